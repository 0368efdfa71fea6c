"""A plan as a table for people and as one JSON document for programs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.table import Table

from pipeline.console import bytes_text
from pipeline.manifest import Manifest
from pipeline.plan import Plan
from pipeline.preflight import Forecast
from pipeline.targets import TARGETS


def plan_json(plan: Plan) -> dict[str, Any]:
    """The plan as plain data; sizes in bytes."""
    sizes = plan.forecast
    return {
        "name": plan.loaded.config.name,
        "rehearsal": plan.loaded.rehearsal,
        "target": plan.loaded.config.target,
        "steps": [
            {
                "stage": step.stage.name,
                "status": step.status,
                "inputs": step.inputs,
                "key": step.action.key if step.action else None,
            }
            for step in plan.steps
        ],
        "forecast": None if sizes is None else _forecast_json(sizes),
        "unhashed_bytes": plan.unhashed_bytes,
        "notes": list(plan.notes),
        "problems": [vars(problem) for problem in plan.problems],
    }


def _forecast_json(sizes: Forecast) -> dict[str, Any]:
    return {
        "source_bytes": sizes.source_bytes,
        "rank_bytes": list(sizes.rank_bytes),
        "rank_bytes_exact": sizes.exact,
        "kv_bytes_per_token": sizes.kv_bytes_per_token,
        "kv_bytes": sizes.kv_bytes,
        "target_bytes": sizes.target_bytes,
        "free_bytes": sizes.free_bytes,
        "fits": sizes.free_bytes >= 0,
    }


def print_plan(plan: Plan, reasons: dict[str, list[str]], console: Console) -> None:
    """Stages with their state and reason (see `explain`), then sizes and memory."""
    parts: list[RenderableType] = [_title(plan), _stage_table(plan, reasons)]
    if plan.forecast is not None:
        parts.append(_size_table(plan, plan.forecast))
    if plan.forecast is None and not plan.problems:
        parts.append(
            "sizes are known after the download, or with the config.json under model.shape"
        )
    if plan.unhashed_bytes:
        parts.append(
            f"{bytes_text(plan.unhashed_bytes)} of the original are hashed once when it runs"
        )
    parts += [f"note: {note}" for note in plan.notes]
    console.print(Group(*parts))


def _title(plan: Plan) -> str:
    config = plan.loaded.config
    rehearsal = (
        " (rehearsal with synthetic weights: no quality gates)" if plan.loaded.rehearsal else ""
    )
    product = (
        "checkpoint only"
        if plan.loaded.converts_only
        else f"{config.build.backend} for {config.target} (SM{TARGETS[config.target].sm})"
    )
    return (
        f"[bold]{config.name}[/]: {config.quantize.format}, tp {config.mapping.tp}, pp "
        f"{config.mapping.pp}, {product}{rehearsal}"
    )


def _stage_table(plan: Plan, reasons: dict[str, list[str]]) -> Table:
    table = Table(show_edge=False, pad_edge=False)
    for column in ("stage", "reads", "state", "key", "why"):
        table.add_column(column, overflow="fold")
    for step in plan.steps:
        reads = ", ".join(dict.fromkeys(step.inputs.values()))
        key = step.action.key[:12] if step.action else "-"
        table.add_row(
            step.stage.name, reads, step.status, key, "; ".join(reasons[step.stage.name][:3])
        )
    return table


def _size_table(plan: Plan, sizes: Forecast) -> Table:
    build = plan.loaded.config.build
    table = Table(show_header=False, show_edge=False, pad_edge=False, box=None)
    table.add_column("what")
    table.add_column("size", justify="right")
    table.add_column("note")
    source = "not fetched yet" if sizes.source_bytes is None else bytes_text(sizes.source_bytes)
    table.add_row("original tensors", source, "")
    precision = "exact" if sizes.exact else "by the budget"
    for rank, size in enumerate(sizes.rank_bytes):
        table.add_row(
            f"rank {rank} tensors",
            bytes_text(size),
            f"TensorRT-LLM checkpoint, {precision}",
        )
    per_token = f"{bytes_text(sizes.kv_bytes_per_token)} a token, batch {build.max_batch_size} x "
    table.add_row(
        "KV cache",
        bytes_text(sizes.kv_bytes),
        f"{per_token}{build.max_seq_len} tokens, {sizes.kv_cache}",
    )
    verdict = "fits" if sizes.free_bytes >= 0 else "[bold red]does not fit[/]"
    note = f"of {bytes_text(sizes.target_bytes)} on {plan.loaded.config.target}: {verdict}"
    table.add_row("left", bytes_text(sizes.free_bytes), f"{note}, before activations and runtime")
    return table


def print_manifest(directory: Path, manifest: Manifest, console: Console) -> None:
    """A published engine in a page: what it is made of, what it measured."""
    config, build = manifest.config, manifest.config.build
    rehearsal = " (rehearsal with synthetic weights)" if manifest.rehearsal else ""
    console.print(f"[bold]{manifest.name}[/]{rehearsal} in {directory}")
    console.print(
        f"{config.quantize.format}, {build.backend} for {config.target}, "
        f"batch {build.max_batch_size}, {build.max_seq_len} tokens"
    )
    table = Table(show_edge=False, pad_edge=False)
    table.add_column("file", overflow="fold")
    table.add_column("size", justify="right")
    table.add_column("sha256")
    for name, entry in manifest.files.items():
        table.add_row(name, bytes_text(entry.bytes), entry.sha256[:12])
    console.print(table)
    for stage, facts in manifest.facts.items():
        for name, value in facts.items():
            for each in value if isinstance(value, list) else [value]:
                console.print(f"{stage}.{name}: {each}", markup=False)
