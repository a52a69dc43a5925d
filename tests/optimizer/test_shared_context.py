"""What a rule computes from all tensors at once: the same in meta-training and deployment, saved, resumed, sharded."""

import copy
import dataclasses
import io
import math
import pickle
from collections.abc import Mapping
from typing import Any, NamedTuple

import pytest
import torch
from optimizer_cases import assert_close, assert_equal, parameters, run, set_gradients, snapshot
from torch import Tensor, nn

from lightning_lopt import RuleOptimizer
from lightning_lopt.meta.estimators import FullUnroll, TruncatedBackprop
from lightning_lopt.meta.schedules import Horizon
from lightning_lopt.meta.unroll import Unroll
from lightning_lopt.rules import StepContext, UpdateRule, dmd, make
from lightning_lopt.tasks import Start, Task

FORMS = [
    {"rank": 1, "num_snapshots": 4},
    {"rank": 2, "num_snapshots": 4, "snapshots": "increments", "loss_scale": 1.0},
    {"rank": 2, "num_snapshots": 4, "snapshots": "shifted", "nominal_stepsize": 1e-2},
    {"rank": 1, "num_snapshots": 4, "method": "sketch", "sketch_size": 4},
]


def lstm_dmd(seed: int = 0, **config) -> UpdateRule:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make("lstm_dmd", **{"num_snapshots": 4, **config})


class CountState(NamedTuple):
    """Of `MeanGradient`."""

    calls: Tensor  # ()


class MeanGradient(UpdateRule):
    """A rule that moves all coordinates against the mean of all gradients, and counts; it keeps what it was given."""

    needs_shared_context = True

    def __init__(self) -> None:
        super().__init__(kind="test_mean")
        self.seen: list[dict[str, Any]] = []

    def init_state(self, param: Tensor) -> CountState:
        return CountState(torch.zeros((), dtype=torch.int64, device=param.device))

    def shared_context(
        self,
        meta_params: Mapping[str, Tensor],
        grads: Mapping[str, Tensor],
        states: Mapping[str, CountState],
        params: Mapping[str, Tensor],
        context: StepContext,
        *,
        in_place: bool = False,
    ) -> tuple[Tensor, dict[str, CountState]]:
        assert list(grads) == list(states) == list(params)
        self.seen.append({"context": context, "in_place": in_place, "grads": grads})
        mean = torch.stack([grad.double().mean() for grad in grads.values()]).mean()
        return mean, {key: CountState(state.calls + 1) for key, state in states.items()}

    def update(
        self, meta_params: Mapping[str, Tensor], grad: Tensor, state: CountState, param: Tensor, context: StepContext
    ) -> tuple[Tensor, CountState]:
        return -context.shared.to(param.dtype) * torch.ones_like(param), state


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Valley(Task):
    """A smooth loss of two tensors with a term that joins them."""

    name: str = "valley"

    def init(self, generator, population=None):
        lead = () if population is None else (population,)
        draw = {name: torch.randn((*lead, *shape), generator=generator) for name, shape in SHAPES.items()}
        return Start(draw, {})

    def loss(self, params, batch):
        scale = torch.linspace(0.1, 2, 6).reshape(3, 2)
        return (scale * params["w"] ** 2).sum() + ((params["w"].sum(0) - params["b"]) ** 2).sum()


SHAPES = {"w": (3, 2), "b": (2,)}
TASK = Valley()


def deployed(rule: UpdateRule, start: dict[str, Tensor], num_steps: int, **options) -> list[dict[str, Tensor]]:
    """The parameters before each step."""
    params = {name: nn.Parameter(value.clone()) for name, value in start.items()}
    optimizer = RuleOptimizer(params.values(), rule, **options)
    path = []
    for _ in range(num_steps):
        path.append({name: param.detach().clone() for name, param in params.items()})
        optimizer.zero_grad()
        loss = TASK.loss(params, {})
        loss.backward()
        optimizer.step(loss=loss.detach())
    return path


# --- meta-training and deployment


@pytest.mark.parametrize("safeguard", [False, True])
@pytest.mark.parametrize("config", FORMS, ids=str)
def test_the_optimizer_and_the_unroll_take_the_same_path(config, safeguard):
    """Three runs at once, in vmap and out of place, against one after the other and in place."""
    rule = lstm_dmd(**config)
    unroll = Unroll(rule, TASK, objective="raw", tell_horizon=False)
    meta_params = {name: value.detach() for name, value in rule.meta_params().items()}
    generator = torch.Generator().manual_seed(0)
    inner = unroll.start(generator, torch.full((3,), 100))
    start, path = inner.params, []
    with torch.no_grad():
        for _ in range(15):
            path.append(inner.params)
            inner, _, _ = unroll.slot(meta_params, inner, generator, lambda n: torch.full((n,), 100))
    for member in range(3):
        own = {name: value[member] for name, value in start.items()}
        for ours, theirs in zip(deployed(rule, own, 15, safeguard=safeguard), path, strict=True):
            for name in SHAPES:
                torch.testing.assert_close(ours[name], theirs[name][member], rtol=1e-5, atol=1e-5)


def test_the_eigenvalues_are_those_of_the_whole_trajectory(monkeypatch):
    rule, seen = lstm_dmd(rank=2, loss_scale=3.0), []
    shared_context = type(rule).shared_context

    def spy(self, *arguments, **options):
        shared, states = shared_context(self, *arguments, **options)
        seen.append((shared, arguments[-1].loss))
        return shared, states

    monkeypatch.setattr(type(rule), "shared_context", spy)
    start = TASK.init(torch.Generator().manual_seed(0)).params
    path = deployed(rule, start, 12)
    points = torch.stack([torch.cat([*(p.flatten() for p in params.values())]) for params in path], dim=1).double()
    losses = torch.stack([loss.double() for _, loss in seen])
    whole = torch.cat([points, 3.0 * losses.unsqueeze(0)])
    for step, (shared, _) in enumerate(seen):
        if step < 4:
            assert not shared.any()
        else:
            values = dmd.eigenvalues(whole[:, step - 4 : step + 1], 2, method="svd")
            torch.testing.assert_close(shared, dmd.features(values), rtol=0, atol=1e-7)


@pytest.mark.parametrize("second_order", [False, True])
def test_meta_gradients_flow_through_an_unroll(second_order):
    rule = lstm_dmd(rank=2, snapshots="increments")
    unroll = Unroll(rule, TASK, objective="raw", second_order=second_order)
    meta_params = {name: value.detach() for name, value in rule.meta_params().items()}
    for estimator in (FullUnroll(num_runs=2, horizon=12), TruncatedBackprop(2, 6, Horizon(9))):
        generator = torch.Generator().manual_seed(0)
        state = estimator.init(unroll, meta_params, generator)
        for _ in range(3):
            estimate = estimator.estimate(unroll, meta_params, state, generator)
            state = estimate.state
            assert estimate.finite
            assert all(grad.any() for grad in estimate.meta_grad.values())
        assert estimate.meta_grad["w_input0"][2:].any()  # the eigenvalues' rows


def test_rules_without_it_are_not_asked(monkeypatch):
    monkeypatch.setattr(UpdateRule, "shared_context", None)
    run(RuleOptimizer(parameters(), make("lstm")), 1)
    unroll = Unroll(make("lstm"), TASK)
    unroll.slot(unroll.rule.meta_params(), unroll.start(torch.Generator(), torch.tensor([5])), torch.Generator(), None)


# --- once a step, over all that moves


def test_one_call_a_step_over_all_groups():
    rule, params = MeanGradient(), parameters([(4,), (2, 3), (0, 3), (1,)])
    groups = [{"params": params[:1]}, {"params": params[1:3], "lr": 0.5}, {"params": params[3:], "maximize": True}]
    optimizer = RuleOptimizer(groups, rule, num_steps=7)
    before = [param.detach().clone() for param in params]
    set_gradients(params, 0)
    optimizer.step()
    assert len(rule.seen) == 1
    assert rule.seen[0]["in_place"]
    assert rule.seen[0]["context"].num_steps == 7
    mean = (params[0].grad.mean() + params[1].grad.mean() - params[3].grad.mean()) / 3
    for param, old, lr in zip(params, before, (1, 0.5, 0, 1), strict=True):
        torch.testing.assert_close(param.detach(), old - lr * mean)
    run(optimizer, 3, start=1)
    assert [int(each["context"].step) for each in rule.seen] == [0, 1, 2, 3]
    assert {int(optimizer.state[p]["calls"]) for p in params if p.numel()} == {4}


def test_parameters_without_gradient_are_not_in_it():
    rule, params = MeanGradient(), parameters([(4,), (5,), (6,)])
    params[1].requires_grad_(False)
    optimizer = RuleOptimizer(params, rule)
    set_gradients(params, 0)
    params[1].grad = None
    optimizer.step()
    assert [grad.numel() for grad in rule.seen[-1]["grads"].values()] == [4, 6]
    params[0].grad = None
    params[1].requires_grad_(True).grad = torch.ones(5)
    optimizer.step()
    assert [grad.numel() for grad in rule.seen[-1]["grads"].values()] == [5, 6]
    assert rule.seen[-1]["context"].step == 1  # that of the tensor with the most updates
    for param in params:
        param.grad = None
    optimizer.step()
    assert len(rule.seen) == 2


def test_a_frozen_parameter_makes_no_difference():
    rule = lstm_dmd(rank=2)
    alone, params = parameters([(4, 3), (3,)]), parameters([(4, 3), (3,)])
    frozen = nn.Parameter(torch.full((1000,), 7.0), requires_grad=False)
    optimizers = RuleOptimizer(alone, rule), RuleOptimizer([params[0], frozen, params[1]], rule)
    for step in range(10):
        for each in (alone, params):
            set_gradients(each, step)
        for optimizer in optimizers:
            optimizer.step()
    assert_equal(alone, params)
    assert not optimizers[1].state.get(frozen)


def test_a_group_that_is_added_later_joins_when_its_window_is_full():
    rule, params = lstm_dmd(), parameters([(4, 3), (3,)])
    first, second = params
    optimizer = RuleOptimizer([first], rule)
    alone = parameters([(4, 3), (3,)])[0]
    other = RuleOptimizer([alone], rule)
    for step in range(12):
        if step == 3:
            optimizer.add_param_group({"params": [second]})
        set_gradients([first], step)
        alone.grad = first.grad.clone()
        second.grad = torch.ones(3)
        optimizer.step()
        other.step()
        assert torch.equal(first, alone) == (step < 3 + 4), step
    assert [int(optimizer.state[param]["seen"]) for param in (first, second)] == [12, 9]


def test_the_step_that_makes_state_for_a_checkpoint_moves_nothing():
    """As torch.distributed.checkpoint takes it: lr 0, gradients 0; here under an lr that is only logged."""
    rule, params = lstm_dmd(), parameters([(4, 3), (3,)])
    optimizer = RuleOptimizer.replacing(torch.optim.SGD(params, lr=0.0), rule)
    before = [param.detach().clone() for param in params]
    for param in params:
        param.grad = torch.zeros_like(param)
    optimizer.step()
    assert_equal(before, [param.detach() for param in params])
    assert all(optimizer.state[param]["step"] == optimizer.state[param]["seen"] == 0 for param in params)


def test_a_sparse_gradient_is_refused_before_anything_changes():
    params = parameters([(4, 3), (4, 3)])
    optimizer = RuleOptimizer(params, lstm_dmd())
    run(optimizer, 2)
    before = snapshot(optimizer)
    params[1].grad = params[1].grad.to_sparse()
    with pytest.raises(RuntimeError, match="update rules take dense gradients"):
        optimizer.step()
    assert_equal(before, snapshot(optimizer))


def test_a_measured_step_is_the_same_step():
    optimizers = [RuleOptimizer(parameters(), lstm_dmd(nominal_stepsize=1e-2)) for _ in range(2)]
    for step in range(8):
        optimizers[0].measure_next_step()
        for optimizer in optimizers:
            run(optimizer, 1, start=step)
        assert optimizers[0].take_metrics().update_rms > 0
    assert_equal(*(snapshot(optimizer) for optimizer in optimizers))


# --- the safeguard


@pytest.mark.parametrize("config", FORMS, ids=str)
def test_a_skipped_step_is_as_if_it_had_not_been(config):
    """The snapshots, which are written in place, included."""
    rule = lstm_dmd(**config)
    skipping, plain = (RuleOptimizer(parameters([(4, 3), (3,)]), rule, safeguard=True) for _ in range(2))
    for step in range(14):
        if step in (2, 7, 8, 13):
            set_gradients(skipping.param_groups[0]["params"], step, scale=math.nan)
            skipping.step(loss=math.nan)
        for optimizer in (skipping, plain):
            run(optimizer, 1, start=step, loss=1 / (1 + step))
    assert skipping.num_skipped() == 8
    names = plain.state[plain.param_groups[0]["params"][0]].keys() - {"skipped"}
    for ours, theirs in zip(skipping.param_groups[0]["params"], plain.param_groups[0]["params"], strict=True):
        assert torch.equal(ours, theirs)
        assert_equal(
            *([optimizer.state[p][name] for name in names] for optimizer, p in ((skipping, ours), (plain, theirs)))
        )


def test_one_skipped_tensor_leaves_the_others_window_alone():
    optimizer = RuleOptimizer(parameters([(4, 3), (3,)]), lstm_dmd(rank=2), safeguard=True)
    first, second = optimizer.param_groups[0]["params"]
    for step in range(12):
        set_gradients([first, second], step)
        if step == 6:
            second.grad[0] = math.inf
        optimizer.step()
    assert [int(optimizer.state[param]["seen"]) for param in (first, second)] == [12, 11]
    assert all(param.isfinite().all() for param in (first, second))


# --- state


def through_file(state_dict: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("stop", [3, 5, 9])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("config", FORMS, ids=str)
def test_resume_is_equal_to_the_bit(config, dtype, stop):
    def make_optimizer(params):
        return RuleOptimizer([{"params": params[:2]}, {"params": params[2:], "lr": 0.5}], rule, safeguard=True)

    rule = lstm_dmd(**config)
    optimizer = make_optimizer(parameters(dtype=dtype))
    run(optimizer, stop, loss=0.5)
    other = make_optimizer([nn.Parameter(p.detach().clone()) for g in optimizer.param_groups for p in g["params"]])
    other.load_state_dict(through_file(optimizer.state_dict()))
    assert_equal(snapshot(optimizer), snapshot(other))
    for each in (optimizer, other):
        run(each, 8, start=stop, loss=0.25)
    assert_equal(snapshot(optimizer), snapshot(other))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["copy", "pickle"])
def test_a_copy_goes_its_own_way_from_the_same_place(duplicate):
    optimizer = RuleOptimizer(parameters(), lstm_dmd(rank=2))
    run(optimizer, 6)
    other = duplicate(optimizer)
    run(other, 5, start=50)
    run(optimizer, 4, start=6)
    reference = RuleOptimizer(parameters(), lstm_dmd(rank=2))
    run(reference, 10)
    assert_equal(snapshot(optimizer), snapshot(reference))


def test_state_is_under_each_parameter_and_nowhere_else():
    params = parameters([(4, 3), (3,)])
    optimizer = RuleOptimizer(params, lstm_dmd())
    run(optimizer, 1)
    saved = optimizer.state_dict()
    assert list(saved) == ["state", "param_groups"]
    for index, param in enumerate(params):
        assert list(saved["state"][index]) == ["step", *optimizer.rule.init_state(param)._fields]
        assert saved["state"][index]["snapshots"].shape == (5, *param.shape)


def test_snapshots_are_written_in_place_behind_the_optimizer():
    params = parameters([(4, 3)])
    optimizer = RuleOptimizer(params, lstm_dmd(), safeguard=True)
    run(optimizer, 1)
    address = optimizer.state[params[0]]["snapshots"].data_ptr()
    run(optimizer, 9, start=1)
    assert optimizer.state[params[0]]["snapshots"].data_ptr() == address


# --- sharded


def sharded_worker(rank: int, folder: str, config: dict[str, Any]) -> None:
    from sharded_cases import Shard, distribute_tensor
    from torch.distributed import destroy_process_group, init_process_group
    from torch.distributed.device_mesh import init_device_mesh

    torch.set_num_threads(1)
    init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    params = [nn.Parameter(distribute_tensor(p.detach(), mesh, [Shard(0)])) for p in parameters(SHARDED)]
    optimizer = RuleOptimizer(params, lstm_dmd(**config), safeguard=True)
    plain = [torch.empty(shape) for shape in SHARDED]
    for step in range(12):
        set_gradients(plain, step)
        for param, other in zip(params, plain, strict=True):
            param.grad = distribute_tensor(other.grad, mesh, [Shard(0)])
        optimizer.step(loss=0.5)
    seen = [optimizer.state[param] for param in params]
    local = [state["snapshots"].to_local().numel() for state in seen if hasattr(state["snapshots"], "to_local")]
    whole = [p.full_tensor().detach() for p in params], [state["gram"] for state in seen]
    torch.save((*whole, local), f"{folder}/{rank}.pt")
    destroy_process_group()


SHARDED = [(5, 3), (7,), (1,)]  # the last leaves one process nothing


@pytest.mark.parametrize("config", [*FORMS, {"rank": 2, "scope": "tensor"}], ids=str)
def test_two_processes_with_a_shard_each_are_one(tmp_path, config):
    torch.multiprocessing.start_processes(sharded_worker, (str(tmp_path), config), nprocs=2, start_method="fork")
    (first, grams, local), (second, other_grams, _) = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    alone = RuleOptimizer(parameters(SHARDED), lstm_dmd(**config), safeguard=True)
    run(alone, 12, loss=0.5)
    assert_equal([*first, *grams], [*second, *other_grams])
    assert_close(first, [p.detach() for p in alone.param_groups[0]["params"]], 1e-5)
    if config.get("method") != "sketch":
        rows = 5 if config.get("snapshots", "raw") == "raw" else 4
        assert local == [rows * 9, rows * 4, rows]
