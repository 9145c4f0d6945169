"""Runs in Weights & Biases, in a process of their own: the only place that imports wandb.

Started by `search.wandb_logger` as `python -m search.wandb_runs`: messages come in on standard input, one
JSON object per line, and reports go out on standard output.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

Mode = Literal["auto", "online", "offline", "disabled"]
Record = Mapping[str, Any]

_SERVER_TIMEOUT = 5  # seconds that one call to the server may take
_FAILURE_LIMIT = 3  # failures in a row, after which nothing more is tried


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one level, names joined with `/`, as are parts that dots separate.

    W&B's workspaces take a dot in a name for nesting.
    """
    result: dict[str, Any] = {}
    for key, value in config.items():
        name = prefix + str(key).replace(".", "/")
        if isinstance(value, Mapping):
            result |= flat(value, name + "/")
        else:
            result[name] = value
    return result


def trial_run(record: Record) -> tuple[dict[str, Any], list[dict[str, Any]], dict[str, Any]]:
    """What W&B gets of a trial: its configuration, the rows of its history, and its summary; all flat.

    The last row has the measurements, the ones before it the performance and the rung losses along
    fine-tuning. What a stopped or failed trial did not measure is left out.
    """
    config = {
        "trial": record["trial"],
        "origin": record["origin"],
        "seed": record["seed"],
        **flat(record["ratios"], "ratio/"),
        **flat(record["coefficients"], "coefficient/"),
        **flat(record.get("options") or {}, "option/"),
    }
    rungs = [
        *((updates, "performance", value) for updates, value in record.get("rungs") or ()),
        *((updates, "rung_loss", value) for updates, value in record.get("rung_losses") or ()),
    ]
    rows: list[dict[str, Any]] = [
        {"fine_tune/updates": updates, f"fine_tune/{name}": value} for updates, name, value in sorted(rungs)
    ]
    measured = {
        **{name: record.get(name) for name in ("parameters", "size_ratio", "macs", "retention")},
        **flat(record["objectives"]),
        **flat(record["performance"], "performance/"),
    }
    measured = {name: value for name, value in measured.items() if value is not None}
    if measured:
        rows.append(measured)
    summary = {
        "status": record["status"],
        "reason": record["reason"],
        "updates": record.get("updates"),
        **flat(record["component_sizes"], "size/"),
        **flat(record["widths"], "width/"),
        **flat(record["timings"], "seconds/"),
        **flat(record.get("fine_tuning") or {}, "fine_tuning/"),
        "repaired_by": record.get("repaired_by") or None,
        **{name: record.get(name) for name in ("host", "started", "finished")},
    }
    return config, rows, {name: value for name, value in summary.items() if value is not None}


def front_table(front: Sequence[Record]) -> tuple[list[str], list[list[Any]]]:
    """The front as columns and rows: every number, text or truth value of its trials, flattened."""
    rows = [
        {name: value for name, value in flat(trial).items() if isinstance(value, bool | int | float | str)}
        for trial in front
    ]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    return columns, [[row.get(name) for name in columns] for row in rows]


class _Runs:
    """The runs, in the process that owns them."""

    def __init__(self, report: Callable[[dict[str, str]], None]) -> None:
        self._report = report
        self._search: Any = None
        self._failures = 0

    def handle(self, message: dict[str, Any]) -> None:
        """Do what one message says; after several failures in a row, nothing any more."""
        if self._failures == _FAILURE_LIMIT:
            return
        try:
            getattr(self, message.pop("kind"))(**message)
        except Exception as error:
            self._failures += 1
            self._report({"warning": f"W&B logging failed ({_first_line(error)}); the search goes on"})
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
        self._report({"mode": self._mode})

    def trial(self, record: dict[str, Any]) -> None:
        """A run for one trial."""
        config, rows, summary = trial_run(record)
        number = record["trial"]
        run = self._new_run(f"{self._prefix}-{number:05d}", f"trial {number}", "trial", config)
        for row in rows:
            run.log(row)
        run.summary.update(summary)
        run.finish(exit_code=1 if record["status"] == "failed" else 0)

    def search(self, row: dict[str, Any]) -> None:
        """One row of the search's history."""
        self._search.log(row)

    def finish(self, front: list[dict[str, Any]], summary: dict[str, Any]) -> None:
        """The front, and the end of the search's run."""
        import wandb

        columns, rows = front_table(front)
        if rows:
            table = wandb.Table(columns=list(columns), data=rows)
            content: dict[str, Any] = {"front": table}
            if {"size_ratio", "retention"} <= set(columns):
                content["front_scatter"] = wandb.plot.scatter(
                    table, "size_ratio", "retention", title="Retention against size"
                )
            self._search.log(content)
        self._search.summary.update(flat(summary))
        self.close()

    def close(self) -> None:
        """End the search's run, if there is one."""
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
            # The id stays taken by the attempt.
            return self._new_run(f"{run_id}-offline", name, job_type, config)


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
    for line in sys.stdin:
        runs.handle(json.loads(line))
    runs.handle({"kind": "close"})


if __name__ == "__main__":
    _serve()
