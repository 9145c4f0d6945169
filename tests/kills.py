"""Searches in processes of their own that are killed again and again, and go on.

A kill is SIGKILL, at a random moment, of the driver, a worker, the raylet or Ray's head (GCS), or of the
driver between the line in trials.jsonl and the study. What is left at the end is checked by `verify`.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import optuna

from search.run_directory import RunDirectory

HERE = Path(__file__).resolve().parent
KINDS = ("driver", "worker", "raylet", "gcs", "between")
LOST = (75, 1)
"""How a search may end whose Ray cluster was killed: by its own word, or by Ray's, which is none."""

PATIENCE = 240.0  # seconds for one step of a search; a busy machine needs tens of them to start Ray

EXPERIMENT = """
name: killed
agent: {kind: "toy_agents:Toy"}
pruning: {metrics: [l2], fine_tune: {updates: 10}}
search: {trials: %d, sampler: random, concurrency: 2, retries: 20}
wandb: {mode: disabled}
"""

BETWEEN = """
import os, signal, sys
from search.study import Study
tell, told = Study.tell, []
def killing(self, result):
    told.append(result.number)
    if len(told) == int(sys.argv[1]):
        os.kill(os.getpid(), signal.SIGKILL)
    tell(self, result)
Study.tell = killing
from search.cli import main
sys.exit(main(sys.argv[2:]))
"""
"""The command, killed after a record was written and before the study hears of it."""


@dataclass
class KilledSearch:
    """One search of the toy agent in a directory, through any number of kills.

    Attributes:
        directory: the run directory is `runs/killed` in it.
        trials: to run in all.
        log: what the processes printed, and the kills.
        seen: whole lines of trials.jsonl when it was last looked at: it may only grow.
    """

    directory: Path
    trials: int
    log: list[str] = field(default_factory=list)
    seen: bytes = b""
    _process: subprocess.Popen[bytes] | None = None
    _starts: int = 0

    @property
    def run(self) -> RunDirectory:
        return RunDirectory(self.directory / "runs" / "killed")

    @property
    def finished(self) -> int:
        """Whole lines of trials.jsonl, none of which may ever be lost or change."""
        content = self.run.trials.read_bytes() if self.run.trials.exists() else b""
        content = content[: content.rfind(b"\n") + 1]
        assert content.startswith(self.seen), f"a finished trial was lost or changed\n{self.tail()}"
        self.seen = content
        return content.count(b"\n")

    def kill(self, kind: str, after: int, random_source: random.Random) -> None:
        """Let so many further trials finish, and kill; a search that ends before that is let go."""
        before = self.finished
        if kind == "between":
            self.stop()
            self._start(["-c", BETWEEN, str(after)])
            self._await(lambda: self._ended)
            self._require_code(-9)
            self.log.append(f"killed between record and study at {self.finished} of {self.trials}")
            return
        while True:
            if self._ended:
                self._start(["-m", "search.cli"])
            self._await(lambda: self._ended or self.finished >= before + after)
            time.sleep(0.3 * random_source.random())
            # Where workers are just being replaced, there is none for a moment.
            self._await(lambda: self._ended or bool(self._victims(kind)))
            victims = [] if self._ended else self._victims(kind)
            if victims:
                break
            if self._ended:
                self._require_code(*LOST)  # to the kill before; it goes on
        with suppress(ProcessLookupError):
            os.kill(victims[0], signal.SIGKILL)
        self.log.append(f"killed {kind} {victims[:1]} at {self.finished} of {self.trials}")
        if kind == "driver":
            self._await(lambda: self._ended)
            self._require_code(-9)

    def finish(self) -> None:
        """Resume until the command has ended by itself."""
        while True:
            if self._ended:
                self._start(["-m", "search.cli"])
            assert self._process is not None
            code = self._process.wait(PATIENCE)
            if code == 0:
                return
            self._require_code(*LOST)

    def tail(self) -> str:
        """The kills, and the end of what was printed."""
        output = (self.directory / "output").read_text(errors="replace")
        return "\n".join([*self.log, output[-3000:]])

    def _require_code(self, *codes: int) -> None:
        assert self._process is not None
        code = self._process.wait(PATIENCE)
        self.log.append(f"ended with {code}")
        assert code in codes, self.tail()
        # Threads of Ray's own may end with a traceback; the command may not.
        assert "search/cli.py" not in (self.directory / "output").read_text(errors="replace"), self.tail()

    @property
    def _ended(self) -> bool:
        return self._process is None or self._process.poll() is not None

    def _start(self, interpreter: list[str]) -> None:
        experiment = self.directory / "killed.yaml"
        experiment.write_text(EXPERIMENT % self.trials)
        arguments = ["search", str(experiment), *(["--resume"] if self._starts else [])]
        paths = [str(HERE.parent), str(HERE), os.environ.get("PYTHONPATH", "")]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
        with (self.directory / "output").open("ab") as output:
            self._process = subprocess.Popen(
                [sys.executable, *interpreter, *arguments],
                cwd=self.directory,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )
        self._starts += 1

    def stop(self) -> None:
        """End the process, if there is one."""
        if not self._ended:
            assert self._process is not None
            self._process.kill()
            self._process.wait(PATIENCE)

    def _await(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < deadline, self.tail()
            time.sleep(0.02)

    def _victims(self, kind: str) -> list[int]:
        assert self._process is not None
        names = {"worker": "ray::_Worker", "raylet": "raylet/raylet", "gcs": "gcs_server"}
        if kind == "driver":
            return [self._process.pid]
        return [
            pid for pid, command in descendants(self._process.pid) if names[kind] in command.split("\0")[0]
        ]


def kinds_of(kills: int, random_source: random.Random) -> list[str]:
    """So many kinds in random order, each at least once where there are enough."""
    more = random_source.choices(KINDS, k=max(0, kills - len(KINDS)))
    return random_source.sample([*KINDS, *more], k=max(kills, len(KINDS)))[:kills]


def descendants(root: int) -> Iterator[tuple[int, str]]:
    """Process id and command line of all processes that a process has started, directly or not."""
    parents: dict[int, int] = {}
    commands: dict[int, str] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                commands[int(entry.name)] = (entry / "cmdline").read_text(errors="replace")
    found = [root]
    for ancestor in found:
        children = sorted(pid for pid, parent in parents.items() if parent == ancestor)
        found += children
        yield from ((pid, commands.get(pid, "")) for pid in children)


def verify(search: KilledSearch) -> None:
    """Every trial has finished once, and all that is derived from them agrees."""
    run = search.run
    assert search.finished == search.trials, search.tail()
    numbers = [json.loads(line)["trial"] for line in run.trials.read_text().splitlines()]
    assert sorted(numbers) == list(range(search.trials)), search.tail()
    results = run.read_trials()
    assert all(result.complete for result in results), search.tail()
    storage = optuna.storages.RDBStorage(f"sqlite:///{run.study}")
    try:
        trials = optuna.load_study(study_name="killed", storage=storage).trials
    finally:
        storage.remove_session()
        storage.engine.dispose()
    assert {trial.state for trial in trials} == {optuna.trial.TrialState.COMPLETE}
    errors = {trial.user_attrs["trial"]: trial.values[1] for trial in trials}
    assert len(errors) == len(trials) == search.trials
    assert errors == {result.number: result.objectives["reconstruction_error"] for result in results}
    front = {entry["trial"] for entry in run.read_front()["trials"]}
    assert run.bundles() == front
    values = [
        (result.objectives["parameters"], result.objectives["reconstruction_error"]) for result in results
    ]
    beaten = {
        result.number
        for result, mine in zip(results, values, strict=True)
        if any(all(a <= b for a, b in zip(other, mine, strict=True)) and other != mine for other in values)
    }
    assert front <= set(numbers) - beaten
    assert {values[i] for i, result in enumerate(results) if result.number not in beaten} == {
        values[i] for i, result in enumerate(results) if result.number in front
    }
