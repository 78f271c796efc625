"""Positions, sinusoids, rotations and buckets against float64 NumPy, step by step, and against transformers."""

import functools
import math

import keras
import numpy as np
import pytest
from cases import MASKS, B, T, arrays, close, normal, refused
from keras import ops

from keras_seq import backend
from keras_seq.ops import position

HALF_PRECISION = ("bfloat16", "float16")
LONG = 2048


def compiled(function):
    """`function` of arrays, compiled as `fit` compiles it."""
    return backend.current().compiled(function, keras.layers.Layer())


def counted(mask, start):
    """Positions by counting."""
    p = np.zeros(mask.shape, int)
    for row in range(len(mask)):
        seen = start[row]
        for t in range(mask.shape[1]):
            p[row, t] = seen
            seen += mask[row, t]
    return p


def same(got, expected):
    (got,) = arrays(got)
    assert got.dtype == "int32"
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("name", ["right", "left", "holes"])
def test_positions_count_valid_steps(name):
    mask, start = MASKS[name], np.array([0, 3, 5, 100], "int32")
    same(position.positions(start, ops.convert_to_tensor(mask)), counted(mask, start))
    same(position.positions(0, ops.convert_to_tensor(mask)), counted(mask, np.zeros(B, int)))


def test_positions_without_a_mask():
    same(position.positions(np.array([0, 7], "int32"), time=4), [[0, 1, 2, 3], [7, 8, 9, 10]])
    same(position.positions(2, time=3), [[2, 3, 4]])
    refused(lambda: position.positions(0), "mask", "None")


def test_a_valid_step_has_the_position_it_would_have_alone():
    for mask in (MASKS["left"], MASKS["holes"]):
        (got,) = arrays(position.positions(0, ops.convert_to_tensor(mask)))
        for row in range(B):
            np.testing.assert_array_equal(got[row, mask[row]], np.arange(mask[row].sum()))


def test_positions_of_chunks_go_on():
    mask = MASKS["holes"]
    whole = counted(mask, np.zeros(B, int))
    start = np.zeros(B, "int32")
    for piece in (slice(0, 1), slice(1, 4), slice(4, T)):
        same(position.positions(start, ops.convert_to_tensor(mask[:, piece])), whole[:, piece])
        start = start + mask[:, piece].sum(1, dtype="int32")


SEGMENTS = np.array(
    [[1, 1, 1, 2, 2, 3, 3], [0, 0, 0, 0, 0, 0, 0], [5, 4, 3, 3, 2, 2, 2], [1, 1, 2, 2, 1, 1, 0]], "int32"
)


def test_segment_positions_restart():
    expected = [[0, 1, 2, 0, 1, 0, 1], [0, 1, 2, 3, 4, 5, 6], [0, 0, 0, 1, 0, 1, 2], [0, 1, 0, 1, 0, 1, 0]]
    segments = ops.convert_to_tensor(SEGMENTS)
    same(position.segment_positions(segments), expected)
    same(position.segment_positions(segments[:, :1]), np.zeros((4, 1)))
    same(compiled(position.segment_positions)(segments), expected)


def sinusoid(p, d, base=10000.0, interleaved=True):
    """float64, one feature at a time."""
    p, table = np.asarray(p, "float64"), np.zeros((*np.shape(p), d))
    for i in range(d // 2):
        angle = p / base ** (2 * i / d)
        s, c = (2 * i, 2 * i + 1) if interleaved else (i, d // 2 + i)
        table[..., s], table[..., c] = np.sin(angle), np.cos(angle)
    return table


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("base", [10000.0, 50])
def test_sinusoidal(interleaved, base):
    p = np.array([[0, 1, 2], [7, LONG, 30000]], "int32")
    y = position.sinusoidal(p, 6, base, interleaved)
    close(y[:, :, :], sinusoid(p, 6, base, interleaved), 2e-3)  # a float32 of 30000 radians is known to 1e-3
    close(y[:1], sinusoid(p[:1], 6, base, interleaved), 1e-6)
    assert arrays(y)[0].dtype == "float32"
    assert tuple(position.sinusoidal(p[0], 6).shape) == (3, 6)


def test_sinusoidal_refuses():
    refused(lambda: position.sinusoidal(np.arange(3), 5), "d_model", "even", "5")
    refused(lambda: position.sinusoidal(np.arange(3), 0), "d_model", "positive", "0")
    refused(lambda: position.sinusoidal(np.arange(3), 4, base=1), "base", "1")


def test_marian_has_sines_before_cosines():
    modeling = pytest.importorskip("transformers.models.marian.modeling_marian")
    theirs = modeling.MarianSinusoidalPositionalEmbedding(50, 16)
    weight = theirs.create_weight().detach().cpu().numpy()
    close(position.sinusoidal(np.arange(50), 16, interleaved=False), weight, 1e-5)


# The scaling, and what transformers calls it.
SCALINGS = {
    "linear": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 64},
    "yarn attention factor": {"factor": 8.0, "original_max_position_embeddings": 4096, "attention_factor": 1.5},
    "yarn betas": {"factor": 16, "original_max_position_embeddings": 512, "beta_fast": 16, "beta_slow": 2},
    "yarn mscales": {"factor": 40, "original_max_position_embeddings": 4096, "mscale": 1.0, "mscale_all_dim": 0.7},
    "yarn not truncated": {"factor": 32.0, "original_max_position_embeddings": 4096, "truncate": False},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 128,
    },
}


@pytest.mark.parametrize("name", SCALINGS)
@pytest.mark.parametrize("base", [10000.0, 500000.0])
def test_rotary_frequencies_are_those_of_transformers(name, base):
    rope = pytest.importorskip("transformers.modeling_rope_utils")
    transformers = pytest.importorskip("transformers")
    scaling = {"rope_type": name.split()[0], **SCALINGS[name]}
    config = transformers.LlamaConfig(
        hidden_size=128,
        num_attention_heads=4,
        max_position_embeddings=4096,
        rope_parameters={**scaling, "rope_theta": base},
    )
    theirs, factor = rope.ROPE_INIT_FUNCTIONS[scaling["rope_type"]](config, "cpu")
    ours, our_factor = position.rotary_frequencies(32, base, scaling)
    np.testing.assert_allclose(ours, theirs.cpu().numpy(), rtol=2e-6)
    assert our_factor == pytest.approx(factor, rel=1e-12)


def test_rotary_frequencies_by_hand():
    w = [1, 0.1, 0.01, 0.001]  # 10000^(-2i / 8)
    for scaling in (None, {"rope_type": "default"}):
        got, factor = position.rotary_frequencies(8, scaling=scaling)
        assert isinstance(got, np.ndarray)
        np.testing.assert_allclose(got, w, rtol=1e-12)
        assert factor == 1
    linear, _ = position.rotary_frequencies(8, scaling={"type": "linear", "factor": 4})  # "type": as in older files
    np.testing.assert_allclose(linear, np.divide(w, 4), rtol=1e-12)
    ntk, _ = position.rotary_frequencies(8, scaling={"rope_type": "ntk", "factor": 16})
    np.testing.assert_allclose(ntk[[0, -1]], [1, 0.001 / 16], rtol=1e-12)  # what the NTK scaling is made for
    np.testing.assert_allclose(ntk[1], (10000 * 16 ** (8 / 6)) ** -0.25, rtol=1e-12)

    # In 2000 steps the pairs turn 318, 31.8, 3.18, 0.318 times: two stay, one is in between, one is interpolated.
    llama3 = {"rope_type": "llama3", "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4}
    got, _ = position.rotary_frequencies(8, scaling=llama3 | {"original_max_position_embeddings": 2000})
    kept = (20 / (2 * math.pi) - 1) / 3
    np.testing.assert_allclose(got, [1, 0.1, 0.01 * (kept + (1 - kept) / 8), 0.001 / 8], rtol=1e-9)

    # 32 turns at pair 8 ln(2000 / 64 pi) / (2 ln 10000) = 0.998, one at 2.503: the ramp goes from pair 0 to pair 3.
    yarn = {"rope_type": "yarn", "factor": 4, "original_max_position_embeddings": 2000}
    got, factor = position.rotary_frequencies(8, scaling=yarn)
    np.testing.assert_allclose(got, [1, 0.1 * (2 / 3 + 1 / 12), 0.01 * (1 / 3 + 2 / 12), 0.001 / 4], rtol=1e-9)
    assert factor == pytest.approx(0.1 * math.log(4) + 1)
    assert position.rotary_frequencies(8, scaling=yarn | {"attention_factor": 1.25})[1] == 1.25
    assert position.rotary_frequencies(8, scaling=yarn | {"factor": 1})[1] == 1


@pytest.mark.parametrize(
    ("scaling", "words"),
    [
        ({"rope_type": "longrope", "factor": 2}, ["rope_type", "longrope", "llama3", "yarn"]),
        ({"factor": 2}, ["rope_type", "factor"]),
        ({"rope_type": "linear"}, ["linear", "Missing: ['factor']"]),
        ({"rope_type": "yarn", "factor": 2}, ["yarn", "Missing: ['original_max_position_embeddings']", "beta_fast"]),
        ({"rope_type": "llama3", "factor": 2}, ["llama3", "high_freq_factor", "Missing"]),
        ({"rope_type": "linear", "factor": 2, "rope_theta": 1e4}, ["linear", "unknown: ['rope_theta']"]),
        ({"rope_type": "linear", "factor": 0}, ["factor", "positive", "0"]),
        ({"rope_type": "ntk", "factor": "two"}, ["factor", "positive", "two"]),
        (
            {"rope_type": "llama3", "original_max_position_embeddings": 9}
            | dict.fromkeys(("factor", "low_freq_factor", "high_freq_factor"), 2),
            ["low_freq_factor < high_freq_factor", "2"],
        ),
    ],
)
def test_wrong_scalings_are_refused(scaling, words):
    refused(lambda: position.rotary_frequencies(8, scaling=scaling), *words)


def test_rotary_frequencies_refuse():
    refused(lambda: position.rotary_frequencies(7), "dim", "even", "7")
    refused(lambda: position.rotary_frequencies(2, scaling={"rope_type": "ntk", "factor": 2}), "ntk", "dim=2")


def turned(x, p, w, factor=1.0, interleaved=False):
    """float64, by complex numbers: a pair is a number, to turn it is to multiply it by e^(i p w)."""
    x, n = np.asarray(x, "float64"), len(w)
    p = np.broadcast_to(p, (x.shape[0], x.shape[2])).astype("float64")
    a, b = (slice(0, 2 * n, 2), slice(1, 2 * n, 2)) if interleaved else (slice(0, n), slice(n, 2 * n))
    z = (x[..., a] + 1j * x[..., b]) * factor * np.exp(1j * p[:, None, :, None] * w)
    y = x.copy()
    y[..., a], y[..., b] = z.real, z.imag
    return y


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dim", [8, 4])
@pytest.mark.parametrize("factor", [1.0, 1.3])
def test_rotate(interleaved, dim, factor):
    x, w = normal(2, 3, 5, 8), position.rotary_frequencies(dim)[0]
    for p in (np.arange(5), np.array([[0, 1, 2, 3, 4], [7, 8, 9, 0, 1]])):
        close(position.rotate(x, p, w, factor, interleaved), turned(x, p, w, factor, interleaved), 1e-6)


def test_rotate_refuses_more_than_there_is():
    refused(lambda: position.rotate(normal(1, 1, 2, 6), np.arange(2), np.ones(4)), "4 frequencies", "(1, 1, 2, 6)")


def test_products_depend_on_the_difference_of_positions():
    q, k = normal(1, 2, 6, 8), normal(1, 2, 6, 8, seed=1)
    w = position.rotary_frequencies(8)[0]

    def scores(shift):
        turn = functools.partial(position.rotate, positions=np.arange(6) + shift, frequencies=w)
        return ops.matmul(turn(q), ops.swapaxes(turn(k), -1, -2))

    close(scores(100), scores(0), 1e-5)


@pytest.mark.parametrize("dtype", HALF_PRECISION)
@pytest.mark.parametrize("interleaved", [False, True])
def test_rotate_in_half_precision(dtype, interleaved):
    x = ops.cast(np.random.default_rng(0).uniform(-1, 1, (1, 1, LONG, 16)), dtype)
    w = position.rotary_frequencies(16)[0]
    y = position.rotate(x, np.arange(LONG), w, interleaved=interleaved)
    assert dtype in str(y.dtype)
    expected = turned(arrays(ops.cast(x, "float32"))[0], np.arange(LONG), w, interleaved=interleaved)
    np.testing.assert_allclose(arrays(ops.cast(y, "float32"))[0], expected, rtol=0, atol=1e-2)


def test_rotate_has_a_gradient_that_turns_back():
    x, w = normal(1, 2, 5, 8), position.rotary_frequencies(8)[0]

    def loss(floats):
        y = position.rotate(floats[0], np.arange(5), w)
        return ops.sum(y * ops.convert_to_tensor(g)), y

    g = normal(1, 2, 5, 8, seed=1)
    _, _, (dx,) = backend.current().gradients(loss, keras.layers.Layer())((ops.convert_to_tensor(x),))
    close(dx, turned(g, -np.arange(5), w), 1e-6)


def official_slopes(n):
    """As in the official repository: by recursion."""
    if math.log2(n).is_integer():
        start = 2 ** (-(2 ** -(math.log2(n) - 3)))
        return [start * start**i for i in range(n)]
    power = 2 ** math.floor(math.log2(n))
    return official_slopes(power) + official_slopes(2 * power)[0::2][: n - power]


def test_alibi_slopes():
    for n in range(1, 70):
        slopes = position.alibi_slopes(n)
        assert slopes.shape == (n,)
        assert slopes.dtype == "float32"
        np.testing.assert_allclose(slopes, official_slopes(n), rtol=1e-6)
    np.testing.assert_array_equal(position.alibi_slopes(8), 2.0 ** -np.arange(1, 9))
    refused(lambda: position.alibi_slopes(0), "num_heads", "0")


def bucket(relative, bidirectional, num_buckets, max_distance):
    """One number at a time, in float64; where a rounding decides it is what an exact logarithm gives."""
    half = num_buckets // 2 if bidirectional else num_buckets
    first = half if bidirectional and relative > 0 else 0
    n = abs(relative) if bidirectional else max(-relative, 0)
    exact = half // 2
    if n < exact:
        return first + n
    where = math.log(n / exact) / math.log(max_distance / exact) * (half - exact)
    where = round(where) if abs(where - round(where)) < 1e-9 else math.floor(where)
    return first + min(half - 1, exact + where)


BUCKETS = [(True, 32, 128), (False, 32, 128), (True, 8, 20), (False, 7, 50), (True, 64, 1000), (True, 4, 2)]


@pytest.mark.parametrize("arguments", BUCKETS)
def test_relative_buckets(arguments):
    relative = np.arange(-1200, 1201, dtype="int32")
    got = position.relative_buckets(ops.convert_to_tensor(relative), *arguments)
    same(got, [bucket(r, *arguments) for r in relative.tolist()])
    by_compiled = compiled(lambda r: position.relative_buckets(r, *arguments))
    same(by_compiled(ops.convert_to_tensor(relative)), arrays(got)[0])


@pytest.mark.parametrize("arguments", BUCKETS)
def test_relative_buckets_are_those_of_transformers(arguments):
    t5 = pytest.importorskip("transformers.models.t5.modeling_t5")
    torch = pytest.importorskip("torch")
    relative = np.arange(-5000, 5001, dtype="int32").reshape(73, 137)
    theirs = t5.T5Attention._relative_position_bucket(torch.from_numpy(relative), *arguments).numpy()
    same(position.relative_buckets(ops.convert_to_tensor(relative), *arguments), theirs)


@pytest.mark.parametrize("arguments", [(True, 2, 128), (False, 1, 128), (True, 32, 8), (False, 32, 16)])
def test_buckets_that_cannot_be_made_are_refused(arguments):
    refused(lambda: position.relative_buckets(np.arange(3), *arguments), "num_buckets", "max_distance", "Received")
