"""Where the data sets lie, and how they are split."""

import os
import pathlib

import numpy as np


def cache_folder():
    """The folder for what is downloaded or prepared: `$KERAS_SEQ_DATA`, or `~/.cache/keras_seq`."""
    return pathlib.Path(os.environ.get("KERAS_SEQ_DATA") or pathlib.Path.home() / ".cache" / "keras_seq")


def train_and_test(items, seed=0):
    """`{"train": ..., "test": ...}`: the first nine tenths of `items` in a seeded random order, and the rest."""
    items = [items[i] for i in np.random.default_rng(seed).permutation(len(items))]
    cut = len(items) * 9 // 10
    return {"train": items[:cut], "test": items[cut:]}
