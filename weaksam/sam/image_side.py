"""What every prompt on one image shares: the image tokens, projected by the mask decoder's weights once.

`decoder` explains the symbols. Weights of the model go in unchanged; products of weights (a few 100 kB) are formed here
for each image, so that a `Sam` that is moved, trained or reloaded is never out of step with a copy.

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
    """Image side of an attention in which prompt tokens read the image.

    Attributes:
        key: (H, d, N) keys without the part that changes per prompt.
        key_pe: (H, d, N) part of the keys from the positional encoding; None where `key` holds it already.
        value: (H, N, d).
        value_bias: (D,) what the values have in common, already in `value` where `key_pe` is None.
    """

    key: Tensor
    key_pe: Tensor | None
    value: Tensor
    value_bias: Tensor | None


@dataclass(frozen=True)
class Layer:
    """Image side of one decoder layer: the reading attention, the writing attention, the norm after it.

    Attributes:
        read: prompt tokens read the image.
        query: (H, d, N) image tokens as queries to the prompt tokens, without the part that changes per prompt.
        query_pe: (H, d, N) part of it from the positional encoding; None where `query` holds it already.
        square: (N,) squared length of the centred image tokens that go into the norm.
        eps: of the norm.
    """

    read: Reader
    query: Tensor
    query_pe: Tensor | None
    square: Tensor
    eps: float


@dataclass(frozen=True)
class ImageSide:
    """All that prompts on one image share.

    Attributes:
        layers: the two decoder layers.
        final: the last reading attention.
        cross: (H, d, N) three projections of the image tokens for the cross terms of the variances: layer 0's
            update in layer 0, layer 0's update in layer 1, layer 1's update in layer 1.
        cross_bias: (N,) cross term of the constant row.
        writers: (C, D) centred output projections to go with `cross`.
        bias: (C,) the constant row of U.
        upscaled: (n, 4 u) image tokens after the first transposed convolution.
        upscaled_bias: (4 u,) what they have in common.
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
    scaled = tokens0 * gain0  # into layer 1, up to r1 and the prompt's own part
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
    """A 2 x 2 transposed convolution of stride 2 as a matrix: (channels in, 4 * channels out), sub-pixels first."""
    return convolution.weight.permute(0, 2, 3, 1).flatten(1)


def _centred(x: Tensor, dim: int) -> Tensor:
    return x - x.mean(dim, keepdim=True)


def _queries(x: Tensor, attention: nn.Module) -> Tensor:
    """(N, D) to (H, d, N)."""
    return x.T.unflatten(0, (attention.num_heads, -1)).contiguous()


def _values(x: Tensor, attention: nn.Module) -> Tensor:
    """(N, D) to (H, N, d)."""
    return x.unflatten(1, (attention.num_heads, -1)).transpose(0, 1).contiguous()


def _first_reader(attention: nn.Module, keys: Tensor, pe: Tensor) -> Reader:
    """Layer 0 reads the image as it is: nothing in it depends on the prompt."""
    key = _queries(F.linear(keys + pe, attention.k_proj.weight, attention.k_proj.bias), attention)
    value = _values(F.linear(keys, attention.v_proj.weight, attention.v_proj.bias), attention)
    return Reader(key=key, key_pe=None, value=value, value_bias=None)


def _reader(attention: nn.Module, tokens: Tensor, pe: Tensor, bias: Tensor) -> Reader:
    """Reads `tokens` times a scale per token, plus `bias`, plus the prompt's own part.

    What all keys have in common is left out: it cancels in the softmax over the image.
    """
    return Reader(
        key=_queries(F.linear(tokens, attention.k_proj.weight), attention),
        key_pe=_queries(F.linear(pe, attention.k_proj.weight), attention),
        value=_values(F.linear(tokens, attention.v_proj.weight), attention),
        value_bias=F.linear(bias, attention.v_proj.weight, attention.v_proj.bias),
    )
