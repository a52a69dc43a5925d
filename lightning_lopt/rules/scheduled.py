"""The flagship: STAR's nominal term under a learned schedule, with a few numbers learned for whole tensors.

There is no network and nothing is learned per parameter. Each step of a tensor is

    g       <- g - centering(t) mean of g over the fan-in                               (matrices)
    m_k     <- b_k m_k + (1 - b_k) g,   v <- b v + (1 - b) g^2                           (k = 1, 2, 3)
    u        = sum_k w_k(t) m_k / sqrt(v + eps)                                          (eq. 21's direction)
    u       <- u (1 - caution(t)) where u g < 0
    u       <- orthogonal matrix nearest to u, at u's root mean square                    (hidden matrices)
    delta    = -nominal_stepsize factor(tensor, t) u - decay(t) p

with `factor` and the weights w_k from `scheduler`. These are added to the nominal term of STAR (Harrison et al. 2022,
arXiv 2209.11208): *centering* (Yong et al. 2020, arXiv 2004.01461); *caution* (Liang et al. 2024, arXiv 2411.16085);
the *orthogonal* step of hidden matrices (Muon, see `matrix`); a decay that goes with the schedule; and three guards for
steps relative to a tensor's scale, which could feed on themselves: *growth*, *first scale* and a *cap*. Rows of an
embedding move only in steps that read them.

Readable numbers, the fields of `ScheduledConfig` from `peak` on, fill the meta-parameters (`curves`).
`examples/recipes/star_scheduler.py` fits the numbers; `MetaTrainer` can train the meta-parameters themselves.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_lopt.rules import features as feats
from lightning_lopt.rules import matrix, nominal, scheduler
from lightning_lopt.rules.base import RuleConfig, StepContext, UpdateRule, compute_dtype, register
from lightning_lopt.rules.constants import constant
from lightning_lopt.rules.shards import TensorShard, means, whole_shape

ROLE_FEATURES = ("hidden", "embedding", "output")  # roles that have a factor of their own; experts count as hidden
SHAPES = {
    **scheduler.SHAPES,
    "momentum_decays": (3,),  # offsets, see `features.effective_decay`
    "rms_decays": (1,),
    "growth": (2,),  # (start, end) exponent
    "centering": (2,),  # (start, end) fraction, see `centered`
    "caution": (2,),  # (start, end) fraction, see `cautious`
    "orthogonal": (2,),  # (start, end) share of the orthogonal step, see `matrix.orthogonal_step`
    "roles": (len(ROLE_FEATURES), 2),  # role x (added to the log factor, the same per factor of ten in the fan-in)
    "first_scale": (1,),  # power of how much smaller than usual a matrix began, see `first_scale`
    "cap": (1,),  # log of a matrix's largest relative step, see `capped`
    "decay": (1,),  # what a run takes off a matrix by decay, as a log, if the schedule stayed at its peak
}
USUAL = 0.58  # root mean square times sqrt(fan-in) of torch's own initial weights
FLOORS = (0.1, 0.01)  # of the scale that a step is relative to: for a matrix that began at 0, and for others
DOUBT = 0.2  # gradients count as noise while the log of the squared strength is this close to that of white noise


def _number(default: float, meaning: str) -> Any:
    """A readable number of the configuration; `lopt show` prints its meaning."""
    return dataclasses.field(default=default, metadata={"meaning": meaning})


@dataclasses.dataclass(frozen=True)
class ScheduledConfig(RuleConfig):
    """Configuration of `Scheduled`. With the defaults the factor is 1 for every tensor at every step."""

    nominal_stepsize: float = 1e-2
    """Step size that the learned factor multiplies."""
    eps: float = 1e-10
    """Added to the second moment before its root. STAR's 1e-6 hides gradients below 1e-3."""
    peak: float = _number(0.0, "log of the largest factor, on a run of 1,000 steps")
    start: float = _number(0.0, "log of the first factor, relative to the peak")
    warmup: float = _number(0.1, "fraction of the run until the peak")
    anneal: float = _number(0.0, "power of the cosine after the peak")
    bias_correction: float = _number(0.0, "power of the second moment's bias correction; 0 leaves it out, 1 is Adam's")
    length: float = _number(0.0, "added to the log factor by a run ten times as long")
    start_length: float = _number(0.0, "added, beyond that, to that of the first step")
    unknown_level: float = _number(0.0, "log factor at step 300 of a run of unknown length")
    unknown_early: float = _number(0.0, "added to it per factor of ten in steps before that")
    unknown_late: float = _number(0.0, "added to it per factor of ten in steps after that")
    depth: float = _number(0.0, "power of the number of tensors that train")
    scale: float = _number(0.0, "power of a matrix's root mean square")
    size: float = _number(0.0, "added to a matrix's log factor per factor of ten in its size")
    fan_in: float = _number(0.0, "the same, per factor of ten in its fan-in")
    vectors: float = _number(0.0, "log factor of vectors and scalars")
    strength_start: float = _number(0.0, "power of the momenta's strength at the start")
    strength_end: float = _number(0.0, "the same, at the end")
    mix_start: float = _number(0.0, "logit of the fastest momentum at the start; the slowest has its negative")
    mix_end: float = _number(0.0, "the same, at the end")
    growth: float = _number(0.0, "power of how far a matrix that only noise moves has grown")
    centering_start: float = _number(0.0, "fraction of a gradient's mean over the fan-in that is removed at the start")
    centering_end: float = _number(0.0, "the same, at the end")
    caution_start: float = _number(0.0, "fraction of a step against the gradient that is held back at the start")
    caution_end: float = _number(0.0, "the same, at the end")
    orthogonal_start: float = _number(0.0, "share of the orthogonal step in a hidden matrix's at the start")
    orthogonal_end: float = _number(0.0, "the same, at the end")
    hidden: float = _number(0.0, "log factor of hidden matrices")
    hidden_fan_in: float = _number(0.0, "added to it per factor of ten in their fan-in")
    embedding: float = _number(0.0, "log factor of embeddings")
    output: float = _number(0.0, "log factor of the last layer's matrix")
    first_scale: float = _number(0.0, "power of how much smaller than usual a matrix began")
    cap: float = _number(10.0, "log of a matrix's largest step relative to its root mean square, at the peak")
    decay: float = _number(0.0, "log of what decay takes off a matrix in a run, if the schedule stayed at its peak")
    fast_offset: float = _number(0.0, "offset of the fastest momentum's decay")
    slow_offset: float = _number(0.0, "offset of the slowest momentum's decay; the middle one has half of it")
    rms_offset: float = _number(0.0, "offset of the second moment's decay")

    def __post_init__(self) -> None:
        self.check_number("nominal_stepsize", 0.0)
        self.check_number("eps", 1e-20, 1.0)
        for name in self.meanings():
            self.check_number(name, -100.0, 100.0)
        self.check_number("cap", -20.0, 20.0)
        self.check_number("decay", 0.0, 20.0)
        self.check_number("warmup", 1e-3, 0.999)
        for name in ("fast_offset", "slow_offset", "rms_offset"):
            self.check_number(name, -5.0, 0.4)  # up to 0.46 the decays stay above 0

    @classmethod
    def meanings(cls) -> dict[str, str]:
        """The readable numbers by name, each with what it means.

        Example:
            >>> ScheduledConfig.meanings()["warmup"]
            'fraction of the run until the peak'
        """
        return {f.name: f.metadata["meaning"] for f in dataclasses.fields(cls) if "meaning" in f.metadata}


class Moments(NamedTuple):
    """The state: 16 bytes per parameter, and 4 per tensor."""

    exp_avg: Tensor  # (3, *shape) momenta, slowest last
    exp_avg_sq: Tensor  # (*shape) second moment
    first_square: Tensor  # () mean square of the tensor before its first step


class Scheduled(UpdateRule):
    """STAR's nominal term under the learned scheduler; see the module.

    Meta-parameters: `SHAPES`, 88 numbers, filled by `curves`.

    Example:
        >>> import torch
        >>> from lightning_lopt.rules import StepContext, make
        >>> rule, param = make("scheduled", nominal_stepsize=0.1, bias_correction=1.0), torch.ones(3, 2)
        >>> delta, state = rule.update(
        ...     rule.meta_params(), torch.ones(3, 2), rule.init_state(param), param, StepContext(torch.tensor(0.0))
        ... )
        >>> delta.shape, state.exp_avg.shape
        (torch.Size([3, 2]), torch.Size([3, 3, 2]))
    """

    Config = ScheduledConfig
    config: ScheduledConfig
    takes_shards = True
    whole_state = frozenset({"first_square"})

    def __init__(self, config: ScheduledConfig | None = None, *, kind: str = "scheduled") -> None:
        super().__init__(config, kind=kind)
        dtype = compute_dtype(torch.get_default_dtype())  # in bfloat16 the numbers would be others
        for name, values in curves(self.config).items():
            self.register_parameter(name, nn.Parameter(values.to(dtype)))

    @property
    def uses_roles(self) -> bool:
        """Whether hidden matrices take orthogonal steps, or a role has a factor of its own."""
        return bool(self.get_parameter("orthogonal").any() or self.get_parameter("roles").any())

    def without_decay(self) -> Scheduled:
        """The same rule with `decay` 0; a copy."""
        rule = copy.deepcopy(self)
        rule.get_parameter("decay").data.zero_()
        return rule

    def init_state(self, param: Tensor) -> Moments:
        """Zeros."""
        return Moments(param.new_zeros((3, *param.shape)), torch.zeros_like(param), param.new_zeros(()))

    def decays(self, meta_params: Mapping[str, Tensor]) -> feats.Decays:
        """Effective decay rates of the momenta (3,) and of the second moment (1,)."""
        return nominal.learned_decays(meta_params)

    def update(
        self, meta_params: Mapping[str, Tensor], grad: Tensor, state: Moments, param: Tensor, context: StepContext
    ) -> tuple[Tensor, Moments]:
        """One step of one tensor."""
        step, num_steps, shard = context.step, context.num_steps, context.shard
        grad = centered(grad, scheduler.ramp(meta_params, "centering", step, num_steps), shard)
        decays = self.decays(meta_params)
        exp_avg, exp_avg_sq = feats.update_moments(state.exp_avg, state.exp_avg_sq, grad, decays)
        reads_rows = is_table(grad.shape, context.role)
        if reads_rows:  # the batch does not read the others
            exp_avg = torch.where(grad == 0, state.exp_avg, exp_avg)
            exp_avg_sq = torch.where(grad == 0, state.exp_avg_sq, exp_avg_sq)
        inv_root = feats.inverse_root(exp_avg_sq, self.config.eps)
        squares = [*scheduler.scales(param, exp_avg, inv_root), (exp_avg_sq > 0).to(grad.dtype)]
        whole_tensor = tuple(range(-grad.dim(), 0))
        square, *strengths, seen = means(shard, *((square, whole_tensor) for square in squares))
        first_square = torch.where(step == 0, square, state.first_square)
        strengths = [strength / seen.clamp(min=1e-12) for strength in strengths]
        shape = whole_shape(shard, param)
        tensor = TensorFacts(
            mean_squares=torch.stack([square, *strengths]).unsqueeze(0),
            first_square=first_square.reshape(1),
            shapes=constant((scheduler.shape_features(shape, context.num_tensors),), grad.dtype, grad.device),
            roles=constant((role_features(shape, context.role),), grad.dtype, grad.device),
        )
        factor, weights = multipliers(
            meta_params, tensor, step, num_steps, decays=decays, stepsize=self.config.nominal_stepsize
        )
        direction = nominal.nominal_direction("AdamAggMo", grad, exp_avg, inv_root, weights.squeeze(0))
        direction = cautious(direction, grad, scheduler.ramp(meta_params, "caution", step, num_steps))
        if reads_rows:
            direction = torch.where(grad == 0, 0.0, direction)
        if matrix.is_matrix(shape, context.role):
            share = scheduler.ramp(meta_params, "orthogonal", step, num_steps)
            direction = matrix.orthogonal_step(direction, context.role, share, shard)
        delta = -factor.squeeze(0) * (self.config.nominal_stepsize * direction)
        if len(shape) > 1:
            lost = decay(meta_params, step, num_steps) * param
            delta = delta - (torch.where(grad == 0, 0.0, lost) if reads_rows else lost)
        return delta, Moments(exp_avg, exp_avg_sq, first_square)

    def terms(
        self, meta_params: Mapping[str, Tensor], grad: Tensor, state: Moments, param: Tensor, context: StepContext
    ) -> dict[str, Tensor]:
        """The whole step: it is the `nominal` term."""
        return {"nominal": self.update(meta_params, grad, state, param, context)[0]}


def curves(config: ScheduledConfig) -> dict[str, Tensor]:
    """The meta-parameters that a configuration's readable numbers stand for; float32, with the shapes of `SHAPES`.

    Example:
        >>> curves(ScheduledConfig(peak=1.0, anneal=0.5))["schedule_fraction"][:2]
        tensor([1., 1.])
    """
    c = config
    found = {name: torch.zeros(shape, dtype=torch.float32) for name, shape in SHAPES.items()}
    warm = [min(1.0, fraction / c.warmup) for fraction in scheduler.FRACTIONS]  # 0 at the start, 1 from the peak on
    annealed = [max(0.0, fraction - c.warmup) / (1 - c.warmup) for fraction in scheduler.FRACTIONS]
    cosine = [max(0.5 + 0.5 * math.cos(math.pi * x), 1e-4) for x in annealed]
    curve = [c.start * (1 - up) + c.anneal * math.log(down) for up, down in zip(warm, cosine, strict=True)]
    found["schedule_fraction"] += c.peak + torch.tensor(curve, dtype=torch.float32)
    found["schedule_length"] += c.length + c.start_length * (1 - torch.tensor(warm, dtype=torch.float32))

    # The second moment after n steps is 1 - decay^n of what it will be, so its inverse root is too large at first.
    rms_decay = 1 - 1e-3 * math.exp(10 * c.rms_offset)
    bias = [math.log(1 - rms_decay ** (10**log_step)) for log_step in scheduler.LOG_STEPS]
    found["schedule_early"] += c.bias_correction / 2 * torch.tensor(bias, dtype=torch.float32)
    decades = torch.tensor(scheduler.LOG_STEPS, dtype=torch.float32) - math.log10(300)
    early, late = (-decades).clamp(min=0), decades.clamp(min=0)
    found["schedule_step"] += c.unknown_level + c.unknown_early * early + c.unknown_late * late

    vectors, matrices = found["tensor_powers"]  # (start, end) x feature each, see `scheduler.tensor_features`
    vectors[:, 0] = c.vectors
    matrices[:, 1] = 2 * c.scale
    matrices[:, 2] = c.size
    matrices[:, 3] = c.fan_in
    found["tensor_powers"][:, :, 4] = c.depth
    for end, (strength, mix) in enumerate(((c.strength_start, c.mix_start), (c.strength_end, c.mix_end))):
        found["tensor_powers"][:, end, 5:] = 2 / 3 * strength
        found["momentum_mix"][end] = torch.tensor([mix, 0.0, -mix], dtype=torch.float32)
    found["orthogonal"] += torch.tensor([c.orthogonal_start, c.orthogonal_end], dtype=torch.float32)
    levels = (c.hidden, c.hidden_fan_in), (c.embedding, 0.0), (c.output, 0.0)
    found["roles"] += torch.tensor(levels, dtype=torch.float32)
    for name in ("first_scale", "cap", "decay"):
        found[name] += getattr(c, name)
    found["growth"] += c.growth
    found["centering"] += torch.tensor([c.centering_start, c.centering_end], dtype=torch.float32)
    found["caution"] += torch.tensor([c.caution_start, c.caution_end], dtype=torch.float32)
    offsets = (c.fast_offset, c.slow_offset / 2, c.slow_offset)
    found["momentum_decays"] += torch.tensor(offsets, dtype=torch.float32)
    found["rms_decays"] += c.rms_offset
    return found


class TensorFacts(NamedTuple):
    """What the factors of T tensors depend on, beside the time."""

    mean_squares: Tensor  # (T, 4) as `scheduler.multipliers` takes them, of the coordinates that had a gradient
    first_square: Tensor  # (T,) mean square before the first step
    shapes: Tensor  # (T, 4) as `scheduler.shape_features` gives them
    roles: Tensor  # (T, 3) as `role_features` gives them


def multipliers(
    meta_params: Mapping[str, Tensor],
    tensors: TensorFacts,
    step: Tensor,
    num_steps: Tensor | int | None,
    *,
    decays: feats.Decays,
    stepsize: float,
) -> scheduler.Multipliers:
    """`scheduler.multipliers` for T tensors, with their roles, growth, first scale and cap.

    Args:
        meta_params: with the names and shapes of `SHAPES`.
        tensors: what is known of them.
        step: () or (T,) updates made so far.
        num_steps: the run's length, or None where it is unknown.
        decays: effective decays, as `Scheduled.decays` gives them.
        stepsize: what the factors multiply, for the cap.
    """
    mean_squares, shapes = tensors.mean_squares, tensors.shapes
    noise = noise_strength(decays.momentum[2], decays.rms[0], step)
    start, end = meta_params["growth"]
    fraction = scheduler.progress(step.to(mean_squares.dtype), num_steps).reshape(-1)
    extra = torch.lerp(start, end, fraction) * growth(mean_squares, shapes, noise)
    level, slope = meta_params["roles"].unbind(1)
    extra = extra + (tensors.roles * (level + slope * shapes[:, 2:3])).sum(1)
    extra = extra + meta_params["first_scale"] * first_scale(tensors)
    found = scheduler.multipliers(meta_params, mean_squares, shapes, step, num_steps, extra)
    return found._replace(factor=capped(meta_params, found, tensors, step, num_steps, stepsize))


def role_features(shape: tuple[int, ...], role: str | None) -> tuple[float, ...]:
    """1 for the tensor's role, 0 for the other `ROLE_FEATURES`; all 0 for vectors and unknown roles.

    Example:
        >>> role_features((8, 4), "hidden"), role_features((8,), "hidden"), role_features((8, 4), None)
        ((1.0, 0.0, 0.0), (0.0, 0.0, 0.0), (0.0, 0.0, 0.0))
    """
    hidden = matrix.is_matrix(shape, role)
    found = (hidden, role == "embedding", role == "output")
    return tuple(float(one and len(shape) > 1) for one in found)


def is_table(shape: tuple[int, ...], role: str | None) -> bool:
    """Whether a batch reads some rows of a tensor: what has no gradient in a step then stays as it is, moments too.

    So a rare row's step does not depend on how rare it is.
    """
    return role == "embedding" and len(shape) > 1


def first_scale(tensors: TensorFacts) -> Tensor:
    """(T,) log of a matrix's first root mean square relative to torch's usual one, at most 0; 0 where it began at 0.

    Steps are relative to a power of the present scale below 1. So a matrix that begins small, as those of a SIREN or of
    a matrix factorization, takes larger steps relative to itself than one of the usual scale.
    """
    log_scale = (torch.log(tensors.first_square.clamp(min=1e-30)) + math.log(10) * (tensors.shapes[:, 2] + 1.5)) / 2
    smaller = (log_scale - math.log(USUAL)).clamp(max=0)
    return smaller * (tensors.first_square > 0) * (1 - tensors.shapes[:, 0])


def capped(
    meta_params: Mapping[str, Tensor],
    found: scheduler.Multipliers,
    tensors: TensorFacts,
    step: Tensor,
    num_steps: Tensor | int | None,
    stepsize: float,
) -> Tensor:
    """(T,) factors with which no matrix moves farther than the cap allows, relative to its root mean square.

    The root mean square of a direction is at most the sum of its momenta's strengths, by the triangle inequality, which
    is what is compared. The cap falls with the schedule. `FLOORS` bound the scale from below.

    Args:
        meta_params: with the names and shapes of `SHAPES`.
        found: the factors without a cap, and the momenta's weights.
        tensors: what is known of them.
        step: () or (T,) updates made so far.
        num_steps: the run's length, or None where it is unknown.
        stepsize: what the factors multiply.
    """
    strengths = tensors.mean_squares[:, 1:].clamp(min=1e-30).sqrt()
    direction = stepsize * (found.momenta * strengths).sum(1)
    began_at_zero = (tensors.first_square == 0).to(strengths.dtype)
    floors = FLOORS[1] + (FLOORS[0] - FLOORS[1]) * began_at_zero
    scale = torch.maximum(tensors.mean_squares[:, 0].clamp(min=1e-30).sqrt(), floors)
    cap = torch.exp(meta_params["cap"]) * scale * annealed(meta_params, step, num_steps)
    return torch.where(tensors.shapes[:, 0] > 0, found.factor, torch.minimum(found.factor, cap / direction))


def annealed(meta_params: Mapping[str, Tensor], step: Tensor, num_steps: Tensor | int | None) -> Tensor:
    """The schedule's curve over the run relative to its highest point, from 0 to 1; 1 where the length is unknown."""
    if num_steps is None:
        return torch.ones_like(step)
    curve = meta_params["schedule_fraction"]
    fraction = scheduler.progress(step.to(curve.dtype), num_steps)
    return torch.exp(scheduler.interpolate(fraction, scheduler.FRACTIONS, curve) - curve.max())


def decay(meta_params: Mapping[str, Tensor], step: Tensor, num_steps: Tensor | int | None) -> Tensor:
    """The fraction that a matrix loses in a step, besides the update: () or (T,), as `step`.

    It goes with the schedule, and its sum over the run does not depend on the run's length. A run of unknown length
    decays as one of a thousand steps, and after those as one that ends now.

    Example:
        >>> round(float(decay({"decay": torch.tensor([3.0])}, torch.tensor(1999.0), None)), 6)
        0.0015
    """
    lost = meta_params["decay"].squeeze(0) * annealed(meta_params, step, num_steps)
    if num_steps is None:
        return lost / (step + 1).clamp(min=1000)
    return lost / scheduler.length_as_tensor(num_steps, lost).clamp(min=10)


def centered(grad: Tensor, fraction: Tensor, shard: TensorShard | None = None) -> Tensor:
    """Remove a fraction of its mean over the fan-in from a matrix's gradient; vectors and scalars stay as they are.

    Inputs that are not centered, such as pixels and the outputs of a ReLU, move all weights of a unit alike: one
    direction of far larger curvature than the others, which limits the step size. Source: Yong et al. 2020, "Gradient
    centralization" (arXiv 2004.01461), eq. 1, which is `fraction` 1. Two deviations. A fraction below 1 keeps some of
    what depends on the inputs' mean, without which a logistic regression can fail. And a coordinate whose gradient is
    0, such as that of a pixel that is always black, is left alone: its second moment would hold nothing but that mean,
    and it would move as far as any other.

    Args:
        grad: (*shape); the fan-in is all dims but the first, as in `nn.Linear` and `nn.Conv2d`.
        fraction: () between 0 and 1; 0 changes nothing.
        shard: the shard of the tensor that `grad` covers; None for all of it.

    Example:
        >>> centered(torch.tensor([[1.0, 0.0, 5.0], [1.0, 1.0, 1.0]]), torch.tensor(0.5))
        tensor([[0.0000, 0.0000, 4.0000],
                [0.5000, 0.5000, 0.5000]])
    """
    if grad.dim() < 2:
        return grad
    dims = tuple(range(1 - grad.dim(), 0))
    if shard is None or shard.has_whole(dims):
        mean = grad.mean(dims, keepdim=True)
    else:
        (rows,) = means(shard, (grad, dims))
        mean = shard.local(rows.reshape(-1, *[1] * len(dims)))
    return torch.where(grad == 0, grad, grad - fraction * mean)


def cautious(direction: Tensor, grad: Tensor, caution: Tensor) -> Tensor:
    """Multiply a direction by 1 - `caution` wherever its sign is not the gradient's.

    A momentum that runs on past a minimum is what makes large steps oscillate. Source: Liang et al. 2024, "Cautious
    optimizers" (arXiv 2411.16085), which is `caution` 1. Two deviations: the direction is not divided by the fraction
    of coordinates that are kept, since the scheduler's factor can make up for it; and where the gradient is 0, as in
    rows of an embedding that a batch does not touch, momenta go on.

    Args:
        direction: (*shape).
        grad: (*shape).
        caution: () between 0 and 1; 0 changes nothing.

    Example:
        >>> cautious(torch.tensor([1.0, 1.0, 1.0]), torch.tensor([2.0, 0.0, -2.0]), torch.tensor(0.75))
        tensor([1.0000, 1.0000, 0.2500])
    """
    return direction * (1 - caution * (direction * grad < 0))  # torch.where takes four times as long


def noise_strength(momentum: Tensor, second: Tensor, step: Tensor) -> Tensor:
    """The log of a momentum's squared strength when gradients are white noise, after `step` + 1 of them.

    From zero and without bias correction, after n steps the mean square of a momentum of decay b is
    (1 - b) / (1 + b) (1 - b^2n) times the gradient's, and a second moment of decay c is 1 - c^n times it.

    Args:
        momentum: () decay of the momentum.
        second: () decay of the second moment.
        step: () or (T,) updates made so far; the result has its shape.

    Example:
        >>> noise_strength(torch.tensor(0.99), torch.tensor(0.99), torch.tensor([0.0, 1e5])).exp()
        tensor([0.0100, 0.0050])
    """
    number = step.to(momentum.dtype) + 1
    of_momentum = torch.log((1 - momentum) / (1 + momentum)) + torch.log(
        -torch.expm1(2 * number * momentum.abs().log())
    )
    return of_momentum - torch.log(-torch.expm1(number * torch.log(second)))


def growth(mean_squares: Tensor, shapes: Tensor, noise: Tensor) -> Tensor:
    """(T,) log of how far the root mean square exceeds 1 / sqrt(fan-in), for matrices that only noise moves; else 0.

    Layers start near 1 / sqrt(fan-in) (torch's at 0.58 of it, He's at 1.4), so this measures growth without storing
    the initial value. Matrices also grow as they learn, behind sigmoids by factors of twenty. But white noise makes
    the slowest momentum exactly as strong as `noise_strength` says; learning makes it stronger, falling gradients
    weaker. Growth counts in full within e^+-DOUBT of that strength, and not at all beyond twice that distance.

    Args:
        mean_squares: (T, 4) as `scheduler.multipliers` takes them.
        shapes: (T, 4) as `scheduler.shape_features` gives them.
        noise: () or (T,) as `noise_strength` gives it.

    Example:
        >>> shapes = torch.tensor([scheduler.shape_features((8, 4))] * 3)
        >>> squares, strength = torch.tensor([0.2, 1.0, 1.0]), torch.tensor([5e-4, 5e-4, 1e-3])
        >>> mean_squares = torch.stack([squares, strength, strength, strength], 1)
        >>> growth(mean_squares, shapes, torch.tensor(5e-4).log())
        tensor([0.0000, 0.6931, 0.0000])
    """
    fan_in = math.log(10) * (shapes[:, 2] + 1.5)
    grown = ((torch.log(mean_squares[:, 0].clamp(min=1e-30)) + fan_in) / 2).clamp(min=0)
    signal = torch.log(mean_squares[:, 3].clamp(min=1e-12)) - noise
    return grown * (2 - signal.abs() / DOUBT).clamp(0, 1) * (1 - shapes[:, 0])


register("scheduled", Scheduled)
