"""Measurements: ratios of two versions of one computation, timed in turn in one run, kept in RESULTS.md."""

import os

# Two threads that spin while another process is busy collapse. Read once, when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
