"""What every layer over time must do, on every backend: the contract as checks that run."""

import contextlib
import gc
import json
import os
import tempfile
import warnings

import keras
import numpy as np
from keras import ops, tree
from keras.src.backend import set_keras_mask

from keras_seq import backend
from keras_seq.base import SequenceLayer


def check_layer(make_layer, inputs=None, tolerance=2e-6, checks=None):
    """Puts a layer through all checks of the contract, on the backend that Keras runs on.

    The splitting law in outputs, state and gradients; step by step; masks of any pattern with NaN in the padding; batch
    1 and time 1; symbolic shapes; compiled and eager; mixed precision with a float32 state; `stateful=True` in `fit`,
    `evaluate` and `predict`; config, save and load, also quantized; reproducible weights and dropout. A layer that
    needs the future must say so in a ValueError, and is held to the rest.

    Args:
        make_layer: a function without arguments that makes a new layer each time.
        inputs: array `(b, t, ...)` to run on, b >= 3 and t >= 4; default: normal numbers `(4, 7, 8)`, or token ids if
            the layer has a `vocab_size`.
        tolerance: of float32, relative to the largest value: 2e-6 for recurrences, 1e-5 for attention.
        checks: some of `CHECKS`; default all of them.

    Raises: AssertionError that names the check and what differed.

    Example:

        from keras_seq.testing import CHECKS, check_layer

        check_layer(lambda: keras_seq.layers.GRU(4), checks=CHECKS[:1])  # the first only; leave it out for all
    """
    case = None
    for check in CHECKS if checks is None else checks:
        try:
            case = _Case(make_layer, inputs, tolerance) if case is None else case
            check(case)
        except AssertionError as error:
            raise AssertionError(f"{check.__name__}: {error}") from error
        except Exception as error:
            raise AssertionError(f"{check.__name__}: {type(error).__name__}: {error}") from error


class _Case:
    """A layer on trial: how to make it, what to run it on."""

    def __init__(self, make_layer, inputs, tolerance):
        self.make_layer, self.tolerance = make_layer, tolerance
        keras.utils.set_random_seed(0)
        layer = make_layer()
        rng = np.random.default_rng(0)
        if inputs is None:
            vocab_size = getattr(layer, "vocab_size", None)
            inputs = rng.integers(1, vocab_size, (4, 7)) if vocab_size else rng.normal(size=(4, 7, 8))
        inputs = np.asarray(inputs)
        self.x = inputs.astype("int32" if inputs.dtype.kind in "iu" else "float32")
        self.batch, self.time = self.x.shape[:2]
        self.mask = rng.random((self.batch, self.time)) < 0.6  # holes
        self.mask[0] = np.arange(self.time) < self.time - 2  # right padding
        self.mask[1] = np.arange(self.time) >= 2  # left padding
        self.mask[2] = False  # an empty row
        self.compiled = {}
        self.layer = self.make()

    def make(self, dtype="float32", seed=0, initial=False, **config):
        """A new layer, built, with other config and under another dtype policy if so wanted.

        Unless it is wanted as it is `initial`, weights (but not biases) that are all 0 get other values: they would
        hide what is multiplied by them.
        """
        keras.utils.set_random_seed(seed)
        policy = keras.config.dtype_policy()
        keras.config.set_dtype_policy(dtype)
        try:
            layer = self.make_layer()
            if config:
                layer = type(layer).from_config(layer.get_config() | config)
        finally:
            keras.config.set_dtype_policy(policy)
        layer.build(list(self.x.shape))  # a list, as when a saved layer is loaded
        layer.built = True
        rng = np.random.default_rng(0)
        for weight in [] if initial else layer.trainable_weights:
            if weight.name != "bias" and not np.any(_numpy(weight)):
                weight.assign(0.3 * rng.normal(size=weight.shape))
        return layer

    def padded(self, value):
        """The inputs with `value` in the padding."""
        if self.x.dtype.kind == "i":
            return self.x
        return np.where(self.mask.reshape(self.mask.shape + (1,) * (self.x.ndim - 2)), self.x, np.float32(value))

    def model(self, layer, stateful=False):
        """The layer as a Keras model of a sequence of any length."""
        batch = self.batch if stateful else None
        inputs = keras.Input(batch_shape=(batch, None, *self.x.shape[2:]), dtype=self.x.dtype.name)
        outputs = tree.flatten(layer(inputs))[0]
        return keras.Model(inputs, outputs)

    def call(self, layer, x, state=None, mask=None):
        """`(y, state)` of a whole sequence, compiled; the state is None if the layer needs the future."""
        if id(layer) not in self.compiled:

            def function(x, state, mask):
                if layer.needs_future:
                    return layer(x, mask=mask, training=False), None
                return layer(x, mask=mask, initial_state=state, return_state=True, training=False)

            self.compiled[id(layer)] = layer, backend.current().compiled(function, layer)
        x, state, mask = tree.map_structure(lambda v: None if v is None else ops.convert_to_tensor(v), (x, state, mask))
        return self.compiled[id(layer)][1](x, state, mask)

    def run(self, layer, x, state=None, mask=None, lengths=None):
        """Outputs and last state of `x`, in pieces of the given lengths."""
        pieces, start = [], 0
        for n in lengths or [self.time]:
            piece = slice(start, start + n)
            start += n
            given = None if mask is None else mask[:, piece]
            y, state = layer(x[:, piece], mask=given, initial_state=state, return_state=True, training=False)
            pieces.append(y)
        return ops.concatenate(pieces, 1) if layer.return_sequences else pieces[-1], state

    def with_gradients(self, layer, x, state, mask=None, lengths=None):
        """As `run`, and the gradients of the weights and of what is float in the inputs and the state, all NumPy."""
        leaves = [ops.convert_to_tensor(leaf) for leaf in tree.flatten((x, state))]
        is_float = ["float" in keras.backend.standardize_dtype(leaf.dtype) for leaf in leaves]
        floats = [leaf for leaf, chosen in zip(leaves, is_float, strict=True) if chosen]
        fixed = [leaf for leaf, chosen in zip(leaves, is_float, strict=True) if not chosen]
        key = id(layer), mask is None, tuple(lengths or ())
        if key not in self.compiled:
            self.compiled[key] = layer, self._gradients(layer, (x, state), is_float, lengths)
        mask = () if mask is None else (ops.convert_to_tensor(mask),)
        (y, last), d_weights, d_floats = self.compiled[key][1](floats, fixed, *mask)
        return _numpy({"y": y, "state": last, "d_weights": list(d_weights), "d_floats": d_floats})

    def _gradients(self, layer, inputs, is_float, lengths):
        """The compiled gradients of a sum over the valid outputs and the last state."""

        def loss(floats, fixed, mask=None):
            kinds = iter(floats), iter(fixed)
            leaves = [next(kinds[0 if chosen else 1]) for chosen in is_float]
            x, state = tree.pack_sequence_as(inputs, leaves)
            y, last = self.run(layer, x, state, mask, lengths)
            shown = y
            if mask is not None and layer.return_sequences:
                shown = ops.where(ops.reshape(mask, (*mask.shape, *(1,) * (len(y.shape) - 2))), y, ops.zeros_like(y))
            total = ops.sum(ops.square(shown))
            for leaf in tree.flatten(last):
                total = total + ops.sum(ops.square(ops.cast(leaf, "float32")))
            return total, (y, last)

        return backend.current().gradients(loss, layer)

    def near(self, got, expected, what, tolerance=None):
        """Equal within the tolerance, relative to the largest value of its group: noise on a 0 does not count."""
        tolerance = tolerance or self.tolerance
        for group in expected if isinstance(expected, dict) else [None]:
            pairs = (got, expected) if group is None else (got[group], expected[group])
            where = what if group is None else f"{what} ({group})"
            got_leaves, expected_leaves = (tree.flatten(_numpy(v)) for v in pairs)
            assert len(got_leaves) == len(expected_leaves), f"{where}: the structure differs"
            scale = max([1e-3, *(np.abs(e).max() for e in expected_leaves if e.size)])
            for g, e in zip(got_leaves, expected_leaves, strict=True):
                assert g.shape == e.shape, f"{where}: shape {g.shape}, expected {e.shape}"
                assert np.isfinite(g).all(), f"{where}: not finite"
                error = np.abs(g - e).max() / scale if g.size else 0.0
                assert error <= tolerance, f"{where}: differs by {error:.1e} of {scale:.1e} > {tolerance:.0e}"

    def state_after_some_steps(self):
        """A state that is not the first one."""
        return self.call(self.layer, np.flip(self.x, 1).copy(), self.layer.initial_state(self.batch))[1]


def check_shapes(case):
    """What a symbolic call promises is what comes, for unknown batch and time; and a state keeps its form."""
    layer = case.layer
    shape = (None, None, *case.x.shape[2:])
    promised = layer(keras.KerasTensor(shape, case.x.dtype.name))
    y = layer(case.x)
    for p, real in zip(tree.flatten(promised), tree.flatten(y), strict=True):
        assert len(p.shape) == len(real.shape), f"promised {p.shape}, got {tuple(real.shape)}"
        assert all(a in (None, b) for a, b in zip(p.shape, real.shape, strict=True)), (
            f"promised {p.shape}, got {real.shape}"
        )
        assert p.shape[-1] == real.shape[-1], f"promised {p.shape}, got {tuple(real.shape)}"
        assert p.dtype == keras.backend.standardize_dtype(real.dtype), f"promised {p.dtype}, got {real.dtype}"
    computed = layer.compute_output_shape(case.x.shape)
    computed = computed if isinstance(computed[0], tuple) else (computed,)
    for shape, real in zip(computed, tree.flatten(y), strict=True):
        assert tuple(shape) == tuple(real.shape), f"compute_output_shape says {tuple(shape)}, got {tuple(real.shape)}"
    if not layer.needs_future:
        last = layer(case.x, return_state=True)[1]
        assert _form(last) == _form(layer.initial_state(case.batch)), "the last state has another form than the first"


def check_split(case, mask=None, x=None):
    """Outputs, last state and all gradients are those of the whole sequence, however it is split."""
    if case.layer.needs_future:
        return check_refusal(case)
    state = case.state_after_some_steps()
    x = case.x if x is None else x
    whole = case.with_gradients(case.layer, x, state, mask)
    lengths = [1, 2, case.time - 3]
    case.near(case.with_gradients(case.layer, x, state, mask, lengths), whole, f"in pieces of {lengths}")


def check_masked_split(case):
    """The same under right and left padding, holes and an empty row."""
    check_split(case, case.mask, case.padded(0))


def check_refusal(case):
    """A layer that needs the future says so, by name."""
    layer = case.layer
    for attempt in (lambda: layer.step(case.x[:, 0], ()), lambda: layer(case.x, return_state=True)):
        try:
            attempt()
        except ValueError as error:
            assert layer.name in str(error), f"the error does not name the layer: {error}"
        else:
            raise AssertionError("a layer that needs the future must refuse to be split")


def check_steps(case):
    """Step by step gives what the whole sequence gives, for a batch and for one row, and for one step."""
    layer = case.layer
    if layer.needs_future:
        return
    for rows in (case.batch, 1):
        x = case.x[:rows]
        y, last = case.call(layer, x, layer.initial_state(rows))
        state, outputs = layer.initial_state(rows), []
        for t in range(case.time):
            y_t, state = layer.step(ops.convert_to_tensor(x[:, t]), state)
            outputs.append(y_t)
        outputs = ops.stack(outputs, 1) if layer.return_sequences else outputs[-1]
        case.near({"y": outputs, "state": state}, {"y": y, "state": last}, f"{rows} rows step by step")
        assert _form(state) == _form(layer.initial_state(rows)), "a step changes the form of the state"


def check_mask(case):
    """Padding is as if it were not there: each row gives what its valid steps alone give; the state skips the rest."""
    layer = case.layer
    x, mask = case.padded(0), case.mask
    together, last = case.call(layer, x, None if layer.needs_future else layer.initial_state(case.batch), mask)
    for row in range(case.batch):
        valid = mask[row]
        first = None if layer.needs_future else layer.initial_state(1)
        alone, state = case.call(layer, x[row : row + 1, valid], first) if valid.any() else (None, first)
        for y, y_alone in zip(tree.flatten(together), tree.flatten(alone), strict=True) if valid.any() else ():
            here = _numpy(y)[row : row + 1]
            case.near(here[:, valid] if layer.return_sequences else here, y_alone, f"row {row} alone")
        if not layer.needs_future:
            got = tree.map_structure(lambda s, row=row: s[row : row + 1], _numpy(last))
            case.near(got, state, f"state of row {row} alone")


def check_padding(case):
    """NaN in the padding reaches no valid output, no state and no gradient."""
    layer, mask = case.layer, ops.convert_to_tensor(case.mask)
    if layer.needs_future:
        clean, dirty = (tree.flatten(layer(case.padded(v), mask=mask)) for v in (0, np.nan))
        if layer.return_sequences:
            clean, dirty = ([_numpy(y)[case.mask] for y in ys] for ys in (clean, dirty))
        return case.near(dirty, clean, "NaN in the padding")
    state = case.state_after_some_steps()
    clean, dirty = (case.with_gradients(layer, case.padded(v), state, mask) for v in (0, np.nan))
    if layer.return_sequences:
        clean["y"], dirty["y"] = clean["y"][case.mask], dirty["y"][case.mask]
    case.near(dirty, clean, "NaN in the padding")


def check_compiled(case):
    """Compiled in `predict` it gives what it gives eagerly; the mask that x carries is used, with a state too."""
    layer = case.layer
    predicted = case.model(layer).predict(case.x, batch_size=case.batch, verbose=0)
    case.near(predicted, tree.flatten(layer(case.x))[0], "compiled")
    x, state = ops.convert_to_tensor(case.padded(0)), layer.initial_state(case.batch)
    expected = layer(x, mask=case.mask, initial_state=state)

    def carried(x, mask, state):
        set_keras_mask(x, mask)
        return layer(x, initial_state=state)

    mask = ops.convert_to_tensor(case.mask)
    case.near(backend.current().compiled(carried, layer)(x, mask, state), expected, "the mask that x carries, compiled")
    case.near(carried(x, mask, state), expected, "the mask that x carries")


def check_precision(case):
    """Under mixed precision outputs have the compute dtype and are finite, and the state stays float32."""
    expected = tree.flatten(case.call(case.layer, case.x)[0])[0]
    for policy, tolerance in (("mixed_bfloat16", 5e-2), ("mixed_float16", 1e-2), ("bfloat16", 1e-1), ("float64", 1e-5)):
        if policy == "float64" and not _has_float64():
            continue
        layer = case.make(policy)
        layer.set_weights(case.layer.get_weights())
        y, last = case.call(layer, case.x, None if layer.needs_future else layer.initial_state(case.batch))
        y = tree.flatten(y)[0]
        dtype = keras.backend.standardize_dtype(y.dtype)
        assert dtype == layer.compute_dtype, f"{policy}: the output is {dtype}"
        case.near(y, expected, policy, tolerance)
        if not layer.needs_future:
            parts = [part for part in layer._flatten_layers() if isinstance(part, SequenceLayer)]
            dtypes = {"float64" if policy == "float64" else "float32"}
            dtypes |= {part.compute_dtype for part in parts if not part.sums_in_state}
            for form in tree.flatten(_form(last)):
                assert "float" not in form or form.split()[-1] in dtypes, f"{policy}: the state is {form}"
            assert _form(last) == _form(layer.initial_state(case.batch)), f"{policy}: the state changes its form"
            y_1, state = case.call(layer, case.x[:, :1], layer.initial_state(case.batch))
            y_2, state = case.call(layer, case.x[:, 1:], state)
            y_12 = ops.concatenate([y_1, y_2], 1) if layer.return_sequences else y_2
            case.near(
                {"y": y_12, "state": state}, {"y": y, "state": last}, f"{policy}: in pieces", min(tolerance, 1e-2)
            )


def check_config(case):
    """A copy made from the config, and one loaded from a file, give the same outputs."""
    layer = case.layer
    y = tree.flatten(layer(case.x))[0]
    config = layer.get_config()
    json.dumps(config)
    copy = type(layer).from_config(config)
    copy.build(list(case.x.shape))
    copy.set_weights(layer.get_weights())
    case.near(tree.flatten(copy(case.x))[0], y, "a copy from the config", 1e-12)
    assert copy.get_config() == config, "the config of a copy differs"
    case.near(_saved_and_loaded(case.model(layer))(case.x), y, "saved and loaded", 1e-12)


def check_quantized(case):
    """`quantize`, save, load gives equal outputs, where there is something to quantize."""
    layer = case.make()
    model = case.model(layer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Keras warns of every layer that has no `quantize`
        gc.freeze()  # Keras collects garbage for each matrix that it quantizes: not among all that is there by now
        try:
            model.quantize("int8")
        except ValueError as error:  # a layer without anything to quantize
            assert "quantize" in str(error), error
            return
        finally:
            gc.unfreeze()
        y, again = (_outputs(m, case.x) for m in (model, _saved_and_loaded(model)))
        case.near(again, y, "quantized, saved and loaded", 1e-12)


def check_fit(case):
    """`fit` runs, changes every weight and keeps them finite; `evaluate` agrees with the loss computed by hand."""
    layer = case.make()
    model = case.model(layer)
    y = _numpy(model(case.x))
    model.compile(keras.optimizers.Adam(0.01), "mse")
    before = [w.numpy() for w in layer.trainable_weights]
    loss = model.evaluate(case.x, 0 * y, batch_size=case.batch, verbose=0)
    assert abs(loss - np.square(y).mean()) <= 1e-5 * max(1, abs(loss)), (
        f"evaluate: {loss}, by hand {np.square(y).mean()}"
    )
    _fit(model, case.x, 0 * y, epochs=2, batch_size=case.batch, verbose=0)
    for weight, old in zip(layer.trainable_weights, before, strict=True):
        assert np.isfinite(weight.numpy()).all(), f"{weight.path} is not finite after fit"
        assert not np.array_equal(weight.numpy(), old), f"{weight.path} does not change in fit"


def check_stateful(case):
    """`stateful=True` carries the state over the batches of `predict`, `evaluate` and `fit` until it is reset."""
    if case.layer.needs_future:
        try:
            case.make(stateful=True)
        except ValueError:
            return
        raise AssertionError("a layer that needs the future must refuse stateful=True")
    layer = case.make(stateful=True)
    layer.set_weights(case.layer.get_weights())
    half = case.time // 2
    pieces = np.concatenate([case.x[:, :half], case.x[:, half : 2 * half]])  # two batches: each row goes on
    model = case.model(layer, stateful=True)
    model.compile(keras.optimizers.SGD(0.0), "mse")
    state, outputs = case.layer.initial_state(case.batch), []
    for piece in (case.x[:, :half], case.x[:, half : 2 * half], case.x[:, :half]):
        y, state = case.call(case.layer, piece, state)
        outputs.append(_numpy(y))
    expected, follows = np.concatenate(outputs[:2]), outputs[2]

    def first_batch():
        return model.predict(case.x[:, :half], batch_size=case.batch, verbose=0)

    runs = {
        "predict": lambda: case.near(model.predict(pieces, batch_size=case.batch, verbose=0), expected, "predict"),
        "evaluate": lambda: model.evaluate(pieces, 0 * expected, batch_size=case.batch, verbose=0),
        "fit": lambda: _fit(model, pieces, 0 * expected, batch_size=case.batch, epochs=1, shuffle=False, verbose=0),
    }
    has_state = bool(tree.flatten(state))
    has_dropout = any(getattr(part, "dropout", 0) or hasattr(part, "rate") for part in layer._flatten_layers())
    for name, run in runs.items():
        layer.reset_state()
        run()
        if name != "fit" or not has_dropout:  # which makes another state
            case.near(first_batch(), follows, f"the batch after {name}", max(case.tolerance, 1e-5))
        layer.reset_state()
        case.near(first_batch(), expected[: case.batch], f"after {name} and reset_state")
    if has_state:
        with contextlib.suppress(ValueError):
            layer(case.x[:-1])
            raise AssertionError("a stateful layer must refuse another batch size")
    assert len(layer.weights) == len(case.layer.weights), "the carried state counts as a weight"


def check_seed(case):
    """One seed gives the same weights and the same dropout; another seed gives others."""
    one, same, other = (case.make(seed=seed, initial=True) for seed in (1, 1, 2))
    for a, b in zip(one.get_weights(), same.get_weights(), strict=True):
        assert np.array_equal(a, b), "one seed gives different weights"
    if any(np.ptp(w) > 0 for w in one.get_weights() if w.size > 1):  # not all constant
        different = [not np.array_equal(a, b) for a, b in zip(one.get_weights(), other.get_weights(), strict=True)]
        assert any(different), "different seeds give the same weights"
    y = [_numpy(tree.flatten(layer(case.x, training=True))[0]) for layer in (one, same)]
    assert np.array_equal(*y), "one seed gives different outputs in training"


def _fit(model, *args, **kwargs):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The model does not have any trainable weights")
        model.fit(*args, **kwargs)


def _saved_and_loaded(model):
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "model.keras")
        model.save(path)
        return keras.saving.load_model(path)


def _outputs(model, x):
    """Those of a model, compiled: eager JAX compiles each call of a quantized layer."""
    return backend.current().compiled(lambda x: model(x), model)(ops.convert_to_tensor(x))


def _numpy(x):
    def convert(v):
        v = np.asarray(v if isinstance(v, np.ndarray) else ops.convert_to_numpy(v))
        v = v.astype("int32") if v.dtype == bool else v
        return v if v.dtype.kind in "iu" else v.astype("float64" if v.dtype == "float64" else "float32")

    return tree.map_structure(convert, x)


def _form(state):
    """Structure, shapes and dtypes of a state."""
    return tree.map_structure(lambda s: f"{tuple(s.shape)} {keras.backend.standardize_dtype(s.dtype)}", state)


def _has_float64():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # JAX warns that it makes a float32 of it
        return keras.backend.standardize_dtype(ops.zeros((), "float64").dtype) == "float64"


CHECKS = (
    check_shapes,
    check_split,
    check_masked_split,
    check_steps,
    check_mask,
    check_padding,
    check_compiled,
    check_precision,
    check_config,
    check_quantized,
    check_fit,
    check_stateful,
    check_seed,
)
