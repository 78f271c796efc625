"""Parts of layers made ready for a loop of single steps: functions of `(b, ...)` that have looked everything up."""

import math

import keras
from keras import ops

from keras_seq.base import dtype_of
from keras_seq.layers.dense import is_product
from keras_seq.ops.dense import product
from keras_seq.ops.norm import layer_norm, rms_norm


def products(*layers, rows, steps=1):
    """`x (b, ...)` times the kernels of `matrix` layers, side by side `(b, n)`; None if one is more than a product."""
    if not all(is_product(layer) for layer in layers):
        return None
    features = math.prod(layers[0].kernel.shape[: layers[0].equation.index(",") - 2])
    kernel = _side_by_side([ops.reshape(layer.kernel, (features, -1)) for layer in layers])
    biases = [ops.reshape(layer.bias, (-1,)) for layer in layers if layer.bias is not None]
    return product(kernel, _side_by_side(biases) if biases else None, rows, steps)


def _side_by_side(xs):
    return xs[0] if len(xs) == 1 else ops.concatenate(xs, axis=-1)


def logits_of(embedding, rows, steps=1):
    """`(b, d) -> (b, vocab_size)` by a `ReversibleEmbedding`; None if it is more than a product."""
    if not is_product(embedding):
        return None
    kernel = ops.transpose(embedding.embeddings) if embedding.tie_weights else embedding.reverse_embeddings
    return product(ops.convert_to_tensor(kernel), None, rows, steps)


def norm_of(layer):
    """A `LayerNormalization` or `RMSNormalization` over the last axis."""
    plain = layer.compute_dtype == layer.variable_dtype and dtype_of(layer.weights[0]) in ("float32", "float64")
    if plain and isinstance(layer, keras.layers.RMSNormalization):
        scale, epsilon = ops.convert_to_tensor(layer.scale), layer.epsilon
        return lambda x: rms_norm(x, scale, epsilon)
    if plain and isinstance(layer, keras.layers.LayerNormalization) and layer.scale and layer.center:
        gamma, beta = (ops.convert_to_tensor(w) for w in (layer.gamma, layer.beta))
        epsilon = layer.epsilon
        return lambda x: layer_norm(x, gamma, beta, epsilon)
    return lambda x: layer(x[:, None])[:, 0]
