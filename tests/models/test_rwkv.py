"""RWKV against the official package, Hugging Face and published numbers; checkpoints in and out."""

import functools
import math

import keras
import numpy as np
import pytest
from cases import close
from keras import ops, tree
from rwkv_files import HEAD, VERSIONS, VOCAB, D, Official, checkpoint

import keras_seq
from keras_seq import backend, models
from keras_seq.checkpoints import CheckpointError
from keras_seq.checkpoints.files import read_arrays, write_arrays

TOKENS = np.random.default_rng(0).integers(0, VOCAB, 70)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The path of a checkpoint of each version, written once."""
    folder = tmp_path_factory.mktemp("rwkv")

    @functools.cache
    def path(version):
        write_arrays(folder / f"v{version}.pth", checkpoint(version))
        return folder / f"v{version}.pth"

    return path


@functools.cache
def loaded(path):
    return models.RWKV.from_checkpoint(path)


def run(model, tokens, state=None, mode="auto"):
    """Logits and state of one row, compiled."""

    def function(tokens, state):
        with keras_seq.kernels(mode):
            return model(tokens, initial_state=state, return_state=True, training=False)

    state = model.initial_state(1) if state is None else state
    return backend.current().compiled(function, model)(ops.convert_to_tensor(tokens[None]), state)


def official_form(state):
    """Our state as the list of the official package, without the batch axis."""
    return [ops.convert_to_numpy(leaf)[0] for leaf in tree.flatten(state)]


@pytest.mark.parametrize("version", VERSIONS)
def test_equals_the_official_package(version, files):
    """Logits and state to 1e-5: whole, step by step for the definition and in chunks, split, and one by one."""
    logits, state = Official(version).run(files(version), TOKENS)
    model = loaded(files(version))
    for mode in ("reference", "native"):
        got, last = run(model, TOKENS, mode=mode)
        close(got[0], logits, 1e-5, f"{mode}: logits")
        for ours, theirs in zip(official_form(last), state, strict=True):
            close(ours.ravel(), theirs.ravel(), 1e-5, f"{mode}: state")
    head, last = run(model, TOKENS[:-3])
    step = backend.current().compiled(model.step_valid, model)
    rows = [head[0, -1]]
    for token in TOKENS[-3:]:
        row, last = step(ops.convert_to_tensor([token], dtype="int32"), last)
        rows.append(row[0])
    close(ops.stack(rows), logits[-4:], 1e-5, "step by step")
    for ours, theirs in zip(official_form(last), state, strict=True):
        close(ours.ravel(), theirs.ravel(), 1e-5, "state, step by step")


@pytest.mark.parametrize("version", VERSIONS)
def test_back_to_the_official_package(version, files, tmp_path):
    """What is written is what was read, and the official package answers identically."""
    model = loaded(files(version))
    path = tmp_path / "back.pth"
    model.to_checkpoint(path)
    before, after = read_arrays(files(version)), read_arrays(path)
    ignored = {f"blocks.0.att.v{i}" for i in range(3)} if version == "7" else set()
    assert after.keys() == before.keys() - ignored
    for name, array in after.items():
        assert array.shape == before[name].shape, name
        np.testing.assert_array_equal(array, before[name], err_msg=name)
    official = Official(version)
    np.testing.assert_array_equal(official.run(path, TOKENS)[0], official.run(files(version), TOKENS)[0])


def test_equals_hugging_face(files, tmp_path):
    """RWKV-4 in the names of Hugging Face, from a safetensors file."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    config = transformers.RwkvConfig(
        vocab_size=VOCAB,
        hidden_size=D,
        attention_hidden_size=D,
        intermediate_size=4 * D,
        num_hidden_layers=2,
        rescale_every=0,
        context_length=128,
    )
    theirs = transformers.RwkvForCausalLM(config).eval()
    keys = {"att": "attention", "ffn": "feed_forward"}
    letters = {"k": "key", "v": "value", "r": "receptance"}
    state = {}
    for name, array in read_arrays(files("4")).items():
        parts = [keys.get(part, part) for part in name.split(".")]
        name = ".".join(parts).replace("ln0", "pre_ln").replace("emb.", "embeddings.")
        if "time_mix_" in name:
            name = name[:-1] + letters[name[-1]]
        state[name if name.startswith("head") else f"rwkv.{name}"] = array
    theirs.load_state_dict({name: torch.from_numpy(array) for name, array in state.items()}, strict=True)
    write_arrays(tmp_path / "model.safetensors", state)
    ours = models.RWKV.from_checkpoint(tmp_path / "model.safetensors")
    with torch.no_grad():
        logits = theirs(torch.from_numpy(TOKENS[None])).logits
    close(run(ours, TOKENS)[0], logits.numpy(), 1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_files(dtype, files, tmp_path):
    path = tmp_path / "half.safetensors"
    loaded(files("7")).to_checkpoint(path, dtype)
    close(run(models.RWKV.from_checkpoint(path), TOKENS)[0], run(loaded(files("7")), TOKENS)[0], 0.05)


def changed(arrays, name, array):
    return {k: v for k, v in (arrays | {name: array}).items() if v is not None}


@pytest.mark.parametrize(
    ("name", "array", "words"),
    [
        ("blocks.1.att.x_k", None, ["blocks.1.att.x_k is missing"]),
        ("blocks.1.att.surprise", np.zeros(3, "float32"), ["blocks.1.att.surprise is not known"]),
        ("blocks.0.att.r_k", np.zeros((5, HEAD), "float32"), ["blocks.0.att.r_k", "(5, 8)", "(4, 8)"]),
        ("ln_out.bias", np.zeros(D, "int32"), ["ln_out.bias", "int32"]),
        ("blocks.0.att.r_k", np.zeros((), "float32"), ["head_dim=0"]),
        ("blocks.0.att.r_k", np.zeros((5, 5), "float32"), ["head_dim=5", "d_model=32"]),
        ("blocks.0.att.w1", np.zeros((D, 0), "float32"), ["decay_rank=0"]),
        ("emb.weight", np.zeros((0, D), "float32"), ["vocab_size=0"]),
        ("head.weight", np.zeros((D, VOCAB), "float32"), ["head.weight", "(32, 50)", "(50, 32)"]),
        ("emb.weight", None, ["emb.weight"]),
        ("blocks.0.ffn.s_emb.weight", np.zeros((3, 3), "float32"), ["later variant"]),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(name, array, words, tmp_path):
    path = tmp_path / "wrong.safetensors"
    write_arrays(path, changed(checkpoint("7"), name, array))
    with pytest.raises(CheckpointError) as error:
        models.RWKV.from_checkpoint(path)
    assert all(word in str(error.value) for word in ["wrong.safetensors", *words]), error.value


def test_arguments_that_contradict_a_checkpoint_are_refused(files):
    path = files("5.2")
    assert models.RWKV.from_checkpoint(path, version=5, d_model=D).d_model == D
    for name, value in {"version": 7, "d_model": D + 1, "head_dim": 1}.items():
        with pytest.raises(ValueError, match=rf"\.pth has {name}=.*\. Received: {name}={value}"):
            models.RWKV.from_checkpoint(path, **{name: value})


def test_a_refused_checkpoint_changes_nothing(tmp_path):
    """A missing weight is found before the first is assigned."""
    from keras_seq.checkpoints import rwkv

    model = models.RWKV(VOCAB, D, 2, head_dim=HEAD)
    model.build((None, None))
    before = model.get_weights()
    arrays = rwkv.arrays_of(model)
    arrays = {name: array + 1 for name, array in arrays.items() if name != "head.weight"}
    with pytest.raises(CheckpointError, match=r"head\.weight is missing"):
        rwkv.load(model, arrays, "here")
    for old, new in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)


def test_damaged_files_are_refused(files, tmp_path):
    """300 files with a flipped bit, a piece missing or a piece too many: refused, or the same as before."""
    data, rng = files("7").read_bytes(), np.random.default_rng(0)
    expected = read_arrays(files("7"))
    path, refusals = tmp_path / "damaged.pth", 0
    for i in range(300):
        at = int(rng.integers(len(data)))
        if i % 3 == 0:
            damaged = data[:at] + bytes([data[at] ^ (1 << int(rng.integers(8)))]) + data[at + 1 :]
        elif i % 3 == 1:
            damaged = data[:at] + data[at + int(rng.integers(1, 100)) :]
        else:
            damaged = data[:at] + rng.bytes(int(rng.integers(1, 100))) + data[at:]
        path.write_bytes(damaged)
        try:
            arrays = read_arrays(path)
        except CheckpointError:
            refusals += 1
            continue
        assert arrays.keys() == expected.keys()
        for name, array in arrays.items():
            np.testing.assert_array_equal(array, expected[name], err_msg=f"file {i}: {name}")
    assert refusals > 250


SIZES = {  # vocabulary, d, layers, options: published number of weights
    "4 169M": ((50277, 768, 12), {"version": 4}, 169_342_464),
    "4 1.5B": ((50277, 2048, 24), {"version": 4}, 1_515_106_304),
    "6 1.6B": ((65536, 2048, 24), {"version": 6}, 1_599_873_024),
    "6 3.1B": ((65536, 2560, 32), {"version": 6}, 3_099_863_040),
    "7 0.19B": ((65536, 768, 12), {}, 191_034_624),
    "7 0.45B": ((65536, 1024, 24), {}, 450_767_872),
    "7 1.5B": ((65536, 2048, 24), {}, 1_527_404_544),
    "7 2.9B": ((65536, 2560, 32), {}, 2_947_735_040),
}


@pytest.mark.parametrize("name", SIZES)
def test_parameters_of_the_released_models(name, monkeypatch):
    """As published, counted from shapes alone: the weights are never made."""
    sizes, options, expected = SIZES[name]
    counted = []

    def add_weight(self, shape=None, *args, **kwargs):
        counted.append(math.prod(shape))

    monkeypatch.setattr(keras.layers.Layer, "add_weight", add_weight)
    models.RWKV(*sizes, **options).build((None, None))
    assert sum(counted) == expected
