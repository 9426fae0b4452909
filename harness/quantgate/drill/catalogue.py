"""Every fault and every harmless change of the drill, cheapest to judge first."""

from __future__ import annotations

from quantgate.drill.benign import benign_changes
from quantgate.drill.calibration_faults import calibration_faults
from quantgate.drill.coverage_faults import coverage_faults
from quantgate.drill.fault import AnyFault
from quantgate.drill.file_faults import file_faults
from quantgate.drill.serving_faults import serving_faults
from quantgate.drill.weight_faults import weight_faults


def catalogue() -> list[AnyFault]:
    return [
        *weight_faults(),
        *coverage_faults(),
        *file_faults(),
        *calibration_faults(),
        *serving_faults(),
        *benign_changes(),
    ]
