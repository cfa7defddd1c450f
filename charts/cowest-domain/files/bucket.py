"""Makes the bucket where it is missing and lets traces expire: `python bucket.py BUCKET [--expire ID=PREFIX=DAYS]...`

The object store is named by the environment of the job's pods, and a way out of a closed network by HTTPS_PROXY.
Rules that others put on the bucket are kept.
"""

# ruff: noqa: T201

import argparse
import os
import time
from typing import Any
from urllib.parse import unquote, urlsplit

import certifi
import urllib3
from minio import Minio
from minio.commonconfig import ENABLED, Filter
from minio.credentials import ChainedProvider, EnvAWSProvider, IamAwsProvider
from minio.error import S3Error
from minio.lifecycleconfig import Expiration, LifecycleConfig, Rule

from cowest_serving.outward import proxy_of

WAIT_SECONDS = 120  # a store that was installed a moment ago is not up yet


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("bucket")
    parser.add_argument("--expire", action="append", default=[], metavar="ID=PREFIX=DAYS")
    parser.add_argument("--replace", default="", metavar="ID", help="rules whose ID starts so are ours and go")
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
        credentials=ChainedProvider([EnvAWSProvider(), IamAwsProvider()]),
        http_client=connections(authorities, proxy) if authorities or proxy else None,
    )
    if os.environ.get("COWEST_S3_PATH_STYLE") == "false":
        store.enable_virtual_style_endpoint()
    return store


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


def rule(text: str) -> Rule:
    name, prefix, days = text.split("=")
    return Rule(ENABLED, rule_filter=Filter(prefix=prefix), rule_id=name, expiration=Expiration(days=int(days)))


def expire(store: Minio, bucket: str, ours: str, rules: list[Rule]) -> None:
    before = store.get_bucket_lifecycle(bucket)
    others = [each for each in (before.rules if before else []) if not (ours and (each.rule_id or "").startswith(ours))]
    if others or rules:
        store.set_bucket_lifecycle(bucket, LifecycleConfig([*others, *rules]))
    elif before:
        store.delete_bucket_lifecycle(bucket)
    for each in rules:
        print(f"{each.rule_filter.prefix} expires after {each.expiration.days} days")


if __name__ == "__main__":
    main()
