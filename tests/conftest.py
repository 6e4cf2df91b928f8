"""What every test shares: one torch thread, and the golden numbers and real data beside the checkout."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch


def pytest_sessionstart() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory) -> Iterator[None]:
    """A cache of the tests' own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TINYCLIP_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder `shared` beside the checkout; tests that need it are skipped elsewhere."""
    path = Path(__file__).parents[1].parent / "shared"
    if not path.is_dir():
        pytest.skip("needs ../shared")
    return path
