"""How fast is RWKV? Against its own definition, keras-hub, attention, and the official package.

    KERAS_BACKEND=torch python benchmarks/rwkv.py [--quick] [--only NAME] [--json FILE]

On one thread of one core. Contenders that are not installed are left out: `pip install rwkv` (which runs on PyTorch,
whatever the backend), and `pip install --no-deps keras-hub` with `pip install kagglehub`. Outputs of contenders of one
row must agree before anything is timed. `--quick` runs tiny shapes, to see that everything works: its numbers mean
nothing.

How to read it: `ratio` is the time of a contender divided by that of the first of its row, in the same round, median
over rounds; `required` is what we promise of it. The contender "again" is the first one under another name: its ratio
shows the noise. TensorFlow is compiled with XLA.

Rows: `core` the recurrence of a version, forward and backward, batch x heads x time x size of a head: in chunks, and
step by step as it is defined; `layer` the time mixing of RWKV-7 against causal keras.layers.MultiHeadAttention of the
same width, with the gradients of all weights; `growth` a core of twice the length against one of half of it, in time
and in memory: what XLA tells of temporary memory on JAX, what TensorFlow allocates, what a process of PyTorch grows by;
`decode` token after token, `prefill` a prompt at once, in a model of 12 layers x 768; `compile` the first step of `fit`
of 12 layers, each for itself and with `scan_layers`, and of 1; `state` the bytes of a state after one token and many.
"""

import argparse
import contextlib
import importlib.metadata
import importlib.util
import io
import itertools
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from functools import partial

import numpy as np
import timing

if __name__ == "__main__":
    timing.one_thread()  # before a framework is imported

import keras
from gradients import differentiated, normal
from keras import ops, tree

import keras_seq
from keras_seq.ops import wkv4, wkv6, wkv7

BACKEND = keras.config.backend()
OURS, STEPS, HUB, ATTENTION, OFFICIAL = "keras_seq", "step by step", "keras-hub", "keras MHA", "rwkv package"
COMPILED = {"xla": True} if BACKEND == "tensorflow" else {}

REQUIRED = {  # of each backend: row: {contender: bound of its ratio}
    "torch": {
        "core 7": {HUB: ">= 50", STEPS: ">= 8"},
        "core 6": {STEPS: ">= 6"},
        "layer": {ATTENTION: ">= 1.176"},
    },
    "jax": {
        "core 7": {HUB: ">= 8", STEPS: ">= 3.5"},
        "core 6": {STEPS: ">= 10"},
        "layer": {ATTENTION: ">= 2.857"},
    },
    "tensorflow": {"core 7": {STEPS: ">= 7"}, "layer": {ATTENTION: ">= 2.857"}},
}[BACKEND]


def official_file():
    """`model.py` of the package `rwkv`, which has the name of this script; None if it or PyTorch is not installed."""
    try:
        importlib.metadata.distribution("torch")
        return importlib.metadata.distribution("rwkv").locate_file("rwkv/model.py")
    except importlib.metadata.PackageNotFoundError:
        return None


# The recurrences:


def inputs(version, shape, seed=0):
    """Arrays as the layers make them, and the function that runs them from an empty state."""
    batch, heads, length, size = shape
    rng = np.random.default_rng(seed)
    x = [rng.normal(size=(batch, length, heads, size)) for _ in range(5)]
    if version == 4:
        k, v = (a.reshape(batch, length, -1) for a in x[:2])
        w, u, empty = -np.ones(k.shape[-1]), np.ones(k.shape[-1]), np.zeros((batch, k.shape[-1]))
        w, u, empty, least = (ops.convert_to_tensor(a.astype("float32")) for a in (w, u, empty, empty - 1e38))
        return as_float32(k, v), lambda k, v: wkv4(k, v, w, u, (empty, empty, least), training=True)[0]
    state = ops.zeros((batch, heads, size, size))
    if version == 6:
        u = ops.ones((heads, size))
        return as_float32(*x[:3], -np.exp(x[3] - 2)), lambda *a: wkv6(*a, u, state, training=True)[0]
    kappa = x[3] / np.linalg.norm(x[3], axis=-1, keepdims=True)
    w, rate = (a / (1 + np.exp(-x[4])) for a in (-np.exp(-0.5), 1))
    arrays = as_float32(x[0], w, x[1], x[2], -kappa, kappa * rate)
    return arrays, lambda *a: wkv7(*a, state, training=True)[0]


def as_float32(*arrays):
    return [a.astype("float32") for a in arrays]


def core(version, shape, mode="native"):
    arrays, run = inputs(version, shape)

    def function(*args):
        with keras_seq.kernels(mode):
            return run(*args[:-1])

    return differentiated(function, arrays, None, normal(*arrays[1].shape, seed=1), **COMPILED)


def hub_core(shape):
    """The recurrence of keras-hub, which takes the logarithm of minus the logarithm of the decay."""
    from keras_hub.src.models.rwkv7.rwkv7_layer import rnn_generalized_delta_rule

    arrays, _ = inputs(7, shape)

    def function(r, w, k, v, a, b, mask):
        return rnn_generalized_delta_rule(r, ops.log(-w), k, v, a, b)[0]

    return differentiated(function, arrays, None, normal(*arrays[1].shape, seed=1), **COMPILED)


# Layers:


def layer(shape):
    batch, heads, length, size = shape
    it = keras_seq.layers.RWKV7TimeMixing(size)
    x = normal(batch, length, heads * size, seed=4)
    it.build(x.shape)
    it.set_weights([w + 0.05 * normal(*w.shape, seed=6 + i) for i, w in enumerate(it.get_weights())])
    return differentiated(lambda x, mask: it(x, training=True), [x], None, normal(*x.shape, seed=5), it, **COMPILED)


def attention(shape):
    batch, heads, length, size = shape
    it = keras.layers.MultiHeadAttention(heads, size)
    x = normal(batch, length, heads * size, seed=4)
    it.build(x.shape, x.shape)
    call = partial(_causal, it)
    return differentiated(call, [x], None, normal(*x.shape, seed=5), it, **COMPILED)


def _causal(it, x, mask):
    return it(x, x, use_causal_mask=True)


# Models:


def checkpoint(folder, layers, d, vocab_size):
    """A model with random weights, as an official file: its path without the ending, and the model."""
    with keras_seq.initializers.without_drawing():
        model = keras_seq.models.RWKV(vocab_size, d, layers, pad_id=None)
        model.build((None, None))
    rng = np.random.default_rng(0)
    for weight in model.weights:
        if len(weight.shape) > 1 and not weight.name.startswith("r_k"):
            weight.assign((weight.shape[0] ** -0.5 * rng.standard_normal(weight.shape)).astype("float32"))
    path = pathlib.Path(folder) / f"rwkv_{layers}_{d}"
    if not path.with_suffix(".pth").exists():
        model.to_checkpoint(path.with_suffix(".pth"))
    return path, model


def official(path):
    """The model of the official package; its settings are read when it is imported."""
    os.environ |= {"RWKV_V7_ON": "1", "RWKV_JIT_ON": "1", "RWKV_CUDA_ON": "0"}
    import torch

    torch.set_num_threads(1)
    if "official_rwkv" not in sys.modules:
        spec = importlib.util.spec_from_file_location("official_rwkv", official_file())
        sys.modules["official_rwkv"] = importlib.util.module_from_spec(spec)
        with contextlib.redirect_stdout(io.StringIO()):
            spec.loader.exec_module(sys.modules["official_rwkv"])
    with contextlib.redirect_stdout(io.StringIO()):
        return sys.modules["official_rwkv"].RWKV_x070(str(path), "cpu fp32")


def decoding(path, model, batch, steps):
    """Functions that generate `steps` tokens after the first, by the most likely each time."""
    prompt = np.full((batch, 1), 5, "int32")

    def ours():
        return model.generate(prompt, steps)[:, -1]

    contenders = {OURS: ours}
    if official_file():
        theirs = official(path)

        def package():  # it takes one sequence at a time
            for _ in range(batch):
                token, state = 5, None
                for _ in range(steps):
                    logits, state = theirs.forward([token], state)
                    token = int(logits.argmax())
            return np.full(batch, token)

        contenders[OFFICIAL] = package
    return contenders


def prefill(path, model, length):
    from keras_seq import backend

    tokens = np.random.default_rng(0).integers(1, model.vocab_size, length)

    def read(tokens):
        state = model.initial_state(1)
        return model(tokens, initial_state=state, return_state=True, training=False, last_only=True)

    run = backend.current().compiled(read, model, **COMPILED)
    given = ops.convert_to_tensor(tokens[None], dtype="int32")
    contenders = {OURS: lambda: ops.convert_to_numpy(run(given)[0])[0, 0]}
    if official_file():
        theirs = official(path)
        contenders[OFFICIAL] = lambda: theirs.forward(list(tokens), None)[0].numpy()
    return contenders


# Rows:


def race(name, contenders, required, tolerance=1e-5, **options):
    if ATTENTION not in contenders:  # which computes something else
        outputs = {k: ops.convert_to_numpy(c.outputs()) for k, c in contenders.items()}
        largest = np.abs(next(iter(outputs.values()))).max()
        timing.agree({k: y / largest for k, y in outputs.items()}, tolerance=tolerance)
    samples, notes = timing.measure({k: c.run for k, c in contenders.items()}, **options)
    return timing.lines(name, samples, required, notes=notes)


def cores(quick, **options):
    shape = (1, 2, 32, 8) if quick else (1, 4, 2048, 64)
    for version in (7, 6, 4):
        contenders = {OURS: core(version, shape), STEPS: core(version, shape, "reference")}
        # On TensorFlow keras-hub makes a graph of each step of the time axis.
        if version == 7 and importlib.util.find_spec("keras_hub") and BACKEND != "tensorflow":
            contenders[HUB] = hub_core(shape)
        title = f"core {version} {'x'.join(map(str, shape))}"
        yield race(title, contenders, REQUIRED.get(f"core {version}"), **options)


def layers(quick, **options):
    for length in [32] if quick else [2048, 8192] if BACKEND == "torch" else [2048]:
        shape = (1, 2, length, 8) if quick else (1, 4, length, 64)
        bound = REQUIRED["layer"] if length != 2048 or BACKEND != "torch" else None
        contenders = {OURS: layer(shape), ATTENTION: attention(shape)}
        yield race(f"layer 7 {'x'.join(map(str, shape))}", contenders, bound, **options)


def of_length(version, length, quick):
    return core(version, (1, 4, length, 8 if quick else 64))


def temporary(version, length, contender, quick):
    """MiB that a core takes while it runs."""
    if contender.memory:
        return contender.memory()
    if BACKEND != "tensorflow":
        contender.run()
        return timing.peak_memory(contender.run)
    # TensorFlow gives nothing back that it has freed; its allocator that counts is chosen when the process begins.
    code = f"import rwkv; print(rwkv.allocated(rwkv.of_length({version}, {length}, {quick}).run))"
    command, environment = [sys.executable, "-c", code], os.environ | {"TF_CPU_ALLOCATOR_USE_BFC": "1"}
    folder = pathlib.Path(__file__).parent
    ran = subprocess.run(command, env=environment, cwd=folder, check=True, stdout=subprocess.PIPE, text=True)
    return float(ran.stdout)


def allocated(run):
    """MiB by which a call of `run` raises what TensorFlow has allocated at most."""
    import tensorflow as tf

    run()
    run()
    before = tf.config.experimental.get_memory_info("CPU:0")["current"]
    tf.config.experimental.reset_memory_stats("CPU:0")
    run()
    return (tf.config.experimental.get_memory_info("CPU:0")["peak"] - before) / 2**20


def growth(quick, **options):
    lengths = [32, 64] if quick else [1024, 2048, 4096, 8192, 16384]
    for version in (7, 6):
        made = {n: of_length(version, n, quick) for n in lengths}
        memory = {n: temporary(version, n, made[n], quick) for n in lengths}
        for half, whole in itertools.pairwise(lengths):
            pair = {f"time {half}": made[half].run, f"time {whole}": made[whole].run}
            samples, notes = timing.measure(pair, **options)
            title = f"growth core {version}"
            yield timing.lines(f"{title} {whole}", samples, {f"time {whole}": "<= 2.15"}, notes=notes)
            samples = {name: [memory[n]] for name, n in zip(pair, (half, whole), strict=True)}
            yield timing.lines(f"{title} {whole}, memory", samples, {f"time {whole}": "<= 2.15"}, unit="MiB")


def models(quick, **options):
    size = (2, 64, 50) if quick else (12, 768, 65536)
    with tempfile.TemporaryDirectory() as folder:
        path, model = checkpoint(folder, *size)
        shape = f"{size[0]}x{size[1]}"
        for batch, bound in {1: ">= 0.95", 4: ">= 2"}.items():
            contenders = decoding(path, model, batch, 4 if quick else 48)
            results = [run() for run in contenders.values()]
            if any((result != results[0]).any() for result in results):
                raise AssertionError(f"The tokens differ: {results}. Not the same work, so not timed.")
            samples, notes = timing.measure(contenders, **options)
            yield timing.lines(f"decode {shape} batch {batch}", samples, {OFFICIAL: bound}, notes=notes)
        contenders = prefill(path, model, 16 if quick else 256)
        timing.agree({name: run() for name, run in contenders.items()}, tolerance=1e-3)
        samples, notes = timing.measure(contenders, **options)
        yield timing.lines(f"prefill {shape} 256 tokens", samples, {OFFICIAL: ">= 3"}, notes=notes)


def states(quick, **options):
    model = keras_seq.models.RWKV(50, 64, 2, pad_id=None)
    model.build((None, None))
    from keras_seq import backend

    step = backend.current().compiled(model.step_valid, model, **COMPILED)
    token, state = ops.convert_to_tensor([5], dtype="int32"), model.initial_state(1)
    sizes = []
    for i in range(101 if quick else 10_001):
        _, state = step(token, state)
        if i % (100 if quick else 10_000) == 0:
            sizes.append(sum(ops.convert_to_numpy(leaf).nbytes for leaf in tree.flatten(state)))
    names = ["1 token", f"{i} tokens"]
    samples = {name: [size / 2**20] for name, size in zip(names, sizes, strict=True)}
    yield timing.lines("state 2x64", samples, {names[1]: "<= 1"}, unit="MiB")


def compilation(quick, **options):
    """The first step of `fit`, with all that it compiles, and the second."""
    scan = [False, True] if BACKEND != "torch" else [False]
    for count, scan_layers in itertools.product((1, 3) if quick else (1, 12), scan):
        if scan_layers and count == 1:
            continue
        model = keras_seq.models.RWKV(50, 64, count, pad_id=None, scan_layers=scan_layers)
        model.build((None, None))
        model.compile(keras_seq.models.rwkv_optimizer(model), jit_compile=BACKEND != "torch")
        tokens = np.random.default_rng(0).integers(1, 50, (2, 32 if quick else 256))
        seconds = []
        for _ in range(2):
            start = time.perf_counter()
            model.train_on_batch(tokens)
            seconds.append(1e3 * (time.perf_counter() - start))
        samples = {"first step": seconds[:1], "second step": seconds[1:]}
        yield timing.lines(f"compile {count}x64" + scan_layers * " scan_layers", samples)


BLOCKS = {"core": cores, "layer": layers, "growth": growth, "models": models, "state": states, "compile": compilation}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny shapes")
    parser.add_argument("--only", metavar="NAME", default="", help=f"one of {', '.join(BLOCKS)}")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args(argv)
    options = {"rounds": 2, "per_round": 0.001} if args.quick else {"rounds": 7}
    results = []
    timing.show()
    for block, rows in BLOCKS.items():
        for lines in rows(args.quick, **options) if args.only in block else ():
            timing.show(lines)
            results += lines
    if args.json:
        timing.save(args.json, results, backend=BACKEND, versions=timing.versions("keras_seq", "keras", BACKEND))
    return results


if __name__ == "__main__":
    main()
