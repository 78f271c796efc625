"""The comparison of RWKV with an LSTM and a Transformer runs, in a small setting."""

import numpy as np
import rwkv_language_model


def test_models_are_of_one_size():
    models = [rwkv_language_model.build(name, 104, 128) for name in rwkv_language_model.MODELS]
    for model in models:
        model.build((None, None))
    counts = [model.count_params() for model in models]
    assert max(counts) < 1.05 * min(counts)


def test_rwkv_language_model(tmp_path, capsys):
    sizes = ["--size", "32", "--layers", "1", "--characters", "20000", "--contexts", "128", "256"]
    results = rwkv_language_model.main(["--minutes", "0.02", *sizes, "--out", str(tmp_path)])
    assert tuple(results) == rwkv_language_model.MODELS
    assert all(np.isfinite(result.bits) and result.speed > 0 for result in results.values())
    assert all(seconds > 0 for result in results.values() for seconds in result.steps)
    growth = {name: result.bytes[1] / result.bytes[0] for name, result in results.items()}
    assert growth["RWKV-7"] == growth["LSTM"] == 1
    assert growth["Transformer"] > 1.9
    printed = capsys.readouterr().out
    found = results["RWKV-7"]
    assert f"\nRWKV-7      {found.parameters:12,}{found.bits:8.2f}{found.speed:11,.0f}" in printed
    assert f"its state: {found.bytes[0]:,} bytes at first, {found.bytes[0]:,} after 304 characters" in printed
    for what in ("state", "step"):
        assert (tmp_path / f"rwkv_language_model_{what}.png").stat().st_size > 10_000
