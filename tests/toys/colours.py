"""Colours of cells of 8 and 16 pixels."""

from weaksam.models.backbones.catalogue.kind import BackboneKind


def _crops(side):
    import torch
    import torch.nn.functional as F

    class Colours(torch.nn.Module):
        mean = std = (127.5, 127.5, 127.5)
        crop_channels, crop_strides = (3, 3), (8, 16)

        def at_once(self, device):
            return 64

        def crop_maps(self, crops):
            return [F.avg_pool2d(crops, stride) for stride in self.crop_strides]

        def load_pretrained(self):
            pass

    return Colours()


def _pyramid(frozen_stages, finest):
    import torch.nn.functional as F

    from weaksam.models.backbones.pyramids import Pyramid

    class Colours(Pyramid):
        channels, strides = (3, 3), (8, 16)

        def forward(self, pixels):
            return [F.avg_pool2d(pixels, stride) for stride in self.strides]

        def load_pretrained(self):
            pass

    return Colours()


KIND = BackboneKind("colours", "mean colours", crops=_crops, crops_key="colours", pyramid=_pyramid)
