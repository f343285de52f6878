"""`python -m fastdreamer_kernels`: what there is, and which implementation `auto` takes on this machine.

`--table` prints the table of costs that `kernels/README.md` shows.
"""

import argparse
from collections.abc import Sequence

import torch

from fastdreamer_kernels import cases, ops
from fastdreamer_kernels.machine import TARGETS
from fastdreamer_kernels.rssm_observe import plan

SHAPES = {
    "gru_gates": "pre (N, 3D), deter (N, D) -> (N, D) in both dtypes",
    "sample_onehot": "logits (..., K), uniform (...) -> (..., K) [beside]",
    "layer_norm_act": "(..., C) -> (..., C) [beside]",
    "batch_norm_act": "(..., C) -> (..., C)",
    "twohot_loss": "logits (..., bins), target (...) -> (...)",
    "twohot_mean": "logits (..., bins) -> (...)",
    "kl_balance": "two logits (..., S, K) -> three (...)",
    "lambda_return": "(T, N) each -> (T, N)",
    "gather_sequences": "ring (M, ...), index (B, T) -> (B, T, ...)",
    "adam_step": "four vectors (P), slow copy (<= P) -> norm ()",
    "rssm_observe": "x (B, T, E), actions (B, T, A) -> states (B, T, ...)",
}
BANDWIDTH = 3.35e12
"""Bytes a second of an H100 SXM's memory, by its data sheet: what floors are computed with."""


def overview() -> str:
    choice, reason = ops.why()
    lines = [f"{'operation':18}{'shapes':54}{'auto takes':12}sizes at preset S (B 16, T 64, H 15)"]
    for operation in ops.Ops._fields:
        sizes = [
            "x".join(str(size) for size in case.sizes.values() if size and not isinstance(size, bool))
            for case in cases.preset("S")
            if case.operation == operation
        ]
        lines.append(f"{operation:18}{SHAPES[operation]:54}{choice:12}{', '.join(sizes)}")
    presets = {
        size: plan.Sizes(cases.BATCH, w.units, w.deter, w.stoch, w.classes, 2) for size, w in cases.SIZES.items()
    }
    rule = plan.describe(TARGETS, presets)
    why = f"{choice}, because {reason}. ops.load('reference' | 'fused' | 'auto') chooses."
    return "\n".join([*lines, "", why, "", rule])


def table() -> str:
    """A row for each case of preset S in bf16: least bytes, operations and the floor in time, forward and backward."""
    lines = [
        "| operation | where, at size S | sizes | MB | million operations | floor, µs | measured |",
        "|---|---|---|---|---|---|---|",
    ]
    for case in cases.preset("S"):
        moved, work = case.traffic(torch.bfloat16), case.operations()
        passes = 2 if moved[1] else 1
        sizes = ", ".join(f"{name} {size}" for name, size in case.sizes.items() if not isinstance(size, bool))
        lines.append(
            f"| `{case.operation}` | {case.label.removeprefix('S ')} | {sizes} "
            f"| {' + '.join(f'{x / 1e6:.2f}' for x in moved[:passes])} "
            f"| {' + '.join(f'{x / 1e6:.1f}' for x in work[:passes])} "
            f"| {' + '.join(f'{x / BANDWIDTH * 1e6:.1f}' for x in moved[:passes])} | not yet run on a GPU |"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m fastdreamer_kernels", description=__doc__)
    parser.add_argument("--table", action="store_true", help="print the README's table of costs instead")
    print(table() if parser.parse_args(argv).table else overview())


if __name__ == "__main__":
    main()
