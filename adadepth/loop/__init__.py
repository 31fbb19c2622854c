"""The loop: it runs the block, limits depths, checks pieces and arguments, and records the trace."""
