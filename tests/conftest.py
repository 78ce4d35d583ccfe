"""Shared fixtures: the released files that tests read from beside the repository, and small random networks."""

from pathlib import Path

import pytest
import torch

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of released files; tests that need it skip where it is absent."""
    if not SHARED.exists():
        pytest.skip("the released files (../shared/data) are not on this machine")
    return SHARED


@pytest.fixture(autouse=True)
def _threads(monkeypatch: pytest.MonkeyPatch) -> None:
    # The networks are tiny: a second thread only waits, the longer the busier the machine is. On some CPUs the number
    # of threads also decides the last bits of a product, so commands that tests start get as many.
    torch.set_num_threads(1)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
