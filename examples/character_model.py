"""Train a character model on real text, then watch it write.

The text is the documentation of the Python language that comes with Python itself (`pydoc_data.topics`, about 465,000
characters): nothing is downloaded. Nine tenths are for training; on the last tenth the model is tested. A recurrent
language model reads a character and predicts the next one; what counts is how many bits it needs per character (a text
of 100 equally likely characters needs 6.6).

    KERAS_BACKEND=jax python examples/character_model.py                    # or torch, or tensorflow
    KERAS_BACKEND=jax python examples/character_model.py --minutes 20       # to run longer: better text
"""

import argparse
import math
import pathlib

import keras
import numpy as np
from shared import TimeBudget, bits_per_character, python_documentation, save, windows

import keras_seq


def learning_curve(history, before):
    """The training loss of each epoch, and the held-out loss after it, in bits per character."""
    training, held_out = (np.array(history[name]) / math.log(2) for name in ("loss", "val_loss"))
    lines = {"training text": training, "held-out text": (np.arange(len(held_out) + 1), [before, *held_out])}
    title = "RecurrentLM on the Python documentation"
    return keras_seq.plotting.curves(lines, "epoch", "bits per character", title)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=2.25, help="time for training (default: %(default)s)")
    parser.add_argument("--units", type=int, default=256, help="size of the LSTM (default: %(default)s)")
    parser.add_argument("--characters", type=int, default=None, help="how much of the text to use (default: all)")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out"), help="where the plot goes")
    options = parser.parse_args(argv)

    keras.utils.set_random_seed(0)
    alphabet, training, held_out = python_documentation(options.characters)
    print(f"{len(training):,} characters to train on, {len(alphabet)} different; backend: {keras.config.backend()}")
    training, held_out = windows(training, 128), windows(held_out, 512)

    model = keras_seq.models.RecurrentLM(len(alphabet), options.units, cell="lstm", pad_id=None)
    model.compile(keras.optimizers.Adam(5e-3, clipnorm=1.0))
    before = bits_per_character(model, held_out)
    print(f"held-out text before training: {before:.2f} bits per character")

    history = model.fit(
        training,
        validation_data=(held_out,),
        batch_size=32,
        epochs=1000,
        callbacks=[TimeBudget(60 * options.minutes, compilation=False)],
    ).history
    after = bits_per_character(model, held_out)
    print(f"held-out text before training: {before:.2f} bits per character; after: {after:.2f}")

    save(learning_curve(history, before), options.out / "learning_curve.png")
    print(f"learning curve: {options.out / 'learning_curve.png'}\n\nThe model writes:\n")
    prompt = "The "
    print(prompt, end="")
    for token in model.stream([alphabet.index(c) for c in prompt], 300, temperature=0.7, seed=0):
        print(alphabet[token], end="", flush=True)
    print("\n\nTo run longer, for a better text: python examples/character_model.py --minutes 20")
    return before, after


if __name__ == "__main__":
    main()
