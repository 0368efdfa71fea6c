"""Make the committed demo model: `python -m pipeline.demo.publish --trained DIR [--out DIR]`.

Takes what `pipeline.demo.train` left in DIR, injects the outlier channels, adds the texts, measures
the held-out loss of the final fp16 weights and writes it all to --out (the package's own model
folder by default). Only README.md, the card, is written by hand.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sysconfig
from pathlib import Path

from pipeline.demo import MODEL_DIR
from pipeline.demo.corpus import (
    Corpus,
    read_documents,
    read_library,
    split_documents,
    write_documents,
)
from pipeline.demo.outliers import OUTLIERS_FILE, draw_outliers, inject_outliers
from pipeline.errors import CheckpointError, Problem

OUTLIER_SEED = 0
OUTLIER_FRACTION = 0.02
OUTLIER_CHOICES = (8, 16)

CALIBRATION_FILE = "calibration.txt"
HELDOUT_FILE = "heldout.txt"
LICENSE_FILE = "LICENSE-python.txt"


def write_model(plain_dir: Path, corpus: Corpus, out_dir: Path) -> None:
    """Checkpoint with outliers, tokenizer and both texts, from the plain checkpoint `plain_dir`."""
    from safetensors.numpy import load_file, save_file

    out_dir.mkdir(parents=True, exist_ok=True)
    plain = load_file(plain_dir / "model.safetensors")
    outliers = draw_outliers(
        plain, seed=OUTLIER_SEED, fraction=OUTLIER_FRACTION, choices=OUTLIER_CHOICES
    )
    for path in plain_dir.glob("*.json"):
        shutil.copyfile(path, out_dir / path.name)
    save_file(
        inject_outliers(plain, outliers), out_dir / "model.safetensors", metadata={"format": "pt"}
    )
    (out_dir / "model.safetensors").chmod(0o644)  # safetensors writes for the owner alone
    (out_dir / OUTLIERS_FILE).write_text(outliers.to_json(), encoding="utf-8")
    write_documents(corpus.calibration, out_dir / CALIBRATION_FILE)
    write_documents(corpus.heldout, out_dir / HELDOUT_FILE)
    # The texts are CPython's; its licence asks to go wherever they go.
    license_path = Path(sysconfig.get_path("stdlib")) / "LICENSE.txt"
    shutil.copyfile(license_path, out_dir / LICENSE_FILE)


def measure_heldout(model_dir: Path) -> dict[str, float | int]:
    """Loss and perplexity of the checkpoint over its heldout.txt, computed in fp32."""
    import torch
    from tokenizers import Tokenizer
    from transformers import LlamaForCausalLM

    from pipeline.demo.perplexity import WINDOW, mean_loss
    from pipeline.demo.tokenizer import encode_documents

    tokenizer = Tokenizer.from_file(str(model_dir / "tokenizer.json"))
    tokens = encode_documents(tokenizer, read_documents(model_dir / HELDOUT_FILE))
    model = LlamaForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    loss = mean_loss(model, tokens)
    return {
        "num_tokens": len(tokens),
        "window": WINDOW,
        "loss_nats": round(loss, 4),
        "perplexity": round(math.exp(loss), 3),
    }


def publish(trained_dir: Path, out_dir: Path) -> None:
    """Write the model of a finished training to `out_dir`, with training.json about how it came.

    Raises:
        CheckpointError: the training is not finished, or used another corpus than this interpreter
            has, so that the texts would not be the ones left out of the training.
    """
    facts_path = trained_dir / "training.json"
    if not facts_path.is_file():
        raise CheckpointError(
            Problem(
                str(facts_path), "is missing: the training is not finished", fix="let it finish"
            )
        )
    facts = json.loads(facts_path.read_text(encoding="utf-8"))
    corpus = split_documents(read_library())
    if facts["corpus_sha256"] != corpus.sha256:
        raise CheckpointError(
            Problem(
                str(facts_path),
                f"the model was trained on corpus {facts['corpus_sha256']}, "
                f"this interpreter's library is {corpus.sha256}",
                fix=f"run with the interpreter that trained it, Python {facts['python']}",
            )
        )
    write_model(trained_dir / "plain", corpus, out_dir)
    facts["heldout"] = measure_heldout(out_dir)
    (out_dir / "training.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the demo model from a finished training.")
    parser.add_argument("--trained", type=Path, required=True, help="--out of pipeline.demo.train")
    parser.add_argument("--out", type=Path, default=MODEL_DIR)
    arguments = parser.parse_args()
    publish(arguments.trained, arguments.out)


if __name__ == "__main__":
    main()
