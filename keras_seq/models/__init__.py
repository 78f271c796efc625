"""Models: arguments in, a `keras.Model` out that fits, saves, streams and generates."""

from keras_seq.models.encoder_decoder import EncoderDecoder as EncoderDecoder
from keras_seq.models.language_model import LanguageModel as LanguageModel
from keras_seq.models.recurrent import RecurrentLM as RecurrentLM
from keras_seq.models.rwkv import RWKV as RWKV
from keras_seq.models.rwkv_optimizer import GroupedAdamW as GroupedAdamW
from keras_seq.models.rwkv_optimizer import rwkv_optimizer as rwkv_optimizer
from keras_seq.models.scheduled_sampling import ConstantSampling as ConstantSampling
from keras_seq.models.scheduled_sampling import ExponentialSampling as ExponentialSampling
from keras_seq.models.scheduled_sampling import InverseSigmoidSampling as InverseSigmoidSampling
from keras_seq.models.scheduled_sampling import LinearSampling as LinearSampling
from keras_seq.models.seq2seq import Seq2Seq as Seq2Seq
from keras_seq.models.transformer import Transformer as Transformer
from keras_seq.models.transformer_encoder import TransformerEncoder as TransformerEncoder
from keras_seq.models.transformer_encoder import mask_tokens as mask_tokens
from keras_seq.models.transformer_lm import TransformerLM as TransformerLM
