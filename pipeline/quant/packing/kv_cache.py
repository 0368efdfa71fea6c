"""Scales of a quantized KV cache, named as ModelOpt's exporter names them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

_LARGEST_CODE = {"fp8": 448.0, "int8": 127.0}
_STORED = {"k_bmm_quantizer": "k_proj.k_scale", "v_bmm_quantizer": "v_proj.v_scale"}
"""ModelOpt uses these names whether the attention has such linears or a fused one."""


def kv_scales(layer: nn.Module, prefix: str, kv_cache: str) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, float32 number) of one decoder layer: largest key or value over the largest code.

    ModelOpt's unified layout has them for FP8 only; INT8 follows by analogy.
    """
    if kv_cache == "fp16":
        return
    found = 0
    for name, module in layer.named_modules(prefix=prefix):
        for quantizer_name, stored in _STORED.items():
            quantizer = getattr(module, quantizer_name, None)
            if quantizer is not None and quantizer.is_enabled:
                found += 1
                yield f"{name}.{stored}", quantizer.amax.float() / _LARGEST_CODE[kv_cache]
    assert found == len(_STORED), f"{found} quantizers of keys and values in {prefix}"
