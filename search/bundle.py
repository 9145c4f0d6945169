"""A bundle: a self-contained pruned agent on disk, which loads and runs anywhere and can prove that it does.

```
<bundle>/
  architecture.json          agent, options, widths: what builds the model
  model.safetensors          its state
  plan.json                  coefficients, ratios, kept channels
  metrics.json               what was measured, with seeds, versions and device; digests of the other files
  contract.json              names, shapes, dtypes and ranges of inputs and outputs, control step
  verification.safetensors   inputs, and the outputs that the agent gave for them
```
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from agents.agent import Agent, agent_class
from components import UserError
from search.arrays import to_arrays, to_tensors
from search.base import Base
from search.base_files import check_state
from search.determinism import deterministic
from search.durable_files import (
    CorruptFileError,
    arrays_bytes,
    counts,
    field,
    json_bytes,
    one_line,
    read_arrays,
    read_json,
    sync_directory,
    write_directory,
    write_json,
)
from search.environment import environment
from search.front import Remeasured
from search.prepared_base import PreparedBase
from search.trial_types import TrialResult

FORMAT = 1
"""Of the files of a bundle; a reader refuses others."""

VERIFICATION_ROWS = 16
"""Inputs whose outputs are stored."""

FILES = ("architecture.json", "model.safetensors", "plan.json", "contract.json", "verification.safetensors")
"""Every file of a bundle but metrics.json, which holds their digests."""


@dataclass(frozen=True, eq=False)
class LoadedBundle:
    """A pruned agent, ready to act.

    Attributes:
        agent: `agent.act(inputs)` is what is deployed, `agent.model` the network.
        kind, options, widths: what it was built from.
        metrics: content of metrics.json.
        contract: content of contract.json.
        inputs, outputs: of the verification, rows first.
        directory: where it was loaded from.
    """

    agent: Agent
    kind: str
    options: Mapping[str, Any]
    widths: Mapping[str, int]
    metrics: Mapping[str, Any]
    contract: Mapping[str, Any]
    inputs: Tensor
    outputs: Tensor
    directory: Path

    @property
    def threads(self) -> int:
        """The CPU threads that the stored outputs and measurements were made with."""
        return int(self.metrics["threads"])


def save_bundle(directory: Path, dense: PreparedBase, result: TrialResult, threads: int = 1) -> None:
    """Store a complete trial, whole or not at all; a bundle that is there is replaced.

    Args:
        directory: of the bundle; its parent is made as needed.
        dense: what the trial was pruned from, on the CPU.
        result: complete, with its state.
        threads: CPU threads of the trial.

    Raises:
        ValueError: the result has no state.
    """
    if result.state is None:
        raise ValueError(f"trial {result.number} has no state to store")
    agent = dense.build(result.widths, result.options)
    agent.load_states({"model": to_tensors(result.state)})
    inputs = agent.example_inputs(VERIFICATION_ROWS)
    outputs = act(agent, inputs, threads)
    contents = {
        "architecture.json": json_bytes(
            {
                "format": FORMAT,
                "agent": dense.base.kind,
                "options": dict(agent.options),
                "widths": dict(result.widths),
            }
        ),
        "model.safetensors": arrays_bytes(result.state),
        "plan.json": json_bytes(
            {
                "coefficients": result.plan.coefficients,
                "ratios": dict(result.plan.ratios),
                "kept": {group: list(kept) for group, kept in result.kept.items()},
            }
        ),
        "contract.json": json_bytes(agent.contract()),
        "verification.safetensors": arrays_bytes(to_arrays({"inputs": inputs, "outputs": outputs})),
    }
    digests = {name: digest(content) for name, content in contents.items()}
    metrics = {**_metrics(dense.base, result, threads), "sha256": digests}
    write_directory(directory, {**contents, "metrics.json": json_bytes(metrics)})


def _metrics(base: Base, result: TrialResult, threads: int) -> dict[str, Any]:
    """The content of metrics.json, without the digests."""
    return {
        "format": FORMAT,
        "trial": result.number,
        "origin": result.origin,
        "objectives": dict(result.objectives),
        "parameters": result.parameters,
        "size_ratio": result.size_ratio,
        "macs": result.macs,
        "component_sizes": dict(result.component_sizes),
        "validation": dict(result.performance),
        "retention": result.retention,
        "repaired_by": result.repaired_by,
        "fine_tuning": dict(result.fine_tuning),
        "test": None,
        "test_retention": None,
        "base": {
            "parameters": base.parameters,
            "macs": base.macs,
            "performance": dict(result.base_performance),
            "trivial": dict(base.trivial),
        },
        "seeds": {"trial": result.seed, "base": base.seed},
        "threads": threads,
        "measured": {"device": result.device, "host": result.host},
        "environment": environment(),
    }


def add_test_measurements(directory: Path, performance: str, again: Remeasured) -> None:
    """Complete a bundle's metrics.json with what the agent reached when the search was over."""
    path = directory / "metrics.json"
    metrics = read_json(path)
    metrics["test"] = {performance: again.performance}
    metrics["test_retention"] = again.retention
    if again.latencies:
        metrics["latency"] = {**again.latencies, "host": again.host}
    write_json(path, metrics)


def load_bundle(
    directory: Path | str, device: str = "cpu", data: Mapping[str, Tensor] | None = None
) -> LoadedBundle:
    """The agent in a bundle, ready to act; its data is loaded only if something asks for it.

    Args:
        directory: of the bundle.
        device: torch device.
        data: of the agent, where it is at hand.

    Raises:
        CorruptFileError: a file is missing, truncated, altered, or does not fit the others; it is named.
        UserError: there is no bundle, or its agent is not known here.
    """
    directory = Path(directory)
    check_files(directory)
    shape_file, model_file = directory / "architecture.json", directory / "model.safetensors"
    shape, state = read_json(shape_file), read_arrays(model_file)
    kind, options = field(shape_file, shape, "agent", str), field(shape_file, shape, "options", dict)
    widths = counts(shape_file, shape, "widths")
    try:
        agent = agent_class(kind)(options, widths, data, device)
    except UserError as error:
        raise CorruptFileError(f"{shape_file} does not describe an agent: {one_line(error)}") from None
    check_state(model_file, state, agent.states()["model"])
    agent.load_states({"model": to_tensors(state, device)})
    verification_file = directory / "verification.safetensors"
    verification = to_tensors(read_arrays(verification_file))
    if set(verification) != {"inputs", "outputs"}:
        raise CorruptFileError(f"{verification_file} is corrupt: it holds {sorted(verification)}")
    return LoadedBundle(
        agent=agent,
        kind=kind,
        options=options,
        widths=widths,
        metrics=read_json(directory / "metrics.json"),
        contract=read_json(directory / "contract.json"),
        inputs=verification["inputs"],
        outputs=verification["outputs"],
        directory=directory,
    )


def check_files(directory: Path) -> None:
    """Refuse a bundle whose files are not, bit for bit, those that were stored.

    Raises:
        CorruptFileError: naming the file.
        UserError: there is no bundle.
    """
    if not directory.is_dir():
        raise UserError(f"there is no bundle {directory}")
    if not any((directory / name).exists() for name in (*FILES, "metrics.json")):
        raise UserError(f"{directory} is not a bundle: it has no architecture.json")
    metrics_file = directory / "metrics.json"
    metrics = read_json(metrics_file)
    if field(metrics_file, metrics, "format", int) != FORMAT:
        raise CorruptFileError(f"{metrics_file} has format {metrics['format']}; this version reads {FORMAT}")
    for name, kind in (("parameters", int), ("threads", int), ("validation", dict), ("base", dict)):
        field(metrics_file, metrics, name, kind)
    field(metrics_file, metrics, "environment", dict)
    digests = field(metrics_file, metrics, "sha256", dict)
    for name in FILES:
        path = directory / name
        if not path.is_file():
            raise CorruptFileError(f"{path} is missing")
        if digest(path.read_bytes()) != field(metrics_file, digests, name, str):
            raise CorruptFileError(f"{path} is corrupt: it is not the file that was stored")


def copy_bundle(source: Path, destination: Path) -> None:
    """Copy a bundle, whole or not at all, to a directory that does not exist or is empty.

    Raises:
        UserError: the destination is there and not an empty directory; nothing is touched.
        CorruptFileError: the bundle is.
    """
    check_files(source)
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise UserError(f"{destination} exists and is not overwritten: name another directory with --out")
    destination.parent.mkdir(parents=True, exist_ok=True)
    temporary = destination.with_name(f".{destination.name}.{os.getpid()}.tmp")
    try:
        shutil.copytree(source, temporary)
        os.replace(temporary, destination)  # over an empty directory too
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync_directory(destination.parent)


def act(agent: Agent, inputs: Tensor, threads: int = 1) -> Tensor:
    """The agent's outputs, the same bits every time."""
    with deterministic(0, threads), torch.no_grad():
        return agent.act(inputs).detach().cpu()


def digest(content: bytes) -> str:
    """SHA-256, in hexadecimal."""
    return hashlib.sha256(content).hexdigest()
