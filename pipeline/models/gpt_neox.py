"""GPT-NeoX and Pythia: q, k, v interleaved by head, attention and MLP in parallel, partial rotary."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.models.architecture import Architecture, Fused, Scope, Source
from pipeline.models.decoder import GELU, Decoder, MlpForm, Norm, Residual
from pipeline.models.hf_fields import MAX_LAYERS, HfFields
from pipeline.models.rotary import unscaled_rotary_from_hf
from pipeline.models.rules import EVERY_FORMAT, LAYER, always, embedding, head, linear, norm
from pipeline.models.shape import ModelShape
from pipeline.parallel import Axis

_NAME = "GPTNeoXForCausalLM"
_HF = "gpt_neox.layers.{layer}"


def _qkv(index: int) -> Source:
    fused = Fused((Axis.Q, Axis.KV, Axis.KV), index, per_kv_head=True)
    axes = (fused.parts[index], Axis.HIDDEN)
    return Source(f"{_HF}.attention.query_key_value", axes, fused=fused)


_RULES = (
    embedding("gpt_neox.embed_in"),
    *norm(f"{LAYER}.input_layernorm", f"{_HF}.input_layernorm", bias=always),
    *linear("attention.qkv", _qkv(0), _qkv(1), _qkv(2), bias=always),
    *linear(
        "attention.dense", Source(f"{_HF}.attention.dense", (Axis.HIDDEN, Axis.Q)), bias=always
    ),
    *norm(f"{LAYER}.post_attention_layernorm", f"{_HF}.post_attention_layernorm", bias=always),
    *linear("mlp.fc", Source(f"{_HF}.mlp.dense_h_to_4h", (Axis.FFN, Axis.HIDDEN)), bias=always),
    *linear("mlp.proj", Source(f"{_HF}.mlp.dense_4h_to_h", (Axis.HIDDEN, Axis.FFN)), bias=always),
    *norm("transformer.ln_f", "gpt_neox.final_layer_norm", Scope.LAST, bias=always),
    head("embed_out", tied="gpt_neox.embed_in"),
)


def _shape_from_hf(config: Mapping[str, Any]) -> ModelShape:
    fields = HfFields(config)
    hidden_size, num_heads = fields.size("hidden_size"), fields.size("num_attention_heads")
    if not fields.problems and hidden_size % num_heads:
        fields.refuse("num_attention_heads", f"{num_heads} does not divide {hidden_size}")
    fraction = fields.positive("rotary_pct", 0.25)
    rotary_size = int(hidden_size // num_heads * fraction)
    if not fields.problems and (fraction > 1.0 or rotary_size < 2 or rotary_size % 2):
        what = f"{fraction} rotates {rotary_size} of {hidden_size // num_heads} channels"
        fields.refuse("rotary_pct", what, "an even number, at most all")
    rotary_base = unscaled_rotary_from_hf(fields, base_name="rotary_emb_base", fraction=fraction)
    head_size = max(hidden_size // num_heads, 1)
    fields.only("head_dim", head_size, head_size, "transformers rotates by it, and only that")
    fields.only("attention_bias", True, True, "TensorRT-LLM's GPT-NeoX has biases")
    fields.only("use_parallel_residual", True, True, "attention and MLP must be in parallel")
    shape = ModelShape(
        architecture=_NAME,
        hidden_size=hidden_size,
        num_layers=fields.size("num_hidden_layers", limit=MAX_LAYERS),
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_size=head_size,
        # This and norm_epsilon are read by our network only: TensorRT-LLM's GPT-NeoX takes
        # 4 * hidden_size and 1e-5 whatever config.json says, as all published models have them.
        intermediate_size=fields.size("intermediate_size"),
        vocab_size=fields.size("vocab_size"),
        max_position_embeddings=fields.size("max_position_embeddings"),
        norm_epsilon=fields.positive("layer_norm_eps", 1e-5),
        rotary_base=rotary_base,
        rotary_scaling=None,
        hidden_act=fields.choice(
            "hidden_act", ("gelu", "gelu_fast", "gelu_new", "gelu_pytorch_tanh"), "gelu"
        ),
        tie_word_embeddings=fields.flag("tie_word_embeddings", default=False),
        attention_bias=True,
        mlp_bias=True,
        # TensorRT-LLM's GPT-NeoX knows the base by this name; our network reads rotary_base.
        config_fields={"rotary_pct": fraction, "rotary_emb_base": rotary_base},
    )
    fields.finish()
    return shape


_DECODER = Decoder(
    norm=Norm.LAYER,
    residual=Residual(True, "input_layernorm", "post_attention_layernorm"),
    mlp_form=MlpForm.PLAIN,
    activations=GELU,
    qkv_bias=True,
    dense_bias=True,
    mlp_bias=True,
    windowed=False,
)

GPT_NEOX = Architecture(
    name=_NAME,
    rules=_RULES,
    decoder=_DECODER,
    shape_from_hf=_shape_from_hf,
    formats=EVERY_FORMAT,
    # Buffers that older checkpoints carry: the causal mask and what follows from rotary_emb_base.
    ignored_sources=(
        f"{_HF}.attention.bias",
        f"{_HF}.attention.masked_bias",
        f"{_HF}.attention.rotary_emb.inv_freq",
    ),
)
