"""Muon for hidden matrices, and AdamW for all other tensors, in one optimizer.

    m <- mu m + (1 - mu) G
    u  = (1 - mu) G + mu m                                                             (Nesterov; else u = m)
    delta = -lr adjust NewtonSchulz(u)

for a hidden layer's matrix G, (out, in), or (out, in * kernel) of a convolution; of experts, for each matrix.
NewtonSchulz takes u = U S V^T to about U V^T, see `matrix.newton_schulz`. Embeddings, the last layer, vectors, scalars,
and tensors of unknown role take Adam's step (`adam`) with a step size of its own.

Source: Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks"
(https://kellerjordan.github.io/posts/muon), as in torch.optim.Muon; the factor "match_rms_adamw" is of Liu et al. 2025
(arXiv 2502.16982), section 2.2. Deviations:

* arithmetic in the dtype of the state, float32 at least, unless `bfloat16` is set. The authors' is always bfloat16;
* matrices of norm below 1e-7 are made orthogonal, too, see `matrix.newton_schulz`;
* adjust reads (out, in * kernel) of a convolution; torch's Muon takes no convolutions;
* decay is the rule's `weight_decay`, times a tensor's step size as in torch. The optimizer's own, for all tensors, is
  multiplied by the optimizer's lr of 1: torch's lr=0.02, weight_decay=0.1 is `RuleOptimizer(weight_decay=0.002)`.

symbol | here       | symbol    | here
mu     | momentum   | eta, lr   | lr
NS     | iterations | (a, b, c) | coefficients
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_lopt.rules import adam, matrix
from lightning_lopt.rules.base import RuleConfig, StepContext, UpdateRule, register
from lightning_lopt.rules.shards import TensorShard, local, whole_shape

ADJUSTMENTS = ("original", "match_rms_adamw")


@dataclasses.dataclass(frozen=True)
class MuonConfig(RuleConfig):
    """Configuration of `Muon`. The defaults are those of the authors' code."""

    lr: float = 0.02
    """Step size of hidden matrices. With adjust_lr_fn="match_rms_adamw", use one that suits AdamW."""
    weight_decay: float = 0.0
    """Decoupled; multiplied by lr, or by adam_lr."""
    momentum: float = 0.95
    """Decay of the momentum."""
    nesterov: bool = True
    """Look ahead: mix the momentum with the gradient once more."""
    iterations: int = 5
    """Newton-Schulz iterations. Two cost less than half, and did as well in training small nets."""
    coefficients: tuple[float, float, float] = matrix.QUINTIC
    """(a, b, c) of an iteration."""
    adjust_lr_fn: str = "original"
    """How a step depends on its matrix (rows, columns): "original", times the root of max(1, rows / columns);
    "match_rms_adamw", times 0.2 the root of max(rows, columns), which gives steps AdamW's root mean square."""
    bfloat16: bool = False
    """Iterate in bfloat16: faster on GPUs, with two digits."""
    adam_lr: float = 3e-4
    """Step size of all other tensors."""
    adam_betas: tuple[float, float] = (0.9, 0.95)
    """Decays of their first and second moments."""
    adam_eps: float = 1e-10
    """Added to the root of the second moment."""

    def __post_init__(self) -> None:
        self.check_number("lr", 0.0)
        self.check_number("weight_decay", 0.0)
        self.check_number("momentum", 0.0, math.nextafter(1.0, 0.0))
        self.check_flags("nesterov", "bfloat16")
        self.check_integer("iterations", 1, 99)
        self.check_numbers("coefficients", 3)
        self.check(self.adjust_lr_fn in ADJUSTMENTS, "adjust_lr_fn", f"one of {list(ADJUSTMENTS)}")
        self.check_number("adam_lr", 0.0)
        self.check_numbers("adam_betas", 2, 0.0, math.nextafter(1.0, 0.0))
        self.check_number("adam_eps", 1e-20, 1.0)


class MuonState(NamedTuple):
    """State of one tensor."""

    exp_avg: Tensor  # (*shape) momentum of Muon, or Adam's first moment
    exp_avg_sq: Tensor  # (*shape) Adam's second moment; stays 0 where Muon moves


class Muon(UpdateRule):
    """Kind `muon`. Nothing is learned.

    `RuleOptimizer` and `LearnedOptimizer` find the roles of tensors. The optimizer's lr is a multiplier of both step
    sizes, 1 unless there is a reason; a schedule of it is a schedule of both. State: 8 bytes per float32 parameter, of
    which hidden matrices use half (a state is made before the role is known). Cost: 2 iterations (2 m^2 n + m^3) 2
    flops for an m x n matrix, m <= n, whatever the batch. Sharded tensors (FSDP2) are gathered, and each process takes
    the whole step.

    Example:
        Muon and AdamW in one optimizer, under Lightning's automatic optimization; the module's optimizer is replaced,
        its schedule multiplies both step sizes, and its decay is kept:

        >>> import lightning_lopt as lopt
        >>> rule = lopt.rules.make("muon")
        >>> callback = lopt.LearnedOptimizer(rule=rule, lr="scale", weight_decay="decoupled")

        In plain torch, with AdamW's learning rate of 1e-3 and its decay of 0.1 for all tensors:

        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> rule = lopt.rules.make("muon", lr=1e-3, adjust_lr_fn="match_rms_adamw", adam_lr=1e-3)
        >>> optimizer = lopt.RuleOptimizer(model.named_parameters(), rule, weight_decay=1e-3 * 0.1)
        >>> optimizer.set_roles(model)
        >>> model(torch.ones(3, 4)).sum().backward()
        >>> optimizer.step()
    """

    Config = MuonConfig
    config: MuonConfig
    uses_roles = True
    takes_shards = True

    def __init__(self, config: MuonConfig | None = None, *, kind: str = "muon") -> None:
        super().__init__(config, kind=kind)

    def init_state(self, param: Tensor) -> MuonState:
        """Zeros."""
        return MuonState(torch.zeros_like(param), torch.zeros_like(param))

    def update(
        self, meta_params: Mapping[str, Tensor], grad: Tensor, state: MuonState, param: Tensor, context: StepContext
    ) -> tuple[Tensor, MuonState]:
        """One step: Muon's of a hidden matrix, Adam's of any other tensor."""
        c, shape = self.config, whole_shape(context.shard, param)
        if not matrix.is_matrix(shape, context.role):
            moments = adam.update_moments(*state, grad, c.adam_betas)
            direction = adam.direction(*moments, context.step + 1, c.adam_betas, c.adam_eps)
            return -c.adam_lr * (direction + c.weight_decay * param), MuonState(*moments)
        momentum = torch.lerp(state.exp_avg, grad, 1 - c.momentum)
        ahead = torch.lerp(grad, momentum, c.momentum) if c.nesterov else momentum
        direction = self._orthogonal(ahead, context.role, context.shard)
        lr = c.lr * adjustment(c.adjust_lr_fn, *matrix.sides(shape, context.role))
        return -lr * direction - c.lr * c.weight_decay * param, MuonState(momentum, state.exp_avg_sq)

    def terms(
        self, meta_params: Mapping[str, Tensor], grad: Tensor, state: Any, param: Tensor, context: StepContext
    ) -> dict[str, Tensor]:
        """The step is a `nominal` term: nothing in it is learned."""
        return {"nominal": self.update(meta_params, grad, state, param, context)[0]}

    def _orthogonal(self, momentum: Tensor, role: str | None, shard: TensorShard | None) -> Tensor:
        """Orthogonal matrices near to those of a momentum (*shape)."""
        c = self.config
        (whole,) = matrix.gathered(shard, momentum)
        matrices = matrix.as_matrices(whole, role)
        if c.bfloat16:
            matrices = matrices.bfloat16()
        found = matrix.newton_schulz(matrices, c.iterations, c.coefficients)
        return local(shard, found.to(whole.dtype).reshape(whole.shape))


def adjustment(name: str, rows: int, columns: int) -> float:
    """What multiplies an orthogonal step of a matrix, by the name in `ADJUSTMENTS`.

    Example:
        >>> adjustment("original", 400, 100), adjustment("original", 100, 400), adjustment("match_rms_adamw", 400, 100)
        (2.0, 1.0, 4.0)
    """
    return math.sqrt(max(1.0, rows / columns)) if name == "original" else 0.2 * math.sqrt(max(rows, columns))


register("muon", Muon)
