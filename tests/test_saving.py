"""A model of recurrent layers, saved, gives the same in a fresh process that imports keras and keras_seq alone."""

import subprocess
import sys

import keras
import numpy as np
from cases import MASKS, B, D, T, U, arrays, close, normal

from keras_seq import layers, models

LOAD = """
import sys
import keras, keras_seq
import numpy as np

path, inputs, outputs = sys.argv[1:]
model = keras.saving.load_model(path)
given = np.load(inputs)
y = model.predict([given["x"], given["tokens"]], verbose=0)
np.savez(outputs, *[keras.ops.convert_to_numpy(v) for v in y])
"""


def model_of_everything():
    x, tokens = keras.Input((None, D), name="x"), keras.Input((None,), dtype="int32", name="tokens")
    h = keras.layers.Masking()(x)
    h, state_h, state_c = layers.LSTM(U, return_sequences=True, return_state=True, dropout=0.1)(h)
    h = layers.Bidirectional(layers.GRU(U, return_sequences=True, reset_after=False), merge_mode="sum")(h)
    h = layers.Residual([keras.layers.LayerNormalization(), layers.SimpleRNN(U, return_sequences=True)])(h)
    h = layers.Stack([keras.layers.Dense(U, "relu"), layers.RNN(layers.PeepholeLSTMCell(U), return_sequences=True)])(h)
    h = layers.RNN(keras.layers.GRUCell(4), return_sequences=True)(h)
    y = layers.GRU(U, kernel_regularizer="l2", recurrent_constraint="unit_norm")(h)
    logits, state = models.RecurrentLM(11, U, num_layers=2, cell="gru", tie_embeddings=True)(tokens, return_state=True)
    return keras.Model([x, tokens], [y, state_h, state_c, logits, *keras.tree.flatten(state)])


def test_loads_in_a_fresh_process(tmp_path):
    model = model_of_everything()
    x = normal(B, T, D) * MASKS["holes"][:, :, None]
    tokens = np.random.default_rng(0).integers(0, 11, (B, T)).astype("int32")
    expected = arrays(model.predict([x, tokens], verbose=0))
    files = [str(tmp_path / name) for name in ("model.keras", "inputs.npz", "outputs.npz")]
    model.save(files[0])
    np.savez(files[1], x=x, tokens=tokens)
    done = subprocess.run([sys.executable, "-c", LOAD, *files], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    loaded = np.load(files[2])
    close([loaded[name] for name in loaded.files], expected, 1e-6)
