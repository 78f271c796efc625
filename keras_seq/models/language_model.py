"""What every model of the next token shares."""

import keras
import numpy as np
from keras import ops
from keras.src.backend import set_keras_mask

from keras_seq import decoding
from keras_seq.base import SequenceLayer, autocast, cast, dtype_of
from keras_seq.decoding.engine import reordered


class LanguageModel(SequenceLayer, keras.Model):
    """A model of the next token: `logits, state = model(tokens, initial_state=None, return_state=True)`.

    `p(x_(t+1) | x_1, ..., x_t) = softmax(logits_t)`; `loss = -mean_t log p(x_(t+1) | x_1, ..., x_t)`

    It is a sequence layer (the splitting law, `step`, `stateful`) and a Keras model (`fit`, `predict`, `save`).

    `fit(tokens)` trains with teacher forcing: the target of each token is the next one in its row.
    `fit(tokens, targets)` trains on targets of your own. Without a loss in `compile` the loss is the mean cross-entropy
    in nats per token; padded targets do not count.

    Args:
        vocab_size: number of token ids.
        pad_id: the id that is padding, in inputs and in targets, where no mask is given; None if there is none.
        **kwargs: `stateful` and those of `keras.Model`.

    Call: tokens `(b, t)` int, mask `(b, t)` bool (default: where they are not `pad_id`), initial_state, return_state ->
    logits `(b, t, vocab_size)`; with `last_only=True` those of the last valid step of each row alone,
    `(b, 1, vocab_size)`. The state is the subclass's: `initial_state(batch_size, max_length)` is the one before the
    first token.

    Raises: ValueError for a vocab_size < 1, a `pad_id` outside of the vocabulary, and in `fit` and `generate` a token
    outside of it.

    A subclass writes `hidden(tokens, state, mask, training)`, `logits(h)`, `build` and `initial_state`.

    Source: Bengio et al. 2003, "A neural probabilistic language model", JMLR 3; Williams & Zipser 1989 (teacher
    forcing).

    Example:

        model = keras_seq.models.RecurrentLM(vocab_size=20, d_model=8)  # a subclass
        logits, state = model(np.array([[5, 7, 3]]), return_state=True)  # (1, 3, 20)
        logits, state = model.step(np.array([4]), state)  # (1, 20)
        beams = model.beam_search([5, 7], max_new_tokens=4, num_beams=2)  # tokens (1, 4), scores (1,)
        tokens = list(model.stream([5, 7], max_new_tokens=4, temperature=0.8, seed=0))  # as `generate`, one by one
    """

    def __init__(self, vocab_size, pad_id=0, **kwargs):
        super().__init__(**kwargs)
        self.input_spec = keras.InputSpec(ndim=2)
        if vocab_size < 1:
            raise ValueError(f"`vocab_size` must be a positive integer. Received: vocab_size={vocab_size!r}")
        if pad_id is not None and not 0 <= pad_id < vocab_size:
            raise ValueError(f"`pad_id` must be from 0 to {vocab_size - 1}, or None. Received: pad_id={pad_id!r}")
        self.vocab_size = vocab_size
        self.pad_id = pad_id
        self.label_smoothing = 0.0

    def hidden(self, tokens, state, mask=None, training=False):
        """Runs over tokens `(b, t)` from `state`: what logits are made of, `(b, t, d)`, and the next state."""
        raise NotImplementedError

    def logits(self, h):
        """`(b, t, d)` -> `(b, t, vocab_size)`."""
        raise NotImplementedError

    def call(self, x, mask=None, initial_state=None, return_state=False, training=None, last_only=False, **given):
        if return_state:
            self._require_splittable("return_state=True")
        x = cast(x, "int32") if "float" in dtype_of(x) else x  # the compute dtype may not hold all ids
        y, state = self._run(x, mask, initial_state, return_state, training, last_only=last_only, **given)
        return (y, state) if return_state else y

    def advance(self, x, state, mask=None, training=False, last_only=False, **given):
        mask = self.compute_mask(x, mask)
        h, state = self.hidden(x, state, mask, training, **given)
        return self.logits(_last_valid(h, mask) if last_only else h), state

    reads_pieces = True  # of a long prompt

    def read(self, prompt, mask, state):
        """The state after a piece of a prompt `(b, t)`."""
        return self(prompt, mask=mask, initial_state=state, return_state=True, training=False, last_only=True)[1]

    def prefill(self, prompt, mask, new, state=None):
        """Reads a prompt `(b, t)`, from a state on if it is given: the logits after it, and a state for `new` more."""
        state = self.initial_state(prompt.shape[0], prompt.shape[1] + new) if state is None else state
        logits, state = self(prompt, mask=mask, initial_state=state, return_state=True, training=False, last_only=True)
        return logits[:, 0], state

    def _built(self):
        if not self.built:  # which must not happen while a function is traced
            self.build((None, None))

    def step_valid(self, token, state):
        """As `step`, for tokens `(b,)` none of which is padding, whatever their id: without the cost of a mask."""
        with autocast(self):
            h, state = self.hidden(token[:, None], state)
            return self.logits(h)[:, 0], state

    def stepper(self, batch_size, steps=1):
        """`step_valid` for about so many tokens in a row, as in `SequenceLayer.stepper`."""
        return self.step_valid

    @property
    def prompt_vocab_size(self):
        """Number of token ids of prompts."""
        return self.vocab_size

    def initial_state(self, batch_size, max_length=None):
        """The state before the first token; `max_length`: how many there will be, for states of fixed capacity."""
        raise NotImplementedError

    def compute_mask(self, inputs, mask=None):
        return mask if mask is not None or self.pad_id is None else inputs != self.pad_id

    def compute_output_shape(self, input_shape):
        return (*input_shape, self.vocab_size)

    def fit(self, x=None, y=None, *args, sample_weight=None, **kwargs):
        """As in Keras; without `y` the targets are the next tokens."""
        check_tokens("The input", x, self.prompt_vocab_size)
        x, y = self._with_targets(x, y, sample_weight)
        return super().fit(x, y, *args, sample_weight=sample_weight, **kwargs)

    def evaluate(self, x=None, y=None, *args, sample_weight=None, **kwargs):
        """As in Keras; without `y` the targets are the next tokens."""
        x, y = self._with_targets(x, y, sample_weight)
        return super().evaluate(x, y, *args, sample_weight=sample_weight, **kwargs)

    def _with_targets(self, x, y, sample_weight):
        """Keras drops the weights of samples that have no y."""
        return (x[:, :-1], x[:, 1:]) if y is None and sample_weight is not None else (x, y)

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        y, y_pred, valid = self._compared(x, y, ops.cast(y_pred, "float32"))
        if self.loss is not None:
            if valid is not None:
                set_keras_mask(y_pred, valid)  # by which Keras's losses leave out what is padding
            return super().compute_loss(x, y, y_pred, sample_weight, training)
        losses = self._token_losses(y, y_pred, training)
        weight = ops.ones_like(losses) if valid is None else ops.cast(valid, losses.dtype)
        if sample_weight is not None:
            sample_weight = ops.cast(sample_weight, losses.dtype)
            weight = weight * (sample_weight[:, None] if len(sample_weight.shape) == 1 else sample_weight)
        total = ops.sum(weight)
        return sum(self.losses, ops.sum(losses * weight) / ops.where(total > 0, total, ops.ones_like(total)))

    def compute_metrics(self, x, y, y_pred, sample_weight=None):
        y, y_pred, valid = self._compared(x, y, y_pred)
        if valid is not None:
            set_keras_mask(y_pred, valid)
        return super().compute_metrics(x, y, y_pred, sample_weight)

    def _compared(self, x, y, y_pred):
        """Targets, the logits that are held against them, and where both are valid (None for everywhere)."""
        valid = self.compute_mask(x, None)
        if y is None:
            y, y_pred, valid = x[:, 1:], y_pred[:, :-1], None if valid is None else valid[:, :-1]
        if valid is not None and tuple(y.shape) == tuple(valid.shape):
            valid = ops.logical_and(valid, y != self.pad_id)
        return y, y_pred, valid

    def _token_losses(self, y, logits, training):
        """`-log p(y)`: without a one-hot array of the targets, which Keras's function makes on two backends."""
        true = ops.take_along_axis(logits, ops.cast(y, "int32")[..., None], axis=-1)[..., 0]
        losses = ops.logsumexp(logits, axis=-1) - true
        smoothing = self.label_smoothing if training else 0.0
        # The mean over all tokens of `-log p` differs by this.
        return losses + smoothing * (true - ops.mean(logits, axis=-1)) if smoothing else losses

    def reordered(self, state, rows):
        """The state whose row i is row `rows[i]` of the old one, as beam search wants it."""
        return reordered(state, rows)

    def generate(
        self,
        prompt_tokens,
        max_new_tokens,
        sampler=None,
        *,
        temperature=None,
        top_k=None,
        top_p=None,
        min_p=None,
        processors=(),
        num_beams=1,
        length_penalty=0.0,
        seed=None,
        stop_tokens=(),
        mask=None,
    ):
        """Generates tokens after a prompt.

        Args:
            prompt_tokens: token ids: `(t,)`, `(b, t)`, or a list of lists of any lengths.
            max_new_tokens: number of tokens, >= 1.
            sampler: `"greedy"`, `"sample"`, a function `(logits, u) -> token` (see `keras_seq.decoding`), or None:
                greedy, unless one of the next four is given.
            temperature, top_k, top_p, min_p: as in `keras_seq.decoding.Sampling`.
            processors: what may come and what may not: `keras_seq.decoding.RepetitionPenalty` and the like, run in
                this order, before the sampler. A row in which they leave no token ends.
            num_beams: above 1, the tokens are the best that `beam_search` finds, and there is no sampler.
            length_penalty: of `beam_search`.
            seed: integer; the same seed gives the same tokens.
            stop_tokens: a row ends after one of these.
            mask: `(b, t)` bool of the prompt, True = valid, any pattern; default: where it is not `pad_id`.

        Returns:
            NumPy int32 array of the new tokens `(b, max_new_tokens)`, or `(max_new_tokens,)` for a prompt `(t,)`;
            filled up with `pad_id` after the end of a row.

        Raises: ValueError for an empty prompt, a token outside of the vocabulary, arguments out of range.
        """
        chosen = decoding.get_sampler(sampler, temperature, top_k, top_p, min_p)
        if num_beams == 1 and not length_penalty:
            self._built()
            return decoding.generate(self, prompt_tokens, max_new_tokens, chosen, seed, stop_tokens, mask, processors)
        if chosen != decoding.Greedy():
            raise ValueError(
                f"Beam search does not draw: it takes no sampler. Received: num_beams={num_beams!r}, "
                f"length_penalty={length_penalty!r}, and {chosen}"
            )
        given = {"stop_tokens": stop_tokens, "processors": processors, "mask": mask}
        beams = self.beam_search(prompt_tokens, max_new_tokens, num_beams, length_penalty=length_penalty, **given)
        return beams.tokens[..., 0, :]

    def beam_search(
        self,
        prompt_tokens,
        max_new_tokens,
        num_beams=4,
        *,
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
        """The best sequences that beam search finds after a prompt, and their scores.

        Args: as in `keras_seq.decoding.beam_search`, which tells what the scores are.

        Returns:
            `keras_seq.decoding.Beams`: tokens `(b, num_results, max_new_tokens)`, scores and lengths
            `(b, num_results)`, from good to bad; without the first axis for a prompt `(t,)`.

        Raises: ValueError for an empty prompt, a token outside of the vocabulary, arguments out of range.
        """
        self._built()
        return decoding.beam_search(
            self,
            prompt_tokens,
            max_new_tokens,
            num_beams,
            num_results,
            length_penalty,
            coverage_penalty,
            early_stopping,
            num_groups,
            diversity_penalty,
            stop_tokens,
            processors,
            mask,
        )

    def stream(
        self,
        prompt_tokens,
        max_new_tokens,
        sampler=None,
        *,
        temperature=None,
        top_k=None,
        top_p=None,
        min_p=None,
        processors=(),
        seed=None,
        stop_tokens=(),
        mask=None,
    ):
        """Yields the tokens of `generate`, with the same arguments, one by one as they are made.

        Returns: an iterator of ints for a prompt `(t,)`, else of arrays `(b,)`.
        """
        sampler = decoding.get_sampler(sampler, temperature, top_k, top_p, min_p)
        self._built()
        return decoding.stream(self, prompt_tokens, max_new_tokens, sampler, seed, stop_tokens, mask, processors)


def _last_valid(h, mask):
    """The last valid step of each row of `(b, t, d)`, as `(b, 1, d)`; the first step of a row without one."""
    if mask is None:
        return h[:, -1:]
    last = ops.max(ops.where(mask, ops.arange(ops.shape(h)[1], dtype="int32"), 0), axis=1)
    return ops.take_along_axis(h, last[:, None, None], axis=1)


def check_tokens(title, tokens, vocab_size):
    """Raises ValueError for token ids outside of the vocabulary, as far as they are at hand in a NumPy array."""
    if isinstance(tokens, np.ndarray) and tokens.size and tokens.dtype.kind in "iu":
        low, high = tokens.min(), tokens.max()
        if low < 0 or high >= vocab_size:
            raise ValueError(f"Tokens must be from 0 to {vocab_size - 1}. {title} has {low} to {high}.")
