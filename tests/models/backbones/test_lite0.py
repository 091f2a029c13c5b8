"""EfficientNet-Lite0: the weights are ImageNet's, folding changes nothing, what is frozen stays."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from torch import Tensor

from weaksam.errors import WeightsError
from weaksam.models.backbones import lite0
from weaksam.models.backbones.crop_net import CropNet
from weaksam.models.backbones.lite0 import CHANNELS, STRIDES, Lite0, normalise, rename_by_order, shipped_state
from weaksam.models.backbones.pyramids import Lite0Pyramid
from weaksam.models.classifiers.build import build_classifier, depth_of, load_trained
from weaksam.models.classifiers.cam_classifier import CamClassifier
from weaksam.models.classifiers.peak_prompts import PeakPromptRules, PeakRule, find_peak_prompts
from weaksam.models.detectors.base import Targets
from weaksam.models.detectors.build import build_to_train
from weaksam.models.detectors.catalogue.kind import DetectorSpec

# of the maps of strides 8, 16 and 32: mean, standard deviation, the first four channels of the first cell
STORED = [
    (-0.60471, 10.78875, [3.9525, 2.7654, 9.4038, 2.8704]),
    (1.18819, 7.68395, [-5.3367, 16.5842, 17.4801, 6.576]),
    (0.15366, 3.46465, [2.4823, 2.8339, -0.8194, -1.0039]),
]
BOXES = torch.tensor([[4.0, 4, 40, 30], [10, 20, 60, 44], [0, 0, 64, 48]])


def waves(height: int = 64, width: int = 96) -> Tensor:
    """(3, H, W) uint8: the same picture on every machine."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([(x * 5 + y * 3) % 256, (x * y) % 256, (x * 2 + 200 - y * 3) % 256]).to(torch.uint8)


@pytest.fixture(scope="module")
def network() -> Lite0:
    return Lite0(state=shipped_state()).eval()


def test_features_are_those_of_the_shipped_weights(network: Lite0) -> None:
    """Stored once from timm's own network with these weights; random ones cannot give them."""
    with torch.no_grad():
        maps = network(normalise(waves(), lite0.MEAN, lite0.STD)[None])
    assert [tuple(one.shape[1:]) for one in maps] == [
        (c, 64 // s, 96 // s) for c, s in zip(CHANNELS, STRIDES, strict=True)
    ]
    for one, (mean, spread, first) in zip(maps[2:], STORED, strict=True):
        assert one.mean().item() == pytest.approx(mean, abs=1e-3)
        assert one.std().item() == pytest.approx(spread, abs=1e-3)
        assert one[0, :4, 0, 0].tolist() == pytest.approx(first, abs=5e-3)


def test_folding_batch_norms_changes_no_map(network: Lite0) -> None:
    theirs = timm.create_model("tf_efficientnet_lite0", features_only=True).eval()
    theirs.load_state_dict({key: value for key, value in shipped_state().items() if key in theirs.state_dict()})
    pixels = torch.randn(2, 3, 70, 100, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for one, other in zip(network(pixels), theirs(pixels), strict=True):
            torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-3)
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in network.modules())


def test_weights_of_another_network_are_refused() -> None:
    state = shipped_state()
    with pytest.raises(WeightsError, match=r"a\.pth: has 295 weights, EfficientNet-Lite0 has 296"):
        rename_by_order(dict(list(state.items())[1:]), where="a.pth")
    other = state | {"conv_stem.weight": torch.zeros(1)}
    with pytest.raises(WeightsError, match=r"a\.pth: conv_stem\.weight is \(1,\), conv_stem\.weight must be \(32, 3"):
        rename_by_order(other, where="a.pth")


def test_a_file_that_was_altered_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "weights.pth").write_bytes(b"something else")
    monkeypatch.setattr(lite0, "shipped_path", lambda: tmp_path / "weights.pth")
    with pytest.raises(WeightsError, match=r"weights\.pth: SHA-256 .* expected 5793"):
        shipped_state()


def test_stages_that_are_not_frozen_learn_and_keep_their_statistics() -> None:
    pyramid = Lite0Pyramid(frozen_stages=4).train()
    pyramid.load_pretrained()
    before = {key: value.clone() for key, value in pyramid.state_dict().items()}
    sum(one.square().mean() for one in pyramid(torch.randn(2, 3, 64, 64))).backward()
    trained = {name for name, p in pyramid.named_parameters() if p.requires_grad}
    assert {name for name, p in pyramid.named_parameters() if p.grad is not None} == trained
    assert {name.split(".")[2] for name in trained} == {"4"}
    torch.optim.SGD([p for p in pyramid.parameters() if p.requires_grad], lr=0.1).step()
    changed = {key for key, value in pyramid.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == trained


@pytest.mark.parametrize(
    ("features", "channels"), [(["efficientnet_lite0"], 432), (["efficientnet_lite0", "frozen_sam"], 528)]
)
def test_crops_have_the_features_of_two_stages_and_of_the_sam(features: list[str], channels: int) -> None:
    net = CropNet(features, dim=8, crop=96).train()
    net.load_pretrained()
    image = waves()
    pooled = net.pool(image, BOXES)
    assert pooled.shape == (3, channels, 6, 6)
    assert net.neck(pooled).shape == (3, 8)
    crops = net.cut_out(image, BOXES, net.lite0)
    fine, coarse = net.lite0.crop_maps(crops)
    torch.testing.assert_close(pooled[:, :112], fine, atol=2e-2, rtol=2e-3)
    torch.testing.assert_close(pooled[:, 112:432, ::2, ::2], coarse, atol=2e-2, rtol=2e-3)
    assert torch.equal(pooled[:, 112:432, ::2, ::2], pooled[:, 112:432, 1::2, 1::2])


def test_what_is_remembered_is_what_is_computed() -> None:
    """A training that is interrupted computes again what another one remembers."""
    net = CropNet(["efficientnet_lite0"], dim=8, crop=64).train()
    first = net.pool(waves(), BOXES)
    assert torch.equal(net.pool(waves(), BOXES), first)
    net.view_cache.views.clear()
    assert torch.equal(net.pool(waves(), BOXES), first)


def test_a_view_that_is_not_remembered_is_rounded_too() -> None:
    net = CropNet(["efficientnet_lite0"], dim=8, crop=64).train()
    first = net.pool(waves(), BOXES)
    net.view_cache = type(net.view_cache)(max_bytes=0)
    assert torch.equal(net.pool(waves(), BOXES), first)


def square_pictures(num: int) -> tuple[list[np.ndarray], list[tuple[int, int]]]:
    """(160, 224, 3) uint8 pictures with a chequered square of 64 pixels, or without; and where its corner is."""
    rng, pictures, corners = np.random.default_rng(0), [], []
    for _ in range(num):
        picture = np.full((160, 224, 3), 110, np.uint8)
        y, x = (int(rng.integers(0, side - 64)) for side in (160, 224))
        picture[y : y + 64, x : x + 64] = np.kron(np.indices((8, 8)).sum(0) % 2, np.ones((8, 8)))[..., None] * 200
        pictures.append(picture)
        corners.append((y, x))
    return pictures, corners


def test_peaks_of_class_maps_lie_on_the_object() -> None:
    """Labels say which pictures hold a square, nothing says where."""
    pictures, corners = square_pictures(12)
    empty = [np.full((160, 224, 3), value, np.uint8) for value in range(60, 180, 10)]
    torch.manual_seed(0)
    model = build_classifier("efficientnet_lite0", 2).train()
    assert isinstance(model, CamClassifier)
    model.load_pretrained()
    pixels = torch.stack([torch.from_numpy(one).permute(2, 0, 1) for one in pictures + empty]) / 127.5 - 1
    labels = torch.tensor([[1.0, 0.0]] * 12 + [[0.0, 1.0]] * 12)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    for _ in range(40):
        logits = model(pixels)
        loss = sum(torch.nn.functional.multilabel_soft_margin_loss(one, labels) for one in (logits.cls, logits.patch))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert len(model.view_cache.views) == 24
    rules = PeakPromptRules(scales=(1.0,), peaks={"coarse": PeakRule(17), "fine": PeakRule(17), "cross": PeakRule(17)})
    prompts, heatmaps = find_peak_prompts(model.eval(), pictures[0], [0], rules)
    assert prompts.probabilities[0] > 0.5 > prompts.probabilities[1]
    assert {kind: tuple(one.shape) for kind, one in heatmaps.items()} == {
        "coarse": (1, 1, 160, 224), "fine": (1, 1, 160, 224), "cross": (1, 0, 160, 224),
    }  # fmt: skip
    y, x = corners[0]
    best = prompts.points[prompts.kinds == 1][0]
    assert x - 16 <= best[0] < x + 80  # a cell has 32 pixels
    assert y - 16 <= best[1] < y + 80


def test_a_finished_classifier_is_loaded_whole(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    model = build_classifier("efficientnet_lite0", 3)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    again = load_trained(tmp_path / "model.safetensors", "efficientnet_lite0", 3)
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in again.state_dict().items())
    with pytest.raises(WeightsError, match="no finished classifier of 2 classes"):
        load_trained(tmp_path / "model.safetensors", "efficientnet_lite0", 2)
    assert depth_of("efficientnet_lite0") == 0


@pytest.mark.parametrize("model", ["faster_rcnn", "mask_rcnn"])
def test_every_trained_weight_of_a_detector_takes_part(model: str) -> None:
    net = build_to_train(DetectorSpec(model, "efficientnet_lite0", 2, frozen_stages=3)).train()
    masks = torch.zeros(1, 64, 96, dtype=torch.bool)
    masks[:, 8:40, 8:60] = True
    targets = [
        Targets(torch.tensor([[8.0, 8, 60, 40]]), torch.tensor([1]), masks),
        Targets(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)),
    ]
    losses = net.losses([waves(), waves().flip(2)], targets, 0)
    torch.stack([value for key, value in losses.items() if key.startswith("loss")]).sum().backward()
    assert [name for name, p in net.named_parameters() if p.requires_grad and p.grad is None] == []
    assert all(torch.isfinite(p.grad).all() for p in net.parameters() if p.grad is not None)
    starting = Lite0(3, shipped_state()).state_dict()
    assert torch.equal(net.state_dict()["backbone.body.lite0.stages.0.0.weight"], starting["stages.0.0.weight"])
    (found, _) = net.eval().detect([waves(), waves()])
    assert found.boxes.shape[1] == 4
