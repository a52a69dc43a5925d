"""The C++ kernels take tensors of every dtype, layout and size, and never touch memory that is not theirs."""

import contextlib
import copy
import ctypes
import gc
import math
import os
import resource
import weakref
from pathlib import Path

import pytest
import torch
from kernel_cases import RULES, SHAPES, assert_same, both
from optimizer_cases import assert_equal, parameters, run, set_gradients, snapshot
from torch import nn

from lightning_lopt import RuleOptimizer
from lightning_lopt.kernels.cpu import scheduled, star, tensors
from lightning_lopt.rules import make

MODULES = {"scheduled": scheduled, "star": star}


@pytest.fixture(params=RULES)
def rule(request):
    made = RULES[request.param]()
    if why := MODULES[request.param].supports(made):
        pytest.skip(why)
    return made


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2e-2), (torch.float16, 2e-3)], ids=str)
def test_low_precision_parameters_have_float32_state(rule, dtype, tolerance):
    # One rounding in other direction is a step of the parameter's grid, and is forgotten in the state.
    reference, fused = both(lambda: parameters(SHAPES[:10], dtype), rule, 20)
    assert_same(reference, fused, tolerance)
    assert {t.dtype for p in fused.state for t in fused.state[p].values()} <= {torch.float32, torch.int64}


def layouts(dtype=torch.float32):
    conv, matrix = (p.detach() for p in parameters([(8, 5, 3, 3), (40, 30)], dtype))
    return [
        nn.Parameter(conv.clone().to(memory_format=torch.channels_last)),
        nn.Parameter(matrix.clone().t()),
        nn.Parameter(matrix.clone()[:, ::2]),
        nn.Parameter(torch._neg_view(matrix.clone())),
        nn.Parameter(torch.cat([torch.zeros(7, dtype=dtype), matrix.flatten()])[7:].view(40, 30)),
    ]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)], ids=str)
def test_memory_layouts_are_kept(rule, dtype, tolerance):
    if dtype not in MODULES[rule.kind].make.dtypes:
        pytest.skip("this kernel computes in float32 alone")
    assert_same(*(pair := both(lambda: layouts(dtype), rule, 10, safeguard=True)), tolerance)
    strides = [p.stride() for p in layouts()]
    for optimizer in pair:
        assert [p.stride() for p in optimizer.state] == strides


GRADIENTS = {
    "expanded": lambda: torch.arange(6.0).expand(4, 6),
    "overlapping": lambda: torch.arange(20.0).as_strided((4, 6), (1, 2)),
    "negative bit": lambda: torch._neg_view(torch.arange(24.0).view(4, 6)),
    "imaginary part of a conjugate": lambda: torch.randn(4, 6, dtype=torch.complex64).conj().imag,
    "offset": lambda: torch.arange(30.0)[6:].view(4, 6),
    "transposed": lambda: torch.arange(24.0).view(6, 4).t(),
    "lazy clone": lambda: torch._lazy_clone(torch.arange(24.0).view(4, 6)),
}


@pytest.mark.parametrize("make", GRADIENTS.values(), ids=GRADIENTS)
def test_gradients_of_every_form_do_what_their_clones_do(rule, make):
    grad, found = make(), []
    for given in (grad, grad.clone().resolve_neg().contiguous()):
        (param,) = parameters([(4, 6)])
        param.grad = given
        optimizer = RuleOptimizer([param], rule, backend="fused")
        optimizer.step()
        found.append(snapshot(optimizer))
    assert_equal(*found)


def test_three_hundred_tensors_in_groups(rule):
    def make():
        params = parameters([(3 + i % 7, 2 + i % 5) if i % 3 else (1 + i % 40,) for i in range(300)])
        return [
            {"params": params[:100], "lr": 0.5, "weight_decay": 0.1},
            {"params": params[100:200], "lr": torch.tensor(2.0), "maximize": True},
            {"params": params[200:]},
        ]

    assert_same(*both(make, rule, steps=4))


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e-12, 1e6, 1e12], ids=str)
def test_gradients_of_every_size(rule, scale):
    reference, fused = both(lambda: parameters(SHAPES[:10]), rule, steps=10, scale=scale, safeguard=True)
    assert reference.num_skipped() == fused.num_skipped() == 0
    assert_same(reference, fused, 1e-4)


@pytest.mark.parametrize("threads", [2, 3])
def test_the_number_of_threads_does_not_matter(rule, threads):
    def stepped():
        optimizer = RuleOptimizer(parameters([(300, 400), (40,), (3, 50000)]), rule, safeguard=True)
        run(optimizer, 3)
        return snapshot(optimizer)

    one = stepped()
    torch.set_num_threads(threads)
    try:
        assert_equal(one, stepped())
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("first", ["reference", "fused"])
def test_state_dicts_go_from_one_backend_to_the_other(rule, first):
    params = parameters(SHAPES[:10])
    optimizer = RuleOptimizer(params, rule, backend=first)
    run(optimizer, 5)
    for _ in range(2):
        other = RuleOptimizer(params, rule, backend="fused" if optimizer.backend == "reference" else "reference")
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        run(other, 5, start=5)
        optimizer = other
    alone = RuleOptimizer(parameters(SHAPES[:10]), rule, backend=first)
    for start in (0, 5, 5):
        run(alone, 5, start=start)
    for a, b in zip(snapshot(alone), snapshot(optimizer), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_moved_memory_is_found(rule):
    params = parameters([(40, 30), (5,)])
    twins = [nn.Parameter(p.detach().clone()) for p in params]
    optimizer, twin = RuleOptimizer(params, rule), RuleOptimizer(twins, rule)
    run(optimizer, 2)
    params[0].data = params[0].detach().clone()
    state = optimizer.state[params[0]]
    state["exp_avg"] = state["exp_avg"].clone()
    state["exp_avg_sq"].data = state["exp_avg_sq"].detach().double()  # as if loaded by other means
    state["exp_avg"].data = state["exp_avg"].mT.contiguous().mT
    state["step"].data = state["step"].clone()
    run(optimizer, 2, start=2)
    run(twin, 4)
    assert_equal(snapshot(optimizer), snapshot(twin))


def pruned(param, optimizer):
    param.data = param.detach()[:2]


def grown(param, optimizer):
    param.data = torch.cat([param.detach(), torch.ones(20, 6)])


def transposed(param, optimizer):
    param.data = param.detach().t().contiguous()


def state_handed_over(param, optimizer):
    other = nn.Parameter(torch.ones(20, 6))
    optimizer.state[other] = optimizer.state.pop(param)
    optimizer.param_groups[0]["params"][0] = other


def shrunk_in_place(param, optimizer):
    optimizer.state[param]["exp_avg"].resize_(3, 2, 6)


def gradient_alone(param, optimizer):
    param.data = param.detach()[:2]
    param.grad = torch.ones(2, 6)
    param.data = torch.ones(4, 6)


@pytest.mark.parametrize("backend", ["fused", "eager"])
@pytest.mark.parametrize(
    "change", [pruned, grown, transposed, state_handed_over, shrunk_in_place, gradient_alone], ids=lambda f: f.__name__
)
def test_other_sizes_than_the_states_are_an_error_that_names_the_parameter(rule, change, backend, monkeypatch):
    if backend == "eager":
        monkeypatch.setattr(MODULES[rule.kind], "supports", lambda *_: "no compiler here")
    (param,) = parameters([(4, 6)])
    optimizer = RuleOptimizer([param], rule, safeguard=True)
    run(optimizer, 2)
    optimizer.zero_grad()
    change(param, optimizer)
    param = optimizer.param_groups[0]["params"][0]
    if param.grad is None:
        param.grad = torch.ones_like(param)
    before = snapshot(optimizer)
    with pytest.raises(
        RuntimeError,
        match=r"of parameter 0 of group 0 .* has shape .*expected shape .* zero_grad\(\) .*delete optimizer.state",
    ):
        optimizer.step()
    assert_equal(before, snapshot(optimizer))


@pytest.mark.parametrize("backend", ["fused", "eager"])
def test_the_default_dtype_and_device_change_nothing(rule, backend, monkeypatch):
    if backend == "eager":
        monkeypatch.setattr(MODULES[rule.kind], "supports", lambda *_: "no compiler here")

    def stepped(context):
        params = parameters(SHAPES[3:6])
        optimizer = RuleOptimizer(params, rule, num_steps=9, safeguard=True)
        for step in range(3):
            for param in params:
                param.grad = torch.sin(param.detach() * (step + 1))
            optimizer.measure_next_step()
            with context:
                optimizer.step()
        return snapshot(optimizer)

    expected = stepped(contextlib.nullcontext())
    assert_equal(expected, stepped(_DefaultDtype(torch.float64)))
    assert_equal(expected, stepped(_DefaultDtype(torch.bfloat16)))
    assert_equal(expected, stepped(torch.device("meta")))


class _DefaultDtype(contextlib.AbstractContextManager):
    def __init__(self, dtype):
        self.dtype = dtype

    def __enter__(self):
        torch.set_default_dtype(self.dtype)

    def __exit__(self, *error):
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int32, torch.int64])
def test_step_counters_of_every_dtype_count_on(rule, dtype):
    """In 64 bits: float32 stands still at 2^24."""
    optimizer = RuleOptimizer(parameters([(4, 3), (5,)]), rule, num_steps=9)
    expected = RuleOptimizer(parameters([(4, 3), (5,)]), rule, num_steps=9)
    run(optimizer, 1)
    run(expected, 4)
    for state in optimizer.state.values():
        state["step"] = state["step"].to(dtype)
    run(optimizer, 3, start=1)
    for a, b in zip(expected.param_groups[0]["params"], optimizer.param_groups[0]["params"], strict=True):
        assert torch.equal(a, b)
        assert optimizer.state[b]["step"] == 4
    for state in optimizer.state.values():
        state["step"].fill_(2**24)
    run(optimizer, 3)
    assert all(state["step"] == 2**24 + 3 for state in optimizer.state.values())


@pytest.mark.parametrize(("name", "dtype"), [("skipped_in_row", torch.int32), ("skipped", torch.float32)])
def test_counters_of_other_dtypes_are_an_error(rule, name, dtype):
    optimizer = RuleOptimizer(parameters([(4, 3)]), rule, safeguard=True)
    run(optimizer, 1)
    state = next(iter(optimizer.state.values()))
    state[name] = state[name].to(dtype)
    with pytest.raises(RuntimeError, match=f"State '{name}' of parameter 0 of group 0 .* is {dtype}, expected"):
        run(optimizer, 1)


def test_parameters_that_left_the_optimizer_are_freed(rule):
    (param,) = parameters([(4, 3)])
    optimizer, gone = RuleOptimizer([param], rule), []
    for _ in range(3):
        run(optimizer, 1)
        gone += [weakref.ref(param), *map(weakref.ref, [optimizer.state[param]["exp_avg"]])]
        other = nn.Parameter(param.detach().clone())
        optimizer.state.pop(param)
        optimizer.param_groups[0]["params"][0] = param = other
        run(optimizer, 1)
    gc.collect()
    assert [reference() is None for reference in gone] == [True] * len(gone)


def test_autograd_notices_that_a_parameter_has_changed(rule):
    (param,) = parameters([(4, 3)])
    optimizer = RuleOptimizer([param], rule, backend="fused")
    loss = param.square().sum()
    param.grad = torch.ones_like(param)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_measurements_are_those_of_the_rule(rule):
    measured = []
    for backend in ("reference", "fused"):
        params = parameters(SHAPES[:10])
        optimizer = RuleOptimizer(params, rule, backend=backend, safeguard=True)
        run(optimizer, 2)
        set_gradients(params, 2)
        params[5].grad[0] = math.nan
        optimizer.measure_next_step()
        optimizer.step()
        measured.append(optimizer.take_metrics())
    for name in ("update_rms", "nominal_share"):
        torch.testing.assert_close(*(getattr(each, name) for each in measured), rtol=1e-4, atol=0)
    assert [int(each.skipped) for each in measured] == [1, 1]


def test_a_measured_step_has_the_same_bits(rule):
    found = []
    for measure in (False, True):
        optimizer = RuleOptimizer(parameters(SHAPES[:10]), rule)
        for step in range(3):
            set_gradients(optimizer.param_groups[0]["params"], step)
            if measure:
                optimizer.measure_next_step()
            optimizer.step()
        found.append(snapshot(optimizer))
    assert_equal(*found)


LIMITS = {
    torch.float32: 3.4028234e38,
    torch.bfloat16: 3.3895e38,
    torch.float16: 65504.0,
    torch.float64: 1.7976931348623157e308,
}


@pytest.mark.parametrize("shape", [(5,), (3, 40000)], ids=str)
@pytest.mark.parametrize(
    ("kind", "dtype"), [("scheduled", dtype) for dtype in LIMITS] + [("hyperparam", dtype) for dtype in [*LIMITS][:3]]
)
def test_values_at_the_end_of_the_range_are_skipped_as_the_reference_does(kind, dtype, shape):
    rule = make(kind, nominal_stepsize=1.0)
    results = []
    for backend in ("reference", "fused"):
        param = nn.Parameter(torch.ones(shape, dtype=dtype))
        with torch.no_grad():
            param[..., -1] = LIMITS[dtype]
        param.grad = -torch.ones_like(param)
        optimizer = RuleOptimizer([param], rule, lr=LIMITS[dtype] / 50, safeguard=True, backend=backend)
        before = param.detach().clone()
        optimizer.step()
        assert torch.equal(param, before)
        results.append(snapshot(optimizer))
    assert_equal(results[0], results[1])
    assert optimizer.num_skipped() == 1


def test_python_and_cpp_agree_about_their_structs(rule):
    module = MODULES[rule.kind]
    for dtype in module.make.dtypes:
        kernel = module.make(rule, dtype)
        sizes = ctypes.sizeof(kernel.rule_struct), kernel.geometry_struct.size
        library = module.make._library(rule.config, dtype)
        tensors.check_layout(library, *sizes)
        with pytest.raises(RuntimeError, match="has structs of"):
            tensors.check_layout(library, sizes[0] + 8, sizes[1])


def in_another_process(function):
    """What a function prints there, and the exit status; it may use up what the process is allowed to have."""
    reading, writing = os.pipe()
    if (child := os.fork()) == 0:
        status = 1
        try:
            os.write(writing, function().encode())
            status = 0
        finally:
            os._exit(status)
    os.close(writing)
    with os.fdopen(reading) as stream:
        printed = stream.read()
    return printed, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def refused(optimizer, limit):
    """Take a step in a process that gets no more threads, or no more memory."""
    if limit == "threads":
        torch.set_num_threads(4)
        if os.getuid() == 0:
            os.setresuid(54321, 54321, 54321)  # root may have as many as it wants
        resource.setrlimit(resource.RLIMIT_NPROC, (1, 1))
    else:
        used = resource.getpagesize() * int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (used, used))
        malloc = ctypes.CDLL(None).malloc
        malloc.restype, malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
        while malloc(1 << 20):  # what has been freed before
            pass
    before = optimizer.param_groups[0]["params"][1].detach().tolist()
    try:
        optimizer.step()
        said = "stepped"
    except MemoryError as error:
        said = str(error)
    torch.set_num_threads(1)
    return f"{said} {before != optimizer.param_groups[0]['params'][1].detach().tolist()}"


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's limits")
@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        ("threads", "stepped True"),
        (
            "memory",
            "There is not enough memory for the optimizer's step. No parameter and no state has changed. False",
        ),
    ],
)
@pytest.mark.parametrize(("kind", "config"), [("scheduled", {"centering_start": 1.0}), ("star", {})])
def test_what_the_system_refuses_is_done_without_or_said(kind, config, limit, expected):
    optimizer = RuleOptimizer(parameters([(1000000, 1), (40,)]), make(kind, **config), backend="fused")
    run(optimizer, 1)
    assert in_another_process(lambda: refused(optimizer, limit)) == (expected, 0)
