"""Hugging Face tensors back from TensorRT-LLM rank files, written from what TensorRT-LLM does alone.

Imports nothing of the package: neither its tables nor its arithmetic. Per tensor-parallel rank r of t,
with H heads, G KV heads, V tokens, L layers, p pipeline stages:
  attention.qkv   rows [q heads of the rank | k | v]; with G < t consecutive ranks repeat a KV head
  mlp.fc          gate_proj, or for Phi-3 and experts [up_proj; gate_proj]; mlp.gate is up_proj
  attention.dense, mlp.proj   cut along the input channels; their biases are whole on every rank
  vocab_embedding, lm_head    rows, ceil(V / t) on each rank, zeros behind the last
  layers          the first L mod p stages have one more, numbered from 0 in each stage
  experts         block r mod ep; within a block, part r // ep of each expert
How many rows stand for a head follows from the shape, so the same holds for codes and scales.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

Array = np.ndarray[Any, Any]
Rank = dict[str, Array]
Tensors = dict[str, Array]

SUFFIXES = {
    "weight": "weight",
    "bias": "bias",
    "weights_scaling_factor": "weight_scale",
    "prequant_scaling_factor": "pre_quant_scale",
    "activation_scaling_factor": "input_scale",
}
_OF_INPUTS = "prequant_scaling_factor"
"""Along the input channels; everything else has output rows first, or is one number."""
_ACTIVATION = "activation_scaling_factor"
_OF_WHOLE = (_OF_INPUTS, _ACTIVATION)
"""Linears with the same input have them in common, and every rank of one cut along its outputs."""


@dataclass(frozen=True)
class Names:
    """How one family calls its modules; {i} is the layer, {e} the expert.

    Attributes:
        qkv, fc, gate: what is joined there, in the order of the rank file.
        fused: the joined linears are one tensor in the Hugging Face file, in its order.
        transposed: plain linears are stored as [in, out].
        norms: target name within a layer -> source.
    """

    embedding: str
    final_norm: str
    head: str
    qkv: tuple[str, ...]
    dense: str
    fc: tuple[str, ...]
    proj: str
    norms: dict[str, str]
    gate: str = ""
    positions: str = ""
    router: str = ""
    fused_qkv: bool = False
    fused_fc: bool = False
    transposed: bool = False


def same(parts: list[Array]) -> Array:
    """What every rank has."""
    for other in parts[1:]:
        assert other.dtype == parts[0].dtype
        assert other.tobytes() == parts[0].tobytes(), "ranks that should hold the same differ"
    return parts[0]


class Unshard:
    """All tensors of one checkpoint."""

    def __init__(self, directory: Path, names: Names, moe_ep: int = 1) -> None:
        config = json.loads((directory / "config.json").read_text())
        self.tp, self.pp = config["mapping"]["tp_size"], config["mapping"]["pp_size"]
        self.heads, self.kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
        self.vocab, self.layers = config["vocab_size"], config["num_hidden_layers"]
        self.names, self.moe_ep = names, moe_ep
        count = self.tp * self.pp
        assert len(list(directory.glob("rank*.safetensors"))) == count
        self.ranks = [load_file(directory / f"rank{rank}.safetensors") for rank in range(count)]
        self.found: Tensors = {}

    def tensors(self) -> Tensors:
        """Every tensor by its Hugging Face name; all tensors of all ranks are used up."""
        names = self.names
        first, last = self._stage(0), self._stage(self.pp - 1)
        self._table(first, "transformer.vocab_embedding.weight", names.embedding)
        if names.positions:
            self._table(first, "transformer.position_embedding.weight", names.positions)
        self._table(last, "lm_head.weight", names.head)
        self._whole(last, "transformer.ln_f", names.final_norm)
        layer = 0
        for stage in range(self.pp):
            for local in range(self.layers // self.pp + (stage < self.layers % self.pp)):
                self._layer(self._stage(stage), f"transformer.layers.{local}", layer)
                layer += 1
        assert layer == self.layers
        left = {name for rank in self.ranks for name in rank}
        assert not left, f"not accounted for: {sorted(left)[:5]}"
        return self.found

    def _stage(self, stage: int) -> list[Rank]:
        return self.ranks[stage * self.tp : (stage + 1) * self.tp]

    def _take(self, ranks: list[Rank], target: str) -> dict[str, list[Array]]:
        """Suffix -> the parts of all ranks, which are used up by it."""
        suffixes = [name.rpartition(".")[2] for name in ranks[0] if name.startswith(f"{target}.")]
        return {suffix: [rank.pop(f"{target}.{suffix}") for rank in ranks] for suffix in suffixes}

    def _table(self, ranks: list[Rank], target: str, source: str) -> None:
        whole = np.concatenate([rank.pop(target) for rank in ranks])
        rows = self.vocab if "vocab" in target or "lm_head" in target else None
        if rows is not None:
            assert len(whole) == -(-rows // self.tp) * self.tp
            assert not whole[rows:].any(), "padding is not zero"
        self.found[f"{source}.weight"] = whole[:rows]

    def _whole(self, ranks: list[Rank], target: str, source: str) -> None:
        for suffix, parts in self._take(ranks, target).items():
            self.found[f"{source}.{suffix}"] = same(parts)

    def _layer(self, ranks: list[Rank], prefix: str, layer: int) -> None:
        names = self.names
        for target, source in names.norms.items():
            self._whole(ranks, f"{prefix}.{target}", source.format(i=layer))
        self._qkv(self._take(ranks, f"{prefix}.attention.qkv"), layer)
        self._put(self._rows(self._take(ranks, f"{prefix}.attention.dense")), names.dense, layer)
        if names.router:
            self._whole(ranks, f"{prefix}.mlp.router", names.router.format(i=layer))
            self._experts(ranks, prefix, layer)
            return
        fc = self._take(ranks, f"{prefix}.mlp.fc")
        halves = [self._columns(fc, half, len(names.fc)) for half in range(len(names.fc))]
        if names.fused_fc:
            self._fused(halves[::-1], names.fc[0], layer)  # stored [gate; up], held [up; gate]
        else:
            for half, name in zip(halves, names.fc, strict=True):
                self._put(half, name, layer)
        if names.gate:
            self._put(self._columns(self._take(ranks, f"{prefix}.mlp.gate")), names.gate, layer)
        self._put(self._rows(self._take(ranks, f"{prefix}.mlp.proj")), names.proj, layer)

    def _qkv(self, parts: dict[str, list[Array]], layer: int) -> None:
        own, groups = self.heads // self.tp, max(self.kv_heads // self.tp, 1)
        split: list[Tensors] = [{}, {}, {}]
        for suffix, ranks in parts.items():
            if suffix in _OF_WHOLE:
                for one in split:
                    one[suffix] = same(ranks)
                continue
            unit, rest = divmod(len(ranks[0]), own + 2 * groups)
            assert rest == 0, suffix
            edges = [own * unit, (own + groups) * unit]
            q, k, v = zip(*(np.split(x, edges) for x in ranks), strict=True)
            split[0][suffix] = np.concatenate(q)
            for one, pieces in ((split[1], k), (split[2], v)):
                one[suffix] = np.concatenate(self._distinct(list(pieces)))
        if self.names.fused_qkv:
            self._fused(split, self.names.qkv[0], layer)
            return
        for one, name in zip(split, self.names.qkv, strict=True):
            self._put(one, name, layer)

    def _distinct(self, pieces: list[Array]) -> list[Array]:
        """One of each KV head that consecutive ranks repeat."""
        copies = self.tp // self.kv_heads if self.kv_heads < self.tp else 1
        return [same(pieces[at : at + copies]) for at in range(0, self.tp, copies)]

    def _columns(self, parts: dict[str, list[Array]], half: int = 0, halves: int = 1) -> Tensors:
        """Of a linear cut along its outputs, of which `halves` are joined in each rank."""
        found = {}
        for suffix, ranks in parts.items():
            if suffix in _OF_WHOLE:
                found[suffix] = same(ranks)
            else:
                found[suffix] = np.concatenate([np.split(x, halves)[half] for x in ranks])
        return found

    def _rows(self, parts: dict[str, list[Array]]) -> Tensors:
        """Of a linear cut along its inputs."""
        found = {}
        for suffix, ranks in parts.items():
            if suffix == _OF_INPUTS or ranks[0].ndim == 2:
                found[suffix] = np.concatenate(ranks, axis=-1)
            else:
                found[suffix] = same(ranks)
        return found

    def _experts(self, ranks: list[Rank], prefix: str, layer: int) -> None:
        fc, proj = (self._take(ranks, f"{prefix}.mlp.{name}") for name in ("fc", "proj"))
        for block in range(self.moe_ep):
            holders = range(block, self.tp, self.moe_ep)
            each = len(fc["weight"][block])
            for local in range(each):
                numbers = {"i": layer, "e": block * each + local}
                mine = _expert(fc, holders, local)
                for half, name in enumerate(self.names.fc):
                    self._put_named(self._columns(mine, half, 2), name.format(**numbers))
                down = self._rows(_expert(proj, holders, local))
                self._put_named(down, self.names.proj.format(**numbers))

    def _fused(self, parts: list[Tensors], name: str, layer: int) -> None:
        """Joined again along the output rows."""
        joined = {}
        for suffix in parts[0]:
            pieces = [part[suffix] for part in parts]
            joined[suffix] = same(pieces) if suffix in _OF_WHOLE else np.concatenate(pieces)
        self._put(joined, name, layer)

    def _put(self, tensors: Tensors, name: str, layer: int) -> None:
        if self.names.transposed and tensors["weight"].dtype == np.float16:
            tensors = {**tensors, "weight": np.ascontiguousarray(tensors["weight"].T)}
        self._put_named(tensors, name.format(i=layer))

    def _put_named(self, tensors: Tensors, name: str) -> None:
        for suffix, values in tensors.items():
            self.found[f"{name}.{SUFFIXES[suffix]}"] = values


def _expert(parts: dict[str, list[Array]], holders: range, local: int) -> dict[str, list[Array]]:
    """Of one expert of a block; all have one activation scale."""
    return {
        suffix: [ranks[r] if suffix == _ACTIVATION else ranks[r][local] for r in holders]
        for suffix, ranks in parts.items()
    }


_HF = "model.layers.{i}"
_LLAMA_NORMS = {
    "input_layernorm": f"{_HF}.input_layernorm",
    "post_layernorm": f"{_HF}.post_attention_layernorm",
}
LLAMA = Names(
    embedding="model.embed_tokens",
    final_norm="model.norm",
    head="lm_head",
    qkv=tuple(f"{_HF}.self_attn.{one}_proj" for one in "qkv"),
    dense=f"{_HF}.self_attn.o_proj",
    fc=(f"{_HF}.mlp.gate_proj",),
    gate=f"{_HF}.mlp.up_proj",
    proj=f"{_HF}.mlp.down_proj",
    norms=_LLAMA_NORMS,
)
PHI3 = Names(
    embedding="model.embed_tokens",
    final_norm="model.norm",
    head="lm_head",
    qkv=(f"{_HF}.self_attn.qkv_proj",),
    dense=f"{_HF}.self_attn.o_proj",
    fc=(f"{_HF}.mlp.gate_up_proj",) * 2,
    proj=f"{_HF}.mlp.down_proj",
    norms=_LLAMA_NORMS,
    fused_qkv=True,
    fused_fc=True,
)
GPT2 = Names(
    embedding="transformer.wte",
    positions="transformer.wpe",
    final_norm="transformer.ln_f",
    head="lm_head",
    qkv=("transformer.h.{i}.attn.c_attn",),
    dense="transformer.h.{i}.attn.c_proj",
    fc=("transformer.h.{i}.mlp.c_fc",),
    proj="transformer.h.{i}.mlp.c_proj",
    norms={
        "input_layernorm": "transformer.h.{i}.ln_1",
        "post_layernorm": "transformer.h.{i}.ln_2",
    },
    fused_qkv=True,
    transposed=True,
)
_EXPERT = f"{_HF}.block_sparse_moe.experts.{{e}}"
MIXTRAL = Names(
    embedding="model.embed_tokens",
    final_norm="model.norm",
    head="lm_head",
    qkv=LLAMA.qkv,
    dense=LLAMA.dense,
    fc=(f"{_EXPERT}.w3", f"{_EXPERT}.w1"),
    proj=f"{_EXPERT}.w2",
    norms=_LLAMA_NORMS,
    router=f"{_HF}.block_sparse_moe.gate",
)
