"""Logits processors against plain Python, and in generation."""

import numpy as np
import pytest
from keras import ops
from tables import Table

from keras_seq.decoding import (
    BannedTokens,
    ForcedTokens,
    Greedy,
    MinLength,
    NoRepeatNGrams,
    PrefixConstraint,
    RepetitionPenalty,
    Sampling,
    generate,
    stream,
)

V, ROWS, CAPACITY = 6, 5, 8
RNG = np.random.default_rng(0)
LOGITS = RNG.normal(size=(ROWS, V)).astype("float32")
TOKENS = RNG.integers(1, V, (ROWS, CAPACITY)).astype("int32")
NEVER = -1e30
PROMPTS = [[1, 2], [3, 5], [4, 4]]


def repetition(row, tokens):
    return [(x / 1.5 if x > 0 else x * 1.5) if i in tokens else x for i, x in enumerate(row)]


def no_repeat(n):
    def run(row, tokens):
        seen = {tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)}
        begun = tuple(tokens[len(tokens) - n + 1 :]) if len(tokens) >= n - 1 else None
        return [NEVER if begun is not None and (*begun, i) in seen else x for i, x in enumerate(row)]

    return run


def without(condition):
    return lambda row, tokens: [NEVER if condition(i, len(tokens)) else x for i, x in enumerate(row)]


def after_greater(tokens, length):
    """A token may not follow a greater one."""
    last = ops.take(tokens, ops.maximum(length - 1, 0), axis=1)
    return ops.logical_or(length == 0, ops.arange(V, dtype="int32")[None] >= last[:, None])


CASES = {
    "repetition": (RepetitionPenalty(1.5), repetition),
    "unigrams": (NoRepeatNGrams(1), no_repeat(1)),
    "bigrams": (NoRepeatNGrams(2), no_repeat(2)),
    "trigrams": (NoRepeatNGrams(3), no_repeat(3)),
    "longer than all": (NoRepeatNGrams(CAPACITY + 1), lambda row, tokens: row),
    "length": (MinLength(3, (2, 4)), without(lambda i, n: n < 3 and i in (2, 4))),
    "banned": (BannedTokens([1, 5]), without(lambda i, n: i in (1, 5))),
    "forced": (ForcedTokens({0: 3, 5: 2}), without(lambda i, n: i != {0: 3, 5: 2}.get(n, i))),
    "constraint": (
        PrefixConstraint(after_greater),
        lambda row, tokens: [NEVER if tokens and i < tokens[-1] else x for i, x in enumerate(row)],
    ),
}


@pytest.mark.parametrize("length", [0, 1, 2, 5, CAPACITY])
@pytest.mark.parametrize("name", CASES)
def test_one_processor(name, length):
    """What stands in the tokens after `length` counts not."""
    processor, by_hand = CASES[name]
    tokens = np.where(np.arange(CAPACITY) < length, TOKENS % 4 + 1, RNG.integers(0, V, TOKENS.shape)).astype("int32")
    arrays = (ops.convert_to_tensor(x) for x in (LOGITS, tokens, np.int32(length)))
    got = ops.convert_to_numpy(processor(*arrays))
    expected = [by_hand(row.tolist(), of_row[:length]) for row, of_row in zip(LOGITS, tokens.tolist(), strict=True)]
    np.testing.assert_allclose(got, np.array(expected, "float32"), rtol=1e-6)


def test_equal_ones_are_compiled_once():
    for make in (
        lambda: RepetitionPenalty(1.5),
        lambda: NoRepeatNGrams(2),
        lambda: MinLength(3, [2, 4]),
        lambda: BannedTokens(np.array([1, 2])),
        lambda: ForcedTokens({0: 3}),
        lambda: PrefixConstraint(after_greater),
    ):
        assert hash(make()) == hash(make())
        assert make() == make()


@pytest.fixture(scope="module")
def model():
    return Table.random(V, seed=3)


def by_hand(model, prompt, processors, stop_tokens=(), n=6):
    """Greedy, with functions of one row."""
    tokens = []
    while len(tokens) < n and not set(tokens) & set(stop_tokens):
        row = model.log_probabilities(prompt, tokens)
        for processor in processors:
            row = processor(list(row), tokens)
        row = np.where(np.arange(V) == 0, NEVER, row)
        if row.max() <= NEVER:
            break
        tokens.append(int(np.argmax(row)))
    return tokens


LISTS = {
    "bigrams, length": (["bigrams", "length"], (2, 4)),
    "forced, constraint": (["forced", "constraint"], ()),
    "unigrams": (["unigrams"], ()),  # after five tokens nothing is left
}


@pytest.mark.parametrize("name", LISTS)
def test_generation(model, name):
    """All at once, one by one, and by hand."""
    names, stop_tokens = LISTS[name]
    processors, functions = zip(*(CASES[name] for name in names), strict=True)
    given = {"stop_tokens": stop_tokens, "processors": processors}
    tokens = generate(model, PROMPTS, 6, Greedy(), **given)
    expected = [by_hand(model, prompt, functions, stop_tokens) for prompt in PROMPTS]
    assert tokens.tolist() == [row + [0] * (6 - len(row)) for row in expected]
    streamed = list(stream(model, PROMPTS, 6, Greedy(), **given))
    np.testing.assert_array_equal(np.stack(streamed, 1), tokens[:, : max(map(len, expected))])
    if name == "unigrams":
        assert list(stream(model, PROMPTS[0], 6, Greedy(), **given)) == expected[0]  # no filling at the end
        assert len(expected[0]) == 5


def test_the_order_is_that_of_the_list(model):
    """Twice the penalty of what is left after it was ruled out is still ruled out; -inf rules out as well."""
    banned = [lambda logits, tokens, length: ops.where(ops.arange(V) < 4, -np.inf, logits), RepetitionPenalty(1e6)]
    assert set(generate(model, PROMPTS, 6, Sampling(5.0), seed=0, processors=banned).flat) == {4, 5}


def test_the_same_seed_gives_the_same_sample(model):
    given = {"seed": 3, "processors": [CASES["constraint"][0]]}
    tokens = generate(model, [PROMPTS[0]] * 4, 6, Sampling(3.0), **given)
    assert (np.diff(tokens, axis=1) >= 0).all()
    assert len({tuple(row) for row in tokens.tolist()}) > 1
    np.testing.assert_array_equal(generate(model, [PROMPTS[0]] * 4, 6, Sampling(3.0), **given), tokens)
    streamed = list(stream(model, [PROMPTS[0]] * 4, 6, Sampling(3.0), **given))
    np.testing.assert_array_equal(np.stack(streamed, 1), tokens)


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: RepetitionPenalty(0.0), "`penalty` must be > 0. Received: 0.0"),
        (lambda: NoRepeatNGrams(0), "`n` must be an integer >= 1. Received: 0"),
        (lambda: NoRepeatNGrams(2.0), "Received: 2.0"),
        (lambda: MinLength(-1, (2,)), "`n` must be an integer >= 0. Received: -1"),
        (lambda: ForcedTokens({-1: 2}), "Positions must be >= 0"),
        (lambda: BannedTokens([V])(LOGITS, TOKENS, 0), r"from 0 to 5. A logits processor was given \[6\]"),
        (lambda: MinLength(1, [-1])(LOGITS, TOKENS, 0), r"given \[-1\]"),
        (lambda: ForcedTokens({2: 9})(LOGITS, TOKENS, 0), r"given \[9\]"),
    ],
)
def test_errors(make, named):
    with pytest.raises(ValueError, match=named):
        make()
