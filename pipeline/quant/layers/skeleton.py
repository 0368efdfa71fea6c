"""A checkpoint as small transformers models: each one decoder layer, its weights, nothing else of size.

Shape suffixes: N output features, K input features.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.modeling_utils import no_init_weights
from transformers.pytorch_utils import Conv1D

from pipeline.checkpoint.check import ignored_names, shadowed_names
from pipeline.checkpoint.source import HfCheckpoint
from pipeline.checkpoint.tensor_reader import TensorReader
from pipeline.errors import CheckpointError, Problem
from pipeline.models import ARCHITECTURES, Scope
from pipeline.quant.dequantized import dequantized
from pipeline.quant.source import model_config

MINI_VOCABULARY = 64
"""Rows of a mini's embedding and head, which nobody uses."""

_LAYER = "{layer}"


class Skeleton:
    """Knows the structure of a checkpoint's model and makes parts of it, weights included.

    Attributes:
        checkpoint: what it is made from; plain or quantized.
        dtype: of every module it makes.
        layers_path: the module list of the decoder layers, e.g. "model.layers".
        num_layers: decoder layers.
    """

    def __init__(self, checkpoint: HfCheckpoint, dtype: torch.dtype) -> None:
        self.checkpoint = checkpoint
        self.dtype = dtype
        self.config: Any = model_config(checkpoint)
        shape = checkpoint.shape
        rules = ARCHITECTURES[shape.architecture].rules_for(shape, Scope.LAYER)
        paths = {rule.sources[0].name.partition(f".{_LAYER}.")[0] for rule in rules}
        assert len(paths) == 1, paths
        self.layers_path = paths.pop()
        self.num_layers = shape.num_layers
        self._skipped = ignored_names(shape) | shadowed_names(shape)

    def layer_prefix(self, layer: int) -> str:
        """What the Hugging Face names of a layer's tensors begin with."""
        return f"{self.layers_path}.{layer}."

    def layer_tensors(self, layer: int) -> list[str]:
        """Names of the layer's tensors in the checkpoint, those left out on purpose not included."""
        prefix = self.layer_prefix(layer)
        names = self.checkpoint.reader.tensors
        return [name for name in names if name.startswith(prefix) and name not in self._skipped]

    def outer_tensors(self) -> list[str]:
        """Names of the tensors that belong to no layer: embeddings, final norm, head."""
        prefix = f"{self.layers_path}."
        names = self.checkpoint.reader.tensors
        return [n for n in names if not n.startswith(prefix) and n not in self._skipped]

    def attention_type(self, layer: int) -> str | None:
        """What transformers calls the layer's attention; None where all layers are alike."""
        types: list[str] | None = getattr(self.config, "layer_types", None)
        return types[layer] if types else None

    def mini(self, layer: int) -> nn.Module:
        """The architecture's ForCausalLM in eval mode with one decoder layer: that layer.

        The vocabulary is tiny and its embeddings are zeros. Conv1D modules (GPT-2) are Linear ones.

        Raises:
            CheckpointError: weights of the layer that are not finite, each by name.
        """
        is_plain = self.checkpoint.format.quant_algo is None
        return self._filled(self.checkpoint.reader, layer, conv1d=is_plain)

    def mini_from(self, packed: TensorReader, layer: int) -> nn.Module:
        """The same with the tensors of a packed layer; quantized ones are dequantized."""
        return self._filled(packed, layer, conv1d=False)

    def _filled(self, reader: TensorReader, layer: int, *, conv1d: bool) -> nn.Module:
        """`conv1d`: weights of such modules are stored as [in, out]. In a quantized checkpoint none is,
        those left plain included."""
        model: nn.Module = self._empty(self.attention_type(layer), MINI_VOCABULARY)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if not name.startswith(self.layers_path):
                    parameter.zero_()
        block = layer_of(model, self.layers_path)
        transposed = _linears_for_conv1d(block)
        problems = []
        for name in [name for name, _ in block.named_parameters()]:
            full = self.layer_prefix(layer) + name
            values = _tensor(reader, full, self.dtype)
            if not torch.isfinite(values).all():
                problems.append(Problem(full, "holds values that are not finite", fix=_NAN_FIX))
            if conv1d and name in transposed:
                values = values.t().contiguous()
            _put(block, name, values)
        if problems:
            raise CheckpointError(problems)
        return model

    def layer_digest(self, layer: int) -> str:
        """sha256 of names, dtypes, shapes and bytes of the layer's tensors, as lower-case hex."""
        return self._digest(self.layer_tensors(layer))

    def outer_digest(self) -> str:
        """The same of the tensors that belong to no layer."""
        return self._digest(self.outer_tensors())

    def _digest(self, names: list[str]) -> str:
        digest = hashlib.sha256()
        reader = self.checkpoint.reader
        for name in sorted(names):
            info = reader.tensors[name]
            digest.update(f"{name}:{info.dtype}:{info.shape}\n".encode())
            for _, rows in reader.row_blocks(name):
                digest.update(np.ascontiguousarray(rows).reshape(-1).view(np.uint8).data)
        return digest.hexdigest()

    def outside(self, num_tokens: int) -> Any:
        """The model without decoder layers: an empty module list in their place, nothing loaded.

        Args:
            num_tokens: rows of the embedding.
        """
        model: Any = self._empty(self.attention_type(0), num_tokens)
        types = getattr(self.config, "layer_types", None)
        if types:  # so that the masks of all types are made
            model.config.layer_types = list(dict.fromkeys(types))
            model.base_model.has_sliding_layers = "sliding_attention" in types
        self.set_layers(model, [])
        return model

    def set_layers(self, model: nn.Module, layers: list[nn.Module]) -> None:
        """Put other modules where the decoder layers are."""
        parent, _, name = self.layers_path.rpartition(".")
        setattr(model.get_submodule(parent), name, nn.ModuleList(layers))

    def _empty(self, attention_type: str | None, vocab_size: int) -> Any:
        config = copy.deepcopy(self.config)
        config.num_hidden_layers = 1
        config.vocab_size = vocab_size
        config.pad_token_id = None  # may lie outside the small vocabulary; nothing is padded here
        if attention_type is not None:
            config.layer_types = [attention_type]
        config.architectures = [self.checkpoint.shape.architecture]
        with no_init_weights():  # pages that nobody writes take no memory
            model: Any = AutoModelForCausalLM.from_config(config, dtype=self.dtype)
        model.tie_weights()
        return model.eval().requires_grad_(False)


_NAN_FIX = "get the weights again, or repair the checkpoint"


def layer_of(model: nn.Module, layers_path: str) -> nn.Module:
    """The one decoder layer of a mini."""
    return model.get_submodule(f"{layers_path}.0")


def load_into(model: nn.Module, reader: TensorReader, name: str, dtype: torch.dtype) -> None:
    """Give a module of a model its tensor of the same name."""
    _put(model, name, _tensor(reader, name, dtype))


def _put(module: nn.Module, name: str, values: torch.Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    old = getattr(owner, leaf)
    assert old.shape == values.shape, (name, old.shape, values.shape)
    setattr(owner, leaf, nn.Parameter(values, requires_grad=False))


def _tensor(reader: TensorReader, name: str, dtype: torch.dtype) -> torch.Tensor:
    """A weight that shares memory with what was read, if it has the dtype already."""
    values = dequantized(reader, name) if _is_quantized(reader, name) else reader.read(name)
    return as_torch(values).to(dtype)


def _is_quantized(reader: TensorReader, name: str) -> bool:
    module, _, leaf = name.rpartition(".")
    return leaf == "weight" and f"{module}.weight_scale" in reader.tensors


def as_torch(values: NDArray[Any]) -> torch.Tensor:
    """The same memory as a tensor; bfloat16 of ml_dtypes, too, which torch does not know."""
    if not values.flags.writeable:  # mapped
        values = values.copy()
    if values.dtype.name == "bfloat16":
        return torch.from_numpy(values.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(values)


def _linears_for_conv1d(block: nn.Module) -> set[str]:
    """Replace GPT-2's Conv1D modules; returns the names of their weights."""
    names = set()
    for name, module in list(_conv1d_modules(block)):
        num_inputs, num_outputs = module.weight.shape
        linear = nn.Linear(num_inputs, num_outputs, device="meta", dtype=module.weight.dtype)
        parent, _, leaf = name.rpartition(".")
        setattr(block.get_submodule(parent), leaf, linear.requires_grad_(False))
        names.add(f"{name}.weight")
    return names


def _conv1d_modules(block: nn.Module) -> Iterator[tuple[str, Conv1D]]:
    for name, module in block.named_modules():
        if isinstance(module, Conv1D):
            yield name, module
