"""The optimizer that RWKV is trained with."""

import keras

from keras_seq.layers.rwkv_weights import RWKVLayer

_MATRICES = ("kernel", "embeddings", "time_state")
_MULTIPLES = {"w0": 2.0, "time_decay": 2.0, "time_first": 3.0}


@keras.saving.register_keras_serializable("keras_seq")
class GroupedAdamW(keras.optimizers.AdamW):
    """AdamW with a learning rate of their own for some weights.

    `m' = beta_1 m + (1 - beta_1) g`; `v' = beta_2 v + (1 - beta_2) g^2`;
    `theta' = theta - c alpha (sqrt(1 - beta_2^t) / (1 - beta_1^t) m' / (sqrt(v') + epsilon) + lambda theta)`, where c
    is the multiple of the weight, alpha the learning rate, and lambda the weight decay, 0 for weights that are not
    `decayed`.

    Args:
        learning_rate: as in `keras.optimizers.AdamW`.
        multiples: `{name of a weight: multiple of the learning rate}`; the others have 1. Weight decay, which is a part
            of the learning rate, has the same multiple.
        decayed: names of the weights that weight decay is for, or None for all.
        **kwargs: `weight_decay`, `beta_1`, `beta_2`, `epsilon`, `clipnorm` and the others of `keras.optimizers.AdamW`.

    Raises: ValueError for a multiple below 0.

    Source: Loshchilov & Hutter 2019, arXiv:1711.05101, algorithm 2.

    Example:

        optimizer = keras_seq.models.GroupedAdamW(1e-3, multiples={"bias": 2.0}, decayed=["kernel"], weight_decay=0.01)
        model = keras_seq.models.RecurrentLM(vocab_size=20, d_model=8)
        model.compile(optimizer)
    """

    def __init__(self, learning_rate=0.001, multiples=None, decayed=None, **kwargs):
        super().__init__(learning_rate, **kwargs)
        self.multiples, self.decayed = dict(multiples or {}), None if decayed is None else list(decayed)
        if any(multiple < 0 for multiple in self.multiples.values()):
            raise ValueError(f"`multiples` must not be below 0. Received: multiples={multiples!r}")

    def build(self, variables):
        if not self.built:
            names = [variable.name for variable in variables]
            self._multiple_of = [self.multiples.get(name, 1.0) for name in names]
            self._is_decayed = [self.decayed is None or name in self.decayed for name in names]
        super().build(variables)

    def update_step(self, gradient, variable, learning_rate):
        # On TensorFlow that of an embedding is sparse, and the squares of a token that comes twice would be added up:
        # to reshape it makes it dense.
        gradient = keras.ops.reshape(gradient, variable.shape)
        multiple = self._multiple_of[self._get_variable_index(variable)]
        learning_rate = learning_rate if multiple == 1 else learning_rate * multiple
        if self.weight_decay and self._use_weight_decay(variable):
            part = keras.ops.cast(learning_rate, variable.dtype) * self.weight_decay
            self.assign_sub(variable, variable * part)
        super().update_step(gradient, variable, learning_rate)

    def _apply_weight_decay(self, variables):
        """Done in `update_step`, which knows the multiples."""

    def _use_weight_decay(self, variable):
        return self._is_decayed[self._get_variable_index(variable)] and super()._use_weight_decay(variable)

    def get_config(self):
        return super().get_config() | {"multiples": self.multiples, "decayed": self.decayed}


def rwkv_optimizer(model, learning_rate=6e-4, weight_decay=0.001, **kwargs):
    """The optimizer of the official training code of RWKV: AdamW with groups of weights.

    `theta' = theta - c alpha (Adam(g) + lambda theta)`, as in `GroupedAdamW`.

    Weight decay lambda is for matrices alone. The decay in time is learned 2 times as fast as the rest (`c = 2`: `w0`
    of RWKV-7, `time_decay` of the earlier), the bonus of the present step 3 times (`c = 3`: `time_first`). The betas
    are 0.9 and 0.99, epsilon is 1e-18.

    Args:
        model: an `RWKV`, or another model with blocks of it.
        learning_rate: a number or a schedule. Official: a cosine from 6e-4 to 6e-5, after a warm-up of 10 steps.
        weight_decay: of the matrices.
        **kwargs: others of `GroupedAdamW`, for example `clipnorm=1.0`.

    Returns:
        an optimizer that is compiled, saved and loaded as any of Keras.

    Raises: ValueError for a model without a layer of RWKV.

    Source: RWKV-LM, `RWKV-v7/train_temp/src/model.py` and `RWKV-v5/src/model.py`, `configure_optimizers`.

    Example:

        model = keras_seq.models.RWKV(100, d_model=32, num_layers=2, head_dim=16)
        schedule = keras.optimizers.schedules.CosineDecay(0.0, 1000, warmup_target=6e-4, warmup_steps=10, alpha=0.1)
        model.compile(keras_seq.models.rwkv_optimizer(model, schedule))
    """
    if not any(isinstance(layer, RWKVLayer) for layer in model._flatten_layers()):
        raise ValueError(f"expected a model with layers of RWKV. Received: {model!r}")
    official = {"beta_1": 0.9, "beta_2": 0.99, "epsilon": 1e-18, "weight_decay": weight_decay}
    return GroupedAdamW(learning_rate, _MULTIPLES, _MATRICES, **official | kwargs)
