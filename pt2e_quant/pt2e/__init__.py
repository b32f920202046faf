"""The engine: capture -> plan -> prepare -> convert."""

from .convert import convert_pt2e
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
    "Parity",
    "Plan",
    "Point",
    "PointRecord",
    "QATSchedule",
    "QuantizedIO",
    "Record",
    "check_converted",
    "convert_pt2e",
    "disable_fake_quant",
    "disable_observer",
    "disable_range_learning",
    "enable_fake_quant",
    "enable_observer",
    "enable_range_learning",
    "freeze_bn_stats",
    "make_plan",
    "prepare_pt2e",
    "prepare_qat_pt2e",
    "record_of",
    "update_bn_stats",
]
