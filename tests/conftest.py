"""What every test file shares: threads, the hypothesis profile, and the skip of tests that need a GPU."""

import hypothesis
import pytest
import torch

torch.set_num_threads(2)
# Derandomized: a red test is red for everyone. The exhaustive tables carry the load, so few examples will do.
hypothesis.settings.register_profile("wush", derandomize=True, deadline=None, max_examples=50, database=None)
hypothesis.settings.load_profile("wush")


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a GPU")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
