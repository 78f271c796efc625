"""The comparison of RWKV with an LSTM and a Transformer runs, in a small setting."""

import numpy as np
import rwkv_language_model


def test_models_are_of_one_size():
    models = [rwkv_language_model.build(name, 104, 128) for name in rwkv_language_model.MODELS]
    for model in models:
        model.build((None, None))
    printed = capsys.readouterr().out
    assert f"{results['LSTM'].parameters:12,}{results['LSTM'].bits:12.2f}" in printed
    assert "its state: 13,056 bytes after the prompt, 13,056 after 304 characters" in printed
    assert (tmp_path / "rwkv_language_model.png").stat().st_size > 10_000


def test_models_are_of_one_size():
    models = [rwkv_language_model.build(name, 98, 128) for name in ("LSTM", "Transformer", "RWKV-7")]
    for model in models:
        model.build((None, None))
    counts = [model.count_params() for model in models]
    assert max(counts) < 1.05 * min(counts)
