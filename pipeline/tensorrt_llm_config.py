"""The section `build.tensorrt_llm` of a YAML: flags of trtllm-build 1.2, and where it is installed.

Sizes (max_batch_size, max_input_len, max_seq_len) come from `build`. Every flag is passed by name, so
that defaults that differ between versions (tokens_per_block, paged context FMHA) change nothing.
Left out: auto_parallel (removed in 1.2), LoRA, speculative decoding, encoders, debug output, and plugins
that TensorRT-LLM sets by itself or that none of our checkpoints use.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from pipeline.calibration_config import Section

DTYPE_PLUGIN = Literal["auto", "float16", "bfloat16", "disable"]
FP8_PLUGIN = Literal["fp8", "disable"]
UPSTREAM_MAX_NUM_TOKENS = 8192
"""trtllm-build's own default of max_num_tokens."""


class VenvEnvironment(Section):
    """A virtual environment that has tensorrt_llm."""

    venv: Annotated[str, Field(min_length=1)]
    """Its directory; a relative path is relative to the YAML file."""


class ImageEnvironment(Section):
    """A container image that has tensorrt_llm."""

    image: Annotated[str, Field(pattern=r"^[a-z0-9][\w.:/@-]*(:[\w.-]+|@sha256:[0-9a-f]{64})$")]
    """With its tag or digest: `latest` is another image tomorrow."""
    program: Literal["docker", "podman"] = "docker"

    @model_validator(mode="after")
    def _tag_stays(self) -> ImageEnvironment:
        if self.image.endswith(":latest"):
            raise ValueError(f"{self.image} moves; allowed: a tag with a version, or a digest")
        return self


NOT_ONE_OF = "not_one_of"
"""Kind of a validation error whose message is what is allowed."""
CURRENT_TAG, VENV_TAG, IMAGE_TAG = "current", "a venv", "an image"


def _kind_of_environment(value: Any) -> str | None:
    if isinstance(value, VenvEnvironment) or (isinstance(value, dict) and "venv" in value):
        return VENV_TAG
    if isinstance(value, ImageEnvironment) or (isinstance(value, dict) and "image" in value):
        return IMAGE_TAG
    return CURRENT_TAG if value == "current" else None


Environment = Annotated[
    Annotated[Literal["current"], Tag(CURRENT_TAG)]
    | Annotated[VenvEnvironment, Tag(VENV_TAG)]
    | Annotated[ImageEnvironment, Tag(IMAGE_TAG)],
    Discriminator(
        _kind_of_environment,
        custom_error_type=NOT_ONE_OF,
        custom_error_message="current, {venv: DIRECTORY} or {image: NAME:TAG}",
    ),
]
"""`current` (the trtllm-build on PATH), `{venv: <directory>}`, or `{image: <name:tag>}`."""


ENVIRONMENTS: dict[str, type[Section]] = {VENV_TAG: VenvEnvironment, IMAGE_TAG: ImageEnvironment}
"""Tag -> section, of those that are sections."""


def image_of(environment: Environment) -> str | None:
    """The image, of an environment that is one."""
    return environment.image if isinstance(environment, ImageEnvironment) else None


class TensorRtLlmConfig(Section):
    """Flags of trtllm-build; `pipeline.engine.trtllm_flags` has what goes with what, and why."""

    environment: Environment = "current"
    workers: Annotated[int, Field(ge=1, le=64)] = 1
    """Ranks that are built at the same time, each on a GPU of its own."""

    max_num_tokens: Annotated[int, Field(ge=1)] | None = None
    """Tokens of all rows in one step; None: 8192, or what max_batch_size rows of max_seq_len have.
    Activation memory grows with it."""
    opt_num_tokens: Annotated[int, Field(ge=1)] | None = None
    """What kernels are tuned for; None: max_batch_size x max_beam_width."""
    max_beam_width: Annotated[int, Field(ge=1, le=64)] = 1
    multiple_profiles: bool = False
    """Several ranges of token numbers, each tuned for itself."""

    kv_cache_type: Literal["paged", "continuous", "disabled"] = "paged"
    tokens_per_block: Literal[16, 32, 64, 128] = 32
    """Of the paged KV cache."""
    remove_input_padding: bool = True
    context_fmha: bool = True
    use_paged_context_fmha: bool | None = None
    """None: where TensorRT-LLM can. Chunked prompts and reuse of the KV cache need it."""
    use_fp8_context_fmha: bool | None = None
    """None: with an fp8 format, from SM89."""

    gpt_attention_plugin: DTYPE_PLUGIN = "auto"
    gemm_plugin: DTYPE_PLUGIN = "auto"
    gemm_swiglu_plugin: FP8_PLUGIN = "disable"
    low_latency_gemm_plugin: FP8_PLUGIN = "disable"
    low_latency_gemm_swiglu_plugin: FP8_PLUGIN = "disable"
    moe_plugin: DTYPE_PLUGIN = "auto"
    use_fused_mlp: bool | None = None
    """None: for fp16, fp8 and mixed. Of AWQ the two branches have scales of their own."""
    reduce_fusion: bool = False
    """All-reduce, residual and norm in one kernel."""
    user_buffer: bool = False
    pp_reduce_scatter: bool = False
    streamingllm: bool = False

    logits_dtype: Literal["float16", "float32"] | None = None
    """None: what the checkpoint says."""
    gather_context_logits: bool = False
    gather_generation_logits: bool = False

    strip_plan: bool = False
    """A plan without weights; trtllm-refit adds them from the checkpoint."""
    fast_build: bool = False
    """Weights in a file of their own (rank{r}_managed_weights.safetensors)."""
    weight_streaming: bool = False
    weight_sparsity: bool = False

    profiling_verbosity: Literal["layer_names_only", "detailed", "none"] = "layer_names_only"
    log_level: Literal["error", "warning", "info", "verbose"] = "info"
    monitor_memory: bool = False
    timing_cache: str | None = None
    """A timing cache to start from. The one that a build leaves is published with the engine."""


WITHOUT_EFFECT_ON_BYTES = frozenset({"workers", "log_level", "monitor_memory", "timing_cache"})
"""Of TensorRtLlmConfig. A timing cache changes which of several right kernels is taken; as the hardware
does that too, its content is no part of an artifact's key."""
