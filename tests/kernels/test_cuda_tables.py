"""What the Triton kernels share on the host: tables that are right, and small, and let go of tensors."""

import gc
import weakref

import pytest
import torch
from triton_cases import DEVICE, QUIET, Run, make_rule, triton

from lightning_lopt.kernels.cuda import layout, tables

pytestmark = QUIET
CONFIGS = {"scheduled": {}}  # of every kind that has Triton kernels
KINDS = pytest.mark.parametrize("kind", CONFIGS)


def new_run(kind, shapes=((4, 3), (5,)), roles=None):
    run = Run(make_rule(kind, **CONFIGS[kind]), shapes, safeguard=True, roles=roles)
    run.draw()
    return run


@KINDS
def test_a_step_after_the_first_works_nothing_out_again(kind, monkeypatch):
    run = new_run(kind)
    run.step()

    def refuse(*_, **__):
        raise AssertionError("this is known, and a CUDA graph cannot capture a copy from the host")

    for module, name in (
        (torch, "tensor"),
        (layout, "memory_order"),
        (tables, "memory_order"),
        (tables, "check_shapes"),
    ):
        monkeypatch.setattr(module, name, refuse)
    run.step()


@KINDS
def test_sets_of_tensors_that_take_turns_keep_their_tables(kind, monkeypatch):
    monkeypatch.setattr(tables, "launch", lambda *_, **__: None)
    monkeypatch.setattr(f"lightning_lopt.kernels.cuda.{kind}.launch", lambda *_, **__: None)
    run, made = new_run(kind, [(number + 1,) for number in range(tables.PLANS_KEPT + 1)]), []
    make, params = run.kernel.plan_type, list(zip(run.params, run.states, run.grads, strict=True))
    monkeypatch.setattr(run.kernel, "plan_type", lambda *arguments: made.append(1) or make(*arguments))

    def step(number):
        run.params, run.states, run.grads = ([each] for each in params[number])
        run.step()

    for _ in range(2):
        for number in range(tables.PLANS_KEPT):
            step(number)
    assert len(made) == tables.PLANS_KEPT
    step(0)
    step(tables.PLANS_KEPT)  # one too many: the least recently used one goes
    step(0)
    assert len(made) == tables.PLANS_KEPT + 1
    step(1)
    assert len(made) == tables.PLANS_KEPT + 2


@KINDS
def test_calls_that_take_turns_are_told_apart_without_a_look(kind, monkeypatch):
    monkeypatch.setattr(f"lightning_lopt.kernels.cuda.{kind}.launch", lambda *_, **__: None)
    run = new_run(kind)
    tensors = [run.params, run.states, run.grads]

    def step(first, end):
        run.params, run.states, run.grads = (each[first:end] for each in tensors)
        run.step()

    for first in (0, 1):
        step(first, first + 1)
    monkeypatch.setattr(run.kernel, "_look", lambda *_: pytest.fail("these tensors are known"))
    for first in (0, 1):
        run.draw()
        step(first, first + 1)


@KINDS
@pytest.mark.parametrize("name", ["dtype", "layout", "device", "negative"])
def test_gradients_of_another_kind_are_noticed(kind, name, monkeypatch):
    run, looks = new_run(kind), []
    run.step()
    run.reference_step()
    look = run.kernel._look
    monkeypatch.setattr(run.kernel, "_look", lambda *arguments: looks.append(1) or look(*arguments))
    changed = {
        "dtype": lambda grad: grad.bfloat16(),
        "layout": lambda grad: grad.t().contiguous().t(),
        "device": lambda grad: grad.to("meta"),
        "negative": torch._neg_view,
    }[name]
    run.draw()
    run.grads[0] = changed(run.grads[0])
    if name == "device":
        with pytest.raises(RuntimeError, match="meta"):
            run.step()
    else:
        run.step()
        run.reference_step()
        run.check(2e-2 if name == "dtype" else 2e-5)
    assert looks == [1]


@KINDS
def test_tables_keep_no_tensor_alive(kind):
    run = new_run(kind)
    run.step()
    tensors = [*run.params, *run.grads, *(t for state in run.states for t in state.values())]
    alive = [weakref.ref(tensor) for tensor in tensors]
    del tensors
    run.params, run.grads, run.states = [], [], []
    gc.collect()
    assert [ref() for ref in alive] == [None] * len(alive)


def pruned(run):
    run.params[0].data = run.params[0].data[:2].clone()
    run.grads[0] = run.grads[0][:2].clone()


def grown(run):
    run.params[0].resize_(8, 3)
    run.grads[0] = torch.ones(8, 3, device=DEVICE)


def transposed_in_place(run):
    run.params[0].t_()
    run.grads[0].t_()


def old_gradient(run):
    run.params[0].data = torch.ones(6, 3, device=DEVICE)


def state_of_another_size(run):
    name = next(name for name, tensor in run.states[0].items() if tensor.dim() > 1)
    run.states[0][name] = run.states[0][name][..., :1].clone()


def state_resized_in_place(run):
    name = next(name for name, tensor in run.states[0].items() if tensor.dim() > 1)
    run.states[0][name].resize_(*run.states[0][name].shape[:-1], 1)


@pytest.mark.parametrize(
    "change", [pruned, grown, transposed_in_place, old_gradient, state_of_another_size, state_resized_in_place]
)
@KINDS
def test_a_tensor_that_no_longer_fits_is_an_error_that_says_which(kind, change):
    run = new_run(kind)
    run.step()
    change(run)
    run.states[1] = {name: tensor.clone() for name, tensor in run.states[1].items()}
    before = run.snapshot()
    shape = str(tuple(run.params[0].shape)).replace("(", r"\(").replace(")", r"\)")
    with pytest.raises(RuntimeError, match=rf"of a parameter of shape {shape} .*optimizer.state\[parameter\]"):
        run.step()
    assert all(torch.equal(a, b) for a, b in zip(before, run.snapshot(), strict=True))


@KINDS
def test_state_that_comes_with_the_new_size_is_taken(kind):
    run = new_run(kind)
    run.step()
    pruned(run)
    run.states[0] = run.new_state(run.params[0])
    run.copies, run.copied = [p.clone() for p in run.params], [{n: t.clone() for n, t in s.items()} for s in run.states]
    run.step()
    run.reference_step()
    run.check()


@KINDS
def test_state_of_another_layout_or_dtype_is_brought_into_order(kind):
    run = new_run(kind)
    run.step()
    run.reference_step()
    for name, tensor in run.states[0].items():
        if tensor.dim() > 1 and tensor.is_floating_point():
            run.states[0][name] = tensor.double().transpose(0, -1).contiguous().transpose(0, -1)
    run.both()
    run.check()


@KINDS
@pytest.mark.parametrize("dtype", [torch.int64, torch.float32])
def test_step_counters_go_on_beyond_what_float32_counts(kind, dtype):
    run = new_run(kind)
    for state, copied in zip(run.states, run.copied, strict=True):
        copied["step"] += 2**24
        state["step"] = copied["step"].to(dtype)
    for _ in range(3):
        run.both(num_steps=10**8)
    run.check()
    assert [state["step"].tolist() for state in run.states] == [2**24 + 3] * 2


@KINDS
def test_the_default_dtype_and_device_do_not_matter(kind):
    ends = []
    for leak in (False, True):
        torch.manual_seed(0)
        run = new_run(kind)
        if leak:
            torch.set_default_dtype(torch.bfloat16)
            torch.set_default_device("meta")
        try:
            squares = run.step(num_steps=10, measure=True)
        finally:
            torch.set_default_dtype(torch.float32)
            torch.set_default_device(None)
        ends.append([*run.snapshot(), squares.change, *squares.terms.values()])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


@KINDS
def test_lazy_and_overlapping_gradients_are_read_as_their_clones(kind):
    ends = []
    for clone in (True, False):
        torch.manual_seed(0)
        run = new_run(kind, [(4, 3), (4, 3), (5,)])
        run.grads[0] = torch._neg_view(run.grads[0])
        run.grads[1] = torch.ones(3, device=DEVICE).expand(4, 3)
        run.grads[2] = torch.arange(12.0, device=DEVICE)[2::2]
        if clone:
            run.grads = [grad.clone() for grad in run.grads]
        run.step()
        ends.append(run.snapshot())
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_learning_rates_on_the_device():
    run = new_run("scheduled")
    rate = torch.tensor(0.25, dtype=torch.float64, device=DEVICE)
    run.step(scale=rate, decay=0.5)
    run.reference_step(scale=0.25, decay=0.5)
    run.check()


def test_autograd_notices_the_step():
    run = new_run("scheduled")
    version = run.params[0]._version
    run.step()
    assert run.params[0]._version > version


def test_an_old_triton_says_what_to_install(monkeypatch):
    assert tables.outdated() is None
    monkeypatch.setattr(triton, "__version__", "3.5.1")
    assert tables.outdated().startswith("triton 3.5.1 is too old")
    assert "install torch >= 2.10" in tables.outdated()


class Subclass(torch.Tensor):
    pass


@pytest.mark.parametrize(
    ("param", "why"),
    [
        (torch.ones(3, dtype=torch.float64), "float64"),
        (torch.ones(4, 4)[:, ::2], "gaps"),
        (torch.ones(1).expand(4, 4), "gaps"),
        (torch._neg_view(torch.ones(3)), "lazy negation"),
        (torch.ones(3).as_subclass(Subclass), "Subclass"),
    ],
)
def test_what_is_left_to_the_rule(param, why):
    assert why in tables.refuses(param)
    assert tables.refuses(torch.ones(3, 3).t()) is None


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type == "cpu", reason="CUDA graphs need a GPU")
@KINDS
@pytest.mark.parametrize("elsewhere", [False, True])  # where the graph has gradients of its own
def test_a_captured_step_is_the_step(kind, elsewhere):
    ends = []
    for captured in (False, True):
        torch.manual_seed(0)
        run = new_run(kind, [(4, 3), (24, 16), (5,)], ["hidden", "hidden", None])
        run.step()  # tables are sent, kernels compiled
        if elsewhere:
            kept = run.grads  # their memory is not given to the new ones
            run.grads = [grad.clone() for grad in kept]
        if captured:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                run.step()
        for _ in range(3):
            graph.replay() if captured else run.step()
        ends.append(run.snapshot())
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type == "cpu", reason="only a GPU can be waited for")
@KINDS
def test_a_step_does_not_wait_for_the_device(kind):
    run = new_run(kind, [(4, 3), (24, 16), (5,)], ["hidden", "hidden", None])
    run.step()
    run.draw()  # gradients elsewhere
    torch.cuda.set_sync_debug_mode("error")
    try:
        run.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
