"""What there is to know about a calibration set, as plain data, with everything that is doubtful.

Shape suffixes: W windows, T tokens of one window, C candidates, D documents, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from pipeline.calibration_config import CalibrationConfig
from pipeline.quant.data.candidates import Candidates
from pipeline.quant.data.characters import (
    MIN_CHARS,
    MIN_CHARS_OF_KIND,
    Profile,
    character_distance,
    script_distance,
)
from pipeline.quant.data.cleaning import CleaningCounts, count_duplicates
from pipeline.quant.data.documents import Document
from pipeline.quant.data.strategies import TAIL_SHARE, rare_tokens, token_counts
from pipeline.quant.data.windows import TokenWindows

USUAL_SAMPLES: Final = 128
"""128 to 1000 samples are usual."""

SHORT_SAMPLE_TOKENS: Final = 64
DUPLICATE_SHARE: Final = 0.05
SCRIPT_LIMIT: Final = 0.2
CHARACTER_LIMIT: Final = 0.05
"""Bits. Two texts of one kind, 16000 characters each: 0.014, 95 of 100 below 0.027 (Python source, the
demo's two texts). Python source against English prose 0.065, German against English 0.086."""


def describe(
    windows: TokenWindows,
    candidates: Candidates,
    chosen_C: NDArray[np.int64],
    documents: Sequence[Document],
    counts: CleaningCounts,
    characters: Profile,
    options: CalibrationConfig,
    *,
    vocab_size: int,
) -> dict[str, Any]:
    """Everything as JSON data; nothing in it depends on time or place.

    Rare tokens are defined by the counts of the whole text that the windows were chosen from: the least
    frequent ids that together make up at most 5 % of it (`strategies.rare_tokens`).
    """
    pieces = [candidates.pieces[index] for index in chosen_C]
    exact, near = count_duplicates(documents)
    facts = {
        "tokens_sha256": windows.digest,
        "num_windows": len(windows.tokens_WT),
        "num_windows_available": windows.num_available,
        "seq_len": int(windows.tokens_WT.shape[1]),
        "batch_size": options.batch_size,
        "seed": options.seed,
        "num_tokens": windows.num_tokens,
        "num_text_tokens": windows.num_text_tokens,
        "strategy": options.strategy,
        "layout": options.layout,
        "padding": options.padding if windows.mask_WT is not None else None,
        "documents": {
            **counts.to_dict(),
            "encoded": len(documents),
            "truncated": candidates.num_truncated,
            "repeated_exactly": exact,
            "repeated_nearly": near,
        },
        "cleaning": options.clean.model_dump(mode="json"),
        "document_tokens": _length_histogram(candidates.lengths_D),
        "vocabulary": _vocabulary(candidates.pieces, pieces, vocab_size),
        "scripts": _rounded(characters.scripts()),
        "characters": _rounded(characters.kinds()),
    }
    return {**facts, "warnings": list(_warnings(facts, len(documents)))}


def _length_histogram(lengths_D: NDArray[np.int64]) -> dict[str, Any]:
    """Documents by their tokens; class i counts lengths of edges[i] up to edges[i + 1] - 1."""
    num_classes = int(lengths_D.max(initial=1)).bit_length()
    edges = [0, *(1 << power for power in range(num_classes + 1))]
    counts, _ = np.histogram(lengths_D, [*edges[:-1], edges[-1] - 0.5])
    return {
        "edges": edges,
        "counts": [int(count) for count in counts],
        "mean": round(float(lengths_D.mean()), 1),
        "median": float(np.median(lengths_D)),
        "longest": int(lengths_D.max()),
    }


def _vocabulary(
    all_pieces: Sequence[NDArray[np.int32]], pieces: Sequence[NDArray[np.int32]], vocab_size: int
) -> dict[str, Any]:
    counts_V = token_counts(all_pieces)
    chosen_V = token_counts(pieces)
    is_rare_V = rare_tokens(counts_V)
    chosen_V = np.pad(chosen_V, (0, len(counts_V) - len(chosen_V)))
    total = int(chosen_V.sum())
    return {
        "size": vocab_size,
        "distinct": int((chosen_V > 0).sum()),
        "distinct_available": int((counts_V > 0).sum()),
        "coverage": round(int((chosen_V > 0).sum()) / vocab_size, 6),
        "rare": {
            "definition": f"least frequent ids, at most {TAIL_SHARE:.0%} of the text's tokens",
            "ids": int(is_rare_V.sum()),
            "ids_covered": int((is_rare_V & (chosen_V > 0)).sum()),
            "share": round(int(chosen_V[is_rare_V].sum()) / max(1, total), 6),
            "share_available": round(
                int(counts_V[is_rare_V].sum()) / max(1, int(counts_V.sum())), 6
            ),
        },
    }


def _rounded(shares: dict[str, float]) -> dict[str, float]:
    return {name: round(share, 4) for name, share in shares.items() if share >= 0.00005}


def _warnings(facts: dict[str, Any], num_documents: int) -> Iterator[str]:
    samples, documents = facts["num_windows"], facts["documents"]
    if samples < USUAL_SAMPLES:
        yield f"{samples} samples are few: {USUAL_SAMPLES} to 1000 are usual"
    mean = facts["num_tokens"] / samples
    if mean < SHORT_SAMPLE_TOKENS:
        yield f"samples are short: {mean:.0f} tokens on average, less than {SHORT_SAMPLE_TOKENS}"
    if documents["truncated"] > num_documents / 2:
        yield (
            f"{documents['truncated']} of {num_documents} documents are longer than seq_len "
            f"{facts['seq_len']}; only their beginnings are used"
        )
    repeated = documents["repeated_exactly"] + documents["repeated_nearly"]
    if repeated > DUPLICATE_SHARE * num_documents:
        yield (
            f"{repeated} of {num_documents} documents repeat another one "
            f"({documents['repeated_exactly']} exactly); `clean: {{drop_duplicates: near}}` drops them"
        )


def comparison_warnings(calibration: Profile, heldout: Profile) -> Iterator[str]:
    """What shows, by characters alone, that two texts are of different kinds.

    Nothing is said of texts that are too short to tell.
    """
    left, right = calibration, heldout
    length = min(left.num_chars, right.num_chars)
    if length < MIN_CHARS:
        return
    if script_distance(left, right) > SCRIPT_LIMIT:
        yield (
            f"the calibration text is {_scripts(left)}, the held-out text {_scripts(right)}: scales "
            "are chosen on one script and judged on another"
        )
        return
    distance = character_distance(left, right)
    if length >= MIN_CHARS_OF_KIND and distance > CHARACTER_LIMIT:
        yield (
            f"calibration and held-out text differ in their characters ({distance:.3f} bits, texts of "
            f"one kind stay below {CHARACTER_LIMIT}): another language, or prose against code"
        )


def _scripts(one: Profile) -> str:
    shares = list(one.scripts().items())[:2]
    shown = [f"{share:.0%} {script}" for script, share in shares if share >= 0.005]
    return " and ".join(shown) or "without letters"
