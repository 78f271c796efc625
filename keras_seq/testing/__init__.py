"""Checks for layers over time, your own too."""

from keras_seq.testing.conformance import CHECKS as CHECKS
from keras_seq.testing.conformance import check_layer as check_layer
