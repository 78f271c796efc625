"""
# Streaming, state, truncated back-propagation

Text, sound and sensor data arrive bit by bit, and may never end. Here a model reads them in pieces of any length and
remembers between the pieces: in training, when it writes, and across a restart. The state in which it remembers is a
value that you hold in your hand.
"""

import os

os.environ.setdefault("KERAS_BACKEND", "jax")  # or "torch", or "tensorflow": before Keras is imported

import time

import keras
import numpy as np
from keras import ops
from shared import python_documentation

import keras_seq

keras.utils.set_random_seed(0)

"""
## State

A recurrent layer reads one time step after another and keeps what it needs of the past in its **state**. Ask for the
state after a call, hand it to the next, and the next goes on where the first ended. `step` is the same for a single
time step, without a time axis.

Cut the sequence where you like: nothing changes. That is the law that every layer of this library obeys.
"""

layer = keras_seq.layers.GRU(8, return_sequences=True)
x = np.random.default_rng(0).normal(size=(2, 12, 3)).astype("float32")  # (batch, time, features)
whole = ops.convert_to_numpy(layer(x))

y1, state = layer(x[:, :5], return_state=True)  # five steps
y2, state = layer(x[:, 5:11], initial_state=state, return_state=True)  # six more
y3, state = layer.step(x[:, 11], state)  # and one
pieces = np.concatenate([*map(ops.convert_to_numpy, (y1, y2, y3[:, None]))], axis=1)
print(f"in one call or in three, the outputs differ by at most {np.abs(whole - pieces).max():.0e}")
assert np.allclose(whole, pieces, atol=1e-5)

"""
## A long text in short pieces

The text is the documentation of Python that comes with Python, about 420,000 characters to train on. A language model
reads a character and predicts the next one; its error is counted in bits per character.

To learn from the whole text as one sequence, back-propagation would have to keep all of its steps in memory. So the
text is cut into pieces, and the gradient stops at each cut. Does what the model remembers have to stop there, too? No:
the state goes on to the next piece, as a plain value without a gradient. This is **truncated back-propagation through
time** (Williams & Peng, 1990).

For batches, the text is cut into as many long strips as a batch has rows, and the strips into pieces. Row i of a batch
then continues row i of the batch before.
"""

CHARACTERS = None  # all
ROWS = 32
PIECE = 16

alphabet, training_text, held_out_text = python_documentation(CHARACTERS)


def strips(tokens):
    """Pieces `(n * ROWS, PIECE)` of a text in this order, and the character that follows each of their characters."""
    n = (len(tokens) - 1) // (ROWS * PIECE)
    tokens = tokens[: ROWS * n * PIECE + 1]
    return [part.reshape(ROWS, n, PIECE).swapaxes(0, 1).reshape(-1, PIECE) for part in (tokens[:-1], tokens[1:])]


training, held_out = strips(training_text), strips(held_out_text)
for i in 0, ROWS, 2 * ROWS:
    print(f"row 0 of batch {i // ROWS}:", repr("".join(alphabet[c] for c in training[0][i])))
x, y = training
assert (y[:-ROWS, -1] == x[ROWS:, 0]).all()

"""
With `stateful=True` a layer or a model carries the state from batch to batch by itself, in `fit`, `evaluate` and
`predict`, on each backend. `reset_state()` goes back to the beginning: here at the start of each epoch. The order of
the batches now matters, so `shuffle=False`.

The second model is trained on the same pieces, but begins each of them with an empty state, as an ordinary `fit` does.
"""

EPOCHS = 2


class StartAgain(keras.callbacks.Callback):
    def on_epoch_begin(self, epoch, logs=None):
        self.model.reset_state()


def language_model(stateful, weights=None):
    model = keras_seq.models.RecurrentLM(len(alphabet), d_model=128, cell="gru", pad_id=None, stateful=stateful)
    model(x[:ROWS])  # builds it, for batches of this size
    if weights:
        model.set_weights(weights)
    return model


weights = {}
for carried in True, False:
    keras.utils.set_random_seed(0)
    model = language_model(stateful=carried)
    model.compile(keras.optimizers.Adam(5e-3, clipnorm=1.0))
    model.fit(x, y, batch_size=ROWS, epochs=EPOCHS, shuffle=not carried, callbacks=[StartAgain()], verbose=0)
    weights[carried] = model.get_weights()

"""
Each of them reads the held-out text in both ways: with the state carried from piece to piece, and without.
"""


def bits(model):
    """The bits `(n, PIECE)` that the model needs for each character of the held-out text."""
    x, y = held_out
    model.reset_state()
    logits = model.predict(x, batch_size=ROWS, verbose=0)
    logits = logits - logits.max(axis=-1, keepdims=True)
    log_probabilities = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    return -np.take_along_axis(log_probabilities, y[..., None], axis=-1)[..., 0] / np.log(2)


lines = {}
words = {True: "carried", False: "empty at each piece"}
for carried in True, False:
    for carrying in True, False:
        found = bits(language_model(carrying, weights[carried]))
        print(f"trained: {words[carried]:20}  reads: {words[carrying]:20}  {found.mean():.2f} bits per character")
        if carried:
            lines[f"state {words[carrying]}"] = found.mean(axis=0)
keras_seq.plotting.curves(
    lines, "position in the piece", "bits per character", "the model that was trained with a carried state"
)

"""
The best of the four has the state carried in both. The figure shows where the difference arises: with an empty state
the first characters of each piece are guesses. With the carried state the line is flat, although no gradient ever
crossed a cut. What the model has learnt to remember within sixteen characters serves it across the cuts too.

There is a limit: no gradient tells the model that something would have paid after the end of the piece. To learn longer
memory takes longer pieces. Their length is a compromise with time and memory.

## Read a long prompt, keep the state

To use the model you need no `stateful`. You hold the state yourself: `model(tokens, initial_state=state,
return_state=True)` reads on from it. Here a long prompt is read in chunks. The size of the state does not depend on how
much was read: it is one vector, in float32. (That is so for recurrent layers and RWKV. A Transformer keeps something of
each token.)

`stop_gradient` is for PyTorch, which otherwise keeps all that led to the state, in case you want a gradient. On the
other backends it does nothing here.
"""

PROMPT = 2000
model = language_model(False, weights[True])


def size(state):
    return sum(ops.convert_to_numpy(part).nbytes for part in keras.tree.flatten(state))


def read(tokens, state=None, chunk=200):
    """The logits after the last token of `(t,)`, and the state."""
    for start in range(0, len(tokens), chunk):
        logits, state = model(tokens[None, start : start + chunk], initial_state=state, return_state=True)
        state = keras.tree.map_structure(ops.stop_gradient, state)
    return logits[:, -1], state


for length in 1, 10, PROMPT:
    logits, state = read(held_out_text[:length])
    print(f"after {length:4} characters the state is {size(state)} bytes")

"""
A state can be saved. Tomorrow, or on another machine, or on another backend, the model goes on from it without reading
the prompt again. So that you can believe it, the state is loaded here and the text continued, always with the most
probable character. `generate` reads the whole prompt in one go, and writes the same.
"""

NEW = 100
keras_seq.states.save("after_the_prompt.safetensors", {"logits": logits, "state": state})
del logits, state

saved = keras_seq.states.load("after_the_prompt.safetensors")


def write(choose):
    """`NEW` characters from the saved state; `choose` makes a token `(1,)` of logits `(1, alphabet)`."""
    logits, state, tokens = saved["logits"], saved["state"], []
    for _ in range(NEW):
        token = choose(logits)
        tokens.append(int(token[0]))
        logits, state = model.step(token, state)
    return tokens


greedy = write(lambda logits: ops.argmax(logits, axis=-1))
assert greedy == model.generate(held_out_text[:PROMPT], max_new_tokens=NEW).tolist()
print(repr("".join(alphabet[c] for c in held_out_text[PROMPT - 60 : PROMPT])), "goes on:")
print(repr("".join(alphabet[c] for c in greedy)))

"""
`step` did not change the saved state: a state is a value, and each call returns a new one. So any number of
continuations can start from the same place. The most probable character soon repeats itself; here are three
continuations that draw from the probabilities instead.
"""

sampling = keras_seq.decoding.Sampling(temperature=0.7)
for seed in 1, 2, 3:
    rng = np.random.default_rng(seed)
    drawn = write(lambda logits, rng=rng: sampling(logits, ops.convert_to_tensor(rng.uniform(size=1), "float32")))
    print(repr("".join(alphabet[c] for c in drawn)))

"""
Most of the time you need none of these loops. `stream` reads a prompt and yields each token as soon as it is made, so
that you can show it before the next is computed.
"""

prompt = "The "
print(prompt, end="")
for token in model.stream([alphabet.index(c) for c in prompt], max_new_tokens=2 * NEW, temperature=0.7, seed=0):
    print(alphabet[token], end="", flush=True)
print()

"""
## How long should a chunk be?

The numbers do not depend on it; the time does. Each call has a fixed cost, whatever it computes, and a chunk shares it
among its steps, until the steps themselves are what takes the time. What a chunk costs in return is delay: nothing
comes out before it is full.

For single steps there is `step`, which takes shortcuts that a call does not take.
"""

CHUNKS = (1, 4, 16, 64, 256, 1024)
READ = 1024


def seconds_per_token(run):
    run()  # whatever has to be compiled is compiled now
    start = time.perf_counter()
    run()
    return (time.perf_counter() - start) / READ


def step_by_step():
    state = model.initial_state(batch_size=1)
    for token in ops.convert_to_tensor(held_out_text[:READ, None]):
        logits, state = model.step(token, state)
    return ops.convert_to_numpy(logits)


times = []
for chunk in CHUNKS:
    times.append(
        seconds_per_token(lambda chunk=chunk: ops.convert_to_numpy(read(held_out_text[:READ], chunk=chunk)[0]))
    )
    print(f"chunks of {chunk:4}: {1e6 * times[-1]:7.0f} microseconds per character")
step_time = seconds_per_token(step_by_step)
print(f"step          : {1e6 * step_time:7.0f} microseconds per character")
keras_seq.plotting.curves(
    {"call with a chunk": (CHUNKS, times), "step": ([1], [step_time])},
    "characters in a chunk",
    "seconds per character",
    "the cost of a character, by the length of the chunk",
    log="xy",
    marker="o",
)

"""
## What can go wrong

- **The carried state does not help.** `shuffle` is on by default, and nothing warns: rows then go on where others
  ended. Set `shuffle=False`, and check the order of the rows as above.
- **`is stateful and carries the state of a batch of 32. Received a batch of 6`.** The last batch was smaller. Cut the
  data so that all batches are full; validation data too.
- **The first batches after a change of text are bad.** The state of the text before is still there. Call
  `reset_state()`, also between `fit`, `evaluate` and `predict`. It is not saved with the model: a loaded one begins
  empty.
- **Characters are read twice.** `fit(tokens)` makes the targets itself, by shifting; pieces that overlap by one token
  are right for that, and wrong for a carried state. With `stateful=True` give `fit(x, y)`, as above.
- **On PyTorch the memory grows with every step.** A state remembers how it was computed. In a loop without end, pass it
  through `keras.ops.stop_gradient`, as `read` does. `stream`, `generate` and `stateful=True` do so themselves.
- **`expects a state of shapes ...`.** A state has as many rows as the batch that it came from. For more listeners make
  one with more rows, or keep one state for each.
- **`Bidirectional` refuses to stream.** Its second half starts at the end of the sequence, which has not come yet. No
  state can help: use one direction for streams.
"""
