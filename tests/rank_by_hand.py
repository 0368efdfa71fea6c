"""What a quantized rank file means, by hand: weights dequantized with numpy, inputs rounded by ModelOpt.

Shares no code with the network: files are read by the safetensors library. `write_random` makes rank
files of random codes in any format.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from pipeline.checkpoint.writer import SafetensorsWriter, TensorSpec

Floats = npt.NDArray[np.float32]
LINEARS = {
    "attention.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attention.dense": ("self_attn.o_proj",),
    "mlp.fc": ("mlp.gate_proj",),
    "mlp.gate": ("mlp.up_proj",),
    "mlp.proj": ("mlp.down_proj",),
}


def put_rank(model: Any, checkpoint_dir: Path) -> None:
    """Give a transformers Llama (float32) the weights, norms and roundings of a rank file."""
    import torch
    from safetensors.torch import load_file

    tensors = load_file(checkpoint_dir / "rank0.safetensors")
    algorithms = _algorithms(checkpoint_dir)
    with torch.no_grad():
        for index, layer in enumerate(model.model.layers):
            prefix = f"transformer.layers.{index}"
            layer.input_layernorm.weight.copy_(tensors[f"{prefix}.input_layernorm.weight"])
            layer.post_attention_layernorm.weight.copy_(tensors[f"{prefix}.post_layernorm.weight"])
            for target, names in LINEARS.items():
                module = f"{prefix}.{target}"
                algorithm = algorithms.get(module, algorithms.get("*"))
                found = {
                    name.removeprefix(f"{module}."): x
                    for name, x in tensors.items()
                    if name.startswith(f"{module}.")
                }
                weight_NK = torch.from_numpy(_weight(found, algorithm))
                start = 0
                for name in names:
                    linear = layer.get_submodule(name)
                    rows = linear.out_features
                    linear.weight.copy_(weight_NK[start : start + rows])
                    start += rows
                    _round_inputs(linear, found, algorithm)


def write_random(out_dir: Path, algorithms: dict[str, str]) -> Path:
    """A Llama rank of random codes: hidden and FFN 256, 8 heads, 4 KV heads of 32, vocabulary 320.

    Args:
        algorithms: quant_algo of each linear, such as {"0.mlp.fc": "FP8"}; others are float16. The
            number of layers is that of the first parts.
    """
    num_layers = 1 + max(int(name.partition(".")[0]) for name in algorithms)
    rng = np.random.default_rng(0)
    tensors: dict[str, npt.NDArray[Any]] = {}
    for name in ("transformer.vocab_embedding", "lm_head"):
        tensors[f"{name}.weight"] = rng.standard_normal((320, 256)).astype(np.float16)
    tensors["transformer.ln_f.weight"] = rng.uniform(0.5, 1.5, 256).astype(np.float16)
    for layer in range(num_layers):
        prefix = f"transformer.layers.{layer}"
        for norm in ("input_layernorm", "post_layernorm"):
            tensors[f"{prefix}.{norm}.weight"] = rng.uniform(0.5, 1.5, 256).astype(np.float16)
        for module in LINEARS:
            rows = 512 if module == "attention.qkv" else 256
            algorithm = algorithms.get(f"{layer}.{module}")
            for suffix, values in _random_linear(rng, rows, 256, algorithm).items():
                tensors[f"{prefix}.{module}.{suffix}"] = values
    out_dir.mkdir(parents=True)
    dtypes = {"float16": "F16", "float32": "F32", "int8": "I8", "float8_e4m3fn": "F8_E4M3"}
    specs = [TensorSpec(name, dtypes[str(x.dtype)], x.shape) for name, x in tensors.items()]
    with SafetensorsWriter(out_dir / "rank0.safetensors", specs) as writer:
        for name, values in tensors.items():
            writer.write(name, values)
    groups = {"group_size": 128, "has_zero_point": False, "pre_quant_scale": True}
    layers = {
        f"transformer.layers.{name}": {"quant_algo": algorithm}
        | (groups if algorithm.startswith("W4") else {})
        for name, algorithm in algorithms.items()
    }
    config = {
        "architecture": "LlamaForCausalLM",
        "dtype": "float16",
        "vocab_size": 320,
        "hidden_size": 256,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_size": 32,
        "intermediate_size": 256,
        "hidden_act": "silu",
        "norm_epsilon": 1e-5,
        "max_position_embeddings": 256,
        "position_embedding_type": "rope_gpt_neox",
        "rotary_base": 10000.0,
        "mapping": {"world_size": 1, "tp_size": 1, "pp_size": 1},
        "quantization": {"quant_algo": "MIXED_PRECISION", "kv_cache_quant_algo": None},
    }
    (out_dir / "config.json").write_text(json.dumps(config))
    (out_dir / "quant_cfg.json").write_text(json.dumps({"quantized_layers": layers}))
    return out_dir


def _random_linear(
    rng: np.random.Generator, rows: int, columns: int, algorithm: str | None
) -> dict[str, npt.NDArray[Any]]:
    weights = rng.standard_normal((rows, columns)) * columns**-0.5
    if algorithm is None:
        return {"weight": weights.astype(np.float16)}
    found: dict[str, npt.NDArray[Any]] = {}
    if algorithm == "FP8":
        found["weight"] = (weights * 2**10).astype(ml_dtypes.float8_e4m3fn)
        found["weights_scaling_factor"] = np.array([2**-10 * 1.1], np.float32)
    elif algorithm.startswith("W8"):
        found["weight"] = rng.integers(-127, 128, (rows, columns), dtype=np.int8)
        found["weights_scaling_factor"] = rng.uniform(5e-4, 1e-3, rows).astype(np.float32)
    else:
        found["weight"] = rng.integers(-128, 128, (rows // 2, columns), dtype=np.int8)
        scale = rng.uniform(5e-3, 1e-2, (rows, columns // 128))
        found["weights_scaling_factor"] = scale.astype(np.float32)
    if algorithm == "W4A8_AWQ":
        found["weights_scaling_factor_2"] = np.array([1e-3], np.float32)
    if algorithm in ("FP8", "W4A8_AWQ", "W8A8_SQ_PER_CHANNEL"):
        found["activation_scaling_factor"] = np.array([rng.uniform(0.02, 0.04)], np.float32)
    if algorithm in ("W4A16_AWQ", "W4A8_AWQ", "W8A8_SQ_PER_CHANNEL"):
        scale = rng.uniform(0.5, 1.5, columns)
        found["prequant_scaling_factor"] = scale.astype(np.float16)
    return found


def _algorithms(checkpoint_dir: Path) -> dict[str, Any]:
    algorithm = json.loads((checkpoint_dir / "config.json").read_text())["quantization"][
        "quant_algo"
    ]
    if algorithm != "MIXED_PRECISION":
        return {"*": algorithm}
    layers = json.loads((checkpoint_dir / "quant_cfg.json").read_text())["quantized_layers"]
    return {name: entry["quant_algo"] for name, entry in layers.items()}


def _weight(found: dict[str, Any], algorithm: str | None) -> Floats:
    """What multiplies the rounded input, [out, in]."""
    if algorithm is None:
        return np.asarray(found["weight"].float().numpy())
    scale = found["weights_scaling_factor"].numpy()
    if algorithm == "FP8":
        return np.asarray(found["weight"].float().numpy() * scale)
    codes = found["weight"].numpy()
    if algorithm.startswith("W8"):
        return codes.astype(np.float32) * scale[:, None]
    nibbles = codes.view(np.uint8).astype(np.int64)
    rows = np.stack([nibbles % 16, nibbles // 16], axis=1).reshape(-1, codes.shape[1])
    values = np.where(rows > 7, rows - 16, rows).astype(np.float32)
    # An engine holds the scales of int4 as float16.
    scale = scale.astype(np.float16).astype(np.float32)
    return values * np.repeat(scale, codes.shape[1] // scale.shape[1], axis=1)


def _round_inputs(linear: Any, found: dict[str, Any], algorithm: str | None) -> None:
    """Pre-quant scale and rounding of the input, the latter as ModelOpt's quantizers do it."""
    import torch
    from modelopt.torch.quantization.tensor_quant import fake_tensor_quant, scaled_e4m3

    before = found.get("prequant_scaling_factor", torch.ones(linear.in_features)).float()
    scale = found.get("activation_scaling_factor")

    def rounded(_: Any, inputs: tuple[Any, ...]) -> Any:
        x = inputs[0] * before.to(inputs[0].dtype)
        if scale is None:
            return (x,)
        if algorithm == "W8A8_SQ_PER_CHANNEL":
            return (fake_tensor_quant(x, scale * 127, None, 8, False, False),)
        return (scaled_e4m3(x, scale * 448, None, 4, 3),)

    linear.register_forward_pre_hook(rounded)
