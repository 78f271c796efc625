"""The same numbers on every backend, with the statistics that the names promise."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_seq import initializers, layers

# Drawn once; whatever the backend, these are the numbers.
GOLDEN = {
    "RandomUniform": [
        [-0.0031182512175291777, -0.00738541642203927, -0.013701830059289932],
        [-0.026264609768986702, -0.036126453429460526, 0.0011986450990661979],
    ],
    "RandomNormal": [
        [-0.07017821818590164, 0.04242097586393356, 0.06543401628732681],
        [-0.06116319075226784, 0.011285650543868542, 0.004810194950550795],
    ],
    "GlorotUniform": [
        [-0.0683174654841423, -0.1618063598871231, -0.30019205808639526],
        [-0.5754287838935852, -0.791490912437439, 0.026260999962687492],
    ],
    "Orthogonal": [
        [-0.7263892292976379, 0.6772837042808533, 0.11681367456912994],
        [-0.4672713875770569, -0.611311674118042, 0.6387139558792114],
    ],
}
FIRST_KERNEL_NUMBERS = [-0.5274975299835205, 0.6143527030944824, 0.16881662607192993, -0.4214031398296356]
FIRST_RECURRENT_NUMBERS = [0.0198423583060503, 0.28181928396224976, 0.18084989488124847, -0.251339316368103]
CLASSES = {name: getattr(initializers, name) for name in GOLDEN}


def values(initializer, shape, **kwargs):
    return ops.convert_to_numpy(initializer(shape, **kwargs))


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_numbers(name):
    np.testing.assert_allclose(values(CLASSES[name](seed=7), (2, 3)), GOLDEN[name], rtol=1e-6)


def test_one_seed_gives_one_layer():
    """`set_random_seed` decides the weights of a layer, and they are the same on every backend."""

    def weights(seed):
        keras.utils.set_random_seed(seed)
        layer = layers.LSTM(2)
        layer.build((None, None, 3))
        return layer.get_weights()

    one, same, other = weights(1), weights(1), weights(2)
    for a, b in zip(one, same, strict=True):
        np.testing.assert_array_equal(a, b)
    assert not np.array_equal(one[0], other[0])
    np.testing.assert_allclose(one[0][0, :4], FIRST_KERNEL_NUMBERS, rtol=1e-6)
    np.testing.assert_allclose(one[1][0, :4], FIRST_RECURRENT_NUMBERS, rtol=1e-6)


@pytest.mark.parametrize("name", GOLDEN)
def test_seeds(name):
    """An initializer gives the same numbers at each call; two without a seed give different ones."""
    one = CLASSES[name](seed=1)
    np.testing.assert_array_equal(values(one, (4, 5)), values(one, (4, 5)))
    np.testing.assert_array_equal(values(one, (4, 5)), values(CLASSES[name](seed=1), (4, 5)))
    assert not np.array_equal(values(one, (4, 5)), values(CLASSES[name](seed=2), (4, 5)))
    assert not np.array_equal(values(CLASSES[name](), (4, 5)), values(CLASSES[name](), (4, 5)))


@pytest.mark.parametrize(
    ("shape", "limit"),
    [
        ((60, 100), np.sqrt(6 / 160)),
        ((3, 40, 60), np.sqrt(6 / 300)),
        ((2000,), np.sqrt(6 / 4000)),
    ],
)
def test_glorot_limits(shape, limit):
    """Uniform within the limit: close to it at both ends, variance limit² / 3."""
    w = values(initializers.GlorotUniform(seed=0), shape)
    assert w.shape == shape
    assert 0.99 * limit < w.max() <= limit
    assert -limit <= w.min() < -0.99 * limit
    assert abs(w.mean()) < 0.05 * limit
    np.testing.assert_allclose(w.var(), limit**2 / 3, rtol=0.05)
    keras_limit = np.abs(values(keras.initializers.GlorotUniform(seed=0), shape)).max()
    np.testing.assert_allclose(keras_limit, limit, rtol=0.01)


@pytest.mark.parametrize("shape", [(6, 6), (8, 5), (5, 8), (2, 3, 4), (4, 16)])
@pytest.mark.parametrize("gain", [1.0, 0.5])
def test_orthogonal(shape, gain):
    w = values(initializers.Orthogonal(gain, seed=0), shape)
    assert w.shape == shape
    w = w.reshape(-1, shape[-1]).astype("float64") / gain
    product = w @ w.T if w.shape[0] <= w.shape[1] else w.T @ w
    np.testing.assert_allclose(product, np.eye(len(product)), atol=1e-6)


def test_orthogonal_has_no_preferred_sign():
    """The signs of QR's diagonal are put right, or the first column would always point one way."""
    corners = [values(initializers.Orthogonal(seed=seed), (3, 3))[0, 0] for seed in range(40)]
    assert 8 < sum(corner > 0 for corner in corners) < 32


def test_orthogonal_needs_two_axes():
    with pytest.raises(ValueError, match=r"two axes.*\(5,\)"):
        initializers.Orthogonal()((5,))


def test_uniform_and_normal():
    w = values(initializers.RandomUniform(1.0, 3.0, seed=0), (5000,))
    assert 1 <= w.min() < 1.01
    assert 2.99 < w.max() < 3.0001
    np.testing.assert_allclose([w.mean(), w.var()], [2, 1 / 3], rtol=0.05)
    w = values(initializers.RandomNormal(1.0, 0.2, seed=0), (5000,))
    np.testing.assert_allclose([w.mean(), w.std()], [1, 0.2], rtol=0.05)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_dtype(dtype):
    w = initializers.GlorotUniform(seed=0)((4, 5), dtype=dtype)
    assert keras.backend.standardize_dtype(w.dtype) == dtype
    expected = values(initializers.GlorotUniform(seed=0), (4, 5))
    np.testing.assert_allclose(ops.convert_to_numpy(ops.cast(w, "float32")), expected, atol=4e-3)


@pytest.mark.parametrize(
    "initializer",
    [
        initializers.RandomUniform(-1.0, 2.0, seed=3),
        initializers.RandomNormal(1.0, 2.0, seed=3),
        initializers.GlorotUniform(seed=3),
        initializers.Orthogonal(0.3, seed=3),
    ],
    ids=lambda initializer: type(initializer).__name__,
)
def test_config(initializer):
    """The class is found again by its registered name, and the copy draws the same."""
    config = keras.saving.serialize_keras_object(initializer)
    copy = keras.saving.deserialize_keras_object(config)
    assert type(copy) is type(initializer)
    assert copy.get_config() == initializer.get_config()
    np.testing.assert_array_equal(values(copy, (3, 4)), values(initializer, (3, 4)))
    again = initializers.get(config)
    np.testing.assert_array_equal(values(again, (3, 4)), values(initializer, (3, 4)))


def test_an_unseeded_config_stays_unseeded():
    """A drawn seed is no argument: a copy draws its own, as in Keras."""
    assert initializers.GlorotUniform().get_config() == {"seed": None}


@pytest.mark.parametrize(
    ("identifier", "expected"),
    [
        ("uniform", "RandomUniform"),
        ("random_normal", "RandomNormal"),
        ("glorot_uniform", "GlorotUniform"),
        ("GlorotUniform", "GlorotUniform"),
        ("orthogonal", "Orthogonal"),
    ],
)
def test_get_by_name(identifier, expected):
    assert type(initializers.get(identifier)) is CLASSES[expected]


def test_get_falls_back_to_keras():
    assert isinstance(initializers.get("zeros"), keras.initializers.Zeros)
    assert isinstance(initializers.get("he_normal"), keras.initializers.HeNormal)
    assert initializers.get(None) is None
    own = keras.initializers.Constant(0.25)
    assert initializers.get(own) is own
    assert initializers.get(np.ones) is np.ones
    with pytest.raises(ValueError, match="no_such"):
        initializers.get("no_such")


def test_keras_initializers_in_a_layer():
    """An object is used as it is, and comes back from the config."""
    layer = layers.GRU(
        3, kernel_initializer=keras.initializers.Constant(0.25), recurrent_initializer=keras.initializers.Constant(2.0)
    )
    copy = layers.GRU.from_config(layer.get_config())
    for gru in (layer, copy):
        gru.build((None, None, 2))
        np.testing.assert_array_equal(gru.get_weights()[0], np.full((2, 9), 0.25))
        np.testing.assert_array_equal(gru.get_weights()[1], np.full((3, 9), 2.0))


def test_a_seeded_initializer_in_a_layer():
    layer = layers.GRU(3, kernel_initializer=initializers.RandomUniform(seed=7))
    layer.build((None, None, 2))
    expected = values(initializers.RandomUniform(seed=7), layer.get_weights()[0].shape)
    np.testing.assert_array_equal(layer.get_weights()[0].reshape(-1), expected.reshape(-1))
