"""Names that become directories and parts of URLs."""

from __future__ import annotations

import re

# To be used with `fullmatch`: `match` with a final "$" lets a newline at the end pass.
BUILD_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
"""A build: a directory below engines/ and triton_repo/."""

MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
"""A model in Triton: a directory of its repository, and a part of its URLs."""
