"""From a configuration to a search: what is checked before the work begins, and whole searches of options."""

from __future__ import annotations

import json

import pytest
from serial_search import EXPERIMENT, search_serially
from toy_agents import INPUTS

from components import UserError
from search.checked_experiment import check
from search.config import parse_experiment
from search.search_command import plan_line
from search.space import OptionRange
from search.verification import verify_bundle

REPEATING = "agent.kind=toy_agents:Repeating"


def checked(tmp_path, *overrides):
    return check(parse_experiment(EXPERIMENT, name="toy", overrides=overrides), tmp_path / "toy")


def test_options_are_searched_with_the_agents_own_for_the_anchors(tmp_path):
    overrides = (REPEATING, "agent.passes=3", "search.options={passes: [1, 4]}")
    space = checked(tmp_path, *overrides).space
    assert space.options == {"passes": OptionRange(1, 4, own=3)}
    assert checked(tmp_path, REPEATING).space.options == {}


@pytest.mark.parametrize("first", [0, 18, 48])
def test_the_first_trials_mix_all_metrics_alike(tmp_path, first):
    chosen = ("search.trials=30", "search.sampler=tpe", f"search.ratios_first={first}")
    experiment = checked(tmp_path, *chosen, "pruning.metrics=[l2, fisher]")
    study = experiment.new_study()
    equal = [
        study.ask(number).plan.coefficients == pytest.approx({"l2": 0.5, "fisher": 0.5})
        for number in range(30)
    ]
    assert all(equal[experiment.anchors : first])
    assert not any(equal[max(experiment.anchors, first) :])


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ((), 32),
        (("search.ratios_first=5",), 5),
        (("pruning.coefficients={latent: {l2: 1}}", "pruning.metrics=[l2, fisher]"), 32),
        (("pruning.coefficients=per_component",), 0),
        (("pruning.coefficients=per_group",), 0),
        (("pruning.coefficients=per_group", "search.ratios_first=7"), 7),
        (("pruning.coefficients=equal", "search.ratios_first=7"), 0),
        (("pruning.metrics=[l2]",), 0),
        (("search.sampler=random", "search.ratios_first=7"), 0),
    ],
)
def test_how_many_trials_search_ratios_alone(tmp_path, overrides, expected):
    assert checked(tmp_path, "search.trials=500", *overrides).ratios_first == expected


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("search.trials=32",), "l2, fisher, mixed alike)"),
        (("search.trials=33",), "l2, fisher, mixed alike in the first 32 trials)"),
        (("search.trials=33", "search.ratios_first=0"), "l2, fisher)"),
    ],
)
def test_the_plan_says_how_metrics_are_mixed(tmp_path, overrides, words):
    assert words in plan_line(checked(tmp_path, "pruning.metrics=[l2, fisher]", *overrides))


def test_groups_that_share_a_ratio_are_one_dimension(tmp_path):
    assert checked(tmp_path).space.keeps["decoder.0"] == "keep/decoder.0"
    assert checked(tmp_path, REPEATING).space.keeps["decoder.0"] == "keep/encoder.0"


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (
            ["search.options.passes=[1, 4]"],
            "search.options.passes cannot be searched: toy_agents:Toy has no options for a search to choose",
        ),
        (
            [REPEATING, "search.options.pases=[1, 4]"],
            "search.options.pases is no option of toy_agents:Repeating to search: did you mean 'passes'? "
            "allowed: passes",
        ),
        (
            [REPEATING, "search.options.hidden=[1, 4]"],
            "search.options.hidden is no option of toy_agents:Repeating to search: allowed: passes",
        ),
        (
            [REPEATING, "search.options.passes=[4, 12]"],
            "search.options.passes may not become 12: agent.passes is 12: it must be at most 9",
        ),
        (
            [REPEATING, "agent.passes=2.0", "search.options.passes=[1, 4]"],
            "search.options.passes cannot be searched: toy_agents:Repeating has 2.0 there, no whole number",
        ),
    ],
)
def test_options_that_cannot_be_searched_are_one_sentence(tmp_path, overrides, sentence):
    with pytest.raises(UserError) as caught:
        checked(tmp_path, *overrides)
    assert str(caught.value) == sentence
    assert list(tmp_path.iterdir()) == []


def test_a_search_of_options(tmp_path):
    ready, front = search_serially(
        tmp_path / "toy",
        REPEATING,
        "agent.passes=3",
        "search.options={passes: [1, 2]}",
        "search.objectives=[macs, reconstruction_error]",
        "search.trials=20",
    )
    base = json.loads((ready.run.base / "widths.json").read_text())
    assert base["options"]["passes"] == 3
    trials = {trial["trial"]: trial for trial in map(json.loads, ready.run.trials.read_text().splitlines())}
    assert {trial["status"] for trial in trials.values()} == {"complete"}
    anchors = [trial for trial in trials.values() if trial["origin"].startswith("anchor: ")]
    assert len(anchors) == len(ready.checked.space.anchors())
    assert {trial["options"]["passes"] for trial in anchors} == {2}  # three, clipped
    assert {trial["options"]["passes"] for trial in trials.values()} == {1, 2}
    for trial in trials.values():
        e, z, d = (trial["widths"][group] for group in ("encoder.0", "latent", "decoder.0"))
        assert e == d  # they share a ratio
        assert trial["macs"] == trial["options"]["passes"] * (INPUTS * e + e * z + z * d + d * INPUTS)
        assert trial["retention"] == ready.base.retention(trial["performance"]["reconstruction_error"])
    rows = json.loads(ready.run.front.read_text())["trials"]
    assert len(rows) == len(front.trials) > 1
    for row in rows:
        assert row["options"] == trials[row["trial"]]["options"]
        architecture = json.loads((ready.run.path / row["bundle"] / "architecture.json").read_text())
        assert architecture["options"] == {**base["options"], **row["options"]}
        report = verify_bundle(ready.run.path / row["bundle"])
        assert report.identical
        measured = {measurement.name: measurement for measurement in report.measurements}
        assert measured["test reconstruction_error"].now == row["test_reconstruction_error"]
    assert [result.options for result in ready.run.read_trials()] == [
        trial["options"] for trial in trials.values()
    ]
