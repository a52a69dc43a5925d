"""chemprop: its message-passing network on made-up molecules, whose target is a count of their atoms."""

import random

import lightning.pytorch as L
import torch
from chemprop import data, featurizers, models, nn
from common import main


def smiles(draw: random.Random) -> str:
    """A chain of carbon, nitrogen and oxygen with branches: always a valid molecule."""
    atoms = [draw.choice(["C", "C", "C", "N", "O", "C(C)", "C(=O)", "C(N)"]) for _ in range(draw.randint(4, 14))]
    return "C" + "".join(atoms)


def target(text: str) -> list[float]:
    return [text.count("N") - 0.5 * text.count("O") + 0.1 * len(text)]


def train(callbacks, losses, seed):
    draw = random.Random(0)
    texts = [smiles(draw) for _ in range(1500)]
    points = [data.MoleculeDatapoint.from_smi(text, target(text)) for text in texts]
    featurizer = featurizers.SimpleMoleculeMolGraphFeaturizer()
    training, held_out = (data.MoleculeDataset(part, featurizer) for part in (points[:1200], points[1200:]))
    scaler = training.normalize_targets()
    held_out.normalize_targets(scaler)
    model = models.MPNN(nn.BondMessagePassing(), nn.MeanAggregation(), nn.RegressionFFN(), batch_norm=False)
    trainer = L.Trainer(max_epochs=10, callbacks=callbacks, accelerator="cpu", logger=False, enable_progress_bar=False,
                        enable_checkpointing=False, enable_model_summary=False)  # fmt: skip
    torch.manual_seed(seed)
    loader = data.build_dataloader(training, batch_size=40, seed=seed)
    trainer.fit(model, loader, data.build_dataloader(held_out, shuffle=False))
    return float(trainer.callback_metrics["val_loss"])


if __name__ == "__main__":
    main(train, L.Callback)
