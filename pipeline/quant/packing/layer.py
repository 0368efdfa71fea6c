"""One decoder layer, quantized in memory, as the tensors of ModelOpt's unified Hugging Face layout.

Shape suffixes: N output features, K input features, G groups of K.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from pipeline.quant.packing.folding import (
    Folded,
    explicit_scale,
    fold_scales,
    pre_quant_scale,
)
from pipeline.quant.packing.kv_cache import kv_scales
from pipeline.quant.packing.linear import quantized_tensors
from pipeline.quant.packing.modelopt_export import average_like_modelopt
from pipeline.quant.packing.names import LayerNames, layer_names
from pipeline.quant.recipe import LayerRecipe


def pack_layer(mini: nn.Module, recipe: LayerRecipe, layer: int) -> dict[str, torch.Tensor]:
    """Every tensor of the layer under its full Hugging Face name.

    Codes as ModelOpt packs them; `weight_scale`, `weight_scale_2`, `input_scale` float32;
    `pre_quant_scale` only where no norm could take it; `weight_zero_point` int8 [N, G]; scales of the KV
    cache; norms with the scales that they took, biases, and what stays plain, in the dtype of `mini`.
    Every linear is [out, in], GPT-2's too, quantized or plain. Tensors are contiguous, on the CPU, and
    may share memory with `mini`.

    Args:
        mini: a transformers causal language model with this one decoder layer, in the checkpoint's
            dtype, quantized by ModelOpt. With `search: modelopt` it is used up.
        layer: the layer's number in the checkpoint.

    Raises:
        StageError: weights that are not finite.
    """
    names = layer_names(mini, layer)
    with torch.no_grad():
        if recipe.search == "modelopt":
            average_like_modelopt(mini, set(recipe.formats.values()))
            folded = None
        else:
            folded = fold_scales(mini, names, recipe.formats)
        tensors = dict(_layer_tensors(mini, names, recipe, folded))
    return {
        names.outer + name.removeprefix(names.inner): tensor.detach().cpu().contiguous()
        for name, tensor in tensors.items()
    }


def _layer_tensors(
    mini: nn.Module, names: LayerNames, recipe: LayerRecipe, folded: Folded | None
) -> Iterator[tuple[str, torch.Tensor]]:
    """(name in memory, tensor) of everything that the layer holds.

    Args:
        folded: None: the model is as ModelOpt exports it.
    """
    block = mini.get_submodule(names.inner)
    for name, module in block.named_modules(prefix=names.inner):
        fmt = recipe.formats.get(name.removeprefix(f"{names.inner}."), "fp16")
        for leaf, parameter in module.named_parameters(recurse=False):
            if fmt == "fp16" or leaf != "weight":
                full = f"{name}.{leaf}"
                yield full, parameter if folded is None else folded.norms.get(full, parameter)
        if fmt != "fp16":
            scale_K = (
                pre_quant_scale(module)
                if folded is None
                else explicit_scale(name, module, fmt, folded)
            )
            if scale_K is not None:
                yield f"{name}.pre_quant_scale", scale_K
            where = names.outer + name.removeprefix(names.inner)
            parts = quantized_tensors(module, fmt, where, like_modelopt=folded is None)
            yield from ((f"{name}.{suffix}", tensor) for suffix, tensor in parts)
    yield from kv_scales(block, names.inner, recipe.kv_cache)
