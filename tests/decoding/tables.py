"""A model whose probabilities are in a table, so that they can be computed by hand."""

import numpy as np
from keras import ops


class Table:
    """The next token depends on the last two: `logits = table[token before the last, last token]`. 0 is padding."""

    pad_id, variables, trainable_variables, non_trainable_variables = 0, (), (), ()

    def __init__(self, table):
        self.table, self.vocab_size = np.asarray(table, "float32"), len(table)

    @classmethod
    def random(cls, vocab_size, seed=0):
        return cls(2 * np.random.default_rng(seed).normal(size=(vocab_size,) * 3))

    def initial_state(self, batch_size, max_length=None):
        return ops.zeros((batch_size,), "int32")

    def prefill(self, prompt, mask, new):
        return self.step_valid(prompt[:, -1], prompt[:, -2])

    def step(self, token, state):
        index = state * self.vocab_size + token
        return ops.take(np.reshape(self.table, (-1, self.vocab_size)), index, axis=0), token

    step_valid = step

    def log_probabilities(self, prompt, tokens=()):
        """Of what may come after a prompt and some more tokens, in float64."""
        logits = self.table[tuple((*prompt, *tokens)[-2:])].astype("float64")
        return logits - np.log(np.exp(logits).sum())
