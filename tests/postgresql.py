"""A PostgreSQL server of the tests' own, on loopback, in a directory of its own."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psycopg
import pytest

OWNER = "nobody"
"""The server refuses to run as root."""


def programs() -> Path | None:
    """Where `initdb` and `postgres` are; None if there are none."""
    places = sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)  # Debian's: not on the path
    found = shutil.which("postgres")
    places += [Path(found).parent] if found else []
    return next((place for place in places if (place / "initdb").exists()), None)


@contextmanager
def server(directory: Path) -> Iterator[str]:
    """A running server; gives the URL of an empty database. Skips the test where there is no PostgreSQL."""
    bin_directory = programs()
    if bin_directory is None:
        pytest.skip("no PostgreSQL server is installed")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    owner = pwd.getpwnam(OWNER) if os.geteuid() == 0 else None
    directory.mkdir()
    if owner is not None:
        os.chown(directory, owner.pw_uid, owner.pw_gid)
        for parent in directory.parents:
            with suppress(PermissionError):
                parent.chmod(parent.stat().st_mode | 0o011)
    who = {"user": owner.pw_uid, "group": owner.pw_gid} if owner else {}
    data = directory / "data"
    subprocess.run(
        [bin_directory / "initdb", "-D", data, "-U", "me", "-A", "trust", "-N", "-E", "UTF8", "--locale=C"],
        check=True,
        capture_output=True,
        cwd=directory,
        **who,
    )
    with (directory / "log").open("wb") as log:
        process = subprocess.Popen(
            [
                bin_directory / "postgres",
                "-D",
                data,
                "-p",
                str(port),
                "-h",
                "127.0.0.1",
                "-k",
                directory,
                "-F",
            ],
            stdout=log,
            stderr=log,
            cwd=directory,
            **who,
        )
        try:
            url = f"postgresql://me@127.0.0.1:{port}/postgres"
            _wait(url, process)
            yield url
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(30)


def _wait(url: str, process: subprocess.Popen[bytes]) -> None:
    for _ in range(300):
        assert process.poll() is None, "PostgreSQL did not start"
        try:
            psycopg.connect(url, connect_timeout=5).close()
        except psycopg.OperationalError:
            time.sleep(0.1)
        else:
            return
    raise AssertionError("PostgreSQL did not start within half a minute")
