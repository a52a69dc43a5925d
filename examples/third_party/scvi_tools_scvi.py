"""scvi-tools: its variational autoencoder of single-cell counts, on cells that differ in five hidden factors."""

import anndata
import lightning.pytorch as L
import numpy as np
from common import QUIET, main
from scvi import settings
from scvi.model import SCVI


def draw_counts(cells: int, genes: int) -> np.ndarray:
    """(cells, genes) Poisson counts with rates from five factors and a size of each cell."""
    draw = np.random.default_rng(0)
    factors = draw.normal(size=(cells, 5)) @ draw.normal(scale=0.4, size=(5, genes))
    size = draw.normal(scale=0.3, size=(cells, 1))
    return draw.poisson(np.exp(factors + size)).astype(np.float32)


def train(callbacks, seed):
    settings.seed = seed  # scvi-tools splits the cells by a seed of its own
    cells = anndata.AnnData(draw_counts(2000, 200))
    SCVI.setup_anndata(cells)
    model = SCVI(cells)
    model.train(max_epochs=22, train_size=0.9, callbacks=callbacks, **QUIET)
    return -model.get_elbo(indices=model.validation_indices)


if __name__ == "__main__":
    main(train, L.Callback)
