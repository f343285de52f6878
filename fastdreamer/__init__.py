"""Trains world-model agents from pixels, fast."""

import os

# Before OpenMP starts, which is when torch is loaded: threads that wait for each other sleep. They would otherwise spin
# on cores that environments, or somebody else's programs, need. What was set outside stays.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
