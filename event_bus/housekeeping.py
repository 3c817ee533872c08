"""What the broker does as time passes: heartbeat, health, cursors, trimming, the file itself."""

from __future__ import annotations

import logging
from collections.abc import Callable

import msgspec

from event_bus.adopt import SpoolAdopter
from event_bus.consumers import Consumers
from event_bus.errors import JournalError, JournalFull, SettingsError, StartError
from event_bus.event_schema import JOURNAL_LOSS
from event_bus.intake import Intake
from event_bus.journal import DamagedBatch
from event_bus.journal_format import LostRange
from event_bus.live import LiveEvents
from event_bus.lock import FileLock
from event_bus.recovery import put_back
from event_bus.settings import Settings
from event_bus.status import BrokerStatus
from event_bus.unfinished import UnfinishedMessages
from event_bus.watchdog import Watchdog

log = logging.getLogger(__name__)

HEARTBEAT_S = 1.0
HEALTH_S = 30.0
HOUSEKEEPING_S = 5.0
PROBE_BYTES = 256 << 10


class Housekeeping:
    """`run_due` does what is due by `monotonic`; nothing here waits. Raises JournalError."""

    def __init__(
        self,
        settings: Settings,
        intake: Intake,
        consumers: Consumers,
        status: BrokerStatus,
        live: LiveEvents,
        adopter: SpoolAdopter,
        watchdog: Watchdog,
        lock: FileLock,
        unfinished: UnfinishedMessages,
        *,
        clock: Callable[[], float],
        monotonic: Callable[[], float],
    ) -> None:
        self._settings = settings
        self._intake = intake
        self._journal = intake.journal
        self._consumers = consumers
        self._status = status
        self._live = live
        self._adopter = adopter
        self._watchdog = watchdog
        self._lock = lock
        self._unfinished = unfinished
        self._clock = clock
        self._monotonic = monotonic
        self._clock_ahead_s = clock() - monotonic()
        self._heartbeat_due = self._health_due = self._housekeeping_due = monotonic()

    @property
    def due(self) -> float:
        return min(self._heartbeat_due, self._health_due, self._housekeeping_due)

    def run_due(self) -> None:
        now = self._monotonic()
        if now >= self._heartbeat_due:
            self._heartbeat_due = now + HEARTBEAT_S
            self._watchdog.alive()
            self._adopter.look()
            self._consumers.pass_time(HEARTBEAT_S)
            self.probe_storage()
            self._keep_files()  # each second: what is gone has to be there again within five
            self._status.keys_problem = self._live.apply_rights()
            self._unfinished.look()
            self._look()
            self._live.publish_heartbeat(self._status.heartbeat())
            self._tell_losses()
        if now >= self._health_due:
            self._emit_health()
        if now >= self._housekeeping_due:
            self._housekeeping_due = now + HOUSEKEEPING_S
            self._trim()

    def storage_is_full(self, reason: str) -> None:
        if self._status.storage_full_since is None:
            self._status.storage_full_since = self._clock()
            self._status.storage_full_reason = reason.partition("; ")[0]
            log.error("refusing events: %s", reason)
            self._look()

    def probe_storage(self) -> None:
        """After a full disk there may be room again, though nobody publishes."""
        if self._status.storage_full_since is not None and self._journal.has_room(PROBE_BYTES):
            log.info("there is room again: taking events")
            self._status.storage_full_since = None
            self._look()

    def found_damaged(self, damaged: DamagedBatch) -> None:
        """Keep account of events that turned out to be damaged, and tell of them once."""
        first, last = damaged.first_seq, damaged.next_seq - 1
        file = self._journal.path.name
        loss = LostRange(first, last, self._clock(), "CRC-32 is wrong", file)
        try:
            if not self._journal.record_loss(loss):
                return
        except JournalFull as e:  # whoever asks for it again brings it up again
            self.storage_is_full(str(e))
        log.error("%s", damaged)
        self._look()

    def _look(self) -> None:
        """See what is wrong; a state that has changed is told at once."""
        if self._status.look():
            log.info("state: %s", self._status.health.state)
            self._health_due = self._monotonic()

    def _emit_health(self) -> None:
        self._health_due = self._monotonic() + HEALTH_S
        if self._status.storage_full_since is None:
            self._intake.emit("system_health", self._status.health_event())

    def _tell_losses(self) -> None:
        untold = [loss for loss in self._journal.losses if not loss.told]
        if not untold:
            return
        for loss in reversed(untold):
            fields = msgspec.structs.asdict(loss) | {"events": loss.events}
            del fields["told"], fields["found_at"]
            self._intake.emit(
                JOURNAL_LOSS, {k: v for k, v in fields.items() if v not in (None, "")}
            )
        self._intake.commit()
        self._journal.losses_are_told()

    def _keep_files(self) -> None:
        """Somebody removed or replaced the journal, the lock or the home with all that is in it:
        what is open still holds everything."""
        try:
            self._settings.make_home()
            self._lock.keep()
        except (SettingsError, StartError) as e:
            if self._journal.is_in_place():
                log.error("%s", e)
                return
            raise JournalError(f"{self._journal.path} is gone: {e}") from e
        if not self._journal.is_in_place():
            log.error("%s was removed or replaced: putting it back", self._journal.path)
            self._intake.commit()
            with self._watchdog.paused():  # ended now, the process would take all of it along
                put_back(self._journal, self._clock)
            self._status.put_back_at = self._clock()
            self._look()

    def _trim(self) -> None:
        """Save cursors, and trim the journal by age and size but not past a durable consumer."""
        self._consumers.save()
        before = self._journal.seq_to_trim(
            older_than=self._steady_now() - self._settings.journal_max_age_s,
            max_bytes=self._settings.journal_max_bytes,
        )
        stored, name = self._consumers.slowest() or (before, "")
        held_by = name if max(stored, self._journal.first_seq) < before else None
        if held_by and held_by != self._status.journal_held_by:
            log.warning(
                "journal kept from %d on, past its limits: consumer %s has not stored it",
                stored,
                held_by,
            )
        self._status.journal_held_by = held_by
        if self._journal.trim(min(before, stored)):
            self._housekeeping_due = self._monotonic()

    def _steady_now(self) -> float:
        """What the clock says, unless it has jumped forward since the start: a clock that is wrong
        for an hour must not trim what it takes for old. One that was put right counts from the
        next start on."""
        return min(self._clock(), self._monotonic() + self._clock_ahead_s)
