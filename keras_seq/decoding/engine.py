"""What generation and beam search share: what they ask of a model, prompts, compiled functions.

A model takes part if it has

    logits, state = model(tokens, mask=..., initial_state=..., return_state=True)    # (b, t) -> (b, t, v)
    logits, state = model.step(token, state)                                         # (b,) -> (b, v)
    state = model.initial_state(batch_size, max_length)
    model.vocab_size, model.pad_id (or None)

and of these, which are faster or different, those that it has:

    logits, state = model.prefill(prompt, mask, new)    # (b, t) -> (b, v), and a state with room for `new` tokens
    state = model.read(prompt, mask, state)    # if it `reads_pieces`; then `prefill` takes `state` too, and reads on
    logits, state = model.step_valid(token, state)      # as step, for tokens that are no padding
    step = model.stepper(batch_size, steps)             # step_valid made ready for about so many in a row
    state = model.reordered(state, rows)                # the state whose row i is row rows[i] of the old one
    model.prompt_vocab_size                             # if prompts are of another vocabulary

and, for the coverage penalty of beam search, these, with the attention weights `(b, t)` of the step to the prompt:

    logits, state, weights = model.prefill_with_attention(prompt, mask, new)
    logits, state, weights = model.step_with_attention(token, state)

A token that is `pad_id` is padding: it leaves the state as it is and is never generated. Rows that have ended take part
in `step_valid` all the same. The prompt is read in one call; a long one, by a model with `reads_pieces`, in pieces of
`PIECE` tokens, so that memory stays bounded and progress is shown (not in beam search). On JAX and TensorFlow reading
and the whole loop are one compiled function; the lengths of prompts and outputs are rounded up to one of four in each
octave, so that few are ever compiled. On PyTorch it is a loop in Python.

In beam search the state has `num_beams` rows for each prompt, and is reordered at each step. What a model's `reordered`
leaves as it is, because it is the same for all beams of a prompt, keeps one row per prompt: row r of the tokens then
belongs to its row `r // num_beams`.
"""

import functools
import math

import numpy as np
from keras import ops, tree

from keras_seq import backend
from keras_seq.decoding.processors import NEVER
from keras_seq.ops.cache import take_rows
from keras_seq.progress import progress

PIECE = 2048  # tokens of a prompt that are read at a time


class Functions:
    """What runs compiled: pure functions of arrays, given the variables of the model."""

    def __init__(self, model, stop_tokens, processors, steps):
        self.model, self.stop_tokens, self.processors, self.steps = model, stop_tokens, processors, steps
        self.pad_id = 0 if model.pad_id is None else model.pad_id
        self.prefill = getattr(model, "prefill", self._prefill)
        self.read = getattr(model, "read", None)  # a piece of a prompt
        self.step = getattr(model, "step_valid", model.step)
        self.reordered = getattr(model, "reordered", reordered)

    def _prefill(self, prompt, mask, new, state=None):
        batch, length = prompt.shape
        state = self.model.initial_state(batch, length + new) if state is None else state
        logits, state = self.model(prompt, mask=mask, initial_state=state, return_state=True, training=False)
        last = ops.max(ops.where(mask, ops.arange(length, dtype="int32"), 0), axis=1)
        return ops.take_along_axis(logits, last[:, None, None], axis=1)[:, 0], state

    def stepper(self, rows):
        return self.model.stepper(rows, self.steps) if hasattr(self.model, "stepper") else self.step

    def processed(self, logits, tokens, length):
        """Logits `(b, v)` float32 as the processors want them; a token that must not come is at `NEVER`."""
        logits = ops.cast(logits, "float32")
        for processor in self.processors:
            logits = processor(logits, tokens, length)
        if self.processors:
            logits = ops.maximum(logits, NEVER)  # which may be -inf
        if self.model.pad_id is not None:
            logits = ops.where(ops.arange(logits.shape[-1]) == self.pad_id, NEVER, logits)
        return logits

    def stops(self, token):
        """Which tokens are stop tokens."""
        none = ops.zeros_like(token, "bool")
        return functools.reduce(ops.logical_or, [token == stop for stop in self.stop_tokens], none)


def compiled(model, functions, what, *key):
    """The compiled method `what` of `functions(model, *key)`, made once for each model and key."""
    cache = model.__dict__.setdefault("_decoders", {})
    if (functions, what, *key) not in cache:
        function = getattr(functions(model, *key), what)
        cache[functions, what, *key] = backend.current().compiled(function, model, xla=True)
    return cache[functions, what, *key]


def reordered(state, rows):
    """The state whose row i is row `rows[i]` of the old one, in all leaves."""
    return tree.map_structure(lambda leaf: take_rows(leaf, rows), state)


def write(tokens, token, i):
    """Tokens `(b, n)` with `token` `(b,)` in column i."""
    return ops.where(ops.arange(tokens.shape[1], dtype="int32") == i, token[:, None], tokens)


def read_prompt(model, tokens, mask):
    """The prompt as `(b, t)` int32 and its mask, with t rounded up by padding on the left; whether it was `(t,)`."""
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


def read_pieces(model, prompt, mask, new):
    """Reads a long prompt but for its end: `(end of the prompt, its mask, state)`; of a short one the state is None."""
    length = prompt.shape[1]
    cut = (length - 1) // PIECE * PIECE
    if not cut or not getattr(model, "reads_pieces", False):
        return prompt, mask, None
    if not ops.convert_to_numpy(mask)[:, cut:].any(axis=1).all():  # a row that ends before needs its logits from there
        return prompt, mask, None
    read, state = compiled(model, Functions, "read", (), (), None), model.initial_state(len(prompt), length + new)
    for i in progress(range(0, cut, PIECE), "reading the prompt"):
        state = read(prompt[:, i : i + PIECE], mask[:, i : i + PIECE], state)
    return prompt[:, cut:], mask[:, cut:], state


def rounded_steps(max_new_tokens):
    """The number of steps that a function is compiled for, so that it also serves for others."""
    if max_new_tokens < 1:
        raise ValueError(f"`max_new_tokens` must be >= 1. Received: {max_new_tokens!r}")
    return _rounded_up(max_new_tokens)


def _rounded_up(n):
    """To 1, 1.25, 1.5 or 1.75 times a power of two; up to 8 to any."""
    step = 2 ** max(math.frexp(n - 1)[1] - 3, 0)
    return -(-n // step) * step
