"""Mask2Former: against transformers' own, its losses, what it makes of answers, and that it learns."""

from __future__ import annotations

import dataclasses
import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load, save
from torch import Tensor, nn
from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, ResNetConfig

from tests.models.detectors.test_mask_rcnn import NOTHING
from tests.models.pictures import assert_same, best_overlap, learn, masked_pictures, squares_and_discs, total
from weaksam.models.backbones.pyramids import Pyramid, ResNet50
from weaksam.models.detectors.base import Targets
from weaksam.models.detectors.mask2former import Mask2Former, Mask2FormerSize, select_instances
from weaksam.models.noise import make_generators

SIZE = Mask2FormerSize(
    dim=64, heads=4, encoder_layers=2, encoder_ffn=96, decoder_layers=3, decoder_ffn=96, queries=20, points=256,
    detections=30,
)  # fmt: skip


class TinyPyramid(Pyramid):
    """Strides 4 to 32."""

    channels, strides = (16, 24, 32, 32), (4, 8, 16, 32)

    def __init__(self, *, maps: int = 4) -> None:
        super().__init__()
        self.channels, self.strides = self.channels[:maps], self.strides[:maps]
        steps = [(3, 16, 4), (16, 24, 2), (24, 32, 2), (32, 32, 2)][:maps]
        self.convs = nn.ModuleList(nn.Conv2d(i, o, step + 1, step, step // 2) for i, o, step in steps)

    def forward(self, pixels: Tensor) -> list[Tensor]:
        return list(itertools.accumulate(self.convs, lambda x, conv: F.relu(conv(x)), initial=pixels))[1:]


def tiny(size: Mask2FormerSize = SIZE, *, maps: int = 4, **options: Any) -> Mask2Former:
    torch.manual_seed(0)
    return Mask2Former(TinyPyramid(maps=maps), 2, size, **options)


def twin(ours: Mask2Former) -> Mask2FormerForUniversalSegmentation:
    """The one of transformers, sharing all weights."""

    class Backbone(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pyramid = ours.pyramid

        def forward(self, pixels: Tensor) -> Any:
            return SimpleNamespace(feature_maps=self.pyramid(pixels))

    backbone = ResNetConfig(
        embedding_size=8, hidden_sizes=[8] * 4, depths=[1] * 4, layer_type="basic",
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = Mask2FormerConfig(**ours.network.config.to_dict() | {"backbone_config": backbone})
    theirs: Any = Mask2FormerForUniversalSegmentation(config)
    theirs.model.pixel_level_module.encoder = Backbone()
    theirs.model.pixel_level_module.decoder = ours.network.pixel_decoder
    theirs.model.transformer_module = ours.network.transformer
    theirs.class_predictor = ours.network.class_predictor
    return theirs


def even_points(*shape: Any, **_: Any) -> Tensor:
    """Instead of random ones, for every mask the same."""
    if len(shape) == 1:
        return torch.zeros(shape[0])  # older transformers draw whether to leave out a layer, which is never done
    row = torch.arange(shape[-2])
    points = torch.stack([(row * 0.7548777) % 1, (row * 0.5698403) % 1], 1)
    return points.expand(*shape).clone()


def test_answers_and_losses_equal_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    images, targets = masked_pictures(1, side=64)
    ours = tiny(masks_per_image=2.0).train()
    theirs = twin(ours).train()
    batch = ours.normaliser(images)
    told = ours(batch)
    labels = {"mask_labels": [one.masks.float() for one in targets], "class_labels": [one.classes for one in targets]}
    theirs.criterion.register_forward_pre_hook(lambda *_: torch.manual_seed(5) and None)
    said = theirs(batch.pixels, **labels, output_auxiliary_logits=True)
    torch.testing.assert_close(said.class_queries_logits, told.logits[-1])
    torch.testing.assert_close(said.masks_queries_logits, told.masks[-1])
    assert len(said.auxiliary_logits) == len(told.logits) - 1 == SIZE.decoder_layers
    losses = ours.losses(images, targets, 0, make_generators([5], torch.device("cpu")))
    assert total(losses).item() == pytest.approx(said.loss.item(), rel=1e-5)
    monkeypatch.setattr(torch, "rand", even_points)
    losses = ours.losses(images, targets, 0)
    criterion: Any = theirs.criterion
    last = criterion(said.masks_queries_logits, said.class_queries_logits, **labels)
    assert losses["loss_class"].item() == pytest.approx(2 * last["loss_cross_entropy"].item(), rel=1e-5)
    assert losses["loss_mask"].item() == pytest.approx(5 * last["loss_mask"].item(), rel=1e-5)
    assert losses["loss_dice"].item() == pytest.approx(5 * last["loss_dice"].item(), rel=1e-5)


def test_losses_of_a_batch_are_the_sum_of_its_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers of objects differ, and of one there is none."""
    images, targets = masked_pictures(3, side=64)
    targets[1] = Targets(*(part[1:] for part in targets[1]))  # type: ignore[index, misc]
    targets[2] = NOTHING
    net = tiny(masks_per_image=1.7).train()
    monkeypatch.setattr(torch, "rand", even_points)
    together = net.losses(images, targets, 0)
    apart = [net.losses([image], [target], 0) for image, target in zip(images, targets, strict=True)]
    for key, value in together.items():
        assert value.item() == pytest.approx(sum(one[key].item() for one in apart), rel=1e-4), key
    assert apart[2]["loss_mask"] == apart[2]["loss_dice"] == 0
    assert apart[2]["loss_class"] > 0


def test_losses_are_divided_by_what_an_image_has_on_average(monkeypatch: pytest.MonkeyPatch) -> None:
    images, targets = masked_pictures(1, side=64)
    monkeypatch.setattr(torch, "rand", even_points)
    ones, fives = (tiny(masks_per_image=m).train().losses(images, targets, 0) for m in (1.0, 5.0))
    for key in ("loss_mask", "loss_dice"):
        torch.testing.assert_close(ones[key], 5 * fives[key])
    torch.testing.assert_close(ones["loss_class"] * (1 + 0.1 * 19), fives["loss_class"] * (5 + 0.1 * 15))


@pytest.mark.parametrize("empty", [[False, False], [True, False], [True, True]])
@pytest.mark.parametrize("maps", [3, 4])
def test_every_weight_takes_part_in_every_step(empty: list[bool], maps: int) -> None:
    images, targets = masked_pictures(2, side=64)
    targets = [NOTHING if is_empty else one for one, is_empty in zip(targets, empty, strict=True)]
    images[1] = F.pad(images[1], (0, 16))
    if not empty[1]:
        targets[1] = targets[1]._replace(masks=F.pad(targets[1].masks, (0, 16)))  # type: ignore[arg-type]
    net = tiny(maps=maps).train()
    losses = net.losses(images, targets, 0)
    assert set(losses) == {"loss_class", "loss_mask", "loss_dice", "loss_aux"}
    total(losses).backward()
    for name, p in net.named_parameters():
        assert p.grad is not None, name
        assert p.grad.isfinite().all(), name


def test_there_may_be_more_objects_than_queries() -> None:
    images, targets = masked_pictures(1, side=64)
    many = Targets(*(part.repeat(15, *[1] * (part.ndim - 1)) for part in targets[0]))  # type: ignore[union-attr]
    assert total(tiny().losses(images, [many], 0)).isfinite()


def test_objects_must_have_masks() -> None:
    images, targets = squares_and_discs(1, side=64)
    with pytest.raises(ValueError, match="2 objects without masks: give `masks`"):
        tiny().train().losses(images, targets, 0)


def test_a_pyramid_has_three_maps_or_more() -> None:
    with pytest.raises(ValueError, match="3 maps or more, got 2"):
        tiny(maps=2)


def test_it_runs_in_bfloat16() -> None:
    images, targets = masked_pictures(1, side=64)
    with torch.autocast("cpu", torch.bfloat16):
        losses = tiny().train().losses(images, targets, 0)
    assert all(value.dtype == torch.float32 for value in losses.values())
    total(losses).backward()
    assert total(losses).isfinite()


def test_select_instances_are_those_of_a_plain_loop() -> None:
    """One query at a time; what lies in the padding is not looked at, and an empty mask is nothing."""
    torch.manual_seed(2)
    logits, masks = 2 * torch.randn(6, 4), F.interpolate(torch.randn(1, 6, 3, 4), (8, 10))[0]
    masks[0] = -1
    masks[1, :7, :8] = -1  # all of it beyond the image
    masks[1, 7, 9] = 9
    height, width = 26, 31
    wanted = []
    for row, mask in zip(logits, masks, strict=True):
        large = F.interpolate(mask[None, None], (32, 40), mode="bilinear", align_corners=False)[0, 0, :height, :width]
        inside = [(x, y) for y in range(height) for x in range(width) if large[y, x] > 0]
        if inside:
            certain = sum(large[y, x].sigmoid().item() for x, y in inside) / len(inside)
            xs, ys = zip(*inside, strict=True)
            box = [min(xs), min(ys), max(xs) + 1, max(ys) + 1]
            chances = row.softmax(0).tolist()[:-1]
            wanted += [(chance, chance * certain, label, box, large > 0) for label, chance in enumerate(chances)]
        else:
            wanted += [(chance, 0.0, -1, [], mask) for chance in row.softmax(0).tolist()[:-1]]
    wanted = sorted(wanted, key=lambda one: -one[0])[:12]  # the best by class, of which the empty ones then go
    wanted = sorted((one for one in wanted if one[3]), key=lambda one: -one[1])
    found = select_instances(logits, masks, (32, 40), (height, width), 12)
    assert found.masks is not None
    assert 0 < len(wanted) == len(found.scores) < 12
    assert found.scores.tolist() == pytest.approx([one[1] for one in wanted], rel=1e-5)
    assert found.classes.tolist() == [one[2] for one in wanted]
    assert found.boxes.tolist() == [one[3] for one in wanted]
    assert torch.equal(found.masks, torch.stack([one[4] for one in wanted]))


def test_detections_are_best_first_with_masks_of_the_images_size() -> None:
    images = [torch.randint(0, 256, (3, *hw), dtype=torch.uint8) for hw in ((40, 56), (70, 33))]
    for image, found in zip(images, tiny().eval().detect(images), strict=True):
        height, width = image.shape[1:]
        assert 0 < len(found.boxes) <= SIZE.detections
        assert found.masks is not None
        assert found.masks.dtype == torch.bool
        assert found.masks.shape == (len(found.boxes), height, width)
        assert found.boxes.dtype == torch.float32
        assert found.boxes.min() >= 0
        assert (found.boxes <= torch.tensor([width, height, width, height])).all()
        assert (found.scores.diff() <= 0).all()
        assert ((found.scores > 0) & (found.scores < 1)).all()
        assert 0 <= found.classes.min() <= found.classes.max() < 2


def test_an_image_is_answered_in_a_batch_of_its_size_as_it_is_alone() -> None:
    images, _ = squares_and_discs(2, side=64)
    net = tiny().eval()
    together, apart = net(net.normaliser(images)), net(net.normaliser(images[1:]))
    torch.testing.assert_close(together.logits[-1][1:], apart.logits[-1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(together.masks[-1][1:], apart.masks[-1], rtol=1e-4, atol=1e-4)


def test_weights_go_there_and_back() -> None:
    net = tiny().eval()
    torch.manual_seed(9)
    other = Mask2Former(TinyPyramid(), 2, SIZE).eval()
    other.load_state_dict(load(save(net.state_dict())))
    images, _ = squares_and_discs(1, side=64)
    assert_same(net.detect(images)[0], other.detect(images)[0])


def test_the_published_size_has_the_published_weights() -> None:
    net = Mask2Former(ResNet50(), 80)
    millions = sum(p.numel() for p in net.parameters()) / 1e6
    assert millions == pytest.approx(44, abs=0.5)  # arXiv 2112.01527, table 1: 44M
    assert len(list(net.backbone_parameters())) == len(list(net.pyramid.parameters()))


def test_starting_weights_are_drawn_the_published_way() -> None:
    """Whatever the version of transformers."""
    weights = {name: p.detach() for name, p in tiny(Mask2FormerSize()).network.named_parameters()}
    spread = {"pixel_decoder.level_embed": 1.0, "transformer.queries_features.weight": 1.0}
    spread["class_predictor.weight"] = (3 * 256) ** -0.5
    for part in ("pixel_decoder.encoder.layers.0.fc1", "transformer.decoder.layers.0.self_attn.q_proj"):
        spread[f"{part}.weight"] = (2 / sum(weights[f"{part}.weight"].shape)) ** 0.5
    for name, value in spread.items():
        assert weights[name].std().item() == pytest.approx(value, rel=0.1), name
    attention = "pixel_decoder.encoder.layers.5.self_attn"
    assert (weights[f"{attention}.sampling_offsets.weight"] == 0).all()
    points = weights[f"{attention}.sampling_offsets.bias"].view(8, 3, 4, 2)  # heads, levels, points, x and y
    assert points[0].tolist() == [[[1, 0], [2, 0], [3, 0], [4, 0]]] * 3
    torch.testing.assert_close(points[3, 1], torch.tensor([[-1.0, 1], [-2, 2], [-3, 3], [-4, 4]]))


@pytest.mark.slow
def test_learns_four_pictures_by_heart() -> None:
    images, targets = masked_pictures(4, side=64)
    net = tiny(dataclasses.replace(SIZE, decoder_layers=2), masks_per_image=2.0).train()
    learn(net, images, targets, steps=100, lr=1e-3)
    for found, target in zip(net.detect(images), targets, strict=True):
        assert best_overlap(found, target) > 0.7
