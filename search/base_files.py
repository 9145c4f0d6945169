"""A base on disk: JSON and safetensors, checked when read.

```
base/
  widths.json              agent, options, widths: what builds the model
  model.safetensors        <section>/<name>: the model and the optimizer's moments
  importance.safetensors   score/<metric>/<group>, history/<series>
  calibration.safetensors  input/<name>, gram/<consumer>
  data.safetensors         what the agent fine-tunes and evaluates on
  metrics.json             size, performance, versions
```
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from agents.agent import agent_class
from components import UserError
from search.arrays import Arrays
from search.base import SPLITS, Base
from search.durable_files import (
    CorruptFileError,
    counts,
    field,
    number,
    one_line,
    read_arrays,
    read_json,
    write_arrays,
    write_json,
)
from search.environment import environment

FORMAT = 1
"""Of the files of a base; a reader refuses others."""


def save_base(base: Base, directory: Path) -> None:
    """Write a trained base into a directory, which is made if needed."""
    directory.mkdir(parents=True, exist_ok=True)
    write_json(
        directory / "widths.json",
        {
            "format": FORMAT,
            "agent": base.kind,
            "options": dict(base.options),
            "widths": dict(base.widths),
            "seed": base.seed,
        },
    )
    write_arrays(directory / "model.safetensors", _flat(base.states))
    write_arrays(
        directory / "importance.safetensors",
        {**_prefixed("score", _flat(base.scores)), **_prefixed("history", base.history)},
    )
    write_arrays(
        directory / "calibration.safetensors",
        {**_prefixed("input", base.calibration), **_prefixed("gram", base.grams or {})},
    )
    write_arrays(directory / "data.safetensors", base.data)
    # Last: a directory with metrics.json is whole.
    write_json(
        directory / "metrics.json",
        {
            "parameters": base.parameters,
            "macs": base.macs,
            "performance": dict(base.performance),
            "trivial": dict(base.trivial),
            "reported": dict(base.reported),
            "training_seconds": base.training_seconds,
            **({} if base.gpu_share is None else {"gpu_share": base.gpu_share}),
            "environment": environment(),
        },
    )


def load_base(directory: Path) -> Base:
    """The base in a directory.

    Raises:
        CorruptFileError: a file is missing, truncated, or does not fit the others; the sentence names it.
        UserError: there is no such directory, or its agent is not known here.
    """
    if not directory.is_dir():
        raise UserError(f"there is no base in {directory}")
    metrics_file = directory / "metrics.json"
    metrics, shape = read_json(metrics_file), read_shape(directory)
    importance = read_arrays(directory / "importance.safetensors")
    calibration = read_arrays(directory / "calibration.safetensors")
    base = Base(
        kind=shape.kind,
        options=shape.options,
        widths=shape.widths,
        seed=shape.seed,
        states=_nested(directory / "model.safetensors", read_arrays(directory / "model.safetensors")),
        scores=_nested(directory / "importance.safetensors", _under("score", importance)),
        history=_under("history", importance),
        calibration=_under("input", calibration),
        grams=_under("gram", calibration) or None,
        data=read_arrays(directory / "data.safetensors"),
        parameters=field(metrics_file, metrics, "parameters", int),
        macs=field(metrics_file, metrics, "macs", int),
        performance=_by_split(metrics_file, metrics, "performance"),
        trivial=_by_split(metrics_file, metrics, "trivial"),
        training_seconds=number(metrics_file, metrics, "training_seconds"),
        gpu_share=number(metrics_file, metrics, "gpu_share") if "gpu_share" in metrics else None,
        reported=_reported(metrics_file, metrics),
    )
    _check_shapes(base, directory)
    return base


@dataclass(frozen=True)
class BaseShape:
    """What builds a base's model: the agent's kind, its options, group -> channels, the training's seed."""

    kind: str
    options: Mapping[str, Any]
    widths: Mapping[str, int]
    seed: int


def read_shape(directory: Path) -> BaseShape:
    """The shape of the base in a directory.

    Raises:
        CorruptFileError: its file is missing or damaged, or of another version.
    """
    file = directory / "widths.json"
    shape = read_json(file)
    if field(file, shape, "format", int) != FORMAT:
        raise CorruptFileError(f"{file} has format {shape['format']}; this version reads {FORMAT}")
    return BaseShape(
        kind=field(file, shape, "agent", str),
        options=field(file, shape, "options", dict),
        widths=counts(file, shape, "widths"),
        seed=field(file, shape, "seed", int),
    )


def check_state(path: Path, state: Arrays, expected: Mapping[str, Any]) -> None:
    """Refuse a state read from `path` that does not have the names and shapes of the model it is for.

    Raises:
        CorruptFileError: naming the first tensor that is missing, unexpected, of another shape or not finite.
    """
    for name in sorted(set(expected) ^ set(state)):
        problem = "has no" if name in expected else "has an unexpected"
        raise CorruptFileError(f"{path} is corrupt: it {problem} tensor {name!r}")
    for name, array in state.items():
        if tuple(array.shape) != tuple(expected[name].shape):
            raise CorruptFileError(
                f"{path} is corrupt: {name!r} has shape {tuple(array.shape)}, "
                f"the model needs {tuple(expected[name].shape)}"
            )
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise CorruptFileError(f"{path} is corrupt: {name!r} holds numbers that are not finite")


def _check_shapes(base: Base, directory: Path) -> None:
    try:
        agent = agent_class(base.kind)(base.options, base.widths, None, "cpu")
    except UserError as error:
        raise CorruptFileError(f"{directory / 'widths.json'} is corrupt: {one_line(error)}") from None
    model_file = directory / "model.safetensors"
    if "model" not in base.states:
        raise CorruptFileError(f"{model_file} is corrupt: it has no model")
    expected = agent.states()["model"]
    check_state(model_file, base.states["model"], expected)
    for metric, by_group in base.scores.items():
        for group, width in base.widths.items():
            if group not in by_group or by_group[group].shape != (width,):
                raise CorruptFileError(
                    f"{directory / 'importance.safetensors'} is corrupt: the {metric!r} scores do not fit "
                    f"group {group!r} of {width} channels"
                )


def _by_split(path: Path, content: Mapping[str, Any], name: str) -> dict[str, float]:
    values = field(path, content, name, dict)
    return {split: number(path, values, split) for split in SPLITS}


def _reported(path: Path, content: Mapping[str, Any]) -> dict[str, float]:
    values = field(path, content, "reported", dict) if "reported" in content else {}  # bases of before
    return {name: number(path, values, name) for name in values}


def _flat(nested: Mapping[str, Arrays]) -> dict[str, np.ndarray]:
    return {f"{outer}/{inner}": array for outer, values in nested.items() for inner, array in values.items()}


def _nested(path: Path, flat: Arrays) -> dict[str, dict[str, np.ndarray]]:
    nested: dict[str, dict[str, np.ndarray]] = {}
    for name, array in flat.items():
        outer, slash, inner = name.partition("/")
        if not slash:
            raise CorruptFileError(f"{path} is corrupt: unexpected tensor {name!r}")
        nested.setdefault(outer, {})[inner] = array
    return nested


def _prefixed(prefix: str, values: Arrays) -> dict[str, np.ndarray]:
    return {f"{prefix}/{name}": array for name, array in values.items()}


def _under(prefix: str, values: Arrays) -> dict[str, np.ndarray]:
    start = prefix + "/"
    return {name.removeprefix(start): array for name, array in values.items() if name.startswith(start)}
