"""
# Your first sequence model

A sequence model reads things that come one after another, and remembers. In ten minutes you train one, test it, use it
while the data is still arriving, save it, and load it again. All of it is plain Keras: what you know stays true.
"""

import os

os.environ.setdefault("KERAS_BACKEND", "jax")  # or "torch", or "tensorflow": before Keras is imported

import keras
import numpy as np
from keras import ops

import keras_seq

keras.utils.set_random_seed(0)

"""
## Data

Someone adds up numbers, but only those that a second channel marks. Two of fifty are marked, so the model has to carry
what it saw for up to fifty steps. Hochreiter & Schmidhuber tested the first LSTM with this task in 1997. Whoever
answers 1 each time is off by 0.167 in the mean square: that is the figure to beat.
"""

LENGTH = 50


def marked_sums(n, seed):
    """`n` sequences `(n, LENGTH, 2)` of numbers and marks, and the sums `(n, 1)` of the marked numbers."""
    rng = np.random.default_rng(seed)
    numbers, marks = rng.uniform(size=(n, LENGTH)), np.zeros((n, LENGTH))
    first, second = rng.integers(0, LENGTH // 2, n), rng.integers(LENGTH // 2, LENGTH, n)
    marks[np.arange(n), first] = marks[np.arange(n), second] = 1
    x = np.stack([numbers, marks], axis=-1).astype("float32")
    return x, (numbers * marks).sum(axis=1, keepdims=True).astype("float32")


SEQUENCES = 20_000
x, y = marked_sums(SEQUENCES, seed=1)
x_test, y_test = marked_sums(1000, seed=2)
print("numbers and marks", x.shape, " sums", y.shape)
print(f"always answering 1: {np.mean((y_test - 1) ** 2):.3f}")

"""
## Fit and evaluate

A GRU reads the sequence; a `Dense` layer turns its last state into the answer. `keras_seq.layers.GRU` takes the place
of `keras.layers.GRU`: same arguments, same weights, same numbers, less time.
"""

EPOCHS = 6
model = keras.Sequential([keras_seq.layers.GRU(64), keras.layers.Dense(1)])
model.compile(keras.optimizers.Adam(5e-3, clipnorm=1.0), "mse")
history = model.fit(x, y, batch_size=100, epochs=EPOCHS, validation_data=(x_test, y_test), verbose=2).history

print(f"error of the model: {model.evaluate(x_test, y_test, verbose=0):.4f}")
figure = keras_seq.plotting.curves(history, "epoch", "mean squared error", "the sum of two marked numbers", log="y")

"""
## Stream

Now the numbers come one at a time, and you want an answer at any moment. The layer's `step` takes one time step and the
state so far. The state is a plain value: nothing is hidden in the layer.
"""

gru, dense = model.layers
state = gru.initial_state(batch_size=1)
for t in range(LENGTH):
    h, state = gru.step(x_test[:1, t], state)
    if x_test[0, t, 1] or t == LENGTH - 1:
        print(f"after {t + 1:2} steps the sum is {ops.convert_to_numpy(dense(h))[0, 0]:.3f}")
print(f"true sum:              {y_test[0, 0]:.3f}")

"""
The law of this library: whole, in pieces, or step by step, the numbers are the same. Here are the three.
"""

whole = model.predict(x_test[:1], verbose=0)
_, state = gru(x_test[:1, :20], return_state=True)  # 20 steps, and a state
piece, _ = gru(x_test[:1, 20:], initial_state=state, return_state=True)  # the other 30 go on from there
pieces = ops.convert_to_numpy(dense(piece))
steps = ops.convert_to_numpy(dense(h))
print("whole:", whole, " pieces:", pieces, " steps:", steps)
assert np.allclose(whole, pieces, atol=1e-5)
assert np.allclose(whole, steps, atol=1e-5)

"""
## Save

The file holds layers, weights and the optimizer. It opens on any of the three backends; the optimizer is that of the
backend it was saved on, so to go on training on another one, load with `compile=False` and compile again.
"""

model.save("first.keras")
again = keras.models.load_model("first.keras")
assert np.allclose(again.predict(x_test[:1], verbose=0), whole, atol=1e-6)

"""
## What can go wrong

- **The loss stays at 0.167 at first.** That is the task: until the model has learnt to carry the first
  number, nothing pays. A `SimpleRNN` stays there for good; tutorial 3 shows why.
- **The loss suddenly jumps.** Recurrent models have steep places; `clipnorm=1.0` keeps one batch from throwing the
  weights away.
- **`step` wants `(batch, features)`**, without a time axis. A single number of a single sequence is `x[:1, t]`.
- **A state of the wrong batch size** is refused with an error that names both. Make one with
  `initial_state(batch_size)` for as many sequences as you feed.
- **`KERAS_BACKEND` has no effect.** It is read when Keras is imported: set it before, as the first lines do.
"""
