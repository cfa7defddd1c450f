"""Makes the bucket where it is missing and lets traces expire: `python bucket.py BUCKET [--expire ID=PREFIX=DAYS]...`

The object store is named by the environment of the job's pods, and a way out of a closed network by HTTPS_PROXY.
Rules that others put on the bucket are kept as they are: the store's own XML is edited, and written only where ours
change.
"""

# ruff: noqa: T201

import argparse
import os
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

import certifi
import urllib3
from minio import Minio
from minio.credentials import ChainedProvider, EnvAWSProvider, IamAwsProvider, StaticProvider
from minio.error import S3Error
from minio.helpers import md5sum_hash

from cowest_serving.outward import proxy_of

WAIT_SECONDS = 120  # a store that was installed a moment ago is not up yet
LIFECYCLE = {"lifecycle": ""}
CANNOT = ("AccessDenied", "NotImplemented", "MethodNotAllowed")  # of a store or keys that know no rules
SMALLEST = "x-amz-transition-default-minimum-object-size"  # said beside the rules; unsaid, a write would set it back


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("bucket")
    parser.add_argument("--expire", action="append", default=[], metavar="ID=PREFIX=DAYS")
    parser.add_argument("--replace", required=True, metavar="ID", help="rules whose ID starts so are ours and go")
    options = parser.parse_args()
    store = client()
    make_bucket(store, options.bucket)
    expire(store, options.bucket, options.replace, [rule(text) for text in options.expire])


def client() -> Minio:
    address = urlsplit(os.environ.get("COWEST_S3_ENDPOINT") or "https://s3.amazonaws.com")
    authorities, proxy = os.environ.get("COWEST_S3_CA"), proxy_of(address.geturl())
    store = Minio(
        address.netloc,
        secure=address.scheme == "https",
        region=os.environ.get("AWS_REGION") or None,
        credentials=keys(os.environ.get("COWEST_S3_KEYS_FOLDER")),
        http_client=connections(authorities, proxy) if authorities or proxy else None,
    )
    if os.environ.get("COWEST_S3_PATH_STYLE") == "false":
        store.enable_virtual_style_endpoint()
    return store


def keys(folder: str | None) -> Any:
    """The files of a mounted Secret, which may end with a line's end; else the environment or the pod's account."""
    if not folder:
        return ChainedProvider([EnvAWSProvider(), IamAwsProvider()])
    files = {path.name: path.read_text().strip() for path in Path(folder).iterdir() if path.is_file()}
    access, secret = (files.get(name, "") for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"))
    return StaticProvider(access, secret, files.get("AWS_SESSION_TOKEN") or None)


def connections(authorities: str | None, proxy: str | None) -> urllib3.PoolManager:
    options: dict[str, Any] = {"ca_certs": authorities or certifi.where(), "timeout": 10, "retries": False}
    if not proxy:
        return urllib3.PoolManager(**options)
    way = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    user, _, address = way.netloc.rpartition("@")
    headers = urllib3.make_headers(proxy_basic_auth=unquote(user)) if user else None
    return urllib3.ProxyManager(f"{way.scheme}://{address}", proxy_headers=headers, **options)


def make_bucket(store: Minio, bucket: str) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while True:
        try:
            if store.bucket_exists(bucket):
                print(f"bucket {bucket} is there")
                return
            store.make_bucket(bucket, os.environ.get("AWS_REGION") or None)
            print(f"made bucket {bucket}")
            return
        except (S3Error, urllib3.exceptions.HTTPError) as error:
            refused = isinstance(error, S3Error) and error.response.status < 500
            if refused or time.monotonic() > deadline:
                raise SystemExit(f"bucket {bucket}: wanted it to exist, saw: {error}") from error
            time.sleep(2)


class Rule(NamedTuple):
    name: str
    prefix: str
    days: str


def rule(text: str) -> Rule:
    name, prefix, days = text.split("=")
    return Rule(name, prefix, str(int(days)))


def expire(store: Any, bucket: str, ours: str, rules: list[Rule]) -> None:
    """minio's own classes for rules know only a part of what others may have said in theirs."""
    try:
        answer = store._execute("GET", bucket, query_params=LIFECYCLE)
        root, said = ElementTree.fromstring(answer.data), {SMALLEST: answer.headers.get(SMALLEST)}
    except S3Error as error:
        if not rules and error.code in CANNOT:
            return
        if error.code != "NoSuchLifecycleConfiguration":
            raise refusal(bucket, error) from error
        root, said = ElementTree.Element("LifecycleConfiguration"), {}
    space = root.tag.rpartition("}")[0] + "}" if root.tag.startswith("{") else ""
    there = [each for each in root.findall(f"{space}Rule") if text(each, space, "ID").startswith(ours)]
    if sorted(read(each, space) for each in there) != sorted(rules):
        for each in there:
            root.remove(each)
        root.extend(built(each, space) for each in rules)
        try:
            write(store, bucket, root, space, {name: value for name, value in said.items() if value})
        except S3Error as error:
            raise refusal(bucket, error) from error
    for each in rules:
        print(f"{each.prefix} expires after {each.days} days")


def refusal(bucket: str, error: S3Error) -> SystemExit:
    return SystemExit(
        f"bucket {bucket}: wanted traces to expire there, saw: {error}. Give the keys s3:GetLifecycleConfiguration and"
        " s3:PutLifecycleConfiguration, or set bucket.expireTraces: false."
    )


def write(store: Any, bucket: str, root: ElementTree.Element, space: str, said: dict[str, str]) -> None:
    if root.find(f"{space}Rule") is None:
        store.delete_bucket_lifecycle(bucket)
        return
    if space:
        ElementTree.register_namespace("", space.strip("{}"))
    body = ElementTree.tostring(root, encoding="utf-8")
    store._execute("PUT", bucket, body=body, headers={"Content-MD5": md5sum_hash(body), **said}, query_params=LIFECYCLE)


def built(rule: Rule, space: str) -> ElementTree.Element:
    found = ElementTree.Element(f"{space}Rule")
    for path, value in (("ID", rule.name), ("Status", "Enabled"), ("Filter/Prefix", rule.prefix),
                        ("Expiration/Days", rule.days)):  # fmt: skip
        place = found
        for name in path.split("/"):
            place = ElementTree.SubElement(place, f"{space}{name}")
        place.text = value
    return found


def read(found: ElementTree.Element, space: str) -> Rule:
    """Of a rule of ours; one that was edited is another."""
    kept = text(found, space, "Status") == "Enabled"
    return Rule(text(found, space, "ID"), text(found, space, "Filter/Prefix"),
                text(found, space, "Expiration/Days") if kept else "")  # fmt: skip


def text(found: ElementTree.Element, space: str, path: str) -> str:
    return found.findtext("/".join(f"{space}{name}" for name in path.split("/"))) or ""


if __name__ == "__main__":
    main()
