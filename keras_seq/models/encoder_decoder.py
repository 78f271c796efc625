"""What every model of a target sequence given a source sequence shares."""

import keras
from keras import ops

from keras_seq.base import autocast
from keras_seq.models.language_model import LanguageModel


class EncoderDecoder(LanguageModel):
    """A model of the next target token, given a source: `logits = model((source, target))`.

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
        pad_id: the id that is padding in sources and targets where no mask is given; None if there is none.
        **kwargs: those of `keras.Model`.

    A subclass writes `memory(source, mask, training)`, `hidden(tokens, state, mask, training)` from a state
    `(own, memory)`, `logits(h)`, `own_state(batch_size, max_length)`, its `fresh_state` and `state_spec`, and `build`.
    """

    def __init__(self, source_vocab_size, target_vocab_size, start_id=1, label_smoothing=0.0, pad_id=0, **kwargs):
        super().__init__(target_vocab_size, pad_id, **kwargs)
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

    def memory(self, source, mask=None, training=False):
        """What the decoder has to know of sources `(b, s)`: a pytree whose leaves are `(b, ...)`."""
        raise NotImplementedError

    def own_state(self, batch_size, max_length=None):
        """The decoder's state before the first token, but for the memory."""
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
            return self.own_state(batch_size, max_length), self._memory_of(source, source_mask, False)

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
            state = self.own_state(ops.shape(target)[0], max_length), memory
            return super().call(target, mask, state, return_state, training, last_only)
        return super().call(target, mask, None, False, training, last_only, memory=memory)

    def prefill(self, prompt, mask, new):
        start = ops.full((prompt.shape[0], 1), self.start_id, dtype="int32")
        logits, state = self(
            (prompt, start), mask=(mask, None), return_state=True, training=False, last_only=True, max_length=new + 1
        )
        return logits[:, 0], state

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

    def _compared(self, x, y, y_pred):
        return y, y_pred, None if self.pad_id is None else y != self.pad_id

    def _token_losses(self, y, logits, training):
        losses = super()._token_losses(y, logits, training)
        if not (training and self.label_smoothing):
            return losses
        uniform = ops.logsumexp(logits, axis=-1) - ops.mean(logits, axis=-1)
        return (1 - self.label_smoothing) * losses + self.label_smoothing * uniform


def _pair(x):
    """`(source, target)` of the inputs of a call; the source is None if they are the target alone."""
    if isinstance(x, dict):
        return x["source"], x["target"]
    return tuple(x) if isinstance(x, list | tuple) else (None, x)
