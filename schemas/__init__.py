"""The event types, one JSON Schema file each."""

from pathlib import Path

DIRECTORY = Path(__file__).resolve().parent

__all__ = ["DIRECTORY"]
