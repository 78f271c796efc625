"""
# Padding, masks, packed sequences

Sequences have different lengths, and an array has one. So short sequences are filled up, and a mask says which steps
are real. Here you see what a mask must do, how it gets from one layer to the next and where it is lost, what padding
costs, and two ways to have less of it.
"""

import os

os.environ.setdefault("KERAS_BACKEND", "jax")  # or "torch", or "tensorflow": before Keras is imported

import time

import keras
import numpy as np
from data import Bucketed, padded
from keras import ops

import keras_seq

keras.utils.set_random_seed(0)

"""
## Sequences of different lengths

The data: words over an alphabet of eight letters, the numbers 1 to 8. Most words are short, a few are long. The
question is which of the letters 1 and 2 came last. 0 is no letter: it is the **padding** that makes an array of them.
"""

LONGEST = 100
SEQUENCES = 4000
TESTED = 1000


def words(n, seed):
    """`n` lists of letters from 1 to 8, and for each of them which of the letters 1 and 2 came last."""
    rng = np.random.default_rng(seed)
    lengths = np.clip(rng.lognormal(2.5, 0.7, n), 3, LONGEST).astype(int)
    sequences = [rng.integers(1, 9, length) for length in lengths]
    for sequence in sequences:  # at least one of the two letters is there
        sequence[rng.integers(len(sequence))] = rng.integers(1, 3)
    last = [sequence[np.flatnonzero(sequence <= 2)[-1]] for sequence in sequences]
    return [sequence.tolist() for sequence in sequences], np.array(last)


sequences, labels = words(SEQUENCES, seed=1)
test_sequences, test_labels = words(TESTED, seed=2)
tokens = padded(test_sequences[:16])
mask = tokens != 0
print("lengths from", min(map(len, sequences)), "to", max(map(len, sequences)))
print("the first word:", test_sequences[0], "\nin the array:  ", tokens[0].tolist())
print(f"real steps among those of the array: {mask.mean():.0%}")
figure = keras_seq.plotting.heatmap(mask, "time step", "sequence", "a batch of 16: what is real (yellow)")

"""
The **mask** is an array `(batch, time)` of booleans, True where a step is real. It belongs to the data, as the array
alone does not tell: is a 0 among measurements a value or a gap?

## What a mask must do

The rule is simple: **a padded sequence gives what it gives alone.** A recurrent layer keeps its state over a padded
step, an attention layer does not look at it. Then it does not matter on which side the padding stands, or whether there
are holes in the middle, such as lost measurements. Here is a word in three arrays, through two layers.
"""

word = np.array(test_sequences[0])
n = len(word)
arrays = {
    "right": np.concatenate([word, np.zeros(5, int)])[None],
    "left": np.concatenate([np.zeros(5, int), word])[None],
    "holes": np.insert(word, [1, 2, n - 1, n - 1, n], 0)[None],
}
embedding = keras.layers.Embedding(9, 16, keras.initializers.RandomNormal(stddev=1.0))
gru = keras_seq.layers.GRU(32)
attention = keras_seq.layers.MultiHeadAttention(num_heads=2, key_dim=8, position="rotary")
alone = ops.convert_to_numpy(gru(embedding(word[None])))
attention_alone = ops.convert_to_numpy(attention(embedding(word[None])))
for name, array in arrays.items():
    real, x = array != 0, embedding(array)
    y = ops.convert_to_numpy(gru(x, mask=real))
    assert np.allclose(y, alone, atol=1e-6)
    attended = ops.convert_to_numpy(attention(x, mask=real))
    assert np.allclose(attended[real], attention_alone[0], atol=1e-5)
    without = np.abs(ops.convert_to_numpy(gru(x)) - alone).max()
    print(f"{name:6}  {array[0]}  without the mask the GRU is off by {without:.0e}")

"""
Without a mask the GRU goes on computing over the padding on the right, and what it has read fades. With padding on the
left it begins the word with a state that the padding made; this GRU, not trained yet, has forgotten most of that at the
end of the word.

## NaN in the padding

A stricter form of the rule: what stands in the padding does not count at all, even if it is NaN. That matters for
gradients too. A layer that computes with the padding and multiplies by 0 afterwards has 0 times NaN in its gradient,
which is NaN. Below the same model makes one step of gradient descent, once with zeros in the padding and once with NaN.
The weights after it are the same. One of the rows has no real step: its state is the first one, 0.
"""

rng = np.random.default_rng(0)
real = np.array([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0], [0, 1, 0, 1, 1, 0], [0, 0, 0, 0, 0, 0]], bool)
values = rng.normal(size=(4, 6, 3)).astype("float32")
after = {}
for fill in (0, np.nan):
    keras.utils.set_random_seed(1)
    inputs, given = keras.Input((None, 3)), keras.Input((None,), dtype="bool")
    model = keras.Model([inputs, given], keras.layers.Dense(1)(keras_seq.layers.GRU(8)(inputs, mask=given)))
    model.compile(keras.optimizers.SGD(0.1), "mse")
    x = np.where(real[:, :, None], values, np.float32(fill))
    model.fit([x, real], np.ones((4, 1)), batch_size=4, verbose=0)
    after[str(fill)] = model.get_weights()
for zeros, nans in zip(after["0"], after["nan"], strict=True):
    assert np.allclose(zeros, nans, atol=1e-6)
empty = keras_seq.layers.GRU(4)(x, mask=real)[3]
print("state of the row without a real step:", ops.convert_to_numpy(empty))

"""
An attention layer has the same problem with such a row: a softmax over nothing is 0 divided by 0. Here such a query
gets 0 from the heads. (Then comes the output projection, whose bias starts at 0.)
"""

y = ops.convert_to_numpy(attention(embedding(np.zeros((1, 4), int)), mask=np.zeros((1, 4), bool)))
assert np.array_equal(y, np.zeros_like(y))

"""
## How the mask travels

You do not have to pass the mask by hand. `Embedding(mask_zero=True)` makes it of the token ids and attaches it to its
output; most Keras layers take it from their input and attach it to what they return. The first layer that knows what to
do with it uses it.

But it is attached to an array, and an array that you compute yourself has none. A plain `+` loses the mask without a
word. So does a layer that does not know masks, such as `Conv1D`, with a warning.
"""

with_mask = keras.layers.Embedding(9, 16, keras.initializers.RandomNormal(stddev=1.0), mask_zero=True)
dense, add = keras.layers.Dense(16), keras.layers.Add()
stack = keras_seq.layers.Stack([keras_seq.layers.Residual(keras.layers.Dense(16)), gru])
paths = {
    "straight on": gru,
    "keras.layers.Dense": lambda h: gru(dense(h)),
    "keras.layers.Add": lambda h: gru(add([h, h])),
    "h + h": lambda h: gru(h + h),
    "h + h, mask passed": lambda h: gru(h + h, mask=with_mask.compute_mask(x)),
    "Residual in a Stack": stack,
}
for name, path in paths.items():
    outputs = []
    for x in (arrays["right"], word[None]):
        outputs.append(ops.convert_to_numpy(path(with_mask(x))))
    off = np.abs(outputs[0] - outputs[1]).max()
    print(f"{name:20}  {'the mask arrived' if off < 1e-5 else f'the mask is lost: off by {off:.2f}'}")

"""
`Stack`, `Residual`, the Transformer blocks and the models of this library hand the mask on as an argument, and do not
rely on what is attached. The models take token ids and make the mask themselves: wherever a token is `pad_id`, which is
0 unless you say otherwise.

## The last step, and the last real step

`GRU(32)` returns its state after the last real step. If a layer returns sequences, the last column is not the last real
step: for an attention layer it is a step of padding. Take the step that you mean.
"""

encoder = keras_seq.models.TransformerEncoder(9, 16, num_layers=1, num_heads=2)  # pad_id=0
word_alone = ops.convert_to_numpy(encoder(word[None]))
y = encoder(arrays["right"])
last = ops.max(ops.where(arrays["right"] != 0, ops.arange(n + 5), 0), axis=1)  # the index of the last real step
last_real = ops.take_along_axis(y, last[:, None, None], axis=1)[:, 0]
assert np.allclose(ops.convert_to_numpy(last_real), word_alone[:, -1], atol=1e-5)
off = np.abs(ops.convert_to_numpy(y)[:, -1] - word_alone[:, -1]).max()
print(f"the last column is off by {off:.2f}, the last real step by nothing")

"""
## Loss and metrics

If there is an answer for each step, the loss must leave out the padding. Three ways, on the same four words, padded to
their longest and padded to 100.

- The output carries a mask, as after an `Embedding(mask_zero=True)`: Keras's losses and metrics leave out what it
  hides.
- You give `sample_weight`, 0 at padded steps. Then mind the mean: Keras divides by the number of all steps, padding
  included, so that the loss, and with it the gradient, shrinks with the padding. The reduction
  `"mean_with_sample_weight"` divides by the sum of the weights. Give metrics as `weighted_metrics`, or they count the
  padding.
- The language models of this library leave out the padding by themselves.
"""


def tagger(mask_zero):
    keras.utils.set_random_seed(0)
    embedding = keras.layers.Embedding(9, 16, mask_zero=mask_zero)
    return keras.Sequential([embedding, keras_seq.layers.GRU(16, return_sequences=True), keras.layers.Dense(9)])


def losses(model, loss, weighted):
    """The losses of the four words, padded to their longest and to 100."""
    found = []
    for length in (None, 100):
        x = padded(test_sequences[:4], length)
        weight = (x != 0).astype("float32") if weighted else None
        value = loss(x, model(x), sample_weight=weight)  # the task: say the letter that you read
        found.append(float(ops.convert_to_numpy(value)))
    return found


def cross_entropy(**options):
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True, **options)


found = {
    "neither": losses(tagger(mask_zero=False), cross_entropy(), False),
    "mask": losses(tagger(mask_zero=True), cross_entropy(), False),
    "sample_weight": losses(tagger(mask_zero=False), cross_entropy(), True),
    "weighted mean": losses(tagger(mask_zero=False), cross_entropy(reduction="mean_with_sample_weight"), True),
}
for name, (short, long) in found.items():
    print(f"{name:14}  padded to the longest: {short:.4f}   to 100: {long:.4f}")
assert np.allclose(*found["mask"], rtol=1e-5)
assert np.allclose(*found["weighted mean"], rtol=1e-5)

language_model = keras_seq.models.RecurrentLM(vocab_size=9, d_model=16)
language_model.compile("adam")
short, long = (language_model.evaluate(padded(test_sequences[:4], k), verbose=0) for k in (None, 100))
print(f"RecurrentLM     padded to the longest: {short:.4f}   to 100: {long:.4f}")
assert np.isclose(short, long, rtol=1e-5)

"""
## With and without

Does a network not learn by itself that 0 means nothing? Here is the question from above, which of the letters 1 and 2
came last, to a GRU with a mask and without, padded on the right and on the left to the longest word of all. There are
three logits: for 1, for 2, and for 0, which is never the answer and is of use below.
"""

EPOCHS = 4


def classifier(mask_zero):
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [keras.layers.Embedding(9, 16, mask_zero=mask_zero), keras_seq.layers.GRU(32), keras.layers.Dense(3)]
    )
    model.compile(keras.optimizers.Adam(3e-3), cross_entropy(ignore_class=0), metrics=["accuracy"])
    return model


def aligned(sequences, side):
    """The sequences in an array `(n, LONGEST)`, padded on one side."""
    if side == "right":
        return padded(sequences, LONGEST)
    return padded([sequence[::-1] for sequence in sequences], LONGEST)[:, ::-1].copy()


losses_of, models = {}, {}
for side in ("right", "left"):
    x, x_test = aligned(sequences, side), aligned(test_sequences, side)
    for mask_zero in (True, False):
        model = classifier(mask_zero)
        name = f"{side}, {'mask' if mask_zero else 'no mask'}"
        fitted = model.fit(x, labels, 50, EPOCHS, validation_data=(x_test, test_labels), verbose=0)
        losses_of[name], models[name] = fitted.history["val_loss"], model
        print(f"{name:14}  test accuracy after each epoch:", *(f"{a:.3f}" for a in fitted.history["val_accuracy"]))
figure = keras_seq.plotting.curves(
    losses_of, "epoch", "test loss in nats", "which letter came last", log="y", marker="."
)

"""
With a mask the side does not matter: the two lines lie on each other. Padded on the right, the GRU without a mask does
no better than a coin: it would have to carry the answer over up to 97 steps of padding. Padded on the left it learns
nearly as well, since the answer is fresh at the end. But it has learnt to live with the padding that it saw. Here is by
how much the logit of the right letter is above that of the other, for one word with ever more padding.
"""

for name, model in models.items():
    margins = []
    for length in (len(test_sequences[0]), 50, LONGEST, 200):
        row = padded(test_sequences[:1], length)
        row = np.roll(row, length - len(test_sequences[0]), axis=1) if name.startswith("left") else row
        logits = ops.convert_to_numpy(model(row))[0]
        margins.append(logits[test_labels[0]] - logits[3 - test_labels[0]])
    print(f"{name:14}  no padding, to 50, 100, 200:", *(f"{margin:6.3f}" for margin in margins))
    assert "no mask" in name or np.allclose(margins, margins[0], atol=1e-4)

"""
With a mask the answer is the same, however long the array is.

## What padding costs

The mask saves no time here: the array is computed as it is, padding included. To save time, put sequences of similar
lengths into one batch. These are **buckets**: a word goes into the shortest that holds it, and a batch has words of one
bucket. `data.Bucketed` (in the folder of the examples) is a `keras.utils.PyDataset` of such batches, for sequences with
target sequences, here of length one. It fills the last batch of each bucket with rows whose target is 0, which
`ignore_class=0` in the loss leaves out.

Why not pad each batch to its own longest sequence? It computes more, and each new length is compiled anew. With buckets
there are as many lengths as buckets.
"""

BUCKETS = 6
batches = Bucketed(sequences, [[label] for label in labels], batch_size=50, buckets=BUCKETS)
print("lengths of the buckets:", [length for length, _ in batches.buckets])

x = aligned(sequences, "right")
seconds = {}
for name, given in {"one length": {"x": x, "y": labels, "batch_size": 50}, "buckets": {"x": batches}}.items():
    model = classifier(mask_zero=True)
    model.fit(**given, epochs=1, verbose=0)  # compiles
    epochs = []
    for _ in range(EPOCHS - 1):
        start = time.perf_counter()
        model.fit(**given, epochs=1, verbose=0)
        epochs.append(time.perf_counter() - start)
    seconds[name] = min(epochs)  # the epoch that other programs disturbed least
    accuracy = model.evaluate(aligned(test_sequences, "right"), test_labels, verbose=0)[1]
    print(f"{name:10}  test accuracy {accuracy:.3f}")
print(f"an epoch with buckets takes {seconds['buckets'] / seconds['one length']:.2f} times as long")

"""
The time falls with the number of steps that are computed. How far depends on the machine and the model: each batch
costs something whatever its length.

## Packed sequences

Attention carries nothing from step to step, so nothing binds it to one sequence per row. **Packing** puts several into
one row, one after another. **Segment ids** say which step belongs to which sequence: 1, 1, 1, 2, 2, 3, ..., and 0 is
padding. A step sees the steps of its own segment alone.

To fill the rows well, take the sequences from long to short and put each into the first row with room for it.
"""


def packed(sequences, length):
    """Rows of sequences, and tokens and segment ids `(rows, length)`."""
    rows, used = [], []
    for sequence in sorted(sequences, key=len, reverse=True):
        row = next((i for i, n in enumerate(used) if n + len(sequence) <= length), len(rows))
        if row == len(rows):
            rows.append([])
            used.append(0)
        rows[row].append(sequence)
        used[row] += len(sequence)
    tokens = padded([[token for sequence in row for token in sequence] for row in rows], length)
    segments = padded([[i for i, sequence in enumerate(row, start=1) for _ in sequence] for row in rows], length)
    return rows, tokens, segments


some_words = sorted(test_sequences[:50], key=len)[:15:3]
rows, tokens, segments = packed(some_words, 42)
print("tokens     ", *tokens[0], "\nsegment ids", *segments[0])

y, weights = attention(embedding(tokens), mask=tokens != 0, segment_ids=segments, return_attention_scores=True)
figure = keras_seq.plotting.attention_maps(weights[0, :1], titles=["who attends to whom in the packed row"])

"""
Each block on the diagonal is one word, whose steps attend to each other; the blank corner is padding. The models take
segment ids too, and count the positions of each segment from its beginning. So a word gives in the packed row what it
gives in a row of its own.
"""

together = ops.convert_to_numpy(encoder(tokens, segment_ids=segments))
one_each = ops.convert_to_numpy(encoder(padded(rows[0])))  # a word in each row
for i, sequence in enumerate(rows[0]):
    assert np.allclose(together[0, segments[0] == i + 1], one_each[i, : len(sequence)], atol=1e-5)

"""
How many steps are computed for each real one, for the words of the training set, in batches of 50?
"""

real_steps = sum(map(len, sequences))
computed = {
    "one length": SEQUENCES * LONGEST,
    "each batch to its longest": sum(padded(sequences[i : i + 50]).size for i in range(0, SEQUENCES, 50)),
    "buckets": sum(batches[i][0].size for i in range(len(batches))),
    "packed": packed(sequences, LONGEST)[1].size,
}
for name, steps in computed.items():
    print(f"{name:26} {steps / real_steps:.2f} steps for each real one")
figure = keras_seq.plotting.bars(
    {name: steps / real_steps for name, steps in computed.items()},
    "steps computed for each real one",
    "what padding costs",
)

"""
## What can go wrong

- **Real steps disappear.** `mask_zero=True` and `pad_id=0` hide each 0: number your vocabulary from 1. `Masking()`
  hides each step of measurements whose features are all 0. And `Masking(mask_value=nan)` hides nothing, as NaN equals
  nothing, not even itself. Make the mask where you make the padding, and pass it.
- **The weights become NaN although the padding is masked.** The NaN went through a layer before the first one that
  knows the mask. A `Dense` there has 0 times NaN in the gradient of its kernel. Put 0 into the padding, or put the
  `Dense` inside a `Stack`, which clears the padding at its entrance.
- **`expects a mask of dtype bool`.** An array of 0 and 1 is refused, since True must mean real: other libraries mark
  the padding instead. Pass `tokens != 0`.
- **The mean over time depends on the padding.** `ops.mean(y, axis=1)` counts it. `GlobalAveragePooling1D` takes the
  mask, if it is still there.
- **Each batch takes long, and nothing else is slow.** Each new length is compiled anew on JAX. Use few lengths.
- **A row without a real step gives NaN or nonsense elsewhere.** `torch.nn.MultiheadAttention` gives NaN, and Keras's
  attention the mean of what the mask hides. Such rows come up, as when a batch is filled up. Here they do no harm.
- **A recurrent layer in a packed row** carries its state from one sequence into the next: it takes no segment ids. Use
  buckets there.
"""
