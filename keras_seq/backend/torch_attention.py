"""PyTorch kernels of attention, of its cache, and of dense projections.

Attention is `scaled_dot_product_attention`, in whichever way needs the smallest mask: none; causal by its own flag; a
mask of the keys alone; or block by block of queries, each with a mask of the keys that it may see. Padding under a
causal mask needs none either: the valid steps of a row see, moved together, just what they should.
"""

import contextlib
import contextvars
import functools
import math
from typing import Any, NamedTuple

import torch
from torch.nn.functional import pad, scaled_dot_product_attention

from keras_seq.backend import refuses
from keras_seq.backend.torch_gradient import first_derivative

_BLOCK = {"cpu": 128}  # queries: enough for efficient products, few enough that a mask of them is small
_LONG_BLOCK = 512  # elsewhere, where each call costs more than its work (not measured)
_ROW_BY_ROW = 128  # from so many steps a CPU is faster on each row without its padding than on all rows with it


def _not_fused(query, key, value, dropout=None, return_weights=False, **_):
    if query.is_meta:
        return "shapes only, no values"
    if return_weights:
        return "the weights are asked for, which the fused kernel does not keep"
    if dropout is not None:
        return "dropout of the weights, which the fused kernel does not keep"
    if not query.dtype == key.dtype == value.dtype:
        return "queries, keys and values of different dtypes"
    return None


@refuses(_not_fused)
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
    **_,
):
    """As `keras_seq.ops.attention`, but in causal self-attention with a `key_mask` a padded query may give 0."""
    queries, keys = query.shape[2], key.shape[2]
    first = keys - queries, keys - queries  # the least and the greatest position of a first query
    if lengths is not None:
        shortest, longest = extent(lengths)
        first = shortest - queries, longest - queries
        if longest < keys:
            keys = max(longest, 1)
            key, value = key.narrow(2, 0, keys), value.narrow(2, 0, keys)
            rest = key_mask, key_positions, key_segments, attention_mask, bias
            key_mask, key_positions, key_segments, attention_mask, bias = (_shortened(x, keys) for x in rest)
        if shortest == longest == keys:
            lengths = None
    placed = query_positions is not None or key_positions is not None
    in_order = lengths is None and key_positions is None and (query_positions is None or queries == keys)
    if not placed:
        causal = causal and queries > 1  # a single query stands at the last key
        window = None if window is not None and window >= max(queries, keys) else window
    if window is None and slopes is None and (not causal or in_order):
        placed = False  # what the positions are makes no difference
    seen_keys = _seen_keys(keys, key_mask, lengths)
    apart = placed or window is not None or slopes is not None or soft_cap is not None
    if not apart and query_segments is None and attention_mask is None and bias is None:
        if not causal:
            return _among_keys(query, key, value, seen_keys, scale)
        if in_order and queries == keys:
            if seen_keys is None:
                return _fused(query, key, value, causal=True, scale=scale)
            return _causal_among_valid(query, key, value, seen_keys, scale)
    seen = _Seen(
        causal,
        window,
        sinks,
        seen_keys,
        query_segments,
        query_segments if key_segments is None else key_segments,
        attention_mask if attention_mask is None or attention_mask.ndim == 4 else attention_mask[:, None],
        *(None, None),
        None if placed else first,
        in_order,
    )
    if causal or window is not None or slopes is not None:
        if not placed:
            query_positions = key_positions = None
        at = _positions(queries, keys, query_positions, key_positions, lengths, query.device)
        seen = seen._replace(query_positions=at[0], key_positions=at[1])
    if slopes is not None:
        slopes = torch.as_tensor(slopes, dtype=_score_dtype(query), device=query.device).view(-1, 1, 1)
    arrays = query, key, value, bias, slopes
    if queries <= _block_size(query.device):
        for block in seen.blocks(queries, keys, query.device):
            return _block(block, _cut(block, arrays), soft_cap, scale)
    return _Blocks.apply(seen, soft_cap, scale, *arrays)


def _positions(queries, keys, of_queries, of_keys, lengths, device):
    """Those of `keras_seq.ops.attention`."""
    if of_keys is None and of_queries is not None and queries == keys:
        return of_queries, of_queries
    if of_keys is None:
        of_keys = torch.arange(keys, dtype=torch.int32, device=device)[None]
    if of_queries is None:
        of_queries = torch.arange(queries, dtype=torch.int32, device=device)[None] - queries
        of_queries = of_queries + (keys if lengths is None else lengths[:, None])
    return of_queries, of_keys


def _shortened(x, keys):
    return x if x is None or x.shape[-1] == 1 else x.narrow(-1, 0, keys)


def _seen_keys(keys, mask, lengths):
    """`(b, k)` bool, or None."""
    if lengths is None:
        return mask
    there = torch.arange(keys, dtype=lengths.dtype, device=lengths.device) < lengths[:, None]
    return there if mask is None else there & mask


def _score_dtype(x):
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _fused(query, key, value, mask=None, causal=False, scale=None):
    """Fused attention. The mask is bool or float, `(b, h, q, k)`, 1 where it is the same for all; empty rows give 0."""
    heads, shared, size = query.shape[1], key.shape[1], value.shape[3]
    if size != query.shape[3]:  # the fused kernels want one size for all
        scale = query.shape[3] ** -0.5 if scale is None else scale
        query, key, value = (pad(x, (0, max(query.shape[3], size) - x.shape[3])) for x in (query, key, value))
    if heads != shared and not causal and (mask is None or mask.shape[1] == mask.shape[2] == 1):
        grouped = query.reshape(query.shape[0], shared, -1, query.shape[3])  # no need to repeat keys and values
        return _fused(grouped, key, value, mask, False, scale)[..., :size].reshape(*query.shape[:3], size)
    empty = None
    if mask is not None and mask.device.type != "cpu":  # not all kernels of GPUs give 0 and finite gradients there
        empty = ~(mask if mask.dtype == torch.bool else mask > -math.inf).any(-1, keepdim=True)
        mask = mask | empty if mask.dtype == torch.bool else mask.masked_fill(empty, 0.0)
    y = scaled_dot_product_attention(query, key, value, mask, 0.0, causal, scale=scale, enable_gqa=heads != shared)
    y = y if y.shape[3] == size else y[..., :size]
    return y if empty is None else y.masked_fill(empty, 0.0)


def _among_keys(query, key, value, seen, scale):
    """Attention where all queries of a row see the same keys, `seen` `(b, k)` or None."""
    if seen is None:
        return _fused(query, key, value, scale=scale)
    if query.shape[2] >= _ROW_BY_ROW and query.device.type == "cpu":
        return _row_by_row(query, key, value, seen, False, scale)
    return _fused(query, key, value, seen[:, None, None], scale=scale)


def _causal_among_valid(query, key, value, mask, scale):
    """Causal self-attention of the valid steps alone; the others give 0."""
    if query.device.type == "cpu":
        if query.shape[2] >= _ROW_BY_ROW:
            return _row_by_row(query, key, value, mask, True, scale)
        if not (mask[:, 1:] > mask[:, :-1]).any():  # nothing valid comes after padding
            y = _fused(query, key, value, causal=True, scale=scale)
            return y.masked_fill(~mask[:, None, :, None], 0.0)
    order = torch.argsort(~mask, dim=1, stable=True)  # valid steps first
    back = torch.argsort(order, dim=1)
    query, key, value = (_Permuted.apply(x, order, back) for x in (query, key, value))
    y = _fused(query, key, value, causal=True, scale=scale)
    return _Permuted.apply(y, back, order).masked_fill(~mask[:, None, :, None], 0.0)


class _Permuted(torch.autograd.Function):
    """`x[b, :, index[b, t]]` for x `(b, h, t, d)` and a permutation `(b, t)`, whose inverse serves the gradient."""

    @staticmethod
    def forward(ctx, x, index, inverse):
        ctx.save_for_backward(index, inverse)
        batch, _, time, _ = x.shape
        rows = index + time * torch.arange(batch, device=x.device)[:, None]
        x = x.transpose(1, 2)
        return x.reshape(batch * time, *x.shape[2:]).index_select(0, rows.view(-1)).view(x.shape).transpose(1, 2)

    @staticmethod
    def backward(ctx, dy):
        index, inverse = ctx.saved_tensors
        return _Permuted.apply(dy, inverse, index), None, None


def _row_by_row(query, key, value, mask, causal, scale):
    """Each row with its valid keys alone, and if causal with its valid queries alone; the others give 0."""
    time, counts = mask.shape[1], mask.sum(1).tolist()
    if min(counts) == time:
        return _fused(query, key, value, causal=causal, scale=scale)
    starts = mask.to(torch.uint8).argmax(1).tolist()
    ys = []
    rows = zip(query.split(1), key.split(1), value.split(1), mask, starts, counts, strict=True)
    for q, k, v, valid, start, count in rows:
        if count == 0:
            ys.append((0.0 * q[..., :1]).expand(-1, -1, -1, value.shape[3]).transpose(1, 2))
            continue
        if bool(valid[start : start + count].all()):
            index = None
            k, v = k.narrow(2, start, count), v.narrow(2, start, count)
            q = q.narrow(2, start, count) if causal else q
        else:
            index = valid.nonzero()[:, 0]
            k, v = k.index_select(2, index), v.index_select(2, index)
            q = q.index_select(2, index) if causal else q
        y = _fused(q, k, v, causal=causal, scale=scale).transpose(1, 2)
        if causal and index is not None:
            y = y.new_zeros(1, time, *y.shape[2:]).index_copy(1, index, y)
        elif causal:
            y = pad(y, (0, 0, 0, 0, start, time - start - count))
        ys.append(y)
    return torch.cat(ys).transpose(1, 2)


def _block_size(device):
    return _BLOCK.get(device.type, _LONG_BLOCK)


class _Block(NamedTuple):
    """A range of queries, the ranges of keys that it may see, and which sees which: `(b or 1, 1 or h, q, k)`."""

    queries: tuple[int, int]
    keys: list[tuple[int, int]]
    seen: Any
    distance: Any  # `(b or 1, 1, q, k)` int32


class _Seen(NamedTuple):
    """What the queries see: the arguments of `attention`, all positions made explicit."""

    causal: bool
    window: int | None
    sinks: int
    keys: Any
    query_segments: Any
    key_segments: Any
    mask: Any
    query_positions: Any  # None if they make no difference
    key_positions: Any
    first: tuple[int, int] | None  # the least and the greatest position of a first query, if a key's is its index
    in_order: bool  # of queries and keys the i-th are one step, and all keys after it are later

    def blocks(self, queries, keys, device):
        size = _block_size(device)
        for start in range(0, queries, size):
            block = self.block(start, min(start + size, queries), keys)
            if device.type == "cpu" and (self.first is None or self.query_segments is not None) and not self.sinks:
                block = _trimmed(block)
            if block.keys:
                yield block

    def block(self, start, stop, keys):
        ranges = self.ranges(start, stop, keys)
        if not ranges:
            return _Block((start, stop), ranges, None, None)

        def of_queries(x):
            return _part(x, 1, [(start, stop)])[:, None, :, None]

        def of_keys(x):
            return _part(x, 1, ranges)[:, None, None, :]

        seen: list[Any] = []
        distance: Any = None
        if self.query_positions is not None:
            distance = of_queries(self.query_positions) - of_keys(self.key_positions)
        if self.causal:
            seen.append(distance >= 0)
        if self.window is not None:
            near = (distance if self.causal else distance.abs()) < self.window
            seen.append(near | (of_keys(self.key_positions) < self.sinks) if self.sinks else near)
        if self.keys is not None:
            seen.append(of_keys(self.keys))
        if self.query_segments is not None:
            seen.append(of_queries(self.query_segments) == of_keys(self.key_segments))
        if self.mask is not None:
            seen.append(_part(_part(self.mask, 2, [(start, stop)]), 3, ranges))
        return _Block((start, stop), ranges, functools.reduce(torch.logical_and, seen) if seen else None, distance)

    def ranges(self, start, stop, keys):
        """The keys that may be seen as far as it is known without a look at an array."""
        low, high = 0, keys
        if self.first is not None:
            if self.causal:
                high = min(high, self.first[1] + stop)
            if self.window is not None:
                low = max(low, self.first[0] + start - self.window + 1)
                if not self.causal:
                    high = min(high, self.first[1] + stop - 1 + self.window)
        elif self.causal and self.in_order:
            high = stop
        sinks = min(self.sinks, high if self.causal else keys)
        if sinks < low:
            return [(a, b) for a, b in ((0, sinks), (low, high)) if a < b]
        return [(0, max(sinks, high))] if high > 0 else []


def _trimmed(block):
    """The block without the keys before the first and after the last that any of its queries sees."""
    if block.seen is None or block.seen.shape[3] == 1:
        return block
    ((start, _),) = block.keys
    index = block.seen.flatten(0, 2).any(0).nonzero()
    if not len(index):
        return block._replace(keys=[])
    low, high = int(index[0]), int(index[-1]) + 1
    seen, distance = (x if x is None else x[..., low:high] for x in (block.seen, block.distance))
    return block._replace(keys=[(start + low, start + high)], seen=seen, distance=distance)


_AXES = (
    (2, None),
    (None, 2),
    (None, 2),
    (2, 3),
    (None, None),
)  # of queries and keys in query, key, value, bias, slopes


def _cut(block, arrays):
    """The arrays query, key, value, bias, slopes of a block."""
    return [
        None if x is None else _part(_part(x, of_queries, [block.queries]), of_keys, block.keys)
        for x, (of_queries, of_keys) in zip(arrays, _AXES, strict=True)
    ]


def _part(x, axis, ranges):
    """The ranges of x along an axis; all of it if there is no such axis, or a size of 1, which stands for any."""
    if axis is None or x.shape[axis] == 1:
        return x
    parts = [x.narrow(axis, start, stop - start) for start, stop in ranges]
    return parts[0] if len(parts) == 1 else torch.cat(parts, axis)


def _add_to_part(x, part, axis, ranges):
    """The inverse: adds to x, in place, what `_part` has cut out."""
    if axis is None or x.shape[axis] == 1:
        x.add_(part)
        return
    pieces = part.split([stop - start for start, stop in ranges], axis)
    for (start, stop), piece in zip(ranges, pieces, strict=True):
        x.narrow(axis, start, stop - start).add_(piece)


def _block(block, arrays, soft_cap, scale):
    query, key, value, bias, slopes = arrays
    added = None if bias is None else bias.to(_score_dtype(query))
    if slopes is not None:
        distance = slopes * block.distance.abs()
        added = -distance if added is None else added - distance
    on_cpu = query.device.type == "cpu"
    if soft_cap is not None or (added is not None and added.dtype != query.dtype and not on_cpu):
        return _unfused(query, key, value, block.seen, added, soft_cap, scale)
    if added is None:
        return _fused(query, key, value, block.seen, scale=scale)
    return _fused(query, key, value, added if block.seen is None else added.where(block.seen, -math.inf), scale=scale)


def _unfused(query, key, value, seen, added, soft_cap, scale):
    shared = query.shape[0], key.shape[1], -1
    scores = query.reshape(*shared, query.shape[3]) @ key.transpose(2, 3)
    scores = scores.view(*query.shape[:3], key.shape[2]).to(_score_dtype(query))
    scores = scores * (query.shape[3] ** -0.5 if scale is None else scale)
    if soft_cap is not None:
        scores = soft_cap * torch.tanh(scores / soft_cap)
    scores = scores if added is None else scores + added
    if seen is None:
        weights = torch.softmax(scores, -1)
    else:  # a finite number, and 0 after the softmax: a query that sees nothing gives 0
        weights = torch.softmax(scores.masked_fill(~seen, -1e30), -1).masked_fill(~seen, 0.0)
    y = weights.to(value.dtype).view(*shared, key.shape[2]) @ value
    return y.view(*query.shape[:3], value.shape[3])


class _Blocks(torch.autograd.Function):
    """Attention block by block of queries; the backward computes each block anew. First derivatives only."""

    @staticmethod
    def forward(ctx, seen, soft_cap, scale, *arrays):
        query, key, value, *_ = arrays
        ctx.save_for_backward(*arrays)
        ctx.given = seen, soft_cap, scale
        y = query.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[3]).transpose(1, 2)
        for block in seen.blocks(query.shape[2], key.shape[2], query.device):
            start, stop = block.queries
            y[:, :, start:stop] = _block(block, _cut(block, arrays), soft_cap, scale)
        return y

    @staticmethod
    @first_derivative
    def backward(ctx, dy):
        arrays = query, key, *_ = ctx.saved_tensors
        seen, soft_cap, scale = ctx.given
        needed = [i for i, needs in enumerate(ctx.needs_input_grad[3:]) if needs]
        sums = {i: torch.zeros_like(arrays[i], dtype=_score_dtype(arrays[i])) for i in needed}
        for block in seen.blocks(query.shape[2], key.shape[2], query.device):
            start, stop = block.queries
            parts: list[Any] = [None if x is None else x.detach() for x in _cut(block, arrays)]
            wanted = [parts[i].requires_grad_() for i in needed]
            with torch.enable_grad():
                y = _block(block, parts, soft_cap, scale)
            for i, grad in zip(needed, torch.autograd.grad(y, wanted, dy[:, :, start:stop]), strict=True):
                of_queries, of_keys = _AXES[i]
                _add_to_part(_part(sums[i], of_queries, [block.queries]), grad, of_keys, block.keys)
        return None, None, None, *(sums[i].to(x.dtype) if i in needed else None for i, x in enumerate(arrays))


# The cache


def extent(x):
    """The smallest and the largest of the integers x, kept on the tensor: a GPU is not waited for twice."""
    version = None if x.is_inference() else x._version
    known = getattr(x, "_extent", None)
    if known is None or known[0] != version:
        low, high = torch.aminmax(x)
        known = x._extent = version, int(low), int(high)
    return known[1], known[2]


def _with_extent(x, low, high):
    x._extent = None if x.is_inference() else x._version, low, high
    return x


def largest(x):
    """The largest of the integers x, or None where there are no values."""
    return None if x.is_meta else extent(x)[1]


def longer(length, time, mask=None):
    if mask is not None:
        return length + mask.sum(1, dtype=torch.int32)
    if length.is_meta:
        return length + time
    low, high = extent(length)
    return _with_extent(length + time, low + time, high + time)


_owned = contextvars.ContextVar("owned", default=False)


@contextlib.contextmanager
def owned_state():
    """Inside, without gradients, `write_one` writes into the buffer that it is given: nobody else wants it."""
    outer = _owned.set(True)
    try:
        yield
    finally:
        _owned.reset(outer)


def write_one(buffer, new, slot):
    if buffer.is_meta:
        return torch.empty_like(buffer)
    low, high = extent(slot)
    in_place = _owned.get() and not torch.is_grad_enabled()
    if low < 0 or high >= buffer.shape[2]:
        index = torch.arange(buffer.shape[2], dtype=slot.dtype, device=slot.device)
        return torch.where((index == slot[:, None])[:, None, :, None], new, buffer)
    if low == high and not in_place:
        return torch.slice_scatter(buffer, new, 2, low, low + 1)
    if low == high:
        buffer.narrow(2, low, 1).copy_(new)
        return buffer
    buffer = buffer if in_place else buffer.clone()
    buffer[torch.arange(len(buffer), device=buffer.device), :, slot] = new[:, :, 0]
    return buffer


# Projections


def dense(x, kernel, bias=None, axes=1):
    kernel = kernel if isinstance(kernel, torch.Tensor) else kernel.value
    of_x, of_kernel = x.shape, kernel.shape
    if len(of_x) > 2:
        x = x.reshape(-1, math.prod(of_x[len(of_x) - axes :]))
    if len(of_kernel) > 2:
        kernel = kernel.reshape(math.prod(of_kernel[:axes]), -1)
    if bias is None:
        y = torch.mm(x, kernel)
    else:
        bias = bias if isinstance(bias, torch.Tensor) else bias.value
        y = torch.addmm(bias if bias.ndim == 1 else bias.reshape(-1), x, kernel)
    shape = of_x[: len(of_x) - axes] + of_kernel[axes:]
    return y if len(shape) == 2 else y.view(shape)
