"""The weights of a gated recurrence, for layers and for cells."""

import numbers

from keras import activations, constraints, ops, regularizers

from keras_seq import initializers
from keras_seq.base import Configured, cast


class GateWeights(Configured):
    """`kernel` `(d, gates * units)`, `recurrent_kernel` `(units, gates * units)`, `bias`: Keras's names and layout."""

    gates = 1
    forget_gate: int | None = None  # the index of the gate whose bias starts at 1

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
        kernel_constraint=None,
        recurrent_constraint=None,
        bias_constraint=None,
        **kwargs,
    ):
        super().__init__(**kwargs)
        if not isinstance(units, numbers.Integral) or units < 1:
            raise ValueError(f"`units` must be a positive integer. Received: units={units!r}")
        self.units = int(units)
        self.activation = activations.get(activation)
        self.use_bias = use_bias
        self.kernel_initializer = initializers.get(kernel_initializer)
        self.recurrent_initializer = initializers.get(recurrent_initializer)
        self.bias_initializer = initializers.get(bias_initializer)
        self.kernel_regularizer = regularizers.get(kernel_regularizer)
        self.recurrent_regularizer = regularizers.get(recurrent_regularizer)
        self.bias_regularizer = regularizers.get(bias_regularizer)
        self.kernel_constraint = constraints.get(kernel_constraint)
        self.recurrent_constraint = constraints.get(recurrent_constraint)
        self.bias_constraint = constraints.get(bias_constraint)

    @property
    def bias_shape(self):
        return (self.gates * self.units,)

    def build(self, input_shape):
        width = self.gates * self.units
        self.kernel = self._add("kernel", (input_shape[-1], width), self.kernel_initializer)
        self.recurrent_kernel = self._add("recurrent_kernel", (self.units, width), self.recurrent_initializer)
        self.bias = self._add("bias", self.bias_shape, self._initial_bias) if self.use_bias else None

    def weights_in(self, dtype):
        """`kernel, recurrent_kernel, bias` as tensors of that dtype; bias is None without `use_bias`."""
        return [None if w is None else cast(w.value, dtype) for w in (self.kernel, self.recurrent_kernel, self.bias)]

    def _add(self, name, shape, initializer):
        kind = name.removesuffix("_kernel")
        return self.add_weight(
            shape,
            initializer,
            autocast=False,  # a recurrence runs in the dtype of its state
            regularizer=getattr(self, f"{kind}_regularizer"),
            constraint=getattr(self, f"{kind}_constraint"),
            name=name,
        )

    def _initial_bias(self, shape, dtype):
        if self.forget_gate is None:
            return self.bias_initializer(shape, dtype)
        before, after = self.forget_gate * self.units, (self.gates - self.forget_gate - 1) * self.units
        ends = self.bias_initializer((before,), dtype), self.bias_initializer((after,), dtype)
        return ops.concatenate([ends[0], ops.ones((self.units,), dtype), ends[1]])
