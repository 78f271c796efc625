"""Bidirectional against Keras's."""

import keras
import numpy as np
import pytest
from cases import MASKS, B, D, T, U, arrays, call, close, compile_for_test, normal, refused, same_weights

from keras_seq import layers


def make(library, name, merge_mode="concat", **config):
    cudnn = {"use_cudnn": False} if library is keras.layers and name != "SimpleRNN" else {}
    return library.Bidirectional(getattr(library, name)(U, **config, **cudnn), merge_mode=merge_mode)


def pair(name, merge_mode="concat", **config):
    return same_weights(*(make(library, name, merge_mode, **config) for library in (layers, keras.layers)))


@pytest.mark.parametrize("mask", [None, MASKS["right"]], ids=["no mask", "right"])
@pytest.mark.parametrize(
    ("name", "merge_mode", "return_sequences"),
    [
        ("LSTM", "concat", True),
        ("GRU", "sum", True),
        ("GRU", "ave", False),
        ("SimpleRNN", "mul", False),
        ("LSTM", None, True),
    ],
)
def test_outputs_and_states_are_those_of_keras(name, merge_mode, return_sequences, mask):
    ours, theirs = pair(name, merge_mode, return_sequences=return_sequences, return_state=True)
    close(call(ours, normal(B, T, D), mask), call(theirs, normal(B, T, D), mask))


@pytest.mark.parametrize("name", ["left", "holes"])
def test_other_masks_are_those_of_keras(name):
    ours, theirs = pair("GRU", return_sequences=True)
    close(call(ours, normal(B, T, D), MASKS[name]), call(theirs, normal(B, T, D), MASKS[name]))


@pytest.mark.parametrize("name", ["LSTM", "GRU"])
def test_starts_from_the_states_of_keras(name):
    """In Keras's flat list, and in pairs."""
    ours, theirs = pair(name, return_sequences=True, return_state=True)
    half = 2 if name == "LSTM" else 1
    flat = [normal(B, U, seed=i) for i in range(2 * half)]
    expected = arrays(call(theirs, normal(B, T, D), None, flat))
    close(call(ours, normal(B, T, D), None, flat), expected)
    pairs = (flat[:half], flat[half:]) if name == "LSTM" else tuple(flat)
    close(call(ours, normal(B, T, D), None, pairs), expected)


def test_result_is_the_merge_of_two_layers():
    layer = make(layers, "GRU", None, return_sequences=True)
    x = normal(B, T, D)
    forward, backward = layer(x)
    close(forward, layer.forward_layer(x))
    close(backward, np.flip(arrays(layer.backward_layer(x))[0], 1))


def test_a_backward_layer_of_another_kind():
    ours, theirs = (
        library.Bidirectional(
            library.LSTM(U, return_sequences=True),
            backward_layer=library.GRU(U, return_sequences=True, go_backwards=True),
        )
        for library in (layers, keras.layers)
    )
    same_weights(ours, theirs)
    close(call(ours, normal(B, T, D)), call(theirs, normal(B, T, D)))


def test_initial_weights_are_taken():
    given = [0.1 * normal(*w.shape, seed=i) for i, w in enumerate(pair("GRU")[0].get_weights())]
    layer = layers.Bidirectional(layers.GRU(U), weights=given)
    layer.build((None, None, D))
    for got, expected in zip(layer.get_weights(), given, strict=True):
        np.testing.assert_array_equal(got, expected)


def test_a_step_of_training_is_that_of_keras():
    models = []
    for library in (layers, keras.layers):
        inputs = keras.Input((None, D))
        layer = make(library, "GRU", return_sequences=True, kernel_regularizer=keras.regularizers.L2(0.01))
        model = keras.Model(inputs, layer(keras.layers.Masking()(inputs)))
        compile_for_test(model, keras.optimizers.SGD(0.5))
        models.append(model)
    ours, theirs = models
    weights = [0.5 * normal(*w.shape, seed=i) for i, w in enumerate(theirs.get_weights())]
    x, y = normal(B, T, D) * MASKS["right"][:, :, None], normal(B, T, 2 * U, seed=1)
    for model in models:
        model.set_weights(weights)
        model.train_on_batch(x, y)
    assert not any(np.array_equal(a, b) for a, b in zip(ours.get_weights(), weights, strict=True))
    close(ours.get_weights(), theirs.get_weights(), 1e-5)


@pytest.mark.parametrize(
    ("attempt", "words"),
    [
        (lambda: layers.Bidirectional(keras.layers.Dense(3)), ["`layer`", "recurrent layer", "Dense"]),
        (lambda: layers.Bidirectional(keras.layers.LSTM(3)), ["`layer`", "recurrent layer", "LSTM"]),
        (lambda: layers.Bidirectional(layers.GRU(3), backward_layer=7), ["`backward_layer`", "recurrent layer", "7"]),
        (lambda: layers.Bidirectional(layers.GRU(3), merge_mode="max"), ["merge_mode", "concat", "'max'"]),
        (lambda: layers.Bidirectional(layers.GRU(3, stateful=True)), ["stateful=True", "end of the sequence"]),
        (lambda: layers.Bidirectional(layers.GRU(3), stateful=True), ["stateful=True", "end of the sequence"]),
        (
            lambda: layers.Bidirectional(layers.GRU(3), backward_layer=layers.GRU(3)),
            ["go_backwards=True", "False and False"],
        ),
        (
            lambda: layers.Bidirectional(
                layers.GRU(3), backward_layer=layers.GRU(3, go_backwards=True, return_sequences=True)
            ),
            ["same return_sequences", "False and True"],
        ),
        (
            lambda: layers.Bidirectional(layers.GRU(3, name="g"), name="both").step(normal(B, D), ()),
            ["Bidirectional 'both'", "step", "end of the sequence"],
        ),
        (
            lambda: layers.Bidirectional(layers.GRU(3), name="both")(normal(B, T, D), return_state=True),
            ["Bidirectional 'both'", "return_state=True", "end of the sequence"],
        ),
        (
            lambda: layers.Bidirectional(layers.GRU(3), name="both")(normal(B, T, D), initial_state=[normal(B, 3)]),
            ["Bidirectional 'both'", "(4, 3), (4, 3)", "[(4, 3)]"],
        ),
        (
            lambda: layers.Bidirectional(layers.GRU(3), name="both")(normal(B, T, D), initial_state=[normal(B, 3)] * 4),
            ["Bidirectional 'both'", "(4, 3), (4, 3)", "[(4, 3), (4, 3), (4, 3), (4, 3)]"],
        ),
        (lambda: layers.Bidirectional(layers.GRU(3))(normal(B, D)), ["ndim=3", "(4, 5)"]),
        (
            lambda: same_weights(make(layers, "GRU"), make(keras.layers, "GRU"))[0](normal(B, T, D + 1)),
            ["value 5", "(4, 7, 6)"],
        ),
    ],
)
def test_errors_say_what_came_and_what_was_expected(attempt, words):
    refused(attempt, *words)
