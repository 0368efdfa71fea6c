"""Names of a model with one decoder layer, and of the same layer in the whole checkpoint."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from pipeline.models import ARCHITECTURES, Architecture, Source


@dataclass(frozen=True)
class LayerNames:
    """Of one decoder layer.

    Attributes:
        inner: prefix in the model in memory, such as "model.layers.0".
        outer: prefix in the checkpoint, such as "model.layers.17".
        template: both, with "{layer}" for the number, as the architecture's table writes it.
        architecture: the table.
    """

    inner: str
    outer: str
    template: str
    architecture: Architecture

    def source(self, suffix: str) -> Source | None:
        """The first weight that the table makes of this module of the layer; None: of none."""
        wanted = f"{self.template}.{suffix}"
        for rule in self.architecture.rules:
            for source in rule.sources:
                if source.name == wanted:
                    return source
        return None


def layer_names(mini: nn.Module, layer: int) -> LayerNames:
    """Find the only decoder layer of `mini`, a transformers causal language model."""
    architecture = ARCHITECTURES[type(mini).__name__]
    lists = [name for name, module in mini.named_modules() if isinstance(module, nn.ModuleList)]
    outermost = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
    assert len(outermost) == 1, outermost
    layers = mini.get_submodule(outermost[0])
    assert isinstance(layers, nn.ModuleList)
    assert len(layers) == 1, f"{len(layers)} decoder layers"
    base = outermost[0]
    return LayerNames(f"{base}.0", f"{base}.{layer}", f"{base}.{{layer}}", architecture)
