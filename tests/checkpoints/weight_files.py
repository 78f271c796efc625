"""Arrays, and damage to the files that hold them."""

import random
import time
import tracemalloc
from contextlib import contextmanager

import numpy as np

from keras_seq.checkpoints import CheckpointError

DTYPES = ["float16", "float32", "float64", "bool", "uint8", "int8", "int16", "int32", "int64"]
SHAPES = [(), (3,), (2, 3), (0, 3), (1, 2, 1, 3)]


def arrays_of(dtypes=DTYPES):
    rng = np.random.default_rng(0)
    return {f"{dtype}.{i}": rng.normal(size=s, scale=9).astype(dtype) for dtype in dtypes for i, s in enumerate(SHAPES)}


def equal(ours, theirs):
    """Same names in the same order, dtypes, shapes and bits."""
    return list(ours) == list(theirs) and all(
        ours[name].dtype == array.dtype and ours[name].shape == array.shape and ours[name].tobytes() == array.tobytes()
        for name, array in theirs.items()
    )


def to_bfloat16(array):
    """Round to nearest, ties to even, by arithmetic: 8 bits of mantissa. Not for subnormal numbers."""
    mantissa, exponent = np.frexp(array.astype("float64"))
    return np.ldexp(np.rint(mantissa * 256), exponent - 8).astype("float32")


def floats(*bits):
    return np.array(bits, "uint32").view("float32")


def small_arrays():
    arrays = arrays_of(["float32", "float16", "int64", "bool"])
    return {name: arrays[name] for name in ("float32.2", "float32.4", "float16.1", "int64.0", "bool.3")}


def mutations(data, rng, n):
    """`n` files that differ from `data`: bits flipped, ends cut off, bytes put in, taken out, zeroed, moved."""
    while n:
        i, length = rng.randrange(len(data)), rng.choice([1, 2, 4, 64])
        match n % 6:
            case 0:
                mutated = bytearray(data)
                for at in [i] + rng.choices(range(len(data)), k=rng.choice([0, 3])):
                    mutated[at] ^= 1 << rng.randrange(8)
            case 1:
                mutated = data[:i]
            case 2:
                mutated = data[:i] + rng.randbytes(length) + data[i:]
            case 3:
                mutated = data[:i] + data[i + length :]
            case 4:
                mutated = data[:i] + bytes(length) + data[i + length :]
            case 5:
                mutated = data[:i] + data[i + 2 * length :][:length] + data[i:][: 2 * length] + data[i + 3 * length :]
        if mutated != data:
            n -= 1
            yield bytes(mutated)


def count_damage(path, arrays, read):
    """Of 300 damaged versions of the file at `path`: how many are refused, how many read. None as other arrays."""
    messages, same = [], 0
    for data in mutations(path.read_bytes(), random.Random(0), 300):
        path.write_bytes(data)
        try:
            back = read(path)
        except CheckpointError as error:
            messages.append(str(error))
        else:
            assert equal(back, arrays)
            same += 1
    assert all(str(path) in message and "Expected" in message for message in messages)
    return len(messages), same


@contextmanager
def at_most(size, seconds=2):
    """What is inside takes no more than `size` bytes of memory at any time, and no longer than `seconds`."""
    tracemalloc.start()
    start = time.perf_counter()
    try:
        yield
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < size
    assert time.perf_counter() - start < seconds
