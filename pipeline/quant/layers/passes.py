"""Forward passes of one layer over all batches, and what to say when a value is not finite.

Shape suffixes: B windows of one batch, T tokens of one window, H hidden size.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from pipeline.errors import Problem, StageError
from pipeline.quant.layers.batches import Batch
from pipeline.quant.layers.frame import Frame, LayerCall
from pipeline.quant.layers.hidden import HiddenStates
from pipeline.quant.layers.skeleton import layer_of

FLOAT16_FIX = "a model made for bfloat16 can overflow in float16: save its checkpoint in bfloat16"
CALIBRATION = "calibration sample"


class Outputs(Protocol):
    """Takes what a layer computes, such as `HiddenStates`."""

    def put(self, index: int, hidden_BTH: torch.Tensor) -> None:
        """The output [B, T, H] for a batch."""


class LayerPasses:
    """Runs layers as the model would.

    Attributes:
        returns_tuple: whether the architecture's layers return one; known after a pass.
    """

    def __init__(
        self,
        frame: Frame,
        batches: Sequence[Batch],
        layers_path: str,
        devices: Sequence[str],
        *,
        window_name: str = CALIBRATION,
    ) -> None:
        """Args:
        devices: torch devices. Statistics are gathered on the first; `outputs` of a layer are
            computed on all, each taking its share of the batches. Several were never run.
        window_name: how errors call a window.
        """
        self.returns_tuple = False
        self._window_name = window_name
        self._frame = frame
        self._batches = batches
        self._layers_path = layers_path
        self._devices = devices

    def forward_loop(
        self, layer: int, inputs: HiddenStates, outputs: Outputs | None = None
    ) -> Callable[[nn.Module], None]:
        """What ModelOpt calls with the mini of a layer to show it its calibration inputs.

        Args:
            outputs: gets what the layer computes, too; of the last call.
        """

        def loop(mini: nn.Module) -> None:
            block = layer_of(mini, self._layers_path)
            for index in range(len(self._batches)):
                output_BTH = self._run(block, layer, index, inputs, self._devices[0])
                if outputs is not None:
                    outputs.put(index, output_BTH)

        return loop

    @property
    def one_device(self) -> bool:
        """Whether `outputs` has nothing to share out."""
        return len(self._devices) == 1

    def outputs(self, mini: nn.Module, layer: int, inputs: HiddenStates, outputs: Outputs) -> None:
        """Fill `outputs` with what the mini's layer makes of `inputs`.

        Raises:
            StageError: an output is not finite; names layer, module and sample.
        """
        block = layer_of(mini, self._layers_path)

        def share(number: int) -> None:
            device = self._devices[number]
            own = block if number == 0 else copy.deepcopy(block).to(device)
            for index in range(number, len(self._batches), len(self._devices)):
                outputs.put(index, self._run(own, layer, index, inputs, device))

        numbers = range(len(self._devices))
        if len(numbers) == 1:
            share(0)
            return
        with ThreadPoolExecutor(len(numbers)) as pool:
            list(pool.map(share, numbers))

    def _run(
        self, block: nn.Module, layer: int, index: int, inputs: HiddenStates, device: str
    ) -> torch.Tensor:
        batch = self._batches[index]
        call = self._frame.call(batch, layer)
        hidden_BTH = inputs.get(index)
        if device != "cpu":
            call, hidden_BTH = call.to(device), hidden_BTH.to(device)
        try:
            with torch.no_grad():
                result = block(hidden_BTH, *call.args, **call.kwargs)
        except StageError as error:  # of a search that watches what linears read
            found = _first_not_finite(block, hidden_BTH, call)
            raise (
                error if found is None else StageError(self._problem(found, layer, batch, None))
            ) from error
        self.returns_tuple = isinstance(result, tuple)
        output_BTH: torch.Tensor = result[0] if self.returns_tuple else result
        if not bool(torch.isfinite(output_BTH).all()):
            found = _first_not_finite(block, hidden_BTH, call) or _Found("output", output_BTH)
            raise StageError(self._problem(found, layer, batch, output_BTH))
        return output_BTH

    def _problem(
        self, found: _Found, layer: int, batch: Batch, output_BTH: torch.Tensor | None
    ) -> Problem:
        """Args:
        output_BTH: of the layer, which knows its windows; None: it got no further than `found`.
        """
        values = found.values if output_BTH is None else output_BTH
        if values.shape[:2] == batch.tokens_BT.shape:
            window = f"{self._window_name} {_sample(batch, values)}"
        else:  # tokens of an expert
            window = f"one of {self._window_name}s {', '.join(map(str, batch.windows))}"
        is_half = values.dtype == torch.float16
        return Problem(
            f"layer {layer}, {found.name}, {window}",
            f"values that are not finite{found.cause}",
            fix=FLOAT16_FIX if is_half else "check the weights of this layer",
        )


def fill_embedded(
    hidden: HiddenStates,
    frame: Frame,
    batches: Sequence[Batch],
    *,
    window_name: str = CALIBRATION,
) -> None:
    """Create `hidden` and fill it with what feeds the first layer.

    Raises:
        StageError: the embedding of a sample is not finite; no room on the disk.
    """
    hidden.create()
    for index, batch in enumerate(batches):
        values_BTH = frame.embed(batch)
        if not bool(torch.isfinite(values_BTH).all()):
            where = f"embedding, {window_name} {_sample(batch, values_BTH)}"
            raise StageError(Problem(where, "the input of the first layer is not finite"))
        hidden.put(index, values_BTH)


@dataclass(frozen=True)
class _Found:
    """The first module whose output is not finite, or what it read; `cause` may follow in words."""

    name: str
    values: torch.Tensor
    cause: str = ""


def _first_not_finite(block: nn.Module, hidden_BTH: torch.Tensor, call: LayerCall) -> _Found | None:
    """Where the first value appears that is not finite: the batch is run again, watched."""
    found: list[_Found] = []

    def before(name: str) -> Callable[[nn.Module, Any], None]:
        def hook(_module: nn.Module, args: Any) -> None:
            given = args[0] if args and isinstance(args[0], torch.Tensor) else None
            if not found and given is not None and not bool(torch.isfinite(given).all()):
                found.append(_Found(f"input of {name}", given))

        return hook

    def behind(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            value = output[0] if isinstance(output, tuple) else output
            if not found and not bool(torch.isfinite(value).all()):
                given = args[0] if args and isinstance(args[0], torch.Tensor) else None
                found.append(_Found(name, value, _cause(module, given, value)))

        return hook

    handles = []
    for name, module in _parts(block):
        # Before the hook of a search, which refuses such an input and ends the run.
        handles.append(module.register_forward_pre_hook(before(name), prepend=True))
        handles.append(module.register_forward_hook(behind(name)))
    try:
        with torch.no_grad(), contextlib.suppress(StageError):
            block(hidden_BTH, *call.args, **call.kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


def _parts(block: nn.Module, prefix: str = "") -> list[tuple[str, nn.Module]]:
    """Linears, whatever a quantizer put into them, and modules without parts."""
    found = []
    for name, module in block.named_children():
        if isinstance(module, nn.Linear) or not list(module.children()):
            found.append((prefix + name, module))
        else:
            found += _parts(module, f"{prefix}{name}.")
    return found


def _sample(batch: Batch, values_BTH: torch.Tensor) -> int:
    """Number of the first window with a value that is not finite."""
    bad_B = ~torch.isfinite(values_BTH).flatten(1).all(dim=1)
    return batch.windows[int(bad_B.nonzero()[0])]


def _cause(module: nn.Module, value: torch.Tensor | None, output: torch.Tensor) -> str:
    if not isinstance(module, nn.Linear) or value is None:
        return ""
    bias = module.bias.float() if module.bias is not None else None
    exact = nn.functional.linear(value.float(), module.weight.float(), bias)
    largest, limit = float(exact.abs().max()), torch.finfo(output.dtype).max
    if largest > limit:
        return f": up to {largest:.3g}, and {str(output.dtype)[6:]} ends at {limit:.3g}"
    return ""
