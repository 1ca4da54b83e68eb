"""Makes the repository's modules and the example tasks importable, and skips what needs a GPU where there is none."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]
torch.set_num_threads(1)  # two processes share two cores (pytest -n 2)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("cuda") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str]]:
    """The settings of a run in the smaller world of short_run.py, and its rewards for all runs of a module."""
    import train
    from short_run import byte_rewards, small_world

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "grade", byte_rewards)
        yield small_world(tmp_path_factory.mktemp("small"))
