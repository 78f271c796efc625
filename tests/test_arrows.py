"""The house rules that import statements can break: which room may use which, and who may know the backend."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "keras_seq"
FRAMEWORKS = {"tensorflow", "jax", "jaxlib", "torch"}

# A room is a folder or a file right under keras_seq/. It may import itself and these.
MAY_IMPORT = {
    "backend": set(),
    "ops": {"backend"},
    "initializers": set(),
    "text": set(),
    "base": {"ops", "backend"},
    "layers": {"base", "ops", "initializers"},
    "decoding": {"base", "ops", "layers", "backend", "progress"},
    "checkpoints": {"base", "ops", "layers", "text", "progress"},
    "states": {"checkpoints"},
    "plotting": set(),
    "progress": set(),
    "models": {"base", "ops", "layers", "initializers", "decoding", "checkpoints", "text"},
}
MAY_IMPORT_ANYTHING = {"__init__", "testing"}


def room_of(path):
    """`("keras_seq", "layers", "rnn.py")` -> `"layers"`; `("keras_seq", "base.py")` -> `"base"`."""
    return path[1].removesuffix(".py")


def violations(source, path):
    """What breaks the rules in `source`, the text of the file at `path` (a tuple that begins with `"keras_seq"`)."""
    room = room_of(path)
    for node in ast.walk(ast.parse(source)):
        line = getattr(node, "lineno", 0)
        for name in imported(node, path):
            top, *rest = name.split(".")
            if top in FRAMEWORKS and room != "backend":
                yield f"line {line}: imports {top}"
            elif top == "keras_seq" and room not in MAY_IMPORT_ANYTHING:
                target = rest[0] if rest else "__init__"
                if target not in {room} | MAY_IMPORT[room]:
                    yield f"line {line}: {room} imports {name}"
        if room != "backend" and asks_for_backend(node):
            yield f"line {line}: asks which backend runs"


def imported(node, path):
    """The full names that an import statement, or a call that imports, brings in."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        module = [node.module] if node.module else []
        if node.level:
            module = [*path[: -node.level], *module]
        return [".".join([*module, alias.name]) for alias in node.names]
    if isinstance(node, ast.Call) and called(node) in ("import_module", "__import__") and node.args:
        name = node.args[0]
        return [name.value] if isinstance(name, ast.Constant) and isinstance(name.value, str) else []
    return []


def called(node):
    """The last name of what a call calls: `keras.config.backend()` -> `"backend"`."""
    return getattr(node.func, "attr", getattr(node.func, "id", None))


def asks_for_backend(node):
    if isinstance(node, ast.ImportFrom):
        return (node.module or "").startswith("keras.") and "backend" in [alias.name for alias in node.names]
    if isinstance(node, ast.Call):
        return called(node) == "backend"
    return isinstance(node, ast.Constant) and node.value == "KERAS_BACKEND"


FILES = sorted(path.relative_to(PACKAGE.parent) for path in PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=str)
def test_file_keeps_the_rules(path):
    assert list(violations((PACKAGE.parent / path).read_text(), path.parts)) == []


def test_every_room_has_a_rule():
    assert {room_of(path.parts) for path in FILES} <= MAY_IMPORT.keys() | MAY_IMPORT_ANYTHING


def test_the_rules_have_no_circle():
    for room, others in MAY_IMPORT.items():
        for other in others:
            assert room not in MAY_IMPORT[other], f"{room} and {other} may import each other"


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("keras_seq/layers/x.py", "import torch"),
        ("keras_seq/layers/x.py", "import jax.numpy as jnp"),
        ("keras_seq/base.py", "from tensorflow import while_loop"),
        ("keras_seq/ops/x.py", "def f():\n    from torch.nn import functional"),
        ("keras_seq/testing/x.py", "import importlib\nimportlib.import_module('jax')"),
        ("keras_seq/checkpoints/x.py", "if True:\n    import torch"),
        ("keras_seq/decoding/x.py", "import keras\nkeras.backend.backend()"),
        ("keras_seq/layers/x.py", "from keras import config\nname = config.backend()"),
        ("keras_seq/layers/x.py", "from keras.config import backend as which\nwhich()"),
        ("keras_seq/models/x.py", "import os\nos.environ['KERAS_BACKEND']"),
        ("keras_seq/backend/x.py", "from keras_seq.ops import lstm"),
        ("keras_seq/backend/__init__.py", "from keras_seq import ops"),
        ("keras_seq/backend/__init__.py", "from ..ops import scan"),
        ("keras_seq/ops/x.py", "from keras_seq.base import SequenceLayer"),
        ("keras_seq/base.py", "from . import layers"),
        ("keras_seq/layers/x.py", "from keras_seq.backend import native"),
        ("keras_seq/layers/x.py", "from keras_seq.models import RecurrentLM"),
        ("keras_seq/layers/x.py", "import keras_seq"),
        ("keras_seq/layers/x.py", "import keras_seq.decoding.loop"),
        ("keras_seq/decoding/x.py", "def f():\n    from ..models import RecurrentLM"),
    ],
)
def test_a_violation_is_found(path, source):
    assert len(list(violations(source, tuple(path.split("/"))))) == 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("keras_seq/backend/torch.py", "import torch\nfrom keras_seq.backend import refuses"),
        ("keras_seq/backend/__init__.py", "import keras\nname = keras.config.backend()"),
        ("keras_seq/ops/x.py", "from keras_seq import backend\nbackend.current().scan()"),
        ("keras_seq/ops/x.py", "from ..backend import native\nfrom .scan import scan"),
        ("keras_seq/layers/x.py", "from keras_seq import ops as o\nfrom keras_seq.layers.gates import GateWeights"),
        ("keras_seq/models/x.py", "from keras_seq import decoding\nfrom keras_seq.layers import LSTM"),
        ("keras_seq/testing/x.py", "import keras_seq\nfrom keras_seq.models import RecurrentLM"),
        ("keras_seq/layers/x.py", "import torchless\nx.torch.jax"),
    ],
)
def test_what_is_allowed_passes(path, source):
    assert list(violations(source, tuple(path.split("/")))) == []
