"""The position-wise feed-forward network of a Transformer."""

import keras
from keras import activations, ops

from keras_seq.base import SequenceLayer, random_seed
from keras_seq.layers.dense import matrix, project
from keras_seq.layers.prepared import products

_GATED = {"swiglu": "silu", "geglu": "gelu", "reglu": "relu", "glu": "sigmoid"}


def tanh_gelu(x):
    """GELU by its tanh approximation, as in GPT-2 (Hendrycks & Gimpel 2016, arXiv:1606.08415)."""
    return ops.gelu(x, approximate=True)


@keras.saving.register_keras_serializable("keras_seq")
class FeedForward(SequenceLayer):
    """Two matrices with an activation between them, on each step alone.

    `y = act(x W_1 + b_1) W_2 + b_2`; of the gated kinds `y = (act(x W_g + b_g) * (x W_1 + b_1)) W_2 + b_2`.

    Args:
        hidden_dim: size between the matrices; default 4 times that of the input.
        activation: `"relu"`, `"gelu"` (exact), `"gelu_tanh"` (its approximation), `"swiglu"`, `"geglu"`, `"reglu"`,
            `"glu"`, another of Keras's names, or a function.
        output_dim: size of the output; default that of the input.
        dropout: rate, on what is between the matrices, in training.
        use_bias: whether there are biases.
        kernel_initializer, bias_initializer: of the matrices and of the biases.
        **kwargs: `stateful` and those of `keras.layers.Layer`.

    Call: x `(b, t, d)` -> y `(b, t, output_dim)`; the state is `()`.

    Raises: ValueError for sizes < 1 and for an unknown activation.

    Source: Vaswani et al. 2017, arXiv:1706.03762, eq. 2; Shazeer 2020, arXiv:2002.05202 (gated).

    Example:

        layer = keras_seq.layers.FeedForward(hidden_dim=16, activation="swiglu", use_bias=False)
        y = layer(keras.ops.ones((2, 5, 8)))  # (2, 5, 8)
    """

    def __init__(
        self,
        hidden_dim=None,
        activation="relu",
        output_dim=None,
        dropout=0.0,
        use_bias=True,
        kernel_initializer="glorot_uniform",
        bias_initializer="zeros",
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.input_spec = keras.InputSpec(min_ndim=3)
        for name, size in {"hidden_dim": hidden_dim, "output_dim": output_dim}.items():
            if size is not None and (not isinstance(size, int) or size < 1):
                raise ValueError(f"`{name}` must be a positive integer. Received: {name}={size!r}")
        self.hidden_dim, self.output_dim = hidden_dim, output_dim
        self.gated = isinstance(activation, str) and activation in _GATED
        activation = _GATED.get(activation, activation) if isinstance(activation, str) else activation
        self.activation = tanh_gelu if activation == "gelu_tanh" else activations.get(activation)
        self.dropout = dropout
        self._drop = keras.layers.Dropout(dropout, seed=random_seed())
        self._matrices = {"use_bias": use_bias, "kernel": kernel_initializer, "bias": bias_initializer}

    def build(self, input_shape):
        features = input_shape[-1]
        self.input_spec = keras.InputSpec(min_ndim=3, axes={-1: features})
        hidden_dim = self.hidden_dim or 4 * features
        names = ("gate_dense", "hidden_dense") if self.gated else ("hidden_dense",)
        for name in names:
            setattr(self, name, self._matrix((features, hidden_dim), name))
        self.output_dense = self._matrix((hidden_dim, self.output_dim or features), "output_dense")

    def _matrix(self, shape, name):
        return matrix(shape, **self._matrices, **self.policy_of_next(), name=name.removesuffix("_dense"))

    def advance(self, x, state, mask=None, training=False):
        h = project(self.hidden_dense, x)
        h = self.activation(project(self.gate_dense, x)) * h if self.gated else self.activation(h)
        h = self._drop(h, training=True) if training and self.dropout else h
        return project(self.output_dense, h), state

    def stepper(self, batch_size, steps=1):
        inner = products(*([self.gate_dense] if self.gated else []), self.hidden_dense, rows=batch_size, steps=steps)
        output = products(self.output_dense, rows=batch_size, steps=steps)
        if inner is None or output is None:
            return self.advance_one

        def step(x, state):
            h = inner(x)
            if self.gated:
                gate, h = ops.split(h, 2, axis=-1)
                return output(self.activation(gate) * h), state
            return output(self.activation(h)), state

        return step

    def compute_output_shape(self, input_shape):
        return (*input_shape[:-1], self.output_dim or input_shape[-1])
