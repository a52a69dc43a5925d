"""pytorch-tabular: its category-embedding network on the mixed table that the package generates."""

import random

import pytorch_lightning as L
from common import main
from pytorch_tabular import TabularModel
from pytorch_tabular.config import DataConfig, OptimizerConfig, TrainerConfig
from pytorch_tabular.models import CategoryEmbeddingModelConfig
from pytorch_tabular.utils import make_mixed_dataset


def train(callbacks, seed):
    random.seed(0)  # draws which columns are categorical
    table, categorical, continuous = make_mixed_dataset(
        "classification", n_samples=5000, n_features=20, n_categories=5, class_sep=0.5
    )
    model = TabularModel(
        data_config=DataConfig(target=["target"], continuous_cols=continuous, categorical_cols=categorical),
        model_config=CategoryEmbeddingModelConfig(task="classification", seed=seed),
        optimizer_config=OptimizerConfig(),
        trainer_config=TrainerConfig(
            max_epochs=6,
            batch_size=64,
            accelerator="cpu",
            early_stopping=None,
            checkpoints=None,
            load_best=False,
            progress_bar="none",
            trainer_kwargs={"enable_model_summary": False},
        ),
        verbose=False,
    )
    model.fit(table.iloc[:4000], callbacks=callbacks, seed=seed)
    (measured,) = model.evaluate(table.iloc[4000:], verbose=False)
    return measured["test_accuracy"]


if __name__ == "__main__":
    main(train, L.Callback)
