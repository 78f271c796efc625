"""Steps that are made ready for a generation give what steps one by one give."""

import keras
import numpy as np
import pytest
from cases import close, normal
from keras import ops

from keras_seq import backend, layers, models

VOCAB, MANY = 23, 64  # steps: enough for weights to be laid out anew

LANGUAGE_MODELS = {
    "GPT-2": {},
    "Llama": {
        "position": "rotary",
        "norm": "rms",
        "activation": "swiglu",
        "use_bias": False,
        "num_kv_heads": 1,
        "qk_norm": True,
        "tie_embeddings": False,
    },
    "window": {"position": "alibi", "window": 3, "sinks": 1},
    "buckets": {"position": "t5", "soft_cap": 4.0},
    "sinusoidal": {"position": "sinusoidal", "activation": "relu"},
}


def compiled_steps(model, state, tokens, ready):
    """Logits of tokens `(b, t)` one after another."""

    def run(tokens, *state):
        state = keras.tree.pack_sequence_as(structure, state)
        step = model.stepper(tokens.shape[0], MANY) if ready else model.step_valid
        logits = []
        for t in range(tokens.shape[1]):
            y, state = step(tokens[:, t], state)
            logits.append(y)
        return ops.stack(logits, 1), state

    structure = state
    return backend.current().compiled(run, model)(ops.convert_to_tensor(tokens), *keras.tree.flatten(state))


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_language_models(name, rows):
    model = models.TransformerLM(VOCAB, 16, 2, 2, max_length=32, **LANGUAGE_MODELS[name])
    rng = np.random.default_rng(0)
    prompt, tokens = rng.integers(1, VOCAB, (rows, 5)), rng.integers(1, VOCAB, (rows, 3)).astype("int32")
    mask = np.arange(5) >= rng.integers(0, 4, (rows, 1))  # rows of different lengths
    state = model(prompt, mask=mask, initial_state=model.initial_state(rows, 12), return_state=True)[1]
    expected, got = (compiled_steps(model, state, tokens, ready) for ready in (False, True))
    close(got, expected, 1e-5)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("version", [6, 7])
def test_rwkv(version, rows):
    options = {"allow_negative_eigenvalues": True} if version == 7 else {}
    model = models.RWKV(VOCAB, 16, 2, version, head_dim=8, **options)
    model.build((None, None))
    rng = np.random.default_rng(0)
    for weight in model.trainable_weights:  # of which some are 0 at first
        weight.assign(ops.convert_to_numpy(weight) + 0.2 * rng.normal(size=weight.shape))
    tokens = rng.integers(1, VOCAB, (rows, 6)).astype("int32")
    state = model(tokens[:, :3], return_state=True)[1]
    expected, got = (compiled_steps(model, state, tokens[:, 3:], ready) for ready in (False, True))
    close(got, expected, 1e-5)


@pytest.mark.parametrize(
    "make",
    [
        lambda: layers.RWKV7TimeMixing(8),
        lambda: layers.RWKVBlock(7, head_dim=8),
        lambda: layers.RWKVBlock(6, head_dim=8),
    ],
    ids=["RWKV7TimeMixing", "RWKVBlock", "RWKVBlock of RWKV-6"],
)
def test_layers_of_rwkv(make):
    layer = make()
    layer.build((None, None, 16))
    layer.built = True
    layer.set_weights([w + 0.2 * normal(*w.shape, seed=i) for i, w in enumerate(layer.get_weights())])
    x = ops.convert_to_tensor(normal(2, 5, 16))
    _, state = layer(x[:, :4], return_state=True)
    expected, got = (backend.current().compiled(f, layer)(x[:, 4], state) for f in (layer.step, layer.stepper(2, MANY)))
    close(got, expected, 1e-5)


@pytest.mark.parametrize("norm_first", [False, True])
def test_encoder_decoder(norm_first):
    model = models.Transformer(VOCAB, VOCAB, 16, 2, 2, norm_first=norm_first)
    rng = np.random.default_rng(0)
    source = np.where(np.arange(5) < [[5], [2], [4]], rng.integers(2, VOCAB, (3, 5)), 0)
    state = model.initial_state(3, 6, source=source)
    tokens = rng.integers(1, VOCAB, (3, 4)).astype("int32")
    expected, got = (compiled_steps(model, state, tokens, ready) for ready in (False, True))
    close(got, expected, 1e-5)


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "bfloat16", "float16"])
def test_other_precisions(policy):
    """They are not made ready, or are: the tokens are the same."""
    model = models.TransformerLM(VOCAB, 16, 1, 2, max_length=32, dtype=policy)
    state = model(np.ones((2, 3), "int32"), initial_state=model.initial_state(2, 8), return_state=True)[1]
    tokens = np.random.default_rng(0).integers(1, VOCAB, (2, 2)).astype("int32")
    expected, got = (compiled_steps(model, state, tokens, ready)[0] for ready in (False, True))
    close(ops.cast(got, "float32"), ops.cast(expected, "float32"), 2e-2)


@pytest.mark.filterwarnings("ignore:Layer .* does not have a `quantize` method")
@pytest.mark.filterwarnings("ignore:.*The use of `x.T` on tensors")  # Keras's quantized embedding on PyTorch
def test_quantized():
    model = models.TransformerLM(VOCAB, 16, 1, 2, max_length=32)
    model(np.ones((1, 3), "int32"))
    model.quantize("int8")
    state = model(np.ones((2, 3), "int32"), initial_state=model.initial_state(2, 8), return_state=True)[1]
    tokens = np.random.default_rng(0).integers(1, VOCAB, (2, 2)).astype("int32")
    expected, got = (compiled_steps(model, state, tokens, ready)[0] for ready in (False, True))
    close(got, expected, 1e-5)


def test_weights_are_read_anew():
    """A second generation sees weights that were changed after the first."""
    model = models.TransformerLM(VOCAB, 16, 1, 2, max_length=128)
    before = model.generate([1, 2], MANY)
    rng = np.random.default_rng(0)
    for weight in model.trainable_weights:
        weight.assign(rng.normal(size=weight.shape))
    after = model.generate([1, 2], MANY)
    assert not np.array_equal(before, after)
    assert np.array_equal(list(model.stream([1, 2], MANY)), after)


def test_token_ids_are_not_rounded():
    """Ids given as floats, as Keras may do, are whole numbers beyond what the compute dtype holds."""
    model = models.TransformerLM(600, 8, 1, 2, max_length=8, dtype="mixed_bfloat16")
    tokens = np.array([[513, 515, 599]])
    close(*(ops.cast(model(x), "float32") for x in (tokens.astype("float32"), tokens)), 1e-12)
