"""RWKV: official initial values, groups of the optimizer, state tuning, tracking of states."""

import itertools
import math

import keras
import numpy as np
import pytest
from cases import close, compile_for_test, refused
from keras import ops, tree

import keras_seq
from keras_seq import backend, layers, models, states

V, D, L, N = 40, 24, 2, 8


def model_of(version=7, num_layers=L, **kwargs):
    model = models.RWKV(V, D, num_layers, version=version, head_dim=N, **kwargs)
    model.build((None, None))
    return model


def weights_of(layer):
    return {weight.path.split("/", 1)[1]: ops.convert_to_numpy(weight) for weight in layer.weights}


def orthogonal(matrix, gain):
    """The shorter side of a matrix is orthonormal, times `gain`."""
    matrix = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    np.testing.assert_allclose(matrix @ matrix.T, gain**2 * np.eye(len(matrix)), atol=1e-5 * gain**2)


@pytest.mark.parametrize("version", [4, 5, 6, 7])
def test_initial_matrices(version):
    """Blocks begin as the identity, so that the logits are those of the embeddings; keys are small, values are not."""
    model = model_of(version)
    for block in model.blocks:
        att, ffn = block.time_mixing, block.channel_mixing
        assert not np.any(att.output_dense.kernel)
        assert not np.any(ffn.value_dense.kernel)
        if version < 7:
            assert not np.any(ffn.receptance_dense.kernel)
        if version == 4:
            assert not np.any(att.key_dense.kernel)
            assert not np.any(att.receptance_dense.kernel)
        else:
            orthogonal(ops.convert_to_numpy(att.key_dense.kernel), 0.1)
            orthogonal(ops.convert_to_numpy(att.receptance_dense.kernel), 1.0)
        orthogonal(ops.convert_to_numpy(att.value_dense.kernel), 1.0)
        hidden = ffn.key_dense.kernel.shape[1]
        orthogonal(ops.convert_to_numpy(ffn.key_dense.kernel), math.sqrt(hidden / D) if version == 4 else 1.0)
        if version > 4:
            scale = ((att.layer_index + 1) / L) ** 0.7
            np.testing.assert_allclose(ops.convert_to_numpy(att.ln_x_weight), scale, rtol=1e-6)
    embeddings = ops.convert_to_numpy(model.embedding.embeddings)
    assert 0.9e-4 < np.abs(embeddings).max() <= 1e-4
    orthogonal(ops.convert_to_numpy(model.head.kernel), 0.5 * math.sqrt(V / D))


def official_vectors(version, layer):
    """The vectors of a layer, channel by channel as the official training code writes them."""
    r01, r10 = layer / (L - 1), 1 - layer / L
    found = {}
    for i in range(D):
        x, h, zigzag = i / D, i / (D - 1), (i + 1) % 3 - 1
        if version == 4:
            of = {
                "att/time_mix_k": x**r10,
                "att/time_mix_v": x**r10 + 0.3 * r01,
                "att/time_mix_r": x ** (0.5 * r10),
                "att/time_decay": -5 + 8 * h ** (0.7 + 1.3 * r01),
                "att/time_first": math.log(0.3) + 0.5 * zigzag,
                "ffn/time_mix_k": x**r10,
                "ffn/time_mix_r": x**r10,
            }
        elif version in (5, 6):
            mixes = {"k": x**r10, "v": x**r10 + 0.3 * r01, "r": x ** (0.5 * r10), "g": x ** (0.5 * r10)}
            if version == 5:
                of = {f"att/time_mix_{name}": mix for name, mix in mixes.items()}
                of |= {"ffn/time_mix_k": x**r10, "ffn/time_mix_r": x**r10}
            else:
                mixes |= {"x": x**r10, "w": x**r10}
                of = {f"att/time_maa_{name}": 1 - mix for name, mix in mixes.items()}
                of |= {"ffn/time_maa_k": 1 - x ** (r10**3), "ffn/time_maa_r": 1 - x ** (r10**3)}
            of["att/time_decay"] = -6 + 5 * h ** (0.7 + 1.3 * r01)
            of["att/time_faaaa"] = r01 * (1 - h) + 0.1 * zigzag
        else:
            z = (i % N - (N - 1) / 2) / ((N - 1) / 2)
            z, linear = z * abs(z), h - 0.5
            powers = {"r": 0.2, "w": 0.9, "k": 0.7, "v": 0.7, "a": 0.9, "g": 0.2}
            of = {f"att/x_{name}": 1 - x ** (power * r10) for name, power in powers.items()}
            of |= {
                "att/w0": -6 + 6 * h ** (1 + r01**0.3) + 0.5 + 2.5 * z,
                "att/a0": -0.19 + 0.3 * z + 0.4 * linear,
                "att/k_k": 0.71 - 0.1 * linear,
                "att/k_a": 1.02,
                "att/r_k": -0.04,
                "ffn/x_k": 1 - x ** (r10**4),
            }
            of |= {"att/v0": 0.73 - 0.4 * linear} if layer else {}
        for name, value in of.items():
            found.setdefault(name, []).append(value)
    return found


@pytest.mark.parametrize("layer", range(L))
@pytest.mark.parametrize("version", [4, 5, 6, 7])
def test_initial_vectors(version, layer):
    weights = weights_of(model_of(version).blocks[layer])
    for name, expected in official_vectors(version, layer).items():
        (got,) = (value for path, value in weights.items() if path.endswith(name))
        np.testing.assert_allclose(got.ravel(), expected, rtol=1e-5, atol=1e-6, err_msg=name)


def test_one_layer_has_initial_values():
    for version in (4, 5, 6, 7):
        block = layers.RWKVBlock(version, head_dim=4)
        block.build((None, None, 8))
        assert all(np.isfinite(w).all() for w in block.get_weights())


def test_ranks_grow_with_the_model():
    """Those of the released 0.1B, 1.5B and 2.9B models."""
    from keras_seq.layers.rwkv_time import _released_rank

    ranks = {d: [_released_rank(letter, d) for letter in "wavg"] for d in (768, 1024, 2048, 2560)}
    assert ranks == {
        768: [64, 64, 32, 128],
        1024: [64, 64, 32, 128],
        2048: [96, 96, 64, 256],
        2560: [96, 96, 64, 320],
    }


def one_step(model, optimizer):
    """How far each weight moves, by name, in the first step of `fit`, in which Adam moves each by its rate."""
    compile_for_test(model, optimizer, None, graph=False)
    before = weights_of(model)
    model.fit(np.random.default_rng(0).integers(1, V, (4, 8)), epochs=1, batch_size=4, verbose=0)
    return {name: (value - before[name], before[name]) for name, value in weights_of(model).items()}


def test_groups_of_the_optimizer():
    """Adam's first step is the learning rate times the sign of the gradient: it shows multiples and weight decay."""
    model = model_of(7)
    rng = np.random.default_rng(0)
    for weight in model.trainable_weights:  # no weight may have a gradient of 0
        weight.assign(ops.convert_to_numpy(weight) + 0.1 * rng.normal(size=weight.shape))
    optimizer = models.rwkv_optimizer(model, 0.01, weight_decay=0.5)
    optimizer.multiples["embeddings"] = 3.0
    moved = one_step(model, optimizer)
    for name, (step, before) in moved.items():
        last = name.split("/")[-1]
        rate = 0.01 * {"w0": 2, "embeddings": 3}.get(last, 1)
        if last in ("kernel", "embeddings"):
            step = step + rate * 0.5 * before
        np.testing.assert_allclose(np.abs(step).max(), rate, rtol=1e-3, err_msg=name)


def test_the_optimizer_is_saved_and_goes_on(tmp_path):
    """Saved and loaded between two epochs, training goes on as if it had not been."""
    tokens = np.random.default_rng(0).integers(1, V, (4, 8))
    schedule = keras.optimizers.schedules.CosineDecay(0.01, 10, alpha=0.1)
    weights = []
    for interrupted in (False, True):
        keras.utils.set_random_seed(0)
        model = model_of(7, 1)
        compile_for_test(model, models.rwkv_optimizer(model, schedule, clipnorm=1.0), None, graph=False)
        model.fit(tokens, epochs=2, batch_size=4, verbose=0)
        if interrupted:
            model.save(tmp_path / "model.keras")
            eagerly, model = model.run_eagerly, keras.saving.load_model(tmp_path / "model.keras")
            model.run_eagerly = eagerly
            assert model.optimizer.multiples["w0"] == 2
            assert "kernel" in model.optimizer.decayed
        model.fit(tokens, epochs=2, batch_size=4, verbose=0)
        weights.append(model.get_weights())
    close(weights[1], weights[0], 1e-6)


def test_wrong_multiples_are_refused():
    refused(lambda: models.GroupedAdamW(multiples={"bias": -1.0}), "multiples", "-1")


def test_a_model_without_rwkv_has_no_official_groups():
    model = models.RecurrentLM(V, D)
    refused(lambda: models.rwkv_optimizer(model), "RWKV", "RecurrentLM")


def test_l2_wrap():
    """The gradient of half of 1e-4 times the mean square of the largest logit is added; the loss shows it not."""
    tokens = ops.convert_to_tensor(np.random.default_rng(0).integers(1, V, (2, 6)))
    found = []
    for amount in (0.0, 0.5):
        keras.utils.set_random_seed(0)
        model = model_of(7, 1, l2_wrap=amount)

        def loss(floats, tokens, model=model):
            logits = model(tokens, training=True)
            plain = model.compute_loss(tokens, None, logits, training=True)
            return plain, (logits, plain)

        found.append(backend.current().gradients(loss, model)([], tokens)[:2])
        index = [weight.path for weight in model.trainable_variables].index(model.head.kernel.path)
    ((logits, without), d_without), ((_, value), d_with) = found
    np.testing.assert_allclose(*map(ops.convert_to_numpy, (value, without)), rtol=1e-6)
    logits = ops.convert_to_numpy(logits)[:, :-1]
    added = np.zeros_like(logits)
    top = logits.argmax(-1)[..., None]
    np.put_along_axis(added, top, 0.5 * np.take_along_axis(logits, top, -1) / top.size, -1)
    hidden = ops.convert_to_numpy(model.hidden(tokens, model.initial_state(2))[0])[:, :-1]
    expected = np.einsum("btd,btv->dv", hidden, added)
    got = ops.convert_to_numpy(d_with[index]) - ops.convert_to_numpy(d_without[index])
    np.testing.assert_allclose(got, expected, atol=1e-5 * np.abs(expected).max() + 1e-6)


@pytest.mark.parametrize("version", [5, 7])
def test_state_tuning(version, tmp_path):
    """`fit` trains the initial states alone, and what they learn is used, saved and generated from."""
    model = model_of(version, 1)
    path = tmp_path / "model.pth"
    rng = np.random.default_rng(0)
    for weight in model.trainable_weights:
        weight.assign(ops.convert_to_numpy(weight) + 0.1 * rng.normal(size=weight.shape))
    model.to_checkpoint(path)
    tuned = models.RWKV.from_checkpoint(path, pad_id=0, state_tuning=True)
    assert [weight.name for weight in tuned.trainable_weights] == ["time_state"]
    tokens = rng.integers(1, V, (4, 8))
    close(tuned(tokens), model(tokens))  # the states begin at 0
    frozen = [ops.convert_to_numpy(weight) for weight in tuned.non_trainable_weights]
    compile_for_test(tuned, models.rwkv_optimizer(tuned, 0.05), None, graph=False)
    before = tuned.evaluate(tokens, batch_size=4, verbose=0)
    tuned.fit(tokens, epochs=4, batch_size=4, verbose=0)
    assert tuned.evaluate(tokens, batch_size=4, verbose=0) < before - 0.01
    for weight, old in zip(tuned.non_trainable_weights, frozen, strict=True):
        np.testing.assert_array_equal(ops.convert_to_numpy(weight), old)
    state = tuned.initial_state(1)
    assert all(np.any(ops.convert_to_numpy(of_time[1])) for of_time, _ in state)
    expected = _continued(model, [3, 4], tuned.initial_state(1), 6).argmax(-1)
    np.testing.assert_array_equal(tuned.generate([3, 4], 6), expected)
    tuned.trainable = False
    assert not tuned.trainable_weights
    tuned.trainable = True
    assert [weight.name for weight in tuned.trainable_weights] == ["time_state"]
    tuned.to_checkpoint(tmp_path / "tuned.pth")
    again = models.RWKV.from_checkpoint(tmp_path / "tuned.pth", pad_id=0)  # the file says that there are such states
    close(again(tokens), tuned(tokens), 1e-6)


def _continued(model, prompt, state, count):
    """Logits of `count` greedy tokens, one by one from a given state."""
    logits, state = model(np.array([prompt]), initial_state=state, return_state=True)
    rows = [ops.convert_to_numpy(logits)[0, -1]]
    while len(rows) < count:
        logits, state = model.step_valid(ops.convert_to_tensor([int(rows[-1].argmax())], dtype="int32"), state)
        rows.append(ops.convert_to_numpy(logits)[0])
    return np.stack(rows)


@pytest.mark.parametrize("version", [4, 7])
def test_checkpointing_changes_nothing(version):
    """Blocks that are computed a second time in the backward pass give the same step, under mixed precision too."""
    tokens, results = np.random.default_rng(0).integers(1, V, (4, 8)), []
    for checkpoint in (False, True):
        keras.utils.set_random_seed(0)
        model = model_of(version, checkpoint=checkpoint, dtype="mixed_bfloat16")
        compile_for_test(model, keras.optimizers.SGD(0.1), None)
        model.fit(tokens, epochs=1, batch_size=4, verbose=0)
        results.append(model.get_weights())
    close(results[1], results[0], 1e-2)


def test_a_quantized_embedding_has_no_official_form(tmp_path):
    model = model_of(7)
    model.embedding.quantize("int8")
    refused(lambda: model.to_checkpoint(tmp_path / "model.pth"), "quantized")


def test_negative_eigenvalues_have_no_official_form(tmp_path):
    model = model_of(7, allow_negative_eigenvalues=True)
    refused(lambda: model.to_checkpoint(tmp_path / "model.pth"), "allow_negative_eigenvalues")
    assert not list(tmp_path.iterdir())


def test_state_tuning_needs_a_matrix():
    refused(lambda: models.RWKV(V, D, L, state_tuning=True, stateful=True), "state_tuning", "stateful")
    refused(lambda: models.RWKV(V, D, L, version=4, state_tuning=True), "state_tuning", "version=4")


def test_wrong_arguments_are_refused():
    refused(lambda: models.RWKV(V, D, L, version=8), "version", "8")
    refused(lambda: models.RWKV(V, D, L, version=5.0), "version", "5.0")
    refused(lambda: models.RWKV(V, D, 0), "num_layers", "0")
    refused(lambda: models.RWKV(V, D, L, head_dim=5), "head_dim", "5", "24")
    refused(lambda: models.RWKV(V, D, L, version="5.1", revision="5.2"), "revision", "5.1", "5.2")
    refused(lambda: models.RWKV(V, D, L, l2_wrap="a"), "l2_wrap", "'a'")
    refused(lambda: models.RWKV(V, D, L, l2_wrap=-1), "l2_wrap", "-1")
    refused(lambda: layers.RWKVBlock(3), "version", "3")
    refused(lambda: layers.RWKV7TimeMixing(5).build((None, None, 8)), "head_dim", "5", "8")
    refused(lambda: layers.RWKV7TimeMixing(4, layer_index=2, num_layers=2), "layer_index", "2")
    refused(lambda: layers.RWKV7TimeMixing(4, gate_rank=0), "gate_rank", "0")
    refused(lambda: layers.RWKV5TimeMixing(4, revision="5.3"), "revision", "5.3")
    refused(lambda: layers.RWKV4ChannelMixing(0), "hidden_dim", "0")
    refused(lambda: layers.RWKV6TimeMixing(4).initial_state(2), "must be built")


def test_generates_as_one_row_alone():
    """A ragged batch, in which short prompts are padded, gives what each prompt gives alone."""
    model = model_of(7)
    rng = np.random.default_rng(0)
    for weight in model.trainable_weights:
        weight.assign(ops.convert_to_numpy(weight) + 0.2 * rng.normal(size=weight.shape))
    together = model.generate([[3, 1, 4, 1, 5], [2, 6, 5]], 5)
    np.testing.assert_array_equal(together[1], model.generate([2, 6, 5], 5))
    assert [int(token) for token in model.stream([2, 6, 5], 5)] == together[1].tolist()


def tracker(keys):
    """An RWKV-7 time mixing set by hand, whose state starts as the identity and is reflected by each token.

    A token is a one-hot vector. Its key is `keys[token]`, of length 1 or 0: the state loses what lies along it twice,
    which is a reflection. Nothing decays and nothing is added.
    """
    tokens, size = len(keys), len(keys[0])
    width = max(tokens, size)
    width += -width % size
    layer = layers.RWKV7TimeMixing(width, allow_negative_eigenvalues=True, decay_rank=1, iclr_rank=1, gate_rank=1)
    layer.build((None, None, width))
    for weight in layer.weights:
        weight.assign(np.zeros(weight.shape))
    layer.w0.assign(np.full(width, -1e4))  # no decay
    layer.a0.assign(np.full(width, 1e4))  # the rate is 2
    layer.k_k.assign(np.ones(width))
    kernel = np.zeros((width, width))
    kernel[:tokens, :size] = keys
    layer.key_dense.kernel.assign(kernel)
    return layer, width


@pytest.mark.parametrize("mode", ["reference", "native"])
@pytest.mark.parametrize("group", ["parity", "S5"])
def test_tracks_a_state(group, mode):
    """Over 500 tokens, exactly: the parity of bits, and the permutation of five things that are swapped in pairs."""
    rng = np.random.default_rng(0)
    if group == "parity":
        keys, size = np.array([[0.0], [1.0]]), 1
        matrices = [np.eye(1), -np.eye(1)]
    else:
        pairs, size = list(itertools.combinations(range(5), 2)), 5
        keys = np.zeros((len(pairs), size))
        for token, (i, j) in enumerate(pairs):
            keys[token, i], keys[token, j] = math.sqrt(0.5), -math.sqrt(0.5)
        matrices = [np.eye(size)[[*_swapped(size, i, j)]] for i, j in pairs]
    layer, width = tracker(keys)
    tokens = rng.integers(0, len(keys), (8, 500))
    start = np.zeros((8, 1, width, width), "float32")
    start[:, :, :size, :size] = np.eye(size)

    def run(x, state):
        with keras_seq.kernels(mode):
            return layer(x, initial_state=state, return_state=True)[1][1]

    x = np.eye(width, dtype="float32")[tokens]
    state = (ops.zeros((8, width)), ops.convert_to_tensor(start))
    last = ops.convert_to_numpy(backend.current().compiled(run, layer)(ops.convert_to_tensor(x), state))
    for row in range(8):
        expected = np.eye(size)
        for token in tokens[row]:
            expected = expected @ matrices[token]
        np.testing.assert_array_equal(np.rint(last[row, 0, :size, :size]), expected)
        assert np.abs(last[row, 0, :size, :size] - expected).max() < 1e-3


def _swapped(size, i, j):
    order = list(range(size))
    order[i], order[j] = j, i
    return order


def test_states_in_files(tmp_path):
    """Saved, loaded in the same structure, and used as if it had never left."""
    model = model_of(7)
    _, state = model(np.array([[3, 1, 4], [1, 5, 9]]), return_state=True)
    states.save(tmp_path / "state.safetensors", state)
    again = states.load(tmp_path / "state.safetensors")
    tree.assert_same_structure(again, state)
    close(again, state, 0.0)
    nest = {"b": [ops.ones((1,)), ()], "a": (ops.zeros((2, 0), "int32"),)}
    states.save(tmp_path / "nest.safetensors", nest)
    again = states.load(tmp_path / "nest.safetensors")
    tree.assert_same_structure(again, nest)
    close(again["b"][0], np.ones(1))
    assert tuple(again["a"][0].shape) == (2, 0)


def test_a_file_that_holds_no_state_is_refused(tmp_path):
    model_of(7).to_checkpoint(tmp_path / "model.safetensors")
    with pytest.raises(keras_seq.checkpoints.CheckpointError, match=r"model\.safetensors.*a state"):
        states.load(tmp_path / "model.safetensors")


def test_states_between_states():
    model = model_of(7)
    (_, a), (_, b) = (model(np.array([[token, 2]]), return_state=True) for token in (3, 4))
    middle = states.interpolate(a, b, 0.25)
    for x, y, z in zip(*map(tree.flatten, (a, b, middle)), strict=True):
        close(z, 0.75 * ops.convert_to_numpy(x) + 0.25 * ops.convert_to_numpy(y))
    close(states.interpolate(a, b, 0.0), a)
    refused(lambda: states.interpolate(a, model.initial_state(2), 0.5), "same structure")


@pytest.mark.parametrize("version", [4, 7])
def test_scanned_layers_give_the_same(version):
    """Logits, states and gradients, under a mask."""
    tokens = ops.convert_to_tensor(np.random.default_rng(0).integers(0, 3, (2, 12)), dtype="int32")
    results = []
    for scan_layers in (False, True):
        keras.utils.set_random_seed(0)
        model = model_of(version, 3, scan_layers=scan_layers)
        assert model._can_scan() == (scan_layers and backend.current().COMPILES)
        rng = np.random.default_rng(1)
        model.set_weights([w + 0.3 * rng.normal(size=w.shape) for w in model.get_weights()])

        def loss(floats, tokens, model=model):
            logits, state = model(tokens, return_state=True, training=True)
            return ops.sum(logits * logits) + sum(ops.sum(leaf**2) for leaf in tree.flatten(state)), (logits, state)

        aux, by_weights, _ = backend.current().gradients(loss, model)([], tokens)
        results.append([ops.convert_to_numpy(leaf) for leaf in tree.flatten((aux, by_weights))])
    for a, b in zip(*results, strict=True):
        scale = max(np.abs(a).max(), 1)
        close(b / scale, a / scale, 5e-6)
