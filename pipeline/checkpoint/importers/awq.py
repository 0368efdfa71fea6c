"""AutoAWQ: `quant_method: awq`, layout GEMM. Its scales are already folded into the layers before."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.checkpoint.importers.fields import QuantFields
from pipeline.checkpoint.importers.packing import AWQ_GEMM
from pipeline.checkpoint.importers.repacked import Layout
from pipeline.models.plain_modules import PlainModules

METHOD = "awq"

_OTHER_KERNEL = "another order of codes, made for one kernel; save it as version gemm"
_VERSIONS = {
    "gemm": "",
    "gemv": _OTHER_KERNEL,
    "gemv_fast": _OTHER_KERNEL,
    "marlin": _OTHER_KERNEL,
    "exllama": "",  # how a loader runs it; the tensors on disk are those of gemm
}


def awq_layout(
    quantization: Mapping[str, Any], where: str, plain: PlainModules, *, requantize: bool
) -> Layout:
    """How an AutoAWQ checkpoint stores its linears, from `quantization_config`.

    Raises:
        CheckpointError: every option that cannot be read, with the reason.
    """
    fields = QuantFields(quantization, where)
    fields.only("bits", 4)
    fields.choice("version", _VERSIONS, "gemm")
    fields.left_alone("modules_to_not_convert", plain)
    layout = Layout(
        packing=AWQ_GEMM,
        group_size=fields.group_size(),
        symmetric=not fields.flag("zero_point", default=True),
        requantize=requantize,
    )
    fields.finish()
    return layout
