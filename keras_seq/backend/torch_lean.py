"""PyTorch kernels of `keras_seq.ops.lean`: the operators themselves."""

import torch


def sigmoid(x):
    return torch.sigmoid(x)


def tanh(x):
    return torch.tanh(x)


def squared_relu(x):
    return torch.relu(x).square()


def reshape(x, shape):
    return x.reshape(shape)


def side_by_side(x, y):
    return torch.cat([x, y], -1)


def inner_product(x, y):
    return (x * y).sum(-1, keepdim=True)


def normalized(x):
    return x * (x * x).sum(-1, keepdim=True).clamp(min=1e-24).rsqrt()


def wkv7_step(r, w, k, v, a, b, s):
    batch, heads, size = r.shape
    s, many = s.reshape(-1, size, size), (batch * heads, size, 1)
    columns = torch.cat([s @ a.reshape(many), v.reshape(many)], 2)
    rows = torch.stack([b, k], 2).view(-1, 2, size)
    s = torch.baddbmm(s * w.exp().reshape(-1, 1, size), columns, rows)
    return (s @ r.reshape(many)).view(batch, heads, size), s.view(batch, heads, size, size)


def group_norm(x, gamma, beta, epsilon):
    """The definition's, by a fused norm over the channels of a head."""
    return torch.layer_norm(x, x.shape[-1:], None, None, epsilon) * gamma + beta
