"""What calibration learned, as a file: stop and resume, in parts, for several configurations; and how well it covers.

    save_calibration(prepared, path)              what every observer of activations keeps
    load_calibration(prepared, path, *others)     back into a model prepared in the same way, or in another one
    calibration_report(prepared, held_back)       sites never reached, and values outside of the range on held-back data

Before this: `pt2e` prepares the model. Files need safetensors (the extra `calibration`).
"""

from .coverage import CalibrationReport, SiteCoverage, calibration_report
from .files import load_calibration, save_calibration

__all__ = ["CalibrationReport", "SiteCoverage", "calibration_report", "load_calibration", "save_calibration"]
