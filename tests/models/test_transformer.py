"""`Transformer` against torch.nn, and what a model of (source, target) must do: fit, decode from a state, save."""

import keras
import numpy as np
import pytest
from cases import close, compile_for_test, refused
from keras import ops

from keras_seq import backend, initializers, models

SOURCE, TARGET, D, HEADS = 13, 17, 12, 3


def tiny(**options):
    return models.Transformer(SOURCE, TARGET, D, 2, HEADS, **({"dropout": 0.0} | options))


def pairs(rows=4, source_length=6, target_length=5, seed=0):
    """Sources and targets with right padding."""
    rng = np.random.default_rng(seed)
    batch = []
    for size, length in ((SOURCE, source_length), (TARGET, target_length)):
        tokens = rng.integers(2, size, (rows, length))
        lengths = rng.integers(2, length + 1, (rows, 1))
        lengths[0] = length
        batch.append(np.where(np.arange(length) < lengths, tokens, 0).astype("int32"))
    return batch


def shifted(target, start_id=1):
    return np.concatenate([np.full_like(target[:, :1], start_id), target[:, :-1]], 1)


def assign(layer, *arrays):
    weights = [w for w in layer.weights if "seed" not in w.path]
    assert len(weights) == len(arrays), [w.path for w in weights]
    for weight, array in zip(weights, arrays, strict=True):
        weight.assign(np.reshape(array, weight.shape))


def from_torch(block, theirs):
    """Gives our block the weights of a layer of torch.nn."""
    w = {name: value.detach().numpy() for name, value in theirs.state_dict().items()}

    def attention(layer, name):
        kernels, biases = np.split(w[f"{name}.in_proj_weight"], 3), np.split(w[f"{name}.in_proj_bias"], 3)
        inside = [x for kernel, bias in zip(kernels, biases, strict=True) for x in (kernel.T, bias)]
        assign(layer, *inside, w[f"{name}.out_proj.weight"].T, w[f"{name}.out_proj.bias"])

    norms = [block.attention_norm, block.feedforward_norm]
    attention(block.attention, "self_attn")
    if getattr(block, "cross_attention", None) is not None:
        attention(block.cross_attention, "multihead_attn")
        norms.insert(1, block.cross_attention_norm)
    for i, norm in enumerate(norms, 1):
        assign(norm, w[f"norm{i}.weight"], w[f"norm{i}.bias"])
    assign(block.feedforward, *[x for i in (1, 2) for x in (w[f"linear{i}.weight"].T, w[f"linear{i}.bias"])])


@pytest.mark.parametrize("norm_first", [False, True])
def test_equals_torch(norm_first):
    """Logits, from the same weights, with padded sources; torch.nn has neither embeddings nor positions."""
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    final = torch.nn.LayerNorm(D, 1e-6) if norm_first else None
    options = {"batch_first": True, "norm_first": norm_first, "layer_norm_eps": 1e-6, "dropout": 0.0}
    encoder = torch.nn.TransformerEncoder(
        torch.nn.TransformerEncoderLayer(D, HEADS, 4 * D, **options), 2, final, enable_nested_tensor=False
    )
    decoder = torch.nn.TransformerDecoder(torch.nn.TransformerDecoderLayer(D, HEADS, 4 * D, **options), 2, final)
    with torch.no_grad():
        for parameter in [*encoder.parameters(), *decoder.parameters()]:
            parameter.add_(0.2 * torch.randn_like(parameter))
    ours = tiny(norm_first=norm_first)
    ours.build()
    for block, theirs in zip([*ours.encoder_blocks, *ours.blocks], [*encoder.layers, *decoder.layers], strict=True):
        from_torch(block, theirs)
    if norm_first:
        for norm, theirs in ((ours.encoder_norm, encoder.norm), (ours.norm, decoder.norm)):
            assign(norm, theirs.weight.detach().numpy(), theirs.bias.detach().numpy())
    source, target = pairs()
    inputs = shifted(np.where(target == 0, 2, target))  # no padding: what a padded query gives is nobody's business
    angles = np.arange(16)[:, None] / 10000 ** (np.arange(0, D, 2) / D)
    table = np.stack([np.sin(angles), np.cos(angles)], -1).reshape(16, D).astype("float32")

    def embedded(embedding, tokens):
        return torch.tensor(D**0.5 * ops.convert_to_numpy(embedding.embeddings)[tokens] + table[: tokens.shape[1]])

    padding = torch.tensor(source == 0)
    with torch.no_grad():
        memory = encoder(embedded(ours.source_embedding, source), src_key_padding_mask=padding)
        h = decoder(
            embedded(ours.embedding, inputs),
            memory,
            tgt_mask=torch.nn.Transformer.generate_square_subsequent_mask(inputs.shape[1]),
            memory_key_padding_mask=padding,
        )
    close(ours((source, inputs)), h.numpy() @ ops.convert_to_numpy(ours.embedding.embeddings).T, 1e-5)


def test_parameters_of_the_base_model(monkeypatch):
    """63.1 million with one shared embedding of 37,000 tokens, by the default arguments."""
    monkeypatch.setattr(initializers.RandomNormal, "__call__", lambda self, shape, dtype=None: ops.zeros(shape, dtype))
    model = models.Transformer(37_000, 37_000)
    model.build()
    d, hidden = 512, 2048
    attention, feed_forward, norm = 4 * (d * d + d), 2 * d * hidden + hidden + d, 2 * d
    encoder, decoder = attention + feed_forward + 2 * norm, 2 * attention + feed_forward + 3 * norm
    assert model.count_params() == 37_000 * d + 6 * (encoder + decoder) == 63_082_496


def test_teacher_forcing():
    """`fit(source, target)` shifts the target; padding in it does not count; smoothing is for training only."""
    source, target = pairs()
    model = tiny(label_smoothing=0.2)
    compile_for_test(model, keras.optimizers.SGD(0.0), loss=None)
    logits = ops.convert_to_numpy(model((source, shifted(target)))).astype("float64")
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    valid = target != 0
    plain = -np.take_along_axis(log_p, target[..., None], -1)[..., 0][valid].mean()
    uniform = -log_p.mean(-1)[valid].mean()
    np.testing.assert_allclose(model.evaluate(source, target, verbose=0), plain, rtol=1e-5)
    smoothed = model.fit(source, target, verbose=0).history["loss"][0]
    np.testing.assert_allclose(smoothed, 0.8 * plain + 0.2 * uniform, rtol=1e-5)
    np.testing.assert_allclose(model.evaluate((source, shifted(target)), target, verbose=0), plain, rtol=1e-5)
    wider = [np.pad(x, ((0, 0), (0, 2))) for x in (source, target)]
    np.testing.assert_allclose(model.evaluate(*wider, verbose=0), plain, rtol=1e-5)


def test_metrics_leave_out_padding():
    source, target = pairs()
    model = tiny()
    model.compile(keras.optimizers.SGD(0.0), metrics=["accuracy"], jit_compile=keras.config.backend() == "jax")
    best = ops.convert_to_numpy(model((source, shifted(target)))).argmax(-1)
    expected = (best == target)[target != 0].mean()
    np.testing.assert_allclose(model.evaluate(source, target, verbose=0)[1], expected, rtol=1e-6)


class Batches(keras.utils.PyDataset):
    def __len__(self):
        return 30

    def __getitem__(self, index):
        rng = np.random.default_rng(index)
        source = rng.integers(2, SOURCE, (32, 3))
        return source, source[:, ::-1]


def test_learns_to_reverse_from_a_dataset_and_loads(tmp_path):
    """`fit` takes datasets of `(source, target)`; a loaded model generates at once."""
    model = models.Transformer(SOURCE, SOURCE, 16, 1, 2, dropout=0.0)
    compile_for_test(model, keras.optimizers.Adam(0.01), loss=None)
    model.fit(Batches(), epochs=4, verbose=0)
    source = Batches()[100][0]
    new = model.generate(source, 3)
    assert (new == source[:, ::-1]).mean() > 0.9
    model.save(tmp_path / "model.keras")
    assert np.array_equal(keras.saving.load_model(tmp_path / "model.keras").generate(source, 3), new)


def test_decodes_as_it_was_trained():
    """Greedy tokens are those that the whole call finds best, for ragged sources alone and together, and streamed."""
    model = tiny()
    sources = [[3, 5, 7, 2], [4, 2], [9, 8, 7]]
    together = model.generate(sources, 6)
    for row, source in zip(together, sources, strict=True):
        assert np.array_equal(model.generate(source, 6), row)
        logits = ops.convert_to_numpy(model((np.array([source]), shifted(row[None]))))[0]
        assert np.array_equal(logits[:, 1:].argmax(-1) + 1, row)  # padding is never generated
    assert np.array_equal(np.stack(list(model.stream(sources, 6)), 1), together)


def test_masks_of_any_pattern():
    """Padding in the source, wherever, is as if it were not there."""
    model = tiny(position="t5")
    source, target = np.array([[3, 5, 7, 2]]), np.array([[1, 4, 6]])
    holes = np.array([[9, 3, 5, 11, 7, 2]])
    mask = np.array([[False, True, True, False, True, True]])
    close(model((holes, target), mask=(mask, None)), model((source, target)), 1e-5)


@pytest.mark.parametrize("position", ["sinusoidal", "learned", "rotary", "alibi"])
def test_state_is_the_whole_past(position):
    """Whole, in pieces and step by step, from a state that holds the source."""
    model = tiny(position=position, norm_first=True)
    source, target = pairs()
    target = shifted(np.where(target == 0, 2, target))
    whole, last = model((source, target), return_state=True)
    close(whole, model({"source": source, "target": target}), 1e-5)
    state = model.initial_state(len(source), 8, source=source)
    first, state = model(target[:, :3], initial_state=state, return_state=True)
    close(first, whole[:, :3], 1e-5)
    for t in range(3, 5):
        y, state = model.step(ops.convert_to_tensor(target[:, t]), state)
        close(y, whole[:, t], 1e-5)
    assert np.array_equal(*(ops.convert_to_numpy(s[0][-1][2]) for s in (state, last)))


def test_checkpoint_with_dropout_changes_no_gradient():
    """What is dropped is dropped again when a block is computed anew."""
    source, target = pairs()
    results = []
    for checkpoint in (False, True):
        keras.utils.set_random_seed(0)
        model = tiny(checkpoint=checkpoint)
        model.build()
        results.append(_gradients(model)(source, target))
    close(results[1], results[0], 1e-5)
    keras.utils.set_random_seed(0)
    model = tiny(checkpoint=True, dropout=0.3, attention_dropout=0.2)
    model.build()
    # Along the gradient the loss of the very same draws grows as it says.
    states = [v for v in model.variables if "seed" in v.path]
    before = [ops.convert_to_numpy(v.value) for v in states]
    weights, losses = [ops.convert_to_numpy(w.value) for w in model.trainable_weights], []
    gradients = _gradients(model)
    y, *grads = gradients(source, target)
    assert np.abs(y - ops.convert_to_numpy(model((source, target)))).max() > 1e-2, "nothing is dropped"
    norm = np.sqrt(sum((g**2).sum() for g in grads))
    for sign in (1, -1):
        for v, value in zip(states, before, strict=True):
            v.assign(value)
        for w, value, g in zip(model.trainable_weights, weights, grads, strict=True):
            w.assign(value + sign * 1e-3 * g / norm)
        losses.append(np.square(gradients(source, target)[0].astype("float64")).mean())
    np.testing.assert_allclose((losses[0] - losses[1]) / 2e-3, norm, rtol=2e-2)


def _gradients(model):
    def loss(floats, source, target):
        y = model((source, target), training=True)
        return ops.mean(ops.square(y)), y

    compiled = backend.current().gradients(loss, model)

    def gradients(source, target):
        y, d_weights, _ = compiled([], *map(ops.convert_to_tensor, (source, target)))
        return [np.asarray(ops.convert_to_numpy(x)) for x in (y, *d_weights)]

    return gradients


def test_errors():
    model, (source, target) = tiny(), pairs()
    refused(lambda: model(target), "source", "initial_state")
    refused(lambda: model(target, initial_state=model.initial_state(4, 8)), "source")
    state = model.initial_state(4, 8, source=source)
    refused(lambda: model((source, target), initial_state=state), "initial_state", "source")
    refused(lambda: model.initial_state(4, 8, source=source[0]), "(batch, time)", "(6,)")
    refused(lambda: model.generate([SOURCE], 3), str(SOURCE - 1), str(SOURCE))
    refused(lambda: tiny(share_embeddings=True), "share_embeddings", "13", "17")
    refused(lambda: tiny(start_id=0), "start_id", "pad_id")
    refused(lambda: tiny(start_id=TARGET), "start_id", "16", "17")
    refused(lambda: tiny(label_smoothing=1.0), "label_smoothing", "1.0")
    refused(lambda: tiny(stateful=True), "stateful")
    refused(lambda: models.Transformer(SOURCE, TARGET, 13, 1, 3), "num_heads", "13", "3")
    refused(lambda: models.Transformer(SOURCE, TARGET, 12, 0, 3), "num_layers", "0")
    refused(lambda: tiny(position="absolute"), "position", "absolute")
