"""The loop over time gives what the same steps give written out one after another, gradients too."""

from functools import partial

import keras
import numpy as np
import pytest
from keras import ops, tree

from keras_seq import backend
from keras_seq.ops.scan import scan


class Table(keras.layers.Layer):
    """A layer with a weight that steps read from inside and from outside a loop."""

    def build(self, shape):
        self.table = self.add_weight(shape=(5, 3), name="table")
        self.drawn = keras.random.SeedGenerator(1)


def unrolled(step, state, xs):
    ys = []
    for t in range(ops.shape(xs[0])[0]):
        state, y = step(state, tuple(x[t] for x in xs))
        ys.append(y)
    return state, tuple(ops.stack(y) for y in zip(*ys, strict=True))


def inside(layer, matrix, bias):
    """A step with all that may meet the loop: tokens, a counter in the state, arrays and a weight from outside."""

    def step(state, x):
        (h, count), (token, given) = state, x
        h = ops.tanh(h @ matrix + ops.take(layer.table, token, axis=0) * given + bias)
        return (h, count + 1), (h * ops.cast(count, h.dtype), token + count, given)

    return step


@pytest.mark.parametrize("which", ["outputs", "state"])
def test_gradients_by_all_that_a_step_reads(which):
    layer = Table()
    layer.build(None)
    rng = np.random.default_rng(0)
    tokens = ops.convert_to_tensor([[0, 3], [3, 4], [2, 2], [3, 1]], dtype="int32")
    floats = [ops.convert_to_tensor(rng.normal(size=s).astype("float32")) for s in [(2, 3), (4, 2, 3), (3, 3), (3,)]]
    layer.table.assign(rng.normal(size=(5, 3)))

    def loss(run, floats, tokens):
        h, given, matrix, bias = floats
        state = h, ops.zeros((), "int32")
        (h, count), (y, moved, same) = run(inside(layer, matrix, bias), state, (tokens, given))
        value = ops.sum(h * h) if which == "state" else ops.sum(y * y * same)
        return value, (h, count, moved)

    results = []
    for run in (scan, unrolled):
        aux, by_weights, by_floats = backend.current().gradients(partial(loss, run), layer)(floats, tokens)
        results.append([ops.convert_to_numpy(a) for a in (*aux, *by_weights, *by_floats)])
    assert results[0][1] == 4
    for loop, written in zip(*results, strict=True):
        np.testing.assert_allclose(loop, written, rtol=1e-5, atol=1e-6)
        assert np.abs(loop).max() > 0


def test_gradients_inside_a_condition():
    """Where TensorFlow does not let a gradient of ours know which variables a step reads."""
    layer = Table()
    layer.build(None)
    layer.table.assign(np.random.default_rng(0).normal(size=(5, 3)))
    tokens = ops.convert_to_tensor([[0, 3], [3, 4], [2, 2], [3, 1]], dtype="int32")
    floats = [ops.convert_to_tensor(np.ones(s, "float32")) for s in [(2, 3), (4, 2, 3), (3, 3), (3,)]]

    def loss(conditional, floats, tokens):
        h, given, matrix, bias = floats

        def last():
            state, _ = scan(inside(layer, matrix, bias), (h, ops.zeros((), "int32")), (tokens, given))
            return ops.sum(state[0])

        value = ops.cond(tokens[0, 1] > 0, last, lambda: ops.sum(h)) if conditional else last()
        return value, value

    expected, got = (
        backend.current().gradients(partial(loss, conditional), layer)(floats, tokens) for conditional in (False, True)
    )
    for a, b in zip(tree.flatten(expected), tree.flatten(got), strict=True):
        np.testing.assert_allclose(ops.convert_to_numpy(a), ops.convert_to_numpy(b), rtol=1e-6)


@pytest.mark.skipif(keras.config.backend() != "tensorflow", reason="of TensorFlow's two graphs")
def test_gradients_from_outside_of_a_graph(monkeypatch):
    import tensorflow as tf

    by_hand, calls = backend.current()._scan_backward, []
    monkeypatch.setattr(backend.current(), "_scan_backward", lambda *args: calls.append(0) or by_hand(*args))
    x = tf.constant(np.ones((4, 2), "float32"))

    @tf.function
    def run(h, x):
        (h, count), y = scan(lambda s, x: ((s[0] * x, s[1] + 1), s[1]), (h, tf.zeros((), tf.int32)), x)
        return h, count, y

    with tf.GradientTape() as tape:
        tape.watch(x)
        h, count, _ = run(tf.ones(2), x)
    np.testing.assert_array_equal(tape.gradient(h, x), np.ones((4, 2)))
    assert count == 4
    assert calls


def test_gradients_of_drawn_numbers():
    """A step that draws numbers: the gradient is of what was drawn, not of other numbers."""
    layer = Table()
    layer.build(None)
    x = ops.convert_to_tensor(np.ones((6, 50), "float32"))

    def loss(floats):
        def step(state, x):
            y = keras.random.dropout(x, 0.5, seed=layer.drawn)
            return state + 1, y

        _, y = scan(step, ops.zeros(()), floats[0])
        return ops.sum(y), y

    y, _, (dx,) = backend.current().gradients(loss, layer)([x])
    y, dx = ops.convert_to_numpy(y), ops.convert_to_numpy(dx)
    assert (y == 0).any()
    assert (y != 0).any()
    np.testing.assert_array_equal(y, dx)
