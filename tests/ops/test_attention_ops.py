"""Attention against a loop in NumPy, and native kernels against the definition, under every structured mask."""

import contextlib
import functools
import itertools
import sys

import keras
import numpy as np
import pytest
from cases import close, normal, tensors
from keras import ops

import keras_seq
from keras_seq import backend
from keras_seq import ops as seq_ops

B, HEADS, SHARED, D, VALUE_D = 3, 4, 2, 8, 5
SHORT, LONG = 9, 161  # steps: for the loop in NumPy; for several blocks of the kernels and a remainder
TORCH = keras.config.backend() == "torch"
KERNEL = sys.modules[backend.current().attention.__module__]


def key_mask(keys, pattern="holes"):
    """One row without a valid key."""
    index, rng = np.arange(keys), np.random.default_rng(5)
    lengths = np.array([[keys], [keys // 3], [0]])
    return {
        "right": index < lengths,
        "left": index >= keys - lengths,
        "holes": (rng.random((B, keys)) < 0.6) & (lengths > 0),
    }[pattern]


def lengths(keys):
    return np.array([keys, keys // 3, 0], "int32")


def some_positions(size, seed=0):
    """Increasing, with gaps."""
    return np.random.default_rng(seed).integers(1, 4, (B, size)).cumsum(1).astype("int32") - 3


def shuffled(size, seed=0):
    return np.random.default_rng(seed).permuted(np.tile(np.arange(size, dtype="int32"), (B, 1)), axis=1)


def segments(size, count=3):
    return np.sort(np.random.default_rng(6).integers(0, count, (B, size)), axis=1).astype("int32")


def slopes(*_):
    return np.array([0.5, 0.02, 0.1, 0.003], "float32")


def window(keys):
    return max(keys // 12, 2)


# Arguments for a number of queries and of keys:
STRUCTURES = {
    "none": lambda q, k: {},
    "causal": lambda q, k: {"causal": True},
    "scale": lambda q, k: {"scale": 0.3, "causal": True},
    "soft cap": lambda q, k: {"soft_cap": 1.5, "causal": True},
    "lengths": lambda q, k: {"lengths": lengths(k)},
    "lengths, causal": lambda q, k: {"lengths": lengths(k), "causal": True},
    "key mask": lambda q, k: {"key_mask": key_mask(k)},
    "key mask on the right, causal": lambda q, k: {"key_mask": key_mask(k, "right"), "causal": True},
    "key mask on the left, causal": lambda q, k: {"key_mask": key_mask(k, "left"), "causal": True},
    "query positions": lambda q, k: {"query_positions": some_positions(q), "causal": True, "window": window(k)},
    "positions": lambda q, k: {"query_positions": shuffled(q, 1), "key_positions": shuffled(k, 2), "causal": True},
    "key positions": lambda q, k: {"key_positions": shuffled(k, 2), "causal": True, "window": window(k), "sinks": 2},
    "segments": lambda q, k: {"query_segments": segments(q), "key_segments": segments(k)},
    "window": lambda q, k: {"window": window(k)},
    "window, causal": lambda q, k: {"window": window(k), "causal": True},
    "window, sinks": lambda q, k: {"window": window(k), "sinks": 3},
    "window, sinks, causal": lambda q, k: {"window": window(k), "sinks": 3, "causal": True},
    "window, lengths": lambda q, k: {"window": window(k), "lengths": lengths(k), "causal": True},
    "slopes": lambda q, k: {"slopes": slopes()},
    "slopes, causal": lambda q, k: {"slopes": slopes(), "causal": True},
    "all": lambda q, k: {
        "causal": True,
        "key_mask": key_mask(k),
        "query_positions": some_positions(q),
        "key_positions": some_positions(k),
        "query_segments": segments(q, 2),
        "key_segments": segments(k, 2),
        "window": window(k),
        "sinks": 3,
        "slopes": slopes(),
        "soft_cap": 2.0,
        "scale": 0.4,
    },
    "all without positions": lambda q, k: {
        "causal": True,
        "key_mask": key_mask(k),
        "lengths": lengths(k),
        "window": window(k),
        "sinks": 3,
        "slopes": slopes(),
        "soft_cap": 2.0,
    },
}
OF_EQUALLY_MANY = {
    "segments of the queries, causal": lambda q, k: {"query_segments": segments(q), "causal": True},
    "key mask, query positions, causal": lambda q, k: {
        "key_mask": key_mask(k, "left"),
        "query_positions": some_positions(q),
        "causal": True,
    },
}
WHOLE = {  # of queries times keys
    "attention mask": lambda q, k: {"attention_mask": np.random.default_rng(3).random((B, q, k)) < 0.4},
    "bias": lambda q, k: {"bias": normal(1, HEADS, q, k, seed=8)},
    "bias, causal, key mask": lambda q, k: {"bias": normal(B, 1, q, k), "causal": True, "key_mask": key_mask(k)},
}
FOR_FEWER = (
    *("causal", "lengths", "lengths, causal", "positions", "key positions", "segments", "window, sinks"),
    *("window, sinks, causal", "window, lengths", "slopes, causal", "all", "all without positions"),
)
DIFFERENTIABLE = "query", "key", "value", "slopes", "bias"


def arguments(structure, keys, fewer=False, shared=SHARED, value_size=VALUE_D, scale=1.0):
    """Arrays with gradients, those without, and options."""
    queries = keys // 2 if fewer else keys
    given = {**STRUCTURES, **OF_EQUALLY_MANY, **WHOLE}[structure](queries, keys)
    given |= {
        "query": scale * normal(B, HEADS, queries, D, seed=1),
        "key": scale * normal(B, shared, keys, D, seed=2),
        "value": normal(B, shared, keys, value_size, seed=3),
    }
    values = {k: given.pop(k) for k in DIFFERENTIABLE if k in given}
    options = {k: given.pop(k) for k in list(given) if not isinstance(given[k], np.ndarray)}
    return values, given, options


def in_numpy(query, key, value, **given):
    """Query by query and key by key, in float64."""
    rows, heads, queries, size = query.shape
    keys, causal, sinks = key.shape[2], given.get("causal", False), given.get("sinks", 0)
    key, value = (np.repeat(x, heads // key.shape[1], 1).astype("float64") for x in (key, value))
    y, weights = np.zeros((rows, heads, queries, value.shape[3])), np.zeros((rows, heads, queries, keys))
    for b, h, q in np.ndindex(rows, heads, queries):
        length = given["lengths"][b] if "lengths" in given else keys
        at = given["query_positions"][b, q] if "query_positions" in given else length - queries + q
        scores = {}
        for k in range(keys):
            key_at = k
            if "key_positions" in given:
                key_at = given["key_positions"][b, k]
            elif "query_positions" in given and queries == keys:
                key_at = given["query_positions"][b, k]
            seen = k < length and not (causal and key_at > at)
            if "window" in given:
                seen = seen and (abs(at - key_at) < given["window"] or (sinks and key_at < sinks))
            if "key_mask" in given:
                seen = seen and given["key_mask"][b, k]
            if "query_segments" in given:
                seen = (
                    seen and given["query_segments"][b, q] == given.get("key_segments", given["query_segments"])[b, k]
                )
            if "attention_mask" in given:
                seen = seen and given["attention_mask"][b, q, k]
            if not seen:
                continue
            score = query[b, h, q].astype("float64") @ key[b, h, k] * given.get("scale", size**-0.5)
            if "soft_cap" in given:
                score = given["soft_cap"] * np.tanh(score / given["soft_cap"])
            if "bias" in given:
                score += np.broadcast_to(given["bias"], (rows, heads, queries, keys))[b, h, q, k]
            if "slopes" in given:
                score -= given["slopes"][h] * abs(int(at) - int(key_at))
            scores[k] = score
        total = sum(np.exp(s - max(scores.values())) for s in scores.values())
        for k, s in scores.items():
            weights[b, h, q, k] = np.exp(s - max(scores.values())) / total
            y[b, h, q] += weights[b, h, q, k] * value[b, h, k]
    return y, weights


@functools.cache
def gradients_of(mode, options, sizes):
    """Compiled once for options and sizes: of blocks, which the kernels read while they are compiled."""

    def loss(values, projection, given):
        with keras_seq.kernels(mode):
            y = seq_ops.attention(*(values[k] for k in ("query", "key", "value")), **options_of(values, given))
        return ops.sum(ops.cast(y, "float32") * projection), y

    def options_of(values, given):
        return {k: v for k, v in values.items() if k in ("slopes", "bias")} | given | dict(options)

    compiled = backend.current().gradients(loss, keras.layers.Layer())

    def gradients(values, projection, given):
        y, _, d_values = compiled(*tensors((values, projection, given)))
        return {"y": y, **{f"d {k}": d for k, d in d_values.items()}}

    return gradients


def run(mode, values, given, options):
    """Outputs and gradients. In causal self-attention what padded queries give is not promised, so not compared."""
    queries, keys = values["query"].shape[2], values["key"].shape[2]
    projection = normal(B, HEADS, queries, values["value"].shape[3], seed=7)
    counted = np.ones((B, queries), bool)
    if options.get("causal") and "key_mask" in given and queries == keys:
        counted = given["key_mask"]
    counted = counted[:, None, :, None]
    sizes = str(KERNEL._BLOCK), getattr(KERNEL, "_PARTS", None)
    result = gradients_of(mode, tuple(options.items()), sizes)(values, projection * counted, given)
    return result | {"y": ops.where(counted, result["y"], 0.0)}


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of so few queries that there are several, in loops."""
    monkeypatch.setattr(KERNEL, "_BLOCK", {"cpu": 64} if TORCH else 64)
    monkeypatch.setattr(KERNEL, "_PARTS", 2, raising=False)


def takes(structure):
    return TORCH or structure not in WHOLE


def compared(values, given, options):
    expected, got = (run(mode, values, given, options) for mode in ("reference", "native"))
    assert got.keys() == expected.keys()
    for name in expected:
        close(got[name], expected[name], 1e-5, name)


@pytest.mark.parametrize("fewer", [False, True], ids=["as many queries", "fewer queries"])
@pytest.mark.parametrize("structure", [*STRUCTURES, *OF_EQUALLY_MANY, *WHOLE])
def test_definition_equals_numpy(structure, fewer):
    if fewer and structure in OF_EQUALLY_MANY:
        pytest.skip("for as many queries as keys")
    values, given, options = arguments(structure, SHORT, fewer)
    with keras_seq.kernels("reference"):
        got = seq_ops.attention(**tensors(values), **tensors(given), **options, return_weights=True)
    close(got, in_numpy(**values, **given, **options), 1e-5)


@pytest.mark.parametrize("structure", [s for s in (*STRUCTURES, *OF_EQUALLY_MANY, *WHOLE) if takes(s)])
def test_kernel_equals_definition(structure, small_blocks):
    compared(*arguments(structure, LONG))


@pytest.mark.parametrize("structure", [s for s in (*FOR_FEWER, *WHOLE) if takes(s)])
def test_kernel_of_fewer_queries_equals_definition(structure, small_blocks):
    compared(*arguments(structure, LONG, fewer=True))


@pytest.mark.parametrize("structure", ["causal", "window, sinks, causal"])
def test_kernel_without_loops_equals_definition(structure, monkeypatch):
    monkeypatch.setattr(KERNEL, "_BLOCK", {"cpu": 64} if TORCH else 64)
    compared(*arguments(structure, LONG))


@pytest.mark.parametrize(("shared", "value_size"), [(1, 2 * D), (HEADS, D)])
def test_kernel_of_other_heads_equals_definition(shared, value_size, small_blocks):
    compared(*arguments("all", LONG, shared=shared, value_size=value_size))


@pytest.mark.skipif(not TORCH, reason="in shorter sequences only PyTorch's kernel does otherwise")
@pytest.mark.parametrize("structure", [*STRUCTURES, *OF_EQUALLY_MANY, *WHOLE])
def test_kernel_of_short_sequences_equals_definition(structure):
    compared(*arguments(structure, 24))
    if structure not in OF_EQUALLY_MANY:
        compared(*arguments(structure, 24, fewer=True))


@pytest.mark.parametrize("structure", ["lengths, causal", "key mask", "positions"])
def test_a_query_that_sees_nothing_gives_0(structure, small_blocks):
    """With scores of a usual size, and with large ones, of which the definition's softmax takes one."""
    for mode, scale in itertools.product(("reference", "native"), (1.0, 300.0)):
        values, given, options = arguments(structure, LONG, scale=scale)
        blind = np.zeros((B, LONG), bool)
        if structure == "positions":
            blind = given["query_positions"] < given["key_positions"].min(1, keepdims=True)
        else:
            blind[2] = True
        result = {k: ops.convert_to_numpy(v) for k, v in run(mode, values, given, options).items()}
        for name, array in result.items():
            assert np.isfinite(array).all(), name
        for name in ("y", "d query"):
            assert (np.moveaxis(result[name], 1, 2)[blind] == 0).all(), name
        if structure != "positions":
            assert (result["d key"][2] == 0).all()
            assert (result["d value"][2] == 0).all()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_with_a_softmax_of_float32(dtype, small_blocks):
    values, given, options = arguments("all", LONG)
    halves = {k: ops.cast(v, dtype) for k, v in values.items()}
    rounded = {k: ops.cast(v, "float32") for k, v in halves.items()}
    got, expected = run("native", halves, given, options), run("reference", rounded, given, options)
    for name, array in got.items():
        assert keras.backend.standardize_dtype(array.dtype) == dtype, name
        close(ops.cast(array, "float32"), expected[name], {"bfloat16": 2e-2, "float16": 3e-3}[dtype], name)


@pytest.mark.parametrize("options", [{}, {"causal": True, "window": 20, "sinks": 2}], ids=["plain", "window"])
def test_eager_equals_compiled(options, small_blocks):
    values = tensors(arguments("none", LONG)[0])
    expected = run("reference", values, {}, options)["y"]
    for _ in range(2):
        with keras_seq.kernels("native") as ran, compilations() as events:
            close(seq_ops.attention(**values, **options), expected, 1e-5)
        assert ran == [("attention", "native", None)]
    assert not events  # at the second call


@contextlib.contextmanager
def compilations():
    """A list of those of JAX."""
    events = []
    if keras.config.backend() != "jax":
        yield events
        return
    import jax

    def listen(event, *_, **__):
        if "backend_compile" in event:
            events.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield events
    jax.monitoring.unregister_event_duration_listener(listen)


@pytest.mark.skipif(keras.config.backend() != "tensorflow", reason="there are no two ways to compile")
@pytest.mark.parametrize("structure", ["causal", "slopes, causal", "window, sinks, causal"])
def test_xla_equals_the_definition(structure, monkeypatch):
    import tensorflow as tf

    monkeypatch.setattr(KERNEL, "_BLOCK", 16)
    monkeypatch.setattr(KERNEL, "_PARTS", 4)  # loops, and enough of them for XLA to fold what goes through unchanged
    values, given, options = arguments(structure, LONG)
    expected = run("reference", values, given, options)
    compiled = tf.function(gradients_of("native", tuple(options.items()), "XLA"), jit_compile=True)
    projection = normal(B, HEADS, LONG, VALUE_D, seed=7)
    got = compiled(*tensors((values, projection, given)))
    for name in expected:
        close(got[name], expected[name], 1e-5, name)


@pytest.mark.parametrize("batch", [None, B])
def test_unknown_sizes(batch, small_blocks):
    """Of the batch: the kernel runs. Of the time: it runs where sizes are told when it is called."""
    values, _, options = arguments("window, sinks, causal", LONG)
    expected = run("reference", values, {}, options)["y"]
    for time in (LONG, None):
        inputs = {k: keras.Input((v.shape[1], time, v.shape[3]), batch, name=k) for k, v in values.items()}
        layer = keras.layers.Lambda(lambda inputs: seq_ops.attention(**inputs, **options))
        model = keras.Model(inputs, layer(inputs))
        close(model(tensors(values)), expected, 1e-5)
        close(model.predict(values, verbose=0), expected, 1e-5)


def test_inside_of_remat_and_loops(small_blocks):
    values, _, options = arguments("slopes, causal", LONG // 2, value_size=D)
    projection, layer = normal(2, *values["query"].shape), keras.layers.Layer()

    def loss(values, projection, remat, mode):
        def attend(query, key, value, slopes):
            with keras_seq.kernels(mode):
                return seq_ops.attention(query, key, value, slopes=slopes, **options)

        def step(query, _):
            query = attend(query, *(values[k] for k in ("key", "value", "slopes")))
            return query, query

        attend = keras.remat(attend) if remat else attend
        last, ys = seq_ops.scan(step, values["query"], projection)
        return ops.sum(ys * projection), last

    def result(**options):
        return backend.current().gradients(functools.partial(loss, **options), layer)(*tensors((values, projection)))

    expected = result(remat=False, mode="reference")
    for remat in (False, True):
        close(result(remat=remat, mode="native"), expected, 1e-5)


@pytest.mark.parametrize(
    ("options", "reason"),
    [({"return_weights": True}, "the weights are asked for"), ({"dropout": lambda weights: weights}, "dropout")],
)
def test_kernel_says_what_it_cannot_take(options, reason):
    values, *_ = arguments("none", 32)
    with keras_seq.kernels("native"), pytest.raises(NotImplementedError, match=reason):
        seq_ops.attention(**tensors(values), **options)
    with keras_seq.kernels("auto") as ran:
        seq_ops.attention(**tensors(values), **options)
    assert [(r.op, r.path) for r in ran] == [("attention", "reference")]
