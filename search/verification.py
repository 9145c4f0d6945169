"""Verify a bundle: reload it, reproduce its stored outputs bit for bit, and measure it again."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from agents.agent import Split
from components import UserError
from components.size import parameter_count
from search.base import retention
from search.bundle import LoadedBundle, act, load_bundle
from search.determinism import deterministic
from search.durable_files import CorruptFileError, one_line
from search.environment import differences, environment
from search.measurement import decision_latency, decision_macs, performance_of

TOLERANCE = 1e-4
"""Largest difference of an output, relative to the largest output, that another machine may make."""


@dataclass(frozen=True)
class Measurement:
    """One number of a bundle, as stored and as measured now; None where one of them is not there."""

    name: str
    stored: float | None
    now: float | None


@dataclass(frozen=True)
class VerificationReport:
    """What a verification found.

    Attributes:
        identical: every stored output was reproduced bit for bit.
        difference: largest difference of an output, relative to the largest stored one; infinite for NaN.
        changes: how this environment differs from the one that the outputs were stored in.
        measurements: sizes, performance and latency, stored and now.
        not_measured: why the performance was not measured again; None where it was.
        rows: how many inputs were compared.
    """

    identical: bool
    difference: float
    changes: tuple[str, ...]
    measurements: tuple[Measurement, ...]
    not_measured: str | None
    rows: int

    @property
    def passed(self) -> bool:
        """Identical bits; in another environment, outputs within the tolerance."""
        return self.identical or (bool(self.changes) and self.difference <= TOLERANCE)


def verify_bundle(directory: Path) -> VerificationReport:
    """Load a bundle as if on another machine, on the CPU, and compare it with what it says of itself.

    Raises:
        CorruptFileError, UserError: as `load_bundle`.
    """
    bundle = load_bundle(directory)
    outputs = act(bundle.agent, bundle.inputs, bundle.threads)
    recorded = {str(name): str(value) for name, value in bundle.metrics["environment"].items()}
    measurements = [
        Measurement("parameters", _stored(bundle.metrics, "parameters"), parameter_count(bundle.agent.model))
    ]
    not_measured = None
    try:
        measurements += _measure_again(bundle)
    except CorruptFileError:
        raise
    except (UserError, OSError) as error:  # the data may be out of reach here, and the outputs still stand
        not_measured = one_line(error)
    return VerificationReport(
        identical=_same_bits(outputs, bundle.outputs),
        difference=_relative_difference(outputs, bundle.outputs),
        changes=tuple(differences(recorded, environment())),
        measurements=tuple(measurements),
        not_measured=not_measured,
        rows=len(bundle.inputs),
    )


def _measure_again(bundle: LoadedBundle) -> list[Measurement]:
    agent, metrics = bundle.agent, bundle.metrics
    name = agent.performance.name
    splits: tuple[Split, ...] = ("validation", "test")
    found = []
    with deterministic(0, bundle.threads):
        for split in splits:
            now = performance_of(agent, split)
            base, trivial = (_split(metrics["base"].get(key), split) for key in ("performance", "trivial"))
            kept = None if base is None or trivial is None else retention(now, base, trivial)
            prefix = "" if split == "validation" else "test_"
            found.append(Measurement(f"{split} {name}", _split(metrics.get(split), name), now))
            found.append(Measurement(f"{split} retention", _stored(metrics, f"{prefix}retention"), kept))
        found.append(Measurement("macs", _stored(metrics, "macs"), decision_macs(agent)))
        stored = metrics.get("latency")
        for latency, value in decision_latency(agent).items():
            found.append(Measurement(latency, _split(stored, latency), value))
    return found


def _stored(metrics: Mapping[str, object], name: str) -> float | None:
    value = metrics.get(name)
    return float(value) if isinstance(value, int | float) else None


def _split(values: object, name: str) -> float | None:
    return _stored(values, name) if isinstance(values, Mapping) else None


def _same_bits(first: torch.Tensor, second: torch.Tensor) -> bool:
    if first.shape != second.shape or first.dtype != second.dtype:
        return False
    return first.contiguous().numpy().tobytes() == second.contiguous().numpy().tobytes()


def _relative_difference(first: torch.Tensor, second: torch.Tensor) -> float:
    if first.shape != second.shape:
        return math.inf
    scale = max(float(second.abs().max()), 1e-12)
    difference = float((first.double() - second.double()).abs().max()) / scale
    return difference if math.isfinite(difference) else math.inf
