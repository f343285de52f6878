"""Traces updates and decisions with torch.profiler: a file for Perfetto (ui.perfetto.dev), and a table by part.

For each part of one update and one decision, its backward pass by itself: share of the time, launches (kernels and
copies on a GPU, operators that compute on a CPU), gaps (the share of its time when nothing ran: idle time of a GPU
before a kernel, on a CPU what no operator covers) and syncs (the host waited for the device; on a CPU: a scalar was
read).
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import table
import updates

from fastdreamer.config import SIZES, BadInput
from fastdreamer.run.workload import ready


def main(argv: Sequence[str] | None = None) -> None:
    parser = updates.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=tuple(SIZES), default="S")
    updates.add_way(parser)
    parser.add_argument("--output", type=Path, default=Path("trace.json.gz"), help="ends in .json or .json.gz")
    args = parser.parse_args(argv)
    if not args.output.name.endswith((".json", ".json.gz")):
        raise BadInput(f"--output {args.output} must end in .json or .json.gz.")
    if not args.output.parent.is_dir():
        raise BadInput(f"--output {args.output}: there is no folder {args.output.parent}; make it first.")
    with ready(updates.config_of(args, args.size)) as trainer:
        result = table.trace(trainer, args.updates, args.warm, args.output)
        precision = trainer.parts.runtime.precision
    way = "compiled" if args.compile else "eager"
    print(f"size {args.size}, {args.objective}, {way}, {precision}: one update, and a decision for {args.envs}")
    print("\n".join(table.lines(result)))
    print(f"{args.output} opens in ui.perfetto.dev")


if __name__ == "__main__":
    sys.exit(updates.failing(main))
