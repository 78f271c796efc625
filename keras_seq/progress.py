"""Tells whoever waits how far something has come."""

import sys
import time

import keras

PATIENCE = 2.0  # seconds without a word


class Progress:
    """A line that tells how much is done, and is written over, of what takes more than 2 seconds.

    It is shown on a terminal and in a notebook, unless `keras.config.disable_interactive_logging()` says otherwise, and
    goes to the standard error stream.

    Args:
        what: what is done.
        total: how much there is to do.
    """

    def __init__(self, what, total):
        self.what, self.total, self.done, self.line = what, total, 0, ""
        self.start = self.shown = time.monotonic()
        self.wanted = keras.config.is_interactive_logging_enabled() and (
            sys.stderr.isatty() or "ipykernel" in sys.modules
        )

    def __enter__(self):
        return self

    def add(self, amount=1):
        """So much more is done."""
        self.done += amount
        now = time.monotonic()
        if self.wanted and now - self.start > PATIENCE and now - self.shown > 0.1:
            self.shown = now
            self._show(f"{self.what}: {self.done / self.total:.0%} after {now - self.start:.0f} s")

    def __exit__(self, *exception):
        if self.line:
            self._show("")
            print("\r", end="", file=sys.stderr, flush=True)

    def _show(self, line):
        print("\r" + line.ljust(len(self.line)), end="", file=sys.stderr, flush=True)
        self.line = line


def progress(items, what):
    """Yields `items`, a collection, and shows how many are done, as `Progress` does."""
    with Progress(what, len(items)) as shown:
        for item in items:
            yield item
            shown.add()
