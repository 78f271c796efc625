"""Writes the tables and pictures of docs/benchmarks.md and docs/choosing.md from the JSON files of benchmarks/results/.

`make bench` writes these files and runs this script. The words of the pages are written by hand; what stands between
`<!-- results: NAME -->` and `<!-- end -->` comes from here: the results of `benchmarks/NAME.py` on each backend, a line
for each contender. `<!-- pivot: NAME -->` gives each contender a column.

    python benchmarks/page.py
"""

import json
import math
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "docs" / name for name in ("benchmarks.md", "choosing.md")]
RESULTS = ROOT / "benchmarks" / "results"
PICTURES = ROOT / "docs" / "assets" / "benchmarks"
BACKENDS = {"torch": "PyTorch", "jax": "JAX", "tensorflow": "TensorFlow"}
REGION = re.compile(r"<!-- (results|pivot): (\w+) -->\n.*?<!-- end -->", re.DOTALL)
AGAIN = ", again"


def page(text, results=RESULTS):
    """The text of the page with all its regions written anew."""

    def anew(found):
        kind, script = found.groups()
        return f"<!-- {kind}: {script} -->\n\n{region(kind, script, results)}<!-- end -->"

    return REGION.sub(anew, text)


def region(kind, script, results=RESULTS):
    """The results of one script: for each backend what they were measured on, a picture and a table."""
    parts = []
    for backend, title in BACKENDS.items():
        path = results / f"{script}_{backend}.json"
        if path.exists():
            run = json.loads(path.read_text())
            if kind == "pivot":
                parts += [f"### {title}\n", measured_on(run), pivot(run["results"])]
                continue
            picture = [f"![{script} on {title}](assets/benchmarks/{path.stem}.png)\n"] if compared(run) else []
            parts += [f"### {title}, `{script}`\n", measured_on(run), *picture, table(run["results"])]
    return "\n".join(parts) + "\n" if parts else "Not measured yet.\n\n"


def measured_on(run):
    """A sentence: versions, machine, date, command."""
    versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
    machine = run["machine"]
    load = machine["load average"]
    return (
        f"{run['date']}, {versions}; {machine['cpu']}, {machine['cpu count']} cores of which 1 is used, "
        f"{machine['platform'].partition('-')[0]}"
        + (f", load average {load[0]:.1f} at the end" if load else "")
        + f": `{run['command']}`\n"
    )


def table(lines):
    """Ratios, never times: those of a CPU that is shared mean nothing elsewhere."""
    rows = ["| row | keras_seq against | ratio | null | goal | | note |", "|---|---|---|---|---|---|---|"]
    null = {line["row"]: line["ratio"] for line in lines if line["contender"].endswith(AGAIN)}
    for line in lines:
        if line["contender"].endswith(AGAIN):
            continue
        ratio, goal = line.get("ratio"), line.get("required", "")
        if ratio is None and not goal:
            continue  # the time of keras_seq itself
        value, against = (line["median"], "") if ratio is None else (ratio, line["contender"])
        shown = f"{null[line['row']]:.2f}" if line["row"] in null and ratio is not None else ""
        value = "in the noise" if ratio is not None and ratio <= 0 else _digits(value)  # of a difference of two times
        cells = (line["row"], against, value, shown, goal, line.get("verdict", ""), line["note"])
        rows.append("| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows) + "\n"


def pivot(lines):
    """A row for each row, a column for each contender: ratios of times, and sizes as they are."""
    lines = [line for line in lines if not line["contender"].endswith(AGAIN)]
    columns = list(dict.fromkeys(line["contender"] for line in lines))
    rows = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for row in dict.fromkeys(line["row"] for line in lines):
        of_row = {line["contender"]: line for line in lines if line["row"] == row}
        cells = (_cell(of_row[name]) if name in of_row else "" for name in columns)
        rows.append(f"| {row} | " + " | ".join(cells) + " |")
    return "\n".join(rows) + "\n"


def _cell(line):
    return _digits(line.get("ratio", 1.0)) if line["unit"] == "ms" else f"{line['median']:,.0f} {line['unit']}"


def compared(run):
    """`{label: ratio}` of the times of other libraries, in the order of the table."""
    return {
        f"{line['row']}: {line['contender']}": line["ratio"]
        for line in run["results"]
        if line.get("unit") == "ms"
        and "ratio" in line
        and not line["contender"].endswith(AGAIN)
        and not line["row"].startswith(("growth", "compile"))
        and "keras_seq" not in line["contender"]
    }


def pictures():
    from matplotlib import pyplot

    from keras_seq import plotting

    PICTURES.mkdir(parents=True, exist_ok=True)
    for path in sorted(RESULTS.glob("*.json")):
        run = json.loads(path.read_text())
        if (ratios := compared(run)) and not path.stem.startswith("choosing"):
            figure = plotting.bars(ratios, "time of the other / time of keras_seq", reference=1.0, log=True)
            figure.savefig(PICTURES / f"{path.stem}.png", dpi=80, metadata={"Software": None})
            pyplot.close(figure)


def _digits(value):
    """Three significant digits."""
    digits = 2 - math.floor(math.log10(abs(value))) if value else 0
    return f"{value:.{max(digits, 0)}f}"


if __name__ == "__main__":
    import matplotlib

    matplotlib.use("Agg")
    for path in PAGES:
        path.write_text(page(path.read_text()))
    pictures()
