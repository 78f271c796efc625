"""Gradients written by hand, on PyTorch."""

import functools

import torch


def first_derivative(backward):
    """A backward pass `(ctx, *gradients)` without a gradient of its own, which it refuses to be asked for."""

    @functools.wraps(backward)
    def checked(ctx, *gradients):
        if torch.is_grad_enabled():
            raise NotImplementedError(
                "Received `create_graph=True`: this kernel has first derivatives only. For second ones, compute in "
                '`with keras_seq.kernels("reference"):`.'
            )
        return backward(ctx, *gradients)

    return checked


@functools.cache  # one class for each pair, not one for each call
def with_gradient(forward, backward):
    """The function `forward(*inputs) -> (outputs, residuals)` with `backward(residuals, d outputs) -> d inputs`."""

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *inputs):
            outputs, residuals = forward(*inputs)
            ctx.save_for_backward(*residuals)
            return outputs

        @staticmethod
        @first_derivative
        def backward(ctx, *gradients):
            return tuple(backward(ctx.saved_tensors, gradients))

    return Function.apply
