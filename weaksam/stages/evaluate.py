from weaksam.config import StageConfig
from weaksam.stage import Stage

STAGE = Stage("evaluate", 1, StageConfig, lambda s: None, writes="metrics")
