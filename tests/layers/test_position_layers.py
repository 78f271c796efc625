"""The layers of positions against NumPy in float64: chunks, padding, packed rows, half precision, limits, files."""

import random

import keras
import numpy as np
import pytest
from cases import MASKS, B, T, arrays, close, normal, refused, tensors
from keras import ops

from keras_seq import backend
from keras_seq.layers import position as layers
from keras_seq.ops.position import segment_positions

D, LONG = 8, 2048
LAYERS = {
    "sinusoidal": lambda **kwargs: layers.SinusoidalPositionalEncoding(**kwargs),
    "sinusoidal halves": lambda **kwargs: layers.SinusoidalPositionalEncoding(100.0, interleaved=False, **kwargs),
    "learned": lambda **kwargs: layers.LearnedPositionalEncoding(40, **kwargs),
    "rotary": lambda **kwargs: layers.RotaryEmbedding(**kwargs),
    "rotary part": lambda **kwargs: layers.RotaryEmbedding(
        500.0, {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1000}, True, 4, **kwargs
    ),
}


def encoded(layer, x, p):
    """What the layer must make of x `(b, t, d)` at positions p `(b, t)`: float64, one step at a time."""
    x = np.asarray(x, "float64")
    if isinstance(layer, layers.LearnedPositionalEncoding):
        return x + arrays(layer.embeddings.value)[0][np.minimum(p, layer.max_length - 1)]
    d = x.shape[-1]
    y = x.copy()
    for i in range(d // 2):
        if isinstance(layer, layers.SinusoidalPositionalEncoding):
            angle = p / layer.max_wavelength ** (2 * i / d)
            a, b = (2 * i, 2 * i + 1) if layer.interleaved else (i, d // 2 + i)
            y[..., a] += np.sin(angle)
            y[..., b] += np.cos(angle)
        elif layer.dim is None:  # half-split, unscaled
            a, b = i, d // 2 + i
            angle = p / layer.base ** (2 * i / d)
            y[..., a] = x[..., a] * np.cos(angle) - x[..., b] * np.sin(angle)
            y[..., b] = x[..., b] * np.cos(angle) + x[..., a] * np.sin(angle)
        elif i < 2:  # the two pairs of the case above: 1 and 500^(-1/2), the ramp from 0 to 2, for a factor of 4
            factor, w = 0.1 * np.log(4) + 1, [1, 500**-0.5 * (0.5 + 0.5 / 4)][i]
            a, b = 2 * i, 2 * i + 1
            y[..., a] = factor * (x[..., a] * np.cos(p * w) - x[..., b] * np.sin(p * w))
            y[..., b] = factor * (x[..., b] * np.cos(p * w) + x[..., a] * np.sin(p * w))
    return y


def counted(mask):
    return np.cumsum(mask, 1) - mask


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("padding", MASKS)
def test_a_step_is_encoded_by_the_valid_steps_before_it(name, padding):
    layer, x, mask = LAYERS[name](), normal(B, T, D), MASKS[padding]
    y, state = layer(x, mask=mask, return_state=True)
    valid = np.ones((B, T), bool) if mask is None else mask
    expected = encoded(layer, x, counted(valid))
    close(arrays(y)[0][valid], expected[valid], 1e-6)
    np.testing.assert_array_equal(arrays(state)[0], valid.sum(1))
    assert "int32" in str(state.dtype)
    assert tuple(layer.initial_state(3, max_length=9).shape) == (3,)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("padding", MASKS)
def test_chunks_and_steps_are_the_whole(name, padding):
    layer, x, mask = LAYERS[name](), normal(B, T, D), MASKS[padding]
    whole, last = layer(x, mask=mask, return_state=True)
    for lengths in ([3, 1, 3], [1] * T):
        state, pieces, start = None, [], 0
        for n in lengths:
            piece = slice(start, start + n)
            given = None if mask is None else mask[:, piece]
            y, state = layer(x[:, piece], mask=given, initial_state=state, return_state=True)
            pieces.append(y)
            start += n
        close((ops.concatenate(pieces, 1), state), (whole, last), 1e-6)
    if mask is None:
        state = layer.initial_state(B)
        for t in range(T):
            y, state = layer.step(ops.convert_to_tensor(x[:, t]), state)
            close(y, whole[:, t], 1e-6)


@pytest.mark.parametrize("name", LAYERS)
def test_packed_rows(name):
    layer, x = LAYERS[name](), normal(2, T, D)
    layer.build((None, None, D))
    segments = np.array([[1, 1, 1, 2, 2, 2, 2], [1, 2, 2, 3, 3, 3, 3]], "int32")
    y = arrays(layer.encode(*tensors((x, segment_positions(ops.convert_to_tensor(segments))))))[0]
    for row, segment in ((0, 1), (0, 2), (1, 1), (1, 2), (1, 3)):
        own = segments[row] == segment
        close(y[row, own][None], layer(x[row, own][None]), 1e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["sinusoidal", "sinusoidal halves", "rotary"])
def test_half_precision_knows_far_positions(name, dtype):
    layer = LAYERS[name](dtype=f"mixed_{dtype}")
    x = np.zeros((1, LONG, D)) if "sinusoidal" in name else np.random.default_rng(0).uniform(-1, 1, (1, LONG, D))
    x = ops.cast(x, dtype)
    y = layer(x)
    assert dtype in str(y.dtype)
    expected = encoded(layer, arrays(ops.cast(x, "float32"))[0], np.arange(LONG)[None])
    np.testing.assert_allclose(arrays(ops.cast(y, "float32"))[0], expected, rtol=0, atol=1e-2)


def test_rotary_of_heads():
    layer, x = layers.RotaryEmbedding(), normal(B, T, 3, D)
    mask = MASKS["left"]
    y = arrays(layer(x, mask=mask))[0]
    for head in range(3):
        expected = encoded(layer, x[:, :, head], counted(mask))
        close(y[:, :, head][mask], expected[mask], 1e-6)
    assert layer.compute_output_shape((B, T, 3, D)) == (B, T, 3, D)


def test_rotary_for_attention():
    """`rotate` needs no building, keeps the dtype of its input, and takes positions of any kind."""
    layer, x = layers.RotaryEmbedding(dtype="mixed_bfloat16"), normal(B, 3, T, D)
    p = np.random.default_rng(0).integers(0, 50, (B, T)).astype("int32")
    y = layer.rotate(*tensors((x, p)))
    assert "float32" in str(y.dtype)
    for head in range(3):
        close(arrays(y)[0][:, head], encoded(layer, x[:, head], p), 2e-6)
    close(layer.rotate(*tensors((x, p[0]))), layer.rotate(*tensors((x, np.tile(p[:1], (B, 1))))), 1e-6)


# The end of the table.


def table(size=5, **kwargs):
    layer = layers.LearnedPositionalEncoding(size, name="mine", **kwargs)
    layer.build((None, None, D))
    return layer


def compiled(layer):
    return backend.current().compiled(
        lambda x, mask, state: layer(x, mask=mask, initial_state=state, return_state=True), layer
    )


@pytest.mark.parametrize(
    ("attempt", "words"),
    [
        (lambda: table()(normal(1, 6, D)), ["6", "5"]),
        (lambda: table()(normal(1, 3, D), initial_state=np.array([3], "int32")), ["3 steps", "position 5"]),
        (lambda: table().step(*tensors((normal(1, D), np.array([5], "int32")))), ["position 5"]),
        (lambda: table()(normal(2, 7, D), mask=np.ones((2, 7), bool)), ["7 steps", "position 6"]),
    ],
    ids=["a whole", "a chunk", "a step", "a mask"],
)
def test_a_position_beyond_the_table_is_refused(attempt, words):
    refused(attempt, "LearnedPositionalEncoding 'mine'", "max_length=5", *words)


def test_a_checked_step_is_still_refused_beyond_the_table():
    layer, x = table(), ops.convert_to_tensor(normal(1, D))
    state = layer.initial_state(1)
    for _ in range(5):
        _, state = layer.step(x, state)
    refused(lambda: layer.step(x, state), "max_length=5", "position 5")


def test_padding_is_never_beyond_the_table():
    layer = table()
    mask = np.zeros((3, 9), bool)
    mask[0, :5] = mask[1, 4:] = mask[2, ::2] = True
    x = normal(3, 9, D)
    arguments = tensors((x, mask, np.zeros(3, "int32")))
    for run in (compiled(layer), lambda *given: layer(given[0], mask=given[1], return_state=True)):
        y, state = run(*arguments)
        assert np.isfinite(arrays(y)[0]).all()
        close(arrays(y)[0][mask], encoded(layer, x, counted(mask))[mask])
        np.testing.assert_array_equal(arrays(state)[0], [5, 5, 5])


@pytest.mark.skipif(keras.config.backend() == "torch", reason="PyTorch compiles nothing here: it raises")
@pytest.mark.parametrize("dtype", ["float32", "mixed_bfloat16"])
def test_compiled_it_is_nan_beyond_the_table(dtype):
    layer, x = table(dtype=dtype), normal(2, 4, D)
    mask = np.array([[1, 1, 0, 1], [1, 1, 1, 1]]) > 0
    y, state = compiled(layer)(*tensors((x, mask, np.array([2, 3], "int32"))))
    assert layer.compute_dtype in str(y.dtype)
    y = arrays(ops.cast(y, "float32"))[0]
    np.testing.assert_array_equal(np.isnan(y).all(-1), [[0, 0, 0, 0], [0, 0, 1, 1]])
    np.testing.assert_array_equal(np.isnan(y).any(-1), [[0, 0, 0, 0], [0, 0, 1, 1]])
    np.testing.assert_array_equal(arrays(state)[0], [5, 7])


def test_a_sequence_that_is_too_long_is_refused_when_compiled():
    layer = table()
    with pytest.raises(ValueError, match=r"max_length=5"):
        compiled(layer)(*tensors((normal(1, 6, D), None, np.array([0], "int32"))))


def test_a_model_of_any_length_with_a_short_table():
    """Keras makes up sizes while it builds a model: they must not count."""
    inputs = keras.Input((None, D))
    model = keras.Model(inputs, table()(inputs))
    assert model.output_shape == (None, None, D)
    x = normal(2, 5, D)
    close(model.predict(x, verbose=0), encoded(model.layers[-1], x, np.arange(5)[None]), 1e-6)


# Biases of attention.


@pytest.mark.parametrize("heads", [4, 6])
def test_alibi(heads):
    layer = layers.AlibiBias(heads)
    assert isinstance(layer.slopes, np.ndarray)
    assert layer.slopes.shape == (heads,)
    q, k = np.array([[3, 4], [9, 10]], "int32"), np.arange(5, dtype="int32")

    def expected(q, k):
        distance = np.abs(q[..., :, None] - k[..., None, :])
        return -layer.slopes.astype("float64")[:, None, None] * distance[..., None, :, :]

    for given in ((q, k), (q[0], k), (q, np.tile(k, (2, 1)))):
        y = layer(*given)
        assert tuple(y.shape) == ((heads, 2, 5) if given[0].ndim == 1 else (2, heads, 2, 5))
        close(y, expected(*given), 1e-6)
    assert "float32" in str(layers.AlibiBias(heads, dtype="mixed_bfloat16")(q, k).dtype)


@pytest.mark.parametrize("bidirectional", [True, False])
def test_relative_position_bias_is_that_of_t5(bidirectional):
    t5 = pytest.importorskip("transformers.models.t5.modeling_t5")
    torch = pytest.importorskip("torch")
    layer = layers.RelativePositionBias(3, bidirectional, num_buckets=16, max_distance=40)
    q, k = np.arange(60, 67, dtype="int32"), np.arange(100, dtype="int32")
    y = layer(q, k)
    assert layer.embeddings.shape == (16, 3)
    buckets = t5.T5Attention._relative_position_bucket(torch.from_numpy(k - q[:, None]), bidirectional, 16, 40).numpy()
    weight = arrays(layer.embeddings.value)[0]
    close(y, weight[buckets].transpose(2, 0, 1), 1e-6)
    batch = np.stack([q, q + 5])
    close(layer(batch, k)[0], y, 1e-6)
    close(layer(batch, k)[1], layer(q + 5, k), 1e-6)
    assert "float32" in str(layers.RelativePositionBias(3, dtype="mixed_bfloat16")(q, k).dtype)


def test_relative_position_bias_learns():
    layer = layers.RelativePositionBias(2, num_buckets=8, max_distance=9)
    q, k = tensors((np.arange(4, dtype="int32"), np.arange(6, dtype="int32")))
    layer(q, k)

    def loss(floats, q, k):
        y = layer(q, k)
        return ops.sum(y), y

    _, (gradient,), _ = backend.current().gradients(loss, layer)((), q, k)
    (gradient,) = arrays(gradient)
    assert gradient.sum() == 4 * 6 * 2
    assert (gradient[0] == 4).all()  # the diagonal


BIASES = {
    "alibi": lambda: layers.AlibiBias(6),
    "t5": lambda: layers.RelativePositionBias(6, False, 8, 20, embeddings_regularizer="l2"),
}


@pytest.mark.parametrize("name", BIASES)
def test_biases_in_a_model_that_is_saved(name, tmp_path):
    q, k = keras.Input((None,), dtype="int32", name="q"), keras.Input((None,), dtype="int32", name="k")
    bias = BIASES[name]()
    model = keras.Model([q, k], bias(q, k))
    assert model.output_shape == (None, 6, None, None)
    given = [np.arange(8, dtype="int32").reshape(2, 4), np.arange(6, dtype="int32").reshape(2, 3)]
    y = model.predict(given, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    close(loaded.predict(given, verbose=0), y, 1e-12)
    assert loaded.layers[-1].get_config() == bias.get_config()


def test_the_same_weights_on_every_backend():
    """What Philox draws from this seed; no backend's generator has a part in it."""
    for make, weight_shape in ((lambda: table(4), (4, D)), (lambda: built(layers.RelativePositionBias(D)), (32, D))):
        keras.utils.set_random_seed(1)
        (weight,) = make().get_weights()
        random.seed(1)
        draw = np.random.Generator(np.random.Philox(random.randint(1, 10**9))).uniform(-0.05, 0.05, weight_shape)
        close(weight, draw, 1e-6)


def built(layer):
    layer.build()
    return layer


def test_configs_come_back():
    scaling = {"rope_type": "linear", "factor": 2.0}
    layer = layers.RotaryEmbedding(500.0, scaling, True, 4, name="mine")
    config = layer.get_config()
    assert {k: config[k] for k in ("base", "scaling", "interleaved", "dim")} == {
        "base": 500.0,
        "scaling": scaling,
        "interleaved": True,
        "dim": 4,
    }
    assert layers.RotaryEmbedding.from_config(config).get_config() == config
    learned = layers.LearnedPositionalEncoding(9, keras.initializers.Zeros(), "l2", "non_neg")
    copy = layers.LearnedPositionalEncoding.from_config(learned.get_config())
    copy.build([None, 3, D])
    assert copy.get_config() == learned.get_config()
    np.testing.assert_array_equal(copy.get_weights()[0], np.zeros((9, D)))
    assert len(copy.losses) == 1


@pytest.mark.parametrize(
    ("attempt", "words"),
    [
        (
            lambda: layers.SinusoidalPositionalEncoding(name="mine")(normal(B, T, 5)),
            ["SinusoidalPositionalEncoding 'mine'", "even", "(4, 7, 5)"],
        ),
        (lambda: layers.SinusoidalPositionalEncoding()(normal(B, D)), ["expected", "(4, 8)"]),
        (lambda: layers.LearnedPositionalEncoding(0), ["max_length", "0"]),
        (lambda: table()(normal(1, 2, D + 1)), ["expected", "(1, 2, 9)"]),
        (lambda: layers.RotaryEmbedding(dim=5), ["dim", "even", "5"]),
        (lambda: layers.RotaryEmbedding(scaling={"rope_type": "new"}), ["rope_type", "new"]),
        (lambda: layers.RotaryEmbedding(name="mine")(normal(B, T, 5)), ["RotaryEmbedding 'mine'", "even", "5"]),
        (lambda: layers.RotaryEmbedding(dim=10)(normal(B, T, D)), ["8 features", "dim=10"]),
        (lambda: layers.RotaryEmbedding().rotate(ops.ones((1, 1, 2, 5)), np.arange(2)), ["even", "5 features"]),
        (lambda: layers.AlibiBias(0), ["num_heads", "0"]),
        (lambda: layers.RelativePositionBias(-1), ["num_heads", "-1"]),
        (lambda: layers.RelativePositionBias(2, num_buckets=2), ["num_buckets=2", "max_distance=128"]),
    ],
)
def test_errors_say_what_came_and_what_was_expected(attempt, words):
    refused(attempt, *words)
