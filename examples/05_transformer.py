r"""
# The Transformer of 2017, part by part

Attention alone, without recurrence, is enough for a sequence model: that was the claim of Vaswani et al. in 2017, and
most large models since are built this way. This tutorial writes its parts out in NumPy and holds each against the
library. Then it puts them together in three ways on one small task: encoder-decoder, encoder only (as BERT), decoder
only (as GPT).
"""

import calendar
import os

os.environ.setdefault("KERAS_BACKEND", "jax")  # or "torch", or "tensorflow": before Keras is imported

import keras
import numpy as np
from keras import ops

import keras_seq

keras.utils.set_random_seed(0)
rng = np.random.default_rng(0)

r"""
## Scaled dot-product attention

Each step of a sequence asks a question and is itself something that can be asked. It has three vectors: a query \(q\),
a key \(k\), and a value \(v\). The query is compared with all keys by dot products, a softmax turns these scores into
weights that sum to 1, and the output is the mean of the values by these weights:

\[ \mathrm{attention}(Q, K, V) = \mathrm{softmax}\!\left(\frac{Q K^\top}{\sqrt d}\right) V \]
"""


def softmax(scores):
    e = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def attention(q, k, v, seen=True):
    """`(..., queries, d)`, `(..., keys, d)`, `(..., keys, d')`; `seen`: which keys a query may look at."""
    scores = q @ np.swapaxes(k, -1, -2) / np.sqrt(q.shape[-1])
    return softmax(np.where(seen, scores, -1e30)) @ v


q, k, v = rng.normal(size=(3, 1, 1, 6, 8)).astype("float32")  # one sequence, one head, six steps, size 8
of_library = keras_seq.ops.attention(*map(ops.convert_to_tensor, (q, k, v)))
assert np.allclose(attention(q, k, v), ops.convert_to_numpy(of_library), atol=1e-5)

r"""
Why the square root of \(d\)? The dot product of two random vectors grows with their size. Large scores make the
softmax put all its weight on one key, and then hardly any gradient gets through. Divided, they keep their size:
"""

for d in (4, 64, 1024):
    products = (rng.normal(size=(2000, d)) * rng.normal(size=(2000, d))).sum(axis=-1)
    print(f"d = {d:4}: dot products of size {products.std():5.1f}, divided {products.std() / np.sqrt(d):.2f}")

r"""
## Heads

One set of weights for each step is one place to look at. Multi-head attention does it several times side by side. Each
head makes its own queries, keys and values by matrices of its own; the outputs of all heads are put together and go
through a last matrix. In self-attention all three are made of the same sequence \(x\).
"""


def heads_of(x, w, b):
    """`(batch, time, d)` -> `(batch, heads, time, size)`."""
    return np.einsum("btd,dhk->bhtk", x, w) + b[:, None]


def multi_head(x, w_q, b_q, w_k, b_k, w_v, b_v, w_o, b_o, seen=True):
    y = attention(heads_of(x, w_q, b_q), heads_of(x, w_k, b_k), heads_of(x, w_v, b_v), seen)
    return np.einsum("bhtk,hkd->btd", y, w_o) + b_o


x = rng.normal(size=(1, 6, 16)).astype("float32")
layer = keras_seq.layers.MultiHeadAttention(num_heads=4, key_dim=4)
y = ops.convert_to_numpy(layer(x))
assert np.allclose(y, multi_head(x, *layer.get_weights()), atol=1e-5)

r"""
A model that writes must not look ahead: step \(t\) may see the steps up to \(t\) only. That is a mask of a triangle,
and in the library the argument `causal`. A causal layer can also run step by step, with a state.
"""

causal = keras_seq.layers.MultiHeadAttention(num_heads=4, key_dim=4, causal=True)
causal.build(x.shape)
causal.set_weights(layer.get_weights())
triangle = np.tri(6, dtype=bool)
print(triangle.astype(int))
assert np.allclose(ops.convert_to_numpy(causal(x)), multi_head(x, *layer.get_weights(), seen=triangle), atol=1e-5)

"""
## Order

In all of this a step does not know where it stands. Change the order of the steps, and the outputs are the same ones in
the new order: attention without a mask sees a set, not a sequence.
"""

order = rng.permutation(6)
print("order:", order)
assert np.allclose(ops.convert_to_numpy(layer(x[:, order])), y[:, order], atol=1e-5)

r"""
So the place is added to the vectors themselves. In the paper it is a pattern of sines and cosines, of wavelengths from
\(2\pi\) to \(10000 \cdot 2\pi\), which differs from position to position:

\[ P_{p,2i} = \sin\left(p / 10000^{2i/d}\right), \qquad P_{p,2i+1} = \cos\left(p / 10000^{2i/d}\right) \]
"""

POSITIONS, CHANNELS = 64, 32
nothing = np.zeros((1, POSITIONS, CHANNELS), "float32")
pattern = ops.convert_to_numpy(keras_seq.layers.SinusoidalPositionalEncoding()(nothing))[0]
figure = keras_seq.plotting.heatmap(pattern, "channel", "position", "sines and cosines of the position", symmetric=True)

angles = np.arange(POSITIONS)[:, None] / 10000 ** (np.arange(0, CHANNELS, 2) / CHANNELS)
assert np.allclose(pattern[:, 0::2], np.sin(angles), atol=1e-5)
assert np.allclose(pattern[:, 1::2], np.cos(angles), atol=1e-5)

"""
Each row is one position: the channels on the left change from step to step, like the last digit of a counter, those on
the right slowly. The dot product of two rows depends on their distance alone, wherever they are, so heads can learn to
look "three steps back". And now the order of the steps makes a difference:
"""

products = pattern @ pattern.T
assert np.allclose(products[:-5, :-5], products[5:, 5:], atol=1e-3)  # five steps further: the same numbers

encode = keras_seq.layers.SinusoidalPositionalEncoding()
placed, moved = ops.convert_to_numpy(layer(encode(x))), ops.convert_to_numpy(layer(encode(x[:, order])))
print(f"largest difference: {np.abs(placed[:, order] - moved).max():.2f}")
assert not np.allclose(placed[:, order], moved, atol=1e-2)

r"""
## The block

A block has two branches. The first is attention, which moves information between steps. The second is a feed-forward
network of two matrices, which works on each step alone: \(\max(0, x W_1 + b_1) W_2 + b_2\). What a branch computes is
added to what went into it (He et al. 2015), so that a block changes a vector and does not replace it. Layer
normalization (Ba et al. 2016) gives the channels of each vector mean 0 and variance 1, then a scale that is learned.

Where the norm stands has changed since 2017. Then it came after the sum, "post":
\(\mathrm{norm}(x + f(x))\). Now it mostly comes before the branch, "pre": \(x + f(\mathrm{norm}(x))\). Deep models with
it train without a careful start of the learning rate (Xiong et al. 2020).
"""


def layer_norm(x, gamma, beta, epsilon=1e-5):
    mean, variance = x.mean(axis=-1, keepdims=True), x.var(axis=-1, keepdims=True)
    return (x - mean) / np.sqrt(variance + epsilon) * gamma + beta


def feed_forward(x, w_1, b_1, w_2, b_2):
    return np.maximum(x @ w_1 + b_1, 0) @ w_2 + b_2


def encoder_block(x, block):
    branches = [
        (multi_head, block.attention, block.attention_norm),
        (feed_forward, block.feedforward, block.feedforward_norm),
    ]
    for f, part, norm in branches:
        weights, of_norm = part.get_weights(), norm.get_weights()
        x = x + f(layer_norm(x, *of_norm), *weights) if block.norm_first else layer_norm(x + f(x, *weights), *of_norm)
    return x


for norm_first in (False, True):
    block = keras_seq.layers.TransformerEncoderBlock(num_heads=4, activation="relu", norm_first=norm_first)
    assert np.allclose(ops.convert_to_numpy(block(x)), encoder_block(x, block), atol=1e-5)
for part in (block.attention, block.feedforward):
    print(f"{part.name}: {part.count_params()} weights")

"""
## A task

Dates that people write, in three styles, are to be written as computers do: "7 may 1998" becomes "1998-05-07". A
character is a token. Four ids are taken: 0 padding, 1 start, 2 end, 3 a mask, which BERT will need.
"""

START, END, MASK, FIRST = 1, 2, 3, 4
ALPHABET = " ,-./=0123456789abcdefghijklmnopqrstuvwxyz"
VOCABULARY = FIRST + len(ALPHABET)


def read(text):
    return [MASK if character == "?" else FIRST + ALPHABET.index(character) for character in text]


def write(tokens):
    return "".join("?" if token == MASK else ALPHABET[token - FIRST] for token in tokens if token >= MASK)


def padded(texts, end=()):
    """Token ids `(n, longest)`, with zeros behind short ones."""
    rows = [[*read(text), *end] for text in texts]
    return np.array([row + [0] * (max(map(len, rows)) - len(row)) for row in rows], "int32")


def dates(n):
    """`n` random days from 1900 to 2099, as people write them and as computers do."""
    days = np.datetime64("1900-01-01") + rng.choice(73_049, n, replace=False)
    pairs = []
    for day, style in zip(days.astype(str), rng.integers(3, size=n), strict=True):
        y, m, d = map(int, day.split("-"))
        name = calendar.month_name[m].lower()
        pairs.append(([f"{d} {name} {y}", f"{name} {d}, {y}", f"{d}.{m}.{y}"][style], day))
    return pairs


SEQUENCES = 20_000
TESTED = 500
pairs = dates(SEQUENCES + TESTED)
training, tests = pairs[:SEQUENCES], pairs[SEQUENCES:]
texts, answers = zip(*training, strict=True)
test_texts, test_answers = zip(*tests, strict=True)
for text, answer in training[:4]:
    print(f"{text:20} {answer}")

"""
## Encoder-decoder

The Transformer of the paper. The encoder's blocks read the source. The decoder's blocks are causal and have a third
branch between the two, cross-attention: queries from the target, keys and values from the source. The paper's base
model has six blocks on each side and 512 channels; here it is two and 64. `fit(source, target)` shifts the target
itself, so that each character is predicted from those before it.
"""

D_MODEL = 64
LAYERS = 2
EPOCHS = 2
sizes = {"d_model": D_MODEL, "num_layers": LAYERS, "num_heads": 4, "hidden_dim": 128, "max_length": 32}
source, target = padded(texts), padded(answers, end=[END])
model = keras_seq.models.Transformer(
    VOCABULARY, VOCABULARY, norm_first=True, dropout=0.0, label_smoothing=0.0, start_id=START, **sizes
)
model.compile(keras.optimizers.Adam(2e-3, clipnorm=1.0))
model.fit(source, target, batch_size=100, epochs=EPOCHS, verbose=2)

tokens = model.generate(padded(test_texts), max_new_tokens=11, stop_tokens=(END,))
written = [write(row) for row in tokens]
for text, found in list(zip(test_texts, written, strict=True))[:3]:
    print(f"{text:20} {found}")
print(f"right: {np.mean([a == b for a, b in zip(written, test_answers, strict=True)]):.1%} of {TESTED} unseen days")

r"""
## What the heads look at

Here is the whole model once more, from its parts. On the way `return_attention_scores=True` asks the attention layers
for their weights. At the end the logits are those of the model. (\(\sqrt d\) times the embedding, as in the paper: next
to sines and cosines it would be small.)
"""

TEXT = "7 may 1998"
answer = write(model.generate(read(TEXT), max_new_tokens=11, stop_tokens=(END,)))
source, target = padded([TEXT]), padded([answer], end=[END])
inputs = np.concatenate([[[START]], target[:, :-1]], axis=1)

x = model.source_position(model.source_embedding(source) * D_MODEL**0.5)
for block in model.encoder_blocks:
    _, within = block.attention(block.attention_norm(x), return_attention_scores=True)
    x = block(x)
memory = model.encoder_norm(x)

y = model.position(model.embedding(inputs) * D_MODEL**0.5)
for block in model.blocks:
    h = y + block.attention(block.attention_norm(y))
    _, across = block.cross_attention(block.cross_attention_norm(h), memory, return_attention_scores=True)
    y = block(y, memory=memory)
logits = ops.convert_to_numpy(model.embedding(model.norm(y), reverse=True))
assert np.allclose(logits, ops.convert_to_numpy(model((source, inputs))), atol=1e-4)

figure = keras_seq.plotting.attention_maps(across[0], [*answer, "(end)"], list(TEXT))

"""
A row is a character that is written, a column one of the source; the darker, the more weight. These are the heads of
the decoder's last block. The year is written first and stands last; in the middle rows the heads look at the letters of
the month, at the bottom at the day. Some weights are spread out, and some lie where nothing is to be found.
`model.alignment(source, target)` gives the mean of the heads in one call.
"""

assert np.allclose(model.alignment(source, target)[0], ops.convert_to_numpy(across)[0].mean(axis=0), atol=1e-5)

"""
## Encoder only: BERT

BERT (Devlin et al. 2018) is the encoder alone, trained to fill gaps: some tokens are replaced by a mask, and the model
says what stood there, from both sides at once. Its text here is a date and its answer in one row. Gaps teach
less per row than a whole answer does, so it gets twice as many epochs, and rotary positions (Su et al. 2021), which
turn queries and keys by their place and so tell the distance between two steps directly.
"""

rows = padded([f"{text}={answer}" for text, answer in training], end=[END])
bert = keras_seq.models.TransformerEncoder(VOCABULARY, head="masked_lm", position="rotary", dropout=0.0, **sizes)
bert.compile(keras.optimizers.Adam(3e-3, clipnorm=1.0))
masked, hidden = keras_seq.models.mask_tokens(rows, MASK, VOCABULARY, rate=0.3, special_ids=(END,), seed=0)
bert.fit(masked, hidden, batch_size=100, epochs=2 * EPOCHS, verbose=2)

unseen = padded([f"{text}={answer}" for text, answer in tests], end=[END])
masked, hidden = keras_seq.models.mask_tokens(unseen, MASK, VOCABULARY, rate=0.3, special_ids=(END,), seed=1)
best = bert.predict(masked, batch_size=TESTED, verbose=0).argmax(axis=-1)
print(f"right: {(best == hidden)[hidden > 0].mean():.1%} of what is hidden in unseen rows")

gaps = ["? may 1998=1998-05-07", "7 m?y 1998=1998-05-07", "7 may 19?8=1998-05-07", "7 may 1998=1998-05-?7"]
tokens = padded(gaps, end=[END])
best = ops.convert_to_numpy(bert(tokens)).argmax(axis=-1)
for text, filled in zip(gaps, np.where(tokens == MASK, best, tokens), strict=True):
    print(text, "->", write(filled))

"""
## Decoder only: GPT

GPT (Radford et al. 2018) is the decoder alone, without cross-attention: a language model. It reads the same rows,
learns to predict each character from those before it, and answers by going on after the "=". Source and target are one
sequence.
"""

gpt = keras_seq.models.TransformerLM(VOCABULARY, **sizes)
gpt.compile(keras.optimizers.Adam(2e-3, clipnorm=1.0))
gpt.fit(rows, batch_size=100, epochs=EPOCHS, verbose=2)

tokens = gpt.generate([read(text + "=") for text in test_texts], max_new_tokens=11, stop_tokens=(END,))
right = np.mean([write(row) == answer for row, answer in zip(tokens, test_answers, strict=True)])
print(f"right: {right:.1%} of {TESTED} unseen days")

"""
To write a token the model needs the keys and values of all tokens before. They do not change, since no step sees a
later one, so they are kept: that is the cache, here the state. The prompt fills it in one call, and each new token is
one step. The logits are those of the whole row at once:
"""

row = padded([f"{TEXT}=1998-05-07"])
whole = ops.convert_to_numpy(gpt(row))

prompt = len(TEXT) + 1
state = gpt.initial_state(batch_size=1, max_length=row.shape[1])
logits, state = gpt(row[:, :prompt], initial_state=state, return_state=True)
pieces = list(ops.convert_to_numpy(logits)[0])
for t in range(prompt, row.shape[1]):
    logits, state = gpt.step(ops.convert_to_tensor(row[:, t]), state)
    pieces.append(ops.convert_to_numpy(logits)[0])
assert np.allclose(whole[0], pieces, atol=1e-4)
print("after the prompt:", write(np.array(pieces[prompt - 1 : -1]).argmax(axis=-1)))

"""
## What can go wrong

- **Token 0 is a letter of yours.** It is padding: no step looks at it, and it does not count in the loss. Give your
  tokens other ids, or the model `pad_id=None`.
- **The loss of `fit` stays above that of `evaluate`.** `Transformer` has a dropout of 0.1 and a label smoothing of 0.1
  as in the paper, in training only. Here both are 0: the task is small and without noise.
- **A text longer than `max_length`.** Learned positions end there, and an error says so; sines, cosines and rotary
  positions go on, but a model knows little of lengths that it has not seen.
- **A cache that is full** is an error too. `initial_state(batch_size, max_length)` fixes its room; `generate` makes one
  that is long enough.
- **Right on test rows, wrong on yours.** Make yours as those of training were made. Without the end token this BERT
  fills most of the four gaps above wrong.
- **Rows that are all padding** give NaN in some libraries, a softmax over nothing. Here such attention is exactly 0.
- **A picture of weights is not a reason.** It shows where a head read, not what the model made of it (Jain & Wallace
  2019).
"""
