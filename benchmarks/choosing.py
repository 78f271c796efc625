"""What does a layer over time cost as sequences grow? Recurrent layers, attention and RWKV of one width.

    KERAS_BACKEND=torch python benchmarks/choosing.py [--quick] [--only NAME] [--json FILE]

On one thread of one core. `ratio` is the time of a layer divided by that of `LSTM`, in the same round, median over
rounds; "LSTM, again" shows the noise. `--quick` runs tiny shapes, to see that everything works: its numbers mean
nothing.

Rows: `training` a whole sequence of one row, forward and backward, with the gradients of all weights; `step` the next
step after so many, compiled on JAX and TensorFlow, as a model is that generates; `state` the bytes that are kept for
this. TensorFlow is compiled with XLA.
"""

import argparse

import timing

if __name__ == "__main__":
    timing.one_thread()  # before a framework is imported

import keras
from gradients import differentiated, normal
from keras import ops, tree

from keras_seq import backend, layers

BACKEND = keras.config.backend()
COMPILED = {"xla": True} if BACKEND == "tensorflow" else {}
HEADS, SIZE = 4, 64
LENGTHS = (256, 1024, 4096)

LAYERS = {
    "LSTM": lambda width: layers.LSTM(width, return_sequences=True),
    "GRU": lambda width: layers.GRU(width, return_sequences=True),
    "SimpleRNN": lambda width: layers.SimpleRNN(width, return_sequences=True),
    "MultiHeadAttention": lambda width: layers.MultiHeadAttention(HEADS, width // HEADS, causal=True),
    "RWKV7TimeMixing": lambda width: layers.RWKV7TimeMixing(width // HEADS),
}


def made(width):
    """The layers, built, with weights that are not 0."""
    built = {name: make(width) for name, make in LAYERS.items()}
    for layer in built.values():
        layer.build((None, None, width))
        layer.built = True
        layer.set_weights([w + 0.02 * normal(*w.shape, seed=i) for i, w in enumerate(layer.get_weights())])
    return built


def training(length, width, **options):
    x, projection = normal(1, length, width), normal(1, length, width, seed=1)
    runs = {}
    for name, layer in made(width).items():

        def whole(x, mask, layer=layer):
            return layer(x, training=True)

        runs[name] = differentiated(whole, [x], None, projection, layer, **COMPILED).run
    samples, notes = timing.measure(runs, **options)
    return [timing.lines(f"training, {length} steps", samples, notes=notes)]


def steps(length, width, **options):
    x, runs, sizes = ops.convert_to_tensor(normal(1, length, width)), {}, {}
    for name, layer in made(width).items():
        state = layer.initial_state(1, max_length=length) if name == "MultiHeadAttention" else layer.initial_state(1)
        _, state = layer(x[:, :-1], initial_state=state, return_state=True)
        step = backend.current().compiled(layer.stepper(1, 64), layer, **COMPILED)
        x_t = x[:, -1]

        def run(step=step, x_t=x_t, state=state):
            return ops.convert_to_numpy(step(x_t, state)[0])

        runs[name] = run
        sizes[name] = [sum(ops.convert_to_numpy(leaf).nbytes for leaf in tree.flatten(state))]
    samples, notes = timing.measure(runs, **options)
    return [
        timing.lines(f"step after {length - 1}", samples, notes=notes),
        timing.lines(f"state after {length - 1}", sizes, unit="bytes"),
    ]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny shapes")
    parser.add_argument("--only", metavar="NAME", default="", help="training or step")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args(argv)
    options = {"rounds": 2, "per_round": 0.001} if args.quick else {"rounds": 5, "budget": 10.0}
    lengths, width = ((16, 32), 16) if args.quick else (LENGTHS, HEADS * SIZE)
    results = []
    timing.show()
    for kind, work in {"training": training, "step": steps}.items():
        for length in lengths if args.only in kind else ():
            for lines in work(length, width, **options):
                timing.show(lines)
                results += lines
    if args.json:
        timing.save(args.json, results, backend=BACKEND, versions=timing.versions("keras_seq", "keras", BACKEND))
    return results


if __name__ == "__main__":
    main()
