"""Layer by layer against the whole model: transformers' logits, and ModelOpt's quantize and export."""

from __future__ import annotations

import contextlib
import copy
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from pipeline.checkpoint.source import open_checkpoint
from pipeline.progress import SilentProgress
from pipeline.quant.data import TokenWindows
from pipeline.quant.layers.batches import equal_length_batches, used_tokens
from pipeline.quant.layers.frame import Frame
from pipeline.quant.layers.hidden import HiddenStates
from pipeline.quant.layers.passes import LayerPasses
from pipeline.quant.layers.skeleton import Skeleton
from pipeline.quant.preflight import QuantizeOptions
from pipeline.quant.quantizer import quantize_windows
from pipeline.quant.source import load_model
from tests.packed_layers import GROUP_SIZE, write_small
from tests.tiny_models import TINY, write_tiny

FEW = ("LlamaForCausalLM", "GPT2LMHeadModel", "MixtralForCausalLM")
"""For every run; the others are slow only because there are so many."""
NOT_PACKED_BY_MODELOPT = "FalconForCausalLM"
"""ModelOpt 0.47 quantizes its linears, and exports them as they were."""


def random_windows(vocab_size: int, seq_len: int) -> TokenWindows:
    tokens_WT = np.random.default_rng(0).integers(3, vocab_size, (5, seq_len))
    return TokenWindows(tokens_WT, 5, tokens_WT.size)


@pytest.mark.parametrize("architecture", TINY)
def test_layers_one_by_one_compute_what_the_model_does(tmp_path: Path, architecture: str) -> None:
    write_tiny(architecture, tmp_path, dtype="float32")
    skeleton = Skeleton(open_checkpoint(tmp_path), torch.float32)
    # Longer than the sliding windows and than Phi-3's original context.
    batches = equal_length_batches(random_windows(331, 40), 2)
    frame = Frame(skeleton, used_tokens(batches))
    passes = LayerPasses(frame, batches, skeleton.layers_path, ["cpu"])
    inputs, outputs = (
        HiddenStates(tmp_path / name, batches, 96, torch.float32, in_memory=False)
        for name in ("inputs", "outputs")
    )
    for hidden in (inputs, outputs):
        hidden.create()
    for index, batch in enumerate(batches):
        inputs.put(index, frame.embed(batch))
    for layer in range(skeleton.num_layers):
        passes.outputs(skeleton.mini(layer), layer, inputs, outputs)
        inputs, outputs = outputs, inputs
    head, model = Frame(skeleton, None), load_model(tmp_path, torch.float32)
    for index, batch in enumerate(batches):
        ours = head.logits(inputs.get(index), returns_tuple=passes.returns_tuple)
        with torch.no_grad():
            theirs = model(torch.from_numpy(batch.tokens_BT), use_cache=False).logits
        assert torch.equal(ours, theirs)


def quantize_with_modelopt(source: Path, architecture: str, windows: TokenWindows) -> Any:
    """ModelOpt's own preset on the same batches, nothing of ours in between."""
    import modelopt.torch.quantization as mtq
    import transformers

    attention = "eager" if architecture == "Gemma2ForCausalLM" else None
    model = getattr(transformers, architecture).from_pretrained(
        source, dtype=torch.bfloat16, attn_implementation=attention
    )
    config = copy.deepcopy(mtq.INT4_AWQ_CFG)
    for entry in config["quant_cfg"]:
        if block_sizes := (entry.get("cfg") or {}).get("block_sizes"):
            block_sizes[-1] = GROUP_SIZE
    # Its preset leaves lm_head alone, but not the head of GPT-NeoX.
    config["quant_cfg"].append({"quantizer_name": "*embed_out*", "enable": False})
    batches = [torch.from_numpy(batch.copy()) for batch in windows.batches(2)]
    with contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
        mtq.quantize(model.eval(), config, lambda whole: [whole(ids) for ids in batches])
    return model


@pytest.mark.parametrize(
    "architecture",
    [
        pytest.param(name, marks=[] if name in FEW else [pytest.mark.slow])
        for name in TINY
        if name != NOT_PACKED_BY_MODELOPT
    ],
)
def test_modelopt_s_search_gives_its_whole_model_export_bit_for_bit(
    tmp_path: Path, architecture: str
) -> None:
    """Every tensor and both configs, bfloat16, three batches of which the last is smaller."""
    from modelopt.torch.export import export_hf_checkpoint

    source = write_small(architecture, tmp_path / "source", dtype="bfloat16")
    windows = random_windows(300, 16)
    options = QuantizeOptions(
        "int4_awq", GROUP_SIZE, num_samples=5, seq_len=16, batch_size=2, search="modelopt"
    )
    out_dir, their_dir = tmp_path / "out", tmp_path / "modelopt"
    out_dir.mkdir()
    quantize_windows(open_checkpoint(source), out_dir, options, windows, SilentProgress())
    model = quantize_with_modelopt(source, architecture, windows)
    with contextlib.redirect_stdout(io.StringIO()):
        export_hf_checkpoint(model, export_dir=their_dir)
    ours = load_file(out_dir / "model.safetensors")
    theirs = load_file(their_dir / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert (ours[name].dtype, ours[name].shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(ours[name].view(torch.uint8), tensor.view(torch.uint8)), name
    for name, field in (("hf_quant_config.json", None), ("config.json", "quantization_config")):
        found, wanted = (json.loads((path / name).read_text()) for path in (out_dir, their_dir))
        assert (found[field], field) == (wanted[field], field) if field else found == wanted


def test_a_linear_that_is_kept_is_stored_as_any_linear_of_a_quantized_checkpoint(
    tmp_path: Path,
) -> None:
    """GPT-2 stores plain weights as [in, out]; ModelOpt puts linears with [out, in] in their place."""
    source = write_small("GPT2LMHeadModel", tmp_path / "source")
    options = QuantizeOptions(
        "int4_awq", GROUP_SIZE, num_samples=5, seq_len=16, batch_size=5, keep=("*.1.mlp.c_fc",)
    )
    out_dir = tmp_path / "out"
    out_dir.mkdir()
    windows = random_windows(300, 16)
    quantize_windows(open_checkpoint(source), out_dir, options, windows, SilentProgress())
    before, after = (load_file(path / "model.safetensors") for path in (source, out_dir))
    name = "transformer.h.1.mlp.c_fc.weight"
    assert torch.equal(after[name], before[name].T)
    assert after["transformer.h.0.mlp.c_fc.weight"].shape == (192 // 2, 128)
    report = json.loads((out_dir / "quant_report.json").read_text())
    assert "transformer.h.1.mlp.c_fc" not in report["linears"]


def test_experts_that_no_token_reached_are_named(tmp_path: Path) -> None:
    """Four experts, two for each of two tokens that are much alike."""
    source = write_small("MixtralForCausalLM", tmp_path / "source", dtype="float32")
    options = QuantizeOptions("int4_awq", GROUP_SIZE, num_samples=1, seq_len=2, batch_size=1)
    windows = TokenWindows(np.array([[5, 5]]), 1, 2)
    out_dir = tmp_path / "out"
    out_dir.mkdir()
    said: list[str] = []

    class Listener(SilentProgress):
        def say(self, text: str) -> None:
            said.append(text)

    quantize_windows(open_checkpoint(source), out_dir, options, windows, Listener())
    linears = json.loads((out_dir / "quant_report.json").read_text())["linears"]
    counts = {name: facts["num_tokens"] for name, facts in linears.items() if name.endswith(".w1")}
    first = {name: count for name, count in counts.items() if "layers.0." in name}
    assert sum(first.values()) == 2 * 2  # two experts for each token
    unseen = [name for name, count in counts.items() if count == 0]
    # Both tokens take the same two, for in the first layer they differ by their position only.
    assert len([name for name in unseen if "layers.0." in name]) == 2
    for name in unseen:
        assert linears[name]["note"].startswith("no calibration token reached this linear"), name
        assert any(
            text.startswith("no calibration token reached") and name in text for text in said
        )
