"""`quantize` and LoRA reach every matrix of attention, feed-forward networks and Transformers, and survive a file."""

import gc

import keras
import numpy as np
import pytest
from cases import arrays, close, compile_for_test, normal, tensors

from keras_seq import backend, layers, models

LAYERS = {
    "MultiHeadAttention": lambda: layers.MultiHeadAttention(2, 4, causal=True, num_kv_heads=1, use_gate=True),
    "FeedForward": lambda: layers.FeedForward(16, "swiglu"),
    "TransformerLM": lambda: models.TransformerLM(11, 8, 1, 2),
    "TransformerEncoder": lambda: models.TransformerEncoder(11, 8, 1, 2, head="masked_lm"),
    "Transformer": lambda: models.Transformer(11, 11, 8, 1, 2),
}


pytestmark = [
    pytest.mark.filterwarnings("ignore:Layer .* does not have a `quantize` method"),
    pytest.mark.filterwarnings("ignore:.*The use of `x.T` on tensors"),  # Keras's quantized embedding on PyTorch
]


@pytest.fixture(autouse=True)
def frozen():
    """Keras collects garbage for each matrix that it quantizes: not among all that is there by now."""
    gc.freeze()
    yield
    gc.unfreeze()


def functional(layer, name):
    """A Keras model of the layer, and inputs of it."""
    if name == "Transformer":
        x = [np.random.default_rng(i).integers(2, 11, (2, 5)).astype("int32") for i in (0, 1)]
        inputs = [keras.Input((None,), dtype="int32") for _ in x]
        return keras.Model(inputs, layer(tuple(inputs))), x
    tokens = np.random.default_rng(0).integers(1, 11, (2, 5)).astype("int32")
    x = tokens if hasattr(layer, "vocab_size") else normal(2, 5, 8)
    inputs = keras.Input((None, *x.shape[2:]), dtype=x.dtype.name)
    return keras.Model(inputs, layer(inputs)), [x]


def outputs(model, x):
    """Compiled: eager JAX compiles each call of a quantized layer."""
    return arrays(backend.current().compiled(lambda *x: model(x[0] if len(x) == 1 else x), model)(*tensors(x)))[0]


def matrices(layer):
    """The dense layers inside, and the embeddings."""
    kinds = keras.layers.Dense, keras.layers.EinsumDense, keras.layers.Embedding
    return [part for part in layer._flatten_layers() if isinstance(part, kinds)]


@pytest.mark.parametrize("name", LAYERS)
def test_int4_saved_and_loaded(name, tmp_path):
    """As int8, which is among the checks of conformance."""
    layer = LAYERS[name]()
    model, x = functional(layer, name)
    before = outputs(model, x)
    model.quantize("int4")
    assert {part.quantization_mode for part in matrices(layer)} == {"int4"}
    y = outputs(model, x)
    assert np.abs(y - before).max() < 0.6 * np.abs(before).max()
    model.save(tmp_path / "model.keras")
    close(outputs(keras.saving.load_model(tmp_path / "model.keras"), x), y, 1e-12)


@pytest.mark.parametrize("name", LAYERS)
def test_lora(name):
    """With LoRA on every matrix nothing changes at first; then only the factors train."""
    layer = LAYERS[name]()
    model, x = functional(layer, name)
    before = outputs(model, x)
    for part in matrices(layer):
        part.enable_lora(2)
    close(outputs(model, x), before, 1e-5)
    large = [w.path for w in layer.trainable_weights if len(w.shape) > 1 and w.name != "bias"]
    assert all("lora" in path or "position" in path for path in large), large
    compile_for_test(model, "adam")
    model.fit(x[0] if len(x) == 1 else tuple(x), 0 * before, verbose=0)
    assert np.abs(outputs(model, x) - before).max() > 0
