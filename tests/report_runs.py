"""Run directories of any size with made-up trials, for reports."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
from serial_search import make_ready

from components.plan import PruningPlan
from search.front import Remeasured, front_results
from search.run_directory import RunDirectory
from search.trial_types import TrialResult

START = datetime(2026, 1, 1, tzinfo=UTC)


def made_up_run(path: Path, trials: int) -> RunDirectory:
    """A run of the toy agent with a real base and so many made-up trials, one in ten of which failed."""
    ready = make_ready(path, f"search.trials={trials}", "base.importance.every=2")
    rng = np.random.default_rng(0)
    widths = ready.base.widths
    keeper = ready.keeper
    for number in range(trials):
        shares = {group: float(np.exp(rng.uniform(-3, 0))) for group in widths}
        weight = float(rng.uniform())
        plan = PruningPlan(
            {"l2": weight, "fisher": 1 - weight}, {group: 1 - share for group, share in shares.items()}
        )
        started = START + timedelta(seconds=number)
        times = {"started": started.isoformat(), "finished": (started + timedelta(seconds=2)).isoformat()}
        if number % 10 == 7:
            result = TrialResult(
                number, "failed", plan, "random", number, reason=f"mix: fault {number % 3}", **times
            )
        else:
            kept = {group: max(1, round(share * widths[group])) for group, share in shares.items()}
            size = float(np.mean(list(shares.values()))) ** 2
            retention = float(1 - 0.5 * (0.01 / size) ** 0.5 - 0.2 * rng.uniform())
            result = TrialResult(
                number=number,
                status="complete",
                plan=plan,
                origin="anchor: dense" if number == 0 else "random",
                seed=number,
                objectives={
                    "parameters": 1.0 + round(size * ready.base.parameters),
                    "reconstruction_error": 1 - retention,
                },
                parameters=1 + round(size * ready.base.parameters),
                size_ratio=size,
                macs=round(size * ready.base.macs),
                retention=retention,
                performance={"reconstruction_error": 1 - retention},
                base_performance=ready.base.performance,
                component_sizes={"encoder": 10, "decoder": 12},
                widths=kept,
                kept={group: tuple(range(width)) for group, width in kept.items()},
                rungs=((0, 0.2), (10, 0.1)),
                updates=10,
                repaired_by="fine_tuning",
                timings={"mix": 0.001, "fine_tune": 1.5, "evaluate": 0.3},
                device="cpu",
                host="somewhere",
                **times,
            )
        ready.run.append_trial(result)
        keeper.results.append(result)
    complete = [result for result in keeper.results if result.complete]
    keeper.members = front_results(complete, ready.checked.objectives, ())
    again = {
        member.number: Remeasured(
            performance=1.01 - (member.retention or 0),
            retention=(member.retention or 0) - 0.01,
            latencies={},
            host="somewhere",
        )
        for member in keeper.members
    }
    ready.run.write_front(keeper.front(again).to_json())
    ready.run.release()
    return ready.run
