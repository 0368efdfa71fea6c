"""The layers of one quantization, from the first that is not finished to the checkpoint.

Shape suffixes: B windows of one batch, T tokens of one window, H hidden size.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import importlib.metadata
import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipeline.checkpoint.reader import CheckpointReader
from pipeline.checkpoint.source import QUANT_CONFIG_FILE, HfCheckpoint
from pipeline.errors import Problem, StageError, ToolError
from pipeline.memory import free_memory_bytes, give_back_freed
from pipeline.models.linears import decoder_linears, head_rule
from pipeline.progress import Progress
from pipeline.quant.choose import model_format, recipe_for
from pipeline.quant.data import TokenWindows
from pipeline.quant.float32_products import float32_products
from pipeline.quant.formats import QuantFormat
from pipeline.quant.layers.batches import equal_length_batches, used_tokens
from pipeline.quant.layers.commits import OUTPUTS, PACKED, FinishedLayers
from pipeline.quant.layers.frame import Frame
from pipeline.quant.layers.head import Int8Head
from pipeline.quant.layers.hidden import HiddenStates, fits_in_memory
from pipeline.quant.layers.passes import LayerPasses, fill_embedded
from pipeline.quant.layers.shards import missing_ones, write_shards, write_tensors
from pipeline.quant.layers.skeleton import Skeleton, layer_of
from pipeline.quant.packing.activations import simulate_inputs
from pipeline.quant.packing.config import quant_config_json
from pipeline.quant.preflight import QuantizeOptions
from pipeline.quant.recipe import LayerRecipe, LinearFacts
from pipeline.quant.report import REPORT_FILE, layer_errors, refuse_incomplete, write_quant_report
from pipeline.quant.source import copy_companions

_FINGERPRINTED_TOOLS = ("nvidia-modelopt", "torch", "transformers")
_NOT_FINGERPRINTED = ("max_memory_bytes", "num_threads", "lm_head")
"""Another number of threads changes last bits at most; layers made with the old one stay good. lm_head
is rounded when the layers are put together."""
_TORCH_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}


@dataclass(frozen=True)
class LayerTools:
    """What is done with one layer.

    Attributes:
        quantize: leaves a mini as a ModelOpt-quantized module; returns facts of its linears.
        pack: the tensors of a quantized mini under their Hugging Face names for a layer number.
    """

    quantize: Callable[
        [nn.Module, LayerRecipe, Callable[[nn.Module], None]], dict[str, LinearFacts]
    ]
    pack: Callable[[nn.Module, LayerRecipe, int], dict[str, torch.Tensor]]


class LayerwiseRun:
    """One quantization: what stays the same from layer to layer."""

    def __init__(
        self,
        checkpoint: HfCheckpoint,
        options: QuantizeOptions,
        windows: TokenWindows,
        progress: Progress,
        work_dir: Path,
        chosen: Mapping[str, str] | None = None,
        tools: LayerTools | None = None,
    ) -> None:
        """Args as of `pipeline.quant.quantizer.quantize_windows`; reads what lies outside the layers."""

        self.checkpoint, self.options, self.windows = checkpoint, options, windows
        self.progress, self.chosen, self.tools = progress, chosen, tools or _usual_tools()
        self.skeleton = Skeleton(checkpoint, _checkpoint_dtype(checkpoint))
        self.batches = equal_length_batches(windows, options.batch_size)
        self.frame = Frame(self.skeleton, used_tokens(self.batches))
        self.devices = torch_devices(options.device)
        self.passes = LayerPasses(self.frame, self.batches, self.skeleton.layers_path, self.devices)
        self.finished = FinishedLayers(work_dir)
        limit = options.max_memory_bytes or free_memory_bytes()
        self._in_memory = False
        self._in_memory = fits_in_memory(self._hidden(work_dir).num_bytes, limit)

    def make_layers(self) -> None:
        """Quantize every layer that is not finished yet."""
        num_layers = self.skeleton.num_layers
        first, changes = self.finished.resume(self._fingerprint(), self.skeleton.layer_digest)
        for change in changes:
            self.progress.say(f"finished layers of an earlier run are not used: {change}")
        num_linears = len(decoder_linears(self.checkpoint.shape))
        self.progress.say(
            f"calibrating {num_linears} linears on {len(self.windows.tokens_WT)} windows, "
            f"{sum(batch.num_tokens for batch in self.batches)} tokens "
            f"(sha256 {self.windows.digest[:16]})"
        )
        if first:
            self.progress.say(f"{first} of {num_layers} layers are finished; continuing")
        self.progress.start(num_layers, "layers")
        for layer in range(first):
            self.progress.advance(f"layer {layer} was finished before")
        if first == num_layers:
            return
        inputs = self._hidden(self.finished.inputs_path(first))
        if first == 0:
            fill_embedded(inputs, self.frame, self.batches)
        started = time.monotonic()
        with float32_products(), torch.no_grad(), _quick_collections():
            for layer in range(first, num_layers):
                inputs, loss = self._make_layer(layer, inputs)
                each = (time.monotonic() - started) / (layer + 1 - first)
                self.progress.advance(_note(layer, loss, each))

    def _hidden(self, path: Path) -> HiddenStates:
        size, dtype = self.checkpoint.shape.hidden_size, self.skeleton.dtype
        return HiddenStates(path, self.batches, size, dtype, in_memory=self._in_memory)

    def _make_layer(self, layer: int, inputs: HiddenStates) -> tuple[HiddenStates, float | None]:
        """Quantize, pack and commit one layer; returns what feeds the next one, and the mean loss."""

        directory = self.finished.open_layer()
        outputs = self._hidden(directory / OUTPUTS)
        outputs.create()
        recipe = self._recipe(layer)
        facts, tensors = self._quantize(layer, recipe, inputs, outputs)
        write_tensors(directory / PACKED, tensors)
        del tensors
        gc.collect()
        give_back_freed()
        packed = CheckpointReader(directory / PACKED)
        if self.options.inputs == "quantized":
            self._run_packed(packed, layer, inputs, outputs)
        shape = self.checkpoint.shape
        errors, problems = layer_errors(self.checkpoint.reader, packed, shape, layer)
        if problems:
            raise StageError(problems)
        prefix = self.skeleton.layer_prefix(layer)
        record = {
            "weights_sha256": self.skeleton.layer_digest(layer),
            "linears": {
                f"{prefix}{name}": {
                    **dataclasses.asdict(found),
                    "relative_weight_error": errors.get(f"{prefix}{name}", 0.0),
                }
                for name, found in facts.items()
            },
        }
        self.finished.commit(layer, record)
        outputs.moved(self.finished.layer_dir(layer) / OUTPUTS)
        losses = [found.loss for found in facts.values() if found.loss is not None]
        return outputs, sum(losses) / len(losses) if losses else None

    def _quantize(
        self, layer: int, recipe: LayerRecipe, inputs: HiddenStates, outputs: HiddenStates
    ) -> tuple[dict[str, LinearFacts], dict[str, torch.Tensor]]:
        """The only place where a layer and its quantization are in memory; freed on return."""

        mini = self.skeleton.mini(layer).to(self.devices[0])
        is_original, watched = self.options.inputs == "original", None
        if is_original and self._watches_original(recipe):
            watched = outputs
        elif is_original:
            self.passes.outputs(mini, layer, inputs, outputs)
        prefix = self.skeleton.layer_prefix(layer)
        loop = self.passes.forward_loop(layer, inputs, watched)
        try:
            facts = self.tools.quantize(mini, recipe, loop)
        except StageError as error:
            raise StageError(_with_full_names(error, recipe, prefix)) from error
        tensors = self.tools.pack(mini, recipe, layer)
        _check_facts(facts, recipe, prefix)
        return facts, tensors

    def _watches_original(self, recipe: LayerRecipe) -> bool:
        """Whether the pass that gathers statistics computes what the layer itself would.

        Our search rounds nothing during its one pass, so a second one would give the same bits.
        """
        return (
            recipe.search == "gram" and recipe.kv_cache == "fp16" and self.passes.one_device
        ) and self.tools.quantize is _usual_tools().quantize

    def _run_packed(
        self, packed: CheckpointReader, layer: int, inputs: HiddenStates, outputs: HiddenStates
    ) -> None:
        """What the engine's layer will make of its inputs, rounding of linears' inputs included."""
        mini = self.skeleton.mini_from(packed, layer).to(self.devices[0])
        block = layer_of(mini, self.skeleton.layers_path)
        simulate_inputs(block, packed, self.skeleton.layer_prefix(layer))
        self.passes.outputs(mini, layer, inputs, outputs)

    def _recipe(self, layer: int) -> LayerRecipe:
        options = self.options
        return recipe_for(
            self.checkpoint.shape,
            layer,
            format=options.format,
            group_size=options.group_size,
            algorithm=options.algorithm,
            search=options.search,
            kv_cache=options.kv_cache,
            keep=options.keep,
            chosen=self.chosen,
        )

    def _format(self) -> QuantFormat:
        options = self.options
        return model_format(
            self.checkpoint.shape,
            format=options.format,
            group_size=options.group_size,
            kv_cache=options.kv_cache,
            keep=options.keep,
            chosen=self.chosen,
            lm_head=options.lm_head,
        )

    def _fingerprint(self) -> dict[str, Any]:
        """All that decides the result, beside the weights of the layers."""

        options = dataclasses.asdict(self.options)
        return {
            "config": self.checkpoint.config,
            "embeddings_sha256": self.skeleton.outer_digest(),
            "tokens_sha256": self.windows.digest,
            "chosen": dict(self.chosen) if self.chosen else None,
            **{f"options.{k}": v for k, v in options.items() if k not in _NOT_FINGERPRINTED},
            **{f"tools.{name}": importlib.metadata.version(name) for name in _FINGERPRINTED_TOOLS},
        }

    def write(self, out_dir: Path) -> None:
        """Put the finished layers together."""

        num_layers = self.skeleton.num_layers
        files = [self.finished.packed(layer) for layer in range(num_layers)]
        fmt, shape = self._format(), self.checkpoint.shape
        reader, outer = self.checkpoint.reader, self.skeleton.outer_tensors()
        if self.options.lm_head != "fp16":
            head = Int8Head(reader, shape)
            reader, outer = head, [*(name for name in outer if name not in head.names), *head.names]
            shape = dataclasses.replace(shape, tie_word_embeddings=False)
        ones = missing_ones(files, shape, fmt)
        write_shards(out_dir, reader, outer, files, ones)
        refuse_incomplete(out_dir, shape, fmt)
        self._describe(out_dir)

    def _describe(self, out_dir: Path) -> None:
        """Everything beside the weights: configs, tokenizer, report."""
        num_layers = self.skeleton.num_layers
        formats: dict[str, str] = {}
        for layer in range(num_layers):
            recipe, prefix = self._recipe(layer), self.skeleton.layer_prefix(layer)
            formats |= {f"{prefix}{name}": fmt for name, fmt in recipe.formats.items()}
        options, extra = self.options, {}
        if options.lm_head != "fp16":
            formats[head_rule(self.checkpoint.shape).sources[0].name] = options.lm_head
            extra["tie_word_embeddings"] = False
        described = quant_config_json(
            self.checkpoint.shape,
            formats,
            group_size=options.group_size,
            kv_cache=options.kv_cache,
        )
        _write_json(out_dir / QUANT_CONFIG_FILE, described.hf_quant_config)
        config = {
            **self.checkpoint.config,
            **extra,
            "quantization_config": described.quantization_config,
        }
        _write_json(out_dir / "config.json", config)
        copy_companions(self.checkpoint.directory, out_dir)
        linears: dict[str, Any] = {}
        for layer in range(num_layers):
            linears |= self.finished.record(layer)["linears"]
        unseen = [name for name, facts in linears.items() if facts["num_tokens"] == 0]
        if unseen:
            self.progress.say(f"no calibration token reached {', '.join(unseen)}")
        write_quant_report(
            out_dir / REPORT_FILE,
            options=options,
            windows=self.windows,
            linears=linears,
        )


@contextlib.contextmanager
def _quick_collections() -> Iterator[None]:
    """Garbage collections look at what is made from now on, not at all modules of the libraries.

    One is needed after every layer: quantized modules refer to each other in circles.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _usual_tools() -> LayerTools:
    from pipeline.quant.packing.layer import pack_layer
    from pipeline.quant.search.layer import quantize_layer

    return LayerTools(quantize_layer, pack_layer)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _note(layer: int, loss: float | None, each_s: float) -> str:
    """What is shown beside the bar, which says how much time is left."""
    shown = "" if loss is None else f"loss {loss:.3g}, "
    memory = f"{_resident_bytes() / 1e9:.2f} GB"
    return f"layer {layer}: {shown}{memory} now, {each_s:.1f} s a layer"


def _resident_bytes() -> int:
    for line in Path("/proc/self/status").read_text("ascii").splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("/proc/self/status has VmRSS")


def torch_devices(device: str) -> list[str]:
    """torch devices to compute on; every GPU that torch sees, with "cuda"."""
    if device != "cuda":
        return ["cpu"]
    if not torch.cuda.is_available():
        fix = "set quantize.device: cpu, or install torch with CUDA on a machine with a GPU"
        raise ToolError(Problem("quantize.device", "torch finds no CUDA device", fix=fix))
    return [f"cuda:{index}" for index in range(torch.cuda.device_count())]


def _with_full_names(error: StageError, recipe: LayerRecipe, prefix: str) -> list[Problem]:
    """Problems with the checkpoint's names of linears in place of the recipe's."""
    return [
        dataclasses.replace(problem, where=prefix + problem.where)
        if problem.where.removesuffix(".weight") in recipe.formats
        else problem
        for problem in error.problems
    ]


def _check_facts(facts: Mapping[str, LinearFacts], recipe: LayerRecipe, prefix: str) -> None:
    """Exactly the linears of the recipe were quantized, with finite losses."""
    wanted = {name for name, fmt in recipe.formats.items() if fmt != "fp16"}
    problems = [
        Problem(f"{prefix}{name}", "this linear was not quantized")
        for name in sorted(wanted - facts.keys())
    ]
    problems += [
        Problem(f"{prefix}{name}", "this was quantized, and should stay as it is")
        for name in sorted(facts.keys() - wanted)
        if facts[name].format != "fp16"
    ]
    problems += [
        Problem(f"{prefix}{name}", f"the search's loss is {found.loss}", allowed="a finite number")
        for name, found in facts.items()
        if found.loss is not None and not abs(found.loss) < float("inf")
    ]
    if problems:
        raise StageError(problems)


def _checkpoint_dtype(checkpoint: HfCheckpoint) -> torch.dtype:
    """The dtype of the decoder's matrices on disk; `check_source` has seen that there is just one."""
    name = decoder_linears(checkpoint.shape)[0]
    info = checkpoint.reader.tensors[f"{name}.weight"]
    return _TORCH_DTYPES[info.dtype]
