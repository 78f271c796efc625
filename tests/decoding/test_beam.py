"""Beam search against exhaustive search, and against a search in plain Python."""

import itertools
import math
from collections import Counter

import numpy as np
import pytest
from keras import ops, tree
from tables import Table

from keras_seq import decoding
from keras_seq.models import RecurrentLM, Seq2Seq, Transformer

V = 6
PROMPTS = [[1, 2], [3, 5], [4, 4]]


def random_weights(model, scale=0.7, seed=0):
    model.build((None, None))
    rng = np.random.default_rng(seed)
    for weight in model.trainable_weights:
        weight.assign(scale * rng.normal(size=weight.shape))
    return model


def penalty(length, alpha):
    return ((5 + length) / 6) ** alpha


def by_hand(log_probabilities, k, steps, stop_tokens=(), alpha=0.0, groups=1, diversity=0.0, results=None, early=None):
    """`[(score, tokens)]` from good to bad. `early`: None: never stop early; False, True: `early_stopping`."""
    m, results = k // groups, results or k
    live, kept = [[(0.0, ())] for _ in range(groups)], [[] for _ in range(groups)]
    for length in range(1, steps + 1):
        chosen = Counter()
        for g in range(groups):
            found = []
            for total, tokens in live[g]:
                for token, lp in list(enumerate(log_probabilities(tokens)))[1:]:
                    found.append((total + lp - diversity * chosen[token], total + lp, (*tokens, token)))
            found.sort(reverse=True)
            chosen.update(tokens[-1] for _, _, tokens in found[:m])
            kept[g] += [(s / penalty(length, alpha), t) for _, s, t in found[:m] if t[-1] in stop_tokens]
            kept[g] = sorted(kept[g], reverse=True)[:m]
            live[g] = [(s, t) for _, s, t in found if t[-1] not in stop_tokens][:m]
            least = kept[g][min(results, m) - 1][0] if len(kept[g]) >= min(results, m) else -math.inf
            possible = [max(s / penalty(n, alpha) for n in (length + 1, steps)) for s, _ in live[g]]
            if early is not None and (least >= max(possible, default=-math.inf) or (early and len(kept[g]) == m)):
                live[g] = []
    for g in range(groups):
        kept[g] = sorted(kept[g] + [(s / penalty(steps, alpha), t) for s, t in live[g]], reverse=True)[:m]
    return sorted({found for of_group in kept for found in of_group}, reverse=True)[:results]


def check(beams, row, expected):
    n = len(expected)
    assert [tuple(t[:length]) for t, length in zip(beams.tokens[row].tolist(), beams.lengths[row], strict=True)] == [
        *(tokens for _, tokens in expected),
        *[()] * (len(beams.tokens[row]) - n),
    ]
    np.testing.assert_allclose(beams.scores[row][:n], [score for score, _ in expected], atol=2e-5)
    assert (beams.scores[row][n:] == -np.inf).all()
    after = np.arange(beams.tokens.shape[-1]) >= beams.lengths[row][:, None]
    assert (beams.tokens[row][after] == 0).all()


class Spied(Transformer):
    """Keeps the numbers of rows of the states that are reordered: `(own, memory)` before and after."""

    def reordered(self, state, rows):
        after = super().reordered(state, rows)
        rows_of = [[{leaf.shape[0] for leaf in tree.flatten(part)} for part in s] for s in (state, after)]
        self.__dict__.setdefault("seen", []).append(rows_of)
        return after


def test_all_beams_are_exhaustive_search():
    """With as many beams as there are sequences all are found, with the model's own probabilities of them."""
    model = random_weights(Spied(6, 5, 8, 1, 2, max_length=8, dropout=0.0))
    sources = np.array([[3, 4, 5, 2], [2, 5, 0, 0]])
    tokens = [t for n in (1, 2, 3) for t in itertools.product((1, 2, 3, 4), repeat=n)]
    ended = [t for t in tokens if 2 not in t[:-1] and (t[-1] == 2 or len(t) == 3)]
    k = len(ended)
    beams = model.beam_search(sources, 3, k, num_results=k, length_penalty=0.8, stop_tokens=(2,))
    inputs = np.array([[1, *t, 1, 1][:3] for t in ended])
    for row in range(2):
        logits = ops.convert_to_numpy(model((np.repeat(sources[row : row + 1], k, 0), inputs))).astype("float64")
        p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        scores = [sum(p[i, j, t] for j, t in enumerate(ts)) / penalty(len(ts), 0.8) for i, ts in enumerate(ended)]
        check(beams, row, sorted(zip(scores, ended, strict=True), reverse=True))
    (first, *others), memory = model.seen, {2}  # the memory has a row for each source, at all times
    assert first == [[{2}, memory], [{2 * k}, memory]]
    assert others
    assert all(rows == [[{2 * k}, memory]] * 2 for rows in others)


SEARCHES = {
    "stop": {"k": 4, "stop_tokens": (2,), "results": 2},
    "long is good": {"k": 4, "stop_tokens": (2, 4), "alpha": 1.2},
    "short is good": {"k": 4, "stop_tokens": (2, 4), "alpha": -0.7, "results": 3},
    "early": {"k": 3, "stop_tokens": (2, 4), "alpha": 1.0, "early": True},
    "groups": {"k": 4, "stop_tokens": (2,), "groups": 2, "diversity": 1.5},
}


@pytest.mark.parametrize("name", SEARCHES)
def test_search_in_plain_python(name):
    """Also that a search which ends early, where nothing better can come, gives what it gives in the end."""
    given, steps = {"alpha": 0.0, "stop_tokens": (), "results": SEARCHES[name]["k"]} | SEARCHES[name], 7
    groups, diversity, early = given.pop("groups", 1), given.pop("diversity", 0.0), given.pop("early", None)
    model = Table.random(V, seed=len(name))
    beams = decoding.beam_search(
        model,
        PROMPTS,
        steps,
        given["k"],
        given["results"],
        length_penalty=given["alpha"],
        early_stopping=bool(early),
        num_groups=groups,
        diversity_penalty=diversity,
        stop_tokens=given["stop_tokens"],
    )
    assert (beams.tokens.dtype, beams.scores.dtype) == ("int32", "float32")
    for row, prompt in enumerate(PROMPTS):
        early = False if groups > 1 else early  # a group that is over does not push away those after it
        expected = by_hand(
            lambda t, p=prompt: model.log_probabilities(p, t),
            steps=steps,
            groups=groups,
            diversity=diversity,
            early=early,
            **given,
        )
        check(beams, row, expected)
        assert len(expected) == given["results"] or groups > 1  # which may find the same


@pytest.fixture(scope="module")
def table():
    return Table.random(V, seed=1)


def test_one_beam_is_greedy(table):
    beams = decoding.beam_search(table, PROMPTS, 7, 1, stop_tokens=(4,))
    greedy = decoding.generate(table, PROMPTS, 7, decoding.Greedy(), stop_tokens=(4,))
    np.testing.assert_array_equal(beams.tokens[:, 0], greedy)
    assert (greedy == 0).any()


def test_a_row_of_a_batch_is_that_row_alone(table):
    together = decoding.beam_search(table, PROMPTS, 6, 3, 3, stop_tokens=(2,), length_penalty=0.6)
    for row, prompt in enumerate(PROMPTS):
        alone = decoding.beam_search(table, prompt, 6, 3, 3, stop_tokens=(2,), length_penalty=0.6)
        assert alone.tokens.shape == (3, 6)
        for a, b in zip(alone, together, strict=True):
            np.testing.assert_allclose(a, b[row], rtol=1e-5)


def test_fewer_tokens_are_another_search(table):
    """Of the same compiled function: what has not ended after them counts as it is."""
    beams = decoding.beam_search(table, PROMPTS, 9, 2, 2, stop_tokens=(2,))
    check(beams, 0, by_hand(lambda t: table.log_probabilities(PROMPTS[0], t), 2, 9, (2,)))
    beams = decoding.beam_search(table, PROMPTS, 10, 2, 2, stop_tokens=(2,))
    check(beams, 0, by_hand(lambda t: table.log_probabilities(PROMPTS[0], t), 2, 10, (2,)))


def test_length_penalty_changes_the_order():
    """2 ends. 2 alone has p = 0.4, 1 1 2 has 0.6 * 0.7 * 0.9 = 0.378: divided by 1 and by (8 / 6)^alpha."""
    p = np.full((3, 3, 3), 1e-9)
    p[0, 1], p[1, 1] = [1e-9, 0.6, 0.4], [1e-9, 0.1, 0.9]
    start = np.array([[1e-9, 0.6, 0.4], [1e-9, 0.7, 0.3]])
    p[2, 2], p[2, 1] = start  # after the prompt 2 2, and after its first token 1
    p[1, 1] = [1e-9, 0.1, 0.9]
    model = Table(np.log(p / p.sum(-1, keepdims=True)))
    short, long = math.log(0.4), math.log(0.6 * 0.7 * 0.9)
    for alpha, best in ((0.0, (2,)), (1.0, (1, 1, 2))):
        beams = decoding.beam_search(model, [2, 2], 3, 2, 2, length_penalty=alpha, stop_tokens=(2,))
        expected = sorted([(short, (2,)), (long / penalty(3, alpha), (1, 1, 2))], reverse=True)
        assert expected[0][1] == best
        check(decoding.Beams(*(x[None] for x in beams)), 0, expected)


def test_an_ended_beam_is_not_lost():
    """1 ends with p = 0.3. All that is better at first, and would fill the beams, comes to nothing."""
    p = np.full((5, 5, 5), 0.2)
    p[4, 4] = [1e-9, 0.3, 0.35, 0.35, 1e-9]
    model = Table(np.log(p))
    best = decoding.beam_search(model, [4, 4], 6, 3, stop_tokens=(1,))
    assert best.tokens[0].tolist() == [1, 0, 0, 0, 0, 0]
    np.testing.assert_allclose(best.scores, [math.log(0.3)], atol=1e-4)


def test_coverage_penalty():
    """The score is made of probabilities and attention weights that the model itself gives for the whole sequence."""
    model = random_weights(Seq2Seq(6, 5, 8, cell="gru"), 1.0)
    sources, beta = np.array([[3, 4, 5, 2], [2, 5, 0, 0]]), 0.4
    beams = model.beam_search(sources, 5, 4, num_results=4, length_penalty=0.6, coverage_penalty=beta, stop_tokens=(2,))
    for row, source in enumerate(sources):
        repeated = np.repeat(source[None], 4, 0)
        inputs = np.concatenate([np.ones((4, 1), "int32"), beams.tokens[row, :, :-1]], 1)
        logits = ops.convert_to_numpy(model((repeated, inputs)))
        p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        there = beams.tokens[row] != 0
        p = (np.take_along_axis(p, beams.tokens[row][..., None], 2)[..., 0] * there).sum(1)
        covered = model.alignment(repeated, beams.tokens[row]).sum(1)[:, source != 0]
        expected = p / penalty(beams.lengths[row], 0.6) + beta * np.log(np.minimum(covered, 1)).sum(1)
        np.testing.assert_allclose(beams.scores[row], expected, atol=1e-4)
        assert (np.diff(beams.scores[row]) < 0).all()
    with pytest.raises(ValueError, match=r"step_with_attention.*Table does not.*0.4"):
        decoding.beam_search(Table.random(V), PROMPTS, 5, coverage_penalty=beta)
    plain = random_weights(Seq2Seq(6, 5, 8, cell="gru", attention=None))
    with pytest.raises(ValueError, match="no attention, and so no coverage"):
        plain.beam_search(sources, 5, coverage_penalty=beta)


def test_generate_with_beams():
    """A decoder-only model: the best of its beams, and prompts of several lengths."""
    model = random_weights(RecurrentLM(V, 8, cell="gru"), 1.0)
    prompts = [[1, 2, 3], [4], [5, 2]]
    beams = model.beam_search(prompts, 6, 4, length_penalty=0.6, stop_tokens=(2,))
    tokens = model.generate(prompts, 6, num_beams=4, length_penalty=0.6, stop_tokens=(2,))
    np.testing.assert_array_equal(tokens, beams.tokens[:, 0])
    for prompt, row, score, length in zip(prompts, tokens, beams.scores[:, 0], beams.lengths[:, 0], strict=True):
        sequence = [*prompt, *row[:length].tolist()]
        logits = ops.convert_to_numpy(model(np.array([sequence])))[0, len(prompt) - 1 : -1]
        p = (logits - np.log(np.exp(logits).sum(-1, keepdims=True)))[np.arange(length), sequence[len(prompt) :]]
        assert score == pytest.approx(p.sum() / penalty(length, 0.6), abs=1e-4)
    with pytest.raises(ValueError, match=r"takes no sampler.*num_beams=2.*temperature=0.5"):
        model.generate(prompts, 6, num_beams=2, temperature=0.5)


def test_processors(table):
    """What they rule out is in no sequence, and what is left has the probabilities that it had."""
    only = decoding.PrefixConstraint(odd_then_even)
    beams = decoding.beam_search(table, PROMPTS, 2, 4, 4, processors=[only])
    for row, prompt in enumerate(PROMPTS):
        ruled = lambda t, p=prompt: np.where(  # noqa: E731
            np.arange(V) % 2 == (len(t) + 1) % 2, table.log_probabilities(p, t), -np.inf
        )
        check(beams, row, by_hand(ruled, 4, 2))
    assert (beams.tokens % 2 == [1, 0]).all()


def odd_then_even(tokens, length):
    allowed = ops.arange(V, dtype="int32")[None] % 2 == (length + 1) % 2
    return ops.broadcast_to(allowed, (tokens.shape[0], V))


def test_dead_ends(table):
    """A beam to which the processors leave nothing is dropped; where none is left there is no sequence."""
    banned = decoding.BannedTokens([1, 2, 3, 5])
    beams = decoding.beam_search(table, PROMPTS, 3, 3, 2, processors=[banned])
    assert beams.tokens[:, 0].tolist() == [[4, 4, 4]] * 3
    assert np.isfinite(beams.scores[:, 0]).all()
    assert (beams.scores[:, 1] == -np.inf).all()
    assert not beams.lengths[:, 1].any()
    assert not beams.tokens[:, 1].any()
    beams = decoding.beam_search(table, PROMPTS, 3, 3, 2, processors=[banned, decoding.NoRepeatNGrams(1)])
    assert (beams.scores == -np.inf).all()
    assert not beams.tokens.any()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"num_beams": 0}, "`num_beams` must be an integer >= 1. Received: num_beams=0"),
        ({"num_beams": 2.0}, "num_beams=2.0"),
        ({"num_results": 0}, "num_results=0"),
        ({"num_results": 5}, "`num_results` must be at most num_beams=4. Received: num_results=5"),
        ({"num_groups": 3, "diversity_penalty": 1.0}, "`num_groups` must divide num_beams=4. Received: num_groups=3"),
        (
            {"num_groups": 2},
            r"`diversity_penalty` must be > 0 with num_groups > 1.*diversity_penalty=0.0, num_groups=2",
        ),
        ({"diversity_penalty": 0.5}, "else 0. Received: diversity_penalty=0.5, num_groups=1"),
        ({"length_penalty": float("nan")}, "`length_penalty`.*nan"),
        ({"coverage_penalty": -1.0}, "`coverage_penalty` must be >= 0. Received: -1.0"),
        ({"max_new_tokens": 0}, "`max_new_tokens` must be >= 1. Received: 0"),
        ({"prompt_tokens": [1, V]}, f"from 0 to {V - 1}"),
        ({"processors": [decoding.BannedTokens([V])]}, rf"from 0 to {V - 1}. A logits processor was given \[{V}\]"),
    ],
)
def test_errors(table, arguments, named):
    with pytest.raises(ValueError, match=named):
        decoding.beam_search(table, **{"prompt_tokens": [1, 2], "max_new_tokens": 5} | arguments)
