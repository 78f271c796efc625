"""Batches of few shapes from pairs of sequences of all lengths."""

import keras
import numpy as np


class Bucketed(keras.utils.PyDataset):
    """Batches `(sources (b, s), targets (b, t))` for `model.fit` on any backend, padded with 0.

    A row goes into the first bucket that holds its source and its target, and a batch has rows of one bucket: little is
    padding, and a backend that compiles does so once for each bucket. So that all batches of a bucket have one shape,
    the last is filled with sources whose target is padding alone, which the models of keras_seq do not count.

    Args:
        sources, targets: lists of lists of token ids, none of them 0.
        batch_size: rows of each batch.
        buckets: at most how many buckets, which are then made at quantiles of the lengths, the last for the longest
            hundredth; or their lengths `[(source, target), ...]`, ascending, as in `buckets` of another `Bucketed`.
        shuffle: whether each epoch has its own random order; else rows come by bucket in the order given, but for the
            second batch.
        seed: of that order.

    Raises: ValueError if there are not as many targets as sources, there is none, or one fits no bucket.

    Example:

        batches = Bucketed([[5, 6], [7]], [[3, 2], [4, 4, 2]], batch_size=2)
        model.fit(batches, epochs=3)
    """

    def __init__(self, sources, targets, batch_size, buckets=6, shuffle=True, seed=0, **kwargs):
        super().__init__(**kwargs)
        if len(sources) != len(targets) or not len(sources):
            raise ValueError(f"As many targets as sources are needed. Received: {len(sources)}, {len(targets)}")
        lengths = np.array([[len(source), len(target)] for source, target in zip(sources, targets, strict=True)])
        if isinstance(buckets, int):
            # The few longest rows have the last bucket for themselves, lest many be padded to their length.
            quantiles = np.quantile(lengths, [*np.linspace(0, 0.99, buckets)[1:], 1], axis=0, method="higher")
            buckets = sorted({tuple(map(int, edges)) for edges in quantiles})
        # The first bucket long enough for the source, or that for the target: the later one is long enough for both.
        edges = np.array(buckets)
        fits = np.maximum(*(np.searchsorted(edges[:, i], lengths[:, i]) for i in (0, 1)))
        if fits.max() == len(buckets):
            raise ValueError(f"Row {fits.argmax()} is longer than the last bucket, {buckets[-1]}.")
        self.buckets, self.batch_size, self.shuffle = buckets, batch_size, shuffle
        self._rows = [np.flatnonzero(fits == i) for i in range(len(buckets))]
        self._arrays = [
            (padded([sources[i] for i in rows], source), padded([targets[i] for i in rows], target))
            for rows, (source, target) in zip(self._rows, buckets, strict=True)
        ]
        self._random = np.random.default_rng(seed)
        self.on_epoch_end()

    def on_epoch_end(self):
        """Draws the order of the next epoch."""
        self._batches = []
        for bucket, rows in enumerate(self._rows):
            order = self._random.permutation(len(rows)) if self.shuffle else np.arange(len(rows))
            self._batches += [(bucket, order[i : i + self.batch_size]) for i in range(0, len(rows), self.batch_size)]
        if self.shuffle:
            self._random.shuffle(self._batches)
        # On TensorFlow, Keras learns from the first two batches which lengths vary: they are of the two end buckets.
        buckets = [bucket for bucket, _ in self._batches]
        ends = dict.fromkeys((buckets.index(min(buckets)), buckets.index(max(buckets))))
        rest = [batch for i, batch in enumerate(self._batches) if i not in ends]
        self._batches = [self._batches[i] for i in ends] + rest

    def __len__(self):
        return len(self._batches)

    def __getitem__(self, index):
        bucket, rows = self._batches[index]
        source, target = (array[np.resize(rows, self.batch_size)] for array in self._arrays[bucket])
        target[len(rows) :] = 0
        return source, target


def padded(sequences, length=None):
    """`(n, length)` int32: token ids with 0 after them; default length: that of the longest."""
    length = max(map(len, sequences), default=0) if length is None else length
    out = np.zeros((len(sequences), length), "int32")
    for row, sequence in zip(out, sequences, strict=True):
        row[: len(sequence)] = sequence
    return out
