"""For the API pages: the names that a package re-exports, and docstrings in this library's style as Markdown."""

import pathlib
import re
import textwrap

from griffe import Extension

API = pathlib.Path(__file__).parent / "api"
WORDS = "Args|Call|Weights|State|Returns|Raises|Source|Example"
# "Call: x", "Example:" before an empty line, "Args, Call, Raises: as in ..."; not "Args:" before its items.
HEADING = re.compile(rf"^((?:{WORDS})(?:, (?:{WORDS}))*):(?= *\S|\n\n)", re.MULTILINE)
SECTION = re.compile(r"^(Call|Weights|Source|State):\n((?: +\S.*\n?|\n(?= ))+)", re.MULTILINE)
# An item of "Args:" whose names take more than one line, and a last one that is no name.
LONG_ITEM = re.compile(r"^(    [\w, ]+,)\n {5,}", re.MULTILINE)
OTHERS = re.compile(r"^    (The others\b.*)", re.MULTILINE)
EQUATION = r"`[^`]* = [^`]*`"
EQUATIONS = re.compile(rf"{EQUATION}|(?s:.)*`[;,]\s+{EQUATION}")
# Where a line of equations may end, and before it code, which has the same signs.
LINE_END = re.compile(rf"(`[^`]*`)(,\s+(?={EQUATION}))?|;\s+|(?<=\.)\s+(?=[A-Z])")
CODE = re.compile(r"(?<![`\[])`([\w.]+)(\([^`()]*\))?`(?!`)")


class Docstrings(Extension):
    def on_package(self, *, pkg, **kwargs):
        """Every docstring of the package becomes Markdown that links to the other public names."""
        links = {}
        for module in [pkg, *pkg.modules.values()]:
            if not (API / f"{module.name}.md").exists():
                continue
            if module.is_init_module and module.exports is None:
                module.exports = public(module)
            names = module.exports or [n for n, m in module.members.items() if m.is_public and not m.is_alias]
            # Without a docstring it is not on the page.
            names = [n for n in names if module[n].docstring]
            links |= {key: f"{module.path}.{n}" for n in names for key in (n, f"{module.path}.{n}")}
        for owner in within(pkg):
            if owner.docstring:
                owner.docstring.value = markdown(owner.docstring.value, links, owner.name)


def public(package):
    """The names that a package imports from its own files."""
    inside = f"{package.path}."
    names = (name for name, member in package.members.items() if member.is_alias)
    return [name for name in names if package[name].target_path.startswith(inside) and name not in package.modules]


def within(owner):
    """An object and all that is defined in it."""
    yield owner
    for member in owner.members.values():
        if not member.is_alias:
            yield from within(member)


def markdown(docstring, links, own_name=""):
    """The Markdown of a docstring.

    Args:
        docstring: its text, not indented.
        links: `{name as it is written in backticks: its full name}`.
        own_name: the name that is no link, because it is that of the page itself.
    """
    text = LONG_ITEM.sub(r"\1 ", docstring)
    text = OTHERS.sub(r"\n\1", text)
    text = SECTION.sub(lambda m: f"**{m[1]}:** {textwrap.dedent(m[2])}", text)
    text = HEADING.sub(r"**\1:**", text)

    def link(code):
        # A word in small letters may as well be an argument.
        known = code[1] in links and code[1] != own_name and ("." in code[1] or not code[1].islower())
        return f"[{code[0]}][{links[code[1]]}]" if known else code[0]

    paragraphs = text.split("\n\n")
    return "\n\n".join(p if p.startswith("    ") else CODE.sub(link, equations(p)) for p in paragraphs)


def equations(paragraph):
    """A paragraph of equations gets a line for each; any other stays as it is."""
    if re.match(r"\*\*|\w+:\n", paragraph) or not EQUATIONS.match(paragraph):
        return paragraph
    lines = LINE_END.sub(lambda m: (m[1] or "") + ("" if m[1] and not m[2] else "<br>\n"), paragraph)
    return f"{lines}\n{{: .equations }}"
