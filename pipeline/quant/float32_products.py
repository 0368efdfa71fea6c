"""Matrix products of float16 tensors on the CPU, computed in float32.

CPUs without float16 units multiply float16 matrices about five times slower than float32 ones. The
result is rounded to float16 again, so a model keeps its dtype; only the order of the additions differs.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class _Float32Products(TorchFunctionMode):
    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        tensors = [value for value in args if isinstance(value, torch.Tensor)]
        if func is torch.nn.functional.linear and all(
            tensor.dtype == torch.float16 and tensor.device.type == "cpu" for tensor in tensors
        ):
            widened: list[Any] = [value.float() if value is not None else None for value in args]
            return func(*widened, **(kwargs or {})).to(torch.float16)
        return func(*args, **(kwargs or {}))


def float32_products() -> AbstractContextManager[Any]:
    """While it is entered, `torch.nn.functional.linear` of float16 CPU tensors works in float32."""
    return _Float32Products()
