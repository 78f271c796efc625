"""Weights of other libraries: one file per format. Arrays in, NumPy arrays out, under every Keras backend."""

from keras_seq.checkpoints.errors import CheckpointError as CheckpointError
from keras_seq.checkpoints.torch_rnn import from_torch_rnn as from_torch_rnn
from keras_seq.checkpoints.torch_rnn import load_torch_rnn as load_torch_rnn
from keras_seq.checkpoints.torch_rnn import to_torch_rnn as to_torch_rnn
