"""report.html: the report for people."""

from __future__ import annotations

import math
from importlib import resources
from pathlib import Path

from pipeline.verification.plots import kl_histogram_svg, loss_scatter_svg
from pipeline.verification.report import REPORT_HTML, REPORT_JSON, Report

NUM_WORST_WINDOWS = 10

_GATE_NAMES = {
    "finite": "windows whose logits are not finite",
    "max_perplexity_ratio": "perplexity of the engine over the original's",
    "max_mean_kl": "mean KL divergence, nats per token",
    "min_top1_agreement": "share of tokens with the same first choice",
}


def write_report(report: Report, out_dir: Path) -> None:
    """Write report.json and report.html (one file, no scripts, nothing loaded from elsewhere)."""
    text = report.model_dump_json(indent=2)
    (out_dir / REPORT_JSON).write_text(text + "\n", encoding="utf-8")
    (out_dir / REPORT_HTML).write_text(render_page(report), encoding="utf-8")


def render_page(report: Report) -> str:
    """The whole page as one string; the same report gives the same page."""
    import jinja2
    from markupsafe import Markup

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(number=_number, size=_size, percent=_percent)
    template = resources.files(__package__).joinpath("report.html.j2").read_text(encoding="utf-8")
    return environment.from_string(template).render(
        report=report,
        gate_names=_GATE_NAMES,
        worst_windows=_worst_windows(report),
        # Markup: our own SVG, made from numbers only.
        kl_plot=Markup(kl_histogram_svg(report.kl_histogram, report.mean_kl, report.p99_kl)),
        loss_plot=Markup(loss_scatter_svg(report.loss_pairs)),
    )


def _worst_windows(report: Report) -> list[object]:
    """Largest mean KL first; unknown ones before all others."""
    ranked = sorted(
        report.windows,
        key=lambda window: -math.inf if math.isnan(window.mean_kl) else -window.mean_kl,
    )
    return list(ranked[:NUM_WORST_WINDOWS])


def _number(value: float) -> str:
    """Five digits; infinity is no integer and prints as inf."""
    if math.isnan(value):
        return "not a number"
    return f"{value:.0f}" if value.is_integer() and value < 1e6 else f"{value:#.5g}"


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:,.2f} MB" if num_bytes >= 1e5 else f"{num_bytes:,} bytes"


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"
