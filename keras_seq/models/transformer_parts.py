"""What the Transformer models share."""

import contextlib

import keras
from keras import tree

from keras_seq import initializers
from keras_seq.layers import LearnedPositionalEncoding, RelativePositionBias, SinusoidalPositionalEncoding


def encoding(position, max_length, dtype, name="position"):
    """What is added to the embeddings: a layer for `"learned"` and `"sinusoidal"`, else None."""
    if position == "learned":
        initializer = initializers.RandomNormal(stddev=0.02)
        return LearnedPositionalEncoding(max_length, initializer, dtype=dtype, name=name)
    return SinusoidalPositionalEncoding(dtype=dtype, name=name) if position == "sinusoidal" else None


def within_blocks(position, num_heads, bidirectional, dtype, name="position_bias"):
    """The `position` of the blocks: None where positions are added to the embeddings, one bias for all with `"t5"`."""
    if position == "t5":
        return RelativePositionBias(num_heads, bidirectional=bidirectional, dtype=dtype, name=name)
    return None if position in ("learned", "sinusoidal") else position


def token_embedding(vocab_size, d_model, tied, stddev, dtype, name="embedding"):
    """Embeddings that also give logits."""
    return keras.layers.ReversibleEmbedding(
        vocab_size,
        d_model,
        tie_weights=tied,
        embeddings_initializer=initializers.RandomNormal(stddev=stddev),
        reverse_dtype=dtype.compute_dtype,
        dtype=dtype,
        name=name,
    )


def check_sizes(d_model, num_heads, head_dim, **counts):
    """Raises ValueError for sizes that no Transformer has."""
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"`{name}` must be a positive integer. Received: {name}={count!r}")
    if head_dim is None and d_model % num_heads:
        raise ValueError(
            f"`num_heads` must divide d_model={d_model}, or head_dim be given. Received: num_heads={num_heads}"
        )


def checkpointed(block, function):
    """`function(*tensors)`, which runs `block`, with what is inside it computed anew in the backward pass.

    Dropout draws its seeds once, before: the second time it drops the same.
    """
    drops = [layer for layer in block._flatten_layers() if isinstance(layer, keras.layers.Dropout) and layer.rate]

    def run(*tensors):
        seeds = [drop.seed_generator.next() for drop in drops]

        def again(*leaves):
            seeds, tensors = tree.pack_sequence_as(structure, leaves)
            with _drawing(drops, seeds):
                return function(*tensors)

        structure = (seeds, tensors)
        return keras.remat(again)(*tree.flatten(structure))

    return run


@contextlib.contextmanager
def _drawing(drops, seeds):
    """Inside, the dropout layers draw from these seeds, not from their generators."""
    generators = [drop.seed_generator for drop in drops]
    try:
        for drop, seed in zip(drops, seeds, strict=True):
            object.__setattr__(drop, "seed_generator", _Drawn(seed))  # not as a part of the layer
        yield
    finally:
        for drop, generator in zip(drops, generators, strict=True):
            object.__setattr__(drop, "seed_generator", generator)


class _Drawn(keras.random.SeedGenerator):
    """A generator of seeds without a state of its own: what it gives follows from one seed."""

    def __init__(self, seed):
        self._initial_seed, self.seed_state, self.count = 0, seed, 0

    def next(self, ordered=True):
        self.count += 1
        # The second number counts calls, and PyTorch adds both: far from what the next call counts.
        return self.seed_state + keras.ops.cast([(self.count * 0x1234567) % 2**31, 0], self.seed_state.dtype)
