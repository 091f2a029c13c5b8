"""Detects secrets in URLs and environment variables, and masks them in everything shown or stored.

A URL has secrets in its user information (`https://user:password@host`) and in its query (a presigned URL).
"""

from __future__ import annotations

import re
from typing import Any

HIDDEN = "***"

_SCHEME = r"[A-Za-z][A-Za-z0-9+.-]*://"
# A quote ends a URL before a blank, another URL or another quoted text. Any other quote is part of the URL: file names
# in a query and passwords may contain quotes.
_QUOTE = rf"['\"<>](?![:;,.)\]}}'\"<>]*(?:\s|$|{_SCHEME})|[:;,)\]}}]+['\"])"
_URL = re.compile(rf"([A-Za-z][A-Za-z0-9+.-]*)://((?:[^\s'\"<>]|{_QUOTE})+)")
_QUERY = re.compile(r"\?\S*?(?=[:;,.)\]]*(?:\s|$))")  # punctuation after the query belongs to the sentence
_WHOLE = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://(.+)", re.DOTALL)
_WEB = ("http", "https")
_CONTAINER_AT_ACCOUNT = ("abfs", "abfss", "wasb", "wasbs")  # the part before their @ is a container
# Object keys may contain a question mark: outside the web a query must have one of these keys.
_SIGNED = re.compile(r"[?&](?:[\w-]*(?:signature|credential|token|secret|password|key)|sig)=", re.IGNORECASE)

_SECRET_NAME = re.compile(
    r"SECRET|TOKEN(?!IZER)|PASSWORD|PASSWD|PASSPHRASE|(^|_)(PASS|PW|PWD|SAS|DSN|AUTH|KEYS?|PAT)$|(^|_)(PASS|SAS)_"
    r"|(?<!COM)(?<!BY)(?<!SUR)(?<!TRES)(?<!OVER)(?<!UNDER)(?<!HIGH)(?<!LOW)(?<!BAND)PASS$|(?<!OLD)PWD$|(?<!SA)CREDS?$"
    r"|CREDENTIAL|AUTHORIZATION|PRIVATE|ACCESS_?KEY|ACCOUNT_?KEY|API_?KEY|SESSION|CONNECTION_?STRING|BEARER|COOKIE"
    r"|SIGNATURE",
    re.IGNORECASE,
)
_SECRET_VALUE = re.compile(
    r"://[^/\s@]*:[^\s@]+@"  # a password in a URL
    r"|https?://[^/\s@]+@"  # a token in a URL
    r"|^[^/\s:@]+:(?!/)[^\s@]+@(?!sha\d+:)[\w.-]+"  # user:password@host of a proxy; not the digest of a container image
    r"|^(?:Basic|Bearer)\s+[\w+/=.~-]{6,}$"
    r"|(?:AccountKey|SharedAccessKey|SharedAccessSignature|Password|Pwd|Secret)\s*=\s*[^;\s]"  # connection strings
    r"|(?:^|[?&])(?:[\w-]*(?:signature|credential|token|secret|password|access_?key|api_?key|[_-]key)|sig|key|pwd)="
    r"|-----BEGIN [A-Z ]*PRIVATE KEY"
    r"|\"private_key\""
    r"|\b(?:AKIA|ASIA)[0-9A-Z]{16}\b|\bgh[pousr]_\w{30}|\bhf_[A-Za-z0-9]{30}|\bxox[abprs]-|\bAIza[\w-]{35}"
    r"|\bgithub_pat_\w{10}|\bglpat-[\w-]{10}|\bsk-(?:[a-z]+\d*-)*\w{20}|\b[rs]k_live_\w{10}|\bnpm_\w{30}"
    r"|\bpypi-\w{16}|\bdckr_pat_\w{10}"
    r"|\beyJ[\w-]{10,}\.[\w-]{10,}\.",
    re.IGNORECASE,
)
_AWS_SECRET = re.compile(r"(?=.*[a-z])(?=.*[A-Z])(?=.*\d)[A-Za-z0-9/+]{40}")


def masked(text: str) -> str:
    """Replaces user information and queries of the URLs in a text by `***`; other text is unchanged."""
    return _URL.sub(_mask_url, text) if "://" in text else text


def masked_url(uri: str) -> str:
    """Masks a text that is a single URL, which may contain blanks and quotes; other text as `masked` does."""
    match = _WHOLE.fullmatch(uri)
    return masked(uri) if match is None else _mask_parts(match[1], match[2], re.compile(r"\?.*", re.DOTALL))


def masked_values(value: Any) -> Any:
    """Returns a copy of JSON values with every text masked."""
    if isinstance(value, str):
        return masked_url(value)
    if isinstance(value, dict):
        return {masked_values(key): masked_values(inner) for key, inner in value.items()}
    return [masked_values(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def without_secrets(uri: str) -> str:
    """Returns a URI without user information and query, i.e. without credentials."""
    return masked_url(uri).replace(f"{HIDDEN}@", "").removesuffix(f"?{HIDDEN}")


def has_credentials(uri: str) -> bool:
    """Whether the URI of an object store has user information; web addresses may have it and are masked."""
    match = _WHOLE.fullmatch(uri)
    return match is not None and match[1].lower() not in _WEB and _user_of(match[1].lower(), match[2]) is not None


def is_secret(name: str, value: str) -> bool:
    """Whether an environment variable looks like a credential, by its name or its value."""
    return bool(_SECRET_NAME.search(name) or holds_secret(value) or _AWS_SECRET.fullmatch(value))


def holds_secret(text: str) -> bool:
    """Whether a text contains a password, a signature or a key of a known form."""
    return _SECRET_VALUE.search(text) is not None


def _mask_url(match: re.Match[str]) -> str:
    return _mask_parts(match[1], match[2], _QUERY)


def _mask_parts(scheme: str, rest: str, query: re.Pattern[str]) -> str:
    if (user := _user_of(scheme.lower(), rest)) is not None:
        rest = f"{HIDDEN}@{rest[len(user) + 1 :]}"
    if scheme.lower() in _WEB or _SIGNED.search(rest):
        rest = query.sub(f"?{HIDDEN}", rest)
    return f"{scheme}://{rest}"


def _user_of(scheme: str, rest: str) -> str | None:
    """Returns the user information of a URL, whose part after `scheme://` is `rest`; None if there is none to mask."""
    authority = re.split(r"[/?#]", rest, maxsplit=1)[0]
    user, at, _ = authority.rpartition("@")
    if at:
        return None if scheme in _CONTAINER_AT_ACCOUNT and ":" not in user else user
    # A secret key may contain slashes, which would end the authority too early: KEY:SEC/RET@bucket.
    name, colon, port = authority.partition(":")
    if colon and not port.isdigit() and not name.startswith(("[", "arn")) and "@" in rest:
        return rest.rpartition("@")[0]
    return None
