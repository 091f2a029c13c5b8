"""Randomness of a sample: generators, and code of libraries that draws from them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from weaksam.models.noise import drawn_from, make_generators, noise_seeds

CPU = torch.device("cpu")


def test_seeds_are_of_seed_round_and_sample_alone() -> None:
    seeds = np.array([[0, 1, 2], [0, 1, 3], [0, 2, 2], [1, 1, 2]])
    drawn = noise_seeds(seeds)
    assert drawn.dtype == torch.int64
    assert len(set(drawn.tolist())) == 4
    assert torch.equal(noise_seeds(seeds[2:]), drawn[2:])


def test_code_without_a_generator_draws_from_one_and_torchs_own_stays_as_it_was() -> None:
    (own,), (twin,) = make_generators([7], CPU), make_generators([7], CPU)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    for _ in range(2):  # the second goes on where the first stopped
        with drawn_from(own):
            drawn = torch.rand(4), torch.randperm(9)
        assert torch.equal(drawn[0], torch.rand(4, generator=twin))
        assert torch.equal(drawn[1], torch.randperm(9, generator=twin))
    with pytest.raises(ValueError, match="stops"), drawn_from(own):
        raise ValueError("stops")
    assert torch.equal(torch.get_rng_state(), before)
