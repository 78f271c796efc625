"""TensorFlow kernels: while loops with hand-written gradients, with and without XLA.

Automatic differentiation of a loop adds up the weight gradients step by step. Here the backward loop only carries the
gradient of the state; the local derivatives are computed for all steps at once before it, and the weight gradients are
one product each after it. First derivatives only (`tf.custom_gradient`). Called eagerly, a kernel is its own graph.
"""

import functools
from contextlib import nullcontext

import tensorflow as tf
from keras import tree

from keras_seq.backend import refuses
from keras_seq.backend.recurrence import not_fused
from keras_seq.backend.tensorflow_attention import attention as attention
from keras_seq.backend.xla import product as product


def scan(step, state, xs):
    """A loop whose gradient is a second loop: back through the states, which are kept, each step computed once more.

    The gradient of `tf.while_loop` keeps every intermediate value, and a step of a longer loop takes it more time. It
    is what remains for steps that draw numbers, which would be others the second time, and, inside of another loop or
    of a condition, for steps that read variables, of which `tf.custom_gradient` knows nothing there.
    """
    if tf.executing_eagerly():
        return _loop(step, state, xs)
    state = tree.map_structure(tf.convert_to_tensor, state)
    specs = tree.map_structure(lambda a: tf.TensorSpec(a.shape, a.dtype), (state, _first(xs)))
    traced = tf.function(step, autograph=False).get_concrete_function(*specs)
    like = specs[0], traced.structured_outputs[1]
    draws = any(op.op_def.is_stateful and op.type != "ReadVariableOp" for op in traced.graph.get_operations())
    if draws or (traced.graph.variables and _in_control_flow()):
        return _loop(step, state, xs, like[1])
    inputs = state, xs, _continuous(traced.captured_inputs)

    @tf.custom_gradient
    def run(*leaves):
        state, xs, _ = _filled(inputs, leaves)

        def keeping(state, x):
            new, y = step(state, x)
            return new, (state, y)

        last, (before, ys) = _loop(keeping, state, xs, like)

        def backward(*gradients, variables=()):
            pairs = zip(gradients, tree.flatten(like), strict=True)
            given = [gradient for gradient, one in pairs if _is_continuous(one)]  # None for the others
            by_inputs, by_variables = _scan_backward(step, before, xs, inputs[2], variables, given)
            by_inputs = [next(by_inputs) if _is_continuous(leaf) else None for leaf in leaves]
            return (by_inputs, by_variables) if variables else by_inputs

        return tree.flatten((last, ys)), backward

    return _filled(like, run(*tree.flatten(inputs)))


def _scan_backward(step, before, xs, captured, variables, gradients):
    """The gradients of a scan, by the first state, xs, and what the step captured; and by variables.

    Of all that is not integers or bools; `gradients` are those by the last state and by the outputs.
    """
    captured, count = [*captured, *variables], len(_continuous(before))

    def back(carry, inputs):
        (d_state, sums), (state, x, dy) = carry, inputs
        sources = _continuous(state), _continuous(x), captured
        with tf.GradientTape() as tape:
            tape.watch(sources)
            outputs = _continuous(step(state, x))
        d_state, dx, d = tape.gradient(outputs, sources, [*d_state, *dy], unconnected_gradients="zero")
        return (d_state, [total + tf.convert_to_tensor(one) for total, one in zip(sums, d, strict=True)]), dx

    carry = gradients[:count], [tf.zeros_like(tensor) for tensor in captured]
    inputs = before, xs, gradients[count:]
    (d_state, sums), dxs = _loop(back, carry, inputs, _continuous(_first(xs)), reverse=True)
    count = len(captured) - len(variables)
    return iter([*d_state, *dxs, *sums[:count]]), sums[count:]


def _in_control_flow():
    graph = tf.compat.v1.get_default_graph()
    while graph is not None:
        if type(graph).__name__ in ("CondBranchFuncGraph", "WhileBodyFuncGraph"):
            return True
        graph = getattr(graph, "outer_graph", None)
    return False


def _first(xs):
    return tree.map_structure(lambda x: x[0], xs)


def _is_continuous(x):
    return x.dtype.is_floating or x.dtype.is_complex


def _continuous(structure):
    return [leaf for leaf in tree.flatten(structure) if _is_continuous(leaf)]


def _filled(structure, leaves):
    leaves = iter(leaves)
    return tree.map_structure(lambda _: next(leaves), structure)


def _loop(step, state, xs, y=None, reverse=False):
    """`tf.while_loop` over tensor arrays; `y` has the structure, shapes and dtypes of what a step gives.

    The static length, which `stack` forgets, is put back.
    """
    leaves = tree.flatten(xs)
    length = leaves[0].shape[0]
    t = tf.shape(leaves[0])[0] if length is None else length
    arrays = [tf.TensorArray(x.dtype, t, element_shape=x.shape[1:]).unstack(x) for x in leaves]
    y = step(state, _first(xs))[1] if y is None else y  # for its structure: pruned from a graph
    outputs = [tf.TensorArray(one.dtype, t, element_shape=one.shape) for one in tree.flatten(y)]

    def body(i, state, outputs):
        at = t - 1 - i if reverse else i
        new, y = step(state, tree.pack_sequence_as(xs, [a.read(at) for a in arrays]))
        new = tree.map_structure(lambda n, s: tf.ensure_shape(n, s.shape), new, state)
        return i + 1, new, [a.write(at, one) for a, one in zip(outputs, tree.flatten(y), strict=True)]

    _, state, outputs = tf.while_loop(lambda i, *_: i < t, body, (0, state, outputs), maximum_iterations=t)
    return state, _filled(y, [tf.ensure_shape(a.stack(), (length, *a.element_shape)) for a in outputs])


COMPILES = True

owned_state = nullcontext  # a compiler finds out by itself what it may overwrite


def compiled(function, layer, xla=False):
    """`function(*arrays)`, which reads the variables of `layer`, compiled; their values are read at each call.

    With `xla` it takes longer to compile and less long to run.
    """
    return tf.function(function, autograph=False, jit_compile=xla)


def gradients(function, layer):
    """`f(floats, *arrays) -> (aux, d loss / d weights, d loss / d floats)`, compiled, of `function -> (loss, aux)`."""

    @tf.function(autograph=False)
    def run(floats, *args):
        weights = [v.value for v in layer.trainable_variables]
        with tf.GradientTape() as tape:
            tape.watch((weights, floats))
            loss, aux = function(floats, *args)
        return aux, *tape.gradient(loss, (weights, floats), unconnected_gradients="zero")

    return run


def _graph(kernel):
    """Calls `kernel(x, h, ...)` in a graph: the one that is being made, or, called eagerly, one of its own."""
    kernel = tf.autograph.experimental.do_not_convert(kernel)

    @functools.cache
    def compiled(*sizes):  # one for each layer's sizes, so that relaxed shapes keep them; batch and time may vary
        return tf.function(kernel, reduce_retracing=True)

    @functools.wraps(kernel)
    def call(x, h, *args):
        if not tf.executing_eagerly():
            return kernel(x, h, *args)
        sizes = x.shape[1] == 1, x.dtype, x.shape[2], h.shape[1], *(a is None for a in args)
        return compiled(*sizes)(x, h, *args)

    return call


def largest(x):
    """The largest of the integers x, or None in compiled code."""
    return int(x.numpy().max()) if hasattr(x, "numpy") else None


def _time_first(x):
    return tf.transpose(x, (1, 0, 2))


def _valid(mask):
    """`(b, t)` -> `(t, b, 1)`, or None."""
    return None if mask is None else tf.transpose(mask)[..., None]


def _before(first, rest):
    """The states before each step, from the first state and the states after each step."""
    return tf.concat([first[None], rest[:-1]], 0)


def _rows(x):
    """`(t, b, n)` -> `(t b, n)`."""
    return tf.reshape(x, (-1, x.shape[-1]))


def _project(x, kernel):
    """`x W` for `(t, b, n)`, as one matrix product."""
    return tf.reshape(tf.matmul(_rows(x), kernel), (*tf.unstack(tf.shape(x)[:2]), kernel.shape[1]))


def _where(valid, new, old):
    return new if valid is None else tf.where(valid, new, old)


def _inputs(x, valid):
    """What a loop reads at each step; `_unpack` gives `(x, valid)` back."""
    return (x,) if valid is None else (x, valid)


def _unpack(inputs):
    return inputs if len(inputs) == 2 else (*inputs, None)


@refuses(not_fused)
def lstm(x, state, kernel, recurrent_kernel, bias=None, mask=None, **_):
    y, h, c = _lstm(x, *state, kernel, recurrent_kernel, bias, mask)
    return y, (h, c)


@_graph
def _lstm(x, h, c, kernel, recurrent_kernel, bias, mask):
    bias = tf.zeros(kernel.shape[1], kernel.dtype) if bias is None else bias
    if x.shape[1] == 1:
        _, new_h, new_c = _lstm_gates(tf.matmul(x[:, 0], kernel) + tf.matmul(h, recurrent_kernel) + bias, c)
        h, c = _where(mask, new_h, h), _where(mask, new_c, c)
        return h[:, None], h, c
    weights = tf.concat([kernel, recurrent_kernel], 0)
    valid = _valid(mask)

    @tf.custom_gradient
    def run(x, h, c, weights, bias):
        def step(state, inputs):
            h, c = state
            x, valid = _unpack(inputs)
            gates, new_h, new_c = _lstm_gates(tf.matmul(tf.concat([x, h], 1), weights) + bias, c)
            new = _where(valid, new_h, h), _where(valid, new_c, c)
            return new, (*new, gates)

        last, (hs, cs, gates) = _loop(step, (h, c), _inputs(x, valid))
        return (hs, *last), functools.partial(_lstm_backward, x, h, c, weights, valid, hs, cs, gates)

    y, h, c = run(_time_first(x), h, c, weights, bias)
    return _time_first(y), h, c


@refuses(not_fused)
def lstm_step(x, state, kernel, recurrent_kernel, bias=None, **_):
    y, h, c = _lstm(x[:, None], *state, kernel, recurrent_kernel, bias, None)
    return y[:, 0], (h, c)


def _lstm_gates(z, c):
    i, f, g, o = tf.split(z, 4, 1)
    i, f, g, o = tf.sigmoid(i), tf.sigmoid(f), tf.tanh(g), tf.sigmoid(o)
    c = f * c + i * g
    return tf.concat([i, f, g, o], 1), o * tf.tanh(c), c


def _lstm_backward(x, h, c, weights, valid, hs, cs, gates, dhs, dh, dc):
    features = x.shape[-1]
    i, f, g, o = tf.split(gates, 4, -1)
    tanh_c = tf.tanh(cs)
    c_by_h = o * (1 - tanh_c * tanh_c)
    # What dc, dc, dc, dh are multiplied by to give the gradients of i, f, g, o before their activations.
    local = tf.concat([g * i * (1 - i), _before(c, cs) * f * (1 - f), i * (1 - g * g), tanh_c * o * (1 - o)], -1)
    if valid is not None:  # a padded step hands on dh and dc as they are
        local, c_by_h = (tf.where(valid, v, tf.zeros_like(v)) for v in (local, c_by_h))
        f = tf.where(valid, f, tf.ones_like(f))
    recurrent = weights[features:]

    def step(state, inputs):
        dh, dc = state
        (dy, c_by_h, local, f), valid = _unpack(inputs)
        dh = dh + dy
        dc = dc + dh * c_by_h
        dz = tf.concat([dc, dc, dc, dh], 1) * local
        dh_before = tf.matmul(dz, recurrent, transpose_b=True)
        return (_where(valid, dh_before, dh), dc * f), dz

    (dh, dc), dz = _loop(step, (dh, dc), _inputs((dhs, c_by_h, local, f), valid), reverse=True)
    d_weights = tf.matmul(_rows(tf.concat([x, _before(h, hs)], -1)), _rows(dz), transpose_a=True)
    return _project(dz, tf.transpose(weights[:features])), dh, dc, d_weights, tf.reduce_sum(dz, (0, 1))


@refuses(not_fused)
def gru(x, h, kernel, recurrent_kernel, bias=None, mask=None, **_):
    return _gru(x, h, kernel, recurrent_kernel, bias, mask)


@_graph
def _gru(x, h, kernel, recurrent_kernel, bias, mask):
    bias = tf.zeros((2, kernel.shape[1]), kernel.dtype) if bias is None else bias
    if x.shape[1] == 1:
        h = _where(mask, _gru_step(x[:, 0], h, kernel, recurrent_kernel, bias)[0], h)
        return h[:, None], h
    valid = _valid(mask)

    @tf.custom_gradient
    def run(x, h, kernel, recurrent_kernel, bias):
        def step(h, inputs):
            x, valid = _unpack(inputs)
            new, gates = _gru_step(x, h, kernel, recurrent_kernel, bias)
            new = _where(valid, new, h)
            return new, (new, gates)

        last, (hs, gates) = _loop(step, h, _inputs(x, valid))
        return (hs, last), functools.partial(_gru_backward, x, h, kernel, recurrent_kernel, valid, hs, gates)

    y, h = run(_time_first(x), h, kernel, recurrent_kernel, bias)
    return _time_first(y), h


@refuses(not_fused)
def gru_step(x, h, kernel, recurrent_kernel, bias=None, **_):
    y, h = _gru(x[:, None], h, kernel, recurrent_kernel, bias, None)
    return y[:, 0], h


def _gru_step(x, h, kernel, recurrent_kernel, bias):
    units = h.shape[1]
    x = tf.matmul(x, kernel) + bias[0]
    a = tf.matmul(h, recurrent_kernel) + bias[1]
    z, r = tf.split(tf.sigmoid(x[:, : 2 * units] + a[:, : 2 * units]), 2, 1)
    n = tf.tanh(x[:, 2 * units :] + r * a[:, 2 * units :])
    return n + z * (h - n), tf.concat([z, r, n, a[:, 2 * units :]], 1)


def _gru_backward(x, h, kernel, recurrent_kernel, valid, hs, gates, dhs, dh):
    z, r, n, a_n = tf.split(gates, 4, -1)
    before = _before(h, hs)
    through_n = (1 - z) * (1 - n * n)
    # What dh is multiplied by to give the gradients of h U + b', in the order z, r, n.
    local = tf.concat([(before - n) * z * (1 - z), through_n * a_n * r * (1 - r), through_n * r], -1)
    if valid is not None:  # a padded step hands on dh as it is
        local, through_n = (tf.where(valid, v, tf.zeros_like(v)) for v in (local, through_n))
        z = tf.where(valid, z, tf.ones_like(z))

    def step(dh, inputs):
        dy, local, z = inputs
        dh = dh + dy
        da = tf.concat([dh, dh, dh], 1) * local
        return dh * z + tf.matmul(da, recurrent_kernel, transpose_b=True), (da, dh)

    dh, (da, dh_all) = _loop(step, dh, (dhs, local, z), reverse=True)
    dx = tf.concat([da[..., : 2 * h.shape[1]], dh_all * through_n], -1)
    d_kernel = tf.matmul(_rows(x), _rows(dx), transpose_a=True)
    d_recurrent = tf.matmul(_rows(before), _rows(da), transpose_a=True)
    d_bias = tf.stack([tf.reduce_sum(dx, (0, 1)), tf.reduce_sum(da, (0, 1))])
    return _project(dx, tf.transpose(kernel)), dh, d_kernel, d_recurrent, d_bias


def slower_in_chunks(name, x, training):
    """Why the recurrence `name` of `keras_seq.ops.wkv` on `x` `(b, t, ...)` is faster step by step, or None.

    Without gradients, and for RWKV-4, that would hold for long sequences too under XLA, but not in a graph, where a
    loop is slow; nothing tells which of them is being made.
    """
    return "few steps" if x.shape[1] is not None and x.shape[1] < 8 else None


def with_gradient(forward, backward):
    """The function `forward(*inputs) -> (outputs, residuals)` with `backward(residuals, d outputs) -> d inputs`."""

    @tf.custom_gradient
    def function(*inputs):
        outputs, residuals = forward(*inputs)
        return outputs, lambda *gradients: backward(residuals, gradients)

    return function


def inverse_lower(system):
    """Of lower triangles `(..., n, n)` with ones on the diagonal."""
    one = tf.eye(system.shape[-1], batch_shape=tf.shape(system)[:-2], dtype=system.dtype)
    return tf.linalg.triangular_solve(system, one)


def chunks_at_once(x):
    """How many of the chunks x `(b, h, n, c, k)` to compute at once; None: all.

    On a CPU few: what is computed next is then still in the cache.
    """
    return None if tf.config.list_physical_devices("GPU") else 1


def recomputed(step):
    """`step`: the gradient of `scan` computes each step once more as it is."""
    return step
