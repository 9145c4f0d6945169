"""A search that is killed a hundred times: `python tests/benchmarks/kills.py --json`.

SIGKILLs of the driver, of workers, of the raylet, of Ray's head and of the driver between the record of a
trial and the study, at random moments of one search of the toy agent, which goes on after each. It fails
unless the records of finished trials stay as they are all along, every trial has finished exactly once at the
end, and the study, the front and the bundles agree with the records.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from figures import run

sys.path.insert(0, str(Path(__file__).parents[1]))
from kills import KilledSearch, kinds_of, verify

TRIALS_PER_KILL = 5


def measure(options: argparse.Namespace) -> Mapping[str, object]:
    """Kill, resume, verify."""
    source = random.Random(options.seed)
    kinds = kinds_of(options.kills, source)
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as directory:
        search = KilledSearch(Path(directory), trials=TRIALS_PER_KILL * options.kills)
        try:
            for number, kind in enumerate(kinds, start=1):
                search.kill(kind, after=source.randint(1, TRIALS_PER_KILL - 1), random_source=source)
                print(f"{number}/{len(kinds)}: {search.log[-1]}", file=sys.stderr, flush=True)
            search.finish()
            verify(search)
        finally:
            search.stop()
    return {
        "kills": len(kinds),
        "by_kind": dict(Counter(kinds)),
        "trials": search.trials,
        "minutes": round((time.monotonic() - started) / 60, 1),
    }


if __name__ == "__main__":
    run(__doc__, measure, kills=100, seed=0)
