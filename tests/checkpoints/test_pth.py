"""Against torch.save and torch.load, where PyTorch is installed; against damaged and hostile files everywhere."""

import os
import pickle
import random
import zipfile

import numpy as np
import pytest
from weight_files import arrays_of, at_most, count_damage, equal, floats, mutations, small_arrays, to_bfloat16

from keras_seq.checkpoints import CheckpointError
from keras_seq.checkpoints.pth import read_pth, write_pth


def instructions(value):
    return pickle.dumps(value, 2)[2:-1]


def a_storage(kind="torch\nFloatStorage", key="0", numel=12):
    """The instructions for a storage."""
    named = b"(" + instructions("storage") + f"c{kind}\n".encode()
    return named + b"".join(map(instructions, (key, "cpu", numel))) + b"tQ"


def a_tensor(offset=0, size=(3, 4), stride=(4, 1), hooks=b"}", more=b"", **storage):
    """The instructions for a tensor; by default, of all 12 elements of storage 0."""
    view = b"".join(map(instructions, (offset, size, stride, False)))
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + a_storage(**storage) + view + hooks + more + b"tR"


def a_dict(*values):
    """The pickle of `{"0": values[0], "1": values[1], ...}`, given as instructions."""
    return b"\x80\2}(" + b"".join(instructions(str(i)) + value for i, value in enumerate(values)) + b"u."


STORAGE = np.arange(12, dtype="float32")


def archive(path, program, compression=zipfile.ZIP_STORED, **members):
    members = {"data.pkl": program, "data/0": STORAGE.tobytes()} | members
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, data in members.items():
            file.writestr(f"model/{name}", data)
    return path


def refused(path, match="Received", **kwargs):
    with pytest.raises(CheckpointError, match=match) as caught:
        read_pth(path, **kwargs)
    assert str(path) in str(caught.value)
    assert "Expected a state dict of tensors" in str(caught.value)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.pth"


def test_what_is_written_is_read(path):
    arrays = arrays_of()
    write_pth(path, arrays)
    back = read_pth(path)
    assert equal(back, arrays)
    assert all(array.flags.writeable for array in back.values())


def test_a_file_depends_on_its_arrays_only(tmp_path):
    for name in ("a.pth", "b.pth"):
        write_pth(tmp_path / name, arrays_of())
    assert (tmp_path / "a.pth").read_bytes() == (tmp_path / "b.pth").read_bytes()


@pytest.mark.parametrize("layout", [lambda a: a.T, lambda a: a[::2, 1:], lambda a: np.broadcast_to(a[0], (3, 4))])
def test_arrays_of_any_layout_are_written(path, layout):
    array = layout(np.arange(24.0).reshape(4, 6)[:, :4])
    write_pth(path, {"x": array})
    assert equal(read_pth(path), {"x": array})


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_dtype_is_that_of_the_floats(path, dtype):
    arrays = arrays_of(["float32", "float16", "int32", "bool"])
    write_pth(path, arrays, dtype=dtype)
    assert equal(read_pth(path), {n: a.astype(dtype) if a.dtype.kind == "f" else a for n, a in arrays.items()})


def test_bfloat16_is_rounded_to_nearest_even(path):
    x = np.random.default_rng(0).normal(size=1000).astype("float32")
    ties = floats(0x3F808000, 0x3F818000, 0x3F808001, 0x3F817FFF, 0x80008000, 0x00018000, 0x80000000)
    special = floats(0x7F800000, 0xFF800000, 0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001)
    write_pth(path, {"x": x, "ties": ties, "special": special}, dtype="bfloat16")
    back = read_pth(path)
    assert equal({"x": back["x"]}, {"x": to_bfloat16(x)})
    rounded = floats(0x3F800000, 0x3F820000, 0x3F810000, 0x3F810000, 0x80000000, 0x00020000, 0x80000000)
    assert equal({"x": back["ties"]}, {"x": rounded})
    np.testing.assert_array_equal(back["special"], [np.inf, -np.inf, np.nan, np.nan, np.nan])


def test_bfloat16_of_ml_dtypes_is_written_as_it_is(path):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    x = np.random.default_rng(0).normal(size=9).astype(ml_dtypes.bfloat16)
    write_pth(path, {"x": x})
    assert equal(read_pth(path), {"x": x.astype("float32")})
    with zipfile.ZipFile(path) as file:
        assert file.read("archive/data/0") == x.tobytes()


def test_torch_reads_what_is_written(path):
    torch = pytest.importorskip("torch")
    arrays = arrays_of()
    write_pth(path, arrays)
    for mmap in (False, True):
        back = torch.load(path, weights_only=True, mmap=mmap)
        assert equal({name: tensor.numpy() for name, tensor in back.items()}, arrays)
        assert all(tensor.is_contiguous() for tensor in back.values())
    assert all(tensor.data_ptr() % 8 == 0 for tensor in back.values())


def test_torch_reads_bfloat16(path):
    torch = pytest.importorskip("torch")
    x = np.random.default_rng(0).normal(size=(5, 7)).astype("float32")
    write_pth(path, {"x": x}, dtype="bfloat16")
    tensor = torch.load(path, weights_only=True)["x"]
    assert tensor.dtype == torch.bfloat16
    assert torch.equal(tensor, torch.from_numpy(x).bfloat16())


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_what_torch_saves_is_read(path, protocol):
    torch = pytest.importorskip("torch")
    base = torch.arange(24.0).reshape(4, 6)
    tensors = {name: torch.from_numpy(array) for name, array in arrays_of().items()} | {
        "bfloat16": torch.randn(3, 4).bfloat16(),
        "base": base,
        "transposed": base.T,
        "sliced": base[1::2, 2:5],
        "expanded": base[0, :2].expand(3, 2),
        "tied": base,
        "parameter": torch.nn.Parameter(torch.ones(2)),
    }
    torch.save(tensors, path, pickle_protocol=protocol)
    arrays = read_pth(path)
    tensors["bfloat16"] = tensors["bfloat16"].float()
    assert equal(arrays, {name: tensor.detach().numpy() for name, tensor in tensors.items()})
    assert np.shares_memory(arrays["base"], arrays["tied"])


def test_state_dict_of_a_module_is_read(path):
    """It is an OrderedDict with an attribute."""
    torch = pytest.importorskip("torch")
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    torch.save(module.state_dict(), path)
    assert equal(read_pth(path), {name: tensor.numpy() for name, tensor in module.state_dict().items()})


def test_big_endian(path):
    archive(path, a_dict(a_tensor()), **{"byteorder": b"big", "data/0": STORAGE.astype(">f4").tobytes()})
    assert equal(read_pth(path), {"0": STORAGE.reshape(3, 4)})
    halves = (STORAGE.view("uint32") >> 16).astype(">u2").tobytes()
    archive(path, a_dict(a_tensor(kind="torch\nBFloat16Storage")), **{"byteorder": b"big", "data/0": halves})
    assert equal(read_pth(path), {"0": STORAGE.reshape(3, 4)})
    refused(archive(path, a_dict(a_tensor()), byteorder=b"middle"), "byte order")


def test_memory_is_the_size_of_the_file(path):
    write_pth(path, {str(i): np.ones((512, 1024), "float32") for i in range(4)})
    with at_most(path.stat().st_size + 2**21):
        assert len(read_pth(path)) == 4


# Damage


def test_damage_is_found(path):
    arrays = small_arrays()
    write_pth(path, arrays)
    # What is read had its damage where nothing is said: dates, padding.
    refused, read = count_damage(path, arrays, read_pth)
    assert refused > 200
    assert read > 5


def test_damage_in_the_pickle_is_found_without_the_checksum(path):
    """Whoever changes the pickle and its CRC can say something else, but only something about the storage."""
    program, rng, read = a_dict(a_tensor(), a_tensor(size=(2, 3), offset=1)), random.Random(0), 0
    for mutated in mutations(program, rng, 300):
        archive(path, mutated)
        try:
            arrays = read_pth(path)
        except CheckpointError:
            continue
        read += 1
        for name, array in arrays.items():
            assert isinstance(name, str)
            assert np.isin(array, STORAGE).all()
            assert array.nbytes <= 4 * path.stat().st_size
    assert 0 < read < 150


def test_members_changed(path):
    good = a_dict(a_tensor())
    assert equal(read_pth(archive(path, good)), {"0": STORAGE.reshape(3, 4)})
    refused(archive(path, good, **{"data/0": STORAGE[1:].tobytes()}), "a storage of 12 float32, '0'. It has 11")
    refused(archive(path, good, **{"data/0": STORAGE.tobytes() + b"\0"}))
    refused(archive(path, a_dict(a_tensor(key="1"))), "without 'model/data/1'")
    refused(archive(path, good, zipfile.ZIP_DEFLATED), "compressed")
    refused(
        archive(path, a_dict(a_tensor(kind="torch\nBoolStorage", numel=48, size=(4,), stride=(1,)))), "neither 0 nor 1"
    )
    with zipfile.ZipFile(archive(path, good), "a") as file, pytest.warns(UserWarning, match="Duplicate"):
        file.writestr("model/data/0", bytes(48))
    refused(path, "two members of the same name")
    with zipfile.ZipFile(archive(path, good), "a") as file:
        file.writestr("other/data.pkl", good)
    refused(path, "2 members <name>/data.pkl")
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("readme", "")
    refused(path, "0 members <name>/data.pkl")


def test_a_member_nobody_uses_is_checked_too(path):
    archive(path, a_dict(a_tensor()), unused=b"unused bytes")
    data = path.read_bytes()
    path.write_bytes(data.replace(b"unused bytes", b"unused bits."))
    refused(path, "CRC")


@pytest.mark.parametrize(
    "change",
    [
        {"size": (3, 5)},
        {"size": (4, 4)},
        {"size": (13,), "stride": (1,)},
        {"stride": (5, 1)},
        {"stride": (4, 2)},
        {"offset": 1},
        {"offset": 2**70},
        {"offset": 13, "size": (0,), "stride": (1,)},
        {"offset": -1},
        {"stride": (-4, 1)},
        {"size": (-3, -4)},
        {"size": (3,)},
        {"size": (3, 4.0)},
        {"size": 12},
        {"size": (1,) * 65, "stride": (1,) * 65},
        {"size": (0, 2**62, 2**62), "stride": (1, 1, 1)},
        {"size": (2**40,), "stride": (0,)},
        {"size": (2**64,), "stride": (0,)},
        {"numel": 11},
        {"numel": -12},
        {"numel": 2**62},
        {"key": "../0"},
        {"key": 0},
        {"kind": "torch\nDoubleStorage"},
        {"kind": "torch\nIntStorage", "numel": 6},
        {"kind": "torch\nQInt8Storage"},
        {"kind": "collections\nOrderedDict"},
        {"hooks": b"N"},
        {"more": b"}X\3\0\0\0neg\x88s"},
    ],
    ids=str,
)
def test_a_tensor_that_is_none(path, change):
    refused(archive(path, a_dict(a_tensor(**change))))
    refused(archive(path, a_dict(a_tensor(), a_tensor(**change))))


def test_a_storage_has_one_dtype(path):
    ints = a_tensor(kind="torch\nIntStorage")
    assert read_pth(archive(path, a_dict(ints)))["0"].dtype == "int32"
    refused(archive(path, a_dict(a_tensor(), ints)), "a storage of 12 int32")


def test_memory_is_bounded(path):
    assert len(read_pth(archive(path, a_dict(*[a_tensor()] * 9)))) == 9
    refused(path, "tensors of more than 400 bytes", max_bytes=400)
    assert len(read_pth(path, max_bytes=9 * 48)) == 9
    expanded = a_tensor(size=(1000,), stride=(0,))
    refused(archive(path, a_dict(expanded)), "tensors of more than")
    assert read_pth(path, max_bytes=4000)["0"].shape == (1000,)


@pytest.mark.parametrize("size", [2**10, 2**26])
def test_a_zip_bomb_is_refused_quickly(path, size):
    archive(path, a_dict(a_tensor()), zipfile.ZIP_DEFLATED, bomb=bytes(size))
    with at_most(2**18):
        refused(path, "compressed")


def test_overlapping_members_are_refused(path):
    """A hundred entries that all point to the same bytes."""
    archive(path, a_dict(a_tensor()), large=bytes(10_000))
    with zipfile.ZipFile(path, "a") as file:
        entry = file.getinfo("model/large")
        for i in range(100):
            copy = zipfile.ZipInfo(f"model/{i:05}")
            for field in ("CRC", "compress_size", "file_size", "header_offset"):
                setattr(copy, field, getattr(entry, field))
            file.filelist.append(copy)
        file.writestr("model/last", b"")
    refused(path, r"members of \d+ bytes in a file of \d+")


# Hostility

RAN = []


def run_me(*arguments):
    RAN.append(arguments)


class Calls:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


class Plain:
    pass


def state(value):
    """A call that would set attributes of an OrderedDict's class."""
    return b"ccollections\nOrderedDict\n" + instructions(value) + b"b"


HOSTILE = {
    "system": pickle.dumps(Calls(os.system, "exit 1"), 2),
    "import": pickle.dumps(Calls(__import__, "antigravity"), 2),
    "getattr": pickle.dumps(Calls(getattr, "", "join"), 2),
    "eval": pickle.dumps(Calls(eval, "1"), 4),
    "ours": pickle.dumps(Calls(run_me, 1), 2),
    "inside": a_dict(a_tensor(), instructions(Calls(run_me, 1))),
    "as hooks": a_dict(a_tensor(hooks=instructions(Calls(run_me, 1)))),
    "inst": b"(S'x'\nios\nsystem\n.",
    "obj": b"(cos\nsystem\nX\1\0\0\0xo.",
    "newobj": pickle.dumps(Plain(), 2),
    "ext": b"\x82\1.",
    "stack global": b"\x8c\2os\x8c\6system\x93\x8c\1x\x85R.",
    "stack global of other things": b"}K\1\x93.",
    "dotted name": b"\x8c\x0bcollections\x8c\x14OrderedDict.fromkeys\x93.",
    "build on a class": state({"x": 1}) + b".",
    "build on a tensor": a_dict(a_tensor() + instructions({"__class__": 1}) + b"b"),
    "build with slots": b"}}}\x86b.",
    "call a storage": b"ctorch\nFloatStorage\n)R.",
    "call a string": b"X\1\0\0\0x)R.",
    "call without a tuple": b"ccollections\nOrderedDict\n}R.",
    "dict of something": b"ccollections\nOrderedDict\n" + b"(X\1\0\0\0a" + a_tensor() + b"t\x85\x85" + b"R.",
    "storage as tensor": a_dict(a_storage()),
    "storage as parameter": a_dict(b"ctorch._utils\n_rebuild_parameter\n(" + a_storage() + b"\x89}tR"),
    "tensor as storage": a_dict(a_tensor().replace(a_storage(), a_tensor())),
    "tensor with too few arguments": a_dict(b"ctorch._utils\n_rebuild_tensor_v2\n(" + a_storage() + b"tR"),
    "key of tuples": b"}(" + b"K\1" + b"2\x86" * 40 + b"K\1u.",
    "key of many tuples": b"}K\1" + b"q\0h\0\x86" * 200 + b"K\1s.",
    "value of many tuples": a_dict(b"K\1" + b"q\0h\0\x86" * 200),
    "persistent id of many tuples": b"K\1" + b"q\0h\0\x86" * 200 + b"Q.",
    "memo missing": b"h\7.",
    "memo huge": b"}r\xff\xff\xff\xffj\xff\xff\xff\xfe.",
    "memo of nothing": b"q\0.",
    "itself": b"}q\0X\1\0\0\0xh\0s.",
    "deep": b"(" * 10**4 + b"t" * 10**4 + b".",
    "deep dicts": b"}X\1\0\0\0x" * 10**4 + b"}" + b"s" * 10**4 + b".",
    "string of 4 GiB": b"X\xff\xff\xff\xffx.",
    "string of 2**63": b"\x8d" + b"\xff" * 7 + b"\x7fx.",
    "bytes of 2**62": b"\x8e" + b"\0" * 7 + b"\x40x.",
    "bytearray of 2**62": b"\x96" + b"\0" * 7 + b"\x40x.",
    "frame of 2**62": b"\x80\4\x95" + b"\0" * 7 + b"\x40.",
    "long of 2 GiB": b"\x8b\xff\xff\xff\x7f\1.",
    "decimal": b"I" + b"9" * 10**5 + b"\n.",
    "name twice": a_dict(a_tensor()).replace(b"u.", instructions("0") + a_tensor() + b"u."),
    "odd items": b"}(X\1\0\0\0xu.",
    "items of a tuple": b")(X\1\0\0\0xK\1u.",
    "items of nothing": b"(X\1\0\0\0xK\1u.",
    "pop below": b"\x87.",
    "mark missing": b"}t.",
    "mark below": b"}}(\x86t.",
    "bytes after the end": a_dict(a_tensor()) + b"}.",
    "no end": a_dict(a_tensor())[:-1],
    "two results": b"}}.",
    "empty": b"",
    "not UTF-8": b"}X\1\0\0\0\xffK\1s.",
    "unknown instruction": b"\xff",
    "number": b"K\1.",
    "tensor alone": a_tensor() + b".",
    "number in the dict": a_dict(instructions(1)),
    "dict in the dict": a_dict(b"}"),
    "number as name": b"}K\1" + a_tensor() + b"s.",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_pickle(path, name, monkeypatch):
    def must_not_run(*_):
        raise AssertionError("ran")

    monkeypatch.setattr(os, "system", must_not_run)
    archive(path, HOSTILE[name])
    with at_most(2**20 + 40 * len(HOSTILE[name])):
        refused(path)
    assert RAN == []


def test_the_parts_of_hostile_pickles_are_fine_by_themselves(path):
    assert equal(read_pth(archive(path, a_dict(a_tensor(), a_tensor()))), dict.fromkeys("01", STORAGE.reshape(3, 4)))
    assert read_pth(archive(path, b"ccollections\nOrderedDict\n)R}b.")) == {}
    pickle.loads(HOSTILE["ours"])
    assert RAN.pop() == (1,)


def test_a_large_pickle_is_refused(path):
    refused(archive(path, b"}" * (2**22 + 1)), "At most 4194304 are read")


# Other files


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b"", "begins with b''"),
        (b"PK", "begins with b'PK'"),
        (b"PK\3\4", "BadZipFile"),
        (b"version https://git-lfs.github.com/spec/v1\n", "begins with b'vers'"),
        (pickle.dumps({"a": 1}, 2), "PyTorch before 1.6"),
    ],
)
def test_another_file(path, data, match):
    path.write_bytes(data)
    refused(path, match)


def test_the_format_before_1_6_is_named(path):
    torch = pytest.importorskip("torch")
    torch.save({"x": torch.ones(2)}, path, _use_new_zipfile_serialization=False)
    refused(path, "PyTorch before 1.6")


@pytest.mark.parametrize("value", [{"model": {}, "step": 3}, [1], {"x": None}, {"x": "text"}])
def test_another_object_of_torch(path, value):
    torch = pytest.importorskip("torch")
    torch.save(value, path)
    refused(path)


def test_a_tensor_of_complex_numbers_is_refused(path):
    torch = pytest.importorskip("torch")
    torch.save({"x": torch.ones(2, dtype=torch.complex64)}, path)
    refused(path, "torch ComplexFloatStorage")


def test_a_missing_file(path):
    with pytest.raises(FileNotFoundError):
        read_pth(path)


# Writing what cannot be written


@pytest.mark.parametrize(
    ("arrays", "dtype"),
    [
        ({"x": np.ones(2, "complex64")}, None),
        ({"x": np.ones(2, "uint16")}, None),
        ({"x": np.array(["a"])}, None),
        ({"x": [object()]}, None),
        ({1: np.ones(2)}, None),
        ({"x": np.ones(2)}, "float8"),
        ({"x": np.ones(2)}, "int8"),
        ({"fine": np.ones(2), "x": np.array([1e30])}, "float16"),
        ({"fine": np.ones(2), "x": np.array([1e300])}, "float32"),
        ({"fine": np.ones(2), "x": np.array([3.4e38], "float32")}, "bfloat16"),
    ],
)
def test_nothing_is_left_of_what_cannot_be_written(path, arrays, dtype):
    with pytest.raises(CheckpointError, match="Received"):
        write_pth(path, arrays, dtype)
    assert list(path.parent.iterdir()) == []
    write_pth(path, {"x": STORAGE})
    before = path.read_bytes()
    with pytest.raises(CheckpointError, match="Received"):
        write_pth(path, arrays, dtype)
    assert list(path.parent.iterdir()) == [path]
    assert path.read_bytes() == before


def test_a_full_disk_leaves_the_old_file(path, monkeypatch):
    write_pth(path, {"x": STORAGE})

    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_pth(path, {"x": 2 * STORAGE})
    assert list(path.parent.iterdir()) == [path]
    assert equal(read_pth(path), {"x": STORAGE})


def test_infinity_may_be_written(path):
    x = np.array([np.inf, -np.inf, 1])
    write_pth(path, {"x": x}, dtype="float16")
    assert equal(read_pth(path), {"x": x.astype("float16")})


def test_no_pickle_module_reads_the_file(path, monkeypatch):
    write_pth(path, {"x": STORAGE})

    def must_not_run(*_, **__):
        raise AssertionError("ran")

    for name in ("loads", "load", "Unpickler"):
        monkeypatch.setattr(pickle, name, must_not_run)
    assert equal(read_pth(path), {"x": STORAGE})
