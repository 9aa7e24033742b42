"""Reads, writes and lists objects by URI: a local path, `file://`, or `s3://bucket/key` on any S3-compatible store.

Every write is atomic and every call is retried within bounds; failures are the `StorageError`s of the error tree. The
parts are `uris`, `client` (boto3), `patience`, `errors` (what becomes which error, and retries), `local`, `s3`,
`counts` (for metrics) and `objects` (what each call promises). Owns boto3, whose own configuration decides: `AWS_*`
variables, profiles, roles. `sources` reads manifests and pictures from other stores too, by `other_stores` (fsspec).
"""

from pia_ray.storage.client import declare_buckets, forget_clients
from pia_ray.storage.counts import Usage, count_read, usage
from pia_ray.storage.objects import (
    arrow_filesystem,
    check_writable,
    clock,
    compares_etags,
    conditional_writes,
    copy,
    copy_to_file,
    create_bytes,
    create_object,
    delete,
    delete_all,
    exists,
    head,
    link,
    list_folder,
    list_objects,
    move,
    pieces_of,
    presign,
    probe,
    read_bytes,
    read_object,
    remove_empty_folder,
    replace_bytes,
    sha256_of,
    sweep,
    upload_file,
    write_bytes,
)
from pia_ray.storage.patience import Notice, hurry, patience, waited_out
from pia_ray.storage.side_by_side import side_by_side
from pia_ray.storage.uris import ObjectStat, expanded, is_s3, join, local_path

__all__ = [
    "Notice",
    "ObjectStat",
    "Usage",
    "arrow_filesystem",
    "check_writable",
    "clock",
    "compares_etags",
    "conditional_writes",
    "copy",
    "copy_to_file",
    "count_read",
    "create_bytes",
    "create_object",
    "declare_buckets",
    "delete",
    "delete_all",
    "exists",
    "expanded",
    "forget_clients",
    "head",
    "hurry",
    "is_s3",
    "join",
    "link",
    "list_folder",
    "list_objects",
    "local_path",
    "move",
    "patience",
    "pieces_of",
    "presign",
    "probe",
    "read_bytes",
    "read_object",
    "remove_empty_folder",
    "replace_bytes",
    "sha256_of",
    "side_by_side",
    "sweep",
    "upload_file",
    "usage",
    "waited_out",
    "write_bytes",
]
