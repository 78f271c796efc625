"""A recurrent language model."""

import keras

from keras_seq import initializers
from keras_seq.base import call_layer, cast, random_seed
from keras_seq.layers import GRU, LSTM, SimpleRNN, Stack
from keras_seq.models.language_model import LanguageModel

_CELLS = {"lstm": LSTM, "gru": GRU, "rnn": SimpleRNN}


@keras.saving.register_keras_serializable("keras_seq")
class RecurrentLM(LanguageModel):
    """A language model of recurrent layers: embedding, `num_layers` of LSTM, GRU or SimpleRNN, projection to logits.

    `x = E[token]`; `h_1 = cell(x)`, `h_2 = cell(h_1)`, ...; `logits = h_n V`, where V is the transpose of E if the
    embeddings are tied.

    Args:
        vocab_size: number of token ids.
        d_model: size of the embeddings and of the states.
        num_layers: number of recurrent layers.
        cell: `"lstm"`, `"gru"` or `"rnn"`.
        dropout: rate, on the input of each recurrent layer and on the input of the projection; one draw for all steps.
        tie_embeddings: whether embedding and projection are one matrix (Press & Wolf 2016).
        pad_id: the token id that is padding, or None.
        **kwargs: `stateful` and those of `keras.Model`.

    Call: tokens `(b, t)`, mask `(b, t)` bool or None -> logits `(b, t, vocab_size)`; the state is the tuple of the
    layers' states, each h `(b, d_model)`, or of an LSTM `(h, c)`.

    Raises: ValueError for an unknown cell, and for sizes < 1.

    Source: Mikolov et al. 2010; Zaremba et al. 2014, arXiv:1409.2329; Press & Wolf 2016, arXiv:1608.05859.

    Example:

        model = keras_seq.models.RecurrentLM(vocab_size=100, d_model=32, num_layers=2)
        model.compile("adam")
        model.fit(np.random.randint(1, 100, (64, 20)), verbose=0)
        tokens = model.generate([5, 7], max_new_tokens=10, temperature=0.8, seed=0)
    """

    def __init__(
        self,
        vocab_size,
        d_model,
        num_layers=1,
        cell="lstm",
        dropout=0.0,
        tie_embeddings=False,
        pad_id=0,
        **kwargs,
    ):
        super().__init__(vocab_size, pad_id, **kwargs)
        if cell not in _CELLS:
            raise ValueError(f"`cell` must be one of {list(_CELLS)}. Received: cell={cell!r}")
        if num_layers < 1:
            raise ValueError(f"`num_layers` must be a positive integer. Received: num_layers={num_layers!r}")
        self.embedding = keras.layers.ReversibleEmbedding(
            vocab_size,
            d_model,
            tie_weights=tie_embeddings,
            embeddings_initializer=initializers.get("uniform"),
            reverse_dtype=self.compute_dtype,
            dtype=self.dtype_policy,
            name="embedding",
        )
        layers = [
            _CELLS[cell](d_model, return_sequences=True, dropout=dropout, dtype=self.dtype_policy, name=f"{cell}_{i}")
            for i in range(num_layers)
        ]
        self.recurrent = Stack(layers, dtype=self.dtype_policy, name="recurrent")
        self.dropout = keras.layers.Dropout(dropout, noise_shape=(None, 1, None), seed=random_seed())

    def build(self, input_shape):
        shape = (*input_shape, self.embedding.output_dim)
        if not self.embedding.built:
            self.embedding.build(tuple(input_shape))
        if not self.recurrent.built:
            self.recurrent.build(shape)

    def initial_state(self, batch_size, max_length=None):
        return self.recurrent.initial_state(batch_size)

    def hidden(self, tokens, state, mask=None, training=False):
        h, state = self.recurrent.advance(call_layer(self.embedding, tokens), state, mask, training)
        return self.dropout(h, training=True) if training else h, state

    def logits(self, h):
        return cast(call_layer(self.embedding, h, reverse=True), self.compute_dtype)
