"""The Optuna study in a database: what finished trials look like in optuna-dashboard.

It is a projection of `trials.jsonl`: a thread of its own writes it, its faults harm nothing, and where it
holds anything else than those trials, it is made anew.
"""

from __future__ import annotations

import json
import logging
import queue
import sqlite3
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import optuna
import sqlalchemy
from optuna.distributions import BaseDistribution, distribution_to_json
from optuna.storages import RDBStorage
from optuna.storages._rdb import models
from optuna.trial import FrozenTrial

from components.errors import UserError
from search.pareto import Direction

logger = logging.getLogger(__name__)

STILL_SECONDS = 30.0
"""How long `StudyDatabase.close` waits for a database that takes nothing."""

OWNER = "prunefront run"
"""The attribute of a study that says which run it belongs to."""

Numbered = tuple[int, FrozenTrial]
"""The number of a trial in its search, and the trial as Optuna has it."""


class StudyDatabase:
    """Writes finished trials into an Optuna study of a database, from a thread of its own.

    A trial that cannot be written is tried again with the next one and when closing; the first fault is
    logged. A study that is there already keeps its trials, and none is written twice; if it does not agree
    with what is handed over first, it is made anew.

    Args:
        storage: SQLite file, or the URL of a PostgreSQL database.
        name: of the study.
        identity: of the run that the study belongs to; one that belongs to another run is left alone.
    """

    def __init__(self, storage: Path | str, name: str, identity: str | None = None) -> None:
        self._storage = storage
        self._name = name
        self.identity = identity
        self._directions: list[Direction] = []
        self._metric_names: list[str] = []
        self._inbox: queue.SimpleQueue[Sequence[Numbered] | None] = queue.SimpleQueue()
        self._open: tuple[RDBStorage, optuna.Study] | None = None
        self._written: set[int] = set()
        self._faulty = False
        self._thread = threading.Thread(target=self._run, name="study-database", daemon=True)

    def __str__(self) -> str:
        """The file, or the URL without its password."""
        return str(self._storage) if isinstance(self._storage, Path) else without_password(self._storage)

    def require_ready(self, identity: str | None) -> None:
        """Make sure of what can be known before the work begins; a file is taken as it comes.

        Args:
            identity: of the run that goes on; None for a new one, which has no study yet.

        Raises:
            UserError: there is no driver for the database, it does not answer, or it has a study of this
                name that belongs to another run.
        """
        if isinstance(self._storage, Path):
            return
        try:
            storage = self._connect()
            try:
                study = self._existing(storage)
                owner = None if study is None else study.user_attrs.get(OWNER)
            finally:
                _disconnect(storage)
        except ImportError:
            raise UserError(
                f"storage {self} needs the Python package psycopg: pip install 'prunefront[postgresql]'"
            ) from None
        except Exception as error:
            raise UserError(f"storage {self} cannot be used: {_first_line(error)}") from None
        if study is not None and (identity is None or owner != identity):
            raise UserError(
                f"storage {self} has a study {self._name!r} of another run: choose another name with --name, "
                "or go on with that run by --resume"
            )

    def start(self, directions: Sequence[Direction], metric_names: Sequence[str]) -> None:
        """Begin to write; directions and names are those of the objectives."""
        self._directions, self._metric_names = list(directions), list(metric_names)
        self._thread.start()

    def put(self, *trials: Numbered) -> None:
        """Hand over finished trials; returns at once. The first call has all that there were before."""
        self._inbox.put(trials)

    def close(self, seconds: float | None = None) -> None:
        """Wait for what was handed over, as long as it is being written, or for so many seconds."""
        self._inbox.put(None)
        written = -1
        while self._thread.is_alive() and written < len(self._written):
            written = len(self._written) if seconds is None else sys.maxsize
            self._thread.join(STILL_SECONDS if seconds is None else seconds)
        if self._thread.is_alive():
            logger.warning("%s is still being written and may lack the last trials", self)

    def _run(self) -> None:
        pending: list[Numbered] = []
        while (trials := self._inbox.get()) is not None:
            pending += trials
            self._write(pending)
        self._write(pending)
        if self._open is not None:
            _disconnect(self._open[0])

    def _write(self, pending: list[Numbered]) -> None:
        """Write from the front of the list, removing what is written, until a fault."""
        try:
            if pending and self._open is None:
                self._open = self._opened(pending)
            while pending and self._open is not None:
                number, trial = pending[0]
                if number not in self._written:
                    self._open[1].add_trial(trial)
                    self._written.add(number)
                del pending[0]
        except Exception as error:
            if not self._faulty:
                self._faulty = True
                logger.warning("%s cannot be written, the search goes on: %s", self, _first_line(error))

    def _opened(self, known: Sequence[Numbered]) -> tuple[RDBStorage, optuna.Study]:
        """The storage and the study in it; a damaged file is put aside."""
        try:
            return self._connected_study(known)
        except (sqlite3.DatabaseError, sqlalchemy.exc.DatabaseError) as error:
            if not isinstance(self._storage, Path) or not _is_damaged(error):
                raise
            aside = self._storage.with_name(f"{self._storage.name}.damaged")
            self._storage.replace(aside)
            logger.warning("%s was damaged, is now %s and is made anew", self, aside.name)
        return self._connected_study(known)

    def _connected_study(self, known: Sequence[Numbered]) -> tuple[RDBStorage, optuna.Study]:
        storage = self._connect()
        try:
            return storage, self._study_in(storage, known)
        except BaseException:
            _disconnect(storage)
            raise

    def _study_in(self, storage: RDBStorage, known: Sequence[Numbered]) -> optuna.Study:
        """The study: new, or as an earlier search left it that had finished some of the known trials."""
        found = self._existing(storage)
        if found is not None:
            if isinstance(self._storage, str) and found.user_attrs.get(OWNER) != self.identity:
                raise RuntimeError(f"its study {self._name!r} belongs to another run")
            written = _agreement(found, dict(known))
            if written is None:
                logger.warning("%s does not agree with trials.jsonl and is made anew", self)
                optuna.delete_study(study_name=self._name, storage=storage)
                found = None
            else:
                self._written = written
        study = found or optuna.create_study(
            storage=storage, study_name=self._name, directions=self._directions
        )
        study.set_user_attr(OWNER, self.identity)
        identifier = storage.get_study_id_from_name(self._name)
        storage.set_study_system_attr(identifier, "study:metric_names", self._metric_names)
        return study

    def _existing(self, storage: RDBStorage) -> optuna.Study | None:
        if self._name not in [study.study_name for study in storage.get_all_studies()]:
            return None
        return optuna.load_study(study_name=self._name, storage=storage)

    def _connect(self) -> RDBStorage:
        if isinstance(self._storage, str):
            return _FinishedTrials(_with_driver(self._storage), engine_kwargs={"connect_args": _TIMEOUT})
        path = self._storage

        def connect() -> sqlite3.Connection:
            connection = sqlite3.connect(path, check_same_thread=False)
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("PRAGMA synchronous=NORMAL")
            return connection

        # The URL only chooses the dialect: connections come from `connect`, whatever characters the path has.
        return _FinishedTrials("sqlite:///study.db", engine_kwargs={"creator": connect})


_TIMEOUT: dict[str, Any] = {"connect_timeout": 10}


class _FinishedTrials(RDBStorage):
    """A storage to which finished trials are added whole, in a third of the time.

    For every parameter, value and attribute of a trial that is added, Optuna looks whether the trial has it
    already and is unfinished, row by row: about three quarters of the work, for a trial that was not there a
    moment ago. These three methods are not public; where Optuna calls them no more, it is as slow as ever.
    """

    def _set_trial_value_without_commit(
        self, session: Any, trial: models.TrialModel, objective: int, value: float
    ) -> None:
        stored, kind = models.TrialValueModel.value_to_stored_repr(value)
        row = models.TrialValueModel(
            trial_id=trial.trial_id, objective=objective, value=stored, value_type=kind
        )
        session.add(row)

    def _set_trial_param_without_commit(
        self,
        session: Any,
        trial_id: int,
        param_name: str,
        param_value_internal: float,
        distribution: BaseDistribution,
        previous_distribution: BaseDistribution | None = None,
    ) -> None:
        row = models.TrialParamModel(
            trial_id=trial_id,
            param_name=param_name,
            param_value=param_value_internal,
            distribution_json=distribution_to_json(distribution),
        )
        session.add(row)

    def _set_trial_attr_without_commit(
        self, session: Any, model_cls: Any, trial_id: int, key: str, value: Any
    ) -> None:
        session.add(model_cls(trial_id=trial_id, key=key, value_json=json.dumps(value)))


def without_password(url: str) -> str:
    """A database's URL as it may be shown and stored: without a password, wherever it stands."""
    try:
        whole = sqlalchemy.engine.make_url(url)
    except (sqlalchemy.exc.ArgumentError, ValueError):
        return "(no URL)"
    secrets = [key for key in whole.query if "pass" in key.lower()]
    open_part = whole._replace(password=None).difference_update_query(secrets)
    return open_part.render_as_string(hide_password=False)


def _with_driver(url: str) -> str:
    """A plain `postgresql:` means psycopg, version 3, whatever SQLAlchemy would take it for."""
    scheme, separator, rest = url.partition("://")
    return f"postgresql+psycopg://{rest}" if separator and scheme in ("postgresql", "postgres") else url


def _agreement(study: optuna.Study, known: dict[int, FrozenTrial]) -> set[int] | None:
    """Which of the known trials the study has; None where it has anything else."""
    agreed: set[int] = set()
    for trial in study.get_trials(deepcopy=False):
        number = trial.user_attrs.get("trial")
        if not isinstance(number, int) or number not in known or number in agreed:
            return None
        expected = known[number]
        if (trial.state, trial.values, trial.params) != (expected.state, expected.values, expected.params):
            return None
        agreed.add(number)
    return agreed


def _disconnect(storage: RDBStorage) -> None:
    storage.remove_session()
    storage.engine.dispose()


def _is_damaged(error: Exception) -> bool:
    return any(words in str(error) for words in ("not a database", "malformed", "no such table"))


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n", maxsplit=1)[0] or type(error).__name__
