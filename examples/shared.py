"""What several examples use: training for a given time, and pictures of what a model looked at."""

import atexit
import gc
import math
import time

import keras


class TimeBudget(keras.callbacks.Callback):
    """Stops training when the time is up, and lowers the learning rate along a cosine until then.

    Because the learning rate follows the clock and not the number of steps, a short run ends as calmly as a long one,
    on a fast machine as on a slow one.

    Args:
        seconds: the time, compilation included.
    """

    def __init__(self, seconds):
        super().__init__()
        self.seconds = seconds

    def on_train_begin(self, logs=None):
        self.start, self.peak = time.monotonic(), float(self.model.optimizer.learning_rate)

    def on_train_batch_end(self, batch, logs=None):
        part = (time.monotonic() - self.start) / self.seconds
        self.model.optimizer.learning_rate = self.peak * (0.01 + 0.99 * math.cos(math.pi / 2 * min(part, 1)) ** 2)
        if part >= 1:
            self.model.stop_training = True
            # TensorFlow complains of a data set that was not read to its end, if it has to clean up at the very last.
            atexit.register(gc.collect)


def plot_alignments(alignments, path):
    """Saves a picture of how much each target token looked at each source token.

    Args:
        alignments: list of `(title, source tokens, target tokens, weights)`: texts, and an array of at least
            `(len(target), len(source))`.
        path: of the PNG file, whose folder is made if need be.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    size = max(max(len(source), len(target)) for _, source, target, _ in alignments)
    side = 1.5 + 0.28 * size
    figure, row = plt.subplots(1, len(alignments), figsize=(side * len(alignments), side), squeeze=False)
    for axes, (title, source, target, weights) in zip(row[0], alignments, strict=True):
        axes.imshow(weights[: len(target), : len(source)], cmap="Greys", vmin=0, vmax=1)
        axes.set_xticks(range(len(source)), source, rotation=90 if max(map(len, source)) > 1 else 0)
        axes.set_yticks(range(len(target)), target)
        axes.set_title(title)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
