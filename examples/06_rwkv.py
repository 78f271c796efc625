r"""
# RWKV

A Transformer looks back at every token: each new one costs more than the one before. A recurrent network has a state of
constant size, but is trained step by step. RWKV is both: trained on all tokens at once, run with a constant state. You
read its equations, train a small RWKV-7 on real text, run it both ways, and measure what a long context costs.
"""

import os

os.environ.setdefault("KERAS_BACKEND", "jax")  # or "torch", or "tensorflow": before Keras is imported

import math
import time

import keras
import numpy as np
from keras import ops
from shared import TimeBudget, bits_per_character, python_documentation, windows

import keras_seq
from keras_seq import layers, models

keras.utils.set_random_seed(0)

r"""
## Two halves of a block

A model of RWKV is an embedding, a pile of blocks, and a projection to logits. A block has two halves, each added to
what comes in, as in a Transformer: **time mixing**, which takes the place of attention, and **channel mixing**, which
takes the place of the feed-forward network.

Both begin with the **token shift**: each channel takes a part of its value from the token before. With \(x_t\) the
input at step \(t\) and \(\mu\) a learned vector, at first of numbers between 0 and 1,

\[ x_{t}^{\mu} = x_t + (x_{t-1} - x_t) \odot \mu . \]

So a block sees pairs of neighbours before any memory comes in. Channel mixing is no more than that, and two matrices
(versions 4 to 6 have a gate as well):

\[ y_t = \mathrm{relu}(x_t^{\mu} W_k)^2 \, W_v . \]

## From version 4 to version 7

Time mixing makes from each token a key \(k_t\), a value \(v_t\) and a receptance \(r_t\) (what attention calls a
query), and keeps a state. The versions differ in how the state changes. Vectors are columns from here on, and \(w\) is
a factor between 0 and 1: what is left after one step.

RWKV-4 (Peng et al., 2023) keeps a weighted mean of the values, in each channel alone. The weights fade with distance;
the newest token has a weight \(u\) of its own:

\[ y_t = \frac{\sum_{s<t} w^{t-1-s} e^{k_s} v_s + e^{u+k_t} v_t}{\sum_{s<t} w^{t-1-s} e^{k_s} + e^{u+k_t}} . \]

RWKV-5 (Peng et al., 2024) keeps a matrix \(S\) in each of several heads. A matrix is a memory with addresses:
\(v k^\top\) writes the value \(v\) at the key \(k\), and \(S r\) reads what is at \(r\). Again the newest token has a
weight \(u\) of its own when it is read:

\[ S_t = S_{t-1}\, \mathrm{diag}(w) + v_t k_t^\top , \qquad y_t = (S_{t-1} + v_t (u \odot k_t)^\top)\, r_t . \]

RWKV-6 (the same paper) lets the decay depend on the token: \(w_t\) in place of \(w\). It can forget on purpose.

RWKV-7 (Peng et al., 2025) can also replace. Before it writes it takes away a part \(a_t\), between 0 and 1, of what is
stored along the direction \(\kappa_t\), a vector of length 1 made from the key:

\[ S_t = S_{t-1} \left( \mathrm{diag}(w_t) - \kappa_t (a_t \odot \kappa_t)^\top \right) + v_t \tilde{k}_t^\top ,
   \qquad y_t = S_t r_t . \]

Here \(\tilde{k}_t = k_t \odot (1 + (a_t - 1) \odot k_a)\): where nothing is taken away, little is written. All of
\(r, w, k, v, a\) are made from the shifted input; \(w\) is \(\exp(-e^{-1/2}\, \sigma(\dots))\), which is between 0.545
and 1. From the second block on, \(v\) is mixed with that of the first block. The result is normed in each head,
multiplied by a gate, and projected.

The difference in a few lines: write 1 at a key, then 2 at the same key, and read it.
"""

key, read = np.array([0.6, 0.8]), {}
for version, taken_away in {"RWKV-5 and 6": 0, "RWKV-7": 1}.items():
    S = np.zeros((1, 2))  # values of size 1, keys of size 2
    for value in (1.0, 2.0):
        S = S @ (np.eye(2) - taken_away * np.outer(key, key)) + value * key
    read[version] = (S @ key).item()
    print(f"{version:12} reads {read[version]:.1f}")
assert np.allclose(list(read.values()), [3, 2])

"""
## Train

The text is the documentation of the Python language, which comes with Python; a token is a character. `RWKV` begins
with the initial values of the official training code, and `rwkv_optimizer` is the optimizer that belongs to them:
weight decay for matrices alone, and the decay in time is learned twice as fast. `pad_id=None` says that no id is
padding.
"""

CHARACTERS = None  # all
LAYERS = 2
D_MODEL = 128
HEAD_DIM = 32
LENGTH = 128
BATCH = 8
SECONDS = 60

alphabet, training, held_out = python_documentation(CHARACTERS)
pieces = windows(training, LENGTH)
pieces = pieces[: len(pieces) // BATCH * BATCH]  # whole batches: another size would be compiled, too
model = models.RWKV(len(alphabet), D_MODEL, LAYERS, version=7, head_dim=HEAD_DIM, pad_id=None)
model.build((None, None))
decays_at_first = [ops.convert_to_numpy(block.time_mixing.w0) for block in model.blocks]
model.compile(models.rwkv_optimizer(model, 5e-3, clipnorm=1.0))
budget = TimeBudget(SECONDS, compilation=False)
model.fit(pieces, batch_size=BATCH, epochs=100, verbose=0, callbacks=[budget])

examples = windows(held_out, LENGTH)[:64]
bits = bits_per_character(model, examples)
print(f"{model.count_params():,} weights; {len(training):,} characters, {len(alphabet)} different")
print(f"bits per character of held-out text: {bits:.2f}; guessing: {math.log2(len(alphabet)):.2f}")

"""
## One model, two ways to run it

As a Transformer: all tokens at once. The recurrence is cut into chunks of 32 steps; within a chunk it is products of
matrices, and only the chunks come one after another. `kernels("native")` asks for that form, and its list tells what
ran. As a recurrent network: a token and a state in, logits and the next state out. In between: pieces of any length.
"""

TOKENS = 160
text = held_out[None, :TOKENS]

with keras_seq.kernels("native") as ran:
    whole = ops.convert_to_numpy(model(text))
print(ran[0])

first, state = model(text[:, : TOKENS // 3], return_state=True)
second, state = model(text[:, TOKENS // 3 :], initial_state=state, return_state=True)
in_pieces = np.concatenate([ops.convert_to_numpy(first), ops.convert_to_numpy(second)], axis=1)

state, in_steps = model.initial_state(batch_size=1), []
for t in range(TOKENS):
    logits, state = model.step(text[:, t], state)
    in_steps.append(ops.convert_to_numpy(logits))
in_steps = np.stack(in_steps, axis=1)

print(f"largest logit {np.abs(whole).max():.1f}")
for name, other in {"pieces": in_pieces, "steps": in_steps}.items():
    print(f"largest difference between the whole and {name}: {np.abs(whole - other).max():.0e}")
    assert np.allclose(whole, other, atol=1e-4)

r"""
## How long it remembers

What a channel of the state keeps from one step to the next is \(w\), and after \(n\) steps it is \(w^n\). In RWKV-7 it
depends on the token; \(\exp(-e^{-1/2}\, \sigma(w_0))\) is what it is without the token's part. The picture has a line
for each channel of the first block, and of the last one. Some forget half within two steps, others need thousands: a
model has use for both. The initial values spread the channels over this range, and a minute of training moves them
little.
"""


def decays(w0):
    return np.exp(-np.exp(-0.5) / (1 + np.exp(-w0)))


for i in sorted({0, LAYERS - 1}):
    trained = decays(ops.convert_to_numpy(model.blocks[i].time_mixing.w0))
    keras_seq.plotting.decay(trained, steps=100, title=f"what is left of a token, block {i + 1}")

print("steps until half is left: shortest, middle, longest of the channels")
for i, (block, before) in enumerate(zip(model.blocks, decays_at_first, strict=True)):
    after = ops.convert_to_numpy(block.time_mixing.w0)
    for when, w0 in {"at first": before, "trained": after}.items():
        half = np.quantile(np.log(0.5) / np.log(decays(w0)), [0, 0.5, 1])
        print(f"block {i + 1}, {when:8}: {half[0]:6.1f} {half[1]:6.0f} {half[2]:6.0f}")

"""
## What a long context costs

A Transformer of the same width and depth keeps the keys and values of all tokens so far, and looks at all of them for
each new one. RWKV has its state. Here is the time to write one more character after contexts of several lengths, and
the bytes that each model keeps for it. `stream` compiles first; then the median of several steps is taken. The
Transformer is not trained: its time is the same.
"""

CONTEXTS = (100, 1000, 10_000)
STEPS = 64  # that are timed

transformer = models.TransformerLM(
    len(alphabet), D_MODEL, LAYERS, D_MODEL // HEAD_DIM, hidden_dim=5 * D_MODEL, position="rotary", pad_id=None
)


def bytes_of(state):
    return sum(ops.convert_to_numpy(leaf).nbytes for leaf in keras.tree.flatten(state))


def milliseconds_of_a_step(model, context):
    stream = model.stream(np.resize(held_out, context - STEPS), STEPS)
    next(stream), next(stream)  # the first reads the context, the second may compile
    times = [time.perf_counter()]
    for _ in stream:
        times.append(time.perf_counter())
    return 1000 * float(np.median(np.diff(times)))


steps, sizes = {}, {}
for name, each in {"Transformer": transformer, "RWKV-7": model}.items():
    steps[name] = [milliseconds_of_a_step(each, context) for context in CONTEXTS]
    sizes[name] = [bytes_of(each.initial_state(1, max_length=context)) for context in CONTEXTS]
    for context, step, size in zip(CONTEXTS, steps[name], sizes[name], strict=True):
        print(f"{name:12} after {context:6,} characters: {step:6.2f} ms a step, a state of {size:10,} bytes")
assert sizes["RWKV-7"][0] == sizes["RWKV-7"][-1]
assert sizes["Transformer"][0] < sizes["Transformer"][-1]

style = {"x": CONTEXTS, "log": "xy", "marker": "o"}
keras_seq.plotting.curves(steps, "context in characters", "milliseconds", "time to write one character", **style)
figure = keras_seq.plotting.curves(sizes, "context in characters", "bytes", "size of the state", **style)

"""
## Stream

`stream` reads the prompt in one call and then yields token by token, for as long as you like: memory does not grow.
After a minute of training it knows words, but no sentences.
"""

CHARACTERS_WRITTEN = 200
prompt = [alphabet.index(c) for c in "The "]
tokens = list(model.stream(prompt, CHARACTERS_WRITTEN, temperature=0.7, seed=0))
print("The " + "".join(alphabet[token] for token in tokens))

state = model.initial_state(1)
before = bytes_of(state)
_, state = model(np.array([prompt + tokens]), initial_state=state, return_state=True)
print(f"\nthe state: {before:,} bytes at first, {bytes_of(state):,} after {len(prompt + tokens)} characters")
assert bytes_of(state) == before

r"""
## Keep track of a state

Is the number of ones so far even or odd? One number that changes its sign at each one would do. In a state of one
number the factor of a step is \(w - a\), and with \(w\) above 0.545 and \(a\) below 1 it is above \(-0.455\): RWKV-7
can erase, but it cannot turn round. With `allow_negative_eigenvalues=True` \(a\) goes up to 2, and the factor down to
\(-1\) (Grazzi et al., 2024). Here is a layer with a state of one number, set by hand: no decay, the largest \(a\),
nothing written. It starts at 1.
"""

BITS = 500
bits_in = np.random.default_rng(0).integers(0, 2, (100, BITS))
even = np.where(bits_in.sum(axis=1) % 2 == 0, 1.0, -1.0)

correct = {}
for allowed in (False, True):
    layer = layers.RWKV7TimeMixing(
        head_dim=1, allow_negative_eigenvalues=allowed, decay_rank=1, iclr_rank=1, gate_rank=1
    )
    layer.build((None, None, 1))
    for weight in layer.weights:
        weight.assign(np.zeros(weight.shape))
    layer.w0.assign([-1e4])  # w is 1
    layer.a0.assign([1e4])  # a is 1, or 2
    layer.k_k.assign([1.0])
    layer.key_dense.kernel.assign([[1.0]])  # the key is the bit itself
    start = ops.zeros((100, 1)), ops.ones((100, 1, 1, 1))  # the last input, and S
    _, (_, S) = layer(bits_in[..., None].astype("float32"), initial_state=start, return_state=True)
    S = ops.convert_to_numpy(S).ravel()
    correct[allowed] = np.isclose(S, even, atol=1e-3).mean()
    print(f"allow_negative_eigenvalues={allowed!s:5}: right after {BITS} bits in {correct[allowed]:.0%} of sequences")
assert correct == {False: 0, True: 1}

"""
## Official checkpoints

`to_checkpoint` writes the names and shapes of the official code, and `from_checkpoint` reads them, versions 4 to 7: the
released models, too. Neither needs PyTorch, and nothing in a `.pth` file is executed.
"""

small = models.RWKV(50, d_model=32, num_layers=2, head_dim=16, pad_id=None)
small.to_checkpoint("small.pth")
again = models.RWKV.from_checkpoint("small.pth")
print(f"{os.path.getsize('small.pth'):,} bytes; RWKV-{again.version}, {again.num_layers} blocks of {again.d_model}")
assert all(
    np.array_equal(ops.convert_to_numpy(a), ops.convert_to_numpy(b))
    for a, b in zip(small.weights, again.weights, strict=True)
)

"""
## State tuning

The state before the first token need not be 0. With `state_tuning=True` these states are the only weights that `fit`
trains: a few numbers that act like a long prompt, and cost nothing in use. Here the model, which has seen few capitals,
gets used to text in capitals alone.
"""

TUNING_SECONDS = 15

model.to_checkpoint("text.safetensors")
tuned = models.RWKV.from_checkpoint("text.safetensors", state_tuning=True)
tuned.compile(models.rwkv_optimizer(tuned, 1.0))
capital = np.array([alphabet.index(c.upper()) if c.upper() in alphabet else i for i, c in enumerate(alphabet)])
before = bits_per_character(tuned, capital[examples])
budget = TimeBudget(TUNING_SECONDS, compilation=False)
tuned.fit(capital[pieces], batch_size=BATCH, epochs=100, verbose=0, callbacks=[budget])
after = bits_per_character(tuned, capital[examples])
trained = sum(math.prod(weight.shape) for weight in tuned.trainable_weights)
print(f"bits per character of capitals: {before:.2f}, with {trained:,} tuned numbers {after:.2f}")

"""
## What can go wrong

- **The loss is worse than in the paper.** RWKV needs its own initial values and groups of weights. `models.RWKV` and
  `rwkv_optimizer` have them; a stack of `RWKVBlock`s has them if each block knows its `layer_index` and `num_layers`.
- **The model never writes a line break,** or whatever id 0 is. By default id 0 is padding: it is not read, not learned,
  not generated. Say `pad_id=None` if it is a token, as in official models, where 0 is the end of a text.
- **Padded prompts.** In other code padding goes into the state. Here a padded step leaves it as it is: give `generate`
  a list of lists, or a `mask` with True for valid.
- **`head_dim` must divide `d_model`;** released models have 64, the default. A small model needs a smaller one.
- **`to_checkpoint` refuses a model with `allow_negative_eigenvalues=True`.** The official format has no place for it,
  and other programs would compute other numbers from the same weights. `save` keeps it.
- **It forgets what a Transformer would find.** A state of constant size cannot hold everything. To look up one of very
  many facts word for word is what attention is better at (Arora et al., 2023).
- **The first call takes long.** JAX and TensorFlow compile the chunks once for each shape. Use batches of one size and
  one length; `generate` rounds lengths up so that few are ever compiled.
"""
