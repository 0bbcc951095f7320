"""Finds out whether a run logs to W&B online or offline, by the credentials on this machine. Makes no request."""

from __future__ import annotations

import configparser
import io
import netrc
import os
from contextlib import redirect_stderr, suppress
from pathlib import Path
from urllib.parse import urlparse


def resolve_mode(mode: str) -> tuple[str, str]:
    """Resolves `auto` to online or offline by the credentials on this machine; the environment has priority.

    Returns:
        The mode, and its reason for the console.
    """
    if mode != "auto":
        return mode, f"{mode} (recipe)"
    requested = os.environ.get("WANDB_MODE", "").strip().lower()
    if requested in ("online", "offline", "disabled", "dryrun"):
        mode = "offline" if requested == "dryrun" else requested
        return mode, f"{mode} (WANDB_MODE)"
    if os.environ.get("WANDB_DISABLED", "").strip().lower() in ("true", "1", "yes", "on"):  # known from transformers
        return "disabled", "disabled (WANDB_DISABLED)"
    if _has_credentials():
        return "online", "online (credentials found)"
    return "offline", "offline (no credentials: run `wandb login`); `wandb sync` uploads the run later"


def server_url() -> str:
    """Returns W&B's server: WANDB_BASE_URL, else the server that `wandb login --host` stored, else the public one."""
    folder = Path(os.environ.get("WANDB_CONFIG_DIR") or "~/.config/wandb").expanduser()
    settings = configparser.ConfigParser(interpolation=None)
    with suppress(configparser.Error, UnicodeDecodeError):
        settings.read(folder / "settings")
    stored = settings.get("default", "base_url", fallback="")
    return os.environ.get("WANDB_BASE_URL") or stored or _public_server()


def _public_server() -> str:
    """Returns the default server of the installed wandb. `wandb login` stores the key under the server's host."""
    try:
        from wandb.sdk.lib.urls import DEFAULT_BASE_URL
    except ImportError:  # an older version of wandb, which knows only this server
        return "https://api.wandb.ai"
    return DEFAULT_BASE_URL


def _has_credentials() -> bool:
    """Returns whether wandb's own reader finds credentials for its server. The reader neither prompts nor connects."""
    try:
        from wandb.sdk.lib.wbauth import authenticate_session
    except ImportError:  # another version of wandb: look in the documented places
        return _has_stored_key(urlparse(server_url()).netloc)
    try:
        # Without this, its warnings about a broken netrc file would appear above the header.
        with redirect_stderr(io.StringIO()):
            found = authenticate_session(host=server_url(), source="mnist_dist", prompt=False, update_session=False)
        return found is not None
    except Exception:  # a key of an invalid form, or a reader with other arguments
        return _has_stored_key(urlparse(server_url()).netloc)


def _has_stored_key(host: str) -> bool:
    """Returns whether the environment or a netrc file holds a key for `host`, given as HOST or HOST:PORT."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    for path in filter(None, (os.environ.get("NETRC"), "~/.netrc", "~/_netrc")):
        try:
            if netrc.netrc(Path(path).expanduser()).authenticators(host):
                return True
        except (OSError, netrc.NetrcParseError):
            continue
    return False
