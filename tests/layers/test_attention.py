"""`MultiHeadAttention` against Keras's, PyTorch's and the equations in NumPy; its cache; its errors."""

import keras
import numpy as np
import pytest
from cases import B, D, T, close, normal, refused
from keras import ops

from keras_seq import backend, layers

HEADS, SIZE = 4, 3
MASK = np.arange(T) < np.array([7, 5, 1, 3])[:, None]


def pair(**kwargs):
    """Ours and Keras's, with the same weights."""
    theirs, ours = (
        keras.layers.MultiHeadAttention(HEADS, SIZE, **kwargs),
        layers.MultiHeadAttention(HEADS, SIZE, **kwargs),
    )
    theirs.build((None, None, D), (None, None, D))
    ours.build((None, None, D))
    ours.set_weights([0.7 * normal(*w.shape, seed=i) for i, w in enumerate(theirs.get_weights())])
    theirs.set_weights(ours.get_weights())
    return ours, theirs


def gradients(layer, function, *inputs):
    """`(y, all gradients in one array)`: that of the keys' bias is 0, and only noise beside the others."""

    def loss(floats):
        y = function(*floats)
        return ops.sum(ops.square(y)), y

    y, d_weights, d_inputs = backend.current().gradients(loss, layer)([ops.convert_to_tensor(x) for x in inputs])
    return y, np.concatenate([ops.convert_to_numpy(g).ravel() for g in (*d_weights, *d_inputs)])


@pytest.mark.parametrize("options", [{}, {"use_bias": False, "value_dim": 5}, {"use_gate": True, "output_shape": 2}])
@pytest.mark.parametrize("causal", [False, True])
def test_equals_keras(options, causal):
    """Outputs and all gradients, with a mask that leaves each query something to see.

    Keras computes the weights in full here: its fused call on JAX fails for value_dim != key_dim.
    """
    ours, theirs = pair(**options)
    x = normal(B, T, D)
    given = {"attention_mask": np.repeat(MASK[:, None], T, 1), "use_causal_mask": causal}
    both = (
        gradients(ours, lambda x: ours(x, x, **given), x),
        gradients(theirs, lambda x: theirs(x, x, return_attention_scores=True, **given)[0], x),
    )
    close(*both, 1e-5)


def test_equals_keras_with_another_sequence():
    ours, theirs = pair()
    x, value, key = normal(B, T, D), normal(B, 5, D, seed=1), normal(B, 5, D, seed=2)
    mask = np.random.default_rng(0).random((B, T, 5)) < 0.7
    mask[:, :, 0] = True
    for given in ({}, {"attention_mask": mask}, {"use_causal_mask": True}):
        got, expected = (m(x, value, key, return_attention_scores=True, **given) for m in (ours, theirs))
        close(got, expected, 1e-5, str(given))


@pytest.mark.parametrize("axes", [None, (2,), (1,), (2, 1)])
def test_equals_keras_over_axes(axes):
    ours, theirs = (m.MultiHeadAttention(HEADS, SIZE, attention_axes=axes) for m in (layers, keras.layers))
    x = normal(2, 3, 4, D)
    theirs(x, x), ours(x)
    ours.set_weights(theirs.get_weights())
    close(ours(x), theirs(x, x), 1e-5)


def test_equals_torch():
    torch = pytest.importorskip("torch")
    theirs = torch.nn.MultiheadAttention(12, HEADS, batch_first=True)
    ours = layers.MultiHeadAttention(HEADS, 3)
    ours.build((None, None, 12))
    w, b = theirs.in_proj_weight.detach().numpy(), normal(36)
    with torch.no_grad():
        theirs.in_proj_bias.copy_(torch.tensor(b))
    qkv = [
        (m.T.reshape(12, HEADS, 3), v.reshape(HEADS, 3)) for m, v in zip(np.split(w, 3), np.split(b, 3), strict=True)
    ]
    out = theirs.out_proj.weight.detach().numpy().T.reshape(HEADS, 3, 12), theirs.out_proj.bias.detach().numpy()
    ours.set_weights([a for pair in (*qkv, out) for a in pair])
    x, valid = normal(B, T, 12), torch.tensor(MASK)
    expected = theirs(*[torch.tensor(x)] * 3, key_padding_mask=~valid, need_weights=False)[0].detach().numpy()
    close(ops.convert_to_numpy(ours(x, mask=MASK))[MASK], expected[MASK], 1e-5)


def test_grouped_heads_are_repeated_heads():
    grouped = layers.MultiHeadAttention(HEADS, SIZE, num_kv_heads=2)
    full = layers.MultiHeadAttention(HEADS, SIZE)
    for layer in (grouped, full):
        layer.build((None, None, D))
    weights = [0.7 * normal(*w.shape, seed=i) for i, w in enumerate(grouped.get_weights())]
    grouped.set_weights(weights)
    full.set_weights([np.repeat(w, 2, -2) if i in (2, 3, 4, 5) else w for i, w in enumerate(weights)])
    close(grouped(normal(B, T, D)), full(normal(B, T, D)), 1e-5)


@pytest.mark.parametrize("sinks", [0, 2])
def test_window_is_a_mask(sinks):
    """Whole, and step by step through the ring: what a mask of time times time gives."""
    window = 3
    ours = layers.MultiHeadAttention(HEADS, SIZE, causal=True, window=window, sinks=sinks)
    x = normal(B, 12, D)
    y = ours(x)
    plain = layers.MultiHeadAttention(HEADS, SIZE)
    plain.build((None, None, D))
    plain.set_weights(ours.get_weights())
    q, k = np.arange(12)[:, None], np.arange(12)[None]
    seen = (k <= q) & ((q - k < window) | (k < sinks))
    close(y, plain(x, attention_mask=np.repeat(seen[None], B, 0)), 1e-5)
    state = ours.initial_state(B)
    assert state[0].shape[2] == window + sinks
    for t in range(12):
        y_t, state = ours.step(ops.convert_to_tensor(x[:, t]), state)
        close(y_t, y[:, t], 1e-5, f"step {t}")


def test_a_query_that_sees_nothing_gives_zero():
    ours = layers.MultiHeadAttention(HEADS, SIZE, use_bias=False)
    mask = MASK & (np.arange(B) != 2)[:, None]
    ours.build((None, None, D))
    results = gradients(ours, lambda x: ours(x, mask=ops.convert_to_tensor(mask)), normal(B, T, D))
    assert np.array_equal(ops.convert_to_numpy(results[0])[2], np.zeros((T, D)))
    assert all(np.isfinite(ops.convert_to_numpy(g)).all() for g in results)


def test_the_cache_has_the_promised_size():
    ours = layers.MultiHeadAttention(HEADS, SIZE, causal=True, num_kv_heads=2, value_dim=5)
    ours.build((None, None, D))
    keys, values, length = ours.initial_state(3, max_length=9)
    assert (tuple(keys.shape), tuple(values.shape), tuple(length.shape)) == ((3, 2, 9, 3), (3, 2, 9, 5), (3,))


def test_a_full_state_raises():
    ours = layers.MultiHeadAttention(HEADS, SIZE, causal=True)
    x = normal(2, 5, D)
    ours(x)
    _, state = ours(x[:, :4], initial_state=ours.initial_state(2, 5), return_state=True)
    _, state = ours(x[:, :1], initial_state=state, return_state=True)
    refused(lambda: ours(x[:, :1], initial_state=state, return_state=True), "full", "5", "6")
    if backend.current().COMPILES:

        def beyond(x, *state):
            return ours(x, initial_state=state, return_state=True)[0]

        y = backend.current().compiled(beyond, ours)(ops.convert_to_tensor(x[:, :1]), *state)
        assert np.isnan(ops.convert_to_numpy(y)).all()


def test_a_state_can_be_used_twice():
    """A step leaves the state that it was given as it is."""
    ours = layers.MultiHeadAttention(HEADS, SIZE, causal=True)
    x = normal(2, 6, D)
    ours(x)
    _, state = ours(x[:, :3], initial_state=ours.initial_state(2, 6), return_state=True)
    before = [np.array(ops.convert_to_numpy(s)) for s in state]
    one, _ = ours.step(ops.convert_to_tensor(x[:, 3]), state)
    ours.step(ops.convert_to_tensor(x[:, 4]), state)
    again, _ = ours.step(ops.convert_to_tensor(x[:, 3]), state)
    close(state, before, 1e-12)
    close(again, one, 1e-12)


def test_errors():
    refused(lambda: layers.MultiHeadAttention(0, 4), "num_heads", "0")
    refused(lambda: layers.MultiHeadAttention(4, 0), "key_dim", "0")
    refused(lambda: layers.MultiHeadAttention(4, 4, num_kv_heads=3), "num_kv_heads", "4", "3")
    refused(lambda: layers.MultiHeadAttention(4, 4, window=0), "window", "0")
    refused(lambda: layers.MultiHeadAttention(4, 4, sinks=1), "sinks", "window")
    refused(lambda: layers.MultiHeadAttention(4, 4, position="sine"), "position", "sine")
    refused(lambda: layers.MultiHeadAttention(4, 4, stateful=True), "stateful", "causal")
    refused(lambda: layers.MultiHeadAttention(4, None)(normal(2, 3, 6)), "num_heads", "6")
    plain, causal = layers.MultiHeadAttention(2, 4), layers.MultiHeadAttention(2, 4, causal=True)
    x = normal(2, 3, 6)
    plain(x), causal(x)
    refused(lambda: plain.step(x[:, 0], ()), "step", "causal")
    refused(lambda: plain(x, return_state=True), "state", "causal")
    refused(lambda: causal(x, normal(2, 4, 6), return_state=True), "state")
    refused(lambda: causal(x, attention_mask=np.ones((2, 3, 3), bool), return_state=True), "attention_mask", "state")
    refused(lambda: plain(x, attention_mask=np.ones((2, 3, 3), "float32")), "attention_mask", "float32")
    refused(lambda: plain(x, mask=np.ones((2, 4), bool)), "mask", "(2, 4)")
    refused(lambda: plain(x, mask=np.ones((2, 3), "float32")), "mask", "float32")
