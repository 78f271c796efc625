"""Generating tokens: one engine for every model that keeps the state protocol."""

from keras_seq.decoding.loop import generate as generate
from keras_seq.decoding.loop import stream as stream
from keras_seq.decoding.sampling import Greedy as Greedy
from keras_seq.decoding.sampling import Sampling as Sampling
from keras_seq.decoding.sampling import get_sampler as get_sampler
