"""Beam search: the most probable sequences that can be found by keeping the best beginnings at each length.

Axes: b prompts, k beams, g groups, m = k / g beams of a group; n = b g searches, since a group is a search of its own
but for the penalty on the tokens that the groups before it chose. Rows are beams: `(b k, ...) = (n m, ...)`.
"""

import math
from typing import Any, NamedTuple

import numpy as np
from keras import ops

from keras_seq import backend
from keras_seq.decoding.engine import Functions, compiled, read_prompt, rounded_steps, write
from keras_seq.decoding.processors import DEAD, NEVER
from keras_seq.ops.cache import take_rows


class Beams(NamedTuple):
    """The best sequences found for each prompt, from good to bad.

    Args:
        tokens: `(b, n, max_new_tokens)` int32, filled up with `pad_id` (0 if there is none) after the end.
        scores: `(b, n)` float32. Where fewer than n sequences exist, the rest has the score -inf and the length 0.
        lengths: `(b, n)` int32, the numbers of tokens, a stop token included.
    """

    tokens: np.ndarray
    scores: np.ndarray
    lengths: np.ndarray


class _Live(NamedTuple):
    """Beams that have not ended."""

    tokens: Any  # (b k, steps)
    scores: Any  # (n, m): sums of log-probabilities; below `DEAD`, there is no such beam
    coverage: Any  # (b k, s): how much attention each token of the prompt has got, 1 in its padding; or ()


class _Kept(NamedTuple):
    """The best that have ended, from good to bad."""

    tokens: Any  # (n, m, steps)
    scores: Any  # (n, m): final ones
    lengths: Any  # (n, m)


def beam_search(
    model,
    prompt_tokens,
    max_new_tokens,
    num_beams=4,
    num_results=1,
    length_penalty=0.0,
    coverage_penalty=0.0,
    early_stopping=False,
    num_groups=1,
    diversity_penalty=0.0,
    stop_tokens=(),
    processors=(),
    mask=None,
):
    """Searches for the sequences of the best scores after each prompt.

    `score = sum_t log p(y_t) / ((5 + length) / 6)^alpha + beta sum_i log min(sum_t a_ti, 1)`, where p is the model's
    own probability, a_ti the attention of step t to token i of the prompt, and the length that of the new tokens, a
    stop token included.

    At each length the `num_beams` best beginnings go on. One that comes among these by a stop token has ended: it is
    kept by its score, beside the beams and not in place of one, and can be lost to better sequences that have ended
    alone. What has not ended after `max_new_tokens` counts as it is. A search ends before that if none of its beams can
    come among the results any more.

    Args:
        model: see `keras_seq.decoding.engine`.
        prompt_tokens: token ids: `(t,)`, `(b, t)`, or a list of lists of any lengths.
        max_new_tokens: number of tokens, >= 1.
        num_beams: number of beams, >= 1; 1 is the greedy search.
        num_results: number of sequences returned, from 1 to `num_beams`.
        length_penalty: alpha; above 0 long sequences are favoured, below 0 short ones.
        coverage_penalty: beta, >= 0, for models that tell their attention to the prompt.
        early_stopping: whether a search also ends as soon as `num_beams` sequences have ended (of each group, its
            share), though beams might still do better.
        num_groups: number of groups of beams, a divisor of `num_beams`, that are to differ.
        diversity_penalty: > 0 with groups: how much the choice of a token costs a beam for each beam of the groups
            before it that chose the same. It is no part of the score. What several groups find is returned once.
        stop_tokens: a sequence ends with one of these.
        processors: functions `(logits, tokens, length) -> logits`, run in this order. The score is of what they make of
            the logits, less the logarithm of the sum of exponentials of the model's own, and at most 0 for a token. A
            beam to which they leave no token is dropped.
        mask: `(b, t)` bool of the prompt, True = valid, any pattern; default: where it is not `pad_id`.

    Returns:
        `Beams`; without the first axis for a prompt `(t,)`.

    Raises:
        ValueError: arguments out of these ranges; a coverage penalty and a model without attention to its prompt; an
            empty prompt, a token outside of the vocabulary, a mask of another shape.

    Source: Wu et al. 2016, arXiv:1609.08144, eq. 14 (score); Vijayakumar et al. 2016, arXiv:1610.02424, algorithm 1
    (groups, with the Hamming diversity).
    """
    for name, n in {"num_beams": num_beams, "num_results": num_results, "num_groups": num_groups}.items():
        if not isinstance(n, int) or n < 1:
            raise ValueError(f"`{name}` must be an integer >= 1. Received: {name}={n!r}")
    if num_results > num_beams:
        raise ValueError(f"`num_results` must be at most num_beams={num_beams}. Received: num_results={num_results}")
    if num_beams % num_groups:
        raise ValueError(f"`num_groups` must divide num_beams={num_beams}. Received: num_groups={num_groups}")
    if not (diversity_penalty > 0 if num_groups > 1 else diversity_penalty == 0):
        raise ValueError(
            "`diversity_penalty` must be > 0 with num_groups > 1, and else 0. Received: "
            f"diversity_penalty={diversity_penalty!r}, num_groups={num_groups}"
        )
    if not math.isfinite(length_penalty):
        raise ValueError(f"`length_penalty` must be a number. Received: {length_penalty!r}")
    if not coverage_penalty >= 0:
        raise ValueError(f"`coverage_penalty` must be >= 0. Received: {coverage_penalty!r}")
    if coverage_penalty and not hasattr(model, "step_with_attention"):
        raise ValueError(
            f"`coverage_penalty` needs a model that tells its attention to the prompt, by `step_with_attention`, which "
            f"{type(model).__name__} does not have. Received: coverage_penalty={coverage_penalty!r}"
        )
    prompt, mask, single = read_prompt(model, prompt_tokens, mask)
    key = tuple(stop_tokens), tuple(processors), rounded_steps(max_new_tokens), num_beams, num_results
    penalties = length_penalty, coverage_penalty, bool(early_stopping), num_groups, diversity_penalty
    run = compiled(model, _Search, "search", *key, *penalties)
    beams = run(prompt, mask, ops.convert_to_tensor(max_new_tokens, "int32"))
    tokens, scores, lengths = (ops.convert_to_numpy(x) for x in beams)
    beams = Beams(tokens[..., :max_new_tokens], scores, lengths)
    return Beams(*(x[0] for x in beams)) if single else beams


class _Search(Functions):
    def __init__(
        self,
        model,
        stop_tokens,
        processors,
        steps,
        num_beams,
        num_results,
        length_penalty,
        coverage_penalty,
        early_stopping,
        num_groups,
        diversity_penalty,
    ):
        super().__init__(model, stop_tokens, processors, steps)
        self.num_beams, self.num_results, self.early_stopping = num_beams, num_results, early_stopping
        self.alpha, self.beta = length_penalty, coverage_penalty
        self.groups, self.beams, self.diversity_penalty = num_groups, num_beams // num_groups, diversity_penalty

    def search(self, prompt, mask, limit):
        """`Beams` with room for `steps` tokens, of which `limit` are searched."""
        if self.beta:
            logits, state, weights = self.model.prefill_with_attention(prompt, mask, self.steps)
        else:
            (logits, state), weights = self.prefill(prompt, mask, self.steps), None
        live, kept = self.beginning(mask)
        rows = ops.arange(prompt.shape[0] * self.num_beams, dtype="int32") // self.num_beams
        state, logits = self.reordered(state, rows), take_rows(logits, rows)
        weights = None if weights is None else take_rows(weights, rows)
        zero = ops.convert_to_tensor(0, "int32")
        token, rows, live, kept = self.extended(zero, limit, logits, weights, live, kept)
        step = self.model.step_with_attention if self.beta else self.stepper(rows.shape[0])

        def unfinished(i, token, rows, state, live, kept):
            return ops.logical_and(i < limit, ops.any(live.scores > DEAD))

        def body(i, token, rows, state, live, kept):
            # The rows move before the step, not after it: a compiler then writes the step as it copies them.
            state = self.reordered(state, rows)
            with backend.current().owned_state():  # nobody else sees the state before this step
                logits, state, *weights = step(token, state)
            token, rows, live, kept = self.extended(i, limit, logits, weights[0] if weights else None, live, kept)
            return i + 1, token, rows, state, live, kept

        i, *_, live, kept = ops.while_loop(unfinished, body, (zero + 1, token, rows, state, live, kept))
        return self.results(self.with_live(kept, live, i))

    def beginning(self, mask):
        """One beam for each search, of no token, and nothing that has ended."""
        batch, searches = mask.shape[0], mask.shape[0] * self.groups
        scores = ops.where(ops.arange(self.beams) == 0, 0.0, NEVER)
        coverage = ops.repeat(ops.cast(ops.logical_not(mask), "float32"), self.num_beams, axis=0) if self.beta else ()
        live = _Live(
            ops.full((batch * self.num_beams, self.steps), self.pad_id, "int32"),
            ops.cast(ops.tile(scores[None], (searches, 1)), "float32"),
            coverage,
        )
        kept = _Kept(
            ops.full((searches, self.beams, self.steps), self.pad_id, "int32"),
            ops.full((searches, self.beams), NEVER, "float32"),
            ops.zeros((searches, self.beams), "int32"),
        )
        return live, kept

    def extended(self, i, limit, logits, weights, live, kept):
        """All beams by token number i: the tokens, the rows that the beams had before, the beams, what has ended."""
        before = live.tokens, () if weights is None else live.coverage + ops.cast(weights, "float32")
        scores, rows, tokens = self.best(ops.reshape(live.scores, (-1, 1)) + self.worth(logits, live.tokens, i))
        if self.stop_tokens:
            stopped = self.stops(tokens)
            first = _Live(*self.moved(before, i, *(x[:, : self.beams] for x in (rows, tokens, scores))))
            first = first._replace(scores=ops.where(stopped[:, : self.beams], first.scores, NEVER))
            kept = self.with_live(kept, first, i + 1)
            order = ops.arange(tokens.shape[1], dtype="int32") + tokens.shape[1] * ops.cast(stopped, "int32")
            going_on = ops.top_k(-order, self.beams)[1]
            scores, rows, tokens = (
                ops.take_along_axis(x, going_on, axis=1) for x in (ops.where(stopped, NEVER, scores), rows, tokens)
            )
            scores = ops.where(self.over(scores, kept, i + 1, limit), NEVER, scores)
        live = _Live(*self.moved(before, i, rows, tokens, scores))
        return ops.reshape(tokens, (-1,)), ops.reshape(rows, (-1,)), live, kept

    def worth(self, logits, tokens, i):
        """What each token adds to the score of each beam, `(b k, v)`."""
        own = ops.cast(logits, "float32")
        values = self.processed(own, tokens, i) - ops.logsumexp(own, axis=-1, keepdims=True)
        return ops.minimum(values, 0.0) if self.processors else values  # scores that only fall are what `over` needs

    def best(self, scores):
        """The best continuations: scores, rows and tokens `(n, c)`, from good to bad, m of which are no stop tokens."""
        vocab_size = scores.shape[-1]
        count = self.beams * min(1 + len(self.stop_tokens), vocab_size)
        scores = ops.reshape(scores, (-1, self.groups, self.beams * vocab_size))
        if self.groups == 1:
            values, index = ops.top_k(scores[:, 0], count)
        else:
            penalty, chosen = 0.0, []
            for group in range(self.groups):
                worth, at = ops.top_k(scores[:, group] - penalty, count)
                chosen.append(at)
                worth, at = worth[:, : self.beams, None], at[:, : self.beams]
                tokens = ops.where(worth > DEAD, ops.one_hot(at % vocab_size, vocab_size, dtype="float32"), 0.0)
                penalty += self.diversity_penalty * ops.tile(ops.sum(tokens, axis=1), (1, self.beams))
            index = ops.stack(chosen, axis=1)
            values = ops.reshape(ops.take_along_axis(scores, index, axis=2), (-1, count))
        index = ops.reshape(ops.cast(index, "int32"), (-1, count))
        searches = ops.arange(index.shape[0], dtype="int32")[:, None]
        return values, searches * self.beams + index // vocab_size, index % vocab_size

    def moved(self, before, i, rows, tokens, scores):
        """The fields of `_Live` for continuations `(n, m)`."""
        rows, (so_far, coverage) = ops.reshape(rows, (-1,)), before
        coverage = take_rows(coverage, rows) if self.beta else ()
        return write(take_rows(so_far, rows), ops.reshape(tokens, (-1,)), i), scores, coverage

    def with_live(self, kept, live, length):
        """The best of what is kept and of beams of that length, as if these had ended."""
        finals = ops.where(live.scores > DEAD, self.final(live.scores, length, live.coverage), NEVER)
        scores, at = ops.top_k(ops.concatenate([kept.scores, finals], axis=1), self.beams)
        tokens = ops.concatenate([kept.tokens, ops.reshape(live.tokens, kept.tokens.shape)], axis=1)
        lengths = ops.concatenate([kept.lengths, ops.zeros_like(kept.lengths) + length], axis=1)
        return _Kept(_picked(tokens, at), scores, _picked(lengths, at))

    def final(self, scores, length, coverage=()):
        """The final scores of sums of log-probabilities `(n, m)`."""
        if self.alpha:
            scores = scores / ((5.0 + ops.cast(length, "float32")) / 6.0) ** self.alpha
        if self.beta and not isinstance(coverage, tuple):
            covered = ops.log(ops.clip(coverage, 1e-30, 1.0))
            scores = scores + self.beta * ops.reshape(ops.sum(covered, axis=-1), scores.shape)
        return scores

    def over(self, scores, kept, length, limit):
        """`(n, 1)`: whether no beam can come among the results; sums only fall, and coverage adds nothing above 0."""
        worst = kept.scores[:, min(self.num_results, self.beams) - 1]
        possible = ops.maximum(self.final(scores, length + 1), self.final(scores, limit))
        over = worst >= ops.max(possible, axis=1)
        if self.early_stopping:
            over = ops.logical_or(over, kept.scores[:, -1] > DEAD)
        return over[:, None]

    def results(self, kept):
        """`Beams` of what the groups of each prompt have kept."""
        tokens, scores, lengths = (ops.reshape(x, (-1, self.num_beams, *x.shape[2:])) for x in kept)
        if self.groups > 1:
            same = ops.all(tokens[:, :, None] == tokens[:, None], axis=-1)
            same = ops.logical_and(same, ops.triu(ops.ones((self.num_beams, self.num_beams), "int32"), 1) > 0)
            same = ops.logical_and(same, (scores > DEAD)[:, :, None])
            scores, at = ops.top_k(ops.where(ops.any(same, axis=1), NEVER, scores), self.num_beams)
            tokens, lengths = _picked(tokens, at), _picked(lengths, at)
        tokens, scores, lengths = (x[:, : self.num_results] for x in (tokens, scores, lengths))
        there = scores > DEAD
        return Beams(
            ops.where(there[..., None], tokens, self.pad_id),
            ops.where(there, scores, -math.inf),
            ops.where(there, lengths, 0),
        )


def _picked(x, index):
    """`x[n, index[n, m]]` for `(n, l, ...)`."""
    return ops.take_along_axis(x, index if len(x.shape) == 2 else index[..., None], axis=1)
