"""Multipart uploads that were begun on S3 and never completed: they show in no listing and are billed all the same."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from lrag_ray.store.address import Storage


class Upload(NamedTuple):
    """An upload that was begun."""

    path: str
    """What it would become, below the run."""
    upload_id: str
    size_bytes: int
    """Of the pieces that have arrived."""
    begun_s: float
    """Seconds since 1970."""


def unfinished_uploads(storage: Storage) -> Iterator[Upload]:
    """Uploads below the run; none where the address is not S3. StorageError where they may not be listed."""
    if not storage.is_s3:
        return
    bucket, _, prefix = storage.root.partition("/")
    page: dict[str, Any] = {}
    while True:
        found = storage.call_s3("list_multipart_uploads", Bucket=bucket, Prefix=f"{prefix}/" if prefix else "", **page)
        for upload in found.get("Uploads", []):
            key, upload_id = upload["Key"], upload["UploadId"]
            pieces = storage.call_s3("list_parts", Bucket=bucket, Key=key, UploadId=upload_id)
            size = sum(piece["Size"] for piece in pieces.get("Parts", []))
            path = key[len(prefix) + 1 :] if prefix else key
            yield Upload(path, upload_id, size, upload["Initiated"].timestamp())
        if not found.get("IsTruncated"):
            return
        page = {"KeyMarker": found["NextKeyMarker"], "UploadIdMarker": found["NextUploadIdMarker"]}


def abort_upload(storage: Storage, path: str, upload_id: str) -> None:
    """Drop an upload and the pieces that have arrived."""
    bucket, _, key = storage.full(path).partition("/")
    storage.call_s3("abort_multipart_upload", Bucket=bucket, Key=key, UploadId=upload_id)
