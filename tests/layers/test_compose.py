"""Stack, Residual and TimeWise against composing by hand."""

import keras
import numpy as np
import pytest
from cases import MASKS, B, D, T, U, arrays, close, normal, refused, tensors

from keras_seq import layers


def parts():
    """Layers with weights of their own, to be run by hand and in a composition."""
    made = [
        layers.LSTM(U, return_sequences=True, name="first"),
        keras.layers.Dense(D, activation="tanh"),
        layers.GRU(D, return_sequences=True, name="second"),
    ]
    for layer, size in zip(made, (D, U, D), strict=True):
        layer.build((None, None, size))
    return made


@pytest.mark.parametrize("mask", [None, MASKS["holes"]], ids=["no mask", "holes"])
def test_stack_is_one_layer_after_another(mask):
    lstm, dense, gru = parts()
    x, mask = tensors((normal(B, T, D), mask))
    first, lstm_state = lstm(x, mask=mask, return_state=True)
    second, gru_state = gru(dense(first), mask=mask, return_state=True)
    stack = layers.Stack([lstm, dense, gru])
    close(stack(x, mask=mask, return_state=True), (second, (lstm_state, (), gru_state)), 1e-6)
    close(stack(x, mask=mask), second, 1e-6)


def test_stack_goes_on_from_a_state():
    stack = layers.Stack(parts())
    x = normal(B, T, D)
    whole, last = stack(x, return_state=True)
    _, state = stack(x[:, :3], return_state=True)
    close(stack(x[:, 3:], initial_state=state, return_state=True), (whole[:, 3:], last))
    y, state = stack.step(tensors(x[:, 0]), stack.initial_state(B))
    close(y, whole[:, 0])
    assert isinstance(state, tuple)
    assert len(state) == 3


def test_stack_takes_one_layer_and_any_last_layer():
    lstm, dense, _ = parts()
    x = normal(B, T, D)
    close(layers.Stack(lstm)(x), lstm(x))
    last = layers.GRU(3)
    stack = layers.Stack([lstm, dense, last])
    y = stack(x)
    assert not stack.return_sequences
    assert y.shape == (B, 3)
    assert stack.compute_output_shape((B, T, D)) == (B, 3)
    close(y, last(dense(lstm(x))))


def test_stacks_nest():
    lstm, dense, gru = parts()
    x = normal(B, T, D)
    y, ((lstm_state, ()), gru_state) = layers.Stack([layers.Stack([lstm, dense]), gru])(x, return_state=True)
    expected, (flat_lstm, _, flat_gru) = layers.Stack([lstm, dense, gru])(x, return_state=True)
    close((y, lstm_state, gru_state), (expected, flat_lstm, flat_gru))


@pytest.mark.parametrize("mask", [None, MASKS["holes"]], ids=["no mask", "holes"])
def test_residual_adds_its_input(mask):
    lstm, dense, gru = parts()
    x, mask = tensors((normal(B, T, D), mask))
    inside, state = layers.Stack([lstm, dense, gru])(x, mask=mask, return_state=True)
    y, last = layers.Residual([lstm, dense, gru])(x, mask=mask, return_state=True)
    x = arrays(x)[0] if mask is None else arrays(x)[0] * MASKS["holes"][:, :, None]  # padding is taken for 0
    close((y, last), (x + arrays(inside)[0], state))


def test_residual_takes_one_layer():
    layer = layers.GRU(D, return_sequences=True)
    x = normal(B, T, D)
    close(layers.Residual(layer)(x), x + arrays(layer(x))[0])


@pytest.mark.parametrize(
    "make",
    [
        lambda: keras.layers.Dense(3),
        lambda: keras.layers.LayerNormalization(),
        lambda: keras.layers.Dropout(0.5),
        lambda: keras.layers.Activation("relu"),
        lambda: keras.layers.TimeDistributed(keras.layers.Dense(3)),
        lambda: keras.Sequential([keras.layers.Dense(3), keras.layers.Dense(2)]),
    ],
    ids=["Dense", "LayerNormalization", "Dropout", "Activation", "TimeDistributed", "Sequential"],
)
def test_time_wise_is_the_layer(make):
    layer, x = make(), normal(B, T, D)
    expected = layer(x)
    y, state = layers.TimeWise(layer)(x, return_state=True)
    close(y, expected)
    assert state == ()


def test_time_wise_drops_in_training_only():
    layer, x = layers.TimeWise(keras.layers.Dropout(0.5)), np.ones((B, T, D), "float32")
    close(layer(x), x)
    np.testing.assert_array_equal(np.unique(arrays(layer(x, training=True))[0]), [0, 2])


def test_an_embedding_masks_what_follows():
    embedding, lstm, dense = keras.layers.Embedding(9, D, mask_zero=True), *parts()[:2]
    gru = layers.GRU(3)
    tokens = np.random.default_rng(0).integers(1, 9, (B, T)).astype("int32") * MASKS["right"]
    x, mask = arrays(embedding(tokens))[0], MASKS["right"]
    expected = gru(dense(lstm(x, mask=mask)), mask=mask)
    close(layers.Stack([embedding, lstm, dense, gru])(tokens), expected)
    alone = layers.Stack([embedding, lstm, dense, gru])(tokens[1:2, : mask[1].sum()])
    close(expected[1:2], alone)


def test_the_mask_goes_on_to_the_next_layer():
    stack = layers.Stack(parts())
    y = stack(keras.layers.Masking()(normal(B, T, D) * MASKS["right"][:, :, None]))
    np.testing.assert_array_equal(arrays(y._keras_mask)[0], MASKS["right"])
    assert layers.Stack([layers.GRU(3)]).compute_mask(None, MASKS["right"]) is None


def test_explicit_states_in_a_functional_model():
    stack = layers.Stack(parts())
    x = keras.Input((None, D))
    state = keras.tree.map_structure(lambda s: keras.Input(s.shape[1:]), stack.initial_state(1))
    y, last = stack(x, initial_state=state, return_state=True)
    model = keras.Model([x, *keras.tree.flatten(state)], [y, *keras.tree.flatten(last)])
    given = [normal(B, T, D), normal(B, U, seed=1), normal(B, U, seed=2), normal(B, D, seed=3)]
    expected = stack(given[0], initial_state=((given[1], given[2]), (), given[3]), return_state=True)
    close(model.predict(given, verbose=0), expected)


MIX_TIME = {
    "Conv1D": lambda: keras.layers.Conv1D(3, 2),
    "GlobalAveragePooling1D": lambda: keras.layers.GlobalAveragePooling1D(),
    "Flatten": lambda: keras.layers.Flatten(),
    "LSTM": lambda: keras.layers.LSTM(3),
    "Bidirectional": lambda: keras.layers.Bidirectional(keras.layers.GRU(3)),
    "MultiHeadAttention": lambda: keras.layers.MultiHeadAttention(2, 3),
    "a number": lambda: 7,
    "a function": lambda: lambda x: x,
}


@pytest.mark.parametrize("make", MIX_TIME.values(), ids=MIX_TIME)
@pytest.mark.parametrize("wrap", [layers.TimeWise, lambda x: layers.Stack([x]), lambda x: layers.Residual([x])])
def test_what_mixes_time_steps_is_refused(wrap, make):
    refused(lambda: wrap(make()), "TimeWise", "each time step alone", "Received:")


def test_a_sequence_layer_is_not_time_wise():
    refused(lambda: layers.TimeWise(layers.LSTM(3)), "each time step alone", "LSTM")


@pytest.mark.parametrize("wrap", [layers.TimeWise, lambda x: layers.Stack([x])])
def test_a_change_of_the_number_of_steps_is_refused(wrap):
    class Halves(keras.layers.Layer):
        def call(self, x):
            return x[:, ::2]

        def compute_output_shape(self, input_shape):
            return (input_shape[0], input_shape[1] // 2, *input_shape[2:])

    refused(lambda: wrap(Halves())(normal(B, 6, D)), "each time step alone", "(4, 3, 5)", "(4, 6, 5)")


@pytest.mark.parametrize(
    ("attempt", "words"),
    [
        (lambda: layers.Stack([]), ["at least one layer", "[]"]),
        (lambda: layers.Stack([layers.LSTM(3, name="mine"), layers.GRU(3)]), ["return_sequences=True", "mine"]),
        (lambda: layers.Stack([layers.LSTM(3, stateful=True, name="mine")]), ["stateful=True", "mine"]),
        (lambda: layers.Stack([layers.LSTM(3, return_state=True, name="mine")]), ["return_state=True", "mine"]),
        (lambda: layers.Residual([layers.LSTM(3, name="mine")]), ["return_sequences=True", "mine"]),
        (lambda: layers.Residual(layers.LSTM(3, return_sequences=True))(normal(B, T, D)), ["(4, 7, 3)", "(4, 7, 5)"]),
        (
            lambda: layers.Stack(layers.Bidirectional(layers.GRU(3), name="both"), name="mine").step(normal(B, D), ()),
            ["Stack 'mine'", "step", "Bidirectional 'both'", "end of the sequence"],
        ),
        (
            lambda: layers.Stack(layers.GRU(3, go_backwards=True, name="g"), stateful=True, name="mine"),
            ["Stack 'mine'", "stateful=True", "GRU 'g'", "go_backwards=True"],
        ),
        (
            lambda: layers.Stack(parts(), name="mine")(normal(B, T, D), initial_state=normal(B, U)),
            ["Stack 'mine'", "(((4, 6), (4, 6)), (), (4, 5))", "Received: (4, 6)"],
        ),
        (
            lambda: layers.Stack(parts(), name="mine")(
                normal(B, T, D), initial_state=((normal(B, U), normal(B, U)), (), normal(B, U))
            ),
            ["Stack 'mine'", "(((4, 6), (4, 6)), (), (4, 5))", "Received: (((4, 6), (4, 6)), (), (4, 6))"],
        ),
        (
            lambda: layers.Stack(parts(), name="mine")(normal(B, T, D), mask=np.ones((B, T + 1), bool)),
            ["Stack 'mine'", "(4, 7)", "(4, 8)"],
        ),
        (lambda: layers.Stack(parts(), name="mine")(normal(B, 0, D)), ["Stack 'mine'", "one time step", "(4, 0, 5)"]),
        (lambda: layers.Stack(parts())(normal(B, D)), ["expected", "(4, 5)"]),
        (lambda: layers.Stack(parts())(normal(B, T, D + 1)), ["expected", "(4, 7, 6)"]),
    ],
)
def test_errors_say_what_came_and_what_was_expected(attempt, words):
    refused(attempt, *words)
