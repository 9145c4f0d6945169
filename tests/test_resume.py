"""Searches that ended early and go on: nothing is lost, nothing runs twice, and the outcome is the same.

Without Ray: what is interrupted is the driver, wherever it stands. `test_kills.py` kills real processes.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any
from unittest.mock import patch

import optuna
import pytest
from serial_search import finish, make_ready
from test_run_directory import MENDED

from components.errors import UserError
from search.checked_experiment import CheckedExperiment
from search.experiment import ReadySearch
from search.front_keeper import FrontKeeper
from search.run_directory import RunDirectory
from search.study import Study

TRIALS = 10


class Killed(BaseException):
    """Stands for SIGKILL: nothing that handles exceptions may handle it."""


def ready(path: Path, *overrides: str, resume: bool = False) -> ReadySearch:
    return make_ready(path, f"search.trials={TRIALS}", *overrides, resume=resume)


def lines(path: Path) -> list[dict[str, Any]]:
    """trials.jsonl without what no two runs have in common."""
    found = [json.loads(line) for line in (path / "trials.jsonl").read_text().splitlines()]
    for record in found:
        for key in ("timings", "usage", "started", "finished", "host"):
            del record[key]
    return found


def stored(path: Path) -> list[tuple[int, optuna.trial.TrialState, list[float] | None]]:
    storage = optuna.storages.RDBStorage(f"sqlite:///{path / 'study.db'}")
    with closing(storage.engine.raw_connection()):
        study = optuna.load_study(study_name=path.name, storage=storage)
        found = [(trial.user_attrs["trial"], trial.state, trial.values) for trial in study.trials]
    storage.engine.dispose()
    return found


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A search that was never interrupted."""
    path = tmp_path_factory.mktemp("runs") / "toy"
    finish(ready(path))
    return path


def killed_at(method: type, name: str, number: int, *, after: bool) -> Callable[..., Any]:
    """`method.name`, killed before or after it has done its work for a trial."""
    original = getattr(method, name)

    def killing(self: Any, *arguments: Any, **more: Any) -> Any:
        if not after and _number(arguments) == number:
            raise Killed
        result = original(self, *arguments, **more)
        if after and _number(arguments) == number:
            raise Killed
        return result

    return killing


def _number(arguments: tuple[Any, ...]) -> int | None:
    first = arguments[0] if arguments else None
    return first if isinstance(first, int) else getattr(first, "number", None)


PLACES = [
    (RunDirectory, "append_proposal", False),
    (RunDirectory, "append_proposal", True),
    (FrontKeeper, "record", False),
    (RunDirectory, "append_trial", False),
    (RunDirectory, "append_trial", True),
    (FrontKeeper, "record", True),
    (Study, "tell", False),
    (Study, "tell", True),
]


@pytest.mark.parametrize(("where", "name", "after"), PLACES)
@pytest.mark.parametrize("number", [0, 4])
def test_killed_anywhere_it_ends_as_if_it_had_not_been(
    whole: Path, tmp_path: Path, where: type, name: str, after: bool, number: int
) -> None:
    path = tmp_path / "toy"
    with patch.object(where, name, killed_at(where, name, number, after=after)), pytest.raises(Killed):
        finish(ready(path))
    resumed = ready(path, resume=True)
    finished = {result.number for result in resumed.keeper.results}
    assert finished >= set(range(number))
    assert resumed.numbers[0] == len(finished)
    finish(resumed)
    assert lines(path) == lines(whole)
    assert stored(path) == stored(whole)
    assert json.loads((path / "front.json").read_text()) == json.loads((whole / "front.json").read_text()) | {
        "base": json.loads((path / "front.json").read_text())["base"]  # seconds of its training
    }
    members = {entry["trial"] for entry in json.loads((path / "front.json").read_text())["trials"]}
    assert RunDirectory(path).bundles() == members


def test_a_trial_on_the_front_has_its_bundle_before_it_counts_as_finished(tmp_path: Path) -> None:
    """The state of a pruned model exists nowhere else once its worker is gone."""
    path = tmp_path / "toy"
    with (
        patch.object(RunDirectory, "append_trial", killed_at(RunDirectory, "append_trial", 0, after=True)),
        pytest.raises(Killed),
    ):
        finish(ready(path))
    run = RunDirectory(path)
    assert [result.number for result in run.read_trials()] == [0]
    assert run.bundles() == {0}


def test_trials_that_were_running_run_again_first_and_unchanged(tmp_path: Path) -> None:
    path = tmp_path / "toy"
    search = ready(path)
    with (
        patch.object(FrontKeeper, "record", killed_at(FrontKeeper, "record", 6, after=False)),
        pytest.raises(Killed),
    ):
        finish(search)
    run = RunDirectory(path)
    noted = run.read_proposals()[6]
    run.append_proposal(8, dataclasses.replace(noted, origin="noted"))  # two at a time, as it were
    resumed = ready(path, resume=True)
    assert resumed.numbers == [6, 8, 7, 9]
    finish(resumed)
    results = {result.number: result for result in run.read_trials()}
    assert list(results) == [0, 1, 2, 3, 4, 5, 6, 8, 7, 9]
    assert results[6].plan == noted.plan
    assert (results[8].plan, results[8].origin) == (noted.plan, "noted")


def test_killed_while_the_base_trains_it_trains_again(whole: Path, tmp_path: Path) -> None:
    path = tmp_path / "toy"
    RunDirectory.create(path, (whole / "experiment.yaml").read_text()).release()
    finish(ready(path, resume=True))
    assert lines(path) == lines(whole)


def test_a_finished_search_goes_on_to_a_larger_budget(whole: Path, tmp_path: Path) -> None:
    path = tmp_path / "toy"
    finish(ready(path, "search.trials=6"))
    resumed = ready(path, resume=True)
    assert resumed.numbers == [6, 7, 8, 9]
    finish(resumed)
    assert lines(path) == lines(whole)
    again = ready(path, resume=True)
    assert again.numbers == []
    finish(again)
    assert lines(path) == lines(whole)


def test_a_last_line_that_was_cut_off_is_mended_with_a_notice(whole: Path, tmp_path: Path) -> None:
    path = tmp_path / "toy"
    finish(ready(path))
    trials = path / "trials.jsonl"
    trials.write_bytes(trials.read_bytes()[:-25])
    resumed = ready(path, resume=True)
    assert resumed.notices == (MENDED.format(trials),)
    assert resumed.numbers == [9]
    finish(resumed)
    assert lines(path) == lines(whole)
    assert stored(path) == stored(whole)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ("pruning.max_ratio=0.5", "pruning.max_ratio was 0.98 and is now 0.5"),
        ("agent.hidden=13", "agent.hidden was null and is now 13"),
        ("base.seed=1", "base.seed was 0 and is now 1"),
        (
            "search.objectives=[macs, reconstruction_error]",
            "search.objectives was null and is now ['macs', 'reconstruction_error']",
        ),
        ("pruning.metrics=[l2]", "pruning.metrics was ['l2', 'fisher'] and is now ['l2']"),
    ],
)
def test_another_search_is_refused_by_what_differs(whole: Path, change: str, sentence: str) -> None:
    before = lines(whole)
    with pytest.raises(UserError, match="toy cannot be resumed as another search: ") as refusal:
        ready(whole, change, "search.trials=20", "search.sampler=random", "resources.gpus=0", resume=True)
    assert sentence in str(refusal.value)
    assert "search.trials" not in str(refusal.value)
    assert lines(whole) == before


def test_a_warm_start_outlives_the_run_that_it_came_from(whole: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    finish(ready(other))
    settings = ("search.warm_start=other", "search.anchors=false")
    finish(ready(tmp_path / "straight", *settings))
    finish(ready(tmp_path / "halted", *settings, "search.trials=4"))
    shutil.rmtree(other)
    finish(ready(tmp_path / "halted", *settings, resume=True))
    assert lines(tmp_path / "halted") == lines(tmp_path / "straight") != lines(whole)


def test_a_warm_start_outlives_a_kill_while_the_base_trains(tmp_path: Path) -> None:
    other = tmp_path / "other"
    finish(ready(other))
    settings = ("search.warm_start=other", "search.anchors=false")
    finish(ready(tmp_path / "straight", *settings))
    with (
        patch.object(CheckedExperiment, "train_base", side_effect=Killed),
        # SIGKILL cleans nothing up, but for locks.
        patch("search.experiment.shutil.rmtree"),
        patch.object(RunDirectory, "claim"),
        pytest.raises(Killed),
    ):
        ready(tmp_path / "killed", *settings)
    shutil.rmtree(other)
    finish(ready(tmp_path / "killed", *settings, resume=True))
    assert lines(tmp_path / "killed") == lines(tmp_path / "straight")


def test_an_experiment_that_is_no_text_is_one_sentence(whole: Path, tmp_path: Path) -> None:
    path = tmp_path / "toy"
    shutil.copytree(whole, path)
    (path / "experiment.yaml").write_bytes(b"name: \xff\xfe")
    with pytest.raises(UserError, match=r"experiment\.yaml is corrupt: 'utf-8' codec") as refusal:
        ready(path, resume=True)
    assert "\n" not in str(refusal.value)


def test_a_torn_proposal_does_no_harm(whole: Path, tmp_path: Path) -> None:
    path = tmp_path / "toy"
    with (
        patch.object(FrontKeeper, "record", killed_at(FrontKeeper, "record", 0, after=False)),
        pytest.raises(Killed),
    ):
        finish(ready(path))
    proposals = path / "proposals.jsonl"
    proposals.write_bytes(b"half a line\n" + proposals.read_bytes()[:-10])
    again = ready(path)  # nothing had finished: it may as well begin anew
    assert again.proposals == {}
    finish(again)
    assert lines(path) == lines(whole)
    proposals.write_bytes(b"\0\0\n" + proposals.read_bytes()[:-10])
    finish(ready(path, resume=True))
    assert lines(path) == lines(whole)


def test_what_is_not_there_is_not_resumed(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no run directory"):
        ready(tmp_path / "toy", resume=True)
    assert not (tmp_path / "toy").exists()


def test_a_lost_bundle_of_the_front_is_named(tmp_path: Path) -> None:
    path = tmp_path / "toy"
    finish(ready(path))
    member = min(RunDirectory(path).bundles())
    (path / "models" / str(member)).rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=rf"has no bundle of trial {member}, which is on the front"):
        ready(path, resume=True)


def test_two_searches_do_not_share_a_directory(tmp_path: Path) -> None:
    path = tmp_path / "toy"
    first = ready(path)
    with pytest.raises(UserError, match="toy is in use by another search"):
        ready(path, resume=True)
    finish(first)
    finish(ready(path, resume=True))
