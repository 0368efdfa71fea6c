"""Why a stage would run: its action against the stored one that differs least, field by field."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from pipeline.plan import Plan
from pipeline.store import Action, Store


def explain(
    plan: Plan, store: Store, published: Mapping[str, dict[str, Any]]
) -> dict[str, list[str]]:
    """Why each stage would run; [] for one that is up to date.

    Args:
        published: stage -> action of what stands under the plan's name; it is what a stage is compared
            with. Without one, the stored artifact that differs least is.
    """
    reasons: dict[str, list[str]] = {}
    for step in plan.steps:
        name = step.stage.name
        if step.action is None:
            reasons[name] = ["its input is not known before it has been read"]
        elif step.status in ("done", "not needed"):
            reasons[name] = []
        else:
            reasons[name] = _reasons(step.action, store, published.get(name))
    reasons["publish"] = _publish_reasons(plan, published)
    return reasons


def _publish_reasons(plan: Plan, published: Mapping[str, dict[str, Any]]) -> list[str]:
    if not published:
        return ["nothing is published under this name"]
    other = [
        step.stage.name
        for step in plan.steps
        if step.action is None or step.action.fields() != published.get(step.stage.name)
    ]
    return [f"what is published was made by another {', '.join(other)}"] if other else []


def _reasons(action: Action, store: Store, published: dict[str, Any] | None) -> list[str]:
    if published is not None and published != action.fields():
        return differences(action, published)
    stored = store.actions_of(action.stage)
    if not stored:
        return ["never made before"]
    if store.dropped(action) is not None:
        return ["was dropped (run.keep: needed), and a stage that would run reads it"]
    like = min((manifest["action"] for manifest in stored), key=partial(_distance, action))
    nearest = differences(action, like)
    if 2 * len(nearest) > len({*_flat(like), *_flat(action.fields())}):
        return ["never made before"]  # that one is of another model
    return nearest or ["its files are missing or were changed"]


def _distance(action: Action, stored: dict[str, Any]) -> int:
    return len(changed_fields(action, stored))


def differences(action: Action, stored: dict[str, Any]) -> list[str]:
    """Field by field, how an action differs from a stored one: "config.group_size: 128 -> 64"."""
    old, new = _flat(stored), _flat(action.fields())
    lines = []
    for name in changed_fields(action, stored):
        before, after = old.get(name, "absent"), new.get(name, "absent")
        lines.append(f"{name}: {_short(before)} -> {_short(after)}")
    return lines


def changed_fields(action: Action, stored: dict[str, Any]) -> list[str]:
    """Names of the fields in which an action differs from a stored one: "config.group_size"."""
    old, new = _flat(stored), _flat(action.fields())
    return [name for name in sorted({*old, *new}) if old.get(name) != new.get(name)]


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        flat: dict[str, Any] = {}
        for key, child in value.items():
            flat.update(_flat(child, f"{prefix}.{key}" if prefix else key))
        return flat
    return {prefix: value}


def _short(value: Any) -> str:
    text = str(value)
    return f"{text[:12]}…" if len(text) == 64 else text
