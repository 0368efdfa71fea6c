"""A complete tiny build: random weights, a tokenizer trained on the spot, its own texts and YAML."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from tests.tiny import write_tiny_llama
from tests.tiny_text import made_up_texts, write_tiny_tokenizer

SHAPE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 4096,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
}
"""Of a synthetic model."""


def write_build(
    root: Path, *, fmt: str = "fp16", backend: str = "onnxruntime", **sections: Any
) -> Path:
    """Write weights/, text.txt and tiny.yaml below `root`; returns the YAML.

    `sections` are merged over the top-level sections of the YAML.
    """
    weights = root / "weights"
    if not weights.exists():
        weights.mkdir(parents=True)
        write_tiny_llama(weights)
        write_tiny_tokenizer(weights)
    (root / "text.txt").write_text("\n<|endoftext|>\n".join(made_up_texts(40)))
    config: dict[str, Any] = {
        "model": {"source": "directory", "path": "weights"},
        "quantize": {
            "format": fmt,
            "group_size": 64,
            "calibration": {"data": "text.txt", "num_samples": 4, "seq_len": 32, "batch_size": 2},
        },
        "build": {
            "backend": backend,
            "max_batch_size": 2,
            "max_input_len": 32,
            "max_seq_len": 64,
        },
        "verify": {
            "data": "text.txt",
            "num_windows": 4,
            "seq_len": 32,
            "gates": {
                "max_perplexity_ratio": 1.5,
                "max_mean_kl": 1.0,
                "min_top1_agreement": 0.3,
            },
        },
    }
    for name, section in sections.items():
        config[name] = {**config.get(name, {}), **section} if isinstance(section, dict) else section
    path = root / "tiny.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    return path
