"""The mathematics: pure functions of arrays, written with `keras.ops`."""

from keras_seq.ops.recurrent import gru as gru
from keras_seq.ops.recurrent import gru_step as gru_step
from keras_seq.ops.recurrent import lstm as lstm
from keras_seq.ops.recurrent import lstm_step as lstm_step
from keras_seq.ops.recurrent import simple_rnn as simple_rnn
from keras_seq.ops.recurrent import simple_rnn_step as simple_rnn_step
from keras_seq.ops.scan import masked_scan as masked_scan
from keras_seq.ops.scan import scan as scan
