"""The catalogue of all stages, by name, in the order of the pipeline."""

from importlib import import_module

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
_ALL: list[Stage] = [import_module(f"{__name__}.{name}").STAGE for name in _FILES]
STAGES: dict[str, Stage] = {stage.name: stage for stage in _ALL}
