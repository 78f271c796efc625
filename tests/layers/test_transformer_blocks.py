"""The blocks of Transformers against `torch.nn`'s, in outputs and gradients; the second sequence; their errors."""

import keras
import numpy as np
import pytest
from cases import B, T, close, normal, refused
from keras import ops

from keras_seq import backend, layers

D, HEADS, HIDDEN, S = 12, 4, 20, 5
MASK = np.arange(T) < np.array([7, 5, 1, 3])[:, None]
MEMORY_MASK = np.arange(S) < np.array([5, 2, 4, 1])[:, None]


def torch_layer(torch, name, **options):
    """A layer of `torch.nn` without dropout, none of whose weights is trivial, and its weights as NumPy arrays."""
    torch.manual_seed(0)
    layer = getattr(torch.nn, name)(D, HEADS, HIDDEN, dropout=0.0, batch_first=True, **options)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return layer, {key: value.detach().numpy() for key, value in layer.state_dict().items()}


def assign(block, w):
    """Gives a block the weights of a layer of `torch.nn`, whose norms are numbered in the order of the branches."""

    def linear(name):
        return [w[f"{name}.weight"].T, w[f"{name}.bias"]]

    def attention(name):
        qkv = zip(np.split(w[f"{name}.in_proj_weight"], 3), np.split(w[f"{name}.in_proj_bias"], 3), strict=True)
        return [a for matrix, bias in qkv for a in (matrix.T, bias)] + linear(f"{name}.out_proj")

    parts = [(block.attention_norm, block.attention, attention("self_attn"))]
    if "multihead_attn.in_proj_weight" in w:
        parts.append((block.cross_attention_norm, block.cross_attention, attention("multihead_attn")))
    parts.append((block.feedforward_norm, block.feedforward, linear("linear1") + linear("linear2")))
    for i, (norm, part, arrays) in enumerate(parts, 1):
        norm.set_weights([w[f"norm{i}.weight"], w[f"norm{i}.bias"]])
        weights = [v for v in part.weights if "seed" not in v.path]
        for weight, array in zip(weights, arrays, strict=True):
            weight.assign(np.reshape(array, weight.shape))
    return block


def with_gradients(block, run, inputs, shown):
    """`(y, gradients of the inputs)` of the sum of `y` times fixed numbers where `shown` `(b, t)` is True."""
    weight = ops.convert_to_tensor(normal(B, T, D, seed=9) * shown[..., None])

    def loss(floats):
        y = run(*floats)
        return ops.sum(y * weight), y

    y, _, gradients = backend.current().gradients(loss, block)([ops.convert_to_tensor(x) for x in inputs])
    return [ops.convert_to_numpy(y)[shown], *map(ops.convert_to_numpy, gradients)]


def with_gradients_of_torch(torch, run, inputs, shown):
    leaves = [torch.tensor(x, requires_grad=True) for x in inputs]
    y = run(*leaves)
    (y * torch.tensor(normal(B, T, D, seed=9) * shown[..., None])).sum().backward()
    return [y.detach().numpy()[shown], *(x.grad.numpy() for x in leaves)]


OPTIONS = [(norm_first, activation) for norm_first in (True, False) for activation in ("relu", "gelu")]


@pytest.mark.parametrize(("norm_first", "activation"), OPTIONS)
def test_encoder_block_equals_torch(norm_first, activation):
    torch = pytest.importorskip("torch")
    options = {"norm_first": norm_first, "activation": activation}
    theirs, w = torch_layer(torch, "TransformerEncoderLayer", **options)
    ours = layers.TransformerEncoderBlock(HEADS, HIDDEN, **options)
    ours.build((None, None, D))
    assign(ours, w)
    for mask in (MASK, np.ones_like(MASK)):
        valid, padded = ops.convert_to_tensor(mask), torch.tensor(~mask)
        got = with_gradients(ours, lambda x, valid=valid: ours(x, mask=valid), [normal(B, T, D)], mask)
        expected = with_gradients_of_torch(
            torch, lambda x, padded=padded: theirs(x, src_key_padding_mask=padded), [normal(B, T, D)], mask
        )
        close(got, expected, 1e-5)


def decoder_block(**options):
    block = layers.TransformerDecoderBlock(HEADS, HIDDEN, cross_attention=True, **options)
    block.build((None, None, D), (None, None, D))
    return block


@pytest.mark.parametrize(("norm_first", "activation"), OPTIONS)
def test_decoder_block_equals_torch(norm_first, activation):
    torch = pytest.importorskip("torch")
    options = {"norm_first": norm_first, "activation": activation}
    theirs, w = torch_layer(torch, "TransformerDecoderLayer", **options)
    ours = assign(decoder_block(**options), w)
    later = torch.ones(T, T, dtype=torch.bool).triu(1)
    inputs, everything = [normal(B, T, D), normal(B, S, D, seed=1)], np.ones((B, T), bool)
    seen, padded = ops.convert_to_tensor(MEMORY_MASK), torch.tensor(~MEMORY_MASK)
    got = with_gradients(ours, lambda x, memory: ours(x, memory, memory_mask=seen), inputs, everything)
    expected = with_gradients_of_torch(
        torch,
        lambda x, memory: theirs(x, memory, tgt_mask=later, memory_key_padding_mask=padded),
        inputs,
        everything,
    )
    close(got, expected, 1e-5)


@pytest.mark.parametrize("norm_first", [True, False])
def test_decoder_steps_with_the_memory_in_the_state(norm_first, monkeypatch):
    """Keys and values of the second sequence, of features of its own, are computed once, and then passed on."""
    block = layers.TransformerDecoderBlock(HEADS, HIDDEN, cross_attention=True, norm_first=norm_first)
    x, memory = normal(B, T, D), normal(B, S, 7, seed=1)
    y = block(x, memory, memory_mask=MEMORY_MASK)
    first = block.initial_state(B, T, ops.convert_to_tensor(memory), ops.convert_to_tensor(MEMORY_MASK))
    monkeypatch.setattr(block.cross_attention, "memory", None)
    whole, last = block(x, initial_state=first, return_state=True)
    close(whole, y, 1e-5)
    state = first
    for t in range(T):
        y_t, state = block.step(ops.convert_to_tensor(x[:, t]), state)
        close(y_t, y[:, t], 1e-5, f"step {t}")
    close(state, last, 1e-5)
    close(state[1], first[1], 0)


def test_memory_of_which_nothing_is_valid():
    """Finite outputs and gradients, none of which flows into it, whatever it holds; the other rows are as before."""
    block = decoder_block()
    seen = MEMORY_MASK & (np.arange(B) != 2)[:, None]
    memory = np.where(seen[..., None], normal(B, S, D, seed=1), np.float32("nan"))
    everything = np.ones((B, T), bool)

    def run(x, memory, mask=seen):
        return block(x, memory, memory_mask=ops.convert_to_tensor(mask))

    y, dx, d_memory = with_gradients(block, run, [normal(B, T, D), memory], everything)
    assert all(np.isfinite(v).all() for v in (y, dx, d_memory))
    assert not d_memory[~seen].any()
    others = np.arange(B) != 2
    expected = run(normal(B, T, D), normal(B, S, D, seed=1), MEMORY_MASK)
    close(y.reshape(B, T, D)[others], ops.convert_to_numpy(expected)[others], 1e-5)


def test_the_mask_that_the_memory_carries():
    block, x = decoder_block(), normal(B, T, D)
    memory = keras.layers.Embedding(5, D, mask_zero=True)(np.where(MEMORY_MASK, 3, 0))
    close(block(x, memory), block(x, memory, memory_mask=MEMORY_MASK), 0)


def test_errors():
    x, memory = normal(B, T, D), normal(B, S, D)
    encoder, plain, decoder = (
        layers.TransformerEncoderBlock(HEADS),
        layers.TransformerDecoderBlock(HEADS),
        decoder_block(),
    )
    encoder(x), plain(x)
    refused(lambda: encoder.step(x[:, 0], ()), encoder.name, "step", "after")
    refused(lambda: encoder(x, return_state=True), encoder.name, "return_state")
    refused(lambda: layers.TransformerEncoderBlock(HEADS, stateful=True), "stateful")
    refused(lambda: layers.TransformerEncoderBlock(HEADS, norm="batch"), "norm", "batch")
    refused(lambda: layers.TransformerEncoderBlock(5)(x), "num_heads", "5")
    refused(lambda: encoder(x, mask=MASK[:, :4]), "mask", "(4, 7)", "(4, 4)")
    refused(lambda: plain(x, memory), plain.name, "memory", "no cross attention")
    refused(lambda: decoder(x), decoder.name, "memory")
    refused(lambda: decoder(x, initial_state=decoder.initial_state(B, T), return_state=True), decoder.name)
    state = decoder.initial_state(B, T, memory)
    refused(lambda: decoder(x, memory, initial_state=state), decoder.name, "the state holds one")
    refused(lambda: decoder(x, initial_state=decoder.initial_state(B - 1, T, memory[1:])), decoder.name, "state")
    refused(lambda: decoder(x, initial_state=(state[0], state[1][:2])), decoder.name, "state")
    refused(lambda: layers.TransformerDecoderBlock(HEADS, cross_attention=True, stateful=True), "stateful")
    for given, mask in ((memory, MEMORY_MASK.astype("int32")), (memory, MEMORY_MASK[:, 1:]), (memory, MEMORY_MASK[1:])):
        refused(lambda given=given, mask=mask: decoder(x, given, memory_mask=mask), decoder.name, "memory_mask")
    for wrong in (memory[0], memory[1:], memory[..., 1:]):
        refused(lambda wrong=wrong: decoder(x, wrong), decoder.name, "memory")
        refused(lambda wrong=wrong: decoder.initial_state(B, T, wrong), decoder.name, "memory")
