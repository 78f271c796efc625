"""`TransformerLM` against Hugging Face's GPT-2 and Llama with random weights, and what a language model must do."""

import keras
import numpy as np
import pytest
from cases import close, refused
from keras import ops

from keras_seq import backend, initializers, models

VOCAB, D, LAYERS, HEADS = 40, 24, 2, 4


def hugging_face(name, **config):
    """A Hugging Face model in evaluation mode, none of whose weights is trivial, and its weights as NumPy arrays."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip(
        "transformers", reason="the oracle is Hugging Face's model: pip install transformers"
    )
    torch.manual_seed(0)
    model = getattr(transformers, name + "LMHeadModel" if name == "GPT2" else name + "ForCausalLM")(
        getattr(transformers, name + "Config")(
            vocab_size=VOCAB, pad_token_id=0, bos_token_id=1, eos_token_id=2, **config
        )
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model, {key: value.detach().numpy() for key, value in model.state_dict().items()}


def assign(layer, *arrays):
    weights = [w for w in layer.weights if "seed" not in w.path]
    assert len(weights) == len(arrays), [w.path for w in weights]
    for weight, array in zip(weights, arrays, strict=True):
        weight.assign(np.reshape(array, weight.shape))


def gpt2():
    theirs, w = hugging_face("GPT2", n_positions=32, n_embd=D, n_layer=LAYERS, n_head=HEADS)
    ours = models.TransformerLM(VOCAB, D, LAYERS, HEADS, max_length=32)
    ours.build((None, None))
    assign(ours.embedding, w["transformer.wte.weight"])
    assign(ours.position, w["transformer.wpe.weight"])
    assign(ours.norm, w["transformer.ln_f.weight"], w["transformer.ln_f.bias"])
    for i, block in enumerate(ours.blocks):
        h = {key.removeprefix(f"transformer.h.{i}."): value for key, value in w.items()}
        qkv = zip(np.split(h["attn.c_attn.weight"], 3, 1), np.split(h["attn.c_attn.bias"], 3), strict=True)
        assign(block.attention_norm, h["ln_1.weight"], h["ln_1.bias"])
        assign(block.attention, *[x for pair in qkv for x in pair], h["attn.c_proj.weight"], h["attn.c_proj.bias"])
        assign(block.feedforward_norm, h["ln_2.weight"], h["ln_2.bias"])
        assign(block.feedforward, *[h[f"mlp.{m}.{v}"] for m in ("c_fc", "c_proj") for v in ("weight", "bias")])
    return ours, theirs


def llama():
    theirs, w = hugging_face(
        "Llama",
        hidden_size=D,
        intermediate_size=56,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=2,
        rms_norm_eps=1e-6,
        tie_word_embeddings=False,
    )
    ours = models.TransformerLM(
        VOCAB,
        D,
        LAYERS,
        HEADS,
        hidden_dim=56,
        position="rotary",
        norm="rms",
        epsilon=1e-6,
        activation="swiglu",
        num_kv_heads=2,
        use_bias=False,
        tie_embeddings=False,
        max_length=32,
    )
    ours.build((None, None))
    assign(ours.embedding, w["model.embed_tokens.weight"], w["lm_head.weight"].T)
    assign(ours.norm, w["model.norm.weight"])
    for i, block in enumerate(ours.blocks):
        h = {key.removeprefix(f"model.layers.{i}."): value for key, value in w.items()}
        assign(block.attention_norm, h["input_layernorm.weight"])
        assign(block.attention, *[h[f"self_attn.{name}_proj.weight"].T for name in "qkvo"])
        assign(block.feedforward_norm, h["post_attention_layernorm.weight"])
        assign(block.feedforward, *[h[f"mlp.{name}_proj.weight"].T for name in ("gate", "up", "down")])
    return ours, theirs


def logits_of(model, tokens, mask=None):
    torch = pytest.importorskip("torch")
    given = {} if mask is None else {"attention_mask": torch.tensor(mask.astype("int64"))}
    with torch.no_grad():
        return model(torch.tensor(tokens), **given).logits.numpy()


@pytest.mark.parametrize("make", [gpt2, llama])
def test_equals_hugging_face(make):
    """Logits, and the greedy tokens after prompts of one length and of several."""
    ours, theirs = make()
    rng = np.random.default_rng(0)
    tokens = rng.integers(3, VOCAB, (3, 11))
    close(ours(tokens), logits_of(theirs, tokens), 1e-5, "logits")
    new = ours.generate(tokens, 8)
    for row, prompt in zip(new, tokens, strict=True):
        expected = list(prompt)
        for _ in range(8):
            scores = logits_of(theirs, np.array([expected]))[0, -1]
            scores[0] = -np.inf  # padding is never generated
            expected.append(int(scores.argmax()))
        assert list(row) == expected[len(prompt) :]
    ragged = [list(tokens[0]), list(tokens[1][:4]), list(tokens[2][:7])]
    together = ours.generate(ragged, 8)
    assert all(np.array_equal(ours.generate(row, 8), t) for row, t in zip(ragged, together, strict=True))
    assert np.array_equal(list(ours.stream(tokens[0], 8)), new[0])


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(side):
    model = models.TransformerLM(VOCAB, D, LAYERS, HEADS, max_length=32)
    tokens = np.random.default_rng(0).integers(1, VOCAB, (1, 5))
    pad = ((0, 0), (3, 0) if side == "left" else (0, 3))
    padded = ops.convert_to_numpy(model(np.pad(tokens, pad)))
    close(padded[:, 3:] if side == "left" else padded[:, :5], model(tokens), 1e-5)


def test_packed_rows_are_like_rows_alone():
    model = models.TransformerLM(VOCAB, D, LAYERS, HEADS, max_length=32)
    a, b = (np.random.default_rng(i).integers(1, VOCAB, (1, n)) for i, n in ((0, 5), (1, 4)))
    packed = model(np.concatenate([a, b], 1), segment_ids=np.array([[1] * 5 + [2] * 4]))
    close(packed, ops.concatenate([model(a), model(b)], 1), 1e-5)


def test_parameters_of_gpt2_small(monkeypatch):
    """124,439,808 (Radford et al. 2019)."""
    monkeypatch.setattr(initializers.RandomNormal, "__call__", lambda self, shape, dtype=None: ops.zeros(shape, dtype))
    model = models.TransformerLM(50257, 768, 12, 12, pad_id=None)
    model.build((None, None))
    assert model.count_params() == 124_439_808


def test_checkpoint_changes_no_gradient():
    tokens = np.random.default_rng(0).integers(1, VOCAB, (2, 9))
    results = []
    for checkpoint in (False, True):
        keras.utils.set_random_seed(0)
        model = models.TransformerLM(VOCAB, D, LAYERS, HEADS, max_length=32, checkpoint=checkpoint)
        model.build((None, None))

        def loss(floats, tokens, model=model):
            y = model(tokens, training=True)
            return ops.mean(ops.square(y)), y

        y, d_weights, _ = backend.current().gradients(loss, model)([], ops.convert_to_tensor(tokens))
        results.append([y, *d_weights])
    close(results[1], results[0], 1e-5)


def test_errors():
    refused(lambda: models.TransformerLM(VOCAB, 25, 1, 4).build((None, None)), "num_heads", "25")
    refused(lambda: models.TransformerLM(VOCAB, D, 0, 4), "num_layers")
    refused(lambda: models.TransformerLM(VOCAB, D, 1, 4, position="absolute"), "position", "absolute")
    model = models.TransformerLM(VOCAB, D, 1, 4, max_length=8)
    refused(lambda: model(np.ones((1, 9), "int32")), "8", "9")


@pytest.mark.skipif(keras.config.backend() != "torch", reason="operators are counted on PyTorch")
def test_few_operators_per_token():
    """What is left of speed when sizes are small: for 6 layers at most 300 calls of PyTorch operators a token, 150 in a
    generation, which looks up the weights once.
    """
    torch = pytest.importorskip("torch")
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.calls += 1
            return function(*args, **kwargs or {})

    model = models.TransformerLM(VOCAB, D, 6, HEADS, max_length=32)
    with torch.no_grad(), backend.current().owned_state():
        _, state = model(np.ones((1, 4), "int32"), initial_state=model.initial_state(1, 16), return_state=True)
        token = ops.ones((1,), "int32")
        for step, most in ((model.step_valid, 300), (model.stepper(1, 64), 150)):
            _, state = step(token, state)
            with Count() as count:
                step(token, state)
            assert count.calls <= most
