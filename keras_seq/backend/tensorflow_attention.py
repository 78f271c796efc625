"""TensorFlow kernel of attention: block by block of queries (`blocks.py`), with and without XLA, and eagerly.

First derivatives only (`tf.custom_gradient`).
"""

import tensorflow as tf

from keras_seq.backend import blocks, refuses

_BLOCK, _PARTS = 128, 16  # of `blocks.prepared`; a loop is slower than its blocks one by one, twice the size is not


@refuses(blocks.refused)
@tf.autograph.experimental.do_not_convert
def attention(query, key, value, *, attention_mask=None, bias=None, dropout=None, return_weights=False, **structure):
    (_, h, q, _), n = query.shape, key.shape[1]
    size = _BLOCK if q <= _BLOCK * _PARTS else 2 * _BLOCK
    rules, given, parts = blocks.prepared(query, key, size, _PARTS, **structure)
    dtype = tf.float64 if query.dtype == tf.float64 else tf.float32
    rows = blocks.padded_length(parts) - q
    given = given._replace(
        query_positions=_padded(given.query_positions, rows), query_segments=_padded(given.query_segments, rows)
    )

    @tf.custom_gradient
    def heads(query, key, value, slopes=None):
        y, total = blocks.forward(query, key, value, given, slopes, rules, parts)

        def gradients(dy):
            of_inputs = blocks.backward(query, key, value, given, slopes, rules, parts, y, total, dy)
            return of_inputs[:3] if slopes is None else of_inputs

        return y, gradients

    def grouped(x):
        return tf.reshape(x, (-1, n, h // n, *x.shape[2:]))

    arrays = [grouped(tf.pad(query, ((0, 0), (0, 0), (0, rows), (0, 0)))), key, value]
    if structure.get("slopes") is not None:
        arrays.append(tf.reshape(structure["slopes"], (1, n, h // n, 1, 1)))
    y = heads(*(tf.cast(x, dtype) for x in arrays))
    return tf.cast(tf.reshape(y, (-1, h, q + rows, value.shape[3]))[:, :, :q], value.dtype)


def _padded(x, rows):
    return None if x is None else tf.pad(x, ((0, 0), (0, rows)))
