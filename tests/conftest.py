"""Shared by all tests: where things are, one thread per process, the data folder that may be absent."""

import os

for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(name, "1")  # before torch is first imported, here and in child processes
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "agg")

import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]
DATA = REPO.parent / "shared" / "data"


@pytest.fixture(scope="session")
def repo() -> Path:
    """The root of the checkout."""
    return REPO


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Real corpora and benchmark files beside the checkout; a test that asks for it is skipped where there are none."""
    if not DATA.is_dir():
        pytest.skip("needs the data folder ../shared/data, which is not part of the checkout")
    return DATA


@pytest.fixture
def data_file(data_dir):
    """`data_file(name)`: one file of the data folder, or a skip that names it."""

    def find(name: str) -> Path:
        path = data_dir / name
        if not path.exists():
            pytest.skip(f"needs ../shared/data/{name}")
        return path

    return find


@pytest.fixture(autouse=True)
def _one_thread():
    """torch keeps its own count: a test that changed it must not slow or alter the next."""
    yield
    torch = sys.modules.get("torch")
    if torch is not None and torch.get_num_threads() != 1:
        torch.set_num_threads(1)
