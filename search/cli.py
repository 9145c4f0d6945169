"""The `prunefront` command: arguments in, sentences and exit codes out.

Exit codes: 0 done; 1 a bundle did not pass its verification, or `doctor` found a problem; 2 the request
cannot be met, for one reason; 75 the cluster was lost for good; 130 interrupted. Everything that was finished
is kept in any case.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from search.interruption import sigterm_interrupts

EPILOG = """\
An experiment is the name of one that is shipped (such as `autoencoder`) or the path of a YAML file; a run is
the name of a directory in runs/, or its path. `prunefront COMMAND --help` explains a command.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code.

    Errors that the user can do something about are one sentence on stderr; others keep their traceback.
    """
    options = _parser().parse_args(arguments)
    try:
        _require_own_packages()
        from search import commands  # imports torch: not before the arguments are known to be good
    except ForeignPackageError as error:
        return _refuse(error)
    from components.errors import UserError

    try:
        with sigterm_interrupts():
            return int(getattr(commands, options.command)(options))
    except UserError as error:
        return _refuse(error)
    except KeyboardInterrupt:
        print("\nprunefront: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `prunefront front RUN | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        if error.strerror is None:
            raise
        where = f": {error.filename}" if error.filename else ""
        return _refuse(f"{error.strerror}{where}")


class ForeignPackageError(Exception):
    """A package that would be imported is not this distribution's."""


def _require_own_packages() -> None:
    """Make sure that `agents` and `components` are this distribution's, not another's of the same name.

    Raises:
        ForeignPackageError: saying whose they are and what to do.
    """
    from importlib.util import find_spec

    ours = Path(__file__).resolve().parent.parent
    marks = {"agents": ("agent.py", "def agent_class("), "components": ("tracing.py", "def trace(")}
    for package, (file, mark) in marks.items():
        spec = find_spec(package)
        places = [Path(place).resolve() for place in (spec.submodule_search_locations or ())] if spec else []
        source = ours / package / file
        if (
            places[:1] != [ours / package]
            or not source.is_file()
            or mark not in source.read_text(encoding="utf-8")
        ):
            found = places[0] if places else "nowhere"
            raise ForeignPackageError(
                f"the Python package {package!r} comes from {found}, not from prunefront in {ours}: another "
                "distribution has a package of that name (openai-agents has an 'agents'), so install "
                "prunefront in a virtual environment of its own"
            )


def _refuse(problem: object) -> int:
    print(f"prunefront: {problem}", file=sys.stderr)
    return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="prunefront",
        description="Search the trade-off between the size and the performance of a neural-network agent.",
        epilog=EPILOG,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_search(commands)
    _add_train(commands)
    _add_front(commands)
    _add_importance(commands)
    _add_report(commands)
    _add_sync(commands)
    _add_dashboard(commands)
    _add_select(commands)
    _add_verify(commands)
    _add_profile(commands)
    _add_doctor(commands)
    return parser


def _add_experiment(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "experiment", metavar="EXPERIMENT", help="a shipped experiment's name, or a YAML file"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        dest="overrides",
        metavar="KEY=VALUE",
        help="override a key of the experiment, such as search.seed=1; may be repeated",
    )
    parser.add_argument("--name", help="of the run directory (default: the experiment's name)")
    parser.add_argument("--runs-dir", type=Path, default=Path("runs"), metavar="DIR", help="default: runs")


def _of_run(commands: Any, name: str, words: str, description: str) -> argparse.ArgumentParser:
    """A command that is given a run; `words` say what it does in the list of all."""
    parser: argparse.ArgumentParser = commands.add_parser(name, help=words, description=description)
    parser.add_argument("run", metavar="RUN", help="a run's name in the runs directory, or its path")
    parser.add_argument("--runs-dir", type=Path, default=Path("runs"), metavar="DIR", help="default: runs")
    return parser


def _add_search(commands: Any) -> None:
    parser = commands.add_parser(
        "search",
        help="train a base, run trials on a Ray cluster, print the front",
        description="Train the base, prune it in many ways on a Ray cluster, and print the front.",
    )
    _add_experiment(parser)
    parser.add_argument("--trials", type=int, help="how many trials to run in all (search.trials)")
    parser.add_argument(
        "--hours", type=_finite, help="begin no further trial after so many hours (search.hours)"
    )
    parser.add_argument(
        "--resume", action="store_true", help="go on with the search of this name that ended early"
    )
    parser.add_argument(
        "--address", help="of a running Ray cluster, host:port or auto; default: start one here"
    )


def _add_train(commands: Any) -> None:
    parser = commands.add_parser(
        "train",
        help="train only the base; a search of the same name continues with it",
        description="Train the base of an experiment; a search of the same name continues with it.",
    )
    _add_experiment(parser)
    parser.add_argument(
        "--resume", action="store_true", help="go on with the training of this name that was interrupted"
    )


def _add_front(commands: Any) -> None:
    parser = _of_run(commands, "front", "print the front of a run", "Print the front of a run.")
    parser.add_argument("--json", action="store_true", help="print front.json instead of tables")


def _add_importance(commands: Any) -> None:
    parser = _of_run(
        commands,
        "importance",
        "how the importance of channels moved while the base was trained",
        "Print how groups, components and channels ranked early and late in the training of the base, how "
        "coupling groups compare with others, and how far metrics agree. Needs the base alone.",
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print everything as JSON")
    form.add_argument(
        "--csv",
        action="store_true",
        help="print one line for each score: step, metric, component, group, coupling, channel, score",
    )


def _add_report(commands: Any) -> None:
    _of_run(
        commands,
        "report",
        "write report.html: everything about a run, in one file for any browser",
        "Write report.html into a run directory: the front, what trials chose, importances, failures and the "
        "experiment, in one file that needs no network. A search writes it at its end.",
    )


def _add_sync(commands: Any) -> None:
    _of_run(
        commands,
        "sync",
        "upload the W&B runs of a run that are on the disk only",
        "Upload the W&B runs of a run that are on the disk only, by `wandb sync`. Exit code 1 if that fails.",
    )


def _add_dashboard(commands: Any) -> None:
    _of_run(
        commands,
        "dashboard",
        "make a W&B dashboard of a run, its front first",
        "Make a dashboard in W&B that shows the front of a run first, or make it anew. The run has to be "
        "online there, and wandb-workspaces installed: pip install 'prunefront[dashboard]'. An online search "
        "makes it by itself.",
    )


def _add_select(commands: Any) -> None:
    parser = _of_run(
        commands,
        "select",
        "copy one pruned agent of a front into a directory",
        "Copy the bundle of one trial of a front into a directory of its own. Retention is what the search "
        "saw: validation data.",
    )
    wish = parser.add_mutually_exclusive_group(required=True)
    wish.add_argument(
        "--min-retention",
        type=_finite,
        metavar="R",
        help="the smallest agent that retains at least R (1 = base)",
    )
    wish.add_argument(
        "--max-parameters", type=_finite, metavar="N", help="the best agent of at most N parameters"
    )
    wish.add_argument(
        "--max-latency", type=_finite, metavar="MS", help="the best agent that decides within MS milliseconds"
    )
    wish.add_argument("--knee", action="store_true", help="the agent at the knee of the front")
    wish.add_argument("--trial", type=int, metavar="ID", help="a certain trial of the front")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="new or empty directory")


def _add_verify(commands: Any) -> None:
    parser = commands.add_parser(
        "verify",
        help="reload a pruned agent, reproduce its stored outputs, measure it again",
        description="Reload a bundle, reproduce its stored outputs bit for bit, and measure it again. "
        "Exit code 1 if outputs differ.",
    )
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="the directory that `select` made")


def _add_profile(commands: Any) -> None:
    parser = commands.add_parser(
        "profile",
        help="what a search would do, and what it would cost",
        description="List what a search would choose, check that its constraints can be met, run a trial of "
        "each size and predict what the search would cost. Nothing is written. Takes a minute or two.",
    )
    _add_experiment(parser)
    parser.add_argument("--trials", type=int, help="how many trials to plan for (search.trials)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")


def _add_doctor(commands: Any) -> None:
    parser = commands.add_parser(
        "doctor",
        help="is this machine, or every node of a cluster, ready",
        description="Check versions, packages, renderer, GPUs, memory, storage, W&B and Ray on this machine, "
        "or on every node of a running Ray cluster, and say how to mend what is wrong. "
        "Exit code 1 if there is a problem.",
    )
    parser.add_argument("--address", help="of a running Ray cluster, host:port or auto; default: look here")
    parser.add_argument("--runs-dir", type=Path, default=Path("runs"), metavar="DIR", help="default: runs")
    parser.add_argument(
        "--seconds",
        type=_positive,
        default=120.0,
        metavar="S",
        help="that a node may take to answer (default: 120)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")


def _positive(text: str) -> float:
    value = _finite(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text} is not a finite number")
    return value


if __name__ == "__main__":
    sys.exit(main())
