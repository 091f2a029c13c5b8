"""Training the small segmenter: the shortcut forward, prompts and targets, the loss, and that it learns at all."""

from __future__ import annotations

import copy
import dataclasses
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from segment_anything.modeling import Sam

from weaksam.demo.sam_training import SegmenterTask, export_weights, initialise, label_cells
from weaksam.demo.sam_training_forward import (
    CELL_PIXELS,
    PROMPT_ABSENT,
    PROMPT_PAD,
    PROMPT_POSITIVE,
    embed_prompts,
    encode_images,
    predict_cells,
    run_decoder,
)
from weaksam.demo.sam_training_loss import Hints, mask_losses, segmentation_loss
from weaksam.demo.sam_training_prompts import PromptMix, choose_cells, draw_prompts, pack, shrink
from weaksam.demo.sam_training_scores import score_segmenter
from weaksam.errors import ConfigError
from weaksam.sam.build import build_sam
from weaksam.sam.variants import VARIANTS
from weaksam.training.optimizers import Muon, MuonAdamW, orthogonalise

POOL = ThreadPoolExecutor(1)
TINY = dataclasses.replace(
    VARIANTS["vit_xs"],
    encoder_dim=32,
    encoder_depth=2,
    encoder_heads=2,
    global_attn_indexes=(1,),
    prompt_dim=48,
    decoder_mlp_dim=48,
    iou_head_hidden_dim=32,
)


@pytest.fixture(params=[True, False], ids=["conv stem", "patches"])
def tiny(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Sam:
    monkeypatch.setitem(VARIANTS, "tiny", dataclasses.replace(TINY, has_conv_stem=request.param))
    torch.manual_seed(0)
    sam = build_sam("tiny")
    initialise(sam)
    for block in sam.image_encoder.blocks:
        torch.nn.init.normal_(block.attn.rel_pos_h, std=0.3)
        torch.nn.init.normal_(block.attn.rel_pos_w, std=0.3)
    return sam


@pytest.fixture
def cache(tmp_path: Path) -> str:
    """Two scenes of 256 px: a bright square with a darker half, on noise."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 60, (2, 256, 256, 3), dtype=np.uint8)
    objects, parts = np.zeros((2, 256, 256), np.uint8), np.zeros((2, 256, 256), np.uint8)
    for i, (top, left) in enumerate([(40, 60), (120, 100)]):
        objects[i, top : top + 80, left : left + 80] = 1
        parts[i, top : top + 80, left : left + 80] = 1
        parts[i, top : top + 40, left : left + 80] = 2
        images[i][objects[i] > 0] += 120
        images[i][parts[i] == 2] += 60
    for name, value in (("images", images), ("objects", objects), ("parts", parts)):
        np.save(tmp_path / f"{name}.npy", value)
    return str(tmp_path)


def test_published_sizes_have_published_shapes():
    counts = {"vit_b": 93_735_472, "vit_xs": 2_472_260}
    for name, count in counts.items():
        with torch.device("meta"):
            sam = build_sam(name)
        assert sum(p.numel() for p in sam.parameters()) == count
        assert not sam.training
    assert VARIANTS["vit_xs"].low_res_side == 64
    with pytest.raises(ConfigError, match="unknown SAM model 'vit_xxl': choose one of vit_h, vit_l, vit_b, vit_xs"):
        build_sam("vit_xxl")


@torch.no_grad()
def test_the_shortcut_gives_what_sam_gives(tiny: Sam):
    pixels, points = torch.randn(2, 3, 256, 256), torch.rand(2, 3, 1, 2) * 256
    embedding = tiny.image_encoder(pixels)
    fast = encode_images(tiny.image_encoder, pixels, torch.float32)
    torch.testing.assert_close(fast, embedding.flatten(2).transpose(1, 2), rtol=1e-3, atol=1e-4)
    labels = torch.tensor([PROMPT_POSITIVE, PROMPT_PAD, PROMPT_ABSENT]).expand(2, 3, 3)
    prompts = embed_prompts(tiny.prompt_encoder, torch.cat([points, torch.zeros(2, 3, 2, 2)], 2), labels)
    where = tiny.prompt_encoder.get_dense_pe()[0].flatten(1).t()
    image = fast + tiny.prompt_encoder.no_mask_embed.weight
    tokens, cells = run_decoder(tiny.mask_decoder, image, where, prompts, labels)
    logits, predicted = predict_cells(tiny.mask_decoder, tokens, cells)
    masks = torch.zeros(2, 3, 4, 16, 4, 16, 4)
    for k, (row, column) in enumerate(CELL_PIXELS):
        masks[:, :, :, :, row, :, column] = logits[:, :, :, k].transpose(2, 3).unflatten(-1, (16, 16))
    masks = masks.flatten(5, 6).flatten(3, 4)
    for b in range(2):
        sparse, dense = tiny.prompt_encoder((points[b], torch.ones(3, 1)), None, None)
        wanted, wanted_iou = tiny.mask_decoder(
            image_embeddings=embedding[b : b + 1],
            image_pe=tiny.prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=True,
        )
        torch.testing.assert_close(masks[b, :, 1:], wanted, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(predicted[b, :, 1:], wanted_iou, rtol=1e-3, atol=1e-4)


def test_perfect_masks_cost_nothing_and_the_best_of_three_counts():
    targets = torch.rand(1, 1, 2, 6, 16) > 0.5
    logits = torch.zeros(1, 1, 6, 16, 4)
    logits[..., 2] = torch.where(targets[:, :, 0], 20.0, -20.0)  # mask 2 is target 0, mask 1 its opposite
    logits[..., 1] = -logits[..., 2]
    weights = torch.ones(1, 1, 6)
    losses, ious = mask_losses(logits, targets, weights)
    assert losses[0, 0, 0, 2] < 1e-3
    assert ious[0, 0, 0].tolist()[1:3] == [0, 1]
    batch = {"targets": targets, "cell_weights": weights, "is_ambiguous": torch.tensor([[True]])}
    batch["has_target"] = torch.tensor([[[True, False]]])
    total, watched = segmentation_loss(logits, ious[:, :, 0], batch)  # a network that knows what it reached
    assert total < 1e-3
    assert watched["point_iou"] == 1
    batch["is_ambiguous"] = torch.tensor([[False]])  # then mask 0 must answer, and it does not
    assert segmentation_loss(logits, ious[:, :, 0], batch)[1]["mask_loss"] > 0.5


def test_points_on_nothing_teach_that_nothing_is_there():
    logits = torch.full((1, 1, 4, 16, 4), 5.0, requires_grad=True)
    predicted = torch.full((1, 1, 4), 0.9, requires_grad=True)
    batch = {"targets": torch.zeros(1, 1, 2, 4, 16, dtype=torch.bool), "cell_weights": torch.ones(1, 1, 4)}
    batch |= {"has_target": torch.zeros(1, 1, 2, dtype=torch.bool), "is_ambiguous": torch.tensor([[True]])}
    total, _ = segmentation_loss(logits, predicted, batch)
    total.backward()
    assert total.item() == pytest.approx(0.81)
    assert not logits.grad.any()
    assert predicted.grad[0, 0].tolist() == pytest.approx([0, 0.6, 0.6, 0.6])


def test_sampled_cells_stand_for_the_whole_picture():
    coverage = np.zeros((16, 16), bool)
    coverage[4:6, 4:6] = True
    cells, weights = choose_cells(np.random.default_rng(0), coverage, 64)
    assert len(set(cells.tolist())) == 64
    assert weights.sum() == pytest.approx(256)
    assert set(np.flatnonzero(coverage)) <= set(cells.tolist())  # few enough to be looked at entirely
    everything, ones = choose_cells(np.random.default_rng(0), ~np.zeros((16, 16), bool), 64)
    assert len(everything) == 64
    assert ones.tolist() == [4.0] * 64


def test_prompts_are_packed_with_their_targets(cache: str):
    objects, parts = (np.load(f"{cache}/{name}.npy")[0] for name in ("objects", "parts"))
    rng, mix = np.random.default_rng(0), PromptMix(points=2, background=1, boxes=1, pairs=1)
    questions = draw_prompts(rng, objects, parts, mix)
    row = pack(rng, questions, side=16, patch=16, count=256)
    assert row["labels"].tolist() == [[1, -1, -2], [1, -1, -2], [1, -1, -2], [2, 3, -2], [1, 1, -1]]
    assert row["has_target"].tolist() == [[True, True], [True, True], [False, False], [True, False], [True, False]]
    assert row["is_ambiguous"].tolist() == [True, True, True, False, False]
    for p in (0, 1):
        x, y = row["coords"][p, 0].astype(int)
        assert objects[y, x] == 1
        whole = np.zeros((16, 16, 4, 4), bool)
        for k, (r, c) in enumerate(CELL_PIXELS):
            whole.reshape(256, 4, 4)[row["cells"][p], r, c] = row["targets"][p, 0, :, k]
        assert np.array_equal(whole.transpose(0, 2, 1, 3).reshape(64, 64), shrink(objects == 1, 4))
    x, y = row["coords"][2, 0].astype(int)
    assert objects[y, x] == 0


def test_pictures_without_objects_or_without_background():
    rng = np.random.default_rng(0)
    empty, full = np.zeros((256, 256), np.uint8), np.ones((256, 256), np.uint8)
    for labels in (empty, full):
        row = pack(rng, draw_prompts(rng, labels, labels, PromptMix()), side=16, patch=16, count=64)
        assert row["has_target"][:, 0].all() == labels.any()
        assert (row["labels"][:, 0] >= 0).all()


def test_hints_know_cells_of_one_object_from_others():
    objects = np.zeros((32, 32), np.uint8)
    objects[:16, :16], objects[16:, 16:28] = 1, 2  # the second ends amid a cell
    parts = np.where(np.arange(32)[None] < 4, 2 * objects, objects)
    cells = {key: torch.from_numpy(value)[None] for key, value in label_cells(objects, parts, 8).items()}
    assert cells["cell_labels"][0].tolist() == [1, 1, 0, 0, 1, 1, 0, 0, 0, 0, 2, -1, 0, 0, 2, -1]
    thing, its_outline, part_outline = cells["cell_pixels"][0, 11].reshape(3, 4, 4)
    assert thing.tolist() == [[True, True, False, False]] * 4
    assert its_outline.tolist() == part_outline.tolist() == [[False, True, False, False]] * 4
    assert cells["cell_pixels"][0, 4].reshape(3, 4, 4)[:, 1].tolist() == [
        [True] * 4,
        [False] * 4,
        [False, True, False, False],
    ]
    hints = Hints(3, width=3)
    torch.nn.init.eye_(hints.together.weight)
    torch.nn.init.zeros_(hints.together.bias)
    right = torch.eye(3)[cells["cell_labels"].clamp(min=0)]
    wrong = torch.eye(3)[torch.arange(16) % 3][None]
    assert hints(right, **cells)[0] < 0.2 < hints(wrong, **cells)[0]


@pytest.mark.parametrize(("capability", "tolerance"), [("AVX512", 0.0), ("AVX2", 0.02)])
def test_muon_is_torchs_also_where_bf16_is_imitated(monkeypatch, capability: str, tolerance: float):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    weights = []
    for kind in (Muon, torch.optim.Muon):
        torch.manual_seed(0)
        layers = torch.nn.Sequential(torch.nn.Linear(24, 8, bias=False), torch.nn.Linear(8, 12, bias=False))
        more = {"adjust_lr_fn": "match_rms_adamw"} if kind is torch.optim.Muon else {}
        optimizer = kind(list(layers.parameters()), lr=0.02, weight_decay=0.1, **more)
        for _ in range(3):
            (layers(torch.ones(2, 24)) - 1).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        weights.append([layer.weight.detach() for layer in layers])
    for ours, theirs in zip(*weights, strict=True):
        assert (ours - theirs).abs().max() <= tolerance
    values = torch.linalg.svdvals(orthogonalise(torch.randn(6, 20, generator=torch.Generator().manual_seed(1))))
    assert values.min() > 0.5
    assert values.max() < 1.4


def test_both_optimisers_go_on_where_they_stopped():
    def build() -> tuple[torch.nn.Linear, MuonAdamW]:
        torch.manual_seed(0)
        layer = torch.nn.Linear(4, 3)
        return layer, MuonAdamW([layer.weight], [layer.bias], lr=0.1, weight_decay=0.1)

    def step(layer: torch.nn.Linear, optimizer: MuonAdamW, factor: float) -> None:
        for group in optimizer.param_groups:
            group["lr"] = 0.1 * factor
        layer(torch.arange(8.0).view(2, 4)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    layer, optimizer = build()
    start = layer.weight.detach().clone()
    step(layer, optimizer, 1.0)
    assert not torch.equal(layer.weight, start)
    resumed, other = build()
    resumed.load_state_dict(layer.state_dict())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for pair in ((layer, optimizer), (resumed, other)):
        step(*pair, factor=0.5)
    assert torch.equal(resumed.weight, layer.weight)
    assert torch.equal(resumed.bias, layer.bias)
    assert [group["lr"] for group in other.param_groups] == [0.05, 0.05]


@pytest.mark.slow
@pytest.mark.parametrize("tiny", [True], ids=["conv stem"], indirect=True)
@pytest.mark.usefixtures("tiny")
def test_it_learns_two_scenes(cache: str):
    task = SegmenterTask(cache, variant="tiny", cells=64, mix=PromptMix(3, 1, 1, 1))
    model = task.build_model()
    optimizer = task.build_optimizer(model, lr=6e-3, weight_decay=0.0)
    losses = []
    for _ in range(25):
        batch = task.load_batch(np.arange(2), np.array([[0, 0, 0], [0, 0, 1]]), POOL)
        loss, watched = task.loss(model, batch)
        loss.backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)  # DDP waits for every one
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert watched["point_iou"] / 2 > 0.6


def test_exported_weights_load_and_score(tiny: Sam, cache: str, tmp_path: Path):
    path = tmp_path / "weights" / "tiny.safetensors"
    export_weights(tiny.state_dict(), path, {"licence": "Apache-2.0"})
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"licence": "Apache-2.0"}
    tiny.load_state_dict(load_file(path))
    assert [p.name for p in path.parent.iterdir()] == ["tiny.safetensors"]
    scores = score_segmenter(tiny, cache)
    assert scores["objects"] == 2
    assert all(0 <= scores[key] <= 1 for key in ("point_iou", "point_iou_chosen", "box_iou"))
    assert scores["point_iou"] >= scores["point_iou_chosen"]
