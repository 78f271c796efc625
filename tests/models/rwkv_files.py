"""Small random checkpoints of every version in the official names, and the official package that runs them."""

import contextlib
import gc
import importlib.util
import io
import os
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest

VERSIONS = ("4", "5.0", "5.1", "5.2", "6", "7")
VOCAB, LAYERS, D, HEAD = 50, 2, 32, 8


def checkpoint(version, seed=0):
    """`{official name: float32 array}`, of numbers that make every part of the model count."""
    rng, heads = np.random.default_rng(seed), D // HEAD
    arrays = {}

    def normal(name, *shape, scale=1.0, mean=0.0):
        arrays[name] = (mean + scale * rng.normal(size=shape)).astype("float32")

    def mixes(prefix, letters):
        for letter in letters:
            arrays[prefix + letter] = rng.random((1, 1, D), "float32")

    def matrix(name, rows, columns):
        normal(f"{name}.weight", rows, columns, scale=columns**-0.5)

    def norm(name):
        normal(f"{name}.weight", D, scale=0.1, mean=1.0)
        normal(f"{name}.bias", D, scale=0.1)

    normal("emb.weight", VOCAB, D)
    norm("blocks.0.ln0")
    for i in range(LAYERS):
        att, ffn = f"blocks.{i}.att.", f"blocks.{i}.ffn."
        norm(f"blocks.{i}.ln1")
        norm(f"blocks.{i}.ln2")
        for name in ("receptance", "key", "value", "output"):
            matrix(att + name, D, D)
        if version != "4":
            norm(f"{att}ln_x")
        if version in ("5.1", "5.2", "6"):
            matrix(f"{att}gate", D, D)
        if version == "4":
            mixes(f"{att}time_mix_", "kvr")
            normal(f"{att}time_decay", D)
            normal(f"{att}time_first", D)
        elif version[0] == "5":
            mixes(f"{att}time_mix_", "kvr" if version == "5.0" else "kvrg")
            per_head = (heads, HEAD) if version == "5.2" else (heads,)
            normal(f"{att}time_decay", *per_head, mean=-1)
            normal(f"{att}{'time_faaaa' if version == '5.2' else 'time_first'}", *per_head)
        elif version == "6":
            mixes(f"{att}time_maa_", "xwkvrg")
            normal(f"{att}time_maa_w1", D, 5 * 32, scale=D**-0.5)
            normal(f"{att}time_maa_w2", 5, 32, D, scale=0.2)
            normal(f"{att}time_decay", 1, 1, D, mean=-1)
            normal(f"{att}time_decay_w1", D, 64, scale=D**-0.5)
            normal(f"{att}time_decay_w2", 64, D, scale=0.2)
            normal(f"{att}time_faaaa", heads, HEAD)
        else:
            mixes(f"{att}x_", "rwkvag")
            for letter, rank in {"w": 6, "a": 7, "v": 5, "g": 9}.items():
                if letter != "g":
                    normal(f"{att}{letter}0", 1, 1, D)
                normal(f"{att}{letter}1", D, rank, scale=D**-0.5)
                normal(f"{att}{letter}2", rank, D, scale=0.4)
            normal(f"{att}k_k", 1, 1, D, scale=0.1, mean=0.7)
            normal(f"{att}k_a", 1, 1, D, scale=0.1, mean=1)
            normal(f"{att}r_k", heads, HEAD, scale=0.1)
        hidden = 4 * D if version in "47" else 96
        if version == "7":
            mixes(f"{ffn}x_", "k")
        else:
            mixes(f"{ffn}time_{'maa' if version == '6' else 'mix'}_", "kr")
            matrix(f"{ffn}receptance", D, D)
        matrix(f"{ffn}key", hidden, D)
        matrix(f"{ffn}value", D, hidden)
    norm("ln_out")
    matrix("head", VOCAB, D)
    return arrays


class Official:
    """The package `rwkv`, which reads its settings when it is imported: once for RWKV-7, once for the others."""

    def __init__(self, version):
        self.version = version
        spec = importlib.util.find_spec("rwkv")
        if spec is None or importlib.util.find_spec("torch") is None:
            pytest.skip("the package rwkv, or torch, which it runs on, is not installed")
        self.module = self._module(Path(spec.origin).parent / "model.py", version == "7")

    @staticmethod
    def _module(path, seven):
        name = f"official_rwkv_{'7' if seven else '4_to_6'}"
        if name not in sys.modules:
            os.environ |= {"RWKV_JIT_ON": "0", "RWKV_CUDA_ON": "0", "RWKV_V7_ON": "1" if seven else "0"}
            spec = importlib.util.spec_from_file_location(name, path)
            module = importlib.util.module_from_spec(spec)
            with _quiet():
                spec.loader.exec_module(module)
            sys.modules[name] = module
        return sys.modules[name]

    def run(self, path, tokens):
        """Logits `(t, vocab)` of a checkpoint and its state after all tokens, as NumPy arrays."""
        kind, path = (self.module.RWKV_x070, str(path)[:-4]) if self.version == "7" else (self.module.RWKV, str(path))
        gc.freeze()  # the package collects garbage at each weight: not among all that is there by now
        try:
            with _quiet():
                model = kind(path, "cpu fp32")
                logits, state = model.forward(list(tokens), None, full_output=True)
        finally:
            gc.unfreeze()
        return logits.numpy(), [part.numpy() for part in state]


@contextlib.contextmanager
def _quiet():
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of torch.jit
        yield
