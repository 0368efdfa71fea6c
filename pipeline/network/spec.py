"""What a network is: sizes and features of one rank, free of the names of architectures."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatch

from pipeline.models.decoder import PRE_NORM, Activation, MlpForm, Norm, Residual
from pipeline.network.rope import Rotary
from pipeline.quant.formats import FORMATS, QuantFormat


@dataclass(frozen=True)
class Experts:
    """A mixture of experts: each token goes to the `top_k` that its router rates highest.

    The weights of the chosen are the router's probabilities, divided by their sum.
    """

    num_experts: int
    top_k: int


@dataclass(frozen=True)
class Biases:
    """Linears that must have a bias; every other linear may have one."""

    qkv: bool = False
    dense: bool = False
    mlp: bool = False


@dataclass(frozen=True)
class Features:
    """What sets one kind of decoder apart from another; the defaults are Llama's.

    Attributes:
        qk_norm: query and key heads are normalized (RMS) before they are rotated.
        rotary: None: positions are not rotated.
        learned_positions: a table of positions is added to the embedding.
        embedding_scale: factor of the embedding.
        query_scale: factor of the attention scores; None: 1 / sqrt(head size).
        attention_softcap, logit_softcap: x becomes cap * tanh(x / cap); None: no cap.
        windows: how many last positions a layer attends to, the current one included: one number per
            layer, repeated from the start where there are more layers; empty: everything.
        experts: None: one feed-forward network per layer.
    """

    norm: Norm = Norm.RMS
    residual: Residual = PRE_NORM
    mlp_form: MlpForm = MlpForm.GATED
    activation: Activation = Activation.SILU
    experts: Experts | None = None
    biases: Biases = Biases()
    qk_norm: bool = False
    rotary: Rotary | None = None
    learned_positions: bool = False
    embedding_scale: float = 1.0
    query_scale: float | None = None
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    windows: tuple[int, ...] = ()


@dataclass(frozen=True)
class NetworkSpec:
    """Sizes and options of one rank's network; names as in DESIGN section 9.

    Attributes:
        vocab_size: rows of lm_head that are tokens; further rows are padding and get no logit.
        format: how linears are stored; in a mixed one, exceptions by their names in TensorRT-LLM.
        excluded_modules: fnmatch patterns of modules that stay float16.
        shared_embedding: lm_head uses the embedding table when it has no weight of its own.
    """

    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    intermediate_size: int
    vocab_size: int
    max_position_embeddings: int
    norm_epsilon: float
    format: QuantFormat
    excluded_modules: tuple[str, ...]
    shared_embedding: bool
    features: Features

    def format_of(self, module: str) -> QuantFormat:
        """How the linear `module` (full TensorRT-LLM name) is stored."""
        if any(fnmatch(module, pattern) for pattern in self.excluded_modules):
            return FORMATS["fp16"]
        return self.format.of(module)

    @property
    def query_scale(self) -> float:
        """Factor of the attention scores."""
        scale = self.features.query_scale
        return self.head_size**-0.5 if scale is None else scale

    def window_of(self, layer: int, cache_length: int) -> int | None:
        """The window of a layer that a cache of `cache_length` positions can reach beyond."""
        windows = self.features.windows
        size = windows[layer % len(windows)] if windows else cache_length
        return size if size < cache_length else None

    def masked_attentions(self, cache_length: int) -> list[bool]:
        """For each Attention of the graph, whether it has a mask of its own.

        Empty with a soft cap: then attention is made of single operations.
        """
        if self.features.attention_softcap is not None:
            return []
        return [self.window_of(layer, cache_length) is not None for layer in range(self.num_layers)]
