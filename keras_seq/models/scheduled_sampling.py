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
    """Scheduled sampling where the probability of the true token is the same at all train steps.

    `p = probability`, where p is the probability of the true token.

    Args:
        probability: of the true token, from 0 to 1.

    Call: step, the number of train steps so far, an integer or a tensor of integers -> p, float32 of the same shape.

    Raises: ValueError outside of that range.

    Source: Bengio et al. 2015, arXiv:1506.03099, section 2.4 ("always sampling" with 0).

    Example:

        schedule = keras_seq.models.ConstantSampling(0.75)
        p = [float(schedule(step)) for step in (0, 100, 1000)]  # [0.75, 0.75, 0.75]
        model = keras_seq.models.Seq2Seq(30, 40, d_model=8, scheduled_sampling=schedule)
    """

    def __init__(self, probability=0.75):
        self.probability = _within(probability=probability)

    def __call__(self, step):
        return ops.full_like(ops.cast(step, "float32"), self.probability)


@keras.saving.register_keras_serializable("keras_seq")
class LinearSampling(_Schedule):
    """Scheduled sampling where the probability of the true token falls linearly with the train steps.

    `p = max(floor, 1 - step / steps)`, where p is the probability of the true token.

    Args:
        steps: number of train steps after which p would be 0.
        floor: the least p.

    Call: step, the number of train steps so far, an integer or a tensor of integers -> p, float32 of the same shape.

    Raises: ValueError for steps < 1 and a floor that is not from 0 to 1.

    Source: Bengio et al. 2015, arXiv:1506.03099, section 2.4.

    Example:

        schedule = keras_seq.models.LinearSampling(steps=400, floor=0.25)
        p = [float(schedule(step)) for step in (0, 100, 1000)]  # [1.0, 0.75, 0.25]
        model = keras_seq.models.Seq2Seq(30, 40, d_model=8, scheduled_sampling=schedule)
    """

    def __init__(self, steps, floor=0.0):
        if steps < 1:
            raise ValueError(f"`steps` must be >= 1. Received: steps={steps!r}")
        self.steps, self.floor = steps, _within(floor=floor)

    def __call__(self, step):
        return ops.maximum(self.floor, 1 - ops.cast(step, "float32") / self.steps)


@keras.saving.register_keras_serializable("keras_seq")
class ExponentialSampling(_Schedule):
    """Scheduled sampling where the probability of the true token falls exponentially with the train steps.

    `p = max(floor, k^step)`, where p is the probability of the true token.

    Args:
        k: above 0 and below 1.
        floor: the least p.

    Call: step, the number of train steps so far, an integer or a tensor of integers -> p, float32 of the same shape.

    Raises: ValueError for a k outside of that range and a floor that is not from 0 to 1.

    Source: Bengio et al. 2015, arXiv:1506.03099, section 2.4.

    Example:

        schedule = keras_seq.models.ExponentialSampling(k=0.99, floor=0.1)
        p = [float(schedule(step)) for step in (0, 100, 1000)]  # [1.0, 0.366..., 0.1]
        model = keras_seq.models.Seq2Seq(30, 40, d_model=8, scheduled_sampling=schedule)
    """

    def __init__(self, k, floor=0.0):
        if not 0 < k < 1:
            raise ValueError(f"`k` must be above 0 and below 1. Received: k={k!r}")
        self.k, self.floor = k, _within(floor=floor)

    def __call__(self, step):
        return ops.maximum(self.floor, ops.exp(ops.cast(step, "float32") * math.log(self.k)))


@keras.saving.register_keras_serializable("keras_seq")
class InverseSigmoidSampling(_Schedule):
    """Scheduled sampling where the probability of the true token falls along a sigmoid of the train steps.

    `p = max(floor, k / (k + exp(step / k)))`, where p is the probability of the true token: near 1 for long, if k is
    large, and 1/2 after `k log(k)` steps.

    Args:
        k: >= 1.
        floor: the least p.

    Call: step, the number of train steps so far, an integer or a tensor of integers -> p, float32 of the same shape.

    Raises: ValueError for k < 1 and a floor that is not from 0 to 1.

    Source: Bengio et al. 2015, arXiv:1506.03099, section 2.4.

    Example:

        schedule = keras_seq.models.InverseSigmoidSampling(k=100)
        p = [float(schedule(step)) for step in (0, 100, 1000)]  # [0.990..., 0.973..., 0.004...]
        model = keras_seq.models.Seq2Seq(30, 40, d_model=8, scheduled_sampling=schedule)
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
