"""Tables, documents and verdicts from small stored results."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from bench import tables
from fastdreamer.config import BadInput

ROOT = Path(__file__).parents[2]
CPU, OTHER, GPU = "Some-CPU-2-cores", "Other-CPU-64-cores", "Some-GPU"
UPDATE = {"eager fp32": 1.0, "compiled fp32": 0.87, "compiled bf16": 0.4567}


def entry(group: str, name: str, baseline: str, ratio: float, *, spread: float = 0.02, **labels: Any) -> dict[str, Any]:
    bounds = {"ratio_low": round(ratio * (1 - spread), 4), "ratio_high": round(ratio * (1 + spread), 4)}
    return {
        "group": group,
        "implementation": name,
        "baseline": baseline,
        **labels,
        "ratio": ratio,
        **bounds,
        "rounds": 5,
    }


def group(name: str, ratios: dict[str, float], *, spread: float = 0.02, **labels: Any) -> list[dict[str, Any]]:
    """Results whose baseline is the first."""
    baseline = next(iter(ratios))
    return [entry(name, one, baseline, ratio, spread=spread, **labels) for one, ratio in ratios.items()]


def along(axis: str, ratios: dict[Any, float], spread: float = 0.02) -> list[dict[str, Any]]:
    baseline = str(next(iter(ratios)))
    return [
        entry(f"update along {axis}", str(value), baseline, ratio, spread=spread, axis=axis, value=value)
        for value, ratio in ratios.items()
    ]


def store(folder: Path, module: str, results: list[dict[str, Any]], device: str = CPU, **head: Any) -> Path:
    """Writes one module's file as `bench/conftest.py` does; on the GPU with times, 10 ms for a baseline."""
    if device == GPU:
        scale = {"median_s": 1e-2, "p20_s": 0.98e-2, "p80_s": 1.02e-2}
        results = [result | {name: result["ratio"] * time for name, time in scale.items()} for result in results]
    head = {
        "device": device, "threads": 2, "python": "3.11.2", "torch": "2.13.0", "triton": "3.6.0",
        "cuda": "12.8" if device == GPU else None, "commit": "0123456789abcdef", "changed since": False,
        "clocks": "1980 MHz, 2619 MHz, 120 W" if device == GPU else None, "when": "2026-11-24",
    } | head  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{module}.json"
    path.write_text(json.dumps(head | {"results": results}))
    return path


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with results of one CPU, and no document yet."""
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    here = tmp_path / "bench/results" / CPU
    decisions = [
        group(f"decision, {n} environments, size S", {"eager fp32": 1.0, "compiled fp32": 0.9}) for n in (1, 16)
    ]
    encoder = group("encoder", {"NCHW": 1.0, "channels last": 0.031})
    store(here, "update", [*group("update, size S", UPDATE), *decisions[0], *decisions[1], *encoder])
    store(
        here, "scaling", [*along("B", {16: 1.0, 8: 0.55, 32: 1.9}), *along("size", {"XS": 1.0, "S": 3.0, "M": 123.4})]
    )
    store(here, "kernels", group("update: of the optimiser", {"eager": 1.0, "compiled": 0.5}))
    return tmp_path


def bench(*arguments: Any) -> int:
    return tables.main([*map(str, arguments)])


def shown(repository: Path, name: str) -> str:
    return tables.render(tables.load(repository / "bench/results"), name)[0].strip()


# Tables.


def test_one_group_has_an_implementation_a_row(repository):
    assert shown(repository, "update, size S").splitlines() == [
        f"{CPU}, 2 threads, torch 2.13.0, Triton 3.6.0, Python 3.11.2, commit 0123456, 2026-11-24.",
        "",
        "| update, size S | time / baseline's (spread) |",
        "| --- | --- |",
        "| eager fp32 (baseline) | 1 (0.98–1.02) |",
        "| compiled fp32 | 0.87 (0.85–0.89) |",
        "| compiled bf16 | 0.46 (0.45–0.47) |",
    ]


def test_groups_that_compare_the_same_share_a_table_and_a_gpu_shows_times(repository):
    rows = [row for n in (1, 16) for row in group(f"decision, {n} environments", {"eager": 1.0, "fused": 0.25})]
    store(repository / "bench/results" / GPU, "update", rows, GPU, **{"changed since": True})
    text = shown(repository, f"decision on {GPU}")
    assert "clocks 1980 MHz, 2619 MHz, 120 W, CUDA 12.8" in text
    assert "commit 0123456 and changes" in text
    assert "threads" not in text
    assert text.splitlines()[-4:] == [
        "| time / baseline's (spread) | eager (baseline) | fused |",
        "| --- | --- | --- |",
        "| decision, 1 environments | 1 (0.98–1.02)<br>10.0 ms (9.80 ms–10.2 ms) "
        "| 0.25 (0.24–0.26)<br>2.50 ms (2.45 ms–2.55 ms) |",
        "| decision, 16 environments | 1 (0.98–1.02)<br>10.0 ms (9.80 ms–10.2 ms) "
        "| 0.25 (0.24–0.26)<br>2.50 ms (2.45 ms–2.55 ms) |",
    ]


def test_what_compares_differently_shares_a_long_table_with_its_labels(repository):
    peers = [entry("peers", "ours", "ours", 1.0, parameters=15262914), entry("peers", "other|one", "ours", 3.2)]
    store(repository / "bench/results" / CPU, "peers", [*peers, entry("alone", "a", "b", 2.0) | {"rounds": 1}])
    lines = shown(repository, "peers.json").splitlines()
    assert lines[2] == "| group | implementation | parameters | time / baseline's (spread) |"
    assert lines[4:] == [
        "| peers | ours (baseline) | 15,262,914 | 1 (0.98–1.02) |",
        "|  | other\\|one | – | 3.20 (3.14–3.26) |",
        "| alone | a | – | 2.00 (one round) |",
    ]


def test_an_implementations_name_may_have_commas(repository):
    peers = [entry("peers", "ours", "ours", 1.0), entry("peers", "other, compiled", "ours", 3.2)]
    store(repository / "bench/results" / CPU, "peers", peers)
    modules = tables.load(repository / "bench/results")
    assert tables.render(modules, "peers/other, compiled") == ("3.20", True)
    assert tables.render(modules, "peers/other, compiled, times") == ("0.3", True)
    with pytest.raises(BadInput, match="'other' is no implementation"):
        tables.render(modules, "peers/other, times")


def test_an_axis_has_its_values_in_order(repository):
    assert shown(repository, "scaling B").splitlines()[-5:] == [
        "| B, sequences a batch | update along B |",
        "| --- | --- |",
        "| 8 | 0.55 (0.54–0.56) |",
        "| 16 | 1 (0.98–1.02) |",
        "| 32 | 1.90 (1.86–1.94) |",
    ]
    sizes = shown(repository, "scaling size").splitlines()[-3:]
    assert [line.split(" | ")[0] for line in sizes] == ["| XS", "| S", "| M"]
    assert "| B, sequences" in shown(repository, "scaling")
    assert "| size |" in shown(repository, "scaling")


def test_a_result_whose_baseline_was_not_measured_says_so(repository):
    lonely = {"group": "lonely", "implementation": "a", "baseline": "b", "rounds": 5}
    store(repository / "bench/results" / CPU, "loop", [lonely])
    assert shown(repository, "loop").splitlines()[-1] == "| a | no baseline |"
    with pytest.raises(BadInput, match="without its baseline 'b'"):
        shown(repository, "loop/a")


def test_everything_is_printed_below_the_name_a_document_would_give(repository, capsys):
    assert bench() == 0
    printed = capsys.readouterr().out
    titles = [line.removeprefix("### ") for line in printed.splitlines() if line.startswith("### ")]
    assert titles == [f"{name} on {CPU}" for name in ("kernels.json", "scaling B", "scaling size", "update.json")]
    for title in titles:
        assert shown(repository, title) in printed


def test_device_leaves_others_out(repository, capsys):
    store(repository / "bench/results" / OTHER, "update", group("update, size S", UPDATE), OTHER)
    assert bench("--device", OTHER) == 0
    printed = capsys.readouterr().out
    assert OTHER in printed
    assert CPU not in printed


# Names and single figures.


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("update/compiled bf16", "0.46"),
        ("update/compiled bf16, times", "2.2"),
        ("encoder/channels last", "0.031"),
        ("encoder/channels last, times", "32"),
        ("decision, 16 environments/compiled fp32", "0.90"),
        (f"update/compiled bf16 on {CPU}", "0.46"),
        ("update/compiled bf16, times on Some-C", "2.2"),
        ("scaling B/32", "1.90"),
        ("scaling size/M", "123"),
        ("kernels/compiled", "0.50"),
    ],
)
def test_a_figure(repository, name, text):
    assert tables.render(tables.load(repository / "bench/results"), name) == (text, True)


def test_a_gpu_has_times_as_figures(repository):
    store(repository / "bench/results" / GPU, "update", group("update, size S", UPDATE), GPU)
    assert shown(repository, f"update/compiled bf16, median on {GPU}") == "4.57 ms"


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("updates", "nothing stored is called 'updates'"),
        (f"update on {GPU}", "nothing stored is called"),
        ("updates/eager", "nothing stored is called 'updates'"),
        ("update/compiled", "one of eager fp32, compiled fp32, compiled bf16"),
        (
            "decision/compiled fp32",
            "in several groups here: name which of decision, 1 environments, size S; decision, 16",
        ),
        ("update/compiled bf16, twice", "'twice' is no form of a figure"),
        ("update/compiled bf16, median", "from a GPU alone"),
        ("upd", "nothing stored is called 'upd'"),
    ],
)
def test_a_name_that_stands_for_nothing(repository, name, says):
    with pytest.raises(BadInput) as raised:
        shown(repository, name)
    assert says in str(raised.value)


def test_a_module_of_the_groups_name_goes_first_and_two_others_have_to_be_named(repository):
    # `update:` is in kernels.json, too.
    assert "of the optimiser" not in shown(repository, "update")
    store(repository / "bench/results" / CPU, "loop", group("encoder", {"a": 1.0, "b": 2.0}))
    with pytest.raises(BadInput, match=r"'encoder' is in loop\.json, update\.json"):
        shown(repository, "encoder")


def test_several_devices_have_to_be_named(repository):
    store(
        repository / "bench/results" / OTHER, "update", group("update, size S", UPDATE | {"compiled bf16": 0.6}), OTHER
    )
    with pytest.raises(BadInput, match=f"add ` on DEVICE`, one of {OTHER}, {CPU}"):
        shown(repository, "update/compiled bf16")
    assert shown(repository, "update/compiled bf16 on Other") == "0.60"
    assert shown(repository, "encoder/channels last") == "0.031"


# Documents.

TEXT = """# A title

An update takes <!-- bench: update/compiled bf16 --><!-- end of bench --> of the time. A quoted `<!-- bench: x -->` and

```
<!-- bench: in a fence -->
```

<!-- bench: update -->
<!-- end of bench -->

The end, 0.46.
"""


def test_write_fills_blocks_and_touches_nothing_else(repository, capsys):
    path = repository / "README.md"
    path.write_text(TEXT)
    assert bench("--check") == 1
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(": ")[:2] for line in lines] == [
        ["README.md", "line 3, update/compiled bf16"],
        ["README.md", "line 9, update"],
    ]
    assert path.read_text() == TEXT
    assert bench("--write") == 0
    written = path.read_text()
    assert "<!-- bench: update/compiled bf16 -->0.46<!-- end of bench --> of the time" in written
    table = shown(repository, "update")
    assert f"<!-- bench: update -->\n\n{table}\n\n<!-- end of bench -->\n\nThe end, 0.46.\n" in written
    assert written.replace("-->0.46<!--", "--><!--").replace(f"\n\n{table}\n\n", "\n") == TEXT
    assert bench("--check") == 0
    assert bench("--write") == 0
    assert path.read_text() == written


@pytest.mark.parametrize("document", tables.DOCUMENTS)
def test_check_finds_a_changed_digit(repository, capsys, document):
    path = repository / document
    path.parent.mkdir(exist_ok=True)
    path.write_text(TEXT)
    assert bench("--write") == 0
    written = path.read_text()
    path.write_text(written.replace("| 0.87 (0.85", "| 0.77 (0.85"))
    capsys.readouterr()
    assert bench("--check") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{document}: line 9, update: shows '| compiled fp32 | 0.77 (0.85–0.89) |', stored is ")
    path.write_text(written.replace("-->0.46<!--", "-->0.45<!--"))
    assert bench("--check") == 1
    assert "update/compiled bf16: shows '0.45', stored is '0.46'" in capsys.readouterr().err


def test_check_finds_new_results(repository):
    (repository / "README.md").write_text(TEXT)
    assert bench("--write") == 0
    store(repository / "bench/results" / CPU, "update", group("update, size S", UPDATE | {"compiled fp32": 0.8}))
    assert bench("--check") == 1


@pytest.mark.parametrize(
    ("broken", "says"),
    [
        (("<!-- end of bench --> of", "of"), "no `<!-- end of bench -->` follows"),
        (("0.46.\n", "0.46.<!-- end of bench -->\n"), "ends nothing"),
        (("bench: update -->", "bench: up -->"), "nothing stored is called 'up'"),
        (("An update takes <!--", "<!--"), "begins the line"),
    ],
)
def test_what_cannot_be_written_is_said_and_left(repository, capsys, broken, says):
    path = repository / "README.md"
    text = TEXT.replace(*broken)
    assert text != TEXT
    path.write_text(text)
    for way in ("--check", "--write", "--check"):
        assert bench(way) == 1
        assert says in capsys.readouterr().err
    if "end of bench" in says or "ends nothing" in says:
        assert path.read_text() == text


def test_a_repository_without_results_and_blocks_is_right(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    (tmp_path / "bench").mkdir()
    (tmp_path / "README.md").write_text("# Nothing measured yet\n")
    assert bench("--check") == 0
    (tmp_path / "README.md").write_text(TEXT)
    assert bench("--check") == 1


def test_this_repositorys_documents_show_what_is_stored():
    done = subprocess.run(
        [sys.executable, "bench/tables.py", "--check"],
        cwd=ROOT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


# A new run against what is stored.


def verdicts(printed: str) -> dict[tuple[str, str], str]:
    rows = [line.strip("| ").split(" | ") for line in printed.splitlines() if line.startswith("| ")][2:]
    return {(row[0], row[1]): row[-1] for row in rows}


def new_run(
    repository: Path, ratios: dict[str, float], *, device: str = CPU, spread: float = 0.02, **head: Any
) -> Path:
    folder = repository / "new"
    store(folder, "update", group("update, size S", ratios, spread=spread), device, **head)
    return folder


def test_the_same_results_are_no_loss(repository, capsys):
    assert bench("--compare", repository / "bench/results") == 0
    found = verdicts(capsys.readouterr().out)
    assert set(found.values()) == {"ok"}
    assert ("update along B", "32") in found
    assert not any(name in ("eager fp32", "16", "XS", "NCHW") for _, name in found)


def test_a_loss_beyond_the_noise_fails(repository, capsys):
    folder = new_run(repository, UPDATE | {"compiled bf16": 0.55, "compiled fp32": 0.95})
    assert bench("--compare", folder) == 1
    printed = capsys.readouterr()
    assert verdicts(printed.out) == {
        ("update, size S", "compiled fp32"): "ok",  # 9 % more
        ("update, size S", "compiled bf16"): "lost",  # 20 % more
    }
    assert printed.err.splitlines() == [
        "update, size S, compiled bf16: 0.55 (0.54–0.56) of the baseline's time, stored is 0.46 (0.45–0.47)"
    ]


def test_a_cpus_spread_excuses_what_a_gpus_does_not(repository):
    slower = UPDATE | {"compiled bf16": 0.55}
    assert bench("--compare", new_run(repository, slower, spread=0.1)) == 0
    store(repository / "bench/results" / GPU, "update", group("update, size S", UPDATE), GPU)
    assert bench("--compare", new_run(repository, slower, spread=0.1, device=GPU)) == 1
    assert bench("--compare", new_run(repository, UPDATE | {"compiled bf16": 0.5}, device=GPU)) == 0


@pytest.mark.parametrize(("ratio", "code"), [(0.62, 0), (0.71, 0), (0.72, 1)])
def test_another_cpu_is_compared_with_the_most_lenient_one(repository, capsys, ratio, code):
    store(repository / "bench/results" / GPU, "update", group("update, size S", UPDATE | {"compiled bf16": 0.9}), GPU)
    folder = new_run(repository, UPDATE | {"compiled bf16": ratio}, device=OTHER)
    assert bench("--compare", folder) == code
    printed = capsys.readouterr().out
    assert printed.startswith(f"Nothing of this CPU is stored: compared with {CPU}, 50% allowed.\n")
    store(
        repository / "bench/results/Third", "update", group("update, size S", UPDATE | {"compiled bf16": 0.5}), "Third"
    )
    assert bench("--compare", folder) == 0


def test_new_groups_are_named_and_do_not_fail(repository, capsys):
    folder = new_run(repository, UPDATE | {"compiled fp8": 9.0}, torch="2.14.0")
    store(folder, "environments", group("steps", {"envpool": 1.0, "gymnasium": 7.0}))
    assert bench("--compare", folder) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("update: stored with torch 2.13.0, now 2.14.0.\n")
    found = verdicts(printed)
    assert found["update, size S", "compiled fp8"] == "not stored"
    assert found["steps", "gymnasium"] == "not stored"
    assert found["update, size S", "compiled bf16"] == "ok"


def test_a_comparison_of_nothing_does_not_pass(repository, capsys):
    assert bench("--compare", new_run(repository, UPDATE, device=GPU)) == 2
    assert f"nothing of this run (device: {GPU}) is among what is stored (devices: {CPU})" in capsys.readouterr().err
    folder = repository / "other groups"
    store(folder, "environments", group("steps", {"envpool": 1.0, "gymnasium": 7.0}))
    assert bench("--compare", folder) == 2
    # Baselines alone compare nothing, nor does another baseline.
    only = repository / "baseline"
    store(only, "update", group("update, size S", {"eager fp32": 1.0}))
    assert bench("--compare", only) == 2
    store(only, "update", group("update, size S", {"compiled fp32": 1.0, "compiled bf16": 0.4}))
    assert bench("--compare", only) == 2
    (repository / "empty").mkdir()
    assert bench("--compare", repository / "empty") == 2


# Pictures.


def test_pictures_show_bars_and_lines(repository, tmp_path, capsys):
    lonely = {"group": "lonely", "implementation": "a", "baseline": "b", "rounds": 5}
    store(repository / "bench/results" / CPU, "loop", [lonely])
    folder = tmp_path / "pictures/here"
    assert bench("--output", folder) == 0
    names = {path.name for path in folder.iterdir()}
    assert names == {f"{CPU}-{name}.png" for name in ("kernels", "scaling-B", "scaling-size", "update")}
    assert capsys.readouterr().err.count(".png") == 4
    for path in folder.iterdir():
        with Image.open(path) as image:
            colours = image.convert("RGB").getcolors(maxcolors=2**24)
            assert image.width > 500
            # The first colours of the style that the colour-blind tell apart: drawn, not only framed.
            assert any(count > 50 and colour == (0, 107, 164) for count, colour in colours or [])


def test_bars_and_lines_are_where_the_ratios_are(repository):
    modules = {module.name: module for module in tables.load(repository / "bench/results")}
    (axes,) = tables._bars(modules["update"], modules["update"].groups()).axes
    widths = sorted(round(bar.get_width(), 4) for bar in axes.patches)  # pyright: ignore[reportAttributeAccessIssue]
    assert widths == sorted([*UPDATE.values(), 1.0, 0.9, 1.0, 0.9, 1.0, 0.031])
    (axes,) = tables._lines(modules["scaling"], "B").axes
    assert np.array(axes.lines[0].get_xydata()).tolist() == [[8, 0.55], [16, 1.0], [32, 1.9]]


# Bad input.


@pytest.mark.parametrize("way", [["--results"], ["--check", "--results"], ["--compare"]])
def test_no_such_folder(repository, capsys, way):
    assert bench(*way, repository / "nowhere") == 2
    assert "nowhere is no folder of results" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text",
    [
        "{", "[]", "{}", '{"device": "x", "results": [{}]}', '{"device": "x", "results": 3}',
        '{"device": "x", "results": [{"group": "g", "implementation": "a", "baseline": "b", "ratio": 1}]}',
        '{"device": "x", "results": [{"group": "g", "implementation": "a", "baseline": "b", "ratio": 2, '
        '"ratio_low": 1, "ratio_high": 1.5}]}',
        '{"device": "x", "results": [{"group": "g", "implementation": 3, "baseline": "b"}]}',
    ],
)  # fmt: skip
def test_a_file_that_no_benchmark_wrote(repository, capsys, text):
    (repository / "bench/results" / CPU / "update.json").write_text(text)
    for way in ([], ["--check"], ["--compare", repository / "bench/results"]):
        assert bench(*way) == 2
        error = capsys.readouterr().err
        assert "update.json is not what a benchmark stores" in error
        assert len(error.splitlines()) == 1


def test_unknown_device_and_nothing_stored_and_no_repository(repository, tmp_path, monkeypatch, capsys):
    assert bench("--device", "Quantum") == 2
    assert capsys.readouterr().err == f"error: --device Quantum has nothing stored: take one of {CPU}.\n"
    store(repository / "bench/results/copied", "update", group("update, size S", UPDATE))
    assert bench() == 2
    assert f"has update.json of {CPU} twice" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert bench("--results", tmp_path / "empty") == 2
    assert "nothing is stored" in capsys.readouterr().err
    monkeypatch.setattr(tables, "ROOT", tmp_path / "site-packages")
    for way in ([], ["--check"], ["--results", tmp_path / "empty", "--write"]):
        assert bench(*way) == 2
        assert "no part of an installed fastdreamer" in capsys.readouterr().err


def test_ways_exclude_each_other(repository):
    with pytest.raises(SystemExit) as stopped:
        bench("--check", "--write")
    assert stopped.value.code == 2


def test_pictures_that_cannot_be_written(repository, tmp_path, capsys):
    (tmp_path / "taken").write_text("")
    assert bench("--output", tmp_path / "taken") == 2
    assert "name another folder by --output" in capsys.readouterr().err
