"""Data that all prompts on one image share: image tokens, projected once by the mask decoder.

`decoder` explains the symbols. The model's weights are used unchanged. Products of weights (a few 100 kB) are formed
for each image, so that no copy is stale after a `Sam` is moved, trained or reloaded.

Axis legend: H heads, d channels of a head, D = H d, C channels, N image tokens, n tokens inside the unpadded image,
u channels after the first upscaling.
"""

# segment_anything declares no attribute types, so to a type checker each of its weights is "Tensor | Module".
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportOperatorIssue=false, reportIndexIssue=false, reportGeneralTypeIssues=false, reportReturnType=false

from __future__ import annotations

from dataclasses import dataclass

from segment_anything.modeling import Sam
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Reader:
    """Image side of a token-to-image attention: keys and values of the image tokens.

    Attributes:
        key: (H, d, N) keys without the part that changes per prompt.
        key_pe: (H, d, N) part of the keys from the positional encoding; None where `key` holds it already.
        value: (H, N, d).
        value_bias: (D,) common part of the values; None where `key_pe` is None, `value` then holds it.
    """

    key: Tensor
    key_pe: Tensor | None
    value: Tensor
    value_bias: Tensor | None


@dataclass(frozen=True)
class Layer:
    """Image side of one decoder layer: token-to-image attention, image-to-token attention, the norm after it.

    Attributes:
        read: token-to-image attention.
        query: (H, d, N) image tokens as queries to the prompt tokens, without the part that changes per prompt.
        query_pe: (H, d, N) part of the queries from the positional encoding; None where `query` holds it already.
        square: (N,) squared length of the centred image tokens that go into the norm.
        eps: eps of the norm.
    """

    read: Reader
    query: Tensor
    query_pe: Tensor | None
    square: Tensor
    eps: float


@dataclass(frozen=True)
class ImageSide:
    """Data that all prompts on one image share.

    Attributes:
        layers: the two decoder layers.
        final: the final token-to-image attention.
        cross: (H, d, N) three projections of the image tokens for the cross terms of the variances: layer 0's
            update in layer 0, layer 0's update in layer 1, layer 1's update in layer 1.
        cross_bias: (N,) cross term of the constant row.
        writers: (C, D) centred output projections of the updates, in the order of `cross`.
        bias: (C,) the constant row of U.
        upscaled: (n, 4 u) image tokens after the first transposed convolution.
        upscaled_bias: (4 u,) common part of `upscaled`.
        embedding_hw: all tokens, (rows, columns).
        grid_hw: tokens inside the unpadded image, (rows, columns).
    """

    layers: tuple[Layer, Layer]
    final: Reader
    cross: tuple[Tensor, Tensor, Tensor]
    cross_bias: Tensor
    writers: tuple[Tensor, Tensor, Tensor]
    bias: Tensor
    upscaled: Tensor
    upscaled_bias: Tensor
    embedding_hw: tuple[int, int]
    grid_hw: tuple[int, int]


def make_image_side(sam: Sam, embedding: Tensor, grid_hw: tuple[int, int]) -> ImageSide:
    """Projects one image's tokens for all its prompts.

    Args:
        embedding: (C, h, w) output of the image encoder.
        grid_hw: tokens inside the unpadded image, (rows, columns), at most (h, w).
    """
    transformer = sam.mask_decoder.transformer
    first, second = transformer.layers
    side = embedding.shape[1:]
    pe = sam.prompt_encoder.get_dense_pe()[0].flatten(1).T
    keys = embedding.flatten(1).T + sam.prompt_encoder.no_mask_embed.weight

    write0, write1 = first.cross_attn_image_to_token, second.cross_attn_image_to_token
    writer0, writer1 = _centred(write0.out_proj.weight, 0), _centred(write1.out_proj.weight, 0)
    gain0, bias0 = first.norm4.weight, first.norm4.bias
    tokens0 = _centred(keys + write0.out_proj.bias, 1)
    scaled = tokens0 * gain0  # input of layer 1, without r1 and the prompt's own part
    writer01 = _centred(gain0[:, None] * writer0, 0)
    tokens1 = _centred(scaled, 1)
    bias = _centred(bias0 + write1.out_proj.bias, 0)
    last = tokens1 * second.norm4.weight

    layer0 = Layer(
        read=_first_reader(first.cross_attn_token_to_image, keys, pe),
        query=_queries(F.linear(keys + pe, write0.q_proj.weight, write0.q_proj.bias), write0),
        query_pe=None,
        square=tokens0.square().sum(1),
        eps=first.norm4.eps,
    )
    query_bias = F.linear(bias0, write1.q_proj.weight, write1.q_proj.bias)
    layer1 = Layer(
        read=_reader(second.cross_attn_token_to_image, scaled, pe, bias0),
        query=_queries(F.linear(scaled, write1.q_proj.weight), write1),
        query_pe=_queries(F.linear(pe, write1.q_proj.weight) + query_bias, write1),
        square=tokens1.square().sum(1),
        eps=second.norm4.eps,
    )
    rows, columns = grid_hw
    upscaling = sam.mask_decoder.output_upscaling[0]
    matrix = upscaling_matrix(upscaling)
    inside = last.unflatten(0, side)[:rows, :columns].flatten(0, 1)
    return ImageSide(
        layers=(layer0, layer1),
        final=_reader(transformer.final_attn_token_to_image, last, pe, second.norm4.bias),
        cross=(
            _queries(tokens0 @ writer0, write0),
            _queries(tokens1 @ writer01, write0),
            _queries(tokens1 @ writer1, write1),
        ),
        cross_bias=tokens1 @ bias,
        writers=(writer0, writer01, writer1),
        bias=bias,
        upscaled=inside @ matrix,
        upscaled_bias=second.norm4.bias @ matrix + upscaling.bias.repeat(4),
        embedding_hw=tuple(side),
        grid_hw=grid_hw,
    )


def upscaling_matrix(convolution: nn.ConvTranspose2d) -> Tensor:
    """Returns a 2 x 2 transposed convolution of stride 2 as (channels in, 4 * channels out), sub-pixels first."""
    return convolution.weight.permute(0, 2, 3, 1).flatten(1)


def _centred(x: Tensor, dim: int) -> Tensor:
    return x - x.mean(dim, keepdim=True)


def _queries(x: Tensor, attention: nn.Module) -> Tensor:
    """Reshapes (N, D) to (H, d, N)."""
    return x.T.unflatten(0, (attention.num_heads, -1)).contiguous()


def _values(x: Tensor, attention: nn.Module) -> Tensor:
    """Reshapes (N, D) to (H, N, d)."""
    return x.unflatten(1, (attention.num_heads, -1)).transpose(0, 1).contiguous()


def _first_reader(attention: nn.Module, keys: Tensor, pe: Tensor) -> Reader:
    """Returns the image side of layer 0's token-to-image attention, which is independent of the prompt."""
    key = _queries(F.linear(keys + pe, attention.k_proj.weight, attention.k_proj.bias), attention)
    value = _values(F.linear(keys, attention.v_proj.weight, attention.v_proj.bias), attention)
    return Reader(key=key, key_pe=None, value=value, value_bias=None)


def _reader(attention: nn.Module, tokens: Tensor, pe: Tensor, bias: Tensor) -> Reader:
    """Returns the image side of attention to `tokens` times a scale per token, plus `bias`, plus the prompt's own part.

    The common part of all keys is left out: it cancels in the softmax over the image.
    """
    return Reader(
        key=_queries(F.linear(tokens, attention.k_proj.weight), attention),
        key_pe=_queries(F.linear(pe, attention.k_proj.weight), attention),
        value=_values(F.linear(tokens, attention.v_proj.weight), attention),
        value_bias=F.linear(bias, attention.v_proj.weight, attention.v_proj.bias),
    )
