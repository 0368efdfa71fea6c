"""What a network is: sizes and features of one rank, free of the names of architectures."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto
from fnmatch import fnmatch

from pipeline.network.rope import Rotary


class Norm(Enum):
    """What normalizes the residual stream; both work along the last axis."""

    RMS = auto()  # weight only
    LAYER = auto()  # subtracts the mean; weight and bias


class Activation(Enum):
    """The nonlinearity of the feed-forward network."""

    SILU = auto()
    GELU = auto()  # exact, by the error function
    GELU_TANH = auto()


class MlpForm(Enum):
    """How `fc`, `gate` and `proj` make a feed-forward network."""

    GATED = auto()  # proj(act(fc x) * gate x)
    FUSED = auto()  # fc holds [linear rows; activated rows]: proj(act(second half) * first half)
    PLAIN = auto()  # proj(act(fc x))


@dataclass(frozen=True)
class Residual:
    """Where a layer normalizes, and what its feed-forward network reads.

    Attributes:
        parallel: attention and feed-forward network both read the layer's input and are added to it
            together; otherwise the feed-forward network reads what attention left.
        before_attention, before_mlp: names of norms; the same name twice is one norm for both.
        after_attention, after_mlp: norms of a branch before it is added; None: there is none.
    """

    parallel: bool
    before_attention: str
    before_mlp: str
    after_attention: str | None = None
    after_mlp: str | None = None

    @property
    def norms(self) -> tuple[str, ...]:
        """Every norm once, in the order of execution."""
        names = (self.before_attention, self.after_attention, self.before_mlp, self.after_mlp)
        return tuple(dict.fromkeys(name for name in names if name is not None))


PRE_NORM = Residual(False, "input_layernorm", "post_layernorm")


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
        quant_algo: None (all linears float16), "W4A16_AWQ" or, with zero points, "W4A16_GPTQ".
        group_size: consecutive input channels that share one int4 scale.
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
    quant_algo: str | None
    group_size: int
    excluded_modules: tuple[str, ...]
    shared_embedding: bool
    features: Features

    @property
    def asymmetric(self) -> bool:
        """Whether int4 linears have zero points."""
        return self.quant_algo == "W4A16_GPTQ"

    def is_quantized(self, module: str) -> bool:
        """Whether the linear `module` (full TensorRT-LLM name) is stored as int4."""
        if self.quant_algo is None:
            return False
        return not any(fnmatch(module, pattern) for pattern in self.excluded_modules)

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
