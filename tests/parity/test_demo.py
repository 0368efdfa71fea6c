"""The committed demo model in transformers: it has learned, and its outliers change no logit."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from pipeline.demo import HELDOUT_PATH, MODEL_DIR
from pipeline.demo.corpus import read_documents
from pipeline.demo.outliers import write_plain_checkpoint
from pipeline.demo.perplexity import WINDOW, mean_loss
from pipeline.demo.publish import measure_heldout
from pipeline.demo.tokenizer import encode_documents


@pytest.fixture(scope="module")
def committed() -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def heldout_tokens() -> np.ndarray:
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    return encode_documents(tokenizer.backend_tokenizer, read_documents(HELDOUT_PATH))


def test_auto_tokenizer_loads_offline() -> None:
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, len(tokenizer)) == (0, 1, 4096)
    assert tokenizer.model_max_length == 1024
    text = "def größe(x):\n\treturn  x  # 猫 🐈 ,  . ' n't\n"
    ids = tokenizer(text).input_ids
    assert ids[0] == 0
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_model_has_learned(committed: LlamaForCausalLM, heldout_tokens: np.ndarray) -> None:
    few = heldout_tokens[: 6 * (WINDOW - 1)]
    # Observed 46.96 on these windows, 33.89 on all; a uniform guess has 4096.
    assert math.exp(mean_loss(committed, few)) < 50


def test_model_uses_its_whole_context(
    committed: LlamaForCausalLM, heldout_tokens: np.ndarray
) -> None:
    few = heldout_tokens[: 6 * 1023]
    long, short = (mean_loss(committed, few, window) for window in (1024, 128))
    assert long < short - 0.05  # observed 3.681 and 3.793


def test_outliers_leave_the_logits_alone(
    committed: LlamaForCausalLM, heldout_tokens: np.ndarray, tmp_path: Path
) -> None:
    write_plain_checkpoint(MODEL_DIR, tmp_path / "plain")
    plain = LlamaForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32).eval()
    rows_BS = torch.from_numpy(heldout_tokens[: 4 * 256].reshape(4, 256))
    with torch.no_grad():
        difference = (plain(rows_BS).logits - committed(rows_BS).logits).abs().max().item()
    assert difference < 1e-5  # observed 0.0: powers of two only move exponents


def test_activations_have_outlier_channels(
    committed: LlamaForCausalLM, heldout_tokens: np.ndarray
) -> None:
    seen: dict[str, torch.Tensor] = {}
    linear = committed.model.layers[2].mlp.gate_proj
    hook = linear.register_forward_pre_hook(lambda _, inputs: seen.update(x=inputs[0]))
    with torch.no_grad():
        committed(torch.from_numpy(heldout_tokens[None, :256]))
    hook.remove()
    sizes = seen["x"].abs().mean(dim=(0, 1))
    assert sizes.max() > 10 * sizes.median()  # observed 26.9; 2.6 in the plain model


@pytest.mark.slow
def test_recorded_heldout_loss_is_measured_again() -> None:
    recorded = json.loads((MODEL_DIR / "training.json").read_text())["heldout"]
    assert measure_heldout(MODEL_DIR) == {
        **recorded,
        "loss_nats": pytest.approx(recorded["loss_nats"], abs=2e-4),
        "perplexity": pytest.approx(recorded["perplexity"], rel=2e-4),
    }


def test_mean_loss_counts_every_token_once() -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=50,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
        )
    ).eval()
    tokens = np.arange(2, 42)
    pieces = [tokens[:15], tokens[15:30], tokens[30:]]
    expected = 0.0
    for piece in pieces:
        row_S = torch.tensor([[0, *piece]])
        with torch.no_grad():  # transformers shifts the labels itself
            expected += model(row_S, labels=row_S).loss.item() * len(piece)
    assert mean_loss(model, tokens, window=16) == pytest.approx(expected / 40, abs=1e-6)
