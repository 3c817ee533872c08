"""`bitten backup` and `bitten restore`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import click

from collector.backup import Backup, make_backup
from collector.manifest import Manifest, backups
from collector.restore import check_backup, find_backup, restore, restore_config
from collector.rotation import Kept
from collector.seqs import count, text
from event_bus.cli.output import clock, print_json, print_table
from event_bus.settings import Settings
from event_bus.traces import last_known


@click.command()
@click.option(
    "--to",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="DIR",
    help="Make it in DIR, and remove none there.  [default: backup_dir, HOME/backup]",
)
@click.option("--list", "list_them", is_flag=True, help="Show the backups there are instead.")
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
@click.pass_obj
def backup(settings: Settings, to: Path | None, list_them: bool, as_json: bool) -> None:
    """Back up database, journal, config.yaml and schemas, while everything runs, and verify it.

    A backup is a directory named by its UTC time. It has its name only once it is verified.

    \b
    bitten backup
    bitten backup --to /mnt/usb
    bitten backup --list
    0 4 * * * bitten backup > /dev/null && rsync -a ~/.bitten/backup/ me@example.org:backup/

    The collector makes them by itself if `backup_interval_s` is set. Exit code 4: none was made.
    """
    if list_them:
        _list(backups(to or settings.backup_dir), as_json=as_json)
        return
    made = make_backup(settings, to.absolute() if to is not None else None)
    if as_json:
        print_json(made)
        return
    click.echo(f"{made.path}: {made.manifest.bytes / 1e6:.1f} MB in {made.seconds:.1f} s")
    click.echo(f"verified: {_account(made)}")
    if made.manifest.missing is not None:
        first, last = made.manifest.missing
        click.echo(f"in neither database nor journal: seq {first} to {last} (see `bitten audit`)")
    if made.removed:
        click.echo(f"removed: {', '.join(path.name for path in made.removed)}")
    for line in _kept(made.kept, settings):
        click.echo(line)
    click.echo("not in it: keys/ and spool/")


@click.command("restore")
@click.argument("name", required=False, metavar="[BACKUP]")
@click.option(
    "--only", type=click.Choice(["database"]), help="Only the database; the journal is kept."
)
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
@click.pass_context
def restore_command(
    context: click.Context, name: str | None, only: str | None, as_json: bool
) -> None:
    """Restore BACKUP, by default the newest, into a home that has no database and no journal.

    Bus and collector must be stopped. BACKUP is a name that `bitten backup --list` shows, or the
    path of a backup from anywhere.

    \b
    bitten restore
    bitten --home /srv/bitten restore /mnt/usb/2026-01-31T04-00-00Z
    bitten restore --only database      the journal is fine: the collector adds what is newer
    """
    settings: Settings = context.obj
    path = find_backup(settings, name)
    check_backup(path, only_database=only is not None)
    put: list[str] = []
    if only is None:
        put = restore_config(path, settings)
        flags = {k: v for k, v in context.find_root().params.items() if k != "debug"}
        settings = Settings.load(**flags)  # config.yaml may be new
    manifest = restore(path, settings, only_database=only is not None)
    known, trace = last_known(settings.home, settings.backup_dir) if only is None else (0, "")
    given_up = (manifest.last_seq + 1, known) if known > manifest.last_seq else None
    if as_json:
        answer = {"backup": path, "home": settings.home, "manifest": manifest, "files": put}
        print_json({**answer, "given_up": given_up})
        return
    click.echo(f"restored from {path}, made {clock(manifest.made_at)}:")
    if manifest.database is not None:
        click.echo(f"  {settings.db}, events up to seq {manifest.database.last_seq}")
    if manifest.journal is not None and only is None:
        click.echo(f"  {settings.journal}, events up to seq {manifest.journal.last_seq}")
    for file in put:
        click.echo(f"  {settings.home / file}")
    if given_up:
        click.echo(f"not in it: events {given_up[0]} to {given_up[1]}, which {trace} tells of")
    click.echo(
        "start bus and collector (`bitten up` or pm2): the collector adds to the database what only"
        " the journal has"
    )


def _list(paths: list[Path], *, as_json: bool) -> None:
    found = [(path, Manifest.read(path)) for path in paths]
    if as_json:
        print_json([Backup(path=path, manifest=manifest) for path, manifest in found])
    elif found:
        print_table(
            ("backup", "made", "last seq", "MB"),
            [(p.name, clock(x.made_at), x.last_seq, f"{x.bytes / 1e6:.1f}") for p, x in found],
        )
    else:
        click.echo("there is no backup yet", err=True)


def _kept(kept: list[Kept], settings: Settings) -> Iterator[str]:
    for old in kept:
        yield (
            f"kept beyond backup_keep ({settings.backup_keep}): {old.path.name} has"
            f" {count(old.seqs)} events that no newer backup has (seq {text(old.seqs)}); to look at"
            f" them: `bitten --home {settings.home}-old restore {old.path}`; if you do not need"
            f" them: `rm -r {old.path}`"
        )


def _account(made: Backup) -> str:
    parts = []
    database, journal = made.manifest.database, made.manifest.journal
    if database is not None:
        text = f"database integrity, {database.events} events up to seq {database.last_seq}"
        if database.gaps or database.holes:
            text += f" ({database.gaps + database.holes} missing, see `bitten audit`)"
        parts.append(text)
    if journal is not None:
        text = f"journal integrity and CRC-32, seq {journal.first_seq} to {journal.last_seq}"
        if journal.lost:
            text += f" ({journal.lost} damaged there, in the database or recorded as lost)"
        parts.append(text)
    return "; ".join([*parts, f"SHA-256 of {len(made.manifest.files)} files"])
