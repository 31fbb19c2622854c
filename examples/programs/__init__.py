"""Straight-line programs: a task in which the depth that each token needs is known, and three ways of finding it."""

import os

# Two threads that spin while another process is busy collapse. Read once, when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "0")
