"""How often a decoder in training sees the true token before, and how often its own guess.

A schedule is a function of the number of train steps so far that gives the probability of the true token.
"""

import math

import keras
from keras import ops


class _Schedule:
    """Its config is its arguments."""

    def get_config(self):
        """The arguments of the constructor."""
        return dict(vars(self))

    @classmethod
    def from_config(cls, config):
        return cls(**config)


@keras.saving.register_keras_serializable("keras_seq")
class ConstantSampling(_Schedule):
    """`p = probability`.

    Args:
        probability: of the true token, from 0 to 1.

    Raises: ValueError outside of that range.

    Source: Bengio et al. 2015, arXiv:1506.03099, section 2.4 ("always sampling" with 0).
    """

    def __init__(self, probability=0.75):
        self.probability = _within(probability=probability)

    def __call__(self, step):
        return ops.full_like(ops.cast(step, "float32"), self.probability)


@keras.saving.register_keras_serializable("keras_seq")
class LinearSampling(_Schedule):
    """`p = max(floor, 1 - step / steps)`.

    Args:
        steps: number of train steps after which p would be 0.
        floor: the least p.

    Raises: ValueError for steps < 1 and a floor that is not from 0 to 1.

    Source: Bengio et al. 2015, arXiv:1506.03099, section 2.4.
    """

    def __init__(self, steps, floor=0.0):
        if steps < 1:
            raise ValueError(f"`steps` must be >= 1. Received: steps={steps!r}")
        self.steps, self.floor = steps, _within(floor=floor)

    def __call__(self, step):
        return ops.maximum(self.floor, 1 - ops.cast(step, "float32") / self.steps)


@keras.saving.register_keras_serializable("keras_seq")
class ExponentialSampling(_Schedule):
    """`p = max(floor, k^step)`.

    Args:
        k: from 0 to below 1.
        floor: the least p.

    Raises: ValueError outside of these ranges.

    Source: Bengio et al. 2015, arXiv:1506.03099, section 2.4.
    """

    def __init__(self, k, floor=0.0):
        if not 0 < k < 1:
            raise ValueError(f"`k` must be above 0 and below 1. Received: k={k!r}")
        self.k, self.floor = k, _within(floor=floor)

    def __call__(self, step):
        return ops.maximum(self.floor, ops.exp(ops.cast(step, "float32") * math.log(self.k)))


@keras.saving.register_keras_serializable("keras_seq")
class InverseSigmoidSampling(_Schedule):
    """`p = max(floor, k / (k + exp(step / k)))`: near 1 for long, 1/2 after `k log(k)` steps.

    Args:
        k: >= 1.
        floor: the least p.

    Raises: ValueError outside of these ranges.

    Source: Bengio et al. 2015, arXiv:1506.03099, section 2.4.
    """

    def __init__(self, k, floor=0.0):
        if k < 1:
            raise ValueError(f"`k` must be >= 1. Received: k={k!r}")
        self.k, self.floor = k, _within(floor=floor)

    def __call__(self, step):
        return ops.maximum(self.floor, ops.sigmoid(math.log(self.k) - ops.cast(step, "float32") / self.k))


def get_schedule(schedule):
    """None, a number (the constant probability of the true token), or a function of the step as it is."""
    if schedule is None or callable(schedule):
        return schedule
    if isinstance(schedule, int | float):
        return ConstantSampling(schedule)
    raise ValueError(
        "`scheduled_sampling` must be None, the probability of the true token, or a schedule such as "
        f"InverseSigmoidSampling(k). Received: {schedule!r}"
    )


def _within(**named):
    ((name, p),) = named.items()
    if not 0 <= p <= 1:
        raise ValueError(f"`{name}` must be a probability from 0 to 1. Received: {name}={p!r}")
    return p
