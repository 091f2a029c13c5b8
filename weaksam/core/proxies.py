"""Selects the proxy for a URL from `HTTPS_PROXY`, `HTTP_PROXY` and `ALL_PROXY`, except for hosts in `NO_PROXY`.

Loopback addresses never use a proxy: it would resolve them to its own machine.
"""

from __future__ import annotations

import ipaddress
import os
from urllib.parse import SplitResult, unquote, urlsplit
from urllib.request import getproxies_environment

from weaksam.errors import ConfigError

_LOOPBACK = ("localhost", "127.0.0.1", "::1")


def is_loopback(host: str) -> bool:
    """Whether a host name or address is a loopback address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def proxy_for(url: str) -> str | None:
    """Returns the URL of the proxy for `url`, or None.

    Raises:
        ConfigError: the value of the variable is not the URL of a proxy.
    """
    parts = urlsplit(url)
    proxies = getproxies_environment()
    kind = parts.scheme if proxies.get(parts.scheme) else "all"
    proxy = proxies.get(kind)
    if not proxy or is_loopback(parts.hostname or "") or _is_excepted(parts, proxies.get("no", "")):
        return None
    proxy = proxy if "://" in proxy else f"http://{proxy}"
    if not _is_proxy(proxy):  # the value may contain part of a password, so the message omits it
        name = next((name for name in os.environ if name.lower() == f"{kind}_proxy"), f"{kind}_proxy")
        raise ConfigError(
            f"{name}: no URL of a proxy, http://host:port: in a user name or password write # as %23, "
            "/ as %2F, ? as %3F, @ as %40, [ as %5B"
        )
    return proxy


def _is_proxy(url: str) -> bool:
    """Whether a URL has a host and no @ after it: that would be the rest of a password."""
    try:
        parts = urlsplit(url)
        return bool(parts.hostname) and (parts.port or 1) > 0 and "@" not in url.partition(parts.netloc)[2]
    except ValueError:
        return False


def proxy_options(proxy: str) -> dict[str, str | int]:
    """Returns a proxy as arguments of pyarrow's S3 client.

    Raises:
        ConfigError: the client does not support this kind of proxy.
    """
    parts = urlsplit(proxy)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(f"HTTPS_PROXY or HTTP_PROXY: s3:// goes through http:// proxies alone, got {proxy}")
    port = parts.port or (443 if parts.scheme == "https" else 80)
    options: dict[str, str | int] = {"scheme": parts.scheme, "host": parts.hostname, "port": port}
    if parts.username:
        options |= {"username": unquote(parts.username), "password": unquote(parts.password or "")}
    return options


def spare_loopback() -> None:
    """Adds loopback addresses to `NO_PROXY`, for clients of this process that read the environment themselves."""
    listed = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
    names = [name.strip() for name in listed.split(",") if name.strip()]
    os.environ["no_proxy"] = os.environ["NO_PROXY"] = ",".join(dict.fromkeys([*names, *_LOOPBACK]))


def _is_excepted(parts: SplitResult, excepted: str) -> bool:
    """Whether NO_PROXY lists a host: by name, domain suffix, name and port, address, network, or `*`."""
    host = (parts.hostname or "").lower()
    for entry in (item.strip().lower() for item in excepted.replace(" ", ",").split(",")):
        if not entry:
            continue
        name, colon, port = entry.rpartition(":")
        if colon and port.isdigit() and ":" not in name and port == str(parts.port):
            entry = name
        bare = entry.removeprefix("*").lstrip(".")
        if entry == "*" or host == bare or (bare and host.endswith(f".{bare}")) or _is_within(host, entry):
            return True
    return False


def _is_within(host: str, network: str) -> bool:
    try:
        return ipaddress.ip_address(host) in ipaddress.ip_network(network, strict=False)
    except ValueError:
        return False
