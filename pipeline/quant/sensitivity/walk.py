"""One walk over the decoder layers with their original inputs, one layer in memory, to measure them.

Computed in float32, whatever the checkpoint's dtype: the error of 8 bits is as small as the rounding
of bfloat16. Every measured layer is committed as `quant.layers.commits` has it, so a killed run goes
on at the layer that was open.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from pipeline.checkpoint.source import HfCheckpoint
from pipeline.memory import free_memory_bytes
from pipeline.models.linears import within_layer
from pipeline.progress import Progress
from pipeline.quant.choose import algorithm_of
from pipeline.quant.data import TokenWindows
from pipeline.quant.float32_products import float32_products
from pipeline.quant.layers.batches import Batch, equal_length_batches, used_tokens
from pipeline.quant.layers.commits import OUTPUTS, FinishedLayers
from pipeline.quant.layers.frame import Frame
from pipeline.quant.layers.hidden import HiddenStates, fits_in_memory
from pipeline.quant.layers.passes import LayerPasses, fill_embedded
from pipeline.quant.layers.run import torch_devices
from pipeline.quant.layers.skeleton import Skeleton
from pipeline.quant.preflight import QuantizeOptions
from pipeline.quant.search.losses import linear_losses
from pipeline.quant.sensitivity.groups import Group
from pipeline.quant.sensitivity.variants import HiddenErrors, exchanged, quantized_copy

MAX_TOKENS = 8192
"""Of the calibration set, windows evenly spaced: a mean over tokens is known well enough by then."""
GroupLosses = list[dict[str, float]]
"""For each group: format -> loss; empty for a group that is kept."""

_TOOLS = ("nvidia-modelopt", "torch", "transformers")
_DECIDING = ("group_size", "batch_size", "algorithm", "search", "device", "sensitivity")


class SensitivityWalk:
    """A checkpoint with some of its calibration windows, ready to be measured layer by layer.

    Attributes:
        skeleton: makes the layers.
        batches: the windows.
        passes: runs a layer over them.
        devices: torch devices; a layer is on the first.
    """

    def __init__(
        self,
        checkpoint: HfCheckpoint,
        options: QuantizeOptions,
        windows: TokenWindows,
        progress: Progress,
        work_dir: Path,
    ) -> None:
        """Args as of `pipeline.quant.quantizer.quantize_windows`; reads what lies outside the layers."""
        self.checkpoint, self.options, self.windows = checkpoint, options, windows
        self.progress, self.work_dir = progress, work_dir
        self.skeleton = Skeleton(checkpoint, torch.float32)
        self.batches = _evenly_spaced(equal_length_batches(windows, 1), options.batch_size)
        self.frame = Frame(self.skeleton, used_tokens(self.batches))
        self.devices = torch_devices(options.device)[:1]
        self.passes = LayerPasses(self.frame, self.batches, self.skeleton.layers_path, self.devices)
        self._in_memory = False
        self._in_memory = self.fits(1)

    def fits(self, count: int) -> bool:
        """Whether that many sets of hidden states, before and after a layer, may stay in memory."""
        limit = self.options.max_memory_bytes or free_memory_bytes()
        return fits_in_memory(count * self.hidden(self.work_dir).num_bytes, limit)

    def hidden(self, path: Path, *, in_memory: bool | None = None) -> HiddenStates:
        """Room for the hidden states of all batches."""
        size, dtype = self.checkpoint.shape.hidden_size, self.skeleton.dtype
        kept = self._in_memory if in_memory is None else in_memory
        return HiddenStates(path, self.batches, size, dtype, in_memory=kept)

    def embedded(self, path: Path) -> HiddenStates:
        """What feeds the first layer.

        Raises:
            StageError: an embedding that is not finite, or no room on the disk.
        """
        hidden = self.hidden(path)
        fill_embedded(hidden, self.frame, self.batches)
        return hidden

    def losses(self, groups: Sequence[Group], formats: Sequence[str]) -> GroupLosses:
        """Of each group in each format, with measure "layer" or "output".

        "layer": mean over tokens of |error|^2 / |hidden state|^2 behind the layer, with this group
        alone quantized. "output": the squared error of each linear's output over the output's energy,
        summed over the linears of the group; one pass instead of one for each group and format.

        Raises:
            StageError: weights or activations that are not finite; no room on the disk.
        """
        finished = FinishedLayers(self.work_dir)
        num_layers = self.skeleton.num_layers
        first, changes = finished.resume(
            self.fingerprint(groups, formats), self.skeleton.layer_digest
        )
        for change in changes:
            self.progress.say(f"measurements of an earlier run are not used: {change}")
        if first:
            self.progress.say(f"{first} of {num_layers} layers are measured; continuing")
        self.progress.start(num_layers, "layers measured")
        for layer in range(first):
            self.progress.advance(f"layer {layer} was measured before")
        inputs = None
        for layer in range(first, num_layers):
            with float32_products(), torch.no_grad():
                if inputs is None:
                    path = finished.inputs_path(layer)
                    inputs = self.hidden(path) if layer else self.embedded(path)
                inputs = self._measure_layer(finished, layer, inputs, groups, formats)
            self.progress.advance(f"layer {layer}")
        found: dict[str, dict[str, float]] = {}
        for layer in range(num_layers):
            found |= finished.record(layer)["losses"]
        return [found.get(group.linears[0], {}) for group in groups]

    def _measure_layer(
        self,
        finished: FinishedLayers,
        layer: int,
        inputs: HiddenStates,
        groups: Sequence[Group],
        formats: Sequence[str],
    ) -> HiddenStates:
        outputs = self.hidden(finished.open_layer() / OUTPUTS)
        outputs.create()
        mini = self.skeleton.mini(layer).to(self.devices[0])
        self.passes.outputs(mini, layer, inputs, outputs)
        own = [group for group in groups if group.layer == layer and not group.is_kept]
        if self.options.sensitivity == "output":
            losses = self._output_losses(mini, layer, inputs, own, formats)
        else:
            losses = self._layer_losses(mini, layer, inputs, outputs, own, formats)
        record = {
            "weights_sha256": self.skeleton.layer_digest(layer),
            "losses": {
                group.linears[0]: by_format for group, by_format in zip(own, losses, strict=True)
            },
        }
        finished.commit(layer, record)
        outputs.moved(finished.layer_dir(layer) / OUTPUTS)
        return outputs

    def _output_losses(
        self,
        mini: nn.Module,
        layer: int,
        inputs: HiddenStates,
        groups: Sequence[Group],
        formats: Sequence[str],
    ) -> GroupLosses:
        suffixes = [[within_layer(name, layer) for name in group.linears] for group in groups]
        found = linear_losses(
            mini,
            self.passes.forward_loop(layer, inputs),
            list(formats),
            [name for names in suffixes for name in names],
            group_size=self.options.group_size,
            algorithms=self.algorithms(formats),
        )
        return [
            {fmt: sum(found[name][fmt] for name in names) for fmt in formats} for names in suffixes
        ]

    def _layer_losses(
        self,
        mini: nn.Module,
        layer: int,
        inputs: HiddenStates,
        outputs: HiddenStates,
        groups: Sequence[Group],
        formats: Sequence[str],
    ) -> GroupLosses:
        losses: GroupLosses = [{} for _ in groups]
        for fmt in formats:
            if fmt == "fp16":
                for by_format in losses:
                    by_format[fmt] = 0.0
                continue
            quantized = self.quantized_copy(mini, layer, inputs, groups, fmt)
            for group, by_format in zip(groups, losses, strict=True):
                errors = HiddenErrors(outputs)
                with exchanged(mini, quantized, group, self.skeleton.layers_path):
                    self.passes.outputs(mini, layer, inputs, errors)
                by_format[fmt] = errors.mean
            del quantized
        return losses

    def quantized_copy(
        self,
        mini: nn.Module,
        layer: int,
        inputs: HiddenStates,
        groups: Sequence[Group],
        fmt: str,
    ) -> nn.Module:
        """The layer with all of `groups` in one format."""
        loop = self.passes.forward_loop(layer, inputs)
        return quantized_copy(mini, groups, fmt, self.algorithms([fmt]), self.options, loop)

    def algorithms(self, formats: Sequence[str]) -> dict[str, str]:
        """How each format will be rounded."""
        wanted = self.options.algorithm
        return {name: algorithm_of(name, wanted) for name in formats if name != "fp16"}

    def fingerprint(self, groups: Sequence[Group], formats: Sequence[str]) -> Mapping[str, Any]:
        """All that decides the measurements, beside the weights of the layers."""
        return {
            "config": self.checkpoint.config,
            "embeddings_sha256": self.skeleton.outer_digest(),
            "tokens_sha256": self.windows.digest,
            "formats": list(formats),
            "kept": [group.linears for group in groups if group.is_kept],
            **{f"options.{name}": getattr(self.options, name) for name in _DECIDING},
            **{f"tools.{name}": importlib.metadata.version(name) for name in _TOOLS},
        }

    def describe(self) -> dict[str, Any]:
        """What was measured on, for the report."""
        return {
            "measure": self.options.sensitivity,
            "num_tokens": sum(batch.num_tokens for batch in self.batches),
            "tokens_sha256": self.windows.digest,
        }


def _evenly_spaced(windows: Sequence[Batch], batch_size: int) -> list[Batch]:
    """At most MAX_TOKENS of single windows, in batches of one length."""
    num_tokens = sum(batch.num_tokens for batch in windows)
    count = max(1, len(windows) * MAX_TOKENS // max(num_tokens, MAX_TOKENS))
    chosen = [windows[index * len(windows) // count] for index in range(count)]
    batches: list[Batch] = []
    for length in sorted({batch.num_tokens for batch in chosen}, reverse=True):
        members = [batch for batch in chosen if batch.num_tokens == length]
        for first in range(0, len(members), batch_size):
            part = members[first : first + batch_size]
            numbers = tuple(batch.windows[0] for batch in part)
            batches.append(Batch(numbers, np.concatenate([batch.tokens_BT for batch in part])))
    return batches
