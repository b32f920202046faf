"""For authors of a quantizer: a conformance check, and random models to test on.

    from pt2e_quant.testing import aten_graphs, assert_conforms

    def test_conforms():
        assert_conforms(MyQuantizer().set_global(CONFIG))

`aten_graphs` draws its models with hypothesis: pip install 'pt2e-quant[testing]'. The rest needs nothing.
"""

from .conformance import RULES, assert_conforms, check_quantizer
from .converted import CONVERTED_RULES, broken_rules
from .draft import Step
from .finding import Finding
from .kinds import OPS
from .models import default_models
from .sketch import STARTS, Sketch
from .strategy import MissingDependencyError, aten_graphs

__all__ = [
    "CONVERTED_RULES",
    "OPS",
    "RULES",
    "STARTS",
    "Finding",
    "MissingDependencyError",
    "Sketch",
    "Step",
    "assert_conforms",
    "aten_graphs",
    "broken_rules",
    "check_quantizer",
    "default_models",
]
