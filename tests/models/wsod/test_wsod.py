"""The weakly supervised detector: backbones, dropblock, heads, losses and the training task."""

from __future__ import annotations

import dataclasses
import functools
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.models import resnet50, vgg16
from torchvision.ops import clip_boxes_to_image, roi_align, roi_pool

from weaksam.data.proposal_boxes import ProposalBoxes
from weaksam.models.backbones.pyramids import SamPyramid
from weaksam.models.backbones.roi_backbones import CropNet, DilatedVgg16, ResNet50C5, RoiNet, load_imagenet
from weaksam.models.noise import SampleNoise, dropout, make_generators
from weaksam.models.wsod.build import WsodSpec
from weaksam.models.wsod.dropblock import ConcreteDropBlock
from weaksam.models.wsod.network import METHODS, WsodNet, forward_losses, wsod_losses
from weaksam.ops import mil
from weaksam.ops.box_coding import decode_boxes
from weaksam.ops.boxes import box_iou
from weaksam.training.wsod_task import WsodRecipe, WsodTask

POOL = ThreadPoolExecutor(2)
CPU = torch.device("cpu")
BOXES = torch.tensor([[4.0, 4, 30, 30], [10, 12, 50, 40], [0, 0, 64, 48], [33, 3, 60, 20], [20, 20, 44, 44]])


def make_image(seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (3, 48, 64), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def make_noise(seeds: list[int], sizes: list[int]) -> SampleNoise:
    return SampleNoise(make_generators(seeds, CPU), sizes)


def make_net(method: str = "mist", *, dropblock: bool = False, classes: int = 3) -> WsodNet:
    torch.manual_seed(0)
    network = CropNet(dim=64)
    network.sam.load_shipped()
    return WsodNet(network, classes, METHODS[method], dropblock=dropblock)


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


def test_noise_of_a_sample_does_not_depend_on_its_neighbours() -> None:
    alone = make_noise([7], [3]).uniform(2)
    among = make_noise([5, 7, 9], [2, 3, 1]).uniform(2)
    torch.testing.assert_close(among[2:5], alone)
    x = torch.ones(4000, 10)
    dropped = dropout(x, make_noise([1], [4000]))
    assert set(dropped.unique().tolist()) == {0.0, 2.0}
    assert dropped.mean().item() == pytest.approx(1, abs=0.05)
    assert dropout(x, None) is x


def test_dropblock_drops_blocks_and_learns_to_raise_the_loss() -> None:
    torch.manual_seed(0)
    block = ConcreteDropBlock(4)
    pooled = torch.rand(60, 4, 7, 7, requires_grad=True)
    noise = functools.partial(make_noise, [1, 2], [40, 20])
    keep = block.draw(pooled.detach(), noise())
    assert set(keep.unique().tolist()) == {0.0, 1.0}
    assert 0.02 < 1 - keep.mean().item() < 0.3
    for one in keep[:, 0][keep[:, 0].amin((1, 2)) == 0]:  # every hole holds a whole block, or one cut by the border
        holes = 1 - one
        eroded = -torch.nn.functional.max_pool2d(-torch.nn.functional.pad(holes, (1, 1, 1, 1), value=1)[None], 3, 1)
        opened = torch.nn.functional.max_pool2d(eroded, 3, 1, padding=1)[0]
        torch.testing.assert_close(opened, holes)
    dropped = block(pooled, noise(), learns=True)
    first = dropped[:40]
    assert first[first > 0].numel() / first.numel() == pytest.approx(keep[:40].mean().item(), abs=1e-6)
    dropped.sum().backward()
    reversed_grad = block.shortcut.weight.grad.clone()
    block.zero_grad()
    scaled = torch.cat([one * one.numel() / one.sum() for one in block.draw(pooled.detach(), noise()).split([40, 20])])
    (pooled.detach() * scaled).sum().backward()
    torch.testing.assert_close(reversed_grad, -block.shortcut.weight.grad)
    block.zero_grad()
    block(pooled, noise(), learns=False).sum().backward()
    assert block.shortcut.weight.grad is None


@pytest.mark.parametrize("second_pass", [False, True])
def test_the_detector_lowers_what_the_dropblock_raises(second_pass: bool) -> None:
    net = make_net(dropblock=True)
    noise = make_noise([3], [5])
    losses, adverse = forward_losses(net, [make_image()], [BOXES], [torch.tensor([1])], noise, second_pass=second_pass)
    total = torch.stack(list(losses[0].values())).sum() + adverse - adverse.detach()
    total.backward()
    assert all((p.grad is not None) == p.requires_grad for p in net.parameters())
    assert net.dropblock.shortcut.weight.grad.abs().sum() > 0
    if second_pass:  # the detector's gradient is the first pass's alone
        learnt = {name: p for name, p in net.named_parameters() if p.requires_grad and not name.startswith("dropblock")}
        others = [p.grad.clone() for p in learnt.values()]
        net.zero_grad()
        noise = make_noise([3], [5])
        (found,) = net.heads(net.pool([make_image()], [BOXES]), [5], noise)
        torch.stack(list(wsod_losses(found, BOXES, torch.tensor([1]), net.rules).values())).sum().backward()
        torch.testing.assert_close(others, [p.grad for p in learnt.values()])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("present", [[], [1], [0, 1, 2]])
@pytest.mark.parametrize("num", [1, 3, 5])
def test_losses_are_finite_whatever_the_image_holds(method: str, present: list[int], num: int) -> None:
    net = make_net(method)
    classes = torch.tensor(present, dtype=torch.int64)
    losses, _ = forward_losses(net, [make_image()], [BOXES[:num]], [classes], make_noise([0], [num]))
    total = torch.stack(list(losses[0].values())).sum()
    total.backward()
    assert total.isfinite()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters() if p.requires_grad)


def test_mining_and_loss_of_oicr_are_those_of_its_published_code() -> None:
    """Overlaps without "+1" for mining and assignment, and a millionth more in the loss of every head."""
    net = make_net("oicr")
    (found,) = net.heads(net.pool([make_image()], [BOXES]), [5])
    present, ends = torch.tensor([0, 2]), BOXES - torch.tensor([0.0, 0, 1, 1])
    source, total = mil.wsddn_scores(found.cls, found.det), 0.0
    for logits in found.refine:
        targets = mil.assign(box_iou(ends, ends), mil.mine_near_top(BOXES, source, present))
        p = logits.softmax(1)[torch.arange(5), targets.labels]
        total += (-(p + 1e-6).log() * targets.weights).mean().item()
        source = logits.softmax(1)[:, 1:]
    losses = wsod_losses(found, BOXES, present, net.rules)
    assert losses["refine_loss"].item() == pytest.approx(total, rel=1e-5)
    assert set(losses) == {"image_loss", "refine_loss"}


def test_one_box_layer_for_all_classes_learns_from_the_last_pseudo_boxes() -> None:
    torch.manual_seed(0)
    rules = dataclasses.replace(METHODS["oicr"], shared_boxes=True)
    net = WsodNet(CropNet(dim=16), 3, rules)
    nn.init.normal_(net.bbox_pred.weight, std=0.5)
    found = net.heads(net.pool([make_image(), make_image(1)], [BOXES, BOXES[:2]]), [5, 2])
    assert [one.shared.shape for one in found] == [(5, 4), (2, 4)]
    losses = wsod_losses(found[0], BOXES, torch.tensor([1]), rules)
    ends = BOXES - torch.tensor([0.0, 0, 1, 1])
    targets = mil.assign(
        box_iou(ends, ends), mil.mine_near_top(BOXES, found[0].refine[1].softmax(1)[:, 1:], torch.tensor([1]))
    )
    torch.testing.assert_close(losses["box_loss"], 30 * mil.shared_regression_loss(found[0].shared, BOXES, targets))
    losses["box_loss"].backward()
    assert net.bbox_pred.weight.grad.abs().sum() > 0
    scores, moved = net.eval().detect(make_image(), BOXES)
    assert scores.shape == (5, 3)
    assert torch.equal(moved[:, 0], moved[:, 2])
    with torch.no_grad():
        (again,) = net.heads(net.pool([make_image()], [BOXES]), [5])
    wanted = clip_boxes_to_image(decode_boxes(again.shared, BOXES), (48, 64))
    torch.testing.assert_close(moved[:, 1], wanted)
    assert not torch.allclose(wanted, BOXES)


def test_a_prior_of_the_proposals_shifts_the_detection_stream_alone() -> None:
    net = make_net()
    (found,) = net.heads(net.pool([make_image()], [BOXES]), [5])
    prior = torch.tensor([0.0, -50, -50, -50, -50])
    losses = wsod_losses(found, BOXES, torch.tensor([1]), net.rules, prior)
    alone = mil.image_loss(found.cls[:1].softmax(1), torch.tensor([1]), background=True)
    torch.testing.assert_close(losses["image_loss"], alone)
    same = wsod_losses(found, BOXES, torch.tensor([1]), net.rules, torch.full((5,), -3.0))
    torch.testing.assert_close(same, wsod_losses(found, BOXES, torch.tensor([1]), net.rules))


def test_ratings_are_the_prior_of_what_is_left_of_the_proposals(task: WsodTask) -> None:
    boxes, ratings = task._boxes.of(0, min_side=4)
    ratings[:] = np.linspace(0, 1, len(boxes))
    rated = dataclasses.replace(task._boxes, boxes=boxes, ratings=ratings, starts=np.array([0, len(boxes)]))
    task = dataclasses.replace(
        task, read_boxes=lambda: rated, recipe=dataclasses.replace(task.recipe, rating_power=2.0)
    )
    prior = task.load_batch(np.array([0]), np.zeros((1, 3), int), POOL)["prior/0"]
    torch.testing.assert_close(prior.exp(), torch.from_numpy(ratings).clamp(min=0.01) ** 2)


def test_detections_are_the_mean_of_the_heads() -> None:
    net = make_net().eval()
    scores, boxes = net.detect(make_image(), BOXES)
    x = net.roi_net.neck(net.roi_net.pool(make_image(), BOXES))
    wanted = sum(getattr(net, f"ref{k}")(x).softmax(1) for k in (1, 2, 3))[:, 1:] / 3
    torch.testing.assert_close(scores, wanted)
    assert boxes.shape == (5, 3, 4)
    assert boxes.min() >= 0
    assert (boxes <= torch.tensor([64.0, 48, 64, 48])).all()
    _, still = make_net("oicr").detect(make_image(), BOXES)
    torch.testing.assert_close(still[:, 0], BOXES)


@pytest.fixture
def task(tmp_path: Path) -> WsodTask:
    """20 grey images; class 0 is a red disc somewhere, class 1 a blue square; most proposals miss them."""
    rng = np.random.default_rng(0)
    uris, labels, boxes = [], np.zeros((20, 2), bool), []
    for i in range(20):
        pixels = rng.integers(90, 160, (64, 80, 3)).astype(np.uint8)
        labels[i] = [i % 3 != 1, i % 3 != 0]
        here = [[*(corner := rng.integers(0, [60, 44])), *(corner + rng.integers(8, 20, 2))] for _ in range(10)]
        for label in np.flatnonzero(labels[i]):
            x, y = (int(v) for v in rng.integers(0, [60, 44]))
            patch = pixels[y : y + 18, x : x + 18]
            inside = (
                np.hypot(*(np.indices(patch.shape[:2]) - 8.5)) < 9 if label == 0 else np.ones(patch.shape[:2], bool)
            )
            patch[inside] = [[220, 30, 30], [30, 30, 220]][label]
            here.append([x, y, x + patch.shape[1], y + patch.shape[0]])
        boxes.append(np.array(here, np.float32))
        uris.append(str(tmp_path / f"{i}.png"))
        Image.fromarray(pixels).save(uris[-1])
    every = np.concatenate(boxes)
    packed = ProposalBoxes(
        every,
        np.full(len(every), 0.5, np.float32),
        np.cumsum([0, *map(len, boxes)]),
        np.full((20, 2), [64, 80], np.int32),
    )
    recipe = WsodRecipe(scales=(64,), min_side=4, optimizer="adamw")
    make = functools.partial(_two_class_net, "mist")
    return WsodTask(make, uris, labels, functools.partial(_same, packed), recipe)


class LearntCrops(RoiNet):
    """A backbone that learns from its first layer on: twenty images are too few for a long vector of features."""

    pooled_channels, dim = 3, 256

    def __init__(self) -> None:
        super().__init__()
        layers = []
        for before, after in ((3, 8), (8, 16), (16, 32)):
            layers += [nn.Conv2d(before, after, 3, padding=1), nn.GroupNorm(8, after), nn.ReLU(), nn.MaxPool2d(2)]
        self.layers = nn.Sequential(*layers, nn.Flatten(), nn.Linear(512, self.dim))

    def pool(self, image: Tensor, boxes: Tensor) -> Tensor:
        margin = 0.1 * (boxes[:, 2:] - boxes[:, :2])
        rois = torch.cat([boxes[:, :2] - margin, boxes[:, 2:] + margin], 1)
        return roi_align(self.normalise(image), [rois], (32, 32), aligned=True)

    def neck(self, pooled: Tensor, noise: SampleNoise | None = None) -> Tensor:
        return dropout(self.layers(pooled).relu(), noise)


def _two_class_net(method: str) -> WsodNet:
    return WsodNet(LearntCrops(), 2, METHODS[method])


def _same(boxes: ProposalBoxes) -> ProposalBoxes:
    return boxes


@pytest.mark.parametrize("flip", [True, False])
def test_images_are_mirrored_half_of_the_time_or_never(task: WsodTask, flip: bool) -> None:
    task = dataclasses.replace(task, recipe=dataclasses.replace(task.recipe, flip=flip))
    seeds = np.stack([np.zeros(16, np.int64), np.arange(16), np.full(16, 3)], 1)
    batch = task.load_batch(np.full(16, 3), seeds, POOL)
    plain = torch.from_numpy(np.asarray(Image.open(task.uris[3])).transpose(2, 0, 1).copy())
    is_plain = [torch.equal(batch[f"image/{i}"], plain) for i in range(16)]
    mirrored = [torch.equal(batch[f"image/{i}"], plain.flip(2)) for i in range(16)]
    assert all(a != b for a, b in zip(is_plain, mirrored, strict=True))
    assert (4 <= sum(mirrored) <= 12) if flip else not any(mirrored)


@pytest.mark.parametrize("method", METHODS)
def test_twenty_images_are_overfitted(task: WsodTask, method: str) -> None:
    torch.manual_seed(1)
    task = dataclasses.replace(task, make_net=functools.partial(_two_class_net, method))
    model = task.build_model()
    optimizer = task.build_optimizer(model, lr=2e-3, weight_decay=0.0)
    for step in range(60):
        seeds = np.stack([np.full(20, step), np.zeros(20, int), np.arange(20)], 1)
        loss, _ = task.loss(model, task.load_batch(np.arange(20), seeds, POOL))
        optimizer.zero_grad()
        (loss / 20).backward()
        optimizer.step()
    hits = 0
    for i in range(20):
        boxes = torch.from_numpy(task._boxes.of(i, min_side=4)[0])
        image = torch.from_numpy(np.asarray(Image.open(task.uris[i])).transpose(2, 0, 1).copy())
        scores, _ = model.eval().detect(image, boxes)
        classes = np.flatnonzero(task.labels[i])  # the last proposals are the objects, in the order of their classes
        wanted = [len(boxes) - len(classes) + k for k in range(len(classes))]
        hits += sum(int(scores[:, label].argmax() == row) for label, row in zip(classes, wanted, strict=True))
    assert hits >= 0.9 * task.labels.sum()


def test_the_loss_of_a_batch_is_the_sum_over_its_images(task: WsodTask) -> None:
    model = task.build_model()
    indices, seeds = np.arange(4), np.arange(12).reshape(4, 3)
    total, sums = task.loss(model, task.load_batch(indices, seeds, POOL))
    parts = [task.loss(model, task.load_batch(indices[i : i + 1], seeds[i : i + 1], POOL))[0] for i in range(4)]
    torch.testing.assert_close(total, torch.stack(parts).sum())
    assert set(sums) == {"image_loss", "refine_loss", "box_loss"}


def test_a_broken_image_counts_for_nothing(task: WsodTask) -> None:
    Path(task.uris[1]).write_bytes(b"junk")
    model = task.build_model()
    batch = task.load_batch(np.arange(3), np.zeros((3, 3), np.int64), POOL)
    assert batch["weight"].tolist() == [1, 0, 1]
    both = [task.loss(model, task.load_batch(np.array([i]), np.zeros((1, 3), np.int64), POOL))[0] for i in (0, 2)]
    torch.testing.assert_close(task.loss(model, batch)[0], torch.stack(both).sum())


def test_muon_takes_the_trained_matrices_of_the_backbone(task: WsodTask) -> None:
    recipe = dataclasses.replace(task.recipe, optimizer="muon")
    task = dataclasses.replace(
        task, recipe=recipe, make_net=WsodSpec("frozen_sam", 2, METHODS["oicr"]).with_starting_weights
    )
    model = task.build_model()
    optimizer = task.build_optimizer(model, lr=1.0, weight_decay=0.5)
    named = {id(p): name for name, p in model.named_parameters()}
    decayed = {named[id(p)] for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    assert decayed == {"roi_net.first.weight", "roi_net.second.weight"}
    learnt = {named[id(p)] for group in optimizer.param_groups for p in group["params"]}
    assert learnt == {name for name, p in model.named_parameters() if p.requires_grad}


def test_biases_learn_twice_as_fast_and_do_not_decay(task: WsodTask) -> None:
    task = dataclasses.replace(task, recipe=dataclasses.replace(task.recipe, optimizer="adam", refine_lr=10.0))
    model = task.build_model()
    optimizer = task.build_optimizer(model, lr=1.0, weight_decay=0.5)
    found = {id(g["params"][0]): (g["lr"], g["weight_decay"]) for g in optimizer.param_groups}
    wanted = {"cls_score.weight": (1.0, 0.5), "cls_score.bias": (2.0, 0.0), "ref2.weight": (10.0, 0.5)}
    named = dict(model.named_parameters())
    assert {key: found[id(named[key])] for key in wanted} == wanted
