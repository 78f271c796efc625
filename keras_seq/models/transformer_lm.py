"""A decoder-only Transformer."""

import keras
from keras import ops

from keras_seq import initializers
from keras_seq.base import call_layer, cast, random_seed
from keras_seq.layers import TransformerDecoderBlock
from keras_seq.layers.prepared import logits_of, norm_of
from keras_seq.layers.transformer import NORMS
from keras_seq.models.language_model import LanguageModel
from keras_seq.models.transformer_parts import check_sizes, checkpointed, encoding, token_embedding, within_blocks
from keras_seq.ops import segment_positions


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
        check_sizes(d_model, num_heads, head_dim, num_layers=num_layers)
        self.max_length, self.checkpoint, policy = max_length, checkpoint, self.dtype_policy
        self.embedding = token_embedding(vocab_size, d_model, tie_embeddings, 0.02, policy)
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
        self.norm = NORMS[norm](epsilon=epsilon, dtype=policy, name="norm")
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

            x, states[i] = (checkpointed(block, run) if training and self.checkpoint else run)(x)
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
