"""PyTorch kernels of single steps, as in decoding: where it is the calls that cost, and the weights that are read."""

import torch
from torch.nn import functional

from keras_seq.backend.torch_attention import _fused, attention, extent, write_one

_MANY = 32  # steps from which on it pays to lay out a matrix anew: that costs as much as about 10 products with it,
_SEVERAL = 16  # and with several rows saves half of each
_LARGEST = 2**28  # bytes; larger matrices are not laid out anew, so that a large model needs no memory for a second one

# Operators of PyTorch's compiler, not of its public interface: without them the plain product runs.
_PACKS = torch.backends.mkldnn.is_available() and all(
    hasattr(torch.ops.mkldnn, name) for name in ("_reorder_linear_weight", "_linear_pointwise")
)


def product(kernel, bias=None, rows=None, steps=1):
    features, packed = len(kernel), None
    pays = rows is not None and steps >= (_MANY if rows < 4 else _SEVERAL)
    lay_out = pays and kernel.device.type == "cpu" and kernel.nbytes <= _LARGEST
    if lay_out and rows == 1:  # a product with one row is faster along the longer axis of the matrix
        kernel = kernel.contiguous() if kernel.shape[1] >= features else kernel.t().contiguous().t()
    elif lay_out and _PACKS and kernel.dtype == torch.float32:
        packed = torch.ops.mkldnn._reorder_linear_weight(kernel.detach().t().contiguous(), rows)

    def apply(x):
        x = x if x.ndim == 2 else x.reshape(-1, features)
        if packed is not None:
            return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
        return torch.mm(x, kernel) if bias is None else torch.addmm(bias, x, kernel)

    return apply


def take_rows(x, rows):
    return x.index_select(0, rows)


def heads_of(y, counts, size):
    return y.view(-1, sum(counts), 1, size).split(counts, 1)


def attention_to_cache(query, key, value, keys, values, before, after, scale=None):
    keys, values = write_one(keys, key, before), write_one(values, value, before)
    if not query.is_meta:
        shortest, longest = extent(after)
        if shortest == longest:
            seen = keys.narrow(2, 0, longest), values.narrow(2, 0, longest)
            return _fused(query, *seen, scale=scale), keys, values
    return attention(query, keys, values, lengths=after, scale=scale), keys, values


def layer_norm(x, gamma, beta, epsilon):
    return torch.layer_norm(x, gamma.shape, gamma, beta, epsilon)


def rms_norm(x, scale, epsilon):
    return functional.rms_norm(x, scale.shape, scale, epsilon)
