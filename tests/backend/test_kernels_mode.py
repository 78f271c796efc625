"""`kernels`: which path runs, and that a user can see and force it."""

import importlib.util
import os
import subprocess
import sys

import keras
import numpy as np
import pytest
from keras import ops

from keras_seq import backend, kernels, layers, models

X = np.random.default_rng(0).normal(size=(3, 4, 5)).astype("float32")
MASK = np.array([[1, 1, 1, 0], [0, 1, 0, 1], [0, 0, 0, 0]], bool)
LAYERS = {"simple_rnn": layers.SimpleRNN, "lstm": layers.LSTM, "gru": layers.GRU}
REFUSED = {
    "relu": (layers.LSTM, {"activation": "relu"}, "lstm", "the activation is not tanh"),
    "relu rnn": (layers.SimpleRNN, {"activation": "relu"}, "simple_rnn", "the activation is not tanh"),
    "hard sigmoid": (layers.GRU, {"recurrent_activation": "hard_sigmoid"}, "gru", "the recurrent activation is not"),
    "reset before": (layers.GRU, {"reset_after": False}, "gru", "reset_after=False"),
}


NO_KERNEL = "the backend has no kernel of that name"


def built(layer_class, **kwargs):
    layer = layer_class(6, return_sequences=True, **kwargs)
    layer.build(X.shape)
    return layer


@pytest.mark.parametrize("mask", [None, MASK], ids=["no mask", "mask"])
@pytest.mark.parametrize("name", LAYERS)
def test_each_call_is_logged_and_the_paths_agree(name, mask):
    if not hasattr(backend.current(), name):
        pytest.skip(NO_KERNEL)
    layer = built(LAYERS[name])
    outputs = {}
    for mode in backend.MODES:
        with kernels(mode) as ran:
            outputs[mode] = ops.convert_to_numpy(layer(X, mask=mask))
        path = "reference" if mode == "reference" else "native"
        reason = "the mode is 'reference'" if mode == "reference" else None
        assert ran == [(name, path, reason)]
        assert (ran[0].op, ran[0].path, ran[0].reason) == ran[0]
    np.testing.assert_array_equal(outputs["native"], outputs["auto"])
    np.testing.assert_allclose(outputs["native"], outputs["reference"], rtol=0, atol=2e-6)


@pytest.mark.parametrize("case", REFUSED)
def test_native_says_what_it_cannot_take(case):
    layer_class, arguments, op, reason = REFUSED[case]
    reason = reason if hasattr(backend.current(), op) else f"{keras.config.backend()} has none"
    layer = built(layer_class, **arguments)
    with kernels("native") as ran, pytest.raises(NotImplementedError, match=f"native {op} on .*{reason}"):
        layer(X)
    assert ran == []
    with kernels() as ran:
        y = ops.convert_to_numpy(layer(X))
    assert [(r.op, r.path) for r in ran] == [(op, "reference")]
    assert reason in ran[0].reason
    with kernels("reference"):
        np.testing.assert_array_equal(ops.convert_to_numpy(layer(X)), y)


def test_a_missing_kernel_is_a_reason():
    missing = [name for name in LAYERS if not hasattr(backend.current(), name)]
    if not missing:
        pytest.skip("the backend has a kernel for each operation")
    layer, reason = built(LAYERS[missing[0]]), f"{keras.config.backend()} has none"
    with kernels() as ran:
        layer(X)
    assert ran == [(missing[0], "reference", reason)]
    with kernels("native"), pytest.raises(NotImplementedError, match=reason):
        layer(X)


def test_recurrent_dropout_is_refused_in_training_only():
    layer = built(layers.LSTM, recurrent_dropout=0.5)
    with kernels("native") as ran:
        layer(X)
        with pytest.raises(NotImplementedError, match="recurrent dropout"):
            layer(X, training=True)
    assert len(ran) == 1


def test_the_error_names_the_backend():
    with kernels("native"), pytest.raises(NotImplementedError, match=keras.config.backend()):
        built(layers.LSTM, activation="relu")(X)


def test_every_operation_is_logged_in_order():
    model = models.RecurrentLM(11, 6, num_layers=2, cell="gru")
    model.build((None, None))
    with kernels() as ran:
        model(np.ones((2, 3), "int32"))
    assert [r.op for r in ran] == ["gru", "gru"]


def test_what_fit_compiles_is_logged():
    """So a user sees which path a training run takes."""
    model = models.RecurrentLM(11, 6)
    model.compile("sgd")
    with kernels() as ran:
        model.fit(np.ones((2, 3), "int32"), verbose=0)
    assert {(r.op, r.path) for r in ran if r.reason != "shapes only, no values"} == {("lstm", "native")}
    other = models.RecurrentLM(11, 6)
    other.compile("sgd")
    with kernels("reference") as ran:
        other.fit(np.ones((2, 3), "int32"), verbose=0)
    assert {(r.op, r.path) for r in ran} == {("lstm", "reference")}


def test_nesting_restores():
    layer = built(layers.LSTM)
    with kernels("reference") as outer:
        layer(X)
        with kernels("native") as inner:
            layer(X)
        layer(X)
    assert [r.path for r in outer] == ["reference", "reference"]
    assert [r.path for r in inner] == ["native"]
    layer(X)
    assert (len(outer), len(inner)) == (2, 1)


def test_an_error_inside_restores():
    relu = built(layers.LSTM, activation="relu")
    with pytest.raises(NotImplementedError), kernels("native"):
        relu(X)
    relu(X)  # the mode is again 'auto'


@pytest.mark.parametrize("mode", ["fast", "", None, "Native"])
def test_unknown_mode(mode):
    with pytest.raises(ValueError, match=rf"mode must be one of .*'native'.* Received: {mode!r}"), kernels(mode):
        pass
    with kernels() as ran:
        built(layers.LSTM)(X)
    assert ran[0].path == "native"


def test_unknown_mode_in_the_environment(monkeypatch):
    monkeypatch.setenv("KERAS_SEQ_KERNELS", "fast")
    spec = importlib.util.spec_from_file_location("a_second_backend", backend.__file__)
    with pytest.raises(ValueError, match=r"KERAS_SEQ_KERNELS must be one of .* Received: 'fast'"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


PROGRAM = """
import numpy as np
from keras_seq import backend, kernels, layers
layer = layers.LSTM(2, activation="relu")
try:
    layer(np.ones((1, 2, 3), "float32"))
except NotImplementedError:
    print("outside: refused")
with kernels("auto") as ran:
    layer(np.ones((1, 2, 3), "float32"))
print("inside:", ran[0].path)
"""


def test_the_environment_sets_the_mode_outside_of_blocks():
    environment = os.environ | {"KERAS_SEQ_KERNELS": "native"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.split("\n")[:2] == ["outside: refused", "inside: reference"]
