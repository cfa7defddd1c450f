"""The object store: files by URI, on a disk (`file://...` or a plain path) or in S3 (`s3://bucket/key`).

Every write is atomic: a reader sees the old bytes or the new ones. S3 is set by the environment: COWEST_S3_ENDPOINT
(`http(s)://host:port`), AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN, AWS_REGION, COWEST_S3_PATH_STYLE
(true | false) and COWEST_S3_CA (a PEM file); without keys the pod's own identity (IRSA, ECS) is used where it has one.
COWEST_S3_KEYS_FOLDER names a folder whose files are the keys instead, such as a mounted Secret: read at each use, so
that a rotation arrives. A proxy is taken as HTTP_PROXY, HTTPS_PROXY and NO_PROXY say.
Every function raises `StoreError`, whose `retryable` says whether the same call may succeed later.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import IO, Any, Protocol
from urllib.parse import quote, unquote, urlsplit

from cowest_serving.key_files import texts_in
from cowest_serving.outward import proxy_of

LAST = "manifest.json"  # an output without it does not exist: uploaded last
MAX_WAIT = 2  # seconds between tries of one call, however long a store asks for: who calls again has a clock of its own
AT_ONCE = 8  # reads of one process that a store is asked for side by side; as many connections are kept
_PART = ".part"  # suffix of a file that is still being written; never listed
_RETRYABLE_CODES = {"SlowDown", "InternalError", "ServiceUnavailable", "RequestTimeout", "XMinioServerNotInitialized"}
_KEY_CODES = {"InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken"}
_ABSENT_CODES = {"NoSuchKey", "NoSuchBucket", "NoSuchObject"}


class StoreError(Exception):
    """What was wanted of the store, what was seen, what to change. `saw`: S3's own word, such as NoSuchBucket."""

    def __init__(self, message: str, *, retryable: bool = False, saw: str = "") -> None:
        super().__init__(message)
        self.retryable, self.saw = retryable, saw


# ---------------------------------------------------------------- what callers use
def prepare(uri: str) -> None:
    """Load what it takes to reach the place: a second of imports for S3, better now than beside the first answers."""
    with contextlib.suppress(StoreError):  # it is said when the place is used
        _place(uri)


def get(uri: str) -> bytes:
    """The bytes of a file. A file that is not there is an error that is not worth a retry."""
    return _place(uri).get()


def put(uri: str, data: bytes) -> None:
    """Write a file whole: on a disk the bytes are synced before the name shows them."""
    _place(uri).put(data)


def exists(uri: str) -> bool:
    """Is there a file, or at least one file below, at `uri`?"""
    return _place(uri).exists()


def list_files(uri: str) -> list[str]:
    """URIs of all files below `uri` (or `uri` itself when it is a file), sorted; nothing there is an empty list."""
    return sorted(_place(uri).files())


def delete(uri: str) -> None:
    """Delete a file, or everything below a folder. Nothing there is fine."""
    _place(uri).delete()


def join(uri: str, *parts: str) -> str:
    """`join("s3://b/k", "a/b", "c") == "s3://b/k/a/b/c"`; the parts are names, not yet percent-encoded."""
    names = [quote(part) if uri.startswith("file://") else part for part in parts]
    head = uri if uri.endswith("/") or not parts else uri + "/"
    return head + "/".join(name.strip("/") for name in names)


def fingerprint(uri: str) -> str:
    """Changes when a file below an S3 `uri` does (by ETag and size) or a local one (by size and time)."""
    lines = sorted(_place(uri).stamps())
    return hashlib.sha256("\n".join([uri, *lines]).encode()).hexdigest()


def download(uri: str, folder: str | Path) -> Path:
    """A folder or a single file at `uri` as a local path; what is local already is not copied."""
    return _place(uri).download(Path(folder))


def upload(folder: str | Path, uri: str) -> None:
    """Copy a folder (or a single file) to `uri`, `manifest.json` last. Files that were there already are replaced."""
    source = Path(folder)
    if not source.exists():
        raise StoreError(f"wanted {source} to upload to {uri}, saw nothing there")
    for path in _upload_order(source):
        target = uri if path == source else join(uri, path.relative_to(source).as_posix())
        _place(target).put_file(path)


def _upload_order(source: Path) -> list[Path]:
    if source.is_file():
        return [source]
    files = [path for path in source.rglob("*") if path.is_file() and not path.name.endswith(_PART)]
    return sorted(files, key=lambda path: (path.relative_to(source).as_posix() == LAST, path))


# ---------------------------------------------------------------- places
class _Place(Protocol):
    def get(self) -> bytes: ...
    def put(self, data: bytes) -> None: ...
    def put_file(self, source: Path) -> None: ...
    def exists(self) -> bool: ...
    def files(self) -> Iterable[str]: ...
    def stamps(self) -> Iterable[str]: ...
    def delete(self) -> None: ...
    def download(self, folder: Path) -> Path: ...


def _place(uri: str) -> _Place:
    scheme = uri.partition("://")[0] if "://" in uri else ""
    if scheme == "s3":
        return _S3(uri)
    if scheme in ("", "file"):
        return _Disk(uri)
    raise StoreError(f"{uri}: wanted a path, file:// or s3://, saw {scheme}://")


class _Disk:
    def __init__(self, uri: str) -> None:
        self.uri = uri
        self.encoded = uri.startswith("file://")
        self.path = Path(unquote(uri.removeprefix("file://"))) if self.encoded else Path(uri)

    def get(self) -> bytes:
        with _disk_errors(f"read {self.uri}"):
            return self.path.read_bytes()

    def put(self, data: bytes) -> None:
        self._write(lambda file: file.write(data))

    def put_file(self, source: Path) -> None:
        if source.resolve() == self.path.resolve():
            return
        with _disk_errors(f"read {source}"), source.open("rb") as data:
            self._write(lambda file: shutil.copyfileobj(data, file, 1 << 20))

    def exists(self) -> bool:
        return self.path.is_file() or any(True for _ in self._walk())

    def files(self) -> Iterator[str]:
        if self.path.is_file():
            yield self.uri
            return
        for path in self._walk():
            yield join(self.uri, path.relative_to(self.path).as_posix())

    def stamps(self) -> Iterator[str]:
        with _disk_errors(f"list {self.uri}"):
            for path in [self.path] if self.path.is_file() else self._walk():
                seen = path.stat()
                yield f"{path} {seen.st_size} {seen.st_mtime_ns}"

    def delete(self) -> None:
        with _disk_errors(f"delete {self.uri}"), contextlib.suppress(FileNotFoundError):
            if self.path.is_dir() and not self.path.is_symlink():
                shutil.rmtree(self.path)
            else:
                self.path.unlink()

    def download(self, folder: Path) -> Path:
        if not self.path.exists():
            raise StoreError(f"wanted a file or folder at {self.uri}, saw nothing there; check the path")
        return self.path

    def _walk(self) -> Iterator[Path]:
        for root, _, names in os.walk(self.path):
            yield from (Path(root, name) for name in names if not name.endswith(_PART))

    def _write(self, fill: Callable[[IO[bytes]], object]) -> None:
        with _disk_errors(f"write {self.uri}"):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            part = self.path.with_name(f".{self.path.name[:100]}.{os.getpid()}.{secrets.token_hex(4)}{_PART}")
            try:
                with part.open("xb") as file:
                    fill(file)
                    file.flush()
                    os.fsync(file.fileno())
                part.replace(self.path)
            except BaseException:
                part.unlink(missing_ok=True)
                raise
            sync(self.path.parent)


def sync(path: Path) -> None:
    """A file's bytes, or a folder's names, to the disk: without the latter a power cut may take back a rename."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def _disk_errors(wanted: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        remedy = {
            errno.ENOSPC: "free some space and run it again",
            errno.EDQUOT: "free some space and run it again",
            errno.EACCES: "give this user the right to do so",
            errno.ENOENT: "check the path",
            errno.EISDIR: "name a file, not a folder",
        }.get(error.errno or 0, "check the disk")
        raise StoreError(f"wanted to {wanted}, saw: {error.strerror or error}; {remedy}", retryable=full) from error


class _S3:
    def __init__(self, uri: str) -> None:
        self.uri = uri
        self.bucket, _, self.key = uri.removeprefix("s3://").partition("/")
        if not self.bucket:
            raise StoreError(f"{uri}: wanted s3://bucket/key, saw no bucket")
        with _s3_errors(f"reach {uri}"):
            self.client = _s3_client(_s3_settings())

    def get(self) -> bytes:
        with _s3_errors(f"read {self.uri}"):
            response = self.client.get_object(self.bucket, self.key)
            try:
                return bytes(response.read())
            finally:
                response.close()
                response.release_conn()

    def put(self, data: bytes) -> None:
        with _s3_errors(f"write {self.uri}"):
            self.client.put_object(self.bucket, self.key, BytesIO(data), len(data))

    def put_file(self, source: Path) -> None:
        with _s3_errors(f"write {self.uri}"):
            self.client.fput_object(self.bucket, self.key, str(source))

    def exists(self) -> bool:
        return self._stat() is not None or any(True for _ in self._below())

    def files(self) -> Iterator[str]:
        yield from (f"s3://{self.bucket}/{item.object_name}" for item in self._objects())

    def stamps(self) -> Iterator[str]:
        yield from (f"{item.object_name} {item.etag} {item.size}" for item in self._objects())

    def delete(self) -> None:
        for item in list(self._objects()):
            with _s3_errors(f"delete {self.uri}"):
                self.client.remove_object(self.bucket, item.object_name)

    def download(self, folder: Path) -> Path:
        found = list(self._objects())
        if not found:
            raise StoreError(f"wanted files at {self.uri}, saw none; check bucket, key and COWEST_S3_ENDPOINT")
        for item in found:
            target = _inside(folder, self._relative(item.object_name))
            with _s3_errors(f"read s3://{self.bucket}/{item.object_name}"), _disk_errors(f"write {target}"):
                target.parent.mkdir(parents=True, exist_ok=True)
                part = f"{target}.{secrets.token_hex(4)}{_PART}"
                self.client.fget_object(self.bucket, item.object_name, str(target), tmp_file_path=part)
        return folder / self._relative(self.key) if found[0].object_name == self.key else folder

    def _relative(self, name: str) -> str:
        return PurePosixPath(name).name if name == self.key else name.removeprefix(self._prefix)

    @property
    def _prefix(self) -> str:
        key = self.key.rstrip("/")
        return key + "/" if key else ""

    def _objects(self) -> Iterator[Any]:
        """The objects below the key, or the one at it."""
        below = list(self._below())
        if not below and (alone := self._stat()) is not None:
            yield alone
        yield from below

    def _below(self) -> Iterator[Any]:
        with _s3_errors(f"list {self.uri}"):
            for item in self.client.list_objects(self.bucket, prefix=self._prefix, recursive=True):
                if not (item.object_name or "").endswith("/"):  # what some tools write to show a folder
                    yield item

    def _stat(self) -> Any:
        from minio.error import S3Error

        if not self.key or self.key.endswith("/"):
            return None
        with _s3_errors(f"look at {self.uri}"):
            try:
                return self.client.stat_object(self.bucket, self.key)
            except S3Error as error:
                if error.code in _ABSENT_CODES:
                    return None
                raise


def _inside(folder: Path, relative: str) -> Path:
    target = folder / relative
    if not target.resolve().is_relative_to(folder.resolve()):
        raise StoreError(f"wanted a key below {folder}, saw {relative!r}, which leads out of it; rename the object")
    return target


_KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")
_KEYS_FOLDER = "COWEST_S3_KEYS_FOLDER"


@dataclass(frozen=True)
class _S3Settings:
    """Another value is another client."""

    url: str
    access: str
    secret: str = field(repr=False)
    token: str = field(repr=False)
    region: str
    path_style: str
    ca: str
    proxy: str | None = field(repr=False)
    has_identity: bool


def _s3_settings() -> _S3Settings:
    """Of the environment, and the keys of the folder that it names."""
    said = os.environ
    endpoint = said.get("COWEST_S3_ENDPOINT") or "s3.amazonaws.com"
    url = endpoint if "://" in endpoint else f"https://{endpoint}"
    folder = said.get(_KEYS_FOLDER)
    access, secret, token = _keys_in(Path(folder)) if folder else tuple(said.get(name, "") for name in _KEYS)
    return _S3Settings(
        url,
        access,
        secret,
        token,
        said.get("AWS_REGION", ""),
        said.get("COWEST_S3_PATH_STYLE", ""),
        said.get("COWEST_S3_CA", ""),
        proxy_of(url),
        any(said.get(name) for name in _POD_IDENTITY),
    )


def _keys_in(folder: Path) -> tuple[str, ...]:
    """All of one moment."""
    try:
        found = texts_in(folder)
    except FileNotFoundError:  # the kubelet has not been there yet
        found = {}
    except (OSError, ValueError) as error:
        raise StoreError(f"wanted to read the keys in {folder} ({_KEYS_FOLDER}), saw: {error}") from None
    if missing := [name for name in _KEYS[:2] if name not in found]:
        raise StoreError(
            f"wanted the files {_KEYS[0]} and {_KEYS[1]} in {folder} ({_KEYS_FOLDER}), saw no {missing[0]};"
            " add the key to the Secret"
        )
    return tuple(found.get(name, "").strip() for name in _KEYS)


_POD_IDENTITY = (
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
)


@lru_cache(maxsize=8)
def _s3_client(settings: _S3Settings) -> Any:
    """One client (and its pool of connections) for each settings."""
    from minio import Minio
    from minio.credentials.providers import IamAwsProvider

    address = urlsplit(settings.url)
    client: Any = Minio(
        address.netloc,
        settings.access or None,
        settings.secret or None,
        session_token=settings.token or None,
        secure=address.scheme == "https",
        region=settings.region or None,
        http_client=_pool(settings),
        credentials=IamAwsProvider() if settings.has_identity and not settings.access else None,
    )
    if settings.path_style:
        if settings.path_style.lower() == "false":
            client.enable_virtual_style_endpoint()
        else:
            client.disable_virtual_style_endpoint()
    return client


def _pool(settings: _S3Settings) -> Any:
    """Of connections, through the proxy where there is one: urllib3 does not look for it itself."""
    import urllib3

    options: dict[str, Any] = {
        "maxsize": AT_ONCE,
        "timeout": urllib3.Timeout(connect=5, read=60),
        "retries": urllib3.Retry(
            total=3, backoff_factor=0.2, status_forcelist=(500, 502, 503, 504), retry_after_max=MAX_WAIT
        ),
        "cert_reqs": "CERT_REQUIRED",
        "ca_certs": settings.ca or None,
    }
    if not settings.proxy:
        return urllib3.PoolManager(**options)
    proxy = urlsplit(settings.proxy if "://" in settings.proxy else f"http://{settings.proxy}")
    user, _, address = proxy.netloc.rpartition("@")
    headers = urllib3.make_headers(proxy_basic_auth=unquote(user)) if user else None
    return urllib3.ProxyManager(f"{proxy.scheme}://{address}", proxy_headers=headers, **options)


@contextlib.contextmanager
def _s3_errors(wanted: str) -> Iterator[None]:
    from minio.error import MinioException, S3Error, ServerError
    from urllib3.exceptions import HTTPError

    try:
        yield
    except S3Error as error:
        # Keys in files may be just being rotated: the new ones reach a pod within two minutes.
        retryable = error.code in _RETRYABLE_CODES or (error.code in _KEY_CODES and bool(os.environ.get(_KEYS_FOLDER)))
        if error.code in _ABSENT_CODES:
            remedy = "check bucket and key"
        elif error.code in _RETRYABLE_CODES:
            remedy = "try again later"
        else:
            remedy = "check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and what they may do"
        message = f"wanted to {wanted}, saw {error.code}: {error.message}; {remedy}"
        raise StoreError(message, retryable=retryable, saw=error.code or "") from error
    except (ServerError, HTTPError) as error:
        message = f"wanted to {wanted}, saw: {error}; check COWEST_S3_ENDPOINT and that the store is up"
        raise StoreError(message, retryable=True) from error
    except (MinioException, ValueError) as error:
        message = f"wanted to {wanted}, saw: {error}; check COWEST_S3_ENDPOINT, the bucket's name and the credentials"
        raise StoreError(message) from error
