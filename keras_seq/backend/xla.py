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
