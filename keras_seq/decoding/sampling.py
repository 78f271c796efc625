"""How the next token is chosen from logits. A sampler is a pure function `(logits, u) -> token`.

`logits` `(b, v)`; `u` `(b,)` uniform in [0, 1), drawn by the engine before the loop starts, so that a seed gives the
same tokens whether they are generated at once or streamed.
"""

from dataclasses import dataclass

from keras import ops


@dataclass(frozen=True)
class Greedy:
    """The most probable token; of equals the first."""

    def __call__(self, logits, u):
        return ops.cast(ops.argmax(logits, axis=-1), "int32")


@dataclass(frozen=True)
class Sampling:
    """A token drawn with its probability, after the improbable ones were left out.

    In this order: the logits are divided by `temperature`; only the `top_k` largest are kept; of these only the
    smallest set of most probable ones whose probabilities sum to at least `top_p`; of these only those of at least
    `min_p` times the largest probability; what is left is normalized.

    Args:
        temperature: > 0; below 1 sharper, above 1 flatter.
        top_k: number of tokens kept, >= 1, or None for all.
        top_p: probability kept, in (0, 1], or None for all.
        min_p: the least probability, in (0, 1], as a part of the largest, or None for any.

    Raises: ValueError for values outside of these ranges.

    Source: Fan et al. 2018, arXiv:1805.04833 (top-k); Holtzman et al. 2019, arXiv:1904.09751 (top-p); Nguyen et al.
    2024, arXiv:2407.01082 (min-p).
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None

    def __post_init__(self):
        if not self.temperature > 0:
            raise ValueError(f"`temperature` must be > 0 (greedy is sampler='greedy'). Received: {self.temperature!r}")
        if self.top_k is not None and not (isinstance(self.top_k, int) and self.top_k >= 1):
            raise ValueError(f"`top_k` must be an integer >= 1 or None. Received: {self.top_k!r}")
        for name, p in {"top_p": self.top_p, "min_p": self.min_p}.items():
            if p is not None and not 0 < p <= 1:
                raise ValueError(f"`{name}` must be in (0, 1] or None. Received: {p!r}")

    def __call__(self, logits, u):
        logits = ops.cast(logits, "float32") / self.temperature
        if self.top_k is None and self.top_p is None:
            return draw(self._probable(_exp(logits)), u)
        vocab_size = logits.shape[-1]
        values, tokens = ops.top_k(logits, min(self.top_k or vocab_size, vocab_size))  # from large to small
        p = _exp(values)
        if self.top_p is not None:
            p = p / ops.sum(p, axis=-1, keepdims=True)
            before = ops.cumsum(p, axis=-1) - p
            p = ops.where(before < self.top_p, p, ops.zeros_like(p))
        return ops.cast(ops.take_along_axis(tokens, draw(self._probable(p), u)[:, None], axis=-1)[:, 0], "int32")

    def _probable(self, p):
        if self.min_p is None:
            return p
        return ops.where(p >= self.min_p * ops.max(p, axis=-1, keepdims=True), p, ops.zeros_like(p))


def _exp(logits):
    """Probabilities but for a common factor, the largest 1."""
    return ops.exp(logits - ops.max(logits, axis=-1, keepdims=True))


def draw(p, u):
    """The index at which the cumulative sum of `p` `(b, n)` passes u times the total; never one whose p is 0.

    `p` need not sum to 1.
    """
    total = ops.cumsum(p, axis=-1)
    # The largest float32 below 1 as a factor: u times the total stays below the total also after rounding.
    target = u[:, None] * total[:, -1:] * (1 - 2**-23)
    return ops.sum(ops.cast(total <= target, "int32"), axis=-1)


def get_sampler(sampler=None, temperature=None, top_k=None, top_p=None, min_p=None):
    """The sampler that the arguments of `generate` name.

    Args:
        sampler: `"greedy"`, `"sample"`, a function `(logits, u) -> token`, or None: greedy, unless one of the others is
            given.
        temperature, top_k, top_p, min_p: of `Sampling`.

    Raises: ValueError for an unknown name, or if both a sampler that takes no arguments and arguments are given.
    """
    given = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    given = {k: v for k, v in given.items() if v is not None}
    if sampler == "sample" or (sampler is None and given):
        return Sampling(**given)
    if given:
        raise ValueError(f"{', '.join(given)} go with sampler='sample'. Received: sampler={sampler!r}")
    if sampler in (None, "greedy"):
        return Greedy()
    if not callable(sampler):
        raise ValueError(
            f"`sampler` must be 'greedy', 'sample' or a function (logits, u) -> token. Received: {sampler!r}"
        )
    return sampler
