"""SOAP: Adam in the eigenbasis of the gradient's Kronecker factors, for hidden matrices; Adam for all other tensors.

    G' = Q_L^T G Q_R
    M' <- beta_1 M' + (1 - beta_1) G',   V <- beta_2 V + (1 - beta_2) G'^2
    N' = M' / (1 - beta_1^t) / (sqrt(V / (1 - beta_2^t)) + eps)
    delta = -lr Q_L N' Q_R^T
    L, R are updated with G, and every `precondition_every` steps Q_L and Q_R (`eigenbasis`); M' is carried along

for a hidden layer's matrix G, (out, in), or (out, in * kernel) of a convolution. Embeddings, the last layer, vectors,
scalars, and tensors of unknown role take Adam's step (`adam`) with the same step size.

Source: Vyas et al. 2024, "SOAP: Improving and Stabilizing Shampoo using Adam" (arXiv 2409.11321), algorithm 3. As in
the authors' code,

* the first gradient of a matrix only makes its factors and, by a decomposition, its bases: the matrix does not move. A
  step by it would be one of Shampoo's with a single sample;
* a basis is refreshed after the step, so that no gradient is rotated by a basis that it made;
* the columns of a basis are kept in the order of their eigenvalues, and V's entries follow them.

Deviations:

* M is kept in the eigenbasis, and carried along when that is refreshed. The paper keeps M in the parameters'
  coordinates and rotates it at each step, which gives the same numbers for two products more;
* eps is added to the root of the corrected V, as Adam has it. The paper adds it to V below the root, the authors' code
  to the root before the correction;
* a convolution is one matrix, by default the authors' code rotates each of its dims. So the longest side that is
  rotated is 4,096 by default, not 10,000;
* vectors move at their first step, embeddings and the last layer are not rotated;
* decay is the rule's `weight_decay`, times `lr`, of the value after the step, as in the authors' code. The optimizer's
  own, `RuleOptimizer(weight_decay=...)`, is multiplied by its lr of 1.

symbol | here       | symbol | here
M', V  | exp_avg, exp_avg_sq | f | precondition_every
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_lopt.rules import adam, eigenbasis, matrix
from lightning_lopt.rules import features as feats
from lightning_lopt.rules.base import RuleConfig, StepContext, UpdateRule, register
from lightning_lopt.rules.eigenbasis import Eigenbasis
from lightning_lopt.rules.shards import local, whole_shape


@dataclasses.dataclass(frozen=True)
class SOAPConfig(RuleConfig):
    """Configuration of `SOAP`. The defaults are the authors', except for `max_side`."""

    lr: float = 3e-3
    """Step size of all tensors."""
    weight_decay: float = 0.0
    """Decoupled; multiplied by lr."""
    betas: tuple[float, float] = (0.95, 0.95)
    """Decays of the first and second moments."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    factor_decay: float = 0.95
    """Decay of the Kronecker factors."""
    precondition_every: int = 10
    """Steps between two refreshes of the bases."""
    max_side: int = 4096
    """Sides longer than this are not rotated."""
    one_sided: bool = False
    """Rotate the shorter side alone: half the cost or less, and a part of the gain."""
    experts: bool = False
    """Tensors of three dims are experts, rotated matrix by matrix, instead of convolutions. A state is made before the
    role of its tensor is known, and its shape depends on this; three-dimensional tensors of the other role take Adam's
    step."""

    def __post_init__(self) -> None:
        self.check_number("lr", 0.0)
        self.check_number("weight_decay", 0.0)
        self.check_numbers("betas", 2, 0.0, math.nextafter(1.0, 0.0))
        self.check_number("eps", 1e-20, 1.0)
        self.check_number("factor_decay", 0.0, math.nextafter(1.0, 0.0))
        self.check_integer("precondition_every", 1, 1_000_000)
        self.check_integer("max_side", 1, 100_000)
        self.check_flags("one_sided", "experts")


class SOAPState(NamedTuple):
    """State of one tensor: n matrices (rows, columns); factors and bases are empty where nothing is rotated."""

    exp_avg: Tensor  # (*shape) first moment, of the rotated gradient where the tensor is rotated
    exp_avg_sq: Tensor  # (*shape) second moment, likewise
    left: Tensor  # (n, rows, rows), see `Eigenbasis`
    right: Tensor  # (n, columns, columns)
    left_basis: Tensor  # (n, rows, rows)
    right_basis: Tensor  # (n, columns, columns)


class SOAP(UpdateRule):
    """Kind `soap`. Nothing is learned.

    `RuleOptimizer` and `LearnedOptimizer` find the roles of tensors. The optimizer's lr is a multiplier of the step
    size, 1 unless there is a reason. State: 8 bytes per float32 parameter, and 8 (rows^2 + columns^2) of a matrix, also
    of an embedding, as far as its sides are short enough (a state is made before the role is known). Cost: 6 m n (m +
    n) flops a step for an m x n matrix, and a QR decomposition of each side every `precondition_every` steps. Sharded
    tensors (FSDP2) are gathered with their moments, and each process takes the whole step.

    The host must know the step's number to leave the decompositions out: it reads it from the tensor, which on a CPU
    costs nothing, and on an accelerator it takes `StepContext.known_step`, or waits. Under `vmap` over runs of
    different age they are computed at every step.

    Example:
        >>> import lightning_lopt as lopt, torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> optimizer = lopt.RuleOptimizer(model.named_parameters(), lopt.rules.make("soap", lr=1e-3))
        >>> optimizer.set_roles(model)
        >>> model(torch.ones(3, 4)).sum().backward()
        >>> optimizer.step()
    """

    Config = SOAPConfig
    config: SOAPConfig
    uses_roles = True
    takes_shards = True
    whole_state = frozenset(Eigenbasis._fields)

    def __init__(self, config: SOAPConfig | None = None, *, kind: str = "soap") -> None:
        super().__init__(config, kind=kind)

    def init_state(self, param: Tensor) -> SOAPState:
        """Moments and factors of zeros, and bases of identities."""
        moments = torch.zeros_like(param), torch.zeros_like(param)
        shape, role = tuple(param.shape), self._role(tuple(param.shape))
        if not matrix.is_matrix(shape, role):
            return SOAPState(*moments, *eigenbasis.init(param, 0, 0, 0))
        rows, columns = matrix.sides(shape, role)
        rotated = eigenbasis.rotated_sides(rows, columns, self.config.max_side, one_sided=self.config.one_sided)
        return SOAPState(*moments, *eigenbasis.init(param, math.prod(shape) // (rows * columns), *rotated))

    def update(
        self, meta_params: Mapping[str, Tensor], grad: Tensor, state: SOAPState, param: Tensor, context: StepContext
    ) -> tuple[Tensor, SOAPState]:
        """One step: SOAP's of a hidden matrix, Adam's of any other tensor."""
        c, shape = self.config, tuple(whole_shape(context.shard, param))
        if not (matrix.is_matrix(shape, context.role) and self._is_laid_out(shape, context.role)):
            moments = adam.update_moments(*state[:2], grad, c.betas)
            direction = adam.direction(*moments, context.step + 1, c.betas, c.eps)
            return self._decayed(-c.lr * direction, param), SOAPState(*moments, *state[2:])
        whole = matrix.gathered(context.shard, feats.bounded(grad, math.prod(shape)), *state[:2])
        grads, *old = (matrix.as_matrices(tensor, context.role) for tensor in whole)
        basis = eigenbasis.update_factors(Eigenbasis(*state[2:]), grads, c.factor_decay)

        def first() -> tuple[Tensor, ...]:
            return torch.zeros_like(grads), *old, *eigenbasis.first_bases(basis)

        def later() -> tuple[Tensor, ...]:
            return self._step(grads, old[0], old[1], basis, context)

        number = context.host_step()
        delta, *new = _either(context.step == 0 if number is None else number == 0, first, later)
        parts = [local(context.shard, each.reshape(whole[0].shape)) for each in (delta, *new[:2])]
        moves = context.step > 0
        return torch.where(moves, self._decayed(parts[0], param), parts[0]), SOAPState(*parts[1:], *new[2:])

    def terms(
        self, meta_params: Mapping[str, Tensor], grad: Tensor, state: Any, param: Tensor, context: StepContext
    ) -> dict[str, Tensor]:
        """The step is a `nominal` term: nothing in it is learned."""
        return {"nominal": self.update(meta_params, grad, state, param, context)[0]}

    def _decayed(self, delta: Tensor, param: Tensor) -> Tensor:
        c = self.config
        return delta - c.lr * c.weight_decay * (param + delta) if c.weight_decay else delta

    def _role(self, shape: tuple[int, ...]) -> str:
        """The role for which the state of a tensor is laid out."""
        return "experts" if self.config.experts and len(shape) == 3 else "hidden"

    def _is_laid_out(self, shape: tuple[int, ...], role: str | None) -> bool:
        return len(shape) == 2 or role == self._role(shape)

    def _step(
        self, grads: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, basis: Eigenbasis, context: StepContext
    ) -> tuple[Tensor, ...]:
        """A step after the first, of matrices: (delta, M', V, *the basis). The first gradient is not in the moments."""
        c, number = self.config, context.host_step()
        exp_avg, exp_avg_sq = adam.update_moments(exp_avg, exp_avg_sq, eigenbasis.rotate(basis, grads), c.betas)
        direction = adam.direction(exp_avg, exp_avg_sq, context.step.clamp(min=1), c.betas, c.eps)
        delta = -c.lr * eigenbasis.rotate_back(basis, direction)

        def refreshed() -> tuple[Tensor, ...]:
            new, orders = eigenbasis.refresh_bases(basis)
            moments = eigenbasis.carried(basis, new, exp_avg), eigenbasis.reordered(orders, exp_avg_sq)
            return delta, *moments, *new

        step = context.step if number is None else number
        return _either(step % c.precondition_every == 0, refreshed, lambda: (delta, exp_avg, exp_avg_sq, *basis))


def _either(
    condition: Tensor | bool, then: Callable[[], tuple[Tensor, ...]], otherwise: Callable[[], tuple[Tensor, ...]]
) -> tuple[Tensor, ...]:
    """What one of two functions gives: of a bool, that one alone is called; of a () tensor, both."""
    if isinstance(condition, bool):
        return then() if condition else otherwise()
    return tuple(torch.where(condition, yes, no) for yes, no in zip(then(), otherwise(), strict=True))


register("soap", SOAP)
