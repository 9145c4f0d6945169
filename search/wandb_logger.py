"""The search's side of Weights & Biases: it hands everything to a process of its own, `search.wandb_runs`.

With a slow or faulty server, everything in wandb but `log` can block. So that process gets one JSON message
per line and is never waited for; it ignores Ctrl-C and ends when its input does, so it finishes its work even
if the search is killed. Whatever happens to it, the search goes on: the user gets one sentence.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from components.errors import UserError
from search.wandb_records import Record
from search.wandb_runs import Mode

_WAITING_LIMIT = 10_000  # messages; more are dropped
_CLOSE_TIMEOUT = 30.0  # seconds to finish what is waiting
_HURRIED_TIMEOUT = 3.0  # after Ctrl-C


class WandbLogger:
    """One W&B run per trial, grouped by experiment, and one for the search; as a context manager.

    No method blocks (but `close`, for half a minute at most) or raises. Files are in `<directory>/wandb`.

    Args:
        directory: the run directory.
        experiment: name of the group and of the search run.
        mode: `auto` is online where an API key is configured and offline elsewhere, unless the environment
            variable WANDB_MODE says otherwise; `online` falls back to offline when no server answers.
        project: W&B project.
        entity: user or team; None for the account's default.
        config: of the search run, nested or flat.
        warn: gets a sentence about anything that went wrong, at most once for each cause.
    """

    def __init__(
        self,
        directory: Path,
        *,
        experiment: str,
        mode: Mode = "auto",
        project: str = "prunefront",
        entity: str | None = None,
        config: Mapping[str, Any] | None = None,
        warn: Callable[[str], None] = lambda sentence: print(sentence, file=sys.stderr),
    ) -> None:
        self.mode: Mode = mode
        self.directory = directory / "wandb"
        self._warn = warn
        self._warned: set[str] = set()
        self._lost = False
        self._closed = mode == "disabled"
        self._process: subprocess.Popen[str] | None = None
        if mode == "disabled":
            return
        self._waiting: queue.Queue[str | None] = queue.Queue(_WAITING_LIMIT)
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._process = _start_process(self.directory / "logger.log")
        except OSError as error:
            self._lose(f"W&B logging could not start ({error})")
            return
        self._threads = [
            threading.Thread(target=work, args=(stream,), name=f"wandb-{name}", daemon=True)
            for name, work, stream in (
                ("writer", self._write, self._process.stdin),
                ("reader", self._read, self._process.stdout),
            )
        ]
        for thread in self._threads:
            thread.start()
        self._send(
            "start",
            directory=str(directory.absolute()),
            experiment=experiment,
            mode=mode,
            project=project,
            entity=entity,
            config=config or {},
        )

    def log_trial(self, record: Record, on_front: bool | None = None) -> None:
        """Log a finished trial as a run of its own.

        Args:
            record: `TrialResult.to_record()`.
            on_front: whether it is on the front now, until `log_members` says otherwise; None for unknown.
        """
        self._send("trial", record=record, on_front=on_front)

    def log_members(self, numbers: Sequence[int]) -> None:
        """Say which trials are on the front now."""
        self._send("members", numbers=list(numbers))

    def log_search(self, row: Mapping[str, float | int | None]) -> None:
        """Log the state of the search after a trial: trials finished, front size, hypervolume ..."""
        self._send("search", row={name: value for name, value in row.items() if value is not None})

    def log_front(self, front: Sequence[Record]) -> None:
        """Log the front as it stands, one mapping per trial, in place of the one before."""
        self._send("front", front=list(front))

    def finish(
        self,
        front: Sequence[Record],
        summary: Record,
        *,
        bundles: Mapping[int, Path] | None = None,
        aliases: Mapping[int, Sequence[str]] | None = None,
        importance: Record | None = None,
        matters: Record | None = None,
        report: Path | None = None,
    ) -> None:
        """Log what the search came to, and end its run.

        Args:
            front: one mapping per trial: a table and a scatter plot.
            summary: nested or flat.
            bundles: trial -> directory: artifacts with the tag `pareto`.
            aliases: trial -> names of its artifact, such as `knee`.
            importance: of groups over training, as in a report: a table.
            matters: measurement -> choice -> how much of it that explains.
            report: a page, to be looked at beside the charts.
        """
        self._send(
            "finish",
            front=list(front),
            summary=summary,
            bundles={str(number): str(path.absolute()) for number, path in (bundles or {}).items()},
            aliases={str(number): list(names) for number, names in (aliases or {}).items()},
            importance=importance or {},
            matters=matters or {},
            report=None if report is None else str(report.absolute()),
        )

    def close(self, timeout: float = _CLOSE_TIMEOUT) -> None:
        """Let the process finish what it was given, for at most `timeout` seconds, then end it."""
        if self._closed or self._process is None:
            return
        if self._process.poll() is not None:
            self._ended()
        self._closed = True
        end = time.monotonic() + timeout
        try:
            if not self._lost:
                self._waiting.put(None, timeout=timeout)
                self._process.wait(end - time.monotonic())
        except (queue.Full, subprocess.TimeoutExpired):
            self._warn_once(
                f"W&B logging had not finished after {timeout:g} s and was ended; "
                f"trials.jsonl has everything, and `wandb sync` uploads what is in {self.directory}"
            )
        _end_group(self._process)
        for thread in self._threads:
            thread.join(timeout=1)

    def where(self) -> str | None:
        """Where to find the runs, in one sentence; None if there are none."""
        if self._process is None:
            return None
        if self.mode == "online":
            return f"W&B runs are online, and in {self.directory}"
        return (
            f"W&B runs are in {self.directory}; upload them with: "
            f"wandb sync --include-online --yes {self.directory}"
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(_HURRIED_TIMEOUT if kind is KeyboardInterrupt else _CLOSE_TIMEOUT)

    def _send(self, kind: str, **content: Any) -> None:
        if self._closed or self._lost:
            return
        try:
            self._waiting.put_nowait(json.dumps({"kind": kind, **content}))
        except queue.Full:
            self._warn_once("W&B logging is too slow for this search: some trials are missing there")
        except (TypeError, ValueError) as error:
            self._warn_once(f"something could not be logged to W&B ({error})")

    def _write(self, stream: IO[str]) -> None:
        try:
            with stream:
                while (message := self._waiting.get()) is not None:
                    stream.write(message + "\n")
                    stream.flush()
        except (OSError, ValueError):
            self._ended()

    def _read(self, stream: IO[str]) -> None:
        with stream:
            for line in stream:
                report = json.loads(line)
                if "warning" in report:
                    self._warn_once(report["warning"])
                if "mode" in report:
                    self.mode = report["mode"]
        self._ended()

    def _ended(self) -> None:
        if not self._closed:
            self._lose(f"W&B logging has ended early (see {self.directory / 'logger.log'})")

    def _lose(self, sentence: str) -> None:
        self._lost = True
        self._warn_once(f"{sentence}; the search goes on without it")

    def _warn_once(self, sentence: str) -> None:
        if sentence not in self._warned:
            self._warned.add(sentence)
            self._warn(sentence)


def require_key(mode: Mode) -> None:
    """Refuse to begin a search whose runs are to be online with a key that is missing or wrong.

    A server that does not answer is no reason: runs are kept offline then.

    Raises:
        UserError: what is wrong with the key.
    """
    if mode != "online":
        return
    try:
        told = subprocess.run(
            [*_COMMAND, "--check"],
            env=_environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=True,
            timeout=_CLOSE_TIMEOUT,
        )
        fault = json.loads(told.stdout)["fault"]
    except (OSError, subprocess.SubprocessError, ValueError, KeyError):
        return
    if fault:
        raise UserError(f"wandb.mode is 'online', but W&B does not take the key: {fault}")


# -P: a directory named wandb where the search was started is not the package.
_COMMAND = [sys.executable, "-P", "-m", "search.wandb_runs"]


def _environment(directory: Path | None = None) -> dict[str, str]:
    """Of the logging process, which keeps everything in a directory."""
    root = str(Path(__file__).resolve().parent.parent)
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    # Artifacts wait there for their upload; W&B's own choice is the home directory.
    data = {} if directory is None else {"WANDB_DATA_DIR": str(directory.absolute() / "data")}
    return {**os.environ, **data, "PYTHONPATH": path}


def _start_process(log: Path) -> subprocess.Popen[str]:
    with log.open("a") as errors:
        return subprocess.Popen(
            _COMMAND,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            encoding="utf-8",
            env=_environment(log.parent),
            start_new_session=True,  # a terminal's Ctrl-C is not for this process
        )


def _end_group(process: subprocess.Popen[str]) -> None:
    """End the process and whatever it has started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(timeout=1)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue
        return
