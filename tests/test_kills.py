"""A search that is killed eight times, in every way, loses nothing and repeats nothing."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from kills import KilledSearch, kinds_of, verify


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_eight_kills_of_every_kind_lose_nothing(tmp_path: Path) -> None:
    seed = random.SystemRandom().randrange(1_000_000)
    print(f"seed {seed}")  # shown where the test fails
    source = random.Random(seed)
    search = KilledSearch(tmp_path, trials=60)
    for kind in kinds_of(8, source):
        search.kill(kind, after=source.randint(1, 6), random_source=source)
    search.finish()
    verify(search)
    assert sum(line.startswith("killed") for line in search.log) == 8
