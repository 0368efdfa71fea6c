"""What ModelOpt's exporter does to a quantized model before it packs, on a model of one layer.

Linears that share an input get the mean of their scales and are quantized again; a norm takes the mean.
For `search: modelopt`, whose result must be what `export_hf_checkpoint` writes.
"""

from __future__ import annotations

from collections.abc import Collection

from torch import nn


def average_like_modelopt(mini: nn.Module, formats: Collection[str]) -> None:
    """Average, quantize again and fold, in place, by ModelOpt's own functions.

    Args:
        formats: that the layer has. With w4a8_awq the exporter of ModelOpt 0.47 dies on experts, in
            its last step, for which there is nothing to do then: the linears of an expert share their
            range already.
    """
    from modelopt.torch.export.layer_utils import (
        get_expert_linear_names,
        is_moe,
        set_expert_quantizer_amax,
        sync_moe_gate_up_amax,
    )
    from modelopt.torch.export.unified_export_hf import requantize_resmooth_fused_llm_layers

    for module in mini.modules():
        if is_moe(module):
            experts = module.experts
            assert isinstance(experts, nn.ModuleList)
            for name in get_expert_linear_names(module):
                linears = [expert.get_submodule(name) for expert in experts]
                set_expert_quantizer_amax(modules=linears, quantizer_attrs=["input_quantizer"])
    requantize_resmooth_fused_llm_layers(mini)
    if "w4a8_awq" not in formats:
        sync_moe_gate_up_amax(mini)
