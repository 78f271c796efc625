"""RecurrentLM as a Keras model: losses by hand, training, state, files."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_seq.models import RecurrentLM

V, D = 11, 8
TOKENS = np.random.default_rng(0).integers(1, V, (4, 6)).astype("int32")
RIGHT = np.where(np.arange(6) < np.array([[6], [4], [2], [1]]), TOKENS, 0)
LEFT = np.where(np.arange(6) >= np.array([[0], [2], [4], [3]]), TOKENS, 0)
PADDED = {"full": TOKENS, "right": RIGHT, "left": LEFT}


def make_model(cell="gru", compiled=True, large=True, **kwargs):
    model = RecurrentLM(V, D, cell=cell, **kwargs)
    model.build((None, None))
    if large:  # so that every logit matters
        rng = np.random.default_rng(1)
        model.set_weights([rng.normal(size=w.shape).astype("float32") for w in model.weights])
    if compiled:
        model.compile("adam")
    return model


def array(x):
    return ops.convert_to_numpy(ops.cast(x, "float32"))


def loss_by_hand(model, tokens, weights=None, pad_id=0):
    """The mean of -log p(next | so far) over the pairs of two tokens."""
    logits = array(model(tokens)).astype("float64")[:, :-1]
    targets = tokens[:, 1:]
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    nats = -np.take_along_axis(log_p, targets[..., None], -1)[..., 0]
    valid = np.ones(targets.shape)
    if pad_id is not None:
        valid = (targets != pad_id) * (tokens[:, :-1] != pad_id)
    if weights is not None:
        valid = valid * np.reshape(weights, (-1, 1))
    return (nats * valid).sum() / valid.sum()


@pytest.mark.parametrize("padding", PADDED)
def test_loss_of_the_next_token(padding):
    """`evaluate(tokens)`: padding counts neither as a target nor as what a target follows."""
    model, tokens = make_model(), PADDED[padding]
    assert model.evaluate(tokens, verbose=0) == pytest.approx(loss_by_hand(model, tokens), rel=1e-5)


@pytest.mark.parametrize("padding", PADDED)
def test_loss_of_given_targets(padding):
    """The same loss with the targets given, and padded targets do not count."""
    model, tokens = make_model(), PADDED[padding]
    loss = model.evaluate(tokens[:, :-1], tokens[:, 1:], verbose=0)
    assert loss == pytest.approx(loss_by_hand(model, tokens), rel=1e-5)


def test_fit_is_keras_fit_on_pairs():
    """`fit(tokens)` is `fit(tokens[:, :-1], tokens[:, 1:])` with Keras's cross-entropy."""
    ours, theirs = make_model(), make_model(compiled=False)
    theirs.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    one = ours.fit(TOKENS, epochs=3, verbose=0).history["loss"]
    other = theirs.fit(TOKENS[:, :-1], TOKENS[:, 1:], epochs=3, verbose=0).history["loss"]
    np.testing.assert_allclose(one, other, rtol=1e-5)
    np.testing.assert_allclose(array(ours(TOKENS)), array(theirs(TOKENS)), atol=1e-4)


def test_fit_is_keras_fit_on_weighted_pairs():
    """With padding: each pair of two tokens has weight 1, every other 0."""
    ours, theirs = make_model(), make_model(compiled=False)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction="mean_with_sample_weight")
    theirs.compile("adam", loss)
    x, y = RIGHT[:, :-1], RIGHT[:, 1:]
    one = ours.fit(RIGHT, epochs=3, verbose=0).history["loss"]
    other = theirs.fit(x, y, sample_weight=(y != 0).astype("float32"), epochs=3, verbose=0).history["loss"]
    np.testing.assert_allclose(one, other, rtol=1e-5)
    np.testing.assert_allclose(array(ours(TOKENS)), array(theirs(TOKENS)), atol=1e-4)


@pytest.mark.parametrize("pad_id", [0, None])
def test_a_keras_loss_with_teacher_forcing(pad_id):
    """A loss given to `compile` is taken for `fit(tokens)` too."""
    model = make_model(pad_id=pad_id, compiled=False)
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    loss = model.evaluate(TOKENS, verbose=0)
    assert loss == pytest.approx(loss_by_hand(model, TOKENS, pad_id=pad_id), rel=1e-5)


def test_metrics():
    model = make_model(compiled=False)
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True), metrics=["accuracy"])
    _, accuracy = model.evaluate(TOKENS[:, :-1], TOKENS[:, 1:], verbose=0)
    assert accuracy == pytest.approx((array(model(TOKENS))[:, :-1].argmax(-1) == TOKENS[:, 1:]).mean(), abs=1e-6)


def test_without_padding_zero_is_a_target():
    model = make_model(pad_id=None)
    assert model.evaluate(RIGHT, verbose=0) == pytest.approx(loss_by_hand(model, RIGHT, pad_id=None), rel=1e-5)


@pytest.mark.parametrize("pad_id", [0, None])
def test_sample_weight(pad_id):
    """One weight per row; a row of weight 0 does not count."""
    model, weights = make_model(pad_id=pad_id), np.array([1.0, 0.0, 2.0, 0.5], "float32")
    loss = model.evaluate(RIGHT, sample_weight=weights, verbose=0)
    assert loss == pytest.approx(loss_by_hand(model, RIGHT, weights, pad_id), rel=1e-5)
    one, other = make_model(pad_id=pad_id), make_model(pad_id=pad_id)
    changed = np.where(np.arange(4)[:, None] == 1, RIGHT[::-1], RIGHT)
    assert not np.array_equal(changed, RIGHT)
    one.fit(RIGHT, sample_weight=weights, epochs=2, shuffle=False, verbose=0)
    other.fit(changed, sample_weight=weights, epochs=2, shuffle=False, verbose=0)
    for a, b in zip(one.get_weights(), other.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


class Pairs(keras.utils.PyDataset):
    """Batches of tokens and the tokens that follow."""

    def __len__(self):
        return 2

    def __getitem__(self, index):
        rows = TOKENS[2 * index : 2 * index + 2]
        return rows[:, :-1], rows[:, 1:]


def test_fit_with_a_dataset():
    model = make_model()
    loss = model.evaluate(Pairs(), verbose=0)
    assert loss == pytest.approx(loss_by_hand(model, TOKENS), rel=1e-5)
    history = model.fit(Pairs(), epochs=3, verbose=0).history["loss"]
    assert history[-1] < history[0]


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn"])
def test_learns(cell):
    """Each token is followed by the next number: the loss goes to almost zero, and generation counts."""
    start = np.random.default_rng(0).integers(0, V - 1, (320, 1))
    tokens = (start + np.arange(8)) % (V - 1) + 1
    model = make_model(cell, large=False, compiled=False)
    model.compile(keras.optimizers.Adam(0.05))
    history = model.fit(tokens, epochs=8, verbose=0).history["loss"]
    assert history[0] > 0.5
    assert history[-1] < 0.05
    assert model.generate([3, 4], 5).tolist() == [5, 6, 7, 8, 9]


@pytest.mark.parametrize(("cell", "gates", "biases"), [("lstm", 4, 1), ("gru", 3, 2), ("rnn", 1, 1)])
@pytest.mark.parametrize("tied", [False, True])
def test_number_of_weights(cell, gates, biases, tied):
    model = make_model(cell, num_layers=3, tie_embeddings=tied)
    per_layer = gates * (2 * D * D + biases * D)
    assert model.count_params() == (1 if tied else 2) * V * D + 3 * per_layer


def test_tied_logits():
    """The projection is the transpose of the embeddings."""
    model = make_model(tie_embeddings=True)
    e = model.embedding.get_weights()[0]
    y = model.recurrent(ops.convert_to_tensor(e[TOKENS]))
    np.testing.assert_allclose(array(model(TOKENS)), array(y) @ e.T, rtol=1e-4, atol=1e-4)


def test_state():
    """Reading in two parts, and token by token, gives the logits of the whole."""
    model = make_model("lstm", num_layers=2)
    logits = array(model(TOKENS))
    first, state = model(TOKENS[:, :4], return_state=True)
    second, last = model(TOKENS[:, 4:], initial_state=state, return_state=True)
    np.testing.assert_allclose(np.concatenate([array(first), array(second)], 1), logits, atol=2e-5)
    for t in (4, 5):
        step, state = model.step(ops.convert_to_tensor(TOKENS[:, t]), state)
        np.testing.assert_allclose(array(step), logits[:, t], atol=2e-5)
    for a, b in zip(keras.tree.flatten(state), keras.tree.flatten(last), strict=True):
        np.testing.assert_allclose(array(a), array(b), atol=2e-5)
    assert len(state) == 2
    assert [tuple(s.shape) for s in state[0]] == [(4, D)] * 2


def test_save_and_load(tmp_path):
    """The loaded model has the same logits and loss, and generates the same tokens."""
    model = make_model("lstm", tie_embeddings=True, dropout=0.1)
    tokens, loss = model.generate(TOKENS[:, :3], 5), model.evaluate(TOKENS, verbose=0)
    model.optimizer.build(model.trainable_variables)  # as `fit` would: Keras warns when it loads one that is not
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert type(loaded) is RecurrentLM
    assert loaded.get_config() == model.get_config()
    np.testing.assert_array_equal(array(loaded(TOKENS)), array(model(TOKENS)))
    np.testing.assert_array_equal(loaded.generate(TOKENS[:, :3], 5), tokens)
    assert loaded.evaluate(TOKENS, verbose=0) == pytest.approx(loss, rel=1e-6)


def test_weights_file(tmp_path):
    model, other = make_model(), make_model(large=False)
    model.save_weights(tmp_path / "model.weights.h5")
    other.load_weights(tmp_path / "model.weights.h5")
    np.testing.assert_array_equal(array(other(TOKENS)), array(model(TOKENS)))


def test_stateful():
    """Batch after batch goes on where the last one ended, in `predict` and in `fit`."""
    whole, model = make_model(), make_model(stateful=True)
    expected = array(whole(TOKENS))
    parts = np.concatenate([TOKENS[:, :3], TOKENS[:, 3:]])
    for _ in range(2):
        y = model.predict(parts, batch_size=4, verbose=0)
        np.testing.assert_allclose(np.concatenate([y[:4], y[4:]], 1), expected, atol=2e-5)
        model.reset_state()
    history = model.fit(parts, batch_size=4, epochs=4, shuffle=False, verbose=0).history["loss"]
    assert np.isfinite(history).all()
    assert history[-1] < history[0]
    with pytest.raises(ValueError, match=r"batch of 4.*[\s\S]*Received a batch of 3"):
        model(TOKENS[:3])


def test_mixed_precision():
    """Logits in the compute dtype, state and loss in float32, finite after training."""
    model = make_model("lstm", dtype="mixed_bfloat16", dropout=0.1)
    logits, state = model(TOKENS, return_state=True)
    assert keras.backend.standardize_dtype(logits.dtype) == "bfloat16"
    assert {keras.backend.standardize_dtype(s.dtype) for s in keras.tree.flatten(state)} == {"float32"}
    history = model.fit(RIGHT, epochs=3, verbose=0).history["loss"]
    assert np.isfinite(history).all()
    assert all(np.isfinite(w).all() for w in model.get_weights())
    assert {w.dtype for w in model.weights} == {"float32"}
    assert model.generate([1, 2], 3).shape == (3,)


def test_dropout_only_in_training():
    model, plain = make_model(dropout=0.5), make_model()
    expected = array(plain(TOKENS))
    np.testing.assert_array_equal(array(model(TOKENS)), expected)
    np.testing.assert_allclose(model.predict(TOKENS, verbose=0), expected, atol=1e-4)
    one, other = (array(model(TOKENS, training=True)) for _ in range(2))
    assert np.abs(one - expected).max() > 0.1
    assert np.abs(one - other).max() > 0.1
    np.testing.assert_array_equal(model.generate([1, 2], 5), plain.generate([1, 2], 5))


def test_predict():
    model = make_model()
    y = model.predict(RIGHT, batch_size=3, verbose=0)
    assert y.shape == (4, 6, V)
    np.testing.assert_allclose(y, array(model(RIGHT)), atol=1e-5)


def test_float_tokens():
    """As Keras's loaders may hand them over."""
    model = make_model()
    np.testing.assert_array_equal(array(model(TOKENS.astype("float32"))), array(model(TOKENS)))


def test_in_a_functional_model():
    """A model of a model, with the padding found by itself."""
    model = make_model()
    inputs = keras.Input((None,), dtype="int32")
    outer = keras.Model(inputs, keras.layers.Activation("softmax")(model(inputs)))
    np.testing.assert_allclose(outer.predict(TOKENS, verbose=0).sum(-1), 1, atol=1e-5)


def test_summary():
    model, lines = make_model(num_layers=2), []
    model.summary(print_fn=lambda line, **_: lines.append(line))
    text = "\n".join(lines)
    assert f"{model.count_params():,}" in text
    assert "embedding" in text
    RecurrentLM(V, D).summary(print_fn=lambda line, **_: None)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"cell": "elman"}, r"`cell` must be one of \['lstm', 'gru', 'rnn'\]. Received: cell='elman'"),
        ({"num_layers": 0}, "`num_layers` must be a positive integer. Received: num_layers=0"),
        ({"vocab_size": 0}, "`vocab_size` must be a positive integer. Received: vocab_size=0"),
        ({"d_model": 0}, "Received: .*0"),
        ({"dropout": 1.5}, "1.5"),
        ({"pad_id": V}, "pad_id.*11"),
    ],
)
def test_errors(arguments, named):
    with pytest.raises(ValueError, match=named):
        RecurrentLM(**{"vocab_size": V, "d_model": D, **arguments})


def test_input_errors():
    model = make_model()
    with pytest.raises(ValueError, match="at least one time step"):
        model(TOKENS[:, :0])
    with pytest.raises(ValueError, match="state of shapes"):
        model(TOKENS, initial_state=(ops.zeros((3, D)),))
    with pytest.raises(ValueError, match="mask of dtype bool"):
        model(TOKENS, mask=np.ones((4, 6), "int32"))
