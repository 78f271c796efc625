"""SimpleRNN, LSTM and GRU against Keras's layers of these names: they take the same arguments and give the same."""

import inspect

import keras
import numpy as np
import pytest
from cases import MASKS, B, D, T, U, arrays, call, close, compile_for_test, normal, same_weights
from keras import ops

from keras_seq import layers

KINDS = {
    "SimpleRNN": ("SimpleRNN", {}),
    "LSTM": ("LSTM", {}),
    "GRU": ("GRU", {}),
    "GRU reset before": ("GRU", {"reset_after": False}),
}
NAMES = ["SimpleRNN", "LSTM", "GRU"]


def make(library, kind, units=U, **config):
    name, options = KINDS[kind]
    if library is keras.layers and name != "SimpleRNN":
        options = options | {"use_cudnn": False}
    return getattr(library, name)(units, **options, **config)


def pair(kind, **config):
    return same_weights(make(layers, kind, **config), make(keras.layers, kind, **config))


def states(kind, scale=0.7):
    return [scale * normal(B, U, seed=20 + i) for i in range(2 if kind == "LSTM" else 1)]


@pytest.mark.parametrize("mask", [None, MASKS["holes"]], ids=["no mask", "holes"])
@pytest.mark.parametrize("state", [0.0, 0.7], ids=["zero state", "any state"])
@pytest.mark.parametrize(
    ("kind", "return_sequences", "go_backwards"),
    [(kind, True, False) for kind in KINDS] + [("LSTM", False, True), ("GRU", False, True)],
)
def test_outputs_and_states_are_those_of_keras(kind, return_sequences, go_backwards, state, mask):
    ours, theirs = pair(kind, return_sequences=return_sequences, go_backwards=go_backwards, return_state=True)
    x = normal(B, T, D)
    got, expected = (arrays(call(layer, x, mask, states(kind, state))) for layer in (ours, theirs))
    if mask is not None and state:  # before the first valid step Keras's backends disagree
        valid = mask if return_sequences else mask.any(1)
        got[0], expected[0] = got[0][valid], expected[0][valid]
    close(got, expected)


@pytest.mark.parametrize("mask", [None, MASKS["holes"]], ids=["no mask", "holes"])
@pytest.mark.parametrize("kind", NAMES)
def test_options_change_only_what_is_shown(kind, mask):
    """All outputs and the last one, forwards and backwards, with and without states."""
    x, mask = normal(B, T, D), np.ones((B, T), bool) if mask is None else mask
    forwards = make(layers, kind, return_sequences=True, return_state=True)
    y, *last = arrays(call(forwards, x, mask))
    flipped, *flipped_last = arrays(call(forwards, np.flip(x, 1).copy(), np.flip(mask, 1).copy()))
    for return_sequences in (True, False):
        for return_state in (True, False):
            for go_backwards, outputs, state in ((False, y, last), (True, flipped, flipped_last)):
                options = {"return_state": return_state, "go_backwards": go_backwards}
                layer = make(layers, kind, return_sequences=return_sequences, **options)
                layer.build((None, None, D))
                layer.set_weights(forwards.get_weights())
                expected = [outputs if return_sequences else outputs[:, -1]] + state * return_state
                close(call(layer, x, mask), expected, 1e-6)


@pytest.mark.parametrize("mask", [MASKS["left"], MASKS["right"]], ids=["left", "right"])
@pytest.mark.parametrize("kind", NAMES)
def test_padding_at_one_end_is_that_of_keras(kind, mask):
    ours, theirs = pair(kind, return_sequences=True, zero_output_for_mask=True)
    close(call(ours, normal(B, T, D), mask), call(theirs, normal(B, T, D), mask))


@pytest.mark.parametrize("return_state", [False, True])
@pytest.mark.parametrize("return_sequences", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_the_form_of_the_result_is_that_of_keras(name, return_sequences, return_state):
    ours, theirs = pair(name, return_sequences=return_sequences, return_state=return_state)
    for time in (T, None):
        x = keras.KerasTensor((None, time, D))
        got, expected = ours(x), theirs(x)
        assert isinstance(got, list | tuple) == isinstance(expected, list | tuple) == return_state
        y_shape = (None, time, U) if return_sequences else (None, U)
        assert [v.shape for v in keras.tree.flatten(got)] == [y_shape] + [(None, U)] * len(states(name)) * return_state
        assert len(keras.tree.flatten(expected)) == len(keras.tree.flatten(got))
        assert [v.dtype for v in keras.tree.flatten(got)] == [v.dtype for v in keras.tree.flatten(expected)]
    y_shape = (B, T, U) if return_sequences else (B, U)
    assert [v.shape for v in arrays(ours(normal(B, T, D)))] == [y_shape] + [(B, U)] * len(states(name)) * return_state


@pytest.mark.parametrize("name", NAMES)
def test_unroll_changes_nothing(name):
    ours, unrolled = (make(layers, name, return_sequences=True, unroll=u) for u in (False, True))
    same_weights(unrolled, ours)
    close(unrolled(normal(B, T, D)), ours(normal(B, T, D)), 1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_takes_every_argument_of_keras_with_its_default(name):
    parameters = inspect.signature(getattr(keras.layers, name).__init__).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
    assert len(defaults) > 15

    def settings(layer):
        values = {k: keras.saving.serialize_keras_object(getattr(layer, k)) for k in defaults if hasattr(layer, k)}
        return values | {"mask": layer.supports_masking}

    ours, explicit = getattr(layers, name)(U), getattr(layers, name)(U, **defaults)
    assert settings(explicit) == settings(ours)
    theirs = settings(getattr(keras.layers, name)(U))
    for key, value in settings(ours).items():
        if not key.endswith("initializer"):
            assert value == theirs.get(key, value), key


@pytest.mark.parametrize("name", NAMES)
def test_positional_arguments_are_in_the_order_of_keras(name):
    """As far as they are given: an argument that means something else by position would go unnoticed."""
    parameters = list(inspect.signature(getattr(keras.layers, name).__init__).parameters.values())[1:]
    positional = [p for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    values = {"units": U, "kernel_initializer": "ones", "recurrent_initializer": "zeros", "bias_initializer": "ones"}
    given = [values.get(p.name, p.default) for p in positional]
    layer = getattr(layers, name)(*given)
    layer.build((None, None, D))
    reference = getattr(keras.layers, name)(*given)
    reference.build((None, None, D))
    for got, expected in zip(layer.get_weights(), reference.get_weights(), strict=True):
        np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_a_config_of_keras_makes_the_layer(kind):
    theirs = make(
        keras.layers,
        kind,
        activation="relu",
        use_bias=False,
        kernel_initializer=keras.initializers.RandomNormal(stddev=0.1, seed=1),
        recurrent_regularizer=keras.regularizers.L2(0.1),
        kernel_constraint=keras.constraints.MaxNorm(1.0),
        dropout=0.1,
        recurrent_dropout=0.2,
        seed=4,
        go_backwards=True,
        return_sequences=True,
        name="mine",
    )
    ours = getattr(layers, KINDS[kind][0]).from_config(theirs.get_config())
    same_weights(ours, theirs)
    assert ours.name == "mine"
    assert (ours.dropout, ours.recurrent_dropout) == (0.1, 0.2)
    assert ours.seed == theirs.get_config().get("seed")  # Keras forgets that of SimpleRNN
    assert type(ours.kernel.constraint) is keras.constraints.MaxNorm
    close(call(ours, normal(B, T, D)), call(theirs, normal(B, T, D)))
    close(ours.losses, theirs.losses if theirs.losses else theirs.cell.losses)


def test_activity_regularizer_is_that_of_keras():
    ours, theirs = pair("LSTM", return_sequences=True, activity_regularizer=keras.regularizers.L2(0.1))
    for layer in (ours, theirs):
        layer(normal(B, T, D))
    assert len(ours.losses) == 1
    close(ours.losses, theirs.losses)


@pytest.mark.parametrize("dtype", ["mixed_bfloat16", "float64"])
def test_a_config_of_keras_brings_its_dtype(dtype):
    theirs = keras.layers.GRU(U, dtype=dtype)
    ours = layers.GRU.from_config(theirs.get_config())
    assert ours.dtype_policy.name == dtype


def training_model(library, kinds, masked):
    """Layers side by side over a sequence of any length, with regularizers and constraints that bite."""
    x = inputs = keras.Input((None, D))
    if masked:
        x = keras.layers.Masking()(x)
    recurrent = [
        make(
            library,
            kind,
            return_sequences=True,
            kernel_regularizer=keras.regularizers.L2(0.01),
            recurrent_regularizer=keras.regularizers.L1(0.01),
            bias_regularizer=keras.regularizers.L1L2(0.01, 0.02),
            kernel_constraint=keras.constraints.MaxNorm(1.0),
            recurrent_constraint=keras.constraints.UnitNorm(),
            bias_constraint=keras.constraints.NonNeg(),
        )
        for kind in kinds
    ]
    model = keras.Model(inputs, keras.layers.Concatenate()([layer(x) for layer in recurrent]))
    compile_for_test(model, keras.optimizers.SGD(0.5))
    return model


@pytest.mark.parametrize(("kinds", "masked"), [(["LSTM", "GRU"], False), (list(KINDS), True)], ids=["no mask", "holes"])
def test_a_step_of_training_is_that_of_keras(kinds, masked):
    """Gradients of all weights, regularizers and constraints at once: the weights after the step tell."""
    ours, theirs = (training_model(library, kinds, masked) for library in (layers, keras.layers))
    weights = [0.5 * normal(*w.shape, seed=i) for i, w in enumerate(theirs.get_weights())]
    for model in (ours, theirs):
        model.set_weights(weights)
    x, y = normal(B, T, D), normal(B, T, len(kinds) * U, seed=1)
    if masked:
        x = x * MASKS["holes"][:, :, None]
    close(sum(ours.losses), sum(theirs.losses))
    losses = [model.train_on_batch(x, y) for model in (ours, theirs)]
    close(*losses, 1e-5)
    moved = ours.get_weights()
    assert not any(np.array_equal(a, b) for a, b in zip(moved, weights, strict=True))
    close(moved, theirs.get_weights(), 1e-5)


def test_explicit_states_in_a_functional_model():
    x, h, c = keras.Input((None, D)), keras.Input((U,)), keras.Input((U,))
    layer = layers.LSTM(U, return_sequences=True, return_state=True)
    model = keras.Model([x, h, c], layer(x, initial_state=[h, c]))
    values = [normal(B, T, D), *states("LSTM")]
    y, (last_h, last_c) = layer(values[0], initial_state=tuple(values[1:]), return_state=True)
    close(model.predict(values, verbose=0), (y, last_h, last_c))


def test_the_encoder_gives_its_state_to_the_decoder():
    """As in Keras's tutorial of translation, with the layers replaced and nothing else."""
    models = []
    for library in (layers, keras.layers):
        source, target = keras.Input((None, D)), keras.Input((None, D))
        _, h, c = library.LSTM(U, return_state=True)(source)
        y, _, _ = library.LSTM(U, return_sequences=True, return_state=True)(target, initial_state=[h, c])
        models.append(keras.Model([source, target], y))
    ours, theirs = models
    ours.set_weights(theirs.get_weights())
    values = [normal(B, T, D), normal(B, 3, D, seed=1)]
    close(ours.predict(values, verbose=0), theirs.predict(values, verbose=0))


@pytest.mark.parametrize("name", NAMES)
def test_the_first_state_is_zero(name):
    layer = make(layers, name)
    layer.build((None, None, D))
    for given in (layer.initial_state(B), [np.zeros((B, U), "float32")] * (2 if name == "LSTM" else 1)):
        close(layer(normal(B, T, D), initial_state=given), layer(normal(B, T, D)), 1e-12)


GOLDEN = {  # the first numbers of kernel and recurrent kernel after set_random_seed(0), for d = 3 and 4 units
    "SimpleRNN": [[-0.15821514, 0.13454664, -0.54235715], [0.43943915, -0.44693539, -0.63499296]],
    "LSTM": [[-0.09603294, 0.081666708, -0.3291983], [0.35033178, 0.58028316, 0.11977178]],
    "GRU": [[-0.10808151, 0.091912851, -0.37050045], [0.39960554, 0.66189927, 0.13661754]],
}


@pytest.mark.parametrize("name", NAMES)
def test_one_seed_gives_the_same_weights_on_every_backend(name):
    keras.utils.set_random_seed(0)
    layer = getattr(layers, name)(4)
    layer.build((None, None, 3))
    first = [ops.convert_to_numpy(w.value)[0, :3] for w in (layer.kernel, layer.recurrent_kernel)]
    np.testing.assert_allclose(first, GOLDEN[name], rtol=1e-6)


def test_the_forget_gate_starts_open():
    for unit_forget_bias in (True, False):
        ours, theirs = (
            library.LSTM(2, bias_initializer="zeros", unit_forget_bias=unit_forget_bias)
            for library in (layers, keras.layers)
        )
        for layer in (ours, theirs):
            layer.build((None, None, D))
        np.testing.assert_array_equal(ours.get_weights()[2], theirs.get_weights()[2])
