"""The encoder-decoder Transformer."""

import keras
from keras import ops

from keras_seq.base import call_layer, cast, random_seed
from keras_seq.layers import TransformerDecoderBlock, TransformerEncoderBlock
from keras_seq.layers.prepared import logits_of, norm_of
from keras_seq.layers.transformer import NORMS
from keras_seq.models.encoder_decoder import EncoderDecoder
from keras_seq.models.transformer_parts import check_sizes, checkpointed, encoding, token_embedding, within_blocks


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
        check_sizes(d_model, num_heads, head_dim, num_layers=num_layers, num_decoder_layers=num_decoder_layers)
        self.d_model, self.max_length, self.checkpoint, policy = d_model, max_length, checkpoint, self.dtype_policy
        stddev = d_model**-0.5
        self.embedding = token_embedding(target_vocab_size, d_model, tie_embeddings, stddev, policy)
        self.source_embedding = self.embedding
        if not (same_size if share_embeddings is None else share_embeddings):
            self.source_embedding = token_embedding(
                source_vocab_size, d_model, True, stddev, policy, "source_embedding"
            )
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
            NORMS[norm](epsilon=epsilon, dtype=policy, name=name) if norm_first else None
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
        x, _ = self._embedded(self.source_embedding, self.source_position, source, mask, training)
        for block in self.encoder_blocks:

            def run(x, block=block):
                return block.advance(x, (), mask, training)[0]

            x = (checkpointed(block, run) if training and self.checkpoint else run)(x)
        x = x if self.encoder_norm is None else call_layer(self.encoder_norm, x)
        mask = ops.ones(ops.shape(source), "bool") if mask is None else mask
        return mask, tuple(block.cross_attention.memory(x, mask)[:2] for block in self.blocks)

    def _embedded(self, embedding, position, tokens, mask, training, state=None):
        """Embeddings with positions, and the next state of these."""
        x = call_layer(embedding, tokens) * self.d_model**0.5
        if position is not None:
            state = position.initial_state(ops.shape(tokens)[0]) if state is None else state
            x, state = position.advance(x, state, mask)
        return self._drop(x, training=True) if training and self.dropout else x, state

    def own_state(self, batch_size, max_length=None, memory=None):
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
        return self.aligned(tokens, state, mask, training, memory, False)[:2]

    def aligned(self, tokens, state, mask=None, training=False, memory=None, return_weights=True):
        """As `hidden`, and the weights `(b, t, s)` of the last block to the source, the mean over its heads."""
        own, seen = list(state[0]), state[1] if memory is None else memory
        first = len(own) - len(self.blocks)  # where the states of the blocks begin
        x, position = self._embedded(self.embedding, self.position, tokens, mask, training, own[0] if first else None)
        own[:first] = [position][:first]
        source_mask, memories = seen
        weighing = self.blocks[-1] if return_weights else None
        for i, (block, (keys, values)) in enumerate(zip(self.blocks, memories, strict=True), first):

            def run(x, keys, values, block=block, before=own[i]):
                before = before, (keys, values, source_mask)
                y, (after, _) = block.advance(x, before, mask, training, return_weights=block is weighing)
                return y, after

            x, own[i] = (checkpointed(block, run) if training and self.checkpoint else run)(x, keys, values)
        x, weights = x if return_weights else (x, None)
        x = x if self.norm is None else call_layer(self.norm, x)
        return x, (tuple(own), seen), ops.mean(weights, axis=1) if return_weights else None

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
