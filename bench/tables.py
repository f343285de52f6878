"""What the benchmarks have stored: `python bench/tables.py`.

    bench/tables.py                       tables of everything stored, in Markdown
    bench/tables.py --check | --write     whether the documents show what is stored; makes them show it
    bench/tables.py --compare FOLDER      whether a new run, stored in FOLDER, has lost against what is stored

It all comes from the JSON in `bench/results/<device>/` (`--results` names another folder). README.md,
kernels/README.md and docs/performance.md show some of it, of one device, between comments:

    <!-- bench: NAME --> tables <!-- end of bench -->

NAME is `MODULE`, all that a module has stored (`update`); `MODULE AXIS`, what goes along an axis (`scaling B`); or
`MODULE: GROUP`, one group by its whole name (`update: update, size S`).
"""

import argparse
import json
import math
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from fastdreamer.config import BadInput

ROOT = Path(__file__).parents[1]
DOCUMENTS = ("README.md", "kernels/README.md", "docs/performance.md")
SHOWN = ("AMD-EPYC-AVX512-BF16-2-cores", "Intel(R)-Xeon(R)-Processor-AVX512-BF16-2-cores")
"""The devices whose results the documents show: of each name the first's that has it. A GPU's go before them."""
MARK = re.compile(r"<!-- (?:bench: (?P<name>.+?)|end of bench) -->")
LOSS = 1.1
"""A ratio may become this many times what it was."""
OTHER_CPU_LOSS = 1.5
"""The same against results of another CPU, whose caches and vector units differ."""
RATIO = "time / baseline's (spread)"
BOUNDS = (("ratio_low", "ratio", "ratio_high"), ("p20_s", "median_s", "p80_s"))
NO_LABELS = {"implementation", "value", "rounds", "clocks", *BOUNDS[0], *BOUNDS[1]}
"""What else differs within a group gets a column."""
Result = dict[str, Any]


@dataclass(frozen=True)
class Module:
    """What one benchmark module has stored on one device."""

    name: str
    device: str
    head: dict[str, Any]
    """Versions, commit, clocks, date."""
    results: list[Result]

    @property
    def timed(self) -> bool:
        """Whether times are stored, which they are from a GPU alone."""
        return any("median_s" in result for result in self.results)

    def named(self) -> dict[str, list[Result]]:
        """Its results by every name that a document may give."""
        named = {self.name: self.results}
        for result in self.results:
            named.setdefault(f"{self.name}: {result['group']}", []).append(result)
            if "axis" in result:
                named.setdefault(f"{self.name} {result['axis']}", []).append(result)
        return named

    def conditions(self) -> str:
        """Device, versions, commit and date in a line."""
        names = ("threads", "clocks", "CUDA", "torch", "Triton", "Python")
        told = [f"{name} {self.head[name.lower()]}" for name in names if self.head.get(name.lower())]
        if commit := self.head.get("commit"):
            told.append(f"commit {str(commit)[:7]}{' and changes' if self.head.get('changed since') else ''}")
        return ", ".join([self.device, *told, str(self.head.get("when"))]) + "."


def load(folder: Path, option: str) -> list[Module]:
    """Every module stored in a folder of JSON files, or in its folders, one a device.

    Raises BadInput, which names the option, where there is none or a file is not what a benchmark stores.
    """
    modules = []
    for path in sorted([*folder.glob("*.json"), *folder.glob("*/*.json")]):
        try:
            head = json.loads(path.read_text(encoding="utf-8"))
            modules.append(Module(path.stem, str(head["device"]), head, [_checked(one) for one in head.pop("results")]))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise BadInput(
                f"{option} {folder}: {path} is not what a benchmark stores ({type(error).__name__}: {error}): "
                "remove it, or run that benchmark again."
            ) from None
    if not modules:
        raise BadInput(f"{option} {folder} has no results in it: name another folder, or run `make bench`.")
    return modules


def _checked(result: Result) -> Result:
    """Raises KeyError, TypeError or ValueError where a result lacks what is shown of it."""
    if not all(isinstance(result[name], str) for name in ("group", "implementation", "baseline")):
        raise TypeError("a name that is no text")
    for low, middle, high in BOUNDS:
        if middle in result and not 0 <= result[low] <= result[middle] <= result[high] < math.inf:
            raise ValueError(f"{middle} outside of its bounds")
    return result


# Tables.


def tables(module: Module, results: Iterable[Result]) -> str:
    """The module's conditions and some of its results, in Markdown.

    Groups that compare the same implementations share a table, one a row; others have an implementation a row.
    """
    groups: dict[str, dict[str, Result]] = {}
    for result in results:
        own = result["implementation"] == result["baseline"]
        title = f"{result['implementation']} (baseline)" if own else result["implementation"]
        groups.setdefault(result["group"], {})[title] = result
    alike: dict[frozenset[str], list[str]] = {}
    for group, members in groups.items():
        alike.setdefault(frozenset(members), []).append(group)
    texts = [module.conditions()]
    for first, *others in alike.values():
        if others:
            rows = [[group, *(_cell(groups[group][title]) for title in groups[first])] for group in (first, *others)]
            texts.append(_table([RATIO, *groups[first]], rows))
        else:
            texts.append(_implementation_table(first, groups[first]))
    return "\n\n".join(texts)


def _implementation_table(group: str, results: dict[str, Result]) -> str:
    """An implementation a row. Along an axis its numbers are in order: the baseline was measured first."""
    every = dict.fromkeys(label for result in results.values() for label in result if label not in NO_LABELS)
    labels = [label for label in every if len({str(result.get(label)) for result in results.values()}) > 1]
    ordered = sorted(results.items(), key=lambda item: _place(item[1]))
    rows = [[title, *(_label(result.get(label, "–")) for label in labels), _cell(result)] for title, result in ordered]
    return _table([group, *labels, RATIO], rows)


def _place(result: Result) -> float:
    value = result.get("value")
    return value if isinstance(value, int | float) else 0


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _label(value: Any) -> str:
    return f"{value:,}" if type(value) is int else str(value)


def _cell(result: Result) -> str:
    """A ratio and, from a GPU, a time."""
    if "median_s" not in result:
        return _ratio(result)
    low, median, high = (seconds(result[name]) for name in ("p20_s", "median_s", "p80_s"))
    return f"{_ratio(result)}<br>{median} ({low}–{high})"


def _ratio(result: Result) -> str:
    """A ratio with the bounds that the spread of both times allows."""
    if "ratio" not in result:
        return "no baseline"
    ratio = "1" if result["implementation"] == result["baseline"] else number(result["ratio"])
    if result.get("rounds") == 1:
        return f"{ratio} (one round)"
    return f"{ratio} ({number(result['ratio_low'])}–{number(result['ratio_high'])})"


def number(value: float) -> str:
    """Three significant digits, or two below 1."""
    magnitude = math.floor(math.log10(value)) if value else 0
    return f"{value:.{max(0, (2 if magnitude >= 0 else 1) - magnitude)}f}"


def seconds(time: float) -> str:
    for scale, unit in ((1.0, "s"), (1e3, "ms"), (1e6, "µs")):
        if time * scale >= 0.9995:
            return f"{number(time * scale)} {unit}"
    return f"{number(time * 1e9)} ns"


# Documents.


def documents(modules: Iterable[Module], *, write: bool) -> list[str]:
    """A line for everything in the documents that is not what is stored; with `write` for what that cannot mend.

    Raises BadInput where a document cannot be read or written.
    """
    shown = sorted((m for m in modules if m.device in SHOWN), key=lambda m: SHOWN.index(m.device), reverse=True)
    named = {name: tables(module, results) for module in shown for name, results in module.named().items()}
    differences = []
    for path in (ROOT / name for name in DOCUMENTS):
        try:
            mended, found = document(named, path.read_text(encoding="utf-8"))
            if write and found:
                path.write_text(mended, encoding="utf-8")
                _, found = document(named, mended)
        except (OSError, UnicodeDecodeError) as error:
            raise BadInput(f"--{'write' if write else 'check'}: {path} cannot be used ({error}): mend it.") from None
        differences += [f"{path.relative_to(ROOT)}: {difference}" for difference in found]
    return differences


def document(named: dict[str, str], text: str) -> tuple[str, list[str]]:
    """A document as it should be, given tables by name, and a line for everything in it that is otherwise."""
    parts, differences, done = [], [], 0
    marks = list(MARK.finditer(text))
    for start, end in zip_longest(marks[::2], marks[1::2]):
        line = text.count("\n", 0, start.start()) + 1
        where = f"line {line}, {start[0]}"
        if start["name"] is None or end is None or end["name"] is not None:
            return text, [f"{where}: one `<!-- end of bench -->` belongs behind each `<!-- bench: NAME -->`."]
        if start["name"] not in named:
            differences.append(f"{where}: SHOWN's devices have no such results: `python bench/tables.py` prints all.")
            continue
        wanted = f"\n\n{named[start['name']]}\n\n"
        if text[start.end() : end.start()] != wanted:
            differences.append(f"{where}: not what is stored: `python bench/tables.py --write` mends it.")
        parts += [text[done : start.end()], wanted]
        done = end.start()
    return "".join([*parts, text[done:]]), differences


# A new run against what is stored.


def compare(new: Sequence[Module], stored: Sequence[Module]) -> tuple[str, list[str]]:
    """Notes and the table of what was compared, and a line for each loss.

    A ratio of a GPU has lost where it is above LOSS times the stored one; a CPU's, which is noisier, where its lower
    bound is above LOSS times the stored upper bound. Where nothing of this CPU is stored, the most lenient of other
    CPUs' bounds counts, times OTHER_CPU_LOSS. Raises BadInput where nothing can be compared.
    """
    notes, rows, losses = [], [], []
    here, there = ({module.device for module in modules} for modules in (new, stored))
    for module in new:
        own = module.timed or any((old.device, old.name) == (module.device, module.name) for old in stored)
        allowed = LOSS if own else OTHER_CPU_LOSS
        peers = [old for old in stored if (old.device == module.device if own else not old.timed)]
        known = [old for old in peers if old.name == module.name]
        if own:
            notes += _changed(module, known)
        else:
            cpus = ", ".join(sorted({old.device for old in peers}))
            notes.append(f"Nothing of this CPU is stored: compared with {cpus}, {allowed - 1:.0%} allowed.")
        low, high = ("ratio", "ratio") if module.timed else ("ratio_low", "ratio_high")
        for result in module.results:
            if result["implementation"] == result["baseline"] or "ratio" not in result:
                continue
            what, now = [result["group"], result["implementation"]], _ratio(result)
            old = max(_same(result, known), key=lambda one: one["ratio_high"], default=None)
            if old is None:
                rows.append([*what, "–", now, "not stored"])
            elif result[low] <= allowed * old[high]:
                rows.append([*what, _ratio(old), now, "ok"])
            else:
                rows.append([*what, _ratio(old), now, "lost"])
                losses.append(f"{', '.join(what)}: {now} of the baseline's time, stored is {_ratio(old)}")
    if all(verdict == "not stored" for *_, verdict in rows):
        raise BadInput(
            f"--compare: nothing of this run (device: {', '.join(sorted(here))}) is among what is stored (devices: "
            f"{', '.join(sorted(there))}): run what is stored, or store this run's results first."
        )
    table = _table(["group", "implementation", "stored", "new", "verdict"], rows)
    return "\n".join([*dict.fromkeys(notes), table]), losses


def _same(result: Result, known: Iterable[Module]) -> list[Result]:
    """What was measured so before."""
    names = ("group", "implementation", "baseline")
    olds = (old for module in known for old in module.results if "ratio" in old)
    return [old for old in olds if all(old[name] == result[name] for name in names)]


def _changed(module: Module, known: Iterable[Module]) -> list[str]:
    return [
        f"{module.name}: stored with {name} {old.head.get(name)}, now {module.head.get(name)}."
        for old in known
        for name in ("python", "torch", "triton", "cuda", "threads")
        if old.head.get(name) != module.head.get(name)
    ]


# The command line.


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code: 0; 1 with a line on stderr for each difference or loss; 2 with one
    sentence there for bad input, or where nothing can be compared."""
    parser = argparse.ArgumentParser(description="Prints, checks and compares what benchmarks stored.")
    parser.add_argument("--results", metavar="FOLDER", type=Path, default=ROOT / "bench/results", help="what is stored")
    way = parser.add_mutually_exclusive_group()
    way.add_argument("--check", action="store_true", help=f"whether {', '.join(DOCUMENTS)} show what is stored")
    way.add_argument("--write", action="store_true", help="make them show it")
    way.add_argument("--compare", metavar="FOLDER", type=Path, help="a new run's results, held against the stored ones")
    options = parser.parse_args(argv)
    wrong = []
    try:
        modules = load(options.results, "--results")
        if options.check or options.write:
            wrong = documents(modules, write=options.write)
        elif options.compare is not None:
            text, wrong = compare(load(options.compare, "--compare"), modules)
            print(text)
        else:
            for module in modules:
                print(f"### {module.name} on {module.device}\n\n{tables(module, module.results)}\n")
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for line in wrong:
        print(line, file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
