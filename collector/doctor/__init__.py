"""`bitten doctor`: what is wrong, why, and what to do about it. It looks and changes nothing."""

from collector.doctor.examination import examine
from collector.doctor.finding import Finding

__all__ = ["Finding", "examine"]
