"""Zero padding of the feed-forward network, so that it can be cut where it otherwise could not.

Rows of zeros behind gate and up make channels that are always act(0) * 0 = 0, and the matching columns
of down multiply them by zero: the model computes the same. Padding is never applied unless asked for.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from pipeline.models import ModelShape
from pipeline.quant.formats import QuantFormat

UNPADDED_FIELD = "unpadded_intermediate_size"
"""In config.json of a padded checkpoint: what the model's own size is. TensorRT-LLM ignores it."""


def padded_shape(shape: ModelShape, fmt: QuantFormat, tp: int) -> ModelShape:
    """The shape with the feed-forward size rounded up to a multiple of group_size * tp.

    The same object if it is such a multiple already.
    """
    multiple = (fmt.group_size or 1) * tp
    padded = -(-shape.intermediate_size // multiple) * multiple
    if padded == shape.intermediate_size:
        return shape
    return replace(shape, padded_intermediate_size=padded)


def padding_record(shape: ModelShape) -> dict[str, Any]:
    """What config.json says of padding: nothing when there is none."""
    if not shape.padded_intermediate_size:
        return {}
    return {UNPADDED_FIELD: shape.intermediate_size}
