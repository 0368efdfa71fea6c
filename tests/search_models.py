"""One-layer models for tests of the search: random weights, channels of very different sizes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import nn

LLAMA_LINEARS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)


def one_layer_model(
    architecture: str = "LlamaForCausalLM", dtype: torch.dtype = torch.float32, **fields: Any
) -> nn.Module:
    """Hidden size 256, MLP 512, one decoder layer; norms vary by an order of magnitude."""
    sizes = {
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 64,
        "max_position_embeddings": 256,
        **fields,
    }
    torch.manual_seed(0)
    model_class = getattr(transformers, architecture)
    model = model_class(model_class.config_class(**sizes)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2:
                parameter.mul_(2.0)
            elif "norm" in name and name.endswith("weight"):
                parameter.copy_(torch.exp(torch.randn_like(parameter)))
    found: nn.Module = model.to(dtype)
    return found


def batches(count: int = 4, size: int = 2, length: int = 64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 64, (size, length), generator=generator) for _ in range(count)]


def forward_loop(inputs: list[torch.Tensor]) -> Callable[[nn.Module], None]:
    def loop(model: nn.Module) -> None:
        with torch.no_grad():
            for tokens_BT in inputs:
                model(tokens_BT, use_cache=False)

    return loop


def inputs_of(
    model: nn.Module, linears: tuple[str, ...], tokens: list[torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Linear -> its input [T, K] in float64, gathered by hooks of our own."""
    rows: dict[str, list[torch.Tensor]] = {linear: [] for linear in linears}
    handles = [
        module.register_forward_pre_hook(
            lambda _module, args, linear=linear: rows[linear].append(
                args[0].reshape(-1, args[0].shape[-1]).double()
            )
        )
        for name, module in model.named_modules()
        for linear in linears
        if name.endswith(linear)
    ]
    forward_loop(tokens)(model)
    for handle in handles:
        handle.remove()
    return {linear: torch.cat(parts) for linear, parts in rows.items() if parts}


def linear_of(model: nn.Module, linear: str) -> Any:
    return next(module for name, module in model.named_modules() if name.endswith(linear))
