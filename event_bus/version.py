"""The distribution's version, apart from everything that would make it costly to read."""

__version__ = "0.1.0"
