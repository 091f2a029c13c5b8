"""The catalogue of all stages, by name, in the order of the pipeline."""

from weaksam.core.step import Stage
from weaksam.stages import (
    detect,
    evaluate,
    export,
    hygiene,
    import_detections,
    index,
    pgt,
    proposals,
    pseudo_masks,
    train_classifier,
    train_detector,
    train_wsod,
)

_MODULES = (
    index,
    train_classifier,
    proposals,
    train_wsod,
    detect,
    import_detections,
    pgt,
    pseudo_masks,
    train_detector,
    evaluate,
    export,
    hygiene,
)
STAGES: dict[str, Stage] = {module.STAGE.name: module.STAGE for module in _MODULES}
