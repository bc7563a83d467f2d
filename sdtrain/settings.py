"""Typed settings from YAML, with readable errors for unknown keys and wrong values."""

from __future__ import annotations

import difflib
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from sdtrain.errors import UserError
from sdtrain.redaction import as_recorded, remember_secrets


class Settings(BaseModel):
    """Base of all configuration sections: frozen, without unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)


SettingsT = TypeVar("SettingsT", bound=Settings)
ModelT = TypeVar("ModelT")


def load_settings(model: type[SettingsT], path: Path) -> SettingsT:
    """Reads a YAML file into `model`; UserError if missing, not YAML, or with an unknown key or a bad value."""
    try:
        content = yaml.safe_load(path.read_text())
    except FileNotFoundError as error:
        raise UserError(f"There is no file {path}.") from error
    except yaml.MarkedYAMLError as error:
        # Without the quoted line, which may hold half of a URL.
        place = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise UserError(f"{path} is not valid YAML: {place}{error.problem or error.context}.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid YAML: it is no text in UTF-8.") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold settings as `key: value` lines.")
    return parse_settings(model, content, str(path))


def shipped(folder: Path) -> list[str]:
    """The names of the YAML files in one of sdtrain's own folders."""
    return sorted(path.stem for path in folder.glob("*.yaml"))


def shipped_or_file(name_or_file: str, folder: Path, what: str) -> Path:
    """The user's own YAML file, or that of a name in `folder`; UserError, with the nearest, for a name of none."""
    path = Path(name_or_file)
    if path.suffix in (".yaml", ".yml"):
        return path
    if not (path := folder / f"{name_or_file}.yaml").exists():
        raise UserError(f"There is no {what} '{name_or_file}'.{nearest(name_or_file, shipped(folder))}")
    return path


def parse_settings(model: type[SettingsT], content: dict[str, Any], where: str) -> SettingsT:
    """Validates `content`, which came from `where`, against `model`; UserError for an unknown key or a bad value."""
    return _validate(model, content, where)


def check_options(options: Any, where: str) -> None:
    """Validates a dataclass of options (`sdtrain.options`) against its types and bounds; UserError for a bad value."""
    _validate(type(options), asdict(options), where)


def _validate(model: type[ModelT], content: dict[str, Any], where: str) -> ModelT:
    remember_secrets(content)
    try:
        return TypeAdapter(model).validate_python(content)
    except ValidationError as error:
        raise UserError(f"{where}: " + "; ".join(_sentence(model, detail) for detail in error.errors())) from error


def dump_settings(settings: Settings) -> str:
    """All settings as YAML in the order of their declaration, without the secrets of URLs."""
    return yaml.safe_dump(as_recorded(settings.model_dump(mode="json")), sort_keys=False, allow_unicode=True)


def nearest(name: str, known: list[str]) -> str:
    """Returns " Did you mean 'x'?" for a misspelt name, else the list of known names."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f" Did you mean '{close[0]}'?" if close else f" Known: {', '.join(sorted(known))}."


def _sentence(model: type, detail: Any) -> str:
    location = [str(part) for part in detail["loc"]]
    name = ".".join(location)
    if detail["type"] == "extra_forbidden":
        return f"unknown key '{name}'.{nearest(location[-1], _known_keys(model, location[:-1]))}"
    if detail["type"] == "missing":
        return f"'{name}' is missing"
    why = detail["msg"].removeprefix("Value error, ")
    # Without a name the error concerns several settings, which the sentence names.
    return f"'{name}' is {detail['input']!r}: {why}" if name else why


def _known_keys(model: Any, path: list[str]) -> list[str]:
    for part in path:
        field = model.model_fields.get(part)
        candidates = [] if field is None else [field.annotation, *get_args(field.annotation)]
        inner = [c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)]
        if not inner:
            break
        model = inner[0]
    return list(model.model_fields)
