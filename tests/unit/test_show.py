"""`show`: every kind of directory is named for what it is, and anything else is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import onnx
import pytest
from safetensors.numpy import load_file, save_file

from pipeline.checkpoint.convert import convert_checkpoint
from pipeline.checkpoint.describe import TensorEntry, group_tensors, ranges
from pipeline.cli import main
from pipeline.config import load_config
from pipeline.engine import write_engine_config
from pipeline.errors import CheckpointError
from pipeline.network import export_network
from pipeline.network.limits import BuildLimits
from pipeline.plan import make_plan
from pipeline.progress import SilentProgress
from pipeline.show import contents_text, describe
from pipeline.workspace import Workspace
from tests.build_config import write_build
from tests.foreign_checkpoints import write_foreign
from tests.tiny import write_tiny_llama
from tests.tiny_models import write_tiny
from tests.tiny_text import write_tiny_tokenizer


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A TensorRT-LLM checkpoint, tp 2, pp 2, 3 layers."""
    directory = tmp_path_factory.mktemp("ranks")
    source = write_tiny_llama(directory / "source", num_hidden_layers=3)
    (directory / "out").mkdir()
    convert_checkpoint(source, directory / "out", tp=2, pp=2, progress=SilentProgress())
    return directory / "out"


def test_hugging_face(tiny_llama: Path) -> None:
    contents = describe(tiny_llama)
    assert contents.kind == "Hugging Face checkpoint"
    assert contents.architecture == "LlamaForCausalLM"
    assert contents.quantization == "none"
    assert not contents.mapping
    assert not contents.problems
    found = load_file(tiny_llama / "model.safetensors")
    assert {tensor.name: tensor.shape for tensor in contents.tensors} == {
        name: values.shape for name, values in found.items()
    }
    assert contents.total_bytes == sum(values.nbytes for values in found.values())


def test_layers_share_a_line(tmp_path: Path) -> None:
    text = contents_text(
        describe(write_tiny_llama(tmp_path, num_hidden_layers=80, vocab_size=64, hidden_size=32))
    )
    lines = text.splitlines()
    assert len(lines) < 20
    (line,) = [line for line in lines if "q_proj" in line]
    assert line.split() == [
        "model.layers.{0-79}.self_attn.q_proj.weight",
        *("F16", "32", "x", "32", "80", "163.84", "kB"),
    ]
    assert lines[-1].startswith("total: 723 tensors, ")


def test_tensorrt_llm(ranks: Path) -> None:
    contents = describe(ranks)
    assert contents.kind == "TensorRT-LLM checkpoint"
    assert contents.architecture == "LlamaForCausalLM"
    assert dict(contents.mapping) == {"tp": 2, "pp": 2}
    sizes = {
        rank: sum(x.nbytes for x in load_file(ranks / f"rank{rank}.safetensors").values())
        for rank in range(4)
    }
    assert contents.rank_bytes() == sizes
    text = contents_text(contents)
    assert "LlamaForCausalLM; quantization: none; tp 2, pp 2" in text
    # 2 layers on ranks 0 and 1, counted from 0; 1 layer on ranks 2 and 3
    (line,) = [line for line in text.splitlines() if "mlp.fc.weight" in line]
    assert line.split()[0] == "transformer.layers.{0-1}.mlp.fc.weight"
    assert line.split()[5:] == ["6", "196.61", "kB", "0-3"]


def test_engine(ranks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_tiny_llama(tmp_path / "source")
    checkpoint, engine = tmp_path / "checkpoint", tmp_path / "engine"
    checkpoint.mkdir()
    engine.mkdir()
    convert_checkpoint(source, checkpoint, tp=1, pp=1, progress=SilentProgress())
    limits = BuildLimits(max_batch_size=1, max_seq_len=32, max_input_len=16)
    export_network(checkpoint, 0, engine, limits, SilentProgress())
    write_engine_config(checkpoint, engine, limits)
    assert main(["show", str(engine), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["kind"], shown["architecture"]) == ("engine", "LlamaForCausalLM")
    assert shown["mapping"] == {"tp": 1, "pp": 1}
    tensors = {tensor["name"]: tensor for tensor in shown["tensors"]}
    assert tensors["lm_head.weight"] == {
        "name": "lm_head.weight",
        "dtype": "FLOAT16",
        "shape": [512, 128],
        "bytes": 512 * 128 * 2,
        "file": "rank0.weights",
        "rank": 0,
    }
    assert main(["show", str(engine)]) == 0
    assert capsys.readouterr().out.startswith(f"engine in {engine}\nLlamaForCausalLM; ")
    (engine / "rank0.onnx").write_bytes(b"\xff\xff")
    with pytest.raises(CheckpointError, match=r"rank0\.onnx: cannot be read: "):
        describe(engine)
    (engine / "rank0.onnx").unlink()
    with pytest.raises(CheckpointError, match=r"engine: tp 1, pp 1, but no rank0\.onnx"):
        describe(engine)


def test_an_engine_of_tensorrt_llm(
    ranks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A config and compiled engines, whose tensors nobody else can list."""
    config = json.loads((ranks / "config.json").read_text())
    mapping = {"world_size": 2, "tp_size": 2, "pp_size": 1, "moe_tp_size": -1, "moe_ep_size": -1}
    content = {"version": "1.2.1", "pretrained_config": config | {"mapping": mapping}}
    (tmp_path / "config.json").write_text(json.dumps(content))
    (tmp_path / "rank0.engine").write_bytes(bytes(1500))
    with pytest.raises(CheckpointError, match=r"tp 2, pp 1, but no rank1\.engine$"):
        describe(tmp_path)
    (tmp_path / "rank1.engine").write_bytes(bytes(2500))
    assert main(["show", str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"engine in {tmp_path}",
        "LlamaForCausalLM; quantization: none; tp 2, pp 1",
        "note: no rank*.onnx: the tensors are inside the engines, and are not listed",
        "",
        "rank0.engine: 1.50 kB",
        "rank1.engine: 2.50 kB",
    ]
    assert main(["show", str(tmp_path), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["files"] == {"rank0.engine": 1500, "rank1.engine": 2500}
    assert shown["tensors"] == []


def write_graph(directory: Path, *tensors: onnx.TensorProto) -> None:
    """An engine directory around one graph with these initializers."""
    directory.mkdir()
    pretrained = {"architecture": "X", "mapping": {"tp_size": 1, "pp_size": 1}}
    (directory / "config.json").write_text(json.dumps({"pretrained_config": pretrained}))
    graph = onnx.helper.make_graph([], "g", [], [], initializer=tensors)
    (directory / "rank0.onnx").write_bytes(onnx.helper.make_model(graph).SerializeToString())


def external(name: str, dtype: int, dims: list[int], **entries: str) -> onnx.TensorProto:
    tensor = onnx.TensorProto(name=name, data_type=dtype, dims=dims)
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in entries.items():
        tensor.external_data.add(key=key, value=value)
    return tensor


def test_the_length_of_external_data_is_optional(tmp_path: Path) -> None:
    half, int4 = onnx.TensorProto.FLOAT16, onnx.TensorProto.INT4
    engine = tmp_path / "engine"
    write_graph(
        engine,
        external("a", half, [3, 5], location="rank0.weights"),
        external("b", int4, [3, 5], location="rank0.weights", offset="30"),
        external("c", half, [2], location="rank0.weights", offset="38", length="4"),
    )
    with pytest.raises(
        CheckpointError, match=r"rank0\.onnx: its weights are in 'rank0\.weights', which is missing"
    ):
        describe(engine)
    (engine / "rank0.weights").write_bytes(bytes(42))
    sizes = {tensor.name: tensor.nbytes for tensor in describe(engine).tensors}
    assert sizes == {"a": 30, "b": 8, "c": 4}


def test_entries_for_external_data_that_make_no_sense(tmp_path: Path) -> None:
    half = onnx.TensorProto.FLOAT16
    write_graph(
        tmp_path / "engine",
        external("a", half, [3], offset="0"),
        external("b", half, [3], location="rank0.weights", length="many"),
        external("c", 999, [3], location="rank0.weights"),
    )
    with pytest.raises(CheckpointError) as caught:
        describe(tmp_path / "engine")
    assert len(caught.value.problems) == 3
    assert "'b': its entry for external data cannot be read (invalid literal" in str(caught.value)


def configured(source: Path, directory: Path, **changes: object) -> Path:
    shutil.copytree(source, directory)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | changes))
    return directory


def test_quantized(tiny_llama: Path, tmp_path: Path) -> None:
    declared = {"quant_method": "made_up", "bits": 3, "group_size": 99}
    contents = describe(configured(tiny_llama, tmp_path / "a", quantization_config=declared))
    assert contents.quantization == "made_up, bits 3, group_size 99"
    assert "quant_method 'made_up'" in str(contents.problems[0])
    modelopt = shutil.copytree(tiny_llama, tmp_path / "b")
    fields = {"quant_algo": "W4A16_AWQ", "group_size": 64, "kv_cache_quant_algo": "FP8"}
    (modelopt / "hf_quant_config.json").write_text(json.dumps({"quantization": fields}))
    assert describe(modelopt).quantization == "ModelOpt W4A16_AWQ, groups of 64, KV cache FP8"


def test_what_convert_would_refuse_is_listed(tiny_llama: Path, tmp_path: Path) -> None:
    directory = shutil.copytree(tiny_llama, tmp_path / "bad")
    tensors = load_file(directory / "model.safetensors")
    for layer in range(2):
        for linear in ("q_proj", "k_proj", "v_proj", "o_proj"):
            del tensors[f"model.layers.{layer}.self_attn.{linear}.weight"]
    del tensors["model.norm.weight"], tensors["lm_head.weight"]
    save_file(tensors, directory / "model.safetensors")
    text = contents_text(describe(directory))
    assert "convert would refuse it:\n  model.layers.0.self_attn.q_proj.weight: missing" in text
    assert text.endswith("  and 2 more (--json has all)")
    unknown = configured(tiny_llama, tmp_path / "unknown", architectures=["NoSuchForCausalLM"])
    contents = describe(unknown)
    assert contents.architecture == "NoSuchForCausalLM"
    assert "NoSuchForCausalLM" in str(contents.problems[0])


def test_none_of_these(ranks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", str(tmp_path)]) == 3
    message = capsys.readouterr().err
    assert f"{tmp_path}: no config.json" in message.replace("\n", "")
    assert "allowed: a Hugging Face checkpoint (config.json with `architectures`), " in message
    (tmp_path / "config.json").write_text('{"a": 1}')
    with pytest.raises(CheckpointError, match=r"its config\.json is of no kind that is known here"):
        describe(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json: not valid JSON"):
        describe(tmp_path)
    lost = shutil.copytree(ranks, tmp_path / "lost")
    (lost / "rank1.safetensors").unlink()
    (lost / "rank3.safetensors").unlink()
    with pytest.raises(
        CheckpointError, match=r"tp 2, pp 2, but no rank1\.safetensors, rank3\.safetensors"
    ):
        describe(lost)
    wrong = configured(ranks, tmp_path / "wrong", mapping={"tp_size": 0})
    with pytest.raises(CheckpointError, match=r"config\.json: mapping: \{'tp_size': 0\}; allowed"):
        describe(wrong)


@pytest.mark.parametrize(
    ("mapping", "text"),
    [
        (
            {"tp_size": 10**9, "pp_size": 1},
            "tp 1000000000, pp 1 are 1000000000 ranks; allowed: up to",
        ),
        ({"tp_size": 100, "pp_size": 100}, "tp 100, pp 100 are 10000 ranks; allowed: up to 4096"),
        ({"tp_size": -1, "pp_size": 1}, "{'tp_size': -1, 'pp_size': 1}; allowed: "),
        ({"tp_size": 1, "pp_size": 1, "moe_ep_size": -2}, "'moe_ep_size': -2}; allowed: "),
        (
            {"tp_size": 64, "pp_size": 1},
            "no rank4.safetensors, rank5.safetensors, rank6.safetensors",
        ),
        ({"tp_size": 64, "pp_size": 1}, "rank11.safetensors and 52 more"),
    ],
)
def test_sizes_that_cannot_be(
    ranks: Path, tmp_path: Path, mapping: dict[str, int], text: str
) -> None:
    with pytest.raises(CheckpointError) as caught:
        describe(configured(ranks, tmp_path / "wrong", mapping=mapping))
    assert text in str(caught.value)


def test_sizes_that_tensorrt_llm_derives(ranks: Path, tmp_path: Path) -> None:
    mapping = {"tp_size": 2, "pp_size": 2, "moe_tp_size": -1, "moe_ep_size": -1}
    contents = describe(configured(ranks, tmp_path / "defaults", mapping=mapping))
    assert dict(contents.mapping) == {"tp": 2, "pp": 2}


def test_zero_points_are_named_for_what_they_are(ranks: Path, tmp_path: Path) -> None:
    plain = write_tiny_llama(tmp_path / "plain", hidden_size=256, intermediate_size=512)
    write_foreign(plain, tmp_path / "hf", method="awq")
    (tmp_path / "out").mkdir()
    convert_checkpoint(tmp_path / "hf", tmp_path / "out", tp=1, pp=1, progress=SilentProgress())
    text = contents_text(describe(tmp_path / "out"))
    assert "note: int4 with zero points, in this project's own layout " in text
    assert "TensorRT-LLM cannot load it" in text
    assert "note:" not in contents_text(describe(ranks))


def test_a_directory_that_is_linked_to_itself(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    loop = tmp_path / "loop"
    loop.symlink_to("loop")
    for path in (loop, loop / "below"):
        assert main(["show", str(path), "--json"]) == 3
        assert json.loads(capsys.readouterr().out)["problems"] == [
            {
                "where": str(loop),
                "what": "a symbolic link that leads in a circle (to loop)",
                "allowed": "",
                "fix": "remove it, or let it lead to what is meant",
            }
        ]
    directory = shutil.copytree(tiny_llama, tmp_path / "hf")
    for name in ("config.json", "manifest.json"):
        (directory / name).unlink(missing_ok=True)
        (directory / name).symlink_to(name)
        assert main(["show", str(directory), "--json"]) == (3 if name == "config.json" else 6)
        assert str(directory / name) in capsys.readouterr().out


def test_an_artifact_of_the_store_is_shown_as_what_it_is(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It has a manifest, but not a publisher's."""
    stored = shutil.copytree(tiny_llama, tmp_path / "stored")
    (stored / "manifest.json").write_text('{"action": {}, "files": {}}')
    assert main(["show", str(stored)]) == 0
    assert capsys.readouterr().out.startswith("Hugging Face checkpoint in ")


def test_experts_and_odd_shapes_are_grouped() -> None:
    names = [f"layers.{i}.experts.{j}.w1.weight" for i in range(3) for j in (0, 1, 3)]
    tensors = [TensorEntry(name, "F16", (4, 2), 16, "a") for name in names]
    tensors.append(TensorEntry("layers.1.experts.2.w1.weight", "F16", (5, 2), 20, "a"))
    same, other = group_tensors(tensors)
    assert (same.pattern, same.count) == ("layers.{0-2}.experts.{0-1, 3}.w1.weight", 9)
    assert (other.pattern, other.shape) == ("layers.1.experts.2.w1.weight", (5, 2))
    assert ranges([7, 2, 0, 1]) == "0-2, 7"


@pytest.mark.parametrize(
    ("architecture", "changes", "notes"),
    [
        ("GPTNeoXForCausalLM", {"intermediate_size": 384}, []),
        (
            "GPTNeoXForCausalLM",
            {"layer_norm_eps": 1e-6},
            [
                "intermediate_size 160: TensorRT-LLM's GPT-NeoX always has 4 x hidden_size and does not "
                "fit these weights",
                "norm_epsilon 1e-06: TensorRT-LLM computes every norm of GPT-NeoX with 1e-05, so its "
                "logits are slightly different",
            ],
        ),
        ("FalconForCausalLM", {}, []),
        (
            "FalconForCausalLM",
            {"layer_norm_epsilon": 1e-6},
            [
                "norm_epsilon 1e-06: TensorRT-LLM computes the last norm of Falcon, and without "
                "parallel attention that of the MLP, with 1e-05, so its logits are slightly different",
            ],
        ),
        (
            "Phi3ForCausalLM",
            {"head_dim": 32, "rope_scaling": None},
            [
                "head_size 32: TensorRT-LLM's Phi-3 takes hidden_size / num_attention_heads and does "
                "not fit these weights",
            ],
        ),
        ("LlamaForCausalLM", {"head_dim": 32, "rms_norm_eps": 1e-3}, []),
    ],
)
def test_what_tensorrt_llm_would_not_read_is_noted(
    tmp_path: Path, architecture: str, changes: dict[str, Any], notes: list[str]
) -> None:
    """In `show` of a checkpoint, and in the plan of one that is made for another tool."""
    weights = write_tiny(architecture, tmp_path / "weights", num_hidden_layers=1, **changes)
    (tmp_path / "out").mkdir()
    convert_checkpoint(weights, tmp_path / "out", tp=1, pp=1, progress=SilentProgress())
    assert list(describe(tmp_path / "out").notes) == notes
    write_tiny_tokenizer(weights)
    workspace = Workspace(tmp_path)
    for backend, expected in (("none", notes), ("onnxruntime", [])):
        config = write_build(tmp_path, build={"backend": backend})
        plan = make_plan(load_config(config), workspace.store, workspace.digests())
        assert list(plan.notes) == expected
