"""JSON from files that nobody vouches for: every way to be wrong is one ValueError."""

from __future__ import annotations

import json
from typing import Any


def parse_object(data: bytes) -> dict[str, Any]:
    """The JSON object in `data` (UTF-8).

    Raises:
        ValueError: not UTF-8, not JSON, not an object, a key twice, or nested too deeply.
    """
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_without_duplicates)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(value, dict):
        raise ValueError(f"a JSON {type(value).__name__} instead of an object")
    return value


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in pairs:
        if key in values:
            raise ValueError(f"the key {key!r} appears twice")
        values[key] = value
    return values
