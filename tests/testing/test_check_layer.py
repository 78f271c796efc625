"""`check_layer` passes a correct layer of a user's, and names what is wrong with others."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_seq import SequenceLayer, initializers, layers
from keras_seq.ops.scan import masked_scan
from keras_seq.testing import CHECKS, check_layer

BY_NAME = {check.__name__: check for check in CHECKS}


@keras.saving.register_keras_serializable("tests")
class MovingAverage(SequenceLayer):
    """`h' = a h + (1 - a) x` with a trained a for each feature: what a user would write."""

    def build(self, input_shape):
        self.decay = self.add_weight((input_shape[-1],), initializers.get("uniform"), name="decay")

    def initial_state(self, batch_size):
        return (ops.zeros((batch_size, self.decay.shape[0]), self.state_dtype),)

    def advance(self, x, state, mask=None, training=False):
        a = ops.sigmoid(ops.cast(self.decay, self.state_dtype))
        x = ops.cast(x, self.state_dtype)
        y, state = masked_scan(lambda state, x: (a * state[0] + (1 - a) * x,), state, x, mask)
        return ops.cast(y, self.compute_dtype), state


def test_a_correct_layer_passes():
    check_layer(MovingAverage)


@keras.saving.register_keras_serializable("tests")
class ConstantStart(MovingAverage):
    """A correct layer whose weights start at 0, whatever the seed."""

    def build(self, input_shape):
        self.decay = self.add_weight((input_shape[-1],), "zeros", name="decay")


def test_weights_that_start_constant_pass():
    check_layer(ConstantStart, checks=[BY_NAME["check_seed"]])


class IgnoresState(MovingAverage):
    def advance(self, x, state, mask=None, training=False):
        return super().advance(x, self.initial_state(ops.shape(x)[0]), mask, training)


class PaddingCounts(MovingAverage):
    """The average decays over padded steps."""

    def advance(self, x, state, mask=None, training=False):
        return super().advance(x, state, None, training)


class LooksAhead(MovingAverage):
    """The output at t has some of t + 1."""

    def advance(self, x, state, mask=None, training=False):
        y, state = super().advance(x, state, mask, training)
        return y + ops.concatenate([y[:, 1:], y[:, -1:]], 1), state


class CastsState(MovingAverage):
    """Under mixed precision the state that comes out is bfloat16."""

    def advance(self, x, state, mask=None, training=False):
        y, (h,) = super().advance(x, state, mask, training)
        return y, (ops.cast(h, self.compute_dtype),)


class LowPrecisionState(MovingAverage):
    """Under mixed precision the state is bfloat16 from its first step on."""

    state_dtype = property(lambda self: self.compute_dtype)


class GrowingState(MovingAverage):
    """The state is wider after the first step."""

    def advance(self, x, state, mask=None, training=False):
        y, (h,) = super().advance(x, state, mask, training)
        return y, (ops.concatenate([h, h], 1),)


@keras.saving.register_keras_serializable("tests")
class WrongConfig(MovingAverage):
    """The config has another factor than the layer."""

    def __init__(self, factor=1.0, **kwargs):
        super().__init__(**kwargs)
        self.factor = factor

    def advance(self, x, state, mask=None, training=False):
        y, state = super().advance(x, state, mask, training)
        return self.factor * y, state

    def get_config(self):
        return super().get_config() | {"factor": 1.0}


class MultipliesByTheMask(MovingAverage):
    """Cleans its input by a product: NaN times 0 is NaN."""

    def call(self, x, mask=None, initial_state=None, return_state=False, training=None):
        state = self.initial_state(ops.shape(x)[0]) if initial_state is None else initial_state
        if mask is not None:
            x = x * ops.cast(mask, x.dtype)[:, :, None]
        y, state = self.advance(ops.convert_to_tensor(x), state, mask)
        return (y, state) if return_state else y


class LeaksThroughTheGradient(MovingAverage):
    """A clean output, but the gradient of the logarithm at the zeros of the padding is infinite times 0."""

    def advance(self, x, state, mask=None, training=False):
        size = ops.log(ops.sum(ops.square(x * ops.cast(self.decay, x.dtype)), -1, keepdims=True))
        if mask is not None:
            size = ops.where(mask[:, :, None], size, ops.zeros_like(size))
        return super().advance(x + size, state, mask, training)


class CountsInPython(MovingAverage):
    """The position is a Python attribute, which outlives the sequence."""

    position = 0

    def advance(self, x, state, mask=None, training=False):
        object.__setattr__(self, "position", self.position + 1)
        y, state = super().advance(x, state, mask, training)
        return y * self.position, state


class KeepsItsState(MovingAverage):
    """The state is a Python attribute."""

    def initial_state(self, batch_size):
        return ()

    def advance(self, x, state, mask=None, training=False):
        state = self.__dict__.get("_kept") or super().initial_state(ops.shape(x)[0])
        y, state = super().advance(x, state, mask, training)
        self.__dict__["_kept"] = state
        return y, ()


class WrongShape(MovingAverage):
    def compute_output_shape(self, input_shape):
        return (*input_shape[:-1], 2 * input_shape[-1])


class Untrained(MovingAverage):
    """No gradient reaches one of the weights."""

    def build(self, input_shape):
        super().build(input_shape)
        self.unused = self.add_weight((3,), "zeros", name="unused")


class SeedsItself(MovingAverage):
    """Draws its weight from a generator that no seed reaches."""

    entropy = np.random.default_rng()

    def build(self, input_shape):
        super().build(input_shape)
        self.decay.assign(self.entropy.normal(size=self.decay.shape))


WRONG = {
    PaddingCounts: "check_mask",
    LooksAhead: "check_split",
    CastsState: "check_precision",
    LowPrecisionState: "check_precision",
    GrowingState: "check_shapes",
    MultipliesByTheMask: "check_padding",
    LeaksThroughTheGradient: "check_masked_split",
    CountsInPython: "check_split",
    KeepsItsState: "check_shapes",
    WrongShape: "check_shapes",
    Untrained: "check_fit",
    SeedsItself: "check_seed",
}


@pytest.mark.filterwarnings("ignore:(Gradients do not exist|The following trainable variables)")
@pytest.mark.parametrize("layer", WRONG, ids=lambda layer: layer.__name__)
def test_wrong_layers(layer):
    """The check that names it finds it, and it alone is run here: the others would only take time."""
    name = WRONG[layer]
    with pytest.raises(AssertionError, match=rf"^{name}: "):
        check_layer(layer, checks=[BY_NAME[name]])


def test_wrong_config():
    with pytest.raises(AssertionError, match=r"^check_config: a copy from the config"):
        check_layer(lambda: WrongConfig(0.5), checks=[BY_NAME["check_config"]])
    check_layer(WrongConfig, checks=[BY_NAME["check_config"]])


def test_all_checks_stop_at_the_first_that_fails():
    with pytest.raises(AssertionError, match=r"^check_split: in pieces"):
        check_layer(IgnoresState)


def test_a_layer_that_needs_the_future_must_say_so():
    class Silent(layers.GRU):
        needs_future = None

    with pytest.raises(AssertionError, match=r"^check_split: in pieces"):
        check_layer(
            lambda: Silent(3, return_sequences=True, go_backwards=True),
            checks=[BY_NAME["check_split"]],
        )


def test_errors_that_are_no_assertions_are_named_too():
    """Whatever a layer raises, the check that it was in is told."""

    class Raises(MovingAverage):
        def advance(self, x, state, mask=None, training=False):
            if mask is not None:
                raise TypeError("no masks here")
            return super().advance(x, state, mask, training)

    with pytest.raises(AssertionError, match=r"^check_mask: [\s\S]*no masks here"):
        check_layer(Raises, checks=[BY_NAME["check_mask"]])


def test_own_inputs_and_tolerance():
    """On inputs of another shape; a tolerance of nothing is not met by sums in another order."""
    x = np.random.default_rng(0).normal(size=(3, 5, 2))
    check_layer(MovingAverage, x, checks=[BY_NAME["check_mask"]])
    with pytest.raises(AssertionError, match=r"^check_split: .*differs by"):
        check_layer(MovingAverage, x, tolerance=1e-12, checks=[BY_NAME["check_split"]])
