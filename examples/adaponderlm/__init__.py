"""AdaPonderLM (arXiv 2603.01914) from adadepth's pieces: so far a small byte-level model that trains in minutes."""

import os

# Two threads that spin while another process is busy collapse. Read once, when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "0")

from adadepth._extras import need

for library in ("rich", "matplotlib", "transformers"):
    need(library, extra="examples")
