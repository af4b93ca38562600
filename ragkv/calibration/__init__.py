"""Calibration: the cheapest method whose loss against full prefill is proved to be small on a user's own model and questions."""

from ragkv.calibration.ladder import RungReport
from ragkv.calibration.run import Calibration, calibrate

__all__ = ["Calibration", "RungReport", "calibrate"]
