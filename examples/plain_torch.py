"""Use a learned optimizer in a plain PyTorch loop, with checkpoint and resume.

Run: python examples/plain_torch.py. A few seconds; needs the extra [demo] for its data.
"""

import io

import torch
from sklearn.datasets import load_digits
from torch import nn

import lightning_lopt as lopt


def make_run() -> tuple[nn.Module, lopt.RuleOptimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    optimizer = lopt.RuleOptimizer(model.named_parameters(), lopt.load_rule("star"), num_steps=300, safeguard=True)
    return model, optimizer


def train(model: nn.Module, optimizer: lopt.RuleOptimizer, steps: range) -> float:
    images, labels = (torch.tensor(x) for x in load_digits(return_X_y=True))
    for step in steps:
        index = torch.randint(0, 1437, (64,), generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(images[index].float() / 16), labels[index])
        loss.backward()
        optimizer.step()
    return loss.item()


def main() -> None:
    model, optimizer = make_run()
    print(f"loss at step 100: {train(model, optimizer, range(100)):.4f}")
    checkpoint = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, checkpoint)
    print(f"loss at step 300: {train(model, optimizer, range(100, 300)):.4f}")

    resumed_model, resumed_optimizer = make_run()
    checkpoint.seek(0)
    saved = torch.load(checkpoint, weights_only=True)
    resumed_model.load_state_dict(saved["model"])
    resumed_optimizer.load_state_dict(saved["optimizer"])
    train(resumed_model, resumed_optimizer, range(100, 300))
    pairs = zip(model.parameters(), resumed_model.parameters(), strict=True)
    print(f"resumed from step 100, equal to the bit: {all(torch.equal(a, b) for a, b in pairs)}")


if __name__ == "__main__":
    main()
