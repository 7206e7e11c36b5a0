"""A run's YAML file, and settings given on the command line -> a RunConfig.

Problems come out as readable lines, one each, with the dotted name of the setting and the remedy; a
setting that does not exist is answered with the nearest one that does.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from elastic.config import yaml_problem
from trainer.config import RunConfig


class ConfigError(ValueError):
    """A configuration cannot be used; the message has one line per problem."""


def load(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a run's configuration from a YAML file.

    Args:
        path: the YAML file.
        overrides: settings as `section.name=value`, applied in order; the value is read as YAML.

    Raises:
        ConfigError: the file, an override or a setting cannot be used; one line per problem.
    """
    tree = _read(path)
    for override in overrides:
        _apply(tree, override)
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        lines = [line for detail in error.errors() for line in _explain(detail)]
        raise ConfigError("\n".join([f"{path} cannot be used:", *lines])) from None


def _read(path: Path) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {yaml_problem(error)}") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(
            f"{path} holds a {type(tree).__name__}; write sections, such as 'train:', at its top"
        )
    return tree


def _apply(tree: dict[str, Any], override: str) -> None:
    """Put one `section.name=value` into the tree, making sections that are not there yet."""
    name, equals, text = override.partition("=")
    keys = name.strip().split(".")
    if not equals or not all(keys):
        raise ConfigError(f"--set {override}: write it as section.name=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {override}: not YAML: {yaml_problem(error)}") from None
    node = tree
    for depth, key in enumerate(keys[:-1], start=1):
        if node.get(key) is None:
            node[key] = {}
        inner = node[key]
        if not isinstance(inner, dict):
            raise ConfigError(
                f"--set {override}: {'.'.join(keys[:depth])} is {inner!r}, not a section"
            )
        node = inner
    node[keys[-1]] = value


def _explain(detail: ErrorDetails) -> Iterator[str]:
    """Turn one of pydantic's errors into readable lines."""
    name = ".".join(str(part) for part in detail["loc"])
    match detail["type"]:
        case "value_error" if "." not in name:
            # Cross checks of a group or of the whole: their lines name the settings themselves.
            yield from str(detail["ctx"]["error"]).splitlines()
        case "extra_forbidden" if name.startswith("parallel.context"):
            yield (
                f"{name}: context parallelism is not supported, as megatron-core's own attention "
                "refuses it; leave it out (see README, Limits)"
            )
        case "extra_forbidden":
            yield f"{name}: no such setting; did you mean {_nearest(name)}?"
        case "missing":
            yield f"{name}: required; set it in the file, or with --set {name}=VALUE"
        case _:
            yield f"{name}: {detail['msg']}, not {detail['input']!r}"


def _nearest(name: str) -> str:
    """The valid dotted name closest to a wrong one."""
    known = list(_names(RunConfig.model_fields))
    # A right name in the wrong section is closer than any spelling.
    leaf = name.rpartition(".")[2]
    for candidate in known:
        if candidate.rpartition(".")[2] == leaf:
            return candidate
    siblings = [each for each in known if each.rpartition(".")[0] == name.rpartition(".")[0]]
    close = difflib.get_close_matches(name, siblings or known, n=1, cutoff=0.0)
    return close[0]


def _names(fields: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for name, field in fields.items():
        yield prefix + name
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from _names(kind.model_fields, f"{prefix}{name}.")
