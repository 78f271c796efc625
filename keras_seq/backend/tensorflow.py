"""TensorFlow kernels."""

import tensorflow as tf
from keras import tree


def scan(step, state, xs):
    """`tf.while_loop` over tensor arrays. The static length, which `stack` forgets, is put back."""
    leaves = tree.flatten(xs)
    length = leaves[0].shape[0]
    t = tf.shape(leaves[0])[0] if length is None else length
    arrays = [tf.TensorArray(x.dtype, t, element_shape=x.shape[1:]).unstack(x) for x in leaves]
    ys = step(state, tree.map_structure(lambda x: x[0], xs))[1]  # for its structure: pruned from a graph
    outputs = [tf.TensorArray(y.dtype, t, element_shape=y.shape) for y in tree.flatten(ys)]

    def body(i, state, outputs):
        new, y = step(state, tree.pack_sequence_as(xs, [a.read(i) for a in arrays]))
        new = tree.map_structure(lambda n, s: tf.ensure_shape(n, s.shape), new, state)
        return i + 1, new, [a.write(i, y) for a, y in zip(outputs, tree.flatten(y), strict=True)]

    _, state, outputs = tf.while_loop(lambda i, *_: i < t, body, (0, state, outputs), maximum_iterations=t)
    stacked = [tf.ensure_shape(a.stack(), (length, *y.shape)) for a, y in zip(outputs, tree.flatten(ys), strict=True)]
    return state, tree.pack_sequence_as(ys, stacked)
