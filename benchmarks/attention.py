"""How fast is attention, forward and backward? Against each backend's own, and against keras.layers.

    KERAS_BACKEND=torch python benchmarks/attention.py [--quick] [--only NAME] [--json FILE]

On one thread of one core. `--only` takes the rows whose name contains NAME. `--quick` runs every second row in a tiny
shape, to see that everything works: its numbers mean nothing. Before a row is timed, the outputs of its contenders from
the same weights must agree to 1e-5 where nothing is padded.

How to read it: a shape is batch x heads x time x size of a head. `ratio` is the time of a contender divided by that of
the first contender of its row, in the same round, median over rounds: 2 beside another one says that keras_seq takes
half its time. `required` is what we promise of that ratio; rows without are for information. The contender "again" is
the first one under another name: its ratio shows the noise. `note` tells which kernels keras_seq took.

Rows: `op` attention of given queries, keys and values, with the gradients of all three; `layer` MultiHeadAttention of a
sequence to itself, with the gradients of the sequence and of all weights; `memory` the temporary memory of a compiled
`op`, as XLA tells it. All are causal. Each is one function of arrays, compiled on JAX (`jax.jit`) and on TensorFlow
(`tf.function`, with XLA or as a graph).
"""

import argparse
from functools import partial

import numpy as np
import timing

if __name__ == "__main__":
    timing.one_thread()  # before a framework is imported

import keras
from gradients import differentiated, normal

import keras_seq
from keras_seq.ops import attention

BACKEND = keras.config.backend()
OURS, KERAS = "keras_seq", "keras.layers"
NATIVE = {"torch": "torch SDPA", "jax": "jax.nn", "tensorflow": "keras.ops"}[BACKEND]
UNWINDOWED = "keras_seq, no window"
WINDOW = 256

SHORT, MEDIUM, LONG, TINY = (4, 6, 128, 64), (4, 6, 512, 64), (1, 6, 2048, 64), (2, 2, 32, 8)
ONE, ONE_1024, TWO = (1, 6, 512, 64), (1, 6, 1024, 64), (2, 6, 2048, 64)

# Block, shape, whether padded on the right, window, bound of the ratio or None, options.
ROWS = {
    "torch": [
        *(("op", shape, False, None, ">= 0.9524", {}) for shape in (SHORT, MEDIUM, LONG)),
        *(("op", shape, True, None, None, {}) for shape in (MEDIUM, LONG)),
        ("op", LONG, False, WINDOW, None, {}),
        ("layer", LONG, False, None, None, {}),
        ("layer", LONG, True, None, ">= 1.667", {}),
        ("layer", TWO, True, None, ">= 1.667", {}),
        ("layer", LONG, False, WINDOW, None, {}),
    ],
    "jax": [
        ("op", SHORT, False, None, None, {}),
        *(("op", shape, padded, None, ">= 2", {}) for padded in (False, True) for shape in (MEDIUM, LONG)),
        *(("memory", shape, padded, None, ">= 4", {}) for padded in (False, True) for shape in (MEDIUM, LONG)),
        ("op", LONG, False, WINDOW, None, {}),
        ("memory", LONG, False, WINDOW, None, {}),
        ("layer", LONG, True, None, None, {}),
    ],
    "tensorflow": [
        ("layer", ONE, False, None, ">= 1.176", {"xla": True}),
        *(("layer", shape, False, None, ">= 1.667", {"xla": True}) for shape in (ONE_1024, LONG)),
        ("layer", LONG, True, None, None, {"xla": True}),
        *(("layer", shape, False, None, None, {"xla": False}) for shape in (ONE, ONE_1024, LONG)),
        ("op", LONG, False, None, None, {"xla": True}),
        ("op", LONG, False, None, None, {"xla": False}),
        *(("layer", LONG, False, WINDOW, None, {"xla": xla}) for xla in (True, False)),
    ],
}[BACKEND]


# Contenders:


def valid_steps(shape, padded):
    """`(b, t)` bool, or None: each row has three quarters of the steps, or, from the second row on, half of them."""
    batch, _, time, _ = shape
    if not padded:
        return None
    return np.arange(time) < np.array([time * 3 // 4, *[time // 2] * (batch - 1)])[:, None]


def op(library, shape, padded=False, window=None, **options):
    """Attention alone; what the padded queries give does not count."""
    mask = valid_steps(shape, padded)
    arrays = [normal(*shape, seed=i) for i in range(3)]
    projection = normal(*shape, seed=3)
    if mask is not None:
        projection *= mask[:, None, :, None]
    function = {OURS: ours, NATIVE: {"torch": sdpa, "jax": jax_attention, "tensorflow": keras_attention}[BACKEND]}
    return differentiated(partial(function[library], window=window), arrays, mask, projection, **options)


def ours(query, key, value, mask=None, window=None):
    return attention(query, key, value, causal=True, key_mask=mask, window=window)


def sdpa(query, key, value, mask=None, window=None):
    """By its flag for a causal order; else by a mask of queries times keys, as `keras.ops` and most users give it."""
    import torch

    if mask is None and window is None:
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
    seen = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).tril()
    seen = seen if window is None else seen.triu(1 - window)
    seen = seen if mask is None else seen & mask[:, None, None]
    return torch.nn.functional.scaled_dot_product_attention(query, key, value, seen)


def jax_attention(query, key, value, mask=None, window=None):
    import jax

    y = jax.nn.dot_product_attention(
        *(keras.ops.swapaxes(x, 1, 2) for x in (query, key, value)),
        mask=None if mask is None else mask[:, None, None],
        is_causal=True,
        local_window_size=None if window is None else (window - 1, 0),
    )
    return keras.ops.swapaxes(y, 1, 2)


def keras_attention(query, key, value, mask=None, window=None):
    heads = (keras.ops.swapaxes(x, 1, 2) for x in (query, key, value))
    mask = None if mask is None else mask[:, None, None]
    return keras.ops.swapaxes(keras.ops.dot_product_attention(*heads, mask=mask, is_causal=True), 1, 2)


def layer(library, shape, padded=False, window=None, **options):
    """MultiHeadAttention of a sequence to itself, causal."""
    batch, heads, time, size = shape
    mask, x = valid_steps(shape, padded), normal(batch, time, heads * size, seed=4)
    projection = normal(*x.shape, seed=5)
    if mask is not None:
        x, projection = x * mask[..., None], projection * mask[..., None]
    if library == OURS:
        it = keras_seq.layers.MultiHeadAttention(heads, size, causal=True, window=window)
        it.build(x.shape)
        call = partial(_call_ours, it)
    else:
        it = keras.layers.MultiHeadAttention(heads, size, sliding_window=window)
        it.build(x.shape, x.shape)
        call = partial(_call_keras, it)
    it.set_weights([0.05 * normal(*w.shape, seed=6 + i) for i, w in enumerate(it.get_weights())])
    return differentiated(call, [x], mask, projection, layer=it, **options)


def _call_ours(layer, x, mask):
    return layer(x, mask=mask)


def _call_keras(layer, x, mask):
    masks = {} if mask is None else {"query_mask": mask, "value_mask": mask}
    return layer(x, x, use_causal_mask=True, **masks)


# Rows:


def rows(quick):
    """Names, and the functions of names that measure them."""
    for block, shape, padded, window, bound, options in ROWS:
        if quick:
            shape, window = TINY, window and 4
        make = layer if block == "layer" else op
        other = KERAS if block == "layer" else NATIVE
        contenders = {library: partial(make, library, shape, padded, window, **options) for library in (OURS, other)}
        if window:
            contenders[UNWINDOWED] = partial(make, OURS, shape, padded, **options)
        measure = partial(race, contenders, {other: bound}, valid_steps(shape, padded), make is op, block == "memory")
        yield title(block, shape, padded, window, **options), measure


def title(block, shape, padded, window, xla=None):
    """E.g. `layer 1x6x2048x64 padded XLA`."""
    parts = [block, "x".join(map(str, shape))]
    parts += ["padded"] * bool(padded) + [f"window={window}"] * bool(window)
    return " ".join(parts + ([] if xla is None else ["XLA" if xla else "graph"]))


def race(contenders, required, valid, heads_first, of_memory, *, name, **timing_options):
    """Times `{label: function that makes a Contender}`, after a check that outputs are alike."""
    with keras_seq.kernels("auto") as ran:
        contenders = {label: make() for label, make in contenders.items()}
        outputs = {label: keras.ops.convert_to_numpy(c.outputs()) for label, c in contenders.items()}
    outputs.pop(UNWINDOWED, None)
    timing.agree({k: np.moveaxis(y, 2, 1) if heads_first else y for k, y in outputs.items()}, valid)
    path = "; ".join(sorted({f"{r.op}: {r.path}" + (f", {r.reason}" if r.reason else "") for r in ran}))
    if of_memory:
        samples = {label: [c.memory()] for label, c in contenders.items()}
        return timing.lines(name, samples, required, unit="MiB", path=path)
    samples, notes = timing.measure({label: c.run for label, c in contenders.items()}, **timing_options)
    return timing.lines(name, samples, required, notes=notes, path=path)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="every second row, in tiny shapes")
    parser.add_argument("--only", metavar="NAME", default="", help="rows whose name contains NAME")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args(argv)
    options = {"rounds": 2, "per_round": 0.001} if args.quick else {}
    results = []
    timing.show()
    for name, work in list(rows(args.quick))[:: 2 if args.quick else 1]:
        if args.only in name:
            lines = work(name=name, **options)
            timing.show(lines)
            results += lines
    if args.json:
        timing.save(args.json, results, backend=BACKEND, versions=timing.versions("keras_seq", "keras", BACKEND))
    return results


if __name__ == "__main__":
    main()
