"""What every test may rely on: no accounts, one thread, the same random examples each time."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import pytest
from hypothesis import settings

# Before torch is imported, here and in the processes that tests start: the models are so small that threads
# only wait for one another, on two busy cores for thirty times as long as the work takes.
os.environ.setdefault("OMP_NUM_THREADS", "1")

settings.register_profile("prunefront", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("prunefront")


@pytest.fixture(autouse=True)
def _no_accounts(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Nothing of the person who runs the tests is used: neither their W&B account nor their Ray cluster."""
    for name in (
        "RAY_ADDRESS",
        "WANDB_API_KEY",
        "WANDB_BASE_URL",
        "WANDB_ENTITY",
        "WANDB_MODE",
        "WANDB_PROJECT",
    ):
        monkeypatch.delenv(name, raising=False)
    empty = tmp_path_factory.getbasetemp() / "no-account"
    empty.mkdir(exist_ok=True)
    monkeypatch.setenv("NETRC", str(empty / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(empty))


@pytest.fixture(autouse=True)
def _threads_as_before() -> Iterator[None]:
    """A test that asks torch for more threads does not leave them to the next."""
    torch = sys.modules.get("torch")  # not every test needs it
    threads = torch.get_num_threads() if torch else None
    yield
    if torch and torch.get_num_threads() != threads:
        torch.set_num_threads(threads)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For models so small that more threads only wait for one another."""
    import torch

    threads = torch.get_num_threads()  # `_threads_as_before` knows none where torch was not there before
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
