"""What is wrong with the bus now, since when, and what to do. Pure: facts in, words out."""

from __future__ import annotations

import msgspec

from event_bus.words import events

STALLED_AFTER_S = 30.0
"""A durable consumer that has events to store and has not asked for so long is reported."""

LOSS_SHOWN_S = 86_400.0
"""How long a loss is a problem; it is in the database as a `journal_loss` event for ever."""

PUT_BACK_SHOWN_S = 600.0
"""How long it is a problem that the journal was removed, though it is there again."""

MAX_WAL_BYTES = 64 << 20
"""Without a reader the journal's has some 33 MB: 4,000 pages of 8 KiB."""

CLOCK_BACK_S = 2.0
"""Smaller steps are what keeping a clock right looks like."""


class Problem(msgspec.Struct, frozen=True):
    """`code` is one of those that docs/operations.md lists, `since` Unix seconds."""

    code: str
    message: str
    remedy: str
    since: float


class ConsumerFacts(msgspec.Struct, frozen=True):
    """Of one durable consumer: `silent_s` since it last asked, `problem` in its own words."""

    lag: int
    silent_s: float
    problem: str


class LossFacts(msgspec.Struct, frozen=True):
    """Events that the journal lost: `what` of them, and the reason."""

    what: str
    found_at: float
    reason: str
    file: str


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    """`latest` is the latest time that the clock has shown since the start; times are Unix
    seconds."""

    now: float
    latest: float
    storage_full_since: float | None = None
    storage_full_reason: str = ""
    storage: str = ""
    losses: list[LossFacts] = []
    recovered: str = ""
    put_back_at: float | None = None
    journal_held_by: str | None = None
    wal_bytes: int = 0
    consumers: dict[str, ConsumerFacts] = {}
    schema_problems: list[str] = []
    keys_problem: str = ""


class Health:
    """The problems of the last look, the gravest first; one that stays keeps its `since`."""

    def __init__(self) -> None:
        self.problems: list[Problem] = []

    @property
    def state(self) -> str:
        """`ok`, or the code of the gravest problem."""
        return self.problems[0].code if self.problems else "ok"

    def look(self, facts: Facts) -> bool:
        """Take in what is the case now; True if that changes the state."""
        before = self.state
        known = {(p.code, _subject(p)): p.since for p in self.problems}
        self.problems = [
            msgspec.structs.replace(p, since=known.get((p.code, _subject(p)), p.since))
            for p in find_problems(facts)
        ]
        return self.state != before


def _subject(problem: Problem) -> str:
    """What a problem is about: its message up to the colon, after which figures may change."""
    return problem.message.partition(":")[0]


def find_problems(facts: Facts) -> list[Problem]:
    """The problems that these facts are, the gravest first."""
    found = []

    def add(code: str, message: str, remedy: str, since: float = facts.now) -> None:
        found.append(Problem(code, message, remedy, since))

    if facts.storage_full_since is not None:
        add(
            "storage_full",
            f"{facts.storage_full_reason}: events are refused, and wait with their senders while"
            " those live, then in spools as far as there is space",
            "free some space, it goes on by itself; a limit of file sizes takes a restart",
            facts.storage_full_since,
        )
    for loss in facts.losses:
        if facts.now - loss.found_at < LOSS_SHOWN_S:
            add(
                "journal_damaged" if loss.file else "journal_gone",
                f"lost to the journal, {loss.what}: {loss.reason}",
                f"see whether the database has them (`bitten audit`); {loss.file} is what is left"
                if loss.file
                else "stop bus and collector, and bring back a backup with `bitten restore`; if"
                " they were removed on purpose, remove last_seq.json and audit.json too",
                loss.found_at,
            )
    if facts.recovered:
        add(
            "journal_recovered",
            f"this start recovered the journal: {facts.recovered}",
            "check the disk; what was lost, if anything, has lines of its own",
        )
    for name, consumer in facts.consumers.items():
        if consumer.problem:
            add(
                "consumer_problem",
                f"consumer {name}: {consumer.problem}",
                "see its log; what it has not stored is kept in the journal",
            )
    for name, consumer in facts.consumers.items():
        if consumer.lag and consumer.silent_s >= STALLED_AFTER_S:
            add(
                "consumer_stalled",
                f"consumer {name} has stopped asking: {events(consumer.lag, 'wait')} for it",
                "start it again (the collector: `bitten up` or `pm2 restart data_collector`)",
                facts.now - consumer.silent_s,
            )
    if facts.journal_held_by:
        add(
            "journal_held",
            f"the journal is kept past its limits for consumer {facts.journal_held_by}",
            "start that consumer, or let go of it with the request `forget`",
        )
    if facts.wal_bytes > MAX_WAL_BYTES:
        add(
            "journal_read",
            f"a program reads {facts.storage} and does not end: its -wal has"
            f" {facts.wal_bytes >> 20} MB and grows",
            "end that program; `bitten doctor --all` names it",
        )
    if facts.now < facts.latest - CLOCK_BACK_S:
        add(
            "clock_back",
            f"the clock was set back: it has been {facts.latest - facts.now:.0f} s ahead of now",
            "check the time service; `seq` is right, `received_at` steps back with the clock",
        )
    if facts.keys_problem:
        add(
            "keys_problem",
            f"the allow-list of keys cannot be read: {facts.keys_problem}",
            "until then the last good list stays in force",
        )
    for text in facts.schema_problems:
        add(
            "schema_problem",
            f"schema file left out: {text}",
            "mend the file, and see `bitten schemas check`",
        )
    if facts.put_back_at is not None and facts.now - facts.put_back_at < PUT_BACK_SHOWN_S:
        add(
            "journal_put_back",
            f"{facts.storage} was removed or replaced while the bus had it open: all that it held"
            " is there again",
            "find out what did it; nothing is lost, and this line goes by itself",
            facts.put_back_at,
        )
    return found
