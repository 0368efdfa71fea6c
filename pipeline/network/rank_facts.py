"""What a graph says about its rank, so that who runs it needs nothing but the graph."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass

RANK_PROPERTY = "trtpipe.rank"
"""Name of the model's metadata property."""


@dataclass(frozen=True)
class RankFacts:
    """Where a graph stands among those of its engine.

    Attributes:
        tp, pp, moe_ep, rank: see pipeline.parallel.Mapping.
        first_layer: number in the model of the graph's layer 0.
        vocab_size: tokens of the model. Logits of a last stage, joined over its ranks in tp_rank order,
            are those of tokens 0, 1, ...; from vocab_size on they belong to rows of padding, must be
            cut off, and must never be sampled.
        first_row: token of the graph's first logit; 0 where it has none. It may be vocab_size or more:
            then all of its logits are padding.
    """

    tp: int
    pp: int
    moe_ep: int
    rank: int
    first_layer: int
    vocab_size: int
    first_row: int

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.tp * self.pp

    def to_json(self) -> str:
        """One line."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> RankFacts:
        """The inverse of to_json."""
        return cls(**json.loads(text))


def facts_of_properties(properties: Mapping[str, str]) -> RankFacts | None:
    """RankFacts of a model's metadata; None: the graph was made when there was only one rank."""
    text = properties.get(RANK_PROPERTY)
    return None if text is None else RankFacts.from_json(text)
