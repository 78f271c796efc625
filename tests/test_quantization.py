"""`quantize` and LoRA reach every matrix of attention, feed-forward networks and Transformers, and survive a file."""

import keras
import numpy as np
import pytest
from cases import arrays, close, compile_for_test, normal

from keras_seq import layers, models

LAYERS = {
    "MultiHeadAttention": lambda: layers.MultiHeadAttention(2, 4, causal=True, num_kv_heads=1, use_gate=True),
    "FeedForward": lambda: layers.FeedForward(16, "swiglu"),
    "TransformerDecoderBlock": lambda: layers.TransformerDecoderBlock(2, 16),
    "TransformerEncoderBlock": lambda: layers.TransformerEncoderBlock(2, 16),
    "TransformerLM": lambda: models.TransformerLM(11, 8, 2, 2),
    "TransformerLM untied": lambda: models.TransformerLM(11, 8, 1, 2, tie_embeddings=False),
    "TransformerEncoder": lambda: models.TransformerEncoder(11, 8, 1, 2, head="masked_lm"),
    "Transformer": lambda: models.Transformer(11, 11, 8, 1, 2),
}


pytestmark = [
    pytest.mark.filterwarnings("ignore:Layer .* does not have a `quantize` method"),
    pytest.mark.filterwarnings("ignore:.*The use of `x.T` on tensors"),  # Keras's quantized embedding on PyTorch
]


def functional(layer, name):
    """A Keras model of the layer, and inputs of it."""
    if name == "Transformer":
        x = [np.random.default_rng(i).integers(2, 11, (2, 5)).astype("int32") for i in (0, 1)]
        inputs = [keras.Input((None,), dtype="int32") for _ in x]
        return keras.Model(inputs, layer(tuple(inputs))), x
    tokens = np.random.default_rng(0).integers(1, 11, (2, 5)).astype("int32")
    x = tokens if hasattr(layer, "vocab_size") else normal(2, 5, 8)
    inputs = keras.Input((None, *x.shape[2:]), dtype=x.dtype.name)
    return keras.Model(inputs, layer(inputs)), x


def matrices(layer):
    """The dense layers inside, and the embeddings."""
    kinds = keras.layers.Dense, keras.layers.EinsumDense, keras.layers.Embedding
    return [part for part in layer._flatten_layers() if isinstance(part, kinds)]


@pytest.mark.parametrize("mode", ["int8", "int4"])
@pytest.mark.parametrize("name", LAYERS)
def test_quantized_saved_and_loaded(name, mode, tmp_path):
    layer = LAYERS[name]()
    model, x = functional(layer, name)
    before = arrays(model(x))[0]
    model.quantize(mode)
    assert all(part.quantization_mode == mode for part in matrices(layer)) and matrices(layer)
    y = arrays(model(x))[0]
    assert np.abs(y - before).max() < (0.1 if mode == "int8" else 0.6) * np.abs(before).max()
    model.save(tmp_path / "model.keras")
    close(keras.saving.load_model(tmp_path / "model.keras")(x), y, 1e-12)


@pytest.mark.parametrize("name", LAYERS)
def test_lora(name):
    """With LoRA on every matrix nothing changes at first; then only the factors train."""
    layer = LAYERS[name]()
    model, x = functional(layer, name)
    before = arrays(model(x))[0]
    for part in matrices(layer):
        part.enable_lora(2)
    close(model(x), before, 1e-5)
    large = [w.path for w in layer.trainable_weights if len(w.shape) > 1 and w.name != "bias"]
    # Keras's own LoRA leaves the second matrix of an untied embedding as it is.
    assert all("lora" in path or "position" in path or "reverse" in path for path in large), large
    compile_for_test(model, "adam")
    model.fit(x, 0 * before, verbose=0)
    assert np.abs(arrays(model(x))[0] - before).max() > 0
