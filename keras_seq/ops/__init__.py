"""The mathematics: pure functions of arrays, written with `keras.ops`."""

from keras_seq.ops.attention import attention as attention
from keras_seq.ops.dense import dense as dense
from keras_seq.ops.position import alibi_slopes as alibi_slopes
from keras_seq.ops.position import positions as positions
from keras_seq.ops.position import relative_buckets as relative_buckets
from keras_seq.ops.position import rotary_frequencies as rotary_frequencies
from keras_seq.ops.position import rotate as rotate
from keras_seq.ops.position import segment_positions as segment_positions
from keras_seq.ops.position import sinusoidal as sinusoidal
from keras_seq.ops.recurrent import gru as gru
from keras_seq.ops.recurrent import gru_step as gru_step
from keras_seq.ops.recurrent import lstm as lstm
from keras_seq.ops.recurrent import lstm_step as lstm_step
from keras_seq.ops.recurrent import simple_rnn as simple_rnn
from keras_seq.ops.recurrent import simple_rnn_step as simple_rnn_step
from keras_seq.ops.scan import masked_scan as masked_scan
from keras_seq.ops.scan import scan as scan
from keras_seq.ops.shift import token_shift as token_shift
from keras_seq.ops.wkv import wkv4 as wkv4
from keras_seq.ops.wkv import wkv5 as wkv5
from keras_seq.ops.wkv import wkv6 as wkv6
from keras_seq.ops.wkv import wkv7 as wkv7
