"""The section `quantize.calibration` of a YAML: which text, how it is cleaned, chosen and cut."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

BUNDLED = "bundled"
"""Instead of a path: the text that ships with the demo model."""


class Section(BaseModel):
    """Strict and immutable: no unknown key, no silent conversion."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class HubFile(Section):
    """One file of a dataset on the Hugging Face Hub, at one commit."""

    hub: Annotated[str, Field(pattern=r"^[\w.-]+/[\w.-]+$")]
    """owner/name of the dataset."""
    revision: Annotated[str, Field(pattern=r"^[0-9a-f]{40}$")]
    """Commit hash: a branch name moves, and an engine must say what it was made from."""
    file: Annotated[str, Field(pattern=r"^(\w[^/\\]*/)*\w[^/\\]*$")]
    """Path within the dataset, such as data/train.parquet."""


PATH_TAG, HUB_FILE_TAG = "a path", "a Hub file"  # pydantic puts these tags into locations


def _kind_of_data(value: Any) -> str:
    return HUB_FILE_TAG if isinstance(value, dict | HubFile) else PATH_TAG


CalibrationSource = Annotated[
    Annotated[str, Tag(PATH_TAG)] | Annotated[HubFile, Tag(HUB_FILE_TAG)],
    Discriminator(_kind_of_data),
]
"""`bundled`, the path of a local file, or a file of a dataset on the Hub."""


class CleanConfig(Section):
    """What is taken out of calibration text before any of it is chosen; nothing unless it says so."""

    remove_urls: bool = False
    normalize_whitespace: bool = False
    """For prose: indentation goes, too."""
    drop_duplicates: Literal["none", "exact", "near"] = "none"
    """near: equal but for case, punctuation, white space and numbers."""
    drop_null: bool = False
    """Rows without a text are an error otherwise."""
    min_chars: Annotated[int, Field(ge=1)] | None = None
    max_chars: Annotated[int, Field(ge=1)] | None = None

    @model_validator(mode="after")
    def _some_length_is_left(self) -> CleanConfig:
        low, high = self.min_chars, self.max_chars
        if low is not None and high is not None and low > high:
            raise ValueError(
                f"min_chars {low} is above max_chars {high}; allowed: at most max_chars"
            )
        return self


def refuse_two_columns(column: str | None, messages: str | None) -> None:
    """Raise ValueError when both are given."""
    if column is not None and messages is not None:
        raise ValueError(
            "column and messages are both given; allowed: a column of texts or one of dialogues"
        )


class CalibrationConfig(Section):
    """Which text the quantizer sees, and how much of it."""

    data: CalibrationSource = BUNDLED
    column: Annotated[str, Field(min_length=1)] | None = None
    """Key or column of the text; None: "text"."""
    messages: Annotated[str, Field(min_length=1)] | None = None
    """Key or column of dialogues, instead of `column`; the model's chat template is put on them."""
    clean: CleanConfig = CleanConfig()
    strategy: Literal["random", "diverse", "length", "perplexity"] = "random"
    """Which windows are taken (`pipeline.quant.data.strategies`)."""
    layout: Literal["packed", "padded"] = "packed"
    """packed: full windows, documents in a row. padded: the beginning of one document in each."""
    padding: Literal["right", "left"] = "right"
    """Where a padded window has its padding."""
    num_samples: Annotated[int, Field(ge=1, le=65536)] = 128
    seq_len: Annotated[int, Field(ge=8, le=131072)] = 256
    batch_size: Annotated[int, Field(ge=1, le=1024)] = 16
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    inputs: Literal["original", "quantized"] = "original"
    """What a layer is calibrated on: outputs of the original layers before it, or of the quantized."""

    @model_validator(mode="after")
    def _columns_agree(self) -> CalibrationConfig:
        refuse_two_columns(self.column, self.messages)
        return self
