"""For the API pages: the names that a package re-exports, and the headings of docstrings that Google's style lacks."""

import re
import textwrap

from griffe import Extension

HEADING = re.compile(r"^(Call|Weights|Source|State|Raises|Returns|Example):(?= *\S|\n\n)", re.MULTILINE)
SECTION = re.compile(r"^(Call|Weights|Source|State):\n((?: +\S.*\n?|\n(?= ))+)", re.MULTILINE)


class Docstrings(Extension):
    def on_module(self, *, mod, **kwargs):
        """A package's public names are those it imports from its own files: its pages show these."""
        if mod.is_init_module and mod.exports is None:
            inside = f"{mod.path}."
            names = (name for name, member in mod.members.items() if member.is_alias)
            mod.exports = [
                name for name in names if mod[name].target_path.startswith(inside) and name not in mod.modules
            ]

    def on_object(self, *, obj, **kwargs):
        """`Call: x` becomes a paragraph that starts with a bold word."""
        if obj.docstring:
            text = SECTION.sub(lambda m: f"**{m[1]}:** {textwrap.dedent(m[2])}", obj.docstring.value)
            obj.docstring.value = HEADING.sub(r"**\1:**", text)
