"""The data of the examples: what is read, how it is split, that nothing half-made stays, and batches."""

import os
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
from data import Bucketed, cmudict, home_assistant, load
from data.files import train_and_test

import keras_seq

EXAMPLES = Path(__file__).parents[2] / "examples"


# Splits:


def test_splits_are_disjoint_and_the_same_each_time():
    items = [str(i) for i in range(1005)]
    parts = train_and_test(items)
    assert parts == train_and_test(items)
    assert [len(parts[name]) for name in ("train", "test")] == [904, 101]
    assert sorted(parts["train"] + parts["test"]) == sorted(items)
    assert parts["train"] != items[:904]
    assert train_and_test(items, seed=1) != parts


# CMUdict:


def test_cmudict_merges_variants_and_drops_stress_and_comments():
    lines = ["bath B AE1 TH # noun\n", "bath(2) B AA1 TH\n", "bath(3) B AE2 TH\n", "a.m. EY2 EH1 M\n"]
    assert cmudict.read(lines) == {"bath": ["B AE TH", "B AA TH"], "a.m.": ["EY EH M"]}


def test_cmudict_has_so_many_words_and_pronunciations():
    words = cmudict.words()
    assert len(words) == 126_052
    assert sum(map(len, words.values())) == 134_860
    assert "".join(sorted({letter for word in words for letter in word})) == "'-.abcdefghijklmnopqrstuvwxyz"
    assert len({p for listed in words.values() for text in listed for p in text.split()}) == 39
    assert words["read"] == ["R EH D", "R IY D"]
    parts = train_and_test(list(words))
    assert [len(parts[name]) for name in ("train", "test")] == [113_446, 12_606]
    assert parts["test"][:3] == ["angst", "seabold", "ernster"]


def test_cmudict_loads(few_words, cache):
    parts = {split: load("cmudict", split) for split in ("train", "test")}
    assert {e["word"]: e["pronunciations"] for e in parts["train"] + parts["test"]} == few_words
    assert [e["word"] for e in parts["train"]] == train_and_test(list(few_words))["train"]
    few_words.clear()  # from now on what was prepared is used
    assert load("cmudict", "test") == parts["test"]
    assert load("cmudict", "train[:5]") == parts["train"][:5]


def test_cmudict_that_fails_leaves_nothing(few_words, cache, monkeypatch):
    def broken(self, part):
        yield 0, {"word": "a", "pronunciations": ["AH"]}
        raise OSError("disk full")

    with monkeypatch.context() as context:
        context.setattr(cmudict.Cmudict, "_generate_examples", broken)
        with pytest.raises(OSError, match="disk full"):
            load("cmudict", "train")
    assert not list((cache / "cmudict").rglob("*.array_record*"))
    assert len(load("cmudict", "train")) == len(few_words) * 9 // 10


@pytest.mark.skipif(keras.config.backend() == "tensorflow", reason="TensorFlow is there from the start")
def test_data_comes_without_tensorflow_and_without_the_code_of_cmudict(few_words, cache):
    load("cmudict", "train")
    code = "import data, sys; data.load('cmudict', 'test'); assert not {'tensorflow', 'cmudict'} & set(sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(EXAMPLES)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# Home Assistant:

TEXTS = {
    "light": {
        "en": {
            "title": "Light",
            "step": {"a": "Turn on the light", "b": "Press the {name} button", "c": "Only English here"},
        },
        "de": {
            "title": "Licht",
            "step": {"a": "Licht einschalten", "b": "Taste {name} drücken"},
            "x": "Nur auf Deutsch hier",
        },
        "fr": {"step": {"a": "Allumer la lumière", "c": "Uniquement en anglais"}},
    },
    "lamp": {
        "en": {"a": "Turn  on\nthe light", "b": "turn on the light.", "c": "Home Assistant Cloud", "d": "word " * 31},
        "de": {"a": "Schalte das Licht an", "b": "Licht an.", "c": "Home Assistant Cloud", "d": "Wort"},
    },
    "fan": {
        "en": {"a": "Turn on the light", "b": "The <b>fan</b> is on", "c": "The fan is on"},
        "de": {"a": "Licht einschalten", "b": "Der Ventilator ist an", "c": "Ventilator an"},
    },
    "english": {"en": {"a": "There is no translation"}},
}


def test_home_assistant_joins_cleans_and_keeps_one_translation(pip, cache, capfd):
    pip.texts = TEXTS
    with pip.pinned():
        pairs = load("home_assistant/de", "train") + load("home_assistant/de", "test")
        found = {pair["source"]: pair["target"] for pair in pairs}
        assert found == {"Turn on the light": "Licht einschalten", "The fan is on": "Ventilator an"}
        assert len(load("home_assistant/fr", "train")) == len(load("home_assistant/fr", "test")) == 1
    assert len(pip.calls) == 1  # the wheel is kept for other languages
    command = " ".join(pip.calls[0][1:])
    assert command.startswith("-m pip download --no-deps --ignore-requires-python ")
    assert command.endswith(" homeassistant==2026.11.0")
    assert f"Downloading homeassistant==2026.11.0 (68 MB) into {cache}" in capfd.readouterr().out


@pytest.mark.parametrize("problem", ["fail", "damage"])
def test_download_that_fails_leaves_nothing_and_says_how_to_retry(pip, cache, problem):
    pip.texts, pip.does = TEXTS, problem
    message = r"Nothing of it was kept\. To retry, .* pip download .* homeassistant==2026\.11\.0"
    with pip.pinned():
        with pytest.raises(RuntimeError, match=message):
            home_assistant.wheel()
        with pytest.raises(RuntimeError, match=message):
            load("home_assistant/de", "train")
        assert not [file for file in cache.rglob("*") if file.is_file() and file.suffix in (".whl", ".array_record")]
        assert not list(cache.rglob("incomplete*"))
        pip.does = "work"
        assert len(load("home_assistant/de", "train")) == 1


def test_download_that_is_interrupted_leaves_nothing(pip, cache):
    pip.texts, pip.does = TEXTS, "part"
    with pip.pinned():
        with pytest.raises(KeyboardInterrupt):
            home_assistant.wheel()
        assert not list(cache.iterdir())
        pip.does = "work"
        assert home_assistant.wheel() == cache / home_assistant.WHEEL
        home_assistant.wheel()
        assert len(pip.calls) == 2
        (cache / home_assistant.WHEEL).write_bytes(b"damaged since")
        home_assistant.wheel()
    assert len(pip.calls) == 3


# Batches:


def rows(n, seed=0):
    """Sequences of many lengths; source i is found by its first tokens, and has target i."""
    random = np.random.default_rng(seed)
    lengths = random.integers(3, 20, (n, 2))
    sources, targets = ([[3 + i // 17, 3 + i % 17] + [5] * (m - 2) for i, m in enumerate(side)] for side in lengths.T)
    return sources, targets


def test_every_row_comes_once_an_epoch():
    sources, targets = rows(203)
    batches = Bucketed(sources, targets, batch_size=16, buckets=4)
    orders = []
    for _ in range(2):
        seen = []
        for i in range(len(batches)):
            for source, target in zip(*batches[i], strict=True):
                if target.any():
                    seen.append((tuple(source[source > 0]), tuple(target[target > 0])))
        assert sorted(seen) == sorted(zip(map(tuple, sources), map(tuple, targets), strict=True))
        orders.append(seen)
        batches.on_epoch_end()
    assert orders[0] != orders[1]


def test_batches_have_few_shapes_little_padding_and_a_source_in_each_row():
    sources, targets = rows(1000)
    batches = Bucketed(sources, targets, batch_size=16, buckets=5)
    found = [batches[i] for i in range(len(batches))]
    assert len({(source.shape, target.shape) for source, target in found}) <= 5
    assert {len(source) for source, _ in found} == {16}
    assert all(source.dtype == target.dtype == np.int32 for source, target in found)
    assert all((source[:, 0] > 0).all() for source, _ in found)
    padding = np.mean([np.mean(target == 0) for _, target in found])
    one_shape = 1 - np.mean([len(target) for target in targets]) / 19
    assert padding < 0.75 * one_shape


def test_order_is_given_by_the_seed_or_by_the_rows():
    sources, targets = rows(50)

    def first(**options):
        return Bucketed(sources, targets, 8, **options)[0][0]

    np.testing.assert_array_equal(first(seed=1), first(seed=1))
    assert not np.array_equal(first(seed=1), first(seed=2))
    plain = Bucketed(sources, targets, 8, buckets=[(19, 19)], shuffle=False)
    plain.on_epoch_end()
    assert [tuple(row[row > 0]) for row in plain[0][0]] == [tuple(source) for source in sources[:8]]


@pytest.mark.parametrize("seed", range(5))
def test_first_two_batches_differ_in_both_lengths(seed):
    batches = Bucketed(*rows(400), batch_size=4, buckets=3, seed=seed)
    for _ in range(3):
        (short_source, short_target), (long_source, long_target) = batches[0], batches[1]
        assert short_source.shape[1] < long_source.shape[1]
        assert short_target.shape[1] < long_target.shape[1]
        batches.on_epoch_end()


def test_buckets_can_be_those_of_other_batches():
    sources, targets = rows(100)
    batches = Bucketed(sources, targets, 8)
    assert Bucketed(sources[:9], targets[:9], 8, buckets=batches.buckets).buckets == batches.buckets
    with pytest.raises(ValueError, match=r"Row 0 is longer than the last bucket, \(19, 19\)"):
        Bucketed([[3] * 20], [[3]], 8, buckets=batches.buckets)
    with pytest.raises(ValueError, match="As many targets as sources"):
        Bucketed(sources, targets[1:], 8)


def test_a_model_fits_batches():
    sources, targets = rows(60)
    model = keras_seq.models.Transformer(30, 30, d_model=16, num_layers=1, num_heads=2, label_smoothing=0.0)
    model.compile(keras.optimizers.Adam(1e-2))
    losses = model.fit(Bucketed(sources, targets, 16, buckets=2), epochs=3, verbose=0).history["loss"]
    assert losses[2] < losses[0]


def test_rows_that_fill_a_batch_do_not_count():
    sources, targets = rows(5)
    model = keras_seq.models.Transformer(30, 30, d_model=16, num_layers=1, num_heads=2)
    model.compile("adam")
    filled = Bucketed(sources, targets, 8, buckets=[(19, 19)], shuffle=False)
    exact = Bucketed(sources, targets, 5, buckets=[(19, 19)], shuffle=False)
    np.testing.assert_allclose(*(model.evaluate(batches, verbose=0) for batches in (filled, exact)), rtol=1e-5)
