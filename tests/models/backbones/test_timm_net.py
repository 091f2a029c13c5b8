"""Networks of timm as backbones: their maps are timm's, wrong weights are refused, what is trained takes part."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.models.wsod.nets import BOXES, make_image, make_noise
from weaksam.core.config import parse_settings
from weaksam.errors import ConfigError, WeightsError
from weaksam.models.backbones.pyramids import TimmPyramid, load_from
from weaksam.models.backbones.timm_net import TimmCrops, TimmNet, timm_info
from weaksam.models.classifiers.build import build_classifier, load_trained, load_weights, pixels_of
from weaksam.models.detectors.base import Targets
from weaksam.models.detectors.build import build_untrained
from weaksam.models.detectors.catalogue.kind import DetectorSpec
from weaksam.models.wsod.build import WsodSpec
from weaksam.models.wsod.network import METHODS, forward_losses
from weaksam.stages import STAGES


def whole(name: str) -> dict[str, Tensor]:
    torch.manual_seed(1)
    return timm.create_model(name).state_dict()


def loaded(name: str, state: Mapping[str, Tensor], **options: Any) -> TimmNet:
    net = TimmNet(name, **options).eval()
    net.load_state(state, where=name)
    return net


def pixels(height: int = 96, width: int = 130) -> Tensor:
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", ["test_resnet", "test_convnext", "test_efficientnet"])
def test_maps_are_those_of_timm(name: str) -> None:
    theirs = timm.create_model(name, features_only=True).eval()
    flat = {key.replace(".", "_"): value for key, value in whole(name).items()}
    theirs.load_state_dict({key: flat[key.replace(".", "_")] for key in theirs.state_dict()})
    net = loaded(name, whole(name), strides=(8, 32))
    with torch.no_grad():
        wanted = theirs(pixels())
    by_stride = dict(zip(theirs.feature_info.reduction(), wanted, strict=True))
    assert net.strides == (8, 32)
    for maps, stride in zip(net(pixels()), net.strides, strict=True):
        torch.testing.assert_close(maps, by_stride[stride][..., : maps.shape[2], : maps.shape[3]])


def test_the_map_of_a_vit_is_its_last_block_normalised() -> None:
    theirs = timm.create_model("test_vit", num_classes=0, dynamic_img_size=True).eval()
    net = loaded("test_vit", theirs.state_dict())
    with torch.no_grad():
        tokens = theirs.forward_features(pixels(96, 128))[:, theirs.num_prefix_tokens :]
    (maps,) = net(pixels(96, 128))
    torch.testing.assert_close(maps.flatten(2).transpose(1, 2), tokens)
    assert [tuple(m.shape[2:]) for m in net(pixels(90, 121))] == [(6, 8)]  # padded to whole patches


def test_pixels_strides_and_licences_are_those_that_timm_states() -> None:
    vit = timm_info("vit_small_patch14_dinov2")
    assert (vit.strides, vit.channels, vit.is_plain_vit, vit.license) == ((14,), (384,), True, "apache-2.0")
    assert vit.mean == pytest.approx([255 * value for value in (0.485, 0.456, 0.406)])
    assert timm_info("vit_base_patch16_siglip_gap_224").mean == (127.5, 127.5, 127.5)
    net = timm_info("convnext_tiny")
    assert (net.strides, net.channels) == ((4, 8, 16, 32), (96, 192, 384, 768))
    assert timm_info("convnextv2_atto").license == "cc-by-nc-4.0"
    with pytest.raises(ConfigError, match="has no network of that name"):
        timm_info("resnet5")


def test_a_file_that_lacks_a_weight_or_has_another_shape_is_refused() -> None:
    state = whole("test_convnext")
    key = next(key for key in state if key.startswith("stages.2"))
    with pytest.raises(WeightsError, match=r"a\.pth: has no stages_2.*: give weights of timm's test_convnext"):
        TimmNet("test_convnext").load_state({k: v for k, v in state.items() if k != key}, where="a.pth")
    with pytest.raises(WeightsError, match=rf"a\.pth: {key} is \(1,\), must be "):
        TimmNet("test_convnext").load_state(state | {key: torch.zeros(1)}, where="a.pth")
    TimmNet("test_convnext").load_state({k: v for k, v in state.items() if not k.startswith("head")}, where="a.pth")


@pytest.mark.parametrize("name", ["test_resnet", "test_convnext", "test_vit", "test_efficientnet"])
def test_every_trained_weight_takes_part_and_frozen_ones_stay(name: str) -> None:
    first = 0 if timm_info(name).is_plain_vit else 2
    for frozen_maps in (None, first):
        net = TimmNet(name, frozen_maps=frozen_maps).train()
        trained = {key: p for key, p in net.named_parameters() if p.requires_grad}
        assert bool(trained) == (frozen_maps is not None)
        if trained:
            assert len(trained) < len(list(net.parameters())) or first == 0
            torch.stack([maps.sum() for maps in net(pixels())]).sum().backward()
            assert all(p.grad is not None for p in trained.values())
            assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in net.modules())


def test_transformers_with_windows_take_any_image_and_those_of_one_size_are_refused() -> None:
    net = TimmNet("swin_tiny_patch4_window7_224", strides=(16, 32)).eval()
    assert [tuple(maps.shape) for maps in net(pixels())] == [(2, 384, 6, 9), (2, 768, 3, 5)]
    with pytest.raises(ConfigError, match="'levit_128s': takes images of one size alone"):
        TimmNet("levit_128s")


def test_maps_of_crops_have_a_spread_of_one_on_a_picture_like_a_photograph() -> None:
    net = TimmCrops("test_efficientnet")
    net.load_state(whole("test_efficientnet"), where="a")
    assert net.crop_strides == (16, 32)
    assert "scale" in net.state_dict()
    assert all(0.1 < maps.std() < 10 for maps in net.crop_maps(pixels(64, 64)))


@pytest.mark.parametrize(
    ("backbone", "crop", "shape"),
    [("test_vit", 64, (64, 4, 4)), ("test_convnext+frozen_sam", 64, (48 + 64 + 96, 4, 4))],
)
def test_a_weakly_supervised_detector_learns_on_it(
    backbone: str, crop: int, shape: tuple[int, ...], tmp_path: Path
) -> None:
    name = backbone.split("+")[0]
    save_file(whole(name), tmp_path / "w.safetensors")
    spec = WsodSpec(backbone, 3, METHODS["mist"], crop=crop, weights=str(tmp_path / "w.safetensors"))
    net = spec.with_starting_weights().train()
    assert net.pool([make_image()], [BOXES]).shape[1:] == shape
    (losses,), _ = forward_losses(net, [make_image()], [BOXES], [torch.tensor([0, 2])], make_noise([0], [len(BOXES)]))
    torch.stack(list(losses.values())).sum().backward()
    trained = [p for p in net.parameters() if p.requires_grad]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained)
    save_file(net.state_dict(), tmp_path / "trained.safetensors")
    again = spec.trained(tmp_path / "trained.safetensors")
    for scores, others in zip(net.eval().detect(make_image(), BOXES), again.detect(make_image(), BOXES), strict=True):
        assert torch.equal(scores, others)


def test_weights_for_no_network_or_for_two_are_refused(tmp_path: Path) -> None:
    save_file(whole("test_vit"), tmp_path / "w.safetensors")
    spec = WsodSpec("test_vit+test_convnext", 3, METHODS["mist"], weights=str(tmp_path / "w.safetensors"))
    with pytest.raises(WeightsError, match="2 of the backbones take weights of a file"):
        spec.with_starting_weights()
    wrong = WsodSpec("test_convnext", 3, METHODS["mist"], weights=str(tmp_path / "w.safetensors"))
    with pytest.raises(
        WeightsError, match=r"w\.safetensors: has no stem_0\.weight: give weights of timm's test_convnext"
    ):
        wrong.with_starting_weights()


@pytest.mark.parametrize("name", ["test_convnext", "test_vit", "test_efficientnet"])
@pytest.mark.parametrize("model", ["faster_rcnn", "mask_rcnn"])
def test_a_detector_learns_on_it(model: str, name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = build_untrained(DetectorSpec(model, name, 3, frozen_stages=0)).train()
    save_file(whole(name), tmp_path / "w.safetensors")
    pyramid = net.backbone.body  # pyright: ignore[reportAttributeAccessIssue]
    load_from(pyramid, str(tmp_path / "w.safetensors"))
    assert isinstance(pyramid, TimmPyramid)
    assert pyramid.strides == (8, 16, 32)
    image = torch.randint(0, 256, (3, 96, 130), dtype=torch.uint8)
    masks = torch.ones(1, 96, 130, dtype=torch.bool)
    losses = net.losses([image], [Targets(torch.tensor([[8.0, 8, 80, 80]]), torch.tensor([1]), masks)], 0)
    torch.stack([value for key, value in losses.items() if key.startswith("loss")]).sum().backward()
    trained = {key: p for key, p in net.named_parameters() if p.requires_grad}
    assert any(key.startswith("backbone.body") for key in trained)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained.values())


def test_a_classifier_of_class_maps_stands_on_a_convolutional_network(tmp_path: Path) -> None:
    model = build_classifier("test_efficientnet", 3)
    save_file(whole("test_efficientnet"), tmp_path / "w.safetensors")
    load_weights(model, str(tmp_path / "w.safetensors"))
    maps = model.eval().find_maps(pixels(64, 96), cross_layers=())
    assert (maps.coarse.shape[2:], maps.fine.shape[2:]) == ((2, 3), (4, 6))
    mean, std = timm_info("test_efficientnet").mean, timm_info("test_efficientnet").std
    for values, stated in zip(pixels_of("test_efficientnet"), (mean, std), strict=True):
        assert [255 * value for value in values] == pytest.approx(stated)
    save_file(model.state_dict(), tmp_path / "trained.safetensors")
    again = load_trained(tmp_path / "trained.safetensors", "test_efficientnet", 3)
    assert torch.equal(again.find_maps(pixels(64, 96), cross_layers=()).fine, maps.fine)


def test_run_files_take_names_of_timm() -> None:
    def faults(stage: str, **own: object) -> list[str]:
        names = {"images": "i", "split": "train", "proposals": "p", "pgt": "p"}
        raw = {key: value for key, value in names.items() if key in STAGES[stage].config.model_fields} | own
        return parse_settings(STAGES[stage].config, raw, where="s")[1]

    for backbone, crop in (("vit_small_patch14_dinov2", 98), ("convnext_tiny", 96), ("convnext_tiny+frozen_sam", 96)):
        assert faults("train_wsod", backbone=backbone, crop=crop) == []
    assert faults("train_wsod", backbone="vit_small_patch14_dinov2") == [
        "s: crop must be a multiple of 14 for vit_small_patch14_dinov2, got 96"
    ]
    (fault,) = faults("train_wsod", backbone="vit_small_patch14_dinov2+frozen_sam", crop=112)
    assert "strides [14, 16] of vit_small_patch14_dinov2+frozen_sam do not go together" in fault
    assert faults("train_detector", backbone="convnext_tiny") == []
    assert faults("train_detector", backbone="convnext_tiny", model="dino") == [
        "s: backbone convnext_tiny is not for dino: it has resnet50 and frozen_sam"
    ]
    assert faults("train_classifier", backbone="convnext_tiny") == []
    assert faults("train_classifier", backbone="convnext_tiny", gated=True) == [
        "s: gated and fine_of are for ViTs: convnext_tiny has no attention"
    ]
    assert "or a network of timm, got 'convnext_small_tiny'" in faults("train_wsod", backbone="convnext_small_tiny")[0]
