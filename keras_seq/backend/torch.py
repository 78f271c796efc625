"""PyTorch kernels."""

import torch
from keras import tree


def scan(step, state, xs):
    """A Python loop. `unbind` once: a select per step has a backward that is quadratic in t."""
    leaves = [torch.unbind(x) for x in tree.flatten(xs)]
    ys = []
    for x in zip(*leaves, strict=True):
        state, y = step(state, tree.pack_sequence_as(xs, x))
        ys.append(y)
    return state, tree.map_structure(lambda *y: torch.stack(y), *ys)
