"""`bitten doctor`."""

from __future__ import annotations

import shlex
from collections import Counter
from dataclasses import asdict, replace

import click

from collector.doctor.examination import examine
from collector.doctor.finding import Finding, fault
from event_bus.cli.output import print_json, printable
from event_bus.errors import SettingsError

COLOURS = {"fault": "red", "warning": "yellow", "skipped": "cyan", "ok": "green"}


@click.command()
@click.option("--all", "show_all", is_flag=True, help="Also show the checks that are fine.")
@click.option("--json", "as_json", is_flag=True, help="The findings as one JSON list.")
@click.pass_context
def doctor(ctx: click.Context, show_all: bool, as_json: bool) -> None:
    """Say what is wrong, why, and what to do about it.

    It looks at the bus, the collector, the files, this machine and pm2, and changes nothing. Exit
    code 1 if there is a fault: events are lost or wait, or will soon. Warnings alone exit with 0.

    \b
    bitten doctor
    bitten doctor --all
    bitten doctor --json | jq '.[] | select(.level == "fault")'
    */10 * * * * bitten doctor > /tmp/doctor.txt || mail -s bitten me < /tmp/doctor.txt
    """
    found = (
        [unusable(ctx.obj, ctx.find_root().params.get("home"))]
        if isinstance(ctx.obj, SettingsError)
        else examine(ctx.obj)
    )
    shown = [f for f in found if show_all or f.level in ("fault", "warning")]
    if as_json:
        print_json([asdict(f) for f in shown])
    else:
        for finding in shown:
            _show(finding)
        click.echo(_summary(found))
    ctx.exit(any(f.level == "fault" for f in found))


def unusable(error: SettingsError, home: str | None) -> Finding:
    """Without settings nothing else can be looked at. `home` is what --home says, if it does."""
    directory = shlex.quote(home) if home else "${BITTEN_HOME:-~/.bitten}"
    finding = fault(
        str(error.args[0]),
        why="every command stops at that, and so do bus and collector",
        remedy=error.hint or "mend that line; docs/settings.md says what is expected",
        command="env | grep BITTEN_; cat " + directory + "/config.yaml",
    )
    return replace(finding, check="settings")


def _show(finding: Finding) -> None:
    level = click.style(f"{finding.level:<7}", fg=COLOURS[finding.level], bold=True)
    click.echo(f"{level}  {finding.check}: {printable(finding.what)}")
    for name, text in (("why:", finding.why), ("do:", finding.remedy), ("$", finding.command)):
        if text:
            click.echo(f"{'':9}{name:<4} {printable(text)}")


def _summary(findings: list[Finding]) -> str:
    levels = Counter(f.level for f in findings)
    if not levels["fault"] and not levels["warning"]:
        return f"all well: {levels['ok']} checks"
    return ", ".join(
        f"{levels[level]} {level}{'s' if levels[level] != 1 else ''}"
        for level in ("fault", "warning")
        if levels[level]
    )
