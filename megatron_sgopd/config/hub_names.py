"""Tells the names of models and data sets on a hub from paths on this machine."""

from __future__ import annotations

import re
from pathlib import Path

_OWNER_AND_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")


def is_hub_name(text: str) -> bool:
    """Returns whether `text` is OWNER/NAME and no file or folder here is called that."""
    return _OWNER_AND_NAME.fullmatch(text) is not None and not Path(text).exists()
