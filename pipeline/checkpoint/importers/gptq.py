"""GPTQ as AutoGPTQ, GPTQModel and transformers write it: `quant_method: gptq`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.checkpoint.importers.fields import QuantFields
from pipeline.checkpoint.importers.packing import GPTQ_V1, GPTQ_V2
from pipeline.checkpoint.importers.repacked import Layout

METHOD = "gptq"

_FORMATS = {
    "gptq": "",
    "gptq_v2": "",
    "marlin": "codes in the order of one GPU kernel; save it as gptq",
    "bitblas": "codes in the order of one GPU kernel; save it as gptq",
}
_PACKINGS = {"gptq": GPTQ_V1, "gptq_v2": GPTQ_V2}


def gptq_layout(quantization: Mapping[str, Any], where: str, *, requantize: bool) -> Layout:
    """How a GPTQ checkpoint stores its linears, from `quantization_config`.

    Raises:
        CheckpointError: every option that cannot be read, with the reason.
    """
    fields = QuantFields(quantization, where)
    fields.only("bits", 4)
    fields.only(
        "desc_act",
        False,
        "input features would be reordered at run time, and every tensor-parallel cut of a "
        "reordered linear mixes groups; quantize without it",
    )
    fields.only("lm_head", False, "lm_head stays float16 here")
    if quantization.get("dynamic"):
        fields.refuse("dynamic: layers are quantized differently", "one setting for all layers")
    # GPTQModel writes both names; old files have neither.
    name = "format" if "checkpoint_format" not in quantization else "checkpoint_format"
    version = fields.choice(name, _FORMATS, "gptq")
    layout = Layout(
        packing=_PACKINGS[version],
        group_size=fields.group_size(),
        symmetric=fields.flag("sym", default=True),
        requantize=requantize,
    )
    fields.finish()
    return layout
