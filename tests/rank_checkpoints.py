"""TensorRT-LLM rank checkpoints for tests: ModelOpt's own exporter, or random ones made with numpy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np


def export_with_modelopt(source_dir: Path, out_dir: Path, group_size: int | None) -> Path:
    """ModelOpt's exporter of TensorRT-LLM checkpoints; `group_size` None: fp16, else INT4 AWQ."""
    import torch
    from modelopt.torch.export import export_tensorrt_llm_checkpoint
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source_dir, dtype=torch.float32).eval()
    model.config.architectures = ["LlamaForCausalLM"]
    if group_size is not None:
        _quantize(model, group_size)
    export_tensorrt_llm_checkpoint(
        model,
        "llama",
        torch.float16,
        out_dir,
        inference_tensor_parallel=1,
        inference_pipeline_parallel=1,
    )
    return out_dir


def _quantize(model: Any, group_size: int) -> None:
    import copy

    import modelopt.torch.quantization as mtq
    import torch

    config = copy.deepcopy(mtq.INT4_AWQ_CFG)
    for entry in config["quant_cfg"]:
        if "weight_quantizer" in entry["quantizer_name"] and "cfg" in entry:
            entry["cfg"]["block_sizes"][-1] = group_size
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.config.vocab_size, (4, 64), generator=generator)
    mtq.quantize(model, config, lambda quantized: quantized(ids))


def write_random_rank(
    out_dir: Path, *, quantized: bool, seed: int = 0, config: dict[str, Any] | None = None
) -> Path:
    """A Llama rank checkpoint of random values, independent of our converter and of ModelOpt.

    hidden 256, 2 layers, 4 heads, 2 KV heads of 64, FFN 512, vocabulary 300, groups of 128. With
    `quantized`, gate has a pre-quant scale of ones. `config` replaces fields of config.json.
    """
    rng = np.random.default_rng(seed)
    hidden, ffn, heads, kv_heads, head_size, vocab, group = 256, 512, 4, 2, 64, 300, 128
    tensors: dict[str, np.ndarray[Any, Any]] = {}

    def vector(name: str) -> None:
        tensors[name] = rng.uniform(0.5, 1.5, hidden).astype(np.float16)

    def table(name: str) -> None:
        tensors[name] = rng.standard_normal((vocab, hidden)).astype(np.float16)

    def linear(module: str, rows: int, columns: int) -> None:
        if not quantized:
            values = rng.standard_normal((rows, columns)) * columns**-0.5
            tensors[f"{module}.weight"] = values.astype(np.float16)
            return
        packed = rng.integers(-128, 128, (rows // 2, columns), dtype=np.int8)
        scale = rng.uniform(0.2, 0.4, (rows, columns // group)) * columns**-0.5
        is_gate = module.endswith("gate")
        pre = np.ones(columns) if is_gate else rng.uniform(0.5, 1.5, columns)
        tensors[f"{module}.weight"] = packed
        tensors[f"{module}.weights_scaling_factor"] = scale.astype(np.float32)
        tensors[f"{module}.prequant_scaling_factor"] = pre.astype(np.float16)

    table("transformer.vocab_embedding.weight")
    for layer in range(2):
        prefix = f"transformer.layers.{layer}"
        vector(f"{prefix}.input_layernorm.weight")
        linear(f"{prefix}.attention.qkv", (heads + 2 * kv_heads) * head_size, hidden)
        linear(f"{prefix}.attention.dense", hidden, heads * head_size)
        vector(f"{prefix}.post_layernorm.weight")
        linear(f"{prefix}.mlp.fc", ffn, hidden)
        linear(f"{prefix}.mlp.gate", ffn, hidden)
        linear(f"{prefix}.mlp.proj", hidden, ffn)
    vector("transformer.ln_f.weight")
    table("lm_head.weight")

    fields: dict[str, Any] = {
        "architecture": "LlamaForCausalLM",
        "dtype": "float16",
        "logits_dtype": "float32",
        "vocab_size": vocab,
        "hidden_size": hidden,
        "num_hidden_layers": 2,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_size": head_size,
        "intermediate_size": ffn,
        "hidden_act": "silu",
        "norm_epsilon": 1e-5,
        "max_position_embeddings": 256,
        "position_embedding_type": "rope_gpt_neox",
        "rotary_base": 10000.0,
        "mapping": {"world_size": 1, "tp_size": 1, "pp_size": 1},
        "quantization": {"quant_algo": None, "kv_cache_quant_algo": None},
    }
    if quantized:
        fields["quantization"] = {
            "quant_algo": "W4A16_AWQ",
            "kv_cache_quant_algo": None,
            "group_size": group,
            "has_zero_point": False,
            "pre_quant_scale": True,
            "exclude_modules": ["lm_head"],
        }
    fields.update(config or {})
    write_rank(out_dir, tensors, fields)
    return out_dir


def write_rank(
    out_dir: Path, tensors: dict[str, np.ndarray[Any, Any]], config: dict[str, Any]
) -> None:
    """config.json and rank0.safetensors, through the safetensors library itself."""
    from safetensors.numpy import save_file

    out_dir.mkdir(parents=True, exist_ok=True)
    save_file(tensors, out_dir / "rank0.safetensors")
    (out_dir / "config.json").write_text(json.dumps(config))


def read_rank(checkpoint_dir: Path) -> dict[str, np.ndarray[Any, Any]]:
    """Every tensor of rank 0, through the safetensors library itself."""
    from safetensors.numpy import load_file

    return dict(load_file(checkpoint_dir / "rank0.safetensors"))
