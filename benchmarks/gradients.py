"""A function with its gradients as one thing to time, on each backend: shared by the scripts of this folder."""

from functools import partial
from typing import NamedTuple

import keras
import numpy as np

BACKEND = keras.config.backend()


class Contender(NamedTuple):
    """`run()` does the work that is timed; `outputs()` are compared; `memory()` in MiB, where XLA tells it."""

    run: object
    outputs: object
    memory: object = None


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def differentiated(function, arrays, mask, projection, layer=None, **options):
    """`function(*arrays, mask)`, and the gradients of `sum(projection outputs)` by the arrays and the weights."""
    arrays, (mask, projection) = tensors(arrays), tensors((mask, projection))
    make = {"torch": in_torch, "jax": in_jax, "tensorflow": in_tensorflow}[BACKEND]
    return make(function, arrays, mask, projection, layer, **options)


def tensors(arrays):
    return [None if a is None else keras.ops.convert_to_tensor(a) for a in arrays]


def in_torch(function, arrays, mask, projection, layer):
    import torch

    wanted = [a.requires_grad_() for a in arrays]
    wanted += [] if layer is None else [v.value for v in layer.trainable_variables]

    def run():
        return torch.autograd.grad((function(*arrays, mask) * projection).sum(), wanted)

    return Contender(run, lambda: function(*arrays, mask).detach())


def in_jax(function, arrays, mask, projection, layer):
    import jax

    variables = [] if layer is None else layer.trainable_variables

    def loss(weights, arrays, mask, projection):
        with keras.StatelessScope(state_mapping=list(zip(variables, weights, strict=True))):
            y = function(*arrays, mask)
        return (y * projection).sum(), y

    given = [v.value for v in variables], arrays, mask, projection
    step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)).lower(*given).compile()
    temporary = step.memory_analysis().temp_size_in_bytes / 2**20
    return Contender(lambda: jax.block_until_ready(step(*given)), lambda: step(*given)[0][1], lambda: temporary)


def in_tensorflow(function, arrays, mask, projection, layer, xla):
    import tensorflow as tf

    weights = [] if layer is None else [v.value for v in layer.trainable_variables]

    @tf.function(jit_compile=xla, autograph=False)
    def step(arrays, mask, projection):
        with tf.GradientTape() as tape:
            tape.watch(arrays)
            y = function(*arrays, mask)
            loss = tf.reduce_sum(y * projection)
        return loss, tape.gradient(loss, (arrays, weights)), y

    run = partial(step, arrays, mask, projection)
    return Contender(lambda: run()[0].numpy(), lambda: run()[2])
