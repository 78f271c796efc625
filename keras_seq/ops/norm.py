"""Normalizations over the last axis."""

from keras import ops

from keras_seq.backend import leaner


@leaner
def layer_norm(x, gamma, beta, epsilon):
    """`(x - mean) / sqrt(variance + epsilon) gamma + beta` (Ba et al. 2016, arXiv:1607.06450); x is float32 or more."""
    return ops.layer_normalization(x, gamma, beta, axis=-1, epsilon=epsilon)


@leaner
def rms_norm(x, scale, epsilon):
    """`x / sqrt(mean(x^2) + epsilon) scale` (Zhang & Sennrich 2019, arXiv:1910.07467); x is float32 or more."""
    return ops.rms_normalization(x, scale, axis=-1, epsilon=epsilon)


@leaner
def group_norm(x, gamma, beta, epsilon):
    """Each head of x `(..., h, n)` normalized over its n channels; gamma and beta are `(h, n)`.

    Source: Wu & He 2018, arXiv:1803.08494; x is float32 or more.
    """
    x = x - ops.mean(x, axis=-1, keepdims=True)
    variance = ops.mean(x * x, axis=-1, keepdims=True)
    return x * ops.rsqrt(variance + epsilon) * gamma + beta
