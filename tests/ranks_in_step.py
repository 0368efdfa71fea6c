"""Logits of an engine of several ranks, its graphs run in this process in lock step.

Independent of the program's own runner. Every all-reduce of a graph is taken out: its input becomes an
output, its output an input. Then pass k of every rank of a stage, with the first k sums fed, yields its
part of sum k, which numpy adds up; a last pass with all sums yields what the stage is for. That is many
passes, and fit for small models only.
Shapes: B rows, S positions, V vocabulary.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.checkpoint.convert import convert_checkpoint
from pipeline.network import BuildLimits, cpu_graph_path, export_network
from pipeline.progress import SilentProgress

Feeds = dict[str, npt.NDArray[Any]]
ALL_REDUCE = ".all_reduce"


def export_ranks(
    source: Path,
    directory: Path,
    limits: BuildLimits,
    *,
    tp: int = 1,
    pp: int = 1,
    moe_ep: int = 1,
) -> list[Path]:
    """A Hugging Face checkpoint converted and exported: the CPU graph of every rank."""
    checkpoint, engine_dir = directory / "checkpoint", directory / "engine"
    checkpoint.mkdir(parents=True)
    engine_dir.mkdir()
    progress = SilentProgress()
    convert_checkpoint(source, checkpoint, tp=tp, pp=pp, moe_ep=moe_ep, progress=progress)
    for rank in range(tp * pp):
        export_network(checkpoint, rank, engine_dir, limits, progress)
    return [cpu_graph_path(engine_dir, rank) for rank in range(tp * pp)]


class Rank:
    """One rank's graph without its all-reduces.

    Attributes:
        facts: what the graph says about itself.
        sums: names of the all-reduces in the order of execution.
    """

    def __init__(self, path: Path) -> None:
        import onnx
        import onnxruntime

        model = onnx.load(str(path), load_external_data=False)
        properties = {entry.key: entry.value for entry in model.metadata_props}
        self.facts: dict[str, int] = json.loads(properties["trtpipe.rank"])
        self.sums: list[str] = []
        element = model.graph.output[-1].type.tensor_type.elem_type
        sizes = {tensor.name: tensor.dims[0] for tensor in model.graph.initializer if tensor.dims}
        self._hidden_size = sizes["transformer.layers.0.input_layernorm.weight"]
        for node in list(model.graph.node):
            if node.op_type == "Identity" and node.name.endswith(ALL_REDUCE):
                (part,), (total,) = node.input, node.output
                self.sums.append(total)
                model.graph.node.remove(node)
                shape = ["B", "S", self._hidden_size]
                info = onnx.helper.make_tensor_value_info
                model.graph.output.append(info(part, element, shape))
                model.graph.input.append(info(total, element, shape))
        self._parts = [value.name for value in list(model.graph.output)[-len(self.sums) :]]
        cut = path.with_suffix(".cut.onnx")
        cut.write_bytes(model.SerializeToString())
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # that the cache is copied does not matter here
        options.intra_op_num_threads = 1
        # Activations stay float32 in int4 products.
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "0")
        self._session = onnxruntime.InferenceSession(
            str(cut), options, providers=["CPUExecutionProvider"]
        )
        inputs = self._session.get_inputs()
        self.inputs = {value.name: value.shape for value in inputs}
        floats = {onnx.TensorProto.FLOAT: np.float32, onnx.TensorProto.FLOAT16: np.float16}
        self._float = floats[element]
        self.outputs = [value.name for value in self._session.get_outputs()]

    def empty_cache(self, num_rows: int) -> Feeds:
        """Zeros."""
        return {
            name: np.zeros((num_rows, *shape[1:]), self._float)
            for name, shape in self.inputs.items()
            if name.startswith("past_")
        }

    def part(self, feeds: Feeds, index: int, sums: list[npt.NDArray[Any]]) -> npt.NDArray[Any]:
        """The rank's part of sum `index`, given all sums before it."""
        (part,) = self._session.run([self._parts[index]], self._with_sums(feeds, sums))
        return np.asarray(part)

    def results(self, feeds: Feeds, names: list[str], sums: list[npt.NDArray[Any]]) -> Feeds:
        """Outputs of the graph, given all sums."""
        found = self._session.run(names, self._with_sums(feeds, sums))
        return dict(zip(names, found, strict=True))

    def _with_sums(self, feeds: Feeds, sums: list[npt.NDArray[Any]]) -> Feeds:
        given = {name: feeds[name] for name in self.inputs if name not in self.sums}
        unknown = np.zeros((*feeds["logit_positions"].shape, self._hidden_size), self._float)
        for index, name in enumerate(self.sums):
            given[name] = sums[index] if index < len(sums) else unknown
        return given


def logits_in_step(graph_paths: list[Path], ids_BS: npt.NDArray[np.int64], cut: int) -> Any:
    """Logits float32 [B, S, V] of the graphs of ranks 0, 1, ...: positions up to `cut` in one call, the
    others in a second."""
    ranks = [Rank(path) for path in graph_paths]
    tp, pp = ranks[0].facts["tp"], ranks[0].facts["pp"]
    assert [rank.facts["rank"] for rank in ranks] == list(range(tp * pp))
    num_rows, num_tokens = ids_BS.shape
    caches = [rank.empty_cache(num_rows) for rank in ranks]
    parts = []
    for start, stop in ((0, cut), (cut, num_tokens)):
        offsets = np.tile(np.arange(stop - start), (num_rows, 1))
        feeds: Feeds = {
            "input_ids": ids_BS[:, start:stop],
            "position_ids": offsets + start,
            "write_indices": np.full(num_rows, start),
            "kv_lengths": np.full(num_rows, stop),
            "logit_positions": offsets,
        }
        for stage in range(pp):
            own = slice(stage * tp, (stage + 1) * tp)
            results = _stage(ranks[own], feeds, caches[own])
            if stage < pp - 1:
                feeds["hidden_states"] = results[0]["hidden_states_out"]
        joined = np.concatenate([result["logits"] for result in results], axis=-1)
        widths = [result["logits"].shape[-1] for result in results]
        last = ranks[-tp:]
        assert [rank.facts["first_row"] for rank in last] == [sum(widths[:i]) for i in range(tp)]
        parts.append(joined[..., : last[0].facts["vocab_size"]])
    return np.concatenate(parts, axis=1)


def _stage(ranks: list[Rank], feeds: Feeds, caches: list[Feeds]) -> list[Feeds]:
    """Results of every rank of a stage; its new cache goes into `caches`."""
    sums: list[npt.NDArray[Any]] = []
    for index in range(len(ranks[0].sums)):
        own = [
            rank.part({**feeds, **cache}, index, sums)
            for rank, cache in zip(ranks, caches, strict=True)
        ]
        total = own[0]
        for part in own[1:]:
            total = total + part
        sums.append(total)
    found = []
    for rank, cache in zip(ranks, caches, strict=True):
        presents = [name for name in rank.outputs if name.startswith("present_")]
        ends = [name for name in rank.outputs if name in ("logits", "hidden_states_out")]
        results = rank.results({**feeds, **cache}, [*ends, *presents], sums)
        for name in presents:
            cache[name.replace("present_", "past_")] = results.pop(name)
        found.append(results)
    return found
