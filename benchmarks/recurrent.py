"""How fast are LSTM and GRU? Against keras.layers, and against torch.nn on PyTorch.

    KERAS_BACKEND=torch python benchmarks/recurrent.py [--quick] [--only NAME] [--json FILE]

On one thread of one core. `--only` takes the rows whose name contains NAME. `--quick` runs every second row in a tiny
shape, to see that everything works: its numbers mean nothing. Before a row is timed, the outputs of its contenders from
the same weights must agree to 1e-5.

How to read it: a shape is batch x time x features x units. `ratio` is the time of a contender divided by that of the
first contender of its row, in the same round, median over rounds: 4 beside keras.layers says that keras_seq is 4 times
faster. `required` is what we promise of that ratio (of the median itself, on the first line of a row). The contender
"again" is the first one under another name: its ratio shows the noise. `note` tells which kernels keras_seq took.

Rows: `train` a train step (`train_on_batch` on PyTorch, a compiled function of gradients and update on JAX and
TensorFlow), also under a mask; `step` one time step of one sequence, as in streaming; `growth` from 256 to 1024 time
steps; `memory` how far a first train step, compilation included, raises the memory of a fresh process.
"""

import argparse
import subprocess
import sys
from functools import cache, partial
from itertools import product
from typing import NamedTuple

import numpy as np
import timing

if __name__ == "__main__":
    timing.one_thread()  # before a framework is imported

import keras

import keras_seq

BACKEND = keras.config.backend()
OURS, KERAS, NATIVE = "keras_seq", "keras.layers", "torch.nn"
UNMASKED = "keras_seq, no mask"
LAYERS = {OURS: keras_seq.layers, KERAS: keras.layers}
GATES = {"LSTM": 4, "GRU": 3}
MASKS = ("right", "left", "random")

# Shapes: batch, time, features, units.
SHORT, LONG, LONGER, TINY = (32, 128, 128, 256), (8, 512, 64, 128), (8, 1024, 64, 128), (2, 8, 3, 4)

TORCH_TRAIN = {
    ("LSTM", SHORT): {KERAS: ">= 4", NATIVE: ">= 0.9"},
    ("GRU", SHORT): {KERAS: ">= 3", NATIVE: ">= 0.9"},
    ("LSTM", LONG): {KERAS: ">= 15", NATIVE: ">= 0.9"},
    ("GRU", LONG): {KERAS: None, NATIVE: ">= 1.3"},
    ("LSTM", LONGER): {KERAS: ">= 15", NATIVE: ">= 0.9"},
    ("GRU", LONGER): {KERAS: None, NATIVE: ">= 1.3"},
}
TORCH_MASKED = {SHORT: ">= 1.5", LONGER: ">= 8"}
JAX_TRAIN = {SHORT: ">= 1.05", LONGER: ">= 1.3"}
TENSORFLOW_TRAIN = {True: ">= 1.5", False: ">= 1"}  # with XLA, without


class Contender(NamedTuple):
    """`run()` does the work that is timed; `outputs()` are compared, and come from the weights of the beginning."""

    run: object
    outputs: object


# Contenders:


class Data:
    """The same arrays for all contenders: x, target, mask, weights in Keras's layout."""

    def __init__(self, cell, shape, masked=None):
        batch, time, features, units = shape
        rng = np.random.default_rng(0)

        def normal(*shape, scale=1.0):
            return (scale * rng.normal(size=shape)).astype("float32")

        width = GATES[cell] * units
        bias_shape = (2, width) if cell == "GRU" else (width,)
        shapes = (features, width), (units, width), bias_shape
        self.weights = [normal(*shape, scale=0.5 * units**-0.5) for shape in shapes]
        self.x, self.target = normal(batch, time, features), normal(batch, time, units)
        self.mask = padding(masked, batch, time)

    def tensors(self):
        arrays = self.x, self.mask, self.target
        return [None if a is None else keras.ops.convert_to_tensor(a) for a in arrays]


def padding(masked, batch, time):
    rng = np.random.default_rng(1)
    lengths, index = rng.integers(time // 2, time, (batch, 1), endpoint=True), np.arange(time)
    patterns = {"right": index < lengths, "left": index >= time - lengths, "random": rng.random((batch, time)) < 0.75}
    return patterns.get(masked)


def built_layer(library, cell, shape, weights):
    layer = getattr(LAYERS[library], cell)(shape[3], return_sequences=True)
    layer.build((shape[0], None, shape[2]))
    layer.set_weights(weights)
    return layer


def train_torch(library, cell, shape, masked=None):
    data = Data(cell, shape, masked)
    if library == NATIVE:
        return train_torch_native(cell, shape, data)
    layer = built_layer(library, cell, shape, data.weights)
    x = keras.Input(shape[1:3])
    mask = None if data.mask is None else keras.Input(shape[1:2], dtype="bool")
    model = keras.Model(x if mask is None else [x, mask], layer(x, mask=mask))
    model.compile("adam", "mse")
    inputs = data.x if mask is None else [data.x, data.mask]
    return Contender(lambda: model.train_on_batch(inputs, data.target), lambda: model(inputs))


def train_torch_native(cell, shape, data):
    """The loop that a PyTorch user writes; with a mask (right-padded) on packed sequences."""
    import torch
    from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

    layer = getattr(torch.nn, cell)(*shape[2:], batch_first=True)
    kernel, recurrent_kernel, bias = data.weights
    biases = (bias, np.zeros_like(bias)) if cell == "LSTM" else bias
    with torch.no_grad():
        for parameter, weight in zip(layer.parameters(), (kernel.T, recurrent_kernel.T, *biases), strict=True):
            if cell == "GRU":  # its gates are r, z, n; those of Keras z, r, n
                weight = np.concatenate([np.split(weight, 3)[i] for i in (1, 0, 2)])
            parameter.copy_(torch.tensor(weight))
    optimizer = torch.optim.Adam(layer.parameters())
    x, mask, target = data.tensors()
    lengths = None if mask is None else mask.sum(1)

    def outputs():
        if mask is None:
            return layer(x)[0]
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        return pad_packed_sequence(layer(packed)[0], batch_first=True, total_length=shape[1])[0]

    def run():
        optimizer.zero_grad()
        error = (outputs() - target) ** 2
        loss = error.mean() if mask is None else error[mask].mean()
        loss.backward()
        optimizer.step()
        return loss.item()

    return Contender(run, outputs)


def train_jax(library, cell, shape, masked=None):
    import jax

    data = Data(cell, shape, masked)
    layer = built_layer(library, cell, shape, data.weights)

    def loss(weights, fixed, x, mask, target):
        y, _ = layer.stateless_call(weights, fixed, x, mask=mask)
        return ((y - target) ** 2).mean(), y

    @jax.jit
    def step(weights, *args):
        (value, y), gradients = jax.value_and_grad(loss, has_aux=True)(weights, *args)
        return y, value, [w - 0.01 * g for w, g in zip(weights, gradients, strict=True)]

    variables = [[v.value for v in vs] for vs in (layer.trainable_variables, layer.non_trainable_variables)]
    run = partial(step, *variables, *data.tensors())
    return Contender(lambda: jax.block_until_ready(run()), lambda: run()[0])


def train_tensorflow(library, cell, shape, masked=None, xla=True):
    import tensorflow as tf

    data = Data(cell, shape, masked)
    layer = built_layer(library, cell, shape, data.weights)
    variables = [v.value for v in layer.trainable_variables]

    @tf.function(jit_compile=xla)
    def step(x, mask, target):
        with tf.GradientTape() as tape:
            y = layer(x, mask=mask)
            loss = tf.reduce_mean((y - target) ** 2)
        for v, g in zip(variables, tape.gradient(loss, variables), strict=True):
            v.assign_sub(0.01 * g)
        return y, loss

    run = partial(step, *data.tensors())
    return Contender(lambda: run()[1].numpy(), lambda: run()[0])


train = {"torch": train_torch, "jax": train_jax, "tensorflow": train_tensorflow}[BACKEND]


def step(library, cell, shape, compiled=True):
    """One time step; compiled (on PyTorch there is no such thing) or eager."""
    data = Data(cell, shape)
    batch, _, features, units = shape
    x, state = keras.ops.convert_to_tensor(data.x[:, 0]), keras.ops.convert_to_tensor(data.target[:, 0])
    if library == OURS:
        layer = built_layer(library, cell, shape, data.weights)
        call, state = layer.step, (state, state) if cell == "LSTM" else state
    else:
        call = layer = getattr(keras.layers, cell + "Cell")(units)
        layer.build((batch, features))
        layer.set_weights(data.weights)
        state = [state, state] if cell == "LSTM" else [state]
    if BACKEND == "torch":
        import torch

        run = torch.no_grad()(partial(call, x, state))
        return Contender(run, lambda: run()[0])
    if BACKEND == "tensorflow":
        import tensorflow as tf

        run = partial(tf.function(lambda x, state: call(x, state)), x, state)
        return Contender(lambda: run()[0].numpy(), lambda: run()[0])
    import jax

    def pure(weights, x, state):
        with keras.StatelessScope(state_mapping=list(zip(layer.variables, weights, strict=True))):
            return call(x, state)

    weights = [v.value for v in layer.variables]
    run = partial(jax.jit(pure), weights, x, state) if compiled else partial(call, x, state)
    return Contender(lambda: jax.block_until_ready(run()), lambda: run()[0])


# Rows: name, and the function of the name that measures it:


def train_cases():
    """Cell, shape, mask, `{contender beside keras_seq: bound or None}`, options of `train`."""
    if BACKEND == "torch":
        for (cell, shape), required in TORCH_TRAIN.items():
            yield cell, shape, None, required, {}
        for (shape, bound), cell, masked in product(TORCH_MASKED.items(), GATES, MASKS):
            packed = {NATIVE: ">= 1"} if masked == "right" else {}
            yield cell, shape, masked, {KERAS: bound, UNMASKED: ">= 0.8"} | packed, {}
    elif BACKEND == "jax":
        for (shape, bound), cell, masked in product(JAX_TRAIN.items(), GATES, (None, "right")):
            yield cell, shape, masked, {KERAS: bound}, {}
    else:
        for (xla, bound), shape, cell in product(TENSORFLOW_TRAIN.items(), (SHORT, LONGER), GATES):
            yield cell, shape, None, {KERAS: bound}, {"xla": xla}


def train_rows(quick):
    for cell, shape, masked, required, options in train_cases():
        if quick and shape != SHORT:
            continue
        shape = TINY if quick else shape
        contenders = {label: partial(train, label, cell, shape, masked, **options) for label in (OURS, *required)}
        if UNMASKED in required:
            contenders[UNMASKED] = partial(train, OURS, cell, shape)
        measure = partial(race, contenders, required, valid=padding(masked, *shape[:2]))
        yield title("train", cell, shape, masked, **options), measure


def step_rows(quick):
    shape = (1, 1, *TINY[2:]) if quick else (1, 1, 128, 256)
    required = {"torch": {KERAS: ">= 5"}, "jax": {KERAS: ">= 1.5"}, "tensorflow": {}}[BACKEND]
    for cell in GATES:
        name = title("step", cell, shape)
        yield name, partial(race, {library: partial(step, library, cell, shape) for library in LAYERS}, required)
        if BACKEND == "jax":
            eager = {library: partial(step, library, cell, shape, compiled=False) for library in LAYERS}
            yield f"{name} eager", partial(race, eager, {OURS: "<= 10"})
            yield f"{name} eager, 10 calls", partial(compilations, eager[OURS])


def growth_rows(quick):
    times = (4, 16) if quick else (256, 1024)
    batch, _, *sizes = TINY if quick else LONG
    modes = [{"xla": True}, {"xla": False}] if BACKEND == "tensorflow" else [{}]
    for cell, masked, options in product(GATES, (None,) if quick else (None, *MASKS), modes):
        contenders = {f"t = {t}": partial(train, OURS, cell, (batch, t, *sizes), masked, **options) for t in times}
        name = title("growth", cell, (batch, "t", *sizes), masked, **options)
        yield name, partial(race, contenders, {f"t = {times[1]}": "<= 4.6"}, alike=False)


def memory_rows(quick):
    shape = TINY if quick else SHORT
    for cell in GATES if sys.platform == "linux" else ():
        measure = cache(peak) if quick else peak_in_fresh_process
        yield title("memory", cell, shape), partial(memory, cell, shape, measure)


def title(block, cell, shape, masked=None, xla=None):
    """E.g. `train LSTM 8x1024x64x128 mask=right`."""
    mode = "" if xla is None else " XLA" if xla else " graph"
    return f"{block} {cell} {'x'.join(map(str, shape))}" + (f" mask={masked}" if masked else "") + mode


# Measurements:


def race(contenders, required, valid=None, alike=True, *, name, **timing_options):
    """Times `{label: function that makes a Contender}`, after a check that outputs are alike."""
    contenders = {label: make() for label, make in contenders.items()}
    with keras_seq.kernels("auto") as ran:
        outputs = {label: keras.ops.convert_to_numpy(c.outputs()) for label, c in contenders.items()}
    if alike:
        outputs.pop(UNMASKED, None)
        timing.agree(outputs, valid)
    path = "; ".join(sorted({f"{r.op}: {r.path}" + (f", {r.reason}" if r.reason else "") for r in ran}))
    samples, notes = timing.measure({label: c.run for label, c in contenders.items()}, **timing_options)
    return timing.lines(name, samples, required, notes=notes, path=path)


def compilations(make, *, name, **_):
    """How often JAX compiles in 10 calls after the first one."""
    import jax

    events, run = [], make().run
    run()
    jax.monitoring.register_event_duration_secs_listener(lambda event, *_, **__: events.append(event))
    for _ in range(10):
        run()
    count = sum("backend_compile" in event for event in events)
    return timing.lines(name, {OURS: [count]}, {OURS: "<= 0"}, unit="compilations")


def memory(cell, shape, measure, *, name, rounds=3, **_):
    """Peak memory of a train step, from `measure(library, cell, *shape)`."""
    labels = [OURS, OURS + timing.AGAIN, KERAS] + [NATIVE] * (BACKEND == "torch")
    samples = {label: [] for label in labels}
    for label in labels * min(rounds, 3):
        samples[label].append(measure(label.removesuffix(timing.AGAIN), cell, *shape))
    return timing.lines(name, samples, {KERAS: ">= 1"}, unit="MiB")


def peak_in_fresh_process(*arguments):
    command = [sys.executable, __file__, "--memory", *map(str, arguments)]
    return float(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.split()[-1])


def peak(library, cell, *shape):
    train(library, cell, TINY).run()
    return timing.peak_memory(train(library, cell, tuple(map(int, shape))).run)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="every second row, in tiny shapes")
    parser.add_argument("--only", metavar="NAME", default="", help="rows whose name contains NAME")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--memory", nargs=6, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.memory:
        return print(peak(*args.memory))
    options = {"rounds": 2, "per_round": 0.001} if args.quick else {}
    every_second = slice(1, None, 2) if args.quick else slice(None)
    results = []
    timing.show()
    for block in (train_rows, step_rows, growth_rows, memory_rows):
        for name, work in list(block(args.quick))[every_second]:
            if args.only in name:
                lines = work(name=name, **options)
                timing.show(lines)
                results += lines
    if args.json:
        timing.save(args.json, results, backend=BACKEND, versions=timing.versions("keras_seq", "keras", BACKEND))
    return results


if __name__ == "__main__":
    main()
