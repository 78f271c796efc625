"""The page of benchmarks holds what the JSON files hold."""

import importlib.util
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]


def load(name="page"):
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


RUN = {
    "backend": "jax",
    "versions": {"python": "3.11.7", "jax": "0.10.2"},
    "date": "2026-01-31",
    "command": "KERAS_BACKEND=jax python benchmarks/speed.py",
    "machine": {"platform": "Linux-6", "cpu": "a CPU", "cpu count": 2, "load average": [1.04, 0, 0]},
    "results": [
        {"row": "train", "contender": "keras_seq", "unit": "ms", "median": 12.3, "note": ""},
        {"row": "train", "contender": "keras_seq, again", "unit": "ms", "median": 12.0, "ratio": 0.976, "note": ""},
        {"row": "train", "contender": "other", "unit": "ms", "median": 24.6, "ratio": 2.0, "note": "a | b"}
        | {"required": ">= 3", "verdict": "short"},
        {"row": "growth", "contender": "t = 2", "unit": "ms", "median": 24.6, "ratio": 0.0123, "note": ""},
        {"row": "compile", "contender": "other", "unit": "ms", "median": -3.0, "ratio": -0.3, "note": ""},
        {"row": "count", "contender": "keras_seq", "unit": "compilations", "median": 0, "required": "<= 0"}
        | {"verdict": "ok", "note": ""},
    ],
}


@pytest.fixture
def results(tmp_path):
    (tmp_path / "speed_jax.json").write_text(json.dumps(RUN))
    return tmp_path


def test_a_region_is_written_anew(results):
    page = load()
    text = "Words.\n\n<!-- results: speed -->\nold\n<!-- end -->\n\n<!-- results: none -->\n<!-- end -->\nMore.\n"
    written = page.page(text, results)
    assert page.page(written, results) == written
    assert "old" not in written
    assert written.startswith("Words.\n")
    assert written.endswith("<!-- results: none -->\n\nNot measured yet.\n\n<!-- end -->\nMore.\n")
    assert "### JAX, `speed`" in written
    assert (
        "2026-01-31, python 3.11.7, jax 0.10.2; a CPU, 2 cores of which 1 is used, Linux, load average 1.0" in written
    )
    assert "`KERAS_BACKEND=jax python benchmarks/speed.py`" in written
    assert "![speed on JAX](assets/benchmarks/speed_jax.png)" in written
    rows = [line for line in written.splitlines() if line.startswith("| ")][1:]
    assert rows == [
        "| train | other | 2.00 | 0.98 | >= 3 | short | a \\| b |",
        "| growth | t = 2 | 0.0123 |  |  |  |  |",
        "| compile | other | in the noise |  |  |  |  |",
        "| count |  | 0 |  | <= 0 | ok |  |",
    ]


def test_a_pivot_has_a_column_for_each_contender(results):
    written = load().page("<!-- pivot: speed -->\n<!-- end -->\n", results)
    assert [line for line in written.splitlines() if line.startswith("| ")] == [
        "| | keras_seq | other | t = 2 |",
        "| train | 1.00 | 2.00 |  |",
        "| growth |  |  | 0.0123 |",
        "| compile |  | -0.300 |  |",
        "| count | 0 compilations |  |  |",
    ]


def test_the_picture_compares_with_other_libraries_alone():
    assert load().compared(RUN) == {"train: other": 2.0}


def test_the_page_is_up_to_date():
    page = load()
    for path in page.PAGES:
        text = path.read_text()
        assert text == page.page(text), "run: python benchmarks/page.py"
        for picture in re.findall(r"\]\((assets/benchmarks/.*?)\)", text):
            assert (ROOT / "docs" / picture).exists()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_does_not_depend_on_what_was_freed_before():
    timing = load("timing")

    kept = []

    def take():  # 64 MiB, in pieces small enough to stay with this process, below one that is not freed
        pieces = [np.ones(2**13) for _ in range(1024)]
        kept.append(np.ones(2**13))
        return pieces

    sizes = [timing.peak_memory(take) for _ in range(3)]
    assert all(55 < size < 80 for size in sizes), sizes
