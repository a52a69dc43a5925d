"""TF32, which rounds products of float32 to three digits, is off where numbers are counted on; CPUs have none."""

import pytest
import torch
from lightning_cases import KNOWN_WARNINGS
from meta_cases import Parabola, fit, meta, star
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_lopt import RuleOptimizer
from lightning_lopt.meta.unroll import full_precision
from lightning_lopt.rules import REGISTRY, make
from lightning_lopt.rules import features as feats
from lightning_lopt.rules.dmd import OnlineDMD
from lightning_lopt.rules.shards import means

pytestmark = KNOWN_WARNINGS


@pytest.fixture
def tf32():
    """As `torch.set_float32_matmul_precision("medium")`, to which Lightning advises."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("medium")
    torch.backends.cudnn.allow_tf32 = True
    yield
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.allow_tf32 = before[1]


def settings():
    return torch.get_float32_matmul_precision(), torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32


@pytest.mark.usefixtures("tf32")
def test_it_is_off_in_meta_training_and_as_before_afterwards(tmp_path):
    seen = []

    class Looks(Parabola):
        def loss(self, params, batch):
            seen.append(settings())
            return super().loss(params, batch)

    fit(tmp_path, meta(tasks=[Looks()], validation_tasks=[Looks(name="held out")]), max_steps=1)
    assert set(seen) == {("highest", False, False)}
    assert settings() == ("medium", True, True)
    with pytest.raises(ZeroDivisionError), full_precision(torch.device("cpu")):
        raise ZeroDivisionError
    assert settings() == ("medium", True, True)


def newer_settings(rank):
    matmul, conv = torch.backends.cuda.matmul, torch.backends.cudnn.conv
    matmul.fp32_precision = conv.fp32_precision = "tf32"
    with full_precision(torch.device("cpu")):
        assert (matmul.fp32_precision, conv.fp32_precision) == ("ieee", "ieee")
    assert (matmul.fp32_precision, conv.fp32_precision) == ("tf32", "tf32")


@pytest.mark.skipif(not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="torch of before 2.9")
def test_so_it_is_where_torchs_newer_settings_are_used():
    torch.multiprocessing.start_processes(newer_settings, nprocs=1, start_method="fork")  # the settings do not mix


class Products(TorchDispatchMode):
    """Matrix products of float32 tensors."""

    NAMES = ("mm", "mv", "dot", "vdot", "bmm", "addmm", "addmv", "addbmm", "baddbmm", "linear", "convolution")

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.__name__.split(".")[0] in self.NAMES and result.dtype == torch.float32:
            self.found.append(func.__name__)
        return result


def on_a_device_that_is_no_cpu(shape):
    return torch.randn(shape, device="meta")


def test_statistics_are_sums_that_it_does_not_touch():
    rule, grad, param = star().to("meta"), on_a_device_that_is_no_cpu((5, 3)), on_a_device_that_is_no_cpu((5, 3))
    with Products() as products:
        state = feats.update_accumulators(rule.init_state(param), grad, rule.decays(rule.meta_params()))
        groups = feats.input_features(state, grad, param)
        mean_squares = list(map(feats.inverse_root_of_mean, means(None, *map(feats.mean_square_of, groups))))
    assert products.found == []
    with Products() as products:  # but the network's are products: the user's own choice
        time = feats.time_features(torch.zeros((), device="meta"), param.dtype)
        rule.heads(rule.meta_params(), groups, mean_squares, time)
    assert products.found


@pytest.mark.parametrize("rank", [1, 2])
def test_inner_products_of_snapshots_are_so_too(rank):
    dmd, value = OnlineDMD(rank=rank, num_snapshots=4), on_a_device_that_is_no_cpu((50,))
    with Products() as products:
        dmd.push([dmd.init(value)], [value])
    assert products.found == []
    with Products() as products:
        dmd.push([dmd.init(torch.zeros(50))], [torch.zeros(50)])
    assert bool(products.found) == (rank == 1)  # a CPU has no TF32


@pytest.mark.parametrize("kind", sorted(REGISTRY))
def test_every_kind_keeps_its_state_in_float32_at_least(kind):
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        rule, expected = make(kind), torch.promote_types(dtype, torch.float32)
        param = torch.nn.Parameter(torch.ones(3, 2, dtype=dtype))
        optimizer = RuleOptimizer([param], rule, backend="reference", num_steps=9)
        param.grad = torch.full_like(param, 0.1)
        optimizer.step(loss=torch.tensor(1.0))
        floating = {t.dtype for name, t in optimizer.state[param].items() if t.is_floating_point() and name != "step"}
        assert floating <= {expected}
        assert param.dtype == dtype
        assert param.isfinite().all()


@pytest.mark.parametrize("kind", ["star", "lstm_dmd", "k_momentums", "multiscale_adam"])
def test_a_step_that_the_scaler_skips_is_as_if_it_had_not_been(kind):
    def run(bad_step):
        torch.manual_seed(0)
        rule, param = make(kind), torch.nn.Parameter(torch.ones(3, 2))
        optimizer, scaler = RuleOptimizer([param], rule, safeguard=True), torch.amp.GradScaler("cpu", init_scale=1024.0)
        for step in range(6):
            target = torch.randn(3, 2, generator=torch.Generator().manual_seed(step))
            for spoilt in [True, False] if step == bad_step else [False]:
                optimizer.zero_grad()
                loss = (param - target).square().mean()
                scaler.scale(loss * (1e38 if spoilt else 1)).backward()
                scaler.step(optimizer)
                scaler.update()
        return [param.detach(), *optimizer.state[param].values()], scaler.get_scale()

    (sound, scale), (skipped, halved) = run(None), run(3)
    assert halved == scale / 2  # the scaler saw an infinity
    assert all(torch.equal(a, b) for a, b in zip(sound, skipped, strict=True))
