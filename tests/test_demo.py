"""`bitten demo`, run as a user runs it, and the pure parts that make its events."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import wait_until

from event_bus.demo import Result, market, strategy
from event_bus.demo.market import CANDLE_S, Candle
from event_bus.demo.strategy import HOLD_CANDLES, Trade, User

CANDLES = 300
UNTIL = 1_763_695_677.0


class Sandbox:
    """Where a demo puts its home, and an environment whose own settings would break it."""

    def __init__(self, path: Path) -> None:
        self.temporary = path / "tmp"
        self.own_home = path / "own"
        self.temporary.mkdir()
        self.environ = os.environ | {
            "TMPDIR": str(self.temporary),
            "BITTEN_HOME": str(self.own_home),
            "BITTEN_ENABLED": "0",
        }

    def demo(self, *options: str, **kwargs: Any) -> subprocess.CompletedProcess[str]:
        argv = [sys.executable, "-m", "event_bus", "demo", *options]
        return subprocess.run(
            argv,
            env=self.environ,
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
            **kwargs,
        )

    def processes(self) -> list[str]:
        """Command lines of the processes that live in a demo's home."""
        found = []
        for process in psutil.process_iter():
            try:
                home = process.environ().get("BITTEN_HOME", "")
                if home.startswith(str(self.temporary)) and process.status() != "zombie":
                    found.append(" ".join(process.cmdline()))
            except psutil.Error:  # it ended meanwhile, or is not ours
                continue
        return found


class Kept:
    """A demo that was run with --keep: what it printed, and the database it left."""

    def __init__(self, path: Path) -> None:
        self.sandbox = Sandbox(path)
        self.done = self.sandbox.demo("--keep", "--json", "--candles", str(CANDLES))
        assert self.done.returncode == 0, self.done.stderr
        self.result: dict[str, Any] = json.loads(self.done.stdout)
        self.home = Path(self.result["home"])

    def sql(self, query: str) -> list[tuple[Any, ...]]:
        db = sqlite3.connect(f"file:{self.home}/bitten_events.db?mode=ro", uri=True)
        try:
            return db.execute(query).fetchall()
        finally:
            db.close()


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kept]:
    yield Kept(tmp_path_factory.mktemp("demo"))


@pytest.fixture
def sandbox(tmp_path: Path) -> Sandbox:
    return Sandbox(tmp_path)


@pytest.fixture(scope="module")
def candles() -> list[Candle]:
    return market.shifted(market.load(CANDLES), UNTIL)


def test_numbers_the_demo_prints_are_what_the_database_holds(kept: Kept) -> None:
    result = kept.result
    by_type = dict(
        kept.sql("SELECT event_type, count(*) FROM events WHERE source <> 'event_bus' GROUP BY 1")
    )
    assert result["complete"]
    assert result["published"] == result["stored"] == by_type
    assert by_type["market_data"] == 4 * CANDLES
    assert result["audit"]["published"] == result["audit"]["stored"] > sum(by_type.values())
    assert result["audit"]["lost"] == 0


def test_kept_home_stays_and_the_users_own_is_not_touched(kept: Kept) -> None:
    assert kept.home.parent == kept.sandbox.temporary
    assert (kept.home / "bitten_events.db").exists()
    assert not kept.sandbox.own_home.exists()
    assert kept.sandbox.processes() == []


def test_events_come_from_two_processes(kept: Kept) -> None:
    producers = kept.sql(
        "SELECT DISTINCT source, substr(event_id, 1, instr(event_id, '-') - 1) FROM events"
        " WHERE source <> 'event_bus' ORDER BY 1"
    )
    assert [source for source, _ in producers] == ["market_feed", "strategy"]
    assert producers[0][1] != producers[1][1]


def test_each_execution_has_its_signal_and_command_under_one_correlation_id(kept: Kept) -> None:
    executions = kept.sql("SELECT count(*) FROM trade_events")[0][0]
    chains = kept.sql(
        "SELECT count(*) FROM trade_events t"
        " JOIN fire_command f ON f.fire_id = t.fire_id AND f.correlation_id = t.correlation_id"
        " JOIN signal_events s ON s.signal_id = f.signal_id AND s.correlation_id = t.correlation_id"
        " WHERE f.user_id = t.user_id AND f.direction = t.direction AND f.direction = s.direction"
    )
    assert chains == [(executions,)]
    assert executions > 20


def test_each_event_of_a_trade_names_the_stored_event_that_caused_it(kept: Kept) -> None:
    links = kept.sql(
        "SELECT e.event_type, c.event_type, count(*), sum(c.correlation_id = e.correlation_id)"
        " FROM events e LEFT JOIN events c ON c.event_id = e.causation_id"
        " WHERE e.source = 'strategy' AND e.event_type <> 'pattern_detected' GROUP BY 1, 2"
    )
    stored = kept.result["stored"]
    causes = {
        "signal_generated": "pattern_detected",
        "fire_command": "signal_generated",
        "trade_executed": "fire_command",
        "balance_update": "trade_executed",
    }
    assert links == sorted((e, c, stored[e], stored[e]) for e, c in causes.items())


def test_stored_events_are_those_the_candles_give_in_their_order(kept: Kept) -> None:
    last_tick = kept.sql("SELECT max(created_at) FROM market_data")[0][0]
    until = last_tick + CANDLE_S - market.TICK_OFFSETS_S[-1]
    candles = market.shifted(market.load(CANDLES), until)
    expected = {"market_feed": list(market.ticks(candles)), "strategy": strategy.trades(candles)}
    for source, events in expected.items():
        stored = kept.sql(
            "SELECT event_type, user_id, correlation_id, data FROM events"
            f" WHERE source = '{source}' ORDER BY seq"
        )
        got = [
            (kind, user, correlation, json.loads(data)) for kind, user, correlation, data in stored
        ]
        for *_, data in got:
            data.pop("execution_time", None)  # a time: compared with the others below
        planned = [(e.event_type, e.user_id, e.correlation_id, dict(e.data)) for e in events]
        for *_, data in planned:
            data.pop("execution_time", None)
        assert got == planned
        times = kept.sql(f"SELECT timestamp FROM events WHERE source = '{source}' ORDER BY seq")
        assert [t for (t,) in times] == pytest.approx([e.timestamp for e in events], abs=1e-5)


def test_queries_of_the_demo_work_when_pasted_into_a_shell(kept: Kept) -> None:
    if shutil.which("sqlite3") is None:
        if os.environ.get("CI"):
            pytest.fail("there is no sqlite3 program")
        pytest.skip("there is no sqlite3 program")
    queries = kept.result["queries"]
    assert len(queries) == 3
    for query in queries:
        assert len(query["rows"]) > 1
        shell = subprocess.run(
            ["sh", "-c", query["command"]], capture_output=True, text=True, check=True, timeout=30
        )
        answers = shell.stdout.splitlines()
        assert [a.split("|") for a in answers] == [
            ["" if value is None else str(value) for value in row] for row in query["rows"]
        ]


def test_demo_prints_ledger_and_removes_its_home(sandbox: Sandbox) -> None:
    done = sandbox.demo("--candles", "60")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    ledger = next(line for line in lines if "published =" in line)
    published, stored = re.findall(r"(\d+) (?:published|stored)", ledger)
    assert published == stored
    assert "stored, 0 lost" in ledger
    assert "--keep" in lines[-1]
    assert max(len(line) for line in lines if str(sandbox.temporary) not in line) <= 80
    assert list(sandbox.temporary.iterdir()) == []
    assert sandbox.processes() == []


def test_candles_too_few_for_a_trade_are_no_failure(sandbox: Sandbox) -> None:
    done = sandbox.demo("--candles", "2", "--json")
    assert done.returncode == 0, done.stderr
    stored = json.loads(done.stdout)["stored"]
    assert stored["market_data"] == 8
    assert "trade_executed" not in stored


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_interrupted_demo_leaves_no_file_and_no_process(
    sandbox: Sandbox, number: signal.Signals
) -> None:
    argv = [sys.executable, "-m", "event_bus", "demo", "--json"]
    with subprocess.Popen(
        argv,
        env=sandbox.environ,
        stdout=subprocess.PIPE,
        # A shell's background job, as these tests may be, has it ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        wait_until(lambda: list(sandbox.temporary.glob("*/bitten_events.db")), "a database")
        process.send_signal(number)
        assert process.wait(30) == 130
    assert list(sandbox.temporary.iterdir()) == []
    assert sandbox.processes() == []


def test_killed_demo_leaves_no_process(sandbox: Sandbox) -> None:
    argv = [sys.executable, "-m", "event_bus", "demo", "--json"]
    with subprocess.Popen(
        argv,
        env=sandbox.environ,
        stdout=subprocess.PIPE,
        # A shell's background job, as these tests may be, has it ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        wait_until(lambda: list(sandbox.temporary.glob("*/bitten_events.db")), "a database")
        assert sandbox.processes() != []
        process.kill()
    wait_until(lambda: sandbox.processes() == [], "all processes have ended")


def test_missing_candles_are_one_line_with_the_command_that_gets_them(sandbox: Sandbox) -> None:
    code = (
        "import sys; sys.modules['backtesting'] = None; sys.argv[1:] = ['demo'];"
        "from event_bus.cli import main; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=sandbox.environ,
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert "pip install 'bitten-event-bus[demo]'" in done.stderr
    assert list(sandbox.temporary.iterdir()) == []


def test_demo_runs_beside_a_foreign_folder_of_the_same_name(
    sandbox: Sandbox, tmp_path: Path
) -> None:
    foreign = tmp_path / "event_bus"
    foreign.mkdir()
    (foreign / "__init__.py").write_text("raise SystemExit('the wrong event_bus')\n")
    bitten = Path(sys.executable).with_name("bitten")
    done = subprocess.run(
        [str(bitten), "demo", "--candles", "60", "--json"],
        cwd=tmp_path,
        env=sandbox.environ,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr


COMPLETE = Result(
    candles=2,
    first=0.0,
    last=CANDLE_S,
    seconds=1.0,
    published={"market_data": 8},
    stored={"market_data": 8},
    sources={"market_data": "market_feed"},
    other={("system_health", "event_bus"): 1},
    reports=[{"waiting": 0, "dropped": 0, "refused": 0}],
    audit={"published": 9, "stored": 9, "lost": 0},
)


def test_result_without_loss_is_complete() -> None:
    assert COMPLETE.complete


@pytest.mark.parametrize(
    "flaw",
    [
        {"stored": {"market_data": 7}},
        {"stored": {"market_data": 7}, "other": {("market_data", "?"): 2}},
        {"audit": {"published": 10, "stored": 9, "lost": 0}},
        {"audit": {"published": 10, "stored": 10, "lost": 0}},
        {"audit": {"published": 9, "stored": 9, "lost": 1}},
        {"reports": [{"waiting": 1, "dropped": 0, "refused": 0}]},
        {"reports": [{"waiting": 0, "dropped": 1, "refused": 0}]},
        {"reports": [{"waiting": 0, "dropped": 0, "refused": 1}]},
    ],
)
def test_result_with_any_loss_is_not_complete(flaw: dict[str, Any]) -> None:
    assert not dataclasses.replace(COMPLETE, **flaw).complete


def test_last_candle_closes_when_it_should_and_gaps_stay() -> None:
    candles = market.load(CANDLES)
    moved = market.shifted(candles, UNTIL)
    assert moved[-1].time + CANDLE_S == UNTIL
    assert {m.time - c.time for m, c in zip(moved, candles, strict=True)} == {
        UNTIL - CANDLE_S - candles[-1].time
    }


def test_ticks_lie_within_their_candle_and_share_its_volume(candles: list[Candle]) -> None:
    ticks = list(market.ticks(candles))
    for i, c in enumerate(candles):
        four = ticks[4 * i : 4 * i + 4]
        bids = [t.data["bid"] for t in four]
        assert (bids[0], bids[-1], max(bids), min(bids)) == (c.open, c.close, c.high, c.low)
        assert sum(t.data["volume"] for t in four) == c.volume
        assert all(c.time <= t.timestamp < c.time + CANDLE_S for t in four)
        assert all(t.data["ask"] - t.data["bid"] == pytest.approx(0.0001) for t in four)


def test_rising_candle_visits_its_low_first_and_falling_its_high() -> None:
    rising = Candle(0, 1.10, 1.14, 1.09, 1.12, 4)
    falling = Candle(0, 1.12, 1.14, 1.09, 1.10, 4)
    assert [t.data["bid"] for t in market.ticks([rising])] == [1.10, 1.09, 1.14, 1.12]
    assert [t.data["bid"] for t in market.ticks([falling])] == [1.12, 1.14, 1.09, 1.10]


def test_orders_fill_at_the_open_of_the_next_candle(candles: list[Candle]) -> None:
    events = strategy.trades(candles)
    opens = {c.time: c.open for c in candles}
    following = dict(zip([c.time for c in candles], [c.time for c in candles[1:]], strict=False))
    fills = [e for e in events if e.event_type == "trade_executed"]
    assert fills
    for fill in fills:
        assert fill.cause is not None
        signal_candle = events[fill.cause].timestamp - strategy.FIRE_DELAY_S - CANDLE_S
        filled_candle = following[signal_candle]
        bid = opens[filled_candle]
        buys = fill.data["direction"] == "BUY"
        assert fill.data["open_price"] == (market.ask(bid) if buys else bid)
        assert fill.timestamp == filled_candle + strategy.FILL_DELAY_S


def test_balances_are_the_start_plus_all_profits_so_far(candles: list[Candle]) -> None:
    updates = [e for e in strategy.trades(candles) if e.event_type == "balance_update"]
    for user in strategy.USERS:
        balance = strategy.START_BALANCE
        own = [u for u in updates if u.user_id == user.user_id]
        assert own
        for update in own:
            balance += update.data["profit"]
            assert update.data["balance"] == pytest.approx(balance)


def test_strategy_knows_nothing_of_later_candles(candles: list[Candle]) -> None:
    all_events = strategy.trades(candles)
    for cut in range(60, len(candles), 20):
        closing = candles[cut - 1].time + CANDLE_S
        known = [e for e in strategy.trades(candles[:cut]) if e.timestamp < closing]
        assert all_events[: len(known)] == known


@pytest.mark.parametrize(
    ("direction", "bid", "profit"),
    [
        ("BUY", 1.1010, 10.0),
        ("BUY", 1.0990, -10.0),
        ("SELL", 1.0989, 10.0),
        ("SELL", 1.1009, -10.0),
    ],
)
def test_profit_of_a_tenth_of_a_lot_is_a_dollar_a_pip(
    direction: str, bid: float, profit: float
) -> None:
    trade = Trade(User("u", 0.10, 0.0), direction, 1.1000, HOLD_CANDLES, 0, "c")
    assert trade.profit(bid) == pytest.approx(profit)


def test_moving_average_begins_with_its_first_full_window() -> None:
    assert strategy.sma([1.0, 2.0, 3.0, 5.0], 3) == [None, None, 2.0, pytest.approx(10 / 3)]


def test_rsi_is_wilders() -> None:
    """Gains 1, 0, 2 and losses 0, 1, 0 average to 1 and 1/3: 75; then a loss of 3 smoothed in."""
    values = strategy.rsi([10.0, 11.0, 10.0, 12.0, 9.0], 3)
    gain, loss = (1 * 2 + 0) / 3, (1 / 3 * 2 + 3) / 3
    assert values[:3] == [None, None, None]
    assert values[3:] == [pytest.approx(75.0), pytest.approx(100 * gain / (gain + loss))]


def test_rsi_of_a_price_that_stands_still_is_in_the_middle() -> None:
    assert strategy.rsi([1.0] * 5, 3)[3:] == [50.0, 50.0]
