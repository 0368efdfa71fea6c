"""From measurements and a budget to the format of each linear, and what is left behind to read."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.checkpoint.source import HfCheckpoint
from pipeline.errors import PlanError
from pipeline.progress import Progress
from pipeline.quant.data import TokenWindows
from pipeline.quant.preflight import QuantizeOptions
from pipeline.quant.report import REPORT_FILE
from pipeline.quant.sensitivity.groups import (
    Group,
    budget_problems,
    format_groups,
    mean_bits,
    reachable_bits,
)
from pipeline.quant.sensitivity.pick import Option, pick
from pipeline.quant.sensitivity.plot import sensitivity_svg
from pipeline.quant.sensitivity.table import table_lines

RECORD_FILE = "sensitivity.json"
PLOT_FILE = "sensitivity.svg"
SCHEMA = 1


def choose_formats(
    checkpoint: HfCheckpoint,
    options: QuantizeOptions,
    windows: TokenWindows,
    progress: Progress,
    work_dir: Path,
    out_dir: Path,
) -> dict[str, str]:
    """Linear (full name) -> format for a mixed checkpoint: the least loss that fits the budget.

    Writes sensitivity.json and sensitivity.svg into `out_dir` and says the table.

    Args:
        options: with `budget_bits` and `candidates`.
        work_dir: keeps what was measured, for a run that continues.

    Raises:
        PlanError: a budget that cannot be kept.
        StageError: weights or activations that are not finite; no room on the disk.
    """
    budget, formats = options.budget_bits, options.candidates
    assert budget is not None, "format mixed has a budget"
    groups = format_groups(checkpoint.shape, options.keep)
    problems = budget_problems(groups, formats, options.group_size, budget)
    if problems:
        raise PlanError(problems)
    work_dir.mkdir(parents=True, exist_ok=True)
    losses, measured = _measure(checkpoint, options, windows, progress, work_dir, groups)
    chosen = chosen_formats(groups, losses, formats, options.group_size, budget)
    record = {
        "schema": SCHEMA,
        **measured,
        "formats": list(formats),
        "group_size": options.group_size,
        "budget_bits": budget,
        "mean_bits": mean_bits(groups, chosen, options.group_size),
        "reachable_bits": list(reachable_bits(groups, formats, options.group_size)),
        "groups": [
            _described(group, by_format, chosen, formats, options.group_size)
            for group, by_format in zip(groups, losses, strict=True)
        ],
    }
    text = json.dumps(record, indent=2, allow_nan=False) + "\n"
    (out_dir / RECORD_FILE).write_text(text, encoding="utf-8")
    (out_dir / PLOT_FILE).write_text(sensitivity_svg(record), encoding="utf-8")
    for line in table_lines(record):
        progress.say(line)
    return chosen


def add_to_report(out_dir: Path) -> None:
    """Put what was chosen into quant_report.json, if anything was."""
    record_path, report_path = out_dir / RECORD_FILE, out_dir / REPORT_FILE
    if not record_path.is_file():
        return
    record, report = (json.loads(path.read_text("utf-8")) for path in (record_path, report_path))
    counts = Counter(group["chosen"] for group in record["groups"])
    report["mixed"] = {
        "budget_bits": record["budget_bits"],
        "mean_bits": record["mean_bits"],
        "sensitivity": record["measure"],
        "groups": {name: counts[name] for name in record["formats"] if counts[name]},
        "details": RECORD_FILE,
    }
    report_path.write_text(json.dumps(report, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def chosen_formats(
    groups: Sequence[Group],
    losses: Sequence[Mapping[str, float]],
    formats: Sequence[str],
    group_size: int,
    budget: float,
) -> dict[str, str]:
    """Linear -> format. Groups that are kept are fp16.

    Args:
        losses: of each group in each of `formats`; not read for kept groups.
        budget: mean bits per weight of all groups together.
    """
    names = [("fp16",) if group.is_kept else tuple(formats) for group in groups]
    options = [
        [
            Option(group.bits(name, group_size), 0.0 if group.is_kept else by_format[name])
            for name in own
        ]
        for group, by_format, own in zip(groups, losses, names, strict=True)
    ]
    weights = sum(group.num_weights for group in groups)
    picked = pick(options, int(budget * weights + 1e-6))
    return {
        linear: own[index]
        for group, own, index in zip(groups, names, picked, strict=True)
        for linear in group.linears
    }


def _measure(
    checkpoint: HfCheckpoint,
    options: QuantizeOptions,
    windows: TokenWindows,
    progress: Progress,
    work_dir: Path,
    groups: Sequence[Group],
) -> tuple[list[dict[str, float]], dict[str, Any]]:
    from pipeline.quant.sensitivity.divergence import divergences
    from pipeline.quant.sensitivity.walk import SensitivityWalk

    walk = SensitivityWalk(checkpoint, options, windows, progress, work_dir)
    measured = walk.describe()
    progress.say(
        f"measuring what {len(groups)} groups of linears lose in {', '.join(options.candidates)}, "
        f"on {measured['num_tokens']} tokens"
    )
    if options.sensitivity == "kl":
        return divergences(walk, groups, options.candidates), measured
    return walk.losses(groups, options.candidates), measured


def _described(
    group: Group,
    losses: Mapping[str, float],
    chosen: Mapping[str, str],
    formats: Sequence[str],
    group_size: int,
) -> dict[str, Any]:
    return {
        "layer": group.layer,
        "kind": group.kind,
        "linears": list(group.linears),
        "num_weights": group.num_weights,
        "kept": group.is_kept,
        "chosen": chosen[group.linears[0]],
        "bits": {name: group.bits(name, group_size) / group.num_weights for name in formats},
        "loss": dict(losses),
    }
