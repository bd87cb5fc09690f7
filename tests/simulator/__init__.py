"""A functional simulator of the PTX that CuTe kernels compile to; README.md says what it checks."""

from .findings import Finding, FindingLog, SimulationError
from .ptx import PtxError
from .simulation import record_launches, simulate

__all__ = [
    "Finding",
    "FindingLog",
    "PtxError",
    "SimulationError",
    "record_launches",
    "simulate",
]
