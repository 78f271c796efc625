"""The loop over time: the one place where the backends differ for every recurrence."""

from keras import ops, tree

from keras_seq import backend


def compiles():
    """Whether the step of a scan is compiled, and that once, however many steps there are."""
    return backend.current().COMPILES


def scan(step, state, xs, recompute=False):
    """Applies `step(state, x_t) -> (state, y_t)` along the first axis of the pytree `xs`.

    Args:
        step: a pure function; the state that it returns has the structure, shapes and dtypes of the one it got.
        state: any pytree.
        xs: pytree of arrays `(t, ...)`, `t >= 1`.
        recompute: whether the backward pass computes each step a second time instead of keeping what is inside it.

    Returns:
        the last state, and the pytree of the `y_t` stacked to `(t, ...)`. One step runs without a loop.
    """
    if tree.flatten(xs)[0].shape[0] == 1:
        state, y = step(state, tree.map_structure(lambda x: x[0], xs))
        return state, tree.map_structure(lambda y: ops.expand_dims(y, 0), y)
    return backend.current().scan(backend.current().recomputed(step) if recompute else step, state, xs)


def first(state):
    """The first part of a state, which is what a recurrent layer shows of it."""
    return state[0]


def masked_scan(step, state, xs, mask=None, read=first):
    """Runs `state = step(state, x_t)` over `(b, t, ...)`; padded steps leave the state as it is.

    Args:
        step: a pure function of the state and of one step of `xs`; returns the next state.
        state: pytree of `(b, ...)`.
        xs: pytree of `(b, t, ...)`.
        mask: `(b, t)` bool or None.
        read: the output of a step, read from the state after it: at a padded step it is that of the state kept.

    Returns:
        the outputs, a pytree of `(b, t, ...)`, and the last state.
    """

    def advance(state, x):
        state = step(state, x)
        return state, read(state)

    def advance_where_valid(state, inputs):
        x, valid = inputs
        state = where(valid, step(state, x), state)
        return state, read(state)

    if mask is None:
        state, y = scan(advance, state, tree.map_structure(time_first, xs))
    else:
        state, y = scan(advance_where_valid, state, tree.map_structure(time_first, (xs, mask)))
    return tree.map_structure(time_first, y), state


def time_first(x):
    """Swaps the first two axes: `(b, t, ...)` <-> `(t, b, ...)`."""
    return ops.transpose(x, (1, 0, *range(2, len(x.shape))))


def where(valid, new, old):
    """Rows of the pytree `new` where `valid` `(b,)`, of `old` elsewhere."""

    def choose(n, o):
        return ops.where(ops.reshape(valid, (-1,) + (1,) * (len(n.shape) - 1)), n, o)

    return tree.map_structure(choose, new, old)
