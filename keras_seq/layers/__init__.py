"""Layers over time."""

from keras_seq.layers.alignment import AdditiveAttention as AdditiveAttention
from keras_seq.layers.alignment import CoverageAttention as CoverageAttention
from keras_seq.layers.alignment import DotAttention as DotAttention
from keras_seq.layers.alignment import MonotonicAttention as MonotonicAttention
from keras_seq.layers.attention import MultiHeadAttention as MultiHeadAttention
from keras_seq.layers.bidirectional import Bidirectional as Bidirectional
from keras_seq.layers.cells import LayerNormLSTMCell as LayerNormLSTMCell
from keras_seq.layers.cells import PeepholeLSTMCell as PeepholeLSTMCell
from keras_seq.layers.compose import Residual as Residual
from keras_seq.layers.compose import Stack as Stack
from keras_seq.layers.compose import TimeWise as TimeWise
from keras_seq.layers.feedforward import FeedForward as FeedForward
from keras_seq.layers.position import AlibiBias as AlibiBias
from keras_seq.layers.position import LearnedPositionalEncoding as LearnedPositionalEncoding
from keras_seq.layers.position import RelativePositionBias as RelativePositionBias
from keras_seq.layers.position import RotaryEmbedding as RotaryEmbedding
from keras_seq.layers.position import SinusoidalPositionalEncoding as SinusoidalPositionalEncoding
from keras_seq.layers.recurrent import GRU as GRU
from keras_seq.layers.recurrent import LSTM as LSTM
from keras_seq.layers.recurrent import SimpleRNN as SimpleRNN
from keras_seq.layers.rnn import RNN as RNN
from keras_seq.layers.transformer import TransformerDecoderBlock as TransformerDecoderBlock
from keras_seq.layers.transformer import TransformerEncoderBlock as TransformerEncoderBlock
