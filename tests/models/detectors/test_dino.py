"""DINO: its geometry, its queries and who sees whom, its losses, and that it learns."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import box_convert

from tests.models.pictures import learn, total
from weaksam.models.backbones.pyramids import Pyramid, ResNet50
from weaksam.models.detectors.base import Detector, Targets
from weaksam.models.detectors.dino import Dino, DinoSize
from weaksam.models.detectors.dino_denoising import FILLER, Noised, noise_objects
from weaksam.models.detectors.dino_layers import InsideNorm
from weaksam.models.detectors.dino_loss import box_losses, focal_losses, match, matched_losses
from weaksam.models.detectors.normalized_boxes import inverse_sigmoid, to_relative
from weaksam.models.noise import make_generators
from weaksam.ops.boxes import box_iou
from weaksam.ops.roi_drop import RoiDropRules

CPU = torch.device("cpu")
SIZE = DinoSize(
    dim=32, heads=4, points=2, encoder_layers=1, decoder_layers=3, ffn=48, levels=4, queries=12, num_denoising=6,
    detections=20,
)  # fmt: skip
NOTHING = Targets(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))
TWO = Targets(torch.tensor([[4.0, 4, 30, 30], [20, 20, 60, 50]]), torch.tensor([0, 2]))
ONE = Targets(torch.tensor([[30.0, 20, 46, 40]]), torch.tensor([1]))
COLOURS = torch.tensor([[230, 40, 40], [40, 220, 60], [60, 80, 240]])


class TinyPyramid(Pyramid):
    """Strides 4 to 16. Without biases padding stays zero, as it is beyond the edge."""

    channels, strides = (16, 24, 32), (4, 8, 16)

    def __init__(self, *, maps: int = 3) -> None:
        super().__init__()
        self.channels, self.strides = self.channels[:maps], self.strides[:maps]
        steps = [(3, 16, 4), (16, 24, 2), (24, 32, 2)][:maps]
        self.convs = nn.ModuleList(nn.Conv2d(i, o, step + 1, step, step // 2, bias=False) for i, o, step in steps)

    def forward(self, pixels: Tensor) -> list[Tensor]:
        return list(itertools.accumulate(self.convs, lambda x, conv: F.relu(conv(x)), initial=pixels))[1:]


def make_image(height: int = 64, width: int = 64, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8)


def make_dino(size: DinoSize = SIZE, **options) -> Dino:
    """A small one in which everything matters: no weight is zero any more."""
    torch.manual_seed(0)
    net = Dino(TinyPyramid(), 3, size, **options)
    with torch.no_grad():
        for p in net.parameters():
            p += 0.05 * torch.randn_like(p)
    return net


def draw_rectangles(num: int = 4, side: int = 64) -> tuple[list[Tensor], list[Targets]]:
    """Images with two or three coloured rectangles each that do not overlap; the colour is the class."""
    generator = torch.Generator().manual_seed(3)
    images, targets = [], []
    for _ in range(num):
        image = torch.randint(90, 130, (3, side, side), generator=generator, dtype=torch.uint8)
        boxes: list[list[int]] = []
        while len(boxes) < 2 + len(images) % 2:
            w, h = (int(torch.randint(12, 30, (), generator=generator)) for _ in range(2))
            x, y = (int(torch.randint(0, side - n, (), generator=generator)) for n in (w, h))
            box = torch.tensor([[x, y, x + w, y + h]]).float()
            if not boxes or box_iou(box, torch.tensor(boxes).float()).max() == 0:
                boxes.append([x, y, x + w, y + h])
        classes = torch.randint(3, (len(boxes),), generator=generator)
        for (x, y, right, bottom), label in zip(boxes, classes, strict=True):
            image[:, y:bottom, x:right] = COLOURS[label][:, None, None]
        images.append(image)
        targets.append(Targets(torch.tensor(boxes).float(), classes))
    return images, targets


def check_learnt(net: Detector, images: list[Tensor], targets: list[Targets]) -> None:
    """Every object is among the best detections, with its class."""
    for found, wanted in zip(net.detect(images), targets, strict=True):
        best = slice(len(wanted.classes))
        overlap = box_iou(wanted.boxes, found.boxes[best]) * (wanted.classes[:, None] == found.classes[best])
        assert overlap.amax(1).min() > 0.7
        assert found.scores[best].min() > 0.3


def make_noised(targets: list[Targets], size: int = 64, queries: int = 6) -> Noised:
    known = [to_relative(one, (size, size)) for one in targets]
    generators = make_generators(range(len(targets)), CPU)
    noised = noise_objects(known, generators, 3, queries=queries, label_noise=0.5, box_noise=1.0)
    assert noised is not None
    return noised


def test_noisy_queries_come_in_groups_of_near_and_far_copies() -> None:
    noised = make_noised([TWO, NOTHING, ONE], queries=300)
    assert noised.objects.shape == (3, 600)
    assert noised.num_groups.tolist() == [150, 1, 300]
    assert noised.objects[0, :8].tolist() == [0, 1, -1, -1, 0, 1, -1, -1]
    assert noised.groups[0, :8].tolist() == [0] * 4 + [1] * 4
    assert (noised.groups[1] == FILLER).all()
    assert (noised.objects[1] == -1).all()
    box = to_relative(ONE, (64, 64)).boxes[0]
    wanted = box_convert(box, "cxcywh", "xyxy")
    moved = box_convert(noised.references[2].sigmoid(), "cxcywh", "xyxy") - wanted
    shift = (moved / (box[2:].repeat(2) / 2)).abs()
    near = noised.objects[2] == 0
    assert shift[near].max() < 1
    assert shift[near].mean() == pytest.approx(0.5, abs=0.05)
    is_whole = noised.references[2].sigmoid()[:, 2] > 0.002  # sides that moved past each other leave next to nothing
    assert shift[~near & is_whole, 0].min() > 0.99
    redrawn = (noised.classes[2] != 1).float().mean()
    assert redrawn == pytest.approx(0.25 * 2 / 3, abs=0.05)


def test_more_objects_than_noisy_queries_make_one_group() -> None:
    many = Targets(ONE.boxes.repeat(9, 1), ONE.classes.repeat(9))
    noised = make_noised([many, NOTHING])
    assert noised.objects.shape == (2, 18)
    assert noised.num_groups.tolist() == [1, 1]
    generators = make_generators([0, 1], CPU)
    assert noise_objects([NOTHING, NOTHING], generators, 3, queries=6, label_noise=0.5, box_noise=1.0) is None


def test_a_noisy_query_is_seen_by_its_group_alone() -> None:
    net = make_dino()
    batch = net.normaliser([make_image(), make_image(seed=1)])
    noised, num = make_noised([TWO, ONE]), SIZE.queries
    plain, before = net(batch), net(batch, noised)
    references, classes = noised.references.clone(), noised.classes.clone()
    changed = noised.groups == 1
    references[changed] += 1.0
    classes[changed] = (classes[changed] + 1) % 3
    after = net(batch, noised._replace(references=references, classes=classes))
    for values, news, olds in zip(before.logits, after.logits, plain.logits, strict=True):
        torch.testing.assert_close(news[:, :num], values[:, :num], rtol=0, atol=1e-6)
        torch.testing.assert_close(olds, values[:, :num], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(news[:, num:][~changed], values[:, num:][~changed], rtol=0, atol=1e-6)
        assert (news[:, num:][changed] - values[:, num:][changed]).abs().amax(1).min() > 1e-3
    assert not noised.visible(num)[0, 0, :num, num:].any()
    assert noised.visible(num)[:, 0, :, :num].all()


def test_noisy_queries_see_the_others() -> None:
    net = make_dino()
    batch, noised = net.normaliser([make_image()]), make_noised([TWO])
    before = net(batch, noised).logits[-1][:, SIZE.queries :]
    with torch.no_grad():
        net.content.weight += torch.randn_like(net.content.weight)
    assert (net(batch, noised).logits[-1][:, SIZE.queries :] - before).abs().amax(2).min() > 1e-4


def test_a_layer_learns_from_its_boxes_and_the_next_ones_alone() -> None:
    net = make_dino(dataclasses.replace(SIZE, decoder_layers=4))
    answers = net(net.normaliser([make_image()]))
    heads = [head.layers[-1].bias for head in net.decoder.box_heads]  # pyright: ignore
    for layer, boxes in enumerate(answers.boxes):
        grads = torch.autograd.grad(boxes.sum(), heads, retain_graph=True, allow_unused=True)
        reached = [k for k, grad in enumerate(grads) if grad is not None and grad.abs().sum() > 0]
        assert reached == [k for k in (layer - 1, layer) if k >= 0]
    chosen = torch.autograd.grad(answers.boxes[0].sum(), list(net.proposal_box.parameters()), allow_unused=True)
    assert all(grad is None for grad in chosen)


def test_the_encoders_heads_learn() -> None:
    net = make_dino()
    loss = net.losses([make_image()], [TWO], 0)["loss_encoder"]
    heads = [*net.proposal.parameters(), *net.proposal_class.parameters(), *net.proposal_box.parameters()]
    assert all(grad.abs().sum() > 0 for grad in torch.autograd.grad(loss, heads))


@pytest.mark.parametrize("targets", [[TWO, ONE], [NOTHING, ONE], [NOTHING, NOTHING]])
@pytest.mark.parametrize("num_denoising", [6, 0])
def test_every_weight_takes_part_in_every_step(targets: list[Targets], num_denoising: int) -> None:
    net = make_dino(dataclasses.replace(SIZE, num_denoising=num_denoising))
    losses = net.losses([make_image(), make_image(48, 80, seed=1)], targets, 0)
    assert set(losses) == {f"loss_{kind}" for kind in ("class", "box", "giou", "aux", "encoder", "denoising")}
    assert all(torch.isfinite(value) for value in losses.values())
    total(losses).backward()
    for name, p in net.named_parameters():
        assert p.grad is not None, name
        assert torch.isfinite(p.grad).all(), name


def test_losses_of_a_batch_are_the_sum_of_its_images() -> None:
    """With the noise on: each image has a generator of its own, so it is the same in a batch and apart.

    Sizes and numbers of objects differ, so padding and filler are there.
    """
    net = make_dino(boxes_per_image=2.5)
    images, targets = [make_image(), make_image(48, 100, seed=1), make_image(60, 50, seed=2)], [TWO, ONE, ONE]
    together = net.losses(images, targets, 0, make_generators(range(3), CPU))
    rows = zip(images, targets, make_generators(range(3), CPU), strict=True)
    apart = [net.losses([image], [target], 0, [generator]) for image, target, generator in rows]
    for name, value in together.items():
        torch.testing.assert_close(value, sum(one[name] for one in apart), rtol=1e-4, atol=1e-5)


def test_losses_are_divided_by_the_boxes_per_image() -> None:
    images, targets, net = [make_image()], [TWO], make_dino()
    torch.manual_seed(5)
    ones = net.losses(images, targets, 0)
    net.boxes_per_image = 4.0
    torch.manual_seed(5)
    for name, value in net.losses(images, targets, 0).items():
        torch.testing.assert_close(value * 4, ones[name])


def test_detections_do_not_depend_on_a_larger_image_beside() -> None:
    net = make_dino().eval()
    small = make_image(40, 56)
    (alone,), (beside, _) = net.detect([small]), net.detect([small, make_image(120, 90, seed=1)])
    torch.testing.assert_close(beside.boxes, alone.boxes, rtol=0, atol=1e-3)
    torch.testing.assert_close(beside.scores, alone.scores, rtol=1e-4, atol=1e-6)
    assert torch.equal(beside.classes, alone.classes)


def test_detections_are_inside_the_image_and_best_first() -> None:
    net = make_dino().eval()
    images = [make_image(40, 56), make_image(70, 33, seed=1)]
    for image, found in zip(images, net.detect(images), strict=True):
        assert found.boxes.shape == (SIZE.detections, 4)
        assert found.boxes.dtype == torch.float32
        assert found.classes.dtype == torch.int64
        height, width = image.shape[1:]
        assert found.boxes.min() >= 0
        assert (found.boxes <= torch.tensor([width, height, width, height])).all()
        assert (found.boxes[:, 2:] >= found.boxes[:, :2]).all()
        assert (found.scores.diff() <= 0).all()
        assert ((found.scores > 0) & (found.scores < 1)).all()
        assert 0 <= found.classes.min() <= found.classes.max() < 3


def test_an_image_may_have_fewer_cells_than_there_are_queries() -> None:
    net = make_dino(dataclasses.replace(SIZE, queries=100, detections=400)).eval()
    image = make_image(16, 12)
    (found,) = net.detect([image])
    assert len(found.boxes) == 300
    answers = net(net.normaliser([image]))
    assert (answers.chosen.logits == -30).all(2).sum() > 40
    total(net.losses([image], [Targets(torch.tensor([[2.0, 2, 9, 9]]), torch.tensor([1]))], 0)).backward()


@pytest.mark.parametrize(("maps", "levels"), [(1, 1), (1, 3), (2, 4), (3, 2), (3, 5)])
def test_any_pyramid_and_any_number_of_levels(maps: int, levels: int) -> None:
    torch.manual_seed(0)
    net = Dino(TinyPyramid(maps=maps), 3, dataclasses.replace(SIZE, levels=levels))
    images = [make_image(), make_image(72, 40, seed=1)]
    assert torch.isfinite(total(net.losses(images, [TWO, ONE], 0)))
    assert len(net.levels.strides) == levels
    assert len(net.eval().detect(images)) == 2


def test_it_runs_in_bfloat16() -> None:
    net = make_dino()
    with torch.autocast("cpu", torch.bfloat16):
        losses = net.losses([make_image()], [TWO], 0)
    assert all(value.dtype == torch.float32 for value in losses.values())
    total(losses).backward()
    assert torch.isfinite(total(losses))


def test_normalisation_leaves_padding_out() -> None:
    norm, x = InsideNorm(4, 8), torch.randn(2, 8, 6, 5) * 3 + 1
    nn.init.uniform_(norm.weight)
    nn.init.uniform_(norm.bias)
    plain = nn.GroupNorm(4, 8)
    plain.load_state_dict(norm.state_dict())
    inside = torch.zeros(2, 6, 5, dtype=torch.bool)
    inside[0], inside[1, :4, :3] = True, True
    normed = norm(x, inside)
    torch.testing.assert_close(normed[0], plain(x[:1])[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(normed[1, :, :4, :3], plain(x[1:, :, :4, :3])[0], rtol=1e-4, atol=1e-5)
    assert (normed[1, :, 4:] == 0).all()


def test_the_inverse_sigmoid_bounds_a_share_and_its_rest_each_on_its_own() -> None:
    shares = torch.tensor([-1.0, 0.0, 1e-4, 0.2, 0.5, 0.9999, 1.0, 2.0])
    for eps in (1e-3, 1e-5):
        inside = [min(max(one, 0.0), 1.0) for one in shares.double().tolist()]
        wanted = [math.log(max(one, eps) / max(1 - one, eps)) for one in inside]
        torch.testing.assert_close(inverse_sigmoid(shares, eps), torch.tensor(wanted), rtol=1e-4, atol=1e-5)
    assert inverse_sigmoid(torch.tensor(0.0)).item() == pytest.approx(math.log(1e-3))  # not log(1e-3 / 0.999)
    assert inverse_sigmoid(torch.tensor([1.0]).bfloat16()).dtype == torch.float32


def test_answers_and_references_are_moved_as_published() -> None:
    """An answer starts from its reference bounded by 1e-5, the next reference by 1e-3."""
    net = make_dino().eval()
    decoder = net.decoder
    for layer in decoder.layers:
        layer.forward = lambda queries, *_, **__: queries
    batch = net.normaliser([make_image()])
    cells = net.levels(net.pyramid(batch.pixels)[-net.num_maps :], batch)
    queries, start = torch.randn(1, 4, 32), torch.tensor([[[-9.0, 9.0, 0.5, -1.0]]]).expand(1, 4, 4)
    _, boxes = decoder(queries, start, torch.zeros(1, 1, 32), cells, None)
    normed, reference, before = decoder.norm(queries), start.sigmoid(), start.sigmoid()
    for move, found in zip(decoder.box_heads, boxes, strict=True):
        torch.testing.assert_close(found, (move(normed) + inverse_sigmoid(before, 1e-5)).sigmoid())
        before = reference = (move(queries) + inverse_sigmoid(reference, 1e-3)).sigmoid()


def test_detections_are_ordinary_tensors() -> None:
    (found,) = make_dino().eval().detect([make_image()])
    assert not any(part.is_inference() for part in found[:3])


def test_focal_loss_is_the_plain_formula() -> None:
    logits, labels = torch.randn(5, 3), torch.tensor([0, -1, 2, -1, 1])
    losses = focal_losses(logits, labels)
    for row, label, loss in zip(logits, labels, losses, strict=True):
        told = 0.0
        for c, p in enumerate(row.sigmoid().tolist()):
            p_right, alpha = (p, 0.25) if c == label else (1 - p, 0.75)
            told -= alpha * (1 - p_right) ** 2 * torch.tensor(p_right).log().item()
        assert loss.item() == pytest.approx(told, rel=1e-4)


def test_box_losses_are_the_plain_formulas() -> None:
    boxes, wanted = torch.tensor([[0.5, 0.5, 0.4, 0.2]]), torch.tensor([[0.6, 0.6, 0.2, 0.4]])
    l1, giou = box_losses(boxes, wanted)
    assert l1.item() == pytest.approx(0.6)
    shared, union, around = 0.2 * 0.2, 0.08 + 0.08 - 0.04, 0.4 * 0.4  # x 0.3..0.7, y 0.4..0.8
    assert giou.item() == pytest.approx(1 - (shared / union - (around - union) / around), rel=1e-4)


def test_matching_is_the_cheapest_of_all() -> None:
    torch.manual_seed(0)
    logits, boxes = torch.randn(2, 5, 3), torch.rand(2, 5, 4) * 0.4 + 0.2
    targets = [to_relative(TWO, (64, 64)), to_relative(ONE, (64, 64))]
    pairs = match(logits, boxes, targets)
    assert pairs.image.tolist() == [0, 0, 1]
    for i, one in enumerate(targets):
        costs = {}
        for queries in itertools.permutations(range(5), len(one.classes)):
            cost = 0.0
            for query, label, box in zip(queries, one.classes.tolist(), one.boxes, strict=True):
                p = logits[i, query, label].sigmoid().item()
                l1, giou = box_losses(boxes[i, query][None], box[None])
                focal = -0.25 * (1 - p) ** 2 * torch.tensor(p).log() + 0.75 * p**2 * torch.tensor(1 - p).log()
                cost += 2 * focal.item() + 5 * l1.item() + 2 * giou.item()
            costs[queries] = cost
        mine = pairs.image == i
        best = dict(zip(pairs.query[mine].tolist(), pairs.boxes[mine].tolist(), strict=True))
        for query, box in zip(min(costs, key=costs.__getitem__), one.boxes, strict=True):
            assert best[query] == pytest.approx(box.tolist())


def test_a_dropped_query_counts_nothing_and_what_is_left_weighs_as_before() -> None:
    torch.manual_seed(0)
    logits, boxes, known = torch.randn(1, 6, 3), torch.rand(1, 6, 4) * 0.4 + 0.2, [to_relative(TWO, (64, 64))]
    plain = matched_losses(logits, boxes, known, RoiDropRules(), 0)
    pairs = match(logits, boxes, known)
    labels = torch.full((1, 6), -1)
    labels[0, pairs.query] = pairs.classes
    focal, (l1, giou) = focal_losses(logits, labels), box_losses(boxes[0, pairs.query], pairs.boxes)
    matched = focal[0, pairs.query]
    assert plain.classes.item() == pytest.approx(focal.sum().item())
    worst = float(matched.max())
    rules = RoiDropRules("cls", cls_threshold=float(matched.mean()), start=3)
    early, late = (matched_losses(logits, boxes, known, rules, step) for step in (2, 3))
    assert early == plain
    assert late.classes.item() == pytest.approx(focal.sum().item() - worst, rel=1e-4)
    assert (late.boxes, late.giou) == (plain.boxes, plain.giou)
    assert (int(late.dropped_classes), int(late.dropped_boxes)) == (1, 0)
    late = matched_losses(logits, boxes, known, RoiDropRules("reg", reg_threshold=float(l1.mean()), start=0), 0)
    kept = int(l1.argmin())
    assert late.classes == plain.classes
    assert late.boxes.item() == pytest.approx(5 * l1[kept].item(), rel=1e-4)
    assert late.giou.item() == pytest.approx(2 * giou[kept].item(), rel=1e-4)
    assert int(late.dropped_boxes) == 1


def test_drops_are_told_and_touch_matched_queries_of_the_decoder_alone() -> None:
    net = make_dino(drop=RoiDropRules("independent", cls_threshold=0.0, reg_threshold=0.0, start=0))
    images = [make_image()]
    torch.manual_seed(5)
    told = net.losses(images, [TWO], 0)
    assert int(told["dropped_class"]) == int(told["dropped_box"]) == 2 * SIZE.decoder_layers
    assert told["loss_box"] == told["loss_giou"] == 0
    net.drop = RoiDropRules()
    torch.manual_seed(5)
    plain = net.losses(images, [TWO], 0)
    assert "dropped_class" not in plain
    assert (plain["loss_encoder"], plain["loss_denoising"]) == (told["loss_encoder"], told["loss_denoising"])
    assert plain["loss_class"] > told["loss_class"] > 0


def test_weights_go_there_and_back() -> None:
    net, torn = make_dino().eval(), Dino(TinyPyramid(), 3, SIZE).eval()
    torn.load_state_dict(net.state_dict())
    image = make_image()
    torch.testing.assert_close(torn.detect([image])[0], net.detect([image])[0])


def test_the_published_size_has_the_published_weights() -> None:
    net = Dino(ResNet50(), 80)
    assert net.levels.strides == [8, 16, 32, 64]
    millions = sum(p.numel() for p in net.parameters()) / 1e6
    assert millions == pytest.approx(47.7, abs=0.3)  # arXiv 2203.03605, table 1: 47M
    assert len(list(net.backbone_parameters())) == len(list(net.pyramid.parameters()))
    assert net.proposal_class.bias.sigmoid().detach().tolist() == pytest.approx([0.01] * 80)


@pytest.mark.slow
def test_it_learns_a_few_images_by_heart() -> None:
    images, targets = draw_rectangles()
    torch.manual_seed(0)
    size = dataclasses.replace(SIZE, decoder_layers=2, levels=3, queries=16, num_denoising=4)
    net = Dino(TinyPyramid(), 3, size, boxes_per_image=2.5)
    learn(net, images, targets, steps=250, lr=4e-3)
    check_learnt(net, images, targets)
