"""The classifier network against timm's and against a plain twin that keeps all of its attention."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor

from weaksam.models.classifiers.weaktr import WeakTr, WeakTrSize, resize_positions
from weaksam.models.classifiers.weaktr_weights import load_state

SIZE = WeakTrSize(dim=24, depth=3, heads=2, patch=8, grid=4)
CLASSES = 3


def make(*, gated: bool = False, size: WeakTrSize = SIZE, fine_of: Any = "both") -> WeakTr:
    torch.manual_seed(0)
    model = WeakTr(CLASSES, size, gated=gated, fine_of=fine_of).eval()
    for parameter in model.parameters():  # sharp attention: near-uniform rows would hide a wrong axis
        parameter.data.mul_(4) if parameter.ndim == 2 else parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model.requires_grad_(False)


def twin(model: WeakTr, images: Tensor) -> dict[str, Tensor]:
    """Everything at once, written for one reader: every map of every head and layer is kept."""
    size, classes = model.size, model.num_classes
    patches = F.conv2d(images, model.patch_embed.proj.weight, model.patch_embed.proj.bias, stride=size.patch)
    h, w = patches.shape[2:]
    x = torch.cat([model.cls_token.expand(len(images), -1, -1), patches.flatten(2).transpose(1, 2)], 1)
    x = x + resize_positions(model.pos_embed, classes, (h, w))
    attention = []
    for block in model.blocks:
        y = block.norm1(x)
        q, k, v = block.attn.qkv(y).chunk(3, -1)
        heads = []
        for a in range(size.heads):
            part = slice(a * size.dim // size.heads, (a + 1) * size.dim // size.heads)
            logits = q[..., part] @ k[..., part].transpose(1, 2) / (size.dim / size.heads) ** 0.5
            heads.append((logits.softmax(-1), v[..., part]))
        attention.append([weights for weights, _ in heads])
        x = x + block.attn.proj(torch.cat([weights @ value for weights, value in heads], -1))
        x = x + block.mlp(block.norm2(x))
    every = torch.stack([torch.stack(layer, 1) for layer in attention], 2)  # (B, A, L, N, N), as published
    stack = every.flatten(1, 2)
    gates = torch.ones(stack.shape[1])
    if model.adaptive_attention_fusion is not None:
        gates = model.adaptive_attention_fusion.fc(stack.mean((2, 3)))[0]
    fused = (stack * gates.view(1, -1, 1, 1)).mean(1)
    activation = model.head(x[:, classes:].transpose(1, 2).unflatten(2, (h, w)))
    coarse = activation.relu()
    cross = fused[:, :classes, classes:]
    spread = {"both": cross * coarse.flatten(2), "coarse": coarse.flatten(2), "cross": cross}[model.fine_of]
    fine = torch.einsum("bpq,bcq->bcp", fused[:, classes:, classes:], spread)
    return {
        "cls": x[:, :classes].mean(2),
        "patch": activation.mean((2, 3)),
        "attention": every,
        "coarse": coarse,
        "fine": fine.unflatten(2, (h, w)),
        "fine_logits": fine.mean(2),
    }


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("hw", [(32, 32), (24, 40), (8, 8), (47, 33)])
def test_maps_equal_the_plain_twins(gated: bool, hw: tuple[int, int]) -> None:
    model = make(gated=gated)
    images = torch.randn(2, 3, *hw)
    wanted, found = twin(model, images), model.find_maps(images, cross_layers=[0, 2])
    rows, columns = hw[0] // 8, hw[1] // 8
    assert found.coarse.shape == found.fine.shape == (2, CLASSES, rows, columns)
    assert found.cross.shape == (2, 4, CLASSES, rows, columns)
    torch.testing.assert_close(found.logits, wanted["cls"])
    torch.testing.assert_close(found.coarse, wanted["coarse"])
    torch.testing.assert_close(found.fine, wanted["fine"])
    cross = wanted["attention"][:, :, [0, 2], :CLASSES, CLASSES:].transpose(1, 2).flatten(1, 2)
    torch.testing.assert_close(found.cross.flatten(3), cross)
    torch.testing.assert_close(wanted["attention"].sum(-1), torch.ones(2, 2, 3, *wanted["attention"].shape[-1:]))


@pytest.mark.parametrize("fine_of", ["coarse", "cross"])
def test_the_fine_map_of_one_map_alone_equals_the_plain_twins(fine_of: str) -> None:
    model, images = make(gated=True, fine_of=fine_of), torch.randn(2, 3, 24, 40)
    wanted, found = twin(model, images), model.find_maps(images, cross_layers=[0])
    torch.testing.assert_close(found.fine, wanted["fine"])
    assert not torch.allclose(found.fine, make(gated=True).find_maps(images, cross_layers=[0]).fine)
    logits = model(images).fine
    assert logits is not None
    torch.testing.assert_close(logits, wanted["fine_logits"])
    assert not found.fine.is_inference()
    with pytest.raises(ValueError, match="fine_of must be one of both, coarse, cross, got 'patchcam'"):
        make(fine_of="patchcam")


@pytest.mark.parametrize("gated", [False, True])
def test_logits_equal_the_plain_twins(gated: bool) -> None:
    model = make(gated=gated)
    images = torch.randn(2, 3, 24, 40)
    wanted, found = twin(model, images), model(images)
    torch.testing.assert_close(found.cls, wanted["cls"])
    torch.testing.assert_close(found.patch, wanted["patch"])
    assert (found.fine is None) is not gated
    if found.fine is not None:
        torch.testing.assert_close(found.fine, wanted["fine_logits"])


def test_the_fine_loss_reaches_the_gate_alone() -> None:
    model = make(gated=True).requires_grad_(True)
    model(torch.randn(1, 3, 32, 32)).fine.sum().backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == {
        "adaptive_attention_fusion.fc.0.weight",
        "adaptive_attention_fusion.fc.2.weight",
    }


def test_without_layers_there_are_no_cross_maps() -> None:
    assert make().find_maps(torch.randn(1, 3, 16, 16), cross_layers=[]).cross.shape == (1, 0, CLASSES, 2, 2)


def test_the_transformer_is_timms() -> None:
    vit = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=64, depth=2).eval()
    model = WeakTr(1, WeakTrSize(dim=192, depth=2, heads=3, grid=4)).eval()
    missing, unexpected = load_state(model, vit.state_dict(), where="timm")
    assert missing == ["head.weight", "head.bias"]
    assert unexpected == []
    images = torch.randn(2, 3, 64, 64)
    vit.norm = torch.nn.Identity()  # the last norm is not part of WeakTr's forward
    with torch.no_grad():
        wanted = vit.forward_features(images)
        torch.testing.assert_close(model(images).cls[:, 0], wanted[:, 0].mean(-1), rtol=1e-4, atol=1e-5)
        patches = wanted[:, 1:].transpose(1, 2).unflatten(2, (4, 4))
        torch.testing.assert_close(model(images).patch, model.head(patches).mean((2, 3)), rtol=1e-4, atol=1e-5)


def test_a_sample_that_drops_a_branch_drops_no_others() -> None:
    model = make()
    images = torch.randn(2, 3, 16, 16)
    keep = torch.ones(2, 3, 2)
    keep[1, 2, 1] = 0
    whole, dropped = model(images), model(images, keep)
    assert torch.equal(whole.cls[0], dropped.cls[0])
    assert not torch.allclose(whole.cls[1], dropped.cls[1])
    assert torch.allclose(model(images, torch.ones(2, 3, 2)).cls, whole.cls)


def test_positions_of_the_trained_grid_are_left_alone_and_others_follow_the_published_factor() -> None:
    positions = torch.randn(1, CLASSES + 16, 8)
    assert resize_positions(positions, CLASSES, (4, 4)) is positions
    larger = resize_positions(positions, CLASSES, (6, 5))
    assert larger.shape == (1, CLASSES + 30, 8)
    assert torch.equal(larger[:, :CLASSES], positions[:, :CLASSES])
    grid = positions[:, CLASSES:].transpose(1, 2).unflatten(2, (4, 4))
    exact = F.interpolate(grid, (6, 5), mode="bicubic", align_corners=False).flatten(2).transpose(1, 2)
    assert 0 < (larger[:, CLASSES:] - exact).abs().max() < 0.5


def test_the_frozen_sam_takes_images_of_any_size() -> None:
    model = make(size=WeakTrSize(dim=32, depth=1, heads=2, grid=16, sam="vit_xs"))
    trained = {name for name, p in model.requires_grad_(False).named_parameters() if "patch_embed" in name}
    assert "patch_embed.proj.weight" in trained
    for hw in ((256, 256), (64, 144), (16, 16)):
        maps = model.find_maps(torch.randn(1, 3, *hw), cross_layers=[0])
        assert maps.coarse.shape[2:] == (hw[0] // 16, hw[1] // 16)
    fresh = WeakTr(2, WeakTrSize(dim=32, depth=1, heads=2, grid=16, sam="vit_xs")).train()
    assert not fresh.patch_embed.encoder.training
    fresh(torch.randn(1, 3, 32, 32)).cls.sum().backward()
    assert all(p.grad is None for p in fresh.patch_embed.encoder.parameters())
    assert fresh.patch_embed.proj.weight.grad is not None
