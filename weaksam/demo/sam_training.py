"""Training SAM on scenes with known objects and parts: a task of the training loop. Does not depend on the cluster.

In: a folder of memory-mapped scenes (`images.npy`, `objects.npy`, `parts.npy`) of the model's image size.
Out: a `TrainTask`.
"""

from __future__ import annotations

from concurrent.futures import Executor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from segment_anything.modeling import Sam
from torch import Tensor, nn

from weaksam.demo.sam_training_forward import embed_prompts, encode_images, predict_cells, run_decoder
from weaksam.demo.sam_training_loss import DICE_WEIGHT, HINT_WEIGHT, Hints, segmentation_loss
from weaksam.demo.sam_training_prompts import PromptMix, Rng, draw_prompts, pack
from weaksam.demo.sam_training_scores import score_segmenter
from weaksam.sam.build import build_sam
from weaksam.sam.variants import VARIANTS
from weaksam.training.optimizers import MuonAdamW

LOCALITY = 1.7  # initial gain of the queries and keys between prompts and image
POSITION_SCALE = 2.5  # spread of the prompt positions' frequencies, so that points 10 px apart differ


class SamWithHints(nn.Module):
    """A SAM and its auxiliary heads for training."""

    def __init__(self, sam: Sam, channels: int) -> None:
        super().__init__()
        self.sam, self.hints = sam, Hints(channels)


@dataclass(frozen=True)
class SegmenterTask:
    """Class-agnostic, prompted segmentation of cached scenes."""

    scenes: str  # folder of the cache
    variant: str = "vit_xs"
    cells: int = 96  # K, cells compared per prompt
    mix: PromptMix = field(default_factory=PromptMix)
    weights: str | None = None  # safetensors to start from, with or without hints; None = random
    dice_weight: float = DICE_WEIGHT
    held_out: str | None = None  # folder of the cache to validate on

    @cached_property
    def _maps(self) -> list[np.ndarray]:
        return [np.load(Path(self.scenes) / f"{name}.npy", mmap_mode="r") for name in ("images", "objects", "parts")]

    def __getstate__(self) -> dict:
        return {key: value for key, value in self.__dict__.items() if key != "_maps"}

    @property
    def num_samples(self) -> int:
        """Number of scenes of the cache."""
        return len(self._maps[0])

    def name_of(self, index: int) -> str:
        """Returns the name of a scene."""
        return f"scene {index}"

    def build_model(self) -> SamWithHints:
        """Returns the network to train, from `weights` or at random."""
        sam = build_sam(self.variant)
        initialise(sam)
        model = SamWithHints(sam, VARIANTS[self.variant].prompt_dim)
        if self.weights:
            state = load_file(self.weights)
            has_hints = any(key.startswith("sam.") for key in state)
            (model if has_hints else sam).load_state_dict(state)
        for parameter in sam.prompt_encoder.mask_downscaling.parameters():
            parameter.requires_grad_(False)  # there are no mask prompts
        return model.train()

    def build_optimizer(self, model: nn.Module, *, lr: float, weight_decay: float) -> torch.optim.Optimizer:
        """Returns Muon for the weights of linear layers, AdamW for the other weights."""
        linear = [cast(nn.Parameter, m.weight) for m in model.modules() if isinstance(m, nn.Linear)]
        kept = {id(p) for p in linear}
        others = [p for p in model.parameters() if p.requires_grad and id(p) not in kept]
        return MuonAdamW(linear, others, lr=lr, weight_decay=weight_decay)

    def load_batch(self, indices: np.ndarray, seeds: np.ndarray, pool: Executor) -> dict[str, Tensor]:
        """Returns pictures, prompts and targets of the scenes `indices`; `seeds` determine the prompts."""
        # without the pool: nothing is decoded, and the many small operations hold the GIL
        rows = [self._load(int(i), np.random.default_rng(seed)) for i, seed in zip(indices, seeds, strict=True)]
        return {key: torch.from_numpy(np.stack([row[key] for row in rows])) for key in rows[0]}

    def _load(self, index: int, rng: Rng) -> dict[str, np.ndarray]:
        size = VARIANTS[self.variant]
        image, objects, parts = augment(rng, *(np.asarray(m[index]) for m in self._maps))
        prompts = draw_prompts(rng, objects, parts, self.mix)
        row = pack(rng, prompts, side=size.embedding_side, patch=size.patch_size, count=self.cells)
        return {**row, **label_cells(objects, parts, size.patch_size), "image": np.ascontiguousarray(image)}

    def loss(self, model: SamWithHints, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the sum over images of the loss, and sums of metrics."""
        embedding, logits, predicted_iou = run_sam(model.sam, batch, dtype=compute_dtype(batch["image"].device))
        loss, metrics = segmentation_loss(logits, predicted_iou, batch, dice_weight=self.dice_weight)
        with torch.autocast(embedding.device.type, enabled=False):
            together_loss, pixel_loss = model.hints(embedding.float(), batch["cell_labels"], batch["cell_pixels"])
        hints = {"together_loss": together_loss.detach(), "pixel_loss": pixel_loss.detach()}
        return loss + HINT_WEIGHT * (together_loss + pixel_loss), metrics | hints

    def validate(self, model: SamWithHints, pool: Executor) -> dict[str, float]:
        """Returns scores on the held-out scenes."""
        return score_segmenter(model.sam, self.held_out) if self.held_out else {}


def compute_dtype(device: torch.device) -> torch.dtype:
    """Returns the dtype of autocast on `device`, float32 where it is off."""
    if torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    return torch.float32


def run_sam(sam: Sam, batch: dict[str, Tensor], *, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Returns image embedding (B, N, C), logits (B, P, K, 16, M) in the batch's cells and predicted IoU (B, P, M)."""
    with torch.autocast(batch["image"].device.type, enabled=False):  # explicit casts need fewer copies
        mean, std = cast(Tensor, sam.pixel_mean), cast(Tensor, sam.pixel_std)
        pixels = (batch["image"].permute(0, 3, 1, 2).float() - mean) / std
        embedding = encode_images(sam.image_encoder, pixels, dtype)
        positions = sam.prompt_encoder.get_dense_pe()[0].flatten(1).t().to(dtype)
        prompts = embed_prompts(sam.prompt_encoder, batch["coords"], batch["labels"])
        image = embedding + sam.prompt_encoder.no_mask_embed.weight.to(dtype)
        tokens, cells = run_decoder(sam.mask_decoder, image, positions, prompts, batch["labels"])
        indices = batch["cells"].unsqueeze(-1).expand(-1, -1, -1, cells.shape[-1])
        return embedding, *predict_cells(sam.mask_decoder, tokens, cells.gather(2, indices))


def initialise(sam: Sam) -> None:
    """Initialises weights for training from scratch; those of `build_sam` only suit loading."""
    nn.init.trunc_normal_(cast(Tensor, sam.image_encoder.pos_embed), std=0.02)
    for module in cast(nn.Module, sam.image_encoder.blocks).modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.05)
            nn.init.zeros_(module.bias)
    cast(Tensor, sam.prompt_encoder.pe_layer.positional_encoding_gaussian_matrix).mul_(POSITION_SCALE)
    for layer in cast(list[Any], sam.mask_decoder.transformer.layers):
        for attention in (layer.cross_attn_token_to_image, layer.cross_attn_image_to_token):
            # equal initial queries and keys make a point attend to its own position from the first step on
            nn.init.orthogonal_(attention.q_proj.weight, gain=LOCALITY)
            attention.k_proj.weight.data.copy_(attention.q_proj.weight.data)


def augment(rng: Rng, image: np.ndarray, objects: np.ndarray, parts: np.ndarray) -> tuple[np.ndarray, ...]:
    """Applies one of the eight symmetries of the square, and changes light and colours."""
    if rng.random() < 0.5:
        image, objects, parts = image.transpose(1, 0, 2), objects.T, parts.T
    turn = (slice(None, None, rng.choice([-1, 1])), slice(None, None, rng.choice([-1, 1])))
    image, objects, parts = image[turn], objects[turn], parts[turn]
    if rng.random() < 0.5:
        image = image[..., rng.permutation(3)]
    if rng.random() < 0.15:
        image = np.repeat(image.mean(-1, keepdims=True), 3, -1).astype(np.uint8)
    if rng.random() < 0.5:
        table = np.arange(256)[:, None] / 255.0
        table = table ** np.exp(rng.normal(0, 0.3)) * rng.normal(1, 0.1, 3) + rng.normal(0, 0.04)
        image = np.stack([np.clip(table[:, c] * 255, 0, 255).astype(np.uint8)[image[..., c]] for c in range(3)], -1)
    return image, objects, parts


def label_cells(objects: np.ndarray, parts: np.ndarray, patch: int) -> dict[str, np.ndarray]:
    """Returns targets of the hints: `cell_labels` (N,) int64, -1 where corners differ, `cell_pixels` (N, 3, 16) bool.

    The three channels are objects, outlines of objects and outlines of parts.
    """
    near, far = patch // 8, patch - 1 - patch // 8
    corners = [objects[y::patch, x::patch].astype(np.int64) for y in (near, far) for x in (near, far)]
    labels = np.where(np.ptp(corners, axis=0) == 0, corners[0], -1)
    side, step = len(labels), patch // 4
    small = [labels_of[step // 2 :: step, step // 2 :: step] for labels_of in (objects, parts)]
    flags = np.stack([small[0] > 0, outline(small[0]), outline(small[1])])
    tiles = flags.reshape(3, side, 4, side, 4).transpose(1, 3, 0, 2, 4)
    return {"cell_labels": labels.ravel(), "cell_pixels": tiles.reshape(side * side, 3, 16)}


def outline(labels: np.ndarray) -> np.ndarray:
    """Returns (H, W) bool, pixels whose label differs from the pixel to the right or below."""
    edge = np.zeros(labels.shape, bool)
    edge[:, :-1] |= labels[:, :-1] != labels[:, 1:]
    edge[:-1] |= labels[:-1] != labels[1:]
    return edge


def sam_weights(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns the SAM's weights from the weights of a `SamWithHints`."""
    return {key.removeprefix("sam."): value for key, value in state.items() if key.startswith("sam.")}


def export_weights(state: dict[str, Tensor], path: str | Path, about: dict[str, str]) -> None:
    """Writes weights as float16 safetensors in one atomic step, with `about` as the file's metadata."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    half = {key: value.detach().cpu().to(torch.float16).contiguous() for key, value in state.items()}
    temporary = path.with_name(f".{path.name}.tmp")
    save_file(half, temporary, metadata=about)
    temporary.chmod(0o644)
    temporary.replace(path)
