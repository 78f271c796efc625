"""Progress is shown to people, and to nobody else."""

import io
import types

import keras
import pytest

from keras_seq import progress as module
from keras_seq.progress import Progress, progress


class Stream(io.StringIO):
    """Takes the place of standard error."""

    terminal = True

    def isatty(self):
        return self.terminal


@pytest.fixture
def stream(monkeypatch):
    stream = Stream()
    monkeypatch.setattr(module, "sys", types.SimpleNamespace(stderr=stream, modules={}))
    return stream


@pytest.fixture
def slow(monkeypatch):
    """A second goes by whenever somebody looks at the clock."""
    seconds = iter(range(1000))
    monkeypatch.setattr(module, "time", types.SimpleNamespace(monotonic=lambda: next(seconds)))


def test_items_are_counted(stream, slow):
    assert list(progress(list("abcd"), "letters")) == list("abcd")
    first, *others = stream.getvalue().split("\r")[1:]
    assert first == "letters: 75% after 3 s"
    assert [line.strip() for line in others] == ["letters: 100% after 4 s", "", ""]


def test_amounts_are_added(stream, slow):
    with Progress("bytes read", 200) as shown:
        for amount in (50, 50, 50, 25):
            shown.add(amount)
    assert "bytes read: 88% after 4 s" in stream.getvalue()


def test_what_is_quick_shows_nothing(stream):
    assert list(progress(range(1000), "numbers")) == list(range(1000))
    assert stream.getvalue() == ""


def test_a_file_is_not_written_to(stream, slow):
    stream.terminal = False
    list(progress(range(9), "numbers"))
    assert stream.getvalue() == ""


def test_keras_can_switch_it_off(stream, slow):
    keras.config.disable_interactive_logging()
    try:
        list(progress(range(9), "numbers"))
    finally:
        keras.config.enable_interactive_logging()
    assert stream.getvalue() == ""


def test_the_line_is_wiped_after_an_error(stream, slow):
    def broken():
        yield from range(6)
        raise RuntimeError

    with pytest.raises(RuntimeError), Progress("work", 9) as shown:
        [shown.add() for _ in broken()]
    assert stream.getvalue().split("\r")[-2].isspace()
