"""Write an update rule of your own, register it, train with it, save it and load it.

The rule moves by the sign of a momentum. Its step size and decay are meta-parameters, which meta-training could learn.
Run: python examples/own_rule.py. A few seconds.
"""

import dataclasses
import tempfile
from typing import NamedTuple

import lightning as L
import torch
from lightning.pytorch.demos.boring_classes import BoringModel
from torch import Tensor, nn

import lightning_lopt as lopt
from lightning_lopt.rules import RuleConfig, register


class State(NamedTuple):
    exp_avg: Tensor  # (*shape) momentum


@dataclasses.dataclass(frozen=True)
class SignMomentumConfig(RuleConfig):
    init_step: float = 1e-3
    init_decay: float = 0.9

    def __post_init__(self) -> None:
        self.check_number("init_step", 1e-12, 1.0)
        self.check_number("init_decay", 0.0, 0.9999)


class SignMomentum(lopt.UpdateRule):
    Config = SignMomentumConfig

    def __init__(self, config: SignMomentumConfig | None = None, *, kind: str = "sign_momentum") -> None:
        super().__init__(config, kind=kind)
        self.log_step = nn.Parameter(torch.tensor(self.config.init_step).log())
        self.decay_logit = nn.Parameter(torch.tensor(self.config.init_decay).logit())

    def init_state(self, param: Tensor) -> State:
        return State(torch.zeros_like(param))

    def update(self, meta_params, grad, state, param, context):
        # A pure function of its arguments, so it also runs under vmap and autograd.
        exp_avg = torch.lerp(grad, state.exp_avg, meta_params["decay_logit"].sigmoid())
        return -meta_params["log_step"].exp() * exp_avg.sign(), State(exp_avg)


def main() -> None:
    register("sign_momentum", SignMomentum)
    rule = lopt.rules.make("sign_momentum", init_step=1e-2)

    torch.manual_seed(0)
    model = BoringModel()
    trainer = L.Trainer(max_epochs=1, callbacks=[lopt.LearnedOptimizer(rule)], accelerator="cpu", logger=False,
                        enable_checkpointing=False, enable_progress_bar=False)  # fmt: skip
    trainer.fit(model)
    print("trained by", type(trainer.optimizers[0]).__name__, "with rule", rule.kind)

    with tempfile.TemporaryDirectory() as folder:
        lopt.save_rule(rule, folder)
        loaded = lopt.load_rule(folder)
    print("saved and loaded:", loaded.kind, loaded.config.to_dict())


if __name__ == "__main__":
    main()
