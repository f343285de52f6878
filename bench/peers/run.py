"""Published Dreamers beside ours: `python bench/peers/run.py NAME=PATH_OR_PACKAGE ...`.

The same synthetic batch and shapes, each in a process of its own. One peer after another takes turns with ours, update
by update, so that a ratio is of the same minutes. README.md beside this file says how to get the peers and what is
compared.
"""

import argparse
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
if __name__ == "__main__":
    # This folder would hide the installed packages that its modules are named after.
    sys.path[0] = str(ROOT)

GIVEN = os.environ.copy()
"""What a peer's process inherits. OpenMP's threads wait there as its users' do: ours says how its own wait."""

import numpy as np  # noqa: E402

from bench.conftest import clocks, device_name, output_of, provenance  # noqa: E402
from bench.peers.protocol import Spec, Variant  # noqa: E402
from fastdreamer.config import SIZES, BadInput  # noqa: E402
from fastdreamer.runtime.device import choose_device  # noqa: E402
from fastdreamer.runtime.graphs import Captured  # noqa: E402

PEERS = {
    "r2dreamer": "bench.peers.r2dreamer",
    "dreamerv3-torch": "bench.peers.dreamerv3_torch",
    "torchrl": "bench.peers.torchrl",
    "jax-dreamerv3": "bench.peers.jax_dreamerv3",
}
OURS = "bench.peers.ours"
COMPILED, DREAMERV3, EAGER = "fastdreamer --compile", "fastdreamer --compile, DreamerV3", "fastdreamer eager fp32"
REFERENCES = {COMPILED: ("mudreamer", ""), DREAMERV3: ("dreamerv3", ""), EAGER: ("mudreamer", "eager fp32")}
TRAIN_RATIO, ACTION_REPEAT = 512, 2
WARM = {"cpu": 2, "cuda": Captured.WARM + 1}
"""Updates before the first that counts; decisions, too."""


class Gone(Exception):
    """A process has no answer to give. The message is one line."""


class Lost(Exception):
    """One of ours has no answer to give: nothing can be compared any more. The message is one line."""


class Worker:
    """A peer's process, which does something only while it is asked."""

    def __init__(self, name: str, adapter: str, spec: Spec, *, python: str, patience: float):
        self.name, self.patience = name, patience
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115
        environment = GIVEN | {"PYTHONUNBUFFERED": "1"}
        try:
            self.process = subprocess.Popen(
                [python, str(Path(__file__).parent / "worker.py"), adapter], env=environment,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True,
            )  # fmt: skip
        except OSError as error:
            raise Gone(f"{python} does not start: {error.strerror}") from None
        try:
            ready = self._exchange(spec.dumps())["ready"]
        except BaseException:
            self.close()
            raise
        self.parameters, self.runs, self.versions = ready["parameters"], ready["runs"], ready["versions"]

    def ask(self, do: str, times: int = 1) -> float:
        """Seconds of one. Raises Gone."""
        return self._exchange(json.dumps({"do": do, "times": times}))["seconds"]

    def _exchange(self, line: str) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            print(line, file=self.process.stdin, flush=True)
        except OSError:
            raise Gone(f"its process ended: {self._last_error()}") from None
        if not select.select([self.process.stdout], [], [], self.patience)[0]:
            raise Gone(f"no answer in {self.patience:.0f} s (--patience)")
        answer = self.process.stdout.readline()
        if not answer:
            self.process.wait()
            raise Gone(f"its process ended: {self._last_error()}")
        message = json.loads(answer)
        if "missing" in message:
            raise Gone(f"misses something: {message['missing']}")
        return message

    def _last_error(self) -> str:
        self.errors.seek(0)
        lines = [line.strip() for line in self.errors.read().decode(errors="replace").splitlines() if line.strip()]
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=10)
        code = self.process.poll()
        if code == -signal.SIGKILL:
            return "killed, for want of memory as it seems"
        return lines[-1] if lines else f"exit code {code}, and nothing said"

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout, self.errors):
            if pipe is not None:
                with suppress(BrokenPipeError):
                    pipe.close()


@dataclass
class Entry:
    """One row of the tables."""

    name: str
    worker: Worker
    own: bool = True
    first: int = 0
    """How many rounds the references had behind them at its first."""
    updates: list[float] = field(default_factory=list)
    decisions: list[float] = field(default_factory=list)

    def frames(self, spec: Spec) -> np.ndarray:
        """Seconds an environment frame, end to end, of each round."""
        updates = TRAIN_RATIO / (spec.batch_size * spec.batch_length)
        return (np.array(self.decisions) / spec.envs + updates * np.array(self.updates)) / ACTION_REPEAT


def fastest(
    name: str,
    adapter: str,
    spec: Spec,
    *,
    python: str,
    patience: float,
    base: Worker,
    times: int,
    skip: Sequence[str],
    opened: ExitStack,
) -> list[Entry]:
    """A peer's variants one after another; of each model the fastest of its own is kept, and the fastest with each
    precision from outside. Each says in a line what it took, or why it could not. `opened` closes what is kept.
    Raises Lost."""
    kept: dict[tuple[str, str], tuple[float, Entry]] = {}
    for variant in importlib.import_module(adapter).variants(spec.device):
        title, worker = f"{name}, {variant.name}", None
        if any(text in title for text in skip):
            print(f"{title}: left out (--skip)", flush=True)
            continue
        try:
            worker = start(title, adapter, spec, variant, python=python, patience=patience)
            opened.callback(worker.close)
            share = first_look(worker, base, times)
        except Gone as error:
            print(f"{title}: {error}", flush=True)
            if worker is not None:
                worker.close()
            continue
        print(f"{title}: {share:.2f} of the time of {COMPILED}, at a first look", flush=True)
        key = variant.model, "" if variant.own else variant.way.partition(" ")[2]
        if key in kept and kept[key][0] <= share:
            worker.close()
            continue
        if key in kept:
            kept[key][1].worker.close()
        kept[key] = share, Entry(title, worker, variant.own)
    return [entry for _, entry in kept.values()]


def first_look(worker: Worker, base: Worker, times: int) -> float:
    """A worker's time over ours, roughly. Raises Gone, and Lost where ours is gone."""
    own, ours = [], []
    for _ in range(2):
        own.append(worker.ask("update", times))
        try:
            ours.append(base.ask("update", times))
        except Gone as error:
            raise Lost(f"{COMPILED}: {error}") from None
    return min(own) / min(ours)


def start(title: str, adapter: str, spec: Spec, variant: Variant, *, python: str, patience: float) -> Worker:
    """A warm worker. Raises Gone."""
    spec = replace(spec, model=variant.model, way=variant.way)
    worker = Worker(title, adapter, spec, python=python, patience=patience)
    try:
        for do in ("update", "act"):
            worker.ask(do, WARM[spec.device])
    except BaseException:
        worker.close()
        raise
    return worker


def take_turns(references: list[Entry], peers: list[Entry], rounds: int, times: int) -> list[Entry]:
    """In each round everyone makes an update and decisions, in turn. Gives back the peers that came to the end.

    Raises Lost where a reference does not.
    """
    for entry in peers:
        entry.first = len(references[0].updates)
    alive = [*references, *peers]
    for _ in range(rounds):
        for entry in list(alive):
            try:
                update, decision = entry.worker.ask("update", times), entry.worker.ask("act", 10)
            except Gone as error:
                if entry in references:
                    raise Lost(f"{entry.name}: {error}") from None
                print(f"{entry.name}: {error}", flush=True)
                alive.remove(entry)
                continue
            entry.updates.append(update)
            entry.decisions.append(decision)
    return [entry for entry in peers if entry in alive]


def results(entries: list[Entry], spec: Spec, timed: bool) -> list[dict[str, Any]]:
    """For an update and for a frame, each entry's time over that of the two references, round by round."""
    named = {entry.name: entry for entry in entries}
    found = []
    for baseline in (COMPILED, DREAMERV3):
        suffix = f"size {spec.size}{', DreamerV3' if baseline == DREAMERV3 else ''}"
        for group, of in (
            (f"update beside peers, {suffix}", lambda entry: np.array(entry.updates)),
            (f"frame end to end beside peers, {suffix}", lambda entry: entry.frames(spec)),
        ):
            for entry in entries:
                if entry is not named[baseline] and entry.name in REFERENCES and baseline == DREAMERV3:
                    continue
                times = of(entry)
                bases = of(named[baseline])[entry.first :][: len(times)]
                low, middle, high = np.quantile(times / bases, [0.2, 0.5, 0.8]).tolist()
                result = {
                    "group": group, "implementation": entry.name, "baseline": baseline, "ratio": round(middle, 4),
                    "ratio_low": round(low, 4), "ratio_high": round(high, 4), "rounds": len(times),
                    "parameters": entry.worker.parameters, "runs": entry.worker.runs,
                    "its own option": "yes" if entry.own else "no",
                }  # fmt: skip
                if timed:
                    low, middle, high = np.quantile(times, [0.2, 0.5, 0.8]).tolist()
                    result |= {"median_s": middle, "p20_s": low, "p80_s": high, "clocks": clocks()}
                found.append(result)
    return found


def show(found: list[dict[str, Any]]) -> None:
    for group in dict.fromkeys(result["group"] for result in found):
        members = [result for result in found if result["group"] == group]
        print(f"\n{group}: times the time of {members[0]['baseline']} (20 % to 80 % of the rounds)")
        width = max(len(result["implementation"]) for result in members)
        for result in members:
            spread = f"({result['ratio_low']:.2f} to {result['ratio_high']:.2f})"
            absolute = f"  {result['median_s'] * 1e3:.3f} ms" if "median_s" in result else ""
            print(
                f"  {result['implementation']:{width}}  {result['ratio']:6.2f} {spread:16}{absolute}  "
                f"{result['parameters']:>11,} parameters; {result['runs']}"
            )
        peers = [result for result in members if result["implementation"] not in REFERENCES]
        for own, which in (("yes", "as published"), ("no", "with a precision put around it from outside")):
            if mine := [result for result in peers if result["its own option"] == own]:
                best = min(mine, key=lambda result: result["ratio"])
                print(f"  the fastest peer {which}: {best['implementation']}, {best['ratio']:.2f}")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python bench/peers/run.py", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument(
        "peers", nargs="+", metavar="NAME=WHERE", help=f"of {', '.join(PEERS)}; a checkout's path or a package's name"
    )
    parser.add_argument("--size", default="S", choices=SIZES, help="ours, whose widths the peers get where they allow")
    parser.add_argument("--rounds", type=int, default=5, help="updates of each that count")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument(
        "--python", action="append", default=[], metavar="NAME=PATH", help="the interpreter that has what a peer needs"
    )
    parser.add_argument("--patience", type=float, default=600, help="seconds after which a variant is given up")
    parser.add_argument("--skip", action="append", default=[], metavar="TEXT", help="leave out variants so named")
    parser.add_argument("--json", metavar="FILE", help="store the result there")
    parser.add_argument("--store", action="store_true", help="store it in bench/results/<device>/peers.json")
    args = parser.parse_args(argv)
    args.peers = pairs(args.peers, "a peer", "a path or a package")
    args.python = pairs(args.python, "--python", "an interpreter's path")
    if args.rounds < 1 or args.patience <= 0:
        raise BadInput("--rounds and --patience must be positive.")
    for name, python in args.python.items():
        if not Path(python).is_file():
            raise BadInput(f"--python {name}={python}: there is no such interpreter; give the path of one.")
    for name, where in args.peers.items():
        check(name, where)
    return args


def pairs(values: Sequence[str], what: str, value: str) -> dict[str, str]:
    found = {}
    for pair in values:
        name, _, where = pair.partition("=")
        if not where:
            raise BadInput(f"{what} is given as NAME=WHERE, with {value}, and not as {pair}.")
        if name not in PEERS:
            raise BadInput(f"there is no peer {name}: use one of {', '.join(PEERS)}.")
        found[name] = where
    return found


def check(name: str, where: str) -> None:
    """Raises BadInput for a path that is not that peer's checkout. A package is looked for by the peer's process."""
    files = importlib.import_module(PEERS[name]).FILES
    folder = Path(where).expanduser()
    if not folder.is_dir():
        if not all(part.isidentifier() for part in where.split(".")):
            raise BadInput(f"{name}={where}: there is no such folder; give the path of a checkout of {name}.")
        return
    absent = [file for file in files if not (folder / file).exists()]
    if absent or not files:
        lacks = f"it has no {absent[0]}" if absent else "it is used as an installed package"
        raise BadInput(f"{name}={where} is no checkout of {name} ({lacks}): name another.")


def compare(args: argparse.Namespace, spec: Spec) -> dict[str, Any]:
    """Runs everyone. Raises Gone where fastdreamer itself does not run, Lost where it comes to no end."""
    times = 1 if spec.device == "cpu" else 10
    references: list[Entry] = []
    entries: list[Entry] = []
    try:
        for name, (model, way) in REFERENCES.items():
            variant = Variant(model, way)
            worker = start(name, OURS, spec, variant, python=sys.executable, patience=args.patience)
            references.append(Entry(name, worker))
        for name, where in args.peers.items():
            folder = Path(where).expanduser()
            here = replace(spec, where=str(folder.resolve()) if folder.is_dir() else where)
            python = args.python.get(name, sys.executable)
            # One peer at a time: what memory and caches have to hold besides ours.
            with ExitStack() as opened:
                peers = fastest(
                    name, PEERS[name], here, python=python, patience=args.patience, base=references[0].worker,
                    times=times, skip=args.skip, opened=opened,
                )  # fmt: skip
                if peers:
                    entries += take_turns(references, peers, args.rounds, times)
        if not references[0].updates:
            take_turns(references, [], args.rounds, times)
        alive = [*references, *entries]
        versions = {entry.name: entry.worker.versions for entry in alive}
        return {
            **provenance(),
            "shapes": {key: value for key, value in asdict(spec).items() if key not in ("where", "model", "way")},
            "peers": {name: commit(where) for name, where in args.peers.items()},
            "versions": versions,
            "results": results(alive, spec, timed=spec.device == "cuda"),
        }
    finally:
        for entry in references:
            entry.worker.close()


def commit(where: str) -> str | None:
    """Of a checkout, where git knows it."""
    folder = Path(where).expanduser()
    if not (folder / ".git").exists():
        return None
    return output_of("git", "-C", str(folder), "rev-parse", "HEAD")


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0; 2 with one sentence for bad input; 1 where fastdreamer itself does not run."""
    try:
        args = parse(sys.argv[1:] if argv is None else argv)
        device = choose_device(args.device).type
        spec = Spec("", "", "", device, args.size, asdict(SIZES[args.size]))
        print(
            f"B {spec.batch_size}, T {spec.batch_length}, H {spec.horizon}, 64x64 pixels, {spec.actions} actions, size "
            f"{args.size}, {device_name()}; a frame: (decision for {spec.envs} environments / {spec.envs} + "
            f"{TRAIN_RATIO} / (B T) updates) / action repeat {ACTION_REPEAT}, without the environment's own time",
            flush=True,
        )
        stored = compare(args, spec)
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (Gone, Lost) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    show(stored["results"])
    files = [Path(args.json)] if args.json else []
    if args.store:
        files.append(ROOT / "bench/results" / device_name() / "peers.json")
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(stored, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
