"""Time mixing of RWKV 4 to 7.

Letters are those of the papers: r receptance, w decay, k key, v value, u bonus of the present step, g gate, a
in-context learning rate.
"""

import itertools
import math

import keras
import numpy as np
from keras import ops

from keras_seq import initializers
from keras_seq.base import cast
from keras_seq.layers.dense import project
from keras_seq.layers.prepared import products
from keras_seq.layers.rwkv_weights import RWKVLayer, TimeMixing
from keras_seq.ops.dense import product
from keras_seq.ops.lean import inner_product, normalized, reshape, side_by_side, sigmoid, tanh, wkv7_step
from keras_seq.ops.norm import group_norm
from keras_seq.ops.shift import token_shift
from keras_seq.ops.wkv import LEAST, wkv4, wkv5, wkv6, wkv7


@keras.saving.register_keras_serializable("keras_seq")
class RWKV4TimeMixing(RWKVLayer):
    """The time mixing of RWKV-4: a mean of past values whose weights decay with time, in each channel alone.

    `x_i = x_t mu_i + x_{t-1} (1 - mu_i)` for i = r, k, v;  `r = sigmoid(x_r W_r)`, `k = x_k W_k`, `v = x_v W_v`;
    `wkv_t = (sum_{s<t} e^{(t-1-s) w + k_s} v_s + e^{u+k_t} v_t) / (sum_{s<t} e^{(t-1-s) w + k_s} + e^{u+k_t})`, where
    `w = -exp(time_decay)` and u = `time_first`;  `y = (r * wkv) W_o`.

    Args:
        layer_index, num_layers: which layer of how many this is in its model, by which the initial values differ.
        **kwargs: `stateful` and those of `keras.layers.Layer`.

    Call: x `(b, t, d)`, mask `(b, t)` bool or None -> y `(b, t, d)`; the state is the last valid step of x `(b, d)`,
    and three sums `(b, d)`: numerator, denominator, and the exponent by which both are divided.

    Raises: ValueError for a `layer_index` that is not below `num_layers`.

    Source: Peng et al. 2023, arXiv:2305.13048, eq. 11-18.

    Example:

        layer = keras_seq.layers.RWKV4TimeMixing()
        y, (last, sums) = layer(keras.ops.ones((2, 5, 8)), return_state=True)  # (2, 5, 8), ((2, 8), 3 times (2, 8))
        y_t, state = layer.step(keras.ops.ones((2, 8)), (last, sums))  # (2, 8)
    """

    def build(self, input_shape):
        super().build(input_shape)
        d = self.features
        mix = self._channels() ** self.to_end
        self._vector("time_mix_k", mix)
        self._vector("time_mix_v", mix + 0.3 * self.from_first)
        self._vector("time_mix_r", mix**0.5)
        self._vector("time_decay", -5 + 8 * self._ramp() ** (0.7 + 1.3 * self.from_first), precise=True)
        self._vector("time_first", math.log(0.3) + 0.5 * _zigzag(d), precise=True)
        self._matrix("receptance", d, d)
        self._matrix("key", d, d)
        self._matrix("value", d, d, 1.0)
        self._matrix("output", d, d)

    def initial_state(self, batch_size, max_length=None):
        zeros = self._start(batch_size, self.features)
        return zeros, (zeros, zeros, zeros + LEAST)

    def advance(self, x, state, mask=None, training=False):
        last, sums = state
        before, last = token_shift(x, last, mask)
        since = x - before
        r = ops.sigmoid(project(self.receptance_dense, before + since * self.time_mix_r))
        k = project(self.key_dense, before + since * self.time_mix_k)
        v = project(self.value_dense, before + since * self.time_mix_v)
        w, u = -ops.exp(self._precise(self.time_decay)), self._precise(self.time_first)
        y, sums = wkv4(k, v, w, u, sums, mask, training)
        return project(self.output_dense, r * cast(y, self.compute_dtype)), (last, tuple(sums))


@keras.saving.register_keras_serializable("keras_seq")
class RWKV5TimeMixing(TimeMixing):
    """The time mixing of RWKV-5 ("Eagle"): linear attention with a decay of each channel.

    `x_i = x_t mu_i + x_{t-1} (1 - mu_i)` for i = r, k, v, g;  `r = x_r W_r`, `k = x_k W_k`, `v = x_v W_v`;
    `y_t = r_t (S_t + diag(u) k_t^T v_t)`, `S_{t+1} = diag(e^w) S_t + k_t^T v_t` in each head, where
    `w = -exp(time_decay)`;  `y = (silu(x_g W_g) * norm(y)) W_o`, norm in each head alone.

    Args:
        head_dim: size of a head; it divides the size of the input.
        layer_index, num_layers: which layer of how many this is in its model, by which the initial values differ.
        revision: `"5.2"`, or of the older models `"5.1"` (one decay and one bonus per head, the bonus as its logarithm)
            or `"5.0"` (as 5.1, without the gate).
        trainable_state: whether the state S before the first step is a weight.
        **kwargs: `stateful` and those of `keras.layers.Layer`.

    Call: x `(b, t, d)`, mask `(b, t)` bool or None -> y `(b, t, d)`; the state is the last valid step of x `(b, d)`,
    and S `(b, h, n, n)`, keys before values.

    Raises: ValueError for a `head_dim` that does not divide d, a `layer_index` that is not below `num_layers`, and an
    unknown revision.

    Source: Peng et al. 2024, arXiv:2404.05892, eq. 3-9.

    Example:

        layer = keras_seq.layers.RWKV5TimeMixing(head_dim=4)
        y, (last, s) = layer(keras.ops.ones((2, 5, 8)), return_state=True)  # (2, 5, 8), ((2, 8), (2, 2, 4, 4))
        y_t, state = layer.step(keras.ops.ones((2, 8)), (last, s))  # (2, 8)
    """

    def __init__(self, head_dim=64, layer_index=0, num_layers=1, revision="5.2", trainable_state=False, **kwargs):
        super().__init__(head_dim, layer_index, num_layers, trainable_state, **kwargs)
        if revision not in ("5.0", "5.1", "5.2"):
            raise ValueError(f'`revision` must be "5.0", "5.1" or "5.2". Received: revision={revision!r}')
        self.revision = revision

    def _add_weights(self, d):
        mix = self._channels() ** self.to_end
        self._vector("time_mix_k", mix)
        self._vector("time_mix_v", mix + 0.3 * self.from_first)
        self._vector("time_mix_r", mix**0.5)
        decay = -6 + 5 * self._ramp() ** (0.7 + 1.3 * self.from_first)
        bonus = self.from_first * (1 - self._ramp()) + 0.1 * _zigzag(d)
        if self.revision == "5.2":
            self._vector("time_decay", decay.reshape(self.heads, -1), precise=True)
            self._vector("time_faaaa", bonus.reshape(self.heads, -1), precise=True)
        else:
            self._vector("time_decay", decay.reshape(self.heads, -1)[:, :1], precise=True)
            self._vector("time_first", math.log(0.3), (self.heads, 1), precise=True)
        self._matrix("receptance", d, d, 1.0)
        self._matrix("key", d, d, 0.1)
        self._matrix("value", d, d, 1.0)
        self._matrix("output", d, d)
        if self.revision != "5.0":
            self._vector("time_mix_g", mix**0.5)
            self._matrix("gate", d, d, 0.1)

    def advance(self, x, state, mask=None, training=False):
        last, s = state
        before, last = token_shift(x, last, mask)
        since = x - before
        r = project(self.receptance_dense, before + since * self.time_mix_r)
        k = project(self.key_dense, before + since * self.time_mix_k)
        v = project(self.value_dense, before + since * self.time_mix_v)
        w = -ops.exp(self._precise(self.time_decay))
        u = self._precise(self.time_faaaa) if self.revision == "5.2" else ops.exp(self._precise(self.time_first))
        r, k, v = self._in_heads(r, k, v)
        y, s = wkv5(r, k, v, w, u, s, mask, training)
        y = self._joined(self._normed(y))
        if self.revision != "5.0":
            y = y * ops.silu(project(self.gate_dense, before + since * self.time_mix_g))
        return project(self.output_dense, y), (last, s)


@keras.saving.register_keras_serializable("keras_seq")
class RWKV6TimeMixing(TimeMixing):
    """The time mixing of RWKV-6 ("Finch"): that of RWKV-5, with mix and decay that depend on the data.

    `x_i = x_t + (x_{t-1} - x_t) (mu_i + tanh((x_t + (x_{t-1} - x_t) mu_x) A_i) B_i)` for i = w, k, v, r, g;
    `w = -exp(time_decay + tanh(x_w A) B)`;  the rest as in `RWKV5TimeMixing`, with w_t in place of w.

    Args:
        head_dim: size of a head; it divides the size of the input.
        layer_index, num_layers: which layer of how many this is in its model, by which the initial values differ.
        mix_rank: rank of A_i and B_i.
        decay_rank: rank of A and B of the decay.
        trainable_state: whether the state S before the first step is a weight.
        **kwargs: `stateful` and those of `keras.layers.Layer`.

    Call: x `(b, t, d)`, mask `(b, t)` bool or None -> y `(b, t, d)`; the state is the last valid step of x `(b, d)`,
    and S `(b, h, n, n)`, keys before values.

    Raises: ValueError for a `head_dim` that does not divide d, a `layer_index` that is not below `num_layers`, and
    ranks < 1.

    Source: Peng et al. 2024, arXiv:2404.05892, eq. 10-19.

    Example:

        layer = keras_seq.layers.RWKV6TimeMixing(head_dim=4)
        y, (last, s) = layer(keras.ops.ones((2, 5, 8)), return_state=True)  # (2, 5, 8), ((2, 8), (2, 2, 4, 4))
        y_t, state = layer.step(keras.ops.ones((2, 8)), (last, s))  # (2, 8)
    """

    def __init__(
        self,
        head_dim=64,
        layer_index=0,
        num_layers=1,
        mix_rank=32,
        decay_rank=64,
        trainable_state=False,
        **kwargs,
    ):
        super().__init__(head_dim, layer_index, num_layers, trainable_state, **kwargs)
        _check_ranks(mix_rank=mix_rank, decay_rank=decay_rank)
        self.mix_rank, self.decay_rank = mix_rank, decay_rank

    def _add_weights(self, d):
        mix = self._channels() ** self.to_end
        for name in "xwk":
            self._vector(f"time_maa_{name}", 1 - mix)
        self._vector("time_maa_v", 1 - (mix + 0.3 * self.from_first))
        for name in "rg":
            self._vector(f"time_maa_{name}", 1 - mix**0.5)
        small = initializers.RandomUniform(-0.01, 0.01)
        self._low_rank("time_maa_w1", (d, 5 * self.mix_rank))
        self._low_rank("time_maa_w2", (5, self.mix_rank, d), small)
        self._vector("time_decay", -6 + 5 * self._ramp() ** (0.7 + 1.3 * self.from_first), precise=True)
        self._low_rank("time_decay_w1", (d, self.decay_rank))
        self._low_rank("time_decay_w2", (self.decay_rank, d), initializers.RandomUniform(-0.01, 0.01))
        bonus = self.from_first * (1 - self._ramp()) + 0.1 * _zigzag(d)
        self._vector("time_faaaa", bonus.reshape(self.heads, -1), precise=True)
        for name, gain in {"receptance": 1.0, "key": 0.1, "value": 1.0, "gate": 0.1, "output": None}.items():
            self._matrix(name, d, d, gain)

    def advance(self, x, state, mask=None, training=False):
        last, s = state
        before, last = token_shift(x, last, mask)
        x_w, x_k, x_v, x_r, x_g = self._mixed(x, before - x)
        r, k, v = (
            project(dense, x_i)
            for dense, x_i in ((self.receptance_dense, x_r), (self.key_dense, x_k), (self.value_dense, x_v))
        )
        g = ops.silu(project(self.gate_dense, x_g))
        lower = ops.tanh(x_w @ self.time_decay_w1) @ self.time_decay_w2
        w = -ops.exp(self._precise(self.time_decay) + self._precise(lower))
        r, k, v, w = self._in_heads(r, k, v, w)
        y, s = wkv6(r, k, v, w, self._precise(self.time_faaaa), s, mask, training)
        y = self._joined(self._normed(y))
        return project(self.output_dense, y * g), (last, s)

    def _mixed(self, x, back):
        """x_w, x_k, x_v, x_r, x_g; `back` leads from x to the step before."""
        inner = ops.tanh((x + back * self.time_maa_x) @ self.time_maa_w1)
        for i, name in enumerate("wkvrg"):
            part = inner[..., i * self.mix_rank : (i + 1) * self.mix_rank] @ self.time_maa_w2[i]
            yield x + back * (getattr(self, f"time_maa_{name}") + part)


@keras.saving.register_keras_serializable("keras_seq")
class RWKV7TimeMixing(TimeMixing):
    """The time mixing of RWKV-7 ("Goose"): a state that unlearns in one direction what it learns anew.

    `x_i = x_t + (x_{t-1} - x_t) mu_i` for i = r, w, k, v, a, g;  `r = x_r W_r`, `k = x_k W_k`, `v = x_v W_v`;
    `w = -e^{-1/2} sigmoid(w0 + tanh(x_w w1) w2)`,  `a = sigmoid(a0 + x_a a1 a2)`,  `g = sigmoid(x_g g1) g2`;
    from the second layer on `v = v + (v_first - v) sigmoid(v0 + x_v v1 v2)`, v_first the value of the first layer;
    `kappa = normalized(k * k_k)` in each head, and `k = k * (1 + (a - 1) k_a)`;
    `S_t = S_{t-1} (diag(e^w) - kappa^T (a * kappa)) + v^T k`,  `y = S_t r`;
    `y = (g * (norm(y) + (sum(r * k * r_k)) v)) W_o`, norm and sum in each head alone.

    Args:
        head_dim: size of a head; it divides the size of the input.
        layer_index, num_layers: which layer of how many this is in its model, by which the initial values differ; all
            but the first take v_first.
        allow_negative_eigenvalues: whether a is in (0, 2), not in (0, 1): then the state can change its sign in one
            direction, which tracking a state needs (Grazzi et al. 2024, arXiv:2411.12537). Official models do not.
        decay_rank, iclr_rank, value_rank, gate_rank: ranks of w1 w2, a1 a2, v1 v2 and g1 g2; default those of the
            released models, which grow with d.
        trainable_state: whether the state S before the first step is a weight.
        **kwargs: `stateful` and those of `keras.layers.Layer`.

    Call: x `(b, t, d)`, mask `(b, t)` bool or None -> y `(b, t, d)`; the state is the last valid step of x `(b, d)`,
    and S `(b, h, n, n)`, values before keys. A layer that is not the first, called alone, takes its own v as v_first.

    Raises: ValueError for a `head_dim` that does not divide d, a `layer_index` that is not below `num_layers`, and
    ranks < 1.

    Source: Peng et al. 2025, arXiv:2503.14456, eq. 3-21.

    Example:

        layer = keras_seq.layers.RWKV7TimeMixing(head_dim=4)
        y, (last, s) = layer(keras.ops.ones((2, 5, 8)), return_state=True)  # (2, 5, 8), ((2, 8), (2, 2, 4, 4))
        y_t, state = layer.step(keras.ops.ones((2, 8)), (last, s))  # (2, 8)
    """

    def __init__(
        self,
        head_dim=64,
        layer_index=0,
        num_layers=1,
        allow_negative_eigenvalues=False,
        decay_rank=None,
        iclr_rank=None,
        value_rank=None,
        gate_rank=None,
        trainable_state=False,
        **kwargs,
    ):
        super().__init__(head_dim, layer_index, num_layers, trainable_state, **kwargs)
        self.allow_negative_eigenvalues = allow_negative_eigenvalues
        self.ranks = {"w": decay_rank, "a": iclr_rank, "v": value_rank, "g": gate_rank}
        names = {"decay_rank": decay_rank, "iclr_rank": iclr_rank, "value_rank": value_rank, "gate_rank": gate_rank}
        _check_ranks(**{name: rank for name, rank in names.items() if rank is not None})

    def _add_weights(self, d):
        for name, power in {"r": 0.2, "w": 0.9, "k": 0.7, "v": 0.7, "a": 0.9, "g": 0.2}.items():
            self._vector(f"x_{name}", 1 - self._channels() ** (power * self.to_end))
        within = np.arange(d) % self.head_dim - (self.head_dim - 1) / 2  # from the middle of a head
        zigzag = within / max((self.head_dim - 1) / 2, 1)
        zigzag, linear = zigzag * abs(zigzag), self._ramp() - 0.5
        decay = -5.5 + 6 * self._ramp() ** (1 + self.from_first**0.3) + 2.5 * zigzag
        self._low_rank_map("w", decay, precise=True)
        self._low_rank_map("a", -0.19 + 0.3 * zigzag + 0.4 * linear)
        if self.layer_index:
            self._low_rank_map("v", 0.73 - 0.4 * linear)
        self._low_rank_map("g", None)
        self._vector("k_k", 0.71 - 0.1 * linear)
        self._vector("k_a", 1.02, (d,))
        self._vector("r_k", -0.04, (self.heads, self.head_dim), precise=True)
        for name, gain in {"receptance": 1.0, "key": 0.1, "value": 1.0, "output": None}.items():
            self._matrix(name, d, d, gain)

    def _low_rank_map(self, name, bias, precise=False):
        d = self.features
        rank = self.ranks[name] or _released_rank(name, d)
        if bias is not None:
            self._vector(f"{name}0", bias, precise=precise)
        self._low_rank(f"{name}1", (d, rank))
        self._low_rank(f"{name}2", (rank, d), initializers.Orthogonal(0.1 * max(rank / d, 1) ** 0.5))

    def advance(self, x, state, mask=None, training=False):
        y, _, state = self.mix(x, state, None, mask, training)
        return y, state

    def mix(self, x, state, v_first, mask=None, training=False):
        """As `advance`, with the value of the first layer, or None in the first: returns y, that value, the state."""
        last, s = state
        before, last = token_shift(x, last, mask)
        back = before - x
        x_r, x_w, x_k, x_v, x_a, x_g = (
            x + back * mu for mu in (self.x_r, self.x_w, self.x_k, self.x_v, self.x_a, self.x_g)
        )
        r = project(self.receptance_dense, x_r)
        k = project(self.key_dense, x_k)
        v = project(self.value_dense, x_v)
        w = self._precise(self.w0) + self._precise(ops.tanh(x_w @ self.w1) @ self.w2)
        w = -math.exp(-0.5) * ops.sigmoid(w)
        a = ops.sigmoid(self.a0 + (x_a @ self.a1) @ self.a2)
        a = 2 * a if self.allow_negative_eigenvalues else a
        g = ops.sigmoid(x_g @ self.g1) @ self.g2
        if v_first is None:
            v_first = v
        if self.layer_index:
            v = v + (v_first - v) * ops.sigmoid(self.v0 + (x_v @ self.v1) @ self.v2)
        kappa = k * self.k_k
        k = k * (1 + (a - 1) * self.k_a)
        r, w, k, v, a, kappa = self._in_heads(r, w, k, v, a, kappa)
        kappa = normalized(kappa)
        y, s = wkv7(r, w, k, v, -kappa, kappa * a, s, mask, training)
        y = self._normed(y)
        y = y + ops.sum(r * k * self._precise(self.r_k), axis=-1, keepdims=True) * v
        return project(self.output_dense, self._joined(y) * g), v_first, (last, s)

    def stepper(self, batch_size, steps=1):
        return stepper_of(self, batch_size, steps)

    def mix_stepper(self, batch_size, steps=1):
        """`mix` on single steps `(b, d)`, made ready as by `stepper`; None if a matrix is more than a product."""
        dense = self.receptance_dense, self.key_dense, self.value_dense, self.output_dense
        matrices = [products(layer, rows=batch_size, steps=steps) for layer in dense]
        if None in matrices or not self.compute_dtype == self.variable_dtype == self.state_dtype:
            return None
        project_r, project_k, project_v, project_out = matrices
        names = "wagv" if self.layer_index else "wag"
        vectors = ("x_r", "x_k", "x_v", "w0", "a0", "k_k", "k_a", *(["v0"] if self.layer_index else []))
        at = {name: ops.convert_to_tensor(getattr(self, name)) for name in vectors}
        inner, outer = {}, {}
        for name in names:  # x_i A = x A + (x_{t-1} - x_t) (mu_i A): the products of all i side by side
            first, mu = ops.convert_to_tensor(getattr(self, f"{name}1")), getattr(self, f"x_{name}")
            inner[name] = ops.concatenate([first, ops.convert_to_tensor(mu)[:, None] * first], axis=0)
            outer[name] = ops.convert_to_tensor(getattr(self, f"{name}2"))
        project_inner = product(ops.concatenate(list(inner.values()), axis=1), None, batch_size, steps)
        cuts = list(itertools.accumulate(matrix.shape[1] for matrix in inner.values()))
        gamma, beta = (ops.reshape(self._precise(x), (self.heads, -1)) for x in (self.ln_x_weight, self.ln_x_bias))
        r_k, scale = self._precise(self.r_k), 2.0 if self.allow_negative_eigenvalues else 1.0
        in_heads, together = (batch_size, self.heads, self.head_dim), (batch_size, self.features)

        def step(x, state, v_first):
            last, s = state
            back = last - x
            r = reshape(project_r(x + back * at["x_r"]), in_heads)
            k, v = project_k(x + back * at["x_k"]), project_v(x + back * at["x_v"])
            within = project_inner(side_by_side(x, back))
            parts = {name: within[:, i:j] for name, i, j in zip(names, [0, *cuts], cuts, strict=False)}
            w = -math.exp(-0.5) * sigmoid(at["w0"] + tanh(parts["w"]) @ outer["w"])
            a = scale * sigmoid(at["a0"] + parts["a"] @ outer["a"])
            g = sigmoid(parts["g"]) @ outer["g"]
            v_first = v if v_first is None else v_first
            if self.layer_index:
                v = v + (v_first - v) * sigmoid(at["v0"] + parts["v"] @ outer["v"])
            kappa = normalized(reshape(k * at["k_k"], in_heads))
            k = reshape(k * (1 + (a - 1) * at["k_a"]), in_heads)
            w, a, v = (reshape(z, in_heads) for z in (w, a, v))
            y, s = wkv7_step(r, w, k, v, -kappa, kappa * a, s)
            y = group_norm(y, gamma, beta, self.epsilon) + inner_product(r * k, r_k) * v
            return project_out(reshape(y, together) * g), v_first, (x, s)

        return step


def stepper_of(layer, batch_size, steps):
    """`stepper` of a layer that has a `mix_stepper`, and is the first of its kind in a model."""
    mix = layer.mix_stepper(batch_size, steps)
    if mix is None:
        return layer.advance_one

    def step(x_t, state):
        y, _, state = mix(x_t, state, None)
        return y, state

    return step


def _zigzag(d):
    """0, 1, -1, 0, 1, -1, ... from the second channel on."""
    return (np.arange(d) + 1) % 3 - 1.0


def _released_rank(name, d):
    """The ranks of the released models of RWKV-7."""
    if name == "g" and d == 1024:
        return 128  # no rule gives it
    factor, power = {"w": (1.8, 0.5), "a": (1.8, 0.5), "v": (1.3, 0.5), "g": (0.6, 0.8)}[name]
    return max(32, 32 * round(factor * d**power / 32))


def _check_ranks(**ranks):
    for name, rank in ranks.items():
        if not isinstance(rank, int) or rank < 1:
            raise ValueError(f"`{name}` must be a positive integer. Received: {name}={rank!r}")
