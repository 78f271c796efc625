"""
# One code, three backends

Keras runs on TensorFlow, JAX and PyTorch. A model of this library is written once, starts from the same weights on each
of them, and learns along the same curve. Here you see that, move a trained model from one to another, and learn what
does differ.
"""

import os

os.environ.setdefault("KERAS_BACKEND", "jax")  # or "torch", or "tensorflow": before Keras is imported

import importlib.util
import itertools
import json
import pathlib
import subprocess
import sys

import keras
import numpy as np

import keras_seq

"""
## One program for all of them

A process has one backend: Keras reads `KERAS_BACKEND` when it is imported. To compare three you start three processes.
This is the program that each of them runs; nowhere does it say on which backend it is. Three lines in it make the runs
comparable.

- `set_random_seed` fixes the seed from which the weights are drawn.
- The `Dense` layer gets an initializer of this library. They draw with NumPy, so that one seed gives the same numbers
  everywhere, and the layers of `keras_seq` use them by default. Keras's own draw with the generator of the backend.
- `shuffle=False` keeps the order of the sequences. Otherwise the loader of the backend draws one, each its own.
"""

PROGRAM = """
import json
import sys
import time

import keras
import numpy as np
from keras import ops

import keras_seq


class Clock(keras.callbacks.Callback):
    def __init__(self):
        super().__init__()
        self.seconds = []

    def on_epoch_begin(self, epoch, logs=None):
        self.start = time.perf_counter()

    def on_epoch_end(self, epoch, logs=None):
        self.seconds.append(time.perf_counter() - self.start)


keras.utils.set_random_seed(7)
data = np.load("data.npz")
model = keras.Sequential(
    [
        keras_seq.layers.GRU(32, return_sequences=True),
        keras_seq.layers.LSTM(32),
        keras.layers.Dense(1, kernel_initializer=keras_seq.initializers.GlorotUniform()),
    ]
)
model.build(data["x"].shape)
weights = np.concatenate([w.ravel() for w in model.get_weights()])

model.compile(keras.optimizers.Adam(3e-3), "mse")
clock = Clock()
fit = {"batch_size": 50, "epochs": int(sys.argv[1]), "shuffle": False, "verbose": 0, "callbacks": [clock]}
losses = model.fit(data["x"], data["y"], **fit).history["loss"]

backend = keras.config.backend()
model.save(f"{backend}.keras")
result = {
    "weights": weights.tolist(),
    "losses": losses,
    "predictions": model.predict(data["x"][:50], verbose=0).ravel().tolist(),
    "seconds": clock.seconds,
    "random": ops.convert_to_numpy(keras.random.uniform((3,), seed=7)).tolist(),
}
with open(f"{backend}.json", "w") as file:
    json.dump(result, file)
"""

"""
The data are made here, once, and go to all of them as a file: short sequences, and for each a number that says how
often two of its channels have the same sign. What is installed is run; what is not is left out.
"""

BACKENDS = ("tensorflow", "jax", "torch")
EPOCHS = 60

rng = np.random.default_rng(0)
x = rng.normal(size=(500, 20, 4)).astype("float32")
y = np.tanh(x[:, :, 0] * x[:, :, 1]).sum(axis=1, keepdims=True)
np.savez("data.npz", x=x, y=y)
pathlib.Path("program.py").write_text(PROGRAM)

runs = {}
for backend in BACKENDS:
    if importlib.util.find_spec(backend) is None:
        print(f"{backend} is not installed: left out")
        continue
    environment = os.environ | {"KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "2"}
    subprocess.run([sys.executable, "program.py", str(EPOCHS)], env=environment, check=True)
    runs[backend] = json.loads(pathlib.Path(f"{backend}.json").read_text())
    losses = runs[backend]["losses"]
    print(f"{backend:10}  loss of the first epoch {losses[0]:.5f}, of the last {losses[-1]:.5f}")

"""
## The same weights, the same curve

The weights before training are equal, not nearly but in every bit. The losses begin equal as far as float32 goes, which
holds about seven decimal digits.

In the figure each backend shows a third of the epochs only, each another third. The points make one curve, also where
the loss jumps: a step that was too long for one of them was too long for all.
"""

pairs = list(itertools.combinations(runs, 2))
for a, b in pairs:
    assert runs[a]["weights"] == runs[b]["weights"]
    assert np.allclose(runs[a]["losses"][:5], runs[b]["losses"][:5], rtol=1e-5)
epochs = np.arange(1, EPOCHS + 1)
keras_seq.plotting.curves(
    {backend: (epochs[i::3], run["losses"][i::3]) for i, (backend, run) in enumerate(runs.items())},
    "epoch",
    "mean squared error",
    "one curve",
    log="y",
    marker="o",
    linestyle="none",
)

"""
## How the last digits part

The three compute the same sums in another order, and each addition rounds. Training feeds its results back into itself,
and the differences grow, most where the loss jumps. That is so for any program in floating point. It happens as well
between two machines, or two versions of one backend.
"""

differences = {}
for a, b in pairs:
    first, second = np.array(runs[a]["losses"]), np.array(runs[b]["losses"])
    relative = np.abs(first - second) / first
    differences[f"{a} and {b}"] = np.maximum(relative, 1e-8)  # an axis with a logarithm has no 0
    print(f"{a} and {b}: first epoch {relative[0]:.0e}, largest of all {relative.max():.0e}")
if differences:  # at least two backends are installed
    keras_seq.plotting.curves(differences, "epoch", "relative difference of the loss", "rounding, amplified", log="y")

"""
## A model moves

Each of the processes has saved its model. This process opens all the files, whatever backend it runs on itself. With
`compile=False` it takes the layers and their weights, in which there is nothing of a backend, and leaves the optimizer
where it was.
"""

for backend, run in runs.items():
    model = keras.models.load_model(f"{backend}.keras", compile=False)
    predictions = model.predict(x[:50], verbose=0).ravel()
    difference = np.abs(predictions - run["predictions"]).max()
    print(f"saved on {backend}, opened on {keras.config.backend()}: predictions differ by {difference:.0e}")
    assert difference < 1e-4

"""
So you can train where it is fastest, and serve where it fits in best. To train on after the move, `compile` the model
again.

## What differs

**Speed.** TensorFlow and JAX compile the training step when they meet it for the first time, so the first epoch takes
longer; PyTorch starts at once. Which is fastest later depends on the model, the batch size and the machine: measure
your own. These are the seconds of one machine, the one that made this page.
"""

for backend, run in runs.items():
    print(f"{backend:10}  first epoch {run['seconds'][0]:5.2f} s   median {np.median(run['seconds']):.3f} s")

"""
**Random numbers while training.** Dropout and sampling draw with the generator of the backend. One seed gives the same
numbers in each run on one backend, and others on another. With dropout the curves agree in their course, not in their
digits.
"""

for backend, run in runs.items():
    print(f"{backend:10}  keras.random.uniform, seed 7:", *(f"{u:.4f}" for u in run["random"]))

"""
## What can go wrong

- **A model that was saved on PyTorch does not open, or does not train.** With Keras 3.15 its file names PyTorch's own
  optimizer. Where PyTorch is not installed, `load_model` fails with `Could not deserialize class 'Adam'`; where it is,
  `fit` on another backend fails. Load with `compile=False`, and compile again.
- **The backend is another than you think.** Ask `keras.config.backend()`. The variable `KERAS_BACKEND` must be set
  before the first `import keras` of the process; without it, `~/.keras/keras.json` decides.
- **The same seed, other weights.** Some layer of the model draws with Keras's initializers: `Dense` or `Embedding` with
  their defaults. Give it one of `keras_seq.initializers`, as the program does.
- **The same weights, another curve.** Look for `shuffle`, which is on by default, for dropout, and for a loss that has
  passed a jump. Compare the first steps, not the last.
- **`y.numpy()` or `np.asarray(y)` fails on another backend.** An array of JAX has no `.numpy()`, and PyTorch refuses
  both while a gradient is attached. `keras.ops.convert_to_numpy(y)` works on all three. Inside of a layer use
  `keras.ops` only.
- **Double precision is lost on JAX.** It makes float64 arrays float32 unless `jax_enable_x64` is set. Cast your data to
  float32 yourself, and all backends see the same numbers.
"""
