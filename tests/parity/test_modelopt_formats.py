"""Quantized rank files against ModelOpt's own TensorRT-LLM exporter, tensor for tensor, bit for bit.

Ours is converted from ModelOpt's unified layout, theirs written by the TensorRT-LLM exporter, both of
one quantized model. What differs, and why, is the whole of `DIFFERENT`; nothing else may. Each such
tensor of ours is compared with slices of the unified checkpoint, made by hand (tests/hand_slices.py).
What the exporter cannot do is proven in test_quantized_slices.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from pipeline.checkpoint import detect_format
from pipeline.checkpoint.convert import convert_checkpoint
from pipeline.progress import SilentProgress
from tests.hand_slices import Rank, Sizes, layer_slices, sizes_of
from tests.made_up_codes import TARGETS, Array, Tensors, expected, full_config
from tests.modelopt_exports import (
    WITHOUT_CONFIG,
    Exports,
    export_both,
    export_trtllm,
    export_unified,
    load,
    quantize,
)

NUM_LAYERS = 4  # two on each of two stages
MAPPINGS = [(1, 1), (2, 1), (4, 1), (2, 2)]
LLAMA_LIKE = (
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "GemmaForCausalLM",
    "Gemma2ForCausalLM",
)
FUSED = ("Phi3ForCausalLM", "GPT2LMHeadModel", "FalconForCausalLM")
QUICK = {
    ("LlamaForCausalLM", "int4_awq"),
    ("LlamaForCausalLM", "w4a8_awq"),
    ("LlamaForCausalLM", "fp8"),
    ("LlamaForCausalLM", "int8_sq"),
    ("MixtralForCausalLM", "int4_awq"),
    ("MixtralForCausalLM", "fp8"),
    ("Gemma2ForCausalLM", "int4_awq"),
    ("GPT2LMHeadModel", "int4_awq"),
}
# Of Mixtral ModelOpt 0.47 exports neither w4a8_awq (unified layout: "Changing shape when setting amax is
# not allowed.") nor int8_sq (TensorRT-LLM: sizes that do not fit).
PAIRS = [
    *((name, fmt) for name in (*LLAMA_LIKE, *FUSED) for fmt in ("int4_awq", "w4a8_awq", "fp8")),
    *((name, "int8_sq") for name in (*LLAMA_LIKE, *FUSED)),
    ("MixtralForCausalLM", "int4_awq"),
    ("MixtralForCausalLM", "fp8"),
]
CASES = [
    pytest.param(*pair, tp, pp, marks=() if pair in QUICK else pytest.mark.slow)
    for pair in PAIRS
    for tp, pp in MAPPINGS
]
# Exporting Phi-3 swaps gate and up in the model itself; it has nothing that exporting would join.
APART = ("Phi3ForCausalLM",)

# For tp > 1 the exporter cuts these fused rows as if they were one matrix, so that rank 0 gets nothing
# of the second part.
CUT_WRONGLY = {"Phi3ForCausalLM": "mlp.fc"}

_JOINED = {f"mlp.{linear}.{name}" for linear in ("fc", "gate") for name in TARGETS.values()}
_FOLDED = {"attention.qkv.prequant_scaling_factor", "input_layernorm.weight"}
_CODES = {f"{linear}.weight" for linear in ("attention.qkv", "attention.dense", "mlp.proj")}


def _different(architecture: str, fmt: str, tp: int) -> set[str]:
    """Tensors of a layer that may differ.

    awq: the unified layout folds the scale of q, k and v into the norm before them, and gives gate and
    up one scale, folded too. Experts keep theirs; their w1 and w3 share the scales of their codes there.
    fp8: codes that one of the two rounds twice; the unified layout has its own scales for gate and up.
    """
    if fmt == "fp8":
        return {*_CODES, "mlp.fc.weight", "mlp.gate.weight"}
    if tp > 1 and architecture in CUT_WRONGLY:
        rows = ("weight", "weights_scaling_factor")
        return {f"{CUT_WRONGLY[architecture]}.{name}" for name in rows}
    if "awq" not in fmt or architecture in FUSED:
        return set()
    if architecture == "MixtralForCausalLM":
        return {*_FOLDED, "mlp.fc.weight", "mlp.fc.weights_scaling_factor"}
    norm = "pre_feedforward" if architecture == "Gemma2ForCausalLM" else "post"
    return _FOLDED | _JOINED | {f"{norm}_layernorm.weight"}


Exported = Callable[[str, str], Exports]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """The exports of one model, made once."""

    @cache
    def make(architecture: str, fmt: str) -> Exports:
        directory = tmp_path_factory.mktemp(f"{architecture}-{fmt}")
        sizes: dict[str, Any] = {"num_hidden_layers": NUM_LAYERS}
        if fmt == "int8_sq":  # the exporter cannot repeat heads with scales of channels
            own = "num_kv_heads" if architecture == "FalconForCausalLM" else "num_key_value_heads"
            sizes[own] = 4
        if architecture not in APART:
            return export_both(directory, architecture, fmt, MAPPINGS, **sizes)
        unified = export_unified(directory, architecture, fmt, **sizes)
        trtllm = {}
        for tp, pp in MAPPINGS:
            model = quantize(load(unified.plain), fmt)
            trtllm[tp, pp] = export_trtllm(model, architecture, directory / f"{tp}-{pp}", tp, pp)
        return Exports(unified.plain, unified.unified, trtllm)

    return make


def _read(path: Path) -> dict[str, Array]:
    """Float8 as ml_dtypes has it; numpy alone has none."""
    import torch
    from safetensors.torch import load_file

    def array(x: Any) -> Array:
        if x.dtype == torch.float8_e4m3fn:
            values: Array = x.view(torch.uint8).numpy().view(ml_dtypes.float8_e4m3fn)
            return values
        plain: Array = x.numpy()
        return plain

    return {name: array(x) for name, x in load_file(path).items()}


def _convert(source: Path, out_dir: Path, tp: int, pp: int) -> list[dict[str, Array]]:
    out_dir.mkdir()
    convert_checkpoint(source, out_dir, tp=tp, pp=pp, progress=SilentProgress())
    return _ranks(out_dir, tp * pp)


def _ranks(directory: Path, world_size: int) -> list[dict[str, Array]]:
    return [_read(directory / f"rank{rank}.safetensors") for rank in range(world_size)]


def _stored(directory: Path, sizes: Sizes, architecture: str) -> tuple[dict[str, Tensors], Tensors]:
    """Linears of the layers by name and suffix, and everything else, of a unified checkpoint."""
    tensors = _read(directory / "model.safetensors")
    linears: dict[str, Tensors] = {}
    for layer in range(NUM_LAYERS):
        for stack in layer_slices(architecture, sizes, layer, Rank(1, 0)).values():
            for part in (part for joined in stack for part in joined):
                linears[part.name] = {
                    suffix: tensors.pop(f"{part.name}.{suffix}")
                    for suffix in TARGETS
                    if f"{part.name}.{suffix}" in tensors
                }
    return linears, tensors


def _same(a: Array, b: Array) -> bool:
    return (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())


@pytest.mark.covers("ModelOpt")
@pytest.mark.parametrize(("architecture", "fmt", "tp", "pp"), CASES)
def test_rank_files(
    tmp_path: Path, exported: Exported, architecture: str, fmt: str, tp: int, pp: int
) -> None:
    exports = exported(architecture, fmt)
    assert detect_format(exports.unified) == fmt
    ours = _convert(exports.unified, tmp_path / "ours", tp, pp)
    theirs = _ranks(exports.trtllm[tp, pp], tp * pp)
    sizes = sizes_of(full_config(exports.plain))
    linears, _ = _stored(exports.unified, sizes, architecture)
    allowed, found = _different(architecture, fmt, tp), set()
    for rank, (mine, modelopts) in enumerate(zip(ours, theirs, strict=True)):
        # A shared head needs its embedding on its stage; ModelOpt leaves the last stage without either.
        extra = {"lm_head.weight"} if architecture.startswith("Gemma") and rank >= tp else set()
        assert mine.keys() - modelopts.keys() == extra
        assert modelopts.keys() <= mine.keys()
        for name in modelopts:
            within = _within(name)
            assert mine[name].dtype == modelopts[name].dtype, name
            assert mine[name].shape == modelopts[name].shape, name
            if not _same(mine[name], modelopts[name]):
                assert within in allowed, f"rank {rank} {name}"
                found.add(within)
        for local in range(NUM_LAYERS // pp):
            layer = local + rank // tp * (NUM_LAYERS // pp)
            for target, stack in layer_slices(
                architecture, sizes, layer, Rank(tp, rank % tp)
            ).items():
                module = f"transformer.layers.{local}.{target}"
                if fmt == "fp8" and target == "attention.qkv":
                    continue  # test_fp8_codes
                wanted = expected(linears, stack, fmt)
                folded = mine.get(f"{module}.{TARGETS['pre_quant_scale']}")
                if folded is not None and TARGETS["pre_quant_scale"] not in wanted:
                    assert (folded == 1).all(), module
                for suffix, values in wanted.items():
                    assert _bytes(mine[f"{module}.{suffix}"]) == _bytes(values), module
    assert found == allowed & {_within(name) for name in theirs[0]}, "a difference is gone"
    if architecture not in WITHOUT_CONFIG:
        _compare_quantization(tmp_path / "ours", exports.trtllm[tp, pp], extra)


def _bytes(values: Array) -> tuple[tuple[int, ...], bytes]:
    return values.shape, values.tobytes()


def _within(name: str) -> str:
    return name.split(".", 3)[-1] if ".layers." in name else name


def _compare_quantization(ours_dir: Path, theirs_dir: Path, extra: set[str]) -> None:
    """`extra`: tensors of the last stage that ModelOpt leaves out, and so does not exclude."""
    ours, theirs = (
        json.loads((directory / "config.json").read_text())["quantization"]
        for directory in (ours_dir, theirs_dir)
    )
    excluded = [set(fields.pop("exclude_modules")) for fields in (ours, theirs)]
    assert ours == theirs
    assert excluded[0] - excluded[1] == {name.removesuffix(".weight") for name in extra}
    assert excluded[1] <= excluded[0]


def _slow_unless_quick(names: tuple[str, ...], fmt: str) -> list[Any]:
    return [
        pytest.param(name, marks=() if (name, fmt) in QUICK else pytest.mark.slow) for name in names
    ]


@pytest.mark.parametrize(
    "architecture", _slow_unless_quick((*LLAMA_LIKE, "MixtralForCausalLM"), "int4_awq")
)
def test_folded_scales(tmp_path: Path, exported: Exported, architecture: str) -> None:
    """Our norm is theirs times their scale of q, k and v, in the float16 steps that ModelOpt takes.

    Gemma stores w of a norm that multiplies by 1 + w. ModelOpt computes (w + 1) * scale - 1 in float16,
    and rank files hold 1 + w, of which theirs has not been rounded since.
    """
    exports = exported(architecture, "int4_awq")
    ours = _convert(exports.unified, tmp_path / "ours", 2, 2)
    theirs = _ranks(exports.trtllm[2, 2], 4)
    plain = _read(exports.plain / "model.safetensors")
    one = np.float16(1)
    for rank, (mine, modelopts) in enumerate(zip(ours, theirs, strict=True)):
        for local in range(2):
            prefix = f"transformer.layers.{local}."
            scale = modelopts[f"{prefix}attention.qkv.prequant_scaling_factor"]
            assert not np.array_equal(scale, np.ones_like(scale)), "nothing was folded"
            stored = plain[f"model.layers.{local + 2 * (rank // 2)}.input_layernorm.weight"]
            if architecture.startswith("Gemma"):
                folded = (stored + one) * scale - one
                wanted = (folded.astype(np.float32) + 1).astype(np.float16)
            else:
                wanted = stored * scale
            assert _same(mine[f"{prefix}input_layernorm.weight"], wanted)


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 2)])
def test_experts_share_the_scales_of_their_codes(
    tmp_path: Path, exported: Exported, tp: int, pp: int
) -> None:
    """The unified layout gives w1 and w3 of an expert the larger of their group scales, for runtimes
    that join the two; the TensorRT-LLM exporter does not, and its codes are 8 % nearer to the weights.
    Ours are those of the source."""
    exports = exported("MixtralForCausalLM", "int4_awq")
    ours = _convert(exports.unified, tmp_path / "ours", tp, pp)
    theirs = _ranks(exports.trtllm[tp, pp], tp * pp)
    for mine, modelopts in zip(ours, theirs, strict=True):
        for layer in range(NUM_LAYERS // pp):
            name = f"transformer.layers.{layer}.mlp.fc.weights_scaling_factor"
            up, gate = np.split(modelopts[name], 2, axis=1)
            larger = np.maximum(up, gate)
            assert _same(mine[name], np.concatenate([larger, larger], axis=1))


FP8 = [name for name, fmt in PAIRS if fmt == "fp8"]


@pytest.mark.parametrize("architecture", _slow_unless_quick(tuple(FP8), "fp8"))
@pytest.mark.parametrize(("tp", "pp"), MAPPINGS)
def test_fp8_codes(tmp_path: Path, exported: Exported, architecture: str, tp: int, pp: int) -> None:
    """Why fewer than 1 % of FP8 codes differ by one step: one exporter rounds twice.

    Both divide the float16 weight by the float32 scale. The unified layout's scale has no dimension, so
    torch keeps the quotient in float16 before it is rounded to fp8; the other's has one, and the
    quotient stays float32. Ours are those of the source, and both follow from the weights to the bit.
    """
    exports = exported(architecture, "fp8")
    ours = _convert(exports.unified, tmp_path / "ours", tp, pp)
    theirs = _ranks(exports.trtllm[tp, pp], tp * pp)
    sizes, config = sizes_of(full_config(exports.plain)), full_config(exports.plain)
    plain = _read(exports.plain / "model.safetensors")
    num_codes = num_different = 0
    for rank, (mine, modelopts) in enumerate(zip(ours, theirs, strict=True)):
        for local in range(NUM_LAYERS // pp):
            layer = local + rank // tp * (NUM_LAYERS // pp)
            targets = layer_slices(architecture, sizes, layer, Rank(tp, rank % tp))
            for target, stack in targets.items():
                module = f"transformer.layers.{local}.{target}"
                weight = _weights(plain, stack, transposed=config["model_type"] == "gpt2")
                once, twice = (
                    _quotient(weight, rank_tensors[f"{module}.weights_scaling_factor"])
                    for rank_tensors in (modelopts, mine)
                )
                a, b = mine[f"{module}.weight"], modelopts[f"{module}.weight"]
                if tp == 1 or CUT_WRONGLY.get(architecture) != target:
                    assert b.tobytes() == once.astype(ml_dtypes.float8_e4m3fn).tobytes(), module
                else:
                    b = once.astype(ml_dtypes.float8_e4m3fn)
                rounded = twice.astype(np.float16).astype(ml_dtypes.float8_e4m3fn)
                assert a.tobytes() == rounded.tobytes(), module
                num_codes += a.size
                num_different += int(np.count_nonzero(a.view(np.uint8) != b.view(np.uint8)))
    assert 0 < num_different / num_codes < 0.01  # seen: 0.3 to 0.5 %


def _weights(plain: dict[str, Array], stack: Any, *, transposed: bool) -> Array:
    """Float32, [experts,] out, in."""
    parts = []
    for joined in stack:
        rows = []
        for part in joined:
            weight = plain[f"{part.name}.weight"].astype(np.float32)
            rows.append((weight.T if transposed else weight)[part.rows][:, part.columns])
        parts.append(np.concatenate(rows))
    return np.stack(parts) if ".experts." in stack[0][0].name else parts[0]


def _quotient(weight: Array, scale: Array) -> Array:
    quotient: Array = weight / (scale[:, :, None] if weight.ndim == 3 else scale)
    return quotient


@pytest.mark.parametrize(
    "architecture", _slow_unless_quick(("LlamaForCausalLM", "GemmaForCausalLM"), "fp8")
)
def test_fp8_of_the_unified_layout_alone(tmp_path: Path, architecture: str) -> None:
    """Without another export before it, q, k and v have scales of their own. Ours have the largest, and
    codes that are the source's, rounded to it: one rounding more than ModelOpt's own."""
    exports = export_unified(tmp_path, architecture, "fp8", num_hidden_layers=1)
    unified = _read(exports.unified / "model.safetensors")
    prefix = "model.layers.0.self_attn."
    scales = [unified[f"{prefix}{part}_proj.weight_scale"] for part in "qkv"]
    assert len({float(scale) for scale in scales}) == 3
    (ours,) = _convert(exports.unified, tmp_path / "ours", 1, 1)
    largest = max(scales)
    assert ours["transformer.layers.0.attention.qkv.weights_scaling_factor"] == largest
    wanted = [
        (unified[f"{prefix}{part}_proj.weight"].astype(np.float32) * (scale / largest)).astype(
            ml_dtypes.float8_e4m3fn
        )
        for part, scale in zip("qkv", scales, strict=True)
    ]
    found = ours["transformer.layers.0.attention.qkv.weight"]
    assert found.tobytes() == np.concatenate(wanted).tobytes()
    plain = _read(exports.plain / "model.safetensors")
    weight = np.concatenate([plain[f"{prefix}{part}_proj.weight"] for part in "qkv"])
    error = np.linalg.norm(found.astype(np.float32) * largest - weight.astype(np.float32))
    best = (weight.astype(np.float32) / largest).astype(ml_dtypes.float8_e4m3fn)
    least = np.linalg.norm(best.astype(np.float32) * largest - weight.astype(np.float32))
    assert least < error < 1.5 * least  # seen: 1.2
