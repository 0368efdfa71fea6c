"""What the network needs to know of a TensorRT-LLM checkpoint's config.json."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any

from pipeline.errors import CheckpointError, Problem
from pipeline.models.shape import RotaryScaling

# Applied by TensorRT-LLM when exclude_modules is null; a list given replaces them.
DEFAULT_EXCLUDED_MODULES = ("*lm_head", "*vocab_embedding", "*position_embedding")

_SIZES = {
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "intermediate_size": "intermediate_size",
    "vocab_size": "vocab_size",
    "max_position_embeddings": "max_position_embeddings",
}
# May be missing or null; TensorRT-LLM then has a default.
_OPTIONAL_SIZES = ("num_key_value_heads", "head_size")
_OPTIONAL_NUMBERS = ("norm_epsilon", "rotary_base")
_SECTIONS = ("mapping", "quantization", "rotary_scaling")
# Numbers a scaling must have; TensorRT-LLM's reader has defaults for llama3's.
_SCALING_NUMBERS: dict[str, dict[str, float | None]] = {
    "linear": {"factor": None},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}
# Only these values are implemented; a missing field means the first.
_ALLOWED_VALUES: dict[str, tuple[object, ...]] = {
    "architecture": ("LlamaForCausalLM",),
    "dtype": ("float16",),
    "hidden_act": ("silu", "swiglu"),
    "position_embedding_type": ("rope_gpt_neox",),
    "rotary_pct": (1.0,),
    "qk_layernorm": (False,),
    "residual_mlp": (False,),
}
_REQUIRED = ("architecture", "dtype", "hidden_act")
_ALLOWED_QUANTIZATION: dict[str, tuple[object, ...]] = {
    "quant_algo": (None, "W4A16_AWQ"),
    "kv_cache_quant_algo": (None,),
    "has_zero_point": (False,),
}


@dataclass(frozen=True)
class NetworkSpec:
    """Sizes and options of one rank's network; names as in DESIGN section 9.

    Attributes:
        vocab_size: rows of lm_head that are tokens; further rows are padding and get no logit.
        quant_algo: None (all linears float16) or "W4A16_AWQ".
        group_size: consecutive input channels that share one int4 scale.
        excluded_modules: fnmatch patterns of modules that stay float16.
        shared_embedding: lm_head uses the embedding table when it has no weight of its own.
        attention_bias, mlp_bias: every linear of the block must have a bias; where False it may.
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
    rotary_base: float
    rotary_scaling: RotaryScaling | None
    quant_algo: str | None
    group_size: int
    excluded_modules: tuple[str, ...]
    shared_embedding: bool
    attention_bias: bool
    mlp_bias: bool

    def is_quantized(self, module: str) -> bool:
        """Whether the linear `module` (full TensorRT-LLM name) is stored as int4."""
        if self.quant_algo is None:
            return False
        return not any(fnmatch(module, pattern) for pattern in self.excluded_modules)


def read_spec(config: Mapping[str, Any], where: str) -> NetworkSpec:
    """NetworkSpec of a checkpoint's config.json; `where` names the file in errors.

    Raises:
        CheckpointError: every missing field and every value that is not implemented, at once.
    """
    for name in _SECTIONS:
        if not isinstance(config.get(name) or {}, dict):
            raise CheckpointError(Problem(where, f"{name} is {config[name]!r}", "null, a mapping"))
    problems = list(_problems(config, where))
    scaling = _rotary_scaling(config.get("rotary_scaling") or {}, where)
    if isinstance(scaling, Problem):
        problems.append(scaling)
    if problems or isinstance(scaling, Problem):
        raise CheckpointError(problems)
    quantization = config.get("quantization") or {}
    excluded = quantization.get("exclude_modules")
    num_heads = int(config["num_attention_heads"])
    return NetworkSpec(
        **{ours: int(config[theirs]) for ours, theirs in _SIZES.items()},
        num_kv_heads=int(config.get("num_key_value_heads") or num_heads),
        head_size=_head_size(config),
        norm_epsilon=float(config.get("norm_epsilon") or 1e-5),
        rotary_base=float(config.get("rotary_base") or 10000.0),
        rotary_scaling=scaling,
        quant_algo=quantization.get("quant_algo"),
        group_size=int(quantization.get("group_size") or 128),
        excluded_modules=DEFAULT_EXCLUDED_MODULES if excluded is None else tuple(excluded),
        shared_embedding=bool(
            config.get("share_embedding_table") or config.get("tie_word_embeddings")
        ),
        attention_bias=bool(config.get("attn_bias")),
        mlp_bias=bool(config.get("mlp_bias")),
    )


def _rotary_scaling(fields: dict[str, Any], where: str) -> RotaryScaling | Problem | None:
    if not fields:
        return None
    kind = fields.get("rope_type", fields.get("type"))
    if kind in ("none", "default"):
        return None
    if kind not in _SCALING_NUMBERS:
        allowed = ", ".join(("none", *_SCALING_NUMBERS))
        return Problem(where, f"rotary_scaling of type {kind!r}", allowed)
    numbers: dict[str, Any] = {
        name: fields.get(name, usual) for name, usual in _SCALING_NUMBERS[kind].items()
    }
    wrong = {name: number for name, number in numbers.items() if not _is_positive(number)}
    if wrong:
        return Problem(where, f"rotary_scaling {wrong}", "numbers above 0")
    return RotaryScaling(kind, **numbers)


def _head_size(config: Mapping[str, Any]) -> int:
    default = int(config["hidden_size"]) // int(config["num_attention_heads"])
    return int(config.get("head_size") or default)


def _problems(config: Mapping[str, Any], where: str) -> Iterator[Problem]:
    number_problems = list(_number_problems(config, where))
    yield from number_problems
    for name in _REQUIRED:
        if name not in config:
            yield Problem(where, f"{name} is missing", _listed(_ALLOWED_VALUES[name]))
    yield from _value_problems(config, _ALLOWED_VALUES, where)
    quantization = config.get("quantization") or {}
    yield from _value_problems(quantization, _ALLOWED_QUANTIZATION, f"{where}: quantization")
    world_size = (config.get("mapping") or {}).get("world_size", 1)
    if world_size != 1:
        yield Problem(
            where, f"mapping.world_size is {world_size}", "1: tp and pp are not built yet"
        )
    if not number_problems:
        yield from _head_problems(config, where)


def _number_problems(config: Mapping[str, Any], where: str) -> Iterator[Problem]:
    sizes = {name: config.get(name) for name in _SIZES.values()}
    sizes |= {name: config[name] for name in _OPTIONAL_SIZES if config.get(name) is not None}
    group_size = (config.get("quantization") or {}).get("group_size")
    if group_size is not None:
        sizes["quantization.group_size"] = group_size
    for name, size in sizes.items():
        if not _is_size(size):
            yield Problem(where, f"{name} is {size!r}", "an integer, 1 or more")
    for name in _OPTIONAL_NUMBERS:
        if config.get(name) is not None and not _is_positive(config[name]):
            yield Problem(where, f"{name} is {config[name]!r}", "a number above 0")


def _head_problems(config: Mapping[str, Any], where: str) -> Iterator[Problem]:
    num_heads = int(config["num_attention_heads"])
    num_kv_heads = int(config.get("num_key_value_heads") or num_heads)
    if num_heads % num_kv_heads:
        yield Problem(
            where,
            f"num_attention_heads {num_heads} is not a multiple of num_key_value_heads "
            f"{num_kv_heads}",
        )
    if _head_size(config) % 2:
        yield Problem(where, f"head_size is {_head_size(config)}", "an even number")


def _value_problems(
    config: Mapping[str, Any], allowed: Mapping[str, tuple[object, ...]], where: str
) -> Iterator[Problem]:
    for name, values in allowed.items():
        if name in config and config[name] not in values:
            yield Problem(where, f"{name} is {config[name]!r}", _listed(values))


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_positive(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0


def _listed(values: tuple[object, ...]) -> str:
    return ", ".join("null" if value is None else str(value) for value in values)
