"""ModelOpt's own algorithms, unchanged: a layer gets what it would get in the whole model."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from pipeline.errors import Problem, StageError
from pipeline.quant.recipe import LayerRecipe, LinearFacts

_ALGORITHMS: dict[str, Any] = {
    "rtn": {"method": "max"},
    "max": {"method": "max"},
    "awq_clip": {"method": "awq_clip"},
    "smoothquant": {"method": "smoothquant"},
    "awq": {"method": "awq_lite", "debug": True},
    "gptq": {"method": "gptq"},
}
"""In the order in which they run side by side: those that change weights last."""


def calibrate_with_modelopt(
    mini: nn.Module,
    recipe: LayerRecipe,
    config: dict[str, Any],
    formats: dict[str, str],
    forward_loop: Callable[[nn.Module], None],
) -> dict[str, LinearFacts]:
    """Quantize `formats` (name -> format); facts have a loss only where ModelOpt measures one.

    With several algorithms each one calibrates its linears while the others stay as they were.
    """
    import modelopt.torch.quantization as mtq

    counter = _TokenCounter(mini, list(formats))
    ways = {name: recipe.algorithms[format_] for name, format_ in formats.items()}
    with counter.watching():
        if len(set(ways.values())) == 1:
            algorithm = _ALGORITHMS[next(iter(ways.values()))]
            mtq.quantize(mini, {**config, "algorithm": algorithm}, counter.counted(forward_loop))
        else:
            mtq.quantize(mini, config)
            for way in sorted(set(ways.values()), key=list(_ALGORITHMS).index):
                others = [name for name in formats if ways[name] != way]
                with _switched_off(mini, others):
                    mtq.calibrate(mini, _ALGORITHMS[way], counter.counted(forward_loop))
    return {
        name: _facts(mini.get_submodule(name), name, format_, ways[name], counter.tokens[name])
        for name, format_ in formats.items()
    }


@contextlib.contextmanager
def _switched_off(mini: nn.Module, names: list[str]) -> Iterator[None]:
    from modelopt.torch.quantization.nn import TensorQuantizer

    quantizers = [
        part
        for name in names
        for part in mini.get_submodule(name).modules()
        if isinstance(part, TensorQuantizer) and part.is_enabled
    ]
    for quantizer in quantizers:
        quantizer.disable()
    try:
        yield
    finally:
        for quantizer in quantizers:
            quantizer.enable()


class _TokenCounter:
    """Tokens that reach each linear in the first pass."""

    def __init__(self, mini: nn.Module, names: list[str]) -> None:
        self._mini = mini
        self._passes = 0
        self.tokens = dict.fromkeys(names, 0)

    def counted(self, forward_loop: Callable[[nn.Module], None]) -> Callable[[nn.Module], None]:
        def loop(model: nn.Module) -> None:
            self._passes += 1
            forward_loop(model)

        return loop

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        handles = [
            self._mini.get_submodule(name).register_forward_pre_hook(self._hook(name))
            for name in self.tokens
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, name: str) -> Callable[[nn.Module, Any], None]:
        def hook(_module: nn.Module, args: Any) -> None:
            if self._passes == 1:
                self.tokens[name] += args[0].numel() // args[0].shape[-1]

        return hook


def _facts(module: Any, name: str, format_: str, algorithm: str, num_tokens: int) -> LinearFacts:
    search = getattr(module, "awq_lite", None)
    if search is None:
        return LinearFacts(format_, algorithm, None, None, None, num_tokens)
    del module.awq_lite
    if not search.is_enabled:
        if num_tokens:
            raise StageError(Problem(name, "ModelOpt found no scale: its input is not finite"))
        note = "no calibration token reached this linear; it is rounded to nearest"
        return LinearFacts(format_, "rtn", None, None, None, 0, note)
    losses = [float(loss) for loss in search.loss.values()]
    if not all(math.isfinite(loss) for loss in losses):
        raise StageError(Problem(name, "the losses of ModelOpt's search are not finite"))
    loss = float(search.loss[search.best_alpha]) / search.num_search_steps
    return LinearFacts(
        format_, algorithm, round(float(search.best_alpha), 6), loss, None, num_tokens
    )
