"""The pronunciation example runs, in a small setting, and counts errors right."""

import numpy as np
import pronounce
import pytest


def test_distance_and_error_rates():
    assert pronounce.distance("kitten", "sitting") == 3
    assert pronounce.distance("", "abc") == pronounce.distance("abc", "") == 3
    assert pronounce.distance("abc", "abc") == 0
    found, listed = ["K AE T", "D AO G Z"], [["K AH T S", "K AE T"], ["D AO G", "D AA G"]]
    assert pronounce.error_rates(found, listed) == (1 / 6, 1 / 2)


def test_spelling_there_and_back():
    spelling = pronounce.Spelling({"cab": ["K AE B"], "a": ["AH", "EY"]})
    assert spelling.source("cab") == [5, 3, 4]
    assert spelling.target("K AE B") == [7, 3, 5, pronounce.END]
    assert spelling.pronunciation([7, 3, 5, pronounce.END, 0]) == "K AE B"


@pytest.mark.usefixtures("few_words")
def test_pronounce(tmp_path, capsys):
    options = ["--minutes", "0.05", "--units", "16", "--words", "Sequence", "--out", str(tmp_path)]
    before, after = pronounce.main(options)
    assert np.isfinite(after).all()
    assert after[0] < before[0]
    printed = capsys.readouterr().out
    assert f"after training, 43 held-out words: {after[0]:.1%} phoneme errors, {after[1]:.1%} word errors" in printed
    assert "\nsequence " in printed
    assert (tmp_path / "pronounce.png").stat().st_size > 5_000
    with pytest.raises(SystemExit):
        pronounce.main(["--words", "naïve"])
