"""Which images a report fetches."""

from __future__ import annotations

import pytest

from weaksam.report.gallery import is_below


@pytest.mark.parametrize(
    ("uri", "folders", "is_in"),
    [
        ("/data/voc/1.jpg", ["/data/voc"], True),
        ("/data/voc/deep/1.jpg", ["/data/voc/"], True),
        ("file:///data/voc/1.jpg", ["/data/voc"], True),
        ("/data/voc2/1.jpg", ["/data/voc"], False),
        ("/data/voc/../../etc/passwd", ["/data/voc"], False),
        ("/etc/passwd", ["/data/voc"], False),
        ("http://169.254.169.254/latest", ["/data/voc"], False),
        ("s3://bucket/voc/1.jpg", ["s3://bucket/voc"], True),
        ("s3://other/voc/1.jpg", ["s3://bucket/voc"], False),
        ("s3://bucket/voc/../other/1.jpg", ["s3://bucket/voc"], False),
        ("/train/1.jpg", ["/data/coco", "/train"], True),
        ("/data/voc/1.jpg", [], False),
    ],
)
def test_nothing_outside_of_the_dataset_is_fetched(uri: str, folders: list[str], is_in: bool) -> None:
    assert is_below(uri, folders) is is_in
