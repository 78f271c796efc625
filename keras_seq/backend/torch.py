"""PyTorch kernels: the fused kernels of `torch`, and a loop with a hand-written gradient where that is faster.

A mask stays on the fast path. `torch`'s kernels know none, so the valid steps of each row are moved to its front
(`_compact`), and the outputs back to where they belong. The padding, now at the end, must not change the state: one
more input feature, 1 on padded steps, drives the gates so far that they freeze it: sigmoid(+-1e4) is 1 or 0.
"""

import torch
from keras import tree

from keras_seq.backend import refuses
from keras_seq.backend.recurrence import not_fused
from keras_seq.backend.torch_attention import attention as attention
from keras_seq.backend.torch_attention import dense as dense
from keras_seq.backend.torch_attention import largest as largest
from keras_seq.backend.torch_attention import longer as longer
from keras_seq.backend.torch_attention import owned_state as owned_state
from keras_seq.backend.torch_attention import write_one as write_one
from keras_seq.backend.torch_decoding import attention_to_cache as attention_to_cache
from keras_seq.backend.torch_decoding import heads_of as heads_of
from keras_seq.backend.torch_decoding import layer_norm as layer_norm
from keras_seq.backend.torch_decoding import product as product
from keras_seq.backend.torch_decoding import rms_norm as rms_norm
from keras_seq.backend.torch_decoding import take_rows as take_rows
from keras_seq.backend.torch_gradient import first_derivative
from keras_seq.backend.torch_gradient import with_gradient as with_gradient
from keras_seq.backend.torch_lean import group_norm as group_norm
from keras_seq.backend.torch_lean import inner_product as inner_product
from keras_seq.backend.torch_lean import normalized as normalized
from keras_seq.backend.torch_lean import reshape as reshape
from keras_seq.backend.torch_lean import side_by_side as side_by_side
from keras_seq.backend.torch_lean import sigmoid as sigmoid
from keras_seq.backend.torch_lean import squared_relu as squared_relu
from keras_seq.backend.torch_lean import tanh as tanh
from keras_seq.backend.torch_lean import wkv7_step as wkv7_step

_FREEZE = 1e4


def scan(step, state, xs):
    """A Python loop. `unbind` once: a select per step has a backward that is quadratic in t."""
    if tree.flatten(xs)[0].device.type == "meta":  # shapes only: one step tells them
        length = len(tree.flatten(xs)[0])
        state, y = step(state, tree.map_structure(lambda x: x[0], xs))
        return state, tree.map_structure(lambda y: y.expand(length, *y.shape), y)
    leaves = [torch.unbind(x) for x in tree.flatten(xs)]
    ys = []
    for x in zip(*leaves, strict=True):
        state, y = step(state, tree.pack_sequence_as(xs, x))
        ys.append(y)
    return state, tree.map_structure(lambda *y: torch.stack(y), *ys)


COMPILES = False


def compiled(function, layer, xla=False):
    """`function(*arrays)` without gradients: PyTorch runs eagerly."""
    return torch.no_grad()(function)


def gradients(function, layer):
    """`f(floats, *arrays) -> (aux, d loss / d weights, d loss / d floats)` of `function -> (loss, aux)`."""

    def run(floats, *args):
        floats = tree.map_structure(lambda x: x.detach().requires_grad_(), floats)
        weights = [v.value for v in layer.trainable_variables]
        loss, aux = function(floats, *args)
        wanted = weights + tree.flatten(floats)
        grads = torch.autograd.grad(loss, wanted, allow_unused=True)
        grads = [torch.zeros_like(w) if g is None else g for w, g in zip(wanted, grads, strict=True)]
        return aux, grads[: len(weights)], tree.pack_sequence_as(floats, grads[len(weights) :])

    return run


def _not_fused(x, *args, **kwargs):
    return "shapes only, no values" if x.is_meta else not_fused(x, *args, **kwargs)


def _weights(x, kernel, recurrent_kernel, bias):
    if x.shape[-1] != kernel.shape[0]:  # torch.lstm does not look, and reads what stands behind the weights
        raise ValueError(f"x has {x.shape[-1]} features, the kernel is for {kernel.shape[0]}.")
    bias = recurrent_kernel.new_zeros(recurrent_kernel.shape[1]) if bias is None else bias
    return [kernel.T, recurrent_kernel.T, bias, torch.zeros_like(bias)]


def _compact(x, mask):
    """Moves the valid steps of each row to its front. Returns x, and the index of each step's output among them + 1."""
    order = torch.argsort(~mask, dim=1, stable=True)
    return _take(x, order), mask.cumsum(1)


def _take(x, index):
    """`x[b, index[b, t]]` for x `(b, s, d)` and index `(b, t)`, with a backward by rows."""
    rows = index + x.shape[1] * torch.arange(len(x), device=x.device)[:, None]
    return x.reshape(-1, x.shape[2]).index_select(0, rows.reshape(-1)).view(*index.shape, x.shape[2])


def _freeze(x, kernel, padded, gates):
    """Adds a feature to x, 1 on padded steps, and its row to the kernel: `gates[i]` (-1, 0, 1) drives gate i."""
    units = kernel.shape[1] // len(gates)
    row = torch.tensor(gates, dtype=x.dtype, device=x.device).repeat_interleave(units) * _FREEZE
    return torch.cat([x, padded.to(x.dtype)[..., None]], -1), torch.cat([kernel, row[None]])


@refuses(_not_fused)
def simple_rnn(x, h, kernel, recurrent_kernel, bias=None, mask=None, **_):
    weights = _weights(x, kernel, recurrent_kernel, bias)
    if mask is not None:
        x, index = _compact(x, mask)
    y, last = torch.rnn_tanh(x, h[None], weights, True, 1, 0.0, torch.is_grad_enabled(), False, True)
    if mask is None:
        return y, last[0]
    y = _take(torch.cat([h[:, None], y], 1), index)
    return y, y[:, -1]


@refuses(_not_fused)
def simple_rnn_step(x, h, kernel, recurrent_kernel, bias=None, **_):
    h = torch.tanh(torch.addmm(x @ kernel if bias is None else torch.addmm(bias, x, kernel), h, recurrent_kernel))
    return h, h


@refuses(_not_fused)
def lstm(x, state, kernel, recurrent_kernel, bias=None, mask=None, **_):
    h, c = state
    if x.shape[1] == 1:
        _, (new_h, new_c) = lstm_step(x[:, 0], state, kernel, recurrent_kernel, bias)
        h, c = (new_h, new_c) if mask is None else (torch.where(mask, new_h, h), torch.where(mask, new_c, c))
        return h[:, None], (h, c)
    if mask is not None:
        x, index = _compact(x, mask)
        padded = torch.arange(x.shape[1], device=x.device) >= index[:, -1:]
        x, kernel = _freeze(x, kernel, padded, (-1, 1, 0, 0))  # i = 0, f = 1: c' = c
    weights = _weights(x, kernel, recurrent_kernel, bias)
    y, last, c = torch.lstm(x, (h[None], c[None]), weights, True, 1, 0.0, torch.is_grad_enabled(), False, True)
    if mask is None:
        return y, (last[0], c[0])
    y = _take(torch.cat([h[:, None], y], 1), index)
    return y, (y[:, -1], c[0])


@refuses(_not_fused)
def lstm_step(x, state, kernel, recurrent_kernel, bias=None, **_):
    h, c = state
    units = h.shape[1]
    gates = (x @ kernel if bias is None else torch.addmm(bias, x, kernel)).addmm_(h, recurrent_kernel)
    i, f, _g, o = torch.sigmoid(gates).split_with_sizes((units,) * 4, 1)
    c = (f * c).addcmul_(i, torch.tanh(gates.narrow(1, 2 * units, units)))
    h = o * torch.tanh(c)
    return h, (h, c)


@refuses(_not_fused)
def gru(x, h, kernel, recurrent_kernel, bias=None, mask=None, **_):
    if bias is None:
        bias = recurrent_kernel.new_zeros(2, recurrent_kernel.shape[1])
    if x.shape[1] == 1:
        new_h, _ = gru_step(x[:, 0], h, kernel, recurrent_kernel, bias)
        h = new_h if mask is None else torch.where(mask, new_h, h)
        return h[:, None], h
    if x.device.type == "cuda":
        if mask is not None:
            x, kernel = _freeze(x, kernel, ~mask, (1, 0, 0))  # z = 1: h' = h
        order = (1, 0, 2)  # torch's gates are r, z, n
        weights = [_reorder(w, order) for w in (kernel, recurrent_kernel, *bias)]
        weights = [weights[0].T, weights[1].T, *weights[2:]]
        y, h = torch.gru(x, h[None], weights, True, 1, 0.0, torch.is_grad_enabled(), False, True)
        return y, h[0]
    return _GRU.apply(x, h, kernel, recurrent_kernel, bias, mask)


def _reorder(weight, order):
    gates = weight.chunk(len(order), -1)
    return torch.cat([gates[i] for i in order], -1)


@refuses(_not_fused)
def gru_step(x, h, kernel, recurrent_kernel, bias=None, **_):
    if bias is None:
        x, a = x @ kernel, h @ recurrent_kernel
    else:
        input_bias, recurrent_bias = bias.unbind()
        x, a = torch.addmm(input_bias, x, kernel), torch.addmm(recurrent_bias, h, recurrent_kernel)
    units = h.shape[1]
    z, r, _n = torch.sigmoid(x + a).split_with_sizes((units,) * 3, 1)  # one call for all is faster than two slices
    n = x.narrow(1, 2 * units, units).addcmul(r, a.narrow(1, 2 * units, units)).tanh_()
    h = torch.lerp(n, h, z)
    return h, h


class _GRU(torch.autograd.Function):
    """GRU on a CPU, where the loop of `torch.gru` and its backward are slow.

    Only what depends on h is inside the two loops, in as few calls as possible and in place. The rest of the gradient
    is computed for `STEPS` steps at once: many enough for efficient products, few enough to stay in the cache. First
    derivatives only.
    """

    STEPS = 32

    @staticmethod
    def forward(ctx, x, h, kernel, recurrent_kernel, bias, mask):
        batch, time, features = x.shape
        units = h.shape[1]
        x = x.transpose(0, 1).contiguous()
        to_zr, to_n = (w.contiguous() for w in recurrent_kernel.split((2 * units, units), 1))
        bias_zr, bias_n = bias[1].split((2 * units, units))
        input_bias = bias[0] + torch.nn.functional.pad(bias_zr, (0, units))
        gates = torch.addmm(input_bias, x.view(-1, features), kernel).view(time, batch, 3 * units)
        zr, (z, r, n) = gates[..., : 2 * units], gates.split(units, -1)  # they become z, r, n in place
        if mask is not None:
            z.masked_fill_(~mask.T[..., None], _FREEZE)  # z = 1: h' = h, and no gradient flows into z
        hs = h.new_empty(time + 1, batch, units)
        hs[0] = h
        a_n = h.new_empty(time, batch, units)
        for next_h, zr_t, z_t, r_t, n_t, a_n_t in zip(*(v.unbind() for v in (hs[1:], zr, z, r, n, a_n)), strict=True):
            zr_t.addmm_(h, to_zr).sigmoid_()
            torch.addmm(bias_n, h, to_n, out=a_n_t)
            n_t.addcmul_(r_t, a_n_t).tanh_()
            h = torch.lerp(n_t, h, z_t, out=next_h)
        ctx.save_for_backward(x, kernel, recurrent_kernel, gates, a_n, hs)
        return hs[1:].transpose(0, 1), h.clone()

    @staticmethod
    @first_derivative
    def backward(ctx, dy, dh):
        x, kernel, recurrent_kernel, gates, a_n, hs = ctx.saved_tensors
        dx = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        d_kernel, d_recurrent = torch.zeros_like(kernel), torch.zeros_like(recurrent_kernel)
        d_bias = kernel.new_zeros(2, kernel.shape[1])
        dhs = torch.empty_like(hs)  # of the outputs; becomes that of h in place
        dhs[0] = 0
        dhs[1:] = dy.transpose(0, 1)
        dhs[-1] += dh
        transposed = recurrent_kernel.T.contiguous()
        arrays = x, gates, a_n, hs[:-1], hs[1:], dhs[:-1], dhs[1:]
        for start in reversed(range(0, len(x), _GRU.STEPS)):
            x_s, gates_s, a_n_s, h, next_h, dh, d_next = (v[start : start + _GRU.STEPS] for v in arrays)
            z, r, n = gates_s.chunk(3, -1)
            rest = 1 - z
            through_n = torch.addcmul(rest, rest * n, n, value=-1)  # (1 - z) (1 - n^2)
            d_n = through_n * r
            d_r = torch.addcmul(a_n_s, a_n_s, r, value=-1).mul_(d_n)
            local = torch.stack([(next_h - n).mul_(rest), d_r, d_n], 2)
            da = local.flatten(2)  # becomes the gradient of h U + b' in place
            steps = zip(*(v.unbind()[::-1] for v in (local, da, z, dh, d_next, d_next[:, :, None])), strict=True)
            for local_t, da_t, z_t, dh_t, d_next_t, d_next_of_gates in steps:
                local_t.mul_(d_next_of_gates)
                dh_t.addcmul_(d_next_t, z_t).addmm_(da_t, transposed)
            da = da.flatten(0, 1)
            d_recurrent.addmm_(h.flatten(0, 1).T, da)
            d_bias[1] += da.sum(0)
            torch.mul(d_next, through_n, out=local[:, :, 2])  # da becomes the gradient of x W + b in place: n differs
            d_kernel.addmm_(x_s.flatten(0, 1).T, da)
            d_bias[0] += da.sum(0)
            if dx is not None:
                torch.mm(da, kernel.T, out=dx[start : start + _GRU.STEPS].flatten(0, 1))
        return None if dx is None else dx.transpose(0, 1), dhs[0], d_kernel, d_recurrent, d_bias, None


def slower_in_chunks(name, x, training):
    """Why the recurrence `name` of `keras_seq.ops.wkv` on `x` `(b, t, ...)` is faster step by step, or None."""
    return "few steps" if x.shape[1] < 8 else None


def inverse_lower(system):
    """Of lower triangles `(..., n, n)` with ones on the diagonal."""
    one = torch.eye(system.shape[-1], dtype=system.dtype, device=system.device)
    return torch.linalg.solve_triangular(system, one.expand_as(system), upper=False, unitriangular=True)


def chunks_at_once(x):
    """How many of the chunks x `(b, h, n, c, k)` to compute at once; None: all.

    On a CPU few: what is computed next is then still in the cache.
    """
    return max(2, 64 // max(1, x.shape[0] * x.shape[1])) if x.device.type == "cpu" else None


def recomputed(function):
    """Not needed: several chunks at once are not computed a second time."""
    return function
