"""Runs in Weights & Biases, in a process of their own: the only place that imports wandb.

Started by `search.wandb_logger` as `python -m search.wandb_runs`: messages come in on standard input, one
JSON object per line, and reports go out on standard output.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from search.wandb_records import Record, flat, front_table, importance_table, trial_run

Mode = Literal["auto", "online", "offline", "disabled"]

COURSE = ("failed", "stopped", "front_size", "hypervolume", "trials_per_minute")
"""What the search's run has over its trials; the axis is `finished`."""

_SERVER_TIMEOUT = 5  # seconds that one call to the server may take
_FAILURE_LIMIT = 3  # failures in a row, after which nothing more is tried


class _Runs:
    """The runs, in the process that owns them."""

    def __init__(self, report: Callable[[dict[str, str]], None]) -> None:
        self._report = report
        self._search: Any = None
        self._open: dict[int, Any] = {}  # runs of the trials that are on the front
        self._failures = 0

    def handle(self, message: dict[str, Any]) -> None:
        """Do what one message says.

        After several failures in a row nothing but the end; after one at the start, nothing at all.
        """
        kind = message.pop("kind")
        if (self._search is None and kind != "start") or (
            self._failures >= _FAILURE_LIMIT and kind not in ("finish", "close")
        ):
            return
        try:
            getattr(self, kind)(**message)
        except Exception as error:
            self._failures += 1
            ends = self._failures == _FAILURE_LIMIT or kind == "start"
            goes = "no more is logged, and the search goes on" if ends else "the search goes on"
            self._report({"warning": f"W&B logging failed ({_first_line(error)}); {goes}"})
        else:
            self._failures = 0

    def start(
        self,
        directory: str,
        experiment: str,
        mode: Mode,
        project: str,
        entity: str | None,
        config: dict[str, Any],
    ) -> None:
        """Decide where runs go, and begin the run of the search."""
        self._directory = directory
        self._experiment = experiment
        self._project, self._entity = project, entity
        self._prefix = _search_id(Path(directory) / "wandb", experiment)
        self._mode = self._resolve(mode)
        self._search = self._new_run(f"{self._prefix}-search", experiment, "search", flat(config))
        self._search.define_metric("finished", summary="max")
        for name in COURSE:
            self._search.define_metric(name, step_metric="finished")
        self._report({"mode": self._mode})

    def trial(self, record: dict[str, Any], on_front: bool | None = None) -> None:
        """A run for one trial."""
        config, rows, summary = trial_run(record)
        run = self._new_run(self._run_id(record["trial"]), f"trial {record['trial']}", "trial", config)
        for row in rows:
            run.log(row)
        run.summary.update(summary if on_front is None else {**summary, "on_front": on_front})
        if on_front:
            self._open[record["trial"]] = run  # it may yet leave the front
        else:
            run.finish(exit_code=1 if record["status"] == "failed" else 0)

    def members(self, numbers: list[int]) -> None:
        """Which trials are on the front now: the runs of those that have left it end."""
        for number in [number for number in self._open if number not in numbers]:
            run = self._open.pop(number)
            run.summary.update({"on_front": False})
            run.finish()

    def search(self, row: dict[str, Any]) -> None:
        """One row of the search's history."""
        self._search.log(row)

    def front(self, front: list[dict[str, Any]]) -> None:
        """The front as it stands."""
        import wandb

        columns, rows = self._linked(front)
        if rows:
            self._search.log(
                {"live_front": wandb.Table(columns=list(columns), data=rows, log_mode="MUTABLE")}
            )

    def finish(
        self,
        front: list[dict[str, Any]],
        summary: dict[str, Any],
        bundles: dict[str, str],
        aliases: dict[str, list[str]],
        importance: dict[str, Any],
        matters: dict[str, Any],
        report: str | None,
    ) -> None:
        """The front and what made it, the report, the front's bundles, and the end of the search's run."""
        import wandb

        content: dict[str, Any] = {}
        columns, rows = self._linked(front)
        if rows:
            content["front"] = wandb.Table(columns=list(columns), data=rows)
            if {"size_ratio", "retention"} <= set(columns):
                content["front_scatter"] = wandb.plot.scatter(
                    content["front"], "size_ratio", "retention", title="Retention against size"
                )
        columns, rows = importance_table(importance)
        if rows:
            content["importance"] = wandb.Table(columns=list(columns), data=rows)
        if report is not None:
            content["report"] = wandb.Html(
                Path(report).read_text(encoding="utf-8"), inject=False, data_is_not_path=True
            )
        if content:
            self._search.log(content)
        self._search.summary.update({**flat(summary), **flat(matters, "matters/")})
        for number, bundle in bundles.items():
            artifact = wandb.Artifact(
                self._run_id(int(number)), type="bundle", metadata={"experiment": self._experiment}
            )
            artifact.add_dir(bundle)
            self._search.log_artifact(artifact, aliases=aliases.get(number, []), tags=["pareto"])
        self.close()

    def _linked(self, front: Sequence[Record]) -> tuple[list[str], list[list[Any]]]:
        """The table of a front, with the run of every trial."""
        return front_table([{"run": self._run_id(trial["trial"]), **trial} for trial in front])

    def _run_id(self, number: int) -> str:
        return f"{self._prefix}-{number:05d}"

    def close(self) -> None:
        """End all runs that are open."""
        while self._open:
            self._open.popitem()[1].finish()
        if self._search is not None:
            self._search.finish()
            self._search = None

    def _resolve(self, mode: Mode) -> Mode:
        """Online only with a key that a server accepts."""
        import wandb

        wanted = mode
        if mode == "auto" and os.environ.get("WANDB_MODE") in ("online", "offline", "disabled"):
            wanted = os.environ["WANDB_MODE"]  # type: ignore[assignment]
        if wanted not in ("auto", "online"):
            return wanted
        try:
            wandb.login(verify=True, timeout=_SERVER_TIMEOUT)
        except wandb.errors.UsageError as error:  # no key, and nobody to ask for one
            if wanted == "online":
                self._offline(error)
            return "offline"
        except Exception as error:
            self._offline(error)
            return "offline"
        return "online"

    def _offline(self, error: Exception) -> None:
        self._report({"mode": "offline", "warning": f"W&B runs are kept offline: {_first_line(error)}"})

    def _new_run(self, run_id: str, name: str, job_type: str, config: dict[str, Any]) -> Any:
        import wandb

        try:
            return wandb.init(
                project=self._project,
                entity=self._entity,
                dir=self._directory,
                mode=self._mode,  # type: ignore[arg-type]  # never "auto" here
                id=run_id,
                name=name,
                group=self._experiment,
                job_type=job_type,
                config=config,
                reinit="create_new",
                settings=wandb.Settings(
                    console="off",
                    disable_code=True,
                    disable_git=True,
                    finish_timeout=_SERVER_TIMEOUT,
                    init_timeout=_SERVER_TIMEOUT,
                    save_code=False,
                    silent=True,
                    x_disable_meta=True,
                    x_disable_stats=True,
                    x_save_requirements=False,
                ),
            )
        except Exception as error:
            if self._mode != "online":
                raise
            self._mode = "offline"
            self._offline(error)
            for attempt in (Path(self._directory) / "wandb").glob(f"run-*-{run_id}"):
                shutil.rmtree(attempt, ignore_errors=True)  # uploaded later, it would be an empty run
            # The id stays taken by the attempt.
            return self._new_run(f"{run_id}-offline", name, job_type, config)


def key_fault() -> str:
    """What is wrong with the API key, in one line; empty where it is right, or no server says."""
    import wandb

    try:
        wandb.login(verify=True, timeout=_SERVER_TIMEOUT)
    except wandb.errors.UsageError as error:  # there is none
        return _first_line(error)
    except wandb.errors.AuthenticationError as error:
        # Raised where nobody answers as well, told apart by these words alone.
        return "" if "Failed to execute API request" in str(error) else _first_line(error)
    except Exception:
        return ""
    return ""


def _search_id(directory: Path, experiment: str) -> str:
    """What the ids of a search's runs begin with: the same for one run directory, others for any other."""
    file = directory / "search-id"
    if not file.exists():
        name = re.sub(r"[^A-Za-z0-9]+", "-", experiment).strip("-")[:40]
        file.write_text(f"{name}-{secrets.token_hex(4)}")
    return file.read_text()


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _serve() -> None:
    """The logging process: messages from standard input, reports to standard output."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    reports = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what wandb prints goes to the log file

    def report(content: dict[str, str]) -> None:
        with suppress(OSError):  # the search has ended; its runs are finished all the same
            print(json.dumps(content), file=reports, flush=True)

    runs = _Runs(report)
    if sys.argv[1:] == ["--check"]:
        report({"fault": key_fault()})
        return
    for line in sys.stdin:
        runs.handle(json.loads(line))
    runs.handle({"kind": "close"})


if __name__ == "__main__":
    _serve()
