"""RNN over any cell."""

import inspect

import keras
from keras import ops, tree

from keras_seq import ops as seq_ops
from keras_seq.layers.cells import Cell
from keras_seq.layers.recurrent import Recurrent, arguments


@keras.saving.register_keras_serializable("keras_seq")
class RNN(Recurrent):
    """Runs a cell over time: `y_t, state = cell(x_t, state)`.

    Args:
        cell: any callable of that form: a cell of this library or of Keras, a layer or an object of your own. It tells
            its first state by `initial_state(batch_size)`, or, as Keras's cells do, by `get_initial_state(batch_size)`
            or `state_size` (one size or several; the state is then a list of zeros `(b, size)`). If its call has a
            `training` argument, that is given.
        The others, and their order and defaults: as in `keras.layers.RNN`.

    Call: x `(b, t, ...)`, mask `(b, t)` bool -> y `(b, units)`, or `(b, t, units)` with `return_sequences=True`. The
    state is the cell's, in float32. If the cell's output is no part of it, the layer's state is `(cell_state, y)`,
    because a padded step repeats the last output.

    Raises: ValueError if the cell is not callable or does not tell its first state.

    Source: the interface of a cell is that of `keras.layers.RNN`.

    Example:

        class Sum:
            state_size = 3

            def __call__(self, x_t, state):
                total = state[0] + x_t
                return total, [total]

        y = keras_seq.layers.RNN(Sum())(keras.ops.ones((2, 5, 3)))  # 5 everywhere
    """

    def __init__(
        self,
        cell,
        return_sequences=False,
        return_state=False,
        go_backwards=False,
        stateful=False,
        unroll=False,
        zero_output_for_mask=False,
        **kwargs,
    ):
        super().__init__(**arguments(locals(), "cell"))
        known = ("initial_state", "get_initial_state", "state_size")
        if not callable(cell) or not any(hasattr(cell, name) for name in known):
            raise ValueError(
                "`cell` must be callable as cell(x_t, state) -> (y_t, state) and have one of "
                f"{', '.join(known)}. Received: {cell!r}"
            )
        self.cell = cell
        function = cell.call if isinstance(cell, keras.layers.Layer) else cell
        self._takes_training = "training" in inspect.signature(function).parameters
        self._output_size = getattr(cell, "output_size", None)
        self._shown = None  # the leaf of the cell's state that is its output

    @property
    def output_size(self):
        if self._output_size is None:
            raise ValueError(f"{self._title} knows the size of its output once it is built.")
        return self._output_size

    def build(self, input_shape):
        input_shape = tuple(input_shape)
        self.input_spec = keras.InputSpec(ndim=len(input_shape), axes={-1: input_shape[-1]})
        if isinstance(self.cell, keras.layers.Layer) and not self.cell.built:
            self.cell.build((input_shape[0], *input_shape[2:]))
            self.cell.built = True
        y, state = self._cell_step(ops.zeros((1, *input_shape[2:]), self.compute_dtype), self._cell_state(1), False)
        self._output_size = y.shape[-1]
        self._shown = next((i for i, leaf in enumerate(tree.flatten(state)) if leaf is y), None)

    def initial_state(self, batch_size, max_length=None):
        state = self._cell_state(batch_size)
        if self._shown is not None:
            return state
        return state, ops.zeros((batch_size, self.output_size), self.state_dtype)

    def recur(self, x, state, mask, training):
        def step(state, x):
            y, cell_state = self._cell_step(x, state if self._shown is not None else state[0], training)
            return self._cast(cell_state if self._shown is not None else (cell_state, y))

        def output(state):
            return tree.flatten(state)[self._shown if self._shown is not None else -1]

        cells = getattr(self.cell, "cells", [self.cell])
        _draw_dropout(cells, x[:, 0])
        y, state = seq_ops.masked_scan(step, state, x, mask, output)
        _forget_dropout(cells)
        return y, state

    def _cell_state(self, batch_size):
        if hasattr(self.cell, "initial_state"):
            state = self.cell.initial_state(batch_size)
        elif hasattr(self.cell, "get_initial_state"):
            state = self.cell.get_initial_state(batch_size=batch_size)
        else:
            sizes = self.cell.state_size
            state = [ops.zeros((batch_size, n)) for n in (sizes if isinstance(sizes, list | tuple) else [sizes])]
        return self._cast(state)

    def _cell_step(self, x, state, training):
        cell = self.cell.call if isinstance(self.cell, Cell) else self.cell
        y, new = cell(x, state, training=training) if self._takes_training else cell(x, state)
        return y, tree.pack_sequence_as(state, tree.flatten(new))

    def _cast(self, state):
        return tree.map_structure(lambda s: ops.cast(s, self.state_dtype), state)


def _draw_dropout(cells, x):
    """Keras's cells draw a dropout mask at the first step and keep it: inside a compiled loop is too late."""
    for cell in cells:
        if hasattr(cell, "get_dropout_mask"):
            cell.get_dropout_mask(x)
            cell.get_recurrent_dropout_mask(ops.ones((ops.shape(x)[0], cell.units), x.dtype))
            x = ops.ones((ops.shape(x)[0], cell.units), x.dtype)


def _forget_dropout(cells):
    for cell in cells:
        if hasattr(cell, "reset_dropout_mask"):
            cell.reset_dropout_mask()
            cell.reset_recurrent_dropout_mask()
