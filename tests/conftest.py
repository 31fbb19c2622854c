"""The same numbers every time: drawn cases, random tensors and the number of threads are fixed.

Memory that is not written yet holds NaN, so that a read of it fails a test instead of finding zeros by luck.
"""

import gc

import pytest
import torch
from hypothesis import HealthCheck, settings

import adadepth

settings.register_profile("fixed", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("fixed")
torch.set_num_threads(1)
torch.use_deterministic_algorithms(True)  # with it, torch.utils.deterministic.fill_uninitialized_memory is heeded
# Its own tests turn it on: every example that is drawn makes new wrappers.
adadepth.RecurrentWrapper.self_check = False
# Files that take long: of two processes neither is to begin one when the other is done.
LONG = [
    *(
        "test_compile",
        "test_regional_compile",
        "test_hf_compile",
        "test_flagship_training",
        "test_demo",
        "test_hf_zoo",
        "test_programs",
        "test_docs",
    ),
    *("test_flagship_evaluation", "test_ranks", "test_hf_surroundings", "test_hf_generate", "test_hf_serve"),
    *("test_small_examples", "test_loop", "test_flagship_text", "test_cache", "test_harness", "test_invariants"),
    *("test_hf_saving", "test_package", "test_flagship_cost", "test_hf_serving", "test_hf_drafts"),
    *("test_hf_drafts_serving", "compositions", "test_stand_in", "test_stand_in_hf"),
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    last = len(LONG)
    items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else last)


def pytest_collection_finish() -> None:
    """What was imported is never garbage: transformers collects garbage once a test, through all of it."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
