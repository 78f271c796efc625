"""Layers that tell where a step stands: added to the input, turned into it, or as a bias of attention."""

import keras
from keras import constraints, ops, regularizers
from keras.src.backend.common.symbolic_scope import in_symbolic_scope  # where sizes and values are made up by Keras

from keras_seq import initializers
from keras_seq.base import Configured, SequenceLayer, cast
from keras_seq.ops import position


class Positional(SequenceLayer):
    """What the layers over time share that look at nothing but the position: the number of valid steps before.

    Padding does not count, so a row is encoded as it would be alone. A subclass writes `encode`.
    """

    def initial_state(self, batch_size, max_length=None):
        return ops.zeros((batch_size,), "int32")

    def encode(self, x, positions, mask=None):
        """x `(b, t, ...)` at the given positions, `(b, t)` integers or what broadcasts to it: `(b, t, ...)`.

        For positions that are not a count, such as those of `keras_seq.ops.segment_positions`. A padded step, where
        mask `(b, t)` is False, may have any position.
        """
        raise NotImplementedError

    def advance(self, x, state, mask=None, training=False):
        self._assert_input_compatibility(x)  # also as a part of another layer, which does not go through `__call__`
        time = ops.shape(x)[1]
        y = self.encode(x, position.positions(state, mask, time), mask)
        return y, state + (time if mask is None else ops.sum(ops.cast(mask, "int32"), axis=1))

    def advance_one(self, x_t, state):
        return self.encode(x_t[:, None], state[:, None])[:, 0], state + 1


@keras.saving.register_keras_serializable("keras_seq")
class SinusoidalPositionalEncoding(Positional):
    """Adds sines and cosines of the position.

    `y = x + P[p]`, `P[p, 2i] = sin(p / base^(2i / d))`, `P[p, 2i + 1] = cos(p / base^(2i / d))`, where p is the number
    of valid steps before this one.

    Args:
        max_wavelength: base; the longest wavelength is 2 pi times it (nearly).
        interleaved: if True sines and cosines alternate, as in the paper; else all sines come before all cosines, as
            in Marian.
        **kwargs: `stateful` and those of `keras.layers.Layer`.

    Call: x `(b, t, d)`, mask `(b, t)` bool -> y `(b, t, d)`; state: number of valid steps so far, `(b,)` int32.

    Raises: ValueError if d is odd.

    Source: Vaswani et al. 2017, arXiv:1706.03762, section 3.5.

    Example:

        layer = keras_seq.layers.SinusoidalPositionalEncoding()
        x, mask = keras.ops.zeros((1, 4, 6)), np.array([[False, True, True, True]])
        y, p = layer(x, mask=mask, return_state=True)  # (1, 4, 6), [3]: padding does not count
        y_t, p = layer.step(keras.ops.zeros((1, 6)), p)  # (1, 6), [4]
    """

    def __init__(self, max_wavelength=10000.0, interleaved=True, **kwargs):
        super().__init__(**kwargs)
        self.max_wavelength = max_wavelength
        self.interleaved = interleaved
        self.input_spec = keras.InputSpec(ndim=3)

    def build(self, input_shape):
        d_model = input_shape[-1]
        if d_model is None or d_model % 2:
            raise ValueError(f"{self._title} needs an even number of features. Received: {tuple(input_shape)}")
        self.input_spec = keras.InputSpec(ndim=3, axes={-1: d_model})

    def encode(self, x, positions, mask=None):
        x = cast(x, self.compute_dtype)
        table = position.sinusoidal(positions, x.shape[-1], self.max_wavelength, self.interleaved, self.state_dtype)
        return x + cast(table, self.compute_dtype)


@keras.saving.register_keras_serializable("keras_seq")
class LearnedPositionalEncoding(Positional):
    """Adds a learned vector for each position.

    `y = x + E[p]`, where p is the number of valid steps before this one.

    Args:
        max_length: number of positions. A valid step at a position beyond them raises; where the position is known only
            when compiled code runs (`fit` and `predict` on TensorFlow and JAX), which cannot raise, y is NaN at that
            step, so that the loss is too. Padded steps do neither.
        embeddings_initializer: of E; default uniform between -0.05 and 0.05.
        embeddings_regularizer, embeddings_constraint: of E.
        **kwargs: `stateful` and those of `keras.layers.Layer`.

    Call: x `(b, t, d)`, mask `(b, t)` bool -> y `(b, t, d)`; state: number of valid steps so far, `(b,)` int32.

    Weights: embeddings E `(max_length, d)`.

    Raises: ValueError if max_length < 1, or at a position beyond it.

    Source: Gehring et al. 2017, arXiv:1705.03122, section 3.1.

    Example:

        layer = keras_seq.layers.LearnedPositionalEncoding(max_length=8)
        y, p = layer(keras.ops.ones((2, 5, 4)), return_state=True)  # (2, 5, 4), [5, 5]
        y_t, p = layer.step(keras.ops.ones((2, 4)), p)  # (2, 4), [6, 6]
    """

    def __init__(
        self,
        max_length,
        embeddings_initializer="uniform",
        embeddings_regularizer=None,
        embeddings_constraint=None,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.max_length = position.positive("max_length", max_length)
        self.embeddings_initializer = initializers.get(embeddings_initializer)
        self.embeddings_regularizer = regularizers.get(embeddings_regularizer)
        self.embeddings_constraint = constraints.get(embeddings_constraint)
        self.input_spec = keras.InputSpec(ndim=3)

    def build(self, input_shape):
        self.input_spec = keras.InputSpec(ndim=3, axes={-1: input_shape[-1]})
        self.embeddings = self.add_weight(
            (self.max_length, input_shape[-1]),
            self.embeddings_initializer,
            autocast=False,  # the rows that are read are cast, not the table
            regularizer=self.embeddings_regularizer,
            constraint=self.embeddings_constraint,
            name="embeddings",
        )

    def encode(self, x, positions, mask=None):
        x = cast(x, self.compute_dtype)
        beyond = positions >= self.max_length
        beyond = beyond if mask is None else ops.logical_and(beyond, mask)
        checked = self._check_length(x, positions, beyond, mask)
        index = ops.clip(positions, 0, self.max_length - 1)  # beyond it, backends differ in what they read
        y = x + cast(ops.take(self.embeddings, index, axis=0), self.compute_dtype)
        return y if checked else ops.where(ops.expand_dims(beyond, -1), float("nan"), y)

    def _check_length(self, x, positions, beyond, mask):
        """Raises if a valid step is known to be beyond the table; whether it is known that none is."""
        time = x.shape[1]
        if in_symbolic_scope():
            return False
        known = _known(ops.any(beyond))
        if known is None and mask is None and isinstance(time, int) and time > self.max_length:
            raise ValueError(
                f"{self._title} has max_length={self.max_length} positions. Received a sequence of {time} steps."
            )
        if known:
            last = int(_known(ops.max(ops.where(beyond, positions, 0))))
            raise ValueError(
                f"{self._title} has max_length={self.max_length} positions, from 0 on. "
                f"Received a sequence of {time} steps that reaches position {last}."
            )
        return known is not None


@keras.saving.register_keras_serializable("keras_seq")
class RotaryEmbedding(Positional):
    """Rotary position embedding: turns pairs of features by angles proportional to the position.

    `(y_i, y_j) = (x_i cos(p w_k) - x_j sin(p w_k), x_j cos(p w_k) + x_i sin(p w_k))` for the k-th pair (i, j),
    `w_k = base^(-2k / dim)`, where p is the number of valid steps before this one.

    Args:
        base: theta.
        scaling: None, or a dict such as `{"rope_type": "linear", "factor": 2.0}`, for longer sequences than a model was
            trained on: "linear", "ntk", "yarn" or "llama3", with the entries of Hugging Face's `rope_scaling`. See
            `keras_seq.ops.rotary_frequencies`.
        interleaved: if False pairs are a half apart, `(k, k + dim / 2)` (GPT-NeoX, Llama on Hugging Face); if True they
            are neighbours, `(2k, 2k + 1)` (the paper, GPT-J, Meta's own files of Llama).
        dim: how many of the features, the first ones, are turned; default all.
        **kwargs: `stateful` and those of `keras.layers.Layer`.

    Call: x `(b, t, d)` or `(b, t, h, d)`, mask `(b, t)` bool -> y of the shape of x; state: number of valid steps so
    far, `(b,)` int32.

    Raises: ValueError if dim or d is odd, if dim > d, or if the scaling is unknown or lacks an entry.

    Source: Su et al. 2021, arXiv:2104.09864, eq. 34.

    Example:

        queries = keras.ops.ones((2, 5, 4, 8))  # 4 heads
        turned = keras_seq.layers.RotaryEmbedding()(queries)  # (2, 5, 4, 8)
        rotary = keras_seq.layers.RotaryEmbedding(scaling={"rope_type": "linear", "factor": 2.0})
        y = keras_seq.layers.MultiHeadAttention(4, 8, position=rotary)(keras.ops.ones((2, 5, 32)))  # (2, 5, 32)
    """

    def __init__(self, base=10000.0, scaling=None, interleaved=False, dim=None, **kwargs):
        super().__init__(**kwargs)
        self.base = base
        self.scaling = scaling
        self.interleaved = interleaved
        self.dim = dim
        self.input_spec = keras.InputSpec(min_ndim=3, max_ndim=4)
        self._features = None
        position.rotary_frequencies(4 if dim is None else dim, base, scaling)  # so that what is wrong raises here

    def build(self, input_shape):
        self.input_spec = keras.InputSpec(min_ndim=3, max_ndim=4, axes={-1: input_shape[-1]})
        self._prepare(input_shape[-1])

    def rotate(self, x, positions):
        """Queries or keys x `(b, h, t, d)` at positions `(b, t)` or `(t,)`: `(b, h, t, d)` in the dtype of x."""
        self._prepare(x.shape[-1])
        return position.rotate(x, positions, self._frequencies, self._factor, self.interleaved)

    def encode(self, x, positions, mask=None):
        x = cast(x, self.compute_dtype)
        if len(x.shape) == 3:
            return self.rotate(x[:, None], positions)[:, 0]
        return ops.swapaxes(self.rotate(ops.swapaxes(x, 1, 2), positions), 1, 2)

    def _prepare(self, features):
        if features == self._features:
            return
        dim = features if self.dim is None else self.dim
        if features is None or dim > features or dim % 2:
            raise ValueError(
                f"{self._title} turns pairs of features, of which it needs an even number. "
                f"Received: {features} features, dim={self.dim}"
            )
        self._frequencies, self._factor = position.rotary_frequencies(dim, self.base, self.scaling)
        self._features = features


@keras.saving.register_keras_serializable("keras_seq")
class AlibiBias(Configured):
    """Attention with linear biases: the further a key, the less it counts.

    `B[k, i, j] = -m_k |q_i - k_j|`, to be added to the scores of head k before the softmax.

    Args:
        num_heads: h; the slopes m are 2^(-8 k / h), k = 1 ... h, for a power of two (see `keras_seq.ops.alibi_slopes`).
        **kwargs: those of `keras.layers.Layer`.

    Call: query_positions `(tq,)` or `(b, tq)`, key_positions `(tk,)` or `(b, tk)`, integers -> `(h, tq, tk)`, or
    `(b, h, tq, tk)` if one of them has a batch, in float32 (float64 under float64). It has no state.

    Raises: ValueError if num_heads < 1.

    Source: Press et al. 2021, arXiv:2108.12409.

    Example:

        alibi = keras_seq.layers.AlibiBias(num_heads=4)
        bias = alibi(keras.ops.arange(5), keras.ops.arange(7))  # (4, 5, 7)
        layer = keras_seq.layers.MultiHeadAttention(4, 8, causal=True, position=alibi)  # adds it to the scores
        y = layer(keras.ops.ones((2, 5, 32)))  # (2, 5, 32)
    """

    def __init__(self, num_heads, **kwargs):
        super().__init__(**kwargs)
        self.num_heads = num_heads
        self._slopes = position.alibi_slopes(num_heads)

    @property
    def slopes(self):
        """m `(h,)`, a NumPy array."""
        return self._slopes

    def call(self, query_positions, key_positions):
        dtype = "float64" if self.compute_dtype == "float64" else "float32"
        distance = ops.cast(ops.abs(_relative(query_positions, key_positions)), dtype)
        slopes = ops.convert_to_tensor(self._slopes.astype(dtype)[:, None, None])
        return -slopes * ops.expand_dims(distance, -3)


@keras.saving.register_keras_serializable("keras_seq")
class RelativePositionBias(Configured):
    """T5's bias of attention: a learned number for each head and each bucket of relative positions.

    `B[h, i, j] = E[bucket(k_j - q_i), h]`, to be added to the scores before the softmax. Near distances have a bucket
    each, far ones share buckets that widen logarithmically (see `keras_seq.ops.relative_buckets`).

    Args:
        num_heads: h.
        bidirectional: whether keys after the query have buckets of their own (encoders) or none (decoders).
        num_buckets: number of buckets, of both directions together.
        max_distance: from here on all distances share a bucket.
        embeddings_initializer: of E; default uniform between -0.05 and 0.05.
        embeddings_regularizer, embeddings_constraint: of E.
        **kwargs: those of `keras.layers.Layer`.

    Call: query_positions `(tq,)` or `(b, tq)`, key_positions `(tk,)` or `(b, tk)`, integers -> `(h, tq, tk)`, or
    `(b, h, tq, tk)` if one of them has a batch, in the dtype of the weight. It has no state.

    Weights: embeddings E `(num_buckets, h)`.

    Raises: ValueError if num_heads < 1, or if the buckets cannot be made.

    Source: Raffel et al. 2019, arXiv:1910.10683, section 2.1.

    Example:

        relative = keras_seq.layers.RelativePositionBias(num_heads=4, bidirectional=False)
        bias = relative(keras.ops.arange(5), keras.ops.arange(7))  # (4, 5, 7)
        layer = keras_seq.layers.MultiHeadAttention(4, 8, causal=True, position=relative)  # adds it to the scores
        y = layer(keras.ops.ones((2, 5, 32)))  # (2, 5, 32)
    """

    def __init__(
        self,
        num_heads,
        bidirectional=True,
        num_buckets=32,
        max_distance=128,
        embeddings_initializer="uniform",
        embeddings_regularizer=None,
        embeddings_constraint=None,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.num_heads = position.positive("num_heads", num_heads)
        self.bidirectional = bidirectional
        self.num_buckets = num_buckets
        self.max_distance = max_distance
        self.embeddings_initializer = initializers.get(embeddings_initializer)
        self.embeddings_regularizer = regularizers.get(embeddings_regularizer)
        self.embeddings_constraint = constraints.get(embeddings_constraint)
        position.bucket_table(bidirectional, num_buckets, max_distance)  # so that what is wrong raises here

    def build(self, query_positions_shape=None, key_positions_shape=None):
        self.embeddings = self.add_weight(
            (self.num_buckets, self.num_heads),
            self.embeddings_initializer,
            autocast=False,  # biases of scores are float32, as the softmax is
            regularizer=self.embeddings_regularizer,
            constraint=self.embeddings_constraint,
            name="embeddings",
        )

    def call(self, query_positions, key_positions):
        relative = _relative(query_positions, key_positions)
        buckets = position.relative_buckets(relative, self.bidirectional, self.num_buckets, self.max_distance)
        return ops.moveaxis(ops.take(self.embeddings, buckets, axis=0), -1, -3)


def _relative(query_positions, key_positions):
    """Position of the key - position of the query, `(tq, tk)` or `(b, tq, tk)`."""
    query, key = ops.cast(query_positions, "int32"), ops.cast(key_positions, "int32")
    return ops.expand_dims(key, -2) - ops.expand_dims(query, -1)


def _known(x):
    """The value of a number as NumPy, or None while a function is being compiled or exported, when it has none yet."""
    try:
        return ops.convert_to_numpy(x)
    except (TypeError, NotImplementedError, RuntimeError):  # what JAX, TensorFlow and PyTorch say of a traced array
        return None
