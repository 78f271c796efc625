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


@leaner
def product(kernel, bias=None, rows=None, steps=1):
    """`dense` on single steps, made ready for many of them: a function `x (b, ...) -> x W + b (b, n)`.

    Args:
        kernel: W `(d, n)`, where d is the size of all axes of x but the first.
        bias: b `(n,)`, or None.
        rows: b, if it is known.
        steps: how often, about, the function will be called: whether it pays to lay out a matrix anew.
    """
    features = kernel.shape[0]

    def apply(x):
        y = ops.reshape(x, (-1, features)) @ kernel
        return y if bias is None else y + bias

    return apply


@leaner
def heads_of(y, counts, size):
    """`(b, n)` cut into heads: for each of the counts `(b, count, 1, size)`."""
    heads = ops.reshape(y, (-1, sum(counts), 1, size))
    if len(counts) == 1:
        return (heads,)
    return ops.split(heads, [sum(counts[:i]) for i in range(1, len(counts))], axis=1)
