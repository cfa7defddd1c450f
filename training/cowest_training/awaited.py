"""Whether what a manifest names is in the object store yet.

A job may be declared before its rows, its base model or even its bucket are there, as with a store that comes with it.
That is no bad input: a step says what brings them, and ends so that it is begun again soon.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from cowest_serving import store
from cowest_training.contract import EXIT_MISSING, StepError

S3 = "s3://"


def is_in_a_store(uri: str) -> bool:
    """Else it is on a disk or a hub, where nobody brings what is missing while a step waits."""
    return uri.startswith(S3)


def look_for(named: Mapping[str, str], folders: Collection[str] = (), out: str = "") -> None:
    """`named`: field of the manifest -> URI; one of `folders` names a folder. `out` only wants a bucket.

    Raises `StepError` with EXIT_MISSING, in one message for all of them.
    """
    there = {uri: _is_there(uri) for uri in dict.fromkeys((*named.values(), out)) if is_in_a_store(uri)}
    buckets = sorted({_bucket(uri) for uri, seen in there.items() if seen is None})
    absent = {field: uri for field, uri in named.items() if uri in there and not there[uri]}
    said = []
    if buckets:
        said.append(f"The store has no bucket {' and no bucket '.join(buckets)} yet: make it.")
    if absent:
        what = "; ".join(f"{field} ({uri})" for field, uri in absent.items())
        commands = " and ".join(
            f"`cowest upload {'FOLDER' if field in folders else 'FILE'} {uri}`" for field, uri in absent.items()
        )
        said.append(f"Not in the store yet: {what}. Bring {'it' if len(absent) == 1 else 'them'} with {commands}.")
    if said:
        raise StepError(f"{' '.join(said)} It is looked at again by itself.", EXIT_MISSING)


def _is_there(uri: str) -> bool | None:
    """None: not even the bucket is."""
    try:
        return store.exists(uri)
    except store.StoreError as error:
        if error.saw == "NoSuchBucket":
            return None
        raise


def _bucket(uri: str) -> str:
    return uri.removeprefix(S3).partition("/")[0]
