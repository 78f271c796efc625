"""Scaled dot-product attention: the definition that every kernel is held to.

Axes: b batch, h heads of the queries, n heads of the keys and values (h is a multiple of n), q queries, k keys, d size
of a head. What a query sees is told by structure (order, lengths, windows, segments): a mask of q times k is only made
of what the caller gives as one.
"""

import functools

import keras
from keras import ops

from keras_seq.backend import leaner, native
from keras_seq.ops.cache import write_one

_NEVER = -1e30  # a finite score, for -inf - -inf is NaN


@native
def attention(
    query,
    key,
    value,
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
    attention_mask=None,
    bias=None,
    slopes=None,
    soft_cap=None,
    scale=None,
    dropout=None,
    return_weights=False,
):
    """Scaled dot-product attention with structured masks.

    `s = scale q k^T`; `s = cap tanh(s / cap)`; `s = s + bias - slope |position of q - position of k|`;
    `y = softmax(s over the keys that the query sees) v`. A query that sees no key gives 0.

    A query sees a key if all of these hold, as far as they are given: `causal`, the key is not after it; `window`, the
    key is less than so many positions away, or is among the first `sinks`; `key_mask` and `lengths`; the segments are
    equal; `attention_mask`.

    Args:
        query: `(b, h, q, d)`.
        key, value: `(b, n, k, d)` and `(b, n, k, d')`; h is a multiple of n, and the queries' heads `i h/n` to
            `(i + 1) h/n - 1` share head i of the keys and values. Padded ones must be finite.
        causal: whether a query sees no key of a later position.
        key_mask: `(b, k)` bool, True = valid.
        lengths: `(b,)` int32: of each row only the first so many keys are there.
        query_positions, key_positions: `(b, q)` and `(b, k)` int32. Without any, the last query stands at the last key
            (of `lengths`, if given). Queries' positions alone are those of the keys too, which are in the same order
            if there are as many; with fewer queries than keys a key's position is its index.
        query_segments, key_segments: `(b, q)` and `(b, k)` int32: packed sequences see only themselves. Queries'
            segments alone are those of the keys too.
        window: number of positions, >= 1, the query's own included; without `causal` in both directions.
        sinks: number of first positions that are seen beyond the window.
        attention_mask: bool `(b, q, k)` or `(b, h, q, k)`, 1 where it is the same for all.
        bias: float `(b, h, q, k)`, 1 where it is the same for all.
        slopes: `(h,)`: ALiBi (Press et al. 2021, arXiv:2108.12409).
        soft_cap: a limit of the scores (Gemma 2, arXiv:2408.00118).
        scale: default `d^-0.5`.
        dropout: None, or a function that drops weights `(b, h, q, k)`.
        return_weights: if True, also returns the weights before dropout.

    Returns:
        `(b, h, q, d')` in the dtype of the values, or that and the weights `(b, h, q, k)`. The softmax is float32
        (float64 for float64).

    Source: Vaswani et al. 2017, arXiv:1706.03762, eq. 1; Ainslie et al. 2023, arXiv:2305.13245 (shared heads).
    """
    groups, queries, keys = query.shape[1] // key.shape[1], ops.shape(query)[2], ops.shape(key)[2]
    scores = _grouped(query, groups) @ ops.swapaxes(key, 2, 3)  # (b, n, groups q, k)
    scores = _ungrouped(ops.cast(scores, _softmax_dtype(query)), groups)
    scores = scores * (query.shape[-1] ** -0.5 if scale is None else scale)
    if soft_cap is not None:
        scores = soft_cap * ops.tanh(scores / soft_cap)
    if bias is not None:
        scores = scores + ops.cast(bias, scores.dtype)
    at, key_at = positions(queries, keys, query_positions, key_positions, lengths)
    if slopes is not None:
        distance = ops.cast(ops.abs(at[:, None, :, None] - key_at[:, None, None, :]), scores.dtype)
        scores = scores - ops.reshape(ops.cast(slopes, scores.dtype), (1, -1, 1, 1)) * distance
    key_segments = query_segments if key_segments is None else key_segments
    seen = visible(at, key_at, causal, window, sinks, key_mask, lengths, query_segments, key_segments, attention_mask)
    weights = softmax(scores, seen)
    dropped = weights if dropout is None else dropout(weights)
    y = _ungrouped(_grouped(ops.cast(dropped, value.dtype), groups) @ value, groups)
    return (y, weights) if return_weights else y


@leaner
def attention_to_cache(query, key, value, keys, values, before, after, scale=None):
    """One step of each row, that sees itself and all steps before it; `keras_seq.ops.cache` tells of the buffers.

    Args:
        query, key, value: `(b, h, 1, d)`, `(b, n, 1, d)` and `(b, n, 1, d')`.
        keys, values: the buffers, `(b, n, s, d)` and `(b, n, s, d')`.
        before, after: `(b,)` int32, the number of steps before this one, and with it.
        scale: as in `attention`.

    Returns:
        the outputs `(b, h, 1, d')`, and the buffers with the step in them.
    """
    keys, values = write_one(keys, key, before), write_one(values, value, before)
    groups, there = query.shape[1] // keys.shape[1], ops.arange(ops.shape(keys)[2], dtype="int32") < after[:, None]
    query = query * (query.shape[-1] ** -0.5 if scale is None else scale)
    scores = ops.cast(_grouped(query, groups) @ ops.swapaxes(keys, 2, 3), _softmax_dtype(query))
    weights = ops.softmax(ops.where(there[:, None, None], scores, _NEVER), axis=-1)
    return _ungrouped(ops.cast(weights, values.dtype) @ values, groups), keys, values


def positions(queries, keys, query_positions=None, key_positions=None, lengths=None):
    """Positions `(b or 1, q)` and `(b or 1, k)` int32 of queries and keys, as `attention` reads its arguments."""
    if key_positions is None:
        known = isinstance(queries, int), isinstance(keys, int)  # a size that is not belongs to a sequence to itself
        alike = query_positions is not None and (queries == keys if all(known) else not any(known))
        key_positions = query_positions if alike else ops.arange(keys, dtype="int32")[None]
    if query_positions is None:
        last = keys if lengths is None else lengths[:, None]
        query_positions = ops.arange(queries, dtype="int32")[None] + (last - queries)
    return query_positions, key_positions


def visible(
    at,
    key_at,
    causal=False,
    window=None,
    sinks=0,
    key_mask=None,
    lengths=None,
    query_segments=None,
    key_segments=None,
    attention_mask=None,
):
    """Which query sees which key: bool `(b or 1, 1 or h, q, k)`, or None if each sees all. Arguments of `attention`."""
    seen = []
    distance = at[:, None, :, None] - key_at[:, None, None, :]
    if causal:
        seen.append(distance >= 0)
    if window is not None:
        near = (distance if causal else ops.abs(distance)) < window
        seen.append(ops.logical_or(near, (key_at < sinks)[:, None, None, :]) if sinks else near)
    if key_mask is not None:
        seen.append(key_mask[:, None, None, :])
    if lengths is not None:
        index = ops.arange(ops.shape(key_at)[1], dtype="int32")
        seen.append((index < lengths[:, None])[:, None, None, :])
    if query_segments is not None:
        seen.append(query_segments[:, None, :, None] == key_segments[:, None, None, :])
    if attention_mask is not None:
        seen.append(attention_mask if len(attention_mask.shape) == 4 else attention_mask[:, None])
    return functools.reduce(ops.logical_and, seen) if seen else None


def softmax(scores, seen=None):
    """Softmax over the last axis of what is seen; 0 where nothing is."""
    if seen is None:
        return ops.softmax(scores, axis=-1)
    scores = ops.where(seen, scores, _NEVER)
    weights = ops.where(seen, ops.exp(scores - ops.stop_gradient(ops.max(scores, axis=-1, keepdims=True))), 0.0)
    total = ops.sum(weights, axis=-1, keepdims=True)
    return weights / ops.where(total == 0, 1.0, total)


def _softmax_dtype(x):
    return "float64" if keras.backend.standardize_dtype(x.dtype) == "float64" else "float32"


def _grouped(x, groups):
    """`(b, h, q, d)` -> `(b, n, groups q, d)`: the queries that share keys, side by side."""
    _, heads, queries, size = ops.shape(x)
    return x if groups == 1 else ops.reshape(x, (-1, heads // groups, groups * queries, size))


def _ungrouped(x, groups):
    _, heads, queries, size = ops.shape(x)
    return x if groups == 1 else ops.reshape(x, (-1, heads * groups, queries // groups, size))
