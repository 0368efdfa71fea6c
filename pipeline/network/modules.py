"""Names and shapes of the modules of one rank, as TensorRT-LLM names them.

Shapes: N output features, K input features, E experts, H hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from pipeline.models.decoder import MlpForm, Norm
from pipeline.network.spec import NetworkSpec
from pipeline.quant.formats import QuantFormat

EMBEDDING = "transformer.vocab_embedding.weight"
POSITIONS = "transformer.position_embedding.weight"
EMBEDDING_SUM = "embedding"
"""What the ranks sum that have parts of these tables."""
FINAL_NORM = "transformer.ln_f"
HEAD = "lm_head"
SCALE = "weights_scaling_factor"
ZERO_POINT = "weights_zero_point"
PRE_QUANT_SCALE = "prequant_scaling_factor"
ACTIVATION_SCALE = "activation_scaling_factor"

Tensors = dict[str, tuple[str, tuple[int, ...]]]
"""Tensor name -> (safetensors dtype, shape)."""


@dataclass(frozen=True)
class NormModule:
    """A norm over `size` channels."""

    module: str
    size: int
    kind: Norm

    @property
    def weight(self) -> str:
        """Name of the scale."""
        return f"{self.module}.weight"

    @property
    def bias(self) -> str | None:
        """Name of the shift, if this kind of norm has one."""
        return f"{self.module}.bias" if self.kind is Norm.LAYER else None

    @property
    def vectors(self) -> tuple[str, ...]:
        """Names of everything it must have, each F16 [size]."""
        return (self.weight,) if self.bias is None else (self.weight, self.bias)


@dataclass(frozen=True)
class Linear:
    """A linear of the checkpoint: weight [N, K], stored as its format says.

    Attributes:
        module: name in the network.
        source: module whose tensors hold it; differs from `module` for one expert of a stack.
        expert: its row in the rank's stack of `num_experts`; None: the tensors are its own.
        summed: each rank has some of its inputs; the ranks' products are added before the bias is.
        biasable: it may have a bias even where it need not.
    """

    module: str
    source: str
    num_outputs: int
    num_inputs: int
    format: QuantFormat
    biased: bool = False
    expert: int | None = None
    num_experts: int = 0
    summed: bool = False
    biasable: bool = True

    @property
    def quantized(self) -> bool:
        """Whether it is stored as anything else than float16."""
        return self.format.quant_algo is not None

    @property
    def asymmetric(self) -> bool:
        """Whether it has zero points."""
        return self.format.has_zero_point

    def required(self) -> Tensors:
        """Everything this linear must have."""
        tensors = dict(self._stored(required=True))
        if self.biased:
            tensors |= self._bias()
        return tensors

    def optional(self) -> Tensors:
        """The same for what it may have."""
        bias = self._bias() if self.biasable else {}
        return bias | dict(self._stored(required=False))

    def is_stacked(self, tensor: str) -> bool:
        """Whether its tensor of this name, such as "weight", holds those of other experts, too."""
        shared = [stored.target for stored in self.format.tensors if not stored.per_expert]
        return self.expert is not None and tensor not in shared

    def division_problems(self) -> Iterator[str]:
        """Sizes that the format cannot divide."""
        sizes = (self.num_outputs, self.num_inputs)
        for stored in self.format.tensors:
            for dim in stored.dims or ():
                size, divisor = sizes[dim.parent], self.format.divisor(dim)
                if size % divisor:
                    ends = ("outputs", "inputs")[dim.parent]
                    yield f"{size} {ends} are not a multiple of {divisor}, as {self.format.name} needs"

    def _stored(self, *, required: bool) -> Iterator[tuple[str, tuple[str, tuple[int, ...]]]]:
        sizes = (self.num_outputs, self.num_inputs)
        for stored in self.format.tensors:
            if (stored.fill is None) != required:
                continue
            shape: tuple[int, ...] = sizes
            if stored.dims is not None:
                shape = tuple(sizes[dim.parent] // self.format.divisor(dim) for dim in stored.dims)
            yield self._named(stored.target, stored.target_dtype, shape or (1,))

    def _bias(self) -> Tensors:
        return dict([self._named("bias", "F16", (self.num_outputs,))])

    def _named(
        self, tensor: str, dtype: str, shape: tuple[int, ...]
    ) -> tuple[str, tuple[str, tuple[int, ...]]]:
        stack = (self.num_experts,) if self.is_stacked(tensor) else ()
        return f"{self.source}.{tensor}", (dtype, (*stack, *shape))


@dataclass(frozen=True)
class MlpModules:
    """A feed-forward network. `fc` passes the activation (HF gate_proj); see MlpForm for `gate`."""

    fc: Linear
    gate: Linear | None
    proj: Linear

    @property
    def linears(self) -> tuple[Linear, ...]:
        """In the order of execution."""
        return (self.fc, self.proj) if self.gate is None else (self.fc, self.gate, self.proj)


@dataclass(frozen=True)
class LayerModules:
    """One decoder layer.

    Attributes:
        norms: by the names that the Residual uses.
        query_norm, key_norm: of each head.
        router: name of the float32 [E, H] matrix that rates experts.
        mlps: one, or one per expert.
    """

    norms: dict[str, NormModule]
    qkv: Linear
    dense: Linear
    query_norm: NormModule | None
    key_norm: NormModule | None
    router: str | None
    mlps: tuple[MlpModules, ...]

    @property
    def all_norms(self) -> tuple[NormModule, ...]:
        """Every norm of the layer."""
        heads = (norm for norm in (self.query_norm, self.key_norm) if norm is not None)
        return (*self.norms.values(), *heads)

    @property
    def linears(self) -> tuple[Linear, ...]:
        """In the order of execution."""
        return (self.qkv, self.dense, *(linear for mlp in self.mlps for linear in mlp.linears))


def layer_modules(spec: NetworkSpec, layer: int) -> LayerModules:
    """The modules of decoder layer `layer`, counted within the rank."""
    prefix = f"transformer.layers.{layer}"
    features, biases = spec.features, spec.features.biases
    heads_width = spec.rank_heads * spec.head_size
    qkv_width = heads_width + 2 * spec.rank_kv_heads * spec.head_size

    def linear(
        name: str, num_outputs: int, num_inputs: int, biased: bool, summed: bool = False
    ) -> Linear:
        module = f"{prefix}.{name}"
        return Linear(
            module,
            module,
            num_outputs,
            num_inputs,
            spec.format_of(module),
            biased,
            summed=summed,
        )

    def head_norm(name: str) -> NormModule | None:
        module = f"{prefix}.attention.{name}"
        return NormModule(module, spec.head_size, Norm.RMS) if features.qk_norm else None

    return LayerModules(
        norms={
            name: NormModule(f"{prefix}.{name}", spec.hidden_size, features.norm)
            for name in features.residual.norms
        },
        qkv=linear("attention.qkv", qkv_width, spec.hidden_size, biases.qkv),
        dense=linear(
            "attention.dense",
            spec.hidden_size,
            heads_width,
            biases.dense,
            summed=spec.mapping.tp > 1,
        ),
        query_norm=head_norm("q_layernorm"),
        key_norm=head_norm("k_layernorm"),
        router=None if features.experts is None else f"{prefix}.mlp.router.weight",
        mlps=tuple(_mlps(spec, f"{prefix}.mlp")),
    )


def final_norm(spec: NetworkSpec) -> NormModule:
    """The norm before lm_head."""
    return NormModule(FINAL_NORM, spec.hidden_size, spec.features.norm)


def _mlps(spec: NetworkSpec, prefix: str) -> Iterator[MlpModules]:
    features, mapping = spec.features, spec.mapping
    hidden, ffn = spec.hidden_size, spec.rank_intermediate_size
    num_experts = len(spec.rank_experts)

    def linear(name: str, num_outputs: int, num_inputs: int, expert: int | None) -> Linear:
        source = f"{prefix}.{name}"
        row_parallel = name == "proj"
        return Linear(
            module=source if expert is None else f"{prefix}.experts.{expert}.{name}",
            source=source,
            num_outputs=num_outputs,
            num_inputs=num_inputs,
            format=spec.format_of(source),
            biased=features.biases.mlp,
            expert=None if expert is None else expert - spec.rank_experts.start,
            num_experts=num_experts,
            # Experts are added up on the rank first, and then over ranks: no place for a bias.
            summed=row_parallel and mapping.tp > 1 and expert is None,
            biasable=not (row_parallel and mapping.moe_tp > 1 and expert is not None),
        )

    fc_width = 2 * ffn if features.mlp_form is MlpForm.FUSED else ffn
    gated = features.mlp_form is MlpForm.GATED
    experts: tuple[int | None, ...] = tuple(spec.rank_experts) or (None,)
    for expert in experts:
        yield MlpModules(
            fc=linear("fc", fc_width, hidden, expert),
            gate=linear("gate", ffn, hidden, expert) if gated else None,
            proj=linear("proj", hidden, ffn, expert),
        )
