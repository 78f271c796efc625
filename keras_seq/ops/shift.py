"""Token shift: each step beside the one before it."""

from keras import ops

from keras_seq.ops.cache import valid_first


def token_shift(x, last, mask=None):
    """What stood before each step.

    Args:
        x: `(b, t, d)`.
        last: `(b, d)`, the valid step before the first.
        mask: `(b, t)` bool or None. A padded step is passed over: what stood before a step is the last valid one.

    Returns:
        the steps before `(b, t, d)`, and the last valid step `(b, d)`, in the dtype of `last`.

    Source: Peng et al. 2023, arXiv:2305.13048, eq. 11-15.
    """
    steps = ops.concatenate([ops.cast(last, x.dtype)[:, None], x], axis=1)
    if mask is None:
        return steps[:, :-1], ops.cast(steps[:, -1], last.dtype)
    valid = ops.cast(mask, "int32")
    seen = ops.cumsum(valid, axis=1)
    # Valid steps in order, after the one that came in: the step before is number `seen` of them, without itself.
    order = ops.concatenate([ops.zeros_like(valid[:, :1]), valid_first(mask) + 1], axis=1)
    before = ops.take_along_axis(order, seen - valid, axis=1)
    end = ops.take_along_axis(order, seen[:, -1:], axis=1)
    found = ops.take_along_axis(steps, ops.concatenate([before, end], axis=1)[..., None], axis=1)
    # What came in is given back as it was, whatever the dtype of x.
    return found[:, :-1], ops.where(seen[:, -1:] > 0, ops.cast(found[:, -1], last.dtype), last)
