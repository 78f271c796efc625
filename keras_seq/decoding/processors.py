"""What may and may not be generated: functions `(logits, tokens, length) -> logits` that run before a token is chosen.

`logits` `(b, v)` float32; `tokens` `(b, n)` int32, the tokens generated so far, of which `length` (int32, a scalar) are
there and the rest is filling. They run in the order in which they are given; then the sampler does what it does. The
prompt does not count: neither for repetitions nor in lengths and positions.

They are pure functions of arrays, written with `keras.ops`: on JAX and TensorFlow they are compiled with the loop, once
for each list of them that is not equal to one before. So write your own as frozen dataclasses, as here, or as one
function that you keep. A token is ruled out by `NEVER` or anything below, -inf included.
"""

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from keras import ops

NEVER = -1e30  # the logit of what must not come: finite, for -inf - -inf is NaN
DEAD = -1e29  # nothing above it has met a `NEVER`


@dataclass(frozen=True)
class RepetitionPenalty:
    """Makes the tokens generated so far less probable: `logit / penalty` if it is positive, else `logit * penalty`.

    Args:
        penalty: > 0; above 1 they become less probable, below 1 more.

    Raises: ValueError for a penalty that is not positive.

    Source: Keskar et al. 2019, arXiv:1909.05858 (CTRL), sec. 4.1; for negative logits as in Hugging Face.
    """

    penalty: float

    def __post_init__(self):
        if not self.penalty > 0:
            raise ValueError(f"`penalty` must be > 0. Received: {self.penalty!r}")

    def __call__(self, logits, tokens, length):
        there = ops.arange(tokens.shape[1], dtype="int32")[None] < length
        penalized = ops.where(logits > 0, logits / self.penalty, logits * self.penalty)
        return ops.where(_any_of(tokens, there, logits), penalized, logits)


@dataclass(frozen=True)
class NoRepeatNGrams:
    """Rules out tokens that would complete an n-gram that was generated before.

    Args:
        n: number of tokens of an n-gram, >= 1; 1: no token comes twice.

    Raises: ValueError for n < 1.

    Source: Paulus et al. 2017, arXiv:1705.04304, sec. 2.5 (trigrams).
    """

    n: int

    def __post_init__(self):
        _check_count("n", self.n, 1)

    def __call__(self, logits, tokens, length):
        before, windows = self.n - 1, tokens.shape[1] - self.n + 1
        if windows < 1:
            return logits
        last = ops.take(tokens, ops.maximum(length - before + ops.arange(before, dtype="int32"), 0), axis=1)
        alike = ops.arange(windows, dtype="int32")[None] + before < length  # the n-gram ends among what is there
        for i in range(before):
            alike = ops.logical_and(alike, tokens[:, i : i + windows] == last[:, i : i + 1])
        return ops.where(_any_of(tokens[:, before:], alike, logits), NEVER, logits)


@dataclass(frozen=True)
class MinLength:
    """Rules out stop tokens among the first n tokens.

    Args:
        n: number of tokens, >= 0, that come before a stop token at least.
        stop_tokens: token ids.

    Raises: ValueError for n < 0, a token outside of the vocabulary.
    """

    n: int
    stop_tokens: Iterable[int]

    def __post_init__(self):
        _check_count("n", self.n, 0)
        object.__setattr__(self, "stop_tokens", _ids(self.stop_tokens))

    def __call__(self, logits, tokens, length):
        stops = ops.convert_to_tensor(_one_of(self.stop_tokens, logits))
        return ops.where(ops.logical_and(length < self.n, stops), NEVER, logits)


@dataclass(frozen=True)
class BannedTokens:
    """Rules out tokens everywhere.

    Args:
        tokens: token ids.

    Raises: ValueError for a token outside of the vocabulary.
    """

    tokens: Iterable[int]

    def __post_init__(self):
        object.__setattr__(self, "tokens", _ids(self.tokens))

    def __call__(self, logits, tokens, length):
        return ops.where(ops.convert_to_tensor(_one_of(self.tokens, logits)), NEVER, logits)


@dataclass(frozen=True)
class ForcedTokens:
    """Rules out all but one token at given positions.

    Args:
        tokens: `{position: token id}`; 0 is the position of the first generated token.

    Raises: ValueError for a position < 0, a token outside of the vocabulary.
    """

    tokens: Mapping[int, int]

    def __post_init__(self):
        pairs = tuple(sorted((int(position), int(token)) for position, token in dict(self.tokens).items()))
        if pairs and pairs[0][0] < 0:
            raise ValueError(f"Positions must be >= 0. Received: {self.tokens!r}")
        object.__setattr__(self, "tokens", pairs)

    def __call__(self, logits, tokens, length):
        forced = dict(self.tokens)
        _one_of(forced.values(), logits)
        ids = ops.arange(logits.shape[-1], dtype="int32")
        for position, token in forced.items():
            logits = ops.where(ops.logical_and(length == position, ids != token), NEVER, logits)
        return logits


@dataclass(frozen=True)
class PrefixConstraint:
    """Constrained decoding: what may come next is a function of what has come so far.

    Args:
        function: `(tokens, length) -> allowed`: the tokens so far `(b, n)` int32, of which `length` are there, to bool
            `(b, v)`. Written with `keras.ops`; compiled on JAX and TensorFlow. A table of transitions is one
            `ops.take`: see the example.

    Example:

        follows = keras.ops.convert_to_tensor(np.eye(9, k=1) > 0)  # (v, v): i + 1 may follow i

        def allowed(tokens, length):
            last = keras.ops.take(tokens, keras.ops.maximum(length - 1, 0), axis=1)
            return keras.ops.logical_or(length == 0, keras.ops.take(follows, last, axis=0))

        model = keras_seq.models.RecurrentLM(vocab_size=9, d_model=8)
        constraint = keras_seq.decoding.PrefixConstraint(allowed)
        tokens = model.generate([3], max_new_tokens=4, processors=[constraint])
    """

    function: Callable[[Any, Any], Any]

    def __call__(self, logits, tokens, length):
        return ops.where(self.function(tokens, length), logits, NEVER)


def _any_of(tokens, where, logits):
    """Which ids of the vocabulary are among the tokens `(b, n)` where that is True: `(b, v)` bool."""
    rows, n = tokens.shape
    if n == 0:
        return ops.zeros_like(logits, "bool")
    row = ops.broadcast_to(ops.arange(rows, dtype="int32")[:, None], (rows, n))
    index = ops.reshape(ops.stack([row, tokens], axis=-1), (-1, 2))
    found = ops.reshape(ops.cast(ops.broadcast_to(where, (rows, n)), "float32"), (-1,))
    return ops.scatter(index, found, (rows, logits.shape[-1])) > 0


@functools.lru_cache(maxsize=256)
def _mask_of(ids, vocab_size):
    wrong = [i for i in ids if not 0 <= i < vocab_size]
    if wrong:
        raise ValueError(f"Tokens must be from 0 to {vocab_size - 1}. A logits processor was given {wrong}.")
    return np.isin(np.arange(vocab_size), ids)


def _one_of(ids, logits):
    """`(v,)` bool: which tokens are among the ids."""
    return _mask_of(tuple(ids), logits.shape[-1])


def _ids(tokens):
    return tuple(int(token) for token in np.asarray(tokens if isinstance(tokens, np.ndarray) else list(tokens)).ravel())


def _check_count(name, n, least):
    if not isinstance(n, int) or n < least:
        raise ValueError(f"`{name}` must be an integer >= {least}. Received: {n!r}")
