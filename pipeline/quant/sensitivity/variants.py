"""A decoder layer in which one group of linears is quantized and all else is as it was."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import nn

from pipeline.models.linears import within_layer
from pipeline.quant.layers.hidden import HiddenStates
from pipeline.quant.layers.skeleton import layer_of
from pipeline.quant.preflight import QuantizeOptions
from pipeline.quant.recipe import LayerRecipe
from pipeline.quant.search.layer import quantize_layer
from pipeline.quant.sensitivity.groups import Group


def quantized_copy(
    mini: nn.Module,
    groups: Sequence[Group],
    fmt: str,
    algorithms: Mapping[str, str],
    options: QuantizeOptions,
    forward_loop: Callable[[nn.Module], None],
) -> nn.Module:
    """A copy of the layer with all of `groups` in one format, as the real run would make them.

    Raises:
        StageError: weights, activations or losses that are not finite.
    """
    recipe = LayerRecipe(
        formats={within_layer(name, one.layer): fmt for one in groups for name in one.linears},
        algorithms={fmt: algorithms[fmt]},
        group_size=options.group_size,
        search=options.search,
    )
    quantized = copy.deepcopy(mini)
    if recipe.formats:
        quantize_layer(quantized, recipe, forward_loop)
    return quantized


@contextlib.contextmanager
def exchanged(
    mini: nn.Module, quantized: nn.Module, group: Group, layers_path: str
) -> Iterator[None]:
    """While entered, `mini` has the linears of `group` from `quantized`."""
    block, source = layer_of(mini, layers_path), layer_of(quantized, layers_path)
    names = [within_layer(name, group.layer) for name in group.linears]
    originals = {name: block.get_submodule(name) for name in names}
    for name in names:
        _put(block, name, source.get_submodule(name))
    try:
        yield
    finally:
        for name, module in originals.items():
            _put(block, name, module)


def _put(block: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(block.get_submodule(parent), leaf, module)


class HiddenErrors:
    """Takes the outputs of a changed layer and compares them with those of the original one.

    Shape suffixes: B windows of one batch, T tokens of one window, H hidden size.
    """

    def __init__(self, original: HiddenStates) -> None:
        self._original = original
        self._total = 0.0
        self._num_tokens = 0

    def put(self, index: int, hidden_BTH: torch.Tensor) -> None:
        """One batch; threads must not call it at the same time."""
        wanted_BTH = self._original.get(index).float()
        error_BT = hidden_BTH.to("cpu", torch.float32).sub(wanted_BTH).square_().sum(-1)
        energy_BT = wanted_BTH.square().sum(-1).clamp_min_(torch.finfo(torch.float32).tiny)
        self._total += float(error_BT.div_(energy_BT).double().sum())
        self._num_tokens += error_BT.numel()

    @property
    def mean(self) -> float:
        """Mean over tokens of |error|^2 / |hidden state|^2."""
        return self._total / self._num_tokens
