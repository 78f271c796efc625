"""How fast do Transformers generate? Against keras-hub, and against Hugging Face on PyTorch.

    KERAS_BACKEND=torch python benchmarks/decoding.py [--quick] [--only NAME] [--json FILE]

On one thread of one core. Contenders that are not installed are left out: `pip install transformers`, and
`pip install --no-deps keras-hub` with `pip install kagglehub` (alone it would bring a second TensorFlow). All have the
same weights, and must generate the same tokens before anything is timed, but for beam search, where the models are of
equal sizes alone: BART, which the others have, norms its embeddings. `--quick` runs tiny models, to see that everything
works: its numbers mean nothing.

How to read it: `ratio` is the time of a contender divided by that of keras_seq in the same round, median over rounds;
`required` is what we promise of it; the contender "again" is keras_seq once more, and its ratio shows the noise.

Rows: `prefill` is everything until the second token is there, `decode` the time of each token after that, from a long
and a short run; `compile` what the first call takes longer than the second; `growth` the time of a token in a long
cache by that in a short one, beside the ratio of the lengths that are attended to; `beam` a whole search in an
encoder-decoder, in which nothing ends before the last token.
"""

import argparse
import importlib.util
import statistics
import time

import numpy as np
import timing

if __name__ == "__main__":
    timing.one_thread()  # before a framework is imported

import keras

import keras_seq

BACKEND = keras.config.backend()
OURS, HUB, HUGGING_FACE = "keras_seq", "keras-hub", "Hugging Face"

REQUIRED = {
    ("torch", 1): {HUB: ">= 4", HUGGING_FACE: ">= 1.3"},
    ("torch", 16): {HUB: ">= 5", HUGGING_FACE: ">= 1.5"},
    ("jax", 1): {HUB: ">= 1.1"},
    ("jax", 16): {HUB: ">= 4"},
    ("tensorflow", 1): {HUB: ">= 1.6"},
    ("tensorflow", 16): {HUB: ">= 4.5"},
}

REQUIRED_OF_BEAMS = {"torch": {HUB: ">= 2.5", HUGGING_FACE: ">= 1"}, "jax": {HUB: ">= 1.5"}, "tensorflow": {}}


class Size:
    """A GPT-like model, a prompt, and the most tokens that follow it."""

    def __init__(self, layers=6, d_model=384, heads=6, vocab_size=8192, prompt=208, new=64, positions=1024):
        self.layers, self.d_model, self.heads, self.vocab_size = layers, d_model, heads, vocab_size
        self.prompt, self.new, self.positions = prompt, new, positions


FULL, TINY = Size(), Size(2, 16, 2, 50, 6, 4, 64)
FULL_TRANSLATION, TINY_TRANSLATION = Size(3, 512, 8, 8192, 32, 23, 64), Size(1, 16, 2, 50, 6, 4, 64)


def weights_of(size):
    """Random weights in the layout of GPT-2, none of them trivial: `{name: array}`."""
    rng, d = np.random.default_rng(0), size.d_model

    def normal(*shape):
        return (0.08 * rng.standard_normal(shape)).astype("float32")

    weights = {"wte": normal(size.vocab_size, d), "wpe": normal(size.positions, d)}
    norms = {"ln_f.weight": 1 + normal(d), "ln_f.bias": normal(d)}
    for i in range(size.layers):
        for name, shape in {
            "attn.c_attn": (d, 3 * d),
            "attn.c_proj": (d, d),
            "mlp.c_fc": (d, 4 * d),
            "mlp.c_proj": (4 * d, d),
        }.items():
            weights |= {f"h.{i}.{name}.weight": normal(*shape), f"h.{i}.{name}.bias": normal(shape[1])}
        for name in ("ln_1", "ln_2"):
            norms |= {f"h.{i}.{name}.weight": 1 + normal(d), f"h.{i}.{name}.bias": normal(d)}
    return weights | norms


def block_weights(weights, i, heads):
    """Those of block i in Keras's layout: a dictionary of lists."""
    h = {name.removeprefix(f"h.{i}."): w for name, w in weights.items() if name.startswith(f"h.{i}.")}
    d = len(h["ln_1.weight"])
    kernels, biases = np.split(h["attn.c_attn.weight"], 3, 1), np.split(h["attn.c_attn.bias"], 3)
    attention = []
    for kernel, bias in zip(kernels, biases, strict=True):
        attention += [kernel.reshape(d, heads, -1), bias.reshape(heads, -1)]
    return {
        "attention": [*attention, h["attn.c_proj.weight"].reshape(heads, -1, d), h["attn.c_proj.bias"]],
        **{name: [h[f"{name}.weight"], h[f"{name}.bias"]] for name in ("ln_1", "ln_2", "mlp.c_fc", "mlp.c_proj")},
    }


# Contenders: functions of weights, a size and prompts, that give a function of a number of new tokens, which gives them


def our_model(weights, size):
    model = keras_seq.models.TransformerLM(
        size.vocab_size, size.d_model, size.layers, size.heads, max_length=size.positions, pad_id=None
    )
    model.build((None, None))
    model.embedding.set_weights([weights["wte"]])
    model.position.set_weights([weights["wpe"]])
    model.norm.set_weights([weights["ln_f.weight"], weights["ln_f.bias"]])
    for i, block in enumerate(model.blocks):
        its = block_weights(weights, i, size.heads)
        _assign(block.attention, its["attention"])
        _assign(block.attention_norm, its["ln_1"])
        _assign(block.feedforward_norm, its["ln_2"])
        _assign(block.feedforward, its["mlp.c_fc"] + its["mlp.c_proj"])
    return model


def ours(weights, size, prompt):
    model = our_model(weights, size)
    return lambda new: model.generate(prompt, new)


def _assign(layer, arrays):
    weights = [w for w in layer.weights if "seed" not in w.path]
    for weight, array in zip(weights, arrays, strict=True):
        weight.assign(array)


def hub_backbone(weights, size):
    from keras_hub.models import GPT2Backbone

    backbone = GPT2Backbone(
        size.vocab_size,
        size.layers,
        size.heads,
        size.d_model,
        4 * size.d_model,
        dropout=0.0,
        max_sequence_length=size.positions,
    )
    backbone.token_embedding.embeddings.assign(weights["wte"])
    backbone.position_embedding.position_embeddings.assign(weights["wpe"])
    backbone.layer_norm.set_weights([weights["ln_f.weight"], weights["ln_f.bias"]])
    for i, block in enumerate(backbone.transformer_layers):
        its = block_weights(weights, i, size.heads)
        _assign(block._self_attention_layer, its["attention"])
        block._self_attention_layer_norm.set_weights(its["ln_1"])
        block._feedforward_layer_norm.set_weights(its["ln_2"])
        block._feedforward_intermediate_dense.set_weights(its["mlp.c_fc"])
        block._feedforward_output_dense.set_weights(its["mlp.c_proj"])
    return backbone


def keras_hub(weights, size, prompt):
    from keras_hub.models import GPT2CausalLM

    model = GPT2CausalLM(hub_backbone(weights, size), preprocessor=None)
    model.compile(sampler="greedy")
    batch, length = prompt.shape
    # One capacity for all runs, as a compiled function is made for each: it stops where the prompt's mask says so.
    capacity = length + size.new

    def run(new):
        tokens = np.zeros((batch, capacity), "int32")
        tokens[:, capacity - new - length : capacity - new] = prompt
        tokens[:, : capacity - new - length] = prompt[:, :1]
        mask = np.arange(capacity)[None] < capacity - new
        inputs = {"token_ids": tokens, "padding_mask": np.repeat(mask, batch, 0).astype("int32")}
        return np.asarray(model.generate(inputs, stop_token_ids=None)["token_ids"])[:, capacity - new :]

    return run


def hugging_face(weights, size, prompt):
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=size.vocab_size,
        n_positions=size.positions,
        n_embd=size.d_model,
        n_layer=size.layers,
        n_head=size.heads,
        bos_token_id=0,
        eos_token_id=None,
        pad_token_id=0,
    )
    model = GPT2LMHeadModel(config).eval()
    state = {f"transformer.{name}": torch.tensor(w) for name, w in weights.items()}
    for name in ("wte", "wpe"):
        state[f"transformer.{name}.weight"] = state.pop(f"transformer.{name}")
    model.load_state_dict(state | {"lm_head.weight": state["transformer.wte.weight"]}, strict=True)
    tokens = torch.tensor(prompt).long()
    ones = torch.ones_like(tokens)

    def run(new):
        with torch.inference_mode():
            y = model.generate(tokens, attention_mask=ones, max_new_tokens=new, do_sample=False)
        return y[:, tokens.shape[1] :].numpy()

    return run


def contenders():
    """`{name: function}` of those that can run here."""
    result = {OURS: ours}
    if importlib.util.find_spec("keras_hub"):
        result[HUB] = keras_hub
    if BACKEND == "torch" and importlib.util.find_spec("transformers"):
        result[HUGGING_FACE] = hugging_face
    return result


def prompts(size, batch):
    return np.random.default_rng(1).integers(1, size.vocab_size, (batch, size.prompt)).astype("int32")


def race(size, batch, required, rounds=7):
    """Lines of the rows `prefill`, `decode` and `compile` for a batch of prompts of one length."""
    prompt, weights = prompts(size, batch), weights_of(size)
    runs = {name: make(weights, size, prompt) for name, make in contenders().items()}
    cold, tokens = {}, {}
    for name, run in runs.items():
        start = time.perf_counter()
        tokens[name] = run(size.new)
        cold[name] = time.perf_counter() - start
        run(2)
    timing.agree(tokens, tolerance=0)
    runs = {OURS: runs[OURS], OURS + timing.AGAIN: runs[OURS], **runs}
    long, short = ({name: [] for name in runs} for _ in range(2))
    names = list(runs)
    for i in range(rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            short[name].append(1e3 * _seconds(runs[name], 2))
            long[name].append(1e3 * _seconds(runs[name], size.new))
    per_token = {n: [(a - b) / (size.new - 2) for a, b in zip(long[n], short[n], strict=True)] for n in names}
    about = f"{size.layers}x{size.d_model} batch={batch} prompt={size.prompt}"
    compile_time = {n: [1e3 * cold[n] - statistics.median(long[n])] for n in cold}
    return [
        *timing.lines(f"decode {about} new={size.new}", per_token, required),
        *timing.lines(f"prefill {about}", short),
        *timing.lines(f"compile {about}", compile_time),
    ]


def growth(size, batch, rounds=7):
    """Lines of the row `growth`: a token after a short and after a prompt four times as long."""
    weights, runs = weights_of(size), {}
    for length in (size.prompt, 4 * size.prompt):
        longer = Size(size.layers, size.d_model, size.heads, size.vocab_size, length, size.new, size.positions)
        run = ours(weights, longer, prompts(longer, batch))
        run(size.new), run(2)
        runs[length] = run
    samples = {f"prompt = {length}": [] for length in runs}
    for _ in range(rounds):
        for length, run in runs.items():
            spent = _seconds(run, size.new) - _seconds(run, 2)
            samples[f"prompt = {length}"].append(1e3 * spent / (size.new - 2))
    attended = (4 * size.prompt + size.new / 2) / (size.prompt + size.new / 2)
    name = f"growth {size.layers}x{size.d_model} batch={batch}"
    return timing.lines(name, samples, {f"prompt = {4 * size.prompt}": f"<= {attended:.2f}"})


# Contenders in beam search: functions of a size, sources and a number of beams, that give a function without arguments


def our_beams(size, source, num_beams):
    model = keras_seq.models.Transformer(
        size.vocab_size,
        size.vocab_size,
        size.d_model,
        size.layers,
        size.heads,
        max_length=size.positions,
        position="learned",
        activation="gelu",
    )
    model.build((None, None))
    _randomize(model)
    return lambda: model.beam_search(source, size.new, num_beams).tokens[:, 0]


def _randomize(model):
    rng = np.random.default_rng(0)
    for weight in model.trainable_weights:
        center = 1.0 if "gamma" in weight.path else 0.0
        weight.assign(center + 0.08 * rng.standard_normal(weight.shape))


def keras_hub_beams(size, source, num_beams):
    from keras_hub.models import BartBackbone, BartSeq2SeqLM
    from keras_hub.samplers import BeamSampler

    sizes = size.vocab_size, size.layers, size.heads, size.d_model, 4 * size.d_model
    model = BartSeq2SeqLM(BartBackbone(*sizes, dropout=0.0, max_sequence_length=size.positions), preprocessor=None)
    _randomize(model)
    model.compile(sampler=BeamSampler(num_beams=num_beams))
    start = np.full((len(source), 1 + size.new), 1, "int32")
    inputs = {
        "encoder_token_ids": source,
        "encoder_padding_mask": np.ones_like(source),
        "decoder_token_ids": start,
        "decoder_padding_mask": (np.arange(1 + size.new)[None] < 1).repeat(len(source), 0).astype("int32"),
    }
    return lambda: np.asarray(model.generate(inputs, stop_token_ids=None)["decoder_token_ids"])[:, 1:]


def hugging_face_beams(size, source, num_beams):
    import torch
    from transformers import BartConfig, BartForConditionalGeneration

    config = BartConfig(
        vocab_size=size.vocab_size,
        max_position_embeddings=size.positions,
        d_model=size.d_model,
        **{f"{part}_layers": size.layers for part in ("encoder", "decoder")},
        **{f"{part}_attention_heads": size.heads for part in ("encoder", "decoder")},
        **{f"{part}_ffn_dim": 4 * size.d_model for part in ("encoder", "decoder")},
        bos_token_id=1,
        decoder_start_token_id=1,
        eos_token_id=None,
        forced_eos_token_id=None,
        pad_token_id=0,
    )
    model = BartForConditionalGeneration(config).eval()
    rng = np.random.default_rng(0)
    for name, weight in model.named_parameters():
        center = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        weight.data.copy_(torch.tensor(center + 0.08 * rng.standard_normal(weight.shape)))
    tokens = torch.tensor(source).long()
    ones = torch.ones_like(tokens)

    def run():
        with torch.inference_mode():
            y = model.generate(
                tokens, attention_mask=ones, max_new_tokens=size.new, num_beams=num_beams, do_sample=False
            )
        return y[:, 1:].numpy()

    return run


def beams(size, batch, num_beams, required, rounds=9):
    """Lines of the row `beam`."""
    source = np.random.default_rng(1).integers(2, size.vocab_size, (batch, size.prompt)).astype("int32")
    made = {OURS: our_beams, HUB: keras_hub_beams, HUGGING_FACE: hugging_face_beams}
    runs = {name: made[name](size, source, num_beams) for name in contenders()}
    for name, run in runs.items():
        if (shape := run().shape) != (batch, size.new):
            raise AssertionError(f"{name} gives tokens of shape {shape}, not {(batch, size.new)}: not the same work.")
    samples, notes = timing.measure(runs, rounds)
    about = f"{size.layers}+{size.layers}x{size.d_model} batch={batch} source={size.prompt} new={size.new}"
    return timing.lines(f"beam {num_beams} {about}", samples, required, notes=notes)


def _seconds(run, new):
    start = time.perf_counter()
    run(new)
    return time.perf_counter() - start


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny models")
    parser.add_argument("--only", metavar="NAME", default="", help="rows whose name contains NAME")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args(argv)
    size, options = (TINY, {"rounds": 2}) if args.quick else (FULL, {})
    translation = TINY_TRANSLATION if args.quick else FULL_TRANSLATION
    rows = {f"decode prefill compile batch={b}": (race, size, b, REQUIRED[BACKEND, b]) for b in (1, 16)}
    rows |= {"growth batch=1": (growth, size, 1)}
    rows |= {f"beam {k} batch=2": (beams, translation, 2, k, REQUIRED_OF_BEAMS[BACKEND]) for k in (4,)}
    results = []
    timing.show()
    for name, (work, *arguments) in rows.items():
        if args.only in name:
            lines = work(*arguments, **options)
            timing.show(lines)
            results += lines
    if args.json:
        timing.save(args.json, results, backend=BACKEND, versions=timing.versions("keras_seq", "keras", BACKEND))
    return results


if __name__ == "__main__":
    main()
