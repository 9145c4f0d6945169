"""`prunefront doctor`: is this machine, or every node of a cluster, ready, and if not, how to mend it."""

from __future__ import annotations

import importlib.metadata
import netrc
import os
import platform
import sqlite3
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlparse

from search.driver import describe
from search.node_checks import Finding, check_node, free_disk, note, ok, problem
from search.own_code import own_code
from search.ray_connection import NodeAnswer, on_every_node

NODE_SECONDS = 120.0
"""How long a node may take to answer."""


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Attributes:
        name: what.
        status: `problem` where a search does not run; `note` where it does, and something is worth knowing.
        found: what is there.
        mend: what to do; empty where nothing is.
    """

    name: str
    status: Literal["ok", "note", "problem"]
    found: str
    mend: str

    @classmethod
    def of(cls, finding: Finding) -> Check:
        """A finding of `search.node_checks`."""
        status: Any = finding["status"]
        return cls(finding["check"], status, finding["found"], finding["mend"])


@dataclass(frozen=True)
class Examined:
    """A machine, or the driver's side of things.

    Attributes:
        name: `this machine`, or a node's host name and address.
        checks: in the order in which they were made.
    """

    name: str
    checks: tuple[Check, ...]

    @property
    def problems(self) -> int:
        """How many checks found a problem."""
        return sum(check.status == "problem" for check in self.checks)


def examine(address: str | None, runs: Path, seconds: float = NODE_SECONDS) -> list[Examined]:
    """Look at this machine or, with an address, at what a search from here needs and at every node.

    Args:
        address: of a running cluster; None starts one here for the moment.
        runs: directory of run directories; nothing stays in it.
        seconds: that a node may take.

    Raises:
        UserError: no cluster answers at the address.
    """
    driver = [storage(runs), free_disk("disk of runs", runs.absolute()), wandb(os.environ), token(os.environ)]
    known = expected()
    if address is not None:
        # With our code, as a search does: nodes need not have it.
        answers = on_every_node(check_node, {**known, "sent": True}, address, seconds, own_code())
        return [_examined("the search's side, here", driver), *(_of_node(answer) for answer in answers)]
    try:
        (answer,) = on_every_node(check_node, known, None, seconds)
        if answer.fault:
            raise RuntimeError(answer.fault)
        findings = [ok("Ray starts", "and has run these checks"), *answer.answer]
    except Exception as error:  # whatever keeps Ray from starting is what is to be told
        mend = "see what else runs here and whether the disk is full; logs: /tmp/ray/session_latest/logs"
        findings = [problem("Ray starts", describe(error), mend), *check_node(known)]
    return [_examined("this machine", [*findings, *driver])]


def expected() -> dict[str, Any]:
    """What nodes are compared with: the versions here, and what prunefront requires."""
    try:
        own = importlib.metadata.version("prunefront")
        requirements = importlib.metadata.requires("prunefront") or []
    except importlib.metadata.PackageNotFoundError:
        own, requirements = None, []
    return {
        "python": platform.python_version(),
        "ray": importlib.metadata.version("ray"),
        "prunefront": own,
        "requirements": requirements,
    }


def storage(runs: Path) -> Finding:
    """Whether the directory of runs takes files that stay, and an SQLite database."""
    place = runs.absolute()
    while not place.exists():
        place = place.parent
    mend = "give a directory of a local disk that you may write to, with --runs-dir"
    try:
        with tempfile.TemporaryDirectory(prefix=".prunefront-doctor-", dir=place) as probe:
            with (Path(probe) / "line").open("wb") as file:
                file.write(b"line\n")
                file.flush()
                os.fsync(file.fileno())
            database = sqlite3.connect(Path(probe) / "study.db")
            try:
                database.execute("PRAGMA journal_mode=WAL")
                database.execute("CREATE TABLE trials (number INTEGER)")
                database.commit()
            finally:
                database.close()
    except (OSError, sqlite3.Error) as error:
        return problem("storage", f"{place}: {describe(error)}", mend)
    where = f"{runs} takes" if place == runs.absolute() else f"{runs} can be made in {place}, which takes"
    return ok("storage", f"{where} files, fsync and SQLite")


def wandb(environment: Mapping[str, str]) -> Finding:
    """What `wandb: {mode: auto}` will do."""
    mode = environment.get("WANDB_MODE", "")
    if mode in ("offline", "disabled"):
        return ok("W&B", f"WANDB_MODE is {mode}: mode auto is {mode}")
    server = environment.get("WANDB_BASE_URL") or "https://api.wandb.ai"
    if environment.get("WANDB_API_KEY"):
        return ok("W&B", f"mode auto is online, with the key in WANDB_API_KEY, at {server}")
    if _has_key(urlparse(server).hostname or server, environment):
        return ok("W&B", f"mode auto is online, with the key in the netrc file, at {server}")
    return note(
        "W&B", "no key: mode auto keeps runs offline, in the run directory", "to be online: wandb login"
    )


def token(environment: Mapping[str, str]) -> Finding:
    """Ray's token, which every machine of a cluster has to have."""
    if environment.get("RAY_AUTH_MODE") == "disabled":
        return note("Ray token", "RAY_AUTH_MODE is disabled: whoever reaches the cluster runs code there", "")
    path = Path(environment.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    if environment.get("RAY_AUTH_TOKEN"):
        return ok("Ray token", "in RAY_AUTH_TOKEN; every machine of a cluster needs the same")
    if path.is_file():
        return ok("Ray token", f"in {path}; every machine of a cluster needs a copy")
    mend = "for a cluster of several machines: ray get-auth-token --generate, and copy the file to each"
    return note("Ray token", f"there is none in {path}; Ray makes one when it starts here", mend)


def _has_key(host: str, environment: Mapping[str, str]) -> bool:
    """Whether a netrc file has a password for a host."""
    chosen = environment.get("NETRC")
    for path in [Path(chosen)] if chosen else [Path.home() / ".netrc", Path.home() / "_netrc"]:
        try:
            if netrc.netrc(path).authenticators(host):
                return True
        except (OSError, netrc.NetrcParseError):
            continue
    return False


def _of_node(answer: NodeAnswer) -> Examined:
    if answer.fault:
        mend = "look at its load and its logs, or start Ray there again: ray start --address=HOST:PORT"
        return _examined(answer.node, [problem("answer", answer.fault, mend)])
    return _examined(answer.node, answer.answer)


def _examined(name: str, findings: list[Finding]) -> Examined:
    return Examined(name, tuple(Check.of(finding) for finding in findings))
