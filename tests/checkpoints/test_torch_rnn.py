"""Against torch.nn itself. Torch comes first: after TensorFlow its import can abort the process."""

import pytest

torch = pytest.importorskip("torch")

import keras  # noqa: E402
import numpy as np  # noqa: E402
from keras import ops, tree  # noqa: E402

from keras_seq import layers  # noqa: E402
from keras_seq.checkpoints import CheckpointError, from_torch_rnn, load_torch_rnn, to_torch_rnn  # noqa: E402

# Keras's `convert_to_numpy` calls `np.array` on tensors whose `__array__` has no `copy` argument.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")

B, T, D, U = 2, 4, 5, 3
KINDS = {"RNN": layers.SimpleRNN, "LSTM": layers.LSTM, "GRU": layers.GRU}
SHAPES = [  # num_layers, bidirectional, bias
    (1, False, True),
    (1, True, False),
    (2, False, False),
    (2, True, True),
]


def torch_module(kind, num_layers=1, bidirectional=False, bias=True, **kwargs):
    torch.manual_seed(0)
    return getattr(torch.nn, kind)(
        D, U, num_layers, bias=bias, bidirectional=bidirectional, batch_first=True, **kwargs
    ).requires_grad_(False)


def our_layer(kind, num_layers=1, bidirectional=False, bias=True):
    parts = [
        KINDS[kind](U, use_bias=bias, bias_initializer="uniform", return_sequences=True) for _ in range(num_layers)
    ]
    parts = [layers.Bidirectional(part) for part in parts] if bidirectional else parts
    return layers.Stack([parts[0], keras.layers.Dropout(0.5), parts[1]]) if num_layers > 1 else parts[0]


def close(ours, theirs, tolerance=1e-6):
    ours, theirs = ops.convert_to_numpy(ours), np.asarray(theirs)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance * np.abs(theirs).max())


def equal_dicts(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, array in theirs.items():
        np.testing.assert_array_equal(ours[name], np.asarray(array), err_msg=name)


def check_like_torch(layer, module, tolerance=1e-6):
    """The outputs, and the last states in torch's order: layer by layer, forward then backward."""
    x = np.random.default_rng(0).normal(size=(B, T, D)).astype("float32")
    expected, last = module(torch.from_numpy(x))
    y, state = layer.advance(ops.convert_to_tensor(x), layer.initial_state(B))
    close(y, expected, tolerance)
    last = last if isinstance(last, tuple) else (last,)
    for i, states in enumerate(last):
        close(ops.stack(tree.flatten(state)[i :: len(last)]), states, tolerance)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_and_states_are_those_of_torch(kind, shape):
    module = torch_module(kind, *shape)
    layer = our_layer(kind, *shape)
    load_torch_rnn(layer, module.state_dict())
    check_like_torch(layer, module)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_round_trips(kind, shape):
    layer = our_layer(kind, *shape)
    layer.build((None, None, D))
    exported = to_torch_rnn(layer)
    module = torch_module(kind, *shape)
    module.load_state_dict({name: torch.from_numpy(array) for name, array in exported.items()})

    again = from_torch_rnn(module.state_dict())
    for ours, theirs in zip(again.get_weights(), layer.get_weights(), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    equal_dicts(to_torch_rnn(again), exported)


def test_export_equals_what_came_in_up_to_the_sum_of_biases():
    for kind in KINDS:
        state_dict = torch_module(kind, 2, True).state_dict()
        expected = {name: np.asarray(value) for name, value in state_dict.items()}
        if kind != "GRU":
            for name in [name for name in expected if "bias_ih" in name]:
                other = name.replace("ih", "hh")
                expected[name], expected[other] = expected[name] + expected[other], np.zeros_like(expected[other])
        equal_dicts(to_torch_rnn(from_torch_rnn(state_dict)), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_a_trained_layer_goes_to_torch(kind):
    layer = our_layer(kind)
    layer.build((None, None, D))
    module = torch_module(kind)
    module.load_state_dict({name: torch.from_numpy(array) for name, array in to_torch_rnn(layer).items()})
    check_like_torch(layer, module)


def test_from_torch_makes_the_layer():
    one = from_torch_rnn(torch_module("GRU", bias=False).state_dict(), dropout=0.5)
    assert isinstance(one, layers.GRU)
    assert (one.units, one.use_bias, one.dropout, one.return_sequences) == (U, False, 0.5, True)

    stack = from_torch_rnn(torch_module("LSTM", 2, True).state_dict(), return_sequences=False, dtype="bfloat16")
    assert isinstance(stack, layers.Stack)
    assert [type(part) for part in stack.parts] == [layers.Bidirectional] * 2
    assert [part.return_sequences for part in stack.parts] == [True, False]
    assert {v.dtype for v in stack.weights} == {stack.compute_dtype, stack.parts[0].compute_dtype} == {"bfloat16"}


def test_activation_is_an_argument():
    module = torch_module("RNN", nonlinearity="relu")
    check_like_torch(from_torch_rnn(module.state_dict(), activation="relu"), module)


def test_prefix():
    model = torch.nn.ModuleDict({"encoder": torch_module("LSTM"), "out": torch.nn.Linear(3, 2)})
    layer = from_torch_rnn(model.state_dict(), prefix="encoder.")
    exported = to_torch_rnn(layer, prefix="encoder.")
    assert exported.keys() == {name for name in model.state_dict() if name.startswith("encoder.")}
    load_torch_rnn(layer, model.state_dict(), prefix="encoder.")
    for prefix in ("", "decoder.", "encoder"):
        with pytest.raises(CheckpointError, match="received"):
            load_torch_rnn(layer, model.state_dict(), prefix=prefix)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_dtypes_of_the_checkpoint(dtype):
    module = torch_module("GRU").to(getattr(torch, dtype))
    equal_dicts(to_torch_rnn(from_torch_rnn(module.state_dict())), module.float().state_dict())


@pytest.mark.parametrize(("dtype", "exported"), [("bfloat16", "float32"), ("float16", "float32"), ("float64",) * 2])
def test_dtypes_of_the_layer(dtype, exported):
    if dtype == "float64" and keras.backend.backend() == "jax":
        pytest.skip("JAX has float64 only in a process that is started with JAX_ENABLE_X64=1")
    module = torch_module("GRU").to(getattr(torch, dtype))
    arrays = to_torch_rnn(from_torch_rnn(module.state_dict(), dtype=dtype))
    assert {str(array.dtype) for array in arrays.values()} == {exported}
    equal_dicts(arrays, module.to(getattr(torch, exported)).state_dict())


def test_the_export_is_a_copy():
    layer = our_layer("LSTM")
    layer.build((None, None, D))
    exported = to_torch_rnn(layer)
    before = {name: array.copy() for name, array in exported.items()}
    layer.set_weights([w + 1 for w in layer.get_weights()])
    equal_dicts(exported, before)


def state_dict(kind="LSTM", num_layers=1, bidirectional=False, bias=True, **kwargs):
    return torch_module(kind, num_layers, bidirectional, bias, **kwargs).state_dict()


def without(name, *args):
    return {key: value for key, value in state_dict(*args).items() if key != name}


REFUSED = {
    "missing": (our_layer, without("bias_hh_l0"), r"bias_hh_l0 \(12,\) \(received: absent\)"),
    "missing in the second layer": (
        lambda kind: our_layer(kind, 2, True),
        without("weight_hh_l1_reverse", "LSTM", 2, True),
        r"weight_hh_l1_reverse \(12, 3\) \(received: absent\)",
    ),
    "left over": (our_layer, state_dict() | {"extra": np.ones(1)}, r"extra absent \(received: \(1,\)\)"),
    "shape": (our_layer, state_dict() | {"bias_ih_l0": np.ones(9)}, r"bias_ih_l0 \(12,\) \(received: \(9,\)\)"),
    "input size": (
        our_layer,
        torch.nn.LSTM(D + 1, U).state_dict(),
        r"weight_ih_l0 \(12, 5\) \(received: \(12, 6\)\)",
    ),
    "no numbers": (
        our_layer,
        state_dict() | {"bias_ih_l0": "none"},
        "array of numbers as bias_ih_l0. Received: 'none'",
    ),
    "no dictionary": (our_layer, list(state_dict()), "Received: <class 'list'>"),
    "gate count": (our_layer, state_dict("GRU"), r"weight_hh_l0 \(12, 3\) \(received: \(9, 3\)\)"),
    "projection": (our_layer, state_dict(proj_size=2), r"weight_hr_l0 absent \(received: \(2, 3\)\)"),
    "bias of torch": (lambda kind: our_layer(kind, bias=False), state_dict(), r"bias_ih_l0 absent"),
    "bias of ours": (our_layer, state_dict(bias=False), r"bias_ih_l0 \(12,\) \(received: absent\)"),
    "direction of torch": (our_layer, state_dict("LSTM", 1, True), "weight_ih_l0_reverse absent"),
    "direction of ours": (lambda kind: our_layer(kind, 1, True), state_dict(), r"weight_ih_l0_reverse \(12, 5\)"),
    "layers of torch": (our_layer, state_dict("LSTM", 2), "weight_ih_l1 absent"),
    "layers of ours": (lambda kind: our_layer(kind, 2), state_dict(), r"weight_ih_l1 \(12, 3\)"),
    "reset_after": (lambda _: layers.GRU(U, reset_after=False), state_dict("GRU"), "reset_after=True.*Received: False"),
    "residual": (
        lambda kind: layers.Residual(layers.LSTM(D, return_sequences=True)),
        state_dict(),
        "Expected SimpleRNN.*<Residual",
    ),
    "another layer": (lambda _: keras.layers.LSTM(U), state_dict(), "Expected SimpleRNN, LSTM, GRU.*Received: <LSTM"),
    "nothing recurrent": (lambda _: layers.Stack([keras.layers.Dense(U)]), state_dict(), "Expected a recurrent layer"),
    "unlike layers": (
        lambda kind: layers.Stack([our_layer(kind), layers.LSTM(U + 1)]),
        state_dict("LSTM", 2),
        r"one module of torch.nn: expected weight_ih_l1 \(12, 3\) \(received: \(16, 3\)\)",
    ),
    "directions of one layer": (
        lambda kind: layers.Stack([our_layer(kind, 1, True), our_layer(kind)]),
        state_dict("LSTM", 2, True),
        r"one module of torch.nn: expected weight_ih_l1_reverse \(12, 6\)",
    ),
    "another size between": (
        lambda kind: layers.Stack([our_layer(kind), keras.layers.Dense(U + 1), our_layer(kind)]),
        state_dict("LSTM", 2),
        r"one module of torch.nn: expected weight_ih_l1 \(12, 3\) \(received: \(12, 4\)\)",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_an_error_changes_no_weight(case):
    make, weights, message = REFUSED[case]
    layer = make("LSTM")
    layer.build((None, None, D))
    before = layer.get_weights()
    with pytest.raises(CheckpointError, match=message):
        load_torch_rnn(layer, weights)
    for after, expected in zip(layer.get_weights(), before, strict=True):
        np.testing.assert_array_equal(after, expected)


def test_a_bad_checkpoint_does_not_build_the_layer():
    layer = our_layer("LSTM")
    for weights in (without("weight_ih_l0"), without("bias_ih_l0"), state_dict("GRU"), {}):
        with pytest.raises(CheckpointError):
            load_torch_rnn(layer, weights)
    assert not layer.built


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({}, "Expected weight_hh_l0"),
        (without("weight_hh_l0"), r"Received: weight_ih_l0 \(12, 5\)"),
        (without("weight_ih_l0"), r"weight_ih_l0 .* \(received: absent\)"),
        ({"weight_hh_l0": np.ones((6, 3))}, r"with 1 \(RNN\), 3 \(GRU\) or 4 \(LSTM\) gates"),
        (state_dict(proj_size=1), "weight_hr_l0"),
        (without("bias_hh_l0"), "bias_hh_l0"),
    ],
)
def test_from_torch_refuses(weights, message):
    with pytest.raises(CheckpointError, match=message):
        from_torch_rnn(weights)


def test_export_needs_weights():
    with pytest.raises(CheckpointError, match="Expected a built layer"):
        to_torch_rnn(our_layer("LSTM"))
