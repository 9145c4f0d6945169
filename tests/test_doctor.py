"""`doctor`: every fault that it can find, made; a cluster of two nodes; exit codes."""

from __future__ import annotations

import json
import math
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from components.errors import UserError
from search import doctor, node_checks, ray_connection
from search.cli import main
from search.doctor import expected, storage, token, wandb
from search.node_checks import Finding, check_node
from search.ray_connection import NodeAnswer, on_every_node

NODE_CHECKS = Path(node_checks.__file__)
NAMES = {"ok", "note", "problem"}


def by_name(findings: list[Finding]) -> dict[str, Finding]:
    assert all(finding["status"] in NAMES for finding in findings)
    assert all(finding["mend"] for finding in findings if finding["status"] == "problem"), findings
    return {finding["check"]: finding for finding in findings}


# --- one machine -----------------------------------------------------------------------------------------


def test_what_is_installed_here_is_as_it_should_be() -> None:
    found = by_name(check_node(expected()))
    assert [name for name, finding in found.items() if finding["status"] == "problem"] == []
    assert found["Python"]["found"] == platform.python_version()
    assert {"Ray", "packages", "prunefront", "control tasks", "renderer", "GPUs", "memory", "processor"} <= {
        *found
    }


@pytest.mark.parametrize(("facts", "check", "words"), [
    ({"python": "3.99.1"}, "Python", "start Ray there with Python 3.99"),
    ({"ray": "1.2.3"}, "Ray", "pip install 'ray[tune]==1.2.3'"),
    ({"requirements": ["torch>=99"]}, "package torch", "pip install 'torch>=99'"),
    ({"requirements": ["no-such-thing>=1; python_version > '3'"]}, "package no-such-thing", "not installed"),
    ({"prunefront": "99.0"}, "prunefront", "the driver has 99.0"),
])  # fmt: skip
def test_a_version_that_does_not_fit_is_a_problem(
    facts: dict[str, Any], check: str, words: str, monkeypatch
) -> None:
    monkeypatch.setattr(node_checks, "_probe", lambda code, environment: "")
    finding = by_name(check_node({**expected(), **facts}))[check]
    assert finding["status"] == "problem"
    assert words in finding["found"] + finding["mend"]


def test_requirements_of_extras_and_of_other_pythons_are_none() -> None:
    texts = ["no-such-thing; extra == 'test'", "no-such-thing; python_version < '3'"]
    found = node_checks.versions({**expected(), "requirements": texts})
    assert [finding["status"] for finding in found] == ["ok", "ok", "ok"]


def elsewhere(arguments: list[str], *code: str, **environment: str) -> list[Finding]:
    """What `node_checks` finds in a Python of its own, which has this file and nothing else of ours."""
    script = (
        "import importlib.util, json, sys\n"
        f"spec = importlib.util.spec_from_file_location('checks', {str(NODE_CHECKS)!r})\n"
        "checks = importlib.util.module_from_spec(spec); spec.loader.exec_module(checks)\n"
        f"print(json.dumps({';'.join(code)}))"
    )
    done = subprocess.run(
        [sys.executable, *arguments, "-c", script],
        env={**os.environ, **environment},
        cwd="/",  # not here, where our packages are
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    findings: list[Finding] = json.loads(done.stdout)
    return findings


def test_a_machine_with_nothing_installed_is_told_so_and_every_check_survives_it() -> None:
    facts = {"python": "3.11.0", "ray": "2.60.0", "prunefront": "0.1.0", "requirements": ["torch>=2.11"]}
    found = by_name(elsewhere(["-I", "-S"], f"checks.check_node({facts!r})"))
    for check in ("Ray", "package torch>=2.11", "prunefront", "GPUs"):
        assert found[check]["status"] == "problem", check
    assert "not installed" in found["Ray"]["found"]
    assert "'agents' is not found" in found["prunefront"]["found"]
    assert found["processor"]["status"] == "ok"


def test_another_distributions_agents_are_noticed(tmp_path) -> None:
    (tmp_path / "agents").mkdir()
    (tmp_path / "agents" / "__init__.py").write_text("")
    (tmp_path / "agents" / "agent.py").write_text("class Agent: ...")
    (found,) = elsewhere([], "checks.packages({})", PYTHONPATH=str(tmp_path))
    assert found["status"] == "problem"
    assert str(tmp_path / "agents") in found["found"]
    assert "virtual environment of its own" in found["mend"]


def test_what_a_search_sends_along_need_not_be_installed() -> None:
    facts = {"prunefront": "99.0"}
    (found,) = node_checks.packages(facts)
    assert (found["status"], found["mend"]) == ("problem", "install prunefront 99.0 there")
    (found,) = node_checks.packages({**facts, "sent": True})
    assert found["status"] == "ok"
    assert found["found"].startswith("sent along, as a search does, to ")


def test_a_pair_of_mujoco_and_dm_control_that_does_not_fit_is_a_problem(monkeypatch) -> None:
    monkeypatch.setattr(node_checks, "CONTROL", "raise AttributeError('no attribute flex_vertedge')")
    (found,) = node_checks.control_tasks({})
    assert found["status"] == "problem"
    assert "AttributeError: no attribute flex_vertedge" in found["found"]
    assert "mujoco>=3.17,<4" in found["mend"]


def test_a_missing_renderer_is_a_note(monkeypatch) -> None:
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    monkeypatch.setattr(node_checks, "RENDER", "import os; raise RuntimeError(os.environ['MUJOCO_GL'])")
    (found,) = node_checks.renderer({})
    assert found["status"] == "note"
    assert "RuntimeError: egl" in found["found"]
    monkeypatch.setattr(node_checks, "RENDER", "")
    assert node_checks.renderer({})[0]["status"] == "ok"
    monkeypatch.setenv("MUJOCO_GL", "disable")
    assert node_checks.renderer({})[0]["status"] == "note"


@pytest.mark.parametrize(("seen", "counted", "status"), [
    (0, 0.0, "ok"), (2, 2.0, "ok"), (0, 1.0, "problem"), (2, 0.0, "problem"), (1, None, "ok"),
])  # fmt: skip
def test_rays_gpus_are_compared_with_torchs(
    seen: int, counted: float | None, status: str, monkeypatch
) -> None:
    import torch

    visible = []

    def count() -> int:
        visible.append(os.environ.get("CUDA_VISIBLE_DEVICES"))
        return seen

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", count)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"GPU {index}")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # as Ray sets it for a task without GPUs
    (found,) = node_checks.gpus({"gpus": counted})
    assert (found["status"], visible) == (status, [None])
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""


@pytest.mark.parametrize(
    ("free", "status"), [(0.1e9, "problem"), (2e9, "note"), (64e9, "ok"), (None, "note")]
)
def test_memory_is_for_a_worker_per_cpu(free: float | None, status: str, monkeypatch) -> None:
    monkeypatch.setattr(node_checks, "_available_memory", lambda: free)
    (found,) = node_checks.memory({"cpus": 8.0})
    assert found["status"] == status


@pytest.mark.parametrize(("total", "free", "status"), [
    (100e9, 50e9, "ok"), (100e9, 1e9, "problem"), (1000e9, 40e9, "problem"),
])  # fmt: skip
def test_a_full_disk_is_a_problem(total: float, free: float, status: str, monkeypatch, tmp_path) -> None:
    usage = SimpleNamespace(total=total, free=free, used=total - free)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert node_checks.free_disk("disk", tmp_path / "not" / "there")["status"] == status
    (found,) = node_checks.shared_memory({"object_store_bytes": 2 * total})
    assert found["status"] == "note"
    assert "--shm-size" in found["mend"]
    assert node_checks.shared_memory({"object_store_bytes": total / 2})[0]["status"] == "ok"


def test_more_cpus_and_threads_than_cores_are_notes(monkeypatch) -> None:
    monkeypatch.setattr(node_checks, "usable_cores", lambda: 4)
    monkeypatch.setenv("OMP_NUM_THREADS", "16")
    found = by_name(node_checks.processor({"cpus": 8.0}))
    assert found["CPUs of Ray"]["status"] == found["threads"]["status"] == "note"
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert [finding["status"] for finding in node_checks.processor({"cpus": 4.0})] == ["ok"]


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, math.inf),
        ({"cpu.max": "max 100000\n"}, math.inf),
        ({"cpu.max": "250000 100000\n"}, 2.5),
        ({"cpu.max": ""}, math.inf),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, math.inf),
        ({"cpu/cpu.cfs_quota_us": "50000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 0.5),
    ],
)
def test_a_containers_share_of_the_cores_is_known(
    files: dict[str, str], cores: float, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert node_checks.cpu_quota(tmp_path) == cores
    monkeypatch.setattr(node_checks, "CGROUP", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(64)))
    assert node_checks.usable_cores() == max(1, min(64, cores // 1))


def test_a_check_that_breaks_is_a_finding(monkeypatch) -> None:
    monkeypatch.setattr(node_checks, "_probe", lambda code, environment: 1 / 0)
    found = {finding["check"]: finding for finding in check_node(expected())}
    assert found["renderer"]["found"].startswith(("the check failed: ZeroDivisionError", "MUJOCO_GL is"))
    assert found["control tasks"]["status"] == "problem"


# --- where the search is started -------------------------------------------------------------------------


def test_storage_leaves_nothing_and_knows_what_it_cannot_write_to(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert storage(Path("runs"))["status"] == "ok"
    assert list(tmp_path.iterdir()) == []
    Path("file").write_text("x")
    assert storage(Path("file/runs"))["status"] == "problem"

    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    found = storage(Path("runs"))
    assert found["status"] == "problem"
    assert "No space left on device" in found["found"]
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_wandb_says_what_mode_auto_will_do(tmp_path) -> None:
    nobody = {"NETRC": str(tmp_path / "netrc")}
    assert wandb(nobody)["status"] == "note"
    assert "offline" in wandb(nobody)["found"]
    assert "online" in wandb({**nobody, "WANDB_API_KEY": "x"})["found"]
    assert "disabled" in wandb({**nobody, "WANDB_API_KEY": "x", "WANDB_MODE": "disabled"})["found"]
    (tmp_path / "netrc").write_text("machine wandb.example.org login user password secret\n")
    (tmp_path / "netrc").chmod(0o600)
    assert wandb(nobody)["status"] == "note"
    own = wandb({**nobody, "WANDB_BASE_URL": "https://wandb.example.org:8080"})
    assert own["status"] == "ok"
    assert "secret" not in str(own)


def test_rays_token_has_to_be_on_every_machine(tmp_path) -> None:
    path = {"RAY_AUTH_TOKEN_PATH": str(tmp_path / "token")}
    assert token(path)["status"] == "note"
    (tmp_path / "token").write_text("secret")
    assert token(path)["status"] == "ok"
    assert "secret" not in str(token(path))
    assert token({"RAY_AUTH_TOKEN": "secret"})["status"] == "ok"
    assert "secret" not in str(token({"RAY_AUTH_TOKEN": "secret"}))
    assert token({"RAY_AUTH_MODE": "disabled"})["status"] == "note"


# --- the command -----------------------------------------------------------------------------------------


@pytest.fixture
def quick(monkeypatch, tmp_path) -> dict[str, Any]:
    """`doctor` with answers of our own: what nodes say is the value of `answers`."""
    monkeypatch.chdir(tmp_path)
    state: dict[str, Any] = {
        "answers": [NodeAnswer("one (127.0.0.1:1)", [node_checks.ok("Ray", "2.60")], "")]
    }

    def answer(
        function: Any, known: Any, address: str | None, seconds: float, code: Any = ()
    ) -> list[NodeAnswer]:
        state["sent"] = [path.name for path in code]
        if isinstance(state["answers"], Exception):
            raise state["answers"]
        return list(state["answers"])

    monkeypatch.setattr(doctor, "on_every_node", answer)
    monkeypatch.setattr(doctor, "check_node", lambda known: [node_checks.ok("Python", "3.11")])
    return state


def call(capsys, *arguments: str) -> tuple[int, str, str]:
    code = main(["doctor", *arguments])
    output, error = capsys.readouterr()
    return code, output, error


def test_all_well_is_code_0(quick, capsys, tmp_path) -> None:
    code, output, error = call(capsys)
    assert (code, error) == (0, "")
    assert "Ready: a search can run here." in output
    assert max(len(line) for line in output.splitlines()) <= 100
    code, output, _ = call(capsys, "--json")
    content = json.loads(output)
    assert (code, content["ready"]) == (0, True)
    assert [machine["name"] for machine in content["machines"]] == ["this machine"]
    assert list(tmp_path.iterdir()) == []


def test_a_problem_is_code_1_and_says_where_and_what_to_do(quick, capsys) -> None:
    bad = node_checks.problem("Ray", "2.59, the driver has 2.60", "pip install it")
    quick["answers"] += [
        NodeAnswer("two (127.0.0.1:2)", [bad], ""),
        NodeAnswer("three", None, "it did not answer"),
    ]
    code, output, _ = call(capsys, "--address", "127.0.0.1:6379")
    assert code == 1
    assert "2 problems on two (127.0.0.1:2), three" in output
    assert "→ pip install it" in output
    assert quick["sent"] == ["components", "agents", "search"], "what a search would send"
    code, output, _ = call(capsys, "--address", "127.0.0.1:6379", "--json")
    content = json.loads(output)
    assert (code, content["ready"]) == (1, False)
    statuses = {m["name"]: [check["status"] for check in m["checks"]] for m in content["machines"][1:]}
    assert statuses == {"one (127.0.0.1:1)": ["ok"], "two (127.0.0.1:2)": ["problem"], "three": ["problem"]}


def test_a_ray_that_does_not_start_is_a_problem_among_the_others(quick, capsys) -> None:
    quick["answers"] = RuntimeError("no free port\nand so on")
    code, output, _ = call(capsys)
    assert code == 1
    assert "RuntimeError: no free port" in output
    assert "1 problem" in output


def test_a_cluster_that_does_not_answer_is_one_sentence(quick, capsys) -> None:
    quick["answers"] = UserError("no Ray cluster answers at address '127.0.0.1:1' (refused)")
    code, _, error = call(capsys, "--address", "127.0.0.1:1")
    assert code == 2
    assert error == "prunefront: no Ray cluster answers at address '127.0.0.1:1' (refused)\n"


# --- clusters --------------------------------------------------------------------------------------------


def three_wait(facts: dict[str, Any]) -> dict[str, Any]:
    """Answers with what it was told; a node of three CPUs takes its time."""
    if facts["cpus"] == 3:
        time.sleep(60)
    return {**facts, "process": os.getpid()}


def two_fail(facts: dict[str, Any]) -> str:
    """Works on the node of three CPUs only."""
    if facts["cpus"] == 2:
        raise ValueError("not here\nnor anywhere")
    return "fine"


@pytest.fixture(scope="module")
def two_nodes() -> Iterator[str]:
    """The address of a real cluster on this machine, of nodes with two and with three CPUs."""
    from ray.cluster_utils import Cluster

    with ray_connection.ray_environment():
        nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
        try:
            nodes.add_node(num_cpus=3)
            yield nodes.address
        finally:
            nodes.shutdown()


@pytest.mark.slow
def test_every_node_answers_for_itself_and_one_that_does_not_is_named(two_nodes: str) -> None:
    started = time.monotonic()
    quick_one, slow_one = sorted(
        on_every_node(three_wait, {"known": 7}, two_nodes, seconds=15), key=lambda answer: answer.fault
    )
    assert time.monotonic() - started < 55
    assert quick_one.answer["cpus"] == 2
    assert quick_one.answer["known"] == 7
    assert quick_one.answer["process"] != os.getpid()
    assert Path(quick_one.answer["temporary"]).is_dir()
    assert (slow_one.answer, slow_one.fault) == (None, "it did not answer within 15 s")
    assert slow_one.node != quick_one.node


@pytest.mark.slow
def test_a_node_that_cannot_run_the_checks_is_named(two_nodes: str) -> None:
    answers = on_every_node(two_fail, {}, two_nodes, seconds=60)
    assert sorted(answer.answer or "" for answer in answers) == ["", "fine"]
    (fault,) = [answer.fault for answer in answers if answer.fault]
    assert fault.startswith("it could not run the checks: ")
    assert "\n" not in fault


@pytest.mark.slow
def test_doctor_reports_every_node_of_a_cluster(two_nodes: str, capsys, monkeypatch, tmp_path) -> None:
    monkeypatch.chdir(tmp_path)
    code, output, error = call(capsys, "--address", two_nodes, "--json")
    content = json.loads(output)
    driver, *machines = content["machines"]
    assert len(machines) == 2
    assert len({machine["name"] for machine in machines}) == 2
    for machine in machines:
        checks = {check["name"]: check for check in machine["checks"]}
        assert checks["Python"]["status"] == "ok"
        assert checks["Ray"]["status"] == "ok"
    assert {check["name"] for check in driver["checks"]} == {"storage", "disk of runs", "W&B", "Ray token"}
    assert code == (0 if content["ready"] else 1)
    assert error == ""
