"""Layers made of layers: one after another, with a residual, time-wise, in both directions."""

import inspect

import keras

from keras_seq.base import SequenceLayer, call_layer, first_state

_MIX_TIME = (
    keras.layers.RNN,
    keras.layers.Bidirectional,
    keras.layers.ConvLSTM1D,
    keras.layers.Conv1D,
    keras.layers.Conv1DTranspose,
    keras.layers.DepthwiseConv1D,
    keras.layers.SeparableConv1D,
    keras.layers.AveragePooling1D,
    keras.layers.MaxPooling1D,
    keras.layers.GlobalAveragePooling1D,
    keras.layers.GlobalMaxPooling1D,
    keras.layers.Attention,
    keras.layers.AdditiveAttention,
    keras.layers.MultiHeadAttention,
    keras.layers.GroupQueryAttention,
    keras.layers.Cropping1D,
    keras.layers.UpSampling1D,
    keras.layers.ZeroPadding1D,
    keras.layers.Flatten,
    keras.layers.Permute,
    keras.layers.RepeatVector,
    keras.layers.Reshape,
)


@keras.saving.register_keras_serializable("keras_seq")
class TimeWise(SequenceLayer):
    """A Keras layer that acts on each time step alone, as a layer over time without memory: its state is `()`.

    `y_t = layer(x_t)`

    `Stack` and `Residual` wrap such layers themselves.

    Args:
        layer: for example `Dense`, `LayerNormalization`, `Dropout`, `Embedding`, `Activation`.
        **kwargs: `stateful` and those of `keras.layers.Layer`.

    Call: x `(b, t, ...)`, mask `(b, t)` bool -> whatever the layer gives, with the same b and t; the state is `()`.

    Raises: ValueError if the layer is a sequence layer, or one of Keras's that mix time steps (convolution, pooling,
    attention, RNN, reshaping), or if its output has another number of steps than its input.

    Example:

        layer = keras_seq.layers.TimeWise(keras.layers.Dense(4))
        y, state = layer(keras.ops.ones((2, 5, 3)), return_state=True)  # (2, 5, 4), ()
        y_t, state = layer.step(keras.ops.ones((2, 3)), state)  # (2, 4), ()
    """

    def __init__(self, layer, **kwargs):
        super().__init__(**kwargs)
        if not isinstance(layer, keras.layers.Layer) or isinstance(layer, (SequenceLayer, *_MIX_TIME)):
            raise ValueError(
                f"{self._title} takes a Keras layer that acts on each time step alone. Received: {layer!r}"
            )
        self.layer = layer
        self._takes = inspect.signature(layer.call).parameters.keys() & {"training", "mask"}

    def build(self, input_shape):
        _build(self.layer, input_shape)
        shape = self.compute_output_shape(tuple(input_shape))
        if len(shape) < 2 or shape[1] != input_shape[1]:
            raise ValueError(
                f"{self._title} takes a Keras layer that acts on each time step alone. {self.layer!r} makes "
                f"{tuple(shape)} of {tuple(input_shape)}."
            )

    def advance(self, x, state, mask=None, training=False):
        given = {"training": training, "mask": mask}
        return call_layer(self.layer, x, **{k: given[k] for k in self._takes}), state

    def compute_output_shape(self, input_shape):
        return tuple(self.layer.compute_output_shape(tuple(input_shape)))

    def compute_mask(self, inputs, mask=None):
        return mask if mask is not None else self.layer.compute_mask(inputs, None)


@keras.saving.register_keras_serializable("keras_seq")
class Stack(SequenceLayer):
    """Layers one after another.

    `h_0 = x`; `h_i, s'_i = layer_i(h_(i-1), s_i)` for i = 1 ... n; `y = h_n`

    Args:
        layers: a list of sequence layers, and of Keras layers that act on each time step alone (see `TimeWise`).
            All but the last must return sequences.
        **kwargs: `stateful` and those of `keras.layers.Layer`.

    Call: x `(b, t, ...)`, mask `(b, t)` bool -> what the last layer gives; the state is `(s_1, ..., s_n)`, the tuple of
    the layers' states, `()` for one without memory.

    Raises: ValueError if there are no layers, one of them cannot be wrapped, one that is not the last does not return
    sequences, or one has `stateful=True` or `return_state=True` of its own.

    Example:

        stack = keras_seq.layers.Stack([keras_seq.layers.LSTM(8, return_sequences=True), keras.layers.Dense(2)])
        y, state = stack(keras.ops.ones((2, 5, 3)), return_state=True)  # (2, 5, 2), ((h, c), ())
    """

    def __init__(self, layers, **kwargs):
        super().__init__(**kwargs)
        self.parts = [
            layer if isinstance(layer, SequenceLayer) else TimeWise(layer)
            for layer in (layers if isinstance(layers, list | tuple) else [layers])
        ]
        if not self.parts:
            raise ValueError(f"{self._title} needs at least one layer. Received: {layers!r}")
        for part in self.parts[:-1]:
            if not part.return_sequences:
                raise ValueError(
                    f"{self._title}: all but the last layer need return_sequences=True. Received: {part!r}"
                )
        for part in self.parts:
            for flag in ("stateful", "return_state"):
                if getattr(part, flag, False):
                    raise ValueError(
                        f"{self._title} holds the states of all its layers: give {flag}=True to it, not to {part!r}"
                    )
        if self.stateful:
            self._require_splittable("stateful=True")

    @property
    def return_sequences(self):  # type: ignore[override]
        return self.parts[-1].return_sequences

    @property
    def needs_future(self):
        return next((f"{part._title} inside: {part.needs_future}" for part in self.parts if part.needs_future), None)

    def build(self, input_shape):
        for part in self.parts:
            _build(part, input_shape)
            input_shape = part.compute_output_shape(input_shape)

    def initial_state(self, batch_size, max_length=None):
        return tuple(first_state(part, batch_size, max_length) for part in self.parts)

    def fresh_state(self, batch_size):
        return tuple(part.fresh_state(batch_size) for part in self.parts)

    def state_spec(self, batch_size):
        return tuple(part.state_spec(batch_size) for part in self.parts)

    def advance(self, x, state, mask=None, training=False):
        states = []
        for part, part_state in zip(self.parts, state, strict=True):
            given, mask = mask, part.compute_mask(x, mask)
            x, part_state = part.advance(x, part_state, mask=given, training=training)
            states.append(part_state)
        return x, tuple(states)

    def advance_one(self, x_t, state):
        states = []
        for part, part_state in zip(self.parts, state, strict=True):
            x_t, part_state = part.advance_one(x_t, part_state)
            states.append(part_state)
        return x_t, tuple(states)

    def compute_output_shape(self, input_shape):
        for part in self.parts:
            input_shape = part.compute_output_shape(input_shape)
        return input_shape

    def compute_mask(self, inputs, mask=None):
        for part in self.parts:
            mask = part.compute_mask(inputs, mask)
            inputs = None
        return mask


@keras.saving.register_keras_serializable("keras_seq")
class Residual(Stack):
    """Layers one after another, whose input is added to their output.

    `y = x + f(x)`, where f is the given layers one after another.

    Args:
        layers: one layer or a list, as in `Stack`; f keeps the shape of its input.
        **kwargs: `stateful` and those of `keras.layers.Layer`.

    Call: x `(b, t, ...)`, mask `(b, t)` bool -> y of the shape of x; the state is the tuple of the layers' states, as
    in `Stack`.

    Raises: ValueError as in `Stack`, and if f changes the shape or does not return sequences.

    Source: He et al. 2015, arXiv:1512.03385.

    Example:

        f = [keras.layers.LayerNormalization(), keras_seq.layers.GRU(4, return_sequences=True)]
        layer = keras_seq.layers.Residual(f)
        y, state = layer(keras.ops.ones((2, 5, 4)), return_state=True)  # (2, 5, 4), ((), h (2, 4))
    """

    def __init__(self, layers, **kwargs):
        super().__init__(layers, **kwargs)
        if not self.return_sequences:
            raise ValueError(f"{self._title}: all layers need return_sequences=True. Received: {self.parts[-1]!r}")

    def build(self, input_shape):
        super().build(input_shape)
        shape = super().compute_output_shape(tuple(input_shape))
        if tuple(shape) != tuple(input_shape):
            raise ValueError(f"{self._title} adds its layers' output to its input. They make {shape} of {input_shape}.")

    def advance(self, x, state, mask=None, training=False):
        y, state = super().advance(x, state, mask=mask, training=training)
        return x + y, state

    def advance_one(self, x_t, state):
        y, state = super().advance_one(x_t, state)
        return x_t + y, state


def _build(layer, input_shape):
    if not layer.built:
        layer.build(tuple(input_shape))
