"""Imports point downwards, and what must start fast imports nothing heavy."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "pipeline"

# Top to bottom; modules of one line may import each other. Kept by hand: it is the design.
LAYERS: list[set[str]] = [
    {"__main__"},
    {"cli"},
    {
        "console",
        "keeping",
        "render",
        "run",
        "show",
        "support",
        "engine_contents",
        "data_page",
        "integrity",
    },
    {"stage_process"},
    {"explain"},
    {"plan"},
    {"preflight"},
    {"forecast"},
    {"weights"},
    {"stages"},
    {"packaging"},
    {"serving"},
    {"verification"},
    {"runtime"},
    {"engine"},
    {"network"},
    {"quant"},
    {"checkpoint"},
    {"models"},
    {"quant.formats"},
    {"parallel"},
    {"workspace", "external", "launch"},
    {"publish", "manifest", "identity"},
    {"config", "store"},
    {"build_config", "run_config", "verify_config"},
    {"tensorrt_llm_config"},
    {"calibration_config"},
    {
        "memory",
        "strict_yaml",
        "targets",
        "progress",
        "orphans",
        "dead_process",
        "disk",
        "tokenizer_file",
        "nvidia_host",
    },
    {"hardlink", "links", "names"},
    {"errors"},
]
# Stands apart: trains the demo model, and tells others where its files lie.
APART = {"demo"}

HEAVY = {
    "torch",
    "transformers",
    "modelopt",
    "onnx",
    "onnxruntime",
    "tensorrt",
    "tensorrt_rtx",
    "tritonclient",
    "matplotlib",
    "huggingface_hub",
    "pyarrow",
}


def _unit(module: str) -> str:
    """The unit of the table that a module `pipeline.a.b` belongs to."""
    parts = module.split(".")[1:]
    if not parts:
        return "__init__"
    if parts[:2] == ["quant", "formats"]:
        return "quant.formats"
    return parts[0]


def _imports(path: Path) -> set[str]:
    tree = ast.parse(path.read_text("utf-8"))
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if name.split(".")[0] == "pipeline"}


def _sources() -> list[Path]:
    # model.py templates of the emitted repositories run inside Triton, not in this package.
    return sorted(path for path in PACKAGE.rglob("*.py"))


def test_every_unit_has_its_place() -> None:
    units = {
        _unit(".".join(("pipeline", *path.relative_to(PACKAGE).with_suffix("").parts)))
        for path in _sources()
    }
    placed = set().union(*LAYERS) | APART | {"__init__"}
    assert units == placed


@pytest.mark.parametrize("path", _sources(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_downwards(path: Path) -> None:
    depth = {unit: level for level, units in enumerate(LAYERS) for unit in units}
    own = _unit(".".join(("pipeline", *path.relative_to(PACKAGE).with_suffix("").parts)))
    for imported in _imports(path):
        unit = _unit(imported)
        if unit in (own, "__init__", "demo") or unit not in depth:
            continue
        if own == "demo":
            assert unit == "errors", f"demo imports {imported}"
            continue
        if own == "quant" and unit == "quant.formats":
            continue
        assert depth[own] <= depth[unit], f"{own} imports {imported}, which is above it"


@pytest.mark.parametrize(
    "module",
    ["pipeline.cli", "pipeline.plan", "pipeline.run", "pipeline.render", "pipeline.stages.worker"],
)
def test_start_up_imports_nothing_heavy(module: str) -> None:
    code = f"import sys, {module}; print(*{{name.split('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not HEAVY & set(done.stdout.split())


def test_files_stay_readable() -> None:
    long = {
        str(path): count
        for root in (PACKAGE, PACKAGE.parent / "tests")
        for path in root.rglob("*.py")
        if (count := len(path.read_text("utf-8").splitlines())) > 500
    }
    assert long == {}
