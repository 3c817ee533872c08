"""`bitten audit`: reads journal, spool and database so that the three can be compared.

An event moves from a process's memory through its spool to the journal, and from there to the
database. They are read in this order, each later than the one before: what has left the one is
found in the next, and nothing that is merely on its way looks lost. First of all it is seen which
processes live, for what a process leaves as it ends is in its spool from then on.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import apsw
import msgspec
import psutil

from collector import attribution, in_backups, layout, ledger, vouched
from collector.accepted import reconcile
from collector.in_backups import InBackup
from collector.journal_view import JournalView, ProducerRow
from collector.ledger import Account, Held, Known, Range, Span
from collector.reader import Reader
from collector.seqs import Seqs, count, merged, without
from collector.spooled import Spooled, read_spools
from collector.tally import Count, Tally, gaps, journal_losses
from collector.wal import file_locks
from event_bus import database, protocol
from event_bus.errors import BusUnavailable, DatabaseError, JournalError
from event_bus.journal_file import has_wal
from event_bus.protocol import Client
from event_bus.settings import Settings
from event_bus.traces import last_known

BUS_PATIENCE_S = 1.0
CLOCK_SLACK_S = 1.0


class Ledger(msgspec.Struct, kw_only=True):
    """The answer of `bitten audit`; docs/audit.md says what each count means.

    `at_least` is true if nobody knows how much is lost besides: where the journal's end is not
    known, where `left_out` seqs were not given out after a recovery, or where up to `contested` of
    the unaccounted may be among events of the ranges. `accepted` of the lost events are known to
    the owner, `news` is true if there is a loss that is not.
    """

    verdict: str
    lost: int
    accepted: int
    news: bool
    at_least: bool
    published: int
    acked: int
    waiting: int
    in_memory: int
    in_spool: int
    dropped: int
    refused: int
    rejected: int
    conflicts: int
    stored: int
    unstored: int
    missing: int
    unaccounted: int
    contested: int
    undecided: int
    truncated: int
    gaps: int
    holes: int
    left_out: int
    differing: int
    duplicates: int | None
    first_seq: int
    last_seq: int
    stored_seq: int
    counted_from_seq: int
    bus: str
    ranges: list[Range]
    in_backups: list[InBackup]
    sources: list[Account]
    producers: list[Account]


def audit(settings: Settings, *, full: bool = False, accept: bool = False) -> Ledger:
    """Compare what was published with what is stored, and account for the difference.

    With `full`, nothing that an earlier audit vouched for is taken over; with `accept`, the losses
    found are no news from now on. Raises DatabaseError if there is no database or it cannot be
    compared, JournalError if the journal cannot be read.
    """
    _check_journal(settings)
    client = Client(settings) if _bus_may_run(settings) else None
    try:
        return _compare(settings, client, full=full, accept=accept)
    except JournalError as e:
        if client is not None and not has_wal(settings.journal):
            raise _removed(Path(f"{settings.journal}-wal")) from e
        raise
    finally:
        if client is not None:
            client.close()


def _check_journal(settings: Settings) -> None:
    if settings.journal.exists():
        return
    if (settings.home / "bus.lock").exists() and _bus_may_run(settings):
        raise _removed(settings.journal)
    past_seq, file = last_known(settings.home, settings.backup_dir)
    if past_seq and not settings.db.exists():
        raise DatabaseError(
            f"neither journal nor database is in {settings.home}, and {file} tells of events"
            f" up to {past_seq}",
            hint="bring back a backup: `bitten restore`",
        )
    raise DatabaseError(
        f"there is no journal at {settings.journal} yet", hint="start the bus: `bitten up`"
    )


def _removed(file: Path) -> DatabaseError:
    return DatabaseError(
        f"{file} was removed under the bus",
        hint="do not stop the bus: it puts the file back by itself; ask again in some seconds",
    )


def _compare(settings: Settings, client: Client | None, *, full: bool, accept: bool) -> Ledger:
    request = client.send(protocol.STATUS) if client else b""  # answered while we read
    with JournalView(settings.journal) as journal:
        dead = {p.token for p in journal.producers() if not _is_alive(p)}
        told_seq, _ = last_known(settings.home, settings.backup_dir, journal.journal_id)
    try:
        spools = read_spools(settings.spool)
    except OSError as e:
        raise DatabaseError(
            f"cannot read {e.filename or settings.spool}, where events may wait: {e.strerror}",
            hint="run it as the owner of the home, or give the rights back",
        ) from e
    with JournalView(settings.journal) as journal, Reader(settings.db) as reader:
        layout.check_is_current(reader.db, settings.db)
        # What was told has been read before, so it can only lag.
        lacks_end = journal.lacks_wal or told_seq > journal.last_seq
        status = _answer(client, request) if client and lacks_end else None
        if status and status["journal_id"] != journal.journal_id:
            status = None  # another home's
        producers = journal.producers()
        try:
            with _one_reading(reader.db):
                if lacks_end:
                    _lose_end(settings, journal, reader, status, told_seq)
                stored_seq = _stored_seq(reader, journal)
                opening = vouched.last_opening(reader.db)
                tally = (
                    Tally() if full else vouched.load(settings.home, reader.db, journal.journal_id)
                )
                counted_from = tally.seq + 1
                Count(reader, tally, stored_seq).run(
                    journal.runs(counted_from), journal.opaque_ids(counted_from)
                )
                told = journal_losses(reader.db)
                left_out = ledger.left_out([*told, *journal.losses], journal.origin_seq)
                ranges = [*gaps(reader.db, 1, stored_seq, left_out), *tally.faults]
        except apsw.Error as e:
            raise DatabaseError(
                f"cannot read {settings.db}: {e}", hint=database.reading_hint(e)
            ) from e
        spans = journal.spans(stored_seq + 1)
    if client and not status:
        status = _answer(client, request)
    if status and status["journal_id"] != journal.journal_id:
        status = None  # another home's
    if not lacks_end:  # with it back, there is more to compare
        vouched.save(settings.home, opening, journal.journal_id, tally)
    not_to_come = _not_to_come(journal, stored_seq, told)
    waiting = max(0, journal.last_seq - max(stored_seq, journal.first_seq - 1))
    waiting -= sum(r.events for r in not_to_come)
    ranges += [r for r in not_to_come if r.events or r.kind != ledger.LEFT_OUT]
    ranges += _not_missed_yet(journal, stored_seq, left_out)
    ranges.sort(key=lambda r: r.first_seq)
    accounts = _accounts(producers, dead, spools, tally, spans, journal.lost())
    foreign = _foreign(tally, waiting - sum(a.unstored for a in accounts))
    contested = attribution.settle_missing(
        accounts,
        attribution.unowned(tally, ranges, spans, stored_seq, left_out),
        attribution.skips(tally, producers, spans, journal.last_seq),
    )
    lost, verdict = ledger.verdict(accounts, ranges, contested=contested)
    try:
        accepted = reconcile(settings.home, journal.journal_id, accounts, ranges, accept=accept)
    except OSError as e:
        raise DatabaseError(
            f"cannot note in {settings.home} which losses are accepted: {e.strerror}",
            hint="run it as the owner of that directory",
        ) from e
    known, news = accepted.compare(accounts, ranges)
    known = min(known, lost)
    at_least = contested > 0 or any(r.last_seq is None or r.kind == ledger.LEFT_OUT for r in ranges)
    if at_least and not news:
        verdict += " (all of it known and accepted)"
    elif known or accepted.endless:
        verdict += f" ({known} of them known and accepted)"
    total = ledger.total([*accounts, *foreign])
    return Ledger(
        verdict=verdict,
        lost=lost,
        accepted=known,
        news=news,
        at_least=at_least,
        waiting=total.in_memory + total.in_spool,
        **{name: getattr(total, name) for name in ledger.SUMMED if name != "processes"},
        contested=contested,
        truncated=tally.truncated,
        gaps=_events(ranges, "gap"),
        holes=_events(ranges, "hole"),
        left_out=_events(ranges, ledger.LEFT_OUT),
        differing=_events(ranges, "differs"),
        duplicates=status["duplicates"] if status else None,
        first_seq=journal.first_seq,
        last_seq=journal.last_seq,
        stored_seq=stored_seq,
        counted_from_seq=counted_from,
        bus=status["state"] if status else "away",
        ranges=ranges,
        in_backups=in_backups.find(settings, journal, stored_seq, ranges),
        sources=ledger.by_source([*accounts, *foreign]),
        producers=accounts,
    )


def _lose_end(
    settings: Settings,
    journal: JournalView,
    reader: Reader,
    status: dict[str, Any] | None,
    told_seq: int,
) -> None:
    """Have the journal count what it lacks as lost. Raises DatabaseError if a bus has it."""
    if status and status["last_seq"] <= journal.last_seq:
        return  # emptied by the bus itself, at a limit of file sizes
    if status or _home_is_held(settings):
        raise _removed(Path(f"{journal.path}-wal"))
    stored_seq = reader.last_seq() if _bound(reader) in (None, journal.journal_id) else 0
    journal.lose_end(max(told_seq, stored_seq))


def _not_to_come(journal: JournalView, stored_seq: int, told: list[Range]) -> list[Range]:
    """What the journal lost, with how much of it is not a gap yet."""
    losses = {r.first_seq: r for r in told}
    for loss in journal.losses:
        r = losses.setdefault(loss.first_seq, loss)
        r.events = max(0, (loss.last_seq or 0) - max(stored_seq, loss.first_seq - 1))
    return list(losses.values())


def _not_missed_yet(journal: JournalView, stored_seq: int, left_out: Seqs) -> list[Range]:
    """What is gone from the journal, and the collector has yet to find missing."""
    first, last = stored_seq + 1, journal.first_seq - 1
    if first > last:
        return []
    reason = "the collector has not come to them yet"
    gap = Range(kind="gap", first_seq=first, last_seq=last, reason=reason)
    return ledger.tell_apart(gap, left_out)


@contextlib.contextmanager
def _one_reading(db: apsw.Connection) -> Iterator[None]:
    db.execute("BEGIN")
    try:
        yield
    finally:
        db.execute("ROLLBACK")


def _stored_seq(reader: Reader, journal: JournalView) -> int:
    """Up to where to compare. Raises DatabaseError if that makes no sense."""
    last, bound = reader.last_seq(), _bound(reader)
    if bound not in (None, journal.journal_id) and journal.origin_seq <= last:
        raise DatabaseError(
            f"{reader.path} was filled from journal {bound}, and {journal.path} is"
            f" {journal.journal_id}",
            hint="restore the journal.db or the database that belongs to the other",
        )
    if last > journal.last_seq:  # stored since, or the journal is an older one
        now = journal.last_seq_now()
        if last > now:
            raise DatabaseError(
                f"{reader.path} has events up to seq {last}, and {journal.path} ends at {now}: an"
                " older copy of the journal was restored",
                hint="restore the newer journal.db, or start the bus: it goes on behind the"
                " database's last event and records what is lost",
            )
    return min(last, journal.last_seq)


def _bound(reader: Reader) -> str | None:
    """The journal that the database was filled from."""
    row: Any = reader.db.execute("SELECT value FROM _meta WHERE key = 'journal_id'").fetchone()
    return row[0] if row else None


def _accounts(
    producers: list[ProducerRow],
    dead: set[str],
    spools: dict[str, Spooled],
    tally: Tally,
    spans: dict[str, list[Span]],
    lost: Seqs,
) -> list[Account]:
    rows = {p.token: p for p in producers}
    ahead = {token: merged((a, b) for _, a, b in found) for token, found in spans.items()}
    unstored = {token: count(without(seqs, lost)) for token, seqs in ahead.items()}
    # The bus's own accounts of refusals are among these.
    doubt = sum(n for token, n in unstored.items() if rows[token].report is None)
    accounts = []
    for token in sorted({*rows, *tally.producers, *spools}):
        row = rows.get(token)
        held = tally.producers.get(token) or Held(
            source=spools[token].source if token in spools else ""
        )
        last_n = row.last_n if row else 0
        spool = spools.get(token)
        known = Known(
            producer=token,
            held=held,
            report=row.report if row else None,
            last_n=last_n,
            last_seen=row.last_seen if row else None,
            alive=row is not None and token not in dead,
            unstored=unstored.get(token, 0),
            lost=count(ahead.get(token, [])) - unstored.get(token, 0),
            spooled=spool.after(last_n) if spool else 0,
            spooled_n=spool.last_n if spool else 0,
            dropped_at_end=spool.dropped if spool else 0,
            reason_at_end=spool.reason if spool else "",
        )
        accounts.append(ledger.account(known, doubt=doubt))
    return accounts


def _foreign(tally: Tally, unstored: int) -> list[Account]:
    """Accounts of sources whose ids name no process; what they sent was acknowledged or refused."""
    accounts = []
    for source, held in tally.foreign.items():
        sent = held.stored + held.rejected + held.conflicts
        accounts.append(
            Account(
                source=source,
                processes=0,
                published=sent,
                acked=sent,
                rejected=held.rejected,
                conflicts=held.conflicts,
                stored=held.stored,
            )
        )
    if unstored > 0:
        accounts.append(Account(processes=0, published=unstored, acked=unstored, unstored=unstored))
    return accounts


def _events(ranges: list[Range], kind: str) -> int:
    return sum(r.events for r in ranges if r.kind == kind)


def _bus_may_run(settings: Settings) -> bool:
    """False if the process that its lock names is gone: then there is no answer to wait for."""
    try:
        return psutil.pid_exists(int((settings.home / "bus.lock").read_text()))
    except FileNotFoundError:
        return _home_is_held(settings)  # a running bus holds this too, and makes it again
    except (OSError, ValueError):
        return False


def _home_is_held(settings: Settings) -> bool:
    """True if a process holds it for sure; outside Linux nobody knows."""
    return bool(file_locks(settings.home))


def _answer(client: Client, request: bytes) -> dict[str, Any] | None:
    """The bus's status; None if it is away."""
    try:
        status: dict[str, Any] = msgspec.json.decode(client.receive(request, BUS_PATIENCE_S)[0])
        return status
    except BusUnavailable:
        return None


def _is_alive(producer: ProducerRow) -> bool:
    """True unless the process is known to be gone: another may have its pid by now."""
    pid = producer.report.pid if producer.report else 0
    if not pid:
        return True
    try:
        process = psutil.Process(pid)
        return (
            process.status() != psutil.STATUS_ZOMBIE
            and process.create_time() <= producer.last_seen + CLOCK_SLACK_S
        )
    except psutil.NoSuchProcess:
        return False
    except psutil.Error:
        return True
