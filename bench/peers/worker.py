"""The process of one peer: `python worker.py ADAPTER`. Started by `run.py`."""

import importlib
import sys
from pathlib import Path

if __name__ == "__main__":
    # This folder would hide the installed packages that its modules are named after.
    sys.path.pop(0)
    sys.path.append(str(Path(__file__).parents[2]))
    sys.exit(importlib.import_module("bench.peers.protocol").serve(importlib.import_module(sys.argv[1])))
