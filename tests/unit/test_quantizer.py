"""pipeline.quant.quantizer on tiny checkpoints: what it writes and what it refuses."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from pipeline.checkpoint.reader import CheckpointReader
from pipeline.checkpoint.source import open_checkpoint, read_format
from pipeline.errors import CheckpointError, PlanError, StageError
from pipeline.models.linears import decoder_linears
from pipeline.progress import SilentProgress
from pipeline.quant.data import token_windows
from pipeline.quant.preflight import check_source
from pipeline.quant.quantizer import QuantizeOptions, quantize_checkpoint
from pipeline.quant.report import layer_errors, refuse_incomplete
from pipeline.quant.source import SourceTokenizer, load_model
from tests.tiny import write_tiny_llama
from tests.tiny_text import made_up_texts, write_tiny_tokenizer

OPTIONS = QuantizeOptions("int4_awq", group_size=128, num_samples=6, seq_len=16, batch_size=4)
TEXTS = made_up_texts(6)

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


class CountingProgress(SilentProgress):
    """Remembers what it was told."""

    def __init__(self) -> None:
        self.total, self.unit, self.done = 0, "", 0
        self.said: list[str] = []

    def start(self, total: int, unit: str) -> None:
        self.total, self.unit = total, unit

    def advance(self, note: str = "") -> None:
        self.done += 1

    def say(self, text: str) -> None:
        self.said.append(text)


def write_source(directory: Path, **overrides: Any) -> Path:
    write_tiny_llama(directory, **overrides)
    return write_tiny_tokenizer(directory)


def quantize(source: Path, out_dir: Path, options: QuantizeOptions = OPTIONS, **calls: Any) -> Path:
    out_dir.mkdir()
    quantize_checkpoint(source, out_dir, options, TEXTS, calls.get("progress", SilentProgress()))
    return out_dir


def edit_json(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def edit_tensor(directory: Path, name: str, change: Any) -> None:
    path = directory / "model.safetensors"
    tensors = load_file(path)
    tensors[name] = change(tensors[name].copy())
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Llama 3 RoPE, and a key of config.json that transformers does not know."""
    directory = write_source(
        tmp_path_factory.mktemp("source"), rope_scaling=LLAMA3_ROPE, rope_theta=500000.0
    )
    edit_json(directory / "config.json", our_own_key={"kept": [1, None]})
    return directory


@pytest.fixture(scope="module")
def quantized(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantize(source, tmp_path_factory.mktemp("quantized") / "out")


def test_the_config_is_the_source_s_plus_the_quantization(source: Path, quantized: Path) -> None:
    before = json.loads((source / "config.json").read_text())
    after = json.loads((quantized / "config.json").read_text())
    assert after.pop("quantization_config")["quant_algo"] == "W4A16_AWQ"
    assert after == before
    assert before["rope_theta"] == 500000.0
    assert before["rope_scaling"] == LLAMA3_ROPE


def test_layout_of_the_tensors(quantized: Path) -> None:
    tensors = load_file(quantized / "model.safetensors")
    layer = "model.layers.1."
    down = tensors[f"{layer}mlp.down_proj.weight"]
    assert (down.dtype, down.shape) == (np.uint8, (64, 256))
    scale = tensors[f"{layer}mlp.down_proj.weight_scale"]
    assert (scale.dtype, scale.shape) == (np.float32, (128, 2))
    assert tensors[f"{layer}mlp.down_proj.pre_quant_scale"].dtype == np.float16
    # 3 tensors each for o_proj and down_proj, 2 each for the other five, 2 norms; 2 layers; 3 more
    assert len(tensors) == 2 * (2 * 3 + 5 * 2 + 2) + 3


def test_embeddings_head_and_final_norm_are_untouched(source: Path, quantized: Path) -> None:
    before = load_file(source / "model.safetensors")
    after = load_file(quantized / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"):
        assert after[name].tobytes() == before[name].tobytes()


def test_tokenizer_and_generation_config_are_copied(source: Path, quantized: Path) -> None:
    names = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
    for name in (*names, "generation_config.json"):
        assert (quantized / name).read_bytes() == (source / name).read_bytes()


def test_the_report_names_the_calibration_tokens_exactly(source: Path, quantized: Path) -> None:
    report = json.loads((quantized / "quant_report.json").read_text())
    calibration = report["calibration"]
    windows = token_windows(
        TEXTS, SourceTokenizer(source), num_windows=6, seq_len=16, seed=0, what="text"
    )
    assert calibration["tokens_sha256"] == windows.digest
    assert (calibration["num_windows"], calibration["seq_len"]) == (6, 16)


def test_the_report_has_a_small_error_for_every_linear(quantized: Path) -> None:
    report = json.loads((quantized / "quant_report.json").read_text())
    linears = report["linears"]
    assert set(linears) == {
        f"model.layers.{layer}.{name}_proj"
        for layer in range(2)
        for name in (
            *(f"self_attn.{part}" for part in "qkvo"),
            *(f"mlp.{part}" for part in ("gate", "up", "down")),
        )
    }
    for facts in linears.values():
        # Gaussian weights in groups of 128: 0.113 to 0.130 observed.
        assert 0.10 < facts["relative_weight_error"] < 0.14
        assert facts["alpha"] is None or 0 <= facts["alpha"] <= 1
        assert 0 < facts["loss"] <= facts["rtn_loss"]
        assert facts["num_tokens"] == 6 * 16


def test_the_same_input_gives_the_same_bytes(source: Path, quantized: Path, tmp_path: Path) -> None:
    again = quantize(source, tmp_path / "again")

    def digests(directory: Path) -> dict[str, str]:
        return {
            path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in directory.iterdir()
        }

    assert digests(again) == digests(quantized)


def test_nothing_reaches_standard_output(
    source: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    progress = CountingProgress()
    quantize(source, tmp_path / "out", progress=progress)
    captured = capfd.readouterr()
    assert captured.out == ""
    assert (progress.total, progress.unit, progress.done) == (2, "layers", 2)
    assert not [text for text in progress.said if "warning" in text]


def test_torch_s_settings_neither_matter_nor_change(
    source: Path, quantized: Path, tmp_path: Path
) -> None:
    """Under a bfloat16 default ModelOpt's own grid of alphas would be rounded: 0.2001953125."""
    import torch

    threads = torch.get_num_threads()
    torch.set_default_dtype(torch.bfloat16)
    try:
        out = quantize(source, tmp_path / "out", dataclasses.replace(OPTIONS, num_threads=1))
        assert torch.get_default_dtype() == torch.bfloat16
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.get_num_threads() == threads
    alphas = [
        [facts["alpha"] for facts in json.loads(path.read_text())["linears"].values()]
        for path in (out / "quant_report.json", quantized / "quant_report.json")
    ]
    assert alphas[0] == alphas[1]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_other_dtypes_and_group_64(tmp_path: Path, dtype: str) -> None:
    directory = write_source(tmp_path / "source", dtype=dtype)
    options = dataclasses.replace(OPTIONS, group_size=64)
    out = quantize(directory, tmp_path / "out", options)
    fmt = read_format(out)
    assert (fmt.name, fmt.group_size) == ("int4_awq", 64)
    exported, original = open_checkpoint(out).reader, open_checkpoint(directory).reader
    name = "lm_head.weight"
    assert exported.tensors[name].dtype == {"bfloat16": "BF16", "float32": "F32"}[dtype]
    assert exported.read(name).tobytes() == original.read(name).tobytes()
    assert exported.tensors["model.layers.0.self_attn.q_proj.weight_scale"].shape == (128, 2)


def test_tied_embeddings_stay_tied(tmp_path: Path) -> None:
    directory = write_source(tmp_path / "source", tie_word_embeddings=True)
    out = quantize(directory, tmp_path / "out")
    assert "lm_head.weight" not in load_file(out / "model.safetensors")
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is True


def test_sharded_source(tmp_path: Path, source: Path, quantized: Path) -> None:
    directory = write_source(
        tmp_path / "source",
        rope_scaling=LLAMA3_ROPE,
        rope_theta=500000.0,
        max_shard_size="300KB",
    )
    assert len(list(directory.glob("*.safetensors"))) > 1
    out = quantize(directory, tmp_path / "out")
    assert (out / "model.safetensors").read_bytes() == (
        quantized / "model.safetensors"
    ).read_bytes()


def test_rope_of_a_transformers_5_config_is_not_lost(tmp_path: Path) -> None:
    """transformers 4.57 reads such a config as base 10000 without scaling."""
    old = write_source(tmp_path / "old", rope_scaling=LLAMA3_ROPE, rope_theta=500000.0)
    new = tmp_path / "new"
    shutil.copytree(old, new)
    config = json.loads((new / "config.json").read_text())
    config["rope_parameters"] = {**config.pop("rope_scaling"), "rope_theta": 500000.0}
    del config["rope_theta"]
    (new / "config.json").write_text(json.dumps(config))

    quantize(old, tmp_path / "old-out")
    quantize(new, tmp_path / "new-out")
    weights = [
        (tmp_path / f"{age}-out" / "model.safetensors").read_bytes() for age in ("old", "new")
    ]
    assert weights[0] == weights[1]
    written = json.loads((tmp_path / "new-out" / "config.json").read_text())
    assert written["rope_parameters"] == config["rope_parameters"]


def test_the_loaded_model_rotates_as_config_json_says(source: Path) -> None:
    import torch

    model = load_model(source, torch.float32)
    frequencies = model.model.rotary_emb.inv_freq.numpy()
    # head size 32: the slowest of 16 frequencies is 500000^(-30/32), slowed down 8 times by llama3
    assert frequencies[-1] == pytest.approx(500000.0 ** (-30 / 32) / 8, rel=1e-6)
    assert frequencies[0] == 1.0


def test_every_linear_that_the_group_size_does_not_divide_is_listed(tmp_path: Path) -> None:
    directory = write_source(tmp_path, intermediate_size=192)
    with pytest.raises(PlanError) as caught:
        check_source(directory, OPTIONS)
    assert [str(problem) for problem in caught.value.problems] == [
        f"model.layers.{layer}.mlp.down_proj.weight: 192 input features are not a multiple of "
        "group_size 128; allowed: group_size 64"
        for layer in range(2)
    ]


def test_a_width_that_no_group_size_divides_says_so(tmp_path: Path) -> None:
    directory = write_source(tmp_path, intermediate_size=160)
    with pytest.raises(PlanError, match="fix: quantize this model in another format"):
        check_source(directory, dataclasses.replace(OPTIONS, group_size=64))


def test_all_unusable_options_are_listed_at_once(source: Path) -> None:
    options = QuantizeOptions("int3", group_size=100, num_samples=0, seq_len=257, batch_size=0)
    with pytest.raises(PlanError) as caught:
        check_source(source, options)
    text = str(caught.value)
    for part in (
        "quantize.format: 'int3' is unknown; allowed: int4_awq",
        "quantize.group_size: 100 is no group size of int4 kernels; allowed: 64, 128",
        "quantize.calibration.num_samples: is 0; allowed: 1 or more",
        "quantize.calibration.batch_size: is 0; allowed: 1 or more",
        "quantize.calibration.seq_len: 257 is longer than the model's 256 positions; "
        "allowed: at most 256",
    ):
        assert part in text


def test_fp16_needs_no_quantizer(source: Path) -> None:
    with pytest.raises(PlanError, match="'fp16' needs no quantizer; allowed: int4_awq"):
        check_source(source, dataclasses.replace(OPTIONS, format="fp16"))


def test_a_quantized_source_is_refused(quantized: Path) -> None:
    with pytest.raises(CheckpointError, match=r"quantized already \(int4_awq\).*original"):
        check_source(quantized, OPTIONS)


def test_a_source_without_tokenizer_is_refused(tmp_path: Path) -> None:
    write_tiny_llama(tmp_path)
    with pytest.raises(CheckpointError, match="there is no tokenizer beside the weights"):
        check_source(tmp_path, OPTIONS)


def test_missing_and_unused_tensors_are_listed_before_anything_is_loaded(tmp_path: Path) -> None:
    directory = write_source(tmp_path)
    tensors = load_file(directory / "model.safetensors")
    tensors["stray"] = tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors, directory / "model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        check_source(directory, OPTIONS)
    assert {problem.where for problem in caught.value.problems} == {
        "model.layers.1.mlp.up_proj.weight",
        "stray",
    }


@pytest.mark.parametrize(
    "name", ["model.layers.0.mlp.up_proj.weight", "model.layers.1.input_layernorm.weight"]
)
def test_mixed_dtypes_are_refused(tmp_path: Path, name: str) -> None:
    directory = write_source(tmp_path)
    edit_tensor(directory, name, lambda weight: weight.astype(np.float32))
    with pytest.raises(CheckpointError, match=rf"the decoder layers mix F16 .*F32 \({name}\)"):
        check_source(directory, OPTIONS)


def test_a_tokenizer_of_a_larger_model_is_refused(tmp_path: Path) -> None:
    directory = write_source(tmp_path / "source", vocab_size=128)
    with pytest.raises(CheckpointError, match=r"token id \d+, the model has 128 embeddings"):
        quantize(directory, tmp_path / "out")


def test_too_little_calibration_text_is_refused(source: Path, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"calibration text: \d+ tokens give \d+ windows"):
        quantize(source, tmp_path / "out", dataclasses.replace(OPTIONS, num_samples=10_000))


def test_nan_weights_are_named(tmp_path: Path) -> None:
    directory = write_source(tmp_path / "source")

    def spoil(weight: np.ndarray) -> np.ndarray:
        weight[3, 5] = np.nan
        return weight

    edit_tensor(directory, "model.layers.1.self_attn.v_proj.weight", spoil)
    with pytest.raises(
        CheckpointError, match=r"layers\.1\.self_attn\.v_proj\.weight: holds values"
    ):
        quantize(directory, tmp_path / "out")


def test_a_linear_of_zeros_quantizes_to_zeros(tmp_path: Path) -> None:
    directory = write_source(tmp_path / "source")
    name = "model.layers.0.mlp.down_proj.weight"
    edit_tensor(directory, name, np.zeros_like)
    out = quantize(directory, tmp_path / "out")
    assert not load_file(out / "model.safetensors")[name].any()


class TestFloat32Products:
    """float16 in, float16 out, float32 in between; everything else is left alone."""

    @pytest.mark.parametrize("bias", [True, False])
    def test_is_the_float32_product_rounded_once(self, bias: bool) -> None:
        import torch

        from pipeline.quant.float32_products import float32_products

        torch.manual_seed(0)
        linear = torch.nn.Linear(512, 64, bias=bias).half()
        x_TK = torch.randn(8, 512).half()
        with float32_products():
            product_TN = linear(x_TK)
        assert product_TN.dtype == torch.float16
        assert linear.weight.dtype == torch.float16
        assert torch.equal(product_TN, linear.float()(x_TK.float()).half())

    def test_what_does_not_fit_float16_is_infinite_as_ever(self) -> None:
        import torch

        from pipeline.quant.float32_products import float32_products

        x_TK = torch.full((1, 4), 200.0).half()
        with float32_products():
            assert torch.isinf(torch.nn.functional.linear(x_TK, x_TK)).all()

    def test_other_dtypes_and_other_operations_keep_theirs(self) -> None:
        import torch

        from pipeline.quant.float32_products import float32_products

        generator = torch.Generator().manual_seed(0)
        x_TK = torch.randn(8, 64, generator=generator).bfloat16()
        plain = torch.nn.functional.linear(x_TK, x_TK)
        with float32_products():
            assert torch.equal(torch.nn.functional.linear(x_TK, x_TK), plain)
            assert (x_TK.half() + 1).dtype == torch.float16


class TestAudit:
    """The exported file is measured, so damage to it cannot pass."""

    @pytest.fixture
    def damaged(self, quantized: Path, tmp_path: Path) -> Path:
        return Path(shutil.copytree(quantized, tmp_path / "damaged"))

    def audit(self, source: Path, directory: Path) -> dict[str, float]:
        checkpoint = open_checkpoint(source)
        refuse_incomplete(directory, checkpoint.shape, read_format(directory))
        errors: dict[str, float] = {}
        problems = []
        for layer in range(checkpoint.shape.num_layers):
            exported = CheckpointReader(directory)
            found, wrong = layer_errors(checkpoint.reader, exported, checkpoint.shape, layer)
            errors |= found
            problems += wrong
        if problems:
            raise StageError(problems)
        return errors

    def test_undamaged(self, source: Path, quantized: Path) -> None:
        errors = self.audit(source, quantized)
        assert set(errors) == set(decoder_linears(open_checkpoint(source).shape))

    def test_swapped_nibbles(self, source: Path, damaged: Path) -> None:
        name = "model.layers.0.self_attn.k_proj.weight"
        edit_tensor(damaged, name, lambda packed: (packed >> 4) | (packed << 4))
        # 1.4 observed: the two rows have nothing to do with each other
        with pytest.raises(StageError, match=r"k_proj\.weight: the exported weight is 1\.4"):
            self.audit(source, damaged)

    def test_a_lost_pre_quant_scale(self, source: Path, damaged: Path) -> None:
        edit_tensor(damaged, "model.layers.1.mlp.down_proj.pre_quant_scale", np.zeros_like)
        with pytest.raises(StageError, match=r"down_proj\.weight: the exported weight is 1 from"):
            self.audit(source, damaged)

    def test_a_scale_that_is_not_finite(self, source: Path, damaged: Path) -> None:
        name = "model.layers.1.mlp.up_proj.weight_scale"
        edit_tensor(damaged, name, lambda scale: np.full_like(scale, np.inf))
        with pytest.raises(StageError) as caught:
            self.audit(source, damaged)
        listed = [str(problem) for problem in caught.value.problems]
        assert f"{name}: holds values that are not finite" in listed

    def test_a_changed_norm(self, source: Path, damaged: Path) -> None:
        name = "model.layers.0.input_layernorm.weight"
        edit_tensor(damaged, name, lambda weight: np.full_like(weight, np.nan))
        with pytest.raises(StageError, match=r"0\.input_layernorm\.weight: holds values that are"):
            self.audit(source, damaged)

    def test_a_missing_tensor(self, source: Path, damaged: Path) -> None:
        path = damaged / "model.safetensors"
        tensors = load_file(path)
        del tensors["model.layers.0.mlp.gate_proj.weight_scale"]
        save_file(tensors, path)
        with pytest.raises(StageError, match=r"gate_proj\.weight_scale: missing"):
            self.audit(source, damaged)
