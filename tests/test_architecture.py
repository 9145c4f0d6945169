"""Who may import whom, and what importing may not do; the layout is described in the README."""

from __future__ import annotations

import ast
import graphlib
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("agents", "components", "search")


@dataclass(frozen=True)
class Import:
    """One imported module; `search.study`, not `search`, for `from search import study`."""

    importer: str
    module: str
    for_types_only: bool
    in_function: bool

    @property
    def distribution(self) -> str:
        return self.module.partition(".")[0]


def module_name(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(file): file for package in PACKAGES for file in sorted((ROOT / package).rglob("*.py"))}
TREES = {name: ast.parse(file.read_text()) for name, file in FILES.items()}


def type_checking_blocks(tree: ast.AST) -> set[ast.AST]:
    """Every node below an `if TYPE_CHECKING:`."""
    return {
        node
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.unparse(block.test)
        for statement in block.body
        for node in ast.walk(statement)
    }


def imports_of(name: str) -> Iterator[Import]:
    tree = TREES[name]
    types_only = type_checking_blocks(tree)
    in_functions = {
        node
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} has a relative import"
            assert node.module is not None
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            modules = [module if module in FILES else node.module for module in inner]
        else:
            continue
        for module in modules:
            yield Import(name, module, node in types_only, node in in_functions)


IMPORTS = [found for name in FILES for found in imports_of(name)]


def project_imports(importer: str, *, when_imported: bool = False) -> set[str]:
    """The project's modules that a module imports at run time, or only when it is itself imported."""
    return {
        found.module
        for found in IMPORTS
        if found.importer == importer
        and found.distribution in PACKAGES
        and not found.for_types_only
        and not (when_imported and found.in_function)
    }


def test_nothing_below_imports_what_is_above() -> None:
    for found in IMPORTS:
        package = found.importer.partition(".")[0]
        if package == "components":
            assert found.distribution not in ("agents", "search"), found
        if package == "agents":
            assert found.distribution != "search", found


def test_components_know_torch_and_numpy_only() -> None:
    for found in IMPORTS:
        if found.importer.startswith("components"):
            allowed = {*sys.stdlib_module_names, "components", "numpy", "torch"}
            assert found.distribution in allowed, found


def test_agents_know_components_by_their_types_only() -> None:
    for found in IMPORTS:
        if found.importer.startswith("agents") and found.distribution == "components":
            assert found.for_types_only or found.module == "components.errors", found


OPTUNAS_USERS = {
    "search.outcomes",
    "search.parameter_importance",
    "search.samplers",
    "search.study",
    "search.study_database",
}


@pytest.mark.parametrize(
    ("distribution", "user"),
    [
        ("ray", {"search.cluster", "search.ray_connection", "search.tune_repairs"}),
        ("optuna", OPTUNAS_USERS),
        ("greenlet", "search.rungs"),
        ("wandb", {"search.wandb_dashboard", "search.wandb_runs"}),
        ("wandb_workspaces", "search.wandb_dashboard"),
        ("plotly", "search.wandb_plots"),
        ("gymnasium", "agents.environments"),
        ("dm_control", "agents.environments"),
        ("shimmy", "agents.environments"),
        ("mujoco", "agents.environments"),
        ("torch_pruning", None),
    ],
)
def test_a_library_has_one_user(distribution: str, user: str | set[str] | None) -> None:
    users = user if isinstance(user, set) else {user}
    assert {found.importer for found in IMPORTS if found.distribution == distribution} <= users


@pytest.mark.parametrize("name", ["pareto", "scheduler"])
def test_fronts_and_ranks_are_plain_numpy(name: str) -> None:
    imports = [found for found in IMPORTS if found.importer == f"search.{name}" and not found.for_types_only]
    distributions = {found.distribution for found in imports}
    assert distributions - sys.stdlib_module_names <= {"numpy", "search"}


@pytest.mark.parametrize(
    ("importer", "allowed"),
    [
        (
            "cluster",
            {
                "driver",
                "gpu_memory",
                "interruption",
                "ray_connection",
                "rungs",
                "scheduler",
                "trial_types",
                "tune_repairs",
            },
        ),
        ("driver", {"interruption", "scheduler", "trial_types"}),
        ("interruption", set()),
        ("ray_connection", {"driver"}),
        ("tune_repairs", set()),
        ("gpu_memory", set()),
        ("history", {"pareto"}),
        (
            "study",
            {
                "study_database",
                "space",
                "history",
                "estimates",
                "optimisers",
                "outcomes",
                "pareto",
                "samplers",
                "trial_types",
                "config",
            },
        ),
        ("samplers", set()),
        ("study_database", {"pareto"}),
        ("space", {"config", "mixtures"}),
        ("mixtures", set()),
        ("optimisers", {"space"}),
        ("grid", {"config", "optimisers", "space"}),
        ("gradient_sweep", {"durable_files", "optimisers", "space"}),
        ("outcomes", {"config", "trial_types"}),
        ("pareto", set()),
        ("scheduler", {"pareto"}),
        ("rungs", {"trial_types"}),
        ("estimates", set()),
        ("progress", {"front_chart"}),
        ("front_chart", {"pareto"}),
        ("wandb_logger", {"wandb_plots", "wandb_records", "wandb_runs"}),
        ("wandb_runs", {"wandb_dashboard", "wandb_plots", "wandb_records"}),
        ("wandb_dashboard", set()),
        ("wandb_plots", {"wandb_records"}),
        ("wandb_records", set()),
        (
            "report.content",
            {
                "config",
                "constraints",
                "durable_files",
                "front",
                "parameter_importance",
                "pareto",
                "report.importance",
                "report.short",
                "run_directory",
                "stability",
                "trial_types",
            },
        ),
        (
            "report.importance",
            {"durable_files", "importance_course", "report.short", "run_directory", "stored_importance"},
        ),
        ("report.short", set()),
        ("report.page", set()),
        ("importance_course", set()),
        ("importance_table", {"front", "front_table", "importance_course"}),
        ("parameter_importance", {"trial_types"}),
    ],
)
def test_the_searchs_parts_know_few_others(importer: str, allowed: set[str]) -> None:
    known = {
        module.removeprefix("search.")
        for module in project_imports(f"search.{importer}")
        if "search" in module
    }
    assert known <= allowed


def test_trials_know_neither_the_study_nor_the_cluster() -> None:
    reached, waiting = set(), ["search.trial"]
    while waiting:
        module = waiting.pop()
        if module not in reached:
            reached.add(module)
            waiting += project_imports(module)
    assert not reached & {
        f"search.{name}" for name in ("cli", "cluster", "study", "wandb_logger", "wandb_runs")
    }


def test_nothing_imports_the_command_and_nothing_imports_in_circles() -> None:
    assert [found for found in IMPORTS if found.module == "search.cli"] == []
    graph = {name: project_imports(name, when_imported=True) - {name.partition(".")[0]} for name in FILES}
    graphlib.TopologicalSorter(graph).prepare()


def test_importing_the_core_is_pure() -> None:
    core = [name for name in FILES if name.startswith(("agents", "components"))]
    script = f"""
import importlib, json, logging, os, sys, warnings
import torch  # what it does to this process is its own affair
def state():
    root = logging.getLogger()
    return [dict(os.environ), root.level, len(root.handlers), len(warnings.filters), torch.get_num_threads(),
            str(torch.get_default_dtype()), torch.initial_seed()]
before = state()
for name in {core!r}:
    importlib.import_module(name)
loaded = [name for name in ("ray", "optuna", "wandb", "search") if name in sys.modules]
print(json.dumps([loaded, before == state()]))
"""
    run = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False, timeout=120
    )
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout) == [[], True]


def test_nothing_is_pickled_or_evaluated() -> None:
    for name, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in {"eval", "exec", "torch.load", "torch.save", "__import__", "compile"}, (
                    name
                )
                assert not any(keyword.arg == "allow_pickle" for keyword in node.keywords), name
    forbidden = {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
    assert [found for found in IMPORTS if found.distribution in forbidden] == []


def test_files_are_named_for_what_they_hold() -> None:
    names = {part for name in FILES for part in name.split(".")}
    assert not names & {"utils", "util", "helpers", "helper", "common", "misc", "tools"}
