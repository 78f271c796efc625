"""Against a trained model of others: the GRUs of g2p-en, which spell phonemes, give what its own NumPy code gives."""

import importlib.metadata
import re
from pydoc_data.topics import topics

import numpy as np
import pytest
from keras import ops

from keras_seq.checkpoints import load_torch_rnn
from keras_seq.models import Seq2Seq

LETTERS = ["<pad>", "<unk>", "</s>", *"abcdefghijklmnopqrstuvwxyz"]
END, START, NEW = 3, 2, 20
LONG = ["squirrel", "xylophone", "antidisestablishment"]
# Words of real text that is always at hand.
FOUND = sorted({word for topic in topics.values() for word in re.findall(r"\b[a-z]{1,14}\b", topic)})
WORDS = [*LONG, *np.random.default_rng(0).choice(FOUND, 197, replace=False).tolist()]


@pytest.fixture(scope="module")
def weights():
    try:
        file = importlib.metadata.distribution("g2p-en").locate_file("g2p_en/checkpoint20.npz")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("g2p-en is not installed: pip install --no-deps g2p-en==2.1.0")
    with np.load(file) as arrays:
        return dict(arrays)


def gru_cell(x, h, weights, side):
    """As in `g2p_en/g2p.py`: gates r, z, n."""
    x = x @ weights[f"{side}_w_ih"].T + weights[f"{side}_b_ih"]
    of_h = h @ weights[f"{side}_w_hh"].T + weights[f"{side}_b_hh"]
    (r_x, z_x, n_x), (r_h, z_h, n_h) = np.split(x, 3), np.split(of_h, 3)
    r, z = 1 / (1 + np.exp(-(r_x + r_h))), 1 / (1 + np.exp(-(z_x + z_h)))
    return (1 - z) * np.tanh(n_x + r * n_h) + z * h


def source(word):
    return [LETTERS.index(letter) for letter in word] + [LETTERS.index("</s>")]


def expected(word, weights):
    """The tokens of a word up to its end, and the logits at each."""
    h, token, tokens, logits = np.zeros(256, "float32"), START, [], []
    for letter in source(word):
        h = gru_cell(weights["enc_emb"][letter], h, weights, "enc")
    while len(tokens) < NEW and token != END:
        h = gru_cell(weights["dec_emb"][token], h, weights, "dec")
        logits.append(weights["fc_w"] @ h + weights["fc_b"])
        tokens.append(token := int(logits[-1].argmax()))
    return tokens, np.stack(logits)


@pytest.fixture(scope="module")
def model(weights):
    model = Seq2Seq(29, 74, 256, cell="gru", attention=None, bidirectional=False, start_id=START)
    model.build()
    for layer, side in ((model.encoder[0], "enc"), (model.decoder[0], "dec")):
        names = {"weight_ih": "w_ih", "weight_hh": "w_hh", "bias_ih": "b_ih", "bias_hh": "b_hh"}
        load_torch_rnn(layer, {f"{ours}_l0": weights[f"{side}_{theirs}"] for ours, theirs in names.items()})
    model.source_embedding.set_weights([weights["enc_emb"]])
    model.embedding.set_weights([weights["dec_emb"], weights["fc_w"].T])
    model.output_bias.assign(weights["fc_b"])
    return model


def test_words_are_spelled_as_there(model, weights):
    sources = [source(word) for word in WORDS]
    width = max(map(len, sources))
    padded = np.array([row + [0] * (width - len(row)) for row in sources])
    found = model.generate(padded, NEW, stop_tokens=(END,))
    for row, word in zip(found, WORDS, strict=True):
        tokens, _ = expected(word, weights)
        assert row[: len(tokens)].tolist() == tokens, word
        assert not row[len(tokens) :].any()


@pytest.mark.parametrize("word", ["squirrel", "antidisestablishment"])
def test_logits_are_those_there(model, weights, word):
    tokens, logits = expected(word, weights)
    found = model((np.array([source(word)]), np.array([[START, *tokens[:-1]]])))
    np.testing.assert_allclose(ops.convert_to_numpy(found)[0], logits, atol=1e-4)
