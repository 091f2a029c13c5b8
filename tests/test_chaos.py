"""A run of `benchmarks.chaos` with fewer images: every kind of kill hits, and nothing is lost, doubled or stale."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import chaos
from testing.s3.server import CephServer


def test_a_plan_is_that_of_its_seed_and_has_every_kind() -> None:
    plans = [chaos.plan(seed) for seed in range(20)]
    assert plans[3] == chaos.plan(3) != plans[4]
    for moments in plans:
        assert sorted(kind for _, kind in moments) == sorted(chaos.KINDS)
        assert moments == sorted(moments)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_run_of_which_everything_is_killed_ends_like_one_left_alone(
    bucket: str, s3_server: CephServer, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    site = chaos.open_site(tmp_path, s3_server, bucket, images=48)
    try:
        good = chaos.try_seeds(site, [0])
    finally:
        site.close()
    assert good, capsys.readouterr().out
