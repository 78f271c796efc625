"""Samplers against brute force in NumPy. `u` is given, so a fixed grid of it shows the distribution exactly."""

import numpy as np
import pytest
from keras import ops

from keras_seq.decoding import Greedy, Sampling, get_sampler
from keras_seq.decoding.sampling import draw

N = 2000
GRID = ((np.arange(N) + 0.5) / N).astype("float32")
LOGITS = np.random.default_rng(3).normal(size=8).astype("float32")


def counts(sampler, row, n=8):
    """How often each index is taken over the grid of u."""
    rows = np.broadcast_to(np.asarray(row, "float32"), (N, len(row)))
    taken = sampler(ops.convert_to_tensor(rows), ops.convert_to_tensor(GRID))
    return np.bincount(ops.convert_to_numpy(taken), minlength=n)


def softmax(logits):
    e = np.exp(logits.astype("float64") - logits.max())
    return e / e.sum()


def expected(logits, temperature=1.0, top_k=None, top_p=None, min_p=None):
    """The probabilities by the words of the docstring, one token after the other."""
    p = softmax(logits / temperature)
    order = np.argsort(-p, kind="stable")[:top_k]
    q = p[order] / p[order].sum()
    kept, total = [], 0.0
    for token, probability in zip(order, q, strict=True):
        if (top_p is not None and total >= top_p) or (min_p is not None and probability < min_p * q[0]):
            break
        kept.append(token)
        total += probability
    result = np.zeros_like(p)
    result[kept] = p[kept] / p[kept].sum()
    return result


def check_distribution(got, p):
    """A cell of length p holds N p points of the grid, give or take one at each end (and one for rounding)."""
    assert got.sum() == N
    assert not got[p == 0].any()
    assert np.abs(got - N * p).max() <= 3
    present = p > 0
    assert (np.square(got - N * p)[present] / (N * p[present])).sum() < present.sum()  # far below chi-square's mean


@pytest.mark.parametrize("scale", [1, 1e-3, 50])
def test_draw_follows_the_distribution(scale):
    """Of probabilities that need not be normalized."""
    p = expected(LOGITS)
    check_distribution(counts(draw, scale * p), p)


@pytest.mark.parametrize(
    "p",
    [
        [0, 0.5, 0, 0.5, 0],
        [0, 0, 1, 0, 0],
        [1, 0, 0, 0, 0],
        [0, 0, 0, 0, 1],
        [0.1, 0.2, 0, 0, 0],
        [0, 1e-30, 0, 1, 0],
    ],
)
@pytest.mark.parametrize("u", [0.0, 1e-30, 0.1, 0.5, 0.9999999, 1 - 2**-24])
def test_draw_never_takes_a_zero(p, u):
    index = ops.convert_to_numpy(
        draw(ops.convert_to_tensor(np.array([p], "float32")), ops.convert_to_tensor(np.array([u], "float32")))
    )
    assert 0 <= index[0] < 5
    assert p[index[0]] > 0


def test_draw_stays_inside_of_a_large_vocabulary():
    """Where the float32 sum of many small numbers is off, the largest u still gives a token of the vocabulary."""
    p = np.full((1, 50_000), 1 / 50_000, "float32")
    p[0, -10:] = 0
    largest = ops.convert_to_tensor(np.array([1 - 2**-24], "float32"))
    assert ops.convert_to_numpy(draw(ops.convert_to_tensor(p), largest))[0] < 49_990


@pytest.mark.parametrize("temperature", [1.0, 0.5, 3.0])
@pytest.mark.parametrize("top_k", [None, 1, 3, 8, 20])
@pytest.mark.parametrize("top_p", [None, 0.05, 0.6, 0.95, 1.0])
def test_sampling_keeps_exactly_the_right_tokens(temperature, top_k, top_p):
    p = expected(LOGITS, temperature, top_k, top_p)
    got = counts(Sampling(temperature, top_k, top_p), LOGITS)
    check_distribution(got, p)
    expected_set = set(np.flatnonzero(p))
    assert set(np.flatnonzero(got)) <= expected_set
    visible = {token for token in expected_set if p[token] * N >= 2}
    assert visible <= set(np.flatnonzero(got))


@pytest.mark.parametrize("arguments", [(), (0.5, 4), (2.0, None, 0.8), (1.0, 6, 0.9)], ids=str)
@pytest.mark.parametrize("min_p", [0.02, 0.3, 1.0])
def test_min_p(arguments, min_p):
    arguments = {**dict(zip(("temperature", "top_k", "top_p"), arguments, strict=False)), "min_p": min_p}
    p = expected(LOGITS, **arguments)
    assert 0 in p
    check_distribution(counts(Sampling(**arguments), LOGITS), p)


def test_top_k_comes_before_top_p():
    """Of 0.4 0.3 0.2 0.1 the first two hold 0.57 and 0.43 among themselves: top_p=0.5 then keeps only the first."""
    logits = np.log(np.array([0.1, 0.4, 0.3, 0.2], "float32"))
    assert set(np.flatnonzero(counts(Sampling(top_k=2, top_p=0.5), logits))) == {1}
    assert set(np.flatnonzero(counts(Sampling(top_p=0.5), logits))) == {1, 2}
    assert set(np.flatnonzero(counts(Sampling(top_k=2), logits))) == {1, 2}


def test_rows_are_independent():
    logits = np.random.default_rng(0).normal(size=(6, 8)).astype("float32")
    u = np.linspace(0, 0.99, 6, dtype="float32")
    sampler = Sampling(0.7, 5, 0.8)
    together = ops.convert_to_numpy(sampler(ops.convert_to_tensor(logits), ops.convert_to_tensor(u)))
    for row in range(6):
        alone = sampler(ops.convert_to_tensor(logits[row : row + 1]), ops.convert_to_tensor(u[row : row + 1]))
        assert ops.convert_to_numpy(alone)[0] == together[row]


def test_temperature_limits():
    """Towards 0 the most probable token, towards infinity all alike."""
    cold = counts(Sampling(1e-4), LOGITS)
    assert cold[LOGITS.argmax()] == N
    hot = counts(Sampling(1e6), LOGITS)
    assert np.abs(hot - N / 8).max() <= 2


def test_a_token_left_out_by_the_model_is_not_drawn():
    """-1e30 and -inf are probability 0, also where top_k would take in more tokens than are left."""
    for low in (-1e30, -np.inf):
        logits = np.where(np.arange(8) < 2, LOGITS, np.float32(low))
        for sampler in (Sampling(), Sampling(top_k=5), Sampling(top_p=1.0)):
            assert set(np.flatnonzero(counts(sampler, logits))) == {0, 1}


def test_greedy_takes_the_first_of_equals():
    logits = np.array([[1, 3, 3, 0], [2, 2, 2, 2]], "float32")
    token = Greedy()(ops.convert_to_tensor(logits), None)
    assert ops.convert_to_numpy(token).tolist() == [1, 0]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_low_precision_logits(dtype):
    """Probabilities are summed in float32 whatever the dtype of the logits."""
    logits = ops.cast(ops.convert_to_tensor(np.broadcast_to(LOGITS, (N, 8)).copy()), dtype)
    rounded = ops.convert_to_numpy(ops.cast(logits, "float32"))[0]
    taken = Sampling(0.9, 6)(logits, ops.convert_to_tensor(GRID))
    check_distribution(np.bincount(ops.convert_to_numpy(taken), minlength=8), expected(rounded, 0.9, 6))


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"temperature": 0}, "`temperature` must be > 0.*Received: 0"),
        ({"temperature": -1.5}, "Received: -1.5"),
        ({"temperature": float("nan")}, "Received: nan"),
        ({"top_k": 0}, "`top_k` must be an integer >= 1 or None. Received: 0"),
        ({"top_k": 2.5}, "Received: 2.5"),
        ({"top_p": 0.0}, r"`top_p` must be in \(0, 1\] or None. Received: 0.0"),
        ({"top_p": 1.5}, "Received: 1.5"),
        ({"min_p": 0}, r"`min_p` must be in \(0, 1\] or None. Received: 0"),
    ],
)
def test_values_out_of_range(arguments, named):
    with pytest.raises(ValueError, match=named):
        Sampling(**arguments)
    with pytest.raises(ValueError, match=named):
        get_sampler(**arguments)


def test_get_sampler():
    assert get_sampler() == get_sampler("greedy") == Greedy()
    assert get_sampler("sample") == Sampling()
    assert get_sampler(temperature=0.8) == get_sampler("sample", temperature=0.8) == Sampling(0.8)
    assert get_sampler(top_k=3) == Sampling(top_k=3)
    assert get_sampler(None, 0.5, 3, 0.9, 0.1) == Sampling(0.5, 3, 0.9, 0.1)
    own = Sampling(0.3)
    assert get_sampler(own) is own
    assert hash(Sampling(0.5, 3)) == hash(Sampling(0.5, 3))


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("beam",), "'beam'"),
        ((3,), "Received: 3"),
        (("greedy", 0.5), "temperature go with sampler='sample'. Received: sampler='greedy'"),
        ((Greedy(), None, 3, 0.5), "top_k, top_p"),
    ],
)
def test_get_sampler_errors(arguments, named):
    with pytest.raises(ValueError, match=named):
        get_sampler(*arguments)
