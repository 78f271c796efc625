"""Functions of single steps, in decoding: `keras.ops` without the cost of its calls, where that is what counts."""

from keras import ops

from keras_seq.backend import leaner


@leaner
def sigmoid(x):
    """`1 / (1 + exp(-x))`."""
    return ops.sigmoid(x)


@leaner
def tanh(x):
    """Hyperbolic tangent."""
    return ops.tanh(x)


@leaner
def squared_relu(x):
    """`max(x, 0)^2`."""
    return ops.square(ops.relu(x))


@leaner
def reshape(x, shape):
    """`ops.reshape`."""
    return ops.reshape(x, shape)


@leaner
def side_by_side(x, y):
    """Both joined along the last axis."""
    return ops.concatenate([x, y], axis=-1)


@leaner
def inner_product(x, y):
    """`sum(x y)` along the last axis, which stays with one entry."""
    return ops.sum(x * y, axis=-1, keepdims=True)


@leaner
def normalized(x):
    """x over its length along the last axis, or over 1e-12 if it is shorter, with a gradient at 0 too."""
    square = ops.sum(x * x, axis=-1, keepdims=True)
    return x * ops.rsqrt(ops.where(square > 1e-24, square, 1e-24))


@leaner
def wkv7_step(r, w, k, v, a, b, s):
    """One step of `wkv7`: `(b, h, n)` each and S `(b, h, n, n)` -> y `(b, h, n)` and the next S."""
    removed = s @ a[..., None]
    s = s * ops.exp(w)[..., None, :] + removed @ b[..., None, :] + v[..., None] @ k[..., None, :]
    return (s @ r[..., None])[..., 0], s
