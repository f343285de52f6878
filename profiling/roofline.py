"""How near each part of an update comes to what the device allows: floors from counted bytes and products.

A part's floor is the longer of two times: its matrix products and convolutions at the device's matrix rate, and the
bytes it must move at the device's copy bandwidth. Must: weights once, what comes in and goes out once each way, what
convolutions read and write, for no processor holds a map, and nothing else of what a part makes for itself, its
backward pass included, which might compute it anew. A floor knows nothing of steps that wait for each other, so the
posterior's and imagination's 64 and 15 steps cannot reach theirs.

Rates are measured here, and the parts timed; with --device-rates they are a GPU's published peaks, nothing runs, and
floors are printed in milliseconds for every size.
"""

# First of all: it says how OpenMP's threads wait, which torch reads when it is loaded.
import fastdreamer  # noqa: F401

# isort: split
import argparse
import json
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import parts
import torch
import updates
from fastdreamer_kernels import ops
from parts import BACKWARD, REST
from table import NAMES, traced
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from fastdreamer.algorithm.agent import Agent
from fastdreamer.config import SIZES, BadInput, Config
from fastdreamer.envs.base import Spaces
from fastdreamer.envs.synthetic import ACTIONS
from fastdreamer.replay import Replay
from fastdreamer.run.workload import ready
from fastdreamer.runtime.device import choose_device, fast_bf16
from fastdreamer.runtime.graphs import Runtime

GATHERS = {"aten::index", "aten::index_select", "aten::gather", "aten::embedding"}
"""Operators that read of their first argument only as much as they give."""
CONVOLUTIONS = {"aten::convolution", "aten::convolution_backward"}
"""Operators whose tensors have to pass through memory, whoever made them."""
OVERWRITES = {"aten::copy_", "aten::_foreach_copy_", "aten::fill_", "aten::zero_"}
"""Operators that change a tensor without reading it."""
COPIED, ROUNDS = 2**28, 10
"""Bytes of the copy whose bandwidth is measured: far beyond any cache. And how often."""
SIDE = {"cpu": 2048, "cuda": 8192}
"""Rows and columns of the product whose rate is measured."""


@dataclass
class Work:
    """What a part has to do: operations of its products by their operands' dtype, bytes read and written at least."""

    flops: dict[str, int] = field(default_factory=dict)
    read: int = 0
    written: int = 0

    def seconds(self, rates: "Rates") -> tuple[float, float]:
        """The floors: by products, by bytes."""
        products = sum(count / rates.products[dtype] for dtype, count in self.flops.items())
        return products, (self.read + self.written) / rates.copy


@dataclass(frozen=True)
class Rates:
    """Of a device: bytes a second that a copy reads and writes, operations a second of products by dtype."""

    name: str
    copy: float
    products: Mapping[str, float]
    source: str


PUBLISHED = {
    name: Rates(name, copy, {"float32": tf32, "bfloat16": bf16}, "published peaks, not measured")
    for name, copy, tf32, bf16 in (
        ("A100", 2.04e12, 156e12, 312e12),
        ("H100", 3.35e12, 495e12, 989e12),
        ("H200", 4.8e12, 495e12, 989e12),
    )
}
"""Of the SXM boards, dense, float32 products in TF32 as the trainer sets it."""


class Count(TorchDispatchMode):
    """Counts the work of whichever part is open. Tensors may be fake."""

    def __init__(self, current: Callable[[], str]):
        super().__init__()
        self.current = current
        self.flops: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
        # Storages stay referenced, so that none is taken for another one that lies where it lay.
        self.storages: dict[int, Any] = {}
        self.owner: dict[int, str] = {}
        self.reads: dict[tuple[str, int], list[tuple[int, int]]] = defaultdict(list)
        self.writes: dict[tuple[str, int], list[tuple[int, int]]] = defaultdict(list)

    def own(self, tensor: Tensor, part: str) -> None:
        """A tensor that is a part's own scratch: what it writes and reads of it is no traffic."""
        self.owner[self._storage(tensor)] = part

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        part, results = self.current(), [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        if (formula := flop_registry.get(func._overloadpacket)) is not None:
            operand = next(x for x in tree_leaves(args) if isinstance(x, Tensor))
            self.flops[part][str(operand.dtype).removeprefix("torch.")] += formula(*args, **kwargs, out_val=result)
        # What a function allocates is its part's, what it changes in place was there before.
        given = [*args, *kwargs.values()]
        changed = [
            given[i] if i < len(args) else kwargs.get(argument.name)
            for i, argument in enumerate(func._schema.arguments)
            if argument.alias_info is not None
            and argument.alias_info.is_write
            and (i < len(args) or argument.name in kwargs)
        ]
        changed = [x for x in tree_leaves(changed) if isinstance(x, Tensor)]
        if func.is_view or not (results or changed):
            return result
        overwritten = {id(x) for x in changed} if func._schema.name in OVERWRITES else set()
        most = results[0].numel() if func._schema.name in GATHERS else None
        for i, tensor in enumerate(x for x in tree_leaves(given) if isinstance(x, Tensor)):
            if id(tensor) not in overwritten:
                self._read(part, tensor, most if i == 0 else None, own=func._schema.name in CONVOLUTIONS)
        for tensor in changed:
            key = self._storage(tensor)
            if self.owner.get(key) != part:
                self.writes[part, key].append(extent(tensor))
        for tensor in results:
            self.owner.setdefault(self._storage(tensor), part)
            if func._schema.name in CONVOLUTIONS:
                self.writes[part, self._storage(tensor)].append(extent(tensor))
        return result

    def _read(self, part: str, tensor: Tensor, most: int | None, *, own: bool) -> None:
        key, span = self._storage(tensor), extent(tensor)
        if most is not None:
            span = (span[0], min(span[1], span[0] + most * tensor.element_size()))
        # Until something has made it, a storage was there before all parts.
        maker = self.owner.setdefault(key, "")
        if maker == part or maker + BACKWARD == part or span in self.writes.get((part, key), ()):
            if own:
                self.reads[part, key].append(span)
            return
        self.reads[part, key].append(span)
        if maker:
            self.writes[maker, key].append(span)

    def _storage(self, tensor: Tensor) -> int:
        storage = tensor.untyped_storage()
        self.storages.setdefault(storage._cdata, storage)
        return storage._cdata

    def work(self) -> dict[str, Work]:
        """By part, in an update's order."""
        found = {part: Work(dict(self.flops.get(part, {}))) for part in NAMES}
        for (part, _), spans in self.reads.items():
            found[part].read += covered(spans)
        for (part, _), spans in self.writes.items():
            found[part].written += covered(spans)
        return {part: work for part, work in found.items() if work.flops or work.read or work.written}


def extent(tensor: Tensor) -> tuple[int, int]:
    """First byte of a tensor in its storage, and the one after its last; of gaps between only what rows leave."""
    size, start = tensor.element_size(), int(tensor.storage_offset()) * tensor.element_size()
    if not tensor.numel():
        return start, start
    last = sum(int(n - 1) * int(stride) for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return start, start + (last + 1) * size


def covered(spans: list[tuple[int, int]]) -> int:
    """Bytes that lie in any of the spans."""
    total, until = 0, 0
    for start, end in sorted(set(spans)):
        total += max(0, end - max(start, until))
        until = max(until, end)
    return total


def count(config: Config, precision: str) -> dict[str, Work]:
    """The work of one update and one decision by part, counted on tensors without memory."""
    spaces = Spaces(image=True, vector=0, action=ACTIONS["continuous"], discrete=False)
    optim, envs = config.optim, config.env.envs
    runtime = Runtime(torch.device("cpu"), precision=precision, say=lambda _: None)  # pyright: ignore[reportArgumentType]
    marks = parts.Parts(lambda name: name, lambda _: None)
    counter = Count(lambda: marks.current)
    # Drawing weights takes a look at what was drawn, which only "meta" goes without.
    with torch.device("meta"):
        agent = Agent(spaces, config, runtime.operations(ops.load("reference")))
    with FakeTensorMode():
        agent._apply(lambda t: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype))
        optimizers = agent.make_optimizers()
        replay = Replay(spaces, envs, config.replay.replay_capacity, images=torch.float32)
        row = {name: torch.zeros(envs, *each.shape[2:], dtype=each.dtype) for name, each in replay.fields.items()}
        carry = agent.initial_carry(envs, torch.device("cpu"))
        for optimizer in optimizers:
            counter.own(optimizer.grad, "optimise")
        parts.attach(marks, agent, optimizers)
        draws = torch.Generator()
        try:
            marks.begin()
            with counter, runtime.autocast():
                with marks.open("sample"):
                    uniform = torch.rand(optim.batch_size, dtype=torch.float64, generator=draws)
                    batch = replay.sample(uniform, optim.batch_length)
                agent.update(batch, agent.draw_update_noise(draws), optimizers)
                with marks.open("act"):
                    agent.act(row, carry, agent.draw_act_noise(envs, draws))
                with marks.open("copy"):
                    replay.add(row)
        finally:
            marks.end()
    return counter.work()


def measured_rates(device: torch.device) -> Rates:
    """What this device reaches on a large copy and on large products."""
    source = torch.ones(COPIED // 4, device=device)
    target = torch.empty_like(source)
    # Read and written
    copy = 2 * COPIED / quickest(lambda: target.copy_(source), device)
    side, products = SIDE[device.type], {}
    for dtype in (torch.float32, torch.bfloat16):
        if dtype == torch.bfloat16 and not fast_bf16(device):
            continue
        left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        products[str(dtype).removeprefix("torch.")] = 2 * side**3 / quickest(lambda a=left, b=right: a @ b, device)
    products.setdefault("bfloat16", products["float32"])
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "a CPU"
    return Rates(name, copy, products, "measured")


def quickest(call: Callable[[], Any], device: torch.device) -> float:
    """Seconds of the fastest of some calls: a floor must not be raised by what disturbed one."""
    times = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return min(times)


def timed(config: Config, turns: int, warm: int | None) -> dict[str, float]:
    """Seconds of each part of one update and one decision: their sum as it is, shared out as a trace says."""
    with ready(config) as trainer:
        once, times = updates.warmed(trainer, warm), []
        for _ in range(turns):
            began = time.perf_counter()
            once()
            updates.wait(trainer)
            times.append(time.perf_counter() - began)
    shares = traced(config, turns, warm).shares()
    return {part: share * statistics.median(times) for part, share in shares.items()}


@dataclass(frozen=True)
class Line:
    """A part's floors, by products and by bytes, and its time where it was timed, in seconds."""

    part: str
    products: float
    bytes: float
    time: float | None = None

    @property
    def floor(self) -> float:
        return max(self.products, self.bytes)

    @property
    def bound(self) -> str:
        return "products" if self.products > self.bytes else "bytes"


def compare(work: Mapping[str, Work], rates: Rates, times: Mapping[str, float] | None) -> list[Line]:
    """One line for each part, and one for all of them."""
    found = []
    for part in [name for name in NAMES if name in work or name in (times or {})]:
        products, moved = work.get(part, Work()).seconds(rates)
        found.append(Line(part, products, moved, times.get(part) if times else None))
    sums = Line(
        "all", sum(line.products for line in found), sum(line.bytes for line in found),
        sum(times.values()) if times else None,
    )  # fmt: skip
    return [*found, sums]


def floor_of(lines: list[Line]) -> float:
    """Of all parts one after the other."""
    return sum(line.floor for line in lines[:-1])


def text(lines: list[Line], gpu: bool) -> list[str]:
    """Achieved / floor of every part. Of a CPU shares and ratios alone."""
    out = [
        f"{'part':<18}{'share':>8}{'floor / time':>14}  {'bound by':<10}"
        + (f"{'ms':>9}{'floor ms':>10}" if gpu else "")
    ]
    whole = lines[-1].time or 0.0
    for line in lines:
        floor, taken = floor_of(lines) if line.part == "all" else line.floor, line.time or 0.0
        ratio = f"{floor / taken:>14.1%}" if taken else f"{'not seen':>14}"
        ms = f"{taken * 1e3:>9.3f}{floor * 1e3:>10.3f}" if gpu else ""
        out.append(f"{line.part:<18}{taken / whole:>8.1%}{ratio}  {line.bound if floor else '-':<10}{ms}".rstrip())
    return out


def floors_text(by_size: Mapping[str, list[Line]]) -> list[str]:
    """Floors in milliseconds, one column for each size, p or b for what binds."""
    out = [f"{'floor, ms':<18}" + "".join(f"{size:>11}" for size in by_size)]
    found = {size: {line.part: line for line in lines} for size, lines in by_size.items()}
    for part in [name for name in (*NAMES, "all") if any(name in lines for lines in found.values())]:
        cells = []
        for size, lines in found.items():
            line = lines.get(part)
            if line is None:
                cells.append(f"{'-':>11}")
                continue
            floor = floor_of(by_size[size]) if part == "all" else line.floor
            cells.append(f"{floor * 1e3:>9.4f} {line.bound[0]}")
        out.append(f"{part:<18}" + "".join(cells))
    return out


def draw(by_size: Mapping[str, list[Line]], rates: Rates, gpu: bool, path: Path) -> None:
    """Horizontal bars for each part: floor by products, floor by bytes, and the time where it was taken."""
    from matplotlib.figure import Figure

    rows = max(len(lines) for lines in by_size.values())
    figure = Figure(figsize=(6 * len(by_size), 1.2 + 0.32 * rows), layout="constrained")
    for axes, (size, lines) in zip(figure.subplots(1, len(by_size), squeeze=False)[0], by_size.items(), strict=True):
        shown = [line for line in lines if line.part not in ("all", REST)][::-1]
        whole = lines[-1].time
        unit = 1e3 if whole is None or gpu else 1 / whole
        bars = [("floor by products", [line.products for line in shown]), ("floor by bytes", [x.bytes for x in shown])]
        if whole is not None:
            bars.append(("measured", [line.time or 0.0 for line in shown]))
        for i, (label, values) in enumerate(bars):
            places = [place + (1 - i) * 0.27 for place in range(len(shown))]
            axes.barh(places, [value * unit for value in values], height=0.27, label=label)
        axes.set_yticks(range(len(shown)), [line.part for line in shown])
        axes.set_xscale("log")
        axes.set_xlabel("ms" if whole is None or gpu else "share of an update and a decision")
        axes.set_title(f"size {size}, {rates.name} ({rates.source})")
        axes.legend()
    figure.savefig(path, dpi=120)


def as_json(
    by_size: Mapping[str, list[Line]], work: Mapping[str, Mapping[str, Work]], rates: Rates, times: bool
) -> dict[str, Any]:
    """Everything counted; `times`: and the seconds and rates, which are a GPU's alone."""
    sizes = {}
    for size, lines in by_size.items():
        whole = lines[-1].time
        entries = []
        for line in lines:
            counted = work[size].get(line.part)
            floor = floor_of(lines) if line.part == "all" else line.floor
            entry: dict[str, Any] = {"part": line.part, "bound": line.bound} | (asdict(counted) if counted else {})
            if times:
                entry |= {"floor by products": line.products, "floor by bytes": line.bytes, "floor": floor}
            if line.time is not None and whole:
                entry |= {"share": line.time / whole, "floor / time": floor / line.time if line.time else None}
                if times:
                    entry["time"] = line.time
            entries.append(entry)
        sizes[size] = entries
    head = {"device": rates.name, "rates": rates.source}
    return head | ({"copy": rates.copy, "products": dict(rates.products)} if times else {}) | {"sizes": sizes}


def sizes_of(argument: str) -> list[str]:
    chosen = argument.split(",")
    if unknown := [size for size in chosen if size not in SIZES]:
        raise BadInput(f"--sizes {argument}: {unknown[0] or 'an empty name'} is none of {', '.join(SIZES)}.")
    return list(dict.fromkeys(chosen))


def main(argv: Sequence[str] | None = None) -> None:
    parser = updates.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", "--size", default="S", help="one or more, with commas: S,M,L,XL")
    updates.add_way(parser)
    parser.add_argument("--device-rates", choices=tuple(PUBLISHED), help="floors from published peaks; nothing runs")
    parser.add_argument("--output", type=Path, default=Path("roofline.png"), help="the picture: .png, .svg or .pdf")
    parser.add_argument("--json", type=Path, help="all numbers, as JSON")
    args = parser.parse_args(argv)
    sizes = sizes_of(args.sizes)
    if args.output.suffix not in (".png", ".svg", ".pdf"):
        raise BadInput(f"--output {args.output} must end in .png, .svg or .pdf.")
    for option, path in (("--output", args.output), ("--json", args.json)):
        if path is not None and not path.parent.is_dir():
            raise BadInput(f"{option} {path}: there is no folder {path.parent}; make it first.")
    device = choose_device("auto")
    gpu = args.device_rates is not None or device.type == "cuda"
    by_size, works = {}, {}
    rates = PUBLISHED[args.device_rates] if args.device_rates else measured_rates(device)
    for size in sizes:
        config = updates.config_of(args, size)
        precision = args.precision
        if precision == "auto":
            narrow = args.device_rates or (fast_bf16(device) and (gpu or (args.compile and size != "tiny")))
            precision = "bf16" if narrow else "fp32"
        works[size] = count(config, precision)
        times = None if args.device_rates else timed(config, args.updates, args.warm)
        by_size[size] = compare(works[size], rates, times)
        if times is not None:
            print(
                f"size {size}, {args.objective}, {'compiled' if args.compile else 'eager'}, {precision}, {rates.name}"
            )
            print("\n".join(text(by_size[size], gpu)))
    if args.device_rates:
        print(f"{rates.name}, {rates.source}; {args.objective}, B 16, T 64, H 15")
        print("\n".join(floors_text(by_size)))
    draw(by_size, rates, gpu, args.output)
    if args.json is not None:
        args.json.write_text(json.dumps(as_json(by_size, works, rates, gpu), indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(updates.failing(main))
