"""How far down a front the stability holds: against a definition by brute force, and in words."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest

from search.stability import MARGIN, StableCompression, stability_sentence, stable_compression

BASE = {"return": 800.0, "stability": 0.95}


def trial(number: int, parameters: int, low: float | None) -> SimpleNamespace:
    measured = {} if low is None else {"stability": low, "stability_low": low, "stability_high": low}
    return SimpleNamespace(
        trial=number, parameters=parameters, size_ratio=parameters / 1000, measured=measured
    )


@pytest.mark.parametrize("seed", range(30))
def test_it_is_the_smallest_of_those_that_hold_with_all_that_are_as_large(seed: int) -> None:
    generator = random.Random(seed)
    trials = [
        trial(n, generator.randint(1, 8), generator.choice([None, 0.5, 0.9 - 1e-9, 0.9, 0.9, 0.95, 1.0, 1.0]))
        for n in range(generator.randint(1, 8))
    ]
    least = 0.95 - MARGIN
    found = stable_compression(BASE, trials)
    if not any(one.measured for one in trials):
        assert found is None
        return
    holding = [
        one
        for one in trials
        if all(
            (other.measured or {"stability_low": -1})["stability_low"] >= least
            for other in trials
            if other.parameters >= one.parameters
        )
    ]
    sizes = {one.parameters for one in holding}
    chosen = {one.trial: one for one in trials}.get(found.trial)
    if holding:
        assert chosen.parameters == min(sizes)
        assert found.size_ratio == min(sizes) / 1000
    elif found.trial is not None:
        # Nothing of a whole size holds: only those of the largest size that do not come first could.
        raise AssertionError(found)
    assert (found.broken is None) == (len(holding) == len(trials))
    assert (found.base, found.least) == (0.95, least)


def test_a_small_one_that_holds_below_a_gap_does_not_count() -> None:
    trials = [trial(0, 1000, 1.0), trial(1, 500, 0.95), trial(2, 100, 0.2), trial(3, 10, 1.0)]
    assert stable_compression(BASE, trials) == StableCompression(0.95, 0.95 - MARGIN, 1, 0.5, 2)


def test_without_a_measurement_of_the_base_or_of_any_trial_there_is_none() -> None:
    assert stable_compression({}, [trial(0, 10, 1.0)]) is None
    assert stable_compression(BASE, [trial(0, 10, None)]) is None
    assert stable_compression(BASE, []) is None


@pytest.mark.parametrize(
    ("lows", "words"),
    [
        ([1.0, 1.0, 0.1], "0.950, holds down to trial 1, 50 % of the base's parameters, and not in trial 2 "),
        ([1.0, 1.0, 1.0], "holds down to trial 2, 25 % of the base's parameters, the smallest of the front "),
        ([0.1, 1.0, 1.0], "does not hold even for the largest agent of the front "),
    ],
)
def test_it_is_said_in_one_sentence_that_names_it_empirical(lows: list[float], words: str) -> None:
    trials = [trial(number, 1000 >> number, low) for number, low in enumerate(lows)]
    sentence = stability_sentence(stable_compression(BASE, trials))
    assert sentence.startswith("Stability, empirical and no certificate: that of the base, ")
    assert words in sentence
    assert sentence.endswith("(lower bounds of at least 0.900).")
