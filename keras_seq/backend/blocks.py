"""Attention block by block of queries, without a tensor of queries times keys: shared by kernels of several backends.

A block of queries sees all its keys at once. The forward keeps the log-sum-exp of the scores of each query, from which
the backward makes the weights of a block anew (Dao et al. 2022, arXiv:2205.14135, sec. 3.1 and appendix B).

Axes: b batch, n heads of keys and values, g heads of queries that share one of them, q queries, k keys, d size of a
head.
"""

from typing import Any, NamedTuple

from keras import ops

_FEW = 16  # queries, as in decoding: nothing to gain, and the weights are small
_UNSEEN = -1e30  # the score of a key that is not seen
_LEAST = -1e29  # no maximum of scores is below it, so the weights of a query that sees no key are exp(-9e29) = 0


class Rules(NamedTuple):
    """What is the same for all queries: arguments of `keras_seq.ops.attention`."""

    causal: bool
    window: int | None
    sinks: int
    soft_cap: float | None
    scale: float


class Given(NamedTuple):
    """What differs from query to query and from key to key, each `(b or 1, q)` or `(b or 1, k)`, or None."""

    query_positions: Any = None
    key_positions: Any = None
    query_segments: Any = None
    key_segments: Any = None
    key_mask: Any = None


class Part(NamedTuple):
    """`repeats` blocks of `size` queries, from query `start` on, that see equally many keys.

    Block i sees `keys` keys, from the key `first + i step` on as far as the ends allow, and the first `sinks` keys.
    """

    start: int
    size: int
    repeats: int
    keys: int
    first: int
    step: int
    sinks: int


def refused(query, key, value, attention_mask=None, bias=None, dropout=None, return_weights=False, **_):
    """Why a call of `keras_seq.ops.attention` cannot be run in blocks, or None."""
    if return_weights:
        return "the weights are asked for, which are never there as a whole"
    if dropout is not None:
        return "dropout of the weights, which are never there as a whole"
    if attention_mask is not None or bias is not None:
        return "an attention mask or a bias of queries times keys, which is as large as the weights"
    queries, keys = query.shape[2], key.shape[2]
    if not isinstance(queries, int) or not isinstance(keys, int):
        return "the number of queries or keys is not known while compiling"
    if queries <= _FEW:
        return f"{queries} queries of {keys} keys are so few that the definition is as fast"
    return None


def prepared(
    query,
    key,
    block,
    most_parts,
    *,
    causal=False,
    key_mask=None,
    lengths=None,
    query_positions=None,
    key_positions=None,
    query_segments=None,
    key_segments=None,
    window=None,
    sinks=0,
    slopes=None,
    soft_cap=None,
    scale=None,
):
    """`Rules`, `Given` and the tuple of `Part`.

    Args:
        block: the most queries of a block. With fewer the products are slower; with more their results outgrow the
            cache, and more keys are looked at in vain.
        most_parts: the most pieces of program; with more blocks, each piece is a loop over some of them.
        others: those of `keras_seq.ops.attention`.
    """
    queries, keys = query.shape[2], key.shape[2]
    scale = query.shape[3] ** -0.5 if scale is None else scale
    rules = Rules(bool(causal), window, sinks if window else 0, soft_cap, scale)
    order = _order(queries, keys, lengths, query_positions, key_positions)
    parts = _parts(queries, keys, block, most_parts, rules, *order)
    if key_positions is None and query_positions is not None and queries == keys:
        key_positions = query_positions
    if query_segments is not None and key_segments is None:
        key_segments = query_segments
    index = ops.arange(keys, dtype="int32")[None]
    if not (causal or window or slopes is not None):
        query_positions = key_positions = None
    else:
        key_positions = index if key_positions is None else key_positions
        if query_positions is None:
            last = keys if lengths is None else lengths[:, None]
            query_positions = ops.arange(queries, dtype="int32")[None] + (last - queries)
    if lengths is not None:
        there = index < lengths[:, None]
        key_mask = there if key_mask is None else ops.logical_and(key_mask, there)
    given = Given(query_positions, key_positions, query_segments, key_segments, key_mask)
    return rules, given, parts


def _order(queries, keys, lengths, query_positions, key_positions):
    """What is known of positions without a look at them.

    Returns:
        whether keys that come after a query in order are after it; whether moreover positions count up one by one; how
        many keys come before the key of the first query.
    """
    if key_positions is not None or (query_positions is not None and queries != keys):
        return False, False, 0
    return True, query_positions is None and lengths is None, keys - queries


def _parts(queries, keys, size, most, rules, in_order, counted, ahead):
    blocks = -(-queries // size)
    size = -(-queries // blocks)
    windowed = rules.window is not None and counted
    together = blocks if windowed and blocks > most else -(-blocks // most)  # blocks of a part
    parts = []
    for block in range(0, blocks, together):
        count, start = min(together, blocks - block), block * size
        first, step, sinks, seen = 0, 0, 0, keys
        if rules.causal and in_order:
            seen = min(max(start + count * size + ahead, 1), keys)
        if windowed and size + 2 * rules.window < seen:
            first, step, sinks = start + ahead - rules.window + 1, size, min(rules.sinks, keys)
            seen = min(size + (rules.window - 1) * (1 if rules.causal else 2), keys)
        parts.append(Part(start, size, count, seen, first, step, sinks))
    return tuple(parts)


def padded_length(parts):
    """The number of queries that the blocks are made for."""
    return parts[-1].start + parts[-1].repeats * parts[-1].size


def forward(query, key, value, given, slopes, rules, parts):
    """Outputs `(b, n, g, q, d')`, and the log-sum-exps of scores `(b, n, g, q, 1)`.

    Args:
        query: `(b, n, g, q, d)`, q as in `padded_length`.
        key, value: `(b, n, k, d)` and `(b, n, k, d')`.
        given: `Given`.
        slopes: `(1, n, g, 1, 1)` or None.
        rules, parts: from `prepared`.
    """

    def block(outputs, at):
        q, k, v, here = at.queries(query), at.keys(key), at.keys(value), at.given(given)
        score, *_ = _scores(q * rules.scale, k, here, slopes, rules)
        highest = ops.maximum(ops.max(score, axis=-1, keepdims=True), _LEAST)
        weights = ops.exp(score - highest)
        total = ops.sum(weights, axis=-1, keepdims=True)
        total = ops.where(total == 0, 1.0, total)
        y = _product(weights, v) / total
        return tuple(at.write(x, new) for x, new in zip(outputs, (y, highest + ops.log(total)), strict=True))

    shape = ops.shape(query)[:4]
    y, total = ops.zeros((*shape, value.shape[3]), query.dtype), ops.zeros((*shape, 1), query.dtype)
    return _over(parts, block, (y, total), key.shape[2])


def backward(query, key, value, given, slopes, rules, parts, y, total, dy):
    """Gradients of query, key, value and slopes (None if these are), from that of the outputs.

    P = exp(S - total);  dV = P^T dY;  dS = P (dY V^T - sum(dY Y));  dQ = scale dS K;  dK = scale dS^T Q
    """

    def block(gradients, at):
        dq, dk, dv, *d_slopes = gradients
        q, k, v, here = at.queries(query), at.keys(key), at.keys(value), at.given(given)
        q = q * rules.scale
        of_y = at.queries(dy)
        score, distance, by_product = _scores(q, k, here, slopes, rules)
        weights = ops.exp(score - at.queries(total))
        d_score = _product(of_y, ops.swapaxes(v, 2, 3)) - ops.sum(of_y * at.queries(y), axis=-1, keepdims=True)
        d_score = weights * d_score
        if slopes is not None:  # rows first: TensorFlow adds up several axes one number after the other
            of_rows = ops.sum(d_score * distance, axis=-1, keepdims=True)
            d_slopes = (d_slopes[0] - ops.sum(of_rows, axis=(0, 3), keepdims=True),)
        if by_product is not None:
            d_score = d_score * by_product
        dq = at.write(dq, _product(d_score, k) * rules.scale)
        dk = at.add_to_keys(dk, _shared_product(d_score, q))
        return dq, dk, at.add_to_keys(dv, _shared_product(weights, of_y)), *d_slopes

    arrays = (query, key, value) if slopes is None else (query, key, value, slopes)
    gradients = _over(parts, block, tuple(map(ops.zeros_like, arrays)), key.shape[2])
    return *gradients, *([None] if slopes is None else [])


def _over(parts, block, carry, keys):
    """`carry = block(carry, at)` for all blocks."""
    for part in parts:
        if part.repeats == 1:
            carry = block(carry, _At(part, 0, keys))
        else:
            step = lambda i, carry, part=part: block(carry, _At(part, i, keys))  # noqa: E731
            carry = ops.fori_loop(0, part.repeats, step, carry)
    return carry


class _At:
    """Where a block reads and writes: block i (an integer or, in a loop, a tensor) of a part."""

    def __init__(self, part, i, keys):
        self.query, self.size = part.start + i * part.size, part.size
        self.key, self.seen, self.sinks = 0, part.keys, part.sinks
        if part.step:
            begin, end = part.first + i * part.step, keys - part.keys
            self.key = min(max(begin, 0), end) if isinstance(i, int) else ops.clip(begin, 0, end)

    def queries(self, x, axis=3):
        return _slice(x, self.query, self.size, axis)

    def write(self, x, new):
        return _write(x, new, self.query, 3)

    def keys(self, x, axis=2):
        y = _slice(x, self.key, self.seen, axis)
        return ops.concatenate([_slice(x, 0, self.sinks, axis), y], axis) if self.sinks else y

    def add_to_keys(self, x, new):
        if self.sinks:
            first, new = new[:, :, : self.sinks], new[:, :, self.sinks :]
            x = _write(x, _slice(x, 0, self.sinks, 2) + first, 0, 2)
        return _write(x, _slice(x, self.key, self.seen, 2) + new, self.key, 2)

    def given(self, given):
        of_queries = (None if x is None else self.queries(x, 1) for x in (given.query_positions, given.query_segments))
        of_keys = (None if x is None else self.keys(x, 1) for x in (given.key_positions, given.key_segments))
        mask = given.key_mask
        if self.sinks:  # they are seen once, before the others
            again = ops.arange(self.seen, dtype="int32") + self.key >= self.sinks
            once = ops.concatenate([ops.ones((self.sinks,), "bool"), again])[None]
            mask = once if mask is None else ops.logical_and(self.keys(mask, 1), once)
        elif mask is not None:
            mask = self.keys(mask, 1)
        (query_positions, query_segments), (key_positions, key_segments) = of_queries, of_keys
        return Given(query_positions, key_positions, query_segments, key_segments, mask)


def _scores(query, key, here, slopes, rules):
    """Scores `(b, n, g, q, k)`, what slopes are multiplied by, and the derivative by the product if that is not 1."""
    score, by_product, distance, seen = _product(query, ops.swapaxes(key, 2, 3)), None, None, []
    if rules.soft_cap is not None:
        tanh = ops.tanh(score / rules.soft_cap)
        score, by_product = rules.soft_cap * tanh, 1 - tanh * tanh
    if here.query_positions is not None:
        key_positions = _of_keys(here.key_positions)
        between = _of_queries(here.query_positions) - key_positions
        if slopes is not None:
            distance = ops.cast(ops.abs(between), score.dtype)
            score = score - slopes * distance
        if rules.causal:
            seen.append(between >= 0)
        if rules.window is not None:
            near = (between if rules.causal else ops.abs(between)) < rules.window
            seen.append(ops.logical_or(near, key_positions < rules.sinks) if rules.sinks else near)
    if here.key_mask is not None:
        seen.append(_of_keys(here.key_mask))
    if here.query_segments is not None:
        seen.append(_of_queries(here.query_segments) == _of_keys(here.key_segments))
    for mask in seen:
        score = ops.where(mask, score, _UNSEEN)
    return score, distance, by_product


def _of_queries(x):
    return x[:, None, None, :, None]


def _of_keys(x):
    return x[:, None, None, None, :]


def _rows(x):
    """`(b, n, g, q, d)` -> `(b, n, g q, d)`."""
    return ops.reshape(x, (-1, x.shape[1], x.shape[2] * x.shape[3], x.shape[4]))


def _product(x, y):
    """`(b, n, g, q, i) @ (b, n, i, j)`."""
    z = _rows(x) @ y
    return ops.reshape(z, (-1, *x.shape[1:4], y.shape[3]))


def _shared_product(x, y):
    """`(b, n, g, q, i)^T @ (b, n, g, q, j)`, summed over the queries of all heads that share one."""
    return ops.swapaxes(_rows(x), 2, 3) @ _rows(y)


def _slice(x, start, size, axis):
    if isinstance(start, int):
        return x if size == x.shape[axis] else x[(slice(None),) * axis + (slice(start, start + size),)]
    starts, shape = [0] * len(x.shape), list(ops.shape(x))
    starts[axis], shape[axis] = start, size
    return ops.slice(x, starts, shape)


def _write(x, new, start, axis):
    if isinstance(start, int) and new.shape[axis] == x.shape[axis]:
        return new
    starts = [0] * len(x.shape)
    starts[axis] = start
    return ops.slice_update(x, starts, new)
