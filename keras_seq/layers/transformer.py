"""The blocks of Transformers."""

from typing import Any

import keras
from keras import ops
from keras.src.backend import get_keras_mask

from keras_seq.base import SequenceLayer, call_layer, cast, dtype_of, matches, random_seed
from keras_seq.layers.attention import MultiHeadAttention
from keras_seq.layers.feedforward import FeedForward
from keras_seq.layers.prepared import norm_of

NORMS = {"layer": keras.layers.LayerNormalization, "rms": keras.layers.RMSNormalization}


class TransformerBlock(SequenceLayer):
    """Self-attention and a feed-forward network, each on a residual branch with a norm before or after it.

    Before ("pre"): `x = x + f(norm(x))`; after ("post", as in 2017): `x = norm(x + f(x))`.

    Args:
        num_heads: number of heads.
        hidden_dim: size inside the feed-forward network; default 4 times that of the input.
        head_dim: size of a head; default that of the input divided by `num_heads`.
        activation: of the feed-forward network, as in `FeedForward`.
        norm: `"layer"` or `"rms"`.
        norm_first: whether the norm is before (True) or after.
        epsilon: of the norms.
        dropout: rate, on each branch before it is added, in training.
        attention_dropout: rate, on the attention weights.
        use_bias: whether the projections have biases.
        kernel_initializer: of all matrices.
        num_kv_heads, position, window, sinks, qk_norm, soft_cap, max_length: of the self-attention, as in
            `MultiHeadAttention`.
        **kwargs: `stateful` and those of `keras.layers.Layer`.
    """

    causal = False

    def __init__(
        self,
        num_heads,
        hidden_dim=None,
        head_dim=None,
        activation="gelu",
        norm="layer",
        norm_first=True,
        epsilon=1e-5,
        dropout=0.0,
        attention_dropout=0.0,
        use_bias=True,
        kernel_initializer="glorot_uniform",
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
        self.input_spec = keras.InputSpec(ndim=3)
        if norm not in NORMS:
            raise ValueError(f"`norm` must be one of {list(NORMS)}. Received: norm={norm!r}")
        self.norm_first, self.dropout = norm_first, dropout
        self._norm = lambda name: NORMS[norm](epsilon=epsilon, dtype=self.dtype_policy, name=name)
        self._drop = keras.layers.Dropout(dropout, seed=random_seed())
        self._of_attention = {
            "key_dim": head_dim,
            "dropout": attention_dropout,
            "use_bias": use_bias,
            "kernel_initializer": kernel_initializer,
            "dtype": self.dtype_policy,
        }
        self.attention_norm = self._norm("attention_norm")
        self.attention = MultiHeadAttention(
            num_heads,
            causal=self.causal,
            num_kv_heads=num_kv_heads,
            position=position,
            window=window,
            sinks=sinks,
            qk_norm=qk_norm,
            soft_cap=soft_cap,
            max_length=max_length,
            name="attention",
            **self._of_attention,
        )
        self.feedforward_norm = self._norm("feedforward_norm")
        self.feedforward = FeedForward(
            hidden_dim,
            activation,
            use_bias=use_bias,
            kernel_initializer=kernel_initializer,
            dtype=self.dtype_policy,
            name="feedforward",
        )
        if self.stateful:
            self._require_splittable("stateful=True")

    @property
    def needs_future(self):
        return self.attention.needs_future

    def build(self, input_shape):
        self.input_spec = keras.InputSpec(ndim=3, axes={-1: input_shape[-1]})
        for part in (self.attention_norm, self.attention, self.feedforward_norm, self.feedforward):
            if not part.built:
                part.build(tuple(input_shape))
                part.built = True

    def initial_state(self, batch_size, max_length=None):
        return self.attention.initial_state(batch_size, max_length)

    def fresh_state(self, batch_size):
        return self.attention.fresh_state(batch_size)

    def state_spec(self, batch_size):
        return self.attention.state_spec(batch_size)

    def _feed_forward(self, x):
        return self.feedforward.advance(x, ())[0]

    def stepper(self, batch_size, steps=1):
        attend = self._added(self.attention_norm, self.attention.stepper(batch_size, steps))
        feed_forward = self._added(self.feedforward_norm, self.feedforward.stepper(batch_size, steps))

        def step(x, state):
            x, state = attend(x, state)
            return feed_forward(x, ())[0], state

        return step

    def _added(self, norm, f):
        """`branch` for single steps: `(x, state) -> (y, state)` of an f that takes and gives a state."""
        norm = norm_of(norm)

        def before(x, state):
            y, state = f(norm(x), state)
            return x + y, state

        def after(x, state):
            y, state = f(x, state)
            return norm(x + y), state

        return before if self.norm_first else after

    def branch(self, x, norm, f, training):
        """`x + f(norm(x))` or `norm(x + f(x))`; f may return a state too, which is returned."""
        y = f(call_layer(norm, x) if self.norm_first else x)
        y, state = y if isinstance(y, tuple) else (y, None)
        y = x + (self._drop(y, training=True) if training and self.dropout else y)
        return (y if self.norm_first else call_layer(norm, y)), state


@keras.saving.register_keras_serializable("keras_seq")
class TransformerEncoderBlock(TransformerBlock):
    """A block whose steps see the whole sequence (or what is near, with `window`).

    `x = x + attention(norm(x))`; `x = x + feedforward(norm(x))`; with `norm_first=False` the norms come after.

    Args:
        num_heads: number of heads.
        hidden_dim: size inside the feed-forward network; default 4 times that of the input.
        head_dim: size of a head; default that of the input divided by `num_heads`.
        activation: of the feed-forward network, as in `FeedForward`.
        norm: `"layer"` or `"rms"`.
        norm_first: whether the norm is before (True) or after.
        epsilon: of the norms.
        dropout: rate, on each branch before it is added, in training.
        attention_dropout: rate, on the attention weights, in training.
        use_bias: whether the projections have biases.
        kernel_initializer: of all matrices.
        num_kv_heads, position, window, sinks, qk_norm, soft_cap: of the attention, as in `MultiHeadAttention`.
        max_length: without effect, since there is no state.
        **kwargs: those of `keras.layers.Layer`.

    Call: x `(b, t, d)`, mask `(b, t)` bool, segment_ids `(b, t)` int (packed sequences) -> y `(b, t, d)`. It has no
    state.

    Raises: ValueError for what `MultiHeadAttention` refuses, an unknown norm; `step` and states: it needs the future.

    Source: Vaswani et al. 2017, arXiv:1706.03762, fig. 1; Xiong et al. 2020, arXiv:2002.04745 (norm first).

    Example:

        block = keras_seq.layers.TransformerEncoderBlock(num_heads=2)
        mask = np.array([[True, True, True, True, True], [True, True, True, False, False]])
        y = block(keras.ops.ones((2, 5, 8)), mask=mask)  # (2, 5, 8)
    """

    def call(  # type: ignore[override]
        self, x, mask=None, initial_state=None, return_state=False, training=None, segment_ids=None
    ):
        if return_state:
            self._require_splittable("return_state=True")
        given = {} if segment_ids is None else {"segments": ops.cast(segment_ids, "int32")}
        return self._run(x, mask, initial_state, return_state, training, **given)[0]

    def advance(self, x, state, mask=None, training=False, segments=None):
        def attend(x):
            return self.attention.advance(x, (), mask, training, segments=segments)[0]

        x, _ = self.branch(x, self.attention_norm, attend, training)
        x, _ = self.branch(x, self.feedforward_norm, self._feed_forward, training)
        return x, state


@keras.saving.register_keras_serializable("keras_seq")
class TransformerDecoderBlock(TransformerBlock):
    """A causal block, with a state; if so wanted, it also attends to another sequence.

    `x = x + attention(norm(x))`; `x = x + cross_attention(norm(x), memory)`; `x = x + feedforward(norm(x))`; with
    `norm_first=False` the norms come after.

    Args:
        num_heads: number of heads.
        hidden_dim: size inside the feed-forward network; default 4 times that of the input.
        cross_attention: whether there is a second sequence to attend to.
        head_dim: size of a head; default that of the input divided by `num_heads`.
        activation: of the feed-forward network, as in `FeedForward`.
        norm: `"layer"` or `"rms"`.
        norm_first: whether the norm is before (True) or after.
        epsilon: of the norms.
        dropout: rate, on each branch before it is added, in training.
        attention_dropout: rate, on the attention weights, in training.
        use_bias: whether the projections have biases.
        kernel_initializer: of all matrices.
        num_kv_heads, position, window, sinks, qk_norm, soft_cap, max_length: of the self-attention, as in
            `MultiHeadAttention`.
        **kwargs: `stateful` and those of `keras.layers.Layer`.

    Call: x `(b, t, d)`, mask `(b, t)` bool, memory `(b, s, d')` and memory_mask `(b, s)` bool of the second sequence,
    segment_ids `(b, t)` int, initial_state, return_state -> y `(b, t, d)`. The state is that of the self-attention,
    `(keys, values, length)`: `(b, kv_heads, capacity, head)` twice, and `(b,)` int32. With cross attention it is a pair
    of that and of `(keys, values, mask)` of the second sequence, `(b, heads, s, head)` twice, and `(b, s)` bool,
    computed once, by `initial_state(batch_size, max_length, memory, memory_mask)`.

    Raises: ValueError for what `MultiHeadAttention` refuses, an unknown norm, a memory that is missing, unexpected or
    of another shape, `stateful=True` with cross attention.

    Source: Vaswani et al. 2017, arXiv:1706.03762, fig. 1; Radford et al. 2019 (without cross attention).

    Example:

        block = keras_seq.layers.TransformerDecoderBlock(num_heads=2, cross_attention=True)
        x, memory = keras.ops.ones((2, 5, 8)), keras.ops.ones((2, 7, 6))
        y = block(x, memory)  # (2, 5, 8)
        state = block.initial_state(batch_size=2, max_length=20, memory=memory)
        y_t, state = block.step(x[:, 0], state)  # (2, 8)
    """

    causal = True

    def __init__(self, num_heads, hidden_dim=None, cross_attention=False, **kwargs):
        super().__init__(num_heads, hidden_dim, **kwargs)
        self.cross_attention_norm: Any = None
        self.cross_attention: Any = None
        self._memory_size = None
        if cross_attention and self.stateful:
            raise ValueError(f"{self._title}: stateful=True does not go with cross_attention=True.")
        if cross_attention:
            self.cross_attention_norm = self._norm("cross_attention_norm")
            self.cross_attention = MultiHeadAttention(num_heads, name="cross_attention", **self._of_attention)

    @property
    def needs_future(self):
        return None

    def build(self, x_shape, memory_shape=None):
        super().build(x_shape)
        if self.cross_attention is not None and not self.cross_attention.built:
            memory_shape = x_shape if memory_shape is None else memory_shape
            self.cross_attention_norm.build(tuple(x_shape))
            self.cross_attention.build(x_shape, memory_shape)
            self.cross_attention.built = True
            self._memory_size = memory_shape[-1]

    def initial_state(self, batch_size, max_length=None, memory=None, memory_mask=None):
        """The state before the first step; with a second sequence `(b, s, d')` its keys and values are in it."""
        own = super().initial_state(batch_size, max_length)
        if self.cross_attention is None:
            return own
        return own, () if memory is None else self._memory(memory, memory_mask, batch_size)

    def _memory(self, memory, mask, batch_size):
        batch_size, size = batch_size if isinstance(batch_size, int) else None, self._memory_size
        if size is None:
            raise ValueError(f"{self._title} must be built before a state with a second sequence is made.")
        if not matches(tuple(memory.shape), (batch_size, None, size)):
            raise ValueError(
                f"{self._title} expects a memory of shape (batch, time, features) = ({batch_size}, any, {size}). "
                f"Received: {tuple(memory.shape)}"
            )
        mask = get_keras_mask(memory) if mask is None else mask
        if mask is not None and (dtype_of(mask) != "bool" or not matches(tuple(mask.shape), tuple(memory.shape[:2]))):
            raise ValueError(
                f"{self._title} expects a memory_mask of dtype bool and shape (batch, time) = "
                f"{tuple(memory.shape[:2])}. Received: {dtype_of(mask)} of shape {tuple(mask.shape)}"
            )
        mask = ops.ones(ops.shape(memory)[:2], "bool") if mask is None else mask
        return self.cross_attention.memory(cast(memory, self.compute_dtype), mask)

    def fresh_state(self, batch_size):
        return () if self.cross_attention is None else ((), ())

    def state_spec(self, batch_size):
        own = super().state_spec(batch_size)
        if self.cross_attention is None:
            return own
        batch, heads = own[0].shape[:2]
        keys, values = (
            keras.KerasTensor((batch, heads, None, size), self.compute_dtype)
            for size in (self.cross_attention.key_dim, self.cross_attention.value_dim)
        )
        return own, (keys, values, keras.KerasTensor((batch, None), "bool"))

    def call(  # type: ignore[override]
        self,
        x,
        memory=None,
        mask=None,
        memory_mask=None,
        segment_ids=None,
        initial_state=None,
        return_state=False,
        training=None,
    ):
        given = {} if segment_ids is None else {"segments": ops.cast(segment_ids, "int32")}
        if memory is not None:
            if self.cross_attention is None or initial_state is not None:
                why = "it has no cross attention" if self.cross_attention is None else "the state holds one already"
                raise ValueError(f"{self._title} does not take a `memory` here: {why}.")
            given["memory"] = self._memory(memory, memory_mask, x.shape[0])
        y, state = self._run(x, mask, initial_state, return_state, training, **given)
        return (y, state) if return_state else y

    def advance(self, x, state, mask=None, training=False, segments=None, memory=None, return_weights=False):
        """As in every sequence layer; with `return_weights` y is `(y, weights)`, those of the cross attention."""
        own, seen = (state, ()) if self.cross_attention is None else state
        seen = seen if memory is None else memory
        if self.cross_attention is not None and not seen:
            raise ValueError(f"{self._title} attends to a second sequence. Give it as `memory`, or in the state.")

        def attend(x):
            return self.attention.advance(x, own, mask, training, segments=segments)

        def attend_to_memory(x):
            return self.cross_attention.attend(x, seen, training, return_weights)

        x, next_own = self.branch(x, self.attention_norm, attend, training)
        if self.cross_attention is not None:
            x, weights = self.branch(x, self.cross_attention_norm, attend_to_memory, training)
        x, _ = self.branch(x, self.feedforward_norm, self._feed_forward, training)
        return (x, weights) if return_weights else x, next_own if self.cross_attention is None else (next_own, seen)

    def stepper(self, batch_size, steps=1):
        if self.cross_attention is None:
            return super().stepper(batch_size, steps)
        attend = self._added(self.attention_norm, self.attention.stepper(batch_size, steps))
        feed_forward = self._added(self.feedforward_norm, self.feedforward.stepper(batch_size, steps))
        look_up = self.cross_attention.memory_stepper(batch_size, steps)
        attend_to_memory = self._added(self.cross_attention_norm, lambda x, memory: (look_up(x, memory), memory))

        def step(x, state):
            own, memory = state
            x, own = attend(x, own)
            x, _ = attend_to_memory(x, memory)
            return feed_forward(x, ())[0], (own, memory)

        return step
