"""AdaPonderLM (arXiv 2603.01914) from adadepth's pieces: so far a small byte-level model that trains in minutes."""

from adadepth._extras import need

need("rich", extra="examples")
