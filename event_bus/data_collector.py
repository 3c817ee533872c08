"""Alias of `collector.DataCollector`, under the name that integrators know."""

from __future__ import annotations

import sys
from pathlib import Path

if __package__ in (None, ""):  # `from data_collector import …` from inside the folder
    sys.path.append(str(Path(__file__).resolve().parent.parent))

from collector import DataCollector

__all__ = ["DataCollector"]
