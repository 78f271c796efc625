"""Models: arguments in, a `keras.Model` out that fits, saves, streams and generates."""

from keras_seq.models.language_model import LanguageModel as LanguageModel
from keras_seq.models.recurrent import RecurrentLM as RecurrentLM
from keras_seq.models.transformer import TransformerLM as TransformerLM
