"""JAX kernel of attention: cuDNN's on a GPU where it applies, else block by block of queries (`blocks.py`).

On a CPU one head at a time: what belongs to a block then fits into the cache. First derivatives in reverse mode only
(`jax.custom_vjp`). The jitted function is compiled once per shape, also when called eagerly.
"""

from functools import partial

import jax
import jax.numpy as jnp

from keras_seq.backend import blocks, refuses

_BLOCK, _PARTS = 128, 8  # of `blocks.prepared`; at 2048 steps faster than whole pieces, and compiled in half the time


@refuses(blocks.refused)
def attention(query, key, value, *, attention_mask=None, bias=None, dropout=None, return_weights=False, **structure):
    structure = {name: x for name, x in structure.items() if x is not None}
    if _for_cudnn(query, key, value, **structure):
        return _cudnn(query, key, value, **structure)
    rules, given, parts = blocks.prepared(query, key, _BLOCK, _PARTS, **structure)
    slopes = structure.get("slopes")
    return _attention(rules, parts, query, key, value, given, None if slopes is None else jnp.asarray(slopes))


def _for_cudnn(query, key, value, causal=False, lengths=None, window=None, scale=None, **others):
    """Whether cuDNN's kernel takes the call: no structure but a causal order of as many queries as keys, a window in
    it, or else lengths of the keys; half precision; an NVIDIA GPU of compute capability 8 or more.
    """
    if jax.default_backend() != "gpu" or others.keys() - {"sinks"} or others.get("sinks"):
        return False
    if not query.dtype == key.dtype == value.dtype or query.dtype not in (jnp.float16, jnp.bfloat16):
        return False
    if query.shape[3] != value.shape[3] or query.shape[3] > 128 or query.shape[3] % 8:
        return False
    if (causal and (lengths is not None or query.shape[2] != key.shape[2])) or (window is not None and not causal):
        return False
    device = jax.devices()[0]
    return "cuda" in device.client.platform_version and float(getattr(device, "compute_capability", 0)) >= 8


@partial(jax.jit, static_argnames=("causal", "window", "scale"))
def _cudnn(query, key, value, causal=False, lengths=None, window=None, scale=None, **_):
    y = jax.nn.dot_product_attention(
        *(jnp.swapaxes(x, 1, 2) for x in (query, key, value)),
        scale=scale,
        is_causal=causal,
        key_value_seq_lengths=None if lengths is None else jnp.maximum(lengths, 1),
        local_window_size=None if window is None else (window - 1, 0),
        implementation="cudnn",
    )
    y = jnp.swapaxes(y, 1, 2)
    return y if lengths is None else jnp.where(lengths[:, None, None, None] > 0, y, 0)


@partial(jax.jit, static_argnums=(0, 1))
def _attention(rules, parts, query, key, value, given, slopes):
    (b, h, q, _), n = query.shape, key.shape[1]
    dtype = jnp.float64 if query.dtype == jnp.float64 else jnp.float32
    rows = blocks.padded_length(parts) - q

    def of_head(x):
        """`(b or 1, t)` of batch or `(h,)` of heads -> `(b n, ...)`."""
        return jnp.repeat(jnp.broadcast_to(x, (b, x.shape[1])), n, 0)

    given = given._replace(
        query_positions=_padded(given.query_positions, rows), query_segments=_padded(given.query_segments, rows)
    )
    heads = (
        jnp.pad(query, ((0, 0), (0, 0), (0, rows), (0, 0))).reshape(b * n, h // n, q + rows, -1),
        key.reshape(b * n, *key.shape[2:]),
        value.reshape(b * n, *value.shape[2:]),
        None if slopes is None else jnp.tile(slopes.astype(dtype).reshape(n, h // n), (b, 1)),
        jax.tree.map(of_head, given),
    )
    y = _heads(rules, parts, *heads)
    return y.reshape(b, h, q + rows, -1)[:, :, :q]


def _padded(x, rows):
    return None if x is None else jnp.pad(x, ((0, 0), (0, rows)))


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _heads(rules, parts, *heads):
    return _forward(rules, parts, *heads)[0]


def _forward(rules, parts, *heads):
    def head(inputs):
        query, key, value, slopes, given = map(_one, inputs)
        y, total = blocks.forward(query, key, value, given, slopes, rules, parts)
        return y[0, 0].astype(inputs[2].dtype), total[0, 0]

    y, total = _each(head, heads)
    return y, (heads, y, total)


def _backward(rules, parts, saved, dy):
    def head(inputs):
        heads, y, total, dy = inputs
        query, key, value, slopes, given = map(_one, heads)
        gradients = blocks.backward(query, key, value, given, slopes, rules, parts, *map(_one, (y, total, dy)))
        *gradients, d_slopes = gradients
        gradients = [dx[0, 0].astype(x.dtype) for dx, x in zip(gradients, heads[:3], strict=True)]
        return *gradients, None if d_slopes is None else d_slopes[0, 0, :, 0, 0]

    return *_each(head, (*saved, dy)), None


_heads.defvjp(_forward, _backward)


def _each(function, xs):
    return jax.lax.map(function, xs) if jax.default_backend() == "cpu" else jax.vmap(function)(xs)


def _one(x):
    """An array of one head as `blocks` wants it: with axes of batch and heads, in the dtype of the softmax."""
    if x is None:
        return None
    if isinstance(x, blocks.Given):
        return jax.tree.map(lambda x: x[None], x)
    if x.ndim == 1:
        return x[None, None, :, None, None]
    return x[None, None] if x.dtype == jnp.float64 else x[None, None].astype(jnp.float32)
