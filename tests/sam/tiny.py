"""A SAM small enough for tests: the architecture classes of `segment_anything`, 128 px input, 16 x 16 tokens."""

from __future__ import annotations

from functools import partial

import torch
from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer

IMAGE_SIDE, PATCH = 128, 8


def build_tiny_sam(*, seed: int = 0, channels: int = 32, heads: int = 4, mlp_dim: int = 48) -> Sam:
    """Random weights, in eval mode, without gradients."""
    torch.manual_seed(seed)
    tokens = IMAGE_SIDE // PATCH
    encoder = ImageEncoderViT(
        depth=2,
        embed_dim=32,
        img_size=IMAGE_SIDE,
        mlp_ratio=2,
        norm_layer=partial(torch.nn.LayerNorm, eps=1e-6),
        num_heads=2,
        patch_size=PATCH,
        qkv_bias=True,
        use_rel_pos=True,
        global_attn_indexes=(1,),
        window_size=6,
        out_chans=channels,
    )
    prompt_encoder = PromptEncoder(
        embed_dim=channels,
        image_embedding_size=(tokens, tokens),
        input_image_size=(IMAGE_SIDE, IMAGE_SIDE),
        mask_in_chans=4,
    )
    decoder = MaskDecoder(
        num_multimask_outputs=3,
        transformer=TwoWayTransformer(depth=2, embedding_dim=channels, mlp_dim=mlp_dim, num_heads=heads),
        transformer_dim=channels,
        iou_head_depth=3,
        iou_head_hidden_dim=24,
    )
    return Sam(encoder, prompt_encoder, decoder).eval().requires_grad_(False)


def shake(sam: Sam) -> Sam:
    """Gives biases and norm weights random values, so that no term of the algebra hides behind a zero or a one."""
    for parameter in sam.mask_decoder.parameters():
        if parameter.ndim == 1:
            parameter.add_(0.2 * torch.randn_like(parameter))
        else:
            parameter.mul_(1.5)
    return sam
