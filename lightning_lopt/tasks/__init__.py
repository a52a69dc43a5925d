"""Tasks for meta-training and evaluation, as pure functions that batch over a population with `torch.func.vmap`."""

from lightning_lopt.tasks import datasets, families
from lightning_lopt.tasks.base import Params, Start, Task
from lightning_lopt.tasks.catalog import GENERALIZATION, dataset_of, list_tasks, make, register
from lightning_lopt.tasks.finetuning import FineTuned, LowRank
from lightning_lopt.tasks.games import Adversarial, PolicyGradient
from lightning_lopt.tasks.supervised import Supervised, build
from lightning_lopt.tasks.wrappers import ESGradient, Reparametrized, ScaledInit

__all__ = [
    "GENERALIZATION",
    "Adversarial",
    "ESGradient",
    "FineTuned",
    "LowRank",
    "Params",
    "PolicyGradient",
    "Reparametrized",
    "ScaledInit",
    "Start",
    "Supervised",
    "Task",
    "build",
    "dataset_of",
    "datasets",
    "families",
    "list_tasks",
    "make",
    "register",
]
