"""Rank files of every architecture that ModelOpt's TensorRT-LLM exporter takes, against that exporter.

Llama, with all its formats, is in test_modelopt_export.py. What the exporter cannot do at all is in
test_architectures.py, proven by an independent path.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from pipeline.checkpoint.convert import convert_checkpoint
from pipeline.models import ARCHITECTURES
from pipeline.progress import SilentProgress
from tests.tiny_models import ALWAYS_TIED, write_tiny

# Architecture -> ModelOpt's decoder type, and config fields that both write with different values, as
# (ModelOpt's, ours).
EXPORTED: dict[str, tuple[str, dict[str, tuple[Any, Any]]]] = {
    "LlamaForCausalLM": ("llama", {}),
    "MistralForCausalLM": ("llama", {}),
    "Qwen2ForCausalLM": ("qwen", {}),
    "Qwen3ForCausalLM": ("qwen", {}),
    "GemmaForCausalLM": ("gemma", {}),
    "Gemma2ForCausalLM": ("gemma2", {}),
    "Phi3ForCausalLM": ("phi3", {}),
    "MixtralForCausalLM": ("llama", {}),
    "FalconForCausalLM": ("falcon", {}),
    "GPT2LMHeadModel": (
        "gpt",
        {
            # The exporter cuts the name at the first underscore; "gelu" alone is another function.
            "hidden_act": ("gelu", "gelu_new"),
            # The exporter's default, though it writes the table of learned positions.
            "position_embedding_type": ("rope_gpt_neox", "learned_absolute"),
        },
    ),
}
# The exporter makes the rank tensors of these, but then refuses to write config.json.
WITHOUT_CONFIG = {"Gemma2ForCausalLM", "Phi3ForCausalLM", "FalconForCausalLM"}
# These it refuses from the start.
REFUSED = {"GPTNeoXForCausalLM": "The model is not supported"}
# For tp > 1 the exporter cuts these fused rows as if they were one matrix, so that rank 0 gets nothing
# of the second part. Ours are proven in test_architectures.py.
CUT_WRONGLY = {"Phi3ForCausalLM": "mlp.fc.weight"}
MAPPINGS = [(1, 1), (2, 1), (4, 1), (2, 2)]


def _export(model: Any, decoder_type: str, directory: Path, tp: int, pp: int) -> Path:
    import torch
    from modelopt.torch.export import export_tensorrt_llm_checkpoint

    with torch.inference_mode():
        export_tensorrt_llm_checkpoint(
            model,
            decoder_type,
            torch.float16,
            directory,
            inference_tensor_parallel=tp,
            inference_pipeline_parallel=pp,
        )
    return directory


def _load(directory: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float16).eval()


def _ranks(directory: Path, world_size: int) -> list[dict[str, np.ndarray]]:
    return [load_file(directory / f"rank{rank}.safetensors") for rank in range(world_size)]


@pytest.mark.covers("ModelOpt", fmt="fp16", mappings=MAPPINGS)
@pytest.mark.parametrize(
    ("architecture", "tied"),
    [
        (architecture, tied)
        for architecture in EXPORTED
        for tied in ((True,) if architecture in ALWAYS_TIED else (False, True))
    ],
)
def test_bit_identical(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, architecture: str, tied: bool
) -> None:
    if architecture in WITHOUT_CONFIG:
        monkeypatch.setattr(
            "modelopt.torch.export.model_config_export.convert_to_tensorrt_llm_config",
            lambda model_config, *_, **__: {
                "rank": model_config.rank,
                "mapping": {
                    "world_size": model_config.tensor_parallel * model_config.pipeline_parallel
                },
                "quantization": {},
                "architecture": architecture,
                "decoder": decoder_type,
            },
        )
    decoder_type, config_differences = EXPORTED[architecture]
    source = write_tiny(
        architecture,
        tmp_path / "source",
        num_hidden_layers=2,
        num_attention_heads=8,  # tp 4 repeats the two KV heads
        hidden_size=128,
        tie_word_embeddings=tied,
    )
    for tp, pp in MAPPINGS:
        model = _load(source)  # anew: exporting Phi-3 swaps gate and up in the model itself
        theirs_dir = _export(model, decoder_type, tmp_path / f"theirs-{tp}-{pp}", tp, pp)
        ours_dir = tmp_path / f"ours-{tp}-{pp}"
        ours_dir.mkdir()
        convert_checkpoint(source, ours_dir, tp=tp, pp=pp, progress=SilentProgress())
        for rank, (ours, theirs) in enumerate(
            zip(_ranks(ours_dir, tp * pp), _ranks(theirs_dir, tp * pp), strict=True)
        ):
            assert ours.keys() - theirs.keys() == _only_ours(architecture, rank, tp, pp)
            for name in theirs:
                where = f"rank {rank} {name}"
                if tp > 1 and name.endswith(CUT_WRONGLY.get(architecture, "nothing")):
                    assert ours[name].tobytes() != theirs[name].tobytes(), where
                    continue
                assert ours[name].dtype == theirs[name].dtype, where
                assert ours[name].shape == theirs[name].shape, where
                assert ours[name].tobytes() == theirs[name].tobytes(), where
        if architecture not in WITHOUT_CONFIG:
            _compare_configs(ours_dir, theirs_dir, config_differences)


def _only_ours(architecture: str, rank: int, tp: int, pp: int) -> set[str]:
    """A shared head needs the embedding on its stage; ModelOpt leaves the last stage without either."""
    last_of_several = pp > 1 and rank >= tp * (pp - 1)
    return {"lm_head.weight"} if architecture in ALWAYS_TIED and last_of_several else set()


def _compare_configs(
    ours_dir: Path, theirs_dir: Path, differences: dict[str, tuple[Any, Any]]
) -> None:
    ours = json.loads((ours_dir / "config.json").read_text())
    theirs = json.loads((theirs_dir / "config.json").read_text())
    for key in sorted(ours.keys() & theirs.keys() - {"rotary_scaling", "logits_dtype"}):
        expected = differences.get(key, (theirs[key], theirs[key]))
        assert (theirs[key], ours[key]) == expected, key


def test_every_architecture_is_exported_or_refused() -> None:
    assert EXPORTED.keys() | REFUSED.keys() == ARCHITECTURES.keys()


@pytest.mark.parametrize("architecture", REFUSED)
def test_refused_by_modelopt(tmp_path: Path, architecture: str) -> None:
    source = write_tiny(architecture, tmp_path / "source", num_hidden_layers=1)
    with pytest.raises(AssertionError, match=REFUSED[architecture]):
        _export(_load(source), "gptnext", tmp_path / "out", 1, 1)
