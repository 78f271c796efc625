"""Where a step stands in its sequence, as features, rotations and biases: pure functions of positions.

Axes: b batch, h heads, t time, d features, n rotated pairs of features. Positions are int32, and what is computed from
them is float32, or float64 where that is asked for: bfloat16 counts in steps of 16 from 2048 on.
"""

import math
import numbers

import keras
import numpy as np
from keras import ops

# What each kind of scaling must have, and what it may have.
_SCALINGS: dict[str, tuple[set[str], set[str]]] = {
    "default": (set(), set()),
    "linear": ({"factor"}, set()),
    "ntk": ({"factor"}, set()),
    "yarn": (
        {"factor", "original_max_position_embeddings"},
        {"beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate"},
    ),
    "llama3": ({"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}, set()),
}


def positions(start, mask=None, time=None):
    """How many valid steps stand before each step of a chunk.

    `p_t = start + sum of mask_s over s < t`: a row with padding, wherever it is, counts as it would alone.

    Args:
        start: `(b,)` integers, the valid steps before the chunk; or one integer for all rows.
        mask: `(b, t)` bool, True = valid; None if all steps are.
        time: t; needed only if mask is None.

    Returns:
        `(b, t)` int32, or `(1, t)` if start is one integer and mask is None. A padded step has the position of the next
        valid one.

    Raises:
        ValueError: neither a mask nor the number of steps.
    """
    start = ops.reshape(ops.cast(start, "int32"), (-1, 1))
    if mask is None:
        if time is None:
            raise ValueError(
                "Positions need a mask (batch, time) or the number of steps. Received: mask=None, time=None"
            )
        return start + ops.arange(time, dtype="int32")
    valid = ops.cast(mask, "int32")
    return start + ops.cumsum(valid, axis=1) - valid


def segment_positions(segments):
    """Positions in rows that hold several sequences one after another.

    `p_t = t - (the first s of the run of equal ids that t is in)`

    Args:
        segments: `(b, t)` integers, one id for all steps of a sequence, another for the next.

    Returns:
        `(b, t)` int32, 0 at the first step of each segment.
    """
    time = ops.shape(segments)[1]
    steps = ops.arange(time, dtype="int32")
    first = ops.concatenate(
        [ops.ones_like(segments[:, :1], dtype="bool"), ops.not_equal(segments[:, 1:], segments[:, :-1])], axis=1
    )
    # The k-th smallest of the first steps belongs to the k-th run. (Keras has no cumulative maximum.)
    starts = ops.sort(ops.where(first, steps, time), axis=1)
    run = ops.cumsum(ops.cast(first, "int32"), axis=1) - 1
    return steps - ops.take_along_axis(starts, run, axis=1)


def sinusoidal(positions, d_model, base=10000.0, interleaved=True, dtype="float32"):
    """Sines and cosines of the position at wavelengths from 2 pi to 2 pi base.

    `P[p, 2i] = sin(p / base^(2i / d))`, `P[p, 2i + 1] = cos(p / base^(2i / d))`, i < d / 2

    Args:
        positions: `(...)` integers.
        d_model: d, even.
        base: the longest wavelength is 2 pi times it (nearly).
        interleaved: if True sines and cosines alternate, as in the paper; else all sines come before all cosines, as
            in Marian. (tensor2tensor and fairseq have that order too, but `base^(i / (d / 2 - 1))` as wavelengths.)
        dtype: `"float32"` or `"float64"`, of the computation and of the result.

    Returns:
        `(..., d_model)`.

    Raises:
        ValueError: d_model is not even and positive.

    Source: Vaswani et al. 2017, arXiv:1706.03762, section 3.5.
    """
    angles = _angles(positions, _inverse_frequencies("d_model", d_model, base), dtype)
    pair = ops.sin(angles), ops.cos(angles)
    return _interleave(*pair) if interleaved else ops.concatenate(pair, axis=-1)


def rotary_frequencies(dim, base=10000.0, scaling=None):
    """The angles by which each pair of features turns per step, in NumPy.

    `w_i = base^(-2i / dim)`, i < dim / 2, and with `scaling`, whose names are those of Hugging Face's `rope_scaling`:

    - `{"rope_type": "linear", "factor": s}`: `w_i / s` (position interpolation).
    - `{"rope_type": "ntk", "factor": s}`: the same with `base s^(dim / (dim - 2))` for base: the slowest pair turns s
      times slower, the fastest as before.
    - `{"rope_type": "yarn", "factor": s, "original_max_position_embeddings": L}`: pairs that turn more than `beta_fast`
      (32) times in L steps stay, those that turn less than `beta_slow` (1) times become `w_i / s`, a ramp between; and
      cos and sin are multiplied by `attention_factor` (`0.1 ln s + 1`). Optional too: `mscale`, `mscale_all_dim`,
      `truncate` (True: the ends of the ramp are whole pairs).
    - `{"rope_type": "llama3", "factor": s, "low_freq_factor": l, "high_freq_factor": h,
      "original_max_position_embeddings": L}`: pairs of a wavelength below `L / h` stay, those above `L / l` become
      `w_i / s`, between them a mixture.
    - `{"rope_type": "default"}`: none.

    Args:
        dim: the number of rotated features, even.
        base: theta.
        scaling: None or such a dict; an optional entry that is None counts as left out.

    Returns:
        `(dim / 2,)` float64, and the factor on cos and sin, which is 1.0 but for YaRN.

    Raises:
        ValueError: dim is not even and positive; an unknown `rope_type`; an entry missing, unknown or out of range.

    Source: Su et al. 2021, arXiv:2104.09864, eq. 15; Chen et al. 2023, arXiv:2306.15595 (linear); Peng et al. 2023,
    arXiv:2309.00071, appendix A.1 (NTK), section 3 (YaRN); meta-llama/llama-models, `apply_scaling` (llama3).
    """
    frequencies = _inverse_frequencies("dim", dim, base)
    kind, options = _checked_scaling(scaling)
    if kind == "default":
        return frequencies, 1.0
    if kind == "linear":
        return frequencies / options["factor"], 1.0
    if kind == "ntk":
        if dim < 4:
            raise ValueError(f"The scaling 'ntk' needs dim > 2. Received: dim={dim}")
        return _inverse_frequencies("dim", dim, base * options["factor"] ** (dim / (dim - 2))), 1.0
    if kind == "yarn":
        return _yarn(frequencies, dim, base, **options)
    return _llama3(frequencies, **options), 1.0


def rotate(x, positions, frequencies, factor=1.0, interleaved=False):
    """Rotary position embedding: turns pairs of features by angles that grow with the position.

    `(x_i, x_j)' = factor (x_i cos(p w_i) - x_j sin(p w_i), x_j cos(p w_i) + x_i sin(p w_i))`, where `j = i + n`, or
    `(2i, 2i + 1)` for `(i, j)` if interleaved. So the product of a query and a key depends on p - q alone.

    Args:
        x: `(b, h, t, d)`; features from 2 n on are left as they are.
        positions: `(b, t)` or `(t,)` integers.
        frequencies: `(n,)` NumPy array w, in radians per step; see `rotary_frequencies`.
        factor: of cos and sin.
        interleaved: if False pairs are a half apart (GPT-NeoX, Llama on Hugging Face: `rotate_half`); if True they are
            neighbours (the paper, GPT-J, Meta's own files of Llama).

    Returns:
        `(b, h, t, d)` in the dtype of x, computed in float32 (float64 if x is).

    Raises:
        ValueError: there are more than d / 2 frequencies.

    Source: Su et al. 2021, arXiv:2104.09864, eq. 34.
    """
    n = len(frequencies)
    if 2 * n > x.shape[-1]:
        raise ValueError(f"{n} frequencies turn {2 * n} features. Received x of shape {tuple(x.shape)}")
    given = keras.backend.standardize_dtype(x.dtype)
    dtype = "float64" if given == "float64" else "float32"
    angles = ops.expand_dims(_angles(positions, frequencies, dtype), -3)  # (b or nothing, 1, t, n)
    cos, sin = factor * ops.cos(angles), factor * ops.sin(angles)
    z = ops.cast(x[..., : 2 * n], dtype)
    first, second = (z[..., 0::2], z[..., 1::2]) if interleaved else (z[..., :n], z[..., n:])
    pair = first * cos - second * sin, second * cos + first * sin
    y = ops.cast(_interleave(*pair) if interleaved else ops.concatenate(pair, axis=-1), given)
    return y if 2 * n == x.shape[-1] else ops.concatenate([y, x[..., 2 * n :]], axis=-1)


def alibi_slopes(num_heads):
    """How much each head minds distance: a geometric sequence, in NumPy.

    `m_k = 2^(-8 k / h)`, k = 1 ... h, if h is a power of two. Else those of the next lower power p, followed by every
    other one (the first, the third, ...) of those of 2 p.

    Args:
        num_heads: h.

    Returns:
        `(h,)` float32.

    Raises:
        ValueError: num_heads is no positive integer.

    Source: Press et al. 2021, arXiv:2108.12409, section 3; ofirpress/attention_with_linear_biases, `get_slopes`.
    """
    power = 2 ** int(math.log2(positive("num_heads", num_heads)))
    exponents = np.concatenate([np.arange(1, power + 1) / power, np.arange(1, 2 * power, 2) / (2 * power)])
    return (2.0 ** (-8 * exponents[:num_heads])).astype("float32")


def relative_buckets(relative, bidirectional=True, num_buckets=32, max_distance=128):
    """T5's buckets of relative positions: one per distance when near, logarithmically wider when far.

    With B buckets for one direction, e = floor(B / 2) and a distance n: `n` if `n < e`, else
    `min(B - 1, e + floor((B - e) ln(n / e) / ln(max_distance / e)))`.

    Args:
        relative: `(...)` integers, position of the key - position of the query.
        bidirectional: if True half of the buckets, the upper one, is for keys after the query; else these all count as
            distance 0.
        num_buckets: B, or 2 B if bidirectional.
        max_distance: from here on all distances share the last bucket.

    Returns:
        `(...)` int32, at least 0 and less than num_buckets.

    Raises:
        ValueError: too few buckets, or all distances below max_distance have one of their own.

    Source: Raffel et al. 2019, arXiv:1910.10683, section 2.1; tensorflow/mesh, `transformer_layers.py`,
    `_relative_position_bucket`.
    """
    table = bucket_table(bidirectional, num_buckets, max_distance)
    relative = ops.cast(relative, "int32")
    distance = ops.abs(relative) if bidirectional else ops.maximum(-relative, 0)
    bucket = ops.take(ops.convert_to_tensor(table), ops.minimum(distance, max_distance), axis=0)
    return bucket + num_buckets // 2 * ops.cast(relative > 0, "int32") if bidirectional else bucket


def bucket_table(bidirectional, num_buckets, max_distance):
    """The bucket of each distance up to `max_distance`, in NumPy.

    Logarithms of backends and compilers differ by a rounding, which here would be a whole bucket.
    """
    size = positive("num_buckets", num_buckets) // (2 if bidirectional else 1)
    exact = size // 2
    if exact < 1 or max_distance <= exact:
        raise ValueError(
            f"Relative buckets need num_buckets >= {4 if bidirectional else 2} and max_distance > {max(exact, 1)}. "
            f"Received: num_buckets={num_buckets}, max_distance={max_distance}, bidirectional={bidirectional}"
        )
    distances = np.arange(max_distance + 1)
    ratios = np.maximum(distances, exact).astype("float32") / exact
    far = exact + (np.log(ratios) / math.log(max_distance / exact) * (size - exact)).astype("int32")
    return np.where(distances < exact, distances, np.minimum(far, size - 1)).astype("int32")


def positive(name, value):
    """`value` as an int, if it is a positive integer."""
    if not isinstance(value, numbers.Integral) or value < 1:
        raise ValueError(f"`{name}` must be a positive integer. Received: {name}={value!r}")
    return int(value)


def _inverse_frequencies(name, dim, base):
    if positive(name, dim) % 2:
        raise ValueError(f"`{name}` must be even: its features are pairs. Received: {name}={dim}")
    if not isinstance(base, numbers.Real) or not 1 < float(base) < math.inf:
        raise ValueError(f"The base of wavelengths must be a number greater than 1. Received: {base!r}")
    return base ** (-np.arange(0, dim, 2) / dim)


def _angles(positions, frequencies, dtype):
    """`(..., n)` of positions `(...)`."""
    frequencies = ops.convert_to_tensor(np.asarray(frequencies, dtype))
    return ops.expand_dims(ops.cast(positions, dtype), -1) * frequencies


def _interleave(a, b):
    """`a_0, b_0, a_1, b_1, ...` along the last axis."""
    return ops.reshape(ops.stack([a, b], axis=-1), (*ops.shape(a)[:-1], 2 * a.shape[-1]))


def _checked_scaling(scaling):
    """The kind of scaling and its options."""
    options = {k: v for k, v in (scaling or {"rope_type": "default"}).items() if v is not None}
    # Files from before transformers 4.43 say "type"; some say both.
    older = options.pop("type", None)
    kind = options.pop("rope_type", older)
    if kind not in _SCALINGS:
        raise ValueError(f"`rope_type` must be one of {sorted(_SCALINGS)}. Received: scaling={scaling!r}")
    required, optional = _SCALINGS[kind]
    missing, unknown = required - options.keys(), options.keys() - required - optional
    if missing or unknown:
        raise ValueError(
            f"The scaling {kind!r} takes {sorted(required)}"
            + (f" and optionally {sorted(optional)}" if optional else "")
            + f". Missing: {sorted(missing)}; unknown: {sorted(unknown)}. Received: scaling={dict(scaling)!r}"
        )
    for name, value in options.items():
        if name != "truncate" and (not isinstance(value, numbers.Real) or not 0 < float(value) < math.inf):
            raise ValueError(f"`{name}` of a scaling must be a positive number. Received: scaling={dict(scaling)!r}")
    return kind, options


def _yarn(
    frequencies,
    dim,
    base,
    factor,
    original_max_position_embeddings,
    beta_fast=32,
    beta_slow=1,
    attention_factor=None,
    mscale=None,
    mscale_all_dim=None,
    truncate=True,
):
    def pair_that_turns(times):
        return dim * math.log(original_max_position_embeddings / (2 * math.pi * times)) / (2 * math.log(base))

    def temperature(scale):
        return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0

    low, high = pair_that_turns(beta_fast), pair_that_turns(beta_slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    width = high - low or 0.001  # no division by 0
    ramp = np.clip((np.arange(dim // 2) - low) / width, 0, 1)
    if attention_factor is None:  # DeepSeek's two, of which one is meant for the scale of attention, else the paper's
        both = mscale is not None and mscale_all_dim is not None
        attention_factor = temperature(mscale) / temperature(mscale_all_dim) if both else temperature(1.0)
    return frequencies * (1 - ramp) + frequencies / factor * ramp, float(attention_factor)


def _llama3(frequencies, factor, low_freq_factor, high_freq_factor, original_max_position_embeddings):
    if not low_freq_factor < high_freq_factor:
        raise ValueError(
            "The scaling 'llama3' needs low_freq_factor < high_freq_factor. "
            f"Received: low_freq_factor={low_freq_factor}, high_freq_factor={high_freq_factor}"
        )
    turns = original_max_position_embeddings * frequencies / (2 * math.pi)  # in the original length
    kept = np.clip((turns - low_freq_factor) / (high_freq_factor - low_freq_factor), 0, 1)
    return kept * frequencies + (1 - kept) * frequencies / factor
