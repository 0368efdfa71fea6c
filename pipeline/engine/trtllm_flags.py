"""trtllm-build's command line from the YAML, and which flags go together.

The rules are those of TensorRT-LLM 1.2: commands/build.py, builder.py, plugin/plugin.py of its package.
Where it would silently change a flag, a flag that the YAML sets is a problem here, and one that it
leaves out is decided the same way.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from pipeline.build_config import BuildConfig
from pipeline.errors import Problem
from pipeline.quant.formats import KvCache
from pipeline.tensorrt_llm_config import UPSTREAM_MAX_NUM_TOKENS, TensorRtLlmConfig

_BUILD, _BUILDER, _PLUGIN = "commands/build.py", "builder.py", "plugin.py"
_FUSED_MLP_FORMATS = ("fp16", "fp8", "mixed")
_REDUCE_FUSION = ("LlamaForCausalLM", "Gemma2ForCausalLM")
_FP8_PLUGINS = ("gemm_swiglu_plugin", "low_latency_gemm_plugin", "low_latency_gemm_swiglu_plugin")
_MANY_TOKENS = 16384
_NO_SM100 = 100
_FP8_SM = 89


@dataclass(frozen=True)
class BuildSubject:
    """What is built, as far as flags depend on it.

    Attributes:
        build: sizes and flags.
        sm: compute capability times ten of the target.
        format: a name of FORMATS, as quant_algo says it: `mixed` where linears differ.
        parts: the formats that occur.
        world_size: ranks.
        tp: of these, how many share a layer.
        architecture: as config.json has it.
    """

    build: BuildConfig
    sm: int
    format: str
    parts: tuple[str, ...]
    kv_cache: KvCache
    tp: int
    world_size: int
    architecture: str

    @property
    def flags(self) -> TensorRtLlmConfig:
        """The section `build.tensorrt_llm`."""
        return self.build.tensorrt_llm

    @property
    def all_tokens(self) -> int:
        """Tokens that all rows can have."""
        return self.build.max_batch_size * self.build.max_seq_len

    @property
    def max_num_tokens(self) -> int:
        """The flag, or its default within the cap."""
        return self.flags.max_num_tokens or min(UPSTREAM_MAX_NUM_TOKENS, self.all_tokens)

    @property
    def can_fuse_mlp(self) -> bool:
        """Whether both branches of a gated MLP can become one product."""
        return self.format in _FUSED_MLP_FORMATS

    @property
    def fp8_context_fmha(self) -> bool:
        """The flag, or its default."""
        if self.flags.use_fp8_context_fmha is not None:
            return self.flags.use_fp8_context_fmha
        return "fp8" in self.parts and self.sm >= _FP8_SM

    @property
    def paged_context_fmha(self) -> bool:
        """The flag, or on wherever nothing forbids it."""
        if self.flags.use_paged_context_fmha is not None:
            return self.flags.use_paged_context_fmha
        return _paged_context_obstacle(self) is None


def build_arguments(subject: BuildSubject) -> list[str]:
    """Every flag but --checkpoint_dir, --output_dir, --workers and the timing caches.

    The subject must have no `flag_problems`.
    """
    build, flags = subject.build, subject.flags
    values: dict[str, object] = {
        "max_batch_size": build.max_batch_size,
        "max_input_len": build.max_input_len,
        "max_seq_len": build.max_seq_len,
        "max_num_tokens": subject.max_num_tokens,
        "opt_num_tokens": flags.opt_num_tokens,
        "max_beam_width": flags.max_beam_width,
        "kv_cache_type": flags.kv_cache_type,
        "tokens_per_block": flags.tokens_per_block,
        "gpt_attention_plugin": flags.gpt_attention_plugin,
        "gemm_plugin": flags.gemm_plugin,
        "gemm_swiglu_plugin": flags.gemm_swiglu_plugin,
        "low_latency_gemm_plugin": flags.low_latency_gemm_plugin,
        "low_latency_gemm_swiglu_plugin": flags.low_latency_gemm_swiglu_plugin,
        "moe_plugin": flags.moe_plugin,
        "logits_dtype": flags.logits_dtype,
        "profiling_verbosity": flags.profiling_verbosity,
        "log_level": flags.log_level,
    }
    words = {
        "context_fmha": flags.context_fmha,
        "use_paged_context_fmha": subject.paged_context_fmha,
        "use_fp8_context_fmha": subject.fp8_context_fmha,
        "remove_input_padding": flags.remove_input_padding,
        "use_fused_mlp": subject.can_fuse_mlp
        if flags.use_fused_mlp is None
        else flags.use_fused_mlp,
        "multiple_profiles": flags.multiple_profiles,
        "reduce_fusion": flags.reduce_fusion,
        "user_buffer": flags.user_buffer,
        "pp_reduce_scatter": flags.pp_reduce_scatter,
        "streamingllm": flags.streamingllm,
    }
    switches = {
        "gather_context_logits": flags.gather_context_logits,
        "gather_generation_logits": flags.gather_generation_logits,
        "strip_plan": flags.strip_plan,
        "fast_build": flags.fast_build,
        "weight_streaming": flags.weight_streaming,
        "weight_sparsity": flags.weight_sparsity,
        "monitor_memory": flags.monitor_memory,
    }
    arguments = [
        text
        for name, value in values.items()
        if value is not None
        for text in (f"--{name}", str(value))
    ]
    for name, is_on in words.items():
        arguments += [f"--{name}", "enable" if is_on else "disable"]
    return arguments + [f"--{name}" for name, is_on in switches.items() if is_on]


def flag_problems(subject: BuildSubject) -> Iterator[Problem]:
    """What trtllm-build would refuse or silently change; `where` is the flag's name."""
    yield from _token_problems(subject)
    yield from _attention_problems(subject)
    yield from _product_problems(subject)
    yield from _communication_problems(subject)


def flag_notes(subject: BuildSubject) -> Iterator[str]:
    """What is legal, and may surprise."""
    flags = subject.flags
    if subject.max_num_tokens > _MANY_TOKENS:
        yield (
            f"max_num_tokens {subject.max_num_tokens}: above {_MANY_TOKENS} trtllm-build warns; memory "
            "of activations grows with it"
        )
    missing = [
        name
        for name, is_missing in (
            ("kv_cache_type: paged", flags.kv_cache_type != "paged"),
            ("remove_input_padding", not flags.remove_input_padding),
            ("gpt_attention_plugin", flags.gpt_attention_plugin == "disable"),
        )
        if is_missing
    ]
    if missing:
        yield f"no in-flight batching: it needs {', '.join(missing)}"
    if not subject.paged_context_fmha:
        reason = _paged_context_obstacle(subject) or "the YAML says so"
        yield f"no chunked prompts and no reuse of the KV cache: paged context FMHA is off ({reason})"
    if flags.weight_streaming and any(fmt.startswith(("int4", "w4a8")) for fmt in subject.parts):
        yield "weight_streaming: int4 weights belong to a plugin and stay on the GPU"
    if flags.gather_generation_logits:
        yield "gather_generation_logits is deprecated in TensorRT-LLM 1.2"
    if flags.strip_plan:
        yield "strip_plan: trtllm-refit must add the checkpoint's weights before the engine runs"


def _token_problems(subject: BuildSubject) -> Iterator[Problem]:
    build, flags = subject.build, subject.flags
    given, opt = flags.max_num_tokens, flags.opt_num_tokens
    if given is not None and given > subject.all_tokens:
        what = f"{given} is more than max_batch_size rows of max_seq_len tokens have"
        yield Problem("max_num_tokens", _said(what, _BUILDER), f"at most {subject.all_tokens}")
    least: int = flags.tokens_per_block
    name = "tokens_per_block"
    if not flags.context_fmha:
        least, name = max(
            (least, name), (build.max_input_len, "max_input_len without context_fmha")
        )
    if subject.max_num_tokens < least:
        what = f"{subject.max_num_tokens} is less than {name}"
        yield Problem("max_num_tokens", _said(what, _BUILDER), f"{least} or more")
    if opt is not None and opt > subject.max_num_tokens:
        what = f"{opt} is more than max_num_tokens"
        yield Problem("opt_num_tokens", _said(what, _BUILDER), f"at most {subject.max_num_tokens}")
    if opt is not None and flags.multiple_profiles:
        what = "each of multiple_profiles has an optimum of its own"
        yield Problem("opt_num_tokens", _said(what, _BUILDER), fix="remove one of the two")


def _attention_problems(subject: BuildSubject) -> Iterator[Problem]:
    flags = subject.flags
    obstacle = _paged_context_obstacle(subject)
    if flags.use_paged_context_fmha and obstacle is not None:
        yield Problem(
            "use_paged_context_fmha",
            _said(f"true, but {obstacle}", _BUILDER),
            "false, or remove it",
        )
    if flags.use_fp8_context_fmha and subject.sm < _FP8_SM:
        what = f"true, but SM{subject.sm} has no fp8"
        yield Problem("use_fp8_context_fmha", _said(what, _PLUGIN), f"false below SM{_FP8_SM}")
    if flags.use_fp8_context_fmha and not flags.context_fmha:
        yield Problem("use_fp8_context_fmha", "true, but context_fmha is off", "false")


def _paged_context_obstacle(subject: BuildSubject) -> str | None:
    """Why context FMHA cannot read a paged KV cache; None if it can."""
    flags = subject.flags
    if not flags.context_fmha:
        return "context_fmha is off"
    if flags.kv_cache_type != "paged":
        return f"kv_cache_type is {flags.kv_cache_type}"
    if flags.streamingllm:
        return "streamingllm is on"
    if subject.kv_cache == "int8":
        return "the KV cache is int8"
    if subject.kv_cache == "fp8" and not subject.fp8_context_fmha:
        return "the KV cache is fp8 and use_fp8_context_fmha is off"
    return None


def _product_problems(subject: BuildSubject) -> Iterator[Problem]:
    flags = subject.flags
    if flags.use_fused_mlp and not subject.can_fuse_mlp:
        what = (
            f"true, but the format is {subject.format}: their two branches have scales of their own"
        )
        yield Problem("use_fused_mlp", _said(what, _BUILDER), "false, or remove it")
    for name in _FP8_PLUGINS:
        if getattr(flags, name) != "fp8":
            continue
        if "fp8" not in subject.parts:
            yield Problem(
                name, _said(f"fp8, but the format is {subject.format}", _PLUGIN), "disable"
            )
        elif subject.sm == _NO_SM100:
            yield Problem(name, _said("fp8, which SM100 does not have", _PLUGIN), "disable")
    if flags.weight_streaming and flags.gemm_plugin != "disable":
        what = f"weights of a plugin do not stream, and gemm_plugin is {flags.gemm_plugin}"
        yield Problem("weight_streaming", _said(what, _BUILD), fix="gemm_plugin: disable")
    if flags.fast_build and "int8_sq" in subject.parts:
        what = "true, but int8_sq has int8 products without a plugin"
        yield Problem("fast_build", _said(what, _BUILD), "false")


def _communication_problems(subject: BuildSubject) -> Iterator[Problem]:
    flags = subject.flags
    if flags.reduce_fusion and subject.tp == 1:
        yield Problem("reduce_fusion", _said("true, but tp is 1", _BUILDER), "false")
    elif flags.reduce_fusion and subject.architecture not in _REDUCE_FUSION:
        what = f"true, but not known for {subject.architecture}"
        yield Problem("reduce_fusion", _said(what, _BUILDER), f"with {', '.join(_REDUCE_FUSION)}")
    if flags.user_buffer and not flags.reduce_fusion:
        yield Problem(
            "user_buffer", _said("needs reduce_fusion", _BUILDER), fix="reduce_fusion: true"
        )
    if flags.workers > subject.world_size:
        what = f"{flags.workers}, but there are {subject.world_size} rank(s) to build"
        yield Problem("workers", what, f"at most {subject.world_size}")


def _said(what: str, file: str) -> str:
    return f"{what} (TensorRT-LLM 1.2, {file})"
