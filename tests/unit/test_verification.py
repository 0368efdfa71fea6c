"""pipeline.verification on tiny checkpoints: quantized, converted, exported and compared."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from pipeline.checkpoint.convert import convert_checkpoint
from pipeline.engine import write_engine_config
from pipeline.errors import CheckpointError, GateError, PlanError, StageError
from pipeline.network.export import export_network
from pipeline.network.limits import BuildLimits
from pipeline.progress import SilentProgress
from pipeline.quant.data import TokenWindows
from pipeline.quant.quantizer import QuantizeOptions, quantize_checkpoint
from pipeline.verification import Gates, Report, VerifyOptions, compare, read_report, write_report
from pipeline.verification.gates import judge
from pipeline.verification.measure import Measurement, measure
from pipeline.verification.report import NotFinite
from pipeline.verification.statistics import perplexity, token_statistics
from tests.tiny import write_tiny_llama
from tests.tiny_text import made_up_texts, write_tiny_tokenizer

TEXTS = made_up_texts(12, seed=7)
GATES = Gates(max_perplexity_ratio=1.5, max_mean_kl=0.05, min_top1_agreement=0.4)
OPTIONS = VerifyOptions(num_windows=4, seq_len=48, gates=GATES)
LIMITS = BuildLimits(max_batch_size=2, max_seq_len=64, max_input_len=32)
QUIET = SilentProgress()


def build(checkpoint_dir: Path, work_dir: Path, spoil: Callable[..., None] | None = None) -> Path:
    """A CPU engine directory of a Hugging Face checkpoint; `spoil` may change the rank's tensors."""
    converted, engine = work_dir / "converted", work_dir / "engine"
    converted.mkdir(parents=True)
    engine.mkdir()
    convert_checkpoint(checkpoint_dir, converted, tp=1, pp=1, progress=QUIET)
    if spoil is not None:
        tensors = load_file(converted / "rank0.safetensors")
        spoil(tensors)
        save_file(tensors, converted / "rank0.safetensors")
    export_network(converted, 0, engine, LIMITS, QUIET)
    write_engine_config(converted, engine, LIMITS)
    return engine


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = write_tiny_llama(tmp_path_factory.mktemp("source"))
    return write_tiny_tokenizer(directory)


@pytest.fixture(scope="module")
def fp16_engine(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(source, tmp_path_factory.mktemp("fp16"))


@pytest.fixture(scope="module")
def fp16_report(
    source: Path, fp16_engine: Path, tmp_path_factory: pytest.TempPathFactory
) -> Report:
    work_dir = tmp_path_factory.mktemp("work")
    report = compare(source, fp16_engine, TEXTS, OPTIONS, QUIET, work_dir)
    assert not list(work_dir.iterdir())
    return report


@pytest.fixture(scope="module")
def quantized(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("quantized")
    options = QuantizeOptions("int4_awq", 128, num_samples=8, seq_len=32, batch_size=8)
    quantize_checkpoint(source, directory, options, made_up_texts(8), QUIET)
    return directory


@pytest.fixture(scope="module")
def int4_report(source: Path, quantized: Path, tmp_path_factory: pytest.TempPathFactory) -> Report:
    engine = build(quantized, tmp_path_factory.mktemp("int4"))
    work_dir = tmp_path_factory.mktemp("work")
    return compare(source, engine, TEXTS, OPTIONS, QUIET, work_dir)


def verdicts(report: Report) -> dict[str, bool]:
    return {verdict.gate: verdict.passed for verdict in report.verdicts}


def test_an_fp16_engine_is_the_original_up_to_rounding(fp16_report: Report) -> None:
    assert fp16_report.quant_algo is None
    assert fp16_report.data.num_tokens == 4 * 47
    assert fp16_report.passed
    assert 0 <= fp16_report.mean_kl < 1e-11  # 9e-14 observed: float32 rounding
    assert fp16_report.max_kl < 1e-10  # 1.7e-13 observed
    assert fp16_report.top1_agreement == 1.0
    assert fp16_report.perplexity_ratio == pytest.approx(1, abs=1e-6)  # 2e-8 observed


def test_an_engine_of_fewer_tokens_is_refused_before_anything_runs(
    source: Path, tmp_path: Path
) -> None:
    other = write_tiny_llama(tmp_path / "other", vocab_size=500)
    engine = build(write_tiny_tokenizer(other), tmp_path)
    work_dir = tmp_path / "work"  # nothing may be written
    with pytest.raises(
        CheckpointError, match=r"its vocabulary of 500 is smaller than .*; allowed: at least 512"
    ):
        compare(source, engine, TEXTS, OPTIONS, QUIET, work_dir)


def test_an_int4_engine_differs_a_little(int4_report: Report, fp16_report: Report) -> None:
    assert int4_report.quant_algo == "W4A16_AWQ"
    assert 5e-3 < int4_report.mean_kl < 0.05  # 0.025 observed
    assert int4_report.mean_kl < int4_report.p99_kl <= int4_report.max_kl
    assert 0.4 < int4_report.top1_agreement < 1  # 0.52 observed
    assert int4_report.engine.perplexity != int4_report.original.perplexity
    assert int4_report.original == fp16_report.original
    assert int4_report.data == fp16_report.data


def test_perplexity_is_transformers_own_loss(
    source: Path, fp16_engine: Path, tmp_path: Path
) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # An independent path: the tokens are cut again with the tokenizer alone, all windows are taken in
    # text order, and transformers computes its own loss.
    tokenizer = AutoTokenizer.from_pretrained(source)
    stream = [
        token
        for text in TEXTS
        for token in [*tokenizer(text, add_special_tokens=False)["input_ids"], 2]
    ]
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    pieces = [stream[start : start + 47] for start in range(0, len(stream) - 46, 47)]
    everything = VerifyOptions(num_windows=len(pieces), seq_len=48)
    losses = []
    for piece in pieces:
        ids = torch.tensor([[1, *piece]])
        with torch.no_grad():
            losses.append(float(model(ids, labels=ids).loss))
    report = compare(source, fp16_engine, TEXTS, everything, QUIET, tmp_path)
    assert report.data.num_windows == report.data.num_windows_available == len(pieces)
    assert report.original.loss == pytest.approx(np.mean(losses), rel=1e-6)  # 3e-8 observed
    assert report.original.perplexity == pytest.approx(math.exp(np.mean(losses)), rel=1e-5)
    assert [window.original_loss for window in report.windows] == pytest.approx(losses, rel=1e-5)


def test_a_broken_engine_fails_its_gates(source: Path, quantized: Path, tmp_path: Path) -> None:
    def spoil(tensors: dict[str, np.ndarray]) -> None:
        for layer in range(2):
            tensors[f"transformer.layers.{layer}.mlp.proj.weights_scaling_factor"][:] = 0

    report = compare(source, build(quantized, tmp_path, spoil), TEXTS, OPTIONS, QUIET, tmp_path)
    # A random model predicts nothing, so damage need not raise its perplexity: KL has to show it.
    assert verdicts(report)["finite"]
    assert not verdicts(report)["max_mean_kl"]
    assert not verdicts(report)["min_top1_agreement"]
    assert report.mean_kl > 0.1  # 0.25 observed, ten times that of int4
    assert not report.passed


def test_nan_in_the_engine_fails_every_gate_and_names_the_windows(
    source: Path, tmp_path: Path
) -> None:
    def spoil(tensors: dict[str, np.ndarray]) -> None:
        # the embedding of </s>, which separates documents
        tensors["transformer.vocab_embedding.weight"][2] = np.nan

    report = compare(source, build(source, tmp_path, spoil), TEXTS, OPTIONS, QUIET, tmp_path)
    assert not any(verdicts(report).values())
    assert set(verdicts(report)) == {
        "finite",
        "max_perplexity_ratio",
        "max_mean_kl",
        "min_top1_agreement",
    }
    assert 0 < len(report.not_finite) < 4, "some windows hold a separator, some do not"
    bad = report.not_finite[0]
    assert bad.side == "engine"
    note = f"engine: logits of window {bad.window} are not finite from position {bad.position} on"
    assert all(note in verdict.note for verdict in report.verdicts)
    assert math.isfinite(report.original.perplexity)
    known = [window for window in report.windows if math.isfinite(window.mean_kl)]
    assert len(known) == 4 - len(report.not_finite)
    assert max(window.mean_kl for window in known) < 1e-8  # a bad window does not spoil the next
    # strict JSON, and nothing of it lost
    write_report(report, tmp_path)
    text = (tmp_path / "report.json").read_text()
    json.loads(text, parse_constant=lambda constant: pytest.fail(f"{constant} is not JSON"))
    again = read_report(tmp_path / "report.json")
    assert again.model_dump_json() == report.model_dump_json()
    assert math.isnan(again.mean_kl)
    page = (tmp_path / "report.html").read_text()
    assert note in page
    assert "Failed." in page


class Given:
    """A side whose logits are what they are."""

    def __init__(self, logits_WTV: np.ndarray) -> None:
        self.logits_WTV = logits_WTV
        self.vocab_size = logits_WTV.shape[2]

    def logits(self, tokens_WT: np.ndarray, chunk_len: int) -> Iterator[np.ndarray]:
        for window in range(len(tokens_WT)):
            for start in range(0, tokens_WT.shape[1], chunk_len):
                yield self.logits_WTV[window, start : start + chunk_len]


def test_padded_vocabulary_is_not_compared() -> None:
    generator = np.random.default_rng(0)
    logits = generator.normal(0, 2, (2, 40, 500)).astype(np.float32)
    # Entries behind the tokens that would win every argmax.
    original = Given(logits)
    padded = Given(np.pad(logits, ((0, 0), (0, 0), (0, 12)), constant_values=1e3))
    tokens = generator.integers(0, 500, (2, 40))
    measured = measure(original, padded, tokens, 16, QUIET)
    for window in measured.windows:
        assert window.kl_N.max() == 0
        assert window.same_top1_N.all()
        assert len(window.kl_N) == 39


def test_a_measurement_survives_a_file(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    logits = generator.normal(0, 2, (3, 10, 50)).astype(np.float32)
    other = logits + generator.normal(0, 0.2, logits.shape).astype(np.float32)
    other[1, 4, 7] = np.nan
    tokens = generator.integers(0, 50, (3, 10))
    measured = measure(Given(logits), Given(other), tokens, 4, QUIET)
    measured.save(tmp_path / "measurement.npz")
    again = Measurement.load(tmp_path / "measurement.npz")
    assert again.not_finite == (NotFinite(side="engine", window=1, position=4),)
    for ours, theirs in zip(measured.windows, again.windows, strict=True):
        for name in ("original_loss_N", "engine_loss_N", "kl_N", "same_top1_N"):
            np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name))
            assert getattr(ours, name).dtype == getattr(theirs, name).dtype


def test_chunks_do_not_change_the_original(source: Path, tmp_path: Path) -> None:
    import torch

    from pipeline.quant.layers.batches import equal_length_batches
    from pipeline.quant.layers.forward import run_layers
    from pipeline.quant.source import load_model, open_original
    from pipeline.verification.logits import OriginalLogits

    tokens_WT = np.random.default_rng(0).integers(3, 500, (2, 30))
    batches = equal_length_batches(TokenWindows(tokens_WT, 2, 60), 1)
    outputs = run_layers(
        open_original(source), batches, tmp_path / "original", torch.float32, QUIET
    )
    original = OriginalLogits(outputs, 512)
    model = load_model(source, torch.float32)
    with torch.no_grad():
        expected = model(torch.from_numpy(tokens_WT), use_cache=False).logits.numpy()
    whole = np.stack(list(original.logits(tokens_WT, 30)))
    np.testing.assert_allclose(whole, expected, atol=2e-5)  # 0 to 3e-6 observed
    chunks = list(original.logits(tokens_WT, 7))
    assert [len(chunk) for chunk in chunks] == [7, 7, 7, 7, 2] * 2
    assert whole.dtype == np.float32
    np.testing.assert_allclose(np.concatenate(chunks), np.concatenate(whole), atol=2e-5)


def test_statistics_against_torch() -> None:
    import torch
    from torch.nn import functional

    generator = np.random.default_rng(0)
    original = generator.normal(0, 4, (50, 300)).astype(np.float32)
    engine = original + generator.normal(0, 0.3, original.shape).astype(np.float32)
    tokens = generator.integers(0, 300, 50)
    statistics = token_statistics(original, engine, tokens)

    left = functional.log_softmax(torch.from_numpy(original).double(), dim=1)
    right = functional.log_softmax(torch.from_numpy(engine).double(), dim=1)
    kl = functional.kl_div(right, left, log_target=True, reduction="none").sum(dim=1)
    np.testing.assert_allclose(statistics.kl_N, kl.numpy(), rtol=1e-12)
    loss = functional.nll_loss(right, torch.from_numpy(tokens), reduction="none")
    np.testing.assert_allclose(statistics.engine_loss_N, loss.numpy(), rtol=1e-12)
    loss = functional.nll_loss(left, torch.from_numpy(tokens), reduction="none")
    np.testing.assert_allclose(statistics.original_loss_N, loss.numpy(), rtol=1e-12)
    agree = (left.argmax(dim=1) == right.argmax(dim=1)).numpy()
    assert np.array_equal(statistics.same_top1_N, agree)
    assert 0 < agree.mean() < 1


def test_statistics_by_hand() -> None:
    """Two tokens: p = (3/4, 1/4), q = (1/2, 1/2)."""
    original = np.log(np.array([[3, 1]], np.float32))
    statistics = token_statistics(original, np.zeros((1, 2), np.float32), np.array([1]))
    assert statistics.kl_N[0] == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    assert statistics.original_loss_N[0] == pytest.approx(math.log(4))
    assert statistics.engine_loss_N[0] == pytest.approx(math.log(2))


def test_huge_logits_do_not_overflow() -> None:
    original = np.array([[3e38, -3e38]], np.float32)
    statistics = token_statistics(original, -original, np.array([1]))
    assert np.isfinite(statistics.kl_N).all()
    assert perplexity(statistics.original_loss_N) == math.inf


class TestGates:
    """Limits are inclusive; what is no number never passes."""

    GATES = Gates(max_perplexity_ratio=1.05, max_mean_kl=0.05, min_top1_agreement=0.9)

    def judge(self, *not_finite: NotFinite, **changed: float) -> dict[str, bool]:
        values = {"perplexity_ratio": 1.05, "mean_kl": 0.05, "top1_agreement": 0.9, **changed}
        judged = judge(self.GATES, not_finite=not_finite, **values)
        return {verdict.gate: verdict.passed for verdict in judged}

    def test_exactly_the_limit_passes(self) -> None:
        assert all(self.judge().values())

    @pytest.mark.parametrize(
        ("name", "value", "gate"),
        [
            ("perplexity_ratio", 1.0501, "max_perplexity_ratio"),
            ("perplexity_ratio", math.inf, "max_perplexity_ratio"),
            ("perplexity_ratio", math.nan, "max_perplexity_ratio"),
            ("mean_kl", 0.0501, "max_mean_kl"),
            ("mean_kl", math.nan, "max_mean_kl"),
            ("top1_agreement", 0.8999, "min_top1_agreement"),
            ("top1_agreement", math.nan, "min_top1_agreement"),
        ],
    )
    def test_one_bad_value_fails_its_gate_only(self, name: str, value: float, gate: str) -> None:
        failed = [gate for gate, passed in self.judge(**{name: value}).items() if not passed]
        assert failed == [gate]

    def test_good_numbers_do_not_help_when_a_window_is_not_finite(self) -> None:
        bad = NotFinite(side="original", window=3, position=5)
        assert not any(self.judge(bad).values())

    def test_a_nan_limit_never_passes(self) -> None:
        gates = Gates(math.nan, math.nan, math.nan)
        judged = judge(gates, perplexity_ratio=1, mean_kl=0, top1_agreement=1, not_finite=())
        assert [verdict.passed for verdict in judged] == [True, False, False, False]

    def test_without_gates_only_finiteness_is_judged(self) -> None:
        judged = judge(None, perplexity_ratio=9, mean_kl=9, top1_agreement=0, not_finite=())
        assert [(verdict.gate, verdict.passed) for verdict in judged] == [("finite", True)]


def test_a_row_that_is_not_finite_spoils_its_own_token_only() -> None:
    original = np.array([[2, 1], [1, 2], [1, 3]], np.float32)
    for bad in (np.nan, np.inf, -np.inf):
        engine = original.copy()
        engine[1, 0] = bad
        statistics = token_statistics(original, engine, np.array([0, 1, 1]))
        assert np.isnan(statistics.kl_N).tolist() == [False, True, False]
        assert np.isnan(statistics.engine_loss_N).tolist() == [False, True, False]
        assert np.isfinite(statistics.original_loss_N).all()
        assert statistics.same_top1_N.tolist() == [True, False, True]
        assert math.isnan(perplexity(statistics.engine_loss_N))


def test_sizes_are_those_on_disk(source: Path, fp16_engine: Path, fp16_report: Report) -> None:
    tensors = load_file(source / "model.safetensors")
    assert fp16_report.original.weight_bytes == sum(tensor.nbytes for tensor in tensors.values())
    assert set(fp16_report.engine_files) == {"rank0.onnx", "rank0.trt.onnx", "rank0.weights"}
    for name, size in fp16_report.engine_files.items():
        assert size == (fp16_engine / name).stat().st_size
    files = fp16_report.engine_files
    assert fp16_report.engine.weight_bytes == files["rank0.weights"]
    assert fp16_report.engine.deployed_bytes == files["rank0.onnx"] + files["rank0.weights"]


def test_a_tensorrt_engine_is_what_counts_for_size(
    source: Path, fp16_engine: Path, tmp_path: Path
) -> None:
    engine = Path(shutil.copytree(fp16_engine, tmp_path / "engine"))
    (engine / "rank0.engine").write_bytes(bytes(1234))
    options = VerifyOptions(num_windows=1, seq_len=8)
    assert compare(source, engine, TEXTS, options, QUIET, tmp_path).engine.deployed_bytes == 1234


def test_int4_is_smaller(int4_report: Report, fp16_report: Report) -> None:
    assert int4_report.engine_files["rank0.weights"] < fp16_report.engine_files["rank0.weights"]


def test_the_page_needs_nothing_else_and_fits_dark_screens(
    int4_report: Report, tmp_path: Path
) -> None:
    write_report(int4_report, tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert page.count("<svg") == 2
    assert not re.search(r'<script|<link|<img|src=|url\((?!#)|@import|href="(?!#)', page)
    assert "prefers-color-scheme: dark" in page
    assert "currentColor" in page
    assert "#010203" not in page
    for text in ("nats per token", "Passed.", int4_report.data.tokens_sha256, "MB", "W4A16_AWQ"):
        assert text in page
    assert str(tmp_path) not in page


def test_the_same_comparison_gives_the_same_files(
    source: Path, fp16_engine: Path, fp16_report: Report, tmp_path: Path
) -> None:
    again = compare(source, fp16_engine, TEXTS, OPTIONS, QUIET, tmp_path)
    files = []
    for name, report in (("one", fp16_report), ("two", again)):
        (tmp_path / name).mkdir()
        write_report(report, tmp_path / name)
        files.append(
            [(tmp_path / name / f"report.{kind}").read_bytes() for kind in ("json", "html")]
        )
    assert files[0] == files[1]


def test_the_headline_is_plain_data(int4_report: Report) -> None:
    headline = int4_report.headline()
    assert json.loads(json.dumps(headline)) == headline
    assert headline["passed"] is True
    assert headline["num_tokens"] == 188
    assert headline["mean_kl"] == int4_report.mean_kl


def test_windows_longer_than_the_engine_are_refused(
    source: Path, fp16_engine: Path, tmp_path: Path
) -> None:
    options = VerifyOptions(num_windows=1, seq_len=65)
    with pytest.raises(PlanError, match=r"verify\.seq_len: 65 is longer .* allowed: at most 64"):
        compare(source, fp16_engine, TEXTS, options, QUIET, tmp_path)


def test_too_little_held_out_text_is_refused(
    source: Path, fp16_engine: Path, tmp_path: Path
) -> None:
    options = VerifyOptions(num_windows=10_000, seq_len=64)
    with pytest.raises(PlanError, match=r"held-out text: .* 10000 were asked for"):
        compare(source, fp16_engine, TEXTS, options, QUIET, tmp_path)


def test_a_config_of_another_number_of_ranks_is_refused(
    source: Path, fp16_engine: Path, tmp_path: Path
) -> None:
    engine = Path(shutil.copytree(fp16_engine, tmp_path / "engine"))
    config = json.loads((engine / "config.json").read_text())
    config["pretrained_config"]["mapping"] = {"world_size": 2, "tp_size": 2, "pp_size": 1}
    (engine / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"config.json is of 2 ranks, rank0.onnx of 1"):
        compare(source, engine, TEXTS, OPTIONS, QUIET, tmp_path)


def test_every_missing_file_of_an_engine_is_named(
    source: Path, fp16_engine: Path, tmp_path: Path
) -> None:
    engine = Path(shutil.copytree(fp16_engine, tmp_path / "engine"))
    (engine / "rank0.weights").unlink()
    with pytest.raises(GateError, match=r"rank0\.weights: is missing; fix: build the engine"):
        compare(source, engine, TEXTS, OPTIONS, QUIET, tmp_path)


def test_an_original_that_is_not_finite_is_named(
    source: Path, fp16_engine: Path, tmp_path: Path
) -> None:
    broken = Path(shutil.copytree(source, tmp_path / "source"))
    tensors = load_file(broken / "model.safetensors")
    tensors["model.embed_tokens.weight"][2] = np.inf  # </s>, which separates documents
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(StageError, match=r"embedding, held-out window \d: .* is not finite"):
        compare(broken, fp16_engine, TEXTS, OPTIONS, QUIET, tmp_path)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (None, r"config\.json: cannot be read: No such file"),
        ("{", r"config\.json: not valid JSON"),
        ("{}", r"has no pretrained_config: not an engine"),
    ],
)
def test_a_directory_that_is_no_engine_is_refused(
    source: Path, tmp_path: Path, content: str | None, text: str
) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=text):
        compare(source, tmp_path, TEXTS, OPTIONS, QUIET, tmp_path)
