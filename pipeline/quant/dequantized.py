"""A transformers model whose weights come through our own reader, int4 linears dequantized.

For checkpoints that transformers can load only with the packages that made them (AutoAWQ, GPTQModel,
ModelOpt), and for PyTorch files, of which only tensors are to be read.

Shape suffixes: N output features, P = N / 2 packed rows, K input features, G groups of K.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pipeline.checkpoint.check import ignored_names, shadowed_names
from pipeline.checkpoint.source import HfCheckpoint
from pipeline.checkpoint.tensor_reader import TensorReader
from pipeline.quant.oracle import dequantize_int4, group_size_of, unpack_int4

if TYPE_CHECKING:
    import torch


def load_through_reader(checkpoint: HfCheckpoint, config: Any, dtype: torch.dtype) -> Any:
    """The model in eval mode on the CPU, one tensor at a time, weights cast to `dtype`.

    Args:
        config: transformers' config of the checkpoint; its quantization_config is dropped.
    """
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.modeling_utils import no_init_weights

    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config
    with no_init_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.tie_weights()
    parameters = dict(model.named_parameters())
    skipped = ignored_names(checkpoint.shape) | shadowed_names(checkpoint.shape)
    for name in _weight_names(checkpoint.reader):
        if name in skipped:
            continue
        values = dequantized(checkpoint.reader, name)
        with torch.no_grad():
            parameters.pop(name).copy_(torch.from_numpy(values))
    # The table of the architecture has ruled gaps out.
    assert not parameters, sorted(parameters)
    return model.eval()


def dequantized(reader: TensorReader, name: str) -> NDArray[np.float32]:
    """One weight as a plain checkpoint would hold it, float32: what multiplies the unscaled input."""
    module = name.removesuffix(".weight")
    if f"{module}.weight_scale" not in reader.tensors:
        return reader.read(name).astype(np.float32)
    packed_PK, scale_NG = reader.read(name), reader.read(f"{module}.weight_scale")
    if f"{module}.weight_zero_point" in reader.tensors:
        zero_NG = reader.read(f"{module}.weight_zero_point")
        group_size = group_size_of(packed_PK.shape[1], scale_NG)
        zero_NK, scale_NK = (
            np.repeat(values.astype(np.float32), group_size, axis=1)
            for values in (zero_NG, scale_NG)
        )
        weight_NK: NDArray[np.float32] = (unpack_int4(packed_PK) - zero_NK) * scale_NK
    else:
        weight_NK = dequantize_int4(packed_PK, scale_NG)
    if f"{module}.pre_quant_scale" in reader.tensors:
        weight_NK *= reader.read(f"{module}.pre_quant_scale").astype(np.float32)
    return weight_NK


def _weight_names(reader: TensorReader) -> list[str]:
    """Weights and biases, without the tensors that belong to a quantized weight."""
    extra = ("weight_scale", "weight_zero_point", "pre_quant_scale")
    return [name for name in reader.tensors if name.rpartition(".")[2] not in extra]
