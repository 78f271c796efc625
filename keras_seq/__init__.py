"""Sequence models for Keras 3 on TensorFlow, JAX and PyTorch."""

from keras_seq import checkpoints as checkpoints
from keras_seq import decoding as decoding
from keras_seq import initializers as initializers
from keras_seq import layers as layers
from keras_seq import models as models
from keras_seq import plotting as plotting
from keras_seq import states as states
from keras_seq import testing as testing
from keras_seq import text as text
from keras_seq.backend import kernels as kernels
from keras_seq.base import SequenceLayer as SequenceLayer

__version__ = "0.1.0"
