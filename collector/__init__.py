"""The collector: stores the bus's events in SQLite, and reads them back."""

from collector.data_collector import DataCollector

__all__ = ["DataCollector"]
