"""Where a number was measured: versions, processor, threads. Equal environments repeat it bit for bit."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import torch


def environment(device: str = "cpu") -> dict[str, str]:
    """Everything that the bits of a result depend on, besides the thread count."""
    return {
        "python": platform.python_version(),
        "prunefront": _version("prunefront"),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "machine": platform.machine(),
        "processor": _processor(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else "cpu",
        "host": platform.node(),
    }


def differences(recorded: Mapping[str, str], present: Mapping[str, str]) -> list[str]:
    """What has changed that bits depend on, as `torch 2.11.0 -> 2.13.0`; the host's name is no such thing."""
    ignored = {"host", "python", "prunefront"}
    return [
        f"{name} {recorded.get(name, 'unknown')} -> {value}"
        for name, value in present.items()
        if name not in ignored and recorded.get(name) != value
    ]


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "unknown"


def _processor() -> str:
    """The processor's model name, where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
