"""Small byte-level models on real text, adaptive and of fixed depths, that train in minutes; and a report of them."""

import os

# Two threads that spin while another process is busy collapse. Read once, when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "0")

from adadepth._extras import need

for library in ("rich", "matplotlib", "transformers"):
    need(library, extra="examples")
