"""What a rule keeps once a run, not once a tensor: shared, saved, resumed, copied, batched, sharded."""

import copy
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
from lightning_lopt.meta.estimators import FullUnroll
from lightning_lopt.meta.unroll import Unroll
from lightning_lopt.rules import StepContext, UpdateRule, WaitingTensor, make
from lightning_lopt.tasks import make as make_task


class NoState(NamedTuple):
    pass


class Losses(NamedTuple):
    """The run's state of `LossAverage`."""

    average: Tensor  # ()
    steps: Tensor  # () int64


class LossAverage(UpdateRule):
    """Minus the gradient, times the average loss of the run; one learned decay."""

    needs_loss = True
    needs_run_state = True
    needs_num_steps = True

    def __init__(self) -> None:
        super().__init__(kind="test_run")
        self.decay = nn.Parameter(torch.tensor(0.75))
        self.waiting: list[tuple[WaitingTensor, ...]] = []

    def init_state(self, param: Tensor) -> NoState:
        return NoState()

    def init_run_state(self, like: Tensor) -> Losses:
        return Losses(like.new_zeros(()), like.new_zeros((), dtype=torch.int64))

    def update_run_state(
        self, meta_params: Mapping[str, Tensor], run: Losses, params: Mapping[str, Tensor], context: StepContext
    ) -> Losses:
        self.waiting.append(tuple(context.waiting))
        decay = meta_params["decay"]
        return Losses(decay * run.average + (1 - decay) * context.loss, run.steps + 1)

    def update(
        self, meta_params: Mapping[str, Tensor], grad: Tensor, state: NoState, param: Tensor, context: StepContext
    ) -> tuple[Tensor, NoState]:
        return -1e-4 * context.run.average.to(grad) * grad, state


def velo(**config: Any) -> UpdateRule:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        rule = make("velo", **{"lstm_hidden_size": 4, "param_inits": 2, "step_mult": 1e-3, **config})
        for value in rule.parameters():
            nn.init.normal_(value, std=0.3)
    return rule


RULES = {
    "average": LossAverage,
    "velo": velo,
    "velo, long": lambda: velo(max_training_steps=40),
    "velo, old": lambda: velo(bugged_lstm_state=True, bugged_loss_features=True),
}


def averages(losses: list[float]) -> list[float]:
    average, found = 0.0, []
    for loss in losses:
        average = 0.75 * average + 0.25 * loss
        found.append(average)
    return found


def test_it_is_updated_once_a_step_and_given_to_every_tensor():
    params = parameters([(3,), (2, 2), (0, 3)])
    optimizer = RuleOptimizer(params, LossAverage(), num_steps=9)
    start = [param.detach().clone() for param in params]
    for loss in (4.0, 2.0):
        for param in params:
            param.grad = torch.ones_like(param)
        optimizer.step(loss=loss)
    for param, old in zip(params, start, strict=True):
        torch.testing.assert_close(param.detach(), old - 1e-4 * sum(averages([4.0, 2.0])))
    state = optimizer.state[params[0]]
    assert list(state) == ["step", "run_average", "run_steps"]
    assert int(state["run_steps"]) == 2
    assert all(optimizer.state[params[1]][name] is state[name] for name in ("run_average", "run_steps"))
    assert not optimizer.state.get(params[2])


def test_it_outlasts_each_tensor():
    """One that is frozen, one that joins, one whose state is dropped: the run goes on."""
    first, second, third = params = parameters([(3,), (2, 2), (4,)])
    rule = LossAverage()
    optimizer = RuleOptimizer([first, second], rule, num_steps=9)
    losses = [4.0, 2.0, 1.0, 3.0, 5.0]
    for step, loss in enumerate(losses):
        if step == 3:
            optimizer.add_param_group({"params": [third]})
            del optimizer.state[first]
        moving = ([first], [first, second], [second], [third], [second, third])[step]
        for param in params:
            param.grad = torch.ones_like(param) if any(param is each for each in moving) else None
        optimizer.step(loss=loss)
        for param in moving:
            assert float(optimizer.state[param]["run_average"]) == pytest.approx(averages(losses)[step])
    assert [[w.param.shape for w in each] for each in rule.waiting] == [[], [], [(3,)], [(2, 2)], []]
    assert optimizer.state[second]["run_steps"] is optimizer.state[third]["run_steps"]
    assert int(optimizer.state[third]["run_steps"]) == 5


def test_the_step_that_makes_state_for_a_checkpoint_does_not_count():
    """As torch.distributed.checkpoint takes it: lr 0, gradients 0, and without loss or length."""
    params = parameters([(4, 3), (3,)])
    optimizer = RuleOptimizer.replacing(torch.optim.SGD(params, lr=0.0), LossAverage())
    for param in params:
        param.grad = torch.zeros_like(param)
    optimizer.step()
    for param in params:
        assert {name: float(value) for name, value in optimizer.state[param].items()} == {
            "step": 0,
            "run_average": 0,
            "run_steps": 0,
        }


def test_the_length_of_the_run_must_be_known():
    params = parameters([(4, 3)])
    optimizer = RuleOptimizer(params, LossAverage())
    set_gradients(params, 0)
    with pytest.raises(RuntimeError, match="Rule 'test_run' must know the length of the run. Pass num_steps="):
        optimizer.step(loss=1.0)


def through_file(state_dict: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("stop", [1, 4, 5])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", RULES)
def test_resume_is_equal_to_the_bit(name, dtype, stop):
    def optimizer_of(params):
        return RuleOptimizer(
            [{"params": params[:2]}, {"params": params[2:], "lr": 0.5}], rule, num_steps=50, safeguard=True
        )

    rule = RULES[name]()
    optimizer = optimizer_of(parameters(dtype=dtype))
    run(optimizer, stop, loss=0.5)
    other = optimizer_of([nn.Parameter(p.detach().clone()) for g in optimizer.param_groups for p in g["params"]])
    other.load_state_dict(through_file(optimizer.state_dict()))
    assert_equal(snapshot(optimizer), snapshot(other))
    for each in (optimizer, other):
        run(each, 6, start=stop, loss=0.25)
    assert_equal(snapshot(optimizer), snapshot(other))


def test_it_keeps_its_precision_beside_tensors_of_another():
    params = [*parameters([(3,)], torch.float64), *parameters([(2,)], torch.float32)]
    optimizer = RuleOptimizer(params, LossAverage(), num_steps=9)
    run(optimizer, 3, loss=1 / 3)
    other = RuleOptimizer([nn.Parameter(param.detach().clone()) for param in params], LossAverage(), num_steps=9)
    other.load_state_dict(through_file(optimizer.state_dict()))
    states = [other.state[param]["run_average"] for param in other.param_groups[0]["params"]]
    assert {state.dtype for state in states} == {torch.float64}
    assert_equal(snapshot(optimizer), snapshot(other))


@pytest.mark.parametrize("broken", ["run_average", "run_steps"])
def test_a_checkpoint_without_it_is_refused(broken):
    optimizer = RuleOptimizer(parameters([(3,)]), LossAverage(), num_steps=9)
    run(optimizer, 2, loss=1.0)
    saved = copy.deepcopy(optimizer.state_dict())
    del saved["state"][0][broken]
    with pytest.raises(ValueError, match=f"State '{broken}' of parameter .* is missing in the checkpoint"):
        RuleOptimizer(parameters([(3,)]), LossAverage(), num_steps=9).load_state_dict(saved)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["copy", "pickle"])
def test_a_copy_goes_its_own_way_from_the_same_place(duplicate):
    optimizer = RuleOptimizer(parameters(), velo(), num_steps=40)
    run(optimizer, 4, loss=0.5)
    other = duplicate(optimizer)
    run(other, 5, start=50, loss=7.0)
    run(optimizer, 4, start=4, loss=0.25)
    reference = RuleOptimizer(parameters(), velo(), num_steps=40)
    run(reference, 4, loss=0.5)
    run(reference, 4, start=4, loss=0.25)
    assert_equal(snapshot(optimizer), snapshot(reference))


def test_a_measured_step_is_the_same_step():
    optimizers = [RuleOptimizer(parameters(), velo(), num_steps=40) for _ in range(2)]
    for step in range(5):
        optimizers[0].measure_next_step()
        for optimizer in optimizers:
            run(optimizer, 1, start=step, loss=0.5)
        assert optimizers[0].take_metrics().update_rms > 0
    assert_equal(*(snapshot(optimizer) for optimizer in optimizers))


def test_a_tensor_that_is_skipped_is_as_it_was_and_the_run_goes_on():
    params = parameters([(4, 3), (3,)])
    optimizer = RuleOptimizer(params, velo(), num_steps=40, safeguard=True)
    run(optimizer, 2, loss=0.5)
    kept = {name: value.clone() for name, value in optimizer.state[params[1]].items()}
    before = params[1].detach().clone()
    set_gradients(params, 2)
    params[1].grad[0] = math.nan
    optimizer.step(loss=0.25)
    assert torch.equal(params[1], before)
    state = optimizer.state[params[1]]
    changed = {name for name, value in kept.items() if not torch.equal(state[name], value)}
    assert changed == {"skipped", "skipped_in_row", "run_means", "run_lows", "run_steps", "run_seen"}


# --- meta-training


@pytest.mark.parametrize("name", RULES)
def test_the_optimizer_and_the_unroll_take_the_same_path(name):
    """Three runs at once, in vmap and each of its own length, against one after the other."""
    rule = RULES[name]()
    task = make_task("linear-regression")
    unroll = Unroll(rule, task, objective="raw")
    meta_params = {name: value.detach() for name, value in rule.meta_params().items()}
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([60, 90, 30])
    inner = unroll.start(generator, lengths)
    start, path, batches = inner.params, [], []
    with torch.no_grad():
        for _ in range(6):
            inner, record, batch = unroll.slot(meta_params, inner, generator, None)
            path.append(inner.params)
            batches.append(batch)
    for member, length in enumerate(lengths.tolist()):
        params = {name: nn.Parameter(value[member].clone()) for name, value in start.items()}
        optimizer = RuleOptimizer(params.values(), rule, num_steps=length)
        for batch, expected in zip(batches, path, strict=True):
            own = torch.utils._pytree.tree_map(lambda leaf, member=member: leaf[member], batch)
            grads, loss = task.grad_and_value({name: param.detach() for name, param in params.items()}, own)
            for name, param in params.items():
                param.grad = grads[name]
            optimizer.step(loss=loss)
            assert_close(
                [param.detach() for param in params.values()], [expected[name][member] for name in params], 1e-3
            )


def test_a_new_episode_begins_with_a_new_run():
    unroll = Unroll(LossAverage(), make_task("linear-regression"), objective="raw")
    generator = torch.Generator().manual_seed(0)
    meta_params = {name: value.detach() for name, value in unroll.rule.meta_params().items()}
    inner = unroll.start(generator, torch.tensor([2, 5]))
    seen = []
    for _ in range(4):
        inner, _, _ = unroll.slot(meta_params, inner, generator, lambda n: torch.full((n,), 9))
        seen.append(inner.run.steps.tolist())
    assert seen == [[1, 1], [2, 2], [0, 3], [1, 4]]


@pytest.mark.parametrize("name", ["average", "velo"])
def test_meta_gradients_flow_through_it(name):
    rule = RULES[name]()
    unroll = Unroll(rule, make_task("linear-regression"), objective="raw")
    meta_params = {name: value.detach() for name, value in rule.meta_params().items()}
    estimator, generator = FullUnroll(num_runs=2, horizon=4), torch.Generator().manual_seed(0)
    estimate = estimator.estimate(unroll, meta_params, estimator.init(unroll, meta_params, generator), generator)
    assert estimate.finite
    assert all(grad.isfinite().all() for grad in estimate.meta_grad.values())
    assert all(estimate.meta_grad[name].any() for name in ("decay",) if name in meta_params)
    assert all(estimate.meta_grad[name].any() for name in ("gates_w", "w0", "initial_hidden") if name in meta_params)


# --- sharded


SHARDED = [(5, 3), (7,), (1,), (4, 4), (4,)]  # the third leaves one process nothing; the last is as long as a state


def sharded_worker(rank: int, folder: str) -> None:
    from sharded_cases import Shard, distribute_tensor
    from torch.distributed import destroy_process_group, init_process_group
    from torch.distributed.device_mesh import init_device_mesh

    torch.set_num_threads(1)
    init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    for number, make_rule in enumerate(RULES.values()):
        plain = parameters(SHARDED)
        params = [nn.Parameter(distribute_tensor(p.detach(), mesh, [Shard(0)])) for p in plain]
        optimizer = RuleOptimizer(params, make_rule(), num_steps=50, safeguard=True)
        for step in range(5):
            set_gradients(plain, step)
            for param, other in zip(params, plain, strict=True):
                param.grad = distribute_tensor(other.grad, mesh, [Shard(0)])
            if step == 3:
                params[1].grad = None
            optimizer.step(loss=0.5 / (1 + step))
        of_run = [v for k, v in optimizer.state[params[0]].items() if k.startswith("run_")]
        of_run = [v.full_tensor() if hasattr(v, "full_tensor") else v for v in of_run]
        torch.save(([p.full_tensor().detach() for p in params], of_run), f"{folder}/{number}-{rank}.pt")
    destroy_process_group()


@pytest.mark.skipif(torch.__version__ < (2, 5), reason="DTensor of torch 2.4 lacks operations that some rules need")
def test_two_processes_with_a_shard_each_are_one(tmp_path):
    torch.multiprocessing.start_processes(sharded_worker, (str(tmp_path),), nprocs=2, start_method="fork")
    for number, make_rule in enumerate(RULES.values()):
        first, second = (torch.load(tmp_path / f"{number}-{rank}.pt") for rank in range(2))
        assert_equal(first[0] + first[1], second[0] + second[1])
        alone = parameters(SHARDED)
        optimizer = RuleOptimizer(alone, make_rule(), num_steps=50, safeguard=True)
        for step in range(5):
            set_gradients(alone, step)
            if step == 3:
                alone[1].grad = None
            optimizer.step(loss=0.5 / (1 + step))
        assert_close(first[0], [param.detach() for param in alone], 1e-5)
        assert_close(first[1], [v for k, v in optimizer.state[alone[0]].items() if k.startswith("run_")], 1e-6)
