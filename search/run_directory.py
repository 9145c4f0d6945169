"""The study directory: the only place that a search writes to, and what it can be read back from.

`trials.jsonl` is the source of truth: one line per finished trial, on the disk before anybody learns of it.
Everything else can be lost and found again from it, or is replaced atomically. `proposals.jsonl` remembers
what was asked for, so that a search that was killed can run again what it was running.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import uuid
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from components.errors import UserError
from search.durable_files import CorruptFileError, one_line, read_json, sync_directory, write_json, write_text
from search.trial_types import Proposal, TrialResult

T = TypeVar("T")


class RunDirectory:
    """`runs/<name>/`: experiment.yaml, base/, trials.jsonl, study.db, models/<trial>/, front.json, wandb/.

    One process at a time may write to it: the one that has claimed it.
    """

    def __init__(self, path: Path) -> None:
        """Use a directory that exists; see `create` and `open`."""
        self.path = path
        self.experiment = path / "experiment.yaml"
        self.base = path / "base"
        self.training = path / "training"  # of the base, while it is under way
        self.trials = path / "trials.jsonl"
        self.proposals = path / "proposals.jsonl"
        self.study = path / "study.db"
        self.models = path / "models"
        self.front = path / "front.json"
        self.wandb = path / "wandb"
        self.lock = path / "lock"
        self.warm_start = path / "warm_start.jsonl"
        self.sweep = path / "gradient.json"
        self.identity = path / "identity"
        self._claim: int | None = None

    @classmethod
    def create(cls, path: Path, experiment_yaml: str) -> RunDirectory:
        """Make a run directory holding the resolved experiment, and claim it; parents are made as needed.

        Raises:
            UserError: the path exists; nothing in it is touched.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            path.mkdir()
        except FileExistsError:
            raise cls.in_use(path) from None
        run = cls(path)
        run.claim()
        write_text(run.identity, f"{uuid.uuid4()}\n")
        write_text(run.experiment, experiment_yaml)
        sync_directory(path.parent)
        return run

    @staticmethod
    def in_use(path: Path) -> UserError:
        """What to raise where a run directory is to be made and something is there."""
        return UserError(
            f"{path} exists and is not overwritten: go on with it by --resume, choose another name with "
            "--name, or remove it"
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

    def claim(self) -> None:
        """Become the one process that writes here, until `release` or the end of the process.

        Raises:
            UserError: another one is.
        """
        if self._claim is not None:
            return
        descriptor = os.open(self.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                owner = os.read(descriptor, 100).decode(errors="replace").strip()
                os.close(descriptor)
                raise UserError(
                    f"{self.path} is in use by another search{f' (process {owner})' if owner else ''}: "
                    "wait for it, or stop it with Ctrl-C"
                ) from None
            # A file system without locks: better unprotected than unusable.
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"{os.getpid()} on {os.uname().nodename}\n".encode())
        self._claim = descriptor

    def release(self) -> None:
        """Let another process write here."""
        if self._claim is not None:
            os.close(self._claim)
            self._claim = None

    def append_trial(self, result: TrialResult) -> None:
        """Add one line to trials.jsonl; it is on the disk when this returns.

        Raises:
            ValueError: a measurement is not finite.
            OSError: it could not be written; the file is as it was before.
        """
        _append(self.trials, result.to_record(), durable=True)

    def append_proposal(self, number: int, proposal: Proposal) -> None:
        """Note what trial `number` is to do, before it begins.

        Not forced onto the disk: a proposal that a power failure takes is made again, and nobody has it yet.
        """
        _append(self.proposals, {"trial": number, **proposal.to_record()}, durable=False)

    def read_trials(self) -> list[TrialResult]:
        """The finished trials, in the order in which they finished; their states are in the bundles.

        A last line that was damaged by a crash is left out with a warning; see `mend`.

        Raises:
            CorruptFileError: any other line is no record of a trial, or a trial is there twice.
        """
        results: list[TrialResult] = []
        seen: set[int] = set()
        for place, result in _read_lines(self.trials, TrialResult.from_record):
            if result.number in seen:
                raise CorruptFileError(f"{self.trials}, line {place}: trial {result.number} is there twice")
            seen.add(result.number)
            results.append(result)
        return results

    def read_proposals(self) -> dict[int, Proposal]:
        """Trial number -> what it was last to do, finished or not; lines that are damaged are left out."""
        found = {}
        for line in self.proposals.read_bytes().split(b"\n") if self.proposals.exists() else []:
            with suppress(*_NO_RECORD):
                number, proposal = _numbered_proposal(_parsed(line))
                found[number] = proposal
        return found

    def read_identity(self) -> str | None:
        """What tells this run from every other one, of the same name too; None in an old directory."""
        return self.identity.read_text().strip() if self.identity.is_file() else None

    def write_warm_start(self, results: Iterable[TrialResult]) -> None:
        """Keep the trials of another search that this one begins with: that one may go on, or away."""
        records = [json.dumps(result.to_record(), allow_nan=False) + "\n" for result in results]
        if records:
            write_text(self.warm_start, "".join(records))

    def read_warm_start(self) -> list[TrialResult] | None:
        """What `write_warm_start` kept; None where it kept nothing."""
        if not self.warm_start.exists():
            return None
        return [result for _, result in _read_lines(self.warm_start, TrialResult.from_record)]

    def forget_proposals(self) -> None:
        """Begin anew: nothing has been asked for."""
        self.proposals.unlink(missing_ok=True)

    def mend(self) -> list[str]:
        """Remove what a crash left half written at the end of trials.jsonl and proposals.jsonl.

        That is what follows the last newline and, of trials.jsonl, a last line that is no record: after a
        power failure its end may be on the disk and its beginning not. What is removed from trials.jsonl is
        kept in trials.jsonl.damaged, and its trial runs again.

        Returns one sentence for each file that was mended.
        """
        notices = []
        _cut(self.proposals, _whole_lines)  # not worth a word: what was asked for is asked for again
        removed = _cut(self.trials, _whole_records)
        if removed:
            damaged = self.trials.with_name(self.trials.name + ".damaged")
            with damaged.open("ab") as file:
                file.write(removed.rstrip(b"\n") + b"\n")
            notices.append(
                f"{self.trials}: its last line was damaged by a crash and has been moved to {damaged.name}"
            )
        return notices

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


def _append(path: Path, record: Mapping[str, Any], *, durable: bool) -> None:
    """Add one line of JSON, whole or not at all."""
    text = json.dumps(record, allow_nan=False, ensure_ascii=False, separators=(",", ":"))
    # Half a surrogate pair becomes JSON's escape of it.
    line = text.encode("utf-8", "backslashreplace") + b"\n"
    new = not path.exists()
    with path.open("ab", buffering=0) as file:
        before = file.tell()
        try:
            if file.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
            if durable:
                os.fsync(file.fileno())
        except OSError as error:
            with suppress(OSError):
                file.truncate(before)
            raise OSError(error.errno, error.strerror, str(path)) from None
    if new and durable:
        sync_directory(path.parent)


def _read_lines(path: Path, read: Callable[[Mapping[str, Any]], T]) -> Iterator[tuple[int, T]]:
    """(line number, what the line means) of a file of JSON lines; nothing where there is no such file.

    Raises:
        CorruptFileError: a line other than the last does not mean anything.
    """
    content = path.read_bytes() if path.exists() else b""
    lines = content.removesuffix(b"\n").split(b"\n") if content else []
    for place, line in enumerate(lines, start=1):
        try:
            value = read(_parsed(line))
        except _NO_RECORD as error:
            if place == len(lines):
                warnings.warn(f"{path}, line {place}: the last line is damaged and left out", stacklevel=3)
                return
            raise CorruptFileError(
                f"{path}, line {place} is corrupt: {type(error).__name__}: {one_line(error)}"
            ) from None
        yield place, value


_NO_RECORD = (ValueError, KeyError, TypeError, AttributeError, RecursionError, UserError)
"""What reading a line raises that is no record."""


def _parsed(line: bytes) -> Any:
    # Decoded here: given bytes, json guesses the encoding, and takes zeros for UTF-32.
    return json.loads(line.decode("utf-8"), parse_constant=_refuse_constant)


def _cut(path: Path, whole: Callable[[bytes], int]) -> bytes:
    """Shorten a file to the part that is whole; returns what was cut off."""
    if not path.exists():
        return b""
    with path.open("r+b") as file:
        content = file.read()
        length = whole(content)
        if length < len(content):
            file.truncate(length)
            os.fsync(file.fileno())
    return content[length:]


def _whole_lines(content: bytes) -> int:
    """The length of a file without a last line that has no end."""
    return content.rfind(b"\n") + 1


def _whole_records(content: bytes) -> int:
    """The length of trials.jsonl without a last line that has no end, or is no record."""
    length = _whole_lines(content)
    start = content.rfind(b"\n", 0, max(0, length - 1)) + 1
    try:
        if length:
            TrialResult.from_record(_parsed(content[start:length]))
    except _NO_RECORD:
        return start
    return length


def _numbered_proposal(record: Mapping[str, Any]) -> tuple[int, Proposal]:
    return int(record["trial"]), Proposal.from_record(record)


def _refuse_constant(constant: str) -> float:
    raise ValueError(f"{constant} is not a finite number")
