"""JAX kernels: scans with hand-written gradients.

Automatic differentiation of a scan adds up the weight gradients step by step. Here the backward scan only carries the
gradient of the state. It works in blocks of steps: the local derivatives of a block are computed at once before it, and
the weight gradients are one product each after it. For all steps at once these arrays outgrow the cache, and memory of
that size is fetched from the system anew at each call. First derivatives in reverse mode only (`jax.custom_vjp`).

On a CPU the input projection is inside the step, as `[x, h] @ [W; U]`: XLA runs that 1.7 to 2.5 times faster than a
projection of all steps ahead of the scan. The jitted functions are compiled once per shape, also when called eagerly.
"""

from contextlib import nullcontext
from functools import partial

import jax
import jax.numpy as jnp
import keras
from jax.lax import scan as scan

from keras_seq.backend import refuses
from keras_seq.backend.jax_attention import attention as attention
from keras_seq.backend.recurrence import not_fused
from keras_seq.backend.xla import product as product

COMPILES = True

owned_state = nullcontext  # a compiler finds out by itself what it may overwrite

_BLOCK = 256  # batch x steps


def compiled(function, layer, xla=True):
    """`function(*arrays)`, which reads the variables of `layer`, compiled; their values are read at each call."""

    @jax.jit
    def pure(values, *args):
        with keras.StatelessScope(state_mapping=list(zip(layer.variables, values, strict=True))):
            return function(*args)

    return lambda *args: pure([v.value for v in layer.variables], *args)


def gradients(function, layer):
    """`f(floats, *arrays) -> (aux, d loss / d weights, d loss / d floats)`, compiled, of `function -> (loss, aux)`."""

    @jax.jit
    def pure(weights, others, floats, *args):
        def loss(weights, floats):
            values = dict(zip(map(id, layer.trainable_variables), weights, strict=True)) | others
            with keras.StatelessScope(state_mapping=[(v, values[id(v)]) for v in layer.variables]):
                return function(floats, *args)

        (d_weights, d_floats), aux = jax.grad(loss, argnums=(0, 1), has_aux=True)(weights, floats)
        return aux, d_weights, d_floats

    def run(floats, *args):
        others = {id(v): v.value for v in layer.non_trainable_variables}
        return pure([v.value for v in layer.trainable_variables], others, floats, *args)

    return run


def take_rows(x, rows):
    return jnp.take(x, rows, axis=0, mode="clip")  # 6 times as fast as filling in what is beyond the end


def largest(x):
    """The largest of the integers x, or None in compiled code."""
    return None if isinstance(x, jax.core.Tracer) else int(x.max())


def _time_first(x):
    return jnp.swapaxes(x, 0, 1)


def _valid(mask):
    """`(b, t)` -> `(t, b, 1)`, or None."""
    return None if mask is None else mask.T[..., None]


def _rows(x):
    """`(t, b, n)` -> `(t b, n)`."""
    return x.reshape(-1, x.shape[-1])


def _saved(gates, valid, padded):
    """The gates that the backward scan reads: on a padded step `padded`, which keep the state and take no gradient."""
    if valid is None:
        return gates
    return jnp.where(valid, gates, jnp.repeat(jnp.array(padded, gates.dtype), gates.shape[-1] // len(padded)))


def _backward(block, carry, batch, steps):
    """Calls `carry = block(carry, start, length)` for blocks of the time axis, the last block first."""
    length = min(steps, max(_BLOCK // batch, 1))
    blocks, rest = divmod(steps, length)
    carry = jax.lax.fori_loop(0, blocks, lambda i, carry: block(carry, steps - (i + 1) * length, length), carry)
    return block(carry, 0, rest) if rest else carry


def _part(x, start, length):
    """Some steps of `(b, t, n)`, as `(length, b, n)`."""
    return _time_first(jax.lax.dynamic_slice_in_dim(x, start, length, 1))


def _before(first, y, start, length):
    """The states before some steps, from the first state and the states `(b, t, n)` after all steps."""
    first = jnp.where(start == 0, first, _part(y, start - 1, 1)[0])
    return jnp.concatenate([first[None], _part(y, start, length - 1)])


@refuses(not_fused)
def lstm(x, state, kernel, recurrent_kernel, bias=None, mask=None, **_):
    return _lstm(x, *state, kernel, recurrent_kernel, bias, mask)


@jax.jit
def _lstm(x, h, c, kernel, recurrent_kernel, bias, mask):
    bias = jnp.zeros(kernel.shape[1], kernel.dtype) if bias is None else bias
    if x.shape[1] == 1:
        _, (new_h, new_c) = _lstm_step(x[:, 0], (h, c), kernel, recurrent_kernel, bias)
        h, c = (new_h, new_c) if mask is None else (jnp.where(mask, new_h, h), jnp.where(mask, new_c, c))
        return h[:, None], (h, c)
    weights = jnp.concatenate([kernel, recurrent_kernel])
    y, h, c = _lstm_scan(x, h, c, weights, bias, _valid(mask))
    return y, (h, c)


@refuses(not_fused)
def lstm_step(x, state, kernel, recurrent_kernel, bias=None, **_):
    return _lstm_step(x, tuple(state), kernel, recurrent_kernel, bias)


@jax.jit
def _lstm_step(x, state, kernel, recurrent_kernel, bias):
    h, c = state
    z = x @ kernel + h @ recurrent_kernel
    _, h, c = _lstm_gates(z if bias is None else z + bias, c)
    return h, (h, c)


def _lstm_gates(z, c):
    i, f, g, o = jnp.split(z, 4, -1)
    i, f, g, o = jax.nn.sigmoid(i), jax.nn.sigmoid(f), jnp.tanh(g), jax.nn.sigmoid(o)
    c = f * c + i * g
    return jnp.concatenate([i, f, g, o], -1), o * jnp.tanh(c), c


@jax.custom_vjp
def _lstm_scan(x, h, c, weights, bias, valid):
    return _lstm_forward(x, h, c, weights, bias, valid)[0]


def _lstm_forward(x, h, c, weights, bias, valid):
    def step(state, inputs):
        h, c = state
        x, valid = inputs
        gates, new_h, new_c = _lstm_gates(jnp.concatenate([x, h], 1) @ weights + bias, c)
        if valid is not None:
            new_h, new_c = jnp.where(valid, new_h, h), jnp.where(valid, new_c, c)
        return (new_h, new_c), (new_h, c, _saved(gates, valid, (0, 1, 0, 0)))

    (last_h, last_c), (y, cs, gates) = scan(step, (h, c), (_time_first(x), valid))
    y = _time_first(y)
    return (y, last_h, last_c), (x, h, weights, valid, y, cs, gates)


def _lstm_backward(saved, gradients):
    x, first, weights, valid, y, cs, gates = saved
    dy, dh, dc = gradients
    kernel, recurrent = weights[: x.shape[-1]].T, weights[x.shape[-1] :].T

    def block(carry, start, length):
        dh, dc, dx, d_weights, d_bias = carry
        here = partial(jax.lax.dynamic_slice_in_dim, start_index=start, slice_size=length)
        c, (i, f, g, o) = here(cs), jnp.split(here(gates), 4, -1)
        tanh_c = jnp.tanh(f * c + i * g)
        c_by_h = o * (1 - tanh_c * tanh_c)
        # What dc, dc, dc, dh are multiplied by to give the gradients of i, f, g, o before their activations.
        local = jnp.concatenate([g * i * (1 - i), c * f * (1 - f), i * (1 - g * g), tanh_c * o * (1 - o)], -1)

        def step(state, inputs):
            dh, dc = state
            dy, c_by_h, local, f, valid = inputs
            dh = dh + dy
            dc = dc + dh * c_by_h
            dz = jnp.concatenate([dc, dc, dc, dh], -1) * local
            dh_before = dz @ recurrent
            if valid is not None:  # a padded step hands on dh as it is
                dh_before = jnp.where(valid, dh_before, dh)
            return (dh_before, dc * f), dz

        inputs = _part(dy, start, length), c_by_h, local, f, None if valid is None else here(valid)
        (dh, dc), dz = scan(step, (dh, dc), inputs, reverse=True)
        dx = jax.lax.dynamic_update_slice_in_dim(dx, _time_first(dz @ kernel), start, 1)
        xh = jnp.concatenate([_part(x, start, length), _before(first, y, start, length)], -1)
        return dh, dc, dx, d_weights + _rows(xh).T @ _rows(dz), d_bias + dz.sum((0, 1))

    zeros = map(jnp.zeros_like, (x, weights, weights[0]))
    dh, dc, dx, d_weights, d_bias = _backward(block, (dh, dc, *zeros), *y.shape[:2])
    return dx, dh, dc, d_weights, d_bias, None


_lstm_scan.defvjp(_lstm_forward, _lstm_backward)


@refuses(not_fused)
def gru(x, h, kernel, recurrent_kernel, bias=None, mask=None, **_):
    return _gru(x, h, kernel, recurrent_kernel, bias, mask)


@jax.jit
def _gru(x, h, kernel, recurrent_kernel, bias, mask):
    bias = jnp.zeros((2, kernel.shape[1]), kernel.dtype) if bias is None else bias
    if x.shape[1] == 1:
        new_h = _gru_step(x[:, 0], h, kernel, recurrent_kernel, bias)[0]
        h = new_h if mask is None else jnp.where(mask, new_h, h)
        return h[:, None], h
    return _gru_scan(x, h, kernel, recurrent_kernel, bias, _valid(mask))


def _gru_step(x, h, kernel, recurrent_kernel, bias):
    units = h.shape[1]
    x = x @ kernel + bias[0]
    a = h @ recurrent_kernel + bias[1]
    z, r = jnp.split(jax.nn.sigmoid(x[:, : 2 * units] + a[:, : 2 * units]), 2, -1)
    n = jnp.tanh(x[:, 2 * units :] + r * a[:, 2 * units :])
    return n + z * (h - n), jnp.concatenate([z, r, n, a[:, 2 * units :]], -1)


@refuses(not_fused)
def gru_step(x, h, kernel, recurrent_kernel, bias=None, **_):
    return _gru_one(x, h, kernel, recurrent_kernel, bias)


@jax.jit
def _gru_one(x, h, kernel, recurrent_kernel, bias):
    bias = jnp.zeros((2, kernel.shape[1]), kernel.dtype) if bias is None else bias
    h = _gru_step(x, h, kernel, recurrent_kernel, bias)[0]
    return h, h


@jax.custom_vjp
def _gru_scan(x, h, kernel, recurrent_kernel, bias, valid):
    return _gru_forward(x, h, kernel, recurrent_kernel, bias, valid)[0]


def _gru_forward(x, h, kernel, recurrent_kernel, bias, valid):
    def step(h, inputs):
        x, valid = inputs
        new, gates = _gru_step(x, h, kernel, recurrent_kernel, bias)
        if valid is not None:
            new = jnp.where(valid, new, h)
        return new, (new, _saved(gates, valid, (1, 0, 0, 0)))

    last, (y, gates) = scan(step, h, (_time_first(x), valid))
    y = _time_first(y)
    return (y, last), (x, h, kernel, recurrent_kernel, bias, y, gates)


def _gru_backward(saved, gradients):
    x, first, kernel, recurrent_kernel, bias, y, gates = saved
    dy, dh = gradients
    recurrent = recurrent_kernel.T

    def block(carry, start, length):
        dh, dxs, d_kernel, d_recurrent, d_bias = carry
        z, r, n, a_n = jnp.split(jax.lax.dynamic_slice_in_dim(gates, start, length), 4, -1)
        h = _before(first, y, start, length)
        through_n = (1 - z) * (1 - n * n)
        # What dh is multiplied by to give the gradients of h U + b', in the order z, r, n.
        local = jnp.concatenate([(h - n) * z * (1 - z), through_n * a_n * r * (1 - r), through_n * r], -1)

        def step(dh, inputs):
            dy, local, z = inputs
            dh = dh + dy
            da = jnp.concatenate([dh, dh, dh], -1) * local
            return dh * z + da @ recurrent, (da, dh)

        dh, (da, dh_all) = scan(step, dh, (_part(dy, start, length), local, z), reverse=True)
        dz = jnp.concatenate([da[..., : 2 * h.shape[-1]], dh_all * through_n], -1)  # the gradients of x W + b
        dxs = jax.lax.dynamic_update_slice_in_dim(dxs, _time_first(dz @ kernel.T), start, 1)
        d_kernel += _rows(_part(x, start, length)).T @ _rows(dz)
        d_recurrent += _rows(h).T @ _rows(da)
        return dh, dxs, d_kernel, d_recurrent, d_bias + jnp.stack([dz.sum((0, 1)), da.sum((0, 1))])

    zeros = map(jnp.zeros_like, (x, kernel, recurrent_kernel, bias))
    dh, dx, d_kernel, d_recurrent, d_bias = _backward(block, (dh, *zeros), *y.shape[:2])
    return dx, dh, d_kernel, d_recurrent, d_bias, None


_gru_scan.defvjp(_gru_forward, _gru_backward)


@refuses(not_fused)
def simple_rnn(x, h, kernel, recurrent_kernel, bias=None, mask=None, **_):
    return _simple_rnn(x, h, kernel, recurrent_kernel, bias, mask)


@jax.jit
def _simple_rnn(x, h, kernel, recurrent_kernel, bias, mask):
    def step(h, inputs):
        x, valid = inputs
        new = x @ kernel + h @ recurrent_kernel
        new = jnp.tanh(new if bias is None else new + bias)
        new = new if valid is None else jnp.where(valid, new, h)
        return new, new

    h, y = scan(step, h, (_time_first(x), _valid(mask)))
    return _time_first(y), h


def slower_in_chunks(name, x, training):
    """Why the recurrence `name` of `keras_seq.ops.wkv` on `x` `(b, t, ...)` is faster step by step, or None."""
    if not isinstance(x.shape[1], int):
        return "the number of steps is not known"
    if x.shape[1] < 8:
        return "few steps"
    if (name == "wkv4" or not training) and jax.default_backend() == "cpu":
        return "on a CPU a scan is faster"
    return None


def with_gradient(forward, backward):
    """The function `forward(*inputs) -> (outputs, residuals)` with `backward(residuals, d outputs) -> d inputs`."""
    function = jax.custom_vjp(lambda *inputs: forward(*inputs)[0])
    function.defvjp(forward, backward)
    return function


def inverse_lower(system):
    """Of lower triangles `(..., n, n)` with ones on the diagonal, n a power of 2.

    By halves: the two on the diagonal have their own inverses; what is below them is `-B^-1 C A^-1`. The triangular
    solve of LAPACK is slower on a CPU, and two of them at a time may never return: they wait in the threads of XLA's
    pool for parts of their work that they have handed to the same pool.
    """
    half = system.shape[-1] // 2
    if not half:
        return system
    inverse = inverse_lower(jnp.stack([system[..., :half, :half], system[..., half:, half:]]))
    exact = partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
    below = -exact(exact(inverse[1], system[..., half:, :half]), inverse[0])
    above = jnp.concatenate([inverse[0], jnp.zeros_like(below)], axis=-1)
    return jnp.concatenate([above, jnp.concatenate([below, inverse[1]], axis=-1)], axis=-2)


def chunks_at_once(x):
    """How many of the chunks x `(b, h, n, c, k)` to compute at once; None: all.

    On a CPU few: what is computed next is then still in the cache.
    """
    return 1 if jax.default_backend() == "cpu" else None


recomputed = jax.checkpoint
