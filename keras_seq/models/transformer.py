"""Transformers: decoder-only and encoder-decoder."""

import keras
from keras import ops

from keras_seq import initializers
from keras_seq.base import call_layer, cast, random_seed
from keras_seq.layers import (
    LearnedPositionalEncoding,
    RelativePositionBias,
    SinusoidalPositionalEncoding,
    TransformerDecoderBlock,
    TransformerEncoderBlock,
)
from keras_seq.layers.prepared import logits_of, norm_of
from keras_seq.models.encoder_decoder import EncoderDecoder
from keras_seq.models.language_model import LanguageModel
from keras_seq.ops import segment_positions

_NORMS = {"layer": keras.layers.LayerNormalization, "rms": keras.layers.RMSNormalization}


def encoding(position, max_length, dtype, name="position"):
    """What is added to the embeddings: a layer for `"learned"` and `"sinusoidal"`, else None."""
    if position == "learned":
        initializer = initializers.RandomNormal(stddev=0.02)
        return LearnedPositionalEncoding(max_length, initializer, dtype=dtype, name=name)
    return SinusoidalPositionalEncoding(dtype=dtype, name=name) if position == "sinusoidal" else None


def within_blocks(position, num_heads, bidirectional, dtype, name="position_bias"):
    """The `position` of the blocks: None where positions are added to the embeddings, one bias for all with `"t5"`."""
    if position == "t5":
        return RelativePositionBias(num_heads, bidirectional=bidirectional, dtype=dtype, name=name)
    return None if position in ("learned", "sinusoidal") else position


def checkpointed(model, block, training, function):
    """`function`, which runs `block`; if so wanted, computed anew in the backward pass."""
    return keras.remat(function) if training and model.checkpoint else function


def _embedding(vocab_size, d_model, tied, stddev, dtype, name):
    return keras.layers.ReversibleEmbedding(
        vocab_size,
        d_model,
        tie_weights=tied,
        embeddings_initializer=initializers.RandomNormal(stddev=stddev),
        reverse_dtype=dtype.compute_dtype,
        dtype=dtype,
        name=name,
    )


def _check(d_model, num_heads, head_dim, checkpoint, dropout, attention_dropout):
    if head_dim is None and d_model % num_heads:
        raise ValueError(
            f"`num_heads` must divide d_model={d_model}, or head_dim be given. Received: num_heads={num_heads}"
        )
    if checkpoint and (dropout or attention_dropout):
        raise ValueError(
            "`checkpoint` computes the blocks twice, and dropout would draw twice: give one of them. Received: "
            f"checkpoint={checkpoint!r}, dropout={dropout!r}, attention_dropout={attention_dropout!r}"
        )


@keras.saving.register_keras_serializable("keras_seq")
class TransformerLM(LanguageModel):
    """A decoder-only Transformer: GPT-2 by default, and Llama and the like by its options.

    `x = E[token] + P[position]`; `x = block(x)` for each block; `logits = norm(x) E^T`.

    Args:
        vocab_size: number of token ids.
        d_model: size of the embeddings.
        num_layers: number of blocks.
        num_heads: number of heads.
        hidden_dim: size inside the feed-forward networks; default 4 times `d_model`.
        max_length: the longest sequence: capacity of a state that is made without one, rows of the learned positions.
        position: `"learned"`, `"sinusoidal"`, `"rotary"`, `"alibi"`, `"t5"` (one bias shared by all blocks), a
            `RotaryEmbedding`, or None.
        activation, norm, epsilon, num_kv_heads, head_dim, window, sinks, qk_norm, soft_cap, use_bias: of the blocks,
            as in `TransformerDecoderBlock`.
        dropout: rate, on the embeddings and on each branch.
        attention_dropout: rate, on the attention weights.
        tie_embeddings: whether the logits use the embedding matrix.
        checkpoint: whether `fit` computes each block a second time in the backward pass instead of keeping what is
            inside it: less memory, about a third more time.
        pad_id: the token id that is padding, or None.
        **kwargs: `stateful` and those of `keras.Model`.

    Call: tokens `(b, t)`, mask `(b, t)` bool or None, segment_ids `(b, t)` int or None (packed sequences) -> logits
    `(b, t, vocab_size)`. The state is the tuple of the blocks' states, after that of the added positions.

    Raises: ValueError for what the blocks refuse, an unknown `position`, a position beyond a learned table.

    Source: Radford et al. 2019 (GPT-2); Touvron et al. 2023, arXiv:2302.13971 (Llama: `position="rotary"`,
    `norm="rms"`, `activation="swiglu"`, `use_bias=False`).

    Example:

        model = keras_seq.models.TransformerLM(100, d_model=32, num_layers=2, num_heads=4, max_length=64)
        model.compile("adam")
        model.fit(np.random.randint(1, 100, (64, 20)), verbose=0)
        tokens = model.generate([5, 7], max_new_tokens=10, temperature=0.8, seed=0)
    """

    def __init__(
        self,
        vocab_size,
        d_model,
        num_layers,
        num_heads,
        hidden_dim=None,
        max_length=1024,
        position="learned",
        activation="gelu_tanh",
        norm="layer",
        epsilon=1e-5,
        num_kv_heads=None,
        head_dim=None,
        window=None,
        sinks=0,
        qk_norm=False,
        soft_cap=None,
        use_bias=True,
        dropout=0.0,
        attention_dropout=0.0,
        tie_embeddings=True,
        checkpoint=False,
        pad_id=0,
        **kwargs,
    ):
        super().__init__(vocab_size, pad_id, **kwargs)
        if num_layers < 1:
            raise ValueError(f"`num_layers` must be a positive integer. Received: num_layers={num_layers!r}")
        _check(d_model, num_heads, head_dim, checkpoint, dropout, attention_dropout)
        self.max_length, self.checkpoint, policy = max_length, checkpoint, self.dtype_policy
        self.embedding = _embedding(vocab_size, d_model, tie_embeddings, 0.02, policy, "embedding")
        self.position = encoding(position, max_length, policy)
        within = within_blocks(position, num_heads, False, policy)
        normal = initializers.RandomNormal(stddev=0.02)
        self.blocks = [
            TransformerDecoderBlock(
                num_heads,
                hidden_dim or 4 * d_model,
                head_dim=head_dim or d_model // num_heads,
                activation=activation,
                norm=norm,
                epsilon=epsilon,
                dropout=dropout,
                attention_dropout=attention_dropout,
                use_bias=use_bias,
                kernel_initializer=normal,
                num_kv_heads=num_kv_heads,
                position=within,
                window=window,
                sinks=sinks,
                qk_norm=qk_norm,
                soft_cap=soft_cap,
                max_length=max_length,
                dtype=policy,
                name=f"block_{i}",
            )
            for i in range(num_layers)
        ]
        self.norm = _NORMS[norm](epsilon=epsilon, dtype=policy, name="norm")
        self.dropout = dropout
        self._drop = keras.layers.Dropout(dropout, seed=random_seed())

    @property
    def _parts(self):
        return ([] if self.position is None else [self.position]) + list(self.blocks)

    def build(self, input_shape):
        shape = (*tuple(input_shape)[:2], self.embedding.output_dim)
        for part, its_shape in [(self.embedding, tuple(input_shape)), *((p, shape) for p in (*self._parts, self.norm))]:
            if not part.built:
                part.build(its_shape)
                part.built = True

    def initial_state(self, batch_size, max_length=None):
        max_length = self.max_length if max_length is None else max_length
        return tuple(part.initial_state(batch_size, max_length) for part in self._parts)

    def fresh_state(self, batch_size):
        return tuple(part.fresh_state(batch_size) for part in self._parts)

    def state_spec(self, batch_size):
        return tuple(part.state_spec(batch_size) for part in self._parts)

    def call(  # type: ignore[override]
        self,
        x,
        mask=None,
        initial_state=None,
        return_state=False,
        training=None,
        last_only=False,
        segment_ids=None,
    ):
        given = {} if segment_ids is None else {"segments": ops.cast(segment_ids, "int32")}
        return super().call(x, mask, initial_state, return_state, training, last_only, **given)

    def hidden(self, tokens, state, mask=None, training=False, segments=None):
        x, states = call_layer(self.embedding, tokens), list(state)
        blocks = len(state) - len(self.blocks)  # where their states begin
        if self.position is not None:
            at = None if segments is None else segment_positions(segments)
            x, states[0] = self._encoded(x, state[0], mask, at)
        x = self._drop(x, training=True) if training and self.dropout else x
        for i, block in enumerate(self.blocks, blocks):

            def run(x, block=block, before=state[i]):
                return block.advance(x, before, mask, training, segments=segments)

            x, states[i] = checkpointed(self, block, training, run)(x)
        return call_layer(self.norm, x), tuple(states)

    def logits(self, h):
        return cast(call_layer(self.embedding, h, reverse=True), self.compute_dtype)

    def stepper(self, batch_size, steps=1):
        logits, norm = logits_of(self.embedding, batch_size, steps), norm_of(self.norm)
        if logits is None:
            return self.step_valid
        parts = [self.position.advance_one] if self.position is not None else []
        parts += [block.stepper(batch_size, steps) for block in self.blocks]

        def step(token, state):
            x, states = call_layer(self.embedding, token), []
            for part, part_state in zip(parts, state, strict=True):
                x, part_state = part(x, part_state)
                states.append(part_state)
            return logits(norm(x)), tuple(states)

        return step

    def _encoded(self, x, state, mask, at):
        if at is None:
            return self.position.advance(x, state, mask)
        return self.position.encode(x, at, mask), state


@keras.saving.register_keras_serializable("keras_seq")
class Transformer(EncoderDecoder):
    """The encoder-decoder Transformer; without further arguments the base model of the paper.

    Encoder: `x = sqrt(d) E[source] + P[position]`; `x = block(x)` for each block: the memory. Decoder:
    `y = sqrt(d) E[target] + P[position]`; `y = block(y, memory)` for each block; `logits = y E^T`. With
    `norm_first=True` a norm follows the last block of either.

    Args:
        source_vocab_size, target_vocab_size: numbers of token ids.
        d_model: size of the embeddings.
        num_layers: number of blocks of the encoder, and of the decoder.
        num_heads: number of heads.
        hidden_dim: size inside the feed-forward networks; default 4 times `d_model`.
        num_decoder_layers: number of blocks of the decoder; default `num_layers`.
        max_length: capacity of a state that is made without one; rows of learned positions.
        position: `"sinusoidal"`, `"learned"`, `"rotary"`, `"alibi"`, `"t5"` (one bias for all blocks of the encoder,
            one for those of the decoder), or None.
        activation, norm, norm_first, epsilon, num_kv_heads, head_dim, qk_norm, soft_cap, use_bias: of the blocks, as in
            `TransformerDecoderBlock`.
        dropout: rate, on the embeddings and on each branch.
        attention_dropout: rate, on the attention weights.
        label_smoothing: in training, this part of the probability of the targets goes to all tokens alike.
        share_embeddings: whether source and target have one embedding matrix; default: if the vocabularies are of one
            size.
        tie_embeddings: whether the logits use the embedding matrix of the target.
        checkpoint: as in `TransformerLM`.
        start_id: the target token before the first.
        pad_id: the token id that is padding, or None.
        **kwargs: those of `keras.Model`.

    Call: `(source, target)`, tokens `(b, s)` and `(b, t)`, or target tokens with an `initial_state`; mask: a pair of
    bool arrays, or that of the target -> logits `(b, t, target_vocab_size)`. The state is `(own, memory)`: that of the
    positions and the decoder's caches, and `(mask, (keys, values) of each block)` of the source.

    Raises: ValueError for what the blocks refuse, an unknown `position`, `share_embeddings` of vocabularies of two
    sizes, a call without a source.

    Source: Vaswani et al. 2017, arXiv:1706.03762; the base model is table 3, line 1.

    Example:

        model = keras_seq.models.Transformer(50, 60, d_model=32, num_layers=2, num_heads=4)
        model.compile("adam")
        source, target = np.random.randint(2, 50, (64, 9)), np.random.randint(2, 60, (64, 7))
        model.fit(source, target, verbose=0)
        tokens = model.generate([5, 7, 9], max_new_tokens=7)
    """

    def __init__(
        self,
        source_vocab_size,
        target_vocab_size,
        d_model=512,
        num_layers=6,
        num_heads=8,
        hidden_dim=None,
        num_decoder_layers=None,
        max_length=512,
        position="sinusoidal",
        activation="relu",
        norm="layer",
        norm_first=False,
        epsilon=1e-6,
        num_kv_heads=None,
        head_dim=None,
        qk_norm=False,
        soft_cap=None,
        use_bias=True,
        dropout=0.1,
        attention_dropout=0.0,
        label_smoothing=0.1,
        share_embeddings=None,
        tie_embeddings=True,
        checkpoint=False,
        start_id=1,
        pad_id=0,
        **kwargs,
    ):
        super().__init__(source_vocab_size, target_vocab_size, start_id, label_smoothing, pad_id, **kwargs)
        num_decoder_layers = num_layers if num_decoder_layers is None else num_decoder_layers
        same_size = source_vocab_size == target_vocab_size
        if share_embeddings and not same_size:
            raise ValueError(
                "`share_embeddings` needs vocabularies of one size. Received: "
                f"source_vocab_size={source_vocab_size}, target_vocab_size={target_vocab_size}"
            )
        _check(d_model, num_heads, head_dim, checkpoint, dropout, attention_dropout)
        for name, count in {"num_layers": num_layers, "num_decoder_layers": num_decoder_layers}.items():
            if count < 1:
                raise ValueError(f"`{name}` must be a positive integer. Received: {name}={count!r}")
        self.d_model, self.max_length, self.checkpoint, policy = d_model, max_length, checkpoint, self.dtype_policy
        stddev = d_model**-0.5
        self.embedding = _embedding(target_vocab_size, d_model, tie_embeddings, stddev, policy, "embedding")
        self.source_embedding = self.embedding
        if not (same_size if share_embeddings is None else share_embeddings):
            self.source_embedding = _embedding(source_vocab_size, d_model, True, stddev, policy, "source_embedding")
        self.source_position = encoding(position, max_length, policy, "source_position")
        self.position = encoding(position, max_length, policy)
        options = {
            "hidden_dim": hidden_dim or 4 * d_model,
            "head_dim": head_dim or d_model // num_heads,
            "activation": activation,
            "norm": norm,
            "norm_first": norm_first,
            "epsilon": epsilon,
            "dropout": dropout,
            "attention_dropout": attention_dropout,
            "use_bias": use_bias,
            "num_kv_heads": num_kv_heads,
            "qk_norm": qk_norm,
            "soft_cap": soft_cap,
            "max_length": max_length,
            "dtype": policy,
        }
        within = within_blocks(position, num_heads, True, policy, "source_position_bias")
        self.encoder_blocks = [
            TransformerEncoderBlock(num_heads, position=within, name=f"encoder_block_{i}", **options)
            for i in range(num_layers)
        ]
        within = within_blocks(position, num_heads, False, policy)
        self.blocks = [
            TransformerDecoderBlock(
                num_heads, position=within, cross_attention=True, name=f"decoder_block_{i}", **options
            )
            for i in range(num_decoder_layers)
        ]
        self.encoder_norm, self.norm = (
            _NORMS[norm](epsilon=epsilon, dtype=policy, name=name) if norm_first else None
            for name in ("encoder_norm", "norm")
        )
        self.dropout = dropout
        self._drop = keras.layers.Dropout(dropout, seed=random_seed())

    def build(self, input_shape=None):
        shape = (None, None, self.d_model)
        for embedding in (self.source_embedding, self.embedding):
            if not embedding.built:
                embedding.build((None, None))
                embedding.built = True
        parts = [self.source_position, *self.encoder_blocks, self.encoder_norm, self.position, *self.blocks, self.norm]
        for part in parts:
            if part is not None and not part.built:
                part.build(shape)
                part.built = True

    def memory(self, source, mask=None, training=False):
        x = self._embedded(self.source_embedding, self.source_position, source, mask, training)
        for block in self.encoder_blocks:
            x = checkpointed(self, block, training, lambda x, block=block: block.advance(x, (), mask, training)[0])(x)
        x = x if self.encoder_norm is None else call_layer(self.encoder_norm, x)
        mask = ops.ones(ops.shape(source), "bool") if mask is None else mask
        return mask, tuple(block.cross_attention.memory(x, mask)[:2] for block in self.blocks)

    def _embedded(self, embedding, position, tokens, mask, training, state=None):
        """Embeddings with positions; from a state also the next."""
        x = call_layer(embedding, tokens) * self.d_model**0.5
        if position is not None:
            first = position.initial_state(ops.shape(tokens)[0]) if state is None else state
            x, next_state = position.advance(x, first, mask)
        x = self._drop(x, training=True) if training and self.dropout else x
        return x if state is None else (x, next_state)

    def own_state(self, batch_size, max_length=None):
        max_length = self.max_length if max_length is None else max_length
        return self._own(lambda part: part.initial_state(batch_size, max_length))

    def fresh_state(self, batch_size):
        return self._own(lambda part: part.fresh_state(batch_size)), ()

    def state_spec(self, batch_size):
        own = self._own(lambda part: part.state_spec(batch_size))
        memories = [block.state_spec(batch_size)[1] for block in self.blocks]
        return own, (memories[0][2], tuple(memory[:2] for memory in memories))

    def _own(self, of):
        """The tuple of the parts' own states, `of(part)`."""
        positions = () if self.position is None else (of(self.position),)
        return *positions, *(of(block)[0] for block in self.blocks)

    def hidden(self, tokens, state, mask=None, training=False, memory=None):
        own, seen = list(state[0]), state[1] if memory is None else memory
        first = len(own) - len(self.blocks)  # where the states of the blocks begin
        x = self._embedded(self.embedding, self.position, tokens, mask, training, own[0] if first else ())
        x, *own[:first] = x if first else (x,)
        source_mask, memories = seen
        for i, (block, (keys, values)) in enumerate(zip(self.blocks, memories, strict=True), first):

            def run(x, keys, values, block=block, before=own[i]):
                y, (after, _) = block.advance(x, (before, (keys, values, source_mask)), mask, training)
                return y, after

            x, own[i] = checkpointed(self, block, training, run)(x, keys, values)
        x = x if self.norm is None else call_layer(self.norm, x)
        return x, (tuple(own), seen)

    def logits(self, h):
        return cast(call_layer(self.embedding, h, reverse=True), self.compute_dtype)

    def stepper(self, batch_size, steps=1):
        logits = logits_of(self.embedding, batch_size, steps)
        if logits is None:
            return self.step_valid
        norm = None if self.norm is None else norm_of(self.norm)
        blocks = [block.stepper(batch_size, steps) for block in self.blocks]

        def step(token, state):
            own, (mask, memories) = state
            x, after = call_layer(self.embedding, token) * self.d_model**0.5, []
            if self.position is not None:
                x, position = self.position.advance_one(x, own[0])
                after.append(position)
            for block, before, (keys, values) in zip(blocks, own[len(after) :], memories, strict=True):
                x, (before, _) = block(x, (before, (keys, values, mask)))
                after.append(before)
            return logits(x if norm is None else norm(x)), (tuple(after), (mask, memories))

        return step
