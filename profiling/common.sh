# What nsys.sh and ncu.sh share: where they lie, the interpreter, and how they refuse. Sourced.

fail() {
    echo "error: $1" >&2
    exit 2
}

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=${PYTHON:-}
if [[ -z $python ]]; then
    python=python3
    if [[ -x $here/../.venv/bin/python ]]; then python=$here/../.venv/bin/python; fi
fi
