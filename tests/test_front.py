"""The front of a search: membership, front.json, selections and how they are printed."""

from __future__ import annotations

import copy
import dataclasses
import io
import itertools
import json
import math
import random
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from components import UserError
from components.plan import PruningPlan
from search.constraints import Constraint
from search.durable_files import CorruptFileError
from search.front import Front, Remeasured, build_front, front_results, percent
from search.front_table import (
    early_stopping_line,
    failure_lines,
    front_lines,
    front_table,
    hypervolume_line,
    retention_table,
    stage_line,
)
from search.selection import Wish, select
from search.trial_types import TrialResult

SIZE = SimpleNamespace(name="parameters", direction="minimize", unit="parameters")
ERROR = SimpleNamespace(name="error", direction="minimize", unit="1")
RETURN = SimpleNamespace(name="return", direction="maximize", unit="1")
LATENCY = SimpleNamespace(name="latency_p99_ms", direction="minimize", unit="ms")
BASE = SimpleNamespace(
    parameters=1000,
    macs=900,
    performance={"validation": 1.0, "test": 1.1},
    trivial={"validation": 3.0, "test": 3.1},
    widths={"latent": 8},
    seed=0,
    training_seconds=1.5,
    reported={},
)


def trial(
    number: int, parameters: int, retention: float, status: str = "complete", **more: float
) -> TrialResult:
    error = 3.0 - 2.0 * retention
    return TrialResult(
        number=number,
        status=status,  # type: ignore[arg-type]
        plan=PruningPlan({"l2": 1.0}, {"latent": 0.5}),
        origin="tpe",
        seed=number,
        reason=None if status == "complete" else "slice: ValueError: no",
        objectives={"parameters": float(parameters), "error": error, **more},
        parameters=parameters,
        size_ratio=parameters / 1000,
        macs=parameters - 1,
        retention=retention,
        performance={"error": error},
        base_performance=BASE.performance,
        timings={"mix": 0.1 * number, "fine_tune": 1.0},
    )


def front_of(results, objectives=(SIZE, ERROR), constraints=(), remeasured=None) -> Front:
    members = front_results(results, objectives, constraints)
    return build_front("mine", objectives, "error", BASE, members, remeasured)


STAIRS = [trial(0, 1000, 1.0), trial(1, 500, 0.98), trial(2, 100, 0.9), trial(3, 8, 0.3), trial(4, 600, 0.5)]


@pytest.mark.parametrize("seed", range(20))
def test_members_are_those_that_brute_force_finds(seed):
    generator = random.Random(seed)
    results = [
        trial(n, generator.randint(1, 30), generator.randint(0, 12) / 12, macs=float(generator.randint(1, 5)))
        for n in range(40)
    ]
    results[3] = trial(3, 1, 1.0, status="failed")
    macs = SimpleNamespace(name="macs", direction="minimize", unit="1")

    def dominates(a, b):
        pairs = [(a.objectives[o], b.objectives[o]) for o in ("parameters", "error", "macs")]
        return all(x <= y for x, y in pairs) and any(x < y for x, y in pairs)

    feasible = [r for r in results if r.complete and r.retention >= 0.25 and r.parameters <= 25]
    expected = {r.number for r in feasible if not any(dominates(other, r) for other in feasible)}
    constraints = [Constraint("retention", ">=", 0.25), Constraint("size_ratio", "<=", 0.025)]
    found = front_results(results, [SIZE, ERROR, macs], constraints)
    assert {r.number for r in found} == expected
    assert [r.parameters for r in found] == sorted(r.parameters for r in found)


def test_adding_trials_one_by_one_to_the_members_gives_the_front_of_all():
    generator = random.Random(1)
    results = [trial(n, generator.randint(1, 50), generator.random()) for n in range(60)]
    members: list[TrialResult] = []
    for entry in results:
        members = front_results([*members, entry], [SIZE, ERROR], [])
    assert members == front_results(results, [SIZE, ERROR], [])


def test_a_measurement_that_a_constraint_needs_and_a_trial_lacks_is_not_feasible():
    assert front_results(STAIRS, [SIZE, ERROR], [Constraint("return", ">=", 0.0)]) == []
    assert front_results([], [SIZE, ERROR], []) == []


def test_front_json_has_the_documented_keys_and_comes_back():
    remeasured = {
        n: Remeasured(performance=1.2, retention=0.95 - n / 10, latencies={}, host="h") for n in range(5)
    }
    front = front_of(STAIRS, remeasured=remeasured)
    content = json.loads(json.dumps(front.to_json(), allow_nan=False))
    assert [entry["trial"] for entry in content["trials"]] == [3, 2, 1, 0]
    assert set(content) >= {"experiment", "objectives", "base", "reference_point", "hypervolume", "trials"}
    keys = {
        "trial",
        "parameters",
        "size_ratio",
        "macs",
        "error",
        "retention",
        "test_retention",
        "coefficients",
        "options",
    }
    assert all(set(entry) >= keys | {"ratios", "bundle", "test_error"} for entry in content["trials"])
    assert content["objectives"][0] == {"name": "parameters", "direction": "minimize", "unit": "parameters"}
    assert Front.from_json(Path("front.json"), content) == front


def test_searched_options_are_in_the_front_and_its_table():
    results = [dataclasses.replace(entry, options={"passes": 40 + entry.number}) for entry in STAIRS]
    front = front_of(results)
    content = json.loads(json.dumps(front.to_json()))
    assert [entry["options"] for entry in content["trials"]] == [{"passes": 40 + n} for n in (3, 2, 1, 0)]
    assert Front.from_json(Path("front.json"), content) == front
    output = io.StringIO()
    Console(width=100, file=output).print(front_table(front))
    rows = [line.split() for line in output.getvalue().splitlines() if line.strip()]
    assert any("passes" in row for row in rows)
    assert any(row[0] == "3" and "43" in row for row in rows)
    for entry in content["trials"]:
        del entry["options"]  # as before there were options
    assert [trial.options for trial in Front.from_json(Path("front.json"), content).trials] == [{}] * 4


def test_hypervolumes_and_the_retention_table_are_those_of_the_stairs():
    remeasured = {n: Remeasured(1.2, 0.5, {}, "h") for n in range(5)}
    front = front_of(STAIRS, remeasured=remeasured)
    steps = [(0.008, 0.3), (0.1, 0.9), (0.5, 0.98), (1.0, 1.0)]
    span = math.log(1 / 0.005)
    log = sum(r * math.log(right / left) for (left, r), (right, _) in itertools.pairwise(steps)) / span
    linear = sum(r * (right - left) for (left, r), (right, _) in itertools.pairwise(steps))
    volumes = front.hypervolumes()
    assert volumes["hypervolume"] == pytest.approx(log, rel=1e-12)
    assert volumes["hypervolume_linear"] == pytest.approx(linear, rel=1e-12)
    assert volumes["test_hypervolume"] == pytest.approx(0.5 * math.log(1 / 0.008) / span, rel=1e-12)
    assert [row["trial"] for row in front.retention_at()] == [3, 3, 3, 2, 2]
    assert [row["retention"] for row in front_of([trial(0, 60, 0.9)]).retention_at()] == [None] * 3 + [
        0.9
    ] * 2


def test_latencies_measured_at_the_end_replace_those_under_load():
    results = [trial(0, 10, 0.5, latency_p99_ms=9.0)]
    again = {0: Remeasured(1.0, 0.5, {"latency_p99_ms": 1.5, "latency_median_ms": 1.0}, "idle-host")}
    front = front_of(results, [SIZE, ERROR, LATENCY], remeasured=again)
    entry = front.to_json()["trials"][0]
    assert entry["latency_p99_ms"] == 1.5
    assert entry["latency_host"] == "idle-host"
    assert "latency_median_ms" not in entry
    assert Front.from_json(Path("f"), front.to_json()) == front


@pytest.mark.parametrize("path", [
    ("trials",), ("objectives",), ("experiment",), ("performance",), ("base",),
    ("trials", 0, "trial"), ("trials", 0, "parameters"), ("trials", 0, "retention"), ("trials", 0, "error"),
    ("trials", 0, "bundle"), ("trials", 0, "ratios"), ("objectives", 0, "name"),
])  # fmt: skip
@pytest.mark.parametrize("damage", ["remove", "null", "text", "nan"])
def test_damage_to_front_json_is_one_sentence(path, damage):
    content = copy.deepcopy(front_of(STAIRS).to_json())
    place = content
    for key in path[:-1]:
        place = place[key]
    if damage == "remove":
        del place[path[-1]]
    else:
        place[path[-1]] = {
            "null": None,
            "text": 3 if isinstance(place[path[-1]], str) else "x",
            "nan": math.nan,
        }[damage]
    with pytest.raises(CorruptFileError, match=r"^front\.json is corrupt: .*") as caught:
        Front.from_json(Path("front.json"), content)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("wish", "number"), [
    (Wish("min_retention", 0.9), 2), (Wish("min_retention", 0.91), 1), (Wish("min_retention", 1.0), 0),
    (Wish("min_retention", -1.0), 3), (Wish("max_parameters", 100), 2), (Wish("max_parameters", 99.5), 3),
    (Wish("max_parameters", 1e9), 0), (Wish("trial", 1), 1), (Wish("knee"), 2),
])  # fmt: skip
def test_selections(wish, number):
    assert select(front_of(STAIRS), wish).trial == number


@pytest.mark.parametrize(("wish", "sentence"), [
    (Wish("min_retention", 1.5), "no trial of the front retains 1.5 of the base: the closest is trial 0"),
    (Wish("max_parameters", 7), "no trial of the front has at most 7 parameters: the closest is trial 3"),
    (Wish("trial", 4), "trial 4 is not on the front: the closest number is 3, all are 0, 1, 2, 3"),
    (Wish("max_latency", 1), "measured no latency: add latency_p99_ms to search.objectives"),
])  # fmt: skip
def test_a_selection_that_nothing_satisfies_names_the_closest(wish, sentence):
    with pytest.raises(UserError) as caught:
        select(front_of(STAIRS), wish)
    assert sentence in str(caught.value)


def test_a_latency_limit_takes_the_best_retention_within_it():
    results = [trial(0, 10, 0.5, latency_p99_ms=1.0), trial(1, 20, 0.8, latency_p99_ms=2.0)]
    front = front_of(results, [SIZE, ERROR, LATENCY])
    assert select(front, Wish("max_latency", 1.9)).trial == 0
    assert select(front, Wish("max_latency", 2.0)).trial == 1
    with pytest.raises(
        UserError, match=r"latency_p99_ms of at most 0.5: the closest is trial 0 .* latency_p99_ms 1"
    ):
        select(front, Wish("max_latency", 0.5))


def test_an_empty_front_selects_nothing():
    with pytest.raises(UserError, match="the front of 'mine' is empty"):
        select(front_of([]), Wish("knee"))


def test_tables_fit_a_hundred_columns_and_show_what_matters():
    results = [
        trial(n, 10**9 - n * 1000, 1 - n / 3000, latency_p99_ms=1234.5678, macs=1e12)
        for n in range(1000, 1015)
    ]
    macs = SimpleNamespace(name="macs", direction="minimize", unit="1")
    front = front_of(
        results,
        [SIZE, ERROR, LATENCY, macs],
        remeasured={r.number: Remeasured(1.23, 0.456, {}, "h") for r in results},
    )
    output = io.StringIO()
    console = Console(width=100, file=output)
    for table in (front_table(front), retention_table(front)):
        console.print(table)
    text = output.getvalue()
    assert max(len(line) for line in text.splitlines()) <= 100
    assert "1,234.57" not in text
    for shown in ("1010", "999,000,000", "0.456", "1.23", "tpe", "1235"):
        assert shown in text, shown


@pytest.mark.parametrize(
    ("width", "more", "options", "left_out"),
    [
        (100, {}, {}, ""),
        (100, {"latency_p99_ms": 1234.5}, {}, "proposed by"),
        (100, {"latency_p99_ms": 1234.5}, {"samples": 577, "horizon": 5}, "MACs, proposed by"),
        (100, {"latency_p99_ms": 1.5}, {"samples": 9, "iterations": 6, "horizon": 5, "passes": 10**8}, None),
        (80, {}, {}, "MACs, proposed by"),
        (50, {}, {}, "MACs, test, stability, proposed by"),
    ],
)
def test_columns_give_way_as_a_whole_and_no_number_is_cut(width, more, options, left_out):
    """Of TD-MPC: stability is wide, and who proposed a trial had taken the room of its return."""
    results = [
        dataclasses.replace(
            result,
            size_ratio=0.5,
            macs=777_777_777,
            options=options,
            objectives={**result.objectives, **more},
        )
        for result in (steady(n, 130_000_000 - n, 1 - n / 10, 1.0, 0.951, 1.0) for n in range(3))
    ]
    remeasured = {n: Remeasured(870.6 - n, 0.987, {}, "h") for n in range(3)}
    front = front_of(results, [SIZE, ERROR, *([LATENCY] if more else [])], remeasured=remeasured)
    output = io.StringIO()
    Console(width=width, file=output).print(front_table(front, width))
    text = output.getvalue()
    table, _, named = text.partition("No room for: ")
    assert all(f" {870.6 - n:g} " in table for n in range(3)), text
    columns = {
        "proposed by": " tpe ",
        "MACs": " 777,777,777 ",
        "parameters": " 130,000,000 ",
        "test": " 0.987 ",
        "stability": " 1.00 .95–1 ",
        "latency p99 ms": f" {more.get('latency_p99_ms', 0):.4g} ",
        **{name: f" {value} " for name, value in options.items()},
    }
    missing = [name for name in named.replace("\n", " ").strip(" .").split(", ") if name]
    if left_out is not None:
        assert ", ".join(missing) == left_out
    if not more:
        del columns["latency p99 ms"]
    for name, number in columns.items():
        assert (number in table.replace("\n", " \n")) == (name not in missing), (name, text)


def test_a_column_may_be_named_like_another_one():
    results = [dataclasses.replace(entry, options={"size": 77, "proposed_by": 99}) for entry in STAIRS]
    output = io.StringIO()
    Console(width=100, file=output).print(front_table(front_of(results)))
    assert all(text in output.getvalue() for text in (" 77 ", " 99 ", " 100 % ", " tpe ")), output.getvalue()


def test_the_stages_of_complete_trials_are_medians_in_one_line():
    failed = dataclasses.replace(trial(99, 1, 0.0, status="failed"), timings={"score": 500.0})
    assert stage_line([*STAIRS, failed]) == "median trial 1.2 s: mix 0.2, fine-tune 1.0"
    # The median of sums is not the sum of medians: 1 + 5, 2 + 2 and 3 + 1 seconds.
    timed = [
        dataclasses.replace(STAIRS[0], timings={"slice": a, "evaluate": b})
        for a, b in ((1, 5), (2, 2), (3, 1))
    ]
    assert stage_line(timed) == "median trial 4.0 s: slice 2.0, evaluate 2.0"
    quick = [dataclasses.replace(STAIRS[0], timings={"mix": 0.0123, "fine_tune": 0.2})]
    assert stage_line(quick) == "median trial 0.21 s: mix 0.01, fine-tune 0.20"
    assert stage_line([failed]) == ""


def test_words_for_hypervolume_sizes_and_failures():
    assert hypervolume_line(front_of([trial(0, 1000, 1.0)])).startswith(
        "Hypervolume 0.000 over log size, 0.000"
    )
    assert [percent(x) for x in (1.0, 0.1, 0.01, 0.01234, 0.00012345, 0.9999)] == [
        "100 %", "10 %", "1 %", "1.23 %", "0.0123 %", "100 %",
    ]  # fmt: skip
    failed = [trial(n, 1, 0.0, status="failed") for n in (7, 4)]
    assert failure_lines([*STAIRS, *failed]) == [
        "2 of 7 trials failed:", "  2 trials, first 4: slice: ValueError: no",
    ]  # fmt: skip
    assert failure_lines(STAIRS) == []


def test_what_was_stopped_early_is_neither_a_failure_nor_on_the_front():
    stopped = [
        dataclasses.replace(trial(n, 1, 1.0, status="stopped"), reason=None, objectives={}, updates=30)
        for n in (7, 4)
    ]
    results = [*(dataclasses.replace(result, updates=150) for result in STAIRS), *stopped]
    assert failure_lines(results) == []
    assert early_stopping_line(results, 150) == (
        "2 of 7 trials were stopped early: 810 of 1,050 updates of fine-tuning were made (77.1 %)."
    )
    assert early_stopping_line(STAIRS, 150) == ""
    assert stage_line(results) == stage_line(STAIRS)
    members = front_results(results, (SIZE, ERROR), ())
    assert members == front_results(results[: len(STAIRS)], (SIZE, ERROR), ())


def steady(number: int, parameters: int, retention: float, *stability: float) -> TrialResult:
    result = trial(number, parameters, retention)
    names = ("stability", "stability_low", "stability_high")
    return dataclasses.replace(
        result, performance={**result.performance, **dict(zip(names, stability, strict=True))}
    )


def test_a_stability_is_shown_with_its_interval_and_how_far_down_it_holds(monkeypatch):
    monkeypatch.setattr(BASE, "reported", {"stability": 1.0})
    results = [
        steady(0, 1000, 1.0, 0.99, 0.96, 1.0),
        steady(1, 500, 0.98, 1.0, 1.0, 1.0),
        steady(2, 100, 0.9, 0.04, 0.0, 0.1),
        trial(3, 8, 0.3),
    ]
    front = front_of(results)
    content = json.loads(json.dumps(front.to_json(), allow_nan=False))
    assert Front.from_json(Path("front.json"), content) == front
    assert content["base"]["reported"] == {"stability": 1.0}
    found = content["stability"]
    assert (found["trial"], found["size_ratio"], found["broken"], found["least"]) == (1, 0.5, 2, 0.95)
    output = io.StringIO()
    Console(width=100, file=output).print(front_table(front))
    rows = {line.split()[0]: line for line in output.getvalue().splitlines() if line.strip()}
    assert "0.99 .96–1 " in rows["0"]
    assert "1.00 1–1 " in rows["1"]
    assert "0.04 0–.10 " in rows["2"]
    assert "–" in rows["3"]
    assert front_lines(front)[1] == found["words"]
    monkeypatch.setattr(BASE, "reported", {})  # as in runs of before
    assert front_of(results).to_json()["stability"] is None
    assert len(front_lines(front_of(results))) == 1


def test_what_misses_a_constraint_in_the_end_is_said_below_the_table():
    again = {0: Remeasured(1.0, 0.5, {"latency_p99_ms": 7.5}, "idle-host")}
    bound = (Constraint("latency_p99_ms", "<=", 5.0),)
    front = front_of([trial(0, 10, 0.5)], remeasured=again)
    assert front.trials[0].measured["latency_p99_ms"] == 7.5
    assert front.trials[0].latency_host == "idle-host"
    front = dataclasses.replace(front, constraints=bound)
    assert front_lines(front)[1:] == [
        "Trial 0 misses latency_p99_ms <= 5.0 by what was measured at the end of the search (7.5); "
        "select does not take it."
    ]


@pytest.mark.parametrize(
    "bounds", [{"retention": "0.5"}, {"retention": ">= 2, <= 1"}, {"retention": None}, 3]
)
def test_damaged_constraints_of_front_json_are_one_sentence(bounds):
    content = {**front_of(STAIRS).to_json(), "constraints": bounds}
    with pytest.raises(CorruptFileError, match=r"^front\.json is corrupt: .*constraints"):
        Front.from_json(Path("front.json"), content)


def test_fronts_of_before_there_were_constraints_in_them_are_read():
    content = front_of(STAIRS).to_json()
    for key in ("constraints", "stability"):
        del content[key]
    for entry in content["trials"]:
        entry.pop("measured", None)
    old = Front.from_json(Path("front.json"), content)
    assert old.constraints == ()
    assert select(old, Wish("knee")).trial == select(front_of(STAIRS), Wish("knee")).trial
