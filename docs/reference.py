"""The API pages of layers and models: one page for each public name, and for each of the two packages a table of them.

    KERAS_BACKEND=jax python docs/reference.py      # `make docs` does so too

What it writes is kept in the repository, and mkdocs.yml lists it by hand: the tests tell what is missing or stale.
"""

import importlib
import inspect
import pathlib

API = pathlib.Path(__file__).parent / "api"

# The files of each package, by family. A new file gets its place here.
FAMILIES = {
    "keras_seq.layers": {
        "Recurrent": ["recurrent", "cells", "rnn", "bidirectional"],
        "Attention": ["attention", "alignment"],
        "Position": ["position"],
        "Transformer": ["transformer", "feedforward"],
        "RWKV": ["rwkv", "rwkv_time", "rwkv_channel"],
        "Composition": ["compose"],
    },
    "keras_seq.models": {
        "Language models": ["recurrent", "transformer_lm", "rwkv", "language_model"],
        "Encoder-decoder models": ["seq2seq", "transformer", "encoder_decoder"],
        "Encoders": ["transformer_encoder"],
        "Training": ["rwkv_optimizer", "scheduled_sampling"],
    },
}

# Who searches for a name looks for its page first.
PAGE = """---
search: {{boost: 4}}
---

# {name}

::: {package}.{name}
    options:
      show_root_heading: true
      show_root_full_path: true
"""


def pages():
    """`{path below docs/api: text}` of all pages that this script writes.

    Raises:
        ValueError: a public name is in a file that belongs to no family.
    """
    found = {}
    for package, families in FAMILIES.items():
        folder = package.rpartition(".")[2]
        names = public(package)
        text = f"# {package}\n\n{inspect.getdoc(importlib.import_module(package))}\n"
        for family, files in families.items():
            text += f"\n## {family}\n\n| name | what it is |\n|---|---|\n"
            for file in files:
                for name in [name for name, value in names.items() if value.__module__ == f"{package}.{file}"]:
                    text += f"| [`{name}`]({folder}/{name}.md) | {summary(names.pop(name))} |\n"
                    found[f"{folder}/{name}.md"] = PAGE.format(name=name, package=package)
        if names:
            raise ValueError(f"The files of these names of {package} belong to no family in {__file__}: {list(names)}")
        found[f"{folder}.md"] = text
    return found


def public(package):
    """The classes and functions that a package offers, by name."""
    offered = vars(importlib.import_module(package)).items()
    return {n: v for n, v in offered if n[0] != "_" and (inspect.isclass(v) or inspect.isfunction(v))}


def summary(value):
    """The first paragraph of a docstring, for a cell of a table."""
    return " ".join(inspect.getdoc(value).split("\n\n")[0].split()).replace("|", "\\|")


def main():
    wanted = pages()
    for package in FAMILIES:
        for path in (API / package.rpartition(".")[2]).glob("*.md"):
            if str(path.relative_to(API)) not in wanted:
                path.unlink()
    for name, text in wanted.items():
        path = API / name
        path.parent.mkdir(exist_ok=True)
        if not path.exists() or path.read_text() != text:
            path.write_text(text)


if __name__ == "__main__":
    main()
