"""What lies around the decoder layers, run by transformers' own code: embeddings, masks, head.

In the model without layers, one recorder stands where they were. It notes with what a layer is
called, which depends on the lengths of a batch and on the kind of attention only, or it hands on
hidden states that were computed elsewhere, so that the model's own code ends with logits.

Shape suffixes: B windows of one batch, T tokens of one window, H hidden size, U used tokens,
V vocabulary.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.utils import _pytree

from pipeline.quant.layers.batches import Batch
from pipeline.quant.layers.skeleton import Skeleton, as_torch, load_into

MAX_REMEMBERED_CALLS = 4
"""Of the last batch shapes; masks of sliding windows are [B, 1, T, T]."""


@dataclass(frozen=True)
class LayerCall:
    """How the model calls a decoder layer, beside the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def to(self, device: str) -> LayerCall:
        """With its tensors on another device."""
        args, kwargs = _pytree.tree_map_only(
            torch.Tensor, lambda tensor: tensor.to(device), (self.args, self.kwargs)
        )
        return LayerCall(args, kwargs)


class _ReachedLayerError(Exception):
    """Ends a forward pass at the first layer."""


class _Recorder(nn.Module):
    """Stands for all decoder layers."""

    def __init__(self) -> None:
        super().__init__()
        self.attention_type: str | None = None
        self.hidden_BTH: torch.Tensor | None = None
        self.call: LayerCall | None = None
        self.output_BTH: torch.Tensor | None = None
        self.returns_tuple = False

    def forward(self, hidden_BTH: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.output_BTH is not None:
            return (self.output_BTH,) if self.returns_tuple else self.output_BTH
        self.hidden_BTH, self.call = hidden_BTH, LayerCall(args, kwargs)
        raise _ReachedLayerError


class Frame:
    """Embeddings and layer calls of a checkpoint, or its head."""

    def __init__(self, skeleton: Skeleton, tokens_U: NDArray[np.int64] | None) -> None:
        """Reads what lies outside the layers.

        Args:
            tokens_U: sorted token ids; only their rows of the embedding are kept. None: the head
                instead, for `logits`; nothing can be embedded.
        """
        self._skeleton = skeleton
        self._tokens_U = tokens_U
        num_rows = skeleton.checkpoint.shape.vocab_size if tokens_U is None else len(tokens_U)
        self._model: Any = skeleton.outside(num_rows)
        self._recorder = _Recorder()
        skeleton.set_layers(self._model, [self._recorder])
        self._calls: OrderedDict[tuple[int, int, str | None], LayerCall] = OrderedDict()
        self._load()

    def _load(self) -> None:
        reader, dtype = self._skeleton.checkpoint.reader, self._skeleton.dtype
        embedding = self._model.get_input_embeddings()
        head = self._model.get_output_embeddings()
        for name, parameter in list(self._model.named_parameters()):
            if parameter is embedding.weight:
                if self._tokens_U is None and parameter is not head.weight:
                    continue  # only the head is wanted; pages that nobody writes take no memory
                rows = self._embedding_rows(name)
                embedding.weight = nn.Parameter(rows.to(dtype), requires_grad=False)
                if parameter is head.weight:  # tied
                    head.weight = embedding.weight
            elif self._tokens_U is None or not (head is not None and parameter is head.weight):
                load_into(self._model, reader, name, dtype)

    def _embedding_rows(self, name: str) -> torch.Tensor:
        reader = self._skeleton.checkpoint.reader
        if self._tokens_U is None:
            return as_torch(reader.read(name))
        pieces = []
        for first, rows in reader.row_blocks(name):
            start, stop = np.searchsorted(self._tokens_U, [first, first + len(rows)])
            pieces.append(rows[self._tokens_U[start:stop] - first])
        return as_torch(np.concatenate(pieces))

    def embed(self, batch: Batch) -> torch.Tensor:
        """Inputs [B, T, H] of the first layer."""
        assert self._tokens_U is not None
        rows_BT = torch.from_numpy(np.searchsorted(self._tokens_U, batch.tokens_BT))
        self._run(self._skeleton.attention_type(0), input_ids=rows_BT)
        hidden_BTH = self._recorder.hidden_BTH
        assert hidden_BTH is not None
        return hidden_BTH

    def call(self, batch: Batch, layer: int) -> LayerCall:
        """With what the model calls a layer for a batch of this shape."""
        attention_type = self._skeleton.attention_type(layer)
        num_windows, num_tokens = batch.tokens_BT.shape
        key = (num_windows, num_tokens, attention_type)
        if key not in self._calls:
            size = (num_windows, num_tokens, self._skeleton.checkpoint.shape.hidden_size)
            self._run(attention_type, inputs_embeds=torch.zeros(size, dtype=self._skeleton.dtype))
            assert self._recorder.call is not None
            self._calls[key] = self._recorder.call
            if len(self._calls) > MAX_REMEMBERED_CALLS:
                self._calls.popitem(last=False)
        self._calls.move_to_end(key)
        return self._calls[key]

    def logits(self, hidden_BTH: torch.Tensor, *, returns_tuple: bool) -> torch.Tensor:
        """Logits [B, T, V] of the last layer's output: the model's own norm, head and caps.

        Args:
            returns_tuple: whether the model's layers return one.
        """
        assert self._tokens_U is None, "made without the head"
        self._recorder.attention_type = self._skeleton.attention_type(0)
        self._recorder.output_BTH, self._recorder.returns_tuple = hidden_BTH, returns_tuple
        try:
            with torch.no_grad():
                logits: torch.Tensor = self._model(
                    inputs_embeds=torch.zeros_like(hidden_BTH), use_cache=False
                ).logits
        finally:
            self._recorder.output_BTH = None
        return logits

    def _run(self, attention_type: str | None, **inputs: torch.Tensor) -> None:
        self._recorder.attention_type = attention_type
        try:
            with torch.no_grad():
                self._model.base_model(**inputs, use_cache=False)
        except _ReachedLayerError:
            return
        raise AssertionError("the model did not reach its layers")
