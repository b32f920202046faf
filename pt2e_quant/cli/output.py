"""What commands print: text for people, JSON for scripts."""

from __future__ import annotations

import json
import math
import sys
from typing import Any

__all__ = ["tell"]


def tell(plain: Any, text: str, as_json: bool) -> None:
    """One of the two on standard output. JSON has no infinity: the SQNR of equal outputs is null."""
    sys.stdout.write((json.dumps(_finite(plain), indent=1, allow_nan=False) if as_json else text) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
