"""Multi-head attention."""

import math

import keras
from keras import constraints, ops, regularizers
from keras.src.backend import get_keras_mask

from keras_seq.base import SequenceLayer, call_layer, cast, dtype_of, random_seed
from keras_seq.layers.dense import matrix, project
from keras_seq.layers.position import AlibiBias, RelativePositionBias, RotaryEmbedding
from keras_seq.layers.prepared import products
from keras_seq.ops import cache
from keras_seq.ops import position as position_ops
from keras_seq.ops.attention import attention, attention_to_cache, positions
from keras_seq.ops.dense import heads_of


@keras.saving.register_keras_serializable("keras_seq")
class MultiHeadAttention(SequenceLayer):
    """Multi-head attention: to the sequence itself, with a state if it is causal, or to another one.

    `q = x W_q + b_q`, `k = m W_k + b_k`, `v = m W_v + b_v`, cut into heads, where m is x or another sequence;
    `y = concat(softmax(q k^T / sqrt(key_dim)) v) W_o + b_o`.

    A drop-in for `keras.layers.MultiHeadAttention`: the same arguments in the same order, the same weights, the same
    outputs, except that a query which sees no key gives 0 (before `W_o`), where Keras averages what it must not see.

    Args:
        num_heads: number of heads of the queries.
        key_dim: size of a head of queries and keys; None for the size of the query divided by `num_heads`.
        value_dim: size of a head of the values; default `key_dim`.
        dropout: rate, on the attention weights, in training.
        use_bias: whether the projections have biases.
        output_shape: an integer or a tuple, the last axes of the output; default the size of the queries' features.
        attention_axes: the axes to attend over, for inputs of more than three; default all but the first and last.
        sliding_window: Keras's name of `window`.
        flash_attention: accepted; the backend's fused kernel runs wherever it can (see `keras_seq.kernels`).
        kernel_initializer, bias_initializer, kernel_regularizer, bias_regularizer, activity_regularizer,
            kernel_constraint, bias_constraint: of the four projections.
        use_gate: whether `sigmoid(x W_g + b_g)` multiplies the heads' outputs (arXiv:2505.06708).
        seed: of the dropout.
        causal: whether a step sees itself and the steps before it only. Then the layer has a state.
        num_kv_heads: number of heads of keys and values, a divisor of `num_heads` (grouped queries; 1: multi-query).
        position: None, `"rotary"`, `"alibi"`, `"t5"`, or a `RotaryEmbedding`, `AlibiBias` or `RelativePositionBias`.
        window: a step sees less than so many steps away, its own included; the state is then a ring of this many.
        sinks: the first so many steps are seen beyond the window (Xiao et al. 2023, arXiv:2309.17453).
        qk_norm: whether queries and keys are RMS-normalized per head.
        soft_cap: a limit of the scores: `cap tanh(s / cap)`.
        max_length: the capacity of a state that is made without one.
        **kwargs: `stateful` and those of `keras.layers.Layer`.

    Call:
        query `(b, t, d)`; value and key `(b, s, d')` of another sequence (default: the query itself, and the value);
        `mask` (or `query_mask`), `value_mask`, `key_mask`: bool, True = valid; attention_mask: bool `(b, t, s)` or
        `(b, heads, t, s)`; `return_attention_scores`; `use_causal_mask`: as `causal`, for this call; segment_ids:
        `(b, t)` int, packed sequences that do not see each other; initial_state, return_state: as in every sequence
        layer, for a causal layer that attends to its own sequence.

        The state is `(keys, values, length)`: `(b, kv_heads, capacity, head)` in the compute dtype, and `(b,)` int32,
        the number of valid steps so far.

    Raises: ValueError for head counts that do not divide, sizes < 1, a state that is full, a mask of another shape or
    dtype, a state together with `attention_mask`, `segment_ids` or another sequence, `step` on a layer that is not
    causal. In compiled code, where a full state cannot raise, the outputs from there on are NaN.

    Source: Vaswani et al. 2017, arXiv:1706.03762, sec. 3.2; Ainslie et al. 2023, arXiv:2305.13245 (grouped queries);
    Beltagy et al. 2020, arXiv:2004.05150 (window); Henry et al. 2020, arXiv:2010.04245 (norm of queries and keys).

    Example:

        layer = keras_seq.layers.MultiHeadAttention(2, 8, causal=True, position="rotary")
        state = layer.initial_state(batch_size=1, max_length=20)
        y, state = layer(keras.ops.ones((1, 5, 16)), initial_state=state, return_state=True)
        y_t, state = layer.step(keras.ops.ones((1, 16)), state)
    """

    sums_in_state = False  # keys and values are kept as they are computed

    def __init__(
        self,
        num_heads,
        key_dim,
        value_dim=None,
        dropout=0.0,
        use_bias=True,
        output_shape=None,
        attention_axes=None,
        sliding_window=None,
        flash_attention=None,
        kernel_initializer="glorot_uniform",
        bias_initializer="zeros",
        kernel_regularizer=None,
        bias_regularizer=None,
        activity_regularizer=None,
        kernel_constraint=None,
        bias_constraint=None,
        use_gate=False,
        seed=None,
        causal=False,
        num_kv_heads=None,
        position=None,
        window=None,
        sinks=0,
        qk_norm=False,
        soft_cap=None,
        max_length=1024,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.input_spec = keras.InputSpec(min_ndim=3)
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        window = sliding_window if window is None else window
        sizes = {"num_heads": num_heads, "num_kv_heads": num_kv_heads, "max_length": max_length}
        optional = {"key_dim": key_dim, "value_dim": value_dim, "window": window}
        sizes |= {k: v for k, v in optional.items() if v is not None}
        for name, size in sizes.items():
            if not isinstance(size, int) or size < 1:
                raise ValueError(f"`{name}` must be a positive integer. Received: {name}={size!r}")
        if num_heads % num_kv_heads:
            raise ValueError(f"`num_kv_heads` must divide num_heads={num_heads}. Received: num_kv_heads={num_kv_heads}")
        if not isinstance(sinks, int) or sinks < 0 or (sinks and window is None):
            raise ValueError(f"`sinks` must be an integer >= 0, and goes with a `window`. Received: sinks={sinks!r}")
        if not 0 <= dropout < 1:
            raise ValueError(f"`dropout` must be a rate from 0 to below 1. Received: dropout={dropout!r}")
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads
        self.key_dim, self.value_dim = key_dim, value_dim or key_dim
        self.dropout, self.use_bias, self.use_gate = dropout, use_bias, use_gate
        self._output_shape = (output_shape,) if isinstance(output_shape, int) else tuple(output_shape or ())
        self.attention_axes = (attention_axes,) if isinstance(attention_axes, int) else attention_axes
        self.causal, self.window, self.sinks, self.soft_cap = causal, window, sinks, soft_cap
        self.max_length = max_length
        if self.stateful:
            self._require_splittable("stateful=True")
        self._matrices = {
            "kernel": kernel_initializer,
            "bias": bias_initializer,
            "kernel_regularizer": regularizers.get(kernel_regularizer),
            "bias_regularizer": regularizers.get(bias_regularizer),
            "activity_regularizer": regularizers.get(activity_regularizer),
            "kernel_constraint": constraints.get(kernel_constraint),
            "bias_constraint": constraints.get(bias_constraint),
        }
        self.position = _position(position, num_heads, causal)
        self.query_norm, self.key_norm = (
            (keras.layers.RMSNormalization(dtype=self.dtype_policy, name=f"{name}_norm") if qk_norm else None)
            for name in ("query", "key")
        )
        self._drop = keras.layers.Dropout(dropout, seed=random_seed() if seed is None else seed)

    def build(self, query_shape, value_shape=None, key_shape=None):
        self.input_spec = keras.InputSpec(min_ndim=3, axes={-1: query_shape[-1]})
        value_shape = tuple(query_shape if value_shape is None else value_shape)
        key_shape = tuple(value_shape if key_shape is None else key_shape)
        if value_shape[1:-1] != key_shape[1:-1]:
            raise ValueError(
                f"{self._title}: key and value need the same steps. Received: key {key_shape}, value {value_shape}"
            )
        query_size = query_shape[-1]
        if self.key_dim is None and query_size % self.num_heads:
            raise ValueError(
                f"{self._title}: `num_heads` must divide the size of the query, or `key_dim` be given. Received: "
                f"num_heads={self.num_heads}, a query of shape {tuple(query_shape)}"
            )
        self.key_dim = self.key_dim or query_size // self.num_heads
        self.value_dim = self.value_dim or self.key_dim
        heads = {"query": (query_size, self.num_heads, self.key_dim)}
        heads["key"] = (key_shape[-1], self.num_kv_heads, self.key_dim)
        if self.use_gate:
            heads["gate"] = (query_size, self.num_heads, self.value_dim)
        heads["value"] = (value_shape[-1], self.num_kv_heads, self.value_dim)
        for name, shape in heads.items():
            setattr(self, f"{name}_dense", self._matrix(shape, name))
        output = self._output_shape or (query_size,)
        self.output_dense = self._matrix((self.num_heads, self.value_dim, *output), "attention_output", axes=2)
        for norm in (self.query_norm, self.key_norm):
            if norm is not None:
                norm.build((None, None, None, self.key_dim))
        if self.position is not None and not self.position.built:
            self.position.build((None, None, self.key_dim))

    def _matrix(self, shape, name, axes=1):
        return matrix(shape, axes, self.use_bias, **self._matrices, **self.policy_of_next(), name=name)

    @property
    def needs_future(self):
        return None if self.causal else "it attends to what comes after; causal=True makes it causal"

    def compute_output_shape(self, query_shape, value_shape=None, key_shape=None):
        return (*query_shape[:-1], *(self._output_shape or query_shape[-1:]))

    def initial_state(self, batch_size, max_length=None):
        """`(keys, values, length)` of no step yet, with room for `max_length` steps; `()` if not causal."""
        if not self.causal:
            return ()
        if self.key_dim is None:
            raise ValueError(
                f"{self._title} has no size yet: give `key_dim`, or build it before its first state is made."
            )
        capacity = self._capacity(self.max_length if max_length is None else max_length)
        keys, values = (
            ops.zeros((batch_size, self.num_kv_heads, capacity, size), self.compute_dtype)
            for size in (self.key_dim, self.value_dim)
        )
        return keys, values, ops.zeros((batch_size,), "int32")

    def fresh_state(self, batch_size):
        return ()

    def state_spec(self, batch_size):
        if not self.causal:
            return ()
        batch = batch_size if isinstance(batch_size, int) else None
        keys, values = (
            keras.KerasTensor((batch, self.num_kv_heads, None, size), self.compute_dtype)
            for size in (self.key_dim, self.value_dim)
        )
        return keys, values, keras.KerasTensor((batch,), "int32")

    def _capacity(self, max_length):
        return max_length if self.window is None else min(max_length, self.window + self.sinks)

    def __call__(self, query, *args, **kwargs):  # type: ignore[override]
        return super().__call__(query, *args, **kwargs)

    def call(  # type: ignore[override]
        self,
        query,
        value=None,
        key=None,
        query_mask=None,
        value_mask=None,
        key_mask=None,
        attention_mask=None,
        return_attention_scores=False,
        training=None,
        use_causal_mask=False,
        mask=None,
        segment_ids=None,
        initial_state=None,
        return_state=False,
    ):
        own = len(query.shape) == 3 and (value is None or value is query) and (key is None or key is query)
        mask = query_mask if mask is None else mask
        given = {"causal": self.causal or use_causal_mask, "return_weights": return_attention_scores}
        stateful = return_state or bool(initial_state)
        whole = {
            "attention_mask": attention_mask,
            "segment_ids": segment_ids,
            "a sequence of its own": None if own else 1,
        }
        for name in (name for name, it in whole.items() if it is not None):
            if stateful or self.stateful:
                raise ValueError(f"{self._title} does not take {name} together with a state.")
        if attention_mask is not None:
            given["attention_mask"] = self._checked_attention_mask(attention_mask)
        if not own:
            return self._attend_to_another(query, value, key, (value_mask, key_mask), training, given)
        if segment_ids is not None:
            given["segments"] = self._checked_segments(segment_ids, query)
        if stateful:
            self._require_splittable("a state")
        mask = _both(get_keras_mask(query) if mask is None else mask, value_mask)
        y, state = self._run(query, mask, initial_state, return_state, training, **given)
        if return_attention_scores:
            y = y[0], cast(y[1], self.compute_dtype)
        if return_state:
            return (*y, state) if return_attention_scores else (y, state)
        return y

    def advance(
        self,
        x,
        state,
        mask=None,
        training=False,
        causal=None,
        attention_mask=None,
        segments=None,
        return_weights=False,
    ):
        """As in every sequence layer; with `return_weights` y is `(y, weights)`. From the state `()` there is none."""
        causal, time = self.causal if causal is None else causal, ops.shape(x)[1]
        query, key, value = self._heads("query", x), self._heads("key", x), self._heads("value", x)
        if segments is not None:
            at = position_ops.segment_positions(segments)
        elif state:
            at = _positions(state[2], mask, time)
        else:
            needed = self.position is not None or (self.window is not None and mask is not None)
            at = _positions(0, mask, time) if needed else None
        query, key = self._rotated(query, at), self._rotated(key, at)
        given = {"causal": causal, "query_positions": at, "return_weights": return_weights}
        if state:
            heads, state = self._attend_to_cache(query, key, value, state, mask, training, given)
        else:
            given |= {"key_mask": mask, "query_segments": segments, "attention_mask": attention_mask}
            heads = self._attention(query, key, value, training, given)
        return self._output(heads, x), state

    def stepper(self, batch_size, steps=1):
        """One product for queries, keys and values, and no analysis of what a step sees."""
        joined = products(self.query_dense, self.key_dense, self.value_dense, rows=batch_size, steps=steps)
        output = products(self.output_dense, rows=batch_size, steps=steps)
        if not self.causal or self.use_gate or self.key_dim != self.value_dim or joined is None or output is None:
            return self.advance_one
        counts, size = (self.num_heads, self.num_kv_heads, self.num_kv_heads), self.key_dim
        rotary = isinstance(self.position, RotaryEmbedding)
        plain = self.window is None and self.soft_cap is None and (rotary or self.position is None)

        def step(x, state):
            query, key, value = heads_of(joined(x), counts, size)
            if self.query_norm is not None:
                query, key = call_layer(self.query_norm, query), call_layer(self.key_norm, key)
            at = None if plain and not rotary else state[2][:, None]
            if rotary:
                query, key = self._rotated(query, at), self._rotated(key, at)
            if plain:
                heads, state = self._attend_to_all(query, key, value, state)
            else:
                given = {"causal": True, "query_positions": at}
                heads, state = self._attend_to_cache(query, key, value, state, None, False, given)
            return output(heads), state

        return step

    def _attend_to_all(self, query, key, value, state):
        """As `_attend_to_cache`, for one step that sees all steps before it."""
        keys, values, before = state
        after = cache.longer(before, 1)
        full = self._full(after, keys.shape[2])
        heads, keys, values = attention_to_cache(query, key, value, keys, values, before, after)
        heads = heads if full is None else ops.where(full[:, None, None, None], float("nan"), heads)
        return heads, (keys, values, after)

    def _attend_to_cache(self, query, key, value, state, mask, training, given):
        """The heads' outputs, and the state with the new steps in it."""
        keys, values, before = state
        capacity, time = keys.shape[2], query.shape[2]
        ring = self.window is not None and capacity == self.window + self.sinks
        sinks = self.sinks if ring else None
        length = cache.longer(before, ops.shape(query)[2], mask)
        new_keys, new_values = (
            cache.write(buffer, new, before, length, mask, sinks) for buffer, new in ((keys, key), (values, value))
        )
        if not ring:
            full = self._full(length, capacity)
            if mask is None:
                given |= {"lengths": length, "query_positions": None}
            else:
                given["key_positions"] = ops.arange(capacity, dtype="int32")[None]
            heads = self._attention(query, new_keys, new_values, training, given)
            heads = heads if full is None else ops.where(full[:, None, None, None], float("nan"), heads)
        elif time == 1:
            given["key_positions"] = cache.held_positions(length, capacity, sinks)
            heads = self._attention(query, new_keys, new_values, training, given)
        else:  # the chunk itself may push out what its first steps still see
            held = cache.held_positions(before, capacity, sinks)
            given["key_positions"] = ops.concatenate([held, given["query_positions"]], axis=1)
            if mask is not None:
                given["key_mask"] = ops.concatenate([ops.ones_like(held, "bool"), mask], axis=1)
            key, value = ops.concatenate([keys, key], axis=2), ops.concatenate([values, value], axis=2)
            heads = self._attention(query, key, value, training, given)
        return heads, (new_keys, new_values, length)

    def _full(self, length, capacity):
        """Which rows are beyond the capacity, in compiled code, where it cannot raise; else None."""
        longest = cache.longest(length)
        if longest is None:
            return length > capacity
        if longest > capacity:
            raise ValueError(
                f"The state of {self._title} is full: it has room for {capacity} steps, and this is number {longest}. "
                "Make it with initial_state(batch_size, max_length)."
            )
        return None

    def memory(self, value, mask=None, key=None):
        """Keys and values `(b, kv_heads, s, size)` of another sequence, and its mask, computed once: for `attend`."""
        if mask is not None:
            value, key = (None if x is None else _zero_where_padded(x, mask) for x in (value, key))
        keys, values = self._heads("key", value if key is None else key), self._heads("value", value)
        return keys, values, mask

    def memory_stepper(self, batch_size, steps=1):
        """`attend` on single steps `(b, d)`, made ready as by `stepper`."""
        made = {"rows": batch_size, "steps": steps}
        queries, output = products(self.query_dense, **made), products(self.output_dense, **made)
        if self.query_norm is not None or self.use_gate or queries is None or output is None:
            return lambda x, memory: self.attend(x[:, None], memory)[:, 0]

        def step(x, memory):
            keys, values, mask = memory
            (query,) = heads_of(queries(x), (self.num_heads,), self.key_dim)
            alike = _rows_alike(x, keys)
            if alike == 1:
                return output(self._attention(query, keys, values, False, {"key_mask": mask}))
            query = ops.transpose(ops.reshape(query, (-1, alike, *query.shape[1::2])), (0, 2, 1, 3))
            heads = self._attention(query, keys, values, False, {"key_mask": mask})
            return output(ops.reshape(ops.transpose(heads, (0, 2, 1, 3)), (x.shape[0], -1)))

        return step

    def attend(self, query, memory, training=False, return_weights=False):
        """The output for queries `(b, t, d)` that attend to a `memory`; or `(output, weights (b, heads, t, s))`.

        The memory may have fewer rows than the queries: each is then that of equally many rows, one after another.
        """
        keys, values, mask = memory
        shape, alike = ops.shape(query), _rows_alike(query, keys)
        if alike > 1:  # their queries are as many steps of one row, for no step sees another
            query = ops.reshape(query, (-1, alike * shape[1], shape[2]))
        given = {"key_mask": mask, "return_weights": return_weights}
        y = self._output(self._attention(self._heads("query", query), keys, values, training, given), query)
        y, *weights = y if return_weights else (y,)
        if alike > 1:
            y = ops.reshape(y, (*shape[:2], *y.shape[2:]))
            weights = [_of_rows(w, alike) for w in weights]
        return (y, *weights) if weights else y

    def _attention(self, query, key, value, training, given):
        """Attention of heads, with what the layer's arguments add to the given structure."""
        given = {k: v for k, v in given.items() if v is not None and v is not False}
        if isinstance(self.position, AlibiBias):
            given["slopes"] = self.position.slopes
        elif isinstance(self.position, RelativePositionBias):
            names = "query_positions", "key_positions", "lengths"
            at = positions(ops.shape(query)[2], ops.shape(key)[2], *(given.get(name) for name in names))
            given["bias"] = self.position(*at)
        if training and self.dropout:
            given["dropout"] = lambda weights: self._drop(weights, training=True)
        options = {"window": self.window, "sinks": self.sinks, "soft_cap": self.soft_cap}
        given |= {k: v for k, v in options.items() if v}
        return attention(query, key, value, **given)

    def _heads(self, name, x):
        """`(b, heads, t, size)`, normalized."""
        layer, norm = getattr(self, f"{name}_dense"), getattr(self, f"{name}_norm", None)
        y = project(layer, x)
        return ops.transpose(y if norm is None else call_layer(norm, y), (0, 2, 1, 3))

    def _rotated(self, heads, at):
        return self.position.rotate(heads, at) if isinstance(self.position, RotaryEmbedding) else heads

    def _output(self, heads, x):
        """From the heads' outputs `(b, heads, t, size)` to y; if they come with weights, so does y."""
        heads, *weights = heads if isinstance(heads, tuple) else (heads,)
        heads = ops.transpose(heads, (0, 2, 1, 3))
        if self.use_gate:
            heads = heads * ops.sigmoid(project(self.gate_dense, x))
        y = project(self.output_dense, heads)
        return (y, *weights) if weights else y

    def _attend_to_another(self, query, value, key, masks, training, given):
        """Keras's call: queries and keys of two sequences, or of more axes, each counted from its beginning."""
        value = query if value is None else value
        key = value if key is None else key
        query, key, value = (cast(x, self.compute_dtype) for x in (query, key, value))
        key_mask = _both(*masks)
        if len(query.shape) > 3:
            return self._attend_over_axes(query, key, value, key_mask, training, given)
        keys, values, key_mask = self.memory(value, key_mask, key)
        query_at, key_at = (ops.arange(ops.shape(x)[1], dtype="int32")[None] for x in (query, key))
        given |= {"key_mask": key_mask, "query_positions": query_at, "key_positions": key_at}
        heads = self._rotated(self._heads("query", query), query_at)
        y = self._output(self._attention(heads, self._rotated(keys, key_at), values, bool(training), given), query)
        return (y[0], cast(y[1], self.compute_dtype)) if given["return_weights"] else y

    def _attend_over_axes(self, query, key, value, key_mask, training, given):
        """The axes attended over become one, and all others part of the batch."""
        rank = len(query.shape)
        axes = tuple(axis % rank for axis in self.attention_axes or range(1, rank - 1))
        others = tuple(axis for axis in range(1, rank - 1) if axis not in axes)
        order = (0, *others, *axes, rank - 1)

        def flat(x):
            x = ops.transpose(x, order)
            return ops.reshape(x, (-1, math.prod(ops.shape(x)[1 + len(others) : -1]), x.shape[-1]))

        batch = [ops.shape(query)[axis] for axis in (0, *others)]
        queries, keys = ([ops.shape(x)[axis] for axis in axes] for x in (query, key))
        if key_mask is not None:
            key_mask = flat(key_mask[..., None])[..., 0]
        if "attention_mask" in given:
            shape = (-1, math.prod(queries), math.prod(keys))
            given = given | {"attention_mask": ops.reshape(given["attention_mask"], shape)}
        y = self._attend_to_another(flat(query), flat(value), flat(key), (key_mask, None), training, given)
        y, *weights = y if given["return_weights"] else (y,)
        y = ops.reshape(y, (*batch, *queries, *y.shape[2:]))
        back = sorted(range(rank - 1), key=(0, *others, *axes).index)
        y = ops.transpose(y, (*back, *range(rank - 1, len(y.shape))))
        weights = [ops.reshape(w, (*batch, self.num_heads, *queries, *keys)) for w in weights]
        return (y, *weights) if weights else y

    def _checked_attention_mask(self, mask):
        if (dtype_of(mask) != "bool" and "int" not in dtype_of(mask)) or len(mask.shape) < 3:
            raise ValueError(
                f"{self._title} expects an attention_mask of dtype bool and shape (batch, time, keys) or "
                f"(batch, heads, time, keys). Received: {dtype_of(mask)} of shape {tuple(mask.shape)}"
            )
        return cast(mask, "bool")

    def _checked_segments(self, segments, x):
        if "int" not in dtype_of(segments) or len(segments.shape) != 2:
            raise ValueError(
                f"{self._title} expects integer segment_ids of shape (batch, time) = {tuple(x.shape[:2])}. "
                f"Received: {dtype_of(segments)} of shape {tuple(segments.shape)}"
            )
        return cast(segments, "int32")


def _rows_alike(x, memory):
    """How many rows of x share one row of the memory."""
    rows, of_memory = x.shape[0], memory.shape[0]
    return rows // of_memory if isinstance(rows, int) and isinstance(of_memory, int) and of_memory else 1


def _positions(start, mask, time):
    """The positions of queries; a padded one stands at the last valid step before it, and sees what that one saw."""
    at = position_ops.positions(start, mask, time)
    return at if mask is None else at - ops.cast(ops.logical_not(mask), "int32")


def _of_rows(weights, alike):
    """Weights `(b, heads, alike t, s)` as `(b alike, heads, t, s)`."""
    _, heads, _, length = weights.shape
    weights = ops.transpose(
        ops.reshape(weights, (-1, heads, alike, weights.shape[2] // alike, length)), (0, 2, 1, 3, 4)
    )
    return ops.reshape(weights, (-1, heads, weights.shape[3], length))


def _both(a, b):
    return a if b is None else b if a is None else ops.logical_and(a, b)


def _zero_where_padded(x, mask):
    return ops.where(mask[:, :, None], x, ops.zeros_like(x))


def _position(position, num_heads, causal):
    if position is None or isinstance(position, RotaryEmbedding | AlibiBias | RelativePositionBias):
        return position
    named = {
        "rotary": lambda: RotaryEmbedding(),
        "alibi": lambda: AlibiBias(num_heads),
        "t5": lambda: RelativePositionBias(num_heads, bidirectional=not causal),
    }
    if position not in named:
        raise ValueError(
            f"`position` must be None, one of {list(named)}, or a RotaryEmbedding, AlibiBias or RelativePositionBias. "
            f"Received: {position!r}"
        )
    return named[position]()
