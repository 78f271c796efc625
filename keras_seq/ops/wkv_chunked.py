"""The recurrences of RWKV chunk by chunk: products of matrices in place of a step for each token.

Shared by the backends, written with `keras.ops`. Products by `@`, cumulative sums by a product with a triangle of ones:
some of `keras.ops` compute float64 in float32.

Axes: b batch, h heads, n chunks, c steps of a chunk, k and v channels of keys and of values.
"""

import math

import numpy as np
from keras import ops

from keras_seq import backend
from keras_seq.ops.scan import scan
from keras_seq.ops.wkv_recurrent import LEAST, WKV4State, larger, masked, wkv4_inputs, wkv4_next, wkv4_output

CHUNK = 64


def _length(time):
    """Steps of a chunk: a power of 2, no longer than needed where the time is known."""
    return CHUNK if time is None else min(CHUNK, 2 ** math.ceil(math.log2(time)))


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


def _triangle(size, diagonal, dtype):
    """Ones below a diagonal and on it, `(c, c)`."""
    return ops.convert_to_tensor(np.tril(np.ones((size, size)), diagonal), dtype=dtype)


def _transposed(x):
    return ops.swapaxes(x, -1, -2)


def _in_turn(chunk, state, *xs):
    """`state, y = chunk(state, *xs)` for one chunk `(b, h, c, ...)` after another, of `xs` `(b, h, n, c, ...)`.

    What is inside a chunk is computed a second time in the backward pass: on a CPU that is faster than to store it for
    all chunks and to fetch it from memory.
    """
    first = [ops.transpose(x, (2, 0, 1, 3, 4)) for x in xs]
    state, y = scan(backend.current().recomputed(lambda s, x: chunk(s, *x)), state, tuple(first))
    return ops.transpose(y, (1, 2, 0, 3, 4)), state


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
    chunk removed: a triangular system. Either the chunks come in turn, or each becomes an affine map of the state,
    `S -> S M + P`, and only these maps come in turn.
    """
    size, time = _length(r.shape[1]), ops.shape(r)[1]
    xs = [_chunks(x, size) for x in masked(mask, state, r, w, k, v, a, b)]
    y, state = (_wkv7_in_turn if backend.current().chunks_in_turn() else _wkv7_at_once)(state, *xs)
    return _steps(y, time), state


def _wkv7_in_turn(state, r, w, k, v, a, b):
    def chunk(state, r, w, k, v, a, b):
        r, k, a, b, half, system, ak, rb, rk = _wkv7_pairs(r, w, k, a, b)
        carried = state * half
        removed = backend.current().solve_lower(system, ak @ v + a @ _transposed(carried))
        y = rb @ removed + rk @ v + r @ _transposed(carried)
        return (carried + _transposed(removed) @ b + _transposed(v) @ k) * half, y

    return _in_turn(chunk, state, r, w, k, v, a, b)


def _wkv7_at_once(state, r, w, k, v, a, b):
    r, k, a, b, half, system, ak, rb, rk = _wkv7_pairs(r, w, k, a, b)
    # What each step removes: of the values in the chunk, and of the state before it.
    removed = backend.current().solve_lower(system, ops.concatenate([ak @ v, a * half], axis=-1))
    of_values, of_state = removed[..., : v.shape[-1]], removed[..., v.shape[-1] :]
    b, k = b * half, k * half
    added = _transposed(of_values) @ b + _transposed(v) @ k
    kept = _transposed(of_state) @ b + ops.eye(b.shape[-1], dtype=b.dtype) * ops.square(half)
    before, state = _states(lambda s, kept, added: s @ kept + added, state, kept, added)
    return rb @ of_values + rk @ v + (rb @ of_state + r * half) @ _transposed(before), state


def _wkv7_pairs(r, w, k, a, b):
    """r, k, a, b, decayed to or from the middle of their chunk; the decay of half a chunk; how its steps meet."""
    size, dtype = r.shape[-2], r.dtype
    total = _triangle(size, 0, dtype) @ w
    middle = 0.5 * total[..., -1:, :]
    upto, grown, before = ops.exp(total - middle), ops.exp(middle - total), ops.exp(total - w - middle)
    a, r, b, k = a * before, r * upto, b * grown, k * grown
    past, present = _triangle(size, -1, dtype), _triangle(size, 0, dtype)
    system = ops.eye(size, dtype=dtype) - (a @ _transposed(b)) * past
    ak, rb, rk = (a @ _transposed(k)) * past, (r @ _transposed(b)) * present, (r @ _transposed(k)) * present
    return r, k, a, b, ops.exp(middle), system, ak, rb, rk


def wkv6(r, k, v, w, u, state, mask=None, training=False):
    """`keras_seq.ops.wkv_recurrent.wkv6` in chunks.

    A chunk is halved again and again: steps of a right half meet those of the left half beside it, and the decay from
    step s to step t is split where the halves meet. The logarithms of both factors are sums of w, never differences of
    sums, so none is above 0, however low w is, and none loses digits.
    """
    size, time = _length(r.shape[1]), ops.shape(r)[1]
    xs = [_chunks(x, size) for x in masked(mask, state, r, k, v, w)]
    r, k, v, _ = xs
    bonus = ops.sum(r * ops.cast(u, r.dtype)[:, None, None] * k, axis=-1, keepdims=True) * v
    if backend.current().chunks_in_turn():

        def chunk(state, *xs):
            y, r, kept, added = _wkv6_within(*xs)
            return kept * state + added, y + r @ state

        y, state = _in_turn(chunk, state, *xs)
    else:
        y, r, kept, added = _wkv6_within(*xs)
        states, state = _states(lambda s, kept, added: kept * s + added, state, kept, added)
        y = y + r @ states
    return _steps(bonus + y, time), state


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
