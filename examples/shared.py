"""What several examples use: a text, training for a given time, and saving pictures."""

import atexit
import gc
import math
import random
import time
from pydoc_data.topics import topics

import keras
import numpy as np


def python_documentation(characters=None):
    """The documentation of the Python language that comes with Python, a character a token.

    Its topics are in a seeded random order, so that the last tenth is like the rest.

    Args:
        characters: how much of the text to use; default all, about 465,000.

    Returns:
        the alphabet as a list of characters, the first nine tenths of the text as token ids `(n,)`, and the last tenth.
    """
    names = sorted(topics)
    random.Random(0).shuffle(names)
    text = "\n".join(topics[name] for name in names)[:characters]
    alphabet = sorted(set(text))
    tokens = np.searchsorted(alphabet, list(text)).astype("int32")
    split = len(tokens) * 9 // 10
    return alphabet, tokens[:split], tokens[split:]


def windows(tokens, length):
    """`(n, length + 1)`: pieces of the text; the last token of each, which is only predicted, begins the next."""
    n = (len(tokens) - 1) // length
    return np.stack([tokens[i * length : (i + 1) * length + 1] for i in range(n)])


def bits_per_character(model, pieces):
    """The mean cross-entropy of the next character, in bits."""
    return model.evaluate(pieces, batch_size=16, verbose=0) / math.log(2)


class TimeBudget(keras.callbacks.Callback):
    """Stops training when the time is up, and lowers the learning rate along a cosine until then.

    Because the learning rate follows the clock and not the number of steps, a short run ends as calmly as a long one,
    on a fast machine as on a slow one.

    Args:
        seconds: the time.
        compilation: whether the first batch, before which the model is compiled, counts.

    Attributes:
        batches: how many have counted.
        elapsed: how many seconds have.
    """

    def __init__(self, seconds, compilation=True):
        super().__init__()
        self.seconds, self.compilation = seconds, compilation

    def on_train_begin(self, logs=None):
        self.start, self.peak = time.monotonic(), float(self.model.optimizer.learning_rate)
        self.batches = 0 if self.compilation else -1

    def on_train_batch_end(self, batch, logs=None):
        self.batches += 1
        if self.batches == 0:
            self.start = time.monotonic()
        self.elapsed = time.monotonic() - self.start
        part = self.elapsed / self.seconds
        self.model.optimizer.learning_rate = self.peak * (0.01 + 0.99 * math.cos(math.pi / 2 * min(part, 1)) ** 2)
        if part >= 1:
            self.model.stop_training = True
            # TensorFlow complains of a data set that was not read to its end, if it has to clean up at the very last.
            atexit.register(gc.collect)


def save(figure, path):
    """Saves a figure of `keras_seq.plotting` as PNG and closes it; makes the folder if need be."""
    from matplotlib import pyplot

    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
