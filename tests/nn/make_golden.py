"""python -m tests.nn.make_golden: what torch 2.13's own modules return for the cases, while it has them."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .cases import FUNCTIONS, MODULES, theirs

ONEDNN = ("ConvAdd2d", "ConvAddReLU2d", "LinearLeakyReLU", "LinearTanh")
"""torch's engine x86 has these layers and fails in them."""

PATH = Path(__file__).with_name("golden.json")


def as_numbers(result: Any) -> dict[str, Any]:
    """Codes and grid of a quantized tensor, or the numbers of a float one."""
    if isinstance(result, Tensor) and result.is_quantized:
        codes = result.int_repr()
        grid = {"scale": result.q_scale(), "zero_point": result.q_zero_point()}
        return {"shape": list(codes.shape), "codes": codes.flatten().tolist(), **grid}
    return {"shape": list(result.shape), "values": [round(v, 6) for v in result.flatten().tolist()]}


def main() -> None:
    warnings.simplefilter("ignore")  # of the removal that this file is for
    made = {}
    for name, case in {**MODULES, **FUNCTIONS}.items():
        torch.backends.quantized.engine = "onednn" if name in ONEDNN else "x86"
        module, arguments = case(theirs())
        made[name] = as_numbers(module(*arguments))
    lines = (f"{json.dumps(name)}: {json.dumps(result)}" for name, result in made.items())
    PATH.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
