"""Convert, then put together again by other code that shares nothing with it: everything comes back.

Sizes are drawn: heads 1 to 24, KV heads repeated or not, uneven stages, any vocabulary, tied or not.
Checkpoints are written here, by hand. Shapes: N output features, K input features.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from pipeline.checkpoint.convert import convert_checkpoint
from pipeline.progress import SilentProgress
from tests.unshard_by_facts import GPT2, LLAMA, MIXTRAL, PHI3, Names, Tensors, Unshard

GROUP = 64
ALGORITHMS = {"int4_awq": "W4A16_AWQ", "int8_sq": "W8A8_SQ_PER_CHANNEL"}
NAMES = {
    "LlamaForCausalLM": LLAMA,
    "Qwen2ForCausalLM": LLAMA,
    "Phi3ForCausalLM": PHI3,
    "GPT2LMHeadModel": GPT2,
    "MixtralForCausalLM": MIXTRAL,
}


@dataclass(frozen=True)
class Model:
    """Sizes of a model, and how it is cut."""

    architecture: str
    fmt: str
    tp: int
    pp: int
    moe_ep: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    hidden: int
    ffn: int
    vocab: int
    tied: bool
    bias: bool
    experts: int = 4


@st.composite
def models(draw: st.DrawFn, architecture: str, fmt: str) -> Model:
    """Only what can be cut: whole heads, whole groups, pairs of rows."""
    tp, pp = draw(st.sampled_from([1, 2, 4, 8])), draw(st.sampled_from([1, 2, 3, 4]))
    packed = fmt == "int4_awq"
    head_size = 64 if packed else draw(st.sampled_from([2, 4, 6, 10]))
    if architecture == "GPT2LMHeadModel":
        heads = kv_heads = tp * draw(st.integers(1, 3))
        hidden = heads * head_size
    elif architecture == "Phi3ForCausalLM":  # its head size is hidden / heads
        kv_heads = draw(st.sampled_from([n for n in (1, 2, 3, 4, 8) if n % tp == 0 or tp % n == 0]))
        heads = np.lcm(kv_heads, tp) * draw(st.integers(1, 3))
        hidden = heads * head_size
    else:
        kv_heads = draw(st.sampled_from([n for n in (1, 2, 3, 4, 8) if n % tp == 0 or tp % n == 0]))
        heads = np.lcm(kv_heads, tp) * draw(st.integers(1, 3))
        hidden = GROUP * draw(st.integers(1, 2)) if packed else draw(st.integers(1, 20))
    return Model(
        architecture=architecture,
        fmt=fmt,
        tp=tp,
        pp=pp,
        moe_ep=draw(st.sampled_from([n for n in (1, 2, 4) if tp % n == 0]))
        if architecture.startswith("Mixtral")
        else 1,
        layers=draw(st.integers(pp, pp + 3)),
        heads=int(heads),
        kv_heads=int(kv_heads),
        head_size=head_size,
        hidden=int(hidden),
        ffn=tp * draw(st.integers(1, 3)) * (GROUP if packed else 1),
        vocab=draw(st.integers(tp, 60)),
        tied=draw(st.booleans()),
        bias=draw(st.booleans()),
    )


def config_of(model: Model) -> dict[str, Any]:
    if model.architecture == "GPT2LMHeadModel":
        return {
            "architectures": [model.architecture],
            "n_embd": model.hidden,
            "n_inner": model.ffn,
            "n_layer": model.layers,
            "n_head": model.heads,
            "n_positions": 24,
            "vocab_size": model.vocab,
            "activation_function": "gelu_new",
            "layer_norm_epsilon": 1e-5,
            "tie_word_embeddings": model.tied,
        }
    return {
        "architectures": [model.architecture],
        "hidden_size": model.hidden,
        "intermediate_size": model.ffn,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.kv_heads,
        **({} if model.architecture.startswith("Phi3") else {"head_dim": model.head_size}),
        "vocab_size": model.vocab,
        "max_position_embeddings": 32,
        "original_max_position_embeddings": 32,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": model.tied,
        "attention_bias": model.bias,
        "mlp_bias": model.bias,
        "num_local_experts": model.experts,
        "num_experts_per_tok": 2,
        "sliding_window": None,
    }


class Writer:
    """Random tensors of one model by their Hugging Face names."""

    def __init__(self, model: Model) -> None:
        self.model, self.tensors = model, Tensors()
        self._random = np.random.default_rng(0)

    def plain(self, name: str, *shape: int) -> None:
        self.tensors[name] = self._random.normal(size=shape).astype(np.float16)

    def linear(self, name: str, n: int, k: int, shared: Tensors, *, bias: bool = False) -> None:
        """`shared`: what linears with the same input have in common."""
        if bias:
            self.plain(f"{name}.bias", n)
        if self.model.fmt == "fp16":
            stored = (k, n) if self.model.architecture.startswith("GPT2") else (n, k)
            self.plain(f"{name}.weight", *stored)
            return
        for suffix, values in shared.items():
            self.tensors[f"{name}.{suffix}"] = values
        if self.model.fmt == "int4_awq":
            self.tensors[f"{name}.weight"] = self._random.integers(0, 256, (n // 2, k), np.uint8)
            scale_shape: tuple[int, ...] = (n, k // GROUP)
        else:
            self.tensors[f"{name}.weight"] = self._random.integers(-128, 128, (n, k), np.int8)
            scale_shape = (n,)
        self.tensors[f"{name}.weight_scale"] = self._random.random(scale_shape, np.float32) + 0.1

    def shared(self, k: int) -> Tensors:
        found: Tensors = {"pre_quant_scale": self._random.random(k).astype(np.float16) + 1}
        if self.model.fmt == "int8_sq":
            found["input_scale"] = np.array(self._random.random(), np.float32)
        return found

    def write(self, directory: Path) -> None:
        model, names = self.model, NAMES[self.model.architecture]
        self.plain(f"{names.embedding}.weight", model.vocab, model.hidden)
        if names.positions:
            self.plain(f"{names.positions}.weight", 24, model.hidden)
        if not model.tied:
            self.plain(f"{names.head}.weight", model.vocab, model.hidden)
        self._norm(names.final_norm)
        for layer in range(model.layers):
            self._layer(names, layer)
        save_file(self.tensors, directory / "model.safetensors", {"format": "pt"})
        (directory / "config.json").write_text(json.dumps(config_of(model)))
        if model.fmt != "fp16":
            fields: dict[str, Any] = {"quant_algo": ALGORITHMS[model.fmt], "group_size": GROUP}
            (directory / "hf_quant_config.json").write_text(json.dumps({"quantization": fields}))

    def _norm(self, name: str) -> None:
        self.plain(f"{name}.weight", self.model.hidden)
        if self.model.architecture.startswith("GPT2"):
            self.plain(f"{name}.bias", self.model.hidden)

    def _layer(self, names: Names, layer: int) -> None:
        model = self.model
        for source in names.norms.values():
            self._norm(source.format(i=layer))
        q, kv = model.heads * model.head_size, model.kv_heads * model.head_size
        biased = {
            "LlamaForCausalLM": (model.bias, model.bias, model.bias),
            "Qwen2ForCausalLM": (True, False, False),
            "GPT2LMHeadModel": (True, True, True),
        }
        qkv, dense, mlp = biased.get(model.architecture, (False, False, False))
        shared = self.shared(model.hidden)
        sizes = (q + 2 * kv,) if names.fused_qkv else (q, kv, kv)
        for name, n in zip(names.qkv, sizes, strict=True):
            self.linear(name.format(i=layer), n, model.hidden, shared, bias=qkv)
        self.linear(names.dense.format(i=layer), model.hidden, q, self.shared(q), bias=dense)
        if names.router:
            self.plain(f"{names.router.format(i=layer)}.weight", model.experts, model.hidden)
        up, down = self.shared(model.hidden), self.shared(model.ffn)
        for numbers in self._experts(names, layer):
            # TensorRT-LLM has one activation scale for all experts.
            shared = {**up, "pre_quant_scale": self.shared(model.hidden)["pre_quant_scale"]}
            rows = model.ffn * (2 if names.fused_fc else 1)
            for name in dict.fromkeys((*names.fc, *filter(None, [names.gate]))):
                self.linear(name.format(**numbers), rows, model.hidden, shared, bias=mlp)
            self.linear(names.proj.format(**numbers), model.hidden, model.ffn, down, bias=mlp)

    def _experts(self, names: Names, layer: int) -> Iterator[dict[str, int]]:
        for expert in range(self.model.experts if names.router else 1):
            yield {"i": layer, "e": expert}


@pytest.mark.parametrize("fmt", ["fp16", "int4_awq", "int8_sq"])
@pytest.mark.parametrize("architecture", NAMES)
@given(data=st.data())
@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_everything_comes_back(architecture: str, fmt: str, data: st.DataObject) -> None:
    model = data.draw(models(architecture, fmt))
    event(f"tp {model.tp}, pp {model.pp}")
    with tempfile.TemporaryDirectory() as root:
        source, out_dir = Path(root) / "hf", Path(root) / "out"
        source.mkdir()
        out_dir.mkdir()
        writer = Writer(model)
        writer.write(source)
        convert_checkpoint(
            source,
            out_dir,
            tp=model.tp,
            pp=model.pp,
            moe_ep=model.moe_ep,
            progress=SilentProgress(),
        )
        found = Unshard(out_dir, NAMES[architecture], model.moe_ep).tensors()
    expected = dict(writer.tensors)
    if model.tied:
        expected["lm_head.weight"] = expected[f"{NAMES[architecture].embedding}.weight"]
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        wanted = values.astype(np.float32) if ".gate.weight" in name else values  # routers
        assert found[name].tobytes() == wanted.tobytes(), name
        assert found[name].shape == (wanted.shape or (1,)), name
