"""Dropout of inputs and of recurrent products: one draw for all steps of a call."""

import keras
import numpy as np
import pytest
from cases import B, D, T, U, arrays, call, close, normal, same_weights

from keras_seq import layers

KINDS = ["SimpleRNN", "LSTM", "GRU"]
RATE = 0.25


def transparent(units, recurrent, **config):
    """`h' = x + recurrent * h`, so that what is dropped can be read off the outputs."""
    layer = layers.SimpleRNN(
        units,
        activation="linear",
        use_bias=False,
        kernel_initializer="identity",
        recurrent_initializer="identity" if recurrent else "zeros",
        return_sequences=True,
        **config,
    )
    layer.build((None, None, units))
    return layer


def train(layer, x):
    return arrays(layer(x, training=True))[0]


@pytest.mark.parametrize("config", [{"dropout": 0.5}, {"recurrent_dropout": 0.5}], ids=["dropout", "recurrent dropout"])
@pytest.mark.parametrize("kind", KINDS)
def test_only_in_training(kind, config):
    layer, plain = same_weights(getattr(layers, kind)(U, **config), getattr(layers, kind)(U))
    x = normal(B, T, D)
    expected = arrays(call(plain, x))[0]
    close(call(layer, x), expected, 1e-12)
    close(call(layer, x, training=False), expected, 1e-12)
    different = arrays(call(layer, x, training=True))[0]
    assert (np.abs(different - expected) > 1e-3).any(1).all()  # in each row


def test_input_dropout_is_the_same_at_all_steps():
    layer = transparent(32, recurrent=False, dropout=RATE)
    factor = train(layer, np.ones((64, T, 32), "float32"))
    assert (factor == factor[:, :1]).all()
    np.testing.assert_allclose(np.unique(factor), [0, 1 / (1 - RATE)], rtol=1e-6)
    assert len(np.unique(factor[:, 0], axis=0)) == 64  # each row has its own
    assert abs(factor.mean() - 1) < 0.05  # the mean stays: 2,048 draws have a standard error of 0.013


def test_recurrent_dropout_is_the_same_at_all_steps():
    layer = transparent(32, recurrent=True, recurrent_dropout=RATE)
    y = train(layer, np.ones((64, 4, 32), "float32"))
    factor = [(y[:, t] - 1) / y[:, t - 1] for t in range(1, 4)]
    np.testing.assert_allclose(factor[1], factor[0], atol=1e-5)
    np.testing.assert_allclose(factor[2], factor[0], atol=1e-5)
    assert ((factor[0] < 1e-5) | (np.abs(factor[0] - 1 / (1 - RATE)) < 1e-5)).all()
    assert abs(factor[0].mean() - 1) < 0.05


@pytest.mark.parametrize("config", [{"dropout": RATE}, {"recurrent_dropout": RATE}], ids=["input", "recurrent"])
def test_drawn_from_the_seed(config):
    x = normal(B, T, 8)
    one, same, other = (transparent(8, recurrent=True, seed=seed, **config) for seed in (1, 1, 2))
    first = train(one, x)
    np.testing.assert_array_equal(train(same, x), first)
    assert not np.array_equal(train(other, x), first)
    assert not np.array_equal(train(one, x), first)  # each call draws anew


def test_without_a_seed_drawn_from_that_of_keras():
    x, y = normal(B, T, 8), []
    for _ in range(2):
        keras.utils.set_random_seed(5)
        y.append(train(transparent(8, recurrent=True, dropout=RATE, recurrent_dropout=RATE), x))
    np.testing.assert_array_equal(*y)


@pytest.mark.parametrize("argument", ["dropout", "recurrent_dropout"])
@pytest.mark.parametrize("rate", [-0.1, 1.5])
def test_a_rate_out_of_range_is_refused(argument, rate):
    with pytest.raises(ValueError, match=rf"`{argument}` must be between 0 and 1.*{rate}"):
        layers.GRU(U, **{argument: rate})
