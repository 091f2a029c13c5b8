"""Loading weights: what fits loads, everything else says what is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from segment_anything.modeling import Sam

from weaksam.errors import ConfigError, WeightsError
from weaksam.sam import checkpoints
from weaksam.sam.build import build_sam
from weaksam.sam.checkpoints import file_sha256, load_sam


@pytest.fixture(scope="module")
def sam() -> Sam:
    torch.manual_seed(5)
    return build_sam("vit_xs")


@pytest.fixture(scope="module")
def file(sam, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "sam.pth"
    torch.save(sam.state_dict(), path)
    return path


@pytest.mark.parametrize("kind", ["pth", "safetensors"])
def test_weights_come_back(sam, file, tmp_path, kind):
    path = file
    if kind == "safetensors":
        path = tmp_path / "sam.safetensors"
        save_file(sam.state_dict(), path)
    loaded = load_sam("vit_xs", path, sha256=file_sha256(path))
    for key, value in sam.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_the_bundled_weights_load(bundled_sam):
    assert bundled_sam.image_encoder.img_size == 256


def test_large_models_have_no_bundled_weights():
    with pytest.raises(WeightsError, match=r"vit_b has no weights in the package: download sam_vit_b_01ec64.pth"):
        load_sam("vit_b")


def test_an_unknown_model_is_named(file):
    with pytest.raises(ConfigError, match="unknown SAM model 'vit_q'"):
        load_sam("vit_q", file)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(WeightsError, match=r"nothing.pth: no such file, it should hold the weights of vit_xs"):
        load_sam("vit_xs", tmp_path / "nothing.pth")


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("keep", [0, 100, -100])
def test_a_cut_file_is_named(sam, file, tmp_path, suffix, keep):
    whole = file
    if suffix == ".safetensors":
        whole = tmp_path / "whole.safetensors"
        save_file(sam.state_dict(), whole)
    path = tmp_path / f"cut{suffix}"
    path.write_bytes(whole.read_bytes()[:keep])
    with pytest.raises(WeightsError, match=r"cut\..* cannot be read as weights .*Download it again"):
        load_sam("vit_xs", path)


def test_code_in_a_file_is_not_run(tmp_path):
    class Trap:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "sprung",))

    path = tmp_path / "trap.pth"
    torch.save({"weight": Trap()}, path)
    with pytest.raises(WeightsError, match="cannot be read as weights"):
        load_sam("vit_xs", path)
    assert not (tmp_path / "sprung").exists()


def test_a_wrong_hash_is_named(file):
    with pytest.raises(WeightsError, match=r"SHA-256 .* expected 00ff: the file was altered"):
        load_sam("vit_xs", file, sha256="00ff")


def test_official_names_promise_size_hash_and_variant(tmp_path, monkeypatch):
    path = tmp_path / "sam_vit_b_01ec64.pth"
    path.write_bytes(b"short")
    with pytest.raises(WeightsError, match="5 bytes, the official file has 375042383"):
        load_sam("vit_b", path)
    monkeypatch.setitem(checkpoints.OFFICIAL, "vit_b", (path.name, 5))
    with pytest.raises(WeightsError, match="expected 01ec64"):
        load_sam("vit_b", path)
    with pytest.raises(WeightsError, match="weights of vit_b by its name, the model is vit_xs"):
        load_sam("vit_xs", path)


def test_keys_and_shapes_that_do_not_fit_are_named(sam, tmp_path):
    state = dict(sam.state_dict())
    del state["mask_decoder.iou_token.weight"]
    state["mask_decoder.more"] = torch.zeros(1)
    state["mask_decoder.mask_tokens.weight"] = torch.zeros(4, 7)
    path = tmp_path / "other.pth"
    torch.save(state, path)
    with pytest.raises(WeightsError) as caught:
        load_sam("vit_xs", path)
    message = str(caught.value)
    assert "missing mask_decoder.iou_token.weight" in message
    assert "unexpected mask_decoder.more" in message
    assert "mask_decoder.mask_tokens.weight is (4, 7) instead of (4, " in message


def test_another_variant_is_recognised(tmp_path):
    path = tmp_path / "b.pth"
    torch.save({"image_encoder.pos_embed": torch.zeros(1, 64, 64, 768)}, path)
    with pytest.raises(WeightsError, match=r"does not fit vit_xs: .*; it looks like vit_b: set the model to that"):
        load_sam("vit_xs", path)


def test_a_training_checkpoint_is_refused(tmp_path):
    path = tmp_path / "training.pth"
    torch.save({"model": {"a": torch.zeros(1)}, "epoch": 3}, path)
    with pytest.raises(WeightsError, match="not a dict of tensors"):
        load_sam("vit_xs", path)
