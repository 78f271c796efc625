"""Against the safetensors package, where it is installed; against damaged and hostile files everywhere."""

import json
import os

import numpy as np
import pytest
from weight_files import arrays_of, at_most, count_damage, equal, floats, small_arrays, to_bfloat16

from keras_seq.checkpoints import CheckpointError
from keras_seq.checkpoints.safetensors import ALGORITHM, CHECKSUM, read_safetensors, write_safetensors

DTYPES = ["float16", "float32", "float64", "bool"] + [f"{u}int{8 * n}" for n in (1, 2, 4, 8) for u in ("", "u")]
DATA = np.arange(12, dtype="<f4").tobytes()
X = {"dtype": "F32", "shape": [3, 4], "data_offsets": [0, 48]}


def write(path, header, data=DATA, length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def header_of(path):
    data = path.read_bytes()
    return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])


def refused(path, match="Received"):
    with pytest.raises(CheckpointError, match=match) as caught:
        read_safetensors(path)
    assert str(path) in str(caught.value)
    assert "Expected tensors in the safetensors format" in str(caught.value)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.safetensors"


def test_what_is_written_is_read(path):
    arrays = arrays_of(DTYPES)
    write_safetensors(path, arrays)
    back = read_safetensors(path)
    assert equal(back, arrays)
    assert all(array.flags.writeable and array.flags.aligned for array in back.values())


def test_no_arrays(path):
    write_safetensors(path, {})
    assert read_safetensors(path) == {}


@pytest.mark.parametrize("layout", [lambda a: a.T, lambda a: a[::2, 1:], lambda a: np.broadcast_to(a[0], (3, 6))])
def test_arrays_of_any_layout_are_written(path, layout):
    array = layout(np.arange(24.0).reshape(4, 6))
    write_safetensors(path, {"x": array, "y": array.astype(">f4")})
    assert equal(read_safetensors(path), {"x": array, "y": array.astype("<f4")})


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_dtype_is_that_of_the_floats(path, dtype):
    arrays = arrays_of(["float32", "float16", "uint16", "bool"])
    write_safetensors(path, arrays, dtype=dtype)
    assert equal(read_safetensors(path), {n: a.astype(dtype) if a.dtype.kind == "f" else a for n, a in arrays.items()})


def test_bfloat16(path):
    x = np.random.default_rng(0).normal(size=(5, 7)).astype("float32")
    write_safetensors(path, {"x": x, "nan": floats(0x7FFFFFFF)}, dtype="bfloat16")
    assert header_of(path)["x"]["dtype"] == "BF16"
    back = read_safetensors(path)
    assert equal({"x": back["x"]}, {"x": to_bfloat16(x)})
    assert np.isnan(back["nan"])


def test_the_package_reads_what_is_written(path):
    numpy = pytest.importorskip("safetensors.numpy")
    arrays = arrays_of(DTYPES)
    write_safetensors(path, arrays, metadata={"author": "Ä"})
    back = numpy.load_file(path)
    assert equal({name: back[name] for name in arrays}, arrays)
    with numpy.safe_open(path, "np") as file:
        assert file.metadata() == header_of(path)["__metadata__"]
        assert file.metadata()["author"] == "Ä"
        assert file.metadata()["format"] == "pt"


def test_what_the_package_writes_is_read(path):
    numpy = pytest.importorskip("safetensors.numpy")
    arrays = arrays_of(DTYPES)
    for metadata in (None, {"format": "np"}):
        numpy.save_file(arrays, path, metadata=metadata)
        back = read_safetensors(path)
        assert equal({name: back[name] for name in arrays}, arrays)
        assert len(back) == len(arrays)


def test_torch_reads_bfloat16(path):
    torch = pytest.importorskip("torch")
    package = pytest.importorskip("safetensors.torch")
    x = np.random.default_rng(0).normal(size=(5, 7)).astype("float32")
    write_safetensors(path, {"x": x}, dtype="bfloat16")
    assert torch.equal(package.load_file(path)["x"], torch.from_numpy(x).bfloat16())
    package.save_file({"x": torch.from_numpy(x).bfloat16()}, path)
    assert equal(read_safetensors(path), {"x": to_bfloat16(x)})


def test_tensors_are_aligned_in_the_file(path):
    write_safetensors(path, {"odd": np.ones(3, "bool"), "half": np.ones(3, "float16"), "double": np.ones(3)})
    data_begins = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    offsets = {name: entry["data_offsets"][0] for name, entry in header_of(path).items() if "shape" in entry}
    assert list(offsets) == ["odd", "half", "double"]
    assert [(data_begins + offsets[name]) % size for name, size in (("odd", 1), ("half", 2), ("double", 8))] == [0] * 3


def test_memory_is_the_size_of_the_file(path):
    write_safetensors(path, {str(i): np.ones((512, 1024), "float32") for i in range(4)})
    with at_most(path.stat().st_size + 2**21):
        assert len(read_safetensors(path)) == 4


def test_damage_is_found(path):
    arrays = small_arrays()
    write_safetensors(path, arrays)
    assert count_damage(path, arrays, read_safetensors)[0] > 250


def test_damage_is_found_with_short_numbers(path):
    """More of the file is header, and a flipped bit more often makes another header."""
    arrays = {"a": np.zeros((2, 2), "int8"), "b": np.ones((2, 2), "uint8")}
    write_safetensors(path, arrays)
    refused, read = count_damage(path, arrays, read_safetensors)
    assert refused > 250
    assert read > 0  # the damage is in other metadata


@pytest.mark.parametrize(
    ("before", "after"), [(b'"x"', b'"y"'), (b"[3,4]", b"[4,3]"), (b"F32", b"I32"), (DATA, DATA[::-1])]
)
def test_the_checksum_is_of_everything(path, before, after):
    write_safetensors(path, {"x": np.arange(12, dtype="float32").reshape(3, 4)})
    changed = path.read_bytes().replace(before, after)
    path.write_bytes(changed)
    refused(path, "checksum")
    renamed = changed.replace(CHECKSUM.encode(), b"_" * len(CHECKSUM))
    path.write_bytes(renamed)
    refused(path, "checksum")
    path.write_bytes(renamed.replace(ALGORITHM.encode(), b"_" * len(ALGORITHM)))
    assert len(read_safetensors(path)) == 1


def test_the_smallest_file_is_fine(path):
    assert equal(read_safetensors(write(path, {"x": X})), {"x": np.arange(12, dtype="float32").reshape(3, 4)})
    empty = {"dtype": "F32", "shape": [0, 2], "data_offsets": [48, 48]}
    assert read_safetensors(write(path, {"x": X, "y": empty, "__metadata__": {"a": "b"}}))["y"].shape == (0, 2)


@pytest.mark.parametrize(
    ("header", "match"),
    [
        ({"x": X | {"shape": [3, 5]}}, "in 48 bytes"),
        ({"x": X | {"shape": [-3, -4]}}, "sizes"),
        ({"x": X | {"shape": [3.0, 4]}}, "sizes"),
        ({"x": X | {"shape": [True, 12]}}, "sizes"),
        ({"x": X | {"shape": [2**63, 0]}}, "sizes"),
        ({"x": X | {"shape": [1] * 60 + [12]}}, "sizes"),
        ({"x": X | {"shape": "34"}}, "without just"),
        ({"x": X | {"shape": [2**62, 2**62, 0], "data_offsets": [0, 0]}}, "in a buffer of 48"),
        ({"x": X | {"dtype": "F64"}}, "in 48 bytes"),
        ({"x": X | {"dtype": "F8_E4M3", "shape": [48]}}, "Known are BOOL"),
        ({"x": X | {"dtype": 1}}, "without just"),
        ({"x": X | {"dtype": "BOOL", "shape": [48]}}, "neither 0 nor 1"),
        ({"x": X | {"data_offsets": [0, 49]}}, "in 49 bytes"),
        ({"x": X | {"data_offsets": [1, 49]}}, "begins at byte 1"),
        ({"x": X | {"data_offsets": [48, 0]}}, "in -48 bytes"),
        ({"x": X | {"data_offsets": [0]}}, "without just"),
        ({"x": X | {"data_offsets": ["0", "48"]}}, "sizes or offsets"),
        ({"x": X | {"more": 1}}, "without just"),
        ({"x": {"dtype": "F32", "shape": [3, 4]}}, "without just"),
        ({"x": X, "y": X}, "begins at byte 0 of the buffer, after one that ends at 48"),
        ({"x": X, "y": X | {"shape": [1], "data_offsets": [44, 48]}}, "begins at byte 44"),
        ({"x": X | {"shape": [11], "data_offsets": [0, 44]}}, "tensors of 44 bytes in a buffer of 48"),
        ({"x": X | {"shape": [13], "data_offsets": [0, 52]}}, "tensors of 52 bytes in a buffer of 48"),
        ({"x": X | {"shape": [2**40], "data_offsets": [0, 2**42]}}, "in a buffer of 48"),
        ({"x": X, "__metadata__": {"a": 1}}, "metadata"),
        ({"x": X, "__metadata__": ["a"]}, "metadata"),
        ({"x": X, "__metadata__": {CHECKSUM: "0"}}, "checksum"),
        ({"x": X, "__metadata__": {CHECKSUM: None}}, "metadata"),
        ({}, "tensors of 0 bytes in a buffer of 48"),
        ({"x": [X]}, "without just"),
        ([X], "a header of <class 'list'>"),
        (b'{"x":%s,"x":%s}' % ((json.dumps(X).encode(),) * 2), "the same name twice"),
        (b'{"x":{"dtype":"F32","dtype":"F32","shape":[12],"data_offsets":[0,48]}}', "the same name twice"),
        (b'{"x":{"dtype":"F32","shape":[NaN],"data_offsets":[0,48]}}', "sizes"),
        (b'{"x":{"dtype":"F32","shape":[' + b"9" * 10_000 + b'],"data_offsets":[0,48]}}', "digits"),
        (b"[" * 10**6, "RecursionError"),
        (b'{"\xff":1}', "UnicodeDecodeError"),
        (b"{", "JSONDecodeError"),
        (b"", "JSONDecodeError"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_header_that_contradicts_itself_or_the_file(path, header, match):
    write(path, header)
    with at_most(2**20 + 10 * path.stat().st_size):
        refused(path, match)


@pytest.mark.parametrize("length", [0, 1, 2**20, 2**62, 2**64 - 1])
def test_length_of_the_header(path, length):
    refused(write(path, {"x": X}, length=length))


def test_a_large_header_is_refused(path):
    refused(write(path, b"{" + b" " * 2**22 + b"}", b""), "At most 4194304 are read")


@pytest.mark.parametrize("data", [b"", b"\0", b"\2\0\0\0\0\0\0", b"version https://git-lfs.github.com/spec/v1\n"])
def test_another_file(path, data):
    path.write_bytes(data)
    refused(path, "a header of")


def test_a_missing_file(path):
    with pytest.raises(FileNotFoundError):
        read_safetensors(path)


@pytest.mark.parametrize(
    ("arrays", "kwargs"),
    [
        ({"x": np.ones(2, "complex64")}, {}),
        ({"x": np.array(["a"])}, {}),
        ({1: np.ones(2)}, {}),
        ({"__metadata__": np.ones(2)}, {}),
        ({"x": np.ones(2)}, {"dtype": "int8"}),
        ({"x": np.ones(2)}, {"metadata": {"step": 3}}),
        ({"fine": np.ones(2), "x": np.array([1e30])}, {"dtype": "float16"}),
        ({"fine": np.ones(2), "x": np.array([3.4e38], "float32")}, {"dtype": "bfloat16"}),
    ],
)
def test_nothing_is_left_of_what_cannot_be_written(path, arrays, kwargs):
    with pytest.raises(CheckpointError, match="Received"):
        write_safetensors(path, arrays, **kwargs)
    assert list(path.parent.iterdir()) == []
    write_safetensors(path, {"x": np.ones(2)})
    before = path.read_bytes()
    with pytest.raises(CheckpointError, match="Received"):
        write_safetensors(path, arrays, **kwargs)
    assert list(path.parent.iterdir()) == [path]
    assert path.read_bytes() == before


def test_a_full_disk_leaves_the_old_file(path, monkeypatch):
    write_safetensors(path, {"x": np.ones(2)})

    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_safetensors(path, {"x": np.zeros(2)})
    assert list(path.parent.iterdir()) == [path]
    assert equal(read_safetensors(path), {"x": np.ones(2)})
