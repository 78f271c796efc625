"""What the layers of RWKV share: their place in a model, weights with official initial values, token shift.

The initial values are those of the official training code (RWKV-LM, `RWKV-v4neo/src/model.py`, `RWKV-v5/src/model.py`,
`RWKV-v7/train_temp/src/model.py`). They depend on where in the model a layer is.
"""

import keras
import numpy as np
from keras import ops

from keras_seq import initializers
from keras_seq.base import SequenceLayer, cast
from keras_seq.layers.dense import matrix
from keras_seq.ops.norm import group_norm
from keras_seq.ops.shift import token_shift


class RWKVLayer(SequenceLayer):
    """A layer of RWKV in layer `layer_index` of a model of `num_layers`."""

    def __init__(self, layer_index=0, num_layers=1, **kwargs):
        super().__init__(**kwargs)
        if not 0 <= layer_index < num_layers:
            raise ValueError(
                "`layer_index` must be from 0 to num_layers - 1. "
                f"Received: layer_index={layer_index!r}, num_layers={num_layers!r}"
            )
        self.layer_index, self.num_layers = layer_index, num_layers
        self.features = self.heads = 0  # until it is built
        self.input_spec = keras.InputSpec(ndim=3)

    def build(self, input_shape):
        self.features = input_shape[-1]
        self.input_spec = keras.InputSpec(ndim=3, axes={-1: self.features})

    @property
    def from_first(self):
        """0 in the first layer, 1 in the last."""
        return self.layer_index / max(self.num_layers - 1, 1)

    @property
    def to_end(self):
        """1 in the first layer, nearly 0 in the last."""
        return 1 - self.layer_index / self.num_layers

    def _channels(self):
        """0 for the first channel, nearly 1 for the last: `(d,)`."""
        return np.arange(self.features) / self.features

    def _ramp(self):
        """0 for the first channel, 1 for the last: `(d,)`."""
        return np.arange(self.features) / max(self.features - 1, 1)

    def _vector(self, name, values, shape=None, precise=False):
        """A weight with these initial values; a `precise` one is not cast to the compute dtype."""
        values = np.asarray(values, "float64") if shape is None else np.broadcast_to(values, shape)

        def initial(shape, dtype=None):
            return ops.convert_to_tensor(values, dtype=dtype)

        autocast = {"autocast": False} if precise else {}
        weight = self.add_weight(values.shape, initial, name=name, **autocast)
        setattr(self, name, weight)

    def _precise(self, weight):
        """A weight in the dtype of the state."""
        return cast(ops.convert_to_tensor(weight), self.state_dtype)

    def _low_rank(self, name, shape, initializer="zeros"):
        setattr(self, name, self.add_weight(shape, initializers.get(initializer), name=name))

    def _matrix(self, name, rows, columns, gain=None):
        """A projection without bias: orthogonal times `gain`, or zero without one."""
        kernel = "zeros" if gain is None else initializers.Orthogonal(gain)
        layer = matrix((rows, columns), use_bias=False, kernel=kernel, **self.policy_of_next(), name=name)
        setattr(self, f"{name}_dense", layer)

    def _start(self, batch_size, *shape):
        if not self.built:
            raise ValueError(f"{self._title} must be built before it has a state: call it once, or `build` it.")
        return ops.zeros((batch_size, *shape), self.state_dtype)


class ChannelMixing(RWKVLayer):
    """A feed-forward network that also looks at the step before: the base of the channel mixing of all versions.

    Args:
        hidden_dim: size inside; default that of the version.
        layer_index, num_layers: which layer of how many this is in its model, by which the initial values differ.
        **kwargs: `stateful` and those of `keras.layers.Layer`.
    """

    def __init__(self, hidden_dim=None, layer_index=0, num_layers=1, **kwargs):
        super().__init__(layer_index, num_layers, **kwargs)
        if hidden_dim is not None and (not isinstance(hidden_dim, int) or hidden_dim < 1):
            raise ValueError(f"`hidden_dim` must be a positive integer. Received: hidden_dim={hidden_dim!r}")
        self.hidden_dim = hidden_dim

    def initial_state(self, batch_size, max_length=None):
        return self._start(batch_size, self.features)

    def advance(self, x, state, mask=None, training=False):
        before, state = token_shift(x, state, mask)
        return self.mix(x, before), state

    def mix(self, x, before):
        """The output, of the steps `(b, t, d)` and of those before each."""
        raise NotImplementedError


class TimeMixing(RWKVLayer):
    """The base of the time mixing of RWKV-5, 6 and 7: heads with a state that is a matrix.

    Args:
        head_dim: size of a head; it divides the size of the input.
        layer_index, num_layers: which layer of how many this is in its model, by which the initial values differ.
        trainable_state: whether the state before the first step is a weight.
        **kwargs: `stateful` and those of `keras.layers.Layer`.
    """

    epsilon = 64e-5  # of the norm of the heads: 1e-5 where the official code divides by 8 first

    def __init__(self, head_dim=64, layer_index=0, num_layers=1, trainable_state=False, **kwargs):
        super().__init__(layer_index, num_layers, **kwargs)
        if not isinstance(head_dim, int) or head_dim < 1:
            raise ValueError(f"`head_dim` must be a positive integer. Received: head_dim={head_dim!r}")
        self.head_dim, self.trainable_state = head_dim, trainable_state

    def build(self, input_shape):
        super().build(input_shape)
        if self.features % self.head_dim:
            raise ValueError(
                f"{self._title}: `head_dim` must divide the size of the input, {self.features}. "
                f"Received: head_dim={self.head_dim}"
            )
        self.heads = self.features // self.head_dim
        self._add_weights(self.features)
        self._vector("ln_x_weight", ((self.layer_index + 1) / self.num_layers) ** 0.7, (self.features,), precise=True)
        self._vector("ln_x_bias", 0, (self.features,), precise=True)
        if self.trainable_state:
            self._vector("time_state", 0, (self.heads, self.head_dim, self.head_dim), precise=True)

    def _add_weights(self, d):
        raise NotImplementedError

    def initial_state(self, batch_size, max_length=None):
        last, s = self._start(batch_size, self.features), (self.heads, self.head_dim, self.head_dim)
        if not self.trainable_state:
            return last, self._start(batch_size, *s)
        return last, ops.broadcast_to(self._precise(self.time_state), (batch_size, *s))

    def _in_heads(self, *xs):
        """`(b, t, d)` -> `(b, t, h, n)`, in the dtype of the state."""
        shapes = [(*ops.shape(x)[:-1], self.heads, self.head_dim) for x in xs]
        return [ops.reshape(cast(x, self.state_dtype), shape) for x, shape in zip(xs, shapes, strict=True)]

    def _normed(self, y):
        """`(b, t, h, n)`, each head normalized alone."""
        gamma, beta = (
            ops.reshape(self._precise(w), (self.heads, self.head_dim)) for w in (self.ln_x_weight, self.ln_x_bias)
        )
        return group_norm(y, gamma, beta, self.epsilon)

    def _joined(self, y):
        """`(b, t, h, n)` -> `(b, t, d)` in the compute dtype."""
        return cast(ops.reshape(y, (*ops.shape(y)[:-2], self.features)), self.compute_dtype)
