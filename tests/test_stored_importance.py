"""The course of importance of stored bases: `prunefront importance`, and what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from serial_search import EXPERIMENT

from agents.agent import agent_class
from search.base import TRACE_ROWS, trace_agent
from search.checked_experiment import check
from search.cli import main
from search.config import parse_experiment
from search.experiment import train_only
from search.run_directory import RunDirectory
from search.stored_importance import read_course


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """What `prunefront train` leaves."""
    path = tmp_path_factory.mktemp("runs") / "toy"
    overrides = ["base.importance={every: 2, interval: 10, decay: 0.9}"]
    config = parse_experiment(EXPERIMENT, name="toy", overrides=overrides)
    run, _ = train_only(check(config, path), lambda done, total, note: None)
    run.release()
    return path


@pytest.fixture
def run(trained, tmp_path, monkeypatch) -> RunDirectory:
    monkeypatch.chdir(tmp_path)
    return RunDirectory(Path(shutil.copytree(trained, tmp_path / "runs" / "toy")).relative_to(tmp_path))


def refused(capsys, *arguments: str) -> str:
    assert main(["importance", *arguments]) == 2
    output, error = capsys.readouterr()
    assert output == ""
    assert error.startswith("prunefront: ")
    assert error.count("\n") == 1
    return error


def test_groups_and_their_components_are_those_of_the_agent(run) -> None:
    agent = agent_class("toy_agents:Toy")({})
    graph = trace_agent(agent, agent.calibration_inputs(TRACE_ROWS, 0))
    course = read_course(run)
    assert [(g.name, set(g.components), g.channels) for g in course.groups] == [
        (g.name, set(g.components), g.size) for g in graph.groups
    ]
    assert [group.is_coupling for group in course.groups] == [group.is_coupling for group in graph.groups]
    assert set(course.kinds) == {"coupling", "component-specific"}


def test_without_the_agents_code_the_groups_are_known_and_their_components_are_not(run) -> None:
    shape = json.loads((run.base / "widths.json").read_text())
    (run.base / "widths.json").write_text(json.dumps({**shape, "agent": "nowhere_to_be_found:Agent"}))
    course = read_course(run, traced=False)
    assert {group.name: group.channels for group in course.groups} == shape["widths"]
    assert course.kinds == {}


def test_the_whole_training_is_there_at_the_chosen_interval(run) -> None:
    course = read_course(run)
    assert course.steps.tolist() == [11, 21, 31, 41, 51, 61, 71, 81, 91, 101, 111, 119]
    stored = load_file(run.base / "importance.safetensors")
    for metric in course.metrics:
        for group in course.groups:
            expected = stored[f"history/{metric}/{group.name}"].astype(float)
            np.testing.assert_array_equal(course.scores[metric][group.name], expected)
    assert set(course.final) == {"l2"}, "fisher was tracked"


def test_the_command_prints_tables_json_and_csv(run, capsys) -> None:
    course = read_course(run)
    assert main(["importance", "toy"]) == 0
    table = capsys.readouterr().out
    assert max(len(line) for line in table.splitlines()) <= 100
    ranks = course.ranks("fisher")[:, [0, -1]]
    for group, (early, late) in zip(course.groups, ranks, strict=True):
        line = next(line for line in table.splitlines() if line.strip().startswith(group.name))
        assert f"{early:g} → {late:g}" in line
        assert ("coupling" in line) == group.is_coupling
    assert main(["importance", "toy", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["steps"] == course.steps.tolist()
    assert set(found["metrics"]) == set(course.metrics)
    assert main(["importance", str(run.path), "--csv"]) == 0
    lines = capsys.readouterr().out.splitlines()
    channels = sum(group.channels for group in course.groups)
    assert len(lines) == 1 + len(course.steps) * len(course.metrics) * channels
    with pytest.raises(SystemExit):
        main(["importance", "toy", "--csv", "--json"])


def test_neither_weights_nor_data_are_read(run, capsys) -> None:
    for name in ("model", "data"):
        (run.base / f"{name}.safetensors").unlink()
    assert main(["importance", "toy"]) == 0


def _without_course(run: RunDirectory) -> None:
    file = run.base / "importance.safetensors"
    save_file({name: a for name, a in load_file(file).items() if not name.startswith("history/")}, file)


def _changed(name: str, change) -> object:
    def damage(run: RunDirectory) -> None:
        file = run.base / "importance.safetensors"
        arrays = load_file(file)
        save_file({**arrays, name: change(arrays[name]).copy()}, file)

    return damage


def _per_trial(run: RunDirectory) -> None:
    shutil.rmtree(run.base)
    run.experiment.write_text(run.experiment.read_text().replace("mode: shared", "mode: per_trial"))


def _other_widths(run: RunDirectory) -> None:
    shape = json.loads((run.base / "widths.json").read_text())
    (run.base / "widths.json").write_text(
        json.dumps({**shape, "widths": {**shape["widths"], "latent": 4, "encoder.0": 11}})
    )


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (_per_trial, "stores no base: with base.mode 'per_trial' every trial trains its own"),
        (lambda run: shutil.rmtree(run.base), "has no base yet: `prunefront train`"),
        (lambda run: (run.base / "metrics.json").unlink(), "has no base yet"),
        (_without_course, "has no course of importance"),
        (lambda run: (run.base / "importance.safetensors").unlink(), "importance.safetensors is missing"),
        (
            lambda run: (run.base / "importance.safetensors").write_bytes(b"x"),
            "importance.safetensors is corrupt",
        ),
        (lambda run: (run.base / "widths.json").write_text("{"), "widths.json is corrupt"),
        (_changed("history/fisher/latent", lambda a: a[:, 1:]), "'fisher' scores do not fit group 'latent'"),
        (_changed("history/fisher/latent", lambda a: a[1:]), "'fisher' scores do not fit group 'latent'"),
        (_changed("score/l2/latent", lambda a: a[1:]), "the 'l2' scores do not fit group 'latent'"),
        (_changed("history/steps", lambda a: a[::-1]), "its steps do not increase"),
        (_other_widths, "scores do not fit group 'encoder.0' of 11 channels"),
    ],
)
def test_what_cannot_be_shown_is_one_sentence(damage, sentence, run, capsys) -> None:
    damage(run)
    assert sentence in refused(capsys, "toy")


def test_other_tracking_is_another_base(trained, tmp_path) -> None:
    path = Path(shutil.copytree(trained, tmp_path / "toy"))

    def held(*overrides: str) -> bool:
        config = parse_experiment(EXPERIMENT, name="toy", overrides=overrides)
        return check(config, path, may_exist=True).holds_base_only

    chosen = "base.importance={every: 2, interval: 10, decay: 0.9}"
    assert held(chosen)
    assert not held()
    assert not held(chosen, "base.importance.decay=0.8")
    assert not held(chosen, "base.importance.interval=20")
