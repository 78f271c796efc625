"""The loop that generates tokens one after another; `keras_seq.decoding.engine` tells what it asks of a model."""

from functools import partial

import numpy as np
from keras import ops
from keras import random as keras_random

from keras_seq import backend
from keras_seq.base import random_seed
from keras_seq.decoding.engine import Functions, compiled, read_pieces, read_prompt, rounded_steps, write
from keras_seq.decoding.processors import DEAD


def generate(model, prompt_tokens, max_new_tokens, sampler, seed=None, stop_tokens=(), mask=None, processors=()):
    """Generates up to `max_new_tokens` tokens after each prompt.

    Args:
        model: see `keras_seq.decoding.engine`.
        prompt_tokens: token ids: `(t,)`, `(b, t)`, or a list of lists of any lengths.
        max_new_tokens: number of tokens, >= 1.
        sampler: a function `(logits, u) -> token`, see `get_sampler`; JAX and TensorFlow (by XLA) compile it.
        seed: integer; the same seed and `max_new_tokens` give the same tokens on one backend. None draws one.
        stop_tokens: a row ends after one of these.
        mask: `(b, t)` bool of the prompt, True = valid, any pattern; default: where it is not `pad_id`.
        processors: functions `(logits, tokens, length) -> logits`, run in this order before the sampler. A row in which
            they leave no token ends.

    Returns:
        NumPy int32 array of the new tokens `(b, max_new_tokens)`, or `(max_new_tokens,)` for a prompt `(t,)`; after the
        end of a row it is filled with `pad_id` (0 if there is none).

    Raises:
        ValueError: an empty prompt, a token outside of the vocabulary, a mask of another shape, max_new_tokens < 1.
    """
    prompt, mask, single = read_prompt(model, prompt_tokens, mask)
    steps = rounded_steps(max_new_tokens)
    u = keras_random.uniform((steps, len(prompt)), seed=random_seed() if seed is None else seed)
    prompt, mask, state = read_pieces(model, prompt, mask, steps)
    run = compiled(model, _Loop, "generate", tuple(stop_tokens), tuple(processors), steps, sampler)
    tokens = run(prompt, mask, state, u, ops.convert_to_tensor(max_new_tokens, "int32"))
    tokens = ops.convert_to_numpy(tokens)[:, :max_new_tokens]
    return tokens[0] if single else tokens


def stream(model, prompt_tokens, max_new_tokens, sampler, seed=None, stop_tokens=(), mask=None, processors=()):
    """Yields the tokens of `generate` one by one, as they are made: an int for a prompt `(t,)`, else an array `(b,)`.

    Ends when every row has ended. Arguments and errors as in `generate`; they are checked at the call.
    """
    prompt, mask, single = read_prompt(model, prompt_tokens, mask)
    steps = rounded_steps(max_new_tokens)
    u = keras_random.uniform((steps, len(prompt)), seed=random_seed() if seed is None else seed)
    key = tuple(stop_tokens), tuple(processors)
    first = compiled(model, _Loop, "first", *key, steps, sampler)
    following = compiled(model, _Loop, "next", *key, None, sampler)
    if not backend.current().COMPILES:  # else each step would be made ready anew
        functions = _Loop(model, *key, steps, sampler)
        following = backend.current().compiled(partial(functions.next, step=functions.stepper(len(prompt))), model)
    capacity = steps if processors else 0  # nobody else asks for the tokens so far

    def tokens():
        end = read_pieces(model, prompt, mask, steps)
        token, carry = first(*end, u[0], ops.zeros((len(prompt), capacity), "int32"))
        for i in range(1, max_new_tokens + 1):
            *_, ended_before, done = carry
            if processors and bool(ops.all(ended_before)):
                return
            yield int(token[0]) if single else ops.convert_to_numpy(token)
            if i == max_new_tokens or bool(ops.all(done)):
                return
            token, carry = following(ops.convert_to_tensor(np.int32(i)), token, carry, u[i])

    return tokens()


class _Loop(Functions):
    """One token after another. What is carried is `(state, tokens so far, rows ended before this token, and by it)`."""

    def __init__(self, model, stop_tokens, processors, steps, sampler):
        super().__init__(model, stop_tokens, processors, steps)
        self.sampler = sampler

    def first(self, prompt, mask, state, u, tokens):
        """Reads the prompt, or the end of it from a state on, and chooses the first token: `(token, carry)`."""
        given = () if state is None else (state,)
        logits, state = self.prefill(prompt, mask, self.steps, *given)
        return self.choose(ops.convert_to_tensor(0, "int32"), logits, u, state, tokens, ops.zeros_like(mask[:, 0]))

    def next(self, i, token, carry, u, step=None):
        """Takes in a token and chooses the next, number i: `(token, carry)`."""
        state, tokens, _, done = carry
        with backend.current().owned_state():  # nobody else sees the state before this step
            logits, state = (step or self.step)(token, state)
        return self.choose(i, logits, u, state, tokens, done)

    def choose(self, i, logits, u, state, tokens, done):
        logits = self.processed(logits, tokens, i)
        if self.processors:
            done = ops.logical_or(done, ops.max(logits, axis=-1) < DEAD)
        token = ops.cast(ops.where(done, self.pad_id, self.sampler(logits, u)), "int32")
        return token, (state, write(tokens, token, i), done, ops.logical_or(done, self.stops(token)))

    def generate(self, prompt, mask, state, u, limit):
        """All tokens `(b, steps)`, of which `limit` are made."""
        tokens = ops.full((prompt.shape[0], self.steps), self.pad_id, "int32")
        token, carry = self.first(prompt, mask, state, u[0], tokens)
        step = self.stepper(prompt.shape[0])

        def unfinished(i, token, carry):
            return ops.logical_and(i < limit, ops.logical_not(ops.all(carry[-1])))

        def body(i, token, carry):
            return i + 1, *self.next(i, token, carry, ops.take(u, i, axis=0), step)

        *_, (_, tokens, _, _) = ops.while_loop(unfinished, body, (ops.convert_to_tensor(1, "int32"), token, carry))
        return tokens
