"""What is wrong with an experiment, in one sentence: the key, the offending value, what is allowed."""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterator, Mapping
from typing import Any, Literal, Union, get_args, get_origin

import annotated_types
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from components.errors import nearest

Section = type[BaseModel]


class Fault(ValueError):
    """What a validator of ours finds wrong.

    Args:
        reason: half a sentence, after the key: `it lists 'l2' twice`.
        key: path below what was validated, where the fault is not in all of it.
        value: the offending value, to be shown between key and reason.
    """

    def __init__(self, reason: str, *, key: str = "", value: str | None = None) -> None:
        super().__init__(reason if value is None else f"is {value}: {reason}")
        self.key = key


def sentence(
    error: ValidationError, root: Section, source: str, overrides: Mapping[tuple[str, ...], str]
) -> str:
    """The first fault of a validation, unknown keys before all others: a misspelt key causes the rest.

    Args:
        error: raised by `root.model_validate`.
        root: the model of the whole experiment.
        source: what to call the text that was read.
        overrides: key path -> what to call what set it, for keys that did not come from the text.
    """
    fault = min(error.errors(), key=lambda fault: fault["type"] != "extra_forbidden")
    location = tuple(str(part) for part in fault["loc"])
    ours = fault["ctx"]["error"] if fault["type"] == "value_error" else None
    if isinstance(ours, Fault) and ours.key:
        location += tuple(ours.key.split("."))
    path = ".".join(location)
    set_by = [origin for key, origin in overrides.items() if key == location[: len(key)]]
    place = set_by[-1] if set_by else source
    if fault["type"] == "extra_forbidden":
        return f"{place}: unknown key {path}: {_nearest_key(root, location)}"
    if ours is not None:
        return f"{place}: {path} {ours}"
    if path == "agent" or (path == "agent.kind" and fault["type"] == "missing"):
        return f"{place}: agent.kind is missing: it names what to prune, such as agent: {{kind: autoencoder}}"
    return f"{place}: {path} is {shown(fault['input'])}: {_allowed(root, location, fault['input'])}"


def shown(value: object) -> str:
    """A value as it stands in a message: short, and in YAML's words for true, false and null."""
    words = {None: "null", True: "true", False: "false"}
    plain = list(value) if isinstance(value, tuple) else value
    text = words[plain] if plain is None or isinstance(plain, bool) else repr(plain)
    return text if len(text) <= 80 else text[:77] + "..."


def _nearest_key(root: Section, location: tuple[str, ...]) -> str:
    """The nearest key of the same section or, failing that, the same key of another."""
    section = root
    for part in location[:-1]:
        section = _subsection(section.model_fields[part]) or section
    siblings = section.model_fields
    elsewhere = [key for key in _all_keys(root) if key.rpartition(".")[2] == location[-1]]
    if elsewhere and not difflib.get_close_matches(location[-1], siblings, n=1, cutoff=0.6):
        return f"did you mean {elsewhere[0]!r}? allowed here: {', '.join(sorted(siblings))}"
    return nearest(location[-1], siblings)


def _all_keys(section: Section, prefix: str = "") -> Iterator[str]:
    for name, field in section.model_fields.items():
        yield prefix + name
        if subsection := _subsection(field):
            yield from _all_keys(subsection, f"{prefix}{name}.")


def _subsection(field: FieldInfo) -> Section | None:
    return _section(field.annotation)


def _section(annotation: Any) -> Section | None:
    """The section that stands at a key, perhaps as an alternative to null."""
    for kind in _alternatives(annotation):
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            return kind
    return None


def _allowed(root: Section, location: tuple[str, ...], value: object) -> str:
    """What may stand at a key: its type and range, from the models themselves."""
    annotation: Any = root
    metadata: list[Any] = []
    for part in location:
        if section := _section(annotation):
            field = section.model_fields[part]
            annotation, metadata = field.annotation, field.metadata
        else:
            annotation, metadata = _entry_type(annotation), []
    kinds = _alternatives(annotation)
    choices = [choice for kind in kinds if get_origin(kind) is Literal for choice in get_args(kind)]
    if choices:
        return nearest(value, choices) if isinstance(value, str) else f"allowed: {', '.join(sorted(choices))}"
    nouns = [_noun(kind) for kind in kinds if kind is not type(None)]
    limits = [limit for limit in map(_limit, metadata) if limit]
    null = ", or null" if type(None) in kinds else ""
    return f"it must be {', '.join([*nouns, *limits])}{null}"


def _alternatives(annotation: Any) -> tuple[Any, ...]:
    return get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)


def _entry_type(annotation: Any) -> Any:
    """The type of a list's entries."""
    return next(get_args(kind)[0] for kind in _alternatives(annotation) if get_origin(kind) is tuple)


def _noun(kind: Any) -> str:
    nouns = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
    if get_origin(kind) is not tuple:
        return nouns.get(kind, "a mapping")
    return "a list" if get_args(kind)[0] is str or get_origin(get_args(kind)[0]) is Literal else "a mapping"


def _limit(bound: object) -> str:
    match bound:
        case annotated_types.Ge():
            return f"at least {bound.ge}"
        case annotated_types.Gt():
            return f"above {bound.gt}"
        case annotated_types.Le():
            return f"at most {bound.le}"
        case annotated_types.Lt():
            return f"below {bound.lt}"
        case annotated_types.MinLen():
            return "not empty"
    if getattr(bound, "pattern", None):
        return "of letters, digits, dots, dashes and underscores, beginning with a letter or digit"
    return ""
