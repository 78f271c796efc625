r"""
# RNN, LSTM, GRU

Three layers read a sequence step by step and carry a hidden state. Here are their equations, the reason why the oldest
of the three forgets, and what the gates of the other two do against it. At the end all three learn the task of
tutorial 1, and you see which of them can.
"""

import os

os.environ.setdefault("KERAS_BACKEND", "jax")  # or "torch", or "tensorflow": before Keras is imported

import keras
import numpy as np
from keras import ops

import keras_seq

keras.utils.set_random_seed(0)

r"""
## The hidden state

A recurrent layer reads \(x_1, x_2, \dots\), one vector per time step. It has one vector of memory, the **hidden state**
\(h\). Each step makes a new one from the input and the old one. In the simple recurrent network (Elman, 1990) that is

\[ h_t = \tanh(W x_t + U h_{t-1} + b), \qquad h_0 = 0. \]

The matrices \(W\), \(U\) and the vector \(b\) are the same at each step. So the layer takes sequences of any length,
and its memory never grows: all that it knows of the past must fit into \(h\).

The task is that of tutorial 1. Each step brings a number and a mark; two numbers of a sequence are marked, and the
answer is their sum. The first of them has to be carried for up to fifty steps.
"""

LENGTH = 50
UNITS = 64


def marked_sums(n, seed):
    """`n` sequences `(n, LENGTH, 2)` of numbers and marks, and the sums `(n, 1)` of the marked numbers."""
    rng = np.random.default_rng(seed)
    numbers, marks = rng.uniform(size=(n, LENGTH)), np.zeros((n, LENGTH))
    first, second = rng.integers(0, LENGTH // 2, n), rng.integers(LENGTH // 2, LENGTH, n)
    marks[np.arange(n), first] = marks[np.arange(n), second] = 1
    x = np.stack([numbers, marks], axis=-1).astype("float32")
    return x, (numbers * marks).sum(axis=1, keepdims=True).astype("float32")


x_test, y_test = marked_sums(1000, seed=2)
rnn = keras_seq.layers.SimpleRNN(UNITS, return_sequences=True)
print("input", x_test[:4].shape, " all states", tuple(rnn(x_test[:4]).shape))

r"""
## Gates

The **LSTM** (Hochreiter & Schmidhuber, 1997; the forget gate is of Gers et al., 2000) keeps a second vector, the memory
\(c\), and changes it by multiplication and addition only:

\[ \begin{aligned}
i_t &= \sigma(W_i x_t + U_i h_{t-1} + b_i) && \text{input gate: how much to write} \\
f_t &= \sigma(W_f x_t + U_f h_{t-1} + b_f) && \text{forget gate: how much to keep} \\
o_t &= \sigma(W_o x_t + U_o h_{t-1} + b_o) && \text{output gate: how much to show} \\
c_t &= f_t \odot c_{t-1} + i_t \odot \tanh(W_g x_t + U_g h_{t-1} + b_g) \\
h_t &= o_t \odot \tanh(c_t)
\end{aligned} \]

\(\sigma\) is the sigmoid, between 0 and 1, and \(\odot\) multiplies element by element. A **gate** is a vector of such
factors, one for each element of the memory, and it depends on the input: with \(f_t = 1\) and \(i_t = 0\) an element is
kept as it is; with \(f_t = 0\) it is deleted.

The **GRU** (Cho et al., 2014) has two gates and no second vector. The update gate \(z\) does what \(f\) and \(1 - i\)
do in the LSTM; the reset gate \(r\) says how much of the old state the new content may use:

\[ \begin{aligned}
z_t &= \sigma(W_z x_t + U_z h_{t-1} + b_z) \\
r_t &= \sigma(W_r x_t + U_r h_{t-1} + b_r) \\
n_t &= \tanh(W_n x_t + b_n + r_t \odot (U_n h_{t-1} + b'_n)) \\
h_t &= z_t \odot h_{t-1} + (1 - z_t) \odot n_t
\end{aligned} \]

The layers are these equations and nothing else. Here is the LSTM in NumPy, with the weights of a layer, where the gates
stand side by side in the order i, f, g, o. It also returns the forget gates, which you will want to see later.
"""


def sigmoid(a):
    return 1 / (1 + np.exp(-a))


def lstm_by_hand(weights, x):
    """The states h and the forget gates f, each `(b, t, units)`, of an LSTM with these weights over `x` `(b, t, d)`."""
    kernel, recurrent_kernel, bias = weights
    h = c = np.zeros((len(x), len(recurrent_kernel)), "float32")
    states, forget_gates = [], []
    for t in range(x.shape[1]):
        i, f, g, o = np.split(x[:, t] @ kernel + h @ recurrent_kernel + bias, 4, axis=1)
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        h = sigmoid(o) * np.tanh(c)
        states.append(h)
        forget_gates.append(sigmoid(f))
    return np.stack(states, axis=1), np.stack(forget_gates, axis=1)


lstm = keras_seq.layers.LSTM(UNITS, return_sequences=True)
y = ops.convert_to_numpy(lstm(x_test[:4]))
by_hand, _ = lstm_by_hand(lstm.get_weights(), x_test[:4])
print(f"layer and equations differ by {np.abs(y - by_hand).max():.1e}")
assert np.allclose(y, by_hand, atol=1e-5)

r"""
## Back-propagation through time

To train, the loss at the end must reach the weights through every step: the loop is laid out as one deep network with a
layer per time step, and differentiated. On the way back from step \(t\) to step \(t - n\) the gradient of the simple
network is multiplied by \(n\) matrices,

\[ \frac{\partial h_t}{\partial h_{t-n}} = \prod_{k=t-n+1}^{t} \operatorname{diag}(1 - h_k^2)\, U . \]

If these factors shrink a vector, \(n\) of them shrink it exponentially: the gradient **vanishes**, and the weights
never hear of what stood far back. If they stretch it, the gradient **explodes** (Bengio et al., 1994; Pascanu et al.,
2013). In the LSTM there is a second way back, along \(c\): one step there is the factor \(f_k\). The GRU has the
same, with \(z_k\). A gate near 1 lets the gradient through.

You can measure it. The layer below adds weights to its input that are 0, so that they change nothing, but the gradient
of such a weight is the gradient of the input it is added to. A step of plain gradient descent with a learning rate of 1
subtracts the gradient from each weight: after one step the weights hold it. The network is as it will be trained: a
recurrent layer, and a `Dense` layer that makes the answer of the last state.
"""

PROBES = 32  # sequences to average over
CELLS = {
    "SimpleRNN": keras_seq.layers.SimpleRNN,
    "LSTM": keras_seq.layers.LSTM,
    "GRU": keras_seq.layers.GRU,
}


class Nudge(keras.layers.Layer):
    def build(self, input_shape):
        self.nudge = self.add_weight(input_shape, "zeros", name="nudge")

    def call(self, x):
        return x + self.nudge


def probe(cell):
    """A model that learns nothing but the nudges of its input."""
    layers = [Nudge(), CELLS[cell](UNITS, trainable=False), keras.layers.Dense(1, trainable=False)]
    model = keras.Sequential([keras.Input(batch_shape=(PROBES, LENGTH, 2)), *layers])
    # The loss is the answer. Keras takes its mean over the batch; a learning rate of PROBES makes it the sum.
    model.compile(keras.optimizers.SGD(learning_rate=float(PROBES)), lambda _, answer: answer)
    return model


def gradients(model, x, weights):
    """The gradient of the answer with respect to each input, as `x` `(PROBES, LENGTH, 2)`, with these weights."""
    model.set_weights([np.zeros(x.shape), *weights])
    model.fit(x, np.zeros((len(x), 1)), batch_size=len(x), shuffle=False, verbose=0)
    return -model.get_weights()[0]


def by_distance(gradient):
    """The mean norm of the gradient after the input n = 0, 1, 2, ... steps before the end."""
    return np.linalg.norm(gradient, axis=-1).mean(axis=0)[::-1]


models, probes = {}, {}
for cell in CELLS:
    models[cell] = keras.Sequential([CELLS[cell](UNITS), keras.layers.Dense(1)])
    models[cell].build((None, LENGTH, 2))
    probes[cell] = probe(cell)

"""
The sequences here are random numbers, once large ones and once the small ones of the task.
"""

large = np.random.default_rng(1).normal(scale=4, size=(PROBES, LENGTH, 2)).astype("float32")
small = x_test[:PROBES]
distance = np.arange(LENGTH)
lines = {}
for cell in CELLS:
    for size, x in ("large", large), ("small", small):
        norms = by_distance(gradients(probes[cell], x, models[cell].get_weights()))
        lines[f"{cell}, {size} inputs"] = distance, norms
        print(f"{cell:9}  {size} inputs  distance 0: {norms[0]:.0e}   distance {LENGTH - 1}: {norms[-1]:.0e}")
keras_seq.plotting.curves(
    lines, "distance in steps", "norm of the gradient", "before training: what the answer owes to the past", log="y"
)

r"""
A straight line down on this logarithmic axis is exponential decay, and before training all of these decay. But they do
so for different reasons.

- The `SimpleRNN` starts with an orthogonal \(U\), which only rotates (Saxe et al., 2013); what shrinks is
  \(1 - h^2\). With small inputs \(h\) stays near 0 and little is lost. With large inputs, that is as soon as it stores
  something distinctly, the gradient vanishes. It cannot both react to what it reads now and keep what it read before,
  because one tanh does both.
- LSTM and GRU hardly mind how large the inputs are. Their lines fall since a fresh gate stands half open, and half of a
  half of a half is soon nothing. But a gate can be opened.

## The bias of the forget gate

With a zero input and state, \(f = \sigma(b_f)\). Jozefowicz et al. (2015) found that LSTMs learn better if \(b_f\)
starts at 1 and not at 0; so does this layer, unless you say `unit_forget_bias=False`. Here is the same LSTM with other
biases, and what is left of a memory after all the steps, \(\sigma(b_f)^n\).
"""

kernel, recurrent_kernel, bias, *dense = models["LSTM"].get_weights()
lines = {}
for forget_bias in (0, 1, 3, 5):
    i, f, g, o = np.split(bias, 4)
    other_bias = np.concatenate([i, np.full_like(f, forget_bias), g, o])
    weights = [kernel, recurrent_kernel, other_bias, *dense]
    lines[f"bias {forget_bias}"] = distance, by_distance(gradients(probes["LSTM"], small, weights))
    factor = sigmoid(forget_bias)
    print(f"bias {forget_bias}: factor {factor:.3f} per step, {factor**LENGTH:.0e} after {LENGTH} steps")
keras_seq.plotting.curves(
    lines,
    "distance in steps",
    "norm of the gradient",
    "an LSTM before training, by the bias of its forget gate",
    log="y",
)

r"""
A bias of 1 is no long memory yet, but the gradient reaches much further than with 0, and training can open the gates
from there. If you know that the memory must last for hundreds of steps, start higher: put a bias of your own into the
weights, as above.

## Training

The three layers learn the sums, each with the same data, optimizer and number of steps. Whoever always answers 1, the
mean of the sums, makes the error that is drawn as a line.
"""

SEQUENCES = 20_000
EPOCHS = 6
x, y = marked_sums(SEQUENCES, seed=1)
baseline = float(np.mean((y_test - 1) ** 2))
errors = {}
for cell, model in models.items():
    model.compile(keras.optimizers.Adam(5e-3, clipnorm=1.0), "mse")
    history = model.fit(x, y, batch_size=100, epochs=EPOCHS, validation_data=(x_test, y_test), verbose=0).history
    errors[cell] = history["val_loss"]
    print(f"{cell:9}  error after each epoch:", *(f"{error:.4f}" for error in errors[cell]))
print(f"always 1   error: {baseline:.4f}")
keras_seq.plotting.curves(
    errors | {"always 1": [baseline] * EPOCHS}, "epoch", "mean squared error", "the sum of two marked numbers", log="y"
)

r"""
GRU and LSTM solve it; the LSTM stays on the line for longer before it falls. The `SimpleRNN` does not leave it: it
learns the mean of the sums and no more. Before training its gradient reached furthest of the three, on these inputs.
But to pick out two numbers of fifty it would have to react to them strongly, and then it forgets.

What have they become? The gradient tells that too. If the answer is the sum of the marked numbers, its gradient with
respect to a number is 1 where the mark stands and 0 elsewhere. Here is one test sequence.
"""

lines = {}
for cell, model in models.items():
    lines[cell] = np.arange(LENGTH), gradients(probes[cell], small, model.get_weights())[0, :, 0]
marked = np.flatnonzero(small[0, :, 1])
print("marked steps:", *marked)
for cell, (_, gradient) in lines.items():
    print(f"{cell:9}  gradient there:", *(f"{g:.2f}" for g in gradient[marked]))
keras_seq.plotting.curves(lines, "time step", "gradient of the answer", "what the answer depends on, after training")

r"""
Two spikes, and nothing between: the gated layers have learnt which numbers to take in, and to keep them.

Look at the forget gates of the LSTM over the same sequence. A row is an element of the memory, a column a time step;
yellow is kept, blue is deleted.
"""

_, forget = lstm_by_hand(models["LSTM"].get_weights()[:3], small[:1])
forget = forget[0][:, np.argsort(-forget[0].mean(axis=0))].T  # (units, time): those that keep most come first
print(f"mean factor of the element that keeps most: {forget[0].mean():.3f}, of all elements: {forget.mean():.3f}")
keras_seq.plotting.heatmap(forget, "time step", "element of the memory", "forget gates of the trained LSTM")

r"""
Most elements stay near the 0.73 that they began with and forget within a few steps. A few at the top come close to 1
once the first mark is read: they hold the number. And the two columns of the marks stand out: the gates react to what
is read.

## Which one?

LSTM and GRU do about equally well on most tasks (Chung et al., 2014). The GRU has about three quarters of the weights,
and here it learns faster. The LSTM can count without bound, since \(c\) is not squashed. Take a
`SimpleRNN` only where the memory need not last. All three have the same call and the same handling of masks and state,
so trying another one is a change of one word.

## What can go wrong

- **`expected ndim=3, found ndim=2`.** The input must be `(batch, time, features)`: one number per step is an axis of
  length 1, `x[..., None]`. In a stack it means that the layer below returned its last state only: all but the last need
  `return_sequences=True`.
- **The loss becomes NaN or jumps.** Gradients explode as they vanish. Clip them (`clipnorm=1.0` in the optimizer), and
  lower the learning rate.
- **The loss does not move for many epochs.** Look where the LSTM left the line above, and give it time. Then try a GRU,
  or begin with shorter sequences.
- **Sequences are padded with zeros, and the result changes.** A zero is an input like any other: the layer goes on
  computing over it. Pass a mask, or put `keras.layers.Masking()` before; tutorial 9 is about that.
- **One layer is slower than its like.** With `activation="relu"` it runs its definition, since the kernels are written
  for tanh. `with keras_seq.kernels() as ran:` around a call tells which ran, and why.
- **Weights from elsewhere give other numbers.** The order of the gates differs: here, as in Keras, it is i, f, g, o and
  z, r, n; PyTorch has r, z, n. Keras's `set_weights` fits as it is, and
  `keras_seq.checkpoints.load_torch_rnn` reorders PyTorch's. A GRU with `reset_after=False` has another bias, and
  other equations.
"""
