"""A plan as a table for people and as one JSON document for programs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.table import Table

from pipeline.forecast.document import change_json, forecast_json, host_json
from pipeline.forecast.judgement import HostForecast
from pipeline.forecast.sizes_text import band_text, exact_text, size_text
from pipeline.forecast.tables import change_table, rank_table, size_lines
from pipeline.integrity import identity_lines
from pipeline.manifest import Manifest
from pipeline.plan import Plan, Step
from pipeline.targets import TARGETS

_SHOWN_REASONS = 2
_SHOWN_ADVICE = 3


def plan_json(plan: Plan) -> dict[str, Any]:
    """The plan as plain data; sizes in bytes."""
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
        "forecast": None if plan.forecast is None else forecast_json(plan.forecast),
        "changes": [change_json(change) for change in plan.changes],
        "host": None if plan.host is None else host_json(plan.host),
        "unhashed_bytes": plan.unhashed_bytes,
        "notes": list(plan.notes),
        "problems": [vars(problem) for problem in plan.problems],
    }


def print_plan(plan: Plan, reasons: dict[str, list[str]], console: Console) -> None:
    """Stages with what they take and why (see `explain`), then memory of the target and advice."""
    parts: list[RenderableType] = [_styled_title(plan), _stage_table(plan, reasons)]
    if plan.host is not None and plan.host.stages:
        parts.append(_host_line(plan.host))
    if plan.forecast is not None:
        parts += ["", *size_lines(plan.forecast), rank_table(plan.forecast)]
    if plan.changes:
        parts += ["", change_table(plan.changes)]
    if plan.forecast is None and not plan.problems:
        parts.append(
            "sizes are known after the download, or with the config.json under model.shape"
        )
    if plan.unhashed_bytes:
        parts.append(
            f"{exact_text(plan.unhashed_bytes)} of the original are hashed once when it runs"
        )
    advice = () if plan.forecast is None else plan.forecast.advice[:_SHOWN_ADVICE]
    parts += [f"note: {one.line}" for one in advice]
    parts += [f"note: {note}" for note in plan.notes]
    console.print(Group(*parts))


def _styled_title(plan: Plan) -> str:
    name, rest = plan.loaded.config.name, plan_title(plan)
    return f"[bold]{name}[/]{rest.removeprefix(name)}"


def plan_title(plan: Plan) -> str:
    """What is built, in a line."""
    rehearsal = (
        " (rehearsal with synthetic weights: no quality gates)" if plan.loaded.rehearsal else ""
    )
    return f"{short_title(plan)}{rehearsal}"


def short_title(plan: Plan) -> str:
    """The same without what does not change sizes."""
    config = plan.loaded.config
    product = (
        "checkpoint only"
        if plan.loaded.converts_only
        else f"{config.build.backend} for {config.target} (SM{TARGETS[config.target].sm})"
    )
    return (
        f"{config.name}: {config.quantize.format}, tp {config.mapping.tp}, pp "
        f"{config.mapping.pp}, {product}"
    )


def _stage_table(plan: Plan, reasons: dict[str, list[str]]) -> Table:
    table = Table(show_edge=False, pad_edge=False)
    table.add_column("stage")
    table.add_column("state")
    for name in ("memory", "disk", "time"):
        table.add_column(name, justify="right")
    table.add_column("why", overflow="fold")
    taken = {} if plan.host is None else {stage.stage: stage for stage in plan.host.stages}
    for step in plan.steps:
        stage = taken.get(step.stage.name)
        sizes = ["", "", ""]
        if stage is not None:
            memory = size_text(stage.ram_peak)
            disk = size_text(stage.disk_written) if stage.disk_written else "links"
            sizes = [f"~{memory}", disk, band_text(stage.seconds)]
        table.add_row(step.stage.name, step.status, *sizes, _why(reasons, step))
    return table


def _why(reasons: dict[str, list[str]], step: Step) -> str:
    """The first reasons; `explain` has all."""
    found = reasons[step.stage.name]
    shown = "; ".join(found[:_SHOWN_REASONS])
    more = len(found) - _SHOWN_REASONS
    return f"{shown}; +{more} more" if more > 0 else shown


def _host_line(host: HostForecast) -> str:
    """The run as a whole, beside what this machine has free."""
    machine = host.machine
    return (
        f"the run: memory ~{size_text(host.ram_peak)} of {size_text(machine.free_memory_bytes)} free, "
        f"disk {size_text(host.disk.peak)} of {size_text(machine.free_disk_bytes)} free, "
        f"{band_text(host.seconds)} on {machine.cores} cores"
    )


def print_manifest(directory: Path, manifest: Manifest, console: Console) -> None:
    """A published engine in a page: what it is made of, what it measured."""
    config, build = manifest.config, manifest.config.build
    rehearsal = " (rehearsal with synthetic weights)" if manifest.rehearsal else ""
    console.print(f"[bold]{manifest.name}[/]{rehearsal} in {directory}")
    console.print(
        f"{config.quantize.format}, {build.backend} for {config.target}, "
        f"batch {build.max_batch_size}, {build.max_seq_len} tokens"
    )
    for line in identity_lines(manifest.identity):
        console.print(line, markup=False, soft_wrap=True)
    table = Table(show_edge=False, pad_edge=False)
    table.add_column("file", overflow="fold")
    table.add_column("size", justify="right")
    table.add_column("sha256")
    for name, entry in manifest.files.items():
        table.add_row(name, exact_text(entry.bytes), entry.sha256[:12])
    console.print(table)
    for stage, facts in manifest.facts.items():
        for name, value in facts.items():
            for each in value if isinstance(value, list) else [value]:
                text = _record_text(each) if isinstance(each, dict) else each
                console.print(f"{stage}.{name}: {text}", markup=False)


def _record_text(record: dict[str, Any]) -> str:
    """What one rank reported, for example."""
    return ", ".join(
        f"{name} {exact_text(value) if name.endswith('_bytes') else value}"
        for name, value in record.items()
    )
