"""The examples run, in a small setting."""

import importlib.util
import pathlib

import numpy as np

EXAMPLES = pathlib.Path(__file__).parents[1] / "examples"


def load(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_character_model(tmp_path, capsys):
    options = ["--minutes", "0.1", "--units", "32", "--characters", "40000", "--out", str(tmp_path)]
    before, after = load("character_model").main(options)
    assert np.isfinite(after)
    assert after < before - 1, f"{before} bits per character before training, {after} after"
    printed = capsys.readouterr().out
    assert f"before training: {before:.2f} bits per character; after: {after:.2f}" in printed
    assert len(printed.split("The model writes:\n\n")[1].split("\n\nTo run longer")[0]) == len("The ") + 300
    assert (tmp_path / "learning_curve.png").stat().st_size > 10_000
