"""Why a stage would run: its action against the stored one that differs least, field by field."""

from __future__ import annotations

from typing import Any

from pipeline.plan import Plan, Step
from pipeline.store import Action, Store


def explain(plan: Plan, store: Store) -> dict[str, list[str]]:
    """Why each stage would run: compared with the stored artifact that differs least; [] for a hit."""
    reasons: dict[str, list[str]] = {}
    for step in plan.steps:
        if step.artifact is not None:
            reasons[step.stage.name] = []
        elif step.action is None:
            reasons[step.stage.name] = ["its input is not known before it has been read"]
        else:
            reasons[step.stage.name] = _reasons(step, store)
    return reasons


def _reasons(step: Step, store: Store) -> list[str]:
    assert step.action is not None
    stored = store.actions_of(step.stage.name)
    if not stored:
        return ["never made before"]
    nearest = min((differences(step.action, manifest["action"]) for manifest in stored), key=len)
    return nearest or ["its files are missing or damaged"]


def differences(action: Action, stored: dict[str, Any]) -> list[str]:
    """Field by field, how an action differs from a stored one: "config.group_size: 128 -> 64"."""
    old, new = _flat(stored), _flat(action.fields())
    lines = []
    for name in sorted({*old, *new}):
        if old.get(name) != new.get(name):
            before, after = old.get(name, "absent"), new.get(name, "absent")
            lines.append(f"{name}: {_short(before)} -> {_short(after)}")
    return lines


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
