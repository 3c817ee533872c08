"""Keys: CURVE certificates in `$BITTEN_HOME/keys`, and the sockets that are given them.

The files are ZeroMQ certificates (https://rfc.zeromq.org/spec/4/) as pyzmq reads and writes them.
A home with `bus.key_secret` has a bus that talks to keys alone; `client.key_secret` is the key of
this home's own processes, and `bus.key` is how they know the bus.
"""

from __future__ import annotations

import ipaddress
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from event_bus.errors import KeysError

if TYPE_CHECKING:
    import zmq

BUS = "bus"
CLIENT = "client"
KEY_CHARACTERS = 40
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}")
_KEY = re.compile(r"[0-9A-Za-z.\-:+=^!/*?&<>()\[\]{}@%$#]{40}")


def is_public_key(text: str) -> bool:
    """Whether text is 32 bytes in Z85 (https://rfc.zeromq.org/spec/32/)."""
    return _KEY.fullmatch(text) is not None


def check_name(name: str) -> None:
    """Raise KeysError unless `name` can name a key and its files."""
    if not _NAME.fullmatch(name):
        raise KeysError(
            f"{name!r} cannot be the name of a key",
            hint="use up to 63 letters, digits, `_`, `-` and `.`, such as laptop",
        )


def make_pair(directory: Path, name: str) -> str:
    """Make `<name>.key` and `<name>.key_secret`, for their owner alone; the public key.

    Raises KeysError, also when either file exists: nothing is overwritten.
    """
    check_name(name)
    from zmq import auth

    for path in (public_file(directory, name), secret_file(directory, name)):
        if path.exists():
            raise KeysError(
                f"{path} exists already", hint="move it away first if it is to be replaced"
            )
    make_directory(directory)
    umask = os.umask(0o077)
    try:
        for written in auth.create_certificates(directory, name):
            Path(written).chmod(0o600)  # whatever the directory's default rights
    except OSError as e:
        raise KeysError(f"cannot make a key in {directory}: {e.strerror}") from e
    finally:
        os.umask(umask)
    return read_public(directory, name)


def make_directory(directory: Path) -> None:
    """A directory for its owner alone, also if it was there with wider rights. Raises KeysError."""
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        directory.chmod(0o700)
    except OSError as e:
        raise KeysError(f"cannot create {directory}: {e.strerror}") from e


def public_file(directory: Path, name: str) -> Path:
    return directory / f"{name}.key"


def secret_file(directory: Path, name: str) -> Path:
    return directory / f"{name}.key_secret"


def is_loopback(url: str) -> bool:
    """Whether only this machine can reach `url`; a name that says nothing of it cannot."""
    if not url.startswith("tcp://"):
        return url.startswith("ipc://")
    try:
        host = urlsplit(url).hostname or ""
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:  # `*`, an interface, a host name
        return False


def has_bus_key(directory: Path) -> bool:
    """Whether the bus of this home asks for keys. Raises KeysError if that cannot be seen."""
    try:
        secret_file(directory, BUS).stat()
    except FileNotFoundError:
        return False
    except OSError as e:
        raise KeysError(f"cannot look for {e.filename}: {e.strerror}") from e
    return True


def read_public(directory: Path, name: str) -> str:
    """The public key of `<name>.key`, in Z85. Raises KeysError."""
    public, _ = _read(public_file(directory, name))
    return public.decode()


def bus_secret(directory: Path) -> bytes:
    """The secret key of the bus, in Z85. Raises KeysError."""
    _, secret = _read(secret_file(directory, BUS), secret=True)
    return secret


def use_bus_key(socket: zmq.Socket[Any], directory: Path, domain: str) -> None:
    """Have a bus's socket, not bound yet, talk only to keys that ZAP admits. Raises KeysError."""
    secret = bus_secret(directory)
    socket.curve_server = True
    socket.curve_secretkey = secret
    socket.zap_domain = domain.encode()
    socket.zap_enforce_domain = True  # without a handler libzmq would let everybody in


def use_client_key(socket: zmq.Socket[Any], directory: Path, url: str) -> None:
    """Give a client's socket this home's key, before it connects to `url`; nothing if it has none.

    Raises KeysError if one of the two files is missing or cannot be read, and if there is none
    and `url` is on another machine: nothing goes there in clear.
    """
    secret_path, bus_path = secret_file(directory, CLIENT), public_file(directory, BUS)
    if not secret_path.exists() and not bus_path.exists():
        if not is_loopback(url):
            raise KeysError(
                f"{url} is beyond this machine, and there is no key for it in {directory}:"
                " whoever is on the way could read and change everything",
                hint="put client.key_secret and bus.key there (`bitten keys --help`)",
            )
        return
    public, secret = _read(secret_path, secret=True)
    bus, _ = _read(bus_path)
    socket.curve_publickey = public
    socket.curve_secretkey = secret
    socket.curve_serverkey = bus


def _read(path: Path, *, secret: bool = False) -> tuple[bytes, bytes]:
    from zmq import auth

    try:
        public, secret_key = auth.load_certificate(path)
        if secret and secret_key is None:
            raise ValueError("it has no secret-key")
        for key in (public, secret_key):
            if key is not None and not is_public_key(key.decode("ascii")):
                raise ValueError(f"a key is {KEY_CHARACTERS} characters of Z85")
    except (OSError, ValueError) as e:
        reason = e.strerror if isinstance(e, OSError) and e.strerror else None
        if reason is None:
            reason = str(e) if path.exists() else "there is no such file"
        raise KeysError(
            f"cannot use the key {path}: {reason}",
            hint="`bitten keys --help` says which files belong there",
        ) from e
    return public, secret_key or b""
