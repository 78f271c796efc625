"""Projections by Keras's dense layers, whose matrices `quantize` and LoRA reach."""

import keras

from keras_seq import initializers
from keras_seq.base import dtype_of
from keras_seq.ops.dense import dense


def matrix(kernel_shape, axes=1, use_bias=True, kernel="glorot_uniform", bias="zeros", **kwargs):
    """A built `EinsumDense` on `(b, t, ...)` with a kernel of this shape, whose first `axes` axes are summed over."""
    rows, columns = "cdef"[:axes], "ghij"[: len(kernel_shape) - axes]
    layer = keras.layers.EinsumDense(
        f"ab{rows},{rows}{columns}->ab{columns}",
        output_shape=(None, *kernel_shape[axes:]),
        bias_axes=columns if use_bias else None,
        kernel_initializer=initializers.of_matrix(kernel, axes),
        bias_initializer=initializers.of_matrix(bias, 1),
        **kwargs,
    )
    layer.build((None, None, *kernel_shape[:axes]))
    return layer


def is_product(layer):
    """Whether a dense layer or an embedding is no more than the product with its kernel."""
    plain = layer.compute_dtype == layer.variable_dtype and layer.quantization_mode is None
    return plain and not layer.lora_enabled and layer.activity_regularizer is None


def project(layer, x):
    """`layer(x)`, for a `matrix` or a `Dense` on `(b, t, ...)`: by one plain product where it is no more than that."""
    if is_product(layer) and dtype_of(x) == layer.compute_dtype:
        return dense(x, layer.kernel, layer.bias, axes=len(x.shape) - 2)
    return layer(x)
