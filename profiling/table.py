"""What a trace says of each part: its time, how much it launched, how long nothing ran, how often the host waited."""

import bisect
import gzip
import json
import tempfile
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import parts
import torch
import updates
from parts import BACKWARD, HALVES, PARTS, REST

from fastdreamer.config import Config
from fastdreamer.run.trainer import Trainer
from fastdreamer.run.workload import ready

Event = dict[str, Any]
"""Of a Chrome trace: `cat`, `name`, `tid`, `ts` and `dur` in microseconds, `args`."""
NAMES = [name + way for name in (*PARTS, *HALVES, REST) for way in ("", BACKWARD)]
IDLE = {
    "aten::as_strided", "aten::view", "aten::alias", "aten::detach", "aten::_unsafe_view", "aten::_reshape_alias",
    "aten::empty", "aten::empty_strided", "aten::empty_like", "aten::lift_fresh", "aten::resolve_conj",
    "aten::resolve_neg", "aten::set_", "aten::resize_", "aten::_local_scalar_dense", "aten::item",
    "aten::is_nonzero", "aten::t", "aten::transpose", "aten::permute", "aten::expand", "aten::expand_as",
    "aten::unsqueeze", "aten::squeeze", "aten::select", "aten::slice", "aten::narrow", "aten::unbind",
    "aten::split", "aten::split_with_sizes", "aten::chunk", "aten::unflatten", "aten::flatten", "aten::reshape",
    "aten::view_as", "aten::broadcast_to", "aten::to", "aten::contiguous",
}  # fmt: skip
"""Operators that compute nothing themselves: views, empty tensors, reading a scalar."""
WORK = ("aten::", "fastdreamer::", "## Call CompiledFxGraph")
"""What an operator's name begins with. Other events are autograd's and the compiler's wrappers around them."""
WAITS = {"cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy"}


@dataclass
class Row:
    """Of one part, in microseconds. `gap`: of its `time`, when nothing ran."""

    part: str
    time: float = 0.0
    launches: int = 0
    gap: float = 0.0
    syncs: int = 0


@dataclass(frozen=True)
class Table:
    """`on_gpu`: times are the device's, and a launch is a kernel or a copy; else they are the process's and a launch is
    an operator that computes. The rows' times add up to all that was traced."""

    rows: list[Row]
    on_gpu: bool
    updates: int

    @property
    def total(self) -> float:
        return sum(row.time for row in self.rows)

    def shares(self) -> dict[str, float]:
        return {row.part: row.time / self.total for row in self.rows}


def trace(trainer: Trainer, count: int, warm: int | None, output: Path) -> Table:
    """Profiles `count` updates with a decision each, and writes the trace to `output` (.json or .json.gz)."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if trainer.parts.device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    once = updates.warmed(trainer, warm)
    with torch.profiler.profile(activities=activities) as profile, parts.marked(trainer, *parts.recorded()):
        for _ in range(count):
            once()
        updates.wait(trainer)
    profile.export_chrome_trace(str(output))
    return summarise(read(output), count)


def traced(config: Config, count: int, warm: int | None) -> Table:
    """As `trace`, of a run of its own, and without a file that stays."""
    with tempfile.TemporaryDirectory() as folder, ready(config) as trainer:
        return trace(trainer, count, warm, Path(folder) / "trace.json.gz")


def read(path: Path) -> list[Event]:
    """The complete events of a trace, gzipped or not."""
    data = path.read_bytes()
    trace = json.loads(gzip.decompress(data) if path.suffix == ".gz" else data)
    return [event for event in trace["traceEvents"] if event.get("ph") == "X"]


def summarise(events: Iterable[Event], updates: int) -> Table:
    """One row for each part that ran, in the order of an update."""
    by_category: dict[str, list[Event]] = defaultdict(list)
    for event in sorted(events, key=lambda event: (event["ts"], -event["dur"])):
        by_category[event.get("cat", "")].append(event)
    ranges = Ranges([event for event in by_category["user_annotation"] if event["name"] in NAMES])
    device = sorted(
        (event for cat in ("kernel", "gpu_memcpy", "gpu_memset") for event in by_category[cat]), key=lambda e: e["ts"]
    )
    rows = {name: Row(name) for name in NAMES}
    runtime = by_category["cuda_runtime"] + by_category["cuda_driver"]
    if device:
        _device(device, runtime, ranges, rows)
    else:
        _host(by_category["cpu_op"], ranges, rows)
    ran = [replace(row) for row in rows.values() if row.time or row.launches]
    return Table(ran, bool(device), updates)


class Ranges:
    """Which part is open on a thread at a time."""

    def __init__(self, events: list[Event]):
        self.events = events
        self._of_thread: dict[Any, list[Event]] = defaultdict(list)
        for event in events:
            self._of_thread[event["tid"]].append(event)
        self._starts = {thread: [event["ts"] for event in own] for thread, own in self._of_thread.items()}

    def at(self, thread: Any, time: float) -> str | None:
        """None where nothing is open: outside of what was profiled, or on a thread that no part has reached."""
        own = self._of_thread.get(thread, [])
        index = bisect.bisect_right(self._starts.get(thread, []), time) - 1
        if index < 0 or time > own[index]["ts"] + own[index]["dur"]:
            return None
        return own[index]["name"]


def _device(device: list[Event], runtime: list[Event], ranges: Ranges, rows: dict[str, Row]) -> None:
    launched = {event["args"].get("correlation"): event for event in runtime}
    until = device[0]["ts"]
    for event in device:
        launch = launched.get(event["args"].get("correlation"))
        row = rows[(ranges.at(launch["tid"], launch["ts"]) if launch else None) or REST]
        end = event["ts"] + event["dur"]
        # What overlaps with a part on another stream is counted once; idle time before it is its own.
        row.gap += max(0.0, event["ts"] - until)
        row.time += max(0.0, end - until)
        row.launches += 1
        until = max(until, end)
    for event in runtime:
        part = ranges.at(event["tid"], event["ts"])
        if event["name"] in WAITS and part is not None:
            rows[part].syncs += 1


def _host(operators: list[Event], ranges: Ranges, rows: dict[str, Row]) -> None:
    for event in ranges.events:
        rows[event["name"]].time += event["dur"]
        rows[event["name"]].gap += event["dur"]
    working = [event for event in operators if event["name"].startswith(WORK)]
    parents: dict[Any, list[Event]] = defaultdict(list)
    inner = set()
    for event in working:
        part, stack = ranges.at(event["tid"], event["ts"]), parents[event["tid"]]
        while stack and stack[-1]["ts"] + stack[-1]["dur"] <= event["ts"]:
            stack.pop()
        if event["name"] not in IDLE:
            inner.update(map(id, stack))
        if not stack and part is not None:
            rows[part].gap -= event["dur"]
        stack.append(event)
    for event in working:
        part = ranges.at(event["tid"], event["ts"])
        if part is None:
            continue
        rows[part].syncs += event["name"] == "aten::_local_scalar_dense"
        rows[part].launches += id(event) not in inner and event["name"] not in IDLE


def lines(table: Table) -> list[str]:
    """The table as text, for one update and one decision. Times of a CPU are given as shares alone."""
    head = (
        f"{'part':<18}{'share':>8}"
        + (f"{'ms':>10}" if table.on_gpu else "")
        + f"{'launches':>10}{'gaps':>8}{'syncs':>7}"
    )
    total = Row("all")
    out = [head]
    for row in table.rows:
        total.time, total.gap = total.time + row.time, total.gap + row.gap
        total.launches, total.syncs = total.launches + row.launches, total.syncs + row.syncs
    for row in (*table.rows, total):
        ms = f"{row.time / table.updates / 1e3:>10.3f}" if table.on_gpu else ""
        gap = row.gap / row.time if row.time else 0.0
        out.append(
            f"{row.part:<18}{row.time / table.total:>8.1%}{ms}{row.launches / table.updates:>10.0f}{gap:>8.1%}"
            f"{row.syncs / table.updates:>7.0f}"
        )
    return out
