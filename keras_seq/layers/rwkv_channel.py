"""Channel mixing of RWKV 4 to 7."""

import keras
from keras import ops

from keras_seq.layers.dense import project
from keras_seq.layers.prepared import products
from keras_seq.layers.rwkv_weights import ChannelMixing
from keras_seq.ops.lean import squared_relu


@keras.saving.register_keras_serializable("keras_seq")
class RWKV4ChannelMixing(ChannelMixing):
    """The channel mixing of RWKV-4: a feed-forward network with a gate, on each step and the one before.

    `x_i = x_t mu_i + x_{t-1} (1 - mu_i)` for i = k, r;  `y = sigmoid(x_r W_r) * (relu(x_k W_k)^2 W_v)`.

    Args:
        hidden_dim: size inside; default 4 times that of the input.
        layer_index, num_layers: which layer of how many this is in its model, by which the initial values differ.
        **kwargs: `stateful` and those of `keras.layers.Layer`.

    Call: x `(b, t, d)`, mask `(b, t)` bool or None -> y `(b, t, d)`; the state is the last valid step of x `(b, d)`.

    Raises: ValueError for a `hidden_dim` < 1 and a `layer_index` that is not below `num_layers`.

    Source: Peng et al. 2023, arXiv:2305.13048, eq. 14, 15 and 18.

    Example:

        layer = keras_seq.layers.RWKV4ChannelMixing(hidden_dim=32)
        y, last = layer(keras.ops.ones((2, 5, 8)), return_state=True)  # (2, 5, 8), (2, 8)
        y_t, last = layer.step(keras.ops.ones((2, 8)), last)  # (2, 8), (2, 8)
    """

    tall_gain = True  # an orthogonal matrix with more columns than rows has sqrt(columns / rows) as its gain

    def build(self, input_shape):
        super().build(input_shape)
        d = self.features
        hidden = self.hidden_dim or self._default_hidden(d)
        self._add_mixes()
        self._matrix("receptance", d, d)
        self._matrix("key", d, hidden, max(hidden / d, 1) ** 0.5 if self.tall_gain else 1.0)
        self._matrix("value", hidden, d)

    def _default_hidden(self, d):
        return 4 * d

    def _add_mixes(self):
        for name in ("time_mix_k", "time_mix_r"):
            self._vector(name, self._channels() ** self.to_end)

    def _mixed(self, x, before):
        """x_k and x_r."""
        return before + (x - before) * self.time_mix_k, before + (x - before) * self.time_mix_r

    def mix(self, x, before):
        x_k, x_r = self._mixed(x, before)
        k = ops.square(ops.relu(project(self.key_dense, x_k)))
        return ops.sigmoid(project(self.receptance_dense, x_r)) * project(self.value_dense, k)


@keras.saving.register_keras_serializable("keras_seq")
class RWKV5ChannelMixing(RWKV4ChannelMixing):
    """The channel mixing of RWKV-5: that of RWKV-4 with a smaller `hidden_dim`, 3.5 times the size of the input.

    `x_i = x_t mu_i + x_{t-1} (1 - mu_i)` for i = k, r;  `y = sigmoid(x_r W_r) * (relu(x_k W_k)^2 W_v)`.

    Args:
        hidden_dim: size inside; default 3.5 times that of the input, rounded down to a multiple of 32, but at least 32.
        layer_index, num_layers: which layer of how many this is in its model, by which the initial values differ.
        **kwargs: `stateful` and those of `keras.layers.Layer`.

    Call: x `(b, t, d)`, mask `(b, t)` bool or None -> y `(b, t, d)`; the state is the last valid step of x `(b, d)`.

    Raises: ValueError for a `hidden_dim` < 1 and a `layer_index` that is not below `num_layers`.

    Source: Peng et al. 2024, arXiv:2404.05892, section 4.

    Example:

        layer = keras_seq.layers.RWKV5ChannelMixing(hidden_dim=32)
        y, last = layer(keras.ops.ones((2, 5, 8)), return_state=True)  # (2, 5, 8), (2, 8)
        y_t, last = layer.step(keras.ops.ones((2, 8)), last)  # (2, 8), (2, 8)
    """

    tall_gain = False

    def _default_hidden(self, d):
        return max(d * 7 // 2 // 32, 1) * 32


@keras.saving.register_keras_serializable("keras_seq")
class RWKV6ChannelMixing(RWKV5ChannelMixing):
    """The channel mixing of RWKV-6: that of RWKV-5, whose mix is written from the present step on.

    `x_i = x_t + (x_{t-1} - x_t) mu_i` for i = k, r;  `y = sigmoid(x_r W_r) * (relu(x_k W_k)^2 W_v)`.

    Args:
        hidden_dim: size inside; default 3.5 times that of the input, rounded down to a multiple of 32, but at least 32.
        layer_index, num_layers: which layer of how many this is in its model, by which the initial values differ.
        **kwargs: `stateful` and those of `keras.layers.Layer`.

    Call: x `(b, t, d)`, mask `(b, t)` bool or None -> y `(b, t, d)`; the state is the last valid step of x `(b, d)`.

    Raises: ValueError for a `hidden_dim` < 1 and a `layer_index` that is not below `num_layers`.

    Source: Peng et al. 2024, arXiv:2404.05892, section 4.

    Example:

        layer = keras_seq.layers.RWKV6ChannelMixing(hidden_dim=32)
        y, last = layer(keras.ops.ones((2, 5, 8)), return_state=True)  # (2, 5, 8), (2, 8)
        y_t, last = layer.step(keras.ops.ones((2, 8)), last)  # (2, 8), (2, 8)
    """

    def _add_mixes(self):
        for name in ("time_maa_k", "time_maa_r"):
            self._vector(name, 1 - self._channels() ** self.to_end**3)

    def _mixed(self, x, before):
        return x + (before - x) * self.time_maa_k, x + (before - x) * self.time_maa_r


@keras.saving.register_keras_serializable("keras_seq")
class RWKV7ChannelMixing(ChannelMixing):
    """The channel mixing of RWKV-7: without a gate.

    `x_k = x_t + (x_{t-1} - x_t) mu_k`;  `y = relu(x_k W_k)^2 W_v`.

    Args:
        hidden_dim: size inside; default 4 times that of the input.
        layer_index, num_layers: which layer of how many this is in its model, by which the initial values differ.
        **kwargs: `stateful` and those of `keras.layers.Layer`.

    Call: x `(b, t, d)`, mask `(b, t)` bool or None -> y `(b, t, d)`; the state is the last valid step of x `(b, d)`.

    Raises: ValueError for a `hidden_dim` < 1 and a `layer_index` that is not below `num_layers`.

    Source: Peng et al. 2025, arXiv:2503.14456, eq. 22 and 23.

    Example:

        layer = keras_seq.layers.RWKV7ChannelMixing(hidden_dim=32)
        y, last = layer(keras.ops.ones((2, 5, 8)), return_state=True)  # (2, 5, 8), (2, 8)
        y_t, last = layer.step(keras.ops.ones((2, 8)), last)  # (2, 8), (2, 8)
    """

    def build(self, input_shape):
        super().build(input_shape)
        d = self.features
        hidden = self.hidden_dim or 4 * d
        self._vector("x_k", 1 - self._channels() ** self.to_end**4)
        self._matrix("key", d, hidden, 1.0)
        self._matrix("value", hidden, d)

    def mix(self, x, before):
        k = project(self.key_dense, x + (before - x) * self.x_k)
        return project(self.value_dense, ops.square(ops.relu(k)))

    def stepper(self, batch_size, steps=1):
        key, value = (products(layer, rows=batch_size, steps=steps) for layer in (self.key_dense, self.value_dense))
        if key is None or value is None or self.compute_dtype != self.state_dtype:
            return self.advance_one
        mu = ops.convert_to_tensor(self.x_k)
        return lambda x, last: (value(squared_relu(key(x + (last - x) * mu))), x)
