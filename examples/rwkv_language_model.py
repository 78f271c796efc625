"""Train a small RWKV-7 on real text, against an LSTM and a Transformer of its size, and see what a long context costs.

The text is the documentation of the Python language that comes with Python itself (`pydoc_data.topics`): nothing is
downloaded. Each model reads a character and predicts the next one, and is trained for the same time. RWKV is trained on
all characters of a piece at once, as the Transformer is. When it writes it has a state of constant size, as the LSTM
has: a Transformer keeps keys and values of every character so far, and looks at all of them at each step.

    KERAS_BACKEND=jax python examples/rwkv_language_model.py                    # or torch, or tensorflow
    KERAS_BACKEND=jax python examples/rwkv_language_model.py --minutes 10       # to run longer: fewer bits
"""

import argparse
import dataclasses
import pathlib
import time

import keras
import numpy as np
from shared import TimeBudget, bits_per_character, python_documentation, save, windows

from keras_seq.models import RWKV, RecurrentLM, TransformerLM, rwkv_optimizer
from keras_seq.plotting import curves

MODELS = ("RWKV-7", "LSTM", "Transformer")
LENGTH, BATCH = 128, 8
STEPS = 64  # that are timed at each context


def build(name, vocab_size, size, layers=3):
    """A model, ready for `fit`. The layers of RWKV and of the Transformer have as many weights as one wide LSTM."""
    if name == "RWKV-7":
        model = RWKV(vocab_size, size, layers, head_dim=32, pad_id=None)
        model.compile(rwkv_optimizer(model, 5e-3, clipnorm=1.0))
    elif name == "LSTM":
        model = RecurrentLM(vocab_size, int(1.3 * size * layers**0.5), cell="lstm", pad_id=None)
        model.compile(keras.optimizers.Adam(5e-3, clipnorm=1.0))
    else:
        shape = {"d_model": size, "num_layers": layers, "num_heads": size // 32, "hidden_dim": 5 * size}
        model = TransformerLM(vocab_size, **shape, position="rotary", pad_id=None)
        model.compile(keras.optimizers.Adam(1e-3, clipnorm=1.0))
    return model


@dataclasses.dataclass
class Result:
    """What is measured of a model."""

    parameters: int
    bits: float  # per character of held-out text
    speed: float  # characters per second in training
    bytes: list  # of the state, at each context
    steps: list  # seconds of a step there


def train(model, pieces, minutes):
    """Trains for so long, compilation not counted; returns the characters per second."""
    budget = TimeBudget(60 * minutes, compilation=False)
    whole = len(pieces) // BATCH * BATCH  # a smaller batch at the end would be compiled, too
    model.fit(pieces[:whole], batch_size=BATCH, epochs=1000, verbose=2, callbacks=[budget])
    return budget.batches * BATCH * LENGTH / budget.elapsed


def bytes_of(state):
    return sum(keras.ops.convert_to_numpy(leaf).nbytes for leaf in keras.tree.flatten(state))


def seconds_of_step(model, context):
    """The time to write one more character after `context`: the median of several."""
    stream = model.stream(context, STEPS)
    next(stream), next(stream)  # the first reads the context, the second may compile
    times = [time.perf_counter()]
    for _ in stream:
        times.append(time.perf_counter())
    return float(np.median(np.diff(times)))


def write(model, alphabet, prompt, characters):
    """Shows a text while the model writes it, and the bytes of its state before the first character and at the end."""
    tokens = [alphabet.index(c) for c in prompt]
    print(prompt, end="")
    for token in model.stream(tokens, characters, temperature=0.7, seed=0):
        print(alphabet[token], end="", flush=True)
        tokens.append(token)
    before, (_, after) = model.initial_state(1), model(np.array([tokens]), return_state=True)
    print(f"\n\nits state: {bytes_of(before):,} bytes at first, {bytes_of(after):,} after {len(tokens)} characters")


def plot(results, contexts, folder):
    """Saves pictures of the bytes of the state and of the time of a step against the context length; their paths."""
    sizes = {name: result.bytes for name, result in results.items()}
    times = {name: [1000 * seconds for seconds in result.steps] for name, result in results.items()}
    paths = []
    for what, lines, unit, title in (
        ("state", sizes, "bytes", "size of the state"),
        ("step", times, "milliseconds", "time to write one character"),
    ):
        figure = curves(lines, "context in characters", unit, title, x=contexts, log="xy", marker="o")
        paths.append(folder / f"rwkv_language_model_{what}.png")
        save(figure, paths[-1])
    return paths


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=1.75, help="to train each model (default: %(default)s)")
    parser.add_argument("--size", type=int, default=128, help="of RWKV, a multiple of 32 (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=3, help="of RWKV and Transformer (default: %(default)s)")
    parser.add_argument("--characters", type=int, default=None, help="how much of the text to use (default: all)")
    parser.add_argument("--contexts", type=int, nargs="+", default=[1024, 4096, 16384], help="(default: %(default)s)")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out"), help="where the pictures go")
    options = parser.parse_args(argv)

    alphabet, training, held_out = python_documentation(options.characters)
    print(f"{len(training):,} characters to train on, {len(alphabet)} different; backend: {keras.config.backend()}")

    models, results = {}, {}
    for name in MODELS:
        keras.utils.set_random_seed(0)
        model = models[name] = build(name, len(alphabet), options.size, options.layers)
        print(f"\n{name}:")
        speed = train(model, windows(training, LENGTH), options.minutes)
        bits = bits_per_character(model, windows(held_out, LENGTH))
        sizes = [bytes_of(model.initial_state(1, max_length=context)) for context in options.contexts]
        steps = [seconds_of_step(model, np.resize(held_out, context - STEPS)) for context in options.contexts]
        results[name] = Result(model.count_params(), bits, speed, sizes, steps)

    print("\nbits per character of held-out text; characters per second in training;")
    print("bytes of the state, and characters written per second, at a context of so many characters:\n")
    heads = "".join(f"{context:>25,}" for context in options.contexts)
    print(f"{'':12}{'parameters':>12}{'bits':>8}{'trained/s':>11}{heads}")
    for name, result in results.items():
        costs = (f"{size:,} B {1 / step:,.0f}/s" for size, step in zip(result.bytes, result.steps, strict=True))
        row = f"{name:12}{result.parameters:12,}{result.bits:8.2f}{result.speed:11,.0f}"
        print(row + "".join(f"{cost:>25}" for cost in costs))

    state, step = plot(results, options.contexts, options.out)
    print(f"\nas pictures: the state in {state}, the time of a step in {step}\n\nRWKV-7 writes:\n")
    write(models["RWKV-7"], alphabet, "The ", 300)
    print("To run longer, for fewer bits: python examples/rwkv_language_model.py --minutes 10")
    return results


if __name__ == "__main__":
    main()
