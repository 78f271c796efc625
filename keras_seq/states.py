"""States of sequence layers, outside of them: in files, and between one another."""

import json

import numpy as np
from keras import ops, tree

from keras_seq.checkpoints import CheckpointError
from keras_seq.checkpoints.safetensors import read_safetensors, write_safetensors


def save(path, state):
    """Saves a state: what a sequence layer returned, or `initial_state` made.

    Args:
        path: a file `*.safetensors`. It appears, or is replaced, once all is written.
        state: any nest of tuples, lists and dicts, from strings, of tensors. A named tuple is saved as a tuple, and
            bfloat16 as float32: layers cast what they get.

    Example:

        model = keras_seq.models.RWKV(50, d_model=32, num_layers=2, head_dim=16, pad_id=None)
        _, state = model(np.array([[3, 1, 4]]), return_state=True)
        keras_seq.states.save("after_the_prompt.safetensors", state)
        logits = model(np.array([[1]]), initial_state=keras_seq.states.load("after_the_prompt.safetensors"))
    """
    leaves = [ops.convert_to_numpy(leaf) for leaf in tree.flatten(state)]
    structure = json.dumps(_described(state, iter(range(len(leaves)))))
    arrays = {"structure": np.frombuffer(structure.encode(), "uint8")}
    write_safetensors(path, arrays | {str(i): leaf for i, leaf in enumerate(leaves)})


def load(path):
    """The state that `save` put into a file, as tensors.

    A layer that gets it as its `initial_state` checks that it fits.

    Args:
        path: the file.

    Raises:
        CheckpointError: the file is damaged, or holds no state.
        FileNotFoundError: there is no such file.

    Example:

        keras_seq.states.save("zeros.safetensors", keras_seq.layers.LSTM(4).initial_state(2))
        h, c = keras_seq.states.load("zeros.safetensors")
    """
    arrays = read_safetensors(path)
    try:
        return _restored(json.loads(arrays["structure"].tobytes()), arrays)
    except (AttributeError, KeyError, ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: expected a state saved by `keras_seq.states.save`. Received: {error!r}"
        ) from None


def interpolate(a, b, weight):
    """A state between two: `(1 - weight) a + weight b`, in every floating-point part; the others are those of a.

    Args:
        a, b: states of the same structure and shapes.
        weight: 0 for a, 1 for b; beyond them it extrapolates.

    Raises: ValueError if structure or shapes differ.

    Example:

        layer = keras_seq.layers.GRU(4)
        _, a = layer(np.ones((2, 5, 3)), return_state=True)
        _, b = layer(np.zeros((2, 5, 3)), return_state=True)
        between = keras_seq.states.interpolate(a, b, 0.5)
    """
    shapes = [tree.map_structure(lambda x: tuple(x.shape), state) for state in (a, b)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"Expected two states of the same structure and shapes. Received: {shapes[0]} and {shapes[1]}")

    def between(x, y):
        x, y = ops.convert_to_tensor(x), ops.convert_to_tensor(y)
        return (1 - weight) * x + weight * y if "float" in str(x.dtype) else x

    return tree.map_structure(between, a, b)


def _described(state, numbers):
    """A nest with the number of each leaf in its place, in what JSON can say."""
    if isinstance(state, dict):
        # In the order in which `tree.flatten` takes them.
        return {"dict": {key: _described(state[key], numbers) for key in sorted(state)}}
    if isinstance(state, list | tuple):
        return {"list" if isinstance(state, list) else "tuple": [_described(part, numbers) for part in state]}
    return next(numbers)


def _restored(described, arrays):
    if isinstance(described, int):
        return ops.convert_to_tensor(arrays[str(described)])
    ((kind, parts),) = described.items()
    if kind == "dict":
        return {key: _restored(part, arrays) for key, part in parts.items()}
    return {"list": list, "tuple": tuple}[kind](_restored(part, arrays) for part in parts)
