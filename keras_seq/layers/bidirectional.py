"""A recurrent layer in both directions."""

import keras
from keras import ops, tree

from keras_seq.base import SequenceLayer
from keras_seq.layers.recurrent import Recurrent

_MERGE = {
    "concat": lambda a, b: ops.concatenate([a, b], axis=-1),
    "sum": lambda a, b: a + b,
    "ave": lambda a, b: (a + b) / 2,
    "mul": lambda a, b: a * b,
    None: lambda a, b: (a, b),
}


@keras.saving.register_keras_serializable("keras_seq")
class Bidirectional(SequenceLayer):
    """Runs one recurrent layer forwards and a second one backwards, and merges their outputs.

    `y_t = merge(forward(x_1 .. x_t), backward(x_n .. x_t))`

    Args:
        layer: a recurrent layer of this library: `SimpleRNN`, `LSTM`, `GRU`, `RNN`. Both directions are made anew from
            its config.
        merge_mode: "concat" (default), "sum", "ave", "mul", or None for the pair of outputs.
        weights: initial weights, forward then backward, as `get_weights` gives them.
        backward_layer: the second layer, if it is not to be like the first; needs `go_backwards=True`.
        **kwargs: those of `keras.layers.Layer`.

    Call: x `(b, t, d)`, mask `(b, t)` bool -> y `(b, t, 2 units)` with `return_sequences=True`, else `(b, 2 units)`
    (with "sum", "ave" and "mul" units, with None a pair of these); outputs of padded steps are 0, as in Keras.
    `initial_state` is the pair of the states at which the two directions start (or Keras's flat list of them). With
    `return_state=True` in the wrapped layer the result is `(y, *forward_state, *backward_state)`.

    Raises: ValueError from `step`, `return_state=True` at the call, and `stateful=True`, because the backward direction
    starts at the end of the sequence; if `layer` is no recurrent layer, the two do not match, or the merge mode is
    unknown.

    Source: Schuster & Paliwal 1997.

    Example:

        x = keras.ops.ones((2, 5, 3))
        y = keras_seq.layers.Bidirectional(keras_seq.layers.LSTM(8, return_sequences=True))(x)  # (2, 5, 16)
        layer = keras_seq.layers.Bidirectional(keras_seq.layers.GRU(8, return_state=True), merge_mode="sum")
        y, forward_h, backward_h = layer(x)  # (2, 8), (2, 8), (2, 8)
    """

    needs_future = "its backward direction starts at the end of the sequence"

    def __init__(self, layer, merge_mode="concat", weights=None, backward_layer=None, **kwargs):
        super().__init__(**kwargs)
        for role, one in (("layer", layer), ("backward_layer", backward_layer)):
            if not isinstance(one, Recurrent) and (role == "layer" or one is not None):
                raise ValueError(f"`{role}` must be a recurrent layer of keras_seq. Received: {one!r}")
        if merge_mode not in _MERGE:
            raise ValueError(f"`merge_mode` must be one of {list(_MERGE)}. Received: {merge_mode!r}")
        if self.stateful or layer.stateful:
            raise ValueError(f"{self._title} does not take stateful=True: {self.needs_future}.")
        self.forward_layer = _copy(layer, f"forward_{layer.name.removeprefix('forward_')}")
        self.backward_layer = backward_layer or _copy(
            layer, f"backward_{layer.name.removeprefix('backward_')}", go_backwards=not layer.go_backwards
        )
        for name in ("return_sequences", "return_state"):
            ours, theirs = getattr(self.forward_layer, name), getattr(self.backward_layer, name)
            if ours != theirs:
                raise ValueError(f"Both directions need the same {name}. Received: {ours} and {theirs}")
        if self.forward_layer.go_backwards or not self.backward_layer.go_backwards:
            raise ValueError(
                "The forward layer needs go_backwards=False and the backward layer go_backwards=True. Received: "
                f"{self.forward_layer.go_backwards} and {self.backward_layer.go_backwards}"
            )
        self.merge_mode = merge_mode
        self.return_sequences = layer.return_sequences
        self.return_state = layer.return_state
        self._given_weights = weights
        for one in (self.forward_layer, self.backward_layer):
            one.zero_output_for_mask = self.return_sequences

    def build(self, input_shape):
        for one in (self.forward_layer, self.backward_layer):
            if not one.built:
                one.build(tuple(input_shape))
        if self._given_weights is not None:
            self.set_weights(self._given_weights)

    def initial_state(self, batch_size, max_length=None):
        return self.forward_layer.initial_state(batch_size), self.backward_layer.initial_state(batch_size)

    def call(self, x, mask=None, initial_state=None, return_state=False, training=None):
        if return_state or not self.return_state:
            return super().call(x, mask, initial_state, return_state, training)
        y, state = self._run(x, mask, initial_state, True, training)
        return (*(y if self.merge_mode is None else (y,)), *tree.flatten(state))

    def advance(self, x, state, mask=None, training=False):
        forward, forward_state = self.forward_layer.advance(x, state[0], mask, training)
        backward, backward_state = self.backward_layer.advance(x, state[1], mask, training)
        if self.return_sequences:
            backward = ops.flip(backward, axis=1)
        return _MERGE[self.merge_mode](forward, backward), (forward_state, backward_state)

    def compute_output_shape(self, input_shape):
        shape = tuple(self.forward_layer.compute_output_shape(input_shape))
        if self.merge_mode is None:
            return shape, shape
        return (*shape[:-1], 2 * shape[-1]) if self.merge_mode == "concat" else shape

    def compute_mask(self, inputs, mask=None):
        mask = super().compute_mask(inputs, mask)
        outputs = 2 if self.merge_mode is None else 1
        states = len(tree.flatten(self.initial_state(1))) if self.return_state else 0
        return mask if outputs + states == 1 else [mask] * outputs + [None] * states

    def _state_before(self, x, given, wanted):
        flat = isinstance(given, list | tuple) and not any(isinstance(s, list | tuple) for s in given)
        form = self.initial_state(1)
        if flat and len(given) == len(tree.flatten(form)):  # Keras's list
            given = tree.pack_sequence_as(form, list(given))
        return super()._state_before(x, given, wanted)


def _copy(layer, name, **changes):
    return type(layer).from_config(layer.get_config() | {"name": name} | changes)
