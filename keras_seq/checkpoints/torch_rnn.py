"""Weights of `torch.nn.RNN`, `LSTM` and `GRU`: from their state dicts, and back.

Per layer and direction torch has `weight_ih` `(gates u, d)`, `weight_hh` `(gates u, u)`, `bias_ih` and `bias_hh`
`(gates u,)`; the names end in `_l0`, `_l0_reverse`, `_l1`, ... Here the matrices are transposed. The gates of LSTM have
the same order i, f, g, o; those of GRU are r, z, n there and z, r, n here. SimpleRNN and LSTM have one bias, the sum of
torch's two; on the way back `bias_hh` is 0. GRU keeps both.

A state dict holds weights only: the activation (tanh or relu in torch's RNN), dropout, `merge_mode` and `go_backwards`
are what the layer says.

Source: pytorch `torch/nn/modules/rnn.py`.
"""

import re
from collections.abc import Mapping

import numpy as np

from keras_seq.checkpoints.errors import CheckpointError
from keras_seq.layers import GRU, LSTM, Bidirectional, Residual, SimpleRNN, Stack, TimeWise


def load_torch_rnn(layer, state_dict, prefix=""):
    """Sets the weights of `layer` to those of a torch module, after everything has been checked.

    Args:
        layer: `SimpleRNN`, `LSTM`, `GRU`, `Bidirectional` of one of them, or a `Stack` of these, one per torch layer.
            Time-wise layers in the stack, such as `Dropout`, are passed over. A layer that is not built is built for
            inputs `(None, None, input_size)`.
        state_dict: `{name: array}`; tensors of torch, or whatever NumPy makes an array of.
        prefix: how the names begin, as in `"encoder.rnn."`. Names that begin otherwise are passed over.

    Raises:
        CheckpointError: a name is missing or left over (`weight_hr_l0` among them: there is no `proj_size`), an array
            has another shape than expected, or torch.nn has no module like the layer (GRU with `reset_after=False`,
            `Residual`, a stack of unlike layers).

    Example:

        layer = keras_seq.layers.Bidirectional(keras_seq.layers.LSTM(8, return_sequences=True))
        load_torch_rnn(layer, torch.nn.LSTM(5, 8, bidirectional=True).state_dict())
    """
    arrays, directions = _arrays(state_dict, prefix), _directions(layer)
    first = directions["l0"]
    *_, input_size = first.kernel.shape[:1] if first.built else (None, *np.shape(arrays.get("weight_ih_l0")))
    _check(f"Weights under {prefix!r} for {layer!r}", arrays, _torch_shapes(directions, input_size))
    if not layer.built:
        layer.build((None, None, input_size))
    to_torch_rnn(layer)  # raises if torch has nothing like it
    for end, one in directions.items():
        one.kernel.assign(_swap(one, arrays[f"weight_ih_{end}"].T))
        one.recurrent_kernel.assign(_swap(one, arrays[f"weight_hh_{end}"].T))
        if one.use_bias:
            biases = np.stack([arrays[f"bias_ih_{end}"], arrays[f"bias_hh_{end}"]])
            one.bias.assign(_swap(one, biases) if isinstance(one, GRU) else biases.sum(0))


def to_torch_rnn(layer, prefix=""):
    """The state dict of the torch module that is like `layer`.

    Args:
        layer: as in `load_torch_rnn`, built.
        prefix: how the names shall begin.

    Returns:
        `{name: array}`: NumPy copies, float32 (float64 for a float64 layer). `torch.from_numpy` makes of them what
        `load_state_dict` takes.

    Raises:
        CheckpointError: the layer is not built, or torch.nn has no module like it.
    """
    directions = _directions(layer)
    arrays: dict = {}
    for end, one in directions.items():
        if not one.built:
            raise CheckpointError(f"Expected a built layer, which has weights. Received: {one!r}")
        kernel, recurrent_kernel, *bias = (_swap(one, _array(w.name, w.value)) for w in one.weights)
        arrays |= {f"weight_ih_{end}": kernel.T, f"weight_hh_{end}": recurrent_kernel.T}
        for b in bias:
            b_ih, b_hh = b if isinstance(one, GRU) else (b, np.zeros_like(b))
            arrays |= {f"bias_ih_{end}": b_ih, f"bias_hh_{end}": b_hh}
    first = directions["l0"]
    _check(f"{layer!r} as one module of torch.nn", arrays, _torch_shapes(directions, first.kernel.shape[0]))
    return {prefix + name: np.array(array, first.state_dtype, order="C") for name, array in arrays.items()}


def from_torch_rnn(state_dict, prefix="", return_sequences=True, **kwargs):
    """The layer that a state dict describes, built and with its weights; a `Stack` if torch has several layers.

    Args:
        state_dict, prefix: as in `load_torch_rnn`.
        return_sequences: whether the (last) layer returns all outputs or only the last.
        **kwargs: for every recurrent layer: `dtype`, `activation`, `dropout`, ...

    Raises:
        CheckpointError: as in `load_torch_rnn`.
    """
    arrays = _arrays(state_dict, prefix)
    rows, units = shape if len(shape := np.shape(arrays.get("weight_hh_l0"))) == 2 else (1, 0)
    kind = next((one for one in (SimpleRNN, GRU, LSTM) if rows == one.gates * units), None)
    if kind is None:
        raise CheckpointError(
            f"Expected weight_hh_l0 (gates * units, units) under {prefix!r}, with 1 (RNN), 3 (GRU) or 4 (LSTM) gates. "
            f"Received: {_some(f'{name} {array.shape}' for name, array in arrays.items())}"
        )
    use_bias, bidirectional = (any(part in name for name in arrays) for part in ("bias_", "_reverse"))
    num_layers = sum(re.fullmatch(r"weight_hh_l\d+", name) is not None for name in arrays)
    layers = []
    for i in range(num_layers):
        sequences = return_sequences or i < num_layers - 1
        one = kind(units, use_bias=use_bias, return_sequences=sequences, **kwargs)
        layers.append(Bidirectional(one, dtype=one.dtype_policy) if bidirectional else one)
    layer = Stack(layers, dtype=layers[0].dtype_policy) if num_layers > 1 else layers[0]
    load_torch_rnn(layer, state_dict, prefix)
    return layer


def _directions(layer):
    """`{"l0": layer, "l0_reverse": layer, "l1": ...}`: the one-way layers inside, by the ends of torch's names."""
    directions = {}
    for i, level in enumerate(_levels(layer)):
        both = isinstance(level, Bidirectional)
        ways = {"": level.forward_layer, "_reverse": level.backward_layer} if both else {"": level}
        for end, one in ways.items():
            if not isinstance(one, SimpleRNN | LSTM | GRU):
                raise CheckpointError(f"Expected SimpleRNN, LSTM, GRU, Bidirectional, Stack. Received: {one!r}")
            if isinstance(one, GRU) and not one.reset_after:
                raise CheckpointError(f"Expected reset_after=True, as torch's GRU is. Received: False in {one!r}")
            directions[f"l{i}{end}"] = one
    if not directions:
        raise CheckpointError(f"Expected a recurrent layer in the stack. Received: {layer!r}")
    return directions


def _levels(layer):
    if isinstance(layer, Stack) and not isinstance(layer, Residual):
        return [level for part in layer.parts for level in _levels(part)]
    return [] if isinstance(layer, TimeWise) else [layer]


def _torch_shapes(directions, input_size):
    """`{name: shape}` of the torch module whose first layer is the first of `directions`, and the others like it."""
    first, ends = directions["l0"], ("", "_reverse") if "l0_reverse" in directions else ("",)
    rows = first.gates * first.units
    shapes: dict = {}
    for i in range(sum(not end.endswith("_reverse") for end in directions)):
        for end in ends:
            d = first.units * len(ends) if i else input_size
            shapes |= {f"weight_ih_l{i}{end}": (rows, d), f"weight_hh_l{i}{end}": (rows, first.units)}
            shapes |= {f"bias_{part}_l{i}{end}": (rows,) for part in ("ih", "hh") if first.use_bias}
    return shapes


def _check(what, arrays, shapes):
    """All of `arrays` have the given shapes, and there are no others."""
    received = {name: array.shape for name, array in arrays.items()}
    wrong = [name for name in received | shapes if received.get(name) != shapes.get(name)]
    if wrong:
        differences = (f"{n} {shapes.get(n, 'absent')} (received: {received.get(n, 'absent')})" for n in wrong)
        raise CheckpointError(f"{what}: expected {_some(differences)}")


def _some(phrases, most=8):
    """The first few, so that the names of a whole model do not drown the message."""
    phrases = list(phrases)
    return ", ".join(phrases[:most]) + (f", and {len(phrases) - most} more" if len(phrases) > most else "")


def _arrays(state_dict, prefix):
    """The arrays whose names begin with `prefix`, by the rest of their names, in float64."""
    if not isinstance(state_dict, Mapping):
        raise CheckpointError(f"Expected a state dict, from names to arrays. Received: {type(state_dict)}")
    return {n.removeprefix(prefix): _array(n, a) for n, a in state_dict.items() if n.startswith(prefix)}


def _array(name, value):
    if hasattr(value, "detach"):
        value = value.detach().cpu().double().numpy()  # NumPy has no bfloat16
    try:
        return np.asarray(value, "float64")
    except (TypeError, ValueError):
        raise CheckpointError(f"Expected an array of numbers as {name}. Received: {value!r}") from None


def _swap(layer, w):
    """The gates of a GRU along the last axis: r, z, n <-> z, r, n. Those of other layers stay."""
    if not isinstance(layer, GRU):
        return w
    a, b, n = np.split(w, 3, axis=-1)
    return np.concatenate([b, a, n], axis=-1)
