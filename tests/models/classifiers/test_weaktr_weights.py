"""Starting weights: what fits is loaded, what does not is named."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from weaksam.errors import ConfigError, WeightsError
from weaksam.models.classifiers.weaktr import WeakTr, WeakTrSize
from weaksam.models.classifiers.weaktr_weights import (
    build_weaktr,
    load_file,
    load_pretrained,
    load_state,
    load_trained,
    size_of,
)
from weaksam.sam.checkpoints import load_sam

SIZE = WeakTrSize(dim=16, depth=2, heads=2, grid=2)


def make(classes: int, *, gated: bool = False) -> WeakTr:
    return WeakTr(classes, SIZE, gated=gated)


def test_sizes_are_read_off_timm() -> None:
    assert size_of("deit_small_patch16_224") == WeakTrSize(384, 12, 6, patch=16, grid=14)
    assert size_of("vit_base_patch32_224").patch == 32


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("no_such_model", "timm cannot build it"),
        ("resnet18", "no ViT with a class token"),
        ("vit_base_patch16_siglip_224", "no ViT with a class token"),
        ("deit3_small_patch16_224", "no plain ViT: it has blocks.0.ls1.gamma"),
    ],
)
def test_a_backbone_that_cannot_carry_weaktr_is_refused(name: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        size_of(name)


def test_the_published_key_names() -> None:
    keys = set(build_weaktr("vit_tiny_patch16_224", 20, gated=True).state_dict())
    assert {
        "cls_token",
        "pos_embed",
        "patch_embed.proj.weight",
        "blocks.11.attn.qkv.weight",
        "blocks.0.mlp.fc1.bias",
        "norm.weight",
        "head.weight",
        "adaptive_attention_fusion.fc.0.weight",
        "adaptive_attention_fusion.fc.2.weight",
    } <= keys
    model = build_weaktr("vit_tiny_patch16_224", 20)
    assert model.cls_token.shape == (1, 20, 192)
    assert model.pos_embed.shape == (1, 20 + 196, 192)
    assert model.head.weight.shape == (20, 192, 3, 3)


def test_every_class_starts_as_a_copy_of_a_vits_one_token() -> None:
    vit = timm.create_model("vit_tiny_patch16_224", num_classes=10, img_size=32, depth=1)
    torch.nn.init.normal_(vit.cls_token)
    model = WeakTr(3, WeakTrSize(192, 1, 3, grid=2))
    missing, unexpected = load_state(model, vit.state_dict(), where="vit")
    assert missing == ["head.weight", "head.bias"]
    assert unexpected == []
    assert all(torch.equal(model.cls_token[0, c], vit.cls_token[0, 0]) for c in range(3))
    assert torch.equal(model.pos_embed[0, 3:], vit.pos_embed[0, 1:])
    assert torch.equal(model.pos_embed[0, 2], vit.pos_embed[0, 0])


def test_a_checkpoint_in_a_training_scripts_wrapping_is_read(tmp_path: Path) -> None:
    theirs, ours = make(4), make(4)
    path = tmp_path / "checkpoint_best.pth"
    torch.save({"model": theirs.state_dict(), "args": argparse.Namespace(lr=1e-4), "epoch": 3}, path)
    load_file(ours, path)
    assert all(torch.equal(value, ours.state_dict()[key]) for key, value in theirs.state_dict().items())


def test_rows_of_a_checkpoint_with_more_classes_are_chosen() -> None:
    theirs, ours = make(90), make(3)
    with pytest.raises(WeightsError, match="has 90 classes, the dataset has 3: name the row of each class"):
        load_state(ours, theirs.state_dict(), where="coco.pth")
    load_state(ours, theirs.state_dict(), where="coco.pth", class_rows=[0, 42, 89])
    assert torch.equal(ours.cls_token[0], theirs.cls_token[0, [0, 42, 89]])
    assert torch.equal(ours.pos_embed[0, :3], theirs.pos_embed[0, [0, 42, 89]])
    assert torch.equal(ours.pos_embed[0, 3:], theirs.pos_embed[0, 90:])
    assert torch.equal(ours.head.weight, theirs.head.weight[[0, 42, 89]])


def test_what_is_left_over_and_what_is_lacking_is_told() -> None:
    state = make(4).state_dict() | {"adaptive_attention_fusion.attn_head_ffn.0.weight": torch.zeros(2)}
    missing, unexpected = load_state(make(4, gated=True), state, where="v3.pth")
    assert missing == ["adaptive_attention_fusion.fc.0.weight", "adaptive_attention_fusion.fc.2.weight"]
    assert unexpected == ["adaptive_attention_fusion.attn_head_ffn.0.weight"]


def test_weights_of_another_transformer_are_refused() -> None:
    state = make(4).state_dict()
    del state["blocks.1.attn.qkv.weight"]
    with pytest.raises(WeightsError, match=r"other.pth: does not fit the classifier: missing blocks.1.attn.qkv.weight"):
        load_state(make(4), state, where="other.pth")
    state = WeakTr(4, WeakTrSize(dim=32, depth=2, heads=2, grid=2)).state_dict()
    with pytest.raises(WeightsError, match=r"cls_token is \(1, 4, 32\) instead of \(1, 4, 16\)"):
        load_state(make(4), state, where="wide.pth")


def test_the_small_one_stands_on_the_shipped_sam() -> None:
    model = build_weaktr("frozen_sam", 2)
    load_pretrained(model, "frozen_sam")
    wanted = load_sam("vit_xs").image_encoder.state_dict()
    assert all(torch.equal(value, wanted[key]) for key, value in model.patch_embed.encoder.state_dict().items())


def test_trained_weights_come_back_whole_or_not_at_all(tmp_path: Path) -> None:
    theirs = build_weaktr("frozen_sam", 2)
    save_file(theirs.state_dict(), tmp_path / "model.safetensors")
    ours = load_trained(tmp_path / "model.safetensors", "frozen_sam", 2)
    assert not ours.training
    assert all(torch.equal(value, ours.state_dict()[key]) for key, value in theirs.state_dict().items())
    state = theirs.state_dict()
    del state["head.bias"]
    save_file(state, tmp_path / "cut.safetensors")
    with pytest.raises(WeightsError, match=r"no finished classifier, it lacks head.bias"):
        load_trained(tmp_path / "cut.safetensors", "frozen_sam", 2)
