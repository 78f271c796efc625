"""Pictures hold what they were given: tested by their content, not by their pixels."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_seq import plotting

pyplot = pytest.importorskip("matplotlib.pyplot", reason="pictures need matplotlib")


@pytest.fixture(autouse=True)
def closed():
    pyplot.switch_backend("Agg")
    yield
    pyplot.close("all")


def lines_of(figure):
    return {line.get_label(): line.get_xydata() for line in figure.axes[0].lines}


def test_curves():
    figure = plotting.curves({"a": [3.0, 2.0], "b": ([10, 20, 30], ops.ones(3))}, "epoch", "loss", "title", log="y")
    axes = figure.axes[0]
    assert (axes.get_xlabel(), axes.get_ylabel(), axes.get_title()) == ("epoch", "loss", "title")
    assert (axes.get_xscale(), axes.get_yscale()) == ("linear", "log")
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["a", "b"]
    np.testing.assert_array_equal(lines_of(figure)["a"], [[1, 3], [2, 2]])
    np.testing.assert_array_equal(lines_of(figure)["b"], [[10, 1], [20, 1], [30, 1]])


def test_curves_at_given_positions():
    figure = plotting.curves({"a": [3.0, 2.0]}, "length", "seconds", x=[1, 100], log="xy")
    np.testing.assert_array_equal(lines_of(figure)["a"], [[1, 3], [100, 2]])
    assert figure.axes[0].get_xscale() == "log"


def test_few_decades_have_readable_labels():
    axis = plotting.curves({"a": [1.0, 2.0, 30.0]}, "", "", log="y").axes[0].yaxis
    axis.figure.canvas.draw()
    assert {"1", "2", "5", "10", "20"} <= {label.get_text() for label in axis.get_ticklabels()}
    assert not any(label.get_text() for label in axis.get_ticklabels(minor=True))


def test_curves_refuse():
    with pytest.raises(ValueError, match="'a' has 2 values at 3 positions"):
        plotting.curves({"a": [1, 2]}, "", "", x=[1, 2, 3])
    with pytest.raises(ValueError, match=r"log must be .* not 'z'"):
        plotting.curves({"a": [1, 2]}, "", "", log="z")


def test_bars():
    axes = plotting.bars({"a": 2.0, "b": 0.5}, "times", "title", reference=1.0, log=True).axes[0]
    assert [bar.get_width() for bar in axes.patches] == [2.0, 0.5]
    assert [text.get_text() for text in axes.get_yticklabels()] == ["a", "b"]
    assert [text.get_text() for text in axes.texts] == ["2", "0.5"]
    assert axes.patches[0].get_facecolor() != axes.patches[1].get_facecolor()
    assert (axes.get_xscale(), axes.get_xlabel(), axes.get_title()) == ("log", "times", "title")
    assert list(axes.lines[0].get_xdata()) == [1, 1]


def test_heatmap():
    values = np.arange(-6.0, 6).reshape(3, 4)
    image = plotting.heatmap(ops.convert_to_tensor(values), "column", "row", symmetric=True).axes[0].images[0]
    np.testing.assert_array_equal(image.get_array(), values)
    assert image.get_clim() == (-6, 6)
    with pytest.raises(ValueError, match=r"\(rows, columns\), not of shape \(3,\)"):
        plotting.heatmap(np.ones(3))


def test_attention_maps():
    weights = keras.random.uniform((5, 2, 3), seed=1)
    figure = plotting.attention_maps(weights, queries=["a", "b"], keys=["c", "d", "long"])
    assert [axes.get_title() for axes in figure.axes] == [f"head {i}" for i in range(1, 6)]
    for axes, expected in zip(figure.axes, ops.convert_to_numpy(weights), strict=True):
        np.testing.assert_array_equal(axes.images[0].get_array(), expected)
        assert axes.images[0].get_clim() == (0, 1)
    assert [text.get_text() for text in figure.axes[0].get_xticklabels()] == ["c", "d", "long"]
    assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == ["a", "b"]
    with pytest.raises(ValueError, match=r"of one sequence, not of shape \(1, 5, 2, 3\)"):
        plotting.attention_maps(weights[None])


def test_alignments_leave_padding_out():
    weights = np.arange(20.0).reshape(4, 5) / 20
    figure = plotting.alignments([weights, weights], [list("abc"), list("ab")], [list("xy"), list("xyz")], ["1", "2"])
    first, second = (axes.images[0].get_array() for axes in figure.axes)
    np.testing.assert_array_equal(first, weights[:2, :3])
    np.testing.assert_array_equal(second, weights[:3, :2])
    assert [axes.get_title() for axes in figure.axes] == ["1", "2"]
    with pytest.raises(ValueError, match=r"5 target and 1 source tokens, but weights \(4, 1\)"):
        plotting.alignments([weights], [["a"]], [list("vwxyz")])


def test_decay():
    figure = plotting.decay(np.array([[0.5], [1.0]]), steps=2)
    np.testing.assert_allclose([line.get_ydata() for line in figure.axes[0].lines], [[1, 0.5, 0.25], [1, 1, 1]])
    with pytest.raises(ValueError, match=r"decays must be in \(0, 1\], not from 0.5 to 2.0"):
        plotting.decay([0.5, 2.0])
