"""Check an agent's options against its pydantic model, and say in one sentence what is wrong."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Literal, TypeVar, get_args, get_origin

from pydantic import BaseModel, ValidationError

from components.errors import UserError, nearest

Options = TypeVar("Options", bound=BaseModel)


def parse_options(model: type[Options], options: Mapping[str, Any], agent: str) -> Options:
    """The options as the model has them, defaults filled in.

    Args:
        model: strict, with `extra="forbid"`.
        options: as the user gave them.
        agent: what to call the agent in messages.

    Raises:
        UserError: an unknown option, with the nearest known one, or a value that is not allowed.
    """
    try:
        return model.model_validate(dict(options))
    except ValidationError as error:
        raise UserError(_sentence(error, model, agent)) from None


def _sentence(error: ValidationError, model: type[BaseModel], agent: str) -> str:
    """The first fault, unknown options before all others: a misspelt option causes the rest."""
    fault = min(error.errors(), key=lambda fault: fault["type"] != "extra_forbidden")
    path = ".".join(str(part) for part in fault["loc"])
    if fault["type"] == "extra_forbidden":
        return f"the {agent} has no option {path!r}: {nearest(path, model.model_fields)}"
    if fault["type"] == "missing":
        return f"the {agent} needs the option {path!r}"
    value = _shown(fault["input"])
    if fault["type"] == "value_error":
        return f"the {agent}'s {path or 'options'}: {fault['ctx']['error']}"
    if fault["type"] == "literal_error":
        return f"the {agent}'s {path} is {value}: {nearest(str(fault['input']), _choices(model, path))}"
    rule = fault["msg"].replace("Input should", "it must", 1)
    return f"the {agent}'s {path} is {value}: {rule[0].lower()}{rule[1:]}"


def _choices(model: type[BaseModel], path: str) -> tuple[str, ...]:
    annotation = model.model_fields[path.partition(".")[0]].annotation
    return tuple(str(choice) for choice in get_args(annotation)) if get_origin(annotation) is Literal else ()


def _shown(value: object) -> str:
    """A value as YAML users write it, cut short."""
    try:
        text = json.dumps(value)
    except (TypeError, ValueError):
        text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
