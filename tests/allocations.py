"""What a computation allocates, as the allocator itself tells the profiler; operators' insides included."""

from collections.abc import Callable

import torch


def largest(compute: Callable[[], object]) -> int:
    """The bytes of the largest allocation that `compute` makes."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        compute()
    events = profiler.profiler.kineto_results.events()
    return max(event.nbytes() for event in events if event.name() == "[memory]")
