"""Weights in `.safetensors` files.

The file is the length of the header (8 bytes, little-endian), the header, and the buffer. The header is JSON:
`{name: {"dtype": "F32", "shape": [3, 4], "data_offsets": [begin, end]}}`, with offsets into the buffer, and
`"__metadata__"`, from strings to strings. The tensors fill the buffer without gaps.

The format has no checksum. `write_safetensors` puts one among the metadata, of names, dtypes, shapes and the buffer;
`read_safetensors` holds it against the file where it is there. In files of other writers a flipped bit of a number is
not noticed.

Source: safetensors `safetensors/src/tensor.rs`.
"""

import hashlib
import json
import math

from keras_seq.checkpoints import storage
from keras_seq.checkpoints.errors import CheckpointError
from keras_seq.progress import progress

DTYPES = {  # name in the file: dtype, bytes
    "BOOL": ("bool", 1),
    "U8": ("uint8", 1),
    "I8": ("int8", 1),
    "U16": ("uint16", 2),
    "I16": ("int16", 2),
    "U32": ("uint32", 4),
    "I32": ("int32", 4),
    "U64": ("uint64", 8),
    "I64": ("int64", 8),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "F32": ("float32", 4),
    "F64": ("float64", 8),
}
METADATA = "__metadata__"
# The value says what it is once more: damage to the name alone must not hide it.
CHECKSUM, ALGORITHM = "keras_seq.checksum", "keras_seq.sha256:"


def read_safetensors(path):
    """The tensors of a `.safetensors` file.

    Args:
        path: the file.

    Returns:
        `{name: array}`, in the order of the header. bfloat16 has become float32.

    Raises:
        CheckpointError: the file is damaged, or something else.
        FileNotFoundError: there is no such file.

    Example:

        write_safetensors("model.safetensors", {"emb.weight": np.ones((3, 2), "float32")})
        assert read_safetensors("model.safetensors")["emb.weight"].shape == (3, 2)
    """
    with storage.reading(path, "tensors in the safetensors format") as (file, size):
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, storage.MAX_HEADER):
            raise ValueError(f"a header of {length} bytes in a file of {size}. At most {storage.MAX_HEADER} are read")
        header = json.loads(file.read(length).decode(), object_pairs_hook=_unique)
        checksums = _pop_checksums(header)
        _check(header, size - 8 - length)
        digest, arrays = _digest(header), {}
        entries = sorted(header.items(), key=lambda item: item[1]["data_offsets"])
        for name, entry in progress(entries, f"reading {path}"):
            begin, end = entry["data_offsets"]
            data = storage.read_exactly(file, end - begin)
            digest.update(data)
            arrays[name] = storage.from_bytes(data, DTYPES[entry["dtype"]][0]).reshape(entry["shape"])
        if checksums - {ALGORITHM + digest.hexdigest()}:
            raise ValueError("bytes that do not have the checksum of the metadata")
    return {name: arrays[name] for name in header}


def write_safetensors(path, arrays, dtype=None, metadata=None):
    """Writes a file that the safetensors package reads, with a checksum among the metadata.

    Args:
        path: the file. It appears, or is replaced, once everything is written.
        arrays: `{name: array}`: floats of 16, 32 and 64 bits, bool, integers; ml_dtypes' bfloat16 too.
        dtype: `"float16"`, `"bfloat16"`, `"float32"` or `"float64"` for all floating-point arrays, rounded to the
            nearest; None keeps each as it is.
        metadata: `{string: string}`, beside `"format": "pt"`, which other libraries ask for.

    Raises:
        CheckpointError: a name, an array, `dtype` or the metadata is something else, or a number is beyond the range
            of `dtype`.

    Example:

        write_safetensors("half.safetensors", {"emb.weight": np.ones(3, "float32")}, dtype="bfloat16")
    """
    codes = {name: (code, size) for code, (name, size) in DTYPES.items()}
    tensors = storage.to_write(path, arrays, dtype, codes)
    metadata = {"format": "pt"} | dict(metadata or {}) | {CHECKSUM: ALGORITHM + "0" * 64}
    if METADATA in tensors or not all(isinstance(text, str) for item in metadata.items() for text in item):
        expected = f"metadata from strings to strings for {str(path)!r}, and no array named {METADATA}"
        raise CheckpointError(f"Expected {expected}. Received: {metadata!r} and {METADATA in tensors}")
    # Large elements first: then each tensor begins at a multiple of the size of its elements.
    order = sorted(tensors, key=lambda name: -codes[tensors[name][1]][1])
    header, end = {}, 0
    for name in order:
        array, one = tensors[name]
        code, size = codes[one]
        begin, end = end, end + array.size * size
        header[name] = {"dtype": code, "shape": list(array.shape), "data_offsets": [begin, end]}
    header = {name: header[name] for name in tensors}
    digest = _digest(header)
    with storage.replacing(path) as file:
        file.write(_encoded(header, metadata))
        for name in progress(order, f"writing {path}"):
            data = storage.to_bytes(path, name, *tensors[name])
            digest.update(data)
            file.write(data)
        file.seek(0)
        file.write(_encoded(header, metadata | {CHECKSUM: ALGORITHM + digest.hexdigest()}))


def _encoded(header, metadata):
    text = json.dumps({METADATA: metadata} | header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _digest(header):
    return hashlib.sha256(json.dumps(header).encode())


def _unique(pairs):
    if len(names := dict(pairs)) < len(pairs):
        raise ValueError("a header with the same name twice")
    return names


def _pop_checksums(header):
    if not isinstance(header, dict):
        raise ValueError(f"a header of {type(header)}")
    metadata = header.pop(METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise ValueError("metadata other than strings")
    return {text for name, text in metadata.items() if name == CHECKSUM or text.startswith(ALGORITHM)}


def _check(header, buffer_size):
    """The entries are of known dtypes, and each byte of the buffer belongs to just one."""
    spans = []
    for name, entry in header.items():
        match entry:
            case {"dtype": str(code), "shape": list(shape), "data_offsets": [begin, end]} if len(entry) == 3:
                numbers = [*shape, begin, end]
            case _:
                raise ValueError(f"{name!r} without just a dtype, a shape and two offsets")
        if code not in DTYPES:
            raise ValueError(f"{name!r} of dtype {code!r}. Known are {', '.join(DTYPES)}")
        if len(shape) > storage.MAX_RANK or not all(type(n) is int and 0 <= n < 2**63 for n in numbers):
            raise ValueError(f"{name!r} with sizes or offsets that are none")
        if end - begin != math.prod(shape) * DTYPES[code][1]:
            raise ValueError(f"{name!r} of shape {shape} and dtype {code} in {end - begin} bytes")
        spans.append((begin, end))
    at = 0
    for begin, end in sorted(spans):
        if begin != at:
            raise ValueError(f"a tensor that begins at byte {begin} of the buffer, after one that ends at {at}")
        at = end
    if at != buffer_size:
        raise ValueError(f"tensors of {at} bytes in a buffer of {buffer_size}")
