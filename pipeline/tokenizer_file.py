"""tokenizer.json as the tokenizers library reads it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.errors import CheckpointError, Problem

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def load_tokenizer_file(path: Path, *, fix: str) -> Tokenizer:
    """The tokenizer in a file that exists.

    Args:
        fix: what to do about a file of another kind.

    Raises:
        CheckpointError: the file cannot be read as a tokenizer.
    """
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:
        # The tokenizers library raises plain Exception for a file of another kind.
        if type(error) is not Exception:
            raise
        what = f"not a tokenizer: {str(error).partition(chr(10))[0]}"
        raise CheckpointError(Problem(str(path), what, fix=fix)) from error
