"""The loop: what runs a block, what bounds and checks it, and what it records."""
