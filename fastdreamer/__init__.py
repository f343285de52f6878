"""Trains world-model agents from pixels, fast."""

import os

# Before OpenMP starts, which is when torch is loaded: threads that wait for each other spin for some microseconds, then
# sleep. They would otherwise spin on cores that environments, or somebody else's programs, need; those that sleep at
# once are woken too late on an idle machine. What was set outside stays.
if os.environ.setdefault("OMP_WAIT_POLICY", "passive") == "passive":
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")
