"""What the file formats share: bytes to arrays and back, and files that are whole or absent.

A dtype is a name, `"float32"`. NumPy has no bfloat16: it is the upper half of a float32, and is read as one.
"""

import os
import secrets
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from keras_seq.checkpoints.errors import CheckpointError

FLOATS = ("float16", "bfloat16", "float32", "float64")
CHUNK = 2**20
# Bytes that names, shapes and dtypes may take: those of some 20,000 tensors. It bounds what reading them can cost.
MAX_HEADER = 2**22
MAX_RANK = 32


@contextmanager
def reading(path, what):
    """The file at `path` and its size; whatever goes wrong with its content is a CheckpointError that says so."""
    with open(path, "rb") as file:
        try:
            size = file.seek(0, os.SEEK_END)
            file.seek(0)
            yield file, size
        except Exception as error:
            reason = str(error) if type(error) is ValueError else f"{type(error).__name__}: {error}"
            raise CheckpointError(f"Expected {what} in {str(path)!r}. Received: {reason[:500]}") from error


@contextmanager
def replacing(path):
    """A new file that takes the place of `path` once it is whole; if writing fails, `path` stays as it was."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def read_exactly(file, size):
    """The next `size` bytes, writeable, in chunks: no more is held than once what is read."""
    data = bytearray(size)
    rest = memoryview(data)
    while n := file.readinto(rest[:CHUNK]):
        rest = rest[n:]
    if len(rest):
        raise ValueError(f"a file that ends {len(rest)} bytes early")
    return data


def from_bytes(data, dtype, byteorder="<"):
    """The flat array `(n,)` that the bytes are, writeable if they are; of bfloat16 a float32 copy."""
    if dtype == "bfloat16":
        bits = np.frombuffer(data, f"{byteorder}u2").astype("uint32")
        return np.left_shift(bits, 16, out=bits).view("float32")
    array = np.frombuffer(data, np.dtype(dtype).newbyteorder(byteorder))
    if dtype == "bool" and array.view("uint8").max(initial=0) > 1:
        raise ValueError("a bool that is neither 0 nor 1")
    return array.astype(dtype, copy=False)


def to_write(path, arrays, dtype, known):
    """What a file shall hold: `{name: (array, dtype)}`, once all of it is known to be what the format can hold.

    Args:
        path: the file, for the message.
        arrays: `{name: array}`.
        dtype: of the floating-point arrays, or None: each keeps its own. Integers and booleans always do.
        known: the dtypes of the format.

    Raises:
        CheckpointError: something else came.
    """
    if dtype not in (None, *FLOATS):
        raise CheckpointError(f"Expected dtype None, {', '.join(FLOATS)}. Received: {dtype!r}")
    result = {}
    for name, value in arrays.items():
        array = np.asarray(value)
        one = array.dtype.name
        if not isinstance(name, str) or one not in known:
            expected = f"for {str(path)!r} names and arrays of {', '.join(known)}"
            raise CheckpointError(f"Expected {expected}. Received: {name!r} and {one}")
        # ml_dtypes, which JAX brings along, gives NumPy a bfloat16.
        array = array.astype("float32") if one == "bfloat16" else array
        result[name] = array, dtype if dtype and one in FLOATS else one
    return result


def to_bytes(path, name, array, dtype):
    """The elements of `array` as flat little-endian bytes `(n,)` of `dtype`, rounded to the nearest, ties to even.

    Raises:
        CheckpointError: a finite number becomes infinite; `path` and `name` are for the message.
    """
    with np.errstate(over="ignore"):
        cast = np.ascontiguousarray(array, "float32" if dtype == "bfloat16" else dtype).reshape(-1)
    if dtype == "bfloat16":
        cast = _rounded_to_bfloat16(cast)
    if cast.dtype.kind == "f" and np.isinf(cast).sum() > np.isinf(array).sum():
        raise CheckpointError(f"Expected {name!r} in the range of {dtype} for {str(path)!r}. Received: larger numbers")
    if dtype == "bfloat16":
        cast = (cast.view("uint32") >> 16).astype("uint16")
    return cast.astype(cast.dtype.newbyteorder("<"), copy=False).view("uint8")


def _rounded_to_bfloat16(array):
    """float32 whose lower halves are 0. Of NaN the upper half is kept: rounding could make another number of it."""
    bits = array.view("uint32")
    rounded = bits + (0x7FFF + (bits >> 16 & 1))
    return (np.where(np.isnan(array), bits | 0x400000, rounded) & 0xFFFF0000).view("float32")
