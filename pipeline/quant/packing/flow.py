"""Which linears a norm feeds, found by watching every operation of one forward pass.

A norm can take over the scale of the linears behind it only if nothing else reads its output: not a
router, not a residual, not a second branch. Names of modules do not show that, operations do: every
operation that reads the memory of the norm's output either belongs to a linear or rules folding out.

Shape suffixes: B sequences, T tokens.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

NUM_TOKENS = 2


def norm_consumers(model: nn.Module) -> dict[str, frozenset[str]]:
    """Norm -> the linears that alone read its output, by their names in `model`.

    Norms of which anything else is read (or nothing at all) are left out. Runs `model` once on two
    tokens, with ModelOpt's quantizers off.
    """
    from modelopt.torch.quantization import set_quantizer_by_cfg_context

    watch = _Watch()
    tokens_BT = torch.zeros(1, NUM_TOKENS, dtype=torch.long, device=_device(model))
    off = [{"quantizer_name": "*", "enable": False}]
    with (
        torch.no_grad(),
        set_quantizer_by_cfg_context(model, off),
        _hooks(model, watch),
        watch,
    ):
        model(input_ids=tokens_BT, use_cache=False)
    return {
        norm: frozenset(name for name in readers if name is not None)
        for norm, readers in watch.readers.items()
        if readers and None not in readers
    }


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch annotates neither
    """Notes, for every operation that reads a norm's output, in which linear it happens.

    Attributes:
        readers: norm -> linears; None stands for an operation outside of them.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.readers: dict[str, set[str | None]] = {}
        self._norm_of: dict[int, str] = {}
        self._kept: list[torch.Tensor] = []  # so that no memory is given out twice
        self._linears: list[str] = []

    def enter(self, linear: str) -> None:
        self._linears.append(linear)

    def leave(self) -> None:
        self._linears.pop()

    def note_norm(self, norm: str, output: torch.Tensor) -> None:
        self._kept.append(output)
        self._norm_of[_memory(output)] = norm
        self.readers.setdefault(norm, set())

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        made = {_memory(leaf) for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)}
        for leaf in tree_leaves((args, kwargs or {})):
            norm = self._norm_of.get(_memory(leaf)) if isinstance(leaf, torch.Tensor) else None
            # A view of the output is still the output, unless the operation wrote into it.
            if norm is not None and (_memory(leaf) not in made or func._schema.is_mutable):
                self.readers[norm].add(self._linears[-1] if self._linears else None)
        return result


def _memory(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


@contextlib.contextmanager
def _hooks(model: nn.Module, watch: _Watch) -> Iterator[None]:
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            handles.append(module.register_forward_pre_hook(_entering(watch, name)))
            handles.append(module.register_forward_hook(lambda *_: watch.leave()))
        elif is_norm(module):
            handles.append(module.register_forward_hook(_noting(watch, name)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def is_norm(module: nn.Module) -> bool:
    """A module whose weight is one factor for each channel."""
    weight = getattr(module, "weight", None)
    return (
        "Norm" in type(module).__name__ and isinstance(weight, nn.Parameter) and weight.dim() == 1
    )


def _entering(watch: _Watch, name: str) -> Any:
    return lambda *_: watch.enter(name)


def _noting(watch: _Watch, name: str) -> Any:
    return lambda _module, _inputs, output: watch.note_norm(name, output)
