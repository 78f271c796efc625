"""The tutorials run from top to bottom in a small setting, and their pages show what stands in them."""

import importlib.util
import sys
from pathlib import Path

import keras
import pytest

ROOT = Path(__file__).parents[2]
pytest.importorskip("matplotlib", reason="tutorials draw with matplotlib")

# The backends of the processes that a tutorial starts: the one that is tested, and once two, which it compares.
STARTED = [keras.config.backend()]
if STARTED == ["torch"] and importlib.util.find_spec("jax"):
    STARTED.append("jax")

# Constants of each tutorial, in place of its own: a run of a few seconds.
SMALL = {
    "first_sequence_model": {"SEQUENCES": 400, "EPOCHS": 1},
    "three_backends": {"BACKENDS": tuple(STARTED), "EPOCHS": 2},
    "rnn_lstm_gru": {"LENGTH": 10, "UNITS": 8, "SEQUENCES": 200, "EPOCHS": 1},
    "streaming": {"CHARACTERS": 12_000, "EPOCHS": 1, "PROMPT": 60, "NEW": 5, "CHUNKS": (1, 16), "READ": 32},
    "seq2seq_attention": {"WORDS": 256, "EPOCHS": 1, "TESTED": 4},
    "transformer": {"SEQUENCES": 100, "LAYERS": 1, "EPOCHS": 1, "TESTED": 20},
    "rwkv": {
        "CHARACTERS": 20_000,
        "LAYERS": 1,
        "D_MODEL": 32,
        "SECONDS": 0.1,
        "TOKENS": 70,
        "CONTEXTS": (40, 64),
        "STEPS": 16,
        "CHARACTERS_WRITTEN": 8,
        "TUNING_SECONDS": 0.1,
    },
    "your_own_layer": {"CHECKED": 1, "LENGTH": 10, "SEQUENCES": 100, "EPOCHS": 1},
    "padding_and_masks": {"SEQUENCES": 200, "TESTED": 60, "LONGEST": 60, "EPOCHS": 2, "BUCKETS": 2},
    "precision_quantization_lora": {
        "ADDED": 500,
        "CHARACTERS": 20_000,
        "D_MODEL": 32,
        "LAYERS": 1,
        "POLICIES": ("float32",),
        "MODES": ("int4",),
        "SOURCE_CHARACTERS": 20_000,
        "EPOCHS": 1,
    },
}


def load():
    spec = importlib.util.spec_from_file_location("tutorials", ROOT / "docs" / "tutorials.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


tutorials = load()
every_tutorial = pytest.mark.parametrize("path", tutorials.TUTORIALS, ids=tutorials.name_of)


@every_tutorial
def test_tutorial_runs(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(ROOT / "examples")
    policy = keras.config.dtype_policy()
    try:
        results = list(tutorials.run(path, SMALL[tutorials.name_of(path)]))
    finally:
        keras.config.set_dtype_policy(policy)
        keras.utils.clear_session(free_memory=False)
    assert len(results) > 3


@pytest.mark.skipif(keras.config.backend() != "torch", reason="the same on each backend: tested on one")
@every_tutorial
def test_page_shows_the_tutorial_as_it_is(path):
    page = ROOT / "docs" / "tutorials" / f"{tutorials.name_of(path)}.md"
    cells = ((kind, text) for kind, text, _ in tutorials.cells(path.read_text()))
    expected = tutorials.page(path, cells)
    received = page.read_text()
    assert tutorials.without_results(received) == expected, f"run: python docs/tutorials.py {path.stem}"
    assert received != expected, "the page shows no results"
    assert "What can go wrong" in received
    assert f"tutorials/{page.name}" in (ROOT / "mkdocs.yml").read_text()


TEXT = '''"""
# Title
"""

STEPS = 100

"""Words."""
for i in range(STEPS):
    print("step", i)
    print("loss - 3s - 15ms/step - loss: 1.0")
'''


def test_cells_of_a_tutorial():
    assert tutorials.cells(TEXT) == [
        ("markdown", "# Title", 1),
        ("code", "STEPS = 100", 5),
        ("markdown", "Words.", 7),
        ("code", TEXT.split('"""Words."""\n')[1].rstrip(), 8),
    ]


def test_constants_take_the_place_of_those_of_a_tutorial(tmp_path):
    path = tmp_path / "07_words.py"
    path.write_text(TEXT)
    printed = [printed for _, _, printed, _ in tutorials.run(path, {"STEPS": 1})]
    assert printed == ["", "", "", "step 0\nloss - loss: 1.0\n"]
    with pytest.raises(ValueError, match=r"07_words.py has no constant \['STEP'\], only \['STEPS'\]"):
        list(tutorials.run(path, {"STEP": 1}))


def test_an_error_names_the_line_of_the_tutorial(tmp_path):
    path = tmp_path / "07_words.py"
    path.write_text(TEXT + "\nassert STEPS == 99\n")
    with pytest.raises(AssertionError) as error:
        list(tutorials.run(path))
    last = error.traceback[-1]
    assert (str(last.path), last.lineno + 1) == (str(path), 12)


def test_page_holds_what_was_printed_and_drawn(tmp_path):
    path = tmp_path / "07_words.py"
    path.write_text(
        TEXT.replace("100", "1") + "\nimport keras_seq\n\nkeras_seq.plotting.heatmap([[1, 2]], title='map')\n"
    )
    page = tutorials.page(path, tutorials.run(path), tmp_path / "img")
    assert "``` { .text .output }\nstep 0\nloss - loss: 1.0\n```" in page
    assert page.endswith("![map](img/words_1.png)\n")
    assert (tmp_path / "img" / "words_1.png").stat().st_size > 1000
    bare = tutorials.page(path, ((kind, text) for kind, text, _ in tutorials.cells(path.read_text())))
    assert bare != page
    assert tutorials.without_results(page) == bare


def test_every_tutorial_has_a_small_setting():
    assert sorted(SMALL) == sorted(map(tutorials.name_of, tutorials.TUTORIALS))
    assert "tutorials" not in sys.modules
