"""Which of a file's columns is what."""

from collections.abc import Sequence
from pathlib import Path

from dynrec_jax.data.sources.source import Columns
from dynrec_jax.errors import ConfigError, DataError

ROLES = ("user", "item", "time", "event", "rating")
REQUIRED = ("user", "item")


def pick(path: Path, found: Sequence[str], columns: Columns, defaults: Columns) -> dict[str, str]:
    """Column names by role; time, event and rating are left out where the file has none and none was named.

    Raises:
      DataError: A column that must be there is not, or is there twice.
    """
    picked = {}
    for role in ROLES:
        given = getattr(columns, role)
        name = getattr(defaults, role) if given is None else given
        if not name and role not in REQUIRED:
            continue
        if name not in found:
            if given is None and role not in REQUIRED:
                continue
            raise DataError(f"{path}: no column {name!r}; found {', '.join(found)} (set --{role}_column)")
        if list(found).count(name) > 1:
            raise DataError(f"{path}: {found.count(name)} columns are named {name!r}; expected one")
        picked[role] = name
    if twice := {name for name in picked.values() if list(picked.values()).count(name) > 1}:
        raise DataError(f"{path}: column {min(twice)!r} was named for two things; expected one column each")
    return picked


def refuse_columns(columns: Columns, kind: str) -> None:
    """Raises ConfigError where a column was named for a source whose columns are fixed."""
    for role in columns.given():
        raise ConfigError(f"--{role}_column: a {kind} source's columns are known; leave the flag out")
