"""The published sizes of the Segment Anything architecture, and one small enough to ship; imports no torch."""

from __future__ import annotations

from dataclasses import dataclass


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
    has_conv_stem: bool = False  # patches embedded by `ConvStem` instead of one product
    weight_bytes: float = 0.0  # of the weights file, roughly; 0 = unknown

    @property
    def embedding_side(self) -> int:
        """Side of the square image embedding, tokens."""
        return self.image_size // self.patch_size

    @property
    def low_res_side(self) -> int:
        """Side of the masks the decoder gives before they are enlarged, pixels."""
        return 4 * self.embedding_side


VARIANTS: dict[str, SamVariant] = {
    "vit_h": SamVariant(1280, 32, 16, (7, 15, 23, 31), weight_bytes=2.6e9),
    "vit_l": SamVariant(1024, 24, 16, (5, 11, 17, 23), weight_bytes=1.3e9),
    "vit_b": SamVariant(768, 12, 12, (2, 5, 8, 11), weight_bytes=0.4e9),
    "vit_xs": SamVariant(
        160,
        6,
        5,
        (1, 3, 5),
        window_size=8,
        image_size=256,
        prompt_dim=96,
        decoder_mlp_dim=192,
        decoder_heads=3,
        iou_head_hidden_dim=96,
        has_conv_stem=True,
        weight_bytes=0.01e9,
    ),
}
