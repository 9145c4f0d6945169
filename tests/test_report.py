"""The report: what it says against the run directory, and that it is one file that asks for nothing."""

from __future__ import annotations

import json
import math
import re
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
from report_runs import made_up_run
from safetensors.numpy import load_file
from serial_search import search_serially

from components import UserError
from components.plan import PruningPlan
from search.cli import main
from search.parameter_importance import parameter_importance
from search.report import write_report
from search.report.content import gather
from search.report.page import render
from search.run_directory import RunDirectory
from search.stored_importance import read_course
from search.trial_types import TrialResult

IMPORTANCE = "base.importance.every=2"
"""The toy's training is short."""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """A whole search of the toy agent, some of whose trials fail."""
    path = tmp_path_factory.mktemp("runs") / "toy"
    search_serially(path, "search.trials=24", "agent.fault=raise", "search.constraints={}", IMPORTANCE)
    return RunDirectory(path)


@pytest.fixture(scope="module")
def content(run: RunDirectory) -> dict:
    return gather(run)


def test_all_of_it_is_json_without_nan(content) -> None:
    assert json.loads(json.dumps(content, allow_nan=False)) == content


def test_every_trial_is_there_with_what_it_measured(run, content) -> None:
    records = {record["trial"]: record for record in map(json.loads, run.trials.read_text().splitlines())}
    trials = content["trials"]
    assert trials["number"] == sorted(records)
    for index, number in enumerate(trials["number"]):
        record = records[number]
        for name in ("status", "origin", "reason", "parameters", "macs", "device"):
            assert trials[name][index] == record[name]
        for name in ("size_ratio", "retention"):
            known = record[name]
            assert trials[name][index] == (None if known is None else pytest.approx(known, rel=1e-4))
        widths = {
            g: w for g, w in zip(trials["groups"], trials["widths"][index], strict=True) if w is not None
        }
        assert widths == record["widths"]
        timings = dict(zip(trials["stages"], trials["timings"][index], strict=True))
        for stage, seconds in record["timings"].items():
            assert timings[stage] == pytest.approx(seconds, rel=0.01)
        for group, ratio in record["ratios"].items():
            assert content["choices"][f"share {group}"][index] == pytest.approx(1 - ratio, rel=1e-3)
        for metric, weight in record["coefficients"].items():
            assert content["choices"][f"weight {metric}"][index] == pytest.approx(weight, abs=1e-3)


def test_the_front_is_that_of_front_json(run, content) -> None:
    front = json.loads(run.front.read_text())
    assert content["front"]["trial"] == [trial["trial"] for trial in front["trials"]]
    assert content["front"]["test_retention"] == pytest.approx(
        [t["test_retention"] for t in front["trials"]], rel=1e-4
    )
    assert content["hypervolumes"]["hypervolume"] == pytest.approx(front["hypervolume"], rel=1e-4)
    assert content["retention_at"] == front["retention_at"]
    assert content["knee"] in content["front"]["trial"]


def test_the_hypervolume_grows_to_that_of_the_front(content) -> None:
    volumes = content["course"]["hypervolume"]
    assert len(volumes) == len(content["trials"]["number"])
    assert volumes == sorted(volumes)
    assert volumes[-1] == content["hypervolumes"]["hypervolume"]
    assert content["course"]["seconds"] == sorted(content["course"]["seconds"])


def test_importance_is_relative_to_the_average_channel(run, content) -> None:
    stored = load_file(run.base / "importance.safetensors")
    metric, found = next(iter(content["importance"]["metrics"].items()))
    steps = stored["history/steps"].tolist()
    groups = [name.split("/")[2] for name in stored if name.startswith(f"history/{metric}/")]
    assert sorted(found["groups"]) == sorted(groups)
    for column, step in enumerate(content["importance"]["steps"]):
        row = steps.index(step)
        scores = {group: stored[f"history/{metric}/{group}"][row].tolist() for group in groups}
        every = [score for channels in scores.values() for score in channels]
        average = sum(every) / len(every)
        for group, values in zip(found["groups"], found["values"], strict=True):
            mean = sum(scores[group]) / len(scores[group])
            if mean > 0:
                assert values[column] == pytest.approx(math.log2(mean / average), abs=0.01)


def test_importance_is_drawn_from_what_the_command_prints(run, content) -> None:
    course = read_course(run)
    found = content["importance"]
    assert found["steps"] == course.steps.tolist()
    assert found["components"] == {group.name: group.part for group in course.groups}
    assert set(found["metrics"]) == {metric for metric in course.metrics if course.compares_groups(metric)}
    for metric, shown in found["metrics"].items():
        assert shown["groups"] == [group.name for group in course.groups]
        np.testing.assert_array_equal(shown["ranks"], course.ranks(metric))
        for name, groups in {**course.parts, **course.kinds}.items():
            expected = np.log2(course.relative(metric, groups))
            np.testing.assert_allclose(shown["parts"][name], expected, rtol=1e-2, atol=1e-3)
    assert len(course.steps) > 5
    for metric in course.metrics:
        for row, shift in zip(found["shifts"][metric], course.shifts(metric), strict=True):
            assert row["channels"] == pytest.approx(shift.mean_channels, rel=1e-2)
            assert row["overlap"] == pytest.approx(list(shift.mean_overlap.values()), rel=1e-2)
    assert found["agreement"]["metrics"] == list(course.agreement)
    for name, values in zip(course.agreement, found["agreement"]["values"], strict=True):
        assert values == pytest.approx(list(course.agreement[name].values()), abs=1e-2)


def test_without_the_agents_code_importance_lacks_the_components_alone(tmp_path) -> None:
    made = made_up_run(tmp_path / "elsewhere", 15)
    known = gather(made)["importance"]
    shape = made.base / "widths.json"
    shape.write_text(shape.read_text().replace("toy_agents:Toy", "nowhere_to_be_found:Toy"))
    content = gather(made)["importance"]
    assert set(content["components"].values()) == {""}
    for metric, shown in content["metrics"].items():
        assert shown == {**known["metrics"][metric], "parts": {}}
    for name in ("shifts", "agreement", "steps"):
        assert content[name] == known[name]


def test_failures_are_counted_by_reason(run, content) -> None:
    failed = [r for r in map(json.loads, run.trials.read_text().splitlines()) if r["status"] == "failed"]
    assert failed, "the search was to have failures"
    assert sorted(number for entry in content["failures"] for number in entry["trials"]) == sorted(
        r["trial"] for r in failed
    )
    for entry in content["failures"]:
        assert {r["reason"] for r in failed if r["trial"] in entry["trials"]} == {entry["reason"]}
    times = [len(entry["trials"]) for entry in content["failures"]]
    assert times == sorted(times, reverse=True)


def test_the_choice_that_decides_is_found() -> None:
    rng = np.random.default_rng(0)
    results = []
    for number, (a, b, c) in enumerate(rng.uniform(0, 0.98, (80, 3))):
        results.append(
            TrialResult(
                number,
                "complete",
                PruningPlan({"l2": 1.0}, {"a": a, "b": b, "c": c}),
                "random",
                0,
                objectives={"parameters": 1000 * (1 - a), "error": 3 * (1 - b) + 0.3 * (1 - c)},
            )
        )
    found = parameter_importance(results, ["parameters", "error", "nothing"])
    assert set(found) == {"parameters", "error"}
    sizes, errors = found["parameters"]["shares"], found["error"]["shares"]
    assert next(iter(sizes)) == "share a"
    assert sizes["share a"] > 0.9
    assert list(errors)[:2] == ["share b", "share c"]
    assert errors["share b"] > 0.8
    assert "weight l2" not in errors, "it never differs"
    assert found["parameters"]["foretold"] > 0.8
    assert parameter_importance(results[:19], ["parameters"]) == {}


def test_of_noise_nothing_is_said_and_small_numbers_count_like_large_ones() -> None:
    rng = np.random.default_rng(1)
    results = [
        TrialResult(
            number,
            "complete",
            PruningPlan({"l2": 1.0}, {"a": a, "b": b}),
            "random",
            0,
            objectives={"noise": float(rng.normal()), "tiny": 1e-9 * a},
        )
        for number, (a, b) in enumerate(rng.uniform(0, 0.98, (60, 2)))
    ]
    found = parameter_importance(results, ["noise", "tiny"])
    assert set(found) == {"tiny"}
    assert found["tiny"]["shares"]["share a"] > 0.9


def test_what_only_repeats_another_measurement_is_left_out() -> None:
    rng = np.random.default_rng(2)
    results = [
        TrialResult(
            number,
            "complete",
            PruningPlan({"l2": 1.0}, {"a": a, "b": 0.5}),
            "random",
            0,
            objectives={"error": 2 * a},
            retention=1 - a,
        )
        for number, a in enumerate(rng.uniform(0, 0.98, 40))
    ]
    assert set(parameter_importance(results, ["error", "retention"])) == {"error"}


def test_trials_that_miss_the_constraints_do_not_count(tmp_path) -> None:
    path = tmp_path / "toy"
    search_serially(path, "search.trials=24", "search.constraints={retention: '>= 0.7'}")
    content = gather(RunDirectory(path))
    front = json.loads((path / "front.json").read_text())
    assert content["constraints"] == ["retention >= 0.7"]
    assert content["course"]["hypervolume"][-1] == pytest.approx(front["hypervolume"], rel=1e-4)
    records = {
        record["trial"]: record
        for record in map(json.loads, (path / "trials.jsonl").read_text().splitlines())
    }
    for number, meets in zip(content["trials"]["number"], content["trials"]["feasible"], strict=True):
        record = records[number]
        assert meets == (record["status"] == "complete" and record["retention"] >= 0.7)
    assert not all(content["trials"]["feasible"])


def test_time_is_that_in_which_trials_ran(tmp_path) -> None:
    made = made_up_run(tmp_path / "paused", 30)  # two seconds each, one second after the other
    lines = [json.loads(line) for line in made.trials.read_text().splitlines()]
    for record in lines[20:]:  # three days later
        for name in ("started", "finished"):
            moment = datetime.fromisoformat(record[name]) + timedelta(days=3)
            record[name] = moment.isoformat()
    made.trials.write_text("".join(json.dumps(record) + "\n" for record in lines))
    seconds = gather(made)["course"]["seconds"]
    assert seconds[:20] == [2.0 + number for number in range(20)]
    assert seconds[20:] == [21.0 + 2.0 + number for number in range(10)]


def test_the_page_is_one_file_that_asks_for_nothing(run) -> None:
    page = render(gather(run))
    assert not re.search(
        r"""(src|href)\s*=|url\(|@import|fetch\(|XMLHttpRequest|WebSocket""", _without_library(page)
    )
    assert "{{" not in page
    assert len(page) < 600_000


def test_what_an_experiment_is_called_cannot_break_the_page(run) -> None:
    content = {
        **gather(run),
        "experiment": '</script><img src=x onerror="alert(1)">',
        "configuration": "{{title}} </SCRIPT> <!--<script> x",
    }
    page = render(content)
    assert page.count("<script") == page.count("</script>") == 3
    assert "<img" not in page.split("<script")[0]
    stored = re.search(r'<script id="content" type="application/json">(.*?)</script>', page, re.DOTALL)
    assert stored is not None
    assert json.loads(stored[1]) == content


def test_a_thousand_trials_fit_into_a_few_megabytes(tmp_path: Path) -> None:
    run = made_up_run(tmp_path / "large", 1000)
    assert write_report(run).path.stat().st_size < 5_000_000


def test_the_command_writes_it(run, capsys, monkeypatch) -> None:
    monkeypatch.chdir(run.path.parent)
    assert main(["report", "toy", "--runs-dir", "."]) == 0
    assert capsys.readouterr().out == "Report: toy/report.html\n"
    assert (run.path / "report.html").read_text().startswith("<!doctype html>")


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda run: run.trials.unlink(), "nothing to report: no trial of the search was completed"),
        (lambda run: run.front.unlink(), "has no front yet"),
        (lambda run: run.front.write_text("{"), r"front.json is corrupt"),
        (lambda run: (run.base / "importance.safetensors").write_bytes(b"x"), "importance.safetensors"),
    ],
)
def test_a_run_that_cannot_be_reported_is_one_sentence(damage, sentence, tmp_path) -> None:
    made = made_up_run(tmp_path / "small", 15)
    damage(made)
    with pytest.raises(UserError, match=sentence) as caught:
        write_report(made)
    assert "\n" not in str(caught.value)
    assert not (made.path / "report.html").exists()


def _without_library(page: str) -> str:
    return re.sub(r'<script id="library".*?</script>', "", page, flags=re.DOTALL)
