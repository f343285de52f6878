#!/usr/bin/env bash
# Nsight Compute on the kernels of one fused operation, at the shapes of its cases.
set -euo pipefail

usage() {
    cat <<'END'
usage: profiling/ncu.sh OPERATION [--size S] [--output NAME]

Launches the operation's fused kernels, forward and backward, once on each of its cases after warm-up, and writes
NAME.ncu-rep (default: OPERATION). OPERATION is a name in kernels/fastdreamer_kernels/ops.py, such as gru_gates.
PYTHON names the interpreter (default: .venv/bin/python where there is one, else python3).
END
}

source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

operation=
output=
options=()
while (($#)); do
    case $1 in
        --help | -h)
            usage
            exit 0
            ;;
        --output)
            (($# > 1)) || fail "--output needs a name: give one, such as --output gru_gates."
            output=$2
            shift
            ;;
        --size)
            (($# > 1)) || fail "--size needs a preset: give one, such as --size S."
            options+=(--size "$2")
            shift
            ;;
        -*) fail "$1 is no option: --help lists them." ;;
        *)
            [[ -z $operation ]] || fail "$1 is one operation too many: profile one at a time."
            operation=$1
            ;;
    esac
    shift
done
[[ -n $operation ]] || fail "no operation is named: give one, such as gru_gates."

device=$("$python" "$here/operation.py" "$operation" --check "${options[@]}") || exit 2
command -v ncu >/dev/null || fail "ncu is not on PATH: install NVIDIA Nsight Compute (package nsight-compute, part of the CUDA toolkit)."
[[ $device == cuda ]] || fail "there is no CUDA device here: profile a kernel on a machine with one."

ncu --force-overwrite --export "${output:-$operation}" --set full --import-source yes --nvtx --profile-from-start off \
    "$python" "$here/operation.py" "$operation" "${options[@]}"
echo "${output:-$operation}.ncu-rep opens in Nsight Compute"
