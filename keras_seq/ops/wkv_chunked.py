"""The recurrences of RWKV chunk by chunk: products of matrices in place of a step for each token.

Shared by the backends, written with `keras.ops`. Products by `@`, cumulative sums by a product with a triangle of ones:
some of `keras.ops` compute float64 in float32.

Axes: b batch, h heads, n chunks, c steps of a chunk, k and v channels of keys and of values.
"""

import math
from typing import Any, NamedTuple

import numpy as np
from keras import ops

from keras_seq import backend
from keras_seq.ops.scan import scan
from keras_seq.ops.wkv_recurrent import LEAST, WKV4State, larger, masked, wkv4_inputs, wkv4_next, wkv4_output

CHUNK = {"wkv7": 32, "wkv6": 64}


def _length(name, time):
    """Steps of a chunk: a power of 2, no longer than needed where the time is known."""
    return CHUNK[name] if time is None else min(CHUNK[name], 2 ** math.ceil(math.log2(time)))


def _chunks(x, size):
    """`(b, t, h, k)` -> `(b, h, n, c, k)`, filled up with steps of zeros, which change nothing."""
    batch, time, heads, features = ops.shape(x)
    if x.shape[1] is None or x.shape[1] % size:
        missing = -time % size
        x = ops.concatenate([x, ops.zeros((batch, missing, heads, features), x.dtype)], axis=1)
        time = time + missing
    return ops.transpose(ops.reshape(x, (batch, time // size, size, heads, features)), (0, 3, 1, 2, 4))


def _steps(y, time):
    """The reverse: `(b, h, n, c, v)` -> `(b, t, h, v)`."""
    batch, heads, count, size, features = ops.shape(y)
    return ops.reshape(ops.transpose(y, (0, 2, 3, 1, 4)), (batch, count * size, heads, features))[:, :time]


def _transposed(x):
    return ops.swapaxes(x, -1, -2)


def _over_chunks(one, several, state, *xs):
    """`state, y = one(state, *xs)` for a chunk `(b, h, c, ...)` after another, or `several` on `(b, h, n, c, ...)`.

    How many at once is for the backend to say.
    """
    count, together = xs[0].shape[2], backend.current().chunks_at_once(xs[0])
    if together == 1:
        first = [ops.transpose(x, (2, 0, 1, 3, 4)) for x in xs]
        state, y = scan(lambda s, x: one(s, *x), state, tuple(first))
        return state, ops.transpose(y, (1, 2, 0, 3, 4))
    if together is None or together >= count:
        return several(state, *xs)
    ys = []
    for some in zip(*(ops.split(x, list(range(together, count, together)), axis=2) for x in xs), strict=True):
        state, y = several(state, *some)
        ys.append(y)
    return state, ops.concatenate(ys, axis=2)


def _states(step, state, *xs):
    """The state before each chunk `(b, h, n, ...)`, and the last; `xs` are `(b, h, n, ...)`."""
    first = [ops.transpose(x, (2, 0, 1, *range(3, len(x.shape)))) for x in xs]
    last, before = scan(lambda s, x: (step(s, *x), s), state, tuple(first))
    return ops.transpose(before, (1, 2, 0, *range(3, len(before.shape)))), last


def wkv7(r, w, k, v, a, b, state, mask=None, training=False):
    """`keras_seq.ops.wkv_recurrent.wkv7` in chunks.

    With `c_t` the sum of w up to step t, what step s adds is decayed to `exp(c_t - c_s)` at step t. It is split into
    `exp(c_t - m) exp(m - c_s)`, m the middle of the sums of the chunk, so that a product gives all pairs of steps. As
    `w > -exp(-0.5)`, no factor is above `exp(0.31 c)`. What a step removes depends on what the steps before it in the
    chunk removed: a triangular system. Of several chunks at once each becomes an affine map of the state,
    `S -> S M + P`, and only these maps come in turn. The gradient is written by hand;
    on PyTorch there are no second derivatives.
    """
    size, time = _length("wkv7", r.shape[1]), ops.shape(r)[1]
    xs = [_chunks(x, size) for x in masked(mask, state, r, w, k, v, a, b)]
    with_gradient = backend.current().with_gradient
    one = with_gradient(_wkv7_chunk, _wkv7_chunk_backward)
    several = with_gradient(_wkv7_chunks, _wkv7_chunks_backward)
    state, y = _over_chunks(one, several, state, *xs)
    return _steps(y, time), state


class _Met(NamedTuple):
    """How the steps of a chunk meet. a and r read, b and k write: one below the other, `(..., 2 c, k)`.

    All are decayed to, or from, the middle of the chunk; the state is where it carries `half` of the decay.
    """

    reads: Any
    writes: Any
    pairs: Any  # what each read finds of each write before it, (..., 2 c, 2 c)
    inverse: Any  # of the system whose solution is what each step removes, (..., c, c)
    half: Any  # (..., 1, k)
    of_reads: Any  # by what a and r, and b and k, were decayed, (..., 2 c, k)
    of_writes: Any
    past: Any  # which writes a read may find, (2 c, 2 c)


def _wkv7_met(r, w, k, a, b):
    size, past = r.shape[-2], _past(r.shape[-2], r.dtype)
    total = past[size:, :size] @ w
    middle = 0.5 * total[..., -1:, :]
    grown = ops.exp(middle - total)
    of_reads = ops.exp(ops.concatenate([total - w, total], axis=-2) - middle)
    of_writes = ops.concatenate([grown, grown], axis=-2)
    reads, writes = ops.concatenate([a, r], axis=-2) * of_reads, ops.concatenate([b, k], axis=-2) * of_writes
    pairs = (reads @ _transposed(writes)) * past
    inverse = backend.current().inverse_lower(ops.eye(size, dtype=r.dtype) - pairs[..., :size, :size])
    return _Met(reads, writes, pairs, inverse, ops.exp(middle), of_reads, of_writes, past)


def _past(size, dtype):
    """Which steps a and r of a chunk read: a those before its own, r its own too; `(2 c, 2 c)`."""
    before, upto = np.tril(np.ones((size, size)), -1), np.tril(np.ones((size, size)))
    return ops.convert_to_tensor(np.block([[before, before], [upto, upto]]), dtype=dtype)


def _wkv7_outputs(carried, v, met):
    """y, and what b and k write: what is removed, and v, `(..., 2 c, v)`; `carried` is the state in the middle."""
    size = v.shape[-2]
    found = met.reads @ _transposed(carried)
    removed = met.inverse @ (met.pairs[..., :size, size:] @ v + found[..., :size, :])
    written = ops.concatenate([removed, v], axis=-2)
    return met.pairs[..., size:, :] @ written + found[..., size:, :], written


def _wkv7_chunk(state, r, w, k, v, a, b):
    """One chunk, `state, y`, and what its gradient needs: all the rest is computed a second time."""
    met = _wkv7_met(r, w, k, a, b)
    carried = state * met.half
    y, written = _wkv7_outputs(carried, v, met)
    return ((carried + _transposed(written) @ met.writes) * met.half, y), (state, r, w, k, v, a, b)


def _wkv7_chunk_backward(inputs, gradients):
    (state, r, w, k, v, a, b), (d_state, dy) = inputs, gradients
    met = _wkv7_met(r, w, k, a, b)
    carried = state * met.half
    written = _wkv7_outputs(carried, v, met)[1]
    return _wkv7_gradients(d_state, dy, carried, v, written, met)


def _wkv7_chunks(state, r, w, k, v, a, b):
    """All chunks at once, `state, y`, and what their gradient needs."""
    size = r.shape[-2]
    met = _wkv7_met(r, w, k, a, b)
    of_values = met.inverse @ (met.pairs[..., :size, size:] @ v)
    of_state = met.inverse @ met.reads[..., :size, :]
    one = ops.eye(w.shape[-1], dtype=w.dtype)
    kept = (one + _transposed(of_state) @ met.writes[..., :size, :]) * met.half * _transposed(met.half)
    added = (_transposed(ops.concatenate([of_values, v], axis=-2)) @ met.writes) * met.half
    before, state = _states(lambda s, kept, added: s @ kept + added, state, kept, added)
    carried = before * met.half
    y, written = _wkv7_outputs(carried, v, met)
    return (state, y), (carried, v, written, of_state, kept, *met)


def _wkv7_chunks_backward(residuals, gradients):
    carried, v, written, of_state, kept, *met = residuals
    (d_state, dy), met, size = gradients, _Met(*met), v.shape[-2]
    dy_removed = _transposed(met.pairs[..., size:, :size]) @ dy
    added = (_transposed(dy_removed) @ of_state + _transposed(dy) @ met.reads[..., size:, :]) * met.half
    backwards = [ops.flip(x, axis=2) for x in (_transposed(kept), added)]
    d_after, d_state = _states(lambda d, kept, added: d @ kept + added, d_state, *backwards)
    return d_state, *_wkv7_gradients(ops.flip(d_after, axis=2), dy, carried, v, written, met)[1:]


def _wkv7_gradients(d_state, dy, carried, v, written, met):
    """By the state before a chunk, r, w, k, v, a, b; from those by the state after it and by y."""
    size = v.shape[-2]
    d_after = d_state * met.half
    d_written = _transposed(met.pairs[..., size:, :]) @ dy + met.writes @ _transposed(d_after)
    d_system = _transposed(met.inverse) @ d_written[..., :size, :]
    d_found = ops.concatenate([d_system, dy], axis=-2)
    dv = d_written[..., size:, :] + _transposed(met.pairs[..., :size, size:]) @ d_system
    d_pairs = (d_found @ _transposed(written)) * met.past
    d_reads = d_found @ carried + d_pairs @ met.writes
    stored = written @ d_after
    d_writes = stored + _transposed(d_pairs) @ met.reads
    d_carried = d_after + _transposed(d_found) @ met.reads
    # By the exponents: of reads c_t - m (and -w), of writes m - c_t, of the state m before and after the chunk.
    by_read, by_write = d_reads * met.reads, d_writes * met.writes
    by_a = by_read[..., :size, :]
    by_total = by_a + by_read[..., size:, :] - by_write[..., :size, :] - by_write[..., size:, :]
    by_middle = _sum_of_steps((d_after + d_carried) * carried) + _sum_of_steps(stored * met.writes - by_read + by_write)
    dw = _transposed(met.past[size:, :size]) @ by_total - by_a + 0.5 * by_middle
    da, dr = _halves(d_reads * met.of_reads, size)
    db, dk = _halves(d_writes * met.of_writes, size)
    return d_carried * met.half, dr, dw, dk, dv, da, db


def _sum_of_steps(x):
    return ops.sum(x, axis=-2, keepdims=True)


def _halves(x, size):
    return x[..., :size, :], x[..., size:, :]


def wkv6(r, k, v, w, u, state, mask=None, training=False):
    """`keras_seq.ops.wkv_recurrent.wkv6` in chunks.

    A chunk is halved again and again: steps of a right half meet those of the left half beside it, and the decay from
    step s to step t is split where the halves meet. The logarithms of both factors are sums of w, never differences of
    sums, so none is above 0, however low w is, and none loses digits.
    """
    size, time = _length("wkv6", r.shape[1]), ops.shape(r)[1]
    xs = [_chunks(x, size) for x in masked(mask, state, r, k, v, w)]
    r, k, v, _ = xs
    bonus = ops.sum(r * ops.cast(u, r.dtype)[:, None, None] * k, axis=-1, keepdims=True) * v
    state, y = _over_chunks(backend.current().recomputed(_wkv6_chunk), _wkv6_chunks, state, *xs)
    return _steps(bonus + y, time), state


def _wkv6_chunk(state, *xs):
    y, r, kept, added = _wkv6_within(*xs)
    return kept * state + added, y + r @ state


def _wkv6_chunks(state, *xs):
    y, r, kept, added = _wkv6_within(*xs)
    states, state = _states(lambda s, kept, added: kept * s + added, state, kept, added)
    return state, y + r @ states


def _wkv6_within(r, k, v, w):
    """Of chunks: y from the steps inside; r, decayed to the beginning; what is kept of a state, and added to it."""
    size, channels, lead = r.shape[-2], r.shape[-1], ops.shape(r)[:-2]

    def pairs(x, length):
        """`(..., c, k)` -> the left and the right halves `(..., pairs, length, k)`."""
        x = ops.reshape(x, (*lead, size // (2 * length), 2, length, channels))
        return x[..., 0, :, :], x[..., 1, :, :]

    y = ops.zeros_like(v)
    # Within each block: the sum of w before a step, after a step, and over the block.
    before, after, whole = ops.zeros_like(w), ops.zeros_like(w), w[..., None, :]
    length = 1
    while length < size:
        before_left, before_right = pairs(before, length)
        after_left, after_right = pairs(after, length)
        left, right = whole[..., ::2, :, :], whole[..., 1::2, :, :]
        keys, values = pairs(k, length)[0], pairs(v, length)[0]
        queries = pairs(r, length)[1]
        met = (queries * ops.exp(before_right)) @ _transposed(keys * ops.exp(after_left)) @ values
        y = y + ops.reshape(ops.stack([ops.zeros_like(met), met], -3), (*lead, size, channels))
        before = ops.reshape(ops.stack([before_left, left + before_right], -3), (*lead, size, channels))
        after = ops.reshape(ops.stack([after_left + right, after_right], -3), (*lead, size, channels))
        whole = left + right
        length *= 2
    kept, added = ops.exp(_transposed(whole[..., 0, :, :])), _transposed(k * ops.exp(after)) @ v
    return y, r * ops.exp(before), kept, added


def wkv4(k, v, w, u, state, mask=None, training=False):
    """`keras_seq.ops.wkv_recurrent.wkv4` in chunks.

    Two short loops: over the steps, of all chunks at once, and then over the chunks.
    """
    time = ops.shape(k)[1]
    size = 32 if k.shape[1] is None else 2 ** round(math.log2(math.sqrt(k.shape[1])))
    state = WKV4State(*state)
    batch, _, features = ops.shape(k)
    count = -(-time // size)
    k, v, w, added = wkv4_inputs(k, v, w, state, mask)

    def steps_first(x, fill):
        """`(b, t, d)` -> `(c, b, n, d)`."""
        filled = ops.concatenate([x, ops.full((batch, count * size - time, features), fill, x.dtype)], axis=1)
        return ops.transpose(ops.reshape(filled, (batch, count, size, features)), (2, 0, 1, 3))

    k, v, w, added = steps_first(k, LEAST), steps_first(v, 0), steps_first(w, 0), steps_first(added, 0)
    empty = WKV4State(ops.zeros_like(k[0]), ops.zeros_like(k[0]), ops.full_like(k[0], LEAST))

    def step(carry, x):
        """The sums of each chunk from nothing on, and how much has decayed since its beginning."""
        (inner, decay), (k, v, w, added) = carry, x
        return (wkv4_next(k, v, w, added, inner), decay + w), carry

    (whole, decays), (inner, decay) = scan(step, (empty, ops.zeros_like(k[0])), (k, v, w, added))

    def chunk(state, x):
        return _sum(state, *x), state

    over = WKV4State(*(ops.swapaxes(x, 0, 1) for x in whole)), ops.swapaxes(decays, 0, 1)
    state, outer = scan(chunk, state, over)
    outer = WKV4State(*(ops.swapaxes(x, 0, 1)[None] for x in outer))
    y = wkv4_output(k, v, ops.cast(u, k.dtype), _sum(outer, inner, decay))
    return ops.reshape(ops.transpose(y, (1, 2, 0, 3)), (batch, count * size, features))[:, :time], state


def _sum(state, inner, decay):
    """The state after steps that made `inner` of nothing and decayed what was before."""
    exponent = larger(decay + state.exponent, inner.exponent)
    old, new = ops.exp(decay + state.exponent - exponent), ops.exp(inner.exponent - exponent)
    numerator = old * state.numerator + new * inner.numerator
    return WKV4State(numerator, old * state.denominator + new * inner.denominator, exponent)
