"""The loop over time gives what the same steps give written out one after another, gradients too."""

from functools import partial

import keras
import numpy as np
import pytest
from keras import ops

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
