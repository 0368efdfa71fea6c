"""ModelOpt's hf_quant_config.json -> QuantFormat: one format, one with exceptions, or many.

Zero points (`W4A16_GPTQ` with has_zero_point) are an addition of ours to the unified layout: ModelOpt
writes none.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pipeline.checkpoint.importers.fields import LEFT_ALONE
from pipeline.errors import CheckpointError, Problem
from pipeline.models import ARCHITECTURES, ModelShape, shape_from_hf
from pipeline.models.linears import decoder_linears
from pipeline.quant.formats import FORMATS, GROUP_SIZES, KV_CACHE_ALGOS, QuantFormat

METHOD = "modelopt"

# Known by name, and why they stop here.
_RECOGNISED = {
    "FP8_PER_CHANNEL_PER_TOKEN": "one scale per token, which no table describes",
    "NVFP4": "4-bit floats; no engine here has kernels for them. Its header can be shown, not converted",
    "W4A16_NVFP4": "4-bit floats; no engine here has kernels for them. Its header can be shown, "
    "not converted",
}


def modelopt_format(
    fields: Mapping[str, Any], config: Mapping[str, Any], where: str, supported: str
) -> QuantFormat:
    """The format that the `quantization` mapping describes.

    Args:
        config: raw config.json of the model; read only where layers are named by patterns.
        where: the file, for errors.
        supported: what any reader takes, for errors.

    Raises:
        CheckpointError: every field that is not supported, at once.
    """
    problems: list[Problem] = []
    fmt = _algorithm(fields, where, supported, problems)
    kv_cache = fields.get("kv_cache_quant_algo")
    if kv_cache is not None and kv_cache not in KV_CACHE_ALGOS:
        allowed = f"null, {', '.join(KV_CACHE_ALGOS)}"
        problems.append(Problem(where, f"kv_cache_quant_algo {kv_cache!r}", allowed))
    exceptions: dict[str, QuantFormat] = {}
    if fmt is not None and fmt.is_mixed:
        exceptions = _quantized_layers(fields, where, supported, problems)
    elif fmt is not None:
        exceptions = _left_plain(_excluded(fields), config, where, problems)
    if problems or fmt is None:
        raise CheckpointError(problems)
    if exceptions:
        fmt = fmt.with_exceptions(exceptions)
    return fmt if kv_cache is None else fmt.with_kv_cache(KV_CACHE_ALGOS[kv_cache])


def fields_of_config(declared: Mapping[str, Any]) -> dict[str, Any]:
    """The `quantization` mapping, from ModelOpt's quantization_config in config.json.

    For a model whose files are not here: hf_quant_config.json, beside the weights, decides.
    """
    groups = declared.get("config_groups")
    weights = [
        group["weights"]
        for group in (groups.values() if isinstance(groups, dict) else ())
        if isinstance(group, dict) and isinstance(group.get("weights"), dict)
    ]
    sizes = [one["group_size"] for one in (declared, *weights) if "group_size" in one]
    excluded = declared.get("ignore", declared.get("exclude_modules"))
    return {**declared, "group_size": sizes[0] if sizes else None, "exclude_modules": excluded}


def _algorithm(
    fields: Mapping[str, Any], where: str, supported: str, problems: list[Problem]
) -> QuantFormat | None:
    """Of the whole file, or of one linear of a mixed one; None after a problem."""
    known = {fmt.quant_algo: fmt for fmt in FORMATS.values() if fmt.quant_algo is not None}
    algo = fields.get("quant_algo")
    if not isinstance(algo, str) or algo not in known:
        reason = _RECOGNISED.get(str(algo), "")
        what = f"quant_algo {algo!r}" + (f": {reason}" if reason else "")
        problems.append(Problem(where, what, supported))
        return None
    fmt = known[algo]
    found = list(_option_problems(where, fields, fmt))
    problems += found
    if found:
        return None
    return fmt if fmt.group_size is None else fmt.with_group_size(fields["group_size"])


def _option_problems(where: str, fields: Mapping[str, Any], fmt: QuantFormat) -> Iterator[Problem]:
    if fmt.is_mixed:
        return
    if bool(fields.get("has_zero_point")) != fmt.has_zero_point:
        what = "has_zero_point is set" if not fmt.has_zero_point else "has_zero_point is not set"
        allowed = f"true with {fmt.quant_algo}" if fmt.has_zero_point else "false: symmetric int4"
        yield Problem(where, what, allowed)
    group_size = fields.get("group_size")
    if fmt.group_size is not None and (
        isinstance(group_size, bool) or group_size not in GROUP_SIZES
    ):
        yield Problem(where, f"group_size {group_size!r}", ", ".join(map(str, GROUP_SIZES)))


def _quantized_layers(
    fields: Mapping[str, Any], where: str, supported: str, problems: list[Problem]
) -> dict[str, QuantFormat]:
    layers = fields.get("quantized_layers")
    if not isinstance(layers, dict) or not layers:
        problems.append(Problem(where, "quantized_layers is missing or empty", "a mapping"))
        return {}
    found = {}
    for name, entry in layers.items():
        if not isinstance(entry, dict):
            problems.append(Problem(f"{where}: {name}", f"{entry!r}", "a mapping"))
            continue
        fmt = _algorithm(entry, f"{where}: {name}", supported, problems)
        if fmt is not None and fmt.is_mixed:
            problems.append(Problem(f"{where}: {name}", "MIXED_PRECISION", "one format"))
        elif fmt is not None:
            found[name] = fmt
    return found


def _excluded(fields: Mapping[str, Any]) -> list[str]:
    excluded = fields.get("exclude_modules")
    names = excluded if isinstance(excluded, list) else [excluded] if excluded else []
    return [str(name) for name in names if name not in LEFT_ALONE]


def _left_plain(
    patterns: Sequence[str], config: Mapping[str, Any], where: str, problems: list[Problem]
) -> dict[str, QuantFormat]:
    """Linears that stay plain; every pattern must name one, or something that is no linear.

    ModelOpt lists a router among them, and shortens the names of a whole module to "...mlp*".
    """
    if not patterns:
        return {}
    shape = shape_from_hf(config)
    linears = dict.fromkeys(decoder_linears(shape))
    modules = _module_names(shape)
    found: dict[str, QuantFormat] = {}
    for pattern in patterns:
        names = [pattern] if pattern in linears else fnmatch.filter(linears, pattern)
        if not names and pattern not in modules and not fnmatch.filter(modules, pattern):
            what = f"exclude_modules: {pattern!r} names no module of {shape.architecture}"
            problems.append(Problem(where, what))
        found |= dict.fromkeys(names, FORMATS["fp16"])
    return found


def _module_names(shape: ModelShape) -> set[str]:
    return {
        source.name.format(layer=layer, expert=0)
        for rule in ARCHITECTURES[shape.architecture].rules
        if not rule.quantized
        for source in rule.sources
        for layer in range(shape.num_layers)
    }
