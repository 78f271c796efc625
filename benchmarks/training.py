"""How fast does a Transformer train by `fit`? Against a training loop by hand, and against keras-hub.

    KERAS_BACKEND=torch python benchmarks/training.py [--quick] [--only NAME] [--json FILE]

On one thread of one core. The loop by hand is what a user of the framework writes: torch.nn.functional, torch.optim on
PyTorch, flax.nnx and optax on JAX (left out without them). All contenders begin with the same weights and must have the
same loss in the first step. `--quick` runs a tiny model, to see that everything works: its numbers mean nothing.

How to read it: a GPT-like model, batch x time; the time is that of a step of Adam, the overhead of an epoch of so many
steps included for those that run by `fit`. `ratio` is that of a contender divided by that of keras_seq in the same
round, median over rounds: 0.9 beside the loop by hand says that keras_seq takes 1 / 0.9 times as long.
"""

import argparse
import importlib.util

import decoding
import numpy as np
import timing

if __name__ == "__main__":
    timing.one_thread()  # before a framework is imported

import keras

import keras_seq

BACKEND = keras.config.backend()
OURS, HUB, NATIVE = "keras_seq", "keras-hub", "by hand"
RATE = 1e-4
REQUIRED = {"torch": {NATIVE: ">= 0.87"}, "jax": {NATIVE: ">= 0.87"}, "tensorflow": {}}  # at most 1.15 times as long


def by_fit(model):
    """Compiles a Keras model; a function of tokens and a number of steps that gives the loss of the last epoch."""
    model.compile(
        keras.optimizers.Adam(RATE),
        loss=None if isinstance(model, keras_seq.models.LanguageModel) else _cross_entropy(),
        jit_compile=BACKEND != "torch",
    )

    def run(tokens):
        x, y = tokens[:, :, :-1], tokens[:, :, 1:]
        x, y = (a.reshape(-1, a.shape[2]) for a in (x, y))
        return model.fit(x, y, batch_size=tokens.shape[1], shuffle=False, verbose=0).history["loss"][-1]

    return run


def _cross_entropy():
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def ours(weights, size):
    return by_fit(decoding.our_model(weights, size))


def keras_hub(weights, size):
    backbone = decoding.hub_backbone(weights, size)
    tokens = keras.Input((None,), dtype="int32")
    h = backbone({"token_ids": tokens, "padding_mask": keras.ops.ones_like(tokens)})
    return by_fit(keras.Model(tokens, backbone.token_embedding(h, reverse=True)))


def by_hand_torch(weights, size):
    import torch
    from torch.nn import functional

    w = {name: torch.nn.Parameter(torch.tensor(array)) for name, array in weights.items()}
    optimizer = torch.optim.Adam(w.values(), RATE, eps=1e-7)
    d, heads = size.d_model, size.heads

    def norm(x, name):
        return functional.layer_norm(x, (d,), w[f"{name}.weight"], w[f"{name}.bias"], 1e-5)

    def dense(x, name):
        return torch.addmm(w[f"{name}.bias"], x.view(-1, x.shape[-1]), w[f"{name}.weight"]).view(*x.shape[:-1], -1)

    def logits(tokens):
        b, t = tokens.shape
        x = w["wte"][tokens] + w["wpe"][:t]
        for i in range(size.layers):
            qkv = dense(norm(x, f"h.{i}.ln_1"), f"h.{i}.attn.c_attn").view(b, t, 3, heads, -1)
            y = functional.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4), is_causal=True)
            x = x + dense(y.transpose(1, 2).reshape(b, t, d), f"h.{i}.attn.c_proj")
            h = functional.gelu(dense(norm(x, f"h.{i}.ln_2"), f"h.{i}.mlp.c_fc"), approximate="tanh")
            x = x + dense(h, f"h.{i}.mlp.c_proj")
        return norm(x, "ln_f") @ w["wte"].T

    def run(tokens):
        total = 0.0
        for batch in torch.tensor(tokens).long():
            optimizer.zero_grad()
            y = logits(batch[:, :-1])
            loss = functional.cross_entropy(y.reshape(-1, size.vocab_size), batch[:, 1:].reshape(-1))
            loss.backward()
            optimizer.step()
            total += loss.item()
        return total / len(tokens)

    return run


def by_hand_jax(weights, size):
    import jax
    import jax.numpy as jnp
    import optax
    from flax import nnx

    d = size.d_model

    class Block(nnx.Module):
        def __init__(self, i, rngs):
            def linear(name, inside, outside):
                layer = nnx.Linear(inside, outside, rngs=rngs)
                layer.kernel[...] = jnp.asarray(weights[f"h.{i}.{name}.weight"])
                layer.bias[...] = jnp.asarray(weights[f"h.{i}.{name}.bias"])
                return layer

            self.ln_1, self.ln_2 = (norm(f"h.{i}.{name}", rngs) for name in ("ln_1", "ln_2"))
            self.qkv, self.out = linear("attn.c_attn", d, 3 * d), linear("attn.c_proj", d, d)
            self.up, self.down = linear("mlp.c_fc", d, 4 * d), linear("mlp.c_proj", 4 * d, d)

        def __call__(self, x):
            b, t, _ = x.shape
            q, k, v = jnp.split(self.qkv(self.ln_1(x)).reshape(b, t, 3 * size.heads, -1), 3, axis=2)
            x = x + self.out(jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(b, t, d))
            return x + self.down(jax.nn.gelu(self.up(self.ln_2(x)), approximate=True))

    def norm(name, rngs):
        layer = nnx.LayerNorm(d, epsilon=1e-5, rngs=rngs)
        layer.scale[...] = jnp.asarray(weights[f"{name}.weight"])
        layer.bias[...] = jnp.asarray(weights[f"{name}.bias"])
        return layer

    class GPT(nnx.Module):
        def __init__(self, rngs):
            self.wte, self.wpe = nnx.Param(jnp.asarray(weights["wte"])), nnx.Param(jnp.asarray(weights["wpe"]))
            self.blocks = nnx.List([Block(i, rngs) for i in range(size.layers)])
            self.ln_f = norm("ln_f", rngs)

        def __call__(self, tokens):
            x = self.wte[...][tokens] + self.wpe[...][: tokens.shape[1]]
            for block in self.blocks:
                x = block(x)
            return self.ln_f(x) @ self.wte[...].T

    model = GPT(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(RATE, eps=1e-7), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, tokens):
        def loss(model):
            return optax.softmax_cross_entropy_with_integer_labels(model(tokens[:, :-1]), tokens[:, 1:]).mean()

        value, gradients = nnx.value_and_grad(loss)(model)
        optimizer.update(model, gradients)
        return value

    return lambda tokens: float(np.mean([step(model, optimizer, batch) for batch in jnp.asarray(tokens)]))


def contenders():
    """`{name: function}` of those that can run here."""
    result = {OURS: ours}
    if BACKEND == "torch":
        result[NATIVE] = by_hand_torch
    if BACKEND == "jax" and importlib.util.find_spec("flax"):
        result[NATIVE] = by_hand_jax
    if importlib.util.find_spec("keras_hub"):
        result[HUB] = keras_hub
    return result


def race(size, batch, time, steps=4, rounds=7):
    weights = decoding.weights_of(size)
    shape = steps, batch, time + 1
    tokens = np.random.default_rng(0).integers(1, size.vocab_size, shape).astype("int32")
    runs = {name: make(weights, size) for name, make in contenders().items()}
    timing.agree({name: np.array([run(tokens[:1])]) for name, run in runs.items()}, tolerance=1e-3)
    work = {name: (lambda run=run: run(tokens)) for name, run in runs.items()}
    samples, notes = timing.measure(work, rounds=rounds, budget=90)
    samples = {name: [value / steps for value in values] for name, values in samples.items()}
    name = f"fit step {size.layers}x{size.d_model} {batch}x{time}"
    return timing.lines(name, samples, REQUIRED[BACKEND], notes=notes)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tiny model")
    parser.add_argument("--only", metavar="NAME", default="", help="nothing, if NAME is not in 'fit step'")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args(argv)
    if args.only not in "fit step":
        return []
    timing.show()
    results = race(decoding.TINY, 2, 8, rounds=2) if args.quick else race(decoding.FULL, 2, 256)
    timing.show(results)
    if args.json:
        timing.save(args.json, results, backend=BACKEND, versions=timing.versions("keras_seq", "keras", BACKEND))
    return results


if __name__ == "__main__":
    main()
