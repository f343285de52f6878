"""`python -m fastdreamer_kernels`: what there is, and which implementation `auto` takes on this machine."""

from fastdreamer_kernels import cases, ops

TITLES = {
    "gru_gates": "pre (N, 3D), deter (N, D) -> (N, D)",
    "sample_onehot": "logits (..., K), uniform (...) -> (..., K)",
    "layer_norm_act": "(..., C) -> (..., C)",
    "batch_norm_act": "(..., C) -> (..., C)",
    "twohot_loss": "logits (..., bins), target (...) -> (...)",
    "twohot_mean": "logits (..., bins) -> (...)",
    "kl_balance": "two logits (..., S, K) -> three (...)",
    "lambda_return": "(T, N) each -> (T, N)",
    "gather_sequences": "ring (M, ...), index (B, T) -> (B, T, ...)",
    "adam_step": "four vectors (P), slow copy (<= P) -> norm ()",
}


def main() -> None:
    choice, reason = ops.why()
    print(f"{'operation':18}{'shapes':48}{'auto takes':12}at size S, bf16, in an update (B 16, T 64, H 15)")
    for operation in ops.Ops._fields:
        sizes = [
            "x".join(str(size) for size in case.sizes.values() if size)
            for case in cases.preset("S")
            if case.operation == operation
        ]
        print(f"{operation:18}{TITLES[operation]:48}{choice:12}{', '.join(sizes)}")
    print(f"\n{choice}, because {reason}. ops.load('reference' | 'fused' | 'auto') chooses.")


if __name__ == "__main__":
    main()
