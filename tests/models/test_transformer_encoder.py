"""`TransformerEncoder` against Hugging Face's BERT with random weights; its heads, its inputs, and its masking."""

import keras
import numpy as np
import pytest
from cases import close, compile_for_test, refused
from keras import ops

from keras_seq import backend, initializers, models

VOCAB, D, LAYERS, HEADS, CLASSES = 40, 24, 2, 4, 3
MASK = np.arange(9) < np.array([9, 4, 7])[:, None]
TYPES = np.arange(9) >= np.array([3, 2, 9])[:, None]


def integers(*shape, low=1, seed=0):
    return np.random.default_rng(seed).integers(low, VOCAB, shape)


def tiny(layers=1, **options):
    return models.TransformerEncoder(VOCAB, D, layers, HEADS, **{"max_length": 32} | options)


def bert(name):
    """A Hugging Face model in evaluation mode, none of whose weights is trivial, and its weights as NumPy arrays."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip(
        "transformers", reason="the oracle is Hugging Face's model: pip install transformers"
    )
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=VOCAB,
        hidden_size=D,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        intermediate_size=4 * D,
        max_position_embeddings=32,
        num_labels=CLASSES,
    )
    model = getattr(transformers, name)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model, {key.removeprefix("bert."): value.detach().numpy() for key, value in model.state_dict().items()}


def assign(layer, *arrays):
    weights = [w for w in layer.weights if "seed" not in w.path]
    assert len(weights) == len(arrays), [w.path for w in weights]
    for weight, array in zip(weights, arrays, strict=True):
        weight.assign(np.reshape(array, weight.shape))


def with_weights_of(w, **options):
    ours = tiny(LAYERS, **options)
    ours.build((None, None))

    def linear(name):
        return w[f"{name}.weight"].T, w[f"{name}.bias"]

    def norm(name):
        return w[f"{name}.weight"], w[f"{name}.bias"]

    assign(ours.embedding, w["embeddings.word_embeddings.weight"])
    assign(ours.position, w["embeddings.position_embeddings.weight"])
    assign(ours.token_type, w["embeddings.token_type_embeddings.weight"])
    assign(ours.norm, *norm("embeddings.LayerNorm"))
    for i, block in enumerate(ours.blocks):
        h = f"encoder.layer.{i}"
        qkv = [x for name in ("query", "key", "value") for x in linear(f"{h}.attention.self.{name}")]
        assign(block.attention, *qkv, *linear(f"{h}.attention.output.dense"))
        assign(block.attention_norm, *norm(f"{h}.attention.output.LayerNorm"))
        assign(block.feedforward, *linear(f"{h}.intermediate.dense"), *linear(f"{h}.output.dense"))
        assign(block.feedforward_norm, *norm(f"{h}.output.LayerNorm"))
    if ours.pooler is not None:
        assign(ours.pooler, *linear("pooler.dense"))
    if ours.classifier is not None:
        assign(ours.classifier, *linear("classifier"))
    if ours.head == "masked_lm":
        assign(ours.head_dense, *linear("cls.predictions.transform.dense"))
        assign(ours.head_norm, *norm("cls.predictions.transform.LayerNorm"))
        ours.output_bias.assign(w["cls.predictions.bias"])
    return ours


def outputs_of(model, tokens, mask, types):
    torch = pytest.importorskip("torch")
    tokens, mask, types = (torch.tensor(x.astype("int64")) for x in (tokens, mask, types))
    with torch.no_grad():
        return model(tokens, attention_mask=mask, token_type_ids=types)


def test_equals_bert():
    """Vectors and what is pooled of them, with padding on the right, with token types and without."""
    theirs, w = bert("BertModel")
    ours, tokens = with_weights_of(w), integers(3, 9)
    for types, given in ((TYPES, {"token_types": TYPES.astype("int32")}), (0 * TYPES, {})):
        expected = outputs_of(theirs, tokens, MASK, types)
        y = ours(tokens, mask=MASK, **given)
        close(ops.convert_to_numpy(y)[MASK], expected.last_hidden_state.numpy()[MASK], 1e-5)
        close(ours.pool(y, MASK), expected.pooler_output.numpy(), 1e-5)


def test_equals_bert_masked_lm():
    theirs, w = bert("BertForMaskedLM")
    ours, tokens = with_weights_of(w, head="masked_lm"), integers(3, 9)
    y = ops.convert_to_numpy(ours(tokens, mask=MASK, token_types=TYPES.astype("int32")))
    close(y[MASK], outputs_of(theirs, tokens, MASK, TYPES).logits.numpy()[MASK], 1e-5)


def test_equals_bert_classifier():
    theirs, w = bert("BertForSequenceClassification")
    ours, tokens = with_weights_of(w, head="classifier", num_classes=CLASSES), integers(3, 9)
    y = ours(tokens, mask=MASK, token_types=TYPES.astype("int32"))
    close(y, outputs_of(theirs, tokens, MASK, TYPES).logits.numpy(), 1e-5)


def test_parameters_of_bert_base(monkeypatch):
    """109,482,240 (Devlin et al. 2018)."""
    monkeypatch.setattr(initializers.RandomNormal, "__call__", lambda self, shape, dtype=None: ops.zeros(shape, dtype))
    model = models.TransformerEncoder(30522, 768, 12, 12)
    model.build((None, None))
    assert model.count_params() == 109_482_240


POSITIONS = ["learned", "sinusoidal", "rotary", "alibi", "t5", None]


@pytest.mark.parametrize("position", POSITIONS)
def test_packed_rows_are_like_rows_alone(position):
    model = tiny(2, position=position)
    a, b = integers(1, 5), integers(1, 4, seed=1)
    segments = np.array([[1] * 5 + [2] * 4])
    packed = model(np.concatenate([a, b], 1), segment_ids=segments, token_types=segments - 1)
    alone = [model(a), model(b, token_types=np.ones((1, 4), "int32"))]
    close(packed, ops.concatenate(alone, 1), 1e-5)


@pytest.mark.parametrize("position", POSITIONS)
def test_padding_changes_nothing(position):
    """Left or right, found by `pad_id` or by a mask, whatever stands there; nor what is pooled and classified."""
    model = tiny(2, position=position)
    classifier = tiny(head="classifier", num_classes=CLASSES, position=position)
    tokens = integers(1, 5)
    y = model(tokens)
    for left, right in ((3, 0), (0, 3), (1, 2)):
        valid = slice(left, left + 5)
        padded = np.pad(tokens, ((0, 0), (left, right)))
        other = np.pad(tokens, ((0, 0), (left, right)), constant_values=7)
        for x, given in ((padded, {}), (other, {"mask": padded != 0, "token_types": np.where(padded, 0, 99)})):
            got = model(x, **given)
            close(got[:, valid], y, 1e-5)
            close(model.pool(got), model.pool(y), 1e-5)
            close(model.pool(ops.convert_to_numpy(got), padded != 0), model.pool(y), 1e-5)
            close(classifier(x, **given), classifier(tokens), 1e-5)


def test_norm_first():
    """The norm is the last thing: nothing is left when its gain is 0."""
    model = tiny(norm_first=True)
    y = ops.convert_to_numpy(model(integers(2, 6)))
    assert abs(y.mean()) < 1e-5
    assert abs(y.std() - 1) < 1e-2
    model.norm.gamma.assign(ops.zeros((D,)))
    close(model(integers(2, 6)), np.zeros((2, 6, D)))


def test_inputs_in_a_structure():
    """A tuple, or a dict by name, is the same as keywords: called, in `predict` and `fit`, in a functional model."""
    model = tiny(head="masked_lm")
    tokens, types = np.where(MASK, integers(3, 9), 0).astype("int32"), TYPES.astype("int32")
    y = model(tokens, token_types=types)
    named = {"tokens": tokens, "token_types": types}
    close(
        [model((tokens, types)), model(named), model({"tokens": tokens, "mask": MASK, "token_types": types})], [y] * 3
    )
    for x in ((tokens, types), [tokens, types], named, named | {"mask": MASK}):
        close(model.predict(x, verbose=0), y, 1e-5)
    inputs = {name: keras.Input((None,), dtype="int32", name=name) for name in named}
    close(keras.Model(inputs, model(inputs)).predict(named, verbose=0), y, 1e-5)
    close(model(tokens.astype("float32")), model(tokens))
    compile_for_test(model, "sgd", None)
    assert np.isfinite(model.fit(named | {"mask": MASK}, tokens, verbose=0).history["loss"][0])
    assert np.isfinite(model.evaluate((tokens, types), tokens, verbose=0))


def test_fits_and_saves(tmp_path):
    """Each head learns a small task, without a loss in `compile`; saved and loaded it gives the same, compiled."""
    tokens = integers(32, 8, low=5)
    tasks = {
        "masked_lm": ({}, models.mask_tokens(np.sort(tokens % 8 + 5), 4, VOCAB, seed=0)),
        "classifier": ({"num_classes": 2}, (tokens, (tokens[:, 2] > 20).astype("int32"))),
    }
    for head, (options, (x, y)) in tasks.items():
        model = tiny(head=head, **options)
        compile_for_test(model, keras.optimizers.Adam(0.003), None)
        losses = model.fit(x, y, epochs=12, batch_size=8, verbose=0).history["loss"]
        assert losses[-1] < 0.8 * losses[0], (head, losses)
        model.save(tmp_path / "model.keras")
        loaded = keras.saving.load_model(tmp_path / "model.keras")
        close(loaded(x), model(x), 1e-12)
        assert abs(loaded.evaluate(x, y, verbose=0) - model.evaluate(x, y, verbose=0)) < 1e-5
    model = tiny()
    compile_for_test(model, keras.optimizers.Adam(0.003))
    losses = model.fit(tokens, 0.1 * ops.ones((32, 8, D)), epochs=12, batch_size=8, verbose=0).history["loss"]
    assert losses[-1] < 0.8 * losses[0]


def test_loss_of_masked_lm():
    """The mean over targets that are neither padding nor negative, weighted or not; the same by a loss of Keras."""
    model, tokens = tiny(head="masked_lm"), np.where(MASK, integers(3, 9), 0)
    targets = np.where(MASK & (integers(3, 9, seed=1) < 20), integers(3, 9, seed=2), 0)
    targets[0, :2] = -100
    counts = (targets > 0).astype("float32")
    y = ops.convert_to_numpy(model(tokens)).astype("float64")
    all_losses = np.log(np.exp(y).sum(-1)) - np.take_along_axis(y, np.maximum(targets, 0)[..., None], -1)[..., 0]
    weights = np.random.default_rng(0).random((3, 9)).astype("float32")
    compile_for_test(model, "sgd", None)
    for given in (counts, counts * weights):
        sample_weight = None if given is counts else weights
        got = model.evaluate(tokens, targets, sample_weight=sample_weight, verbose=0)
        assert abs(got - (all_losses * given).sum() / given.sum()) < 1e-5
    assert model.evaluate(tokens, 0 * targets, verbose=0) == 0
    compile_for_test(model, "sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    assert abs(model.evaluate(tokens, targets, verbose=0) - (all_losses * counts).sum() / counts.sum()) < 1e-5


def test_checkpoint_changes_no_gradient():
    tokens, results = integers(2, 9), []
    for checkpoint in (False, True):
        keras.utils.set_random_seed(0)
        model = tiny(2, checkpoint=checkpoint, head="classifier", num_classes=CLASSES)
        model.build((None, None))

        def loss(floats, tokens, model=model):
            y = model(tokens, training=True)
            return ops.mean(ops.square(y)), y

        y, d_weights, _ = backend.current().gradients(loss, model)([], ops.convert_to_tensor(tokens))
        results.append([y, *d_weights])
    close(results[1], results[0], 1e-5)


def test_pooler():
    """Trained with the classifier alone; a model without it has none, and the classifier then sees the first step."""
    for options, trained in (({}, False), ({"head": "classifier", "num_classes": 2}, True)):
        model = tiny(**options)
        model.build((None, None))
        assert all(any(w is v for v in model.trainable_weights) == trained for w in model.pooler.weights)
        without = tiny(pooler=False, **options)
        without(integers(1, 5))
        assert without.count_params() == model.count_params() - D * D - D
    refused(lambda: tiny(pooler=False).pool(np.ones((1, 5, D))), "no pooler")
    refused(lambda: tiny(head="masked_lm").pool(np.ones((1, 5, D))), "no pooler")
    refused(lambda: tiny().pool(keras.Input((None, D))), "functional")


def test_mask_tokens():
    tokens = np.random.default_rng(0).integers(0, VOCAB, (200, 50))
    inputs, targets = models.mask_tokens(tokens, 4, VOCAB, special_ids=(2, 3), seed=0)
    chosen = targets != 0
    assert np.array_equal(targets[chosen], tokens[chosen])
    assert np.array_equal(inputs[~chosen], tokens[~chosen])
    assert not np.isin(tokens[chosen], (0, 2, 3, 4)).any()
    assert abs(chosen[~np.isin(tokens, (0, 2, 3, 4))].mean() - 0.15) < 0.02
    masked, same = inputs[chosen] == 4, inputs[chosen] == tokens[chosen]
    assert abs(masked.mean() - 0.8) < 0.04
    assert abs(same.mean() - 0.1) < 0.04
    assert not np.isin(inputs[chosen & (inputs != 4)], (0, 2, 3)).any()
    for given, equal in (({"seed": 0}, True), ({"seed": 1}, False)):
        again = models.mask_tokens(tokens, 4, VOCAB, special_ids=(2, 3), **given)
        assert np.array_equal(again, (inputs, targets)) == equal
    keras.utils.set_random_seed(5)
    one = models.mask_tokens(tokens, 4, VOCAB)
    keras.utils.set_random_seed(5)
    assert np.array_equal(models.mask_tokens(tokens, 4, VOCAB), one)
    inputs, targets = models.mask_tokens(tokens, 4, VOCAB, rate=1.0, pad_id=None, seed=0)
    assert np.array_equal(targets == -1, tokens == 4)
    refused(lambda: models.mask_tokens(tokens, 4, VOCAB, rate=15), "rate", "15")
    refused(lambda: models.mask_tokens(tokens / 2, 4, VOCAB), "integer", "float64")
    refused(lambda: models.mask_tokens([1, 1], 1, 2), "vocab_size=2")


def test_errors():
    refused(lambda: tiny(head="next"), "head", "next")
    refused(lambda: tiny(head="classifier"), "num_classes", "None")
    refused(lambda: tiny(head="classifier", num_classes=0), "num_classes", "0")
    refused(lambda: tiny(num_classes=2), "num_classes", "None")
    refused(lambda: tiny(position="absolute"), "position", "absolute")
    refused(lambda: tiny(norm="batch"), "norm", "batch")
    refused(lambda: tiny(pad_id=VOCAB), "pad_id", "40")
    refused(lambda: tiny(stateful=True), "stateful", "after")
    refused(lambda: models.TransformerEncoder(VOCAB, 25, 1, 4), "num_heads", "25")
    refused(lambda: models.TransformerEncoder(VOCAB, D, 0, 4), "num_layers", "0")
    model = tiny(max_length=8)
    refused(lambda: model(np.ones((1, 9), "int32")), "8", "9")
    tokens = np.ones((2, 5), "int32")
    refused(lambda: model(tokens[0]), "tokens", "(5,)")
    refused(lambda: model(tokens, mask=tokens), "mask", "int32")
    refused(lambda: model(tokens, token_types=tokens[:, :4]), "token_types", "(2, 5)", "(2, 4)")
    refused(lambda: model(tokens, segment_ids=tokens / 2), "segment_ids", "float")
    refused(lambda: model({"tokens": tokens, "types": tokens}), "token_types", "'types'")
    refused(lambda: model((tokens, tokens, tokens)), "(tokens, token_types)")
    refused(lambda: tiny(num_token_types=0)(tokens, token_types=tokens), "num_token_types=0")
    refused(lambda: model.step(tokens[:, 0], ()), model.name, "step", "after")
    refused(lambda: model(tokens, return_state=True), model.name, "return_state", "after")
    one = tiny(head="classifier", num_classes=1)
    compile_for_test(one, "sgd", None)
    refused(lambda: one.fit(tokens, tokens[:, 0], verbose=0), "a loss", "one class")
    for targets, received in ((None, "None"), (tokens[:, :, None], "5, 1)")):
        lm = tiny(head="masked_lm")
        compile_for_test(lm, "sgd", None)
        refused(lambda lm=lm, y=targets: lm.fit(tokens, y, verbose=0), "targets (batch, time)", received)
