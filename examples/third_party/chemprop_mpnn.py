"""chemprop: its message-passing network predicts a property of made-up molecules from their graphs."""

import random

import lightning.pytorch as L
from chemprop import data, featurizers, models, nn
from common import QUIET, main


def draw_smiles(draw: random.Random) -> str:
    """A chain of carbon, nitrogen and oxygen with branches: always a valid molecule."""
    atoms = [draw.choice(["C", "C", "C", "N", "O", "C(C)", "C(=O)", "C(N)"]) for _ in range(draw.randint(4, 14))]
    return "C" + "".join(atoms)


def target(smiles: str) -> list[float]:
    return [smiles.count("N") - 0.5 * smiles.count("O") + 0.1 * len(smiles)]


def train(callbacks, seed):
    draw = random.Random(0)
    molecules = [draw_smiles(draw) for _ in range(1500)]
    points = [data.MoleculeDatapoint.from_smi(smiles, target(smiles)) for smiles in molecules]
    featurizer = featurizers.SimpleMoleculeMolGraphFeaturizer()
    training = data.MoleculeDataset(points[:1200], featurizer)
    held_out = data.MoleculeDataset(points[1200:], featurizer)
    held_out.normalize_targets(training.normalize_targets())
    model = models.MPNN(nn.BondMessagePassing(), nn.MeanAggregation(), nn.RegressionFFN(), batch_norm=False)
    trainer = L.Trainer(max_epochs=10, callbacks=callbacks, **QUIET)
    loader = data.build_dataloader(training, batch_size=40, seed=seed)
    trainer.fit(model, loader, data.build_dataloader(held_out, shuffle=False))
    return trainer.callback_metrics["val_loss"]


if __name__ == "__main__":
    main(train, L.Callback)
