"""Decides whether runs are tracked with Weights & Biases, by recipe, environment and network."""

from __future__ import annotations

import configparser
import netrc
import os
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Literal
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

Mode = Literal["online", "offline", "disabled"]

OWN_HOSTS = ("api.wandb.ai", "api.forge.coreweave.com")  # two names of wandb's own server; a key may stand under either
MODES: Mapping[str, Mode] = {
    "online": "online",
    "run": "online",
    "offline": "offline",
    "dryrun": "offline",
    "disabled": "disabled",
}
"""Values of ``WANDB_MODE``, and what they mean."""
CONNECT_TIMEOUT_S = 2.0


def resolve_mode(mode: str) -> tuple[Mode, str | None]:
    """What a recipe's ``tracking.wandb.mode`` means here; looks at the environment and the network.

    Args:
        mode: offline, disabled, or online: where an API key is found (``WANDB_API_KEY``,
            ``WANDB_IDENTITY_TOKEN_FILE``, or the server's entry in the netrc file) and the server, or the proxy before
            it, accepts a connection within two seconds; else offline. auto: ``WANDB_MODE`` where it is set, else as
            online where there is a key, and disabled where there is none.

    Returns:
        The mode to use, and why it differs from the mode that was asked for.
    """
    asked = asked_mode(mode)
    if asked in ("offline", "disabled"):
        return MODES[asked], None
    if reason := why_off(asked):
        return "disabled", reason
    if lacking := lacking_key():
        return "offline", f"{lacking} (`wandb login` stores one)"
    problem = _unreachable(configured_url())
    return ("offline", problem) if problem else ("online", None)


def why_off(asked: str) -> str | None:
    """Why nothing is tracked though nobody has disabled it; None: it is, or is disabled. Looks at no network."""
    if asked not in ("auto", *MODES.values()):
        return f"WANDB_MODE is {asked}; it can be {', '.join(MODES)}"
    if asked == "auto" and (lacking := lacking_key()):
        return f"{lacking} (`wandb login` stores one; tracking.wandb.mode=offline records without)"
    return None


def asked_mode(mode: str) -> str:
    """The recipe's mode, or that of ``WANDB_MODE`` where the recipe leaves it open."""
    wanted = os.environ.get("WANDB_MODE", "") if mode == "auto" else ""
    return MODES.get(wanted, wanted) or mode


def configured_url() -> str | None:
    """The server that ``WANDB_BASE_URL`` or wandb's settings file names, as ``wandb login --host`` does."""
    if url := os.environ.get("WANDB_BASE_URL"):
        return url
    folder = os.environ.get("WANDB_CONFIG_DIR") or "~/.config/wandb"
    settings = configparser.ConfigParser(interpolation=None)
    settings.read(Path(folder).expanduser() / "settings", encoding="utf-8")
    return settings.get("default", "base_url", fallback=None)


def has_key() -> bool:
    """Whether there is an API key for the server.

    Raises:
        netrc.NetrcParseError: where it might be in a file that cannot be read.
    """
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    try:
        entries = netrc.netrc(Path(os.environ.get("NETRC") or "~/.netrc").expanduser())
    except FileNotFoundError:
        return False
    return any(entries.authenticators(host) for host in _hosts())


def lacking_key() -> str | None:
    """That there is no API key for the server, or that it may be where nobody can read it; None: there is one."""
    try:
        return None if has_key() else f"no API key for {_hosts()[0]} in WANDB_API_KEY or the netrc file"
    except netrc.NetrcParseError as error:  # its text may quote the key
        return f"the netrc file cannot be read, near line {error.lineno}"


def _hosts() -> Sequence[str]:
    url = configured_url()
    return (urlsplit(url).netloc,) if url else OWN_HOSTS


def _unreachable(url: str | None) -> str | None:
    """Why neither the server nor its proxy accepts a connection; None: one does."""
    if url is None:
        import wandb

        url = wandb.Settings().base_url
    parts = urlsplit(url)
    proxy = getproxies().get(parts.scheme)
    if proxy and not proxy_bypass(parts.netloc):
        parts = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    port = parts.port or (80 if parts.scheme == "http" else 443)
    try:
        socket.create_connection((parts.hostname or "", port), timeout=CONNECT_TIMEOUT_S).close()
    except OSError as error:
        return f"{parts.hostname}:{port} cannot be reached: {error.strerror or error}"
    return None
