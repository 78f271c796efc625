"""What JAX and TensorFlow share: kernels in `keras.ops` that are written for the compiler XLA."""

from keras import ops


def product(kernel, bias=None, rows=None, steps=1):
    features, columns = kernel.shape
    # One row is faster along the longer axis of the matrix; laid out anew before a loop, not in it.
    transposed = rows == 1 and steps > 1 and features > columns
    kernel = ops.transpose(kernel) if transposed else kernel

    def apply(x):
        x = ops.reshape(x, (-1, features))
        y = ops.transpose(kernel @ ops.transpose(x)) if transposed else x @ kernel
        return y if bias is None else y + bias

    return apply


def slower_in_chunks(name, x, training):
    """Why the recurrence `name` of `keras_seq.ops.wkv` on `x` `(b, t, ...)` is faster step by step, or None."""
    if x.shape[1] == 1:
        return "one step"
    if not training or name == "wkv4":
        return "XLA runs the steps faster"
    return None
