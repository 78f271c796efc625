"""The keys and values that attention has seen, in buffers of fixed capacity, as pure functions of arrays.

Axes: b batch, n heads, s slots (the capacity), t new steps, d size of a head. A row holds the valid steps alone, in
order, however much padding was around them: a padded step leaves it as it is, and rows of different lengths share one
buffer. The step at position p is in slot p.

Under a sliding window the buffer is a ring: the first `sinks` positions keep their slots, the others share the rest in
turn.
"""

from keras import ops

from keras_seq import backend
from keras_seq.backend import leaner

EMPTY = 2**30  # the position of a slot that holds nothing: after that of any query


@leaner
def longer(length, time, mask=None):
    """The number of valid steps of each row `(b,)` int32 after `time` more."""
    return length + (time if mask is None else ops.sum(ops.cast(mask, "int32"), axis=1))


def longest(length):
    """The length of the longest row as an int, or None in compiled code, where it is not known."""
    return backend.current().largest(length)


def held_positions(length, capacity, sinks=None):
    """The position that each slot holds after `length` steps: `(b, s)` int32, `EMPTY` where there is none.

    Args:
        length: `(b,)` int32, number of valid steps so far.
        capacity: number of slots.
        sinks: None for a plain buffer; for a ring, the number of first positions that are kept.
    """
    slot, length = ops.arange(capacity, dtype="int32")[None], length[:, None]
    held = slot
    if sinks is not None:
        newest = length - 1 - ops.mod(length - 1 - slot, capacity - sinks)  # the last position that falls into the slot
        held = ops.where(slot < sinks, slot, newest)
    return ops.where(ops.logical_and(held >= slot, held < length), held, EMPTY)


def write(buffer, new, before, after, mask=None, sinks=None):
    """The buffer `(b, n, s, d)` with a chunk of steps in it.

    Args:
        new: `(b, n, t, d)`.
        before, after: `(b,)` int32, the number of valid steps before and after the chunk.
        mask: `(b, t)` bool or None.
        sinks: as in `held_positions`.
    """
    capacity = buffer.shape[2]
    if new.shape[2] == 1 and mask is None:
        if sinks is not None:
            before = ops.where(before < sinks, before, sinks + ops.mod(before - sinks, capacity - sinks))
        return write_one(buffer, new, before)
    held = held_positions(after, capacity, sinks)
    step = (
        held - before[:, None]
    )  # the valid step of the chunk that the slot is to hold; below 0: it holds an older one
    index = ops.clip(step, 0, ops.shape(new)[2] - 1)
    index = index if mask is None else ops.take_along_axis(valid_first(mask), index, axis=1)
    fresh = ops.logical_and(step >= 0, held < EMPTY)[:, None, :, None]
    return ops.where(fresh, ops.take_along_axis(new, index[:, None, :, None], axis=2), buffer)


@leaner
def write_one(buffer, new, slot):
    """The buffer `(b, n, s, d)` with the step `new` `(b, n, 1, d)` in `slot` `(b,)`; as it was, if there is no such."""
    return ops.where((ops.arange(buffer.shape[2], dtype="int32") == slot[:, None])[:, None, :, None], new, buffer)


@leaner
def take_rows(x, rows):
    """`x[rows[i]]` as row i."""
    return ops.take(x, rows, axis=0)


def valid_first(mask):
    """The indices of the valid steps in order, then of the padded ones: `(b, t)` int32 from a mask `(b, t)`."""
    time = ops.shape(mask)[1]
    index = ops.arange(time, dtype="int32")
    return ops.cast(ops.argsort(ops.where(mask, index, index + time), axis=1), "int32")
