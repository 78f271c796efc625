"""The documentation is complete, and what it shows runs."""

import importlib
import inspect
import re
import runpy
import textwrap
from pathlib import Path

import keras
import numpy as np
import pytest
import torch

import keras_seq

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [
    page
    for page in [*sorted(DOCS.rglob("*.md")), ROOT / "README.md"]
    # Tutorials run by themselves, in a small setting.
    if "```python\n" in page.read_text() and page.parent.name != "tutorials"
]
REFERENCE = runpy.run_path(str(DOCS / "reference.py"))
INTERNAL = {"backend", "base", "ops", "progress"}
MODULES = ["keras_seq"] + sorted(
    f"keras_seq.{path.stem}"
    for path in (ROOT / "keras_seq").iterdir()
    if (path.suffix == ".py" or (path / "__init__.py").exists()) and path.stem not in INTERNAL | {"__init__"}
)


def ours(value):
    return getattr(value, "__module__", "").startswith("keras_seq")


def public(module):
    """The classes and functions that a public module offers, by full name."""
    offered = vars(importlib.import_module(module)).items()
    return {
        f"{module}.{name}": value
        for name, value in offered
        if not name.startswith("_") and (inspect.isclass(value) or inspect.isfunction(value)) and ours(value)
    }


def methods(cls):
    """The public methods that a class of this library adds to what it inherits from elsewhere, by name."""
    added = {name: f for base in reversed(cls.__mro__) if ours(base) for name, f in vars(base).items()}
    known = {name for base in cls.__mro__ if not ours(base) for name in vars(base)}
    return {name: f for name, f in added.items() if inspect.isfunction(f) and name[0] != "_" and name not in known}


NAMES = {name: value for module in MODULES for name, value in public(module).items()}


@pytest.mark.parametrize("module", MODULES)
def test_module_has_a_page(module):
    """Its page shows all that is public, or is a table of links to a page for each name."""
    name = module.removeprefix("keras_seq.")
    text = (DOCS / "api" / f"{name}.md").read_text()
    assert is_listed(f"{name}.md")
    if module not in REFERENCE["FAMILIES"]:
        assert f"::: {module}\n" in text
    for one in public(module) if module in REFERENCE["FAMILIES"] else ():
        page = f"{name}/{one.rpartition('.')[2]}.md"
        assert f"]({page})" in text
        assert f"::: {one}\n" in (DOCS / "api" / page).read_text()
        assert is_listed(page), f"mkdocs.yml does not list api/{page}"


def is_listed(page):
    """Whether the navigation of the site has a page of docs/api."""
    return re.search(rf"[ :]api/{re.escape(page)}$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)


def test_reference_is_fresh():
    """Each page is what `docs/reference.py` would write now."""
    written = {f"{package.rpartition('.')[2]}.md" for package in REFERENCE["FAMILIES"]}
    written |= {str(page.relative_to(DOCS / "api")) for page in (DOCS / "api").glob("*/*.md")}
    wanted = REFERENCE["pages"]()
    assert written == set(wanted), "run: make docs"
    stale = [page for page, text in wanted.items() if (DOCS / "api" / page).read_text() != text]
    assert not stale, "run: make docs"


def test_docstring_becomes_markdown():
    """Equations get lines of their own, names links, and each kind of heading is bold."""
    pytest.importorskip("griffe", reason="needs the tools of the documentation")
    markdown = runpy.run_path(str(DOCS / "docstrings.py"))["markdown"]
    docstring = """Doubles, as `Half` halves.

`a = f(x; 1)`; `b = a`, `y = b` for all x. Then more.

Args:
    one, two,
        three: three of them.
    The others: as in `Twice`.

Args, Call, Raises: as in `Half(1)`.

Example:

    y = Twice("`Half`")
"""
    expected = """Doubles, as [`Half`][a.Half] halves.

`a = f(x; 1)`<br>
`b = a`<br>
`y = b` for all x.<br>
Then more.
{: .equations }

Args:
    one, two, three: three of them.

The others: as in `Twice`.

**Args, Call, Raises:** as in [`Half(1)`][a.Half].

**Example:**

    y = Twice("`Half`")
"""
    assert markdown(docstring, {"Half": "a.Half", "Twice": "a.Twice"}, "Twice") == expected


@pytest.mark.parametrize("name", NAMES)
def test_name_has_a_docstring(name):
    """It says what the arguments are: below "Args:", by example, or by its source, or elsewhere."""
    value = NAMES[name]
    assert value.__doc__, f"{name} has no docstring"
    said = re.search(r"^(Args|Call|Example|Source):|arguments .*as in `", inspect.getdoc(value), re.MULTILINE | re.I)
    assert said or not takes_arguments(value), f"{name} does not say what its arguments are"
    if inspect.isclass(value):
        bare = [method for method in methods(value) if not inspect.getdoc(getattr(value, method))]
        assert not bare, f"methods of {name} without a docstring: {bare}"


def takes_arguments(value):
    if inspect.isclass(value) and issubclass(value, Exception):
        return False
    kinds = {parameter.kind for parameter in inspect.signature(value).parameters.values()}
    return bool(kinds - {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD})


@pytest.mark.parametrize("name", NAMES)
def test_example_of_a_docstring_runs(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"keras": keras, "keras_seq": keras_seq, "np": np, "torch": torch}
    names |= vars(importlib.import_module(name.rpartition(".")[0]))
    exec(compile(example(inspect.getdoc(NAMES[name])), name, "exec"), names)


def example(docstring):
    """The code below "Example:" in a docstring, up to the next line that is not indented."""
    found = re.search(r"^Example:\n+((?:    .*\n|\n)+)", f"{docstring}\n", re.MULTILINE)
    return textwrap.dedent(found[1]) if found else ""


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_code_of_a_page_runs(page, tmp_path, monkeypatch):
    """The Python blocks of a page, one after another, share their names."""
    monkeypatch.chdir(tmp_path)
    names = {"__name__": page.stem}
    for before, code in blocks(page.read_text()):
        exec(compile("\n" * before + code, str(page), "exec"), names)


def blocks(text):
    """The Python blocks of a page, each with the number of lines before it."""
    for block in re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        yield text.count("\n", 0, block.start(1)), block[1]


def test_examples_are_found():
    assert example("Sum.\n\nExample:\n\n    x = 1\n\n    y = x\n\nSource: none.") == "x = 1\n\ny = x\n\n"
    assert list(blocks("Text.\n\n```python\nx = 1\n```\n\n```sh\nls\n```\n")) == [(3, "x = 1\n")]
    assert sum(bool(example(inspect.getdoc(value))) for value in NAMES.values()) > 3
    assert sum(len(list(blocks(page.read_text()))) for page in PAGES) > 10


COMING_FROM = sorted((ROOT / "docs" / "coming_from").glob("*.md"))


@pytest.mark.parametrize("page", COMING_FROM, ids=lambda page: page.stem)
def test_names_of_a_table_exist(page):
    """What the column of this library names, as in `layers.LSTM`, is there."""
    found = [(package, name) for cell in ours_in_tables(page.read_text()) for package, name in named(cell)]
    assert len(found) > 3
    missing = [f"{package}.{name}" for package, name in found if not hasattr(getattr(keras_seq, package), name)]
    assert not missing


def ours_in_tables(text):
    """The cells below "keras_seq" in the tables of a page; those of `keras_seq.layers` begin with its name."""
    column = None
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.split("|")]
        if not line.startswith("|"):
            column = None
        elif column is None:
            column, heading = next((i, cell) for i, cell in enumerate(cells) if cell.startswith("keras_seq"))
        elif cells[column].strip("-"):
            prefix = heading.removeprefix("keras_seq").removeprefix(".")
            yield re.sub(r"`([A-Z])", rf"`{prefix}.\1", cells[column]) if prefix else cells[column]


def named(cell):
    return re.findall(r"\b(layers|models|decoding|checkpoints)\.([A-Z]\w*)", cell)


def test_names_in_tables_are_found():
    table = "| torch | keras_seq |\n|---|---|\n| `a.B` | `layers.C`, or `models.D(x)` |\n\n| k | keras_seq.layers |\n"
    cells = list(ours_in_tables(table + "|---|---|\n| `E` | `F`, `g` |\n"))
    assert [named(cell) for cell in cells] == [[("layers", "C"), ("models", "D")], [("layers", "F")]]
