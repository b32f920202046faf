"""X86InductorQuantizer keeps the Quantizer contract on all the models of the conformance kit, in every recipe."""

from __future__ import annotations

import pytest

from pt2e_quant.testing import assert_conforms
from quantizers.x86_inductor import X86InductorQuantizer
from tests.x86.x86_rows import RECIPES


@pytest.mark.parametrize("recipe", ["static", "dynamic", "fp16", "weight only"])
def test_the_contract_is_kept(recipe):
    assert_conforms(X86InductorQuantizer().set_global(RECIPES[recipe]))
