"""What every settings class and every model config is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict

from tinyclip.redact import redacted


class Config(BaseModel):
    """A frozen value: keyword-only, unknown fields are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


MAX_WORKERS = 1024  # processes that read data: each is a copy of the interpreter
NUM_NAMED = 5  # changed settings that an error names


def changes(before: Any, after: Any, *, free: Sequence[str] = ()) -> str:
    """The first few of `difference` in one line; empty where the settings are the same but for `free` ones."""
    changed = [line for line in difference(before, after) if line.partition(": ")[0] not in free]
    more = f"; and {len(changed) - NUM_NAMED} more" if len(changed) > NUM_NAMED else ""
    return "; ".join(changed[:NUM_NAMED]) + more


def difference(before: Any, after: Any, name: str = "") -> list[str]:
    """`path: before -> after` of every setting that differs."""
    if isinstance(before, dict) and isinstance(after, dict):
        keys = before | after
        return [line for k in keys for line in difference(before.get(k), after.get(k), f"{name}.{k}".strip("."))]
    if isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        pairs = enumerate(zip(before, after, strict=True))
        return [line for i, (a, b) in pairs for line in difference(a, b, f"{name}.{i}")]
    return [] if before == after else [f"{name}: {_short(before)} -> {_short(after)}"]


def _short(setting: Any) -> str:
    return "..." if isinstance(setting, dict | list) and len(str(setting)) > 60 else str(redacted(setting))
