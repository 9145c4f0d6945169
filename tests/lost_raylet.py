"""A search whose raylet is killed on the way, in a process of its own: `python tests/lost_raylet.py`.

Prints what became of the trials. In a process of its own because Ray may end the process that uses it.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).resolve().parent.parent)]
    from test_cluster import Journal, search, unhurried

    from search import ray_connection
    from search.trial_types import TrialResult

    # However slow: a cluster that is being left is not taken for one whose head has died.
    ray_connection._HEAD_SECONDS = 0.0
    journal = Journal()

    def kill(result: TrialResult) -> None:
        if result.number == 2:
            raylet = ray_connection.own_node().all_processes["raylet"][0].process
            os.kill(raylet.pid, signal.SIGKILL)

    outcome = search(journal, range(8), unhurried, observers=[kill], concurrency=2)
    told = {"complete": outcome.complete, "failed": outcome.failed, "repeated": outcome.repeated}
    print(json.dumps({**told, "asked": journal.of("ask"), "recorded": journal.of("record")}))
