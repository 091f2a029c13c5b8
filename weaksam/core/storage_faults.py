"""Classifies faults of stores (down, denied, expired, missing) and retries requests."""

from __future__ import annotations

import errno
import itertools
import random
import re
import time
from collections.abc import Callable
from typing import TypeVar

from weaksam.core.uris import is_local
from weaksam.errors import ConfigError, DeniedError, StorageError

ATTEMPTS = 4
# The AWS client reports this, and does not try again as it does after every other fault, when the text of the store's
# error is longer than the bytes of a short read. Therefore it is tried as often as the client tries.
_UNSEEN_ERROR = "failed to flush response stream"
_ATTEMPTS_OF_UNSEEN = 12

# Parts of error texts, lower case without underscores: clients write AccessDenied or ACCESS_DENIED.
_DENIED = (
    *("accessdenied", "http status 403", "forbidden", "invalidaccesskeyid", "signaturedoesnotmatch", "invalidtoken"),
    *("http status 401", "unauthorized", "authenticationfailed", "authorizationfailure", "authorizationpermission"),
    *("invalidgrant", "refresherror", "anonymous caller"),
)
_EXPIRED = re.compile(
    r"expired ?(authentication)?token|(token|credentials?|session|signature|request)\w{0,12}( \w+){0,3} expired"
    r"|tokenrefreshrequired|requestexpired"
)
_SKEWED = ("requesttimetooskewed", "request time too skewed")
_BY_HOST_ALONE = ("secondleveldomainforbidden", "pathstyledomainforbidden", "virtual hosted style", "virtual-hosted")
_NO_CAUSE = re.compile(r"(accessdenied|http status 40[03]).*no response body")  # the response to HEAD has no body

_S3_RIGHTS = {
    "read": "s3:GetObject",
    "write": "s3:PutObject",
    "list": "s3:ListBucket",
    "look up": "s3:GetObject and s3:ListBucket",
    "delete": "s3:DeleteObject",
}
_NO_SUCH_FILE = (errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP)  # the path cannot be an object

T = TypeVar("T")


def retrying(action: Callable[[], T], uri: str, doing: str, *, ask: Callable[[], str] = lambda: "") -> T:
    """Runs `action` several times with jittered back-off; does not retry a missing object or permission.

    Args:
        action: one attempt.
        uri: URI for messages.
        doing: read, write, list, look up or delete.
        ask: returns the store's reason for a denial; called if its first response has no text.

    Raises:
        FileNotFoundError: there is no such object.
        DeniedError: the store denies access.
        StorageError: all attempts failed.
        ConfigError: the store needs another addressing style.
    """
    for attempt in itertools.count(1):
        try:
            return action()
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            raise
        except Exception as error:  # fsspec clients raise any type; on a local path only OSError is a fault of storage
            if is_local(uri) and not isinstance(error, OSError):
                raise
            if isinstance(error, (ConfigError, StorageError)):
                raise
            if getattr(error, "errno", None) in _NO_SUCH_FILE:
                raise FileNotFoundError(f"{uri}: {error}") from error
            text = str(error)
            if _NO_CAUSE.search(_plain(text)) and (cause := ask()):
                text = cause
            if (fault := _fault_of(uri, doing, text, isinstance(error, PermissionError))) is not None:
                raise fault from error
            attempts = _ATTEMPTS_OF_UNSEEN if _UNSEEN_ERROR in text.lower() else ATTEMPTS
            if attempt >= attempts or is_local(uri):
                raise StorageError(f"{uri}: could not {doing} after {attempt} tries ({text})") from error
            time.sleep(random.uniform(0.5, 1.0) * 0.4 * 2 ** min(attempt, ATTEMPTS))
    raise AssertionError("unreachable")


def _plain(text: str) -> str:
    return text.lower().replace("_", "")


def _fault_of(uri: str, doing: str, text: str, is_denied: bool) -> ConfigError | StorageError | None:
    """Returns the error for a fault that a retry cannot fix, else None."""
    plain = _plain(text)
    if is_local(uri):
        return (
            DeniedError(f"{uri}: not allowed to {doing} ({text}): check the rights of the file") if is_denied else None
        )
    if any(word in plain for word in _BY_HOST_ALONE):
        return ConfigError(
            f"{uri}: the store serves buckets by their own host name alone ({text}): set `addressing: virtual` in the "
            "run file, or AWS_S3_ADDRESSING_STYLE=virtual"
        )
    if any(word in plain for word in _SKEWED):
        return DeniedError(f"{uri}: not allowed to {doing} ({text}): set the clock of this machine")
    is_expired = _EXPIRED.search(plain) is not None
    if is_denied or is_expired or any(word in plain for word in _DENIED):
        return DeniedError(f"{uri}: not allowed to {doing} ({text}): {_advice(uri, doing, is_expired)}")
    return None


def _advice(uri: str, doing: str, is_expired: bool) -> str:
    if uri.startswith(("http://", "https://")):
        return "check the URL; one that is signed expires: get a new one" if "?" in uri else "check the URL"
    if is_expired:
        return "the credentials have expired: renew them"
    right = _S3_RIGHTS.get(doing) if uri.startswith("s3://") else None
    return "check the credentials" + (f", which must have the right {right}" if right else "")
