"""Row 21: every event sent a hundred times, across restarts."""

from __future__ import annotations

import signal
import time
from typing import Any

from harness import Trial, drill
from system import wait_until

from event_bus import envelope
from event_bus.envelope import Envelope
from event_bus.errors import BusRefused, BusUnavailable
from event_bus.protocol import Client

SOURCE = "storm"
TIMES = 100
BATCH = 200
CHANGED = 25


@drill(
    row=21,
    name="duplicates",
    fault="each event sent 100 times, the bus killed meanwhile; ids again with other content",
    long="5,000 events",
    plant="the bus takes changed content for a duplicate",
    breaks="conflicts are kept",
)
def duplicates(trial: Trial) -> None:
    up = trial.start(fault="conflicts-unseen" if trial.planted else "")
    trial.publish()
    count = trial.count(400, 5_000)
    token = envelope.new_producer()
    # Half with ids as the bridge makes them, half with those of a foreign client.
    lines = [_line(f"{token}-{n}" if n % 2 else f"order {n}", n) for n in range(1, count + 1)]
    sends = [line for line in lines for _ in range(TIMES)]
    trial.rng.shuffle(sends)
    batches = [sends[i : i + BATCH] for i in range(0, len(sends), BATCH)]
    kill_at = {len(batches) * k // 4 for k in (1, 2, 3)}
    client = Client(trial.system.settings)
    for i, batch in enumerate(batches):
        if i in kill_at:
            up.signal("bus", signal.SIGKILL)
        _publish(client, b"".join(batch))
    changed = [_line(f"order {n}", -n) for n in range(2, 2 * CHANGED + 1, 2)]
    _publish(client, b"".join(changed))
    client.close()
    trial.settle()
    trial.check()
    stored = trial.system.sql(
        "SELECT event_id, data ->> 'n' FROM events WHERE source = ? ORDER BY seq", SOURCE
    )
    (conflicts,) = trial.system.sql("SELECT count(*) FROM rejected_events WHERE rule = 'conflict'")
    trial.note("sent", len(sends) + len(changed))
    trial.note("unique", count)
    trial.note("rows", len(stored))
    trial.note("conflicts", conflicts[0])
    trial.expect(len(stored) == count, f"{len(stored)} rows for {count} ids")
    trial.expect(
        {n for _, n in stored} == set(range(1, count + 1)), "a row has another event's content"
    )
    trial.expect(conflicts[0] == CHANGED, f"{conflicts[0]} of {CHANGED} conflicts are kept")


def _line(event_id: str, n: int) -> bytes:
    event = Envelope(
        event_id=event_id,
        event_type="user_action",
        timestamp=1_763_700_000.0,
        source=SOURCE,
        data={"action": "storm", "details": {}, "n": n},
    )
    return envelope.encode(event) + b"\n"


def _publish(client: Client, batch: bytes) -> None:
    """Send until it is acknowledged."""

    def acknowledged() -> dict[str, Any] | None:
        try:
            return client.publish(batch, 1.0)
        except (BusUnavailable, BusRefused):
            time.sleep(0.05)
            return None

    wait_until(acknowledged, "the bus acknowledges", 60.0)
