"""Wrong arguments of SimpleRNN, LSTM and GRU: a ValueError that says what came and what was expected."""

import numpy as np
import pytest
from cases import B, D, T, U, normal, refused

from keras_seq import layers

KINDS = [layers.SimpleRNN, layers.LSTM, layers.GRU]


def built(kind, **config):
    layer = kind(U, name="mine", **config)
    layer.build((None, None, D))
    return layer


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("units", [0, -3, 2.5, "8", None])
def test_units(kind, units):
    refused(lambda: kind(units), "`units` must be a positive integer", f"units={units!r}")


@pytest.mark.parametrize("kind", KINDS)
def test_activation(kind):
    refused(lambda: kind(U, activation="tanhh"), "activation", "tanhh")
    if kind is not layers.SimpleRNN:
        refused(lambda: kind(U, recurrent_activation="sigmoidd"), "activation", "sigmoidd")


@pytest.mark.parametrize("kind", KINDS)
def test_initializer(kind):
    refused(lambda: kind(U, kernel_initializer="glorot_unform"), "initializer", "glorot_unform")


@pytest.mark.parametrize("kind", KINDS)
def test_unknown_argument(kind):
    with pytest.raises((ValueError, TypeError), match="retrun_sequences"):
        kind(U, retrun_sequences=True)


@pytest.mark.parametrize("shape", [(B, D), (B, T, D, 1), (B,)])
@pytest.mark.parametrize("kind", KINDS)
def test_rank(kind, shape):
    refused(lambda: built(kind)(normal(*shape)), "mine", "ndim=3", str(shape))
    refused(lambda: kind(U, name="mine")(normal(*shape)), "mine", "ndim=3", str(shape))


@pytest.mark.parametrize("kind", KINDS)
def test_feature_size(kind):
    refused(lambda: built(kind)(normal(B, T, D + 1)), "mine", "value 5", "(4, 7, 6)")


@pytest.mark.parametrize("kind", KINDS)
def test_no_time_steps(kind):
    refused(lambda: built(kind)(normal(B, 0, D)), "'mine'", "at least one time step", "(4, 0, 5)")


@pytest.mark.parametrize(
    ("mask", "received"),
    [
        (np.ones((B, T + 1), bool), "bool of shape (4, 8)"),
        (np.ones((B + 1, T), bool), "bool of shape (5, 7)"),
        (np.ones((B,), bool), "bool of shape (4,)"),
        (np.ones((B, T, 1), bool), "bool of shape (4, 7, 1)"),
        (np.ones((B, T), "float32"), "float32 of shape (4, 7)"),
        (np.ones((B, T), "int32"), "int32 of shape (4, 7)"),
    ],
)
def test_mask(mask, received):
    expected = "mask of dtype bool and shape (batch, time) = (4, 7)"
    refused(lambda: built(layers.GRU)(normal(B, T, D), mask=mask), "GRU 'mine'", expected, f"Received: {received}")


@pytest.mark.parametrize(
    ("kind", "shapes", "expected", "received"),
    [
        (layers.LSTM, [(B, U)], "((4, 6), (4, 6))", "[(4, 6)]"),
        (layers.LSTM, [(B, U)] * 3, "((4, 6), (4, 6))", "[(4, 6), (4, 6), (4, 6)]"),
        (layers.LSTM, [(B, U), (B, U + 1)], "((4, 6), (4, 6))", "[(4, 6), (4, 7)]"),
        (layers.LSTM, [(B, U), (B + 1, U)], "((4, 6), (4, 6))", "[(4, 6), (5, 6)]"),
        (layers.GRU, [(B, U)] * 2, "(4, 6)", "[(4, 6), (4, 6)]"),
        (layers.GRU, [(B, U + 1)], "(4, 6)", "[(4, 7)]"),
        (layers.SimpleRNN, [(1, B, U)], "(4, 6)", "[(1, 4, 6)]"),
    ],
)
def test_state(kind, shapes, expected, received):
    state = [normal(*shape) for shape in shapes]
    words = f"{kind.__name__} 'mine'", f"expects a state of shapes {expected}", f"Received: {received}"
    refused(lambda: built(kind)(normal(B, T, D), initial_state=state), *words)
    refused(lambda: built(kind).step(normal(B, D), state), *words)


@pytest.mark.parametrize("state", [7, "zeros", [None, None], {"h": 1}])
def test_what_is_no_state(state):
    refused(lambda: built(layers.LSTM)(normal(B, T, D), initial_state=state), "LSTM 'mine'", "((4, 6), (4, 6))")


@pytest.mark.parametrize("kind", KINDS)
def test_a_wrong_state_after_steps_that_were_right(kind):
    """Checks that are skipped for a known signature are not skipped for another one."""
    layer = built(kind)
    state = layer.initial_state(B)
    for _ in range(3):
        _, state = layer.step(normal(B, D), state)
    wrong = layer.initial_state(B + 1)
    refused(lambda: layer.step(normal(B, D), wrong), f"{kind.__name__} 'mine'", "(4, 6)", "(5, 6)")


@pytest.mark.parametrize("x", [7, None, [1.0, 2.0]])
def test_step_of_what_is_no_step(x):
    layer = built(layers.GRU)
    refused(lambda: layer.step(x, layer.initial_state(B)), "GRU 'mine'", "(batch, ...)", repr(x))


@pytest.mark.parametrize("kind", KINDS)
def test_going_backwards_needs_the_future(kind):
    layer = built(kind, go_backwards=True)
    words = f"{kind.__name__} 'mine'", "go_backwards=True"
    refused(lambda: layer.step(normal(B, D), layer.initial_state(B)), *words, "step")
    refused(lambda: layer(normal(B, T, D), return_state=True), *words, "return_state=True")
    refused(lambda: kind(U, name="mine", go_backwards=True, stateful=True), *words, "stateful=True")
