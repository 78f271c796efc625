"""Attention of a recurrent decoder to its source: what one step of a sequence reads from another sequence."""

import keras
from keras import ops
from keras.src.backend import get_keras_mask

from keras_seq import initializers
from keras_seq.base import SequenceLayer, cast, dtype_of, matches, random_seed
from keras_seq.layers.dense import matrix, project
from keras_seq.ops import alignment
from keras_seq.ops.scan import masked_scan


class Alignment(SequenceLayer):
    """Reads from a second sequence, the memory: `a_t = weights(query_t, keys)`; `y_t = sum_s a_ts memory_s`.

    The keys are made of the memory once, and are part of the state, which is `(own, (keys, values, mask))`: `own` is
    what earlier steps leave to later ones, `()` where they leave nothing.

    Call: x `(b, t, d)`, memory `(b, s, e)`, mask `(b, t)` bool, memory_mask `(b, s)` bool (True = valid) -> y
    `(b, t, e)`; with return_attention_scores=True `(y, a)`, a `(b, t, s)`; with return_state=True the state comes
    last. A state to go on from holds the memory: then none is given. `initial_state(batch_size, memory=...)` makes the
    first one. A row whose memory is all padding reads exactly 0.

    A subclass writes `build`, `keys_of(memory)`, `queries_of(x)` and `distribution(queries, keys, valid)`, all without
    state, or instead of the last `weigh(queries, keys, valid, own, training)` and `first_own(batch_size, length)`.
    """

    carries = False  # whether a step leaves something to the next
    sums_in_state = False  # the memory is kept as it is computed; what is carried is float32 all the same

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        if self.stateful:
            raise ValueError(f"{self._title} does not take stateful=True: each sequence has a memory of its own.")
        self._memory_size = None

    def build(self, x_shape, memory_shape=None):
        self._memory_size = (x_shape if memory_shape is None else memory_shape)[-1]

    def keys_of(self, memory):
        """`(b, s, e)` -> keys `(b, s, u)`."""
        return memory

    def queries_of(self, x):
        """`(b, t, d)` -> what `distribution` needs of it, `(b, t, u)`."""
        return x

    def distribution(self, queries, keys, valid):
        """Queries `(b, n, u)`, keys `(b, s, u)` and valid `(b, s)` bool -> weights `(b, n, s)`, in float32."""
        raise NotImplementedError

    def weigh(self, queries, keys, valid, own, training):
        """`distribution` of one step that also depend on `own` `(b, n, s)`: the weights, and the next `own`."""
        raise NotImplementedError

    def first_own(self, batch_size, length):
        """`own` before the first step, `(batch_size, length)`."""
        raise NotImplementedError

    # The state:

    def memory(self, value, mask=None):
        """Keys, values and mask of a memory `(b, s, e)`, made once: for `attend`."""
        value = cast(value, self.compute_dtype)
        mask = ops.ones(ops.shape(value)[:2], "bool") if mask is None else mask
        value = ops.where(mask[:, :, None], value, ops.zeros_like(value))
        return self.keys_of(value), value, mask

    def own_state(self, batch_size, memory):
        """What the steps before the first leave to it."""
        return self.first_own(batch_size, ops.shape(memory[2])[1]) if self.carries else ()

    def initial_state(self, batch_size, max_length=None, memory=None, memory_mask=None):
        """The state before the first step; without a `memory` it is of no use."""
        if memory is None:
            return (), ()
        memory = self._checked_memory(memory, memory_mask, batch_size)
        return self.own_state(batch_size, memory), memory

    def state_spec(self, batch_size):
        batch = batch_size if isinstance(batch_size, int) else None
        memory = keras.KerasTensor((batch, None, self._memory_size), self.compute_dtype)
        memory = keras.KerasTensor((batch, None, self._key_size), self.compute_dtype), memory
        own = keras.KerasTensor((batch, None), self.state_dtype) if self.carries else ()
        return own, (*memory, keras.KerasTensor((batch, None), "bool"))

    @property
    def _key_size(self):
        return self._memory_size

    def _checked_memory(self, memory, mask, batch_size):
        if self._memory_size is None:
            raise ValueError(f"{self._title} must be built before a state with a memory is made.")
        memory = ops.convert_to_tensor(memory)
        batch = batch_size if isinstance(batch_size, int) else None
        if not matches(tuple(memory.shape), (batch, None, self._memory_size)):
            raise ValueError(
                f"{self._title} expects a memory of shape (batch, time, features) = ({batch}, any, "
                f"{self._memory_size}). Received: {tuple(memory.shape)}"
            )
        mask = get_keras_mask(memory) if mask is None else ops.convert_to_tensor(mask)
        if mask is not None and (dtype_of(mask) != "bool" or not matches(tuple(mask.shape), tuple(memory.shape[:2]))):
            raise ValueError(
                f"{self._title} expects a memory_mask of dtype bool and shape (batch, time) = "
                f"{tuple(memory.shape[:2])}. Received: {dtype_of(mask)} of shape {tuple(mask.shape)}"
            )
        return self.memory(memory, mask)

    # Running:

    def call(  # type: ignore[override]
        self,
        x,
        memory=None,
        mask=None,
        memory_mask=None,
        initial_state=None,
        return_state=False,
        training=None,
        return_attention_scores=False,
    ):
        given = {}
        if memory is not None:
            if initial_state is not None:
                raise ValueError(f"{self._title} does not take a `memory` here: the state holds one already.")
            given["memory"] = self._checked_memory(memory, memory_mask, x.shape[0])
        (y, weights), state = self._run(x, mask, initial_state, return_state, training, return_weights=True, **given)
        y = (y, cast(weights, self.compute_dtype)) if return_attention_scores else (y,)
        y = (*y, state) if return_state else y
        return y if len(y) > 1 else y[0]

    def advance(self, x, state, mask=None, training=False, memory=None, return_weights=False):
        own, seen = state
        if memory is not None:
            own, seen = self.own_state(ops.shape(x)[0], memory), memory
        if not seen:
            raise ValueError(f"{self._title} reads from a second sequence. Give it as `memory`, or in the state.")
        y, weights, own = self.attend(x, seen, own, mask, training)
        return (y, weights) if return_weights else y, (own, seen)

    def attend(self, x, memory, own=(), mask=None, training=False):
        """What x `(b, t, d)` reads from a `memory`: `(y, weights, own)`, y `(b, t, e)`, weights `(b, t, s)`.

        The memory may have fewer rows than x: each is then that of equally many rows of x, one after another.
        """
        keys, values, valid = memory
        queries = self.queries_of(x)
        beams = _ratio(x, values)
        if self.carries:
            weights, own = self._weigh_each(queries, keys, valid, own, mask, training, beams)
            return _unfolded(self._read(_folded(weights, beams), values), x, beams), weights, own
        weights = self.distribution(_folded(queries, beams), keys, valid)
        return _unfolded(self._read(weights, values), x, beams), _unfolded(weights, x, beams), own

    def _read(self, weights, values):
        return cast(weights, dtype_of(values)) @ values  # `ops.matmul` would make float32 of float64

    def _weigh_each(self, queries, keys, valid, own, mask, training, beams):
        """Weights step by step, since each leaves something to the next."""
        shape = ops.shape(own)
        noise = self.noise(ops.shape(queries)[:2], shape[1]) if training else None

        def step(state, inputs):
            before = state[0]
            query, rows, *noise = (ops.reshape(v, (-1, beams, v.shape[-1])) for v in (inputs[0], before, *inputs[2:]))
            weights, after = self.weigh(query, keys, valid, rows, training, *noise)
            after = ops.reshape(after, shape)
            return ops.where(inputs[1][:, None], after, before), ops.reshape(weights, shape)

        mask = ops.ones(ops.shape(queries)[:2], "bool") if mask is None else mask
        steps = (queries, mask) if noise is None else (queries, mask, noise)
        weights, (own, _) = masked_scan(step, (own, ops.zeros_like(own)), steps, read=lambda state: state[1])
        return weights, own

    def noise(self, steps, length):
        """Random numbers `(*steps, length)` that `weigh` gets last, in training; or None."""
        return None

    def compute_output_shape(self, x_shape, memory_shape=None):
        size = self._memory_size if memory_shape is None else memory_shape[-1]
        return (*x_shape[:-1], size)


def _ratio(x, memory):
    rows, of_memory = x.shape[0], memory.shape[0]
    return rows // of_memory if isinstance(rows, int) and isinstance(of_memory, int) and of_memory else 1


def _folded(x, beams):
    """`(b beams, t, n)` -> `(b, beams t, n)`."""
    return x if beams == 1 else ops.reshape(x, (x.shape[0] // beams, -1, x.shape[-1]))


def _unfolded(y, x, beams):
    """Back to the first axes of x."""
    return y if beams == 1 else ops.reshape(y, (*ops.shape(x)[:2], y.shape[-1]))


@keras.saving.register_keras_serializable("keras_seq")
class AdditiveAttention(Alignment):
    """Attention by a small network of query and memory, as in the first translation models with attention.

    `a_ts = softmax_s(v . tanh(q_t W_q + m_s W_m + b))`; `y_t = sum_s a_ts m_s`

    Args:
        units: size of the network; default that of the query.
        use_bias: whether there is a b.
        normalize: if True v is `g v / |v|` with a learned scalar g, which starts at `units^-1/2`.
        kernel_initializer: of the matrices and of v.
        **kwargs: those of `keras.layers.Layer`.

    Call: x `(b, t, d)`, memory `(b, s, e)`, mask `(b, t)` bool, memory_mask `(b, s)` bool -> y `(b, t, e)`; also
    `return_attention_scores` (a `(b, t, s)`), `initial_state`, `return_state`. The state is
    `((), (keys, values, mask))`, keys `(b, s, units)`, values `(b, s, e)`, mask `(b, s)` bool, made by
    `initial_state(batch_size, memory=memory, memory_mask=mask)`. A row without valid memory gives exactly 0.

    Raises: ValueError for units < 1, a memory that is missing or of another shape, `stateful=True`.

    Source: Bahdanau et al. 2015, arXiv:1409.0473, section A.1.2; Salimans & Kingma 2016, arXiv:1602.07868 (normalize).

    Example:

        x, memory = keras.ops.ones((2, 5, 3)), keras.ops.ones((2, 7, 4))
        y, weights = keras_seq.layers.AdditiveAttention(8)(x, memory, return_attention_scores=True)  # (2, 5, 4)
    """

    def __init__(self, units=None, use_bias=True, normalize=False, kernel_initializer="glorot_uniform", **kwargs):
        super().__init__(**kwargs)
        if units is not None and (not isinstance(units, int) or units < 1):
            raise ValueError(f"`units` must be a positive integer. Received: units={units!r}")
        self.units, self.use_bias, self.normalize, self.kernel_initializer = (
            units,
            use_bias,
            normalize,
            kernel_initializer,
        )

    def build(self, x_shape, memory_shape=None):
        super().build(x_shape, memory_shape)
        self.units = self.units or x_shape[-1]
        of = {"kernel": self.kernel_initializer}
        self.query_dense = matrix(
            (x_shape[-1], self.units), use_bias=self.use_bias, **of, **self.policy_of_next(), name="query"
        )
        self.memory_dense = matrix(
            (self._memory_size, self.units), use_bias=False, **of, **self.policy_of_next(), name="memory"
        )
        self.v = self.add_weight(
            (self.units,), initializers.RandomUniform(-(self.units**-0.5), self.units**-0.5), name="v"
        )
        if self.normalize:
            self.gain = self.add_weight((), keras.initializers.Constant(self.units**-0.5), name="gain")

    @property
    def _key_size(self):
        return self.units

    def keys_of(self, memory):
        return project(self.memory_dense, memory)

    def queries_of(self, x):
        return project(self.query_dense, x)

    def scores(self, queries, keys, bias=None):
        """`(b, n, s)` in float32."""
        v = ops.convert_to_tensor(self.v)
        if self.normalize:
            v = self.gain * v * ops.rsqrt(ops.sum(ops.square(v)))
        return cast(alignment.additive_scores(queries, keys, v, bias), self.state_dtype)

    def distribution(self, queries, keys, valid):
        return alignment.masked_softmax(self.scores(queries, keys), valid[:, None])


@keras.saving.register_keras_serializable("keras_seq")
class CoverageAttention(AdditiveAttention):
    """Additive attention that knows how much of each step of the memory was read before.

    `a_ts = softmax_s(v . tanh(q_t W_q + m_s W_m + c_ts w_c + b))`; `c_ts = a_1s + ... + a_(t-1)s`;
    `y_t = sum_s a_ts m_s`

    Args:
        units: size of the network; default that of the query.
        use_bias: whether there is a b.
        normalize: if True v is `g v / |v|` with a learned scalar g, which starts at `units^-1/2`.
        kernel_initializer: of the matrices and of v; w_c starts at 0.
        **kwargs: those of `keras.layers.Layer`.

    Call: x `(b, t, d)`, memory `(b, s, e)`, mask `(b, t)` bool, memory_mask `(b, s)` bool -> y `(b, t, e)`; the rest as
    in `AdditiveAttention`. The state is `(c, (keys, values, mask))`, c `(b, s)` the sum of the weights so far, keys
    `(b, s, units)`, values `(b, s, e)`, mask `(b, s)` bool.

    Raises: ValueError as in `AdditiveAttention`.

    Source: Tu et al. 2016, arXiv:1601.04811; See et al. 2017, arXiv:1704.04368, eq. 10-11.

    Example:

        x, memory = keras.ops.ones((2, 5, 3)), keras.ops.ones((2, 7, 4))
        y, (c, _) = keras_seq.layers.CoverageAttention(8)(x, memory, return_state=True)  # (2, 5, 4), c (2, 7)
    """

    carries = True

    def build(self, x_shape, memory_shape=None):
        super().build(x_shape, memory_shape)
        self.coverage = self.add_weight((self.units,), "zeros", name="coverage")

    def first_own(self, batch_size, length):
        return ops.zeros((batch_size, length), self.state_dtype)

    def weigh(self, queries, keys, valid, own, training):
        bias = cast(own, self.compute_dtype)[..., None] * self.coverage
        weights = alignment.masked_softmax(self.scores(queries, keys, bias), valid[:, None])
        return weights, own + weights


@keras.saving.register_keras_serializable("keras_seq")
class MonotonicAttention(AdditiveAttention):
    """Attention that moves through the memory from its beginning to its end and never back, and so can run on line.

    `p_ts = sigmoid(g v / |v| . tanh(q_t W_q + m_s W_m + b) + r)`; in training
    `a_ts = p_ts sum_{k<=s} a_(t-1)k (1 - p_tk) ... (1 - p_t(s-1))`; else `a_ts = 1` at the first s with `p_ts > 1/2`
    from where a_(t-1) is 1 on, and 0 at all others; `a_0 = (1, 0, ..., 0)`; `y_t = sum_s a_ts m_s`

    At each step of the output the reader stops at step s with probability p_ts, or goes on to the next. In training y_t
    is the expectation over where it stops, which has a gradient; else it reads one step alone, and once it ran off the
    end it reads 0.

    Args:
        units, use_bias, kernel_initializer: as in `AdditiveAttention`.
        normalize: as in `AdditiveAttention`; here True by default.
        score_bias: what r, a learned bias of all scores, starts at; below 0 the reader starts out going far.
        noise: standard deviation of what is added to the scores in training, which drives p to 0 or 1.
        **kwargs: those of `keras.layers.Layer`.

    Call: x `(b, t, d)`, memory `(b, s, e)`, mask `(b, t)` bool, memory_mask `(b, s)` bool -> y `(b, t, e)`; the rest as
    in `AdditiveAttention`. The state is `(a, (keys, values, mask))`, a `(b, s)` the weights of the last step, keys
    `(b, s, units)`, values `(b, s, e)`, mask `(b, s)` bool.

    Raises: ValueError as in `AdditiveAttention`, and for noise < 0.

    Source: Raffel et al. 2017, arXiv:1704.00784.

    Example:

        layer = keras_seq.layers.MonotonicAttention(8, score_bias=-1.0)
        x, memory = np.random.normal(size=(2, 5, 3)), np.random.normal(size=(2, 7, 4))
        y, a = layer(x, memory, training=True, return_attention_scores=True)  # (2, 5, 4), (2, 5, 7) from 0 to 1
        y, a = layer(x, memory, return_attention_scores=True)  # (2, 5, 4), (2, 5, 7) of 0 and 1
    """

    carries = True

    def __init__(self, units=None, use_bias=True, normalize=True, score_bias=0.0, noise=0.0, **kwargs):
        super().__init__(units, use_bias, normalize, **kwargs)
        if noise < 0:
            raise ValueError(f"`noise` must be >= 0. Received: noise={noise!r}")
        self.first_score_bias, self.stddev = score_bias, noise
        self.seed_generator = keras.random.SeedGenerator(random_seed())

    def build(self, x_shape, memory_shape=None):
        super().build(x_shape, memory_shape)
        self.score_bias = self.add_weight((), keras.initializers.Constant(self.first_score_bias), name="score_bias")

    def first_own(self, batch_size, length):
        first = ops.cast(ops.arange(length) == 0, self.state_dtype)
        return ops.broadcast_to(first[None], (batch_size, length))

    def noise(self, steps, length):
        if self.stddev:
            return keras.random.normal((*steps, length), 0.0, self.stddev, self.state_dtype, self.seed_generator)
        return None

    def weigh(self, queries, keys, valid, own, training, noise=None):
        scores = self.scores(queries, keys) + cast(self.score_bias, self.state_dtype)
        scores = scores if noise is None else scores + noise
        how = alignment.monotonic_weights if training else alignment.hard_monotonic_weights
        weights = how(scores, own, valid)
        return weights, weights


_SCORES = ("dot", "general", "concat")


@keras.saving.register_keras_serializable("keras_seq")
class DotAttention(Alignment):
    """Attention by products, to the whole memory or to a window of it whose place is predicted.

    `score_ts = q_t . m_s` ("dot"), `q_t . (m_s W)` ("general"), or `v . tanh(q_t W_q + m_s W_m)` ("concat");
    `a_ts = softmax_s(score_ts)`; `y_t = sum_s a_ts m_s`. With a `window` D (local-p): `p_t = S sigmoid(v_p .
    tanh(q_t W_p))`, S the length of the memory; the softmax is over `p_t - D <= s <= p_t + D`, and a_ts is multiplied
    by `exp(-(s - p_t)^2 / (2 (D / 2)^2))`.

    Args:
        score: "dot" (query and memory of one size), "general" or "concat".
        window: D, in steps; None for the whole memory.
        units: size of the network of "concat"; default that of the query.
        kernel_initializer: of the matrices and of v.
        **kwargs: those of `keras.layers.Layer`.

    Call: x `(b, t, d)`, memory `(b, s, e)`, mask `(b, t)` bool, memory_mask `(b, s)` bool -> y `(b, t, e)`; the rest as
    in `AdditiveAttention`. The state is `((), (keys, values, mask))`, keys `(b, s, d)`, of "concat" `(b, s, units)`,
    values `(b, s, e)`, mask `(b, s)` bool.

    Raises: ValueError for an unknown score, units or window < 1, "dot" of two sizes, and as `AdditiveAttention`.

    Source: Luong et al. 2015, arXiv:1508.04025, eq. 8-10 (in eq. 8 v and W are those of "concat").

    Example:

        x, memory = keras.ops.ones((2, 5, 3)), keras.ops.ones((2, 7, 4))
        y = keras_seq.layers.DotAttention("general", window=2)(x, memory)  # (2, 5, 4)
    """

    def __init__(self, score="dot", window=None, units=None, kernel_initializer="glorot_uniform", **kwargs):
        super().__init__(**kwargs)
        if score not in _SCORES:
            raise ValueError(f"`score` must be one of {list(_SCORES)}. Received: score={score!r}")
        for name, size in {"window": window, "units": units}.items():
            if size is not None and size < 1:
                raise ValueError(f"`{name}` must be >= 1 or None. Received: {name}={size!r}")
        self.score, self.window, self.units, self.kernel_initializer = score, window, units, kernel_initializer

    def build(self, x_shape, memory_shape=None):
        super().build(x_shape, memory_shape)
        d, e = x_shape[-1], self._memory_size
        if self.score == "dot" and d != e:
            raise ValueError(
                f"{self._title}: score='dot' needs a query and a memory of one size. Received: {d} and {e}; 'general' "
                "takes any."
            )
        of = {"use_bias": False, "kernel": self.kernel_initializer}
        self.units = (self.units or d) if self.score == "concat" else d
        if self.score != "dot":
            self.memory_dense = matrix((e, self.units), **of, **self.policy_of_next(), name="memory")
        if self.score == "concat":
            self.query_dense = matrix((d, self.units), **of, **self.policy_of_next(), name="query")
            self.v = self._vector("v", self.units)
        if self.window is not None:
            self.center_dense = matrix((d, d), **of, **self.policy_of_next(), name="center")
            self.center_v = self._vector("center_v", d)

    def _vector(self, name, size):
        return self.add_weight((size,), initializers.RandomUniform(-(size**-0.5), size**-0.5), name=name)

    @property
    def _key_size(self):
        return self.units

    def keys_of(self, memory):
        return memory if self.score == "dot" else project(self.memory_dense, memory)

    def distribution(self, queries, keys, valid):
        scores = self._scores(queries, keys)
        if self.window is None:
            return alignment.masked_softmax(scores, valid[:, None])
        center = ops.sum(self.center_v * ops.tanh(project(self.center_dense, queries)), axis=-1)
        return alignment.local_weights(scores, cast(ops.sigmoid(center), self.state_dtype), valid, self.window)

    def _scores(self, queries, keys):
        if self.score == "concat":
            v = ops.convert_to_tensor(self.v)
            return cast(alignment.additive_scores(project(self.query_dense, queries), keys, v), self.state_dtype)
        return cast(queries @ ops.transpose(keys, (0, 2, 1)), self.state_dtype)
