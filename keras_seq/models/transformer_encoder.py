"""A Transformer that sees the whole sequence, as BERT does, and the masking it is trained by."""

import keras
import numpy as np
from keras import ops
from keras.src.backend import get_keras_mask, set_keras_mask

from keras_seq import initializers
from keras_seq.base import SequenceLayer, call_layer, cast, dtype_of, matches, random_seed
from keras_seq.layers import RelativePositionBias, TransformerEncoderBlock
from keras_seq.layers.dense import project
from keras_seq.layers.transformer import NORMS
from keras_seq.models.transformer_parts import checkpointed, encoding
from keras_seq.ops import segment_positions

_HEADS = (None, "masked_lm", "classifier")


@keras.saving.register_keras_serializable("keras_seq")
class TransformerEncoder(SequenceLayer, keras.Model):
    """A Transformer encoder, BERT by default: vectors of tokens, logits of masked tokens, or logits of classes.

    `x = norm(E[token] + P[position] + T[type])`; `x = block(x)` for each block; then, by `head`:

    - None: x.
    - `"masked_lm"`: `norm(act(x W + b)) E^T + c`.
    - `"classifier"`: `pooled V + a`, `pooled = tanh(x_first U + u)`, of the first valid step of each row.

    It is a sequence layer and a Keras model (`fit`, `predict`, `save`). Without a loss in `compile` a head trains on
    the mean cross-entropy in nats. Targets `(b, t)` of masked tokens do not count where they are `pad_id` or negative,
    nor where the input is padding: see `mask_tokens`.

    Args:
        vocab_size: number of token ids.
        d_model: size of the embeddings.
        num_layers: number of blocks.
        num_heads: number of heads.
        hidden_dim: size inside the feed-forward networks; default 4 times `d_model`.
        max_length: the longest sequence that the learned positions are for; the others have no limit.
        num_token_types: number of token types (BERT's segments A and B); 0 for none.
        head: None, `"masked_lm"` or `"classifier"`.
        num_classes: of the classifier.
        pooler: whether there is a pooler U, u, for the classifier and `pool`; never with `"masked_lm"`. Without a head
            no output depends on it, and it is not trainable unless you set `model.pooler.trainable = True`.
        position: `"learned"`, `"sinusoidal"`, `"rotary"`, `"alibi"`, `"t5"` (one bias shared by all blocks), a
            `RotaryEmbedding`, or None.
        activation, norm, epsilon, num_kv_heads, head_dim, window, qk_norm, soft_cap, use_bias: of the blocks, as in
            `TransformerEncoderBlock`; the first three also of the head and of the norm outside of the blocks.
        norm_first: whether norms come before each branch; then one comes after the last block, and none after the
            embeddings.
        dropout: rate, on the embeddings, on each branch, and on what the classifier sees.
        attention_dropout: rate, on the attention weights.
        checkpoint: whether `fit` computes each block a second time in the backward pass instead of keeping what is
            inside it: less memory, about a third more time.
        pad_id: the token id that is padding where no mask is given, or None.
        **kwargs: those of `keras.Model`.

    Call: tokens `(b, t)` int, mask `(b, t)` bool or None, token_types `(b, t)` int or None (all 0), segment_ids
    `(b, t)` int or None (packed sequences that do not see each other, each with positions of its own) ->
    `(b, t, d_model)`, `(b, t, vocab_size)` or `(b, num_classes)`. For `fit` and `predict` the tokens may come with the
    others as `(tokens, token_types)` or as a dict by these names: `{"tokens": ..., "token_types": ..., "mask": ...}`.

    Raises: ValueError for what the blocks refuse, an unknown `head` or `position`, a head that lacks or does not take
    `num_classes`, inputs of other shapes or dtypes, a position beyond a learned table; `step` and states: it needs the
    future.

    Source: Devlin et al. 2018, arXiv:1810.04805, section 3 and appendix A; google-research/bert, `modeling.py`.

    Example:

        model = keras_seq.models.TransformerEncoder(100, 32, 2, num_heads=4, head="classifier", num_classes=3)
        model.compile("adam", metrics=["accuracy"])
        tokens, labels = np.random.randint(1, 100, (64, 20)), np.random.randint(0, 3, 64)
        model.fit(tokens, labels, verbose=0)
        logits = model.predict(tokens[:5], verbose=0)
    """

    needs_future = "its steps attend to what comes after"

    def __init__(
        self,
        vocab_size,
        d_model,
        num_layers,
        num_heads,
        hidden_dim=None,
        max_length=512,
        num_token_types=2,
        head=None,
        num_classes=None,
        pooler=True,
        position="learned",
        activation="gelu",
        norm="layer",
        norm_first=False,
        epsilon=1e-12,
        num_kv_heads=None,
        head_dim=None,
        window=None,
        qk_norm=False,
        soft_cap=None,
        use_bias=True,
        dropout=0.0,
        attention_dropout=0.0,
        checkpoint=False,
        pad_id=0,
        **kwargs,
    ):
        super().__init__(**kwargs)
        if self.stateful:
            self._require_splittable("stateful=True")
        sizes = {"vocab_size": vocab_size, "d_model": d_model, "num_layers": num_layers, "num_heads": num_heads}
        for name, size in (sizes | {"num_token_types": num_token_types or 1}).items():
            if not isinstance(size, int) or size < 1:
                raise ValueError(f"`{name}` must be a positive integer. Received: {name}={size!r}")
        if pad_id is not None and not 0 <= pad_id < vocab_size:
            raise ValueError(f"`pad_id` must be from 0 to {vocab_size - 1}, or None. Received: pad_id={pad_id!r}")
        if head not in _HEADS:
            raise ValueError(f"`head` must be one of {_HEADS}. Received: head={head!r}")
        classifies = head == "classifier"
        known = isinstance(num_classes, int) and num_classes > 0
        if not (known if classifies else num_classes is None):
            raise ValueError(
                "`num_classes` must be a positive integer with head='classifier', and None without. Received: "
                f"head={head!r}, num_classes={num_classes!r}"
            )
        if head_dim is None and d_model % num_heads:
            raise ValueError(
                f"`num_heads` must divide d_model={d_model}, or head_dim be given. Received: num_heads={num_heads}"
            )
        self.vocab_size, self.d_model, self.num_token_types = vocab_size, d_model, num_token_types
        self.head, self.num_classes, self.return_sequences = head, num_classes, not classifies
        self.norm_first, self.dropout, self.checkpoint, self.pad_id = norm_first, dropout, checkpoint, pad_id
        policy = self.dtype_policy
        self.embedding = keras.layers.ReversibleEmbedding(
            vocab_size,
            d_model,
            embeddings_initializer=_normal(),
            reverse_dtype=self.compute_dtype,
            dtype=policy,
            name="embedding",
        )
        self.token_type = None
        if num_token_types:
            self.token_type = keras.layers.Embedding(
                num_token_types, d_model, _normal(), dtype=policy, name="token_type"
            )
        self.position = encoding(position, max_length, policy)
        within = None if self.position is not None else position
        if within == "t5":
            within = RelativePositionBias(num_heads, dtype=policy, name="position_bias")
        self.blocks = [
            TransformerEncoderBlock(
                num_heads,
                hidden_dim or 4 * d_model,
                head_dim=head_dim or d_model // num_heads,
                activation=activation,
                norm=norm,
                norm_first=norm_first,
                epsilon=epsilon,
                dropout=dropout,
                attention_dropout=attention_dropout,
                use_bias=use_bias,
                kernel_initializer=_normal(),
                num_kv_heads=num_kv_heads,
                position=within,
                window=window,
                qk_norm=qk_norm,
                soft_cap=soft_cap,
                dtype=policy,
                name=f"block_{i}",
            )
            for i in range(num_layers)
        ]
        self.norm = NORMS[norm](epsilon=epsilon, dtype=policy, name="norm")
        self.pooler = self.classifier = self.head_dense = self.head_norm = None
        if head == "masked_lm":
            self.head_dense = keras.layers.Dense(d_model, kernel_initializer=_normal(), dtype=policy, name="head_dense")
            self.head_norm = NORMS[norm](epsilon=epsilon, dtype=policy, name="head_norm")
        elif pooler:
            self.pooler = keras.layers.Dense(
                d_model, "tanh", kernel_initializer=_normal(), trainable=classifies, dtype=policy, name="pooler"
            )
        if classifies:
            self.classifier = keras.layers.Dense(
                num_classes, kernel_initializer=_normal(), dtype=policy, name="classifier"
            )
        self._drop = keras.layers.Dropout(dropout, seed=random_seed())

    def build(self, input_shape):
        steps, vectors = (None, None), (None, self.d_model)
        sequence = (*steps, self.d_model)
        parts: list = [(part, steps) for part in (self.embedding, self.token_type)]
        parts += [(p, sequence) for p in (self.position, self.norm, *self.blocks, self.head_dense, self.head_norm)]
        parts += [(part, vectors) for part in (self.pooler, self.classifier)]
        for part, shape in parts:
            if part is not None and not part.built:
                part.build(shape)
                part.built = True
        if self.head == "masked_lm" and not self.built:
            self.output_bias = self.add_weight((self.vocab_size,), "zeros", name="output_bias")

    def compute_output_shape(self, input_shape):
        if self.head == "classifier":
            return (input_shape[0], self.num_classes)
        return (*input_shape, self.vocab_size if self.head == "masked_lm" else self.d_model)

    def compute_mask(self, inputs, mask=None):
        return self._mask(*self._unpacked(inputs, mask)[:2]) if self.return_sequences else None

    def call(  # type: ignore[override]
        self,
        x,
        mask=None,
        token_types=None,
        segment_ids=None,
        initial_state=None,
        return_state=False,
        training=None,
    ):
        if return_state:
            self._require_splittable("return_state=True")
        tokens, mask, others = self._unpacked(x, mask)
        if len(tokens.shape) != 2:
            raise ValueError(f"{self._title} expects tokens of shape (batch, time). Received: {tuple(tokens.shape)}")
        others = {"token_types": token_types, "segment_ids": segment_ids} | others
        others = {name: self._checked(name, ids, tokens) for name, ids in others.items() if ids is not None}
        tokens = tokens if "int" in dtype_of(tokens) else ops.cast(tokens, "int32")
        return self._run(tokens, mask, initial_state, return_state, training, **others)[0]

    def advance(self, x, state, mask=None, training=False, token_types=None, segment_ids=None):
        mask = self._mask(x, mask)
        h = self._embedded(x, mask, token_types, segment_ids)
        h = self._dropped(h if self.norm_first else call_layer(self.norm, h), training)
        for block in self.blocks:
            h = self._through(block, h, mask, training, segment_ids)
        h = call_layer(self.norm, h) if self.norm_first else h
        if self.head == "masked_lm":
            h = self.blocks[0].feedforward.activation(project(self.head_dense, h))
            h = call_layer(self.embedding, call_layer(self.head_norm, h), reverse=True)
            h = h + cast(self.output_bias, h.dtype)
        elif self.head == "classifier":
            h = _first(h, mask) if self.pooler is None else self.pool(h, mask)
            h = call_layer(self.classifier, self._dropped(h, training))
        return cast(h, self.compute_dtype), state

    def pool(self, sequence, mask=None):
        """`tanh(x_first U + u)` `(b, d_model)` of the first valid step of each row.

        Args:
            sequence: `(b, t, d_model)`, what the model gives without a head.
            mask: `(b, t)` bool; default the one that `sequence` carries, if any.

        Raises: ValueError if the model has no pooler; in a functional model, which would have the pooler twice and
        could not be loaded.
        """
        if self.pooler is None:
            raise ValueError(f"{self._title} has no pooler: make it with pooler=True, and another head than masked_lm.")
        if isinstance(sequence, keras.KerasTensor):
            raise ValueError(f"{self._title} does not pool in a functional model. Use a Dense layer of your own there.")
        mask = get_keras_mask(sequence) if mask is None else mask
        return self.pooler(_first(sequence, mask))

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        if self.head is None:
            return super().compute_loss(x, y, y_pred, sample_weight, training)
        y_pred = cast(y_pred, self.state_dtype)
        if self.head == "masked_lm" and y is not None and len(y.shape) == 2:
            wanted = y >= 0 if self.pad_id is None else ops.logical_and(y >= 0, y != self.pad_id)
            valid = self._mask(*self._unpacked(x, None)[:2])
            y = ops.where(wanted, y, ops.zeros_like(y))
            set_keras_mask(y_pred, wanted if valid is None else ops.logical_and(wanted, valid))
        if self.loss is not None:
            return super().compute_loss(x, y, y_pred, sample_weight, training)
        if y is None or (self.head == "masked_lm" and len(y.shape) != 2):
            shape = "(batch, time)" if self.head == "masked_lm" else "(batch,)"
            received = None if y is None else tuple(y.shape)
            raise ValueError(f"{self._title} needs targets {shape}: fit(tokens, targets). Received: {received}")
        if self.num_classes == 1:
            raise ValueError(f"{self._title} needs a loss in `compile`: there is but one class.")
        cross_entropy = keras.losses.SparseCategoricalCrossentropy(
            from_logits=True, reduction="mean_with_sample_weight", dtype=self.state_dtype
        )
        return sum(self.losses, cross_entropy(y, y_pred, sample_weight))

    def _unpacked(self, x, mask):
        """Tokens, their mask, and the other inputs by name. Keras gives the masks of several inputs in a structure."""
        if isinstance(x, list | tuple):
            x = dict(zip(("tokens", "token_types", *range(len(x))), x, strict=False))
        x = dict(x) if isinstance(x, dict) else {"tokens": x}
        if "tokens" not in x or not set(x) <= {"tokens", "token_types", "mask", "segment_ids"}:
            raise ValueError(
                f"{self._title} takes tokens, (tokens, token_types), or a dict of tokens and any of token_types, mask "
                f"and segment_ids. Received: {list(x)}"
            )
        tokens = x.pop("tokens")
        mask = x.pop("mask", None if isinstance(mask, dict | list | tuple) else mask)
        return tokens, get_keras_mask(tokens) if mask is None else mask, x

    def _checked(self, name, ids, tokens):
        """Integers `(b, t)`, as int32."""
        if name == "token_types" and self.token_type is None:
            raise ValueError(f"{self._title} takes no token_types: it has num_token_types={self.num_token_types}.")
        if "int" not in dtype_of(ids) or not matches(tuple(ids.shape), tuple(tokens.shape)):
            raise ValueError(
                f"{self._title} expects integer {name} of shape (batch, time) = {tuple(tokens.shape)}. "
                f"Received: {dtype_of(ids)} of shape {tuple(ids.shape)}"
            )
        return cast(ids, "int32")

    def _mask(self, tokens, mask):
        return mask if mask is not None or self.pad_id is None else tokens != self.pad_id

    def _dropped(self, x, training):
        return self._drop(x, training=True) if training and self.dropout else x

    def _embedded(self, tokens, mask, token_types, segment_ids):
        """`E[token] + P[position] + T[type]`; padding may have any type."""
        x = call_layer(self.embedding, tokens)
        if self.position is not None and segment_ids is not None:
            x = self.position.encode(x, segment_positions(segment_ids), mask)
        elif self.position is not None:
            x, _ = self.position.advance(x, self.position.initial_state(ops.shape(x)[0]), mask)
        if self.token_type is None:
            return x
        if token_types is None:
            token_types = ops.zeros((1, 1), "int32")
        elif mask is not None:
            token_types = ops.where(mask, token_types, ops.zeros_like(token_types))
        return x + call_layer(self.token_type, token_types)

    def _through(self, block, x, mask, training, segments):
        def run(x):
            return block.advance(x, (), mask, training, segments=segments)[0]

        return (checkpointed(block, run) if training and self.checkpoint else run)(x)


def mask_tokens(tokens, mask_id, vocab_size, rate=0.15, special_ids=(), seed=None, pad_id=0):
    """BERT's masking: the inputs and the targets of `TransformerEncoder(..., head="masked_lm")`.

    Each token is chosen with probability `rate`. A chosen one becomes `mask_id` with probability 0.8, a random token
    with 0.1, and stays with 0.1; it is the target at its place.

    Args:
        tokens: integers of any shape.
        mask_id: the id of the mask.
        vocab_size: random tokens are below it, and none of `mask_id`, `pad_id` and `special_ids`.
        rate: probability, from 0 to 1.
        special_ids: ids that are never chosen, such as those of `[CLS]` and `[SEP]`.
        seed: integer; the same seed gives the same masks. None draws one, which `keras.utils.set_random_seed` fixes.
        pad_id: the id of padding, which is never chosen, or None.

    Returns:
        NumPy int32 arrays `(inputs, targets)` of the shape of tokens; targets are `pad_id` (-1 if that is None)
        where no token was chosen, which the model leaves out of its loss.

    Raises: ValueError for tokens that are no integers, a rate out of range, a vocabulary without an ordinary token.

    Source: Devlin et al. 2018, arXiv:1810.04805, section 3.1 and appendix C.2.

    Example:

        tokens = np.random.randint(5, 100, (64, 20))
        model = keras_seq.models.TransformerEncoder(100, 32, num_layers=1, num_heads=4, head="masked_lm")
        model.compile("adam")
        model.fit(*mask_tokens(tokens, mask_id=4, vocab_size=100, special_ids=(2, 3), seed=0), verbose=0)
    """
    tokens = np.asarray(tokens)
    if tokens.dtype.kind not in "iu" or not 0 <= rate <= 1:
        raise ValueError(
            f"`mask_tokens` needs integer tokens and a rate from 0 to 1. Received: {tokens.dtype} tokens, rate={rate!r}"
        )
    apart = [mask_id, *special_ids] + ([] if pad_id is None else [pad_id])
    ordinary = np.setdiff1d(np.arange(vocab_size), apart)
    if not len(ordinary):
        raise ValueError(f"All of the vocabulary is special. Received: vocab_size={vocab_size}, special ids {apart}")
    generator = np.random.default_rng(random_seed() if seed is None else seed)
    chosen = (generator.random(tokens.shape) < rate) & ~np.isin(tokens, apart)
    fate = generator.random(tokens.shape)
    others = generator.choice(ordinary, tokens.shape)
    inputs = np.where(chosen & (fate < 0.8), mask_id, np.where(chosen & (fate >= 0.9), others, tokens))
    targets = np.where(chosen, tokens, -1 if pad_id is None else pad_id)
    return inputs.astype("int32"), targets.astype("int32")


def _normal():
    return initializers.RandomNormal(stddev=0.02)


def _first(x, mask):
    """The first valid step of each row `(b, t, d)`: `(b, d)`."""
    if mask is None:
        return x[:, 0]
    first = ops.argmax(ops.cast(mask, "int32"), axis=1)
    return ops.take_along_axis(x, first[:, None, None], axis=1)[:, 0]
