"""RNN: Keras's cells against `keras.layers.RNN`, this library's cells against loops in NumPy, cells of a user."""

import keras
import numpy as np
import pytest
from cases import MASKS, B, D, T, U, arrays, call, close, compile_for_test, normal, same_weights, tensors
from keras import ops

from keras_seq import layers

KERAS_CELLS = {
    "SimpleRNNCell": lambda: keras.layers.SimpleRNNCell(U),
    "LSTMCell": lambda: keras.layers.LSTMCell(U),
    "GRUCell": lambda: keras.layers.GRUCell(U),
    "list of cells": lambda: keras.layers.StackedRNNCells([keras.layers.GRUCell(4), keras.layers.LSTMCell(U)]),
}


@pytest.mark.parametrize("mask", [None, MASKS["holes"]], ids=["no mask", "holes"])
@pytest.mark.parametrize("cell", KERAS_CELLS.values(), ids=KERAS_CELLS)
def test_cells_of_keras_run_as_in_keras(cell, mask):
    ours, theirs = same_weights(
        *(library.RNN(cell(), return_sequences=True, return_state=True) for library in (layers, keras.layers))
    )
    close(call(ours, normal(B, T, D), mask), call(theirs, normal(B, T, D), mask))


def test_options_are_those_of_keras():
    options = {"go_backwards": True, "zero_output_for_mask": True, "unroll": False, "return_sequences": True}
    ours, theirs = same_weights(
        *(library.RNN(keras.layers.GRUCell(U), **options) for library in (layers, keras.layers))
    )
    close(call(ours, normal(B, T, D), MASKS["right"]), call(theirs, normal(B, T, D), MASKS["right"]))


def test_starts_from_the_state_of_keras():
    ours, theirs = same_weights(
        *(library.RNN(keras.layers.LSTMCell(U), return_state=True) for library in (layers, keras.layers))
    )
    state = [normal(B, U, seed=1), normal(B, U, seed=2)]
    close(call(ours, normal(B, T, D), None, state), call(theirs, normal(B, T, D), None, state))


@pytest.mark.parametrize("name", ["LSTM", "GRU", "SimpleRNN"])
def test_a_cell_gives_what_the_layer_gives(name):
    layer, cells = same_weights(
        getattr(layers, name)(U, return_sequences=True),
        layers.RNN(getattr(keras.layers, f"{name}Cell")(U), return_sequences=True),
    )
    close(call(cells, normal(B, T, D)), call(layer, normal(B, T, D)))


def test_trains_with_dropout_in_the_cell():
    layer = layers.RNN(keras.layers.GRUCell(U, dropout=0.3, recurrent_dropout=0.2))
    inputs = keras.Input((None, D))
    model = keras.Model(inputs, layer(inputs))
    compile_for_test(model, "sgd")
    before, x = model.get_weights(), normal(2 * B, T, D)
    model.fit(x, normal(2 * B, U, seed=1), epochs=2, batch_size=B, verbose=0)
    for old, new in zip(before, model.get_weights(), strict=True):
        assert np.isfinite(new).all()
        assert not np.array_equal(old, new)
    predictions = [model.predict(x, verbose=0) for _ in range(2)]
    np.testing.assert_array_equal(*predictions)
    assert np.abs(arrays(call(layer, x, training=True))[0] - predictions[0]).max() > 1e-3


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def norm(a, gain):
    return gain * (a - a.mean(-1, keepdims=True)) / np.sqrt(a.var(-1, keepdims=True) + 1e-5)


def layer_norm_lstm(x, h, c, w):
    z = norm(x @ w["kernel"], w["input_gain"]) + norm(h @ w["recurrent_kernel"], w["recurrent_gain"]) + w["bias"]
    i, f, g, o = np.split(z, 4, -1)
    c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
    return sigmoid(o) * np.tanh(norm(c, w["state_gain"]) + w["state_bias"]), c


def peephole_lstm(x, h, c, w):
    i, f, g, o = np.split(x @ w["kernel"] + h @ w["recurrent_kernel"] + w["bias"], 4, -1)
    p_i, p_f, p_o = np.split(w["peephole"], 3)
    c = sigmoid(f + p_f * c) * c + sigmoid(i + p_i * c) * np.tanh(g)
    return sigmoid(o + p_o * c) * np.tanh(c), c


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize(
    ("cell", "step"), [(layers.LayerNormLSTMCell, layer_norm_lstm), (layers.PeepholeLSTMCell, peephole_lstm)]
)
def test_cells_equal_numpy(cell, step, mask):
    layer = layers.RNN(cell(U), return_sequences=True)
    layer.build((None, None, D))
    layer.set_weights([w + 0.3 * normal(*w.shape, seed=i) for i, w in enumerate(layer.get_weights())])
    weights = {w.name: np.asarray(v, "float64") for w, v in zip(layer.weights, layer.get_weights(), strict=True)}
    x, h, c = (normal(*shape, seed=i).astype("float64") for i, shape in enumerate([(B, T, D), (B, U), (B, U)]))
    got = call(layer, x.astype("float32"), mask, (h.astype("float32"), c.astype("float32")), return_state=True)
    outputs = []
    for t in range(T):
        valid = np.ones((B, 1), bool) if mask is None else mask[:, t, None]
        new_h, new_c = step(x[:, t], h, c, weights)
        h, c = np.where(valid, new_h, h), np.where(valid, new_c, c)
        outputs.append(h)
    close(got, (np.stack(outputs, 1), (h, c)))


@pytest.mark.parametrize("cell", [layers.LayerNormLSTMCell, layers.PeepholeLSTMCell])
def test_cells_take_the_options_of_lstm(cell):
    config = {
        "activation": "relu",
        "recurrent_activation": "hard_sigmoid",
        "unit_forget_bias": False,
        "bias_initializer": "ones",
        "kernel_regularizer": keras.regularizers.L2(0.1),
    }
    layer = layers.RNN(cell(U, **config))
    y = call(layer, normal(B, T, D))
    np.testing.assert_array_equal(arrays(layer.cell.bias.value)[0], np.ones(4 * U))
    assert len(layer.losses) == 1
    copy = layers.RNN.from_config(layer.get_config())
    copy.build((None, None, D))
    copy.set_weights(layer.get_weights())
    close(call(copy, normal(B, T, D)), y, 1e-12)
    without_bias = layers.RNN(cell(U, use_bias=False))
    without_bias.build((None, None, D))
    assert not any(w.name == "bias" for w in without_bias.weights)


class Counter:
    """A cell of plain Python: a dict of states, an output that is no part of it, and the flag `training`."""

    def initial_state(self, batch_size):
        return {"steps": ops.zeros((batch_size, 1)), "sum": ops.zeros((batch_size, D))}

    def __call__(self, x, state, training=False):
        state = {"steps": state["steps"] + 1, "sum": state["sum"] + x}
        return state["sum"] / state["steps"] + (100.0 if training else 0.0), state


def test_a_cell_of_plain_python():
    layer = layers.RNN(Counter(), return_sequences=True)
    x, steps = normal(B, T, D), np.arange(1, T + 1)[:, None]
    y, (state, last) = layer(x, return_state=True)
    close(y, x.cumsum(1) / steps)
    close(state, {"steps": np.full((B, 1), T, "float32"), "sum": x.sum(1)})
    close(last, x.mean(1))
    close(layer(x, training=True), 100 + x.cumsum(1) / steps)


def test_a_padded_step_repeats_the_output_of_the_cell():
    layer = layers.RNN(Counter(), return_sequences=True)
    x, mask = normal(B, T, D), MASKS["holes"]
    kept, steps = (x * mask[:, :, None]).cumsum(1), mask.cumsum(1)[:, :, None]
    close(layer(*tensors((x, mask))), np.where(steps > 0, kept / np.maximum(steps, 1), 0))


@pytest.mark.parametrize("cell", [7, None, "lstm", keras.layers.Dense(3), lambda x, state: (x, state)])
def test_what_is_no_cell_is_refused(cell):
    with pytest.raises(ValueError, match=r"(?s)callable.*initial_state.*Received: "):
        layers.RNN(cell)


def test_says_what_state_it_expects():
    layer = layers.RNN(layers.PeepholeLSTMCell(U), name="mine")
    with pytest.raises(ValueError, match=r"RNN 'mine'.*\(\(4, 6\), \(4, 6\)\).*Received: \[\(4, 5\), \(4, 6\)\]"):
        layer(normal(B, T, D), initial_state=[normal(B, 5), normal(B, U)])


@pytest.mark.parametrize("cell", [layers.LayerNormLSTMCell, layers.PeepholeLSTMCell])
@pytest.mark.parametrize("units", [0, -1, 2.5, None])
def test_units_below_one_are_refused(cell, units):
    with pytest.raises(ValueError, match=rf"positive integer.*units={units}"):
        cell(units)
