"""Whether a bucket lies in another region than this machine."""

import contextlib
import urllib.request
from typing import Any

from lib.data.download import tell
from lib.files import answered, filesystem

# what tells a machine of Google's, or of Amazon's, where it is; nothing answers there elsewhere
ZONE = "http://metadata.google.internal/computeMetadata/v1/instance/zone"
AMAZON = "http://169.254.169.254/"
# a bucket in one of these lies in all regions of that beginning
WIDE = {"US": "us-", "EU": "europe-", "ASIA": "asia-"}


def warn_if_far(address: str):
    """Say where a bucket lies in another region than this machine: each byte costs time and money.

    Nothing is said where either can't be known.
    """
    with contextlib.suppress(Exception):
        bucket, machine = places(address)
        if is_far(bucket, machine):
            tell(
                f"warning: {address} lies in {bucket} and this machine in {machine}: what is read "
                "is slow and billed as traffic between regions"
            )


def is_far(bucket: str, machine: str) -> bool:
    """Whether a bucket's region is certainly not this machine's; "" where that is not known."""
    if not machine:
        return False
    if bucket in WIDE:
        return not machine.startswith(WIDE[bucket])
    # a name of several regions, such as NAM4, tells nothing
    return "-" in bucket and bucket.lower() != machine


def places(address: str) -> tuple[str, str]:
    """The regions of a bucket and of this machine; raises where one can't be known."""
    fs, root = filesystem(address)
    bucket = root.split("/")[0]
    if address.startswith("gs://"):
        return _of_google(fs, bucket)
    if address.startswith("s3://"):
        return _of_amazon(fs, bucket)
    raise LookupError(address)


def _of_google(fs: Any, bucket: str) -> tuple[str, str]:
    asked = urllib.request.Request(ZONE, headers={"Metadata-Flavor": "Google"})
    with urllib.request.urlopen(asked, timeout=2) as answer:
        zone = answer.read().decode().rpartition("/")[2]
    address = f"gs://{bucket}"
    about = answered(address, lambda: fs.call("GET", "b/{}", bucket, json_out=True), 10)
    # us-central1-a is in us-central1
    return about["location"], zone.rpartition("-")[0]


def _of_amazon(fs: Any, bucket: str) -> tuple[str, str]:
    from botocore.utils import (  # pyright: ignore[reportMissingImports]
        InstanceMetadataRegionFetcher,
    )

    fetcher = InstanceMetadataRegionFetcher(timeout=2, num_attempts=1, base_url=AMAZON)
    region = fetcher.retrieve_region()
    address = f"s3://{bucket}"
    about = answered(address, lambda: fs.call_s3("get_bucket_location", Bucket=bucket), 10)
    # the first region of all has no name there
    return about["LocationConstraint"] or "us-east-1", region or ""
