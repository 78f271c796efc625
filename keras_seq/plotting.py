"""Pictures of sequence models. Needs matplotlib, the extra `plotting`.

Each function takes arrays of any backend and returns a `matplotlib` figure, made with `pyplot`: a notebook shows it,
a script calls `matplotlib.pyplot.show()` or `figure.savefig("picture.png")`.
"""

import numpy as np
from keras import ops

__all__ = ["alignments", "attention_maps", "bars", "curves", "decay", "heatmap"]


def curves(lines, xlabel, ylabel, title="", x=None, log="", marker=None, **style):
    """Lines in one pair of axes: learning curves, gradient norms over distance, cost over context length.

    Args:
        lines: `{label: values}`; values `(n,)`, or a pair `(x, values)` of two such sequences.
        xlabel: what the horizontal axis is, with its unit.
        ylabel: what the vertical axis is, with its unit.
        title: of the figure.
        x: positions `(n,)` of the values that come without; default 1, 2, 3, ...
        log: which axes are logarithmic: `"x"`, `"y"`, `"xy"` or none.
        marker: of the points, as in `matplotlib`; default none.
        **style: for `Axes.plot`.

    Returns:
        the figure.

    Raises:
        ValueError: a line and its positions differ in length, or `log` names another axis.

    Example:

        history = {"loss": [2.1, 1.4, 1.1], "val_loss": [1.9, 1.5, 1.3]}  # as `fit(...).history`
        figure = keras_seq.plotting.curves(history, "epoch", "nats per token", "learning curves")
    """
    if set(log) - set("xy"):
        raise ValueError(f'log must be "x", "y", "xy" or "", not {log!r}')
    figure, axes = _pyplot().subplots(figsize=(6, 4))
    for label, values in lines.items():
        at, values = values if isinstance(values, tuple) else (x, values)
        values = _array(values)
        at = np.arange(1, len(values) + 1) if at is None else _array(at)
        if at.shape != values.shape:
            raise ValueError(f"{label!r} has {len(values)} values at {len(at)} positions")
        axes.plot(at, values, label=label, marker=marker, **style)
    axes.set(xlabel=xlabel, ylabel=ylabel, title=title)
    _logarithmic(axes, log)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    return figure


def bars(values, xlabel, title="", reference=None, log=False):
    """Values beside their names, from top to bottom: ratios of a benchmark, parameters of models.

    Args:
        values: `{name: value}`.
        xlabel: what the values are, with their unit.
        title: of the figure.
        reference: where a vertical line stands: values from there on are drawn darker; default none.
        log: whether the axis of the values is logarithmic.

    Returns:
        the figure, as high as there are values.

    Example:

        figure = keras_seq.plotting.bars({"LSTM": 3.1, "GRU": 2.9}, "times as fast", reference=1.0)
    """
    figure, axes = _pyplot().subplots(figsize=(8, 1.2 + 0.26 * len(values)))
    names, lengths = list(values), [float(value) for value in values.values()]
    dark = [reference is None or value >= reference for value in lengths]
    shown = axes.barh(range(len(names)), lengths, color=["tab:blue" if d else "lightsteelblue" for d in dark])
    axes.bar_label(shown, [f"{value:.3g}" for value in lengths], padding=3)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set(xlabel=xlabel, title=title)
    _logarithmic(axes, "x" if log else "")
    axes.margins(x=0.12, y=0.01)
    if reference is not None:
        axes.axvline(reference, color="black", linewidth=0.8)
    figure.tight_layout()
    return figure


def heatmap(values, xlabel="", ylabel="", title="", symmetric=False):
    """An array as colours: positional encodings, states over time.

    Args:
        values: array `(rows, columns)`; row 0 is at the top.
        xlabel: what the columns are.
        ylabel: what the rows are.
        title: of the figure.
        symmetric: whether 0 is in the middle of the colours.

    Returns:
        the figure.

    Example:

        encoding = keras_seq.layers.SinusoidalPositionalEncoding()(np.zeros((1, 64, 32)))[0]
        figure = keras_seq.plotting.heatmap(encoding, "channel", "position", symmetric=True)
    """
    values = _array(values)
    if values.ndim != 2:
        raise ValueError(f"values must be (rows, columns), not of shape {values.shape}")
    figure, axes = _pyplot().subplots(figsize=(6, 4))
    limit = float(np.abs(values).max())
    colours = {"cmap": "RdBu_r", "vmin": -limit, "vmax": limit} if symmetric else {"cmap": "viridis"}
    figure.colorbar(axes.imshow(values, aspect="auto", interpolation="nearest", **colours))
    axes.set(xlabel=xlabel, ylabel=ylabel, title=title)
    figure.tight_layout()
    return figure


def attention_maps(weights, queries=None, keys=None, titles=None):
    """What each head of one sequence looks at.

    Args:
        weights: array `(num_heads, t, s)`: how much query position t takes from key position s, 0 (white) to 1 (black).
        queries: t texts, or None for numbers.
        keys: s texts, or None for numbers.
        titles: a text for each head; default "head 1", "head 2", ...

    Returns:
        the figure, a map for each head, four in a row.

    Example:

        layer = keras_seq.layers.MultiHeadAttention(num_heads=2, key_dim=4, causal=True)
        x = np.random.default_rng(0).normal(size=(1, 5, 8)).astype("float32")
        _, weights = layer(x, return_attention_scores=True)  # (1, 2, 5, 5)
        figure = keras_seq.plotting.attention_maps(weights[0], list("hello"), list("hello"))
    """
    weights = _array(weights)
    if weights.ndim != 3:
        raise ValueError(f"weights must be (num_heads, t, s), of one sequence, not of shape {weights.shape}")
    titles = titles or [f"head {i + 1}" for i in range(len(weights))]
    return _maps(weights, titles, [queries] * len(weights), [keys] * len(weights))


def alignments(weights, sources, targets, titles=None):
    """How much each target token took from each source token, for one pair of sequences or several, side by side.

    Args:
        weights: list of arrays of at least `(len(target), len(source))`; what lies beyond is padding.
        sources: a list of texts for each pair.
        targets: a list of texts for each pair.
        titles: a text for each pair; default none.

    Returns:
        the figure.

    Example:

        figure = keras_seq.plotting.alignments([np.eye(4)], [list("code")], [["K", "OW", "D", ""]], ["code"])
    """
    pairs = zip(weights, sources, targets, strict=True)
    maps = [_array(array)[: len(target), : len(source)] for array, source, target in pairs]
    for array, source, target in zip(maps, sources, targets, strict=True):
        if array.shape != (len(target), len(source)):
            raise ValueError(f"{len(target)} target and {len(source)} source tokens, but weights {array.shape}")
    return _maps(maps, titles or [""] * len(maps), targets, sources)


def decay(decays, steps=64, title="what is left of a token"):
    """How long the channels of a recurrence remember: `w ** n` after n steps, a line for each channel.

    Args:
        decays: factors w of one step, in (0, 1], any shape.
        steps: how many steps to show.
        title: of the figure.

    Returns:
        the figure. Channels that remember longest are darkest.

    Example:

        figure = keras_seq.plotting.decay(np.exp(-np.exp(np.linspace(-6, 0, 16))))
    """
    decays = np.sort(_array(decays).ravel())
    if not ((decays > 0) & (decays <= 1)).all():
        raise ValueError(f"decays must be in (0, 1], not from {decays.min()} to {decays.max()}")
    figure, axes = _pyplot().subplots(figsize=(6, 4))
    n = np.arange(steps + 1)
    for shade, w in zip(np.linspace(0.3, 1, len(decays)), decays, strict=True):
        axes.plot(n, w**n, color=_pyplot().cm.Blues(shade), linewidth=1)
    axes.set(xlabel="steps since", ylabel="part", title=title, ylim=(0, 1.02))
    axes.grid(alpha=0.3)
    figure.tight_layout()
    return figure


def _maps(arrays, titles, rows, columns):
    """A grid of maps of weights, four in a row."""
    height, width = (max(array.shape[axis] for array in arrays) for axis in (0, 1))
    side = (1.2 + min(0.26 * width, 6), 1.2 + min(0.26 * height, 6))
    across = min(len(arrays), 4)
    down = -(-len(arrays) // across)
    figure, grid = _pyplot().subplots(down, across, figsize=(side[0] * across, side[1] * down), squeeze=False)
    for axes in grid.flat[len(arrays) :]:
        axes.remove()
    for axes, array, title, row, column in zip(grid.flat, arrays, titles, rows, columns, strict=False):
        axes.imshow(array, cmap="Greys", vmin=0, vmax=1, interpolation="nearest")
        axes.set_title(title)
        if column is not None:
            axes.set_xticks(range(len(column)), column, rotation=90 if max(map(len, column)) > 1 else 0)
        if row is not None:
            axes.set_yticks(range(len(row)), row)
    figure.tight_layout()
    return figure


def _logarithmic(axes, log):
    """Makes these axes logarithmic; where less than two decades are shown, with labels at 1, 2 and 5 of each."""
    for name in log:
        getattr(axes, f"set_{name}scale")("log")
        low, high = getattr(axes, f"get_{name}lim")()
        if high < 100 * low:
            from matplotlib.ticker import LogLocator, NullFormatter

            axis = getattr(axes, f"{name}axis")
            axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.set_major_formatter(lambda value, _: f"{value:g}")
            axis.set_minor_formatter(NullFormatter())


def _array(values):
    return np.asarray(ops.convert_to_numpy(values))


def _pyplot():
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError('pictures need matplotlib: pip install "keras-seq[plotting]"') from error
    return pyplot
