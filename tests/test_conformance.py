"""Every public layer and model through every check of the contract."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_seq import SequenceLayer, initializers, layers, models
from keras_seq.testing import CHECKS, check_layer


class Sum:
    """A cell without weights, with a state in Keras's form."""

    state_size = 8

    def __call__(self, x, state):
        total = state[0] + x
        return total, [total]


@keras.saving.register_keras_serializable("tests")
class Projected(keras.layers.Layer):
    """A user's cell whose output is no part of its state."""

    output_size = 3

    def build(self, input_shape):
        self.kernel = self.add_weight((input_shape[-1], 4), "glorot_uniform", name="kernel")
        self.projection = self.add_weight((4, 3), "glorot_uniform", name="projection")

    def initial_state(self, batch_size):
        return {"h": ops.zeros((batch_size, 4))}

    def call(self, x, state):
        h = ops.tanh(0.5 * state["h"] + x @ self.kernel)
        return h @ self.projection, {"h": h}


@keras.saving.register_keras_serializable("tests")
class OnSource(SequenceLayer):
    """A decoder on one fixed source for all rows: what it does to its own sequence."""

    def __init__(self, decoder, source, **kwargs):
        super().__init__(**kwargs)
        self.decoder, self.source = decoder, source
        if hasattr(decoder, "vocab_size"):
            self.vocab_size = decoder.vocab_size

    def build(self, input_shape):
        if not self.decoder.built:
            self.decoder.build((*input_shape[:2], 8))

    def initial_state(self, batch_size, max_length=None):
        source = ops.convert_to_tensor(np.asarray(self.source))
        rows = ops.repeat(source[None], batch_size, axis=0)
        rows = rows if hasattr(self.decoder, "vocab_size") else ops.cast(rows, self.compute_dtype)
        return self.decoder.initial_state(batch_size, max_length, rows)

    def fresh_state(self, batch_size):
        own, memory = self.initial_state(batch_size, 1)
        return self.decoder.fresh_state(batch_size)[0] or own, memory

    def state_spec(self, batch_size):
        return self.decoder.state_spec(batch_size)

    def advance(self, x, state, mask=None, training=False):
        return self.decoder.advance(x, state, mask, training)

    def compute_output_shape(self, input_shape):
        return self.decoder.compute_output_shape(input_shape)


MEMORY = np.random.default_rng(1).normal(size=(5, 8)).astype("float32").tolist()

LAYERS = {
    "SimpleRNN": lambda: layers.SimpleRNN(5, return_sequences=True),
    "LSTM": lambda: layers.LSTM(5, return_sequences=True),
    "LSTM last output": lambda: layers.LSTM(5),
    "LSTM other activations": lambda: layers.LSTM(
        5,
        "softsign",
        "hard_sigmoid",
        use_bias=False,
        return_sequences=True,
        kernel_initializer=keras.initializers.HeNormal(0),
    ),
    "LSTM zero output": lambda: layers.LSTM(5, return_sequences=True, zero_output_for_mask=True),
    "LSTM dropout": lambda: layers.LSTM(5, return_sequences=True, dropout=0.3, recurrent_dropout=0.2),
    "LSTM backwards": lambda: layers.LSTM(5, go_backwards=True),
    "GRU": lambda: layers.GRU(5, return_sequences=True),
    "GRU no bias": lambda: layers.GRU(5, return_sequences=True, use_bias=False),
    "GRU reset before": lambda: layers.GRU(5, return_sequences=True, reset_after=False),
    "RNN of LayerNormLSTMCell": lambda: layers.RNN(layers.LayerNormLSTMCell(5), return_sequences=True),
    "RNN of PeepholeLSTMCell": lambda: layers.RNN(layers.PeepholeLSTMCell(5)),
    "RNN of a Keras cell": lambda: layers.RNN(
        keras.layers.GRUCell(5, recurrent_initializer=initializers.Orthogonal()), return_sequences=True
    ),
    "RNN of a projecting cell": lambda: layers.RNN(Projected()),
    "Bidirectional": lambda: layers.Bidirectional(layers.LSTM(5, return_sequences=True)),
    "Bidirectional last output": lambda: layers.Bidirectional(layers.GRU(5), merge_mode="sum"),
    "TimeWise": lambda: layers.TimeWise(keras.layers.Dense(5)),
    "Stack": lambda: layers.Stack(
        [layers.LSTM(6, return_sequences=True), keras.layers.Dense(5, "tanh"), layers.GRU(3, return_sequences=True)]
    ),
    "Residual": lambda: layers.Residual(
        [keras.layers.LayerNormalization(), layers.GRU(8, return_sequences=True), keras.layers.Dropout(0.2, seed=3)]
    ),
    "SinusoidalPositionalEncoding": lambda: layers.SinusoidalPositionalEncoding(),
    "LearnedPositionalEncoding": lambda: layers.LearnedPositionalEncoding(40),
    "RotaryEmbedding": lambda: layers.RotaryEmbedding(interleaved=True, dim=4),
    "MultiHeadAttention": lambda: layers.MultiHeadAttention(2, 4),
    "MultiHeadAttention causal": lambda: layers.MultiHeadAttention(2, 4, causal=True, dropout=0.1, max_length=40),
    "MultiHeadAttention rotary": lambda: layers.MultiHeadAttention(
        4, 6, causal=True, num_kv_heads=1, position="rotary", qk_norm=True, max_length=40
    ),
    "MultiHeadAttention window": lambda: layers.MultiHeadAttention(
        2, 4, causal=True, window=3, sinks=1, position="alibi"
    ),
    "MultiHeadAttention buckets": lambda: layers.MultiHeadAttention(
        2, 4, causal=True, window=2, position="t5", soft_cap=5.0, use_gate=True, use_bias=False
    ),
    "AdditiveAttention on a source": lambda: OnSource(layers.AdditiveAttention(5, normalize=True), MEMORY),
    "CoverageAttention on a source": lambda: OnSource(layers.CoverageAttention(5), MEMORY),
    "MonotonicAttention on a source": lambda: OnSource(layers.MonotonicAttention(5, noise=0.5), MEMORY),
    "DotAttention on a source": lambda: OnSource(layers.DotAttention("general", window=2), MEMORY),
    "FeedForward": lambda: layers.FeedForward(16, "swiglu"),
    "TransformerEncoderBlock": lambda: layers.TransformerEncoderBlock(2, 12, norm_first=False, dropout=0.1),
    "TransformerDecoderBlock": lambda: layers.TransformerDecoderBlock(
        2, 12, activation="geglu", norm="rms", position="rotary", num_kv_heads=1, max_length=40
    ),
    "Transformer on a source": lambda: OnSource(models.Transformer(9, 11, 8, 1, 2, max_length=40), [3, 5, 7, 0, 0]),
    "Seq2Seq on a source": lambda: OnSource(models.Seq2Seq(9, 11, 8, dropout=0.1), [3, 5, 7, 0, 0]),
    "Seq2Seq at once on a source": lambda: OnSource(
        models.Seq2Seq(9, 11, 8, cell="gru", attention="concat", input_feeding=False), [3, 5, 7, 0, 0]
    ),
    "TransformerLM": lambda: models.TransformerLM(11, 8, num_layers=2, num_heads=2, max_length=40),
    "TransformerLM rotary": lambda: models.TransformerLM(
        11, 8, 1, 2, position="rotary", norm="rms", activation="swiglu", use_bias=False, num_kv_heads=1, window=4
    ),
    "TransformerEncoder": lambda: models.TransformerEncoder(11, 8, 1, 2, hidden_dim=12, max_length=40, dropout=0.1),
    "TransformerEncoder masked LM": lambda: models.TransformerEncoder(
        11, 8, 1, 2, hidden_dim=12, head="masked_lm", position="t5", norm_first=True, checkpoint=True
    ),
    "TransformerEncoder classifier": lambda: models.TransformerEncoder(
        11, 8, 1, 2, hidden_dim=12, head="classifier", num_classes=3, position="rotary", num_token_types=0
    ),
    "RWKV4TimeMixing": lambda: layers.RWKV4TimeMixing(),
    "RWKV5TimeMixing": lambda: layers.RWKV5TimeMixing(4),
    "RWKV6TimeMixing": lambda: layers.RWKV6TimeMixing(4, mix_rank=3, decay_rank=4),
    "RWKV7TimeMixing": lambda: layers.RWKV7TimeMixing(4, decay_rank=3, iclr_rank=4, gate_rank=5),
    "RWKV4ChannelMixing": lambda: layers.RWKV4ChannelMixing(12),
    "RWKV5ChannelMixing": lambda: layers.RWKV5ChannelMixing(12),
    "RWKV6ChannelMixing": lambda: layers.RWKV6ChannelMixing(12),
    "RWKV7ChannelMixing": lambda: layers.RWKV7ChannelMixing(12),
    "RWKVBlock": lambda: layers.RWKVBlock(4),
    "RWKV": lambda: models.RWKV(11, 8, 1, head_dim=4, hidden_dim=12),
    "RecurrentLM": lambda: models.RecurrentLM(11, 6, num_layers=2, cell="gru", dropout=0.1),
    "RecurrentLM tied": lambda: models.RecurrentLM(11, 6, tie_embeddings=True),
}


@pytest.mark.parametrize("name", LAYERS)
def test_conformance(name):
    left_out = set()
    if "source" in name:  # it belongs to a batch: what is decoded on one cannot be stateful
        left_out.add("check_stateful")
    if "Monotonic" in name or "Dot" in name:  # a rounded score may stop the reader, or begin the window, elsewhere
        left_out.add("check_precision")
    checks = [check for check in CHECKS if check.__name__ not in left_out]
    check_layer(LAYERS[name], tolerance=1e-5 if "Attention" in name or "Transformer" in name else 2e-6, checks=checks)
