"""Additive, dot, coverage and monotonic attention against loops in NumPy, and what they refuse."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_seq import layers

# JAX has float64 off, unless it is switched on for the whole process.
DTYPE, EXACT = ("float32", 2e-6) if keras.backend.backend() == "jax" else ("float64", 1e-12)
RNG = np.random.default_rng(0)
X, MEMORY = RNG.normal(size=(3, 4, 6)), RNG.normal(size=(3, 5, 6))
VALID = np.array([[1, 1, 1, 0, 0], [0, 1, 1, 0, 1], [0, 0, 0, 0, 0]], bool)


def array(x):
    return np.asarray(ops.convert_to_numpy(x), "float64")


def run(layer, training=False, **kwargs):
    """`(y, weights)`."""
    y, weights = layer(X, MEMORY, memory_mask=VALID, return_attention_scores=True, training=training, **kwargs)
    return array(y), array(weights)


def rows(weigh):
    """What a loop over rows, steps and valid memory gives: `weigh(q, memory, own) -> (a, own)`, own None at first."""
    weights = np.zeros((3, 4, 5))
    for b in range(3):
        own = None
        for t in range(4):
            if VALID[b].any():
                weights[b, t, VALID[b]], own = weigh(X[b, t], MEMORY[b][VALID[b]], own)
    return weights


def softmax(scores):
    e = np.exp(scores - scores.max())
    return e / e.sum()


def scores_of(layer, extra=0.0):
    """`v . tanh(q W_q + m W_m + b + extra)` by the weights of the layer."""
    w_q, w_m, v = (array(w) for w in (layer.query_dense.kernel, layer.memory_dense.kernel, layer.v))
    b = array(layer.query_dense.bias) if layer.query_dense.bias is not None else 0
    if getattr(layer, "normalize", False):
        v = array(layer.gain) * v / np.linalg.norm(v)
    return lambda q, m, extra=0.0: np.tanh(q @ w_q + m @ w_m + b + extra) @ v


def randomized(layer):
    """Built, with a value in every weight."""
    layer.build(X.shape, MEMORY.shape)
    layer.built = True
    rng = np.random.default_rng(1)
    layer.set_weights([rng.normal(size=w.shape) for w in layer.weights])
    return layer


@pytest.mark.parametrize("normalize", [False, True])
def test_additive(normalize):
    layer = randomized(layers.AdditiveAttention(7, normalize=normalize, dtype=DTYPE))
    scores = scores_of(layer)
    expected = rows(lambda q, m, own: (softmax(scores(q, m)), None))
    y, weights = run(layer)
    np.testing.assert_allclose(weights, expected, atol=EXACT)
    np.testing.assert_allclose(y, expected @ MEMORY, atol=EXACT)
    assert not y[2].any()  # nothing to read: exactly 0


def test_coverage():
    layer = randomized(layers.CoverageAttention(7, dtype=DTYPE))
    scores, w_c = scores_of(layer), array(layer.coverage)

    def weigh(q, m, c):
        c = np.zeros(len(m)) if c is None else c
        a = softmax(scores(q, m, c[:, None] * w_c))
        return a, c + a

    np.testing.assert_allclose(run(layer)[1], rows(weigh), atol=EXACT)


@pytest.mark.parametrize("training", [False, True])
def test_monotonic(training):
    layer = randomized(layers.MonotonicAttention(7, dtype=DTYPE))
    layer.score_bias.assign(-0.25)
    scores, r = scores_of(layer), -0.25

    def expectation(q, m, before):
        before = np.eye(len(m))[0] if before is None else before
        p, a, q_j = 1 / (1 + np.exp(-scores(q, m) - r)), np.zeros(len(m)), 0.0
        for j in range(len(m)):  # eq. 9 and 10 of the paper: q_j = (1 - p_(j-1)) q_(j-1) + a'_j
            q_j = ((1 - p[j - 1]) * q_j if j else 0.0) + before[j]
            a[j] = p[j] * q_j
        return a, a

    def hard(q, m, before):
        start = 0 if before is None else before
        stops = [j for j in range(len(m)) if j >= start and scores(q, m)[j] + r > 0]
        j = stops[0] if stops else len(m)
        return np.eye(len(m) + 1)[j][:-1], j

    # In rows that begin with padding the reader starts before the first valid step: at it, that is.
    expected = rows(expectation if training else hard)
    np.testing.assert_allclose(run(layer, training)[1], expected, atol=EXACT)


@pytest.mark.parametrize("window", [None, 1.5])
@pytest.mark.parametrize("score", ["dot", "general", "concat"])
def test_dot(score, window):
    layer = randomized(layers.DotAttention(score, window=window, dtype=DTYPE))

    def weigh(q, m, own):
        if score == "concat":
            s = scores_of(layer)(q, m)
        else:
            s = m @ q if score == "dot" else (m @ array(layer.memory_dense.kernel)) @ q
        if window is None:
            return softmax(s), None
        center = np.tanh(q @ array(layer.center_dense.kernel)) @ array(layer.center_v)
        distance = np.arange(len(m)) - len(m) / (1 + np.exp(-center))
        near = np.abs(distance) <= window
        a = np.zeros(len(m))
        a[near] = softmax(s[near]) * np.exp(-0.5 * (distance[near] / (window / 2)) ** 2)
        return a, None

    expected = rows(weigh)
    y, weights = run(layer)
    np.testing.assert_allclose(weights, expected, atol=EXACT)
    np.testing.assert_allclose(y, expected @ MEMORY, atol=EXACT)


def test_dot_is_keras_attention():
    theirs = keras.layers.Attention(dtype=DTYPE)([X[:2], MEMORY[:2]], mask=[None, ops.convert_to_tensor(VALID[:2])])
    ours = layers.DotAttention("dot", dtype=DTYPE)(X[:2], MEMORY[:2], memory_mask=VALID[:2])
    np.testing.assert_allclose(array(ours), array(theirs), atol=1e-6)


def test_a_memory_may_serve_several_rows():
    memory = MEMORY.astype("float32")
    for make in (layers.AdditiveAttention, layers.CoverageAttention, lambda n: layers.DotAttention(window=2)):
        layer = randomized(make(7))
        seen = layer.memory(ops.convert_to_tensor(memory[:2]), ops.convert_to_tensor(VALID[:2]))
        x = ops.convert_to_tensor(RNG.normal(size=(6, 1, 6)).astype("float32"))
        y, weights, _ = layer.attend(x, seen, layer.own_state(6, seen))
        copied = [ops.repeat(v, 3, axis=0) for v in seen]
        expected, expected_weights, _ = layer.attend(x, copied, layer.own_state(6, copied))
        np.testing.assert_allclose(array(y), array(expected), atol=1e-6)
        np.testing.assert_allclose(array(weights), array(expected_weights), atol=1e-6)


def test_noise_moves_the_expectation_in_training_only():
    layer = randomized(layers.MonotonicAttention(7, noise=2.0))
    layer.normalize = False
    a, b = run(layer, True)[1], run(layer, True)[1]
    assert np.abs(a - b).max() > 1e-3
    np.testing.assert_array_equal(run(layer)[1], run(layer)[1])


def test_monotonic_in_half_precision():
    layer = layers.MonotonicAttention(7, dtype="mixed_bfloat16")
    y, state = layer(X, MEMORY, memory_mask=VALID, return_state=True, training=True)
    assert keras.backend.standardize_dtype(y.dtype) == "bfloat16"
    assert keras.backend.standardize_dtype(state[0].dtype) == "float32"
    full = layers.MonotonicAttention(7)
    full.build(X.shape, MEMORY.shape)
    full.set_weights(layer.get_weights())
    np.testing.assert_allclose(array(y), array(full(X, MEMORY, memory_mask=VALID, training=True)), atol=0.05)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: layers.AdditiveAttention(0), "units=0"),
        (lambda: layers.DotAttention("scaled"), "'scaled'"),
        (lambda: layers.DotAttention(window=0), "window=0"),
        (lambda: layers.MonotonicAttention(4, noise=-1), "noise=-1"),
        (lambda: layers.AdditiveAttention(4, stateful=True), "stateful"),
        (lambda: layers.DotAttention()(X, MEMORY[..., :3]), "6 and 3"),
        (lambda: layers.AdditiveAttention(4)(X), "second sequence"),
        (lambda: layers.AdditiveAttention(4)(X, MEMORY[:2]), r"\(3, any, 6\)"),
        (lambda: layers.AdditiveAttention(4)(X, MEMORY, memory_mask=VALID[:, :2]), "memory_mask"),
        (lambda: layers.AdditiveAttention(4)(X, MEMORY, memory_mask=np.ones((3, 5))), "bool"),
        (lambda: layers.AdditiveAttention(4).initial_state(3, memory=MEMORY), "must be built"),
    ],
)
def test_errors(make, words):
    with pytest.raises(ValueError, match=words):
        make()
