"""A detector of one box: the whole image."""

from weaksam.models.detectors.catalogue.kind import DetectorKind


def _build(spec, rules):
    import torch

    from weaksam.models.detectors.base import Detections, Detector

    class WholeImage(Detector):
        num_classes = spec.num_classes

        def __init__(self):
            super().__init__()
            self.logits = torch.nn.Parameter(torch.zeros(spec.num_classes))

        def detect(self, images, mask_sizes=None):
            scores = self.logits.sigmoid().max(0)
            boxes = [torch.tensor([[0.0, 0.0, image.shape[2], image.shape[1]]]) for image in images]
            return [Detections(box, scores.indices[None], scores.values[None]) for box in boxes]

    return WholeImage()


KIND = DetectorKind("whole_image", _build, recipe={"steps": 7}, has_roi_drop=True)
