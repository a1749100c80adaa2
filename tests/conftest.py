"""Shared by all tests: few threads of torch, Triton's interpreter where there is no GPU, reproducible property tests,
a cache of their own, GPU tests skipped without a GPU, garbage looked for among few objects."""

import gc
import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else min(2, os.cpu_count() or 1))
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before a kernel's file is imported: `triton.jit` looks at it there
settings.register_profile("repo", deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
settings.load_profile("repo")
MANY_OBJECTS = 50_000
"""More than a test makes, and less than what an import of transformers does."""


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test reads or fills the cache of whoever runs it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOWVRAM_I2V_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def pytest_runtest_setup() -> None:
    """Every phase of a run ends with a full collection. With all that the tests import, each would take half a second:
    what is alive before a test is not looked at again."""
    if len(gc.get_objects()) > MANY_OBJECTS:
        gc.collect()
        gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device; none is visible here"))
