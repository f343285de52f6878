"""What the benchmarks have stored: `python bench/tables.py`.

    bench/tables.py [--output FOLDER]     tables of everything stored, in Markdown; with --output pictures of it, too
    bench/tables.py --check | --write     whether the documents show what is stored; makes them show it
    bench/tables.py --compare FOLDER      whether a new run, stored in FOLDER, has lost against what is stored

It all comes from the JSON in `bench/results/<device>/` (`--results` names another folder). README.md,
kernels/README.md and docs/performance.md show it between comments:

    <!-- bench: NAME --> tables <!-- end of bench -->
    ... takes <!-- bench: NAME/IMPLEMENTATION -->0.46<!-- end of bench --> of the time ...

NAME is, and the first that is stored counts: a group of results, or as much of its name as stands before a comma or a
colon (`update`); a module (`kernels`; `update.json` where a group has that name, too); a module and an axis
(`scaling B`). ` on DEVICE` behind it, or the beginning of a device's name, is needed where several devices have stored
it. `NAME/IMPLEMENTATION` is one figure, the time as a share of the baseline's; `NAME/IMPLEMENTATION, times` how many
times as fast as the baseline it is, `NAME/IMPLEMENTATION, median` its time on a GPU. The comment of a figure may not
begin a line, where Markdown would take all of that line for HTML. A comment behind a backtick or in a fenced block is
none of this.
"""

import argparse
import json
import math
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastdreamer.config import BadInput

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ROOT = Path(__file__).parents[1]
DOCUMENTS = ("README.md", "kernels/README.md", "docs/performance.md")
MARK = re.compile(r"(?<!`)<!-- (?:bench: (?P<name>.+?)|end of bench) -->")
FENCE = re.compile(r"^ *```.*?^ *``` *$", re.MULTILINE | re.DOTALL)
LOSS = 1.1
"""A ratio may become this many times what it was."""
OTHER_CPU_LOSS = 1.5
"""The same against results of another CPU, whose caches and vector units differ."""
AXES = {
    "B": "B, sequences a batch", "T": "T, steps a sequence", "H": "H, imagined steps", "size": "size",
    "environments": "environments",
}  # fmt: skip
# Labels that say what was measured, which a group's name says, too; what else varies within a group gets a column.
TOLD = {
    "group", "implementation", "baseline", "operation", "case", "sizes", "pass", "dtype", "bytes", "axis", "value",
    "ratio", "ratio_low", "ratio_high", "rounds", "median_s", "p20_s", "p80_s", "clocks",
}  # fmt: skip
Result = dict[str, Any]
Groups = dict[str, dict[str, Result]]
"""Results by group and implementation."""


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

    @property
    def axes(self) -> list[str]:
        return list(dict.fromkeys(str(result["axis"]) for result in self.results if "axis" in result))

    def groups(self, axis: str | None = None) -> Groups:
        """The groups that go along an axis, or those that go along none."""
        groups: Groups = {}
        for result in self.results:
            if (str(result["axis"]) if "axis" in result else None) == axis:
                groups.setdefault(result["group"], {})[result["implementation"]] = result
        return groups

    def conditions(self) -> str:
        """Device, versions, commit and date in a line."""
        head = self.head
        parts = [self.device]
        if self.timed:
            parts += [f"clocks {head['clocks']}" if head.get("clocks") else "", f"CUDA {head.get('cuda')}"]
        else:
            parts.append(f"{head.get('threads')} threads")
        parts += [f"{name} {head[name.lower()]}" for name in ("torch", "Triton", "Python") if head.get(name.lower())]
        if head.get("commit"):
            parts.append(f"commit {head['commit'][:7]}{' and changes' if head.get('changed since') else ''}")
        return ", ".join(part for part in [*parts, head.get("when")] if part) + "."


@dataclass(frozen=True)
class Selection:
    """What a name stands for: groups of a module, or an axis of it, or all of it."""

    module: Module
    groups: Groups
    axes: tuple[str, ...] = ()


def load(folder: Path) -> list[Module]:
    """Every module stored in a folder of JSON files, or in its folders, one a device.

    Raises BadInput where there is no such folder or a file is not what a benchmark stores.
    """
    if not folder.is_dir():
        raise BadInput(f"{folder} is no folder of results: run `make bench`, or name another by --results.")
    modules: dict[tuple[str, str], Module] = {}
    for path in sorted([*folder.glob("*.json"), *folder.glob("*/*.json")]):
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
            results, device = stored.pop("results"), str(stored["device"])
            for result in results:
                if any(not isinstance(result[name], str) for name in ("group", "implementation", "baseline")):
                    raise TypeError("a name that is no text")
                if "ratio" in result and not 0 <= result["ratio_low"] <= result["ratio"] <= result["ratio_high"] > 0:
                    raise ValueError("a ratio outside of its bounds")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise BadInput(
                f"{path} is not what a benchmark stores ({type(error).__name__}: {error}): remove it, or run it again."
            ) from None
        if (device, path.stem) in modules:
            raise BadInput(f"{folder} has {path.stem}.json of {device} twice: remove one.")
        modules[device, path.stem] = Module(path.stem, device, stored, results)
    return list(modules.values())


# What a name stands for.


def of_device(modules: Sequence[Module], name: str) -> tuple[Sequence[Module], str]:
    """The modules of the device that `NAME on DEVICE` ends with, and NAME; all of them where it ends with none."""
    what, _, device = name.rpartition(" on ")
    known = {module.device for module in modules}
    devices = {device} & known or {full for full in known if full.startswith(device)}
    if not what or not devices:
        return modules, name
    return [module for module in modules if module.device in devices], what


def select(modules: Sequence[Module], name: str) -> Selection:
    """What NAME stands for. Raises BadInput where nothing of that name is stored, or several things are."""
    found = _of_groups(modules, name) or _of_modules(modules, name)
    if not found:
        raise BadInput(f"nothing stored is called {name!r}")
    devices = sorted({selection.module.device for selection in found})
    if len(devices) > 1:
        raise BadInput(f"{name!r} is stored of several devices: add ` on DEVICE`, one of {', '.join(devices)}")
    if len(found) > 1:
        files = ", ".join(f"{selection.module.name}.json" for selection in found)
        raise BadInput(f"{name!r} is in {files}: name more of the group, or a module")
    return found[0]


def _of_groups(modules: Iterable[Module], name: str) -> list[Selection]:
    """One selection for each module that has such groups; of a device's modules, one so named goes before others."""
    found = []
    for module in modules:
        every = module.groups()
        chosen = {group: every[group] for group in every if group == name} or {
            group: every[group] for group in every if group.startswith((f"{name},", f"{name}:"))
        }
        if chosen:
            found.append(Selection(module, chosen))
    named = [selection for selection in found if selection.module.name == name]
    devices = {selection.module.device for selection in named}
    return [selection for selection in found if selection in named or selection.module.device not in devices]


def _of_modules(modules: Iterable[Module], name: str) -> list[Selection]:
    found = []
    for module in modules:
        if name.removesuffix(".json") == module.name:
            found.append(Selection(module, module.groups(), tuple(module.axes)))
        found += [Selection(module, {}, (axis,)) for axis in module.axes if name == f"{module.name} {axis}"]
    return found


def render(modules: Sequence[Module], name: str) -> tuple[str, bool]:
    """The text that belongs between a block's comments, and whether it is one figure. Raises BadInput as `select`."""
    modules, name = of_device(modules, name)
    try:
        return f"\n\n{tables(select(modules, name))}\n\n", False
    except BadInput as error:
        reason = error
    for slash in re.finditer("/", name):
        try:
            selection = select(modules, name[: slash.start()])
        except BadInput as error:
            reason = error
        else:
            return _figure(selection, name[slash.end() :]), True
    raise reason


def _figure(selection: Selection, what: str) -> str:
    groups = dict(selection.groups)
    for axis in selection.axes:
        groups |= selection.module.groups(axis)
    # An implementation's name may have commas of its own.
    whole = any(what in results for results in groups.values()) or ", " not in what
    wanted, form = (what, "") if whole else what.rsplit(", ", 1)
    having = {group: results[wanted] for group, results in groups.items() if wanted in results}
    if len(having) != 1:
        several = "which of " + "; ".join(having) if having else "one of " + ", ".join(
            dict.fromkeys(name for results in groups.values() for name in results)
        )  # fmt: skip
        raise BadInput(f"{wanted!r} is {'in several groups' if having else 'no implementation'} here: name {several}")
    (result,) = having.values()
    if form not in ("", "times", "median"):
        raise BadInput(f"{form!r} is no form of a figure: leave it out, or take `times` or `median`")
    if form == "median":
        if "median_s" not in result:
            raise BadInput("times are stored from a GPU alone: leave `, median` out")
        return seconds(result["median_s"])
    if "ratio" not in result:
        raise BadInput(f"{wanted!r} was measured without its baseline {result['baseline']!r}: run the benchmark again")
    if form == "times":
        return f"{1 / result['ratio']:.{1 if result['ratio'] > 0.1 else 0}f}"
    return number(result["ratio"])


# Tables.


def number(ratio: float) -> str:
    """Two decimals, fewer of large ratios, more of tiny ones: two significant digits at least."""
    if ratio == 0:  # what rounding has left of a lower bound
        return "0.00"
    return f"{ratio:.{max(0, 2 - max(0, math.floor(math.log10(ratio))), 1 - math.floor(math.log10(ratio)))}f}"


def seconds(time: float) -> str:
    scale, unit = next(
        (pair for pair in ((1.0, "s"), (1e3, "ms"), (1e6, "µs")) if time * pair[0] >= 0.9995), (1e9, "ns")
    )
    return f"{number(time * scale)} {unit}"


def tables(selection: Selection) -> str:
    """A selection's conditions and its tables, in Markdown."""
    module = selection.module
    texts = [_table(*rows) for rows in _group_tables(module, selection.groups)]
    texts += [_table(*_axis_table(module, axis)) for axis in selection.axes]
    return "\n\n".join([module.conditions(), *texts])


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [list(header), ["---"] * len(header), *(list(row) for row in rows)]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _ratio(result: Result) -> str:
    """A ratio with the bounds that the spread of both times allows."""
    if "ratio" not in result:
        return "no baseline"
    own = result["implementation"] == result["baseline"]
    ratio = "1" if own else number(result["ratio"])
    if result.get("rounds") == 1:
        return ratio if own else f"{ratio} (one round)"
    return f"{ratio} ({number(result['ratio_low'])}–{number(result['ratio_high'])})"


def _time(result: Result) -> str:
    if "median_s" not in result:
        return "–"
    spread = "" if result.get("rounds") == 1 else f" ({seconds(result['p20_s'])}–{seconds(result['p80_s'])})"
    return seconds(result["median_s"]) + spread


def _cell(result: Result | None) -> str:
    if result is None:
        return "–"
    return _ratio(result) + (f"<br>{_time(result)}" if "median_s" in result else "")


def _titled(name: str, baseline: str) -> str:
    return f"{name} (baseline)" if name == baseline else name


def _group_tables(module: Module, groups: Groups) -> Iterator[tuple[list[str], list[list[str]]]]:
    """Groups that compare the same implementations share a table, one group a row; one alone has an implementation
    a row, and so have those that are left, together."""
    alike: dict[tuple[str, frozenset[str]], Groups] = {}
    for group, results in groups.items():
        baseline = next(iter(results.values()))["baseline"]
        alike.setdefault((baseline, frozenset(results)), {})[group] = results
    alone: Groups = {}
    for (baseline, _), members in alike.items():
        names = list(next(iter(members.values())))
        if len(members) == 1:
            alone |= members
            continue
        header = ["time / baseline's (spread)", *(_titled(name, baseline) for name in names)]
        yield header, [[group, *(_cell(results[name]) for name in names)] for group, results in members.items()]
    if alone:
        yield _long(module, alone)


def _long(module: Module, groups: Groups) -> tuple[list[str], list[list[str]]]:
    labels = [
        label
        for label in dict.fromkeys(x for results in groups.values() for result in results.values() for x in result)
        if label not in TOLD and any(len({str(r.get(label)) for r in g.values()}) > 1 for g in groups.values())
    ]
    several = len(groups) > 1
    header = ["group", "implementation"] if several else list(groups)
    header += [
        *(label.replace("_per_s", " a second") for label in labels),
        "time / baseline's (spread)",
        *(["median (spread)"] if module.timed else []),
    ]
    rows = []
    for group, results in groups.items():
        for i, (name, result) in enumerate(results.items()):
            row = [*([group if i == 0 else ""] if several else []), _titled(name, result["baseline"])]
            row += [_label(result.get(label)) for label in labels]
            rows.append([*row, _ratio(result), *([_time(result)] if module.timed else [])])
    return header, rows


def _label(value: Any) -> str:
    return (
        "–" if value is None else f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
    )


def _along(module: Module, axis: str) -> tuple[list[Any], dict[str, dict[Any, Result]]]:
    """An axis' values, in order if they are numbers, and each group's results by value."""
    lines = {
        group: {result["value"]: result for result in results.values()}
        for group, results in module.groups(axis).items()
    }
    values = list(dict.fromkeys(value for line in lines.values() for value in line))
    return sorted(values) if all(isinstance(value, int | float) for value in values) else values, lines


def _axis_table(module: Module, axis: str) -> tuple[list[str], list[list[str]]]:
    values, lines = _along(module, axis)
    header = [AXES.get(axis, axis), *lines]
    return header, [[str(value), *(_cell(line.get(value)) for line in lines.values())] for value in values]


def everything(modules: Sequence[Module]) -> str:
    """All tables, each below the name that a document would give."""
    selections = []
    for module in modules:
        if groups := module.groups():
            selections.append((f"{module.name}.json", Selection(module, groups)))
        selections += [(f"{module.name} {axis}", Selection(module, {}, (axis,))) for axis in module.axes]
    return "\n\n".join(
        f"### {name} on {selection.module.device}\n\n{tables(selection)}" for name, selection in selections
    )


# Documents.


def documents(modules: Sequence[Module], root: Path, *, write: bool) -> list[str]:
    """A line for everything in the documents that is not what is stored; with `write` for what cannot be mended."""
    differences = []
    for name in DOCUMENTS:
        path = root / name
        if path.exists():
            old = path.read_text(encoding="utf-8")
            new, found = document(modules, old, write=write)
            differences += [f"{name}: {line}" for line in found]
            if new != old:
                path.write_text(new, encoding="utf-8")
    return differences


def document(modules: Sequence[Module], text: str, *, write: bool) -> tuple[str, list[str]]:
    """A document, with `write` as it should be, and a line for everything that is wrong in it."""
    fences = [match.span() for match in FENCE.finditer(text)]
    marks = [m for m in MARK.finditer(text) if not any(start <= m.start() < end for start, end in fences)]
    parts, differences, done = [], [], 0
    while marks:
        start = marks.pop(0)
        line, name = text.count("\n", 0, start.start()) + 1, start["name"]
        if name is None:
            return text, [*differences, f"line {line}: `<!-- end of bench -->` ends nothing: remove it"]
        if not marks or marks[0]["name"] is not None:
            return text, [*differences, f"line {line}, {name}: no `<!-- end of bench -->` follows: add it"]
        end = marks.pop(0)
        shown = text[start.end() : end.start()]
        try:
            wanted, figure = render(modules, name)
        except BadInput as error:
            differences.append(f"line {line}, {name}: {error}")
            continue
        if figure and not text[text.rfind("\n", 0, start.start()) + 1 : start.start()].strip():
            differences.append(f"line {line}, {name}: a figure's comment begins the line: put a word before it")
        if shown == wanted:
            continue
        if not write:
            differences.append(f"line {line}, {name}: {_difference(shown, wanted)}")
            continue
        parts += [text[done : start.end()], wanted]
        done = end.start()
    return "".join([*parts, text[done:]]), differences


def _difference(shown: str, wanted: str) -> str:
    """The first line that differs."""
    here, there = shown.strip().splitlines(), wanted.strip().splitlines()
    for i in range(max(len(here), len(there))):
        old, new = (lines[i] if i < len(lines) else None for lines in (here, there))
        if old != new:
            return f"shows {old or 'nothing'!r}, stored is {new or 'nothing'!r}"
    return "its empty lines are not those that --write leaves"


# A new run against what is stored.


def compare(new: Sequence[Module], stored: Sequence[Module]) -> tuple[list[str], list[list[str]], list[str]]:
    """Notes, the table of what was compared, and a line for each loss.

    A ratio of a GPU has lost where it is above LOSS times the stored one; a CPU's, which is noisier, where its lower
    bound is above LOSS times the stored upper bound. Where nothing of this CPU is stored, the most lenient of other
    CPUs' bounds counts, times OTHER_CPU_LOSS. Raises BadInput where nothing can be compared.
    """
    notes, rows, losses = [], [], []
    compared = 0
    others = False
    for module in new:
        known, own = _stored_of(module, stored)
        others |= not own
        notes += _changed(module, known) if own else []
        for group, results in (pair for axis in (None, *module.axes) for pair in module.groups(axis).items()):
            for name, result in results.items():
                if name == result["baseline"] or "ratio" not in result:
                    continue
                bounds = [old for old in (_same(other, result) for other in known) if old is not None]
                if not bounds:
                    rows.append([group, name, "–", _ratio(result), "not stored"])
                    continue
                old = max(bounds, key=lambda bound: bound["ratio_high"])
                compared += 1
                allowed = LOSS if own else OTHER_CPU_LOSS
                lost = (
                    result["ratio"] > allowed * old["ratio"]
                    if module.timed
                    else result["ratio_low"] > allowed * old["ratio_high"]
                )
                rows.append([group, name, _ratio(old), _ratio(result), "lost" if lost else "ok"])
                if lost:
                    losses.append(f"{group}, {name}: {_ratio(result)} of the baseline's time, stored is {_ratio(old)}")
    if not compared:
        devices = ", ".join(sorted({module.device for module in stored})) or "none"
        here = ", ".join(sorted({module.device for module in new})) or "none"
        raise BadInput(
            f"nothing of this run (device: {here}) is among what is stored (devices: {devices}): run what is stored, "
            "or store this run's results first."
        )
    if others:
        cpus = sorted({module.device for module in stored if not module.timed})
        notes.insert(
            0, f"Nothing of this CPU is stored: compared with {', '.join(cpus)}, {OTHER_CPU_LOSS - 1:.0%} allowed."
        )
    return notes, rows, losses


def _stored_of(module: Module, stored: Sequence[Module]) -> tuple[list[Module], bool]:
    """The stored modules to compare with, and whether they are of the same device."""
    of_device = [other for other in stored if other.device == module.device]
    if of_device or module.timed:
        return [other for other in of_device if other.name == module.name], True
    return [other for other in stored if other.name == module.name and not other.timed], False


def _same(module: Module, result: Result) -> Result | None:
    names = ("group", "implementation", "baseline")
    same = (old for old in module.results if "ratio" in old and all(old[name] == result[name] for name in names))
    return next(same, None)


def _changed(module: Module, known: Sequence[Module]) -> list[str]:
    return [
        f"{module.name}: stored with {name} {old.head.get(name)}, now {module.head.get(name)}."
        for old in known
        for name in ("python", "torch", "triton", "cuda", "threads")
        if old.head.get(name) != module.head.get(name)
    ]


# Pictures.


def draw(modules: Sequence[Module], folder: Path) -> list[Path]:
    """Bars of each module's implementations against their baselines, and a line along each axis, as PNGs in a folder.

    Raises BadInput where the folder cannot be written.
    """
    from matplotlib import style

    figures: dict[str, Figure] = {}
    with style.context("tableau-colorblind10"):
        for module in modules:
            stem = f"{module.device}-{module.name}"
            if groups := _measured(module.groups()):
                figures[f"{stem}.png"] = _bars(module, groups)
            measured = [axis for axis in module.axes if _measured(module.groups(axis))]
            figures |= {f"{stem}-{axis}.png": _lines(module, axis) for axis in measured}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, figure in figures.items():
            figure.savefig(folder / name, dpi=120)
    except OSError as error:
        raise BadInput(f"{folder} cannot be written ({error}): name another folder by --output.") from None
    return [folder / name for name in figures]


def _measured(groups: Groups) -> Groups:
    """Without what has no ratio."""
    kept = {
        group: {name: result for name, result in results.items() if "ratio" in result}
        for group, results in groups.items()
    }
    return {group: results for group, results in kept.items() if results}


def _spread(results: Sequence[Result]) -> list[list[float]]:
    """How far the bounds lie below and above the ratios."""
    return [
        [result["ratio"] - result["ratio_low"] for result in results],
        [result["ratio_high"] - result["ratio"] for result in results],
    ]


def _bars(module: Module, groups: Groups) -> "Figure":
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(name for results in groups.values() for name in results))
    bars = sum(len(results) for results in groups.values())
    figure = Figure(figsize=(9, 1.6 + 0.2 * bars + 0.16 * len(groups)), layout="constrained")
    axes = figure.add_subplot()
    places: dict[str, list[tuple[float, Result]]] = {name: [] for name in names}
    ticks, place = [], 0.0
    for results in groups.values():
        ticks.append(place + (len(results) - 1) / 2)
        for name, result in results.items():
            places[name].append((place, result))
            place += 1
        place += 0.8
    for i, name in enumerate(names):
        where, results = zip(*places[name], strict=True)
        axes.barh(
            where, [result["ratio"] for result in results], height=0.9, xerr=_spread(results), label=name,
            color=f"C{i % 10}", hatch="//" if i >= 10 else None, error_kw={"linewidth": 1, "capsize": 2},
        )  # fmt: skip
    axes.axvline(1, color="black", linewidth=1)
    axes.set_yticks(ticks, list(groups), fontsize=8)
    axes.invert_yaxis()
    ratios = [result["ratio"] for results in groups.values() for result in results.values()]
    if max(ratios) > 10 * min(ratios):
        axes.set_xscale("log")
    _titles(axes, module, module.name)
    axes.set_xlabel("time / baseline's (1: the baseline; less is faster)")
    figure.legend(loc="outside lower center", ncols=min(4, len(names)), frameon=False, fontsize=8)
    return figure


def _lines(module: Module, axis: str) -> "Figure":
    from matplotlib.figure import Figure

    values, lines = _along(module, axis)
    numbers = all(isinstance(value, int | float) for value in values)
    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.add_subplot()
    for group, line in lines.items():
        known = [value for value in values if "ratio" in line.get(value, {})]
        results = [line[value] for value in known]
        where = known if numbers else [values.index(value) for value in known]
        axes.errorbar(where, [r["ratio"] for r in results], yerr=_spread(results), marker="o", capsize=3, label=group)
    if numbers and min(values) > 0:
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        axes.set_xticks(values, [str(value) for value in values])
        axes.minorticks_off()
        axes.yaxis.set_major_formatter("{x:g}")
    else:
        axes.set_xticks(range(len(values)) if not numbers else values, [str(value) for value in values])
    _titles(axes, module, f"{module.name}, along {axis}")
    axes.set_xlabel(AXES.get(axis, axis))
    axes.set_ylabel("time / baseline's")
    axes.legend(frameon=False, fontsize=8)
    return figure


def _titles(axes: "Axes", module: Module, title: str) -> None:
    axes.set_title(f"{title}\n{module.device}, {module.head.get('when')}", loc="left", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.set_axisbelow(True)


# The command line.


def main(argv: Sequence[str] | None = None) -> int:
    """The command line behind `bench`; returns the exit code: 0; 1 with a line on stderr for each difference or loss;
    2 with one sentence there for bad input, or where nothing can be compared."""
    parser = argparse.ArgumentParser(description="Prints, checks and compares what benchmarks stored.")
    parser.add_argument("--results", metavar="FOLDER", type=Path, help="what is stored (default: bench/results)")
    parser.add_argument("--device", metavar="NAME", help="leave other devices' results out")
    way = parser.add_mutually_exclusive_group()
    way.add_argument("--output", metavar="FOLDER", type=Path, help="draw pictures, too")
    way.add_argument("--check", action="store_true", help=f"whether {', '.join(DOCUMENTS)} show what is stored")
    way.add_argument("--write", action="store_true", help="make them show it")
    way.add_argument("--compare", metavar="FOLDER", type=Path, help="a new run's results, held against the stored ones")
    options = parser.parse_args(argv)
    try:
        return _run(options)
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _run(options: argparse.Namespace) -> int:
    if not (ROOT / "bench").is_dir() and (options.results is None or options.check or options.write):
        raise BadInput("benchmarks and documents are no part of an installed fastdreamer: run this in its repository.")
    if options.results is None and not (ROOT / "bench/results").is_dir():
        modules = []  # a document without blocks is right before anything was measured
    else:
        modules = load(options.results or ROOT / "bench/results")
    if options.device is not None:
        known = sorted({module.device for module in modules})
        if options.device not in known:
            raise BadInput(f"--device {options.device} has nothing stored: take one of {', '.join(known) or 'none'}.")
        modules = [module for module in modules if module.device == options.device]
    if options.check or options.write:
        return _complain(documents(modules, ROOT, write=options.write))
    if options.compare is not None:
        notes, rows, losses = compare(load(options.compare), modules)
        for note in notes:
            print(note)
        print(_table(["group", "implementation", "stored", "new", "verdict"], rows))
        return _complain(losses)
    if not modules:
        raise BadInput("nothing is stored: run `make bench`, or name a folder of results by --results.")
    print(everything(modules))
    if options.output is not None:
        for path in draw(modules, options.output):
            print(f"{path}", file=sys.stderr)
    return 0


def _complain(lines: Sequence[str]) -> int:
    for line in lines:
        print(line, file=sys.stderr)
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
