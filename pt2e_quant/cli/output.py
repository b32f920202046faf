"""What commands print: text for people, JSON for scripts."""

from __future__ import annotations

import json
import sys
from typing import Any

__all__ = ["tell"]


def tell(plain: Any, text: str, as_json: bool) -> None:
    """One of the two on standard output."""
    sys.stdout.write((json.dumps(plain, indent=1) if as_json else text) + "\n")
