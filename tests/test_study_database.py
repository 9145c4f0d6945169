"""The study's projection into SQLite and a real PostgreSQL server, and what happens where it disagrees."""

from __future__ import annotations

import logging
import math
import sqlite3
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import optuna
import postgresql
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.storages import RDBStorage
from optuna.trial import TrialState, create_trial
from test_study import OBJECTIVES, finish, run, space_of

from components.errors import UserError
from search.study import Study
from search.study_database import StudyDatabase, _FinishedTrials, without_password
from search.trial_types import TrialResult


def study_in(storage: Path | str, name: str = "mine") -> Study:
    return Study(space_of(), OBJECTIVES, "tpe", database=StudyDatabase(storage, name, "this run"))


@contextmanager
def opened(storage: Path | str) -> Iterator[optuna.storages.RDBStorage]:
    """As Optuna opens it."""
    is_file = isinstance(storage, Path)
    url = f"sqlite:///{storage}" if is_file else str(storage).replace("://", "+psycopg://", 1)
    backend = optuna.storages.RDBStorage(url)
    try:
        yield backend
    finally:
        backend.remove_session()
        backend.engine.dispose()


def contents(storage: Path | str, name: str = "mine") -> dict[int, tuple[TrialState, list[float] | None]]:
    """Trial number -> state and values; no number twice."""
    with opened(storage) as backend:
        trials = optuna.load_study(study_name=name, storage=backend).trials
    found = {trial.user_attrs["trial"]: (trial.state, trial.values) for trial in trials}
    assert len(found) == len(trials)
    return found


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with postgresql.server(tmp_path_factory.mktemp("postgresql") / "server") as url:
        yield url


@pytest.fixture(params=["sqlite", "postgresql"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Path | str:
    if request.param == "sqlite":
        return tmp_path / "study.db"
    url: str = request.getfixturevalue("server")
    with opened(url) as backend:
        for name in optuna.get_all_study_names(backend):
            optuna.delete_study(study_name=name, storage=backend)
    return url


def test_a_trial_added_whole_is_what_optuna_would_have_added(tmp_path: Path) -> None:
    distributions = {
        "log": FloatDistribution(0.01, 1.0, log=True),
        "whole": IntDistribution(2, 64, log=True),
        "text": CategoricalDistribution(["a", "b"]),
    }
    some = create_trial(
        values=[math.inf, -2.5],
        params={"log": 0.1, "whole": 8, "text": "b"},
        distributions=distributions,
        user_attrs={"trial": 7, "origin": "tpe", "nested": {"a": [1, None, "ü"]}},
        system_attrs={"ours": [1.5]},
        constraints={"retention >= 0.5": -0.1},
    )
    pruned = create_trial(
        state=TrialState.PRUNED,
        params={"log": 0.5, "whole": 3, "text": "a"},
        distributions=distributions,
        intermediate_values={1: 0.5, 2: math.nan},
    )
    failed = create_trial(state=TrialState.FAIL, user_attrs={"reason": "no"})
    found = []
    for name, storage_class in (("ours", _FinishedTrials), ("optunas", RDBStorage)):
        storage = storage_class(f"sqlite:///{tmp_path / name}")
        study = optuna.create_study(storage=storage, directions=["minimize", "maximize"])
        study.add_trials([some, pruned, failed, some])
        study.set_user_attr("a", 1)
        storage.remove_session()
        again = optuna.load_study(study_name=study.study_name, storage=f"sqlite:///{tmp_path / name}")
        found.append((again.trials, again.user_attrs))
        storage.engine.dispose()
    assert repr(found[0]) == repr(found[1])  # NaN is not equal to itself
    assert [trial.number for trial in found[0][0]] == [0, 1, 2, 3]


def test_a_resumed_study_goes_on_in_the_same_database(storage: Path | str) -> None:
    before = study_in(storage)
    results = run(before, 6)
    before.close()
    after = study_in(storage)
    after.replay(results)
    failed = TrialResult(6, "failed", (proposal := after.ask(6)).plan, proposal.origin, 0, reason="it broke")
    after.tell(failed)
    results += run(after, 8, first=7)
    after.close()
    found = contents(storage)
    assert sorted(found) == list(range(8))
    assert found.pop(6) == (TrialState.FAIL, None)
    assert {state for state, _ in found.values()} == {TrialState.COMPLETE}
    scores = {result.number: result.objectives["score"] for result in results}
    assert {number: (values or [])[1] for number, (_, values) in found.items()} == scores


def test_what_a_kill_kept_from_the_database_is_added(storage: Path | str) -> None:
    before = study_in(storage)
    results = run(before, 5)
    before.close()
    lost = finish(5, before.ask(5))  # in trials.jsonl, and no further
    after = study_in(storage)
    after.replay([*results, lost])
    after.close()
    assert sorted(contents(storage)) == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("disagreement", ["a trial more", "another value", "left running"])
def test_a_database_that_disagrees_is_made_anew(
    storage: Path | str, disagreement: str, caplog: pytest.LogCaptureFixture
) -> None:
    before = study_in(storage)
    results = run(before, 4)
    before.close()
    expected = contents(storage)
    if disagreement == "a trial more":
        results = results[:3]
        del expected[3]
    elif disagreement == "another value":
        other = study_in(storage, "other")
        first = finish(0, other.ask(0), objectives={"parameters": 7.0, "score": 0.5})
        results[0], _ = first, other.close()
        expected[0] = (TrialState.COMPLETE, [pytest.approx(1.945910149), 0.5])
    else:
        with opened(storage) as backend:
            study = optuna.load_study(study_name="mine", storage=backend)
            study.add_trial(create_trial(state=TrialState.RUNNING, user_attrs={"trial": 4}))
    with caplog.at_level(logging.WARNING, logger="search.study_database"):
        after = study_in(storage)
        after.replay(results)
        after.close()
    assert [record.message for record in caplog.records] == [
        f"{StudyDatabase(storage, 'mine')} does not agree with trials.jsonl and is made anew"
    ]
    assert contents(storage) == expected


def test_a_damaged_file_is_put_aside(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "study.db"
    before = study_in(path)
    results = run(before, 3)
    before.close()
    content = path.read_bytes()
    path.write_bytes(b"x" * 2000 + content[2000:])
    with caplog.at_level(logging.WARNING, logger="search.study_database"):
        after = study_in(path)
        after.replay(results)
        after.close()
    assert "was damaged, is now study.db.damaged and is made anew" in caplog.text
    assert sorted(contents(path)) == [0, 1, 2]
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)


def test_a_study_of_another_run_is_left_alone(server: str, caplog: pytest.LogCaptureFixture) -> None:
    database = StudyDatabase(server, "taken")
    database.require_ready(None)
    study = study_in(server, "taken")
    run(study, 2)
    study.close()
    database.require_ready("this run")
    for identity in (None, "another run"):
        with pytest.raises(
            UserError, match=r"storage postgresql://.*/postgres has a study 'taken' of another"
        ):
            database.require_ready(identity)
    other = Study(space_of(), OBJECTIVES, "tpe", database=StudyDatabase(server, "taken", "another run"))
    run(other, 1)
    other.close()
    assert "belongs to another run" in caplog.text
    assert sorted(contents(server, "taken")) == [0, 1]


def test_a_database_that_does_not_answer_is_one_sentence_without_its_password() -> None:
    with pytest.raises(UserError, match=r"storage postgresql://me@127\.0\.0\.1:9/x cannot be used: ") as told:
        StudyDatabase("postgresql://me:secret@127.0.0.1:9/x", "mine").require_ready(None)
    assert "secret" not in str(told.value)
    assert "\n" not in str(told.value)


def test_a_missing_driver_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(
        UserError, match=r"needs the Python package psycopg: pip install 'prunefront\[postgresql\]'"
    ):
        StudyDatabase("postgresql://me@127.0.0.1:9/x", "mine").require_ready(None)


def test_a_file_needs_no_preparation(tmp_path: Path) -> None:
    StudyDatabase(tmp_path / "study.db", "mine").require_ready(None)
    assert not (tmp_path / "study.db").exists()
    assert without_password("nonsense") == "(no URL)"
