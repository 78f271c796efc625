"""Inputs of a wrong rank or size are refused by name, before a layer is built and after."""

import numpy as np
import pytest

from keras_seq import layers, models

OVER_TIME = {
    "LSTM": lambda: layers.LSTM(4),
    "SinusoidalPositionalEncoding": layers.SinusoidalPositionalEncoding,
    "FeedForward": lambda: layers.FeedForward(16),
    "MultiHeadAttention": lambda: layers.MultiHeadAttention(2, 4),
    "TransformerEncoderBlock": lambda: layers.TransformerEncoderBlock(2, 16),
    "TransformerDecoderBlock": lambda: layers.TransformerDecoderBlock(2, 16),
    "RWKV4TimeMixing": layers.RWKV4TimeMixing,
    "RWKV7TimeMixing": lambda: layers.RWKV7TimeMixing(4),
    "RWKV6ChannelMixing": layers.RWKV6ChannelMixing,
    "RWKVBlock": lambda: layers.RWKVBlock(6, head_dim=4),
}
OF_TOKENS = {
    "RecurrentLM": lambda: models.RecurrentLM(50, 8),
    "TransformerLM": lambda: models.TransformerLM(50, 8, 1, 2),
    "RWKV": lambda: models.RWKV(50, 8, 1, head_dim=4),
}


@pytest.mark.parametrize("name", OVER_TIME)
def test_layers(name):
    layer = OVER_TIME[name]()
    with pytest.raises(ValueError, match=r"expected (min_)?ndim=3, found ndim=2. Full shape received: \(2, 8\)"):
        layer(np.ones((2, 8), "float32"))
    assert not layer.built
    layer.build((None, None, 8))
    layer.built = True
    with pytest.raises(ValueError, match=r"expected axis -1 of input shape to have value 8, but .* shape \(2, 3, 7\)"):
        layer(np.ones((2, 3, 7), "float32"))


@pytest.mark.parametrize("name", OF_TOKENS)
def test_models(name):
    with pytest.raises(ValueError, match=r"expected ndim=2, found ndim=1. Full shape received: \(8,\)"):
        OF_TOKENS[name]()(np.ones(8, "int32"))
    with pytest.raises(ValueError, match=r"expected ndim=2, found ndim=3. Full shape received: \(2, 3, 4\)"):
        OF_TOKENS[name]()(np.ones((2, 3, 4), "int32"))
