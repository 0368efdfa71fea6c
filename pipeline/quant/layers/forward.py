"""A whole checkpoint run over windows of tokens, one decoder layer in memory at a time.

Plain checkpoints and quantized ones, whose weights are dequantized exactly as stored. Inputs of
linears are rounded where the format does so; keys and values never are.

Shape suffixes: B windows of one batch, C chosen positions of one window, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import torch

from pipeline.checkpoint.source import HfCheckpoint
from pipeline.progress import Progress
from pipeline.quant.layers.batches import Batch, used_tokens
from pipeline.quant.layers.frame import Frame
from pipeline.quant.layers.hidden import HiddenStates
from pipeline.quant.layers.passes import LayerPasses, fill_embedded
from pipeline.quant.layers.skeleton import Skeleton, layer_of
from pipeline.quant.packing.activations import simulate_inputs

_WINDOW = "held-out window"
_ROOM_FIX = "make room, or use fewer or shorter windows of held-out text"


class LayerOutputs:
    """What a checkpoint's last layer made of each batch, and from there to logits.

    Attributes:
        path: plain values of the dtype, batch after batch; whoever made them removes them.
        returns_tuple: whether the architecture's layers return one.
    """

    def __init__(
        self,
        checkpoint: HfCheckpoint,
        batches: Sequence[Batch],
        path: Path,
        dtype: torch.dtype,
        *,
        returns_tuple: bool,
    ) -> None:
        """Of what `run_layers` has left, in this process or in another."""
        self.path = path
        self.returns_tuple = returns_tuple
        self._checkpoint = checkpoint
        self._dtype = dtype
        self._hidden = _states(checkpoint, batches, path, dtype)

    @cached_property
    def _head(self) -> Frame:
        """Loaded when the first logits are wanted: the table of a large vocabulary."""
        return Frame(Skeleton(self._checkpoint, self._dtype), None)

    def logits(self, index: int, row: int, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Logits [C, V] of positions start..stop-1 of one window: row `row` of batch `index`."""
        hidden_1CH = self._hidden.get(index)[row : row + 1, start:stop]
        logits_1CV = self._head.logits(hidden_1CH, returns_tuple=self.returns_tuple)
        return logits_1CV[0]


def run_layers(
    checkpoint: HfCheckpoint,
    batches: Sequence[Batch],
    path: Path,
    dtype: torch.dtype,
    progress: Progress,
) -> LayerOutputs:
    """Run all layers over all batches.

    Args:
        path: names two files in an existing directory, by suffixes of its own, of which one is left.

    Raises:
        CheckpointError: weights that are not finite.
        StageError: activations that are not finite, or no room on the disk.
    """
    skeleton = Skeleton(checkpoint, dtype)
    frame = Frame(skeleton, used_tokens(batches))
    passes = LayerPasses(frame, batches, skeleton.layers_path, ["cpu"], window_name=_WINDOW)
    inputs, outputs = (
        _states(checkpoint, batches, path.with_suffix(suffix), dtype)
        for suffix in (".inputs", ".outputs")
    )
    fill_embedded(inputs, frame, batches, window_name=_WINDOW)
    outputs.create()
    progress.start(skeleton.num_layers, "layers")
    with torch.no_grad():
        for layer in range(skeleton.num_layers):
            mini = skeleton.mini(layer)
            block = layer_of(mini, skeleton.layers_path)
            simulate_inputs(block, checkpoint.reader, skeleton.layer_prefix(layer))
            passes.outputs(mini, layer, inputs, outputs)
            inputs, outputs = outputs, inputs
            progress.advance()
    outputs.path.unlink()
    return LayerOutputs(checkpoint, batches, inputs.path, dtype, returns_tuple=passes.returns_tuple)


def _states(
    checkpoint: HfCheckpoint, batches: Sequence[Batch], path: Path, dtype: torch.dtype
) -> HiddenStates:
    size = checkpoint.shape.hidden_size
    return HiddenStates(path, batches, size, dtype, in_memory=False, room_fix=_ROOM_FIX)
