"""What the linears of a layer read, gathered in one pass: once for each distinct input.

Linears that read the same tensor (q, k and v; gate and up) are found while the layer runs, by the
identity of the tensor, so no table of architectures is needed.

Shape suffixes: T tokens, K input features.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from pipeline.errors import Problem, StageError
from pipeline.quant.search.moments import SecondMoment

SAMPLES_OF_BATCH = 32
MAX_SAMPLES = 512

_EXPERT = re.compile(r"\bexperts\.\d+\.")


def expert_of(name: str) -> str:
    """ "experts.3." for a linear of expert 3, "" outside experts."""
    match = _EXPERT.search(name)
    return match.group() if match else ""


class InputStatistics:
    """One distinct input of linears, over all of its tokens.

    Attributes:
        magnitude_K: sum of |x| of each feature, float32.
        amax_K: largest |x| of each feature, float32.
        moment: see `SecondMoment`.
        samples: a few rows of every batch, for errors of rounding the input itself.
        num_tokens: rows seen.
    """

    def __init__(self, num_features: int, device: torch.device) -> None:
        self.num_tokens = 0
        self.magnitude_K = torch.zeros(num_features, device=device)
        self.amax_K = torch.zeros(num_features, device=device)
        self.moment = SecondMoment(num_features)
        self.samples: list[torch.Tensor] = []

    def add(self, x: torch.Tensor) -> bool:
        """Add every row of x [..., K]; False if one of its numbers is not finite."""
        x_TK = x.detach().reshape(-1, x.shape[-1])
        if not len(x_TK):
            return True  # an expert that the router did not choose
        magnitude_TK = x_TK.abs()
        amax_K = magnitude_TK.amax(0).float()
        if not bool(torch.isfinite(amax_K).all()):
            return False
        self.amax_K = torch.maximum(self.amax_K, amax_K)
        self.magnitude_K += magnitude_TK.sum(0, dtype=torch.float32)
        self.num_tokens += len(x_TK)
        self.moment.add(x_TK)
        if sum(map(len, self.samples)) < MAX_SAMPLES:
            self.samples.append(
                x_TK[:: max(1, len(x_TK) // SAMPLES_OF_BATCH)][:SAMPLES_OF_BATCH].clone()
            )
        return True


def joint_range(inputs: Mapping[str, InputStatistics]) -> torch.Tensor:
    """The largest |x| of each feature in any of the inputs: float32 [K]."""
    return torch.stack([value.amax_K for value in inputs.values()]).amax(0)


@dataclass
class LayerInputs:
    """What `gather_inputs` found.

    Attributes:
        of: linear -> its input; linears that read the same tensor have the same object. A linear that
            no token reached is missing.
    """

    of: dict[str, InputStatistics] = field(default_factory=dict)

    def sharing(self, names: list[str]) -> list[list[str]]:
        """`names` grouped by the tensor they read; of all experts together, as TensorRT-LLM has them."""
        keys: dict[str, str] = {}  # linear or expert-independent name -> representative

        def find(name: str) -> str:
            while keys.setdefault(name, name) != name:
                name = keys[name]
            return name

        first_reader: dict[int, str] = {}
        for name in names:
            keys[find(name)] = find(_EXPERT.sub("experts.*.", name))
            if name in self.of:
                reader = first_reader.setdefault(id(self.of[name]), name)
                keys[find(name)] = find(reader)
        groups: dict[str, list[str]] = {}
        for name in names:
            groups.setdefault(find(name), []).append(name)
        return list(groups.values())


def gather_inputs(
    model: nn.Module,
    linears: Mapping[str, nn.Module],
    forward_loop: Callable[[nn.Module], None],
) -> LayerInputs:
    """Run `forward_loop` once and gather the input of each of `linears` (name -> module of `model`).

    Raises:
        StageError: an input that is not finite, with the linear's name; raised inside `forward_loop`,
            so the caller that runs the batches knows which one it was.
    """
    found = LayerInputs()
    alive: dict[int, tuple[weakref.ref[torch.Tensor], InputStatistics]] = {}
    owners: dict[int, str] = {}  # the one linear of each input that adds to it

    def statistics_of(name: str, x: torch.Tensor) -> InputStatistics:
        if name not in found.of:
            tensor, statistics = alive.get(id(x), (None, None))
            if statistics is None or tensor is None or tensor() is not x:
                statistics = InputStatistics(x.shape[-1], x.device)
                alive[id(x)] = (weakref.ref(x), statistics)
                owners[id(statistics)] = name
            found.of[name] = statistics
        return found.of[name]

    def watch(name: str) -> Callable[[nn.Module, Any], None]:
        def hook(_module: nn.Module, args: Any) -> None:
            x = args[0]
            if x.numel() == 0:
                return
            statistics = statistics_of(name, x)
            if owners[id(statistics)] == name and not statistics.add(x):
                raise StageError(_not_finite(name, x))

        return hook

    handles = [module.register_forward_pre_hook(watch(name)) for name, module in linears.items()]
    try:
        with torch.no_grad():
            forward_loop(model)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _not_finite(name: str, x: torch.Tensor) -> Problem:
    fix = "check the weights for NaN and infinity"
    if x.dtype == torch.float16:
        fix += "; a model made for bfloat16 can overflow in float16"
    return Problem(name, "its input is not finite", fix=fix)
