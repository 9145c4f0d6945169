"""Files that survive a crash, and sentences about those that did not.

Every file is written beside its destination, synced and renamed over it, so a reader sees the old content or
the new, never half of it. Arrays are stored as safetensors and everything else as JSON: nothing is pickled.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from components.errors import UserError, text_of

Arrays = Mapping[str, np.ndarray]


class CorruptFileError(UserError):
    """A stored file is missing, truncated, or does not hold what it should."""


def write_text(path: Path, text: str) -> None:
    """Replace a file by `text`, atomically and durably."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Replace a file by `content`, atomically and durably."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        _write(temporary, content)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def _write(path: Path, content: bytes) -> None:
    """Write a file and force it onto the disk; an OSError names it, which those of a full disk do not."""
    try:
        with path.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None


def write_json(path: Path, value: Any) -> None:
    """Replace a file by `value` as indented JSON, atomically and durably.

    Raises:
        ValueError: a number is not finite.
    """
    write_bytes(path, json_bytes(value))


def write_arrays(path: Path, arrays: Arrays) -> None:
    """Replace a safetensors file by named arrays, atomically and durably."""
    write_bytes(path, arrays_bytes(arrays))


def write_directory(directory: Path, contents: Mapping[str, bytes]) -> None:
    """Replace a directory by one with these files, durably: whole, or what was there before or nothing."""
    temporary = directory.with_name(f".{directory.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        for name, content in contents.items():
            _write(temporary / name, content)
        sync_directory(temporary)
        shutil.rmtree(directory, ignore_errors=True)
        os.replace(temporary, directory)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync_directory(directory.parent)


def json_bytes(value: Any) -> bytes:
    """A value as indented JSON.

    Raises:
        ValueError: a number is not finite.
    """
    return (json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False) + "\n").encode()


def arrays_bytes(arrays: Arrays) -> bytes:
    """Named arrays as a safetensors file."""
    from safetensors.numpy import save

    return save({name: np.ascontiguousarray(array) for name, array in arrays.items()})


def sync_directory(directory: Path) -> None:
    """Make renames and removals inside a directory durable."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        CorruptFileError: the file is missing, is not JSON, holds a non-finite number or no object.
    """
    try:
        value = json.loads(path.read_bytes(), parse_constant=_refuse_constant)
    except FileNotFoundError:
        raise CorruptFileError(f"{path} is missing") from None
    except (ValueError, RecursionError) as error:
        raise CorruptFileError(f"{path} is corrupt: {one_line(error)}") from None
    if not isinstance(value, dict):
        raise CorruptFileError(f"{path} is corrupt: it holds a {type(value).__name__}, not an object")
    return value


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """The named arrays in a safetensors file, writable.

    Raises:
        CorruptFileError: the file is missing, truncated or no safetensors file.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        return {name: np.array(array) for name, array in load(path.read_bytes()).items()}
    except FileNotFoundError:
        raise CorruptFileError(f"{path} is missing") from None
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise CorruptFileError(f"{path} is corrupt: {one_line(error)}") from None


def field(path: Path, content: Mapping[str, Any], name: str, kind: type | tuple[type, ...]) -> Any:
    """`content[name]`, checked: the value of a key of the JSON object that was read from `path`.

    Raises:
        CorruptFileError: the key is missing or its value is not of `kind`.
    """
    if name not in content:
        raise CorruptFileError(f"{path} is corrupt: it has no {name!r}")
    value = content[name]
    wrong_bool = isinstance(value, bool) and kind is not bool
    if wrong_bool or not isinstance(value, kind):
        raise CorruptFileError(f"{path} is corrupt: {name!r} is {value!r}")
    return value


def number(path: Path, content: Mapping[str, Any], name: str) -> float:
    """`content[name]` as a finite float; see `field`."""
    value = float(field(path, content, name, (int, float)))
    if not math.isfinite(value):
        raise CorruptFileError(f"{path} is corrupt: {name!r} is {value}")
    return value


def counts(path: Path, content: Mapping[str, Any], name: str) -> dict[str, int]:
    """`content[name]` as a mapping from names to positive integers; see `field`."""
    values = field(path, content, name, dict)
    for key in values:
        if field(path, values, key, int) < 1:
            raise CorruptFileError(f"{path} is corrupt: {name}.{key} is {values[key]}, which is below 1")
    return dict(values)


def one_line(error: BaseException) -> str:
    """An error as one line of at most 300 characters."""
    text = " ".join(text_of(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."


def _refuse_constant(constant: str) -> float:
    raise ValueError(f"{constant} is not a finite number")
