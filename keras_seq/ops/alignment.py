"""How much each step of one sequence attends to each step of another: weights that a recurrent decoder reads by."""

from keras import ops


def additive_scores(queries, keys, v, bias=None):
    """`v . tanh(q + k)` for queries `(b, n, u)`, keys `(b, s, u)` and v `(u,)`: `(b, n, s)`.

    Args:
        bias: `(b, n, s, u)` added to the sum of a query and a key, or None.

    Source: Bahdanau et al. 2015, arXiv:1409.0473, section A.1.2.
    """
    total = queries[:, :, None] + keys[:, None]
    return ops.sum(v * ops.tanh(total if bias is None else total + bias), axis=-1)


def masked_softmax(scores, valid):
    """Weights `(b, n, s)` that sum to 1 over the valid steps, and to exactly 0 where there is none.

    Args:
        scores: `(b, n, s)`.
        valid: bool, what broadcasts to it.
    """
    scores = ops.where(valid, scores, ops.full_like(scores, -1e30))
    weights = ops.exp(scores - ops.stop_gradient(ops.max(scores, axis=-1, keepdims=True)))
    weights = ops.where(valid, weights, ops.zeros_like(weights))
    total = ops.sum(weights, axis=-1, keepdims=True)
    return weights / ops.where(total > 0, total, ops.ones_like(total))


def local_weights(scores, center, valid, window):
    """Weights near a predicted center: softmax within `center +- window`, times a Gaussian around it.

    `a_s = softmax(score)_s exp(-(s - p)^2 / (2 sigma^2))`, `sigma = window / 2`

    Args:
        scores: `(b, n, s)`.
        center: p, `(b, n)`, from 0 to 1: a part of the number of valid steps.
        valid: `(b, s)` bool.
        window: D, in steps.

    Source: Luong et al. 2015, arXiv:1508.04025, eq. 9-10.
    """
    count = ops.cumsum(ops.cast(valid, "int32"), axis=1)
    steps = ops.cast(count - 1, scores.dtype)[:, None]  # padding takes no room
    distance = steps - center[:, :, None] * ops.cast(count[:, -1:], scores.dtype)[:, :, None]
    near = ops.logical_and(valid[:, None], ops.abs(distance) <= window)
    return masked_softmax(scores, near) * ops.exp(-0.5 * ops.square(distance / (window / 2)))


def monotonic_weights(scores, before, valid):
    """The expected alignment of a reader that only moves forward and stops at step s with probability `sigmoid(score)`.

    `a_j = p_j sum_{k <= j} a'_k prod_{k <= l < j} (1 - p_l)`, `p = sigmoid(score)`, where a' is the alignment before.

    Args:
        scores: `(b, n, s)`.
        before: a', `(b, n, s)`.
        valid: `(b, s)` bool; the reader passes over padding.

    Returns: `(b, n, s)`; what is missing to a sum of 1 is the probability that the reader ran off the end.

    Source: Raffel et al. 2017, arXiv:1704.00784, eq. 8-10; in the form of sums of logarithms, which never divides.
    """
    valid = valid[:, None]
    stop = ops.where(valid, ops.sigmoid(scores), ops.zeros_like(scores))
    passed = ops.where(valid, ops.log_sigmoid(-scores), ops.zeros_like(scores))  # log(1 - p)
    passed = ops.cumsum(passed, axis=-1) - passed  # before step j
    between = passed[..., None, :] - passed[..., :, None]  # (b, n, k, j), <= 0 where k <= j
    steps = ops.arange(scores.shape[-1] or ops.shape(scores)[-1])
    forward = steps[:, None] <= steps[None]
    reach = ops.where(forward, ops.exp(ops.where(forward, between, ops.zeros_like(between))), ops.zeros_like(between))
    return stop * ops.sum(before[..., None] * reach, axis=-2)


def hard_monotonic_weights(scores, before, valid):
    """`monotonic_weights` of a reader that stops at the first step whose score is above 0: one step, or none.

    Args: as in `monotonic_weights`, where `before` is one step, or none: then it has run off the end, and stays there.
    """
    stop = ops.cast(ops.logical_and(scores > 0, valid[:, None]), scores.dtype)
    stop = stop * ops.cumsum(before, axis=-1)
    return stop * ops.cast(ops.cumsum(stop, axis=-1) <= 1, scores.dtype)
