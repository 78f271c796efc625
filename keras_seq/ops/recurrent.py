"""Simple, LSTM and GRU recurrences as pure functions of arrays: the definition that every kernel is held to.

Axes: b batch, t time, d features, u units. All arrays have the dtype of the state (float32 or float64).
A padded step (mask False) keeps the state, and its output is the state's h, so that any split of the time axis gives
the same outputs. `recurrent_dropout` is None or a `(b, u)` factor on h where it enters the recurrent product
(Gal & Ghahramani 2016, arXiv:1512.05287: one mask for all steps).
"""

from keras import ops

from keras_seq.backend import native
from keras_seq.ops.dense import dense
from keras_seq.ops.scan import masked_scan


def _identity(h):
    return h


def _dropout(factor):
    return _identity if factor is None else lambda h: h * factor


def _plus(bias):
    return _identity if bias is None else lambda z: z + bias


@native
def simple_rnn(x, h, kernel, recurrent_kernel, bias=None, mask=None, *, activation=ops.tanh, recurrent_dropout=None):
    """Simple (Elman) recurrence: `h' = act(x W + h U + b)`.

    Args:
        x: `(b, t, d)`.
        h: `(b, u)`.
        kernel, recurrent_kernel, bias: W `(d, u)`, U `(u, u)`, b `(u,)` or None.
        mask: `(b, t)` bool or None.

    Returns:
        y `(b, t, u)` and the last h.

    Source: Elman 1990, "Finding structure in time".
    """
    recurrent_kernel, drop = ops.convert_to_tensor(recurrent_kernel), _dropout(recurrent_dropout)

    def step(state, x):
        return (activation(x + drop(state[0]) @ recurrent_kernel),)

    y, (h,) = masked_scan(step, (h,), dense(x, kernel, bias), mask)
    return y, h


@native
def simple_rnn_step(x, h, kernel, recurrent_kernel, bias=None, *, activation=ops.tanh):
    """One step of `simple_rnn`: `x` `(b, d)` -> y `(b, u)` and the next h, which is y."""
    h = activation(_plus(bias)(x @ kernel + h @ recurrent_kernel))
    return h, h


@native
def lstm(
    x,
    state,
    kernel,
    recurrent_kernel,
    bias=None,
    mask=None,
    *,
    activation=ops.tanh,
    recurrent_activation=ops.sigmoid,
    recurrent_dropout=None,
):
    """Long short-term memory with a forget gate.

    `z = x W + h U + b`, split into i, f, g, o; `c' = s(f) c + s(i) act(g)`; `h' = s(o) act(c')`.

    Args:
        x: `(b, t, d)`.
        state: `(h, c)`, each `(b, u)`.
        kernel, recurrent_kernel, bias: W `(d, 4u)`, U `(u, 4u)`, b `(4u,)` or None; gates in the order i, f, g, o.
        mask: `(b, t)` bool or None.

    Returns:
        y `(b, t, u)` and the last `(h, c)`.

    Source: Hochreiter & Schmidhuber 1997; Gers et al. 2000 (forget gate).
    """
    recurrent_kernel, drop = ops.convert_to_tensor(recurrent_kernel), _dropout(recurrent_dropout)

    def step(state, x):
        h, c = state
        return _lstm_gates(x + drop(h) @ recurrent_kernel, c, activation, recurrent_activation)

    return masked_scan(step, tuple(state), dense(x, kernel, bias), mask)


@native
def lstm_step(x, state, kernel, recurrent_kernel, bias=None, *, activation=ops.tanh, recurrent_activation=ops.sigmoid):
    """One step of `lstm`: `x` `(b, d)` -> y `(b, u)` and the next `(h, c)`, of which h is y."""
    h, c = state
    h, c = _lstm_gates(_plus(bias)(x @ kernel + h @ recurrent_kernel), c, activation, recurrent_activation)
    return h, (h, c)


def _lstm_gates(z, c, activation, recurrent_activation):
    i, f, g, o = ops.split(z, 4, axis=-1)
    c = recurrent_activation(f) * c + recurrent_activation(i) * activation(g)
    return recurrent_activation(o) * activation(c), c


@native
def gru(
    x,
    h,
    kernel,
    recurrent_kernel,
    bias=None,
    mask=None,
    *,
    activation=ops.tanh,
    recurrent_activation=ops.sigmoid,
    recurrent_dropout=None,
    reset_after=True,
):
    """Gated recurrent unit.

    `z = s(x W_z + h U_z + b_z)`; `r = s(x W_r + h U_r + b_r)`; `h' = z h + (1 - z) n`, where
    `n = act(x W_n + b_n + r (h U_n + b'_n))` if `reset_after` (version 3, as in cuDNN), else
    `n = act(x W_n + b_n + (r h) U_n)` (version 1).

    Args:
        x: `(b, t, d)`.
        h: `(b, u)`.
        kernel, recurrent_kernel: W `(d, 3u)`, U `(u, 3u)`, in the order z, r, n.
        bias: None, or `(2, 3u)` (for W and for U) if `reset_after`, else `(3u,)`.
        mask: `(b, t)` bool or None.

    Returns:
        y `(b, t, u)` and the last h.

    Source: Cho et al. 2014, arXiv:1406.1078, eq. 5-8 (v3 and v1 of the preprint).
    """
    input_bias, recurrent_bias = _two(bias, reset_after)
    recurrent_kernel, drop = ops.convert_to_tensor(recurrent_kernel), _dropout(recurrent_dropout)

    def step(state, x):
        (h,) = state
        return (
            _gru_gates(x, h, drop, recurrent_kernel, recurrent_bias, activation, recurrent_activation, reset_after),
        )

    y, (h,) = masked_scan(step, (h,), dense(x, kernel, input_bias), mask)
    return y, h


@native
def gru_step(
    x,
    h,
    kernel,
    recurrent_kernel,
    bias=None,
    *,
    activation=ops.tanh,
    recurrent_activation=ops.sigmoid,
    reset_after=True,
):
    """One step of `gru`: `x` `(b, d)` -> y `(b, u)` and the next h, which is y."""
    input_bias, recurrent_bias = _two(bias, reset_after)
    x = _plus(input_bias)(x @ kernel)
    h = _gru_gates(x, h, _identity, recurrent_kernel, recurrent_bias, activation, recurrent_activation, reset_after)
    return h, h


def _two(bias, reset_after):
    """The biases of W and of U."""
    return ops.unstack(bias) if reset_after and bias is not None else (bias, None)


def _gru_gates(x, h, drop, recurrent_kernel, recurrent_bias, activation, recurrent_activation, reset_after):
    u = h.shape[-1]
    if reset_after:
        a = _plus(recurrent_bias)(drop(h) @ recurrent_kernel)
        z, r = ops.split(recurrent_activation(x[:, : 2 * u] + a[:, : 2 * u]), 2, axis=-1)
        n = activation(x[:, 2 * u :] + r * a[:, 2 * u :])
    else:
        a = drop(h) @ recurrent_kernel[:, : 2 * u]
        z, r = ops.split(recurrent_activation(x[:, : 2 * u] + a), 2, axis=-1)
        n = activation(x[:, 2 * u :] + (r * drop(h)) @ recurrent_kernel[:, 2 * u :])
    return z * h + (1 - z) * n
