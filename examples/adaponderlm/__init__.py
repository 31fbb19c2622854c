"""AdaPonderLM (arXiv 2603.01914) from adadepth's pieces, and its neighbours: train, evaluate, compare."""

import os

# Two threads that spin while another process is busy collapse. Read once, when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "0")

from adadepth._extras import need

for library in ("accelerate", "datasets", "matplotlib", "omegaconf", "rich", "transformers"):
    need(library, extra="examples")
