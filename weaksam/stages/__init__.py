"""The catalogue: every stage, by name, in the order of the pipeline."""

from weaksam.stage import Stage
from weaksam.stages import detect, evaluate, index, proposals, train_classifier, train_wsod

STAGES: dict[str, Stage] = {
    module.STAGE.name: module.STAGE for module in (index, train_classifier, proposals, train_wsod, detect, evaluate)
}
