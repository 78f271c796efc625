"""The splitting law at a thousand steps, at the tolerance that the contract states for it."""

import numpy as np
import pytest
from cases import call
from keras import ops

from keras_seq import layers


@pytest.mark.parametrize("name", ["SimpleRNN", "LSTM", "GRU"])
def test_a_thousand_steps_in_pieces(name):
    layer = getattr(layers, name)(6, return_sequences=True)
    layer.build((2, None, 5))
    x = np.random.default_rng(0).normal(size=(2, 1000, 5)).astype("float32")
    whole, last = call(layer, x, return_state=True)
    pieces, state = [], layer.initial_state(2)
    for piece in (x[:, :1], x[:, 1:500], x[:, 500:]):
        y, state = call(layer, piece, initial_state=state, return_state=True)
        pieces.append(ops.convert_to_numpy(y))
    difference = np.abs(np.concatenate(pieces, 1) - ops.convert_to_numpy(whole)).max()
    assert difference <= 2e-6 * np.abs(ops.convert_to_numpy(whole)).max()
    for got, expected in zip(_numpy(state), _numpy(last), strict=True):
        assert np.abs(got - expected).max() <= 2e-6 * np.abs(expected).max()


def _numpy(state):
    parts = state if isinstance(state, list | tuple) else [state]
    return np.stack([ops.convert_to_numpy(part) for part in parts])
