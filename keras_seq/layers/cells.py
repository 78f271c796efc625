"""Cells for `RNN`: one step of a recurrence, `call(x_t, state) -> (y_t, state)`."""

import keras
from keras import activations, ops

from keras_seq.layers.gates import GateWeights


class Cell(GateWeights):
    """A cell of this library: it computes in float32 (float64 under float64), whatever its compute dtype."""

    @property
    def state_dtype(self):
        return "float64" if self.compute_dtype == "float64" else "float32"

    def build(self, input_shape):
        super().build(input_shape)
        self.built = True

    def _vector(self, name, n, initializer):
        return self.add_weight((n * self.units,), initializer, autocast=False, name=name)


class LSTMLikeCell(Cell):
    """The arguments and the state `(h, c)` of a cell with the gates i, f, g, o.

    Args:
        units: size of the state and of the output.
        activation, recurrent_activation: of g and c', and of the gates.
        unit_forget_bias: the bias of f starts at 1.
        **kwargs: `use_bias`, and the initializers, regularizers and constraints of `kernel`, `recurrent` and `bias`.
    """

    gates = 4

    def __init__(self, units, activation="tanh", recurrent_activation="sigmoid", unit_forget_bias=True, **kwargs):
        super().__init__(units, activation, **kwargs)
        self.recurrent_activation = activations.get(recurrent_activation)
        self.forget_gate = 1 if unit_forget_bias else None

    def initial_state(self, batch_size):
        """`(h, c)` of zeros, each `(batch_size, units)`."""
        return tuple(ops.zeros((batch_size, self.units), self.state_dtype) for _ in "hc")


@keras.saving.register_keras_serializable("keras_seq")
class LayerNormLSTMCell(LSTMLikeCell):
    """LSTM with layer normalization, for `RNN`.

    `i, f, g, o = LN(x W) + LN(h U) + b`; `c' = s(f) c + s(i) tanh(g)`; `h' = s(o) tanh(LN(c'))`; `y = h'`, where
    `LN(a) = gain (a - mean(a)) / sqrt(var(a) + epsilon)`, and the LN of c' also adds a bias.

    Args:
        units: size of the state and of the output.
        epsilon: added to the variance.
        **kwargs: `activation`, `recurrent_activation`, `unit_forget_bias`, `use_bias`, and the initializers,
            regularizers and constraints of `kernel`, `recurrent` and `bias`, as in `LSTM`.

    Call: x_t `(b, d)`, state `(h, c)` each `(b, units)` -> y_t `(b, units)` and the next state.

    Raises: ValueError if units < 1.

    Source: Ba et al. 2016, arXiv:1607.06450, eq. 20-22. (In TensorFlow Addons' cell of this name the state c itself is
    normalized, which the paper does not do.)

    Example:

        y = keras_seq.layers.RNN(keras_seq.layers.LayerNormLSTMCell(8))(keras.ops.ones((2, 5, 3)))  # (2, 8)
    """

    def __init__(self, units, epsilon=1e-5, **kwargs):
        super().__init__(units, **kwargs)
        self.epsilon = epsilon

    def build(self, input_shape):
        super().build(input_shape)
        self.input_gain = self._vector("input_gain", 4, "ones")
        self.recurrent_gain = self._vector("recurrent_gain", 4, "ones")
        self.state_gain = self._vector("state_gain", 1, "ones")
        self.state_bias = self._vector("state_bias", 1, "zeros")

    def call(self, x, state):
        kernel, recurrent_kernel, bias = self.weights_in(self.state_dtype)
        h, c = state
        z = self._norm(ops.cast(x, self.state_dtype) @ kernel, self.input_gain)
        z = z + self._norm(h @ recurrent_kernel, self.recurrent_gain)
        i, f, g, o = ops.split(z if bias is None else z + bias, 4, axis=-1)
        s = self.recurrent_activation
        c = s(f) * c + s(i) * self.activation(g)
        h = s(o) * self.activation(self._norm(c, self.state_gain) + ops.cast(self.state_bias, c.dtype))
        return h, (h, c)

    def _norm(self, a, gain):
        a = a - ops.mean(a, axis=-1, keepdims=True)
        variance = ops.mean(a * a, axis=-1, keepdims=True)
        return ops.cast(gain, a.dtype) * a * ops.rsqrt(variance + self.epsilon)


@keras.saving.register_keras_serializable("keras_seq")
class PeepholeLSTMCell(LSTMLikeCell):
    """LSTM whose gates see the memory cell, for `RNN`.

    `i, f, g, o = x W + h U + b`; `c' = s(f + p_f c) c + s(i + p_i c) tanh(g)`; `h' = s(o + p_o c') tanh(c')`; `y = h'`

    Args:
        units: size of the state and of the output.
        **kwargs: `activation`, `recurrent_activation`, `unit_forget_bias`, `use_bias`, and the initializers,
            regularizers and constraints of `kernel`, `recurrent` and `bias`, as in `LSTM`. The peepholes p start at 0.

    Call: x_t `(b, d)`, state `(h, c)` each `(b, units)` -> y_t `(b, units)` and the next state.

    Raises: ValueError if units < 1.

    Source: Gers et al. 2002, "Learning precise timing with LSTM recurrent networks", JMLR 3.

    Example:

        y = keras_seq.layers.RNN(keras_seq.layers.PeepholeLSTMCell(8))(keras.ops.ones((2, 5, 3)))  # (2, 8)
    """

    def build(self, input_shape):
        super().build(input_shape)
        self.peephole = self._vector("peephole", 3, "zeros")  # of i, f, o

    def call(self, x, state):
        kernel, recurrent_kernel, bias = self.weights_in(self.state_dtype)
        h, c = state
        z = ops.cast(x, self.state_dtype) @ kernel + h @ recurrent_kernel
        i, f, g, o = ops.split(z if bias is None else z + bias, 4, axis=-1)
        p_i, p_f, p_o = ops.split(ops.cast(self.peephole, c.dtype), 3)
        s = self.recurrent_activation
        c = s(f + p_f * c) * c + s(i + p_i * c) * self.activation(g)
        h = s(o + p_o * c) * self.activation(c)
        return h, (h, c)
