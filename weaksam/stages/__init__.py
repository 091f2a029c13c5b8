"""The catalogue of all stages, by name, in the order of the pipeline."""

from weaksam.core.catalogues import members
from weaksam.core.step import Stage

# The files of this folder that hold a stage, each with its `STAGE`.
_FILES = (
    "index",
    "train_classifier",
    "proposals",
    "train_wsod",
    "detect",
    "import_detections",
    "pgt",
    "pseudo_masks",
    "train_detector",
    "evaluate",
    "export",
    "hygiene",
)
STAGES: dict[str, Stage] = {stage.name: stage for stage in members(__name__, _FILES, "STAGE")}
