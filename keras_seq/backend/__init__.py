"""Native kernels: chosen by name from `backend/<keras backend>.py`, used where they apply.

An operation in `keras_seq.ops` is the definition. A native kernel has the same name and signature, and
`refuses(...)`, which says in words why it cannot take a call, or returns None.
"""

import contextlib
import contextvars
import functools
import importlib
import os
from typing import Any, NamedTuple

import keras

MODES = ("auto", "reference", "native")


class Ran(NamedTuple):
    """One call of an operation: its name, the path it took, and why not the native one."""

    op: str
    path: str
    reason: str | None


def _checked(mode, source):
    if mode not in MODES:
        raise ValueError(f"{source} must be one of {MODES}. Received: {mode!r}")
    return mode


_from_environment = _checked(os.environ.get("KERAS_SEQ_KERNELS", "auto"), "KERAS_SEQ_KERNELS")
_mode = contextvars.ContextVar("mode", default=_from_environment)
_log: contextvars.ContextVar[list[Ran] | None] = contextvars.ContextVar("log", default=None)


@contextlib.contextmanager
def kernels(mode="auto"):
    """Chooses which path the operations take inside a `with` block, and tells which one ran.

    Args:
        mode: `"auto"` takes the native kernel of the backend where it applies; `"reference"` takes the definition in
            `keras_seq.ops`; `"native"` takes the native kernel or raises `NotImplementedError` with the reason.

    Yields:
        a list that grows by a `(op, path, reason)` for each operation that runs in the block. A function that was
        compiled before the block (by `fit`, `jax.jit` or `tf.function`) keeps the path it was compiled with and adds
        nothing.

    Raises:
        ValueError: unknown mode.

    The environment variable `KERAS_SEQ_KERNELS` sets the mode outside of any block.

        with keras_seq.kernels("auto") as ran:
            layer(x)
        print(ran)  # [Ran(op='lstm', path='native', reason=None)]
    """
    ran: list[Ran] = []
    outer_mode, outer_log = _mode.set(_checked(mode, "mode")), _log.set(ran)
    try:
        yield ran
    finally:
        _mode.reset(outer_mode)
        _log.reset(outer_log)


@functools.cache
def current():
    """The module of native kernels of the backend that Keras runs on."""
    name = keras.config.backend()
    if name not in ("tensorflow", "jax", "torch"):
        raise ImportError(f"keras_seq runs on the Keras backends tensorflow, jax and torch. KERAS_BACKEND is {name!r}.")
    return importlib.import_module(f"{__name__}.{name}")


def refuses(reason):
    """Attaches to a kernel the function that says why it cannot take a call, or returns None."""

    def attach(kernel):
        kernel.refuses = reason
        return kernel

    return attach


def native(reference, kernel: Any = None, slower=lambda *args, **kwargs: None):
    """Lets `backend/<name>.py` take over calls of `reference` by a function of the same name and signature.

    Args:
        reference: the definition.
        kernel: another function of its name and signature, which takes every call, for backends that have no kernel.
        slower: says in words why that one is slower than the definition for a call, or returns None. It is not asked
            in mode `"native"`.
    """
    name = reference.__name__

    @functools.wraps(reference)
    def dispatch(*args, **kwargs):
        mode, log = _mode.get(), _log.get()
        chosen: Any = getattr(current(), name, None)
        reason = None
        if chosen:
            reason = chosen.refuses(*args, **kwargs)
        if kernel and (reason or not chosen):
            chosen, reason = kernel, slower(*args, **kwargs) if mode == "auto" else None
        if not chosen:
            reason = f"{keras.config.backend()} has none"
        if mode == "reference":
            reason = "the mode is 'reference'"
        elif reason and mode == "native":
            raise NotImplementedError(f"No native {name} on {keras.config.backend()} for this call: {reason}.")
        if log is not None:
            log.append(Ran(name, "reference" if reason else "native", reason))
        return (reference if reason else chosen)(*args, **kwargs)

    dispatch.reference = reference  # type: ignore[attr-defined]
    return dispatch


def leaner(reference):
    """As `native`, for small helpers: a kernel of the same name takes every call, and is not logged."""
    name = reference.__name__

    @functools.wraps(reference)
    def dispatch(*args, **kwargs):
        kernel = reference if _mode.get() == "reference" else getattr(current(), name, reference)
        return kernel(*args, **kwargs)

    return dispatch
