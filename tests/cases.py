"""Small shapes, masks and comparisons, shared by the tests of recurrences."""

import re

import keras
import numpy as np
import pytest
from keras import ops, tree

from keras_seq import SequenceLayer, backend

B, T, D, U = 4, 7, 5, 6

MASKS = {
    "no mask": None,
    "right": np.arange(T) < np.array([7, 5, 1, 3])[:, None],
    "left": np.arange(T) >= np.array([2, 0, 6, 4])[:, None],
    "holes": np.array([[0, 0, 0, 0, 0, 0, 0], [1, 0, 1, 1, 0, 0, 1], [0, 1, 0, 0, 1, 1, 0], [1, 1, 1, 1, 1, 1, 1]]) > 0,
}


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def tensors(nest):
    return tree.map_structure(lambda x: None if x is None else ops.convert_to_tensor(x), nest)


def arrays(nest):
    return [np.asarray(ops.convert_to_numpy(x)) for x in tree.flatten(nest)]


def close(got, expected, tolerance=2e-6, what=""):
    """Each array of a nest within the tolerance, relative to its largest value."""
    got, expected = arrays(got), arrays(expected)
    assert len(got) == len(expected), f"{what}: {len(got)} arrays, expected {len(expected)}"
    for i, (g, e) in enumerate(zip(got, expected, strict=True)):
        np.testing.assert_allclose(
            g, e, rtol=0, atol=tolerance * max(np.abs(e).max(), 1e-3), err_msg=f"{what}: array {i}"
        )


def call(layer, x, mask=None, initial_state=None, **kwargs):
    """`layer(...)` on arrays. Layers of Keras are compiled, because their loops are slow on JAX without."""

    def function(x, mask, initial_state):
        return layer(x, mask=mask, initial_state=initial_state, **kwargs)

    if not layer.built:
        layer.build((None, None, x.shape[-1]))
    if not isinstance(layer, SequenceLayer):
        function = backend.current().compiled(function, layer)
    return function(*tensors((x, mask, initial_state)))


def same_weights(ours, theirs, features=D, seed=3):
    """Builds both and gives both the same weights, none of them zero."""
    for layer in (theirs, ours):
        layer.build((None, None, features))
    weights = [0.5 * normal(*w.shape, seed=seed + i) for i, w in enumerate(theirs.get_weights())]
    assert [w.shape for w in ours.get_weights()] == [w.shape for w in weights]
    theirs.set_weights(weights)
    ours.set_weights(theirs.get_weights())
    return ours, theirs


def refused(attempt, *words):
    """`attempt()` raises a ValueError whose message has all these words, in any order."""
    with pytest.raises(ValueError, match="(?s)" + "".join(f"(?=.*{re.escape(word)})" for word in words)):
        attempt()


def compile_for_test(model, optimizer, loss="mse", graph=True):
    """JAX is compiled, because its eager loops are slow; TensorFlow is not, because XLA compiles for long.

    Where `graph` is False TensorFlow does not even make a graph, which takes longer than a few steps.
    """
    eagerly = keras.config.backend() == "tensorflow" and not graph
    model.compile(optimizer, loss, jit_compile=keras.config.backend() == "jax", run_eagerly=eagerly)
