"""The one abstraction of the library: a layer over time with an explicit state."""

import inspect
import random
from contextlib import nullcontext

import keras
from keras import ops, tree
from keras.src.backend import AutocastScope, get_keras_mask  # the mask's attribute is not on traced arrays of JAX

_KERAS_CONFIG = ("name", "dtype", "trainable")
_OWN_ARGUMENTS = ("stateful", "name", "dtype", "trainable", "activity_regularizer", "autocast")


class Configured(keras.layers.Layer):
    """A Keras layer whose config is the arguments of its constructor, whatever they are: nobody writes `get_config`.

    Initializers, layers and other Keras objects among them are serialized, and the dtype policies of quantized layers
    inside are kept, so that a quantized model loads.
    """

    def __new__(cls, *args, **kwargs):
        self = super().__new__(cls, *args, **kwargs)
        bound = inspect.signature(cls.__init__).bind(self, *args, **kwargs)
        bound.apply_defaults()
        config = dict(list(bound.arguments.items())[1:])
        config |= config.pop("kwargs", {})
        object.__setattr__(self, "_arguments", {k: v for k, v in config.items() if k not in _KERAS_CONFIG})
        return self

    def get_config(self):
        config = {k: keras.saving.serialize_keras_object(v) for k, v in self._arguments.items()}
        quantized = {
            path: keras.saving.serialize_keras_object(_quantization(layer))
            for path, layer in _sublayers(self)
            if layer.quantization_mode
        }
        return super().get_config() | config | ({"quantized": quantized} if quantized else {})

    @classmethod
    def from_config(cls, config):
        config = {k: keras.saving.deserialize_keras_object(v) for k, v in config.items()}
        quantized = config.pop("quantized", {})
        layer = cls(**config)
        for path, quantization in quantized.items():
            _set_quantization(layer, [int(i) for i in path.split(".")], quantization)
        return layer

    def policy_of_next(self):
        """The dtype policy of a layer that `build` is about to make, and how it was quantized if it was saved so."""
        return getattr(self, "_quantizations", {}).get(len(self._layers), {"dtype": self.dtype_policy})


class SequenceLayer(Configured):
    """A layer over time that can be run whole, in chunks, or step by step.

    The splitting law: for any split of the time axis, x = x1 ++ x2, and any mask,

        y1, s1 = layer(x1, initial_state=s0, return_state=True)
        y2, s2 = layer(x2, initial_state=s1, return_state=True)
        y,  s  = layer(x,  initial_state=s0, return_state=True)
        y == y1 ++ y2   and   s == s2, with the same gradients

    A subclass writes `advance`, and where it needs them `build`, `initial_state` and `compute_output_shape` (of a
    sequence `(b, t, ...)`), and gets the rest, `get_config` included.

    Args:
        stateful: if True, the state is carried from one batch of `fit`, `evaluate`, `predict` or a call to the next
            (row i of a batch continues row i of the batch before; no gradient flows between batches) until
            `reset_state()`. Every batch must then have the size that the layer was built for. A call with an explicit
            `initial_state`, and `step`, leave what is carried alone.
        **kwargs: those of `keras.layers.Layer`: `name`, `dtype`, `trainable`, ...

    Call:
        x `(b, t, ...)`; mask `(b, t)` bool, True = valid, any pattern; initial_state: what `initial_state` or an
        earlier call returned, or None for the beginning; return_state: if True returns `(y, state)`, else y.

    Raises:
        ValueError: a mask or a state of another structure, shape or dtype than expected; a sequence of length 0; `step`
            or `return_state` on a layer that needs the future.
    """

    return_sequences = True
    sums_in_state = True  # then the state is float32 whatever the compute dtype

    def __init__(self, stateful=False, **kwargs):
        super().__init__(**kwargs)
        self.stateful = stateful
        self.supports_masking = True
        self._convert_input_args = False  # or Keras would cast a float32 state to the compute dtype
        self._carried = _Carried()
        self._checked_steps = _Set()

    # To define:

    def initial_state(self, batch_size, max_length=None):
        """The state before the first step: any pytree whose leaves are `(batch_size, ...)`.

        Args:
            batch_size: number of rows.
            max_length: how many steps there will be at most, for states of fixed capacity; others ignore it.
        """
        return ()

    def advance(self, x, state, mask=None, training=False):
        """Runs `x` `(b, t, ...)`, t >= 1, from `state`: returns `(y, state)`. Padded steps must keep the state.

        `x` is 0 where `mask` is False, unless a layer before left something there.
        """
        raise NotImplementedError

    def advance_one(self, x_t, state):
        """`advance` by one step `x_t` `(b, ...)`, in inference: `(y_t, state)`. To write it is a matter of speed."""
        y, state = self.advance(x_t[:, None], state)
        return (y[:, 0] if self.return_sequences else y), state

    def stepper(self, batch_size, steps=1):
        """`advance_one` for about so many steps in a row of so many rows: a function `(x_t, state) -> (y_t, state)`.

        It may have looked up, and laid out anew, the weights, which must not change meanwhile. A matter of speed too.
        """
        return self.advance_one

    def fresh_state(self, batch_size):
        """What `advance` gets in a call that neither gives a state nor wants one back: `initial_state`, or less."""
        return self.initial_state(batch_size)

    def state_spec(self, batch_size):
        """The state in shapes and dtypes; None in a shape is a dimension that may differ from state to state."""
        return self.initial_state(batch_size)

    def compute_output_shape(self, input_shape):
        return tuple(input_shape)

    @property
    def needs_future(self):
        """Why the layer cannot be run piece by piece, or None if it can."""
        return None

    # Given:

    @property
    def state_dtype(self):
        """The dtype of recurrent sums: float32 whatever the compute dtype, float64 under float64."""
        return "float64" if self.compute_dtype == "float64" else "float32"

    def __call__(self, x, *args, **kwargs):
        x, args, kwargs = tree.map_structure(_tensor, (x, args, kwargs))
        return super().__call__(x, *args, **kwargs)

    def call(self, x, mask=None, initial_state=None, return_state=False, training=None):
        if return_state:
            self._require_splittable("return_state=True")
        y, state = self._run(x, mask, initial_state, return_state, training)
        return (y, state) if return_state else y

    def _run(self, x, mask, initial_state, return_state, training, **given):
        if len(x.shape) > 1 and x.shape[1] == 0:
            raise ValueError(
                f"{self._title} needs at least one time step. Received an input of shape {tuple(x.shape)}."
            )
        if mask is None:
            mask = get_keras_mask(x)
        if "float" in dtype_of(x):
            x = cast(x, self.compute_dtype)
        if mask is not None:
            self._check_mask(mask, x)
            x = ops.where(ops.reshape(mask, (*ops.shape(mask), *(1,) * (len(x.shape) - 2))), x, ops.zeros_like(x))
        state = self._state_before(x, initial_state, return_state)
        y, state = self.advance(x, state, mask=mask, training=bool(training), **given)
        if self.stateful and initial_state is None:
            self._carried.assign(state)
        return y, state

    def step(self, x_t, state):
        """One step: `x_t` `(b, ...)` and a state give `y_t` `(b, ...)` and the next state.

        Raises:
            ValueError: the layer needs the future; a state of another structure or shape than expected.
        """
        signature = _signature(x_t), _signature(state)
        if signature in self._checked_steps:  # the layer's own mathematics, without the cost of a Keras call
            return self.advance_one(x_t, state)
        return self._first_step(x_t, state, signature)

    def _first_step(self, x_t, state, signature):
        """A step through the whole of `call`; the next like it need not be checked again."""
        self._require_splittable("step")
        if not hasattr(x_t, "shape") or len(x_t.shape) < 1:
            raise ValueError(f"{self._title} expects one time step, of shape (batch, ...). Received: {x_t!r}")
        x = ops.expand_dims(_tensor(x_t), 1)
        y, last = SequenceLayer.__call__(self, x, initial_state=state, return_state=True, training=False)
        plain = self.compute_dtype == self.variable_dtype and dtype_of(x) in (self.compute_dtype, "int32", "int64")
        if plain and ops.is_tensor(x_t) and signature[-1] == _signature(last):
            self._checked_steps.add(signature)
        return (y[:, 0] if self.return_sequences else y), last

    def reset_state(self):
        """Forgets the state that `stateful=True` carries, here and in all layers inside."""
        for layer in self._flatten_layers():
            if isinstance(layer, SequenceLayer):
                layer._carried.reset(layer)

    def compute_mask(self, inputs, mask=None):
        """The mask goes on to the next layer, as long as there is a time axis."""
        mask = mask[0] if isinstance(mask, list | tuple) else mask
        return mask if self.return_sequences else None

    def compute_output_spec(self, *args, **kwargs):
        return keras.Operation.compute_output_spec(self, *args, **kwargs)

    @property
    def variables(self):
        """Weights, seeds, and the state carried by `stateful=True`, which is no weight: it is not saved."""
        return super().variables + self._carried.variables

    # Checks:

    @property
    def _title(self):
        return f"{type(self).__name__} '{self.name}'"

    def _require_splittable(self, what):
        if self.needs_future:
            raise ValueError(f"{self._title} does not take {what}: {self.needs_future}.")

    def _check_mask(self, mask, x):
        shape, dtype = tuple(mask.shape), dtype_of(mask)
        if dtype != "bool" or not matches(shape, tuple(x.shape[:2])):
            raise ValueError(
                f"{self._title} expects a mask of dtype bool and shape (batch, time) = {tuple(x.shape[:2])}. "
                f"Received: {dtype} of shape {shape}."
            )

    def _state_before(self, x, given, wanted):
        if given is not None:
            return self._checked_state(x, given)
        if self.stateful:
            return self._carried.read(self, x.shape[0])
        return (self.initial_state if wanted else self.fresh_state)(ops.shape(x)[0])

    def _checked_state(self, x, given):
        expected = self.state_spec(ops.shape(x)[0])
        try:
            return _conform(given, expected)
        except (TypeError, ValueError, AttributeError):
            received = tree.map_structure(lambda s: tuple(getattr(s, "shape", ())), given)
            raise ValueError(
                f"{self._title} expects a state of shapes {tree.map_structure(lambda s: tuple(s.shape), expected)}. "
                f"Received: {received}."
            ) from None


class _Carried:
    """The state of a stateful layer, in variables that `fit` on every backend hands back, but that are no weights."""

    def __init__(self):
        self.structure, self.variables = None, []

    def read(self, layer, batch_size):
        if self.structure is None:
            if batch_size is None:
                raise ValueError(
                    f"{layer._title} is stateful and must know the batch size when it is built. "
                    "Give it, e.g. with keras.Input(batch_size=...), or call the model on one batch first."
                )
            self.build(layer, batch_size)
        expected = self.variables[0].shape[0] if self.variables else batch_size
        if batch_size is not None and batch_size != expected:
            raise ValueError(
                f"{layer._title} is stateful and carries the state of a batch of {expected}. "
                f"Received a batch of {batch_size}."
            )
        # A copy: the variable is overwritten while the backward pass still needs what was read.
        values = [ops.stop_gradient(ops.copy(v.value)) for v in self.variables]
        return tree.pack_sequence_as(self.structure, values)

    def build(self, layer, batch_size):
        self.structure = layer.initial_state(batch_size)

        def variable(i, state):
            def initial(shape, dtype):
                # A copy: a state that is the same for all rows may share their memory.
                return ops.copy(ops.cast(tree.flatten(layer.initial_state(batch_size))[i], dtype))

            return keras.Variable(initial, state.shape, dtype_of(state), trainable=False, autocast=False, name="state")

        self.variables = [variable(i, state) for i, state in enumerate(tree.flatten(self.structure))]

    def assign(self, state):
        for variable, value in zip(self.variables, tree.flatten(state), strict=True):
            variable.assign(ops.stop_gradient(value))

    def reset(self, layer):
        if self.variables:
            # Copies: two parts of a first state may be one array, which two variables must not share.
            self.assign(tree.map_structure(ops.copy, layer.initial_state(self.variables[0].shape[0])))


def own_arguments(kwargs):
    """Takes out of `kwargs` those that `SequenceLayer` and Keras know: the rest is for the layers inside."""
    return {name: kwargs.pop(name) for name in _OWN_ARGUMENTS if name in kwargs}


def random_seed():
    """An explicit seed drawn as Keras draws its own, from Python's generator, which `set_random_seed` seeds.

    A `SeedGenerator` without an explicit seed makes PyTorch's dropout use the global generator instead.
    """
    return random.randint(1, 10**9)


def autocast(layer):
    """Inside, the weights of `layer` are read in its compute dtype, as in a Keras call of it."""
    return AutocastScope(layer.compute_dtype) if layer.compute_dtype != layer.variable_dtype else nullcontext()


def call_layer(layer, x, **kwargs):
    """`layer(x)` for a part of a layer: without the cost of a Keras call, where that changes nothing.

    A Keras call casts, sets masks and records regularizers; none of that is wanted for a built layer of the same dtype.
    """
    plain = layer.built and layer.compute_dtype == layer.variable_dtype and layer.quantization_mode is None
    if plain and layer.activity_regularizer is None and dtype_of(x) in (layer.compute_dtype, "int32", "int64"):
        return layer.call(x, **kwargs)
    return layer(x, **kwargs)


def first_state(layer, batch_size, max_length=None):
    """`layer.initial_state(...)`, also of a layer whose state has no capacity and takes none."""
    if max_length is None:
        return layer.initial_state(batch_size)
    if "max_length" in inspect.signature(layer.initial_state).parameters:
        return layer.initial_state(batch_size, max_length)
    return layer.initial_state(batch_size)


class _Set(set):
    """A set that Keras does not track."""


_DTYPES: dict = {}


def dtype_of(x):
    """The name of the dtype of a tensor."""
    try:
        return _DTYPES[x.dtype]
    except KeyError:
        return _DTYPES.setdefault(x.dtype, keras.backend.standardize_dtype(x.dtype))


def cast(x, dtype):
    """`ops.cast`, free of charge where there is nothing to do."""
    return x if dtype_of(x) == dtype else ops.cast(x, dtype)


def _signature(x):
    """Shapes and dtypes of tuples of tensors."""
    if isinstance(x, tuple):
        return tuple([_signature(v) for v in x])
    try:
        return x.shape, x.dtype
    except AttributeError:
        return type(x)


def _tensor(x):
    """Arrays become tensors; what is no array stays."""
    if hasattr(x, "__array__") and not ops.is_tensor(x) and not isinstance(x, keras.KerasTensor):
        return ops.convert_to_tensor(x)
    return x


def matches(shape, expected):
    """Whether shapes are equal, as far as both are known."""
    return len(shape) == len(expected) and all(
        a == b or a is None or b is None for a, b in zip(shape, expected, strict=True)
    )


def _conform(given, expected):
    """`given` in the structure and dtypes of `expected`; a list may stand for a tuple, and `[s]` for `s`."""
    if isinstance(expected, list | tuple) and not hasattr(expected, "_fields"):
        if not isinstance(given, list | tuple) or len(given) != len(expected):
            raise TypeError
        return type(expected)(_conform(g, e) for g, e in zip(given, expected, strict=True))
    if tree.is_nested(expected):
        tree.assert_same_structure(given, expected)
        leaves = zip(tree.flatten(given), tree.flatten(expected), strict=True)
        return tree.pack_sequence_as(expected, [_conform(g, e) for g, e in leaves])
    if isinstance(given, list | tuple) and len(given) == 1:
        (given,) = given
    if not matches(tuple(given.shape), tuple(expected.shape)):
        raise ValueError
    return cast(given, dtype_of(expected))


def _quantization(layer):
    """How a layer is quantized, as arguments of its constructor."""
    config = getattr(layer, "quantization_config", None)
    return {"dtype": layer.dtype_policy} | ({} if config is None else {"quantization_config": config})


def _set_quantization(layer, path, quantization):
    """Sets how the layer at the path is quantized; one that `build` will make gets it from `policy_of_next`."""
    for i in path:
        if i >= len(layer._layers):
            object.__setattr__(layer, "_quantizations", getattr(layer, "_quantizations", {}) | {i: quantization})
            return
        layer = layer._layers[i]
    if "quantization_config" in quantization:
        layer.quantization_config = quantization["quantization_config"]
    layer.dtype_policy = quantization["dtype"]


def _sublayers(layer, path=""):
    """All layers inside `layer`, with a path that is the same in a copy of it."""
    for i, sub in enumerate(layer._layers):
        yield f"{path}{i}", sub
        yield from _sublayers(sub, f"{path}{i}.")
