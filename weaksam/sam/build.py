"""The Segment Anything architecture in its published sizes, and one small enough to ship.

The modules are `segment_anything`'s own, so official checkpoints load key by key. `vit_xs` is the embedded default:
256 px pictures and 8 px patches (32 x 32 tokens, 128 x 128 low-resolution masks), because with 16 px patches the
masks of small objects are a handful of cells.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer

from weaksam.errors import ConfigError

PIXEL_MEAN = (123.675, 116.28, 103.53)  # RGB, of 0..255
PIXEL_STD = (58.395, 57.12, 57.375)


@dataclass(frozen=True)
class SamVariant:
    """One size of SAM. The defaults are what all published sizes share."""

    encoder_dim: int
    encoder_depth: int
    encoder_heads: int
    global_attn_indexes: tuple[int, ...]  # blocks that see the whole picture, the others see a window
    window_size: int = 14  # tokens
    image_size: int = 1024  # side of the padded square picture, pixels
    patch_size: int = 16  # pixels
    prompt_dim: int = 256  # channels of the image embedding and of prompts
    decoder_mlp_dim: int = 2048
    decoder_heads: int = 8
    iou_head_hidden_dim: int = 256

    @property
    def embedding_side(self) -> int:
        """Side of the square image embedding, tokens."""
        return self.image_size // self.patch_size

    @property
    def low_res_side(self) -> int:
        """Side of the masks the decoder gives before they are enlarged, pixels."""
        return 4 * self.embedding_side


VARIANTS: dict[str, SamVariant] = {
    "vit_h": SamVariant(1280, 32, 16, (7, 15, 23, 31)),
    "vit_l": SamVariant(1024, 24, 16, (5, 11, 17, 23)),
    "vit_b": SamVariant(768, 12, 12, (2, 5, 8, 11)),
    "vit_xs": SamVariant(
        128,
        6,
        2,
        (2, 5),
        window_size=8,
        image_size=256,
        patch_size=8,
        prompt_dim=96,
        decoder_mlp_dim=192,
        decoder_heads=3,
        iou_head_hidden_dim=96,
    ),
}


def build_sam(variant: str) -> Sam:
    """A SAM of the named variant with random weights, in eval mode, on the CPU.

    Raises:
        ConfigError: no such variant.
    """
    if variant not in VARIANTS:
        raise ConfigError(f"unknown SAM model {variant!r}: choose one of {', '.join(VARIANTS)}")
    size = VARIANTS[variant]
    sam = Sam(
        image_encoder=_build_encoder(size),
        prompt_encoder=PromptEncoder(
            embed_dim=size.prompt_dim,
            image_embedding_size=(size.embedding_side, size.embedding_side),
            input_image_size=(size.image_size, size.image_size),
            mask_in_chans=16,
        ),
        mask_decoder=MaskDecoder(
            num_multimask_outputs=3,
            transformer=TwoWayTransformer(
                depth=2, embedding_dim=size.prompt_dim, mlp_dim=size.decoder_mlp_dim, num_heads=size.decoder_heads
            ),
            transformer_dim=size.prompt_dim,
            iou_head_depth=3,
            iou_head_hidden_dim=size.iou_head_hidden_dim,
        ),
        pixel_mean=list(PIXEL_MEAN),
        pixel_std=list(PIXEL_STD),
    )
    return sam.eval()


def _build_encoder(size: SamVariant) -> ImageEncoderViT:
    return ImageEncoderViT(
        depth=size.encoder_depth,
        embed_dim=size.encoder_dim,
        img_size=size.image_size,
        mlp_ratio=4,
        norm_layer=partial(torch.nn.LayerNorm, eps=1e-6),
        num_heads=size.encoder_heads,
        patch_size=size.patch_size,
        qkv_bias=True,
        use_rel_pos=True,
        global_attn_indexes=size.global_attn_indexes,
        window_size=size.window_size,
        out_chans=size.prompt_dim,
    )
