#!/usr/bin/env bash
# Nsight Systems on updates of synthetic rows: ranges by part without --compile, gaps within the captured graph with it.
set -euo pipefail

usage() {
    cat <<'END'
usage: profiling/nsys.sh [--output NAME] [options of profiling/updates.py, such as --size S --updates 10 --compile]

Records N updates with a decision each, after warm-up, into NAME.nsys-rep (default: update), and prints time by range
and by kernel. NVTX ranges exist where Python runs:
  --no-compile   (default) a range for each part, its backward pass by itself
  --compile      an update is two captured graphs and a range each; their kernels, and the gaps between them, are
                 shown one by one
PYTHON names the interpreter (default: .venv/bin/python where there is one, else python3).
END
}

source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

output=update
options=()
while (($#)); do
    case $1 in
        --help | -h)
            usage
            exit 0
            ;;
        --output)
            (($# > 1)) || fail "--output needs a name: give one, such as --output update."
            output=$2
            shift
            ;;
        *) options+=("$1") ;;
    esac
    shift
done

device=$("$python" "$here/updates.py" --check "${options[@]}") || exit 2
command -v nsys >/dev/null || fail "nsys is not on PATH: install NVIDIA Nsight Systems (package nsight-systems, part of the CUDA toolkit)."
[[ $device == cuda ]] || fail "there is no CUDA device here: profiling/trace.py profiles on a CPU, too."

nsys profile --force-overwrite true --output "$output" --trace cuda,nvtx,cublas,osrt --cuda-graph-trace=node \
    --capture-range=cudaProfilerApi --capture-range-end=stop \
    "$python" "$here/updates.py" "${options[@]}"
nsys stats --force-export=true --report nvtx_sum,nvtx_gpu_proj_sum,cuda_gpu_kern_sum,cuda_api_sum "$output.nsys-rep"
echo "$output.nsys-rep opens in Nsight Systems"
