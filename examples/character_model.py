"""Train a character model on real text, then watch it write.

The text is the documentation of the Python language that comes with Python itself (`pydoc_data.topics`, about 465,000
characters): nothing is downloaded. Nine tenths are for training; on the last tenth the model is tested. A recurrent
language model reads a character and predicts the next one; what counts is how many bits it needs per character (a text
of 100 equally likely characters needs 6.6).

    KERAS_BACKEND=jax python examples/character_model.py                    # or torch, or tensorflow
    KERAS_BACKEND=jax python examples/character_model.py --minutes 20       # to run longer: better text
"""

import argparse
import math
import pathlib
import random
import time
from pydoc_data.topics import topics

import keras
import numpy as np

import keras_seq


def read_text():
    """The topics in a seeded random order, so that the last tenth is like the rest."""
    names = sorted(topics)
    random.Random(0).shuffle(names)
    return "\n".join(topics[name] for name in names)


def windows(tokens, length):
    """`(n, length + 1)`: pieces of the text; the last token of each, which is only predicted, begins the next."""
    n = (len(tokens) - 1) // length
    return np.stack([tokens[i * length : (i + 1) * length + 1] for i in range(n)])


class TimeBudget(keras.callbacks.Callback):
    """Stops training when the time is up, and lowers the learning rate in a straight line until then.

    The clock starts after the first batch, before which the model is compiled.
    """

    def __init__(self, seconds):
        super().__init__()
        self.seconds = seconds

    def on_train_begin(self, logs=None):
        self.start, self.peak = None, float(self.model.optimizer.learning_rate)

    def on_train_batch_end(self, batch, logs=None):
        self.start = self.start or time.monotonic()
        left = 1 - (time.monotonic() - self.start) / self.seconds
        self.model.optimizer.learning_rate = self.peak * max(left, 0.02)
        if left <= 0:
            self.model.stop_training = True


def bits_per_character(model, tokens):
    """The mean cross-entropy of the next character, in bits."""
    return model.evaluate(tokens, batch_size=16, verbose=0) / math.log(2)


def plot(history, before, path):
    """The learning curve in bits per character: the training loss of each epoch, and the held-out loss after it."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4))
    training, held_out = (np.array(history[name]) / math.log(2) for name in ("loss", "val_loss"))
    epochs = np.arange(1, len(training) + 1)
    axes.plot(epochs, training, label="training text")
    axes.plot([0, *epochs], [before, *held_out], label="held-out text")
    axes.set(xlabel="epoch", ylabel="bits per character", title="RecurrentLM on the Python documentation")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=2.25, help="time for training (default: %(default)s)")
    parser.add_argument("--units", type=int, default=256, help="size of the LSTM (default: %(default)s)")
    parser.add_argument("--characters", type=int, default=None, help="how much of the text to use (default: all)")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out"), help="where the plot goes")
    options = parser.parse_args(argv)

    keras.utils.set_random_seed(0)
    text = read_text()[: options.characters]
    alphabet = sorted(set(text))
    tokens = np.searchsorted(alphabet, list(text)).astype("int32")
    split = len(tokens) * 9 // 10
    training, held_out = windows(tokens[:split], 128), windows(tokens[split:], 512)
    print(f"{len(text):,} characters, {len(alphabet)} different; backend: {keras.config.backend()}")

    model = keras_seq.models.RecurrentLM(len(alphabet), options.units, cell="lstm", pad_id=None)
    model.compile(keras.optimizers.Adam(5e-3, clipnorm=1.0))
    before = bits_per_character(model, held_out)
    print(f"held-out text before training: {before:.2f} bits per character")

    history = model.fit(
        training,
        validation_data=(held_out,),
        batch_size=32,
        epochs=1000,
        callbacks=[TimeBudget(60 * options.minutes)],
    ).history
    after = bits_per_character(model, held_out)
    print(f"held-out text before training: {before:.2f} bits per character; after: {after:.2f}")

    options.out.mkdir(parents=True, exist_ok=True)
    plot(history, before, options.out / "learning_curve.png")
    print(f"learning curve: {options.out / 'learning_curve.png'}\n\nThe model writes:\n")
    prompt = "The "
    print(prompt, end="")
    for token in model.stream([alphabet.index(c) for c in prompt], 300, temperature=0.7, seed=0):
        print(alphabet[token], end="", flush=True)
    print("\n\nTo run longer, for a better text: python examples/character_model.py --minutes 20")
    return before, after


if __name__ == "__main__":
    main()
