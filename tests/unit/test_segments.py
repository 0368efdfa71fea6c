"""A rank's CPU graph in segments: where it is cut, what each loads, and that it computes the same."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from pipeline.checkpoint.convert import convert_checkpoint
from pipeline.engine import sharded
from pipeline.engine.collectives import Alone
from pipeline.engine.onnxruntime import OnnxNetwork
from pipeline.engine.onnxruntime_backend import check_forward
from pipeline.engine.segments import RankGraph
from pipeline.engine.sharded import ShardedNetwork
from pipeline.errors import GateError
from pipeline.network import cpu_graph_path, export_network, weights_path
from pipeline.parallel import Mapping
from pipeline.progress import SilentProgress
from tests.family_checkpoints import random_model, write_checkpoint
from tests.network_logits import LENGTH, LIMITS, logits_in_chunks, random_ids
from tests.rank_checkpoints import write_random_rank
from tests.tiny import write_tiny_llama

QUIET = SilentProgress()
FAMILIES = ("LlamaForCausalLM", "GPT2LMHeadModel", "MixtralForCausalLM", "Gemma2ForCausalLM")


def engine_of(checkpoint: Path, engine: Path, num_ranks: int = 1) -> Path:
    engine.mkdir()
    for rank in range(num_ranks):
        export_network(checkpoint, rank, engine, LIMITS, QUIET)
    return engine


@pytest.fixture(scope="module")
def four_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tp 2, pp 2; two layers, so one per stage."""
    root = tmp_path_factory.mktemp("four")
    source = write_tiny_llama(root / "source")
    (root / "checkpoint").mkdir()
    convert_checkpoint(source, root / "checkpoint", tp=2, pp=2, progress=QUIET)
    return engine_of(root / "checkpoint", root / "engine", 4)


@pytest.mark.parametrize("architecture", FAMILIES)
@pytest.mark.parametrize("call_len", [LENGTH, 7])
def test_segments_give_the_very_logits_of_the_whole_network(
    tmp_path: Path, architecture: str, call_len: int
) -> None:
    model = random_model(architecture)
    engine = engine_of(write_checkpoint(model, tmp_path / "checkpoint"), tmp_path / "engine")
    ids = random_ids(331, 3)
    found = ShardedNetwork(engine, Alone(Mapping()), num_threads=1).logits(ids, call_len)
    network = OnnxNetwork(engine, num_threads=1)
    expected = [
        logits_in_chunks(network, row[None], tuple(range(call_len, LENGTH, call_len)))[0]
        for row in ids
    ]
    parts = [part for part in found if part is not None]
    assert np.array_equal(np.concatenate(parts), np.concatenate(expected))


def test_windows_in_several_groups_give_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = write_random_rank(tmp_path / "checkpoint", quantized=True)
    network = ShardedNetwork(engine_of(checkpoint, tmp_path / "engine"), Alone(Mapping()), 1)
    ids = random_ids(300, 5)
    assert network.num_steps(*ids.shape) == 3  # embedding and two layers
    at_once = np.stack([part for part in network.logits(ids, LENGTH) if part is not None])
    monkeypatch.setattr(sharded, "GROUP_BYTES", 2 * 4 * LENGTH * 256)
    assert network.num_steps(*ids.shape) == 3 * 3  # two, two and one window
    in_groups = np.stack([part for part in network.logits(ids, LENGTH) if part is not None])
    assert np.array_equal(at_once, in_groups)


def test_a_segment_loads_the_weights_of_its_layer_only(tmp_path: Path) -> None:
    checkpoint = write_random_rank(tmp_path / "checkpoint", quantized=True)
    graph = RankGraph(engine_of(checkpoint, tmp_path / "engine"), 0)
    kinds = []
    for segment in graph.segments:
        names = {name for node in segment.nodes for name in node.input}
        stored = {name for name in names if name.startswith(("transformer.", "lm_head."))}
        kinds.append({re.sub(r"(layers\.\d+)\..*", r"\1", name) for name in stored})
    layer_parts = [{f"transformer.layers.{layer}"} for layer in (0, 1)]
    assert [{kind for kind in each if ".layers." in kind} for each in kinds] == [
        set(),
        *layer_parts,
        set(),
    ]
    assert [segment.cache for segment in graph.segments] == [None, 0, 1, None]


def test_ranks_are_cut_where_they_sum_up(four_ranks: Path) -> None:
    first, last = RankGraph(four_ranks, 0), RankGraph(four_ranks, 3)
    summed = [[total for _, total in segment.sums] for segment in first.segments]
    dense, proj = (
        f"transformer.layers.0.{name}.all_reduce" for name in ("attention.dense", "mlp.proj")
    )
    # embedding; attention; MLP; what is added behind it; the stage's output
    assert summed == [["embedding.all_reduce"], [dense], [proj], [], []]
    assert [[t for _, t in segment.sums] for segment in last.segments] == [[dense], [proj], [], []]
    assert not first.has_head
    assert last.has_head
    assert first.hidden_size == last.hidden_size == 128
    assert first.cache_shape == (1, 64, 32)  # one of 2 KV heads
    for graph in (first, last):
        assert {name for segment in graph.segments for name in segment.inputs} >= {
            value.name for value in graph.inputs
        }


@pytest.mark.parametrize("rank", range(4))
def test_a_rank_alone_shows_that_it_computes(four_ranks: Path, rank: int) -> None:
    check_forward(four_ranks, rank)


def test_a_rank_alone_shows_that_it_does_not(tmp_path: Path) -> None:
    source = write_tiny_llama(tmp_path / "source")
    (tmp_path / "checkpoint").mkdir()
    convert_checkpoint(source, tmp_path / "checkpoint", tp=1, pp=2, progress=QUIET)
    engine = engine_of(tmp_path / "checkpoint", tmp_path / "engine", 2)
    weights = np.fromfile(weights_path(engine, 0), np.float16)
    weights[:: 2**10] = np.nan
    weights.tofile(weights_path(engine, 0))
    with pytest.raises(GateError, match=r"rank0\.onnx: \d+ of 512 hidden states are not finite"):
        check_forward(engine, 0)


class TestRefused:
    """What cannot be run says so."""

    def test_another_mapping(self, four_ranks: Path) -> None:
        with pytest.raises(
            GateError,
            match=r"rank1\.onnx: is the network of tp 2, pp 2, moe_ep 1, rank 1; "
            r"allowed: tp 4, pp 1, moe_ep 1, rank 1; fix: build again",
        ):
            ShardedNetwork(four_ranks, Alone(Mapping(4, 1, 1)))

    def test_a_missing_graph(self, tmp_path: Path) -> None:
        with pytest.raises(GateError, match=r"rank0\.onnx: cannot be read: No such file"):
            RankGraph(tmp_path, 0)

    def test_a_file_of_another_kind(self, tmp_path: Path) -> None:
        cpu_graph_path(tmp_path, 0).write_bytes(b"not a graph")
        with pytest.raises(GateError, match=r"rank0\.onnx: is not an ONNX graph; fix: build again"):
            RankGraph(tmp_path, 0)

    def test_weights_that_end_too_soon(self, tmp_path: Path) -> None:
        checkpoint = write_random_rank(tmp_path / "checkpoint", quantized=False)
        engine = engine_of(checkpoint, tmp_path / "engine")
        path = weights_path(engine, 0)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        network = ShardedNetwork(engine, Alone(Mapping()), 1)
        with pytest.raises(GateError, match=r"rank0\.onnx: ONNX Runtime cannot load it: "):
            list(network.logits(random_ids(300, 1), LENGTH))
