"""Creates buckets on the tests' server, and writes small drawn scenes with image-level labels to any folder."""

from __future__ import annotations

import io
from concurrent.futures import ThreadPoolExecutor

from PIL import Image
from pyarrow import fs as pafs

from testing.s3.server import CephServer
from weaksam.core import storage
from weaksam.demo.scene_drawing import CLASS_NAMES, draw_scene


def make_bucket(server: CephServer, name: str) -> str:
    """Creates a bucket, unless it exists, and returns its URI."""
    client = pafs.S3FileSystem(
        scheme="http",
        endpoint_override=server.endpoint.partition("://")[2],
        access_key=server.access_key,
        secret_key=server.secret_key,
        allow_bucket_creation=True,
        retry_strategy=pafs.AwsDefaultS3RetryStrategy(
            max_attempts=10
        ),  # a new server takes seconds for its first bucket
    )
    client.create_dir(name)
    return f"s3://{name}"


def write_scenes_small(root: str, count: int, *, seed: int) -> None:
    """Writes `root/train/*.jpg` of 96 x 80 pixels and `root/labels.csv`."""

    def write(index: int) -> str:
        scene, buffer = draw_scene(seed * 1_000_000 + index, family="demo", size=(80, 96)), io.BytesIO()
        Image.fromarray(scene.image).save(buffer, "JPEG", quality=90)
        storage.write_bytes(storage.join(root, f"train/{index:04}.jpg"), buffer.getvalue())
        names = sorted({CLASS_NAMES[thing.class_id] for thing in scene.objects})
        return f"train/{index:04}.jpg,{';'.join(names)}"

    with ThreadPoolExecutor(8) as pool:
        rows = list(pool.map(write, range(count)))
    storage.write_bytes(storage.join(root, "labels.csv"), "\n".join(["file,labels", *rows, ""]).encode())
