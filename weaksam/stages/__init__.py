"""The catalogue: every stage, by name, in the order of the pipeline."""

from weaksam.stage import Stage
from weaksam.stages import evaluate, index, proposals, train_classifier

STAGES: dict[str, Stage] = {
    module.STAGE.name: module.STAGE for module in (index, train_classifier, proposals, evaluate)
}
