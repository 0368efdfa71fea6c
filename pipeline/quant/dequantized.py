"""A transformers model whose weights come through our own reader, quantized linears dequantized.

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

BESIDE_A_WEIGHT = (
    "weight_scale",
    "weight_scale_2",
    "weight_zero_point",
    "pre_quant_scale",
    "input_scale",
    "k_scale",
    "v_scale",
)
"""Last parts of the names of tensors that say how a quantized weight or cache is to be read."""


def load_through_reader(checkpoint: HfCheckpoint, config: Any, dtype: torch.dtype) -> Any:
    """The model in eval mode on the CPU, one tensor at a time, weights cast to `dtype`.

    What linears read is rounded where the checkpoint's format does so (fp8, w4a8_awq, int8_sq).

    Args:
        config: transformers' config of the checkpoint; its quantization_config is dropped.
    """
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.modeling_utils import no_init_weights
    from transformers.pytorch_utils import Conv1D

    from pipeline.quant.packing.activations import simulate_inputs

    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config
    with no_init_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.tie_weights()
    parameters = dict(model.named_parameters())
    skipped = ignored_names(checkpoint.shape) | shadowed_names(checkpoint.shape)
    is_quantized = checkpoint.format.quant_algo is not None  # then no linear is stored as [in, out]
    for name in _weight_names(checkpoint.reader):
        if name in skipped:
            continue
        values = dequantized(checkpoint.reader, name)
        module = name.rpartition(".")[0]
        if is_quantized and values.ndim == 2 and isinstance(model.get_submodule(module), Conv1D):
            values = values.T
        with torch.no_grad():
            parameters.pop(name).copy_(torch.from_numpy(values))
    # The table of the architecture has ruled gaps out.
    assert not parameters, sorted(parameters)
    simulate_inputs(model, checkpoint.reader, "")
    return model.eval()


def dequantized(reader: TensorReader, name: str) -> NDArray[np.float32]:
    """One weight as a plain checkpoint would hold it, float32: what multiplies the unscaled input.

    Every format of FORMATS, told by which tensors are there, their dtypes and shapes; for a quantized
    weight always [out, in], also where a plain one is stored transposed (GPT-2). What a format does
    to the input of the linear is not in it.
    """
    module = name.removesuffix(".weight")
    if f"{module}.weight_scale" not in reader.tensors:
        return reader.read(name).astype(np.float32)
    codes, scale = reader.read(name), reader.read(f"{module}.weight_scale").astype(np.float32)
    if f"{module}.weight_zero_point" in reader.tensors:
        zero_NG = reader.read(f"{module}.weight_zero_point")
        group_size = group_size_of(codes.shape[1], scale)
        zero_NK, scale_NK = (
            np.repeat(values.astype(np.float32), group_size, axis=1) for values in (zero_NG, scale)
        )
        weight_NK: NDArray[np.float32] = (unpack_int4(codes) - zero_NK) * scale_NK
    elif scale.ndim == 2:
        weight_NK = dequantize_int4(codes, scale)
    else:  # int8: [N] scales; fp8: one number
        weight_NK = codes.astype(np.float32) * scale.reshape(-1, 1)
    if f"{module}.pre_quant_scale" in reader.tensors:
        weight_NK *= reader.read(f"{module}.pre_quant_scale").astype(np.float32)
    return weight_NK


def _weight_names(reader: TensorReader) -> list[str]:
    """Weights and biases, without the tensors that belong to a quantized weight."""
    return [name for name in reader.tensors if name.rpartition(".")[2] not in BESIDE_A_WEIGHT]
