"""OnnxNetwork: the cache is really updated in place, and nothing that does not fit gets through."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.engine.kv_cache import KVCache
from pipeline.engine.onnxruntime import OnnxNetwork
from pipeline.errors import GateError
from pipeline.network import BuildLimits, cpu_graph_path, export_network, weights_path
from pipeline.progress import SilentProgress
from tests.rank_checkpoints import write_random_rank

LIMITS = BuildLimits(max_batch_size=4, max_seq_len=32, max_input_len=16)


@pytest.fixture(scope="module")
def engine_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    checkpoint = write_random_rank(tmp_path_factory.mktemp("checkpoint"), quantized=True)
    out_dir = tmp_path_factory.mktemp("engine")
    export_network(checkpoint, 0, out_dir, LIMITS, SilentProgress())
    return out_dir


@pytest.fixture(scope="module")
def network(engine_dir: Path) -> OnnxNetwork:
    return OnnxNetwork(engine_dir, num_threads=1)


def run(
    network: OnnxNetwork, cache: KVCache, ids: Any, start: int = 0, **changes: Any
) -> np.ndarray[Any, Any]:
    ids_BS = np.array(ids)
    num_rows, num_tokens = ids_BS.shape
    arguments: dict[str, Any] = {
        "input_ids": ids_BS,
        "position_ids": np.tile(np.arange(start, start + num_tokens), (num_rows, 1)),
        "write_indices": np.full(num_rows, start),
        "kv_lengths": np.full(num_rows, start + num_tokens),
        "logit_positions": np.full((num_rows, 1), num_tokens - 1),
        "cache": cache,
    }
    return network.run(**(arguments | changes))


def test_the_shape_comes_from_the_graph(network: OnnxNetwork) -> None:
    shape = network.shape
    assert (shape.num_layers, shape.num_kv_heads, shape.head_size) == (2, 2, 64)
    assert (shape.vocab_size, shape.max_seq_len) == (300, 32)
    assert shape.limits == LIMITS
    # 2 (key, value) x 2 layers x 2 heads x 32 positions x 64 x 4 bytes
    assert shape.cache_bytes_per_row == 65536
    assert network.new_cache(3).nbytes == 3 * 65536


def test_only_the_written_positions_change(network: OnnxNetwork) -> None:
    cache = network.new_cache(2)
    for array in (*cache.keys, *cache.values):
        array[:] = np.arange(array.size).reshape(array.shape)
    before = [array.copy() for array in (*cache.keys, *cache.values)]
    arrays = (*cache.keys, *cache.values)
    run(
        network,
        cache,
        [[5, 6, 7], [8, 9, 10]],
        position_ids=np.array([[4, 5, 6], [20, 21, 22]]),
        write_indices=np.array([4, 20]),
        kv_lengths=np.array([7, 23]),
    )
    for old, array in zip(before, arrays, strict=True):
        written = np.zeros(array.shape, bool)
        written[0, :, 4:7] = True
        written[1, :, 20:23] = True
        assert (array[written] != old[written]).mean() > 0.99
        np.testing.assert_array_equal(array[~written], old[~written])


def test_past_and_present_are_one_memory(network: OnnxNetwork, capfd: Any) -> None:
    """ONNX Runtime warns for every cache tensor that it has to copy; here it must not."""
    cache = network.new_cache(1)
    run(network, cache, [[1, 2, 3]])
    assert "in-place" not in capfd.readouterr().err
    # The same session without shared memory does warn, so the silence above means something.
    feeds = {
        "input_ids": np.array([[1, 2, 3]]),
        "position_ids": np.array([[0, 1, 2]]),
        "write_indices": np.array([0]),
        "kv_lengths": np.array([3]),
        "logit_positions": np.array([[2]]),
    }
    for layer in range(2):
        feeds[f"past_key_{layer}"] = np.zeros(cache.keys[0].shape, np.float32)
        feeds[f"past_value_{layer}"] = np.zeros(cache.keys[0].shape, np.float32)
    network._session.run(None, feeds)
    assert capfd.readouterr().err.count("in-place optimization not activated") == 4


def test_row_views_share_memory_and_leave_other_rows_alone(network: OnnxNetwork) -> None:
    cache = network.new_cache(3)
    view = cache.rows(1, 2)
    assert all(
        np.shares_memory(part, whole) for part, whole in zip(view.keys, cache.keys, strict=True)
    )
    run(network, view, [[1, 2, 3]])
    for array in (*cache.keys, *cache.values):
        assert array[1, :, :3].any()
        assert not array[[0, 2]].any()


def test_a_batch_equals_its_rows(network: OnnxNetwork) -> None:
    ids = np.random.default_rng(0).integers(0, 300, (3, 5))
    together = run(network, network.new_cache(3), ids)
    alone = [run(network, network.new_cache(1), row[None]) for row in ids]
    # Seen: equal to the bit.
    np.testing.assert_allclose(together, np.concatenate(alone), atol=1e-5)


def test_used_rows_need_no_clearing(network: OnnxNetwork) -> None:
    cache = network.new_cache(1)
    fresh = run(network, cache, [[1, 2, 3]])
    for array in (*cache.keys, *cache.values):
        array[:] = 1e4  # more than an older sequence would leave
    again = run(network, cache, [[1, 2, 3]])
    np.testing.assert_array_equal(fresh, again)


def test_no_logits_when_none_are_asked_for(network: OnnxNetwork) -> None:
    cache = network.new_cache(1)
    logits = run(network, cache, [[1, 2]], logit_positions=np.zeros((1, 0), np.int64))
    assert logits.shape == (1, 0, 300)
    assert cache.keys[1][0, :, :2].any()


def test_logits_of_chosen_positions(network: OnnxNetwork) -> None:
    ids = [[1, 2, 3, 4], [5, 6, 7, 8]]
    everything = run(
        network, network.new_cache(2), ids, logit_positions=np.tile(np.arange(4), (2, 1))
    )
    chosen = run(network, network.new_cache(2), ids, logit_positions=np.array([[3, 0], [1, 1]]))
    np.testing.assert_allclose(chosen[0], everything[0, [3, 0]], atol=1e-5)
    np.testing.assert_allclose(chosen[1], everything[1, [1, 1]], atol=1e-5)


def test_the_faster_accuracy_level_is_not_exact(engine_dir: Path, network: OnnxNetwork) -> None:
    """Level 4 rounds activations to int8: near, but not the same numbers."""
    faster = OnnxNetwork(engine_dir, num_threads=1, accuracy_level=4)
    ids = [[1, 2, 3]]
    exact = run(network, network.new_cache(1), ids)
    rounded = run(faster, faster.new_cache(1), ids)
    difference = np.abs(exact - rounded).max()
    assert 1e-4 < difference < 5.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input_ids": np.array([1, 2])}, "input_ids has shape (2,), expected [B, S]"),
        ({"input_ids": np.zeros((1, 0))}, "input_ids has shape (1, 0), expected [B, S]"),
        ({"input_ids": np.array([[1, 300]])}, "input_ids holds 1 to 300, allowed 0 to 299"),
        ({"input_ids": np.array([[-1, 3]])}, "input_ids holds -1 to 3, allowed 0 to 299"),
        ({"position_ids": np.array([[0]])}, "position_ids has shape (1, 1), expected (1, 2)"),
        ({"position_ids": np.array([[0, 32]])}, "position_ids holds 0 to 32, allowed 0 to 31"),
        ({"write_indices": np.array([31])}, "write_indices holds 31 to 31, allowed 0 to 30"),
        ({"write_indices": np.array([-1])}, "write_indices holds -1 to -1, allowed 0 to 30"),
        ({"kv_lengths": np.array([1])}, "kv_lengths [1] is not write_indices [0] + 2 tokens"),
        ({"kv_lengths": np.array([2, 2])}, "kv_lengths has shape (2,), expected (1,)"),
        ({"logit_positions": np.array([0])}, "logit_positions has shape (1,), expected (1, M)"),
        ({"logit_positions": np.array([[2]])}, "logit_positions holds 2 to 2, allowed 0 to 1"),
    ],
)
def test_what_does_not_fit_is_refused(
    network: OnnxNetwork, changes: dict[str, Any], message: str
) -> None:
    cache = network.new_cache(1)
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the text is compared below
        run(network, cache, [[1, 2]], **changes)
    assert str(caught.value) == message
    assert not cache.keys[0].any()


def test_a_cache_of_another_form_is_refused(network: OnnxNetwork) -> None:
    good = network.new_cache(2)
    halves = [array.astype(np.float16) for array in good.keys]
    reversed_memory = [array[:, :, ::-1] for array in good.keys]
    for keys, message in (
        (halves, "cache array float16 (2, 2, 32, 64), expected float32 (2, 2, 32, 64) in C order"),
        (
            good.rows(0, 1).keys,
            "cache array float32 (1, 2, 32, 64), expected float32 (2, 2, 32, 64) in C order",
        ),
        (
            reversed_memory,
            "cache array float32 (2, 2, 32, 64), expected float32 (2, 2, 32, 64) in C order",
        ),
        (good.keys[:1], "cache of 1 layers, expected 2"),
    ):
        with pytest.raises(ValueError) as caught:  # noqa: PT011 - the text is compared below
            run(network, KVCache(keys, good.values), [[1], [2]])
        assert str(caught.value) == message


@pytest.mark.parametrize(("start", "stop"), [(0, 0), (2, 1), (-1, 1), (0, 4)])
def test_rows_outside_the_cache_are_refused(network: OnnxNetwork, start: int, stop: int) -> None:
    with pytest.raises(ValueError, match=f"rows {start}:{stop} of a cache of 3 rows"):
        network.new_cache(3).rows(start, stop)


def test_missing_and_damaged_files_are_gate_errors(engine_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(GateError, match=r"rank0\.onnx: ONNX Runtime cannot load it"):
        OnnxNetwork(tmp_path)
    cpu_graph_path(tmp_path, 0).write_bytes(cpu_graph_path(engine_dir, 0).read_bytes())
    with pytest.raises(GateError, match=r"cannot load it.*rank0\.weights"):
        OnnxNetwork(tmp_path)
    weights = weights_path(engine_dir, 0).read_bytes()
    weights_path(tmp_path, 0).write_bytes(weights[: len(weights) // 2])
    with pytest.raises(GateError, match=r"cannot load it.*lm_head\.weight.*fix: build again"):
        OnnxNetwork(tmp_path)
    cpu_graph_path(tmp_path, 0).write_bytes(b"not a graph")
    with pytest.raises(GateError, match="cannot load it"):
        OnnxNetwork(tmp_path)


def test_a_foreign_graph_is_refused(tmp_path: Path) -> None:
    import onnx
    from onnx import helper

    value = helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
    result = helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1])
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", [value], [result])
    opset = helper.make_opsetid("", 24)
    model = helper.make_model(graph, opset_imports=[opset], ir_version=12)
    cpu_graph_path(tmp_path, 0).write_bytes(model.SerializeToString())
    with pytest.raises(GateError, match="is not a network of this program; fix: build again"):
        OnnxNetwork(tmp_path)
