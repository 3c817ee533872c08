"""The product's main path, through real processes."""

from __future__ import annotations

from conftest import System

EMIT = """
from event_bus.event_bridge import signal_generated, flush
import sys
print(signal_generated({
    'signal_id': 'TEST_001', 'symbol': 'EURUSD', 'direction': 'BUY',
    'confidence': 85.0, 'pattern_type': 'LIQUIDITY_SWEEP_REVERSAL'}))
sys.exit(0 if flush(10) else 1)
"""


def test_event_of_a_legacy_process_is_answered_by_sql(bus: System) -> None:
    bus.start_collector()
    done = bus.script(EMIT)
    assert done.returncode == 0, done.stderr
    bus.wait_stored()
    assert bus.sql("SELECT symbol, confidence FROM signal_events") == [("EURUSD", 85.0)]
    event_id = bus.sql("SELECT event_id FROM events WHERE event_type = 'signal_generated'")
    assert event_id == [(done.stdout.strip(),)]
