"""The proxy that the environment names for a URL, with the exceptions that it lists."""

from __future__ import annotations

import os

import pytest

from weaksam.core import proxies
from weaksam.errors import ConfigError


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy.example:3128")


@pytest.mark.parametrize(
    ("url", "excepted", "is_used"),
    [
        ("https://bucket.s3.amazonaws.com", "", True),
        ("http://bucket.s3.amazonaws.com", "", False),  # HTTP_PROXY is not set
        ("https://127.0.0.1:9000", "", False),
        ("https://[::1]:9000", "", False),
        ("https://data.localhost", "", False),
        ("https://s3.corp.example", "corp.example", False),
        ("https://s3.corp.example", ".corp.example, other", False),
        ("https://s3.corp.example", "*.corp.example", False),
        ("https://s3.notcorp.example", "corp.example", True),
        ("https://s3.corp.example:9000", "s3.corp.example:9000", False),
        ("https://s3.corp.example:9001", "s3.corp.example:9000", True),
        ("https://10.1.2.3", "10.0.0.0/8", False),
        ("https://11.1.2.3", "10.0.0.0/8", True),
        ("https://s3.corp.example", "*", False),
    ],
)
def test_the_proxy_of_a_url(url: str, excepted: str, is_used: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", excepted)
    assert proxies.proxy_for(url) == ("http://proxy.example:3128" if is_used else None)


def test_a_proxy_as_the_client_takes_it() -> None:
    assert proxies.proxy_options("http://me:a%40b@proxy:3128") == {
        **{"scheme": "http", "host": "proxy", "port": 3128, "username": "me", "password": "a@b"}
    }
    with pytest.raises(ConfigError, match=r"http:// proxies alone, got socks5://\*\*\*@proxy"):
        proxies.proxy_options("socks5://me:word@proxy:1080")


def test_loopback_is_spared_of_clients_that_read_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "corp.example")
    monkeypatch.setenv("NO_PROXY", "corp.example")
    proxies.spare_loopback()
    proxies.spare_loopback()
    assert os.environ["NO_PROXY"] == os.environ["no_proxy"] == "corp.example,localhost,127.0.0.1,::1"
