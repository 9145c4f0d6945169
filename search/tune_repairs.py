"""Two faults of Ray Tune, mended while a search runs. Both are in methods that are not public."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch
from weakref import WeakKeyDictionary

from ray.air.execution._internal.actor_manager import RayActorManager
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.tune.execution.tune_controller import TuneController
from ray.tune.experiment import Trial


@contextmanager
def repaired_tune() -> Iterator[None]:
    """Inside the block, Tune lets workers finish starting, and survives whatever becomes of them."""
    _starting.clear()
    with ExitStack() as stack:
        stack.enter_context(patch.object(TuneController, "_maybe_reuse_cached_actor", _unhurried_reuse))
        stack.enter_context(patch.object(RayActorManager, "_actor_task_failed", _any_loss))
        yield


START_SECONDS = 300.0
"""What a worker may take to start before its trial is given to another."""

_starting: WeakKeyDictionary[Any, float] = (
    WeakKeyDictionary()
)  # Tune's actor -> when it was first seen starting

_reuse_cached_actor = TuneController._maybe_reuse_cached_actor
_task_failed = RayActorManager._actor_task_failed


def _unhurried_reuse(self: TuneController, trial: Trial) -> bool:
    """Leave a trial to its own worker while that starts.

    Tune gives such a trial the first other worker that becomes free, and ends the one that starts. Where a
    trial is over before a worker has started, which imports torch, no second worker would ever come to life:
    not on a node that has joined, nor after one was lost.
    """
    own = self._trial_to_actor.get(trial)
    # One that waits for room waits for ever, where the free one holds it.
    if own is None or not self._actor_manager.is_actor_started(own) or trial in self._resetting_trials:
        return _reuse_cached_actor(self, trial)
    seen = _starting.setdefault(own, time.monotonic())
    return _reuse_cached_actor(self, trial) if time.monotonic() - seen > START_SECONDS else False


def _any_loss(self: RayActorManager, tracked_actor_task: Any, exception: Exception) -> None:
    """Take every error that Ray itself reports of a worker for the loss of the worker.

    Tune knows `RayActorError` alone and ends the whole search by a `RuntimeError` on others, as where Ray
    has killed a worker because its machine ran low on memory, or an object was lost with its node.
    """
    if isinstance(exception, RayError) and not isinstance(exception, RayActorError | RayTaskError):
        exception = RayActorError(error_msg=f"{type(exception).__name__}: {exception}")
    _task_failed(self, tracked_actor_task, exception)
