"""Products with the matrices of weights."""

import math

from keras import ops

from keras_seq.backend import leaner


@leaner
def dense(x, kernel, bias=None, axes=1):
    """`x W + b` over the last axes of x, as one matrix product.

    Args:
        x: `(b, ..., d)`, or with more axes for d.
        kernel: W `(d, n)`, or with more axes for d and for n.
        bias: b, of the axes of n, or None.
        axes: number of axes of d.

    Returns:
        `(b, ..., n)`, with the axes of n.
    """
    features, columns = math.prod(kernel.shape[:axes]), kernel.shape[axes:]
    y = ops.reshape(x, (-1, features)) @ ops.reshape(kernel, (features, -1))
    y = y if bias is None else y + ops.reshape(bias, (-1,))
    return ops.reshape(y, (-1, *ops.shape(x)[1:-axes], *columns))
