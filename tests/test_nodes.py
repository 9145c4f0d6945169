"""A search on two nodes of a Ray cluster that share no files, one of which is lost on the way."""

from __future__ import annotations

import json
import os
import secrets
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
OTHER = "other-node"
PATIENCE = 120.0
TOKEN = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
"""As on machines of their own, which have no file with a token in common."""

EXPERIMENT = """
name: spread
agent: {kind: "toy_agents:Toy"}
pruning: {metrics: [l2], fine_tune: {updates: 400}}
search: {trials: %d, sampler: random}
wandb: {mode: disabled}
"""


def _may_unshare() -> bool:
    probe = ["unshare", "--mount", "--uts", "sh", "-c", f"hostname {OTHER} && mount -t tmpfs none /dev/shm"]
    try:
        return subprocess.run(probe, check=False, capture_output=True, timeout=30).returncode == 0
    except OSError:
        return False


def _wait(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.1)


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex(("127.0.0.1", port)) == 0


@contextmanager
def node(arguments: list[str], directory: Path, hidden: list[Path]) -> Iterator[subprocess.Popen[bytes]]:
    """A Ray node that runs until the end; with hidden directories, in namespaces of its own.

    Its modules come from nowhere but its installation, and what lies in the hidden directories is not there.
    """
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", *arguments, "--block", "--num-cpus=1"]
    if hidden:
        mounts = [f"mount -t tmpfs none {shlex.quote(str(path))}" for path in hidden]
        script = " && ".join([f"hostname {OTHER}", *mounts, "exec " + shlex.join(command)])
        command = ["unshare", "--mount", "--uts", "sh", "-c", script]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    with (directory / "nodes.log").open("ab") as log:
        process = subprocess.Popen(
            command,
            cwd="/",
            env={**environment, **TOKEN, "RAY_USAGE_STATS_ENABLED": "0"},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        lose(process)


@contextmanager
def head_node(directory: Path, ray_files: Path) -> Iterator[int]:
    """The head of a cluster on this machine; its port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    own = [f"--port={port}", "--node-ip-address=127.0.0.1", f"--temp-dir={ray_files}"]
    with node(["--head", *own, "--include-dashboard=false"], directory, []) as first:
        _wait(lambda: _answers(port) or first.poll() is not None, "the head did not start")
        yield port


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    with (
        tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as ray_files,
        head_node(tmp_path_factory.mktemp("head"), Path(ray_files)) as port,
    ):
        yield port


def lose(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL to everything that a node consists of."""
    from kills import descendants

    everything = [pid for pid, _ in descendants(process.pid)] if process.poll() is None else []
    for pid in [process.pid, *everything]:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait(30)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_nodes_that_share_no_files_and_one_of_them_is_lost(tmp_path: Path) -> None:
    trials = 80
    isolated = _may_unshare()
    storage = tmp_path / "storage"
    storage.mkdir()
    (storage / "spread.yaml").write_text(EXPERIMENT % trials)
    records = storage / "runs" / "spread" / "trials.jsonl"
    code = [ROOT / name for name in ("agents", "components", "search", "tests")]

    def hosts() -> Counter[str]:
        lines = records.read_text().splitlines(keepends=True) if records.exists() else []
        return Counter(json.loads(line)["host"] for line in lines if line.endswith("\n"))

    with ExitStack() as stack:
        # Not below tmp_path: the path of a socket may have 107 characters at most.
        short = tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True)
        ray_files = Path(stack.enter_context(short))
        hidden = [*code, storage, Path("/dev/shm"), ray_files] if isolated else []
        port = stack.enter_context(head_node(tmp_path, ray_files))
        other = stack.enter_context(node([f"--address=127.0.0.1:{port}"], tmp_path, hidden))
        paths = [str(ROOT), str(ROOT / "tests")]
        with (tmp_path / "output").open("wb") as output:
            search = subprocess.Popen(
                [
                    *(sys.executable, "-m", "search.cli", "search", "spread.yaml"),
                    f"--address=127.0.0.1:{port}",
                ],
                cwd=storage,
                env={**os.environ, **TOKEN, "PYTHONPATH": os.pathsep.join(paths)},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )
        stack.callback(search.kill)

        def tail() -> str:
            logs = [(tmp_path / name).read_text(errors="replace")[-2000:] for name in ("output", "nodes.log")]
            return "\n".join([str(hosts()), *logs])

        here = os.uname().nodename

        def enough() -> bool:
            return min(hosts()[here], hosts()[OTHER]) >= 3 if isolated else hosts().total() >= 6

        _wait(lambda: enough() or search.poll() is not None, "")
        assert enough(), tail()
        assert hosts().total() < trials, "it was over before the node could be lost"
        lose(other)
        assert search.wait(PATIENCE) == 0, tail()
        finished = [json.loads(line) for line in records.read_text().splitlines()]
        assert sorted(record["trial"] for record in finished) == list(range(trials))
        assert {record["status"] for record in finished} == {"complete"}, tail()
        if not isolated:
            pytest.skip("the nodes shared their files: namespaces are not allowed here")


OTHER_VERSIONS = """
import platform, sys
import ray
from ray._private import utils
from search.cli import main

mine = {"ray": ray.__version__, "python": platform.python_version(), sys.argv[1]: "2.1.9"}
utils.compute_version_info = lambda: (mine["ray"], mine["python"])
sys.exit(main(["search", "spread.yaml", "--address", sys.argv[2]]))
"""


@pytest.mark.parametrize("mine", ["ray", "python"])
def test_a_cluster_of_other_versions_is_refused_in_one_sentence(mine: str, head: int, tmp_path: Path) -> None:
    (tmp_path / "spread.yaml").write_text(EXPERIMENT % 2)
    told = subprocess.run(
        [sys.executable, "-c", OTHER_VERSIONS, mine, f"127.0.0.1:{head}"],
        cwd=tmp_path,
        env={**os.environ, **TOKEN, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE,
    )
    assert told.returncode == 2, told.stderr
    [sentence] = told.stderr.splitlines()
    start = f"prunefront: the Ray cluster at address '127.0.0.1:{head}' cannot be joined: Version mismatch"
    assert sentence.startswith(start)
    assert "2.1.9" in sentence
