"""What is looked at on every machine of a cluster. Needs nothing but Python: it is sent along by value.

A node may have another Python, another Ray or no prunefront at all; that is what is to be found out. So this
file imports the standard library only, and everything else where it is looked at.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import math
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

GIGABYTE = 1e9
CGROUP = Path("/sys/fs/cgroup")
LEAST_FREE_DISK = 2 * GIGABYTE
"""Free bytes below which there is too little room; Ray stops making objects at 95 % used."""

LEAST_MEMORY = 0.7 * GIGABYTE
"""Memory that a worker takes with torch and a small base, bytes."""

PROBE_SECONDS = 60
"""How long a probe in a process of its own may take."""

Finding = dict[str, str]
"""`check`, `status` (`ok`, `note` or `problem`), `found`, and `mend`: what to do, empty where nothing is."""

OURS = {
    "agents": ("agent.py", "def agent_class("),
    "components": ("tracing.py", "def trace("),
    "search": ("cli.py", ""),
}
"""Our packages, with a file of each and what it has that nobody else's does."""

CONTROL = "from dm_control import suite; suite.load('cartpole', 'swingup').reset()"
RENDER = "import mujoco; mujoco.GLContext(64, 64).make_current()"


def check_node(facts: Mapping[str, Any]) -> list[Finding]:
    """Everything that can be found out about this machine.

    Args:
        facts: `python` and `ray`, versions of the driver; `requirements`, what prunefront needs, as in its
            metadata; `sent`, where prunefront itself comes along; and from Ray, where it runs: `cpus`,
            `gpus`, `object_store_bytes` and `temporary`, the directory of its files.

    Never raises: a check that fails is a finding.
    """
    checks = (versions, packages, control_tasks, renderer, gpus, memory, shared_memory, disk, processor)
    findings: list[Finding] = []
    for check in checks:
        try:
            findings += check(facts)
        except Exception as error:
            name = check.__name__.replace("_", " ")
            found = f"the check failed: {type(error).__name__}: {error}"
            findings.append(problem(name, found, "see whether Python and its packages are whole there"))
    return findings


def ok(check: str, found: str) -> Finding:
    """Nothing to do."""
    return {"check": check, "status": "ok", "found": found, "mend": ""}


def note(check: str, found: str, mend: str) -> Finding:
    """Worth knowing; a search runs all the same."""
    return {"check": check, "status": "note", "found": found, "mend": mend}


def problem(check: str, found: str, mend: str) -> Finding:
    """A search does not run, or not here."""
    return {"check": check, "status": "problem", "found": found, "mend": mend}


def versions(facts: Mapping[str, Any]) -> list[Finding]:
    """Python and Ray, which have to be the driver's, and every package that prunefront needs."""
    findings = [_python(str(facts["python"])), _ray(str(facts["ray"]))]
    installed, faults = [], []
    for text in facts["requirements"]:
        name, found, fault = _required(text)
        if fault:
            mend = f"in {sys.executable}'s environment: pip install '{text.partition(';')[0].strip()}'"
            faults.append(problem(f"package {name}", fault, mend))
        elif name in ("torch", "optuna", "mujoco", "dm-control", "wandb"):
            installed.append(f"{name} {found}")
    return [*findings, *(faults or [ok("packages", ", ".join(installed))])]


def packages(facts: Mapping[str, Any]) -> list[Finding]:
    """Whether `agents`, `components` and `search` are found, and are prunefront's."""
    places: dict[str, str] = {}
    for package, (file, mark) in OURS.items():
        spec = importlib.util.find_spec(package)
        found = list(spec.submodule_search_locations or ()) if spec else []
        if not found:
            return [_not_installed(f"the Python package {package!r} is not found")]
        source = Path(found[0]) / file
        if not source.is_file() or mark not in source.read_text(encoding="utf-8"):
            mend = "install prunefront in a virtual environment of its own"
            return [problem("prunefront", f"{package!r} is another distribution's, in {found[0]}", mend)]
        places[package] = str(Path(found[0]).parent)
    if facts.get("sent"):
        return [ok("prunefront", f"sent along, as a search does, to {places['search']}")]
    own = _version("prunefront") or "not installed, but found"
    expected = facts.get("prunefront")
    if expected and own != expected:
        mend = f"install prunefront {expected} there"
        return [problem("prunefront", f"{own} in {places['search']}, the driver has {expected}", mend)]
    return [ok("prunefront", f"{own} in {places['search']}")]


def control_tasks(facts: Mapping[str, Any]) -> list[Finding]:
    """Whether dm_control's tasks can be made: some pairs with mujoco cannot."""
    pair = f"mujoco {_version('mujoco')}, dm-control {_version('dm-control')}"
    fault = _probe(CONTROL, {"MUJOCO_GL": "disable"})
    if fault:
        mend = "pip install 'mujoco>=3.17,<4' 'dm-control>=1.0.30': dm-control fails with mujoco 4"
        return [problem("control tasks", f"{pair}: {fault}", mend)]
    return [ok("control tasks", f"cartpole-swingup runs with {pair}")]


def renderer(facts: Mapping[str, Any]) -> list[Finding]:
    """Whether images can be made: only pixel tasks need that."""
    chosen = os.environ.get("MUJOCO_GL", "")
    if chosen in ("disable", "disabled", "off", "false", "0"):
        return [note("renderer", f"MUJOCO_GL is {chosen}: states only", "for pixel tasks: MUJOCO_GL=egl")]
    fault = _probe(RENDER, {"MUJOCO_GL": chosen or "egl"})
    backend = f"MUJOCO_GL={chosen}" if chosen else "egl, the default"
    if fault:
        mend = (
            "only pixel tasks need one: MUJOCO_GL=egl with libegl1, or MUJOCO_GL=osmesa with libosmesa6 "
            "(their names on Debian and Ubuntu)"
        )
        return [note("renderer", f"none ({backend}: {fault})", mend)]
    return [ok("renderer", backend)]


def gpus(facts: Mapping[str, Any]) -> list[Finding]:
    """The GPUs that Ray counts against those that torch sees."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") == ""  # Ray hides them from a task without GPUs
    if hidden:
        del os.environ["CUDA_VISIBLE_DEVICES"]
    try:
        import torch

        seen = torch.cuda.device_count() if torch.cuda.is_available() else 0
        names = ", ".join(torch.cuda.get_device_name(index) for index in range(seen))
        build = torch.__version__
    except ImportError as error:
        return [problem("GPUs", f"torch cannot be imported: {error}", "pip install torch")]
    finally:
        if hidden:
            os.environ["CUDA_VISIBLE_DEVICES"] = ""
    counted = facts.get("gpus")
    if counted is not None and counted != seen:
        mend = (
            "install a build of torch with CUDA that fits the driver of the GPU"
            if counted > seen
            else f"start Ray with --num-gpus={seen}, or look at CUDA_VISIBLE_DEVICES where it is started"
        )
        return [problem("GPUs", f"Ray counts {counted:g}, torch {build} sees {seen}", mend)]
    return [ok("GPUs", f"{seen}: {names}" if seen else "none: trials run on the CPU")]


def memory(facts: Mapping[str, Any]) -> list[Finding]:
    """Whether a worker for every CPU fits into the memory."""
    free = _available_memory()
    if free is None:
        return [note("memory", "the system does not tell", "")]
    workers = max(1, int(facts.get("cpus") or usable_cores()))
    found = f"{free / GIGABYTE:.1f} GB available for {workers} workers"
    if free < LEAST_MEMORY:
        return [
            problem("memory", found, "a worker alone takes 0.7 GB: end other programs, or use a larger one")
        ]
    if free < workers * LEAST_MEMORY:
        most = int(free / LEAST_MEMORY)
        return [note("memory", found, f"a worker takes 0.7 GB: use --set search.concurrency={most}")]
    return [ok("memory", found)]


def shared_memory(facts: Mapping[str, Any]) -> list[Finding]:
    """Whether Ray's object store fits into /dev/shm; where it does not, it is slow, on the disk."""
    place = Path("/dev/shm")
    if not place.is_dir():
        return [note("shared memory", "there is no /dev/shm", "")] if sys.platform == "linux" else []
    usage = shutil.disk_usage(place)
    found = f"/dev/shm has {usage.free / GIGABYTE:.1f} GB"
    store = facts.get("object_store_bytes")
    if store and usage.total < store:
        mend = "give the container more, such as docker run --shm-size=8g"
        return [note("shared memory", f"{found}, Ray's object store {store / GIGABYTE:.1f} GB", mend)]
    if usage.total < GIGABYTE:
        return [note("shared memory", found, "give the container more, such as docker run --shm-size=8g")]
    return [ok("shared memory", found)]


def disk(facts: Mapping[str, Any]) -> list[Finding]:
    """Room for Ray's temporary files."""
    return [free_disk("Ray's disk", Path(facts.get("temporary") or "/tmp"))]


def free_disk(check: str, place: Path) -> Finding:
    """Whether there is room at a place, or at the nearest directory above it."""
    while not place.exists():
        place = place.parent
    usage = shutil.disk_usage(place)
    found = f"{usage.free / GIGABYTE:.1f} GB free in {place}"
    if usage.free < LEAST_FREE_DISK or usage.free < 0.05 * usage.total:
        mend = "make room: Ray keeps no objects on a disk that is more than 95 % full"
        return problem(check, found, mend)
    return ok(check, found)


def processor(facts: Mapping[str, Any]) -> list[Finding]:
    """Cores, threads, and whether bfloat16 is multiplied in hardware."""
    cores, flags = usable_cores(), _processor_flags()
    fast = [name for flag, name in (("amx_bf16", "AMX"), ("avx512_bf16", "AVX-512 BF16")) if flag in flags]
    bfloat = f"bfloat16 in hardware ({', '.join(fast)})" if fast else "no bfloat16 in hardware"
    findings = [ok("processor", f"{cores} cores, {bfloat}")]
    counted = facts.get("cpus")
    threads = os.environ.get("OMP_NUM_THREADS")
    if counted and counted > cores:
        mend = f"more trials than cores slow one another down: start Ray with --num-cpus={cores}"
        findings.append(note("CPUs of Ray", f"{counted:g}, but {cores} cores may be used", mend))
    if threads and threads.isdigit() and int(threads) > cores:
        found = f"OMP_NUM_THREADS is {threads}, with {cores} cores"
        findings.append(
            note("threads", found, "unset it: trials take as many threads as resources.cpus says")
        )
    return findings


def usable_cores() -> int:
    """CPU cores that this process may use, of which a container may have a share."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, int(min(cores, cpu_quota(CGROUP))))


def cpu_quota(cgroup: Path) -> float:
    """How many cores a control group, of version 2 or 1, admits; infinite without a limit."""
    older = [cgroup / "cpu" / f"cpu.cfs_{name}_us" for name in ("quota", "period")]
    for files in ([cgroup / "cpu.max"], older):
        with suppress(OSError, ValueError):
            words = " ".join(file.read_text() for file in files).split()
            quota, period = map(float, words)  # a quota of "max" is no number
            return quota / period if quota > 0 < period else math.inf
    return math.inf


def _python(expected: str) -> Finding:
    own = platform.python_version()
    if own.split(".")[:2] != expected.split(".")[:2]:
        minor = ".".join(expected.split(".")[:2])
        return problem("Python", f"{own}, the driver has {expected}", f"start Ray there with Python {minor}")
    return ok("Python", own)


def _ray(expected: str) -> Finding:
    own = _version("ray")
    if own != expected:
        found = f"{own or 'not installed'}, the driver has {expected}"
        return problem("Ray", found, f"pip install 'ray[tune]=={expected}' and start Ray there again")
    return ok("Ray", own)


def _required(text: str) -> tuple[str, str, str]:
    """Name and version of a requirement as in a distribution's metadata, and what is wrong, if anything."""
    try:
        from packaging.requirements import Requirement
    except ImportError:  # it comes with Ray
        return text, "", "not checked: the package packaging is not installed"
    requirement = Requirement(text)
    if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
        return requirement.name, "", ""
    found = _version(requirement.name)
    if found is None:
        return requirement.name, "", "not installed"
    if not requirement.specifier.contains(found, prereleases=True):
        return requirement.name, found, f"{found}, needed is {requirement.specifier}"
    return requirement.name, found, ""


def _not_installed(found: str) -> Finding:
    return problem(
        "prunefront", found, f"install prunefront for {sys.executable}, as where the search starts"
    )


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _probe(code: str, environment: Mapping[str, str]) -> str:
    """What goes wrong when a process of its own runs some code, in one line; empty where nothing does."""
    command: Sequence[str] = [sys.executable, "-W", "ignore", "-c", code]
    try:
        done = subprocess.run(
            command,
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            check=False,
            timeout=PROBE_SECONDS,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{type(error).__name__}: {error}"
    if done.returncode == 0:
        return ""
    errors = [
        line.strip() for line in done.stderr.splitlines() if "Error" in line and not line.startswith(" ")
    ]
    return (errors or [f"the process ended with code {done.returncode}"])[0][:160]


def _available_memory() -> float | None:
    """Bytes, or None where the system does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    kilobytes = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return 1024.0 * int(kilobytes[0]) if kilobytes else None


def _processor_flags() -> frozenset[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    flags = [line.partition(":")[2].split() for line in lines if line.startswith("flags")]
    return frozenset(flags[0]) if flags else frozenset()
