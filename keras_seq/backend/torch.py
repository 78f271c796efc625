"""PyTorch kernels: the fused kernels of `torch`, and a loop with a hand-written gradient where that is faster.

A mask stays on the fast path. `torch`'s kernels know none, so the valid steps of each row are moved to its front
(`_compact`), and the outputs back to where they belong. The padding, now at the end, must not change the state: one
more input feature, 1 on padded steps, drives the gates so far that they freeze it: sigmoid(+-1e4) is 1 or 0.
"""

import torch
from keras import tree

from keras_seq.backend import refuses
from keras_seq.backend.recurrence import not_fused

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


def compiled(function, layer):
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
    return "shapes only, no values" if x.device.type == "meta" else not_fused(x, *args, **kwargs)


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
    state = torch.lstm_cell(x, state, kernel.T, recurrent_kernel.T, bias)
    return state[0], state


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
        x, a = torch.addmm(bias[0], x, kernel), torch.addmm(bias[1], h, recurrent_kernel)
    units = 2 * h.shape[1]
    z, r = torch.sigmoid(x[:, :units] + a[:, :units]).chunk(2, 1)
    h = torch.lerp(torch.tanh(torch.addcmul(x[:, units:], r, a[:, units:])), h, z)
    return h, h


class _GRU(torch.autograd.Function):
    """GRU on a CPU, where the loop of `torch.gru` and its backward are slow.

    Only what depends on h is inside the two loops; the local derivatives are computed for all steps at once, and the
    gradients of the weights are one product each. First derivatives only.
    """

    @staticmethod
    def forward(ctx, x, h, kernel, recurrent_kernel, bias, mask):
        batch, time, features = x.shape
        units = h.shape[1]
        x = x.transpose(0, 1).reshape(-1, features)
        gates = torch.addmm(bias[0], x, kernel).view(time, batch, 3 * units)  # becomes z, r, n in place
        z, r, n = gates.split(units, -1)
        if mask is not None:
            z.masked_fill_(~mask.T[..., None], _FREEZE)  # z = 1: h' = h, and no gradient flows into z
        hs = h.new_empty(time + 1, batch, units)
        hs[0] = h
        a = h.new_empty(batch, 3 * units)
        a_zr, a_n = a.split((2 * units, units), -1)
        a_ns = h.new_empty(time, batch, units)
        steps = zip(hs, hs[1:], gates[..., : 2 * units], z, r, n, a_ns, strict=False)
        for h, next_h, zr_t, z_t, r_t, n_t, a_n_t in steps:
            torch.addmm(bias[1], h, recurrent_kernel, out=a)
            zr_t.add_(a_zr).sigmoid_()
            n_t.addcmul_(r_t, a_n).tanh_()
            torch.lerp(n_t, h, z_t, out=next_h)
            a_n_t.copy_(a_n)
        ctx.save_for_backward(x, kernel, recurrent_kernel, gates, a_ns, hs)
        return hs[1:].transpose(0, 1), hs[-1].clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy, dh):
        x, kernel, recurrent_kernel, gates, a_n, hs = ctx.saved_tensors
        time, batch, units = a_n.shape
        z, r, n = gates.split(units, -1)
        through_n = (1 - z) * (1 - n * n)
        local = torch.stack([(hs[:-1] - n) * z * (1 - z), through_n * a_n * r * (1 - r), through_n * r], 2)
        da = local.view(time, batch, 3 * units)  # becomes the gradient of h U + b' in place
        dhs = torch.empty_like(a_n)
        transposed = recurrent_kernel.T.contiguous()
        for dy_t, z_t, local_t, da_t, dh_t in zip(
            dy.transpose(0, 1).flip(0), z.flip(0), *(v.unbind()[::-1] for v in (local, da, dhs)), strict=True
        ):
            torch.add(dh, dy_t, out=dh_t)
            local_t.mul_(dh_t[:, None])
            dh = torch.addmm(dh_t * z_t, da_t, transposed)
        da = da.view(-1, 3 * units)
        d_recurrent, d_recurrent_bias = hs[:-1].reshape(-1, units).T @ da, da.sum(0)
        torch.mul(dhs, through_n, out=local[:, :, 2])  # da becomes the gradient of x W + b in place: n differs
        dx = (da @ kernel.T).view(time, batch, -1).transpose(0, 1)
        return dx, dh, x.T @ da, d_recurrent, torch.stack([da.sum(0), d_recurrent_bias]), None
