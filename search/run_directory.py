"""The study directory: the only place that a search writes to, and what it can be read back from.

`trials.jsonl` is the source of truth: one line per finished trial, on the disk before anybody learns of it.
Everything else can be lost and found again from it, or is replaced atomically.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from components.errors import UserError
from search.durable_files import CorruptFileError, one_line, read_json, sync_directory, write_json, write_text
from search.trial_types import TrialResult


class RunDirectory:
    """`runs/<name>/`: experiment.yaml, base/, trials.jsonl, study.db, models/<trial>/, front.json, wandb/."""

    def __init__(self, path: Path) -> None:
        """Use a directory that exists; see `create` and `open`."""
        self.path = path
        self.experiment = path / "experiment.yaml"
        self.base = path / "base"
        self.trials = path / "trials.jsonl"
        self.study = path / "study.db"
        self.models = path / "models"
        self.front = path / "front.json"
        self.wandb = path / "wandb"

    @classmethod
    def create(cls, path: Path, experiment_yaml: str) -> RunDirectory:
        """Make a run directory holding the resolved experiment; parents are made as needed.

        Raises:
            UserError: the path exists; nothing in it is touched.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            path.mkdir()
        except FileExistsError:
            raise cls.in_use(path) from None
        run = cls(path)
        write_text(run.experiment, experiment_yaml)
        sync_directory(path.parent)
        return run

    @staticmethod
    def in_use(path: Path) -> UserError:
        """What to raise where a run directory is to be made and something is there."""
        return UserError(
            f"{path} exists and is not overwritten: choose another name with --name, or remove it"
        )

    @classmethod
    def open(cls, path: Path) -> RunDirectory:
        """An existing run directory.

        Raises:
            UserError: there is none at the path.
        """
        if not path.is_dir():
            raise UserError(f"there is no run directory {path}")
        run = cls(path)
        if not run.experiment.is_file():
            raise UserError(f"{path} is not a run directory: it has no {run.experiment.name}")
        return run

    def append_trial(self, result: TrialResult) -> None:
        """Add one line to trials.jsonl; it is on the disk when this returns.

        Raises:
            ValueError: a measurement is not finite.
        """
        line = (
            json.dumps(result.to_record(), allow_nan=False, ensure_ascii=False, separators=(",", ":")) + "\n"
        )
        new = not self.trials.exists()
        with self.trials.open("ab") as file:
            file.write(line.encode())
            file.flush()
            os.fsync(file.fileno())
        if new:
            sync_directory(self.path)

    def read_trials(self) -> list[TrialResult]:
        """The finished trials, in the order in which they finished; their states are in the bundles.

        A last line that was cut off by a crash is left out with a warning.

        Raises:
            CorruptFileError: any other line is no record of a trial, or a trial is there twice.
        """
        if not self.trials.exists():
            return []
        lines = self.trials.read_bytes().split(b"\n")
        results: list[TrialResult] = []
        seen: set[int] = set()
        for place, line in enumerate(lines, start=1):
            last = place == len(lines)  # what follows the last newline: nothing, or a line cut off
            if last and not line:
                break
            try:
                result = TrialResult.from_record(json.loads(line, parse_constant=_refuse_constant))
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                if last:
                    warnings.warn(
                        f"{self.trials}, line {place}: the last line is cut off and left out", stacklevel=2
                    )
                    break
                raise CorruptFileError(
                    f"{self.trials}, line {place} is corrupt: {type(error).__name__}: {one_line(error)}"
                ) from None
            if result.number in seen:
                raise CorruptFileError(f"{self.trials}, line {place}: trial {result.number} is there twice")
            seen.add(result.number)
            results.append(result)
        return results

    def write_front(self, front: Mapping[str, Any]) -> None:
        """Replace front.json, atomically."""
        write_json(self.front, front)

    def read_front(self) -> dict[str, Any]:
        """The content of front.json, unchecked but for being JSON.

        Raises:
            CorruptFileError: it is missing or corrupt.
        """
        if not self.front.exists():
            raise UserError(f"{self.path} has no front yet: no trial of the search was completed")
        return read_json(self.front)

    def bundle(self, number: int) -> Path:
        """Where the bundle of a trial belongs."""
        return self.models / str(number)

    def bundles(self) -> set[int]:
        """The trials that have a bundle."""
        if not self.models.is_dir():
            return set()
        return {int(entry.name) for entry in self.models.iterdir() if entry.name.isdigit()}

    def remove_bundles_but(self, numbers: Iterable[int]) -> None:
        """Remove the bundles of all other trials: those that have left the front."""
        for number in self.bundles() - set(numbers):
            shutil.rmtree(self.bundle(number))


def _refuse_constant(constant: str) -> float:
    raise ValueError(f"{constant} is not a finite number")
