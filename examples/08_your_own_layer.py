r"""
# Your own layer

You have an idea for a layer over time that the library does not have. Here you write two such layers, one as a cell for
`RNN` and one as a layer of its own, and let the library look for the mistakes. The second then trains, streams, stands
in a stack and is saved like any other.
"""

import os

os.environ.setdefault("KERAS_BACKEND", "jax")  # or "torch", or "tensorflow": before Keras is imported

import keras
import numpy as np
from keras import ops

import keras_seq
from keras_seq import initializers
from keras_seq.testing import CHECKS, check_layer

keras.utils.set_random_seed(0)

r"""
## A cell: one step of time

A recurrent layer is a loop over time, and what stands in the loop is its **cell**: a function of the input of one step
and of the state before it, which gives the output of this step and the next state. If you can write the cell, `RNN`
does the rest.

The **minimal gated unit** (Zhou et al., 2016) is a GRU with one gate \(f\), which both forgets and resets. With
\(x_t\) the input and \(h\) the state,

\[ \begin{aligned}
f_t &= \sigma(x_t W_f + h_{t-1} U_f + b_f) \\
n_t &= \tanh(x_t W_n + (f_t \odot h_{t-1})\, U_n + b_n) \\
h_t &= (1 - f_t) \odot h_{t-1} + f_t \odot n_t
\end{aligned} \]

The cell is a Keras layer with weights. `initial_state` says where it starts. Its output is the new state, so `call`
returns it twice. The initial weights are drawn by the library's initializers, which draw the same numbers on each
backend.
"""


@keras.saving.register_keras_serializable("tutorial")
class MinimalGatedUnit(keras.layers.Layer):
    def __init__(self, units, **kwargs):
        super().__init__(**kwargs)
        self.units = units

    def build(self, input_shape):
        self.kernel = self.add_weight(
            (input_shape[-1], 2 * self.units), initializers.get("glorot_uniform"), name="kernel"
        )
        self.recurrent_f = self.add_weight((self.units, self.units), initializers.get("orthogonal"), name="recurrent_f")
        self.recurrent_n = self.add_weight((self.units, self.units), initializers.get("orthogonal"), name="recurrent_n")
        self.bias = self.add_weight((2 * self.units,), "zeros", name="bias")

    def initial_state(self, batch_size):
        return ops.zeros((batch_size, self.units))

    def call(self, x_t, h):
        x_f, x_n = ops.split(ops.matmul(x_t, self.kernel) + self.bias, 2, axis=-1)
        f = ops.sigmoid(x_f + ops.matmul(h, self.recurrent_f))
        n = ops.tanh(x_n + ops.matmul(f * h, self.recurrent_n))
        h = (1 - f) * h + f * n
        return h, h

    def get_config(self):
        return super().get_config() | {"units": self.units}


x = np.random.default_rng(0).normal(size=(3, 10, 4)).astype("float32")  # (batch, time, features)
mgu = keras_seq.layers.RNN(MinimalGatedUnit(8), return_sequences=True)
y, state = mgu(x, return_state=True)
print("outputs", tuple(y.shape), " state", tuple(state.shape))

"""
The loop, the mask and the steps come from `RNN`. A padded step keeps the state as it is, though the cell knows nothing
of masks. Here the third sequence has only six steps, and the rest is padding: its state is that of the six alone.
"""

mask = np.ones((3, 10), bool)
mask[2, 6:] = False
_, state = mgu(x, mask=mask, return_state=True)
_, alone = mgu(x[2:, :6], return_state=True)
assert np.allclose(ops.convert_to_numpy(state)[2:], ops.convert_to_numpy(alone), atol=1e-6)

state = mgu.initial_state(batch_size=3)
for t in range(10):
    y_t, state = mgu.step(x[:, t], state)
assert np.allclose(ops.convert_to_numpy(y_t), ops.convert_to_numpy(y)[:, -1], atol=1e-6)

r"""
## A layer: the whole sequence

A cell sees one step, so all it computes is computed step by step. Sometimes that is more than needed. In the **minGRU**
(Feng et al., 2024) gate and candidate depend on the input alone:

\[ z_t = \sigma(x_t W_z + b_z), \qquad n_t = x_t W_n + b_n, \qquad
   h_t = (1 - z_t) \odot h_{t-1} + z_t \odot n_t . \]

The products with the matrices can be made for all steps at once, before the loop; only the last equation is in it. For
that you need the whole sequence in hand: derive from `SequenceLayer` and write

- `build(input_shape)`: the weights;
- `initial_state(batch_size)`: the state before the first step, of which the first axis is the batch;
- `advance(x, state, mask, training)`: runs the sequence `x`, shape `(batch, time, ...)`, from a state, and returns the
  outputs and the state after it;
- `compute_output_shape(input_shape)`, if the outputs have another shape than the inputs.

`call`, `step`, `get_config` and `stateful=True` come from the class. This is a first try.
"""


class FirstTry(keras_seq.SequenceLayer):
    def __init__(self, units, **kwargs):
        super().__init__(**kwargs)
        self.units = units

    def build(self, input_shape):
        self.kernel = self.add_weight(
            (input_shape[-1], 2 * self.units), initializers.get("glorot_uniform"), name="kernel"
        )
        self.bias = self.add_weight((2 * self.units,), "zeros", name="bias")

    def compute_output_shape(self, input_shape):
        return (*input_shape[:-1], self.units)

    def initial_state(self, batch_size):
        return ops.zeros((batch_size, self.units), self.state_dtype)

    def gates(self, x):
        """z and n of all steps at once, in the dtype of the state."""
        z, n = ops.split(ops.matmul(x, self.kernel) + self.bias, 2, axis=-1)
        return ops.cast(ops.sigmoid(z), self.state_dtype), ops.cast(n, self.state_dtype)

    def advance(self, x, state, mask=None, training=False):
        z, n = self.gates(x)
        h, outputs = self.initial_state(ops.shape(x)[0]), []
        for t in range(x.shape[1]):
            h = (1 - z[:, t]) * h + z[:, t] * n[:, t]
            outputs.append(h)
        return ops.cast(ops.stack(outputs, axis=1), self.compute_dtype), h


print(tuple(FirstTry(8)(x).shape))

"""
It runs. It even trains, on sequences of one length. Is it right? `check_layer` takes a function that makes a new layer
each time, and puts the layer through the contract of the library. It raises an `AssertionError` that names the check
and what went wrong.
"""


def mistake(make_layer, checks=CHECKS):
    """What `check_layer` says of a layer."""
    try:
        check_layer(make_layer, checks=checks)
    except AssertionError as error:
        return str(error).replace("\033[1m", "").replace("\033[0m", "")  # without Keras's bold letters
    return "no mistake found"


print(mistake(lambda: FirstTry(8)))

"""
Most of this is Keras's; the line in the middle counts. The length of a sequence may be unknown when a model is built,
as in `keras.Input((None, 4))`, and a Python loop cannot count to an unknown number. (PyTorch knows all lengths, and
there you see the next mistake at once.) Where it can count, it writes each step into the compiled program, which then
takes the longer to compile the longer the sequence is.

`keras_seq.ops.masked_scan` is the loop of each backend: it takes the function of one step, the state, and what the
steps read. `read` says what to show of the state as the output of a step.
"""


def min_gru_step(h, inputs):
    z, n = inputs
    return (1 - z) * h + z * n


class SecondTry(FirstTry):
    def advance(self, x, state, mask=None, training=False):
        h = self.initial_state(ops.shape(x)[0])
        y, h = keras_seq.ops.masked_scan(min_gru_step, h, self.gates(x), read=lambda h: h)
        return ops.cast(y, self.compute_dtype), h


print(mistake(lambda: SecondTry(8)))

"""
In pieces of 1, 2 and 4 steps the sequence gives other outputs `y` than in one piece. Each piece must go on from the
state that the one before left; this layer begins anew with each call. Training would not have shown it, as there a
sequence is one piece, but `step` would have forgotten everything at each step. So start from `state`:
"""


class ThirdTry(FirstTry):
    def advance(self, x, state, mask=None, training=False):
        y, state = keras_seq.ops.masked_scan(min_gru_step, state, self.gates(x), read=lambda h: h)
        return ops.cast(y, self.compute_dtype), state


check_mask = next(check for check in CHECKS if check.__name__ == "check_mask")
print(mistake(lambda: ThirdTry(8), checks=[check_mask]))

"""
While you work on one thing, its check alone is quicker. This one compares each row of a padded batch with its valid
steps alone. They differ: the layer goes on to compute over the padding. The state must stop there. `masked_scan` does
that if it gets the mask. Now the layer is right, here in one piece, and registered, so that it can be saved.
"""

CHECKED = 13


@keras.saving.register_keras_serializable("tutorial")
class MinGRU(keras_seq.SequenceLayer):
    def __init__(self, units, **kwargs):
        super().__init__(**kwargs)
        self.units = units

    def build(self, input_shape):
        self.kernel = self.add_weight(
            (input_shape[-1], 2 * self.units), initializers.get("glorot_uniform"), name="kernel"
        )
        self.bias = self.add_weight((2 * self.units,), "zeros", name="bias")

    def compute_output_shape(self, input_shape):
        return (*input_shape[:-1], self.units)

    def initial_state(self, batch_size):
        return ops.zeros((batch_size, self.units), self.state_dtype)

    def advance(self, x, state, mask=None, training=False):
        z, n = ops.split(ops.matmul(x, self.kernel) + self.bias, 2, axis=-1)
        inputs = ops.cast(ops.sigmoid(z), self.state_dtype), ops.cast(n, self.state_dtype)
        y, state = keras_seq.ops.masked_scan(min_gru_step, state, inputs, mask, read=lambda h: h)
        return ops.cast(y, self.compute_dtype), state


check_layer(lambda: MinGRU(8), checks=CHECKS[:CHECKED])
check_layer(lambda: keras_seq.layers.RNN(MinimalGatedUnit(4), return_sequences=True), checks=CHECKS[:CHECKED])
print("both layers pass", CHECKED, "checks")

"""
## What the checks are

Each check is a promise that somebody will rely on, tried on the backend that is running. "The same" means within 2e-6
of the largest value; `tolerance` changes that.

| check | what it tries |
|---|---|
| `check_shapes` | A model with unknown batch size and length has the shapes that come; the state keeps its form. |
| `check_split` | In pieces or whole: the same outputs, last state, and gradients of weights, inputs and first state. |
| `check_masked_split` | The same with padding on the right, on the left, holes, and a row that is all padding. |
| `check_steps` | `step` after `step` gives what the whole sequence gives, for a batch and for one row. |
| `check_mask` | A padded row gives what its valid steps give alone, and ends in the same state. |
| `check_padding` | NaN in the padding reaches no valid output, no state and no gradient. |
| `check_compiled` | `predict` gives what a plain call gives; a mask that comes with the input is found. |
| `check_precision` | With bfloat16 or float16 outputs are finite and near, and the state stays float32. |
| `check_config` | A copy from the config, and one saved and loaded, give equal outputs. |
| `check_quantized` | The same after `quantize`, if there is something to quantize. |
| `check_fit` | `fit` changes each weight and keeps it finite; `evaluate` agrees with the loss by hand. |
| `check_stateful` | `stateful=True` carries the state from batch to batch, until it is reset. |
| `check_seed` | One seed gives the same weights and the same dropout, another seed gives others. |

A layer that must see the end of the sequence first cannot run in pieces. It says so in its property `needs_future`, a
phrase with the reason. It must then refuse `step` and states, and is held to the rest.
"""

assert len(CHECKS) == 13

"""
## In a stack

`Stack` runs layers one after another, and is one layer itself: its state is the tuple of theirs, and it hands the mask
on. `Residual` adds its input to what the layers inside make of it. Keras's layers that act on each time step alone may
stand between them. They are wrapped in `TimeWise`, which you need not write, except to give such a layer a `step` of
its own.
"""


def small_stack(layer):
    return keras_seq.layers.Stack(
        [
            keras.layers.Dense(16),
            keras_seq.layers.Residual([keras.layers.LayerNormalization(), layer]),
            keras.layers.Dense(1),
        ]
    )


stack = small_stack(MinGRU(16))
whole, last = stack(x, return_state=True)
print("states:", keras.tree.map_structure(lambda s: tuple(s.shape), last))

first, state = stack(x[:, :7], return_state=True)
rest, state = stack(x[:, 7:], initial_state=state, return_state=True)
assert np.allclose(ops.convert_to_numpy(ops.concatenate([first, rest], axis=1)), ops.convert_to_numpy(whole), atol=1e-5)

time_wise = keras_seq.layers.TimeWise(keras.layers.Dense(2))
y_t, no_state = time_wise.step(x[:, 0], time_wise.initial_state(batch_size=3))
print("a Dense layer as a step:", tuple(y_t.shape), no_state)

"""
## Fit

The task: each step brings a number, and now and then a mark. At each step, say which number was marked last. The first
step of a sequence is always marked. Whoever answers 0 each time is off by about 1/3 in the mean square. The minGRU only
has to open its gate at the marks and to keep it closed elsewhere. The cell from above learns beside it.
"""

LENGTH = 40
SEQUENCES = 4000
EPOCHS = 6


def last_marked(n, seed):
    """`n` sequences `(n, LENGTH, 2)` of numbers and marks, and at each step the number marked last `(n, LENGTH, 1)`."""
    rng = np.random.default_rng(seed)
    numbers, marks = rng.uniform(-1, 1, (n, LENGTH)), rng.random((n, LENGTH)) < 0.1
    marks[:, 0] = True
    when = np.maximum.accumulate(np.where(marks, np.arange(LENGTH), 0), axis=1)
    inputs = np.stack([numbers, marks], axis=-1)
    return inputs.astype("float32"), np.take_along_axis(numbers, when, axis=1)[..., None].astype("float32")


x, y = last_marked(SEQUENCES, seed=1)
x_test, y_test = last_marked(500, seed=2)
errors, models = {}, {}
for name, layer in {
    "minGRU": MinGRU(16),
    "minimal gated unit": keras_seq.layers.RNN(MinimalGatedUnit(16), return_sequences=True),
}.items():
    models[name] = keras.Sequential([keras.Input((None, 2)), small_stack(layer)])
    models[name].compile(keras.optimizers.Adam(1e-2), "mse")
    history = models[name].fit(x, y, batch_size=50, epochs=EPOCHS, validation_data=(x_test, y_test), verbose=0).history
    errors[name] = history["val_loss"]
    print(f"{name:18}  error after each epoch:", *(f"{error:.4f}" for error in errors[name]))
print(f"always 0            error: {np.mean(y_test**2):.4f}")
figure = keras_seq.plotting.curves(errors, "epoch", "mean squared error", "the number that was marked last", log="y")

"""
Both learn it. The cell multiplies its state by two matrices at each step, the minGRU by none.

## Stream

The trained stack runs step by step without another line of code: one test sequence, as if it were just arriving.
"""

SHOWN = 4  # the test sequence
model = models["minGRU"]
(stack,) = model.layers
state, answers = stack.initial_state(batch_size=1), []
for t in range(LENGTH):
    y_t, state = stack.step(x_test[SHOWN : SHOWN + 1, t], state)
    answers.append(ops.convert_to_numpy(y_t)[0, 0])
assert np.allclose(answers, model.predict(x_test[SHOWN : SHOWN + 1], verbose=0)[0, :, 0], atol=1e-4)

steps = np.arange(LENGTH)
marked = x_test[SHOWN, :, 1] > 0
figure = keras_seq.plotting.curves(
    {"number marked last": (steps, y_test[SHOWN, :, 0]), "answer of the minGRU": (steps, answers)},
    "time step",
    "number",
    f"one test sequence, marked at the steps {', '.join(map(str, steps[marked]))}",
    drawstyle="steps-mid",
)

"""
## Save and load

You did not write a `get_config` for `MinGRU`: the class keeps the arguments of the constructor. (The cell is a plain
Keras layer, and has its own.) The file holds the name under which the layer was registered. A program that loads it
must import the module that defines the layer, so that the name is known.
"""

model.save("own_layer.keras")
again = keras.models.load_model("own_layer.keras")
assert np.allclose(again.predict(x_test[:5], verbose=0), model.predict(x_test[:5], verbose=0), atol=1e-6)
print(again.layers[0].parts[1].parts[1].get_config()["units"], "units")

r"""
## What can go wrong

- **`Could not locate class 'MinGRU'`** when a model is loaded: the module with the class was not imported, or the class
  is not registered. Two classes under one name overwrite each other, so give your package's name to
  `register_keras_serializable`.
- **Zeros are not padding.** An input of zeros is still a step: the gate opens by \(\sigma(b_z)\) and the state fades.
  To multiply `x` by the mask is not enough; the state must be kept. Pass the mask to `masked_scan`, or choose with
  `ops.where`. Never multiply where NaN may stand: 0 times NaN is NaN.
- **`the state is (4, 8) bfloat16`.** With mixed precision the layer summed over time in bfloat16, which rounds small
  steps away. Make states in `self.state_dtype`, and cast what goes into the loop. **`the output is float32`**: cast
  what comes out to `self.compute_dtype`.
- **The state is kept in an attribute**, `self.h = h`. It then belongs to whichever call came last, and the next batch
  has another size. The state goes in and comes out; to carry it from batch to batch is what `stateful=True` is for.
- **A second model for streaming, and its weights do not fit.** People train a GRU layer, build a graph of GRU cells for
  the device, and find that the weights have other names. Here there is no second model: `step` is a method of the layer
  that was trained.
- **`TimeWise takes a Keras layer that acts on each time step alone.`** A convolution or a pooling looks at several
  steps, so it has a state, and Keras's layer does not hand it out. Write it as a `SequenceLayer` that keeps the last
  inputs.
- **It is slower than an LSTM on PyTorch.** There a loop runs in Python, step by step, while `LSTM` and `GRU` have
  kernels. Keep what does not need the state out of the loop.
"""
