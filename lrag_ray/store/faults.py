"""What storage clients raise, sorted: whether another try can help, and what fixes it where it cannot.

S3 errors are distinguished by their code, which s3fs keeps in the exception's cause; a HEAD request has no code but its
HTTP status. Client libraries are recognised by the names of their exceptions, so that none of them is imported here.
"""

from __future__ import annotations

import errno
import platform
from datetime import UTC, datetime
from urllib.parse import urlsplit

_TRANSIENT_CODES = frozenset(
    {
        "InternalError",
        "InternalFailure",
        "ServiceUnavailable",
        "SlowDown",
        "RequestTimeout",
        "RequestTimeoutException",
        "PriorRequestNotComplete",
        "Throttling",
        "ThrottlingException",
        "TooManyRequests",
        "TooManyRequestsException",
        "RequestLimitExceeded",
        "BandwidthLimitExceeded",
        # Two conditional writes of one name at the same moment: S3 asks for another try.
        "ConditionalRequestConflict",
        "OperationAborted",
        # The bytes did not arrive as they were sent.
        "BadDigest",
        "IncompleteBody",
        "XAmzContentSHA256Mismatch",
    }
)
_TRANSIENT_STATUS = frozenset({408, 409, 429, 500, 502, 503, 504})
_TRANSIENT_TYPES = frozenset(
    {
        "TimeoutError",
        # Both Python's and botocore's: refused, reset, aborted, name not resolved, proxy.
        "ConnectionError",
        "HTTPClientError",
        "ResponseParserError",
        "IncompleteReadError",
        "IncompleteRead",
        "ClientPayloadError",
        "ClientConnectionError",
        # The bytes did not arrive as they are stored.
        "FlexibleChecksumError",
    }
)
_TRANSIENT_ERRNO = frozenset(
    {errno.EAGAIN, errno.EINTR, errno.ESTALE, errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH}
)

_CREDENTIALS = (
    "The store does not know the credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or storage.profile, on "
    "every node"
)
_WRONG_STORE_CODES = frozenset(
    {"NoSuchBucket", "InvalidAccessKeyId", "InvalidToken", "SignatureDoesNotMatch", "AccessDenied", "403"}
)
_AMAZON = (
    "It was Amazon's S3 that was asked: if the bucket is in another store, name that with AWS_ENDPOINT_URL (or "
    "storage.endpoint_url in a configuration)"
)
_EXPIRED = "The credentials have expired: renew them on every node; the same command continues"
_DENIED = (
    "The credentials are known but may not do this: allow them to list, get, put and delete there (s3:ListBucket, "
    "GetObject, PutObject, DeleteObject), or use others (AWS_* variables, storage.profile)"
)
_STORE_FULL = "The store is full or its quota is used up: free some space or raise it; the same command continues"
_NO_STORE = (
    "That answer is not from an S3 store: check storage.endpoint_url (or AWS_ENDPOINT_URL), and what is between "
    "here and the store"
)
_REGION = "The bucket is in another region: set storage.region (or AWS_DEFAULT_REGION)"
_MENDS_BY_CODE = {
    "NoSuchBucket": "The bucket does not exist: create it, or correct run.uri (and storage.endpoint_url)",
    "InvalidBucketName": "Correct the bucket's name in run.uri",
    "AccessDenied": _DENIED,
    "AllAccessDisabled": _DENIED,
    "403": _DENIED,
    "InvalidAccessKeyId": _CREDENTIALS,
    "SignatureDoesNotMatch": _CREDENTIALS,
    "InvalidToken": _CREDENTIALS,
    "NotImplemented": (
        "The store does not know what is asked of it; commits need conditional writes (If-None-Match). Set run.uri to "
        "another store"
    ),
    "ExpiredToken": _EXPIRED,
    "ExpiredTokenException": _EXPIRED,
    "TokenRefreshRequired": _EXPIRED,
    "QuotaExceeded": _STORE_FULL,
    "InsufficientStorage": _STORE_FULL,
    "XMinioStorageFull": _STORE_FULL,
    "XMinioAdminBucketQuotaExceeded": _STORE_FULL,
    "507": _STORE_FULL,
    "404": _NO_STORE,
    "PermanentRedirect": _REGION,
    "AuthorizationHeaderMalformed": _REGION,
    "IllegalLocationConstraintException": _REGION,
    "301": _REGION,
}
_MENDS_BY_TYPE = {
    "NoCredentialsError": _CREDENTIALS,
    "PartialCredentialsError": _CREDENTIALS,
    "CredentialRetrievalError": _CREDENTIALS,
    "ProfileNotFound": "Correct storage.profile (or AWS_PROFILE), or add the profile to ~/.aws/config on every node",
    "SSOTokenLoadError": _EXPIRED,
    "UnauthorizedSSOTokenError": _EXPIRED,
    "TokenRetrievalError": _EXPIRED,
}
_FULL = "No space is left there: free some (`lrag-ray gc RUN` lists leftovers); the same command continues"
_PERMISSION = "This user may not do that there: change the owner or the permissions, or set run.uri to another folder"
_MENDS_BY_ERRNO = {
    errno.EIO: (
        "The disk or its server reports an error: look for it in the system's log (dmesg) or ask whoever runs the file "
        "system, or set run.uri to another folder; the same command continues"
    ),
    errno.ENOSPC: _FULL,
    errno.EDQUOT: "The disk quota is used up: free some space or raise it; the same command continues",
    errno.EFBIG: "The file is larger than a file may be here: raise the limit (`ulimit -f`)",
    errno.EROFS: "The file system is mounted read-only: mount it for writing, or set run.uri to another folder",
    errno.EACCES: _PERMISSION,
    errno.EPERM: f"{_PERMISSION}. Commits need hard links, which some file systems refuse",
    **dict.fromkeys(
        (errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK),
        "Commits need hard links, which this file system does not have: set run.uri to another",
    ),
    **dict.fromkeys((errno.EEXIST, errno.ENOTDIR), "A file is where a folder is to be: set run.uri to another folder"),
    errno.EMFILE: "This process may open no more files: raise the limit (`ulimit -n`)",
}


def error_code(error: BaseException | None) -> str | None:
    """The store's own code for `error` (``SlowDown``), or the HTTP status where the answer had none; or None."""
    response = _response(error)
    if not response:
        return None
    code = response.get("Error", {}).get("Code") or response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    return str(code) if code else None


def already_exists(error: Exception) -> bool:
    """Whether a create-only write was refused because the file is there."""
    return isinstance(error, FileExistsError) or error_code(error) in ("PreconditionFailed", "412")


def is_beyond_end(error: Exception) -> bool:
    """Whether a range of bytes was refused because the object ends before it, as every range of an empty one does.

    gcsfs keeps the HTTP status as `code`, adlfs as `status_code` and aiohttp as `status`.
    """
    statuses = [error_code(error), *(getattr(error, name, None) for name in ("code", "status_code", "status"))]
    return any(str(status) in ("InvalidRange", "416") for status in statuses)


def is_transient(error: Exception) -> bool:
    """Whether the same operation may succeed a little later."""
    response = _response(error)
    if response is not None:
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        code = error_code(error)
        return code in _TRANSIENT_CODES or (status in _TRANSIENT_STATUS and code not in _MENDS_BY_CODE)
    if isinstance(error, OSError) and error.errno in _TRANSIENT_ERRNO:
        return True
    return any(kind.__name__ in _TRANSIENT_TYPES for kind in type(error).__mro__)


def fix_of(error: Exception, *, local: bool, endpoint: str = "") -> str:
    """What the user can do about `error`, in a sentence or two; `endpoint` is the S3 that was asked, where known."""
    code = error_code(error)
    host = urlsplit(endpoint).hostname or ""
    if code in _WRONG_STORE_CODES and host.endswith((".amazonaws.com", ".amazonaws.com.cn")):
        return f"{_MENDS_BY_CODE[code]}. {_AMAZON}"
    if code == "RequestTimeTooSkewed":
        return (
            f"The clock of {platform.node()} ({datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC) differs too much from the "
            "store's: set it (chrony, ntpd or timedatectl)"
        )
    if code in _MENDS_BY_CODE:
        return _MENDS_BY_CODE[code]
    for kind in type(error).__mro__:
        if kind.__name__ in _MENDS_BY_TYPE:
            return _MENDS_BY_TYPE[kind.__name__]
    if local and isinstance(error, OSError) and error.errno in _MENDS_BY_ERRNO:
        return _MENDS_BY_ERRNO[error.errno]
    if local:
        return "Check the path, its permissions and the free space, or set run.uri to another folder"
    if is_transient(error):
        return (
            "The store is overloaded or cannot be reached: check storage.endpoint_url (or AWS_ENDPOINT_URL) and the "
            "network; the same command continues"
        )
    return "Check the address, the credentials and the endpoint (s3: AWS_* variables), or set another run.uri"


def _response(error: BaseException | None) -> dict[str, dict[str, object]] | None:
    """What the store answered, as botocore keeps it; s3fs translates the exception and keeps botocore's as cause."""
    while error is not None:
        response = getattr(error, "response", None)
        if isinstance(response, dict):
            return response
        error = error.__cause__
    return None
