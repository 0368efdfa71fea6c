"""The nearest builds that fit: each really does, and none that is nearer was passed over."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.config import load_config
from pipeline.forecast.changes import MAX_CHANGES, Change, nearest_changes
from pipeline.forecast.device import fits, rank_memories
from pipeline.forecast.subject import Subject, cut_problems, is_possible
from pipeline.network.limits import BuildLimits
from pipeline.plan import Plan, make_plan
from pipeline.quant.formats import FORMATS
from pipeline.targets import TARGETS
from pipeline.workspace import Workspace
from tests.forecast_subjects import LLAMA_2_7B, LLAMA_2_13B, LLAMA_2_70B, llama, subject_of
from tests.machines import AMPLE


def _limits(batch: int, length: int, tokens: int) -> BuildLimits:
    return BuildLimits(max_batch_size=batch, max_seq_len=length, max_input_len=tokens)


SUBJECTS = {
    "70b": subject_of(LLAMA_2_70B),
    "70b-fp16-tp2": subject_of(LLAMA_2_70B, format=FORMATS["fp16"], tp=2),
    "13b-fp16": subject_of(LLAMA_2_13B, format=FORMATS["fp16"], limits=_limits(2, 4096, 2048)),
    "13b-many": subject_of(LLAMA_2_13B, limits=_limits(32, 4096, 2048)),
    "7b-long": subject_of(LLAMA_2_7B, limits=_limits(16, 4096, 4000)),
    "7b-tp4-uncut": subject_of(LLAMA_2_7B, tp=4),
    "13b-tp8-uncut": subject_of(LLAMA_2_13B, tp=8),
    "70b-cpu": subject_of(LLAMA_2_70B, backend="onnxruntime"),
    "13b-a10": subject_of(
        LLAMA_2_13B, format=FORMATS["fp16"], limits=_limits(2, 4096, 2048), target=TARGETS["a10"]
    ),
}


@pytest.mark.parametrize("name", SUBJECTS)
def test_every_change_really_fits(name: str) -> None:
    subject = SUBJECTS[name]
    assert cut_problems(subject) or not fits(subject)
    changes = nearest_changes(subject)
    assert 1 <= len(changes) <= MAX_CHANGES
    for change in changes:
        assert cut_problems(change.subject) == [], change.what
        assert is_possible(change.subject), change.what
        assert all(rank.left >= 0 for rank in rank_memories(change.subject)), change.what
        assert change.subject != subject
        assert change.distance > 0
    assert [change.distance for change in changes] == sorted(c.distance for c in changes)
    assert len({change.what for change in changes}) == len(changes)


def _by_what(subject: Subject) -> dict[str, Change]:
    return {change.what.partition(":")[0]: change for change in nearest_changes(subject)}


def test_the_largest_batch_that_fits() -> None:
    subject = SUBJECTS["13b-many"]
    batch = _by_what(subject)["build.max_batch_size"].subject.limits.max_batch_size
    assert batch == 4  # 5 would leave 54 MB: 3.4 GB of cache a row beside 7.2 GB, of 25.8 GB
    more = replace(subject.limits, max_batch_size=batch + 1)
    assert not fits(replace(subject, limits=more))


def test_the_longest_sequence_that_fits() -> None:
    subject = SUBJECTS["7b-long"]
    limits = _by_what(subject)["build.max_seq_len"].subject.limits
    assert limits.max_seq_len % 64 == 0
    assert limits.max_input_len == min(4000, limits.max_seq_len // 2)
    longer = limits.max_seq_len + 64
    more = replace(subject.limits, max_seq_len=longer, max_input_len=longer // 2)
    assert not fits(replace(subject, limits=more))


def test_fewest_further_gpus() -> None:
    changes = {change.what: change for change in nearest_changes(SUBJECTS["70b-fp16-tp2"])}
    assert "mapping.tp: 4" not in changes  # 138 GB: four cards of 25.8 GB are too few
    assert changes["mapping.tp: 8"].num_gpus == 8
    assert changes["mapping.tp: 4, pp: 2"].num_gpus == 8


def test_another_format_and_another_target() -> None:
    whats = [change.what for change in nearest_changes(SUBJECTS["13b-fp16"])]
    assert "quantize.format: fp8" in whats
    assert "target: rtx5090" in whats  # 34.4 GB, the smallest that holds 26.0 and 6.7 GB
    # fp8 does not run on SM86
    ampere = [change.what for change in nearest_changes(SUBJECTS["13b-a10"])]
    assert "quantize.format: fp8" not in ampere
    assert "quantize.format: int8_wo" in ampere


def test_weights_that_are_quantized_already_keep_their_format() -> None:
    found = nearest_changes(SUBJECTS["13b-fp16"], formats=False)
    assert found
    assert all(change.subject.format == FORMATS["fp16"] for change in found)


def test_a_shape_that_cannot_be_cut() -> None:
    """11008 channels in groups of 128 are 86 groups: not a multiple of four."""
    found = {change.what: change for change in nearest_changes(SUBJECTS["7b-tp4-uncut"])}
    padded = found["mapping.pad_ffn: true"].subject.shape
    assert padded.padded_intermediate_size == 11264
    assert "quantize.group_size: 64" in found
    assert "mapping.tp: 2, pp: 2" in found


def _plan(root: Path, shape: dict[str, Any], **sections: Any) -> Plan:
    path = root / "x.yaml"
    model = {"source": "synthetic", "shape": shape}
    path.write_text(yaml.safe_dump({"model": model, **sections}))
    workspace = Workspace(root)
    return make_plan(load_config(path), workspace.store, workspace.digests(), AMPLE)


def test_the_plan_names_the_nearest_with_their_numbers(tmp_path: Path) -> None:
    limits = {"max_seq_len": 4096, "max_input_len": 2048}
    plan = _plan(tmp_path, LLAMA_2_70B, build=limits)
    (problem,) = plan.problems
    assert "rank 0: weights and KV cache need 41.72 GB, the target has 25.77 GB" in problem.what
    assert problem.fix.startswith(
        "mapping.tp: 2 (2 GPUs, weights 18.18 GB, KV cache 2.68 GB, 2.90 GB left) or mapping.pp: 2"
    )
    assert plan.changes == plan.forecast.changes if plan.forecast else False


def test_the_plan_of_a_shape_that_cannot_be_cut_offers_changes(tmp_path: Path) -> None:
    plan = _plan(tmp_path, llama(512, 1408, 8, 8, 2, 1000), mapping={"tp": 4})
    assert plan.forecast is None
    assert any("cannot" in str(one) or "multiple" in str(one) for one in plan.problems)
    assert plan.changes
    assert all(cut_problems(change.subject) == [] for change in plan.changes)


def test_a_tight_build_is_not_refused(tmp_path: Path) -> None:
    limits = {"max_batch_size": 5, "max_seq_len": 4096, "max_input_len": 4095}
    plan = _plan(tmp_path, LLAMA_2_13B, build=limits)
    assert plan.problems == ()
    assert plan.forecast is not None
    assert plan.forecast.fullest.verdict == "tight"
    assert plan.changes[0].what.startswith("build.")
