"""Training: the loop, what it is told by (recipes, schedulers) and what it tells (callbacks).

This room may import `artifacts`, `evaluation`, `models`, `data`, `images` and what lies below,
and does not know `inference`.
"""

from transferkit.training.averaging import EMA, SWA
from transferkit.training.callbacks import Callback, EarlyStopping, SaveBest, TimeBudget
from transferkit.training.checkpoints import Checkpoints
from transferkit.training.estimates import Estimate
from transferkit.training.feature_cache import FeatureCache
from transferkit.training.forward import Criterion
from transferkit.training.history import EpochRecord, History
from transferkit.training.logs import CSVLog, EpochLog, JSONLog, ProgressBar, TensorBoardLog
from transferkit.training.lr_find import LRFind
from transferkit.training.optimizers import OptimizerFactory, list_optimizers
from transferkit.training.phases import Phase
from transferkit.training.plan import FitPlan, PhasePlan
from transferkit.training.recipes import RECIPES, Recipe
from transferkit.training.schedulers import (
    Schedule,
    SchedulerFactory,
    list_schedulers,
    register_scheduler,
)
from transferkit.training.trainer import Trainer

__all__ = [
    "EMA",
    "RECIPES",
    "SWA",
    "CSVLog",
    "Callback",
    "Checkpoints",
    "Criterion",
    "EarlyStopping",
    "EpochLog",
    "EpochRecord",
    "Estimate",
    "FeatureCache",
    "FitPlan",
    "History",
    "JSONLog",
    "LRFind",
    "OptimizerFactory",
    "Phase",
    "PhasePlan",
    "ProgressBar",
    "Recipe",
    "SaveBest",
    "Schedule",
    "SchedulerFactory",
    "TensorBoardLog",
    "TimeBudget",
    "Trainer",
    "list_optimizers",
    "list_schedulers",
    "register_scheduler",
]
