"""The recurrences of RWKV, "WKV" for weighted keys and values: step by step or in chunks, whichever is faster."""

import inspect

from keras import ops

from keras_seq import backend
from keras_seq.backend import native
from keras_seq.ops import wkv_chunked, wkv_recurrent
from keras_seq.ops.wkv_recurrent import LEAST as LEAST


def _in_chunks(recurrence):
    """`recurrence`, and its form in chunks where that is faster: `kernels("native")` forces it."""
    chunked = getattr(wkv_chunked, recurrence.__name__)

    def slower(*args, **kwargs):
        given = inspect.signature(recurrence).bind(*args, **kwargs).arguments
        return backend.current().slower_in_chunks(recurrence.__name__, given["k"], given.get("training", False))

    return native(recurrence, chunked, slower)


wkv4 = _in_chunks(wkv_recurrent.wkv4)
wkv6 = _in_chunks(wkv_recurrent.wkv6)
wkv7 = _in_chunks(wkv_recurrent.wkv7)


def wkv5(r, k, v, w, u, state, mask=None, training=False):
    """The attention of RWKV-5: that of RWKV-6 with a decay that is the same at all steps.

    Args:
        w: `(h, k)` or `(h, 1)`, logarithm of the decay, < 0.
        r, k, v, u, state, mask, training: as in `wkv6`.

    Returns:
        y `(b, t, h, v)` and the next state.

    Source: Peng et al. 2024, arXiv:2404.05892, eq. 17-19.
    """
    return wkv6(r, k, v, ops.broadcast_to(w, ops.shape(k)), u, state, mask, training)
