"""Backend tensorrt without a GPU: its code runs through TensorRT-RTX's bindings, which share its API.

677 of 679 methods of the two bindings have the same signature; TensorRT itself was not executed.
"""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline.engine import tensorrt_build
from pipeline.engine.tensorrt_build import is_fatal, profiles, version_problem
from pipeline.engine.tensorrt_request import PlanOptions, TensorRtRequest
from pipeline.network import BuildLimits, export_network
from pipeline.network.export import read_checkpoint_spec
from pipeline.progress import SilentProgress
from tests.rank_checkpoints import write_random_rank

LIMITS = BuildLimits(max_batch_size=2, max_seq_len=64, max_input_len=32)
_WITH_RTX = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx_bindings") is None,
    reason="TensorRT-RTX is not installed",
)
_BUILD = """
import sys
from pathlib import Path
import tensorrt_rtx_bindings as trt
from pipeline.engine.tensorrt_build import build_plan
from pipeline.engine.tensorrt_request import PlanOptions
from pipeline.network import BuildLimits
from pipeline.network.export import read_checkpoint_spec, tensorrt_graph_path

root = Path(sys.argv[1])
limits = BuildLimits(2, 64, 32)
spec = read_checkpoint_spec(root / "checkpoint", 0, limits)
activations = build_plan(
    trt, tensorrt_graph_path(root, 0), root / "rank0.engine", spec, limits,
    PlanOptions(profiles=sys.argv[2]), None, root / "build.log",
)
print(activations)
"""


@pytest.mark.rtx
@_WITH_RTX
def test_the_builder_runs(tmp_path: Path) -> None:
    checkpoint = write_random_rank(tmp_path / "checkpoint", quantized=True)
    export_network(checkpoint, 0, tmp_path, LIMITS, SilentProgress())
    command = [sys.executable, "-c", _BUILD, str(tmp_path), "context_and_generation"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 0
    log = (tmp_path / "build.log").read_text()
    assert "_gemm_mha_v2" in log  # the shared lowering
    assert (tmp_path / "rank0.engine").read_bytes()[:4] == b"vtrt"


def _names(tree: ast.AST, owner: str) -> set[str]:
    """Attributes that the source takes of a variable."""
    return {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == owner
    }


@pytest.mark.rtx
@_WITH_RTX
def test_every_name_exists_in_the_bindings() -> None:
    import tensorrt_rtx_bindings as trt

    owners: dict[str, Any] = {
        "trt": trt,
        "builder": trt.Builder,
        "config": trt.IBuilderConfig,
        "profile": trt.IOptimizationProfile,
    }
    tree = ast.parse(Path(tensorrt_build.__file__).read_text("utf-8"))
    used = {owner: _names(tree, owner) for owner in owners}
    assert used["config"] >= {"create_timing_cache", "set_timing_cache", "get_timing_cache"}
    assert used["builder"] >= {"build_serialized_network_to_stream"}
    missing = {
        f"{owner}.{name}"
        for owner, names in used.items()
        for name in names
        if not hasattr(owners[owner], name)
    }
    assert missing == set()
    flags = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert {name for name in ("STRIP_PLAN", "REFIT") if name in flags} == {"STRIP_PLAN", "REFIT"}
    assert hasattr(trt.BuilderFlag, "STRIP_PLAN")
    assert hasattr(trt.BuilderFlag, "REFIT")
    assert hasattr(trt.ITimingCache, "serialize")


@pytest.mark.parametrize(
    ("version", "what"),
    [
        ("11.0.0.114", None),
        ("11.4.0.106", None),
        (
            "10.16.1.11",
            "has no attention with lengths of rows: it would attend to the whole KV cache",
        ),
        (
            "10.15.1.29",
            "has no attention with lengths of rows: it would attend to the whole KV cache; and no "
            "all-reduce",
        ),
        ("10.3.0", "has no update of a KV cache, and no attention with lengths of rows"),
        ("12.0.0.1", "is not known to this program"),
    ],
)
def test_versions(version: str, what: str | None) -> None:
    problem = version_problem(version)
    assert (None if problem is None else problem.what) == (
        None if what is None else f"TensorRT {version} {what}"
    )
    assert problem is None or problem.allowed == "11.x"


def test_a_profile_for_prompts_and_one_for_single_tokens(tmp_path: Path) -> None:
    spec = read_checkpoint_spec(write_random_rank(tmp_path, quantized=False), 0, LIMITS)
    context, generation = profiles(spec, LIMITS, PlanOptions())
    assert context["input_ids"] == ((1, 1), (2, 32), (2, 32))
    assert generation["input_ids"] == ((1, 1), (2, 1), (2, 1))
    assert generation["position_ids"] == ((1, 1), (2, 1), (2, 1))
    assert context["logit_positions"] == ((1, 1), (2, 1), (2, 1))
    assert context["past_key_0"] == generation["past_key_0"]
    (only,) = profiles(spec, LIMITS, PlanOptions(profiles="one"))
    assert only["input_ids"] == ((1, 1), (2, 1), (2, 32))


def test_a_dropped_input_is_fatal_and_another_warning_is_not() -> None:
    assert is_fatal("ERROR: no kernel")
    assert is_fatal("WARNING: Unused Input: kv_lengths")
    assert not is_fatal("WARNING: a tactic was skipped")


def test_a_request_survives_the_command_line() -> None:
    request = TensorRtRequest(3, "rtx4090", LIMITS, PlanOptions(strip_plan=True))
    assert TensorRtRequest.from_json(request.to_json()) == request
