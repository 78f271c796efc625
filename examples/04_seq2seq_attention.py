"""
# Seq2Seq with attention

Here a sequence becomes another one, of another length: the spelling of an English word becomes its pronunciation. You
train a recurrent encoder-decoder without and with attention, see what attention changes for long words, look at where
it looks, and search for the best output instead of taking the first that comes.
"""

import os

os.environ.setdefault("KERAS_BACKEND", "jax")  # or "torch", or "tensorflow": before Keras is imported

import keras
import numpy as np
from data import cmudict, padded  # examples/data
from keras import ops
from pronounce import END, FIRST, START, Spelling, error_rates  # examples/pronounce.py

import keras_seq

keras.utils.set_random_seed(0)

"""
## Data

CMUdict lists how English words are pronounced, in 39 phonemes. The models learn from words of at most eight letters.
They are tested on words that they have not seen, of four to fourteen letters: those of more than eight are longer than
anything in training.

A model reads numbers. `Spelling` numbers the letters and the phonemes from 3 on, because three ids are taken: 0 is
padding, which fills short rows up to the longest; 1 stands before the first phoneme; 2 ends each target, so that the
model can learn where to stop.
"""

LONGEST = 8
LENGTHS = range(4, 15)
TESTED = 100  # of each length
SHOWN = ["parody", "wireless", "storyteller"]  # not in training either
dictionary = {word: listed for word, listed in cmudict.words().items() if word.isalpha()}
spelling = Spelling(dictionary)

words = [word for word in dictionary if word not in SHOWN]
np.random.default_rng(0).shuffle(words)
tests = {n: [word for word in words if len(word) == n][:TESTED] for n in LENGTHS}
tested = [word for n in LENGTHS for word in tests[n]]
longer = [word for word in tested if len(word) > LONGEST]

WORDS = 30_000
held_out = set(tested)
training = [word for word in words if len(word) <= LONGEST and word not in held_out][:WORDS]
source = padded([spelling.source(word) for word in training])
target = padded([spelling.target(dictionary[word][0]) for word in training])
print("sources", source.shape, " targets", target.shape)
print("parody:", dictionary["parody"][0], "=", spelling.target(dictionary["parody"][0]))

"""
## An encoder and a decoder

One recurrent layer, the encoder, reads the letters in both directions. Its last state is all that the second one, the
decoder, gets: it starts from there and writes the phonemes one by one (Sutskever et al. 2014). The decoder is a
language model of phonemes, and at each step it sees the phoneme before.

Which phoneme before? In training it is the true one, whatever the model would have said. That is called teacher
forcing. All steps of a target can then be trained at once, and an early mistake does not spoil the rest. `fit` does it
by itself: the decoder sees the start token and all targets but the last. The loss is the mean of -log p, where p is the
probability that the model gives to the true phoneme.
"""

EPOCHS = 3
BATCH = 128


def trained(**options):
    """A model, and its loss per epoch."""
    keras.utils.set_random_seed(0)
    model = keras_seq.models.Seq2Seq(
        source_vocab_size=FIRST + len(spelling.letters),
        target_vocab_size=FIRST + len(spelling.phonemes),
        d_model=128,
        cell="gru",
        input_feeding=False,  # all steps of a target at once
        start_id=START,
        **options,
    )
    model.compile(keras.optimizers.Adam(2e-3, clipnorm=1.0))
    return model, model.fit(source, target, batch_size=BATCH, epochs=EPOCHS, verbose=0).history["loss"]


print("what the decoder sees:    (start) P EH R AH D IY")
print("what it is to say:        P EH R AH D IY (end)")
plain, plain_loss = trained(attention=None)
print("loss without attention:  ", np.round(plain_loss, 2), "nats per phoneme")

r"""
## Attention

A state of 128 numbers has to hold the whole word, however long it is. With attention the encoder keeps its output at
every letter, \(m_1 \dots m_s\), and the decoder looks back at them at each step (Bahdanau et al. 2015). From its
state \(h_t\) it gives each letter a score, turns the scores into weights that sum to 1, and reads the weighted mean:

\[ e_{ti} = v^\top \tanh(W h_t + U m_i), \qquad a_{ti} = \frac{\exp e_{ti}}{\sum_j \exp e_{tj}},
\qquad c_t = \sum_i a_{ti} m_i \]

The next phoneme is predicted from \(h_t\) and \(c_t\). Nobody tells the model where to look; that is learned along
with the rest.
"""

model, loss = trained(attention="additive")
print("loss with attention:     ", np.round(loss, 2), "nats per phoneme")

"""
Both models write the pronunciations of the test words now, each step from their own phonemes. `generate` takes the
most probable phoneme at each step. The phoneme error rate counts how many phonemes have to be inserted, deleted or
replaced to get to the nearest pronunciation in the dictionary, per phoneme of that one.
"""

MAX_PHONEMES = 24
prompts = padded([spelling.source(word) for word in tested])


def pronounced(model):
    """`{word: what the model says}` of all test words."""
    tokens = model.generate(prompts, MAX_PHONEMES, stop_tokens=(END,))
    return dict(zip(tested, map(spelling.pronunciation, tokens), strict=True))


def errors(said, words):
    """The phoneme error rate on some of them."""
    return error_rates([said[word] for word in words], [dictionary[word] for word in words])[0]


said = {"without attention": pronounced(plain), "with attention": pronounced(model)}
rates = {name: [errors(found, tests[n]) for n in LENGTHS] for name, found in said.items()}
for name, found in said.items():
    print(f"{name:18} all test words: {errors(found, tested):.1%} errors, the longer: {errors(found, longer):.1%}")
figure = keras_seq.plotting.curves(
    rates, "letters of the word", "phoneme error rate", "trained on at most 8 letters", x=list(LENGTHS), marker="."
)

"""
Without attention the errors grow with the length, already within the lengths of the training words: more has to go
through the same state. With attention there are fewer everywhere. Words longer than all in training are harder for
both: nothing here has taught the decoder to go on after its tenth phoneme.

## Where it looks

`alignment` gives the weights for a source and a target: a row for each phoneme, a column for each letter.
"""

tokens = model.generate([spelling.source(word) for word in SHOWN], MAX_PHONEMES, stop_tokens=(END,))
found = [spelling.pronunciation(row) for row in tokens]
weights = [
    model.alignment(spelling.source(word), spelling.target(text)) for word, text in zip(SHOWN, found, strict=True)
]
assert np.allclose(weights[0].sum(axis=-1), 1, atol=1e-5)  # each phoneme shares out a whole
for word, text in zip(SHOWN, found, strict=True):
    print(f"{word:12} {text:28} dictionary: {' / '.join(dictionary[word])}")
figure = keras_seq.plotting.alignments(
    weights, [list(word) for word in SHOWN], [[*text.split(), "(end)"] for text in found], SHOWN
)

"""
The dark fields run from the upper left to the lower right: phonemes come in the order of their letters, and the model
has found that out by itself. A field that is grey shares its weight with its neighbours.

## Exposure bias

In training the decoder always saw the true phoneme before; now it sees its own, and a mistake leads it to where it has
never been. This gap is called exposure bias. It can be measured: let the same model predict each phoneme after the true
ones, as in training, and compare.
"""


def told_and_alone(model):
    """Phoneme error rates on the test words: each phoneme predicted after the true ones, and after its own."""
    first = [dictionary[word][:1] for word in tested]
    targets = padded([spelling.target(listed[0]) for listed in first])
    inputs = np.concatenate([np.full_like(targets[:, :1], START), targets[:, :-1]], axis=1)
    tokens = model.predict((prompts, inputs), batch_size=len(tested), verbose=0).argmax(axis=-1)
    tokens[targets == 0] = 0
    told, _ = error_rates(map(spelling.pronunciation, tokens), first)
    alone, _ = error_rates(pronounced(model).values(), first)
    return told, alone


for name, each in {"without attention": plain, "with attention": model}.items():
    told, alone = told_and_alone(each)
    print(f"{name:18} told the true phonemes before: {told:.1%} errors, on its own: {alone:.1%}")

"""
Without attention the model depends on what it has written, and is worse on its own. With attention there is no such
gap here: whatever it has written, it can find its place again by a look at the letters.

Scheduled sampling (Bengio et al. 2015) closes the gap from the side of training: now and then, and more often as
training goes on, the decoder sees a phoneme that it has drawn itself. A schedule is the probability of the true one.
Three are at hand, and any function of the step will do.
"""

STEPS = EPOCHS * -(-len(source) // BATCH)
schedules = {
    "LinearSampling": keras_seq.models.LinearSampling(STEPS, floor=0.5),
    "ExponentialSampling": keras_seq.models.ExponentialSampling(0.5 ** (2 / STEPS)),
    "InverseSigmoidSampling": keras_seq.models.InverseSigmoidSampling(k=max(1, STEPS / 8)),
}
steps = np.arange(STEPS + 1)
figure = keras_seq.plotting.curves(
    {name: (steps, schedule(steps)) for name, schedule in schedules.items()},
    "training step",
    "probability of the true token",
    "schedules",
)

sampled, sampled_loss = trained(attention=None, scheduled_sampling=schedules["LinearSampling"])
told, alone = told_and_alone(sampled)
print("loss with scheduled sampling:", np.round(sampled_loss, 2), "nats per phoneme")
print(f"scheduled sampling told the true phonemes before: {told:.1%} errors, on its own: {alone:.1%}")

"""
The loss is higher, because the task has become harder: the phonemes before are wrong now and then. Told the truth the
model is worse than without scheduled sampling, on its own it is better, and the gap is nearly closed.
"""

"""
## Beam search

The most probable phoneme at each step need not begin the most probable word. Beam search keeps the best few beginnings
at each length, here four, and returns several results from good to bad. The score of a result is the sum of the
logarithms of its probabilities, so it can be compared: a difference of 0.7 means twice as probable. The
pronunciation in the dictionary may well be among the results without being the first.
"""

for word in SHOWN[:2]:
    letters = spelling.source(word)
    beams = model.beam_search(letters, MAX_PHONEMES, num_beams=4, num_results=4, stop_tokens=(END,))
    print(f"{word}, greedy: {found[SHOWN.index(word)]}")
    for tokens, score in zip(beams.tokens, beams.scores, strict=True):
        print(f"   {score:6.2f}  probability {np.exp(score):.3f}  {spelling.pronunciation(tokens)}")

"""
The score is nothing but what the model itself says of the output: here is the same sum, from one call with the output
as the target.
"""

best, n = beams.tokens[0], beams.lengths[0]
inputs = np.concatenate([[START], best[: n - 1]])
logits = model((np.array([letters]), inputs[None]))[0]
log_p = ops.convert_to_numpy(ops.log_softmax(logits))[np.arange(n), best[:n]]
print(f"{log_p.sum():.4f} = {beams.scores[0]:.4f}")
assert np.allclose(log_p.sum(), beams.scores[0], atol=1e-4)

"""
## What can go wrong

- **The accuracy in `fit` is good and the output is bad.** What `fit` reports is told the truth at each step. Measure
  what you want: generate, and count the errors in that.
- **The output does not stop.** A target needs a token of yours at its end, and `generate` has to know it:
  `stop_tokens=(END,)`. Otherwise all `max_new_tokens` are written.
- **A token of yours is 0.** Ids that are 0 are padding: they do not count in the loss, and are never generated. Begin
  with 1, and leave one id for `start_id`.
- **Beams make the output shorter.** Each further token lowers the sum of logarithms, so long results lose. A
  `length_penalty` of 0.6 to 1 makes up for it.
- **The first call of `generate` takes seconds.** JAX and TensorFlow compile for each new shape. Pad your prompts to
  one length, and decode many at once.
- **Training is slow.** By default each step sees what the step before read (`input_feeding=True`, Luong et al. 2015),
  and steps follow one another. `input_feeding=False`, as here, runs them all at once. Scheduled sampling has to draw
  step by step as well.
- **Cutting an inference model out of the trained one** is not needed: `save`, `keras.models.load_model`, `generate`.
"""
