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
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from components.errors import UserError
from search.wandb_plots import Tried
from search.wandb_records import Record, trial_run
from search.wandb_runs import Mode

_WAITING_LIMIT = 10_000  # messages; more are dropped
_CLOSE_TIMEOUT = 30.0  # seconds to finish what is waiting
_HURRIED_TIMEOUT = 3.0  # after Ctrl-C


class WandbLogger:
    """One W&B run per trial, grouped by experiment, and one for the search; as a context manager.

    No method blocks (but `close`, for half a minute at most) or raises. Files are in `<directory>/wandb`.

    Attributes:
        mode: how runs are logged: `auto` until that is known.
        directory: where the files are.
        address: of the search's run; None until it is online.
        dashboard: address of the dashboard; None until there is one.

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
        self.address: str | None = None
        self.dashboard: str | None = None
        self._makes_dashboard = False
        self.directory = directory / "wandb"
        self._place: dict[str, Any] = {"experiment": experiment, "project": project, "entity": entity}
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
            mode=mode,
            config=config or {},
            **self._place,
        )

    def log_trial(self, record: Record, on_front: bool | None = None) -> None:
        """Log a finished trial as a run of its own.

        Args:
            record: `TrialResult.to_record()`.
            on_front: whether it is on the front now, until `log_members` says otherwise; None for unknown.
        """
        self._send("trial", record=record, on_front=on_front)

    def begin_dashboard(self, trial: Callable[[], Record]) -> None:
        """Make the dashboard, in the background, if the runs are online and `wandb-workspaces` is there.

        Only the first call does. Where that fails, `prunefront dashboard` says why.

        Args:
            trial: makes what `make_dashboard` takes; called only if the dashboard is made.
        """
        if self._makes_dashboard or self.address is None:
            return
        self._makes_dashboard = True
        if find_spec("wandb_workspaces") is None:
            return

        def make() -> None:
            with suppress(UserError, OSError):
                self.dashboard = make_dashboard(self.directory.parent, trial=trial(), **self._place)

        threading.Thread(target=make, name="wandb-dashboard", daemon=True).start()

    def log_members(self, numbers: Sequence[int]) -> None:
        """Say which trials are on the front now."""
        self._send("members", numbers=list(numbers))

    def log_tried(self, trials: Sequence[Tried]) -> None:
        """Say which trials were completed; fronts are drawn with them from then on."""
        self._send("tried", trials=list(trials))

    def log_search(self, row: Mapping[str, float | int | None]) -> None:
        """Log the state of the search after a trial: trials finished, front size, hypervolume ..."""
        self._send("search", row={name: value for name, value in row.items() if value is not None})

    def log_front(self, front: Sequence[Record]) -> None:
        """Log the front as it stands, one mapping per trial: a table, in place of the last, and a plot."""
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
            front: one mapping per trial: a table and a plot.
            summary: nested or flat.
            bundles: trial -> directory: versions of an artifact, with the tag `pareto` and the alias
                `trial-00000` and so on.
            aliases: trial -> more aliases of its version, such as `knee`.
            importance: of groups over training, as in a report: a table, a heat map and ranks.
            matters: measurement -> choice -> how much of it that explains: numbers and a plot.
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
                if self._process.wait(end - time.monotonic()) != 0:
                    self._lose_process()
        except (queue.Full, subprocess.TimeoutExpired):
            self._warn_once(
                f"W&B logging had not finished after {timeout:g} s and was ended; trials.jsonl has "
                f"everything, and `prunefront sync` uploads what is in {self.directory}"
            )
        _end_group(self._process)
        for thread in self._threads:
            thread.join(timeout=1)

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
                self.address = report.get("url") or self.address
        self._ended()

    def _ended(self) -> None:
        if not self._closed:
            self._lose_process()

    def _lose_process(self) -> None:
        self._lose(f"W&B logging has ended early (see {self.directory / 'logger.log'})")

    def _lose(self, sentence: str) -> None:
        self._lost = True
        self._warn_once(f"{sentence}; the search goes on without it")

    def _warn_once(self, sentence: str) -> None:
        if sentence not in self._warned:
            self._warned.add(sentence)
            self._warn(sentence)


def account_fault(entity: str | None) -> str:
    """Why W&B takes no runs for an account, in a few words; empty where it does, or nobody answers."""
    return _ask("--check", {"entity": entity}).get("fault", "")


def require_account(mode: Mode, entity: str | None = None) -> None:
    """Refuse to begin a search whose runs are to be online without an account that takes them.

    A server that does not answer is no reason: runs are kept offline then.

    Raises:
        UserError: what is wrong with the API key or the entity.
    """
    if mode == "online" and (fault := account_fault(entity)):
        raise UserError(f"wandb.mode is 'online', but {fault}")


def make_dashboard(
    directory: Path, *, experiment: str, project: str, entity: str | None, trial: Record
) -> str:
    """Make a search's dashboard in W&B, or make it anew, and return its address.

    Args:
        directory: the run directory.
        experiment: its name.
        project: W&B project.
        entity: user or team; None for the account's default.
        trial: one of the search, whatever came of it: what it chose and measured has names.

    Raises:
        UserError: why there is none.
    """
    known = directory / "wandb" / "dashboard"
    content = {
        "experiment": experiment,
        "search_run": _search_run(directory / "wandb"),
        "project": project,
        "entity": entity,
        "objectives": list(trial["objectives"]),
        "choices": [name for name in trial_run(trial)[0] if "/" in name],
        "address": known.read_text() if known.is_file() else None,
    }
    told = _ask("--dashboard", content)
    if "dashboard" not in told:
        raise UserError(f"there is no dashboard in W&B: {told.get('fault') or 'its server does not answer'}")
    known.write_text(told["dashboard"])
    return told["dashboard"]


def _search_run(directory: Path) -> str:
    """Id of the search's run."""
    runs = sorted(directory.glob("*run-*-search"), key=lambda run: run.name.partition("run-")[2])
    if not runs:
        raise UserError(f"{directory} has no W&B run of a search: wandb.mode was 'disabled', or no trial ran")
    return runs[-1].name.partition("run-")[2].partition("-")[2]


def _ask(question: str, content: Mapping[str, Any]) -> dict[str, str]:
    """What the logging process says to one question; nothing where it fails or takes too long."""
    try:
        told = subprocess.run(
            [*_COMMAND, question],
            env=_environment(),
            input=json.dumps(content),
            capture_output=True,
            text=True,
            check=True,
            timeout=_CLOSE_TIMEOUT,
        )
        answer: dict[str, str] = json.loads(told.stdout)
    except (OSError, subprocess.SubprocessError, ValueError):
        return {}
    return answer


# -P: a directory named wandb where the search was started is not the package.
_COMMAND = [sys.executable, "-P", "-m", "search.wandb_runs"]


def _environment(directory: Path | None = None) -> dict[str, str]:
    """Of the logging process, which keeps everything in a directory."""
    root = str(Path(__file__).resolve().parent.parent)
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    # Artifacts wait there for their upload; W&B's own choice is the home directory.
    data = {} if directory is None else {"WANDB_DATA_DIR": str(directory.absolute() / "data")}
    # With a server that does not answer, wandb waits for as long, and to report its own troubles even longer.
    patience = {"WANDB_HTTP_TIMEOUT": "5", "WANDB_ERROR_REPORTING": "false"}
    return {**patience, **os.environ, **data, "PYTHONPATH": path}


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
    """End the process; what wandb has started ends by itself when it is gone."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(timeout=1)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue
        return
