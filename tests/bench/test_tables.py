"""Tables, documents and verdicts from small stored results."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench import tables

ROOT = Path(__file__).parents[2]
CPU, OTHER, GPU = "Some-CPU-2-cores", "Other-CPU-64-cores", "Some-GPU"
THIRD = "Third-CPU-4-cores"
UPDATE = {"eager fp32": 1.0, "compiled fp32": 0.87, "compiled bf16": 0.4567}
DECISION = {"eager fp32": 1.0, "compiled fp32": 0.031}
TEXT = "# A title\n\n<!-- bench: scaling B -->\n<!-- end of bench -->\n\nThe end, 0.87.\n"


def group(name: str, ratios: dict[str, float], *, spread: float = 0.02, **labels: Any) -> list[dict[str, Any]]:
    """Results whose baseline is the first."""
    return [
        {
            "group": name, "implementation": one, "baseline": next(iter(ratios)), **labels, "ratio": ratio,
            "ratio_low": round(ratio * (1 - spread), 4), "ratio_high": round(ratio * (1 + spread), 4), "rounds": 5,
        }
        for one, ratio in ratios.items()
    ]  # fmt: skip


def along(axis: str, ratios: dict[Any, float]) -> list[dict[str, Any]]:
    results = group(f"update along {axis}", {f"{axis} {value}": ratio for value, ratio in ratios.items()}, axis=axis)
    return [result | {"value": value} for result, value in zip(results, ratios, strict=True)]


def store(folder: Path, module: str, results: list[dict[str, Any]], device: str = CPU, **head: Any) -> None:
    """Writes one module's file as `bench/conftest.py` does, on the GPU with times."""
    if device == GPU:
        results = [result | {"p20_s": 0.98e-3, "median_s": 2e-3, "p80_s": 0.0123} for result in results]
    versions = {"threads": 2, "python": "3.11.2", "torch": "2.13.0", "triton": "3.6.0"}
    head = {"device": device, **versions, "commit": "0123456789abcdef", "when": "2026-11-24"} | head
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{module}.json").write_text(json.dumps(head | {"results": results}))


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with results of two CPUs, one of which its documents show; they have no marks yet."""
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    monkeypatch.setattr(tables, "SHOWN", (CPU, THIRD))
    here = tmp_path / "bench/results" / CPU
    decisions = [result for n in (1, 16) for result in group(f"decision in {n}, size S", DECISION)]
    store(here, "update", [*group("update, size S", UPDATE), *decisions])
    store(here, "scaling", [*along("B", {16: 1, 8: 0.55, 32: 1.9}), *along("size", {"XS": 1, "S": 3, "M": 123.4})])
    store(tmp_path / "bench/results" / OTHER, "loop", group("turn", {"updates alone": 1.0, "whole": 1.2}), OTHER)
    for name in tables.DOCUMENTS:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("Nothing here.\n")
    return tmp_path


def bench(*arguments: Any) -> int:
    return tables.main([*map(str, arguments)])


def shown(repository: Path, name: str) -> list[str]:
    """The lines that a document shows for a name."""
    path = repository / "README.md"
    path.write_text(f"<!-- bench: {name} --><!-- end of bench -->\n")
    assert bench("--write") == 0
    return path.read_text().splitlines()[2:-2]


# Tables.


def test_groups_that_compare_the_same_share_a_table(repository):
    lines = shown(repository, "update")
    assert lines == [
        f"{CPU}, threads 2, torch 2.13.0, Triton 3.6.0, Python 3.11.2, commit 0123456, 2026-11-24.",
        "",
        "| update, size S | time / baseline's (spread) |",
        "| --- | --- |",
        "| eager fp32 (baseline) | 1 (0.98–1.02) |",
        "| compiled fp32 | 0.87 (0.85–0.89) |",
        "| compiled bf16 | 0.46 (0.45–0.47) |",
        "",
        "| time / baseline's (spread) | eager fp32 (baseline) | compiled fp32 |",
        "| --- | --- | --- |",
        "| decision in 1, size S | 1 (0.98–1.02) | 0.031 (0.030–0.032) |",
        "| decision in 16, size S | 1 (0.98–1.02) | 0.031 (0.030–0.032) |",
    ]
    assert shown(repository, "update: update, size S") == lines[:7]


def test_an_axis_has_its_values_in_order(repository):
    rows = [line.split(" (")[0] for line in shown(repository, "scaling") if line.startswith(("| B", "| size"))]
    assert rows == ["| B 8 | 0.55", "| B 16", "| B 32 | 1.90", "| size XS", "| size S | 3.00", "| size M | 123"]


def test_what_differs_within_a_group_gets_a_column(repository):
    ours, other, last = group("peers", {"ours": 1.0, "other|one": 3.2, "last": 123.4}, size="S")
    last.pop("ratio")
    store(repository / "bench/results" / CPU, "peers", [ours | {"parameters": 15262914}, other | {"rounds": 1}, last])
    assert shown(repository, "peers")[2:] == [
        "| peers | parameters | time / baseline's (spread) |",
        "| --- | --- | --- |",
        "| ours (baseline) | 15,262,914 | 1 (0.98–1.02) |",
        "| other\\|one | – | 3.20 (one round) |",
        "| last | – | no baseline |",
    ]


def test_everything_is_printed_and_a_gpu_has_times(repository, capsys):
    store(repository / "bench/results" / GPU, "update", group("u", UPDATE), GPU, cuda="12.8", **{"changed since": True})
    assert bench() == 0
    printed = capsys.readouterr().out
    titles = [line.removeprefix("### ") for line in printed.splitlines() if line.startswith("### ")]
    assert titles == [f"loop on {OTHER}", f"scaling on {CPU}", f"update on {CPU}", f"update on {GPU}"]
    assert "CUDA 12.8, torch 2.13.0, Triton 3.6.0, Python 3.11.2, commit 0123456 and changes" in printed
    assert "| compiled bf16 | 0.46 (0.45–0.47)<br>2.00 ms (980 µs–12.3 ms) |" in printed


# Documents.


@pytest.mark.parametrize("document", tables.DOCUMENTS)
def test_write_fills_blocks_alone_and_check_finds_a_changed_digit(repository, capsys, document):
    path = repository / document
    path.write_text(TEXT)
    assert bench("--write") == bench("--check") == 0
    written = path.read_text()
    start, end = TEXT.split("\n<!-- end")
    assert written.startswith(f"{start}\n\n{CPU}")
    assert written.endswith(f"1.90 (1.86–1.94) |\n\n<!-- end{end}")
    changed = written.replace("| B 8 | 0.55", "| B 8 | 0.56")
    path.write_text(changed)
    assert bench("--check") == 1
    says = (
        f"{document}: line 3, <!-- bench: scaling B -->: not what is stored: `python bench/tables.py --write` mends it."
    )
    assert capsys.readouterr().err.splitlines() == [says]
    assert path.read_text() == changed


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("\n<!-- end of bench -->", "", "line 3, <!-- bench: scaling B -->: one `<!-- end of bench -->` belongs"),
        ("The end", "<!-- end of bench -->", "line 6, <!-- end of bench -->: one `<!-- end of bench -->` belongs"),
        ("<!-- end", "<!-- bench: update -->\n<!-- end", "line 3, <!-- bench: scaling B -->: one"),
        ("scaling B", "update: decision", "line 3, <!-- bench: update: decision -->: SHOWN's devices have no"),
        ("scaling B", "loop", "no such results"),  # another CPU's
    ],
)
def test_what_cannot_be_written_is_said_and_left(repository, capsys, old, new, says):
    path = repository / "README.md"
    text = TEXT.replace(old, new)
    path.write_text(text)
    assert bench("--write") == 1
    assert says in capsys.readouterr().err
    assert path.read_text() == text


def test_this_repositorys_documents_show_what_is_stored():
    subprocess.run([sys.executable, "bench/tables.py", "--check"], cwd=ROOT, check=True, timeout=120)


# A new run against what is stored.


def compared(repository: Path, bf16: float, device: str = CPU, spread: float = 0.02, **head: Any) -> int:
    """The exit code where only the time in bfloat16 has changed."""
    results = group("update, size S", UPDATE | {"compiled bf16": bf16}, spread=spread)
    store(repository / "new", "update", results, device, **head)
    return bench("--compare", repository / "new")


def test_a_loss_beyond_the_noise_fails(repository, capsys):
    assert bench("--compare", repository / "bench/results") == 0
    assert compared(repository, 0.52) == 0  # its lower bound is 9.4 % above the stored upper one
    capsys.readouterr()
    assert compared(repository, 0.53, torch="2.14.0") == 1
    printed = capsys.readouterr()
    assert printed.out.startswith("update: stored with torch 2.13.0, now 2.14.0.\n| group |")
    assert printed.out.splitlines()[3:] == [
        "| update, size S | compiled fp32 | 0.87 (0.85–0.89) | 0.87 (0.85–0.89) | ok |",
        "| update, size S | compiled bf16 | 0.46 (0.45–0.47) | 0.53 (0.52–0.54) | lost |",
    ]
    loss = "update, size S, compiled bf16: 0.53 (0.52–0.54) of the baseline's time, stored is 0.46 (0.45–0.47)"
    assert printed.err.splitlines() == [loss]


def test_a_cpus_spread_excuses_what_a_gpus_does_not(repository):
    assert compared(repository, 0.55, spread=0.1) == 0
    store(repository / "bench/results" / GPU, "update", group("update, size S", UPDATE), GPU)
    assert compared(repository, 0.55, GPU, spread=0.1) == 1
    assert compared(repository, 0.50, GPU, spread=0.1) == 0


@pytest.mark.parametrize(("ratio", "code"), [(0.71, 0), (0.72, 1)])
def test_another_cpu_is_compared_with_the_most_lenient_one(repository, capsys, ratio, code):
    for device, bf16 in ((GPU, 0.9), (OTHER, 0.4)):  # a GPU's results say nothing of a CPU
        results = group("update, size S", UPDATE | {"compiled bf16": bf16})
        store(repository / "bench/results" / device, "update", results, device)
    assert compared(repository, ratio, "Third") == code
    note = f"Nothing of this CPU is stored: compared with {OTHER}, {CPU}, 50% allowed.\n"
    assert capsys.readouterr().out.startswith(note)


def test_what_is_not_stored_passes_but_not_alone(repository, capsys):
    assert compared(repository, 0.4567, GPU) == 2
    says = f"error: --compare: nothing of this run (device: {GPU}) is among what is stored (devices: {OTHER}, {CPU}): "
    assert capsys.readouterr().err.startswith(says)
    # Against another baseline, or in another module, it is another measurement.
    store(repository / "new", "update", group("update, size S", {"compiled fp32": 1.0, "compiled bf16": 0.4}))
    store(repository / "new", "loop", group("update, size S", UPDATE))
    assert bench("--compare", repository / "new") == 2
    assert compared(repository, 0.4567) == 0
    assert "| update, size S | compiled bf16 | – | 0.46 (0.45–0.47) | not stored |" in capsys.readouterr().out


# Bad input.


@pytest.mark.parametrize("wrong", [{"group": 3}, {"ratio": 2}, {"ratio": "1"}, {"ratio_high": 1e999}, {"median_s": 1}])
def test_a_file_that_no_benchmark_wrote(repository, capsys, wrong):
    path = repository / "bench/results" / CPU / "update.json"
    store(path.parent, "update", [group("update, size S", UPDATE)[0] | wrong])
    for text in (path.read_text(), "{", "[]", "{}", '{"device": "x", "results": 3}'):
        path.write_text(text)
        assert bench("--check") == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"error: --results {repository}/bench/results: {path} is not what a benchmark stores (")


def test_no_results_and_no_document(repository, capsys):
    for option, nothing in (("--results", repository / "nowhere"), ("--compare", repository / "docs")):
        assert bench(option, nothing) == 2
        says = f"error: {option} {nothing} has no results in it: name another folder, or run `make bench`.\n"
        assert capsys.readouterr().err == says
    (repository / "README.md").unlink()
    assert bench("--check") == 2
    assert capsys.readouterr().err.startswith(f"error: --check: {repository}/README.md cannot be used")


def test_documents_show_the_first_device_that_has_a_name(repository: Path) -> None:
    folder = repository / "bench/results" / THIRD
    store(folder, "update", group("update, size S", {"eager fp32": 1.0, "other": 0.3}), THIRD)
    store(folder, "startup", group("start", {"eager": 1.0, "cold": 3.0}), THIRD)
    assert any("0.46" in line for line in shown(repository, "update: update, size S"))
    assert any("Third-CPU" in line for line in shown(repository, "startup"))
