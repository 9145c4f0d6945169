"""The connection to a Ray cluster: start or join it, count what fits on it, ask its nodes, see it die."""

from __future__ import annotations

import logging
import math
import os
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import ray
import torch
from ray import cloudpickle
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from components.errors import UserError
from search.driver import describe

# Tune may wait for a lost head for ever, out of reach of any exception; after so long the process ends.
_HEAD_SECONDS = 8.0

LOST = 75
"""Exit code of a process whose cluster was lost in a way that it could not survive; `--resume` goes on."""

# In force while a search runs, in this process and in the local cluster that it starts.
_ENVIRONMENT = {
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # the coming default, whose announcement is a warning
    "RAY_AIR_NEW_OUTPUT": "0",  # the new output prints a table even when it is told to be silent
    "RAY_gcs_rpc_server_reconnect_timeout_s": "15",  # a lost head ends this process after so long, not 60 s
    "RAY_USAGE_STATS_ENABLED": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # CSV, JSON and TensorBoard files of every trial
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Tune's waits up to 15 s for running trials; ours is below
    "TUNE_GLOBAL_CHECKPOINT_S": "1e9",  # snapshots that nobody reads
    # Workers start side by side; how many there may be the search itself says. With one start at a time, Tune
    # ends the workers that become free meanwhile.
    "TUNE_MAX_PENDING_TRIALS_PG": "10000",
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",  # failures are reported by us
}
# What Ray sets by itself and leaves behind.
_SET_BY_RAY = ("PYTHONBREAKPOINT", "RAY_AUTH_MODE")


def slots_of(cpus: float, gpus: float | None, least: float = 0.0) -> tuple[int, float]:
    """How many trials fit on the cluster at once, and the GPUs of each.

    Args:
        cpus: of a trial.
        gpus: of a trial; None shares the GPUs there are among the trials that the CPUs admit.
        least: the share that a trial's memory needs, below which None does not go.

    Raises:
        UserError: no node can hold one trial.
    """
    nodes = _node_resources()
    by_cpu = [int(node.get("CPU", 0) / cpus) for node in nodes]
    if gpus is None:
        shares = [n / node["GPU"] for n, node in zip(by_cpu, nodes, strict=True) if node.get("GPU") and n]
        # Equal on every node with GPUs, so that trials do not depend on where they run.
        gpus = max(1 / math.ceil(max(1.0, *shares)), least) if shares else 0.0
    slots = count_slots(cpus, gpus)
    if slots == 0:
        most_cpus = max((node.get("CPU", 0) for node in nodes), default=0)
        most_gpus = max((node.get("GPU", 0) for node in nodes), default=0)
        raise UserError(
            f"a trial needs {cpus:g} CPUs and {gpus:g} GPUs, but the largest node of the cluster has "
            f"{most_cpus:g} CPUs and {most_gpus:g} GPUs"
        )
    return slots, gpus


def count_slots(cpus: float, gpus: float) -> int:
    """How many trials of this size the cluster holds now."""
    return sum(
        min(int(node.get("CPU", 0) / cpus), int(node.get("GPU", 0) / gpus) if gpus else sys.maxsize)
        for node in _node_resources()
    )


def _node_resources() -> list[Mapping[str, float]]:
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]


def cluster_lives() -> bool:
    """Whether the cluster still works for this process; without its own node Tune would wait for ever."""
    node = own_node()
    if node.head:  # a cluster of this process's own: its processes are its children
        parts = [node.all_processes.get(part, []) for part in ("gcs_server", "raylet")]
        return all(map(_alive, parts))
    here = ray.get_runtime_context().get_node_id()
    return any(entry["NodeID"] == here and entry["Alive"] for entry in ray.nodes())  # type: ignore[no-untyped-call]


def own_node() -> Any:
    """Ray's account of what this process has started; there is no public one."""
    return ray._private.worker._global_node


@dataclass(frozen=True)
class NodeAnswer:
    """What became of a call on one node.

    Attributes:
        node: its host name and address.
        answer: what the function returned; None where it did not.
        fault: why it did not, in a few words; empty where it did.
    """

    node: str
    answer: Any
    fault: str


def on_every_node(
    function: Callable[[dict[str, Any]], object],
    known: Mapping[str, Any],
    address: str | None,
    seconds: float,
    code: Sequence[Path] = (),
) -> list[NodeAnswer]:
    """Call a function once on every living node of a cluster, all at the same time; it occupies no CPU there.

    Args:
        function: gets what is `known` and, as Ray has them of its node, `cpus`, `gpus`, `object_store_bytes`
            and `temporary`, the directory of Ray's files. The whole module that it is of is sent along, so
            that nodes need not have it; it may import the standard library only.
        known: plain values for every node.
        address: of a running cluster; None starts one on this machine and stops it afterwards.
        seconds: that a node may take to answer.
        code: sent to the nodes of a running cluster, as `connected` does.

    Raises:
        UserError: no cluster answers at the address.
    """
    module = sys.modules[function.__module__]
    cloudpickle.register_pickle_by_value(module)  # type: ignore[no-untyped-call]
    try:
        with ray_environment(), quiet_ray(), connected(address, code):
            every = ray.nodes()  # type: ignore[no-untyped-call]
            nodes = {node["NodeID"]: node for node in every if node["Alive"]}
            task = ray.remote(num_cpus=0, max_retries=0)(function)
            calls = {}
            for identifier, node in nodes.items():
                only_there = NodeAffinitySchedulingStrategy(identifier, soft=False)
                facts = {**known, **_facts(node)}
                calls[identifier] = task.options(scheduling_strategy=only_there).remote(facts)
            ray.wait(list(calls.values()), num_returns=len(calls), timeout=seconds)
            return [_answer_of(node, calls[identifier], seconds) for identifier, node in nodes.items()]
    finally:
        cloudpickle.unregister_pickle_by_value(module)  # type: ignore[no-untyped-call]


def _facts(node: Mapping[str, Any]) -> dict[str, Any]:
    """What Ray says of a node."""
    resources = node["Resources"]
    return {
        "cpus": resources.get("CPU", 0.0),
        "gpus": resources.get("GPU", 0.0),
        "object_store_bytes": resources.get("object_store_memory", 0.0),
        "temporary": str(
            Path(node["ObjectStoreSocketName"]).parents[2]
        ),  # .../session_.../sockets/plasma_store
    }


def _answer_of(node: Mapping[str, Any], call: Any, seconds: float) -> NodeAnswer:
    """What a node has answered by now."""
    name = f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']}:{node['NodeManagerPort']})"
    try:
        return NodeAnswer(name, ray.get(call, timeout=0), "")
    except ray.exceptions.GetTimeoutError:
        ray.cancel(call, force=True)
        return NodeAnswer(name, None, f"it did not answer within {seconds:g} s")
    except Exception as error:
        return NodeAnswer(name, None, f"it could not run the checks: {describe(error)}")


@contextmanager
def connected(address: str | None, code: Sequence[Path] = ()) -> Iterator[None]:
    """Connected to a cluster, whose workers get the code; with no address, to one of this process's own."""
    if address is None:
        with _environment({"PYTHONPATH": _import_path()}):
            try:
                # Never a bare init(): a stale file of an earlier cluster would make that hang.
                ray.init(
                    address="local", include_dashboard=False, configure_logging=False, log_to_driver=False
                )
            except OSError as error:
                if error.errno is None:
                    raise
                place = error.filename or "/tmp/ray, or wherever RAY_TMPDIR says"
                raise UserError(f"Ray cannot start: {error.strerror}: {place}") from error
    else:
        require_answer(address)
        try:
            with _environment({"RAY_gcs_server_port_wait_time_s": "1"}):  # one attempt, not twenty
                ray.init(
                    address=address,
                    configure_logging=False,
                    log_to_driver=False,
                    runtime_env={"py_modules": [str(path) for path in code]} if code else None,
                )
        except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
            whole = " ".join(str(error).split())  # a mismatch of versions takes several lines to tell
            raise UserError(f"the Ray cluster at address {address!r} cannot be joined: {whole}") from error
    heads = own_node().all_processes.get("gcs_server", [])
    left = threading.Event()
    threading.Thread(target=_watch_head, args=(heads, left), name="ray-head-watch", daemon=True).start()
    try:
        yield
    finally:
        if _alive(heads):  # from here on it dies because it is told to, however long that takes
            left.set()
        ray.shutdown()
        left.set()


def _alive(processes: Sequence[Any]) -> bool:
    return all(info.process.poll() is None for info in processes)


def _watch_head(heads: Sequence[Any], left: threading.Event) -> None:
    """End the process if the head of its own cluster has died and it does not get away from it.

    Tune's loop then waits inside Ray, and Ray would end the process a little later, without a word about what
    can be done. Everything that has finished is on the disk.
    """
    while not left.wait(1.0):
        if not _alive(heads) and not left.wait(_HEAD_SECONDS):
            print(
                "\nprunefront: the head of the Ray cluster on this machine died; everything that had "
                "finished is kept, and the same command with --resume goes on from there",
                file=sys.stderr,
                flush=True,
            )
            os._exit(LOST)


def _import_path() -> str:
    """Where this process finds modules besides its installation, for workers on this machine."""
    installed = (sys.prefix, sys.base_prefix)
    paths = [os.path.abspath(path) for path in sys.path if path]
    return os.pathsep.join(path for path in paths if not path.startswith(installed))


def require_room(address: str | None, cpus: float, gpus: float | None) -> None:
    """Ask for a cluster that can hold a trial, before anything is made for it.

    Args:
        address: of a running cluster, which is joined for a moment; None looks at this machine.
        cpus, gpus: of a trial; None for as many GPUs as there are.

    Raises:
        UserError: no cluster answers at the address, it cannot be joined, or no node can hold one trial.
    """
    if address is not None:
        with ray_environment(), quiet_ray(), connected(address):
            slots_of(cpus, gpus)
        return
    with quiet_ray():
        most_cpus = ray._private.utils.get_num_cpus(override_docker_cpu_warning=True)
    most_gpus = torch.cuda.device_count()
    if cpus > most_cpus or (gpus or 0.0) > most_gpus:
        raise UserError(
            f"a trial needs {cpus:g} CPUs and {gpus or 0:g} GPUs, but this machine has {most_cpus:g} CPUs "
            f"and {most_gpus} GPUs that torch can use"
        )


def require_answer(address: str) -> None:
    """Ask for an address that can be right, before Ray tries it for minutes.

    Raises:
        UserError: it cannot be right, or nothing listens there.
    """
    if address == "auto":
        return
    if address.startswith("ray://"):
        raise UserError(
            f"address {address!r} is a Ray Client address; start the search on a machine of the cluster, "
            "with 'auto' or its 'host:port'"
        )
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise UserError(f"address {address!r} is neither 'auto' nor of the form 'host:port'")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
    except (OSError, OverflowError) as error:
        raise UserError(f"no Ray cluster answers at address {address!r} ({describe(error)})") from error


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Environment variables for the time being; those that Ray adds go with them."""
    before = {name: os.environ.get(name) for name in (*variables, *_SET_BY_RAY)}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def ray_environment() -> Iterator[None]:
    """The environment variables that a search needs, in this process and in a cluster that it starts."""
    with _environment(_ENVIRONMENT):
        yield


@contextmanager
def quiet_ray() -> Iterator[None]:
    """Ray's and Tune's own log lines are muted: what a user should know comes from us."""
    ray_logger = logging.getLogger("ray")
    level = ray_logger.level
    # CRITICAL: Tune calls failed trials, and result files that it was told not to write, errors.
    ray_logger.setLevel(logging.CRITICAL)
    try:
        # What the raylet has to say, such as that many workers start, is printed past all loggers.
        with patch.object(ray._private.worker, "print_to_stdstream", lambda *_, **__: None):
            yield
    finally:
        ray_logger.setLevel(level)
