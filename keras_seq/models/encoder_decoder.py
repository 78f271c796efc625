"""What every model of a target sequence given a source sequence shares."""

import keras
import numpy as np
from keras import ops, tree

from keras_seq.base import autocast, random_seed
from keras_seq.decoding.engine import compiled
from keras_seq.decoding.sampling import draw
from keras_seq.models.language_model import LanguageModel, check_tokens
from keras_seq.models.scheduled_sampling import get_schedule


class EncoderDecoder(LanguageModel):
    """A model of the next target token, given a source: `logits = model((source, target))`.

    `p(y_t | y_1, ..., y_(t-1), source) = softmax(logits_t)`;
    `loss = -mean_t ((1 - l) log p(y_t | ...) + l mean_v log p(v | ...))` over all tokens v, l the label smoothing.

    `fit(source, target)` trains with teacher forcing: the decoder sees `start_id` and all targets but the last, and its
    logits at each step are held against the target there. `fit((source, decoder_inputs), target)` leaves the shift to
    the caller. Without a loss in `compile` it is the mean cross-entropy in nats per token. Padding does not count.

    The decoder is a sequence layer, with the splitting law and `step`: its state holds what it has to know of the
    source, `state = model.initial_state(batch_size, max_length, source)`, and from there on
    `logits, state = model(target, initial_state=state, return_state=True)`. `generate` and `stream` take sources.

    Args:
        source_vocab_size, target_vocab_size: numbers of token ids.
        start_id: the target token before the first.
        label_smoothing: in training, this part of the probability of the targets goes to all tokens alike (only of the
            loss without one in `compile`).
        scheduled_sampling: in training, how often the decoder sees the true token before, and not one that it draws
            itself: a probability, or a function of the train step such as `InverseSigmoidSampling(k)`; None for always.
        pad_id: the id that is padding in sources and targets where no mask is given; None if there is none.
        **kwargs: those of `keras.Model`.

    Call: `(source, target)`, tokens `(b, s)` and `(b, t)`, the target from `start_id` on; or target tokens with an
    `initial_state`; mask: a pair of bool arrays, or that of the target (default: where they are not `pad_id`);
    `return_state`, `last_only`; `max_length`: capacity of the state that is returned -> logits
    `(b, t, target_vocab_size)`. The state is `(own, memory)`: what earlier target tokens leave to later ones, and what
    the subclass's `memory` makes of the source.

    Raises: ValueError for sizes < 1, a `start_id` or `pad_id` outside of the vocabulary or a `start_id` that is
    `pad_id`, a label smoothing that is not from 0 to below 1, an unknown `scheduled_sampling`, `stateful=True`; for a
    call without a source, or with one and an `initial_state`; for `fit` without targets; for a token outside of the
    vocabulary in `fit`, `generate` and `alignment`, and for `alignment` of a model without attention.

    A subclass writes `memory(source, mask, training)`, `hidden(tokens, state, mask, training)` from a state
    `(own, memory)`, `logits(h)`, `own_state(batch_size, max_length, memory)`, its `fresh_state` and `state_spec`, and
    `build`.

    Source: Sutskever et al. 2014, arXiv:1409.3215; Szegedy et al. 2015, arXiv:1512.00567, section 7 (label smoothing);
    Bengio et al. 2015, arXiv:1506.03099 (scheduled sampling).

    Example:

        model = keras_seq.models.Seq2Seq(source_vocab_size=30, target_vocab_size=40, d_model=8)  # a subclass
        source, target = np.array([[5, 7, 9]]), np.array([[1, 4, 6, 8]])  # 1 is `start_id`
        logits = model((source, target))  # (1, 4, 40)
        state = model.initial_state(batch_size=1, max_length=10, source=source)
        logits, state = model(target, initial_state=state, return_state=True)  # the same, and the state after it
        logits, state = model.step(np.array([3]), state)  # (1, 40)
    """

    def __init__(
        self,
        source_vocab_size,
        target_vocab_size,
        start_id=1,
        label_smoothing=0.0,
        pad_id=0,
        scheduled_sampling=None,
        **kwargs,
    ):
        super().__init__(target_vocab_size, pad_id, **kwargs)
        self.input_spec = None  # the first argument is a pair, or the target alone
        if source_vocab_size < 1:
            raise ValueError(
                f"`source_vocab_size` must be a positive integer. Received: source_vocab_size={source_vocab_size!r}"
            )
        if not 0 <= start_id < target_vocab_size or start_id == pad_id:
            raise ValueError(
                f"`start_id` must be from 0 to {target_vocab_size - 1}, and not pad_id={pad_id!r}. Received: "
                f"start_id={start_id!r}"
            )
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"`label_smoothing` must be from 0 to below 1. Received: {label_smoothing!r}")
        if self.stateful:
            raise ValueError(f"{self._title} does not take stateful=True: each target has a source of its own.")
        self.source_vocab_size, self.start_id, self.label_smoothing = source_vocab_size, start_id, label_smoothing
        self.scheduled_sampling = get_schedule(scheduled_sampling)
        if self.scheduled_sampling is not None:
            self.seed_generator = keras.random.SeedGenerator(random_seed())
            self.train_steps = self.add_weight((), "zeros", "int32", trainable=False, name="train_steps")

    def memory(self, source, mask=None, training=False):
        """What the decoder has to know of sources `(b, s)`: a pytree whose leaves are `(b, ...)`."""
        raise NotImplementedError

    def own_state(self, batch_size, max_length=None, memory=None):
        """The decoder's state before the first token, but for the memory, from which it may start."""
        raise NotImplementedError

    def hidden(self, tokens, state, mask=None, training=False, memory=None):
        """As in every language model, from a state `(own, memory)`, or from the beginning with a `memory`."""
        raise NotImplementedError

    @property
    def prompt_vocab_size(self):
        return self.source_vocab_size

    def initial_state(self, batch_size, max_length=None, source=None, source_mask=None):
        """The state before the first target token: `(own, memory)`.

        Args:
            batch_size: number of rows.
            max_length: how many target tokens there will be at most, for states of fixed capacity.
            source: `(b, s)` tokens; without it the memory is empty, and the state is of no use.
            source_mask: `(b, s)` bool, True = valid; default: where it is not `pad_id`.
        """
        self._built()
        if source is None:
            return self.own_state(batch_size, max_length), ()
        with autocast(self):
            source = ops.convert_to_tensor(source)
            memory = self._memory_of(source, source_mask, False)
            return self.own_state(batch_size, max_length, memory), memory

    def _memory_of(self, source, mask, training):
        if len(source.shape) != 2:
            raise ValueError(f"{self._title} expects sources (batch, time). Received: shape {tuple(source.shape)}")
        source = ops.cast(source, "int32")
        if mask is None and self.pad_id is not None:
            mask = source != self.pad_id
        return self.memory(source, mask, training)

    def call(  # type: ignore[override]
        self,
        x,
        mask=None,
        initial_state=None,
        return_state=False,
        training=None,
        last_only=False,
        max_length=None,
    ):
        """`x` is `(source, target)`, or the target alone with an `initial_state`; mask likewise."""
        source, target = _pair(x)
        if source is None:
            if initial_state is None or not initial_state[1]:
                raise ValueError(
                    f"{self._title} needs a source: call it on (source, target), or on a target with "
                    "initial_state=model.initial_state(batch_size, max_length, source)."
                )
            return super().call(target, mask, initial_state, return_state, training, last_only)
        if initial_state is not None:
            raise ValueError(f"{self._title}: the initial_state holds a source already. Call it on the target alone.")
        source_mask, mask = (None, mask) if mask is None or hasattr(mask, "shape") else _pair(mask)
        memory = self._memory_of(source, source_mask, bool(training))
        if return_state:
            state = self.own_state(ops.shape(target)[0], max_length, memory), memory
            return super().call(target, mask, state, return_state, training, last_only)
        if training and self.scheduled_sampling is not None:
            target = self._sampled(target, mask, memory)
        return super().call(target, mask, None, False, training, last_only, memory=memory)

    reads_pieces = False  # a source is read whole

    def prefill(self, prompt, mask, new, state=None):
        start = ops.full((prompt.shape[0], 1), self.start_id, dtype="int32")
        logits, state = self(
            (prompt, start), mask=(mask, None), return_state=True, training=False, last_only=True, max_length=new + 1
        )
        return logits[:, 0], state

    def prefill_with_attention(self, prompt, mask, new):
        """`prefill`, and the attention weights `(b, s)` of the step that it ends with."""
        batch = prompt.shape[0]
        state = self.initial_state(batch, new + 1, prompt, mask)
        with autocast(self):
            h, state, weights = self.aligned(ops.full((batch, 1), self.start_id, dtype="int32"), state)
            if weights is None:
                raise ValueError(f"{self._title} has no attention, and so no coverage.")
            return self.logits(h)[:, 0], state, weights[:, 0]

    def step_with_attention(self, token, state):
        """`step_valid`, and the attention weights `(b, s)` to the source."""
        with autocast(self):
            h, state, weights = self.aligned(token[:, None], state)
            return self.logits(h)[:, 0], state, weights[:, 0]

    def reordered(self, state, rows):
        """As in every language model; the memory stays as it is, one row for all beams of a source."""
        return super().reordered(state[0], rows), state[1]

    def compute_mask(self, inputs, mask=None):
        _, target = _pair(inputs)
        mask = mask if mask is None or hasattr(mask, "shape") else _pair(mask)[1]
        return super().compute_mask(target, mask)

    def compute_output_shape(self, input_shape):
        shape = input_shape[-1] if isinstance(input_shape[-1], list | tuple) else input_shape
        return (*shape, self.vocab_size)

    # Training:

    def train_step(self, *args):
        return super().train_step(*args[:-1], self._teacher_forced(args[-1]))

    def test_step(self, *args):
        return super().test_step(*args[:-1], self._teacher_forced(args[-1]))

    def _symbolic_build(self, iterator=None, data_batch=None):
        """Keras builds losses and metrics by a call on the inputs of `fit`, which need not have a target in them."""
        tokens = keras.KerasTensor((2, 3), "int32")
        super()._symbolic_build(data_batch=((tokens, tokens), tokens))

    def _teacher_forced(self, data):
        """`(source, target)` -> `((source, decoder inputs), target)`."""
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        if y is None:
            raise ValueError(f"{self._title} needs targets: fit(source, target).")
        if _pair(x)[0] is None:
            start = ops.full_like(y[:, :1], self.start_id)
            x = x, ops.concatenate([start, y[:, :-1]], axis=1)
        return x, y, sample_weight

    def _sampled(self, target, mask, memory):
        """Decoder inputs `(b, t)` some of whose tokens are the model's own."""
        mask = self.compute_mask(target, mask)
        probability = self.scheduled_sampling(self.train_steps.value)
        self.train_steps.assign_add(1)
        shape = ops.shape(target)
        own = keras.random.uniform(shape, seed=self.seed_generator) >= probability
        own = ops.logical_and(own, ops.arange(shape[1])[None] > 0)  # nothing is guessed before the first step
        own = own if mask is None else ops.logical_and(own, mask)
        u = keras.random.uniform(shape, seed=self.seed_generator)
        memory = tree.map_structure(ops.stop_gradient, memory)
        return self.with_guesses(ops.cast(target, "int32"), own, u, mask, memory)

    def with_guesses(self, target, own, u, mask, memory):
        """`target` `(b, t)`, but where `own` a token that the model draws after the tokens before.

        Here in two passes over all steps at once: the guesses follow from the true tokens (Mihaylova & Martins 2019,
        arXiv:1906.07651). A model whose steps follow one another anyway guesses from what it guessed (Bengio et al.
        2015).
        """
        h, _ = self.hidden(target, self.fresh_state(ops.shape(target)[0]), mask, memory=memory)
        guess = self.drawn(self.logits(h), u)
        return ops.where(own, ops.concatenate([target[:, :1], guess[:, :-1]], axis=1), target)

    def drawn(self, logits, u):
        """Tokens drawn from logits `(..., v)` by u `(...)`, none of them padding."""
        p = ops.softmax(ops.cast(logits, "float32"))
        if self.pad_id is not None:
            p = p * ops.cast(ops.arange(self.vocab_size) != self.pad_id, p.dtype)
        tokens = draw(ops.reshape(p, (-1, self.vocab_size)), ops.reshape(u, (-1,)))
        return ops.stop_gradient(ops.reshape(tokens, ops.shape(u)))

    def alignment(self, source, target, source_mask=None):
        """How much each target token looked at each source token when it was to be written.

        Args:
            source: `(b, s)` tokens, or `(s,)`.
            target: `(b, t)` tokens as `fit` takes them and `generate` gives them, or `(t,)`.
            source_mask: `(b, s)` bool, True = valid; default: where it is not `pad_id`.

        Returns: NumPy array `(b, t, s)`, or `(t, s)`; rows of padding are 0.

        Raises: ValueError if the model has no attention, or there is a token outside of the vocabulary.
        """
        self._built()
        source, target = (np.asarray(ops.convert_to_numpy(tokens)) for tokens in (source, target))
        single = source.ndim == 1
        source, target = (source[None], target[None]) if single else (source, target)
        self._check_tokens(source, target)
        if self.pad_id is not None and source_mask is None:
            source_mask = source != self.pad_id
        mask = np.ones(source.shape, bool) if source_mask is None else np.reshape(source_mask, source.shape)
        run = compiled(self, _itself, "_alignment")
        given = (ops.convert_to_tensor(v, d) for v, d in ((source, "int32"), (target, "int32"), (mask, "bool")))
        weights = ops.convert_to_numpy(run(*given))
        return weights[0] if single else weights

    def _alignment(self, source, target, source_mask):
        memory = self._memory_of(source, source_mask, False)
        inputs = ops.concatenate([ops.full_like(target[:, :1], self.start_id), target[:, :-1]], axis=1)
        state = self.fresh_state(ops.shape(target)[0])
        _, _, weights = self.aligned(inputs, state, self.compute_mask(inputs), memory=memory)
        if weights is None:
            raise ValueError(f"{self._title} has no attention, and so no alignment.")
        weights = ops.cast(weights, "float32")
        return weights if self.pad_id is None else ops.where((target != self.pad_id)[..., None], weights, 0.0)

    def aligned(self, tokens, state, mask=None, training=False, memory=None):
        """As `hidden`, and the weights `(b, t, s)` by which each step looks at the source; None if it does not."""
        raise NotImplementedError

    def fit(self, x=None, y=None, *args, **kwargs):
        """As in Keras: sources and targets `(b, t)`, or a dataset of such pairs."""
        self._check_tokens(x, y)
        return super().fit(x, y, *args, **kwargs)

    def evaluate(self, x=None, y=None, *args, **kwargs):
        """As in Keras: sources and targets `(b, t)`, or a dataset of such pairs."""
        self._check_tokens(x, y)
        return super().evaluate(x, y, *args, **kwargs)

    def _check_tokens(self, x, y):
        source, target = (x, y) if _pair(x)[0] is None else _pair(x)
        check_tokens("The source", source, self.source_vocab_size)
        for tokens in (target, y):
            check_tokens("The target", tokens, self.vocab_size)

    def _compared(self, x, y, y_pred):
        return y, y_pred, None if self.pad_id is None else y != self.pad_id


def _itself(model):
    """Where `compiled` finds a method of the model."""
    return model


def _pair(x):
    """`(source, target)` of the inputs of a call; the source is None if they are the target alone."""
    if isinstance(x, dict):
        return x["source"], x["target"]
    return tuple(x) if isinstance(x, list | tuple) and len(x) == 2 else (None, x)
