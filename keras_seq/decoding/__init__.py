"""Generating tokens: one engine for every model that keeps the state protocol."""

from keras_seq.decoding.beam import Beams as Beams
from keras_seq.decoding.beam import beam_search as beam_search
from keras_seq.decoding.loop import generate as generate
from keras_seq.decoding.loop import stream as stream
from keras_seq.decoding.processors import BannedTokens as BannedTokens
from keras_seq.decoding.processors import ForcedTokens as ForcedTokens
from keras_seq.decoding.processors import MinLength as MinLength
from keras_seq.decoding.processors import NoRepeatNGrams as NoRepeatNGrams
from keras_seq.decoding.processors import PrefixConstraint as PrefixConstraint
from keras_seq.decoding.processors import RepetitionPenalty as RepetitionPenalty
from keras_seq.decoding.sampling import Greedy as Greedy
from keras_seq.decoding.sampling import Sampling as Sampling
from keras_seq.decoding.sampling import get_sampler as get_sampler
