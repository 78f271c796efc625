"""A block of RWKV: time mixing and channel mixing."""

import keras

from keras_seq.base import SequenceLayer, call_layer, own_arguments
from keras_seq.layers.prepared import norm_of
from keras_seq.layers.rwkv_channel import RWKV4ChannelMixing, RWKV5ChannelMixing, RWKV6ChannelMixing, RWKV7ChannelMixing
from keras_seq.layers.rwkv_time import (
    RWKV4TimeMixing,
    RWKV5TimeMixing,
    RWKV6TimeMixing,
    RWKV7TimeMixing,
    stepper_of,
)

TIME_MIXING = {4: RWKV4TimeMixing, 5: RWKV5TimeMixing, 6: RWKV6TimeMixing, 7: RWKV7TimeMixing}
CHANNEL_MIXING = {4: RWKV4ChannelMixing, 5: RWKV5ChannelMixing, 6: RWKV6ChannelMixing, 7: RWKV7ChannelMixing}


@keras.saving.register_keras_serializable("keras_seq")
class RWKVBlock(SequenceLayer):
    """A block of RWKV: time mixing, then channel mixing, each on a residual branch after a norm.

    `x = x + time_mixing(ln1(x))`; `x = x + channel_mixing(ln2(x))`

    Args:
        version: 4, 5, 6 or 7.
        head_dim: size of a head, from version 5 on; it divides the size of the input.
        hidden_dim: size inside the channel mixing; default that of the version.
        layer_index, num_layers: which block of how many this is in its model, by which the initial values differ.
        **kwargs: for the time mixing of the version: `revision` (5), `mix_rank` (6), `decay_rank` (6, 7), `iclr_rank`,
            `value_rank`, `gate_rank`, `allow_negative_eigenvalues` (7), `trainable_state` (5, 6, 7); and `stateful` and
            those of `keras.layers.Layer`.

    Call: x `(b, t, d)`, mask `(b, t)` bool or None -> `(b, t, d)`; the state is that of the time mixing and that of the
    channel mixing: `((last ln1(x) (b, d), S (b, h, n, n)), last ln2(x) (b, d))`, with three sums `(b, d)` in place of S
    in version 4.

    Raises: ValueError for an unknown version, and for what the layers inside refuse.

    Source: Peng et al. 2023, arXiv:2305.13048, section 3; Peng et al. 2025, arXiv:2503.14456, section 4.

    Example:

        block = keras_seq.layers.RWKVBlock(7, head_dim=8)
        y, state = block(keras.ops.ones((2, 5, 16)), return_state=True)
        y_t, state = block.step(keras.ops.ones((2, 16)), state)
    """

    def __init__(self, version=7, head_dim=64, hidden_dim=None, layer_index=0, num_layers=1, **kwargs):
        super().__init__(**own_arguments(kwargs))
        if version not in TIME_MIXING:
            raise ValueError(f"`version` must be one of {list(TIME_MIXING)}. Received: version={version!r}")
        self.version = version
        place = {"layer_index": layer_index, "num_layers": num_layers, "dtype": self.dtype_policy}
        heads = {} if version == 4 else {"head_dim": head_dim}
        norm = {"epsilon": 1e-5, "dtype": self.dtype_policy}
        self.ln1 = keras.layers.LayerNormalization(**norm, name="ln1")
        self.time_mixing = TIME_MIXING[version](**heads, **place, **kwargs, name="att")
        self.ln2 = keras.layers.LayerNormalization(**norm, name="ln2")
        self.channel_mixing = CHANNEL_MIXING[version](hidden_dim, **place, name="ffn")

        self.input_spec = keras.InputSpec(ndim=3)

    def build(self, input_shape):
        self.input_spec = keras.InputSpec(ndim=3, axes={-1: input_shape[-1]})
        for part in (self.ln1, self.time_mixing, self.ln2, self.channel_mixing):
            if not part.built:
                part.build(tuple(input_shape))
                part.built = True

    def initial_state(self, batch_size, max_length=None):
        return self.time_mixing.initial_state(batch_size), self.channel_mixing.initial_state(batch_size)

    def advance(self, x, state, mask=None, training=False):
        x, _, state = self.mix(x, state, None, mask, training)
        return x, state

    def mix(self, x, state, v_first, mask=None, training=False):
        """As `advance`, with v_first of RWKV-7, or None in the first block: returns the output, v_first, the state."""
        of_time, of_channels = state
        normed = call_layer(self.ln1, x)
        if self.version == 7:
            y, v_first, of_time = self.time_mixing.mix(normed, of_time, v_first, mask, training)
        else:
            y, of_time = self.time_mixing.advance(normed, of_time, mask, training)
        x = x + y
        y, of_channels = self.channel_mixing.advance(call_layer(self.ln2, x), of_channels, mask, training)
        return x + y, v_first, (of_time, of_channels)

    def stepper(self, batch_size, steps=1):
        return stepper_of(self, batch_size, steps)

    def mix_stepper(self, batch_size, steps=1):
        """`mix` on single steps `(b, d)`, made ready as by `stepper`; None if there is nothing to be gained."""
        mix = self.time_mixing.mix_stepper(batch_size, steps) if self.version == 7 else None
        if mix is None:
            return None
        ln1, ln2, channels = norm_of(self.ln1), norm_of(self.ln2), self.channel_mixing.stepper(batch_size, steps)

        def step(x, state, v_first):
            of_time, of_channels = state
            y, v_first, of_time = mix(ln1(x), of_time, v_first)
            x = x + y
            y, of_channels = channels(ln2(x), of_channels)
            return x + y, v_first, (of_time, of_channels)

        return step
