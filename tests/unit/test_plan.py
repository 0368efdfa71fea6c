"""The plan: every problem at once, from headers alone, in a moment."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from pipeline.config import load_config
from pipeline.errors import CheckpointError
from pipeline.explain import explain
from pipeline.external import DigestCache
from pipeline.plan import Plan, make_plan
from pipeline.weights import override_weights
from pipeline.workspace import Workspace
from tests.build_config import write_build
from tests.machines import AMPLE
from tests.tiny import write_tiny_llama
from tests.tiny_text import write_tiny_tokenizer

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_build(tmp_path_factory.mktemp("build"))


def _plan(config: Path, root: Path) -> Plan:
    workspace = Workspace(root)
    return make_plan(load_config(config), workspace.store, workspace.digests(), AMPLE)


def _variant(build: Path, tmp_path: Path, **changes: object) -> Path:
    """A copy of the build's YAML with dotted keys changed; paths made absolute."""
    data = yaml.safe_load(build.read_text())
    data["model"] = {"source": "directory", "path": str(build.parent / "weights")}
    data["quantize"]["calibration"]["data"] = str(build.parent / "text.txt")
    data["verify"]["data"] = str(build.parent / "text.txt")
    for key, value in changes.items():
        section = data
        *parents, last = key.split("__")
        for parent in parents:
            section = section.setdefault(parent, {})
        section[last] = value
    path = tmp_path / "variant.yaml"
    path.write_text(yaml.safe_dump(data, sort_keys=False))
    return path


def _texts(plan: Plan) -> list[str]:
    return [str(problem) for problem in plan.problems]


def test_the_steps_of_a_quantized_build(build: Path, tmp_path: Path) -> None:
    config = _variant(build, tmp_path, quantize__format="int4_awq")
    plan = _plan(config, tmp_path)
    names = [step.stage.name for step in plan.steps]
    assert names == ["fetch", "quantize", "convert", "build", "verify", "serve"]
    assert plan.step("convert").inputs == {"checkpoint": "quantize"}
    assert all(step.status == "to do" for step in plan.steps)


def test_without_quantization_there_is_no_quantize_step(build: Path, tmp_path: Path) -> None:
    plan = _plan(build, tmp_path)
    assert "quantize" not in [step.stage.name for step in plan.steps]
    assert plan.step("convert").inputs == {"checkpoint": "fetch"}


def _keys(config: Path, root: Path) -> dict[str, str]:
    plan = _plan(config, root)
    assert _texts(plan) == []
    return {step.stage.name: step.action.key for step in plan.steps if step.action is not None}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"quantize__group_size": 128}, {"quantize", "convert", "build", "verify", "serve"}),
        ({"build__max_batch_size": 3}, {"build", "verify", "serve"}),
        ({"verify__num_windows": 5}, {"verify"}),
        ({"serve__model_name": "other"}, {"serve"}),
        ({"serve__http_port": 9000}, set()),
        ({"build__launch": "mpirun"}, set()),
        ({"target": "l4"}, set()),  # the CPU engine does not depend on the GPU
    ],
)
def test_a_change_repeats_only_what_depends_on_it(
    build: Path, tmp_path: Path, change: dict[str, object], expected: set[str]
) -> None:
    before = _keys(_variant(build, tmp_path, quantize__format="int4_awq"), tmp_path)
    after = _keys(_variant(build, tmp_path, quantize__format="int4_awq", **change), tmp_path)
    assert {name for name in after if after[name] != before[name]} == expected


def test_several_ranks_are_not_served(build: Path, tmp_path: Path) -> None:
    plan = _plan(_variant(build, tmp_path, mapping__tp=2), tmp_path)
    assert _texts(plan) == []
    assert [step.stage.name for step in plan.steps] == ["fetch", "convert", "build", "verify"]
    assert (
        "2 ranks: no Triton model repository is made; it would serve from the CPU, which runs one rank"
        in plan.notes
    )


def test_keys_follow_the_content_of_files_not_their_path(build: Path, tmp_path: Path) -> None:
    before = _keys(build, tmp_path)
    moved = tmp_path / "moved"
    shutil.copytree(build.parent, moved)
    assert _keys(moved / "tiny.yaml", tmp_path) == before
    weights = moved / "weights" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    after = _keys(moved / "tiny.yaml", tmp_path)
    assert all(after[name] != before[name] for name in after)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            {"build__backend": "tensorrt_rtx", "target": "h100-80gb"},
            "target: ",
        ),
        (
            {"build__backend": "tensorrt_rtx", "build__also_for": ["l4", "h100-80gb"]},
            "build.also_for: TensorRT-RTX 1.7 cannot compile for h100-80gb (SM90)",
        ),
        (
            {"build__also_for": ["l4"]},
            "build.also_for: an engine of backend onnxruntime is for one target; "
            "allowed: backend tensorrt_rtx; fix: remove it, or one YAML per target",
        ),
        (
            {"build__max_seq_len": 512},
            "build.max_seq_len: 512 is more than the model's max_position_embeddings; "
            "allowed: at most 256",
        ),
        (
            {"verify__seq_len": 128},
            "verify.seq_len: 128 does not fit the engine; allowed: at most build.max_seq_len, 64",
        ),
        ({"verify__data": "nowhere.txt"}, "verify.data: no such file: "),
        ({"verify__data": "weights/config.json"}, "verify.data: "),
        ({"model__path": "nowhere"}, "nowhere: no such directory; allowed: a directory in Hugging"),
    ],
)
def test_each_problem_is_found_before_the_start(
    build: Path, tmp_path: Path, change: dict[str, object], expected: str
) -> None:
    texts = _texts(_plan(_variant(build, tmp_path, **change), tmp_path))
    assert any(expected in text for text in texts), texts


def test_an_engine_that_cannot_fit_its_target(tmp_path: Path) -> None:
    """Llama-2-70B dimensions in fp16 on a 24 GiB card, known from the YAML alone."""
    shape = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "vocab_size": 32000,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
    }
    path = tmp_path / "x.yaml"
    config = {"model": {"source": "synthetic", "shape": shape}, "quantize": {"format": "fp16"}}
    path.write_text(yaml.safe_dump(config))
    plan = _plan(path, tmp_path)
    assert plan.forecast is not None
    assert 137e9 < plan.forecast.rank_bytes[0] < 139e9  # 137.95 GB: published parameter count x 2
    (text,) = _texts(plan)
    assert "weights and KV cache need 139.30 GB, the target has 25.77 GB" in text
    assert "quantize.format" not in text  # 36 GB of int4, on one card, are too many
    assert "mapping.tp: 8 (8 GPUs, weights 17.25 GB" in text


def test_mixed_dtypes_are_seen_by_the_plan(build: Path, tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    broken = _broken_weights(build, tmp_path)
    tensors = load_file(broken / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = tensors[name].astype("float32")
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    config = _variant(build, tmp_path, model__path=str(broken), quantize__format="int4_awq")
    texts = _texts(_plan(config, tmp_path))
    wanted = f"mix F16 (model.layers.0.input_layernorm.weight), F32 ({name})"
    assert any(wanted in text for text in texts), texts


def test_two_savers_of_digests_lose_nothing(build: Path, tmp_path: Path) -> None:
    one, other = (DigestCache(tmp_path / "digests.json") for _ in range(2))
    first, second = build.parent / "text.txt", build.parent / "weights" / "config.json"
    one.digest(first)
    other.digest(second)
    one.save()
    other.save()
    both = DigestCache(tmp_path / "digests.json")
    assert both.peek(first) is not None
    assert both.peek(second) is not None
    (tmp_path / "digests.json").write_text("[]")
    assert DigestCache(tmp_path / "digests.json").peek(first) is None


def test_all_problems_are_listed_at_once(build: Path, tmp_path: Path) -> None:
    config = _variant(
        build, tmp_path, mapping__tp=3, build__max_seq_len=512, verify__data="nowhere.txt"
    )
    assert len(_texts(_plan(config, tmp_path))) >= 3


def _broken_weights(build: Path, tmp_path: Path) -> Path:
    broken = tmp_path / "broken"
    shutil.copytree(build.parent / "weights", broken)
    return broken


def test_truncated_weights(build: Path, tmp_path: Path) -> None:
    broken = _broken_weights(build, tmp_path)
    file = broken / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    plan = _plan(_variant(build, tmp_path, model__path=str(broken)), tmp_path)
    assert any("model.safetensors" in text for text in _texts(plan)), _texts(plan)
    with pytest.raises(CheckpointError):
        plan.raise_problems()


def test_an_unsupported_architecture_names_the_supported_ones(build: Path, tmp_path: Path) -> None:
    broken = _broken_weights(build, tmp_path)
    config = json.loads((broken / "config.json").read_text())
    config["architectures"] = ["BloomForCausalLM"]
    (broken / "config.json").write_text(json.dumps(config))
    texts = _texts(_plan(_variant(build, tmp_path, model__path=str(broken)), tmp_path))
    assert any("BloomForCausalLM" in text and "LlamaForCausalLM" in text for text in texts), texts


def test_a_group_size_that_does_not_divide(build: Path, tmp_path: Path) -> None:
    from tests.tiny import write_tiny_llama

    odd = tmp_path / "odd"
    shutil.copytree(build.parent / "weights", odd)
    write_tiny_llama(odd, intermediate_size=192)
    config = _variant(
        build, tmp_path, model__path=str(odd), quantize__format="int4_awq", quantize__group_size=128
    )
    texts = _texts(_plan(config, tmp_path))
    assert any(
        "quantize.group_size" in text and "192" in text and "64" in text for text in texts
    ), texts


def test_synthetic_is_planned_without_weights(tmp_path: Path) -> None:
    loaded = override_weights(load_config(CONFIGS / "demo.yaml"), "synthetic")
    workspace = Workspace(tmp_path)
    plan = make_plan(loaded, workspace.store, workspace.digests())
    assert _texts(plan) == []
    assert plan.loaded.config.name == "demo-synthetic"


def test_explain_before_anything_was_made(build: Path, tmp_path: Path) -> None:
    plan = _plan(build, tmp_path)
    reasons = explain(plan, Workspace(tmp_path).store, {})
    assert reasons.pop("publish") == ["nothing is published under this name"]
    assert set(map(tuple, reasons.values())) == {("never made before",)}


def test_explain_does_not_compare_with_another_model(build: Path, tmp_path: Path) -> None:
    """A demo in the store says nothing of why a model from the Hub is fetched."""
    store = Workspace(tmp_path).store
    step = _plan(CONFIGS / "demo.yaml", tmp_path).step("fetch")
    assert step.action is not None
    store.commit(step.action, store.new_work_dir(step.action), {})
    reasons = explain(_plan(CONFIGS / "llama2-13b.yaml", tmp_path), store, {})
    assert reasons["fetch"] == ["never made before"]


def test_large_files_are_not_hashed_by_a_plan(
    build: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.plan.HASH_AT_ONCE_BYTES", 1000)
    plan = _plan(build, tmp_path)
    assert plan.unhashed_bytes > 100_000
    assert {step.status for step in plan.steps} == {"unknown"}


def test_the_command_prints_one_json_document(build: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pipeline", "plan", str(build), "--json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    plan = json.loads(done.stdout)
    assert [step["stage"] for step in plan["steps"]] == [
        "fetch",
        "convert",
        "build",
        "verify",
        "serve",
    ]
    assert plan["forecast"]["fits"]


def test_heads_without_an_attention_kernel_are_found_by_the_plan(tmp_path: Path) -> None:
    weights = write_tiny_llama(tmp_path / "weights", head_dim=12)
    write_tiny_tokenizer(weights)
    config = write_build(tmp_path, backend="tensorrt_rtx", target="rtx4090")
    (text,) = _texts(_plan(config, tmp_path))
    assert text.endswith(
        "build.backend: TensorRT-RTX has no attention kernel for heads of 12 channels; "
        "allowed: multiples of 8, 16 to 256; fix: build.backend: onnxruntime"
    )
