"""The group `bitten`: common options, and commands found by their entry points.

A package adds commands by entry points of the group `bitten.commands`; this is how the
collector's commands come in without the bus importing the collector.
"""

from __future__ import annotations

import errno
import logging
import os
import sys
import time
from importlib.metadata import entry_points
from typing import Any

import click

from event_bus.cli.escape import printable
from event_bus.errors import BittenError, SettingsError
from event_bus.settings import Settings
from event_bus.version import __version__

_UNWRITABLE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBADF}
"""How a write to a terminal, a pipe or a file fails."""


class CommandGroup(click.Group):
    """Loads a command's module when the command is used, so that `bitten emit` starts fast."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(entry_points(group="bitten.commands").names)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        for entry in entry_points(group="bitten.commands", name=cmd_name):
            command: click.Command = entry.load()
            return command
        return None


@click.group(
    cls=CommandGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Every option is also a variable (BITTEN_HOME, BITTEN_DB, …) and a line of "
    "$BITTEN_HOME/config.yaml. Exit codes: 0 yes, 1 no (refused, lost), 2 wrong use, "
    "3 the bus does not answer, 4 a file, port or lock is not to be had, 5 the journal failed.",
)
@click.option("--home", help="Directory of all files.  [default: ~/.bitten]", metavar="DIR")
@click.option("--db", help="The database.  [default: HOME/bitten_events.db]", metavar="FILE")
@click.option("--events-url", help="Where the bus publishes.", metavar="URL")
@click.option("--ingress-url", help="Where the bus takes events and requests.", metavar="URL")
@click.option("--debug", is_flag=True, help="Log more, and show tracebacks of errors.")
@click.version_option(__version__, prog_name="bitten")
@click.pass_context
def cli(ctx: click.Context, /, debug: bool, **flags: Any) -> None:
    """An event bus for a trading system on one machine.

    \b
    bitten up                        start bus and collector here, until Ctrl-C
    bitten emit user_action action=login user_id=7
    bitten tail 'signal_*'           watch events as they happen
    bitten query --type trade_executed --since 1h
    bitten audit                     is anything lost?
    bitten demo                      see it work on real candles
    """
    os.umask(0o077)  # whatever a command makes is its owner's alone
    try:
        ctx.obj = Settings.load(**flags)
    except SettingsError as e:
        if ctx.invoked_subcommand != "doctor":
            raise
        ctx.obj = e  # it says so among what it finds
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        _Escaping("%(asctime)sZ %(levelname)s %(name)s: %(message)s", "%Y-%m-%dT%H:%M:%S")
    )
    level = logging.DEBUG if debug else logging.INFO
    logging.basicConfig(level=level, handlers=[handler], force=True)


class _Escaping(logging.Formatter):
    """Times in UTC; what a log line quotes cannot write to the terminal or begin a line."""

    converter = staticmethod(time.gmtime)

    def formatMessage(self, record: logging.LogRecord) -> str:
        record.message = printable(record.message)
        return super().formatMessage(record)


def main() -> None:
    """Run the command line and exit with the code its epilog lists."""
    debug = "--debug" in sys.argv
    _open_outputs()
    try:
        try:
            code = cli.main(prog_name="bitten", standalone_mode=False)
        except SystemExit as e:
            code = e.code
        sys.stdout.flush()
    except BittenError as e:
        if debug:
            raise
        click.echo(f"bitten: {printable(str(e))}", err=True)
        code = e.exit_code
    except click.ClickException as e:
        e.show()
        code = e.exit_code
    except click.Abort:
        code = 130
    except BrokenPipeError:  # `bitten query | head`
        _discard_output()
        code = 141
    except OSError as e:
        if debug or e.filename is not None or e.errno not in _UNWRITABLE:
            raise
        click.echo(f"bitten: cannot write the output: {e.strerror}", err=True)
        _discard_output()
        code = 4
    sys.exit(code if isinstance(code, int) else 0)


def _open_outputs() -> None:
    """What the shell closed (`>&-`) is there again: standard output to fail when written to."""
    if sys.stdout is None:
        sys.stdout = os.fdopen(os.open(os.devnull, os.O_RDONLY), "w")
    if sys.stderr is None:
        sys.stderr = os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")


def _discard_output() -> None:
    """Python writes what is left when it ends, and complains if it cannot."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)
