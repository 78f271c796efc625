"""Simple, LSTM and GRU layers: Keras's arguments and weights, the splitting law, the fastest kernel at hand."""

import keras
from keras import activations, ops, tree
from keras.src.backend.common.stateless_scope import in_stateless_scope

from keras_seq import ops as seq_ops
from keras_seq.base import SequenceLayer, cast, random_seed
from keras_seq.layers.gates import GateWeights


def arguments(scope, *own):
    """What the constructor with these local variables hands on: all but its `own` arguments."""
    left_out = {"self", "__class__", "kwargs", *own}
    return {k: v for k, v in scope.items() if k not in left_out} | scope["kwargs"]


def _values(variables):
    """`v.value` of each, or None for None. The property asks for scopes anew each time, which counts in a step."""
    if in_stateless_scope():
        return [None if v is None else v.value for v in variables]
    return [None if v is None else v._value for v in variables]


class Recurrent(SequenceLayer):
    """What all recurrent layers share: the options about time, with Keras's names and defaults.

    Args:
        return_sequences: if False, y is the last output `(b, units)`; else all outputs `(b, t, units)`.
        return_state: if True, a call without `return_state` returns `(y, *states)` as in Keras.
        go_backwards: reads the sequence from its end; outputs are in the order in which they were computed.
        zero_output_for_mask: if True, the output of a padded step is 0; else it is the last valid output, that is h.
        unroll: accepted for Keras; how the loop runs is the kernel's business and changes no result.
        **kwargs: `stateful` and those of `keras.layers.Layer`.

    A subclass writes `recur`, `initial_state` and `output_size`.
    """

    def __init__(
        self,
        return_sequences=False,
        return_state=False,
        go_backwards=False,
        zero_output_for_mask=False,
        unroll=False,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.return_sequences = return_sequences
        self.return_state = return_state
        self.go_backwards = go_backwards
        self.zero_output_for_mask = zero_output_for_mask
        self.unroll = unroll
        if self.stateful:
            self._require_splittable("stateful=True")

    @property
    def needs_future(self):
        return "with go_backwards=True it reads the sequence from its end" if self.go_backwards else None

    @property
    def output_size(self):
        """The size of the last axis of the output."""
        raise NotImplementedError

    def recur(self, x, state, mask, training):
        """Runs over `x` `(b, t, ...)` forwards: returns all outputs `(b, t, units)` and the last state."""
        raise NotImplementedError

    def call(self, x, mask=None, initial_state=None, return_state=False, training=None):
        if return_state or not self.return_state:
            return super().call(x, mask, initial_state, return_state, training)
        y, state = self._run(x, mask, initial_state, True, training)
        return (y, *tree.flatten(state))

    def advance(self, x, state, mask=None, training=False):
        self._assert_input_compatibility(x)  # also as a part of another layer, which does not go through `__call__`
        if self.go_backwards:
            x, mask = ops.flip(x, 1), None if mask is None else ops.flip(mask, 1)
        y, state = self.recur(x, state, mask, training)
        if mask is not None and self.zero_output_for_mask and self.return_sequences:
            y = ops.where(mask[:, :, None], y, ops.zeros_like(y))
        y = y if self.return_sequences else y[:, -1]
        return cast(y, self.compute_dtype), state

    def compute_output_shape(self, input_shape):
        batch, time = input_shape[:2]
        return (batch, time, self.output_size) if self.return_sequences else (batch, self.output_size)

    def compute_mask(self, inputs, mask=None):
        y_mask = super().compute_mask(inputs, mask)
        return [y_mask] + [None] * len(tree.flatten(self.initial_state(1))) if self.return_state else y_mask


class Gated(GateWeights, Recurrent):
    """What SimpleRNN, LSTM and GRU share: the weights, dropout, and that the recurrence is one operation.

    `use_cudnn` and `implementation` are accepted for Keras: the fastest kernel that equals the definition is taken (see
    `keras_seq.kernels`).
    """

    def __init__(
        self, *args, dropout=0.0, recurrent_dropout=0.0, seed=None, implementation=None, use_cudnn="auto", **kwargs
    ):
        super().__init__(*args, **kwargs)
        for name, rate in (("dropout", dropout), ("recurrent_dropout", recurrent_dropout)):
            if not 0 <= rate <= 1:
                raise ValueError(f"`{name}` must be between 0 and 1. Received: {name}={rate!r}")
        self.dropout = dropout
        self.recurrent_dropout = recurrent_dropout
        self.seed = seed
        self.seed_generator = keras.random.SeedGenerator(random_seed() if seed is None else seed)
        self.implementation = implementation
        self.use_cudnn = use_cudnn
        self.input_spec = keras.InputSpec(ndim=3)

    @property
    def output_size(self):
        return self.units

    def build(self, input_shape):
        super().build(input_shape)
        self.input_spec = keras.InputSpec(ndim=3, axes={-1: input_shape[-1]})
        self._one_dtype = self.variable_dtype == self.compute_dtype == self.state_dtype

    def initial_state(self, batch_size, max_length=None):
        return ops.zeros((batch_size, self.units), self.state_dtype)

    def recur(self, x, state, mask, training):
        x = cast(x, self.state_dtype)
        recurrent_dropout = None
        if training and self.dropout:
            x = x * self._dropout_factor(self.dropout, x[:, :1])
        if training and self.recurrent_dropout:
            recurrent_dropout = self._dropout_factor(self.recurrent_dropout, tree.flatten(state)[0])
        kernel, recurrent_kernel, bias = self.weights_in(self.state_dtype)
        options = {"activation": self.activation, "recurrent_dropout": recurrent_dropout}
        return self.recurrence(x, state, kernel, recurrent_kernel, bias, mask, **options)

    def advance_one(self, x_t, state):
        if not self._one_dtype or self.go_backwards:
            return super().advance_one(x_t, state)
        return self.one_step(x_t, state, *_values((self.kernel, self.recurrent_kernel, self.bias)))

    def recurrence(self, x, state, kernel, recurrent_kernel, bias, mask, **kwargs):
        """The operation of `keras_seq.ops` that this layer is."""
        raise NotImplementedError

    def one_step(self, x, state, kernel, recurrent_kernel, bias):
        """The same operation for one step."""
        raise NotImplementedError

    def _dropout_factor(self, rate, like):
        """0 or 1 / (1 - rate), one draw for all steps (Gal & Ghahramani 2016)."""
        return keras.random.dropout(ops.ones_like(like), rate, seed=self.seed_generator)


@keras.saving.register_keras_serializable("keras_seq")
class SimpleRNN(Gated):
    """Fully connected recurrent layer whose output is fed back.

    `h' = act(x W + h U + b)`, `y = h'`

    Args:
        units: size of the state and of the output.
        activation: act; default tanh.
        The others, and their order and defaults: as in `keras.layers.SimpleRNN`.

    Call: x `(b, t, d)`, mask `(b, t)` bool -> y `(b, units)`, or `(b, t, units)` with `return_sequences=True`;
    state h `(b, units)`.

    Weights: kernel W `(d, units)`, recurrent_kernel U `(units, units)`, bias b `(units,)`.

    Raises: ValueError if units < 1 or a dropout rate is not from 0 to 1.

    Source: Elman 1990.

    Example:

        layer = keras_seq.layers.SimpleRNN(8)
        y, h = layer(keras.ops.ones((2, 5, 3)), return_state=True)  # (2, 8), (2, 8)
        y_t, h = layer.step(keras.ops.ones((2, 3)), h)  # (2, 8), (2, 8)
    """

    def __init__(
        self,
        units,
        activation="tanh",
        use_bias=True,
        kernel_initializer="glorot_uniform",
        recurrent_initializer="orthogonal",
        bias_initializer="zeros",
        kernel_regularizer=None,
        recurrent_regularizer=None,
        bias_regularizer=None,
        activity_regularizer=None,
        kernel_constraint=None,
        recurrent_constraint=None,
        bias_constraint=None,
        dropout=0.0,
        recurrent_dropout=0.0,
        return_sequences=False,
        return_state=False,
        go_backwards=False,
        stateful=False,
        unroll=False,
        seed=None,
        **kwargs,
    ):
        super().__init__(**arguments(locals()))

    def recurrence(self, *args, **kwargs):
        return seq_ops.simple_rnn(*args, **kwargs)

    def one_step(self, *args):
        return seq_ops.simple_rnn_step(*args, activation=self.activation)


@keras.saving.register_keras_serializable("keras_seq")
class LSTM(Gated):
    """Long short-term memory.

    `i, f, g, o = x W + h U + b`; `c' = s(f) c + s(i) tanh(g)`; `h' = s(o) tanh(c')`; `y = h'`

    Args:
        units: size of the state and of the output.
        activation: of g and of c'; default tanh.
        recurrent_activation: s, of the gates; default sigmoid.
        use_bias: whether there is a b.
        unit_forget_bias: the bias of f starts at 1 (Jozefowicz et al. 2015).
        The others, and their order and defaults: as in `keras.layers.LSTM`.

    Call: x `(b, t, d)`, mask `(b, t)` bool -> y `(b, units)`, or `(b, t, units)` with `return_sequences=True`;
    state `(h, c)`, each `(b, units)`.

    Weights: kernel W `(d, 4 units)`, recurrent_kernel U `(units, 4 units)`, bias b `(4 units,)`; order i, f, g, o.

    Raises: ValueError if units < 1 or a dropout rate is not from 0 to 1.

    Source: Hochreiter & Schmidhuber 1997; Gers et al. 2000 (forget gate); Gal & Ghahramani 2016, arXiv:1512.05287
    (dropout: one draw for all steps).

    Example:

        layer = keras_seq.layers.LSTM(8, return_sequences=True)
        y, (h, c) = layer(keras.ops.ones((2, 5, 3)), return_state=True)  # (2, 5, 8), ((2, 8), (2, 8))
        y, (h, c) = layer(keras.ops.ones((2, 4, 3)), initial_state=(h, c), return_state=True)  # goes on: (2, 4, 8)
        y_t, (h, c) = layer.step(keras.ops.ones((2, 3)), (h, c))  # (2, 8)
    """

    gates = 4

    def __init__(
        self,
        units,
        activation="tanh",
        recurrent_activation="sigmoid",
        use_bias=True,
        kernel_initializer="glorot_uniform",
        recurrent_initializer="orthogonal",
        bias_initializer="zeros",
        unit_forget_bias=True,
        kernel_regularizer=None,
        recurrent_regularizer=None,
        bias_regularizer=None,
        activity_regularizer=None,
        kernel_constraint=None,
        recurrent_constraint=None,
        bias_constraint=None,
        dropout=0.0,
        recurrent_dropout=0.0,
        seed=None,
        return_sequences=False,
        return_state=False,
        go_backwards=False,
        stateful=False,
        unroll=False,
        use_cudnn="auto",
        **kwargs,
    ):
        super().__init__(**arguments(locals(), "recurrent_activation", "unit_forget_bias"))
        self.recurrent_activation = activations.get(recurrent_activation)
        self.forget_gate = 1 if unit_forget_bias else None

    def initial_state(self, batch_size, max_length=None):
        return super().initial_state(batch_size), super().initial_state(batch_size)

    def recurrence(self, *args, **kwargs):
        return seq_ops.lstm(*args, recurrent_activation=self.recurrent_activation, **kwargs)

    def one_step(self, *args):
        return seq_ops.lstm_step(*args, activation=self.activation, recurrent_activation=self.recurrent_activation)


@keras.saving.register_keras_serializable("keras_seq")
class GRU(Gated):
    """Gated recurrent unit.

    `z = s(x W_z + h U_z + b_z)`; `r = s(x W_r + h U_r + b_r)`; `n = tanh(x W_n + b_n + r (h U_n + b'_n))`;
    `h' = z h + (1 - z) n`; `y = h'`. With `reset_after=False`: `n = tanh(x W_n + b_n + (r h) U_n)`.

    Args:
        units: size of the state and of the output.
        activation: of n; default tanh.
        recurrent_activation: s, of the gates; default sigmoid.
        use_bias: whether there is a b.
        reset_after: r acts after (as in cuDNN and PyTorch) or before the product with U_n (as in the first preprint).
        The others, and their order and defaults: as in `keras.layers.GRU`.

    Call: x `(b, t, d)`, mask `(b, t)` bool -> y `(b, units)`, or `(b, t, units)` with `return_sequences=True`;
    state h `(b, units)`.

    Weights: kernel W `(d, 3 units)`, recurrent_kernel U `(units, 3 units)`, bias b `(2, 3 units)` (for W and for U), or
    `(3 units,)` if `reset_after=False`; in the order z, r, n.

    Raises: ValueError if units < 1 or a dropout rate is not from 0 to 1.

    Source: Cho et al. 2014, arXiv:1406.1078, eq. 5-8; Gal & Ghahramani 2016, arXiv:1512.05287 (dropout: one draw for
    all steps).

    Example:

        layer = keras_seq.layers.GRU(8)
        mask = np.array([[True, True, True, True, True], [True, True, True, False, False]])
        y, h = layer(keras.ops.ones((2, 5, 3)), mask=mask, return_state=True)  # (2, 8), (2, 8)
        y_t, h = layer.step(keras.ops.ones((2, 3)), h)  # (2, 8), (2, 8)
    """

    gates = 3

    def __init__(
        self,
        units,
        activation="tanh",
        recurrent_activation="sigmoid",
        use_bias=True,
        kernel_initializer="glorot_uniform",
        recurrent_initializer="orthogonal",
        bias_initializer="zeros",
        kernel_regularizer=None,
        recurrent_regularizer=None,
        bias_regularizer=None,
        activity_regularizer=None,
        kernel_constraint=None,
        recurrent_constraint=None,
        bias_constraint=None,
        dropout=0.0,
        recurrent_dropout=0.0,
        seed=None,
        return_sequences=False,
        return_state=False,
        go_backwards=False,
        stateful=False,
        unroll=False,
        reset_after=True,
        use_cudnn="auto",
        **kwargs,
    ):
        super().__init__(**arguments(locals(), "recurrent_activation", "reset_after"))
        self.recurrent_activation = activations.get(recurrent_activation)
        self.reset_after = reset_after

    @property
    def bias_shape(self):
        return (2, 3 * self.units) if self.reset_after else (3 * self.units,)

    def recurrence(self, *args, **kwargs):
        return seq_ops.gru(
            *args, recurrent_activation=self.recurrent_activation, reset_after=self.reset_after, **kwargs
        )

    def one_step(self, *args):
        return seq_ops.gru_step(
            *args,
            activation=self.activation,
            recurrent_activation=self.recurrent_activation,
            reset_after=self.reset_after,
        )
