"""What shorthands hand on to the steps they stand for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from types import MappingProxyType
from typing import Any

# Levels and search are measured on the same data set, but each on as many tokens as it needs: the search's options
# have their own names in a shorthand, those of the levels these.
DATABASE = MappingProxyType(
    {"calibration_tokens": "database_tokens", "context_tokens": "database_context_tokens"}
)


def handed_on(
    config: Any, step: type, renamed: Mapping[str, str] = DATABASE, /, **more: Any
) -> dict[str, Any]:
    """The options of a step's ``Config`` that a shorthand's has, too.

    Args:
        renamed: what an option of the step is called in the shorthand, where that differs.
        more: options that the shorthand sets itself, such as ``From(...)``.
    """
    names = {field.name: renamed.get(field.name, field.name) for field in fields(step)}
    ours = {field.name for field in fields(config)}
    return {option: getattr(config, name) for option, name in names.items() if name in ours} | more
