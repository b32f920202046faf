"""The engine: capture -> plan -> prepare -> convert."""

from .convert import convert_pt2e
from .plan import Group, Plan, Point, make_plan
from .prepare import prepare_pt2e
from .quantized_io import QuantizedIO
from .record import Decision, GroupRecord, PointRecord, Record, record_of

__all__ = [
    "Decision",
    "Group",
    "GroupRecord",
    "Plan",
    "Point",
    "PointRecord",
    "QuantizedIO",
    "Record",
    "convert_pt2e",
    "make_plan",
    "prepare_pt2e",
    "record_of",
]
