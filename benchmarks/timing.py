"""Fair timing, shared by the scripts of this folder.

One process, one core, one thread; contenders take turns in rounds, so that what else the machine does meets all of
them; a ratio is the median of the ratios within a round; the first contender of a row runs once more under another
name, and how far that null ratio is from 1 is the noise of the row.
"""

import ctypes
import datetime
import gc
import json
import operator
import os
import platform
import re
import statistics
import sys
import time

import numpy as np

AGAIN = ", again"
COLUMNS = {"row": 48, "contender": 22, "median": 12, "min": 10, "ratio": 7, "of medians": 10, "required": 9}
COLUMNS |= {"verdict": 7, "rounds": 6, "note": 0}


def one_thread():
    """Holds this process on one core and its framework on one thread. To be called before a framework is imported."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    backend = os.environ.setdefault("KERAS_BACKEND", "tensorflow")
    if backend == "torch":
        import torch

        torch.set_num_threads(1)
        torch.set_num_interop_threads(1)
    elif backend == "tensorflow":
        import tensorflow as tf

        tf.config.threading.set_intra_op_parallelism_threads(1)
        tf.config.threading.set_inter_op_parallelism_threads(1)


def agree(outputs, valid=None, tolerance=1e-5):
    """Raises AssertionError unless all arrays of `outputs` `{contender: array}` are equal where `valid` is True."""
    (first, expected), *others = outputs.items()
    where = slice(None) if valid is None else valid
    for name, received in others:
        difference = np.abs(received - expected)[where].max()
        if not difference <= tolerance:
            raise AssertionError(f"{name} and {first} differ by {difference}: not the same work, so not timed.")


def measure(contenders, rounds=9, budget=20.0, per_round=0.1):
    """Times `{name: run}`, the first one also under `name + AGAIN`.

    Args:
        contenders: functions without arguments that return when their work is done.
        rounds: most rounds that a contender takes part in.
        budget: seconds for one contender. It takes part in fewer rounds, at least one, where they do not suffice.
        per_round: seconds of one contender in one round: a short call is repeated that often, at most 1000 times.

    Returns:
        `{name: [milliseconds per call, one for each round]}`, and `{name: note}`. A contender whose first call takes
        longer than `budget` is not called again: that cold call is its round.
    """
    first = next(iter(contenders))
    contenders = {first: contenders[first], first + AGAIN: contenders[first], **contenders}
    samples, notes, repeats, limit = {}, {}, {}, {}
    gc.collect()
    for name, run in contenders.items():
        seconds = _warm(run)
        repeats[name] = min(max(int(per_round / seconds), 1), 1000)
        limit[name] = min(max(int(budget / (seconds * repeats[name])), 1), rounds)
        samples[name] = []
        if seconds > budget:
            samples[name], limit[name], notes[name] = [1e3 * seconds], 0, "one cold call"
    names = list(contenders)
    for i in range(rounds):
        start = i % len(names)
        for name in names[start:] + names[:start]:
            if i < limit[name]:
                samples[name].append(1e3 * _seconds(contenders[name], repeats[name]))
    return samples, notes


def _warm(run):
    """Seconds of a call, after up to two calls to warm up if they are short."""
    spent = [_seconds(run)]
    while sum(spent) < 1 and len(spent) < 3:
        spent.append(_seconds(run))
    return min(spent)


def _seconds(run, repeats=1):
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    return (time.perf_counter() - start) / repeats


def peak_memory(run):
    """MiB by which a call of `run` raises the memory of this process at most (Linux with glibc).

    From /proc, because `ru_maxrss` begins with the peak of the parent process and cannot be set back. What calls before
    have freed goes back to the system first: otherwise it is used again, and no growth is seen.
    """

    def status(key):
        with open("/proc/self/status") as file:
            return int(re.search(rf"{key}:\s+(\d+) kB", file.read())[1]) / 1024

    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the high-water mark starts again from here
    before = status("VmRSS")
    run()
    return max(status("VmHWM") - before, 0.1)


def lines(row, samples, required=None, unit="ms", notes=None, path=None):
    """The results of one row, one dictionary for each contender.

    Args:
        row: its name.
        samples: `{contender: [value of each round]}`; ratios are those to the first contender.
        required: `{contender: bound}` such as `">= 1.5"`: of its ratio; for the first contender of its median.
        unit: of the values.
        notes: `{contender: text}`.
        path: which kernels ran.
    """
    required, notes = required or {}, notes or {}
    first = next(iter(samples))
    result = []
    for name, values in samples.items():
        median = statistics.median(values)
        line = {"row": row, "contender": name, "unit": unit, "median": median, "min": min(values)}
        if name != first:
            line["ratio"] = statistics.median(v / f for v, f in zip(values, samples[first], strict=False))
            line["of medians"] = median / statistics.median(samples[first])
        if required.get(name):
            line["required"] = required[name]
            line["verdict"] = "ok" if _holds(line.get("ratio", median), required[name]) else "short"
        note = notes.get(name, path if name == first else None)
        result.append(line | {"rounds": len(values), "note": note or "", "path": path, "values": values})
    return result


def _holds(value, bound):
    relation, limit = bound.split()
    return {">=": operator.ge, "<=": operator.le}[relation](value, float(limit))


def show(results=None):
    """Prints results as lines of a Markdown table; without results, its head."""
    if results is None:
        results = [{name: name for name in COLUMNS}, {name: "-" * max(width, 3) for name, width in COLUMNS.items()}]
    for line in results:
        cells = (_cell(line.get(name, ""), name, line).ljust(width) for name, width in COLUMNS.items())
        print("|", " | ".join(cells), "|", flush=True)


def _cell(value, name, line):
    if isinstance(value, str | int):
        return str(value)
    digits = 3 if abs(value) < 10 else 1
    return f"{value:.{digits}f}" + (f" {line['unit']}" if name == "median" else "")


def save(path, results, **about):
    """Writes results as JSON, with what they were measured on, when, and by which command."""
    words = [word for word, before in zip(sys.argv, ["", *sys.argv], strict=False) if "--json" not in (word, before)]
    command = f"KERAS_BACKEND={about['backend']} python benchmarks/{os.path.basename(words[0])} {' '.join(words[1:])}"
    about |= {"date": datetime.date.today().isoformat(), "command": command.strip(), "machine": machine()}
    with open(path, "w") as file:
        json.dump({**about, "results": results}, file, indent=1)


def machine():
    cpu = platform.processor()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            cpu = next((line.split(":")[1].strip() for line in file if line.startswith("model name")), cpu)
    load = os.getloadavg() if hasattr(os, "getloadavg") else None
    return {"platform": platform.platform(), "cpu": cpu, "cpu count": os.cpu_count(), "load average": load}


def versions(*modules):
    """Versions of Python and of imported modules."""
    return {"python": platform.python_version()} | {name: sys.modules[name].__version__ for name in modules}
