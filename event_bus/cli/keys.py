"""`bitten keys`: who may connect to the bus, and do what."""

from __future__ import annotations

import click

from event_bus import allow_list, keys
from event_bus.allow_list import FILE, Rights
from event_bus.cli.output import print_json, print_table
from event_bus.errors import KeysError
from event_bus.settings import Settings

RESTART = "restart the bus: `pm2 restart event_bus`, or Ctrl-C and `bitten up`"


@click.group()
def keys_group() -> None:
    """Make keys, and say what each may do.

    Once a home has a key for its bus, every connection needs a key that is on the allow-list
    ($BITTEN_HOME/keys/allowed.yaml), on this machine too. Files in $BITTEN_HOME/keys:

    \b
    bus.key, bus.key_secret          the bus
    client.key, client.key_secret    the processes of this home
    NAME.key, NAME.key_secret        a key made here for somebody else

    Another machine needs two files in its own $BITTEN_HOME/keys: bus.key, and its key as
    client.key_secret.

    \b
    bitten keys new                  for this machine
    bitten keys new laptop           for another one
    bitten keys allow laptop --subscribe 'signal_*' --publish user_action
    bitten keys list
    bitten keys revoke laptop
    """


@keys_group.command()
@click.argument("name", required=False)
@click.pass_obj
def new(settings: Settings, name: str | None) -> None:
    """Make the keys of this home, or with NAME a key to hand out.

    Nothing is overwritten. Without NAME it makes the pair of the bus and the one of this home's
    own processes, and allows those everything.

    \b
    bitten keys new
    bitten keys new laptop
    """
    settings.make_home()
    if name in (keys.BUS, keys.CLIENT):
        raise KeysError(f"{name} is a key of this home", hint="make it with `bitten keys new`")
    if name is not None:
        click.echo(f"made {name}: {keys.make_pair(settings.keys, name)}")
        click.echo(f"allow it:      bitten keys allow {name} --publish TYPE --subscribe PATTERN")
        click.echo("copy it:       into $BITTEN_HOME/keys of the other machine, over a safe way:")
        click.echo(f"               {keys.public_file(settings.keys, keys.BUS)} as bus.key")
        secret = keys.secret_file(settings.keys, name)
        click.echo(f"               {secret} as client.key_secret")
        click.echo(f"then remove:   {secret}")
        return
    for own in (keys.BUS, keys.CLIENT):
        if keys.secret_file(settings.keys, own).exists():
            click.echo(f"{own} has a key already: {keys.read_public(settings.keys, own)}")
        else:
            click.echo(f"made {own}: {keys.make_pair(settings.keys, own)}")
    allowed = _read(settings)
    public_key = keys.read_public(settings.keys, keys.CLIENT)
    allowed[keys.CLIENT] = Rights(keys.CLIENT, public_key, ("*",), ("*",))
    _write(settings, allowed)
    click.echo(f"from its next start the bus talks to keys alone; {RESTART}")


@keys_group.command()
@click.argument("name")
@click.argument("public_key", required=False)
@click.option("--publish", multiple=True, metavar="PATTERN", help="Event types it may publish.")
@click.option("--subscribe", multiple=True, metavar="PATTERN", help="What it may read; `*`: all.")
@click.pass_obj
def allow(
    settings: Settings,
    name: str,
    public_key: str | None,
    publish: tuple[str, ...],
    subscribe: tuple[str, ...],
) -> None:
    """Put a key on the allow-list, or change its rights to those given.

    PUBLIC_KEY is only needed for a key that was not made here. A running bus knows within a
    second. Reading everything (`--subscribe '*'`) is needed for `bitten status`, a collector and
    durable consumers.

    \b
    bitten keys allow laptop --subscribe '*'
    bitten keys allow feed 'rq:rM>}U?@Lns47E1%kR.o@n%FcmmsL/@{H8]yf7' --publish market_data
    """
    keys.check_name(name)
    allowed = _read(settings)
    if not publish and not subscribe:
        now = allowed.get(name, Rights(name, "", (), ()))
        raise click.UsageError(
            "give its rights with --publish or --subscribe; now it may publish"
            f" {_list(now.publish)} and read {_list(now.subscribe)}"
        )
    if public_key is None:
        if keys.public_file(settings.keys, name).exists():
            public_key = keys.read_public(settings.keys, name)
        elif name in allowed:
            public_key = allowed[name].public_key
        else:
            raise KeysError(
                f"there is no key {name} in {settings.keys}",
                hint=f"make it with `bitten keys new {name}`, or give its public key",
            )
    changed = Rights(name, public_key, publish, subscribe)
    _write(settings, allowed | {name: changed})
    click.echo(f"{name} may publish {_list(publish)} and read {_list(subscribe)}")
    if name != keys.CLIENT and keys.has_bus_key(settings.keys) and keys.CLIENT not in allowed:
        click.echo(
            "this home's own processes (key client) are not on the list: `bitten keys new` lets"
            " them in",
            err=True,
        )


@keys_group.command()
@click.argument("name")
@click.pass_obj
def revoke(settings: Settings, name: str) -> None:
    """Take a key off the allow-list; its files stay.

    Within a second a running bus refuses what it sends, and ends its live subscriptions.

    \b
    bitten keys revoke laptop
    """
    allowed = _read(settings)
    if name not in allowed:
        raise KeysError(f"{name} is not on the allow-list", hint="`bitten keys list` shows it")
    del allowed[name]
    _write(settings, allowed)
    click.echo(f"{name} is allowed nothing any more")


@keys_group.command(name="list")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line.")
@click.pass_obj
def list_keys(settings: Settings, as_json: bool) -> None:
    """Show the allow-list. Secrets are never shown.

    \b
    bitten keys list
    bitten keys list --json | jq .name
    """
    allowed = allow_list.read(settings.keys / FILE)
    if as_json:
        for rights in allowed.values():
            print_json(
                {
                    "name": rights.name,
                    "public_key": rights.public_key,
                    "publish": rights.publish,
                    "subscribe": rights.subscribe,
                }
            )
        return
    print_table(
        ["name", "publish", "subscribe", "public key"],
        [
            (r.name, ", ".join(r.publish) or "-", ", ".join(r.subscribe) or "-", r.public_key)
            for r in allowed.values()
        ],
    )


def _read(settings: Settings) -> dict[str, Rights]:
    """The allow-list as it is; empty if there is none yet."""
    path = settings.keys / FILE
    return allow_list.read(path) if path.exists() else {}


def _write(settings: Settings, allowed: dict[str, Rights]) -> None:
    """Write an allow-list that the bus will take. Raises KeysError if it would not."""
    settings.make_home()
    keys.make_directory(settings.keys)
    allow_list.write(settings.keys / FILE, allowed)


def _list(patterns: tuple[str, ...]) -> str:
    return ", ".join(patterns) or "nothing"
