"""The base of every typed config section, and the translation of validation errors into one readable sentence each."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Annotated, Any, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError

from wsss_dist.errors import UserError

# a path in a config; ~ is the home folder, as in a shell
ConfigPath = Annotated[Path, AfterValidator(Path.expanduser)]


class StrictModel(BaseModel):
    """A frozen config section: an unknown key is an error, a default is validated like a given value."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, protected_namespaces=())


def parse(model: type[StrictModel], values: Any, where: str) -> Any:
    """Build `model` from a mapping.

    Args:
        model: the config class.
        values: what the YAML section holds.
        where: dotted key of the section, "" at the top.
    Raises:
        UserError: one line per problem: dotted key, what came, what is expected, the nearest known key.
    """
    if not isinstance(values, dict):
        raise UserError(f"config: '{where or 'the file'}' must be a mapping of keys to values, found {values!r}")
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise UserError("\n".join(_sentence(model, e, where) for e in error.errors())) from None


def _sentence(model: type[BaseModel], error: Any, where: str) -> str:
    path = [str(part) for part in error["loc"]]
    key = ".".join(([where] if where else []) + path)
    kind = error["type"]
    if kind == "extra_forbidden":
        known = sorted(_fields_at(model, path[:-1]))
        near = difflib.get_close_matches(path[-1], known, n=1) or _elsewhere(model, path[-1], where)
        hint = f"did you mean '{near[0]}'?" if near else f"known keys: {', '.join(known)}"
        return f"config: unknown key '{key}' (value {error['input']!r}); {hint}"
    if kind == "missing":
        return f"config: key '{key}' is missing; add it to the config"
    return f"config: '{key}' is {error['input']!r}: {_lower_first(error['msg'])}{_yaml_hint(kind, error['input'])}"


def _yaml_hint(kind: str, value: Any) -> str:
    """YAML turns some words into numbers and booleans, and a list needs brackets even where it has one entry."""
    if kind in ("list_type", "tuple_type"):
        return f"; write a list, as [{value}]"
    if kind not in ("string_type", "literal_error") or isinstance(value, str):
        return ""
    if isinstance(value, bool):
        return '; write it in quotes, as "off": YAML takes yes, no, on and off for true or false'
    return f'; write a word, or put it in quotes: "{value}"' if isinstance(value, int | float) else ""


def _lower_first(message: str) -> str:
    message = message.removeprefix("Value error, ")
    return message[:1].lower() + message[1:]


def _elsewhere(model: type[BaseModel], name: str, where: str) -> list[str]:
    """Dotted keys that end in `name`: of a section (indented wrongly), or of a key in a section."""
    top = set(model.model_fields)
    inner = [s for s in model.model_fields if (found := _fields_at(model, [s])) != top and name in found]
    places = [name] * (name in top) + [f"{section}.{name}" for section in inner]
    return [f"{where}.{place}" if where else place for place in places]


def _fields_at(model: type[BaseModel], path: list[str]) -> set[str]:
    for part in path:
        field = model.model_fields.get(part)
        inner = [] if field is None else [field.annotation, *get_args(field.annotation)]
        models = [t for t in inner if isinstance(t, type) and issubclass(t, BaseModel)]
        if not models:
            continue
        model = models[0]
    return set(model.model_fields)
