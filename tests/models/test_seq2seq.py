"""Seq2Seq: against PyTorch's modules, training, scheduled sampling, alignment, saving, bad input."""

import os
import subprocess
import sys

import keras
import numpy as np
import pytest
import torch
from keras import ops

from keras_seq import layers, models

RNG = np.random.default_rng(0)
SOURCE = np.array([[3, 5, 7, 4, 0], [6, 3, 0, 0, 0], [4, 4, 5, 6, 7]])
TARGET = np.array([[4, 6, 8, 2], [5, 2, 0, 0], [9, 8, 7, 2]])
INPUTS = np.concatenate([np.ones((3, 1), int), TARGET[:, :-1]], axis=1)


def array(x):
    return ops.convert_to_numpy(x)


def reversal(n=512):
    """Sequences, and the same backwards."""
    rng = np.random.default_rng(0)
    source, target = np.zeros((n, 5), int), np.zeros((n, 6), int)
    for i, length in enumerate(rng.integers(2, 6, n)):
        source[i, :length] = rng.integers(3, 9, length)
        target[i, : length + 1] = [*source[i, :length][::-1], 2]
    return source, target


@pytest.fixture(scope="module")
def fitted():
    """A model of reversed sequences, by scheduled sampling."""
    keras.utils.set_random_seed(0)
    schedule = models.InverseSigmoidSampling(30)
    model = models.Seq2Seq(9, 9, 32, attention="general", scheduled_sampling=schedule, label_smoothing=0.02)
    model.compile(keras.optimizers.Adam(1e-2), metrics=["accuracy"])
    model.fit(*reversal(), batch_size=64, epochs=40, verbose=0)
    return model


def weights_of(layer, prefix=""):
    """The weights of an LSTM as those of a module of PyTorch."""
    kernel, recurrent_kernel, bias = (torch.tensor(array(w)) for w in layer.weights)
    names = f"weight_ih{prefix}", f"weight_hh{prefix}", f"bias_ih{prefix}", f"bias_hh{prefix}"
    return dict(zip(names, (kernel.T, recurrent_kernel.T, bias, torch.zeros_like(bias)), strict=True))


def test_torch_gives_the_same():
    """Luong's decoder with input feeding, step by step in PyTorch, on the rows without their padding."""
    d = 8
    model = models.Seq2Seq(8, 10, d, attention="general")
    model.build()
    rng = np.random.default_rng(1)
    model.set_weights([0.5 * rng.normal(size=w.shape).astype("float32") for w in model.weights])
    found = array(model((SOURCE, INPUTS)))
    both, cell = torch.nn.LSTM(d, d // 2, bidirectional=True, batch_first=True), torch.nn.LSTMCell(2 * d, d)
    encoder = model.encoder[0]
    state = weights_of(encoder.forward_layer, "_l0") | weights_of(encoder.backward_layer, "_l0_reverse")
    both.load_state_dict(state)
    cell.load_state_dict(weights_of(model.decoder[0]))
    embeddings = [torch.tensor(array(e.embeddings)) for e in (model.source_embedding, model.embedding)]
    score, combine = (torch.tensor(array(x.kernel)) for x in (model.attention.memory_dense, model.combine))
    output, bias = (torch.tensor(array(w)) for w in (model.embedding.reverse_embeddings, model.output_bias))
    with torch.no_grad():
        for row, (source, inputs) in enumerate(zip(SOURCE, INPUTS, strict=True)):
            memory, (h, c) = both(embeddings[0][source[source != 0]][None])
            memory, state, fed = memory[0], (h.reshape(1, d), c.reshape(1, d)), torch.zeros(1, d)
            for t, token in enumerate(inputs[inputs != 0]):
                h, c = state = cell(torch.cat([embeddings[1][token][None], fed], 1), state)
                weights = torch.softmax(h @ (memory @ score).T, 1)
                fed = torch.tanh(torch.cat([weights @ memory, h], 1) @ combine)
                np.testing.assert_allclose(found[row, t], (fed @ output + bias)[0].numpy(), atol=2e-5)


def test_learns_to_reverse(fitted):
    source, target = reversal(64)
    model = fitted
    assert model.evaluate(source, target, batch_size=64, verbose=0)[1] > 0.98
    tokens = model.generate(source, 6, stop_tokens=(2,))
    assert (tokens == target).mean() > 0.95
    assert int(array(model.train_steps.value)) == 40 * 8  # it counts on every backend


def test_alignment_of_a_reversal_goes_backwards(fitted):
    model = fitted
    source, target = np.array([[3, 4, 5, 6, 7], [8, 7, 6, 0, 0]]), np.array([[7, 6, 5, 4, 3, 2], [6, 7, 8, 2, 0, 0]])
    weights = model.alignment(source, target)
    assert weights.shape == (2, 6, 5)
    np.testing.assert_allclose(weights[0].sum(1), 1, atol=1e-5)
    assert weights[0, :4].argmax(1).tolist() in ([4, 3, 2, 1], [3, 3, 2, 1], [4, 3, 2, 2])
    assert not weights[1, :, 3:].any()  # padding of the source
    assert not weights[1, 4:].any()  # and of the target
    np.testing.assert_allclose(model.alignment(source[0], target[0]), weights[0], atol=1e-5)


def test_alignment_of_a_transformer():
    model = models.Transformer(8, 10, 8, 1, 2, max_length=20)
    weights = model.alignment(SOURCE, TARGET)
    assert weights.shape == (3, 4, 5)
    np.testing.assert_allclose(weights.sum(-1), TARGET != 0, atol=1e-5)
    assert not weights[0, :, 4].any()


def test_a_saved_model_decodes_at_once(fitted, tmp_path):
    model = fitted
    model.save(tmp_path / "model.keras")
    source, _ = reversal(4)
    np.save(tmp_path / "expected.npy", model.generate(source, 6, num_beams=2, stop_tokens=(2,)))
    np.save(tmp_path / "source.npy", source)
    code = (
        "import torch, keras, keras_seq, numpy as np\n"
        "model = keras.models.load_model('model.keras')\n"
        "found = model.generate(np.load('source.npy'), 6, num_beams=2, stop_tokens=(2,))\n"
        "assert (found == np.load('expected.npy')).all()\n"
        "assert model.scheduled_sampling.k == 30\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, env=os.environ)


@pytest.mark.parametrize("make", [models.Seq2Seq, lambda *a, **k: models.Transformer(*a, 1, 2, dropout=0.0, **k)])
def test_guesses_come_in_where_the_schedule_says(make):
    model = make(8, 10, 8, scheduled_sampling=0.0)
    model.build()
    source, inputs = ops.convert_to_tensor(SOURCE), ops.convert_to_tensor(INPUTS)
    memory = model.memory(source, source != 0)
    mixed = array(model._sampled(inputs, None, memory))
    np.testing.assert_array_equal(mixed[:, 0], INPUTS[:, 0])  # nothing is guessed before the first step
    np.testing.assert_array_equal(mixed == 0, INPUTS == 0)  # padding stays, and none is guessed
    assert (mixed != INPUTS).any()
    model.scheduled_sampling = models.ConstantSampling(1.0)
    np.testing.assert_array_equal(array(model._sampled(inputs, None, memory)), INPUTS)


def test_the_guess_is_drawn_after_the_guesses_before():
    model = models.Seq2Seq(8, 10, 8, scheduled_sampling=0.0)
    model.build()
    model.output_bias.assign(RNG.normal(size=10))
    source, inputs = ops.convert_to_tensor(SOURCE[2:]), ops.convert_to_tensor(INPUTS[2:], "int32")
    memory, u = model.memory(source), np.array([[0.3, 0.9, 0.6, 0.1]], "float32")
    own = ops.convert_to_tensor([[False, True, True, True]])
    mixed = array(model.with_guesses(inputs, own, ops.convert_to_tensor(u), None, memory))[0]
    state = model.initial_state(1, source=source)
    for t in range(3):
        logits, state = model.step(ops.convert_to_tensor(mixed[t : t + 1]), state)
        p = array(ops.softmax(logits))[0].astype("float64")
        p[0] = 0
        assert mixed[t + 1] == (np.cumsum(p) <= u[0, t] * p.sum()).sum()


def test_schedules():
    def at(schedule, step):
        return float(array(schedule(ops.convert_to_tensor(step, "int32"))))

    assert at(models.ConstantSampling(0.25), 7) == 0.25
    assert at(models.LinearSampling(10, floor=0.2), 5) == pytest.approx(0.5)
    assert at(models.LinearSampling(10, floor=0.2), 9) == pytest.approx(0.2)
    assert at(models.ExponentialSampling(0.9), 3) == pytest.approx(0.9**3)
    assert at(models.InverseSigmoidSampling(5), 8) == pytest.approx(5 / (5 + np.exp(8 / 5)))


def test_an_empty_source_is_decoded_from_zeros():
    model = models.Seq2Seq(8, 10, 8)
    source = np.array([[0, 0, 0, 0, 0], [3, 4, 0, 0, 0]])
    logits = model((source, INPUTS[:2]))
    assert np.isfinite(array(logits)).all()
    zeros = model.initial_state(2)[0]
    own = model.initial_state(2, source=source)[0]
    for found, zero in zip(own[0][0], zeros[0][0], strict=True):
        np.testing.assert_array_equal(array(found)[0], array(zero)[0])
    assert not model.alignment(source, TARGET[:2])[0].any()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: models.Seq2Seq(8, 10, 8, attention="bahdanau"), "attention='bahdanau'"),
        (lambda: models.Seq2Seq(8, 10, 8, cell="sru"), "cell='sru'"),
        (lambda: models.Seq2Seq(8, 10, 7), "d_model=7"),
        (lambda: models.Seq2Seq(8, 10, 8, num_layers=0), "num_layers=0"),
        (lambda: models.Seq2Seq(8, 10, 8, dropout=1.0), "1.0"),
        (lambda: models.Seq2Seq(8, 10, 8, scheduled_sampling=1.5), "1.5"),
        (lambda: models.Seq2Seq(8, 10, 8, scheduled_sampling="linear"), "'linear'"),
        (lambda: models.LinearSampling(0), "steps=0"),
        (lambda: models.ExponentialSampling(1.0), "k=1.0"),
        (lambda: models.InverseSigmoidSampling(0.5), "k=0.5"),
        (lambda: models.Seq2Seq(8, 10, 8).fit(SOURCE + 8, TARGET), "The source has 8 to 15"),
        (lambda: models.Seq2Seq(8, 10, 8).fit(SOURCE, TARGET + 10), "The target has 10 to 19"),
        (lambda: models.Seq2Seq(8, 10, 8).generate([[0, 0]], 3), "at least one valid token"),
        (lambda: models.Seq2Seq(8, 10, 8).generate([[8]], 3), "from 0 to 7"),
        (lambda: models.Seq2Seq(8, 10, 8).beam_search(SOURCE, 3, num_beams=0), "num_beams"),
        (lambda: models.Seq2Seq(8, 10, 8)(INPUTS), "needs a source"),
        (lambda: models.Seq2Seq(8, 10, 8, attention=None).alignment(SOURCE, TARGET), "no attention"),
        (lambda: models.Seq2Seq(8, 10, 8, attention=layers.CoverageAttention(stateful=True)), "stateful"),
    ],
)
def test_errors(make, words):
    with pytest.raises(ValueError, match=words):
        make()
