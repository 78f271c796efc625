"""The recurrent encoder-decoder with attention."""

import keras
from keras import ops, tree

from keras_seq import initializers
from keras_seq.base import call_layer, cast, random_seed
from keras_seq.layers import GRU, LSTM, AdditiveAttention, Bidirectional, DotAttention, SimpleRNN
from keras_seq.layers.alignment import Alignment
from keras_seq.models.encoder_decoder import EncoderDecoder
from keras_seq.ops.scan import masked_scan

_CELLS = {"lstm": LSTM, "gru": GRU, "rnn": SimpleRNN}
_SCORES = ("dot", "general", "concat")


@keras.saving.register_keras_serializable("keras_seq")
class Seq2Seq(EncoderDecoder):
    """Recurrent layers read a source; others, which look back at it by attention, write the target.

    Encoder: `m_1 .. m_n, e = RNN(E_source[source])`, in both directions if `bidirectional`. Decoder, from the state e:
    `h_t = RNN([E[y_(t-1)]; a_(t-1)])`, `c_t = attention(h_t, m)`, `a_t = tanh([c_t; h_t] W)`, `logits_t = a_t V + b`,
    without a_(t-1) if not `input_feeding`, and with `a_t = h_t` if there is no attention.

    Args:
        source_vocab_size, target_vocab_size: numbers of token ids.
        d_model: size of embeddings and states; of a bidirectional encoder each direction has half of it, so that both
            together are the state in which the decoder starts.
        num_layers: number of recurrent layers of the encoder and of the decoder.
        cell: `"lstm"`, `"gru"` or `"rnn"`.
        attention: `"additive"` (Bahdanau), `"dot"`, `"general"`, `"concat"` (Luong), None (the decoder knows of the
            source what it starts from), or a layer such as `CoverageAttention()`.
        bidirectional: whether the encoder reads in both directions.
        input_feeding: whether a step also sees what the step before read. Then steps can only be computed one after
            another; without it training is faster.
        dropout: rate, on the input of each recurrent layer and of the logits; one draw for all steps of a sequence.
        label_smoothing: in training, this part of the probability of the targets goes to all tokens alike.
        scheduled_sampling: in training, how often the decoder sees the true token before, and not one that it draws
            itself: a probability, or a function of the train step such as `InverseSigmoidSampling(k)`; None for always.
        tie_embeddings: whether V is the transpose of E.
        start_id: the target token before the first.
        pad_id: the id that is padding in sources and targets where no mask is given; None if there is none.
        **kwargs: those of `keras.Model`.

    Call: `(source (b, s), target (b, t))` -> logits `(b, t, target_vocab_size)`. Call of the decoder alone, `fit`,
    `generate`, `beam_search`, `stream`: as in `EncoderDecoder`. The state is `(own, memory)`; own is `(states of the
    layers, a_t or (), what the attention carries or ())`, memory is `(keys, values, mask, e)`. A row without a source
    is decoded from a state of zeros and reads zeros.

    Raises: ValueError for an unknown cell or attention, sizes < 1, an odd d_model if bidirectional.

    Source: Sutskever et al. 2014, arXiv:1409.3215; Bahdanau et al. 2015, arXiv:1409.0473; Luong et al. 2015,
    arXiv:1508.04025, section 3.3 (input feeding; with "additive" too the score is of h_t, as there).

    Example:

        model = keras_seq.models.Seq2Seq(source_vocab_size=30, target_vocab_size=40, d_model=32)
        model.compile("adam")
        source, target = np.random.randint(3, 30, (64, 9)), np.random.randint(3, 40, (64, 7))
        model.fit(source, target, verbose=0)
        tokens = model.generate(source[:2], max_new_tokens=10, stop_tokens=(2,))  # (2, 10)
        weights = model.alignment(source[:2], tokens)  # (2, 10, 9)
    """

    def __init__(
        self,
        source_vocab_size,
        target_vocab_size,
        d_model,
        num_layers=1,
        cell="lstm",
        attention="additive",
        bidirectional=True,
        input_feeding=True,
        dropout=0.0,
        label_smoothing=0.0,
        scheduled_sampling=None,
        tie_embeddings=False,
        start_id=1,
        pad_id=0,
        **kwargs,
    ):
        super().__init__(
            source_vocab_size, target_vocab_size, start_id, label_smoothing, pad_id, scheduled_sampling, **kwargs
        )
        if cell not in _CELLS:
            raise ValueError(f"`cell` must be one of {list(_CELLS)}. Received: cell={cell!r}")
        for name, size in {"d_model": d_model, "num_layers": num_layers}.items():
            if size < 1:
                raise ValueError(f"`{name}` must be a positive integer. Received: {name}={size!r}")
        if bidirectional and d_model % 2:
            raise ValueError(
                f"`d_model` must be even, so that each direction has half of it. Received: d_model={d_model!r}"
            )
        if not 0 <= dropout < 1:
            raise ValueError(f"`dropout` must be a rate from 0 to below 1. Received: dropout={dropout!r}")
        policy = self.dtype_policy
        self.d_model, self.dropout = d_model, dropout
        initializer = initializers.RandomNormal(stddev=d_model**-0.5)
        self.source_embedding = keras.layers.Embedding(
            source_vocab_size, d_model, initializer, dtype=policy, name="source_embedding"
        )
        units = d_model // 2 if bidirectional else d_model
        encoder = [_CELLS[cell](units, return_sequences=True, dtype=policy, name=f"{cell}") for _ in range(num_layers)]
        self.encoder = [
            Bidirectional(layer, dtype=policy, name=f"encoder_{i}") if bidirectional else layer
            for i, layer in enumerate(encoder)
        ]
        self.embedding = keras.layers.ReversibleEmbedding(
            target_vocab_size,
            d_model,
            tie_weights=tie_embeddings,
            embeddings_initializer=initializer,
            reverse_dtype=self.compute_dtype,
            dtype=policy,
            name="embedding",
        )
        self.decoder = [
            _CELLS[cell](d_model, return_sequences=True, dtype=policy, name=f"decoder_{i}") for i in range(num_layers)
        ]
        self.attention = _attention(attention, d_model, policy)
        self.input_feeding = input_feeding and self.attention is not None
        self.combine = None
        if self.attention is not None:
            self.combine = keras.layers.Dense(
                d_model, "tanh", False, initializers.get("glorot_uniform"), dtype=policy, name="combine"
            )
        self._dropout_seeds = keras.random.SeedGenerator(random_seed())

    def build(self, input_shape=None):
        d = self.d_model
        for embedding in (self.source_embedding, self.embedding):
            _build(embedding, (None, None))
        for layer in self.encoder:
            _build(layer, (None, None, d))
        for i, layer in enumerate(self.decoder):
            _build(layer, (None, None, 2 * d if self.input_feeding and i == 0 else d))
        if self.attention is not None:
            _build(self.attention, (None, None, d), (None, None, d))
            _build(self.combine, (None, None, 2 * d))
        self.output_bias = self.add_weight((self.vocab_size,), "zeros", name="output_bias")

    # The source:

    def memory(self, source, mask=None, training=False):
        x, states = call_layer(self.source_embedding, source), []
        for layer in self.encoder:
            x, state = layer.advance(self._drop(x, training), layer.initial_state(ops.shape(x)[0]), mask)
            if isinstance(layer, Bidirectional):
                state = tree.map_structure(lambda a, b: ops.concatenate([a, b], axis=-1), *state)
            states.append(state)
        return *(self.attention.memory(x, mask) if self.attention is not None else ()), tuple(states)

    def own_state(self, batch_size, max_length=None, memory=None):
        if memory is None:
            cells, aligned = tuple(layer.initial_state(batch_size) for layer in self.decoder), ()
        else:
            cells, aligned = memory[-1], ()
            if self.attention is not None:
                aligned = self.attention.own_state(batch_size, memory)
        fed = ops.zeros((batch_size, self.d_model), self.compute_dtype) if self.input_feeding else ()
        return cells, fed, aligned

    def fresh_state(self, batch_size):
        return (), ()

    def state_spec(self, batch_size):
        batch = batch_size if isinstance(batch_size, int) else None
        cells = tuple(layer.state_spec(batch_size) for layer in self.decoder)
        fed = keras.KerasTensor((batch, self.d_model), self.compute_dtype) if self.input_feeding else ()
        aligned, seen = ((), ()) if self.attention is None else self.attention.state_spec(batch_size)
        return (cells, fed, aligned), (*seen, cells)

    # The target:

    def hidden(self, tokens, state, mask=None, training=False, memory=None):
        return self.aligned(tokens, state, mask, training, memory)[:2]

    def aligned(self, tokens, state, mask=None, training=False, memory=None):
        """As `hidden`, and the attention weights `(b, t, s)`, or None without attention."""
        if memory is not None:
            state = self.own_state(ops.shape(tokens)[0], memory=memory), memory
        own, memory = state
        x = call_layer(self.embedding, tokens)
        drops = [self._drop_factor(layer.kernel.shape[0], x, training) for layer in self.decoder]
        run = self._one_by_one if self.input_feeding else self._all_at_once
        h, weights, own = run(x, own, memory, mask, training, drops)
        return self._drop(h, training), (own, memory), weights

    def _all_at_once(self, x, own, memory, mask, training, drops):
        cells, fed, carried = own
        h, cells = self._recur(x, cells, mask, drops)
        h, weights, carried = self._look(h, memory, carried, mask, training)
        return h, weights, (cells, fed, carried)

    def _one_by_one(self, x, own, memory, mask, training, drops):
        def step(state, inputs):
            cells, fed, carried = state[:3]
            x = ops.concatenate([inputs, fed], axis=-1)[:, None]
            h, cells = self._recur(x, cells, None, drops)
            h, weights, carried = self._look(h, memory, carried, None, training)
            return cells, h[:, 0], carried, weights[:, 0]

        if x.shape[1] == 1 and mask is None:
            *own, weights = step(own, x[:, 0])
            return own[1][:, None], weights[:, None], tuple(own)
        none = ops.zeros((ops.shape(x)[0], ops.shape(memory[2])[1]), self.state_dtype)
        (h, weights), (*own, _) = masked_scan(step, (*own, none), x, mask, lambda state: (state[1], state[3]))
        return h, weights, tuple(own)

    def _recur(self, x, states, mask, drops):
        """All recurrent layers of the decoder, on `(b, t, d)`."""
        after = []
        for layer, state, drop in zip(self.decoder, states, drops, strict=True):
            x, state = layer.advance(x if drop is None else x * drop, state, mask)
            after.append(state)
        return x, tuple(after)

    def _look(self, h, memory, carried, mask, training):
        """What h `(b, t, d)` becomes by what it reads, the weights, and what the attention carries."""
        if self.attention is None:
            return h, None, carried
        context, weights, carried = self.attention.attend(h, memory[:3], carried, mask, training)
        return call_layer(self.combine, ops.concatenate([context, h], axis=-1)), weights, carried

    def logits(self, h):
        return cast(call_layer(self.embedding, h, reverse=True), self.compute_dtype) + self.output_bias

    def _drop_factor(self, size, x, training):
        """0 or 1 / (1 - rate), one draw for all steps (Gal & Ghahramani 2016); None if nothing is dropped."""
        if not (training and self.dropout):
            return None
        ones = ops.ones((ops.shape(x)[0], 1, size), self.compute_dtype)
        return keras.random.dropout(ones, self.dropout, seed=self._dropout_seeds)

    def _drop(self, x, training):
        factor = self._drop_factor(x.shape[-1], x, training)
        return x if factor is None else x * factor

    # What is wanted of a decoder whose steps follow one another:

    def with_guesses(self, target, own, u, mask, memory):
        def step(state, inputs):
            decoder, guess, _ = state
            true, is_own, u = inputs
            token = ops.where(is_own, guess, true)
            h, (decoder, _) = self.hidden(token[:, None], (decoder, memory))
            return decoder, self.drawn(self.logits(h)[:, 0], u), token

        first = self.own_state(ops.shape(target)[0], memory=memory), target[:, 0], target[:, 0]
        tokens, _ = masked_scan(step, first, (target, own, u), mask, lambda state: state[2])
        return tokens if mask is None else ops.where(mask, tokens, target)


def _attention(attention, d_model, policy):
    if attention is None or isinstance(attention, Alignment):
        return attention
    if attention == "additive":
        return AdditiveAttention(d_model, dtype=policy, name="attention")
    if attention in _SCORES:
        return DotAttention(attention, dtype=policy, name="attention")
    raise ValueError(
        f"`attention` must be 'additive', one of {list(_SCORES)}, None, or an attention layer to a memory, such as "
        f"CoverageAttention(). Received: attention={attention!r}"
    )


def _build(layer, *shapes):
    if not layer.built:
        layer.build(*shapes)
        layer.built = True
