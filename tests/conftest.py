"""What must happen before a backend is imported, and one seed for every test."""

import gc
import importlib.util
import os

import pytest

# Arrays are small, and the workers of pytest keep the cores busy: more threads only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TF_NUM_INTRAOP_THREADS", "1")
os.environ.setdefault("TF_NUM_INTEROP_THREADS", "1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
# Each test compiles for a few calls only: XLA need not spend time on machine code that runs fast. Its older emitters
# compile in a third of the time, and the workers of pytest keep the cores busy: one thread each is enough.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1",
)
# What one worker of JAX has compiled the other need not, nor the next run.
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", os.path.join(os.path.dirname(__file__), "..", ".pytest_cache", "jax")
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

# What runs on no backend needs to run on one only.
if os.environ.get("KERAS_BACKEND") in ("jax", "tensorflow"):
    collect_ignore = [
        "test_arrows.py",
        "test_benchmarks.py",
        "test_progress.py",
        "test_site.py",
        "text",
        *(f"checkpoints/test_{name}.py" for name in ("files", "pth", "safetensors")),
    ]

# PyTorch comes before TensorFlow, which Keras imports on every backend when it saves: the other order may crash.
if importlib.util.find_spec("torch"):
    import torch  # noqa: F401

import keras

# Graphs and compiled functions are millions of objects, and stay: to look through them again and again takes time.
gc.set_threshold(50_000, 20, 100)


@pytest.fixture(autouse=True)
def seed():
    """Python, NumPy and the backend draw the same numbers in each test, whichever tests run before it."""
    keras.utils.set_random_seed(0)
