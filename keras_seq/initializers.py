"""Initializers that draw the same numbers from one seed on every backend.

Keras's own draw from the generator of the backend, so that one seed gives three different models. These draw with
NumPy's Philox generator. Their names are Keras's; the layers of this library use them wherever Keras would use its own
by name. An initializer object that you pass is used as it is.
"""

import contextlib
import contextvars
import math
import random

import keras
import numpy as np
from keras import ops

_drawing = contextvars.ContextVar("drawing", default=True)


@contextlib.contextmanager
def without_drawing():
    """Inside, random initializers give zeros: for weights that will be loaded, and large ones take long to draw."""
    token = _drawing.set(False)
    try:
        yield
    finally:
        _drawing.reset(token)


class _Random(keras.initializers.Initializer):
    """Without a seed, one is drawn from Python's generator, which `keras.utils.set_random_seed` seeds."""

    def __init__(self, seed=None):
        self.given_seed = seed
        self.seed = random.randint(1, 10**9) if seed is None else int(seed)

    def __call__(self, shape, dtype=None):
        if not _drawing.get():
            return ops.zeros(shape, dtype or keras.config.floatx())
        values = self._draw(np.random.Generator(np.random.Philox(self.seed)), tuple(shape))
        return ops.convert_to_tensor(values, dtype=dtype or keras.config.floatx())

    def _draw(self, generator, shape):
        raise NotImplementedError

    def get_config(self):
        return {"seed": self.given_seed}


@keras.saving.register_keras_serializable("keras_seq")
class RandomUniform(_Random):
    """Uniform between `minval` and `maxval`.

    Args:
        minval, maxval: the bounds.
        seed: integer, or None to draw one.
    """

    def __init__(self, minval=-0.05, maxval=0.05, seed=None):
        super().__init__(seed)
        self.minval, self.maxval = minval, maxval

    def _draw(self, generator, shape):
        return generator.uniform(self.minval, self.maxval, shape)

    def get_config(self):
        return {"minval": self.minval, "maxval": self.maxval, **super().get_config()}


@keras.saving.register_keras_serializable("keras_seq")
class RandomNormal(_Random):
    """Normal with the given mean and standard deviation.

    Args:
        mean, stddev: mean and standard deviation.
        seed: integer, or None to draw one.
    """

    def __init__(self, mean=0.0, stddev=0.05, seed=None):
        super().__init__(seed)
        self.mean, self.stddev = mean, stddev

    def _draw(self, generator, shape):
        return generator.normal(self.mean, self.stddev, shape)

    def get_config(self):
        return {"mean": self.mean, "stddev": self.stddev, **super().get_config()}


@keras.saving.register_keras_serializable("keras_seq")
class GlorotUniform(_Random):
    """Uniform within `sqrt(6 / (fan_in + fan_out))`; the last two axes are in and out, the others count in both.

    Source: Glorot & Bengio 2010.
    """

    def _draw(self, generator, shape):
        receptive = math.prod(shape[:-2])
        fan_in, fan_out = (shape[-2:] if len(shape) > 1 else shape * 2) if shape else (1, 1)
        limit = math.sqrt(6 / (receptive * (fan_in + fan_out)))
        return generator.uniform(-limit, limit, shape)


@keras.saving.register_keras_serializable("keras_seq")
class Orthogonal(_Random):
    """Rows or columns, whichever are fewer, are orthonormal, times `gain`.

    Source: Saxe et al. 2013, arXiv:1312.6120.
    """

    def __init__(self, gain=1.0, seed=None):
        super().__init__(seed)
        self.gain = gain

    def _draw(self, generator, shape):
        if len(shape) < 2:
            raise ValueError(f"An orthogonal initializer needs at least two axes. Received shape: {shape}")
        rows, columns = math.prod(shape[:-1]), shape[-1]
        q, r = np.linalg.qr(generator.normal(size=(max(rows, columns), min(rows, columns))))
        q = q * np.sign(np.diag(r))
        return self.gain * (q if rows >= columns else q.T).reshape(shape)

    def get_config(self):
        return {"gain": self.gain, **super().get_config()}


_BY_NAME = {
    "uniform": RandomUniform,
    "random_uniform": RandomUniform,
    "RandomUniform": RandomUniform,
    "normal": RandomNormal,
    "random_normal": RandomNormal,
    "RandomNormal": RandomNormal,
    "glorot_uniform": GlorotUniform,
    "GlorotUniform": GlorotUniform,
    "orthogonal": Orthogonal,
    "Orthogonal": Orthogonal,
}


def get(identifier):
    """This library's initializer of that name where there is one, else whatever `keras.initializers.get` gives.

    Args:
        identifier: a name such as `"glorot_uniform"`, an initializer, a config, or None.
    """
    if isinstance(identifier, str) and identifier in _BY_NAME:
        return _BY_NAME[identifier]()
    return keras.initializers.get(identifier)


def of_matrix(identifier, input_axes):
    """As `get`, for a kernel of more axes that is a matrix. Each call gives a new initializer, with a seed of its own.

    Args:
        identifier: as in `get`.
        input_axes: the first so many axes of the kernel are the rows of the matrix, the others its columns.
    """
    initializer = get(identifier)
    if initializer is identifier and isinstance(initializer, keras.initializers.Initializer):
        initializer = type(initializer).from_config(initializer.get_config())
    if not isinstance(initializer, _Random):
        return initializer

    def draw(shape, dtype=None):
        matrix = math.prod(shape[:input_axes]), math.prod(shape[input_axes:])
        return ops.reshape(initializer(matrix, dtype), shape)

    return draw
