"""The recurrences of RWKV 4, 6 and 7 step by step: the definitions.

Axes: b batch, t time, h heads, k channels of a key, v channels of a value (in a head both are of the same size), d
channels of RWKV-4, which has no heads.

All recurrences run in the dtype of their state, float32 at least. A padded step keeps the state as it is: its decay is
1 and it adds nothing. `training` says that gradients will be wanted; it changes which kernel is the faster one, not
what is computed.
"""

from typing import Any, NamedTuple

from keras import ops

from keras_seq.ops.scan import scan, time_first

LEAST = -1e38  # the largest exponent of a state that has seen nothing


class WKV4State(NamedTuple):
    """The sums of RWKV-4, each `(b, d)`: numerator and denominator, both times `exp(-exponent)`."""

    numerator: Any
    denominator: Any
    exponent: Any


def wkv4(k, v, w, u, state, mask=None, training=False):
    """The attention of RWKV-4: a mean of the values so far, with weights that decay in time.

    `y_t = (A_t + exp(u + k_t) v_t) / (B_t + exp(u + k_t))`, where
    `A_{t+1} = exp(w) A_t + exp(k_t) v_t`, `B_{t+1} = exp(w) B_t + exp(k_t)`.

    Args:
        k, v: `(b, t, d)`.
        w: `(d,)`, logarithm of the decay, < 0.
        u: `(d,)`, bonus of the present step.
        state: `WKV4State`: A and B, divided by `exp(exponent)`, so that nothing overflows.
        mask: `(b, t)` bool or None.
        training: whether gradients will be wanted.

    Returns:
        y `(b, t, d)` and the next state.

    Source: Peng et al. 2023, arXiv:2305.13048, eq. 16-18 and appendix D.
    """
    k, v, w, added = wkv4_inputs(k, v, w, state, mask)
    u = ops.cast(u, k.dtype)

    def step(state, x):
        k, v, w, added = x
        return wkv4_next(k, v, w, added, state), wkv4_output(k, v, u, state)

    state, y = scan(step, WKV4State(*state), tuple(time_first(x) for x in (k, v, w, added)))
    return time_first(y), state


def wkv4_inputs(k, v, w, state, mask):
    """k, v, w of each step and how much it adds to the denominator, in the dtype of the state; padding adds nothing."""
    k, v, w = (ops.cast(x, state[0].dtype) for x in (k, v, w))
    w, added = ops.broadcast_to(w, ops.shape(k)), ops.ones_like(k)
    if mask is not None:
        valid = mask[..., None]
        k, v = ops.where(valid, k, LEAST), ops.where(valid, v, 0)
        w, added = ops.where(valid, w, 0), ops.where(valid, added, 0)
    return k, v, w, added


def larger(x, y):
    """The larger of both; `ops.maximum` rounds float64 to float32 on PyTorch."""
    return ops.where(x > y, x, y)


def wkv4_next(k, v, w, added, state):
    """The next state of one step, or of many side by side."""
    exponent = larger(w + state.exponent, k)
    old, new = ops.exp(w + state.exponent - exponent), ops.exp(k - exponent)
    return WKV4State(old * state.numerator + new * v, old * state.denominator + new * added, exponent)


def wkv4_output(k, v, u, state):
    """y of one step, or of many side by side."""
    exponent = larger(state.exponent, u + k)
    old, new = ops.exp(state.exponent - exponent), ops.exp(u + k - exponent)
    return (old * state.numerator + new * v) / (old * state.denominator + new)


def wkv6(r, k, v, w, u, state, mask=None, training=False):
    """The attention of RWKV-6: linear attention with a decay of each channel at each step.

    `y_t = r_t (S_t + diag(u) k_t^T v_t)`;  `S_{t+1} = diag(exp(w_t)) S_t + k_t^T v_t`.

    Args:
        r, k, v: `(b, t, h, k)`.
        w: `(b, t, h, k)`, logarithm of the decay, <= 0, however low.
        u: `(h, k)` or `(h, 1)`, bonus of the present step.
        state: S `(b, h, k, v)`.
        mask: `(b, t)` bool or None.
        training: whether gradients will be wanted.

    Returns:
        y `(b, t, h, v)` and the next S.

    Source: Peng et al. 2024, arXiv:2404.05892, eq. 17-19.
    """
    r, k, v, w = masked(mask, state, r, k, v, w)
    u = ops.cast(u, r.dtype)

    def step(s, x):
        r, k, v, w = x
        y = (r[..., None, :] @ s)[..., 0, :] + ops.sum(r * u * k, axis=-1, keepdims=True) * v
        return ops.exp(w)[..., None] * s + k[..., None] * v[..., None, :], y

    state, y = scan(step, state, tuple(time_first(x) for x in (r, k, v, w)))
    return time_first(y), state


def wkv7(r, w, k, v, a, b, state, mask=None, training=False):
    """The attention of RWKV-7: a state that is decayed, corrected along one direction, and added to.

    `S_t = S_{t-1} (diag(exp(w_t)) + a_t^T b_t) + v_t^T k_t`;  `y_t = S_t r_t`.

    In RWKV-7 a is the direction that is removed, the negative normalized key, and b is that key times the rate at which
    it is learned in context.

    Args:
        r, k, v, a, b: `(b, t, h, k)`.
        w: `(b, t, h, k)`, logarithm of the decay, <= 0. The chunked kernel is for w >= -1, as in RWKV-7, whose w is
            above `-exp(-0.5)`: its exponents grow with the sum of w in a chunk.
        state: S `(b, h, v, k)`.
        mask: `(b, t)` bool or None.
        training: whether gradients will be wanted.

    Returns:
        y `(b, t, h, v)` and the next S.

    Source: Peng et al. 2025, arXiv:2503.14456, eq. 16-17.
    """
    r, w, k, v, a, b = masked(mask, state, r, w, k, v, a, b)

    def step(s, x):
        r, w, k, v, a, b = x
        removed = s @ a[..., None]
        s = s * ops.exp(w)[..., None, :] + removed @ b[..., None, :] + v[..., None] @ k[..., None, :]
        return s, (s @ r[..., None])[..., 0]

    state, y = scan(step, state, tuple(time_first(x) for x in (r, w, k, v, a, b)))
    return time_first(y), state


def masked(mask, state, *xs):
    """The inputs in the dtype of the state, 0 on padded steps: nothing is decayed and nothing added."""
    cast = [ops.cast(x, state.dtype) for x in xs]
    if mask is None:
        return cast
    valid = mask[..., None, None]
    return [ops.where(valid, x, ops.zeros_like(x)) for x in cast]
