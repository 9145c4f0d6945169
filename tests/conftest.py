"""What every test may rely on: no accounts, no colours, the same random examples each time."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from hypothesis import settings

if "PYTEST_XDIST_WORKER" in os.environ:  # processes share the cores; before torch is imported
    os.environ.setdefault("OMP_NUM_THREADS", "1")

CLUSTERS = frozenset(
    f"test_{name}"
    for name in (
        "cluster",
        "doctor",
        "faults",
        "kills",
        "memory_pressure",
        "nodes",
        "search_end_to_end",
        "tdmpc_search",
    )
)
"""Files that start Ray clusters."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where several processes share the tests, all that starts clusters stays in one of them.

    That comes first, since it takes longest. Of the other files each stays in one process, too, so that what
    its tests have in common is made once.
    """
    for item in items:
        file = item.path.stem
        item.add_marker(pytest.mark.xdist_group("clusters" if file in CLUSTERS else file))
    items.sort(key=lambda item: item.path.stem not in CLUSTERS)


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


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For models so small that more threads only wait for one another."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
