"""The demo model: its corpus, tokenizer, outlier channels, training, and what was committed."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer

from pipeline.demo import CALIBRATION_PATH, HELDOUT_PATH, MODEL_DIR
from pipeline.demo.corpus import (
    Corpus,
    Document,
    read_documents,
    read_library,
    split_documents,
    write_documents,
)
from pipeline.demo.outliers import (
    Outliers,
    draw_outliers,
    inject_outliers,
    remove_outliers,
    write_plain_checkpoint,
)
from pipeline.demo.publish import publish
from pipeline.demo.tokenizer import EOS_ID, encode_documents, train_tokenizer
from pipeline.demo.train import ModelSize, Schedule, batch_of_step, train
from pipeline.errors import CheckpointError, ToolError
from pipeline.quant.data import load_texts

TINY_TEXTS = [f"def f{n}(x):\n    return x + {n}  # doubled {n * n}\n" for n in range(60)]
TINY_CORPUS = Corpus(tuple(Document(f"{n}.py", t) for n, t in enumerate(TINY_TEXTS)), (), ())
TINY_SIZE = ModelSize(
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    vocab_size=300,
    max_position_embeddings=64,
)
TINY_SCHEDULE = Schedule(
    num_steps=4, tokens_per_step=64, short_length=16, long_length=32, warmup_steps=2
)


def test_import_is_light() -> None:
    heavy = {"torch", "numpy", "tokenizers", "transformers"}
    code = f"import sys, pipeline.demo; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# --- corpus


def test_library_leaves_out_tests_tables_generated_and_undecodable_files(tmp_path: Path) -> None:
    kept = {"os.py": "import sys\n", "json/tool.py": "x = 'é'\n"}
    left_out = {
        "test/test_os.py": "x\n",
        "json/tests/check.py": "x\n",
        "test_top.py": "x\n",
        "encodings/cp1252.py": "x\n",
        "site-packages/pip/main.py": "x\n",
        "_sysconfigdata__linux_x86_64.py": "x\n",
        "empty.py": " \n",
        "README.txt": "x\n",
        "separator.py": "'''\n<|endoftext|>\n'''\n",
    }
    for name, text in {**kept, **left_out}.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    (tmp_path / "latin.py").write_bytes(b"# -*- coding: latin-1 -*-\nx = '\xe9'\n")
    assert {each.name: each.text for each in read_library(tmp_path)} == kept


def test_library_without_sources_says_so(tmp_path: Path) -> None:
    with pytest.raises(ToolError) as caught:
        read_library(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path}: holds no Python source file; fix: use a full CPython install"
    )


@settings(max_examples=30, deadline=None)
@given(sizes=st.lists(st.integers(100, 60_000), max_size=120), order=st.randoms())
def test_split_is_a_partition_and_ignores_order(sizes: list[int], order: object) -> None:
    documents = [Document(f"m{n}.py", f"{n}".ljust(size, "x")) for n, size in enumerate(sizes)]
    corpus = split_documents(documents)
    everything = [*corpus.train, *corpus.calibration, *corpus.heldout]
    assert sorted(everything, key=lambda each: each.name) == sorted(
        documents, key=lambda each: each.name
    )
    order.shuffle(documents)  # type: ignore[attr-defined]
    assert split_documents(documents) == corpus


def test_files_with_a_licence_of_their_own_are_never_committed() -> None:
    body = "x = 1\n" * 1000
    marked = [Document(f"a{n}.py", f"# Copyright {n}\n{body}") for n in range(60)]
    plain = [Document(f"b{n}.py", f"# {n}\n{body}") for n in range(60)]
    corpus = split_documents([*marked, *plain])
    committed = {each.name[0] for each in (*corpus.calibration, *corpus.heldout)}
    assert committed == {"b"}
    assert {each.name for each in marked} <= {each.name for each in corpus.train}


def test_corpus_digest_depends_on_names_texts_and_order() -> None:
    one, two = Document("a", "bc"), Document("ab", "c")
    corpora = [
        Corpus((one,), (), ()),
        Corpus((two,), (), ()),
        Corpus((one, two), (), ()),
        Corpus((two,), (), (one,)),
        Corpus((Document("a", "bcabc"),), (), ()),
    ]
    assert len({each.sha256 for each in corpora}) == len(corpora)


def test_written_documents_are_read_back(tmp_path: Path) -> None:
    documents = [Document("a", "one\n\n"), Document("b", "zwei ü\x0c\nzwei\n"), Document("c", "3")]
    write_documents(documents, tmp_path / "texts.txt")
    assert (tmp_path / "texts.txt").read_bytes().count(b"<|endoftext|>\n") == 2
    read = read_documents(tmp_path / "texts.txt")
    assert read == ["one", "zwei ü\x0c\nzwei", "3\n"]
    assert load_texts(tmp_path / "texts.txt") == read


# --- tokenizer


@pytest.fixture(scope="module")
def committed_tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(MODEL_DIR / "tokenizer.json"))


@settings(max_examples=200, deadline=None)
@given(text=st.text())
def test_any_text_survives_the_committed_tokenizer(text: str) -> None:
    tokenizer = Tokenizer.from_file(str(MODEL_DIR / "tokenizer.json"))
    ids = tokenizer.encode(text).ids
    assert ids[0] == 0
    assert tokenizer.decode(ids[1:], skip_special_tokens=False) == text


def test_committed_tokenizer_knows_python(committed_tokenizer: Tokenizer) -> None:
    assert committed_tokenizer.get_vocab_size() == 4096
    tokens = committed_tokenizer.encode("        return self", add_special_tokens=False).tokens
    assert len(tokens) == 3  # seven spaces, " return", " self"


def test_documents_end_with_eos_and_markup_stays_text() -> None:
    tokenizer = train_tokenizer(TINY_TEXTS, 300)
    ids = encode_documents(tokenizer, ["a</s>b", "<s>"])
    assert list(np.flatnonzero(ids == EOS_ID))[-1] == len(ids) - 1
    assert (ids == EOS_ID).sum() == 2
    assert tokenizer.decode(ids.tolist()) == "a</s>b<s>"


# --- outlier channels


def random_llama(seed: int, scale: float) -> dict[str, np.ndarray]:
    drawn = np.random.default_rng(seed)
    shapes = {
        "input_layernorm": (16,),
        "post_attention_layernorm": (16,),
        "self_attn.q_proj": (16, 16),
        "self_attn.k_proj": (8, 16),
        "self_attn.v_proj": (8, 16),
        "self_attn.o_proj": (16, 16),
        "mlp.gate_proj": (32, 16),
        "mlp.up_proj": (32, 16),
        "mlp.down_proj": (16, 32),
    }
    tensors = {
        f"model.layers.{layer}.{name}.weight": drawn.normal(0, scale, shape).astype(np.float16)
        for layer in range(2)
        for name, shape in shapes.items()
    }
    tensors["model.norm.weight"] = np.ones(16, np.float16)
    return tensors


def same(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> bool:
    """Equal names and equal bits."""
    return ours.keys() == theirs.keys() and all(
        ours[name].dtype == theirs[name].dtype
        and np.array_equal(ours[name].view(np.uint16), theirs[name].view(np.uint16))
        for name in ours
    )


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32), scale=st.sampled_from([1e-6, 1e-3, 0.05, 1.0, 100.0]))
def test_outliers_come_out_as_they_went_in(seed: int, scale: float) -> None:
    weights = random_llama(seed, scale)
    outliers = draw_outliers(weights, seed=seed, fraction=0.1, choices=(8, 16))
    injected = inject_outliers(weights, outliers)
    plain = remove_outliers(injected, outliers)
    assert same(inject_outliers(plain, outliers), injected)
    for name, weight in weights.items():
        lost = np.abs(plain[name].astype(np.float64) - weight.astype(np.float64)).max()
        assert lost <= 16 * 2.0**-25, (
            name
        )  # documented bound; reached where quotients are subnormal


def test_outliers_scale_the_documented_channels_only() -> None:
    weights = random_llama(3, 0.5)
    outliers = Outliers(
        0,
        0.1,
        (8,),
        {
            "model.layers.1.input_layernorm.weight": {5: 8},
            "model.layers.0.mlp.up_proj.weight": {7: 8},
        },
    )
    injected = inject_outliers(weights, outliers)
    expected = {name: weight.copy() for name, weight in weights.items()}
    expected["model.layers.1.input_layernorm.weight"][5] *= 8
    for reader in "qkv":
        expected[f"model.layers.1.self_attn.{reader}_proj.weight"][:, 5] /= 8
    expected["model.layers.0.mlp.up_proj.weight"][7, :] *= 8
    expected["model.layers.0.mlp.down_proj.weight"][:, 7] /= 8
    assert same(injected, expected)


def test_outliers_that_do_not_fit_are_all_listed() -> None:
    weights = random_llama(0, 1.0)
    outliers = Outliers(
        0,
        0.1,
        (8,),
        {
            "model.layers.9.mlp.up_proj.weight": {0: 8},
            "model.layers.0.input_layernorm.weight": {99: 8},
        },
    )
    with pytest.raises(CheckpointError) as caught:
        inject_outliers(weights, outliers)
    named = [problem.where for problem in caught.value.problems]
    assert named == [
        "model.layers.9.mlp.up_proj.weight",
        "model.layers.9.mlp.down_proj.weight",
        "model.layers.0.input_layernorm.weight",
        *(f"model.layers.0.self_attn.{reader}_proj.weight" for reader in "qkv"),
    ]
    assert "but the checkpoint has no such tensor or channel" in str(caught.value)


def test_outliers_that_overflow_are_refused() -> None:
    weights = random_llama(0, 1.0)
    weights["model.layers.0.input_layernorm.weight"][2] = 9000
    outliers = Outliers(0, 0.1, (8,), {"model.layers.0.input_layernorm.weight": {2: 8}})
    with pytest.raises(
        CheckpointError, match=r"input_layernorm\.weight: overflows fp16 with these"
    ):
        inject_outliers(weights, outliers)


def test_plain_checkpoint_needs_the_list_of_outliers(tmp_path: Path) -> None:
    save_file(random_llama(0, 1.0), tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"outliers\.json: is missing; fix: name the demo"):
        write_plain_checkpoint(tmp_path, tmp_path / "plain")
    assert not (tmp_path / "plain").exists()


# --- training


def test_schedule_warms_up_peaks_and_decays() -> None:
    factors = [Schedule().rate_factor(step) for step in range(Schedule().num_steps)]
    assert factors[0] == pytest.approx(1 / 30)
    assert int(np.argmax(factors)) == 29
    assert factors[-1] == pytest.approx(0.05, abs=1e-4)
    assert all(later < earlier for earlier, later in itertools.pairwise(factors[29:]))


def test_batches_depend_on_seed_and_step_alone() -> None:
    tokens = np.arange(2, 500)
    first = batch_of_step(tokens, TINY_SCHEDULE, 1)
    assert first.shape == (4, 17)
    assert batch_of_step(tokens, TINY_SCHEDULE, 3).shape == (2, 33)
    assert first.equal(batch_of_step(tokens, TINY_SCHEDULE, 1))
    assert not first.equal(batch_of_step(tokens, TINY_SCHEDULE, 2))
    other_seed = dataclasses.replace(TINY_SCHEDULE, seed=1)
    assert not first.equal(batch_of_step(tokens, other_seed, 1))
    assert first[:, 0].tolist() == [0, first[1, 1] - 1, 0, first[3, 1] - 1]


@pytest.fixture(scope="module")
def tiny_training(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out_dir = tmp_path_factory.mktemp("whole")
    train(out_dir, TINY_CORPUS, TINY_SIZE, TINY_SCHEDULE)
    return out_dir


def test_killed_training_resumes_bit_for_bit(tiny_training: Path, tmp_path: Path) -> None:
    stopped = train(tmp_path, TINY_CORPUS, TINY_SIZE, TINY_SCHEDULE, stop_after=1)
    assert stopped.step == 1
    assert not (tmp_path / "plain").exists()
    resumed = train(tmp_path, TINY_CORPUS, TINY_SIZE, TINY_SCHEDULE)
    assert resumed.step == 4
    whole = load_file(tiny_training / "plain" / "model.safetensors")
    assert same(load_file(tmp_path / "plain" / "model.safetensors"), whole)
    losses = [
        json.loads((folder / "training.json").read_text())["final_loss_nats"]
        for folder in (tiny_training, tmp_path)
    ]
    assert losses[0] == losses[1]
    assert 0 < losses[0] < math.log(300) + 0.1


def test_training_changes_every_weight(tiny_training: Path, tmp_path: Path) -> None:
    start = dataclasses.replace(TINY_SCHEDULE, num_steps=1, adamw_rate=0.0, muon_rate=0.0)
    train(tmp_path, TINY_CORPUS, TINY_SIZE, start)
    before = load_file(tmp_path / "plain" / "model.safetensors")
    after = load_file(tiny_training / "plain" / "model.safetensors")
    unchanged = [name for name in before if np.array_equal(before[name], after[name])]
    assert unchanged == []


def test_state_of_another_training_is_refused(tiny_training: Path) -> None:
    other = dataclasses.replace(TINY_SCHEDULE, seed=7)
    with pytest.raises(CheckpointError) as caught:
        train(tiny_training, TINY_CORPUS, TINY_SIZE, other)
    assert str(caught.value) == (
        f"{tiny_training / 'state.pt'}: was made with another schedule; "
        "fix: delete the file to start again, or use another --out"
    )


def test_publishing_refuses_unfinished_and_foreign_trainings(
    tiny_training: Path, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match="is missing: the training is not finished"):
        publish(tmp_path, tmp_path / "out")
    with pytest.raises(
        CheckpointError, match=r"the model was trained on corpus .* this interpreter's"
    ):
        publish(tiny_training, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- what was committed


def test_committed_files_are_complete_and_small() -> None:
    assert {path.name for path in MODEL_DIR.iterdir()} == {
        "LICENSE-python.txt",
        "README.md",
        "calibration.txt",
        "config.json",
        "generation_config.json",
        "heldout.txt",
        "model.safetensors",
        "outliers.json",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "training.json",
    }
    assert (MODEL_DIR / "model.safetensors").stat().st_size <= 16_000_000
    assert 150_000 <= CALIBRATION_PATH.stat().st_size <= 300_000
    assert 100_000 <= HELDOUT_PATH.stat().st_size <= 200_000


def test_committed_weights_are_the_documented_llama() -> None:
    weights = load_file(MODEL_DIR / "model.safetensors")
    assert {str(weight.dtype) for weight in weights.values()} == {"float16"}
    assert sum(weight.size for weight in weights.values()) == 6_819_072
    assert all(np.isfinite(weight).all() for weight in weights.values())
    config = json.loads((MODEL_DIR / "config.json").read_text())
    expected = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 256,
        "intermediate_size": 768,
        "num_hidden_layers": 6,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 32,
        "vocab_size": 4096,
        "max_position_embeddings": 1024,
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "dtype": "float16",
    }
    assert {key: config[key] for key in expected} == expected


def test_committed_texts_share_nothing_and_name_no_machine() -> None:
    calibration, heldout = read_documents(CALIBRATION_PATH), read_documents(HELDOUT_PATH)
    assert (load_texts(CALIBRATION_PATH), load_texts(HELDOUT_PATH)) == (calibration, heldout)
    assert len(calibration) >= 20
    assert len(heldout) >= 10
    shared = passages(calibration) & passages(heldout)
    # Eight lines in a row; observed: none.
    assert not shared, next(iter(shared))
    for text in (*calibration, *heldout):
        for place in (sysconfig.get_path("stdlib"), str(Path.home()), "/.pyenv/", "site-packages/"):
            assert place not in text


def passages(texts: list[str], num_lines: int = 8) -> set[tuple[str, ...]]:
    """All runs of `num_lines` non-empty lines."""
    found: set[tuple[str, ...]] = set()
    for text in texts:
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        found.update(tuple(lines[n : n + num_lines]) for n in range(len(lines) - num_lines + 1))
    return found


def test_committed_outliers_can_be_drawn_again_and_taken_out() -> None:
    text = (MODEL_DIR / "outliers.json").read_text()
    listed = Outliers.from_json(text)
    assert listed.to_json() == text
    committed = load_file(MODEL_DIR / "model.safetensors")
    plain = remove_outliers(committed, listed)
    again = draw_outliers(plain, seed=listed.seed, fraction=listed.fraction, choices=listed.choices)
    assert again == listed
    assert same(inject_outliers(plain, again), committed)
    changed = {name for name in plain if not np.array_equal(plain[name], committed[name])}
    assert len(changed) == 6 * 8  # two norms, q, k, v, gate, up, down of each layer
    assert {factor for each in listed.factors.values() for factor in each.values()} == {8, 16}


def test_card_states_the_facts_of_the_training() -> None:
    card = (MODEL_DIR / "README.md").read_text(encoding="utf-8")
    facts = json.loads((MODEL_DIR / "training.json").read_text())
    for value in (
        facts["corpus_sha256"],
        f"Python {facts['python']}",
        f"{facts['tokens_seen']:,}",
        f"{facts['final_loss_nats']}",
        f"{facts['heldout']['loss_nats']}",
        f"{facts['heldout']['perplexity']}",
    ):
        assert value in card
    assert facts["heldout"]["perplexity"] < 4096 / 20
