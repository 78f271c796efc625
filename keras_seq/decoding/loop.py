"""The loop that generates tokens, written against the state protocol alone.

A model takes part if it has

    logits, state = model(tokens, mask=..., initial_state=..., return_state=True)    # (b, t) -> (b, t, v)
    logits, state = model.step(token, state)                                         # (b,) -> (b, v)
    state = model.initial_state(batch_size, max_length)
    model.vocab_size, model.pad_id (or None)

and of these, which are faster or different, those that it has:

    logits, state = model.prefill(prompt, mask, new)    # (b, t) -> (b, v), and a state with room for `new` tokens
    logits, state = model.step_valid(token, state)      # as step, for tokens that are no padding
    step = model.stepper(batch_size, steps)             # step_valid made ready for about so many in a row
    model.prompt_vocab_size                             # if prompts are of another vocabulary

A token that is `pad_id` is padding: it leaves the state as it is and is never generated. Rows that have ended take part
in `step_valid` all the same. The prompt is read in one call. On JAX and TensorFlow reading and the whole loop are one
compiled function; the lengths of prompts and outputs are rounded up to one of four in each octave, so that few are ever
compiled. On PyTorch it is a loop in Python.
"""

import math
from functools import partial

import numpy as np
from keras import ops
from keras import random as keras_random

from keras_seq import backend
from keras_seq.base import random_seed

_NEVER = -1e30


def generate(model, prompt_tokens, max_new_tokens, sampler, seed=None, stop_tokens=(), mask=None):
    """Generates up to `max_new_tokens` tokens after each prompt.

    Args:
        model: see the top of this file.
        prompt_tokens: token ids: `(t,)`, `(b, t)`, or a list of lists of any lengths.
        max_new_tokens: number of tokens, >= 1.
        sampler: a function `(logits, u) -> token`, see `get_sampler`; JAX and TensorFlow (by XLA) compile it.
        seed: integer; the same seed and `max_new_tokens` give the same tokens on one backend. None draws one.
        stop_tokens: a row ends after one of these.
        mask: `(b, t)` bool of the prompt, True = valid, any pattern; default: where it is not `pad_id`.

    Returns:
        NumPy int32 array of the new tokens `(b, max_new_tokens)`, or `(max_new_tokens,)` for a prompt `(t,)`; after the
        end of a row it is filled with `pad_id` (0 if there is none).

    Raises:
        ValueError: an empty prompt, a token outside of the vocabulary, a mask of another shape, max_new_tokens < 1.
    """
    prompt, mask, single = _prompt(model, prompt_tokens, mask)
    steps = _rounded_up(_at_least_one(max_new_tokens))
    u = keras_random.uniform((steps, len(prompt)), seed=random_seed() if seed is None else seed)
    run = _compiled(model, "generate", sampler, tuple(stop_tokens), steps)
    tokens = run(prompt, mask, u, ops.convert_to_tensor(max_new_tokens, "int32"))
    tokens = ops.convert_to_numpy(tokens)[:, :max_new_tokens]
    return tokens[0] if single else tokens


def stream(model, prompt_tokens, max_new_tokens, sampler, seed=None, stop_tokens=(), mask=None):
    """Yields the tokens of `generate` one by one, as they are made: an int for a prompt `(t,)`, else an array `(b,)`.

    Ends when every row has ended. Arguments and errors as in `generate`; they are checked at the call.
    """
    prompt, mask, single = _prompt(model, prompt_tokens, mask)
    steps = _rounded_up(_at_least_one(max_new_tokens))
    u = keras_random.uniform((steps, len(prompt)), seed=random_seed() if seed is None else seed)
    first = _compiled(model, "first", sampler, tuple(stop_tokens), steps)
    following = _compiled(model, "next", sampler, tuple(stop_tokens), None)
    if not backend.current().COMPILES:  # else each step would be made ready anew
        functions = _Functions(model, sampler, tuple(stop_tokens), steps)
        following = partial(functions.next, step=functions.stepper(len(prompt)))

    def tokens():
        token, state, done = first(prompt, mask, u[0])
        for i in range(1, max_new_tokens + 1):
            yield int(token[0]) if single else ops.convert_to_numpy(token)
            if i == max_new_tokens or bool(ops.all(done)):
                return
            token, state, done = following(token, state, done, u[i])

    return tokens()


def _compiled(model, what, *key):
    """The compiled function of that name, made once per model, sampler and size."""
    cache = model.__dict__.setdefault("_decoders", {})
    if (what, *key) not in cache:
        cache[what, *key] = backend.current().compiled(getattr(_Functions(model, *key), what), model, xla=True)
    return cache[what, *key]


class _Functions:
    """What runs compiled: pure functions of arrays, given the variables of the model."""

    def __init__(self, model, sampler, stop_tokens, steps):
        self.model, self.sampler, self.stop_tokens, self.steps = model, sampler, stop_tokens, steps
        self.pad_id = 0 if model.pad_id is None else model.pad_id
        self.prefill = getattr(model, "prefill", self._prefill)
        self.step = getattr(model, "step_valid", model.step)

    def _prefill(self, prompt, mask, new):
        batch, length = prompt.shape
        state = self.model.initial_state(batch, length + new)
        logits, state = self.model(prompt, mask=mask, initial_state=state, return_state=True, training=False)
        last = ops.max(ops.where(mask, ops.arange(length, dtype="int32"), 0), axis=1)
        return ops.take_along_axis(logits, last[:, None, None], axis=1)[:, 0], state

    def stepper(self, batch_size):
        return self.model.stepper(batch_size, self.steps) if hasattr(self.model, "stepper") else self.step

    def first(self, prompt, mask, u):
        """Reads the prompt and chooses the first token: `(token, state, done)`."""
        logits, state = self.prefill(prompt, mask, self.steps)
        return self.choose(logits, u, state, ops.zeros((prompt.shape[0],), "bool"))

    def next(self, token, state, done, u, step=None):
        """Takes in a token and chooses the next: `(token, state, done)`."""
        with backend.current().owned_state():  # nobody else sees the state before this step
            logits, state = (step or self.step)(token, state)
        return self.choose(logits, u, state, done)

    def generate(self, prompt, mask, u, limit):
        """All tokens `(b, steps)`, of which `limit` are made."""
        token, state, done = self.first(prompt, mask, u[0])
        step = self.stepper(prompt.shape[0])
        column = ops.arange(self.steps, dtype="int32")[None]
        tokens = ops.where(column == 0, token[:, None], self.pad_id)

        def unfinished(i, token, state, done, tokens):
            return ops.logical_and(i < limit, ops.logical_not(ops.all(done)))

        def body(i, token, state, done, tokens):
            token, state, done = self.next(token, state, done, ops.take(u, i, axis=0), step)
            return i + 1, token, state, done, ops.where(column == i, token[:, None], tokens)

        carry = ops.convert_to_tensor(1, "int32"), token, state, done, ops.cast(tokens, "int32")
        return ops.while_loop(unfinished, body, carry)[-1]

    def choose(self, logits, u, state, done):
        if self.model.pad_id is not None:
            logits = ops.where(ops.arange(logits.shape[-1]) == self.pad_id, _NEVER, ops.cast(logits, "float32"))
        token = ops.where(done, self.pad_id, self.sampler(logits, u))
        for stop in self.stop_tokens:
            done = ops.logical_or(done, token == stop)
        return ops.cast(token, "int32"), state, done


def _prompt(model, tokens, mask):
    """The prompt as `(b, t)` int32 and its mask, with t rounded up by padding on the left."""
    if isinstance(tokens, list | tuple) and tokens and isinstance(tokens[0], list | tuple | np.ndarray):
        length = max(len(row) for row in tokens)
        given = np.array([[False] * (length - len(row)) + [True] * len(row) for row in tokens], bool)
        tokens = np.array([[0] * (length - len(row)) + list(row) for row in tokens])
        if mask is None:
            mask = given if model.pad_id is None else given & (tokens != model.pad_id)
    tokens = np.asarray(ops.convert_to_numpy(tokens))
    single = tokens.ndim == 1
    tokens = tokens[None] if single else tokens
    if tokens.ndim != 2 or not tokens.size or tokens.dtype.kind not in "iu":
        raise ValueError(
            f"A prompt is a non-empty integer array (t,) or (b, t), or a list of lists. Received: {tokens.dtype} of "
            f"shape {tokens.shape}"
        )
    if mask is None:
        mask = np.ones(tokens.shape, bool) if model.pad_id is None else tokens != model.pad_id
    mask = np.asarray(ops.convert_to_numpy(mask))
    mask = mask[None] if single and mask.ndim == 1 else mask
    if mask.shape != tokens.shape or mask.dtype != bool:
        raise ValueError(f"`mask` must be bool of shape {tokens.shape}. Received: {mask.dtype} of shape {mask.shape}")
    if not mask.any(axis=1).all():
        raise ValueError(f"Every prompt needs at least one valid token. Rows without: {np.where(~mask.any(axis=1))[0]}")
    valid, vocab_size = tokens[mask], getattr(model, "prompt_vocab_size", model.vocab_size)
    if valid.min() < 0 or valid.max() >= vocab_size:
        raise ValueError(f"Tokens must be from 0 to {vocab_size - 1}. The prompt has {valid.min()} to {valid.max()}.")
    if backend.current().COMPILES:
        left = ((0, 0), (_rounded_up(tokens.shape[1]) - tokens.shape[1], 0))
        tokens, mask = np.pad(tokens, left), np.pad(mask, left)
    return ops.convert_to_tensor(tokens, "int32"), ops.convert_to_tensor(mask, "bool"), single


def _at_least_one(n):
    if n < 1:
        raise ValueError(f"`max_new_tokens` must be >= 1. Received: {n!r}")
    return n


def _rounded_up(n):
    """To 1, 1.25, 1.5 or 1.75 times a power of two; up to 8 to any."""
    step = 2 ** max(math.frexp(n - 1)[1] - 3, 0)
    return -(-n // step) * step
