"""The recurrences of RWKV: against loops in NumPy, and in chunks against step by step."""

import functools

import keras
import numpy as np
import pytest
from cases import close, tensors
from keras import ops, tree

import keras_seq
from keras_seq import backend
from keras_seq import ops as seq_ops

B, H, N = 2, 2, 4
KINDS = ("wkv4", "wkv5", "wkv6", "wkv7")
FLOAT64 = {"tensorflow": True, "torch": True, "jax": False}  # JAX has it switched off


def wkv4(x, t, state):
    numerator, denominator, exponent = state
    k, v, w, u = x["k"][:, t], x["v"][:, t], x["w"], x["u"]
    numerator, denominator = numerator * np.exp(exponent), denominator * np.exp(exponent)
    y = (numerator + np.exp(u + k) * v) / (denominator + np.exp(u + k))
    numerator, denominator = np.exp(w) * numerator + np.exp(k) * v, np.exp(w) * denominator + np.exp(k)
    exponent = np.maximum(exponent + w, k)
    return y, (numerator * np.exp(-exponent), denominator * np.exp(-exponent), exponent)


def wkv6(x, t, s):
    r, k, v = (x[name][:, t] for name in "rkv")
    w = x["w"] if x["w"].ndim == 2 else x["w"][:, t]
    kv = np.einsum("bhk,bhv->bhkv", k, v)
    y = np.einsum("bhk,bhkv->bhv", r, s + x["u"][..., None] * kv)
    return y, np.exp(w)[..., None] * s + kv


def wkv7(x, t, s):
    r, w, k, v, a, b = (x[name][:, t] for name in "rwkvab")
    change = np.einsum("bhk,bhl->bhkl", a, b)
    s = s * np.exp(w)[:, :, None] + np.einsum("bhvk,bhkl->bhvl", s, change) + np.einsum("bhv,bhk->bhvk", v, k)
    return np.einsum("bhvk,bhk->bhv", s, r), s


STEP = {"wkv4": wkv4, "wkv5": wkv6, "wkv6": wkv6, "wkv7": wkv7}


def in_numpy(kind, x, state, mask=None):
    """Step by step in float64; a padded step keeps the state."""
    x, state = tree.map_structure(lambda v: np.asarray(v, "float64"), (x, state))
    outputs = []
    for t in range(x["v"].shape[1]):
        y, new = STEP[kind](x, t, state)
        keep = np.ones(len(y), bool) if mask is None else mask[:, t]
        state = tree.map_structure(lambda n, s, k=keep: np.where(k.reshape(-1, *(1,) * (n.ndim - 1)), n, s), new, state)
        outputs.append(y)
    return np.stack(outputs, 1), state


def arguments(kind, time=7, case="normal", batch=B):
    """Inputs and a state that is not 0. The cases: ordinary numbers, extreme decay, no decay at all."""
    rng = np.random.default_rng(0)

    def normal(*shape):
        return rng.normal(size=shape)

    def decay(*shape):
        if kind == "wkv7":
            w = -np.exp(-0.5) / (1 + np.exp(-normal(*shape)))
            return {"normal": w, "extreme": np.full(shape, -np.exp(-0.5)), "none": np.zeros(shape)}[case]
        return {
            "normal": -np.exp(normal(*shape)),
            "extreme": -np.exp(2 * normal(*shape) + 5),
            "none": np.full(shape, -1e-9),
        }[case]

    if kind == "wkv4":
        k = normal(batch, time, H * N) * (10 if case == "extreme" else 1)
        x = {"k": k, "v": normal(batch, time, H * N), "w": decay(H * N), "u": normal(H * N)}
        return x, (normal(batch, H * N), np.exp(normal(batch, H * N)), normal(batch, H * N))
    x = {name: normal(batch, time, H, N) for name in "rkv"}
    x["w"] = decay(*(H, N) if kind == "wkv5" else (batch, time, H, N))
    if kind != "wkv7":
        return x | {"u": normal(H, N)}, normal(batch, H, N, N)
    kappa = normal(batch, time, H, N)
    rate = 1 / (1 + np.exp(-normal(batch, time, H, N)))
    if case == "none":  # and one key at all steps, wholly unlearned each time
        kappa, rate = np.broadcast_to(kappa[:, :1], kappa.shape), np.ones_like(rate)
    kappa = kappa / np.linalg.norm(kappa, axis=-1, keepdims=True)
    return x | {"a": -kappa, "b": kappa * rate}, normal(batch, H, N, N)


@functools.cache
def outputs_of(kind, mode):
    def run(x, state, mask):
        with keras_seq.kernels(mode):
            return getattr(seq_ops, kind)(**x, state=state, mask=mask)

    return backend.current().compiled(run, keras.layers.Layer())


@functools.cache
def gradients_of(kind, mode):
    def loss(floats, weights, mask):
        x, state = floats
        with keras_seq.kernels(mode):
            y, last = getattr(seq_ops, kind)(**x, state=state, mask=mask, training=True)
        if mask is not None:
            y = ops.where(ops.reshape(mask, (*mask.shape, *(1,) * (len(y.shape) - 2))), y, ops.zeros_like(y))
        pairs = zip(tree.flatten((y, last)), tree.flatten(weights), strict=True)
        return sum(ops.sum(a * b) for a, b in pairs), (y, last)

    compiled = backend.current().gradients(loss, keras.layers.Layer())

    def gradients(x, state, mask=None):
        rng = np.random.default_rng(1)
        weights = tree.map_structure(lambda v: rng.normal(size=v.shape).astype(v.dtype), (x["v"], state))
        (y, last), _, (d_x, d_state) = compiled(*tensors(((x, state), weights, mask)))
        return {"y": y, "state": last, "d_state": d_state} | {f"d_{name}": d for name, d in d_x.items()}

    return gradients


def as_dtype(nest, dtype):
    return tree.map_structure(lambda v: v.astype(dtype), nest)


def masks(time, batch=B):
    index = np.arange(time)
    return {
        "right": index < np.array([time, time // 2])[:batch, None],
        "left": index >= np.array([0, time // 3])[:batch, None],
        "holes": np.stack([np.random.default_rng(0).random(time) < 0.6, np.zeros(time, bool)])[:batch],
    }


@pytest.mark.parametrize("mask", [None, "right", "left", "holes"])
@pytest.mark.parametrize("mode", ["reference", "native"])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_numpy(kind, mode, mask):
    x, state = as_dtype(arguments(kind), "float32")
    mask = mask and masks(7)[mask]
    y, last = outputs_of(kind, mode)(*tensors((x, state, mask)))
    expected_y, expected_last = in_numpy(kind, x, state, mask)
    valid = np.ones((B, 7), bool) if mask is None else mask
    close(ops.convert_to_numpy(y)[valid], expected_y[valid], what="y")
    close(last, expected_last, what="state")


@pytest.mark.parametrize("mode", ["reference", "native"])
@pytest.mark.parametrize("kind", KINDS)
def test_one_step(kind, mode):
    x, state = as_dtype(arguments(kind, time=1, batch=1), "float32")
    close(outputs_of(kind, mode)(*tensors((x, state, None))), in_numpy(kind, x, state))


@pytest.mark.parametrize("kind", KINDS)
def test_from_nothing(kind):
    """RWKV-4 begins with no weights at all: the first output is the first value."""
    x, state = as_dtype(arguments(kind, time=70), "float32")
    state = tree.map_structure(np.zeros_like, state)
    if kind == "wkv4":
        state = (*state[:2], np.full_like(state[2], -1e38))
    y, last = outputs_of(kind, "native")(*tensors((x, state, None)))
    expected = outputs_of(kind, "reference")(*tensors((x, state, None)))
    close((y, last), expected, 5e-6)
    if kind == "wkv4":
        close(y[:, 0], x["v"][:, 0])


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("case", ["normal", "extreme", "none"])
@pytest.mark.parametrize("kind", KINDS)
def test_chunks_equal_steps(kind, case, masked):
    """Outputs, state and all gradients over several chunks and a remainder: 1e-12 in float64, 5e-6 in float32."""
    precise = FLOAT64[keras.config.backend()]
    x, state = as_dtype(arguments(kind, 150, case), "float64" if precise else "float32")
    mask = masks(150)["holes"] if masked else None
    expected, got = (gradients_of(kind, mode)(x, state, mask) for mode in ("reference", "native"))
    assert keras.backend.standardize_dtype(got["y"].dtype) == ("float64" if precise else "float32")
    for name in expected:
        close(got[name], expected[name], 1e-12 if precise else 5e-6, name)


@pytest.mark.parametrize("count", [1, 2, None])
@pytest.mark.parametrize("kind", ["wkv6", "wkv7"])
def test_any_number_of_chunks_at_once(monkeypatch, kind, count):
    """A backend takes all chunks at once on one device, and few on another."""
    monkeypatch.setattr(backend.current(), "chunks_at_once", lambda x: count)
    precise = FLOAT64[keras.config.backend()]
    x, state = as_dtype(arguments(kind, 150), "float64" if precise else "float32")
    expected = gradients_of(kind, "reference")(x, state)
    got = gradients_of.__wrapped__(kind, "native")(x, state)
    for name in expected:
        close(got[name], expected[name], 1e-12 if precise else 5e-6, name)


@pytest.mark.parametrize("kind", ["wkv6", "wkv7"])
def test_no_sequences(kind):
    x, state = as_dtype(arguments(kind, 40, batch=0), "float32")
    y, last = outputs_of(kind, "native")(*tensors((x, state, None)))
    assert y.shape == x["v"].shape
    assert last.shape == state.shape


@pytest.mark.skipif(keras.config.backend() != "torch", reason="JAX and TensorFlow have second derivatives")
def test_second_derivatives_are_refused_or_right():
    import torch

    x, state = tensors(as_dtype(arguments("wkv7", 40), "float32"))
    for name in "rk":
        x[name].requires_grad_()

    def first(mode):
        with keras_seq.kernels(mode):
            y = seq_ops.wkv7(**x, state=state)[0]
        return torch.autograd.grad((y * y).sum(), x["r"], create_graph=True)[0]

    assert torch.autograd.grad(first("reference").sum(), x["k"])[0].abs().max() > 0
    with pytest.raises(NotImplementedError, match="reference"):
        first("native")


@pytest.mark.parametrize("kind", KINDS)
def test_chunks_equal_steps_in_float32(kind):
    x, state = arguments(kind, 150)
    expected = gradients_of(kind, "reference")(*as_dtype((x, state), "float64"))
    got = gradients_of(kind, "native")(*as_dtype((x, state), "float32"))
    for name in expected:
        close(got[name], expected[name], 5e-6, name)


def test_the_state_keeps_its_dtype():
    """Recurrent sums are float32, also where the inputs are not."""
    for kind in KINDS:
        x, state = as_dtype(arguments(kind), "float32")
        half = {name: ops.cast(ops.convert_to_tensor(v), "bfloat16") for name, v in x.items()}
        y, last = outputs_of(kind, "native")(half, tensors(state), None)
        assert {keras.backend.standardize_dtype(v.dtype) for v in tree.flatten((y, last))} == {"float32"}


def test_which_path_runs():
    x, state = tensors(as_dtype(arguments("wkv7", 16), "float32"))
    first = {name: v[:, :1] for name, v in x.items()}
    with keras_seq.kernels() as ran:
        seq_ops.wkv7(**x, state=state, training=True)
        seq_ops.wkv7(**first, state=state, training=True)
    assert [(r.op, r.path) for r in ran] == [("wkv7", "native"), ("wkv7", "reference")]
    assert "step" in ran[1].reason
    with keras_seq.kernels("reference") as ran:
        seq_ops.wkv7(**x, state=state, training=True)
    assert [r.path for r in ran] == ["reference"]


@pytest.mark.parametrize("mask", [None, "right", "left", "holes"])
def test_token_shift(mask):
    rng = np.random.default_rng(0)
    x, last = rng.normal(size=(B, 7, 3)).astype("float32"), rng.normal(size=(B, 3)).astype("float32")
    valid = np.ones((B, 7), bool) if mask is None else masks(7)[mask]
    before, end = seq_ops.token_shift(*tensors((x, last)), None if mask is None else tensors(valid))
    for row in range(B):
        held = last[row]
        for t in range(7):
            np.testing.assert_array_equal(ops.convert_to_numpy(before)[row, t], held)
            held = x[row, t] if valid[row, t] else held
        np.testing.assert_array_equal(ops.convert_to_numpy(end)[row], held)
