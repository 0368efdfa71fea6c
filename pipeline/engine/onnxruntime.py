"""OnnxNetwork: the engine's network executed on the CPU by ONNX Runtime, with its cache in place.

Shapes: B rows, S tokens per row in this call, M positions that get logits, V vocabulary,
C key/value heads, T cache positions, D head size.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.engine.cpu_session import (
    EXACT,
    bind_cache,
    bind_input,
    bind_output,
    load_session,
)
from pipeline.engine.kv_cache import KVCache
from pipeline.errors import GateError, Problem
from pipeline.network.export import LIMITS_PROPERTY, cpu_graph_path
from pipeline.network.io_names import (
    INPUT_IDS,
    KV_LENGTHS,
    LOGIT_POSITIONS,
    LOGITS,
    POSITION_IDS,
    WRITE_INDICES,
    cache_names,
)
from pipeline.network.limits import BuildLimits
from pipeline.network.rank_facts import facts_of_properties

Int64Array = npt.NDArray[np.int64]


@dataclass(frozen=True)
class OnnxNetworkShape:
    """Sizes of a loaded network, read from the graph itself.

    Attributes:
        vocab_size: V, tokens that have a logit.
        limits: what the engine was built for. Here only max_seq_len is enforced, because the CPU
            graph has no other bound; a session should keep all of them.
    """

    num_layers: int
    num_kv_heads: int
    head_size: int
    vocab_size: int
    limits: BuildLimits

    @property
    def max_seq_len(self) -> int:
        """T."""
        return self.limits.max_seq_len

    @property
    def cache_bytes_per_row(self) -> int:
        """Bytes of float32 key/value cache that one row takes when it is full."""
        return 2 * 4 * self.num_layers * self.num_kv_heads * self.max_seq_len * self.head_size


class OnnxNetwork:
    """A loaded rank{r}.onnx. One object may serve several threads; a cache row only one at a time.

    Args:
        engine_dir: directory with rank{r}.onnx and rank{r}.weights.
        rank: global rank.
        num_threads: threads of one matrix product; None: ONNX Runtime's default, every core.
        accuracy_level: `session.qdq_matmulnbits_accuracy_level`; 0 (EXACT) computes int4 products
            with float32 activations, 4 with activations rounded to int8 (faster).

    Raises:
        GateError: files missing, truncated or not made by export_network; or the graph is one rank of
            several, which alone computes nothing of use.
    """

    def __init__(
        self,
        engine_dir: Path,
        rank: int = 0,
        num_threads: int | None = None,
        accuracy_level: int = EXACT,
    ) -> None:
        path = cpu_graph_path(engine_dir, rank)
        self._session = load_session(path, num_threads, accuracy_level)
        self.shape = _read_shape(self._session, path)

    def new_cache(self, num_rows: int) -> KVCache:
        """A cache for `num_rows` rows, all positions free."""
        shape = self.shape
        shape_BCTD = (num_rows, shape.num_kv_heads, shape.max_seq_len, shape.head_size)
        return KVCache.zeros(shape.num_layers, shape_BCTD)

    def run(
        self,
        input_ids: Int64Array,
        position_ids: Int64Array,
        write_indices: Int64Array,
        kv_lengths: Int64Array,
        logit_positions: Int64Array,
        cache: KVCache,
    ) -> npt.NDArray[np.float32]:
        """One forward pass; writes the new keys and values into `cache`.

        Rows may stand at different positions. Rows with fewer than S new tokens are padded on the
        right: the padding is written too, at positions that the row's next call overwrites.

        Args:
            input_ids: int64 [B, S].
            position_ids: int64 [B, S], the cache position of each token, write_indices + 0..S-1:
                rotation and sliding windows go by it.
            write_indices: int64 [B], first cache position written in each row.
            kv_lengths: int64 [B], valid cache length after the write, padding included: always
                write_indices + S, because the causal mask is aligned to its end.
            logit_positions: int64 [B, M], which of the S positions get logits; M may be 0.
            cache: B rows.

        Returns:
            logits, float32 [B, M, V].

        Raises:
            ValueError: shapes or values that do not fit together; the cache is untouched.
        """
        feeds = {
            INPUT_IDS: input_ids,
            POSITION_IDS: position_ids,
            WRITE_INDICES: write_indices,
            KV_LENGTHS: kv_lengths,
            LOGIT_POSITIONS: logit_positions,
        }
        feeds = {name: np.ascontiguousarray(feed, np.int64) for name, feed in feeds.items()}
        self._check(feeds, cache)
        num_rows, num_logits = feeds[LOGIT_POSITIONS].shape
        logits_BMV = np.empty((num_rows, num_logits, self.shape.vocab_size), np.float32)
        binding = self._session.io_binding()
        for name, feed in feeds.items():
            bind_input(binding, name, feed)
        for layer, arrays in enumerate(zip(cache.keys, cache.values, strict=True)):
            for (past, present), array in zip(cache_names(layer), arrays, strict=True):
                bind_cache(binding, past, present, array)
        bind_output(binding, LOGITS, logits_BMV)
        self._session.run_with_iobinding(binding)
        return logits_BMV

    def _check(self, feeds: dict[str, Int64Array], cache: KVCache) -> None:
        """The pass works on raw memory, so nothing that does not fit may get through."""
        shape = self.shape
        if feeds[INPUT_IDS].ndim != 2 or feeds[INPUT_IDS].size == 0:
            raise ValueError(f"{INPUT_IDS} has shape {feeds[INPUT_IDS].shape}, expected [B, S]")
        num_rows, num_tokens = feeds[INPUT_IDS].shape
        expected: dict[str, tuple[int, ...]] = {
            POSITION_IDS: (num_rows, num_tokens),
            WRITE_INDICES: (num_rows,),
            KV_LENGTHS: (num_rows,),
        }
        for name, wanted in expected.items():
            if feeds[name].shape != wanted:
                raise ValueError(f"{name} has shape {feeds[name].shape}, expected {wanted}")
        if feeds[LOGIT_POSITIONS].ndim != 2 or feeds[LOGIT_POSITIONS].shape[0] != num_rows:
            raise ValueError(
                f"{LOGIT_POSITIONS} has shape {feeds[LOGIT_POSITIONS].shape}, "
                f"expected ({num_rows}, M)"
            )
        _check_range(feeds, INPUT_IDS, shape.vocab_size)
        _check_range(feeds, POSITION_IDS, shape.max_seq_len)
        _check_range(feeds, LOGIT_POSITIONS, num_tokens)
        _check_range(feeds, WRITE_INDICES, shape.max_seq_len - num_tokens + 1)
        if not np.array_equal(feeds[KV_LENGTHS], feeds[WRITE_INDICES] + num_tokens):
            raise ValueError(
                f"{KV_LENGTHS} {feeds[KV_LENGTHS].tolist()} is not {WRITE_INDICES} "
                f"{feeds[WRITE_INDICES].tolist()} + {num_tokens} tokens"
            )
        wanted = (num_rows, shape.num_kv_heads, shape.max_seq_len, shape.head_size)
        for array in (*cache.keys, *cache.values):
            if array.shape != wanted or array.dtype != np.float32 or not array.flags.c_contiguous:
                raise ValueError(
                    f"cache array {array.dtype} {array.shape}, expected float32 {wanted} in C order"
                )
        if len(cache.keys) != shape.num_layers or len(cache.values) != shape.num_layers:
            raise ValueError(f"cache of {len(cache.keys)} layers, expected {shape.num_layers}")


def _check_range(feeds: dict[str, Int64Array], name: str, stop: int) -> None:
    feed = feeds[name]
    if feed.size and not 0 <= int(feed.min()) <= int(feed.max()) < stop:
        raise ValueError(f"{name} holds {feed.min()} to {feed.max()}, allowed 0 to {stop - 1}")


def _read_shape(session: Any, path: Path) -> OnnxNetworkShape:
    properties = session.get_modelmeta().custom_metadata_map
    if LIMITS_PROPERTY not in properties:
        raise GateError(Problem(str(path), "is not a network of this program", fix="build again"))
    facts = facts_of_properties(properties)
    if facts is not None and facts.world_size > 1:
        what = f"is rank {facts.rank} of {facts.world_size}; one process runs an engine of one rank"
        fix = "build with tp: 1 and pp: 1, or let `verify` run the ranks under mpirun"
        raise GateError(Problem(str(path), what, fix=fix))
    inputs = {value.name: value for value in session.get_inputs()}
    outputs = {value.name: value for value in session.get_outputs()}
    num_layers = sum(name.startswith("past_key_") for name in inputs)
    (past_key, _), _ = cache_names(0)
    _, num_kv_heads, _, head_size = inputs[past_key].shape
    return OnnxNetworkShape(
        num_layers=num_layers,
        num_kv_heads=num_kv_heads,
        head_size=head_size,
        vocab_size=outputs[LOGITS].shape[-1],
        limits=BuildLimits(**json.loads(properties[LIMITS_PROPERTY])),
    )
