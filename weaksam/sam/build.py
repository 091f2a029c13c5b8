"""The Segment Anything architecture, built in one of the sizes of `variants`.

The modules are `segment_anything`'s own, so official checkpoints load key by key. `vit_xs` is the embedded default:
256 px pictures, 16 x 16 tokens, 64 x 64 low-resolution masks. Only its patch embedding is not SAM's: three small
convolutions detect edges, which one product per patch learns very slowly.
"""

from __future__ import annotations

from functools import partial
from itertools import pairwise

from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer
from torch import Tensor, nn
from torch.nn import functional

from weaksam.errors import ConfigError
from weaksam.sam.variants import VARIANTS, SamVariant

PIXEL_MEAN = (123.675, 116.28, 103.53)  # RGB, of 0..255; ImageNet's
PIXEL_STD = (58.395, 57.12, 57.375)


class ConvStem(nn.Module):
    """Embeds patches by convolutions: 4 x 4 products, then 3 x 3 with stride 2 until a patch is one token.

    Takes (B, 3, H, W), returns (B, H / patch, W / patch, dim), as SAM's `PatchEmbed` does.
    """

    def __init__(self, dim: int, patch_size: int, width: int = 32) -> None:
        super().__init__()
        halvings = (patch_size // 4).bit_length() - 1
        widths = [*(width * 2**k for k in range(halvings)), dim]
        self.convs = nn.ModuleList([nn.Conv2d(3, widths[0], 4, stride=4)])
        self.convs.extend(nn.Conv2d(i, o, 3, stride=2, padding=1) for i, o in pairwise(widths))
        self.norms = nn.ModuleList(nn.LayerNorm(w, eps=1e-6) for w in widths[:-1])

    def steps(self, pixels: Tensor) -> list[Tensor]:
        """Returns (B, D, h, w) maps at stride 4, 8, ..., the patch; all but the last after the nonlinearity."""
        maps = [self.convs[0](pixels)]
        for norm, conv in zip(self.norms, self.convs[1:], strict=True):
            maps[-1] = functional.gelu(norm(maps[-1].permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
            maps.append(conv(maps[-1]))
        return maps

    def forward(self, pixels: Tensor) -> Tensor:
        return self.steps(pixels)[-1].permute(0, 2, 3, 1)


def build_sam(variant: str) -> Sam:
    """Returns a SAM of the named variant with random weights, in eval mode, on the CPU.

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
    encoder = ImageEncoderViT(
        depth=size.encoder_depth,
        embed_dim=size.encoder_dim,
        img_size=size.image_size,
        mlp_ratio=4,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),  # pyright: ignore[reportArgumentType]
        num_heads=size.encoder_heads,
        patch_size=size.patch_size,
        qkv_bias=True,
        use_rel_pos=True,
        global_attn_indexes=size.global_attn_indexes,
        window_size=size.window_size,
        out_chans=size.prompt_dim,
    )
    if size.has_conv_stem:
        encoder.patch_embed = ConvStem(size.encoder_dim, size.patch_size)  # pyright: ignore[reportAttributeAccessIssue]
    return encoder
