"""The recurrences against loops in NumPy, and native kernels against the definition."""

import functools

import keras
import numpy as np
import pytest
from cases import MASKS, B, D, T, U, close, normal, tensors
from keras import ops, tree

import keras_seq
from keras_seq import backend
from keras_seq import ops as seq_ops


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def simple_rnn(x, state, kernel, recurrent_kernel, bias):
    return (np.tanh(x @ kernel + state[0] @ recurrent_kernel + bias),)


def lstm(x, state, kernel, recurrent_kernel, bias):
    h, c = state
    i, f, g, o = np.split(x @ kernel + h @ recurrent_kernel + bias, 4, -1)
    c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
    return sigmoid(o) * np.tanh(c), c


def gru(x, state, kernel, recurrent_kernel, bias):
    (h,) = state
    w_z, w_r, w_n = np.split(x @ kernel + bias[0], 3, -1)
    u_z, u_r, u_n = np.split(h @ recurrent_kernel + bias[1], 3, -1)
    z = sigmoid(w_z + u_z)
    return (z * h + (1 - z) * np.tanh(w_n + sigmoid(w_r + u_r) * u_n),)


def gru_reset_before(x, state, kernel, recurrent_kernel, bias):
    (h,) = state
    kernels, recurrent, biases = (np.split(v, 3, -1) for v in (kernel, recurrent_kernel, bias))
    z, r = (sigmoid(x @ kernels[i] + h @ recurrent[i] + biases[i]) for i in (0, 1))
    return (z * h + (1 - z) * np.tanh(x @ kernels[2] + (r * h) @ recurrent[2] + biases[2]),)


KINDS = {  # one step in NumPy, the operation, its options, gates, shape of the bias
    "simple_rnn": (simple_rnn, seq_ops.simple_rnn, {}, 1, (U,)),
    "lstm": (lstm, seq_ops.lstm, {}, 4, (4 * U,)),
    "gru": (gru, seq_ops.gru, {}, 3, (2, 3 * U)),
    "gru reset before": (gru_reset_before, seq_ops.gru, {"reset_after": False}, 3, (3 * U,)),
}


def has_native(kind):
    return kind in ("lstm", "gru") or (kind == "simple_rnn" and keras.config.backend() != "tensorflow")


def arguments(kind, time=T, batch=B, bias=True, zero_state=False):
    *_, gates, bias_shape = KINDS[kind]
    scale = 0.0 if zero_state else 0.7
    values = {
        "x": normal(batch, time, D, seed=1),
        "state": tuple(scale * normal(batch, U, seed=2 + i) for i in range(2 if kind == "lstm" else 1)),
        "kernel": 0.5 * normal(D, gates * U, seed=4),
        "recurrent_kernel": 0.5 * normal(U, gates * U, seed=5),
    }
    return values | ({"bias": 0.5 * normal(*bias_shape, seed=6)} if bias else {})


def projections(values):
    """What outputs and states are multiplied by to make a loss."""
    batch, time = values["x"].shape[:2]
    return normal(batch, time, U, seed=7), [normal(batch, U, seed=8 + i) for i in range(len(values["state"]))]


def in_numpy(kind, values, mask=None):
    """All outputs and the last state, in float64."""
    values = tree.map_structure(lambda v: np.asarray(v, "float64"), values)
    x, state, bias = values["x"], values["state"], values.get("bias", np.zeros(KINDS[kind][4]))
    outputs = []
    for t in range(x.shape[1]):
        new = KINDS[kind][0](x[:, t], state, values["kernel"], values["recurrent_kernel"], bias)
        state = (
            new if mask is None else tuple(np.where(mask[:, t, None], n, s) for n, s in zip(new, state, strict=True))
        )
        outputs.append(state[0])
    return np.stack(outputs, 1), state


def run(kind, mode, values, mask):
    _, operation, options, *_ = KINDS[kind]
    state = values["state"] if kind == "lstm" else values["state"][0]
    with keras_seq.kernels(mode):
        y, last = operation(
            values["x"],
            state,
            values["kernel"],
            values["recurrent_kernel"],
            values.get("bias"),
            mask,
            **options,
        )
    return y, last if kind == "lstm" else (last,)


@functools.cache
def outputs_of(kind, mode):
    return backend.current().compiled(functools.partial(run, kind, mode), keras.layers.Layer())


@functools.cache
def gradients_of(kind, mode):
    def loss(values, projections, mask):
        y, last = run(kind, mode, values, mask)
        pairs = zip((y, *last), tree.flatten(projections), strict=True)
        return sum(ops.sum(a * b) for a, b in pairs), (y, last)

    compiled = backend.current().gradients(loss, keras.layers.Layer())

    def gradients(values, mask):
        (y, last), _, d_values = compiled(*tensors((values, projections(values), mask)))
        return {"y": y, "state": last, **{f"d {k}": d for k, d in d_values.items()}}

    return gradients


def cut(mask, values):
    batch, time = values["x"].shape[:2]
    return None if mask is None else mask[:batch, :time]


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize(
    "case",
    [{}, {"zero_state": True}, {"time": 1}, {"batch": 1, "bias": False}],
    ids=["whole", "zero state", "one step", "one row without bias"],
)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", ["reference", "native"])
def test_equals_numpy(kind, mode, case, mask):
    values = arguments(kind, **case)
    mask = cut(mask, values)
    if mode == "native" and not has_native(kind):
        with pytest.raises(NotImplementedError, match=r"reset_after=False|tensorflow has none"):
            outputs_of(kind, mode)(*tensors((values, mask)))
        return
    close(outputs_of(kind, mode)(*tensors((values, mask))), in_numpy(kind, values, mask))


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("time", [T, 1])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if has_native(kind)])
def test_native_gradients_equal_those_of_the_definition(kind, time, mask):
    values = arguments(kind, time)
    mask = cut(mask, values)
    expected = gradients_of(kind, "reference")(values, mask)
    got = gradients_of(kind, "native")(values, mask)
    assert got.keys() == expected.keys()
    for name in expected:
        close(got[name], expected[name], what=name)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_native_gradients_of_a_long_sequence(kind, masked):
    """Long enough for kernels that work in blocks of steps: several of them and a remainder."""
    values = arguments(kind, 150)
    mask = np.random.default_rng(0).random((B, 150)) < 0.7 if masked else None
    expected, got = (gradients_of(kind, mode)(values, mask) for mode in ("reference", "native"))
    for name in expected:
        close(got[name], expected[name], what=name)


@pytest.mark.parametrize("mask", [None, MASKS["holes"]], ids=["no mask", "holes"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_equal_differences(kind, mask):
    """In float64, along random directions in each argument."""
    values = tree.map_structure(lambda v: v.astype("float64"), arguments(kind))
    if keras.backend.standardize_dtype(ops.convert_to_tensor(values["x"]).dtype) != "float64":
        pytest.skip("the backend has no float64 switched on")
    values_projections = [p.astype("float64") for p in tree.flatten(projections(values))]

    def loss(values):
        y, last = in_numpy(kind, values, mask)
        return sum((a * b).sum() for a, b in zip((y, *last), values_projections, strict=True))

    def loss_and_aux(values, projections, mask):
        y, last = run(kind, "reference", values, mask)
        return sum(ops.sum(a * b) for a, b in zip((y, *last), projections, strict=True)), ()

    _, _, gradients = backend.current().gradients(loss_and_aux, keras.layers.Layer())(
        *tensors((values, values_projections, mask))
    )
    rng, step = np.random.default_rng(0), 1e-6
    for name, gradient in gradients.items():
        direction = tree.map_structure(lambda v: rng.normal(size=v.shape), values[name])
        ends = [
            loss(values | {name: tree.map_structure(lambda v, d, s=s: v + s * step * d, values[name], direction)})
            for s in (1, -1)
        ]
        along = sum((ops.convert_to_numpy(g) * d).sum() for g, d in zip(*map(tree.flatten, (gradient, direction))))  # noqa: B905
        np.testing.assert_allclose(along, (ends[0] - ends[1]) / (2 * step), rtol=1e-7, err_msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_tells_which_path_ran(kind):
    values = tensors(arguments(kind))
    _, operation, options, *_ = KINDS[kind]
    name = operation.reference.__name__
    state = values["state"] if kind == "lstm" else values["state"][0]
    given = values["x"], state, values["kernel"], values["recurrent_kernel"]
    with keras_seq.kernels("auto") as ran:
        operation(*given, **options)
        with keras_seq.kernels("reference") as inside:
            operation(*given, **options)
    assert [(r.op, r.path) for r in ran] == [(name, "native" if has_native(kind) else "reference")]
    assert inside == [(name, "reference", "the mode is 'reference'")]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"activation": keras.activations.relu}, "the activation is not tanh"),
        ({"recurrent_activation": keras.activations.hard_sigmoid}, "the recurrent activation is not the sigmoid"),
        ({"recurrent_dropout": np.ones((B, U), "float32")}, "recurrent dropout"),
    ],
    ids=["activation", "recurrent activation", "recurrent dropout"],
)
@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_native_says_what_it_cannot_take(kind, options, reason):
    values = tensors(arguments(kind))
    state = values["state"] if kind == "lstm" else values["state"][0]
    with keras_seq.kernels("native"), pytest.raises(NotImplementedError, match=reason):
        KINDS[kind][1](values["x"], state, values["kernel"], values["recurrent_kernel"], **options)


@pytest.mark.parametrize("features", [D - 1, D + 1, 2 * D])
@pytest.mark.parametrize("kind", KINDS)
def test_another_number_of_features_is_refused(kind, features):
    """By whatever exception, but never by numbers: a fused kernel may read past the end of the weights."""
    values = tensors(arguments(kind) | {"x": normal(B, T, features)})
    with pytest.raises(Exception, match=r"."):
        run(kind, "auto", values, None)


def test_unknown_mode_is_refused():
    with pytest.raises(ValueError, match=r"auto.*'fast'"), keras_seq.kernels("fast"):
        pass


@pytest.mark.parametrize("time", [1, 5])
def test_scan_carries_any_structure(time):
    x = normal(time, B, D)

    def step(state, inputs):
        total = {"sum": state["sum"] + inputs[0], "steps": (state["steps"][0] + 1,)}
        return total, {"mean": total["sum"] / total["steps"][0]}

    state = {"sum": ops.zeros((B, D)), "steps": (ops.zeros(()),)}
    last, y = seq_ops.scan(step, state, [ops.convert_to_tensor(x)])
    close(y, {"mean": x.cumsum(0) / np.arange(1, time + 1)[:, None, None]})
    close(last, {"steps": (np.float32(time),), "sum": x.sum(0)})


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_masked_scan_keeps_the_state_at_padded_steps(mask):
    x = normal(B, T, D)
    y, (total,) = seq_ops.masked_scan(lambda s, x: (s[0] + x,), (ops.ones((B, D)),), *tensors((x, mask)))
    kept = x if mask is None else x * mask[:, :, None]
    close((y, total), (1 + kept.cumsum(1), 1 + kept.sum(1)))
