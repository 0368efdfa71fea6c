"""What a network is: sizes and features of one rank, free of the names of architectures.

Sizes are those of the whole model; properties that start with `rank_` are this rank's share of them, by
the rules of `pipeline.parallel`.
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cached_property

from pipeline.models.decoder import PRE_NORM, Activation, MlpForm, Norm, Residual
from pipeline.network.rope import Rotary
from pipeline.parallel import Axis, Dim, Extent, Mapping, experts_of_rank, layers_of_stage, part
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
        vocab_size: tokens; further rows of lm_head are padding.
        format: how linears are stored; in a mixed one, exceptions by their names in TensorRT-LLM, which
            counts layers from the first of a stage.
        excluded_modules: fnmatch patterns of modules that stay float16; layers are counted alike.
        shared_embedding: lm_head uses the embedding table when it has no weight of its own.
        mapping: of the rank.
        cut_embedding: tables of tokens and positions are cut by rows over the tensor-parallel ranks;
            otherwise each of them has the whole.
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
    mapping: Mapping
    cut_embedding: bool

    @cached_property
    def rank_layers(self) -> range:
        """The rank's layers by their numbers in the model. Everything else counts from its first."""
        return layers_of_stage(self.num_layers, self.mapping.pp, self.mapping.pp_rank)

    @property
    def num_rank_layers(self) -> int:
        """How many they are."""
        return len(self.rank_layers)

    @property
    def has_embedding(self) -> bool:
        """Whether the rank starts from token ids, not from the hidden states of another stage."""
        return self.mapping.pp_rank == 0

    @property
    def has_head(self) -> bool:
        """Whether it ends with logits, not with hidden states for another stage."""
        return self.mapping.pp_rank == self.mapping.pp - 1

    @property
    def rank_heads(self) -> int:
        """Query heads."""
        return self._share(Axis.Q, self.num_heads)

    @property
    def rank_kv_heads(self) -> int:
        """Key/value heads; one that other ranks have, too, where there are more ranks than heads."""
        return self._share(Axis.KV, self.num_kv_heads)

    @property
    def rank_intermediate_size(self) -> int:
        """Channels of the feed-forward network, or of each expert."""
        axis = Axis.FFN if self.features.experts is None else Axis.EXPERT_FFN
        return self._share(axis, self.intermediate_size)

    @property
    def rank_experts(self) -> range:
        """The rank's experts by their numbers in the model; empty without a mixture."""
        experts = self.features.experts
        return range(0) if experts is None else experts_of_rank(experts.num_experts, self.mapping)

    def table_rows(self, axis: Axis, *, cut: bool) -> int:
        """Rows that the rank needs of a table of VOCAB or POSITION, `cut` over the ranks or whole."""
        sizes = {Axis.VOCAB: self.vocab_size, Axis.POSITION: self.max_position_embeddings}
        return self._share(axis, sizes[axis]) if cut else sizes[axis]

    def _share(self, axis: Axis, units: int) -> int:
        return part(Dim(axis, Extent(units)), self.mapping).size

    def reads_positions(self, cache_length: int) -> bool:
        """Whether anything in the rank's graph depends on the position of a token."""
        features = self.features
        return (
            features.rotary is not None
            or (features.learned_positions and self.has_embedding)
            or features.attention_softcap is not None
            or any(self.window_of(layer, cache_length) for layer in range(self.num_rank_layers))
        )

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
        """The window of the rank's layer that a cache of `cache_length` positions can reach beyond."""
        windows = self.features.windows
        size = windows[self.rank_layers[layer] % len(windows)] if windows else cache_length
        return size if size < cache_length else None

    def masked_attentions(self, cache_length: int) -> list[bool]:
        """For each Attention of the graph, whether it has a mask of its own.

        Empty with a soft cap: then attention is made of single operations.
        """
        if self.features.attention_softcap is not None:
            return []
        layers = range(self.num_rank_layers)
        return [self.window_of(layer, cache_length) is not None for layer in layers]
