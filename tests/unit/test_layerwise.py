"""pipeline.quant.layers: the parts of quantizing one decoder layer at a time."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.checkpoint.source import open_checkpoint
from pipeline.errors import CheckpointError, StageError
from pipeline.progress import SilentProgress
from pipeline.quant.data import TokenWindows
from pipeline.quant.layers import shards
from pipeline.quant.layers.batches import equal_length_batches
from pipeline.quant.layers.evaluate import compare_checkpoints
from pipeline.quant.layers.frame import Frame
from pipeline.quant.layers.hidden import HiddenStates, fits_in_memory
from pipeline.quant.layers.passes import LayerPasses
from pipeline.quant.layers.run import LayerTools
from pipeline.quant.layers.skeleton import Skeleton, layer_of
from pipeline.quant.packing.layer import pack_layer
from pipeline.quant.preflight import QuantizeOptions
from pipeline.quant.quantizer import quantize_windows
from pipeline.quant.search.layer import quantize_layer
from pipeline.quant.source import load_model
from tests.tiny import write_tiny_llama
from tests.tiny_models import write_tiny
from tests.tiny_text import write_tiny_tokenizer

SIZES = {
    "LlamaForCausalLM": {"hidden_size": 192, "intermediate_size": 256},
    "GPT2LMHeadModel": {"n_layer": 2},
}
OPTIONS = QuantizeOptions("int4_awq", group_size=64, num_samples=4, seq_len=16, batch_size=2)


class Notes(SilentProgress):
    """Remembers what it was told."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.notes: list[str] = []

    def advance(self, note: str = "") -> None:
        self.notes.append(note)

    def say(self, text: str) -> None:
        self.said.append(text)


class CountingTools:
    """The real tools; remembers which layers were packed, and may end a run before one."""

    def __init__(self, stop_before: int | None = None) -> None:
        self.packed: list[int] = []
        self._stop_before = stop_before

    def tools(self) -> LayerTools:
        def pack(mini: Any, recipe: Any, layer: int) -> dict[str, torch.Tensor]:
            if layer == self._stop_before:
                raise KeyboardInterrupt
            self.packed.append(layer)
            return pack_layer(mini, recipe, layer)

        return LayerTools(quantize_layer, pack)


def random_windows(num_windows: int = 4, seq_len: int = 16, seed: int = 0) -> TokenWindows:
    tokens_WT = np.random.default_rng(seed).integers(3, 300, (num_windows, seq_len))
    return TokenWindows(tokens_WT, num_windows, tokens_WT.size)


def write_source(directory: Path, **overrides: Any) -> Path:
    write_tiny_llama(directory, **overrides)
    return write_tiny_tokenizer(directory)


def quantize(source: Path, out_dir: Path, **options: Any) -> Path:
    calls = {name: options.pop(name) for name in ("work_dir", "tools") if name in options}
    progress = options.pop("progress", SilentProgress())
    windows = options.pop("windows", random_windows())
    out_dir.mkdir()
    chosen = dataclasses.replace(OPTIONS, **options)
    quantize_windows(open_checkpoint(source), out_dir, chosen, windows, progress, **calls)
    return out_dir


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_source(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def quantized(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantize(source, tmp_path_factory.mktemp("quantized") / "out")


class TestBatches:
    def test_without_a_mask_they_are_the_windows_in_order(self) -> None:
        windows = random_windows(5)
        batches = equal_length_batches(windows, 2)
        assert [batch.windows for batch in batches] == [(0, 1), (2, 3), (4,)]
        for batch, tokens_BT in zip(batches, windows.batches(2), strict=True):
            assert np.array_equal(batch.tokens_BT, tokens_BT)

    @pytest.mark.parametrize("side", ["right", "left"])
    def test_padding_is_cut_off_and_lengths_are_not_mixed(self, side: str) -> None:
        windows = random_windows(4, 8)
        mask_WT = np.ones((4, 8), bool)
        for window, length in ((1, 5), (3, 5)):
            pad = np.s_[length:] if side == "right" else np.s_[: 8 - length]
            mask_WT[window, pad] = False
        batches = equal_length_batches(dataclasses.replace(windows, mask_WT=mask_WT), 8)
        assert [(batch.windows, batch.tokens_BT.shape) for batch in batches] == [
            ((0, 2), (2, 8)),
            ((1, 3), (2, 5)),
        ]
        kept = windows.tokens_WT[1][mask_WT[1]]
        assert np.array_equal(batches[1].tokens_BT[0], kept)

    def test_what_padding_holds_changes_nothing(self, source: Path, tmp_path: Path) -> None:
        windows = random_windows(4, 16)
        mask_WT = np.ones((4, 16), bool)
        mask_WT[2, 9:] = False
        padded = dataclasses.replace(windows, mask_WT=mask_WT)
        other_WT = np.where(mask_WT, windows.tokens_WT, 7)
        other = dataclasses.replace(padded, tokens_WT=other_WT)
        ours = contents(quantize(source, tmp_path / "one", windows=padded))
        theirs = contents(quantize(source, tmp_path / "two", windows=other))
        assert ours["model.safetensors"] == theirs["model.safetensors"]
        report = json.loads(ours["quant_report.json"])
        assert {facts["num_tokens"] for facts in report["linears"].values()} == {3 * 16 + 9}


class TestHiddenStates:
    @pytest.mark.parametrize("in_memory", [True, False])
    def test_round_trip(self, tmp_path: Path, in_memory: bool) -> None:
        batches = equal_length_batches(random_windows(5), 2)
        path = tmp_path / "hidden"
        hidden = HiddenStates(path, batches, 8, torch.bfloat16, in_memory=in_memory)
        hidden.create()
        values = [torch.randn(*batch.tokens_BT.shape, 8).bfloat16() for batch in batches]
        for index, value in enumerate(values):
            hidden.put(index, value)
        again = HiddenStates(path, batches, 8, torch.bfloat16, in_memory=False)
        assert path.stat().st_size == again.num_bytes == 5 * 16 * 8 * 2
        for index, value in enumerate(values):
            assert torch.equal(hidden.get(index), value)
            assert torch.equal(again.get(index), value)

    def test_a_quarter_of_the_budget_for_what_is_before_and_after_a_layer(self) -> None:
        assert fits_in_memory(100, 800)
        assert not fits_in_memory(101, 800)


def test_the_budget_changes_where_activations_lie_and_no_result(
    source: Path, quantized: Path, tmp_path: Path
) -> None:
    out = quantize(source, tmp_path / "out", max_memory_bytes=1)
    assert contents(out) == contents(quantized)


@contextlib.contextmanager
def few_bytes_a_file() -> Iterator[None]:
    """No file may grow beyond 16 kB: the kernel refuses, as it does on a full disk.

    No fixture: pytest writes the result of a test before its fixtures end, and that may go to a file.
    """
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16_000, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_noticed_before_a_layer_is_run(source: Path, tmp_path: Path) -> None:
    tools = CountingTools()
    with few_bytes_a_file(), pytest.raises(StageError) as caught:
        quantize(source, tmp_path / "out", windows=random_windows(8, 16), tools=tools.tools())
    # 8 windows x 16 tokens x 128 features x 2 bytes
    assert "needs 32768 bytes for hidden states" in str(caught.value)
    assert "finished layers are kept" in str(caught.value)
    assert tools.packed == []


class TestNotFinite:
    def with_large_up_proj(self, directory: Path, factor: float) -> Path:
        write_source(directory, num_hidden_layers=2)
        path = directory / "model.safetensors"
        tensors = load_file(path)
        tensors["model.layers.1.mlp.up_proj.weight"] *= factor
        save_file(tensors, path, metadata={"format": "pt"})
        return directory

    def test_a_linear_that_overflows_float16(self, tmp_path: Path) -> None:
        directory = self.with_large_up_proj(tmp_path / "source", 200_000)
        with pytest.raises(StageError) as caught:
            quantize(directory, tmp_path / "out")
        text = str(caught.value)
        assert (
            "layer 1, mlp.up_proj, calibration sample 0: values that are not finite: up to" in text
        )
        assert "float16 ends at 6.55e+04" in text
        assert "a model made for bfloat16 can overflow in float16" in text

    def test_a_product_between_two_linears(self, tmp_path: Path) -> None:
        directory = self.with_large_up_proj(tmp_path / "source", 20_000)
        with pytest.raises(
            StageError, match=r"layer 1, input of mlp\.down_proj, calibration sample"
        ):
            quantize(directory, tmp_path / "out")

    def test_every_tensor_that_is_not_finite_is_named(self, tmp_path: Path) -> None:
        directory = write_source(tmp_path / "source")
        path = directory / "model.safetensors"
        tensors = load_file(path)
        names = [f"model.layers.1.{name}.weight" for name in ("mlp.up_proj", "input_layernorm")]
        for name in names:
            tensors[name].view(-1)[5] = float("nan")
        save_file(tensors, path, metadata={"format": "pt"})
        with pytest.raises(CheckpointError) as caught:
            quantize(directory, tmp_path / "out")
        assert {problem.where for problem in caught.value.problems} == set(names)

    def test_an_embedding(self, tmp_path: Path) -> None:
        directory = write_source(tmp_path / "source")
        path = directory / "model.safetensors"
        tensors = load_file(path)
        windows = random_windows()
        token = int(windows.tokens_WT[3, 2])
        first = int(np.argwhere(windows.tokens_WT == token)[0, 0])
        tensors["model.embed_tokens.weight"][token, 0] = float("inf")
        save_file(tensors, path, metadata={"format": "pt"})
        with pytest.raises(StageError, match=f"embedding, calibration sample {first}: the input"):
            quantize(directory, tmp_path / "out", windows=windows)


class TestShards:
    def test_large_ones_are_the_layers_files(
        self, source: Path, quantized: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(shards, "SINGLE_FILE_BYTES", 1000)
        work_dir = tmp_path / "work"
        out = quantize(source, tmp_path / "out", work_dir=work_dir)
        files = sorted(path.name for path in out.glob("*.safetensors"))
        assert files == [f"model-0000{n}-of-00003.safetensors" for n in range(1, 4)]
        for layer, name in enumerate(files[1:]):
            assert (out / name).samefile(work_dir / f"layer-0000{layer}" / "packed.safetensors")
        together: dict[str, Any] = {}
        for name in files:
            together |= load_file(out / name)
        single = load_file(quantized / "model.safetensors")
        assert together.keys() == single.keys()
        for name, tensor in single.items():
            assert torch.equal(together[name], tensor), name
        index = json.loads((out / "model.safetensors.index.json").read_text())
        assert index["weight_map"].keys() == single.keys()
        assert open_checkpoint(out).format.name == "int4_awq"

    def test_a_head_that_is_not_finite_is_named(self, tmp_path: Path) -> None:
        directory = write_source(tmp_path / "source", num_hidden_layers=1)
        path = directory / "model.safetensors"
        tensors = load_file(path)
        tensors["lm_head.weight"][3, 3] = float("nan")
        save_file(tensors, path, metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match=r"lm_head\.weight: holds values that are not"):
            quantize(directory, tmp_path / "out")
        assert not (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.parametrize("fmt", ["int4_awq", "fp8", "w4a8_awq", "int8_sq"])
def test_quantized_inputs_are_those_of_the_exported_layers(tmp_path: Path, fmt: str) -> None:
    """What feeds the second layer is what the exported first layer computes, run as a whole model."""
    source = write_source(tmp_path / "source", dtype="float32")
    work_dir = tmp_path / "work"
    tools = CountingTools(stop_before=1)
    quantize_twice = {"inputs": "quantized", "work_dir": work_dir, "format": fmt}
    with pytest.raises(KeyboardInterrupt):
        quantize(source, tmp_path / "open", tools=tools.tools(), **quantize_twice)
    batches = equal_length_batches(random_windows(), OPTIONS.batch_size)
    path = work_dir / "layer-00000" / "outputs.hidden"
    hidden = HiddenStates(path, batches, 128, torch.float32, in_memory=False)
    fed = [hidden.get(index) for index in range(len(batches))]
    out = quantize(source, tmp_path / "out", **quantize_twice)
    model = load_model(out, torch.float32)
    with torch.no_grad():
        for index, batch in enumerate(batches):
            states = model(torch.from_numpy(batch.tokens_BT), output_hidden_states=True)
            wanted = states.hidden_states[1]
            error = (fed[index] - wanted).norm() / wanted.norm()
            assert error < 1e-6  # 0 seen; rounding of inputs alone is 0.01 to 0.06


@pytest.mark.parametrize(
    ("architecture", "fmt"), [("LlamaForCausalLM", "int4_awq"), ("GPT2LMHeadModel", "fp8")]
)
def test_the_evaluation_is_that_of_the_whole_models(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, architecture: str, fmt: str
) -> None:
    directory = tmp_path_factory.mktemp(architecture)
    source = write_tiny(architecture, directory / "source", dtype="float32", **SIZES[architecture])
    quantized = quantize(source, directory / "out", format=fmt)
    windows = random_windows(3, 24, seed=1)
    found = compare_checkpoints(
        open_checkpoint(source), open_checkpoint(quantized), windows, tmp_path, batch_size=2
    )
    ids = torch.from_numpy(windows.tokens_WT)
    with torch.no_grad():
        logs = [
            load_model(path, torch.float32)(ids).logits[:, :-1].double().log_softmax(-1)
            for path in (source, quantized)
        ]
    losses = [-log.gather(2, ids[:, 1:, None]).mean() for log in logs]
    kl = (logs[0].exp() * (logs[0] - logs[1])).sum(-1).mean()
    assert found.num_positions == 3 * 23
    assert found.original_perplexity == pytest.approx(float(losses[0].exp()), rel=1e-5)
    assert found.perplexity == pytest.approx(float(losses[1].exp()), rel=1e-5)
    assert found.mean_kl == pytest.approx(float(kl), rel=1e-4, abs=1e-7)
    assert found.mean_kl > 1e-5
    assert not list(tmp_path.iterdir())


def test_a_mini_holds_one_layer_and_a_tiny_vocabulary(source: Path) -> None:
    skeleton = Skeleton(open_checkpoint(source), torch.float16)
    mini = skeleton.mini(1)
    stored = load_file(source / "model.safetensors")
    layer = layer_of(mini, skeleton.layers_path)
    for name, parameter in layer.named_parameters():
        assert torch.equal(parameter, stored[f"model.layers.1.{name}"]), name
    assert mini.get_input_embeddings().weight.shape == (64, 128)  # type: ignore[operator]


def test_several_devices_share_the_batches(source: Path, tmp_path: Path) -> None:
    """The CPU twice: who computes which batch changes no output."""
    skeleton = Skeleton(open_checkpoint(source), torch.float32)
    batches = equal_length_batches(random_windows(5), 1)
    frame = Frame(skeleton, np.arange(512))
    results = []
    for devices in (["cpu"], ["cpu", "cpu"]):
        passes = LayerPasses(frame, batches, skeleton.layers_path, devices)
        inputs, outputs = (
            HiddenStates(tmp_path / name, batches, 128, torch.float32, in_memory=False)
            for name in ("inputs", "outputs")
        )
        for index, batch in enumerate(batches):
            if index == 0:
                inputs.create()
                outputs.create()
            inputs.put(index, frame.embed(batch))
        passes.outputs(skeleton.mini(0), 0, inputs, outputs)
        results.append(outputs.path.read_bytes())
    assert results[0] == results[1]


@pytest.mark.parametrize("fmt", ["int4_awq", "w4a8_awq"])
def test_one_pass_for_statistics_and_outputs_gives_the_bytes_of_two(
    source: Path, tmp_path: Path, fmt: str
) -> None:
    def by_another_name(*args: Any) -> Any:
        return quantize_layer(*args)

    two_passes = LayerTools(by_another_name, pack_layer)
    one = quantize(source, tmp_path / "one", format=fmt)
    two = quantize(source, tmp_path / "two", format=fmt, tools=two_passes)
    assert contents(one) == contents(two)


def test_progress_says_layer_loss_memory_and_time_left(source: Path, tmp_path: Path) -> None:
    notes = Notes()
    quantize(source, tmp_path / "out", progress=notes)
    assert len(notes.notes) == 2
    assert notes.notes[1].startswith("layer 1: loss ")
    for part in ("GB now", "s a layer"):
        assert part in notes.notes[1]
