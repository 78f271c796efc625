"""Weights in PyTorch's `.pth` files, read and written without PyTorch, and without running what a file says.

The file is a zip archive of uncompressed members: `<name>/data.pkl` is a pickle of `{name: tensor}`, `<name>/data/0`,
`<name>/data/1`, ... are the storages. A tensor is a view of a storage: offset, size and stride, in elements.

Source: pytorch `torch/serialization.py`, `torch/_utils.py`.
"""

import math
import pickle
import zipfile
from dataclasses import dataclass

import numpy as np

from keras_seq.checkpoints import storage
from keras_seq.checkpoints.pickles import Global, run_pickle
from keras_seq.progress import Progress, progress

STORAGES = {
    "BoolStorage": "bool",
    "ByteStorage": "uint8",
    "CharStorage": "int8",
    "ShortStorage": "int16",
    "IntStorage": "int32",
    "LongStorage": "int64",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "FloatStorage": "float32",
    "DoubleStorage": "float64",
}
ALIGNMENT = 64


def read_pth(path, max_bytes=None):
    """The tensors of a file of `torch.save(state_dict, path)`.

    Args:
        path: the file, as PyTorch 1.6 and later write it.
        max_bytes: how much memory the arrays may describe together; None: 4 times the file's size. A file of bfloat16
            needs twice its size. Tensors that share a storage each count in full, as do those with stride 0.

    Returns:
        `{name: array}`, in the file's order. bfloat16 has become float32. Tensors that share a storage share memory.

    Raises:
        CheckpointError: the file is damaged, or anything else than a state dict of tensors.
        FileNotFoundError: there is no such file.

    Example:

        write_pth("model.pth", {"emb.weight": np.ones((3, 2), "float32")})
        assert read_pth("model.pth")["emb.weight"].shape == (3, 2)
    """
    with storage.reading(path, "a state dict of tensors, saved by torch.save") as (file, size):
        start = file.read(4)
        if start[:1] == b"\x80":
            raise ValueError("the format of PyTorch before 1.6. Its torch.load and a newer torch.save convert it")
        if start != b"PK\3\4":
            raise ValueError(f"a file that begins with {start!r}, as no zip archive does")
        with zipfile.ZipFile(file) as archive, Progress(f"reading {path}", size) as shown:
            return _Archive(archive, size, 4 * size if max_bytes is None else max_bytes, shown).state_dict()


def write_pth(path, arrays, dtype=None):
    """Writes a file that `torch.load(path, weights_only=True)` reads as a state dict.

    Args:
        path: the file. It appears, or is replaced, once everything is written.
        arrays: `{name: array}`: float16, float32, float64, bool, uint8 or signed integers; ml_dtypes' bfloat16 too.
        dtype: `"float16"`, `"bfloat16"`, `"float32"` or `"float64"` for all floating-point arrays, rounded to the
            nearest; None keeps each as it is.

    Raises:
        CheckpointError: a name, an array or `dtype` is something else, or a number is beyond the range of `dtype`.

    Example:

        write_pth("half.pth", {"emb.weight": np.ones((3, 2), "float32")}, dtype="bfloat16")
    """
    kinds = {one: kind for kind, one in STORAGES.items()}
    tensors = storage.to_write(path, arrays, dtype, kinds)
    program = [b"\x80\2}("]
    for i, (name, (array, one)) in enumerate(tensors.items()):
        program += [_pushed(name), _pushed_tensor(kinds[one], str(i), array.shape)]
    with storage.replacing(path) as file, zipfile.ZipFile(file, "w") as archive:
        archive.writestr(zipfile.ZipInfo("archive/data.pkl"), b"".join([*program, b"u."]))
        archive.writestr(zipfile.ZipInfo("archive/byteorder"), b"little")
        for i, (name, (array, one)) in enumerate(progress(tensors.items(), f"writing {path}")):
            info = zipfile.ZipInfo(f"archive/data/{i}")
            # An extra field that nobody reads moves the data to where PyTorch can map it into memory.
            padding = -(file.tell() + 30 + len(info.filename) + 4) % ALIGNMENT
            info.extra = b"FB" + padding.to_bytes(2, "little") + bytes(padding)
            archive.writestr(info, storage.to_bytes(path, name, array, one))
        archive.writestr(zipfile.ZipInfo("archive/version"), b"3\n")


def _pushed(value):
    """The instructions that push a string, a number or a tuple: a pickle without its first and its last instruction."""
    return pickle.dumps(value, 2)[2:-1]


def _pushed_tensor(kind, key, shape):
    """The instructions that push a contiguous tensor, alone in its storage."""
    numel, stride = math.prod(shape), tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
    named = b"ctorch\n" + kind.encode() + b"\n"
    reference = b"(" + _pushed("storage") + named + _pushed(key) + _pushed("cpu") + _pushed(numel) + b"tQ"
    view = _pushed(0) + _pushed(tuple(shape)) + _pushed(stride) + _pushed(False)
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + reference + view + b"ccollections\nOrderedDict\n)RtR"


@dataclass(frozen=True)
class Storage:
    """The numbers that tensors are views of, `(n,)`, and their dtype in the file."""

    array: np.ndarray
    dtype: str


class _Archive:
    """The members of an archive. Each is read whole and once, which checks its CRC."""

    def __init__(self, archive, file_size, max_bytes, shown):
        members = archive.infolist()
        self.shown = shown
        self.archive, self.members = archive, {member.filename: member for member in members}
        self.max_bytes, self.bytes_left, self.storages = max_bytes, max_bytes, {}
        if len(self.members) < len(members):
            raise ValueError("an archive with two members of the same name")
        if any(member.compress_type or member.file_size != member.compress_size for member in members):
            raise ValueError("an archive with compressed members")
        if (total := sum(member.file_size for member in members)) > file_size:
            raise ValueError(f"members of {total} bytes in a file of {file_size}")
        pickles = [name for name in self.members if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise ValueError(f"an archive with {len(pickles)} members <name>/data.pkl")
        self.prefix = pickles[0].removesuffix("data.pkl")
        order = self.take(name) if (name := f"{self.prefix}byteorder") in self.members else b"little"
        if order not in (b"little", b"big"):
            raise ValueError(f"the byte order {bytes(order[:20])!r}")
        self.byteorder = "<" if order == b"little" else ">"

    def state_dict(self):
        name = f"{self.prefix}data.pkl"
        if (size := self.members[name].file_size) > storage.MAX_HEADER:
            raise ValueError(f"a pickle of {size} bytes. At most {storage.MAX_HEADER} are read")
        known: dict = {f"torch {kind}": dtype for kind, dtype in STORAGES.items()} | {
            "collections OrderedDict": lambda: {},
            "torch._utils _rebuild_tensor_v2": self.tensor,
            "torch._utils _rebuild_parameter": self.parameter,
        }
        state_dict = run_pickle(bytes(self.take(name)), known, self.load)
        for name in list(self.members):
            self.take(name)
        if not isinstance(state_dict, dict):
            raise ValueError(f"an object of {type(state_dict)}")
        for name, array in state_dict.items():
            if not isinstance(array, np.ndarray):
                raise ValueError(f"an object of {type(array)} as {name!r}")
        return state_dict

    def take(self, name):
        member = self.members.pop(name, None)
        if member is None:
            raise ValueError(f"an archive without {name!r}")
        self.shown.add(member.file_size)
        with self.archive.open(member) as file:
            return storage.read_exactly(file, member.file_size)

    def load(self, reference):
        match reference:
            case ("storage", Global(_, str(dtype)), str(key), str(), int(numel)):
                pass
            case _:
                raise ValueError("a reference to something else than a storage")
        if key not in self.storages:
            array = storage.from_bytes(self.take(f"{self.prefix}data/{key}"), dtype, self.byteorder)
            self.storages[key] = Storage(array, dtype)
        held = self.storages[key]
        if (held.dtype, held.array.size) != (dtype, numel):
            raise ValueError(f"a storage of {numel} {dtype}, {key!r}. It has {held.array.size} {held.dtype}")
        return held

    def tensor(self, *arguments):
        match arguments:
            case (Storage(array), int(offset), tuple(size), tuple(stride), bool(), dict()):
                pass
            case _:
                raise ValueError("a tensor that is not described by storage, offset, size and stride")
        numbers = (offset, *size, *stride)
        if not len(size) == len(stride) <= storage.MAX_RANK or not all(type(n) is int and n >= 0 for n in numbers):
            raise ValueError("a tensor whose size and stride are not the same number of integers from 0 on")
        self.bytes_left -= math.prod(size) * array.itemsize
        if self.bytes_left < 0:
            raise ValueError(f"tensors of more than {self.max_bytes} bytes")
        end = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) + 1 if all(size) else offset
        if end > array.size:
            raise ValueError(f"a tensor that ends at element {end} of a storage of {array.size}")
        strides = [step * array.itemsize for step in stride] if all(size) else None
        return np.ndarray(size, array.dtype, array, offset * array.itemsize, strides)

    def parameter(self, *arguments):
        match arguments:
            case (np.ndarray() as array, bool(), dict()):
                return array
        raise ValueError("a parameter that is no tensor")
