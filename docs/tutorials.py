"""Tutorials as pages: runs `examples/NN_name.py` and writes `docs/tutorials/name.md` with what it printed and drew.

A tutorial is a Python file that runs from top to bottom. Strings that stand alone at its top level are Markdown; what
is between them is code. What a cell of code prints stands below it, and so does each figure that it leaves open.

    KERAS_BACKEND=jax python docs/tutorials.py                       # all pages
    KERAS_BACKEND=jax python docs/tutorials.py 03_rnn_lstm_gru       # one of them
"""

import argparse
import ast
import contextlib
import io
import pathlib
import re
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).parents[1]
TUTORIALS = sorted((ROOT / "examples").glob("[0-9][0-9]_*.py"))
RESULT = re.compile(
    r"^(``` \{ \.text \.output \}\n.*?^```|!\[[^\n]*\]\(img/[^\n]*\)|\*Printed by .*?\*)\n\n", re.MULTILINE | re.DOTALL
)

# What Keras says of the time of an epoch: it depends on the machine and on what else runs there.
TIMES = re.compile(r" - \d+m?s(?: - \d+[mu]?s/(?:step|epoch))?(?= - |$)", re.MULTILINE)


def cells(source):
    """`[(kind, text, line)]` of a tutorial; the kind is `"markdown"` or `"code"`, `line` that of the first, from 1."""
    lines, found, start = source.splitlines(), [], 1

    def code(until):
        text = "\n".join(lines[start - 1 : until])
        if text.strip():
            blank = len(text) - len(text.lstrip("\n"))
            found.append(("code", text.strip("\n"), start + blank))

    for node in ast.parse(source).body:
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            code(node.lineno - 1)
            found.append(("markdown", node.value.value.strip(), node.lineno))
            start = node.end_lineno + 1
    code(len(lines))
    return found


def run(path, constants=None):
    """Runs a tutorial.

    Args:
        path: of its file.
        constants: `{NAME: value}` in place of what the tutorial assigns to these names at its top level.

    Yields:
        `(kind, text, printed, figures)` of each cell as it is done; figures are closed when the next cell begins.

    Raises:
        ValueError: the tutorial assigns no such constant.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    constants = dict(constants or {})
    source = path.read_text()
    assigned = {target.id for node in ast.parse(source).body for target in _targets(node)}
    if unknown := set(constants) - assigned:
        raise ValueError(
            f"{path.name} has no constant {sorted(unknown)}, only {sorted(n for n in assigned if n.isupper())}"
        )
    names = {"__name__": "__main__", "__file__": str(path)}
    for kind, text, line in cells(source):
        printed = io.StringIO()
        if kind == "code":
            tree = ast.increment_lineno(ast.parse(text), line - 1)
            for node in tree.body:
                for target in _targets(node):
                    if target.id in constants:
                        node.value = ast.copy_location(ast.Constant(constants[target.id]), node.value)
            with contextlib.redirect_stdout(printed):
                exec(compile(tree, str(path), "exec"), names)
        yield kind, text, TIMES.sub("", printed.getvalue()), [pyplot.figure(number) for number in pyplot.get_fignums()]
        pyplot.close("all")


def _targets(node):
    """The names that a statement `NAME = value` assigns to."""
    return [t for t in node.targets if isinstance(t, ast.Name)] if isinstance(node, ast.Assign) else []


def name_of(path):
    """`examples/03_rnn_lstm_gru.py` -> `"rnn_lstm_gru"`."""
    return path.stem.partition("_")[2]


def page(path, results, folder=None):
    """The Markdown of a page.

    Args:
        path: of the tutorial.
        results: of `run`, or `(kind, text)` alone for a page without what it printed.
        folder: where the figures are saved; None: nowhere.
    """
    parts = []
    for kind, text, *result in results:
        if kind == "markdown":
            parts.append(text)
            if len(parts) == 1:
                parts.append(f"Run it: `python examples/{path.name}`, with `KERAS_BACKEND` as you like.")
            continue
        parts.append(f"```python\n{text}\n```")
        printed, figures = result or ("", [])
        if printed.strip():
            parts.append("``` { .text .output }\n" + printed.rstrip() + "\n```")
        for figure in figures:
            number = sum(part.startswith("![") for part in parts) + 1
            image = f"{name_of(path)}_{number}.png"
            title = next((axes.get_title() for axes in figure.axes if axes.get_title()), "figure")
            if folder:
                folder.mkdir(parents=True, exist_ok=True)
                figure.savefig(folder / image, dpi=90, metadata={"Software": None})
            parts.append(f"![{title}](img/{image})")
    return "\n\n".join(parts) + "\n"


def without_results(text):
    """A page without what its code printed and drew: equal for every run of the same tutorial."""
    return RESULT.sub("", text + "\n").rstrip("\n") + "\n"


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", help="files of examples/, without .py (default: all)")
    names = parser.parse_args(argv).names or [path.stem for path in TUTORIALS]
    sys.path.insert(0, str(ROOT / "examples"))
    for name in names:
        path = ROOT / "examples" / f"{name}.py"
        start = time.monotonic()
        folder = ROOT / "docs" / "tutorials"
        with tempfile.TemporaryDirectory() as scratch, contextlib.chdir(scratch):
            text = page(path, run(path), folder / "img")
        text += f"\n{_printed_by()}\n"
        (folder / f"{name_of(path)}.md").write_text(text)
        print(f"{path.name}: {time.monotonic() - start:.0f} s", flush=True)


def _printed_by():
    import importlib.metadata as metadata

    import keras

    backend = keras.config.backend()
    version = metadata.version({"tensorflow": "tensorflow-cpu"}.get(backend, backend))
    return f"*Printed by Keras {keras.__version__} on {backend} {version}, on a CPU.*"


if __name__ == "__main__":
    main()
