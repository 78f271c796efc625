"""The format is told by the name when a file is written, by its content when it is read."""

import pickle

import numpy as np
import pytest
from weight_files import arrays_of, equal

from keras_seq.checkpoints import CheckpointError
from keras_seq.checkpoints.files import read_arrays, write_arrays
from keras_seq.checkpoints.pth import read_pth
from keras_seq.checkpoints.safetensors import read_safetensors


@pytest.mark.parametrize(
    ("name", "read"), [("a.pth", read_pth), ("a.pt", read_pth), ("a.safetensors", read_safetensors)]
)
def test_name_says_the_format(tmp_path, name, read):
    arrays = arrays_of(["float32"])
    write_arrays(tmp_path / name, arrays, dtype="float16")
    assert equal(read(tmp_path / name), {name: array.astype("float16") for name, array in arrays.items()})
    write_arrays(str(tmp_path / name), arrays)
    moved = (tmp_path / name).rename(tmp_path / "model.bin")
    assert equal(read_arrays(moved), arrays)
    assert equal(read_arrays(str(moved)), arrays)


@pytest.mark.parametrize("name", ["a.npz", "pth", "a.pth.gz", "a"])
def test_other_names_are_not_written(tmp_path, name):
    with pytest.raises(CheckpointError, match=r"\*\.pth, \*\.pt, \*\.safetensors. Received: .*" + name):
        write_arrays(tmp_path / name, {"x": np.ones(2)})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b"", "begins with b''"),
        (b"\x89HDF\r\n\x1a\n", "HDF"),
        (b"version https://git-lfs.github.com/spec/v1\n", "version https"),
        (pickle.dumps({"a": 1}, 2), "PyTorch before 1.6"),
        (b"PK\3\4", "BadZipFile"),
        (b"12345678{}", "a header of"),
    ],
)
def test_other_files_are_not_read(tmp_path, data, match):
    (tmp_path / "model.pth").write_bytes(data)
    with pytest.raises(CheckpointError, match=match) as caught:
        read_arrays(tmp_path / "model.pth")
    assert "model.pth" in str(caught.value)


def test_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_arrays(tmp_path / "model.pth")
