"""Backbones of weakly supervised detectors: their weights, and maps of regions."""

from __future__ import annotations

import pytest
import torch
from torchvision.models import resnet50, vgg16
from torchvision.ops import roi_pool

from tests.models.wsod.nets import BOXES, make_image
from weaksam.models.backbones.crop_net import CropNet
from weaksam.models.backbones.pyramids import SamPyramid
from weaksam.models.backbones.roi_net import DilatedVgg16, ResNet50C5, load_imagenet


@pytest.mark.slow
def test_vgg16_is_torchvisions_but_for_pool4_and_the_dilated_stage() -> None:
    theirs = vgg16(weights=None).eval()
    ours = DilatedVgg16().eval()
    assert load_imagenet(ours, theirs.state_dict()) == []
    image = make_image()
    maps = ours.features(ours.normalise(image))
    assert maps.shape == (1, 512, 6, 8)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    x = ((image / 255).permute(1, 2, 0) - mean) / std
    conv4 = theirs.features[:23](x.permute(2, 0, 1)[None])
    for place in (24, 26, 28):
        layer = theirs.features[place]
        conv4 = torch.conv2d(conv4, layer.weight, layer.bias, padding=2, dilation=2).relu()
    torch.testing.assert_close(maps, conv4, rtol=1e-3, atol=1e-4)
    pooled = ours.pool(image, BOXES)
    inclusive = BOXES - torch.tensor([0.0, 0, 1, 1])
    torch.testing.assert_close(pooled, roi_pool(maps, [inclusive], (7, 7), 1 / 8))
    torch.testing.assert_close(ours.neck(pooled), theirs.classifier[:6](pooled.flatten(1)), rtol=1e-3, atol=1e-4)
    frozen = [name for name, p in ours.named_parameters() if not p.requires_grad]
    assert sum(p.numel() for p in ours.parameters() if not p.requires_grad) == 260_160
    assert {name.split(".")[2] for name in frozen} == {"0", "2", "5", "7"}
    assert DilatedVgg16(last_relu=False, frozen_stages=0).features(ours.normalise(image)).min() < 0


@pytest.mark.slow
def test_weights_from_caffe_see_blue_first_and_have_their_own_mean() -> None:
    network = DilatedVgg16("caffe")
    image = make_image()
    seen = network.normalise(image)[0]
    torch.testing.assert_close(seen[0], image[2] - 102.9801)
    state = {key: value for key, value in vgg16(weights=None).state_dict().items() if key.startswith("features")}
    state |= {f"classifier.{k}.{kind}": getattr(network.classifier[j], kind) + 1
              for k, j in ((1, 0), (4, 3)) for kind in ("weight", "bias")}  # fmt: skip
    before = network.classifier[3].bias.clone()
    assert load_imagenet(network, state) == []
    torch.testing.assert_close(network.classifier[3].bias, before + 1)
    with pytest.raises(ValueError, match="the file has"):
        load_imagenet(network, {"features.0.weight": torch.zeros(3)})


def test_resnet50_keeps_stride_8_and_takes_torchvisions_weights() -> None:
    network = ResNet50C5().eval()
    assert load_imagenet(network, resnet50(weights=None).state_dict()) == []
    pooled = network.pool(make_image(), BOXES)
    assert pooled.shape == (5, 1024, 7, 7)
    assert network.neck(pooled).shape == (5, 2048)


def test_crops_see_the_box_and_a_margin() -> None:
    network = CropNet(dim=8, margin=0.0)
    flat = torch.zeros(3, 48, 64, dtype=torch.uint8)
    flat[:, 10:26, 20:36] = 255
    box = torch.tensor([[20.0, 10, 36, 26]])
    crops = network.cut_out(flat, box, network.sam)
    inside = (255 - network.pixel_mean) / network.pixel_std
    torch.testing.assert_close(crops[0, :, 4:-4, 4:-4], inside.expand(3, 56, 56))
    wide = CropNet(dim=8, margin=0.5)
    assert wide.cut_out(flat, box, wide.sam)[0, 0, 0, 0] < 0
    assert network.pool(flat, box).shape == (1, 96, 4, 4)


def test_what_is_frozen_is_computed_once_for_a_view(monkeypatch: pytest.MonkeyPatch) -> None:
    network, image = CropNet(dim=8).train(), make_image()
    assert {key.split(".")[0] for key, p in network.named_parameters() if p.requires_grad} == {
        "first",
        "norm",
        "second",
    }
    first = network.pool(image, BOXES)
    monkeypatch.setattr(network.sam, "forward", lambda crops: pytest.fail("seen again"))
    assert torch.equal(network.pool(image, BOXES), first)
    monkeypatch.undo()
    assert not torch.equal(network.pool(image.flip(2), BOXES), first)
    assert not torch.equal(network.pool(image, BOXES.flip(0)), first)
    network.view_cache.max_bytes = 0
    network.pool(make_image(1), BOXES)
    assert len(network.view_cache.views) == 3
    torch.testing.assert_close(network.eval().pool(image, BOXES), first)


def test_images_of_one_colour_are_not_taken_for_one_another() -> None:
    pyramid = SamPyramid().train()
    shapes = [[one.shape for one in pyramid(torch.zeros(1, 3, *hw))] for hw in ((32, 64), (64, 32), (32, 64))]
    assert shapes[0] == shapes[2] != shapes[1]
    assert len(pyramid.view_cache.views) == 2
