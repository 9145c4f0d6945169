"""Runs in Weights & Biases, in a process of their own.

Started by `search.wandb_logger` as `python -m search.wandb_runs`: messages come in on standard input, one
JSON object per line, and reports go out on standard output. With `--check` or `--dashboard` it reads one
object, does that, reports and ends.
"""

from __future__ import annotations

import json
import os
import queue
import re
import secrets
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from search.wandb_dashboard import DashboardContent, save_dashboard
from search.wandb_plots import Tried, front_plot, importance_plot, matters_plot, ranks_plot
from search.wandb_records import Record, flat, front_table, importance_table, trial_run

Mode = Literal["auto", "online", "offline", "disabled"]

COURSE = ("failed", "stopped", "front_size", "hypervolume", "trials_per_minute")
"""What the search's run has over its trials; the axis is `finished`."""

_SERVER_TIMEOUT = 5  # seconds that one call to the server may take
_UPLOAD_TIMEOUT = 15  # seconds that uploading the bundles may take
_BEHIND = 50  # messages waiting, above which the server is too slow
_BEHIND_AT_THE_END = 10  # the same when nothing more comes: the search waits
_FAILURE_LIMIT = 3  # failures in a row, after which nothing more is tried


class _Runs:
    """The runs, in the process that owns them."""

    def __init__(self, report: Callable[[dict[str, str]], None]) -> None:
        self._report = report
        self._search: Any = None
        self._mode: Mode = "auto"  # until the start
        # Trials that are on the front, with their runs: open, or None where they end at once, online.
        self._on_front: dict[int, Any] = {}
        self._tried: list[Tried] = []
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
        self._config = flat(config)
        known = self._members_file()
        self._on_front = dict.fromkeys(json.loads(known.read_text())) if known.exists() else {}
        # What a resumed search adds goes behind what there is. Offline, that is decided when it is uploaded.
        # The first part of an online run is not to be continued: `sync` may upload it once more.
        continued = self._mode == "offline" or any(self._folders(f"{self._prefix}-search"))
        self._begin_search(continued=continued)
        self._report({"mode": self._mode, "url": self._search.url or ""})

    def _begin_search(self, *, continued: bool) -> None:
        run_id = f"{self._prefix}-search"
        self._search = self._new_run(run_id, self._experiment, "search", self._config, continued=continued)
        self._search.define_metric("finished", summary="max")
        for name in COURSE:
            self._search.define_metric(name, step_metric="finished")

    def trial(self, record: dict[str, Any], on_front: bool | None = None) -> None:
        """A run for one trial."""
        config, rows, summary = trial_run(record)
        run = self._trial_run(record["trial"], config)
        for row in rows:
            run.log(row)
        run.summary.update(summary if on_front is None else {**summary, "on_front": on_front})
        stays = on_front and self._mode != "online"
        if on_front:
            self._on_front[record["trial"]] = run if stays else None
            self._store_members()
        if not stays:
            self._end(run, exit_code=1 if record["status"] == "failed" else 0)

    def members(self, numbers: list[int]) -> None:
        """Which trials are on the front now: the runs of those that have left it say so."""
        for number in [number for number in self._on_front if number not in numbers]:
            run = self._on_front.pop(number) or self._trial_run(number, {}, continued=True)
            run.summary.update({"on_front": False})
            self._end(run)
        self._store_members()

    def _store_members(self) -> None:
        """For a resumed search, which has to say that they have left the front."""
        _write(self._members_file(), json.dumps(list(self._on_front)))

    def _members_file(self) -> Path:
        return Path(self._directory) / "wandb" / "on-front.json"

    def tried(self, trials: list[Tried]) -> None:
        """Trials that were completed, which the front is drawn with."""
        self._tried += trials

    def search(self, row: dict[str, Any]) -> None:
        """One row of the search's history."""
        self._search.log(row)

    def front(self, front: list[dict[str, Any]]) -> None:
        """The front as it stands."""
        self._check_server()
        if content := self._front_content(front, final=False):
            self._search.log(content)

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

        self._check_server()
        content = self._front_content(front, final=True)
        columns, rows = importance_table(importance)
        if rows:
            content["importance"] = wandb.Table(columns=list(columns), data=rows)
        plots = {
            "importance_plot": importance_plot(importance),
            "ranks_plot": ranks_plot(importance),
            "matters_plot": matters_plot(matters),
        }
        content |= {name: wandb.Plotly(plot) for name, plot in plots.items() if plot is not None}
        if report is not None:
            content["report"] = wandb.Html(
                Path(report).read_text(encoding="utf-8"), inject=False, data_is_not_path=True
            )
        if content:
            self._search.log(content)
        self._search.summary.update({**flat(summary), **flat(matters, "matters/")})
        artifacts = []
        for number, bundle in bundles.items():
            # Versions of one artifact: what an alias points to moves on when the search is resumed.
            artifact = wandb.Artifact(
                f"{self._prefix}-models",
                type="bundle",
                metadata={"experiment": self._experiment, "trial": int(number)},
            )
            artifact.add_dir(bundle)
            names = [_alias(number), *aliases.get(number, [])]
            artifacts.append(self._search.log_artifact(artifact, aliases=names, tags=["pareto"]))
        self._wait_for(artifacts)
        self.close()

    def _front_content(self, front: Sequence[Record], *, final: bool) -> dict[str, Any]:
        """A front as a plot and a table that replaces the last; in the end also as one that stays."""
        import wandb

        columns, rows = self._linked(front)
        if not rows:
            return {}
        return {
            "front_plot": wandb.Plotly(front_plot(front, self._tried)),
            "live_front": wandb.Table(columns=list(columns), data=rows, log_mode="MUTABLE"),
            **({"front": wandb.Table(columns=list(columns), data=rows)} if final else {}),
        }

    def _linked(self, front: Sequence[Record]) -> tuple[list[str], list[list[Any]]]:
        """The table of a front, with the run and the artifact of every trial."""
        return front_table(
            [
                {
                    "run": self._run_id(trial["trial"]),
                    **self._link(trial["trial"]),
                    "model": f"{self._prefix}-models:{_alias(trial['trial'])}",
                    **trial,
                }
                for trial in front
            ]
        )

    def _link(self, number: int) -> dict[str, str]:
        """Where a trial's run is to be looked at; W&B makes a link of it."""
        url = self._search.url
        return {"link": url.removesuffix(self._search.id) + self._run_id(number)} if url else {}

    def _run_id(self, number: int) -> str:
        return f"{self._prefix}-{number:05d}"

    def close(self) -> None:
        """End all runs that are open."""
        while self._on_front:
            _, run = self._on_front.popitem()
            if run is not None:
                self._end(run)
        search, self._search = self._search, None
        if search is not None:
            folder = Path(search.dir).parent
            try:
                search.finish()
            except TimeoutError:
                rest = "not everything has reached W&B yet; `prunefront sync` uploads the rest"
                self._report({"warning": rest})
            else:
                self._check_server()
                # Uploaded once more, it would be appended where it continues another, or go back behind one.
                if self._mode == "online":
                    (folder / f"run-{search.id}.wandb.synced").touch()

    def _end(self, run: Any, exit_code: int = 0) -> None:
        """End the run of a trial."""
        try:
            run.finish(exit_code=exit_code)
        except TimeoutError:
            self.fall_back(TimeoutError("its server takes too long"))

    def _wait_for(self, artifacts: Sequence[Any]) -> None:
        """Let bundles be uploaded: that may take longer than the end of a run waits."""
        end = time.monotonic() + _UPLOAD_TIMEOUT
        for artifact in artifacts if self._mode == "online" else ():
            if (left := round(end - time.monotonic())) < 1:
                break
            with suppress(Exception):  # the end of the run says that something is missing
                artifact.wait(timeout=left)

    def _check_server(self) -> None:
        """Go on offline if the server no longer answers: tables and artifacts would wait for it."""
        import wandb

        if self._mode == "online":
            try:
                wandb.login(verify=True, timeout=_SERVER_TIMEOUT)
            except Exception as error:
                self.fall_back(error)

    def fall_back(self, error: Exception) -> None:
        """Go on offline. What there is of the search's run is on the disk, and the rest goes behind it."""
        import wandb

        if self._mode != "online":
            return
        self._mode = "offline"
        self._offline(error)
        with suppress(Exception):
            wandb.teardown()  # or the ids of its runs stay taken
        if self._search is not None:
            self._begin_search(continued=True)

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

    def _trial_run(self, number: int, config: dict[str, Any], *, continued: bool = False) -> Any:
        return self._new_run(self._run_id(number), f"trial {number}", "trial", config, continued=continued)

    def _new_run(
        self, run_id: str, name: str, job_type: str, config: dict[str, Any], *, continued: bool = False
    ) -> Any:
        import wandb

        settings = wandb.Settings(
            console="off",
            disable_code=True,
            disable_git=True,
            finish_timeout=_SERVER_TIMEOUT,
            finish_timeout_raises=True,
            init_timeout=_SERVER_TIMEOUT,
            save_code=False,
            silent=True,
            x_disable_meta=True,
            x_disable_stats=True,
            x_save_requirements=False,
        )
        before = set(self._folders(run_id))
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
                resume="allow" if continued else None,  # without it, what is logged replaces what there is
                settings=settings,
            )
        except Exception as error:
            if self._mode != "online":
                raise
            self.fall_back(error)
            for attempt in set(self._folders(run_id)) - before:
                shutil.rmtree(attempt, ignore_errors=True)  # uploaded later, it would be an empty run
            return self._new_run(run_id, name, job_type, config, continued=continued)

    def _folders(self, run_id: str) -> Iterator[Path]:
        """Where a run was logged to, now or before."""
        return (Path(self._directory) / "wandb").glob(f"*run-*-{run_id}")


def account_fault(entity: str | None) -> str:
    """Why runs cannot be logged to an account, in one line; empty where they can, or no server says."""
    import wandb

    refuses = "W&B does not take the key: "
    try:
        wandb.login(verify=True, timeout=_SERVER_TIMEOUT)
    except wandb.errors.UsageError as error:  # there is none
        return refuses + _first_line(error)
    except wandb.errors.AuthenticationError as error:
        # Raised where nobody answers as well, told apart by these words alone.
        return "" if "Failed to execute API request" in str(error) else refuses + _first_line(error)
    except Exception:
        return ""
    if entity is None and (entity := os.environ.get("WANDB_ENTITY")) is None:
        return ""
    try:
        viewer = wandb.Api(timeout=_SERVER_TIMEOUT).viewer
        theirs = list(dict.fromkeys(filter(None, [viewer.username, viewer.entity, *viewer.teams])))
        known = bool(viewer.admin) or entity in theirs
    except Exception:
        return ""
    return "" if known else f"wandb.entity {entity!r} is none of its account's: {', '.join(theirs)}"


def make_dashboard(content: DashboardContent) -> dict[str, str]:
    """Make a dashboard: its address as `dashboard`, or what is wrong, in one line, as `fault`."""
    if fault := account_fault(content.entity):
        return {"fault": fault}
    try:
        return {"dashboard": save_dashboard(content)}
    except ImportError:
        return {"fault": "it needs wandb-workspaces: pip install 'prunefront[dashboard]'"}
    except LookupError as error:
        return {"fault": f"{error.args[0]}; `prunefront sync` uploads what is on the disk only"}
    except Exception as error:
        return {"fault": _first_line(error)}


def _search_id(directory: Path, experiment: str) -> str:
    """What the ids of a search's runs begin with: the same for one run directory, others for any other."""
    file = directory / "search-id"
    if not file.exists():
        name = re.sub(r"[^A-Za-z0-9]+", "-", experiment).strip("-")[:40]
        _write(file, f"{name}-{secrets.token_hex(4)}")
    return file.read_text()


def _write(file: Path, content: str) -> None:
    """All of it or nothing, whenever this process is killed.

    `search.durable_files` does that too, and would bring torch into this process.
    """
    new = file.with_name(f"{file.name}.new")
    new.write_text(content)
    new.replace(file)


def _alias(number: int | str) -> str:
    """Of the artifact of a trial."""
    return f"trial-{int(number):05d}"


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _read(messages: queue.Queue[dict[str, Any] | None]) -> None:
    """Take messages in as they come, so that it is known how many wait; None is the end."""
    for line in sys.stdin:
        try:
            messages.put(json.loads(line))
        except ValueError:  # the search was killed while it wrote
            break
    messages.put(None)


def _handle_all(runs: _Runs, messages: queue.Queue[dict[str, Any] | None]) -> None:
    """Handle messages until the end, offline once too many wait: any number may before the first."""
    ended = False
    while (message := messages.get()) is not None:
        left = messages.qsize()
        ended = ended or (left > 0 and messages.queue[-1] is None)
        if left > (_BEHIND_AT_THE_END if ended else _BEHIND):
            runs.fall_back(TimeoutError("its server is slower than the search"))
        runs.handle(message)
    runs.handle({"kind": "close"})


def _serve() -> None:
    """The logging process: messages from standard input, reports to standard output."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    reports = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what wandb prints goes to the log file

    def report(content: dict[str, str]) -> None:
        with suppress(OSError):  # the search has ended; its runs are finished all the same
            print(json.dumps(content), file=reports, flush=True)

    match sys.argv[1:]:
        case ["--check"]:
            report({"fault": account_fault(json.load(sys.stdin)["entity"])})
            return
        case ["--dashboard"]:
            report(make_dashboard(DashboardContent(**json.load(sys.stdin))))
            return
    runs = _Runs(report)
    messages: queue.Queue[dict[str, Any] | None] = queue.Queue()
    threading.Thread(target=_read, args=(messages,), daemon=True).start()
    _handle_all(runs, messages)


if __name__ == "__main__":
    _serve()
