"""Tokenizers that a family of models needs; for all else there are libraries of tokenizers."""

from keras_seq.text.rwkv import RWKVTokenizer as RWKVTokenizer
from keras_seq.text.rwkv import StreamDecoder as StreamDecoder
