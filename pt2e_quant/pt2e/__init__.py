"""The engine: capture -> plan -> prepare -> convert."""

from .convert import convert_pt2e
from .numeric_debugger import (
    NodeAccuracySummary,
    OutputLogger,
    QuantizationComparisonResult,
    compare_results,
    extract_results_from_loggers,
    generate_numeric_debug_handle,
    prepare_for_propagation_comparison,
)
from .plan import Group, Plan, Point, make_plan
from .prepare import prepare_pt2e
from .qat.check import Parity, check_converted
from .qat.prepare import prepare_qat_pt2e
from .qat.schedule import QATSchedule
from .qat.switches import (
    disable_fake_quant,
    disable_observer,
    disable_range_learning,
    enable_fake_quant,
    enable_observer,
    enable_range_learning,
    freeze_bn_stats,
    update_bn_stats,
)
from .quantized_io import QuantizedIO
from .record import Decision, GroupRecord, PointRecord, Record, record_of

__all__ = [
    "Decision",
    "Group",
    "GroupRecord",
    "NodeAccuracySummary",
    "OutputLogger",
    "Parity",
    "Plan",
    "Point",
    "PointRecord",
    "QATSchedule",
    "QuantizationComparisonResult",
    "QuantizedIO",
    "Record",
    "check_converted",
    "compare_results",
    "convert_pt2e",
    "disable_fake_quant",
    "disable_observer",
    "disable_range_learning",
    "enable_fake_quant",
    "enable_observer",
    "enable_range_learning",
    "extract_results_from_loggers",
    "freeze_bn_stats",
    "generate_numeric_debug_handle",
    "make_plan",
    "prepare_for_propagation_comparison",
    "prepare_pt2e",
    "prepare_qat_pt2e",
    "record_of",
    "update_bn_stats",
]
