"""Celo2 against the authors' trajectories, torch's AdamW and what its steps must be."""

import field_goldens as field
import goldens
import numpy as np
import pytest
import torch
from torch import nn

import lightning_lopt as lopt
from lightning_lopt.rules import Celo2, StepContext, celo2, make
from lightning_lopt.rules.shards import TensorShard, Unknown

THETA = field.theta("celo2")
RECORDED = {"lr": 0.01, "weight_decay": 0.1}
BASE = {"kind": "celo2_base", **RECORDED}
RUNS = {  # file -> how `from_jax` gives the rule that it records
    "celo2_base": BASE,
    "celo2_ortho": {"vector_mult": None, **RECORDED},
    "celo2_full": RECORDED,
}
SHAPES = [(), (7,), (6, 4), (4, 6), (5, 5), (8, 4, 3, 3), (4, 3, 5)]


def rms(tensor, dims=None):
    return tensor.square().mean(dims).sqrt()


def one_step(rule, grad, param=None, state=None, role="hidden", step=0, shard=None):
    meta_params = {key: value.detach().to(grad.dtype) for key, value in rule.meta_params().items()}
    param = torch.zeros_like(grad) if param is None else param
    state = rule.init_state(param) if state is None else state
    context = StepContext(torch.tensor(step, dtype=grad.dtype), role=role, shard=shard)
    return rule.update(meta_params, grad, state, param, context)


# --- the authors' trajectories


@pytest.mark.parametrize("leaf", [leaf for leaf in field.LEAVES if leaf != field.NEVER])
@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("layout", celo2.feats.LAYOUTS)
def test_replays_the_recorded_trajectory(layout, run, leaf):
    """In torch's layout the tensors are transposed, and in JAX's they are as the authors' code has them."""
    field.assert_replays(Celo2.from_jax(THETA, layout=layout, **RUNS[run]), field.record(run), leaf)


def test_names_of_arrays_as_npz_files_have_them():
    theta = {f"theta|ff_mod_stack|~|{name}": value.numpy() for name, value in THETA.items()}
    found, expected = Celo2.from_jax(theta), Celo2.from_jax(THETA)
    assert all(torch.equal(value, expected.state_dict()[name]) for name, value in found.state_dict().items())


@pytest.mark.parametrize("leaf", field.LEAVES)
def test_accumulators_are_the_recorded_ones(leaf):
    record = field.record("celo2_base")
    *_, (_, _, state) = field.replay(Celo2.from_jax(THETA, **BASE), leaf)
    fields = {"acc_m": state.exp_avg, "acc_rms": state.exp_avg_sq.unsqueeze(0), "acc_v_row": state.row}
    fields |= {"acc_v_col": state.col, "acc_v_diag": state.diag}
    for name, found in fields.items():
        expected = np.moveaxis(field.recorded(record, name, leaf), -1, 0)
        if not expected.size:
            assert not found.numel()
        elif name in ("acc_m", "acc_rms", "acc_v_diag"):
            expected = torch.stack([goldens.to_torch(each) for each in expected])
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)
        else:
            # Without one of its dims in the authors' order, then the dims that are left in torch's.
            lost = state.factored_dims[1 if name == "acc_v_row" else 0].item()
            order = celo2.feats.jax_order(state.exp_avg_sq.dim())
            kept = [dim - (dim > lost) for dim in order if dim != lost]
            torch.testing.assert_close(
                found.permute(0, *(1 + dim for dim in kept)), torch.tensor(expected), rtol=1e-9, atol=0
            )


def test_in_float32_it_stays_near():
    for leaf in ("mixed/e_conv", "edges/b_square"):
        rule, record = Celo2.from_jax(THETA, **BASE), field.record("celo2_base")
        *_, (_, param, _) = field.replay(rule, leaf, torch.float32)
        expected = goldens.to_torch(field.recorded(record, "params", leaf)[-1])
        torch.testing.assert_close(param.double(), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("run", RUNS)
def test_a_tensor_that_never_has_a_gradient_does_not_move_though_the_authors_does(run):
    start = goldens.to_torch(field.inputs("params0", field.NEVER)).double()
    for _, param, _ in field.replay(Celo2.from_jax(THETA, **RUNS[run]), field.NEVER):
        assert torch.equal(param, start)
    theirs = torch.tensor(field.recorded(field.record(run), "params", field.NEVER)[-1])
    assert (theirs - start).abs().max() > 0.1


# --- what has never had a gradient


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", celo2.KINDS)
def test_it_moves_from_its_first_gradient_on_however_small_or_sparse(kind, shape):
    rule = make(kind, weight_decay=0.1)
    param, state = torch.rand(shape) + 1, None
    for step in range(3):
        delta, state = one_step(rule, torch.zeros(shape), param, state, step=step)
        assert not delta.any()
    sparse = torch.zeros(shape)
    sparse.view(-1)[-1] = 1e-25  # its square is 0 in float32
    for step, grad in enumerate((sparse, *torch.zeros(3, *shape)), 3):
        delta, state = one_step(rule, grad, param, state, step=step)
        assert delta.all() if kind == "celo2_base" or len(shape) > 1 else delta.any()


def test_dead_coordinates_of_a_tensor_that_has_a_gradient_move_as_in_the_authors_code():
    grad = torch.randn(5, 4)
    grad[1] = 0
    delta, _ = one_step(make("celo2_base"), grad, torch.randn(5, 4))
    assert delta[1].all()


# --- the size of a step


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("options", [BASE, {"vector_mult": None}], ids=str)
def test_each_matrix_moves_by_the_step_size_whatever_the_scale_of_gradients(options, shape):
    rule = Celo2.from_jax(THETA, **{**options, "lr": 0.03, "weight_decay": 0.0})
    for scale in (1e-3, 1.0, 1e2):
        delta, _ = one_step(rule, scale * torch.randn(shape, dtype=torch.float64))
        sizes = rms(delta, tuple(range(len(shape)))[:2]) if shape else delta.abs()
        torch.testing.assert_close(sizes, torch.full_like(sizes, 0.03), rtol=1e-3, atol=0)


def test_each_position_of_a_kernel_is_a_matrix_of_its_own():
    grad = torch.randn(6, 4, 3, 3, dtype=torch.float64)
    whole = celo2.orthogonalized(grad)
    for row in range(3):
        for column in range(3):
            torch.testing.assert_close(whole[:, :, row, column], celo2.orthogonalized(grad[:, :, row, column]))


@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (5, 5), (1, 7), (7, 1)], ids=str)
def test_newton_schulz_keeps_singular_vectors_and_evens_singular_values(shape):
    matrix = torch.randn(shape, dtype=torch.float64)
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    found = left.mT @ celo2.orthogonalized(matrix) @ right.mT
    torch.testing.assert_close(found, torch.diag(found.diag()), rtol=0, atol=1e-12)
    assert (values / values.norm()).min() > 0.01
    assert ((found.diag() > 0.6) & (found.diag() < 1.25)).all()


def test_it_steps_the_same_on_a_matrix_and_on_its_kernel_of_size_one():
    grads = torch.randn(5, 6, 6, dtype=torch.float64)
    for kind in celo2.KINDS:
        rule, states, params = make(kind).double(), [None, None], [torch.zeros(6, 6), torch.zeros(6, 6, 1, 1)]
        params = [param.double() for param in params]
        for step, grad in enumerate(grads):
            for number in range(2):
                grad = grad.reshape(params[number].shape)
                delta, states[number] = one_step(rule, grad, params[number], states[number], step=step)
                params[number] = params[number] + delta
        torch.testing.assert_close(params[1][:, :, 0, 0], params[0], rtol=1e-9, atol=1e-12)


# --- AdamW


@pytest.mark.parametrize("role", ["embedding", "other", None])
@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("correction", ["bias_correction", "adam_bias_correction"])
def test_embeddings_and_vectors_move_as_by_torchs_adamw(correction, role, decay):
    shape = (7,) if role is None else (5, 3)
    rule = make("celo2", lr=0.01, weight_decay=decay, **{correction: True})
    param = nn.Parameter(torch.randn(shape, dtype=torch.float64))
    adamw = torch.optim.AdamW([param], lr=0.2, betas=(0.9, 0.95), eps=1e-8, weight_decay=decay)
    own, state = param.detach().clone(), None
    for step in range(20):
        grad = torch.randn(shape, dtype=torch.float64) * (2000 if step == 5 else 1)
        param.grad = grad.clone()
        adamw.step()
        delta, state = one_step(rule, grad, own, state, role, step)
        own = own + delta
        torch.testing.assert_close(own, param.detach(), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("role", ["hidden", "experts", "output", None])
def test_other_matrices_do_not(role):
    grad, rule = torch.randn(5, 3), make("celo2", vector_mult=None)
    other = make("celo2")
    other.load_state_dict(rule.state_dict())
    assert torch.equal(one_step(other, grad, role=role)[0], one_step(rule, grad)[0])
    assert not torch.equal(one_step(other, grad, role="embedding")[0], one_step(rule, grad)[0])


def test_celo2_base_moves_everything_by_the_network():
    rule = make("celo2_base")
    assert make("celo2").uses_roles
    assert not rule.uses_roles
    grad = torch.randn(5, 3)
    assert torch.equal(one_step(rule, grad, role="embedding")[0], one_step(rule, grad, role=None)[0])


def test_the_optimizer_warns_of_matrices_of_unknown_roles():
    model = nn.Linear(3, 2)
    model(torch.ones(1, 3)).sum().backward()
    with pytest.warns(UserWarning, match="roles of 1 matrices in the net are unknown"):
        lopt.RuleOptimizer(model.parameters(), make("celo2")).step()


# --- options that the published rules do not use


def reference_step(theta, options, param, grads):
    """The authors' direction of a matrix (in, out), fewer inputs than outputs, after these gradients; in NumPy."""
    momenta, second, rows, columns = np.zeros((3, *param.shape)), np.zeros(param.shape), 0.0, 0.0
    decays = np.array([0.9, 0.99, 0.999]).reshape(3, 1, 1)
    for grad in grads:
        momenta = decays * momenta + (1 - decays) * grad
        second = 0.95 * second + 0.05 * grad**2
        square = np.stack([grad**2 + 1e-30] * 3)
        rows = decays * rows + (1 - decays) * square.mean(2, keepdims=True)
        columns = decays * columns + (1 - decays) * square.mean(1, keepdims=True)

    def factors():
        of_rows = np.maximum(rows / (rows.mean(1, keepdims=True) + 1e-9), 1e-9) ** -0.5
        return of_rows * np.maximum(columns, 1e-9) ** -0.5

    by_factors = grad * factors()
    if options.get("bias_correction"):
        correction = 1 - decays ** len(grads)
        momenta, rows, columns = momenta / correction, rows / correction, columns / correction
        second = second / (1 - 0.95 ** len(grads))
    root = (second + 1e-8) ** -0.5
    blocks = [grad[None], grad[None].clip(-0.1, 0.1), param[None], momenta, second[None], momenta * root, root[None]]
    blocks += [by_factors, (grad * root)[None], rows, columns, (rows + 1e-8) ** -0.5, (columns + 1e-8) ** -0.5]
    channels = np.concatenate(
        [np.broadcast_to(block, (len(block), *param.shape)) for block in [*blocks, momenta * factors()]]
    )
    channels = channels * ((channels**2).mean((1, 2), keepdims=True) + 1e-9) ** -0.5
    first = np.concatenate([theta[f"w0__{block}"] for block in range(14)])
    units = np.moveaxis(channels, 0, -1) @ first + theta["b0"]
    for layer in (1, 2):
        units = np.tanh(units) if options.get("tanh") else np.maximum(units, 0)
        units = units @ theta[f"w{layer}"] + theta[f"b{layer}"]
    direction = units[..., 0] * np.exp(options.get("exp_mult", 0.0) * units[..., 1])
    return direction * ((direction**2).mean() + 1e-9) ** -0.5


@pytest.mark.parametrize("options", [{}, {"tanh": True}, {"exp_mult": 0.5}, {"bias_correction": True}], ids=str)
@pytest.mark.parametrize("layout", celo2.feats.LAYOUTS)
def test_options_of_the_authors_code(layout, options):
    rule = Celo2.from_jax(THETA, kind="celo2_base", lr=1.0, layout=layout, **options)
    theta = {name: value.numpy() for name, value in THETA.items()}
    generator = np.random.default_rng(0)
    param, grads, state = generator.normal(size=(4, 6)), generator.normal(size=(5, 4, 6)), None
    for step, grad in enumerate(grads):
        tensors = [field.laid(rule, array) for array in (grad, param)]
        delta, state = one_step(rule, *tensors, state, step=step)
        expected = -reference_step(theta, options, param, grads[: step + 1])
        torch.testing.assert_close(delta, field.laid(rule, expected), rtol=1e-9, atol=1e-12)
        param = param + expected


# --- shards


def sharded_step(rule, grads, param, split, role):
    """Two steps on the two halves of a tensor, with the sums that `optimizer.sharding.together` would exchange."""
    halves, values = param.chunk(2, split), []
    starts = [0, halves[0].shape[split]]
    states = [None, None]
    for step, grad in enumerate(grads):
        shards = []
        for half, begin in zip(halves, starts, strict=True):
            start = [0] * param.dim()
            start[split] = begin
            shards.append(TensorShard(param.shape, start, half.shape, [split]))
        if states[0] is None:
            whole = rule.init_state(param)
            states = [whole._replace(**cut) for cut in _cuts(whole, split)]
        results = [None, None]
        while None in results:
            asked = {}
            for number, shard in enumerate(shards):
                shard.asked = 0
                pieces = grad.chunk(2, split)[number], halves[number], states[number]
                try:
                    results[number] = one_step(rule, *pieces, role, step, shard)
                except Unknown as unknown:
                    asked[number] = unknown.sums
            if asked:
                assert len(asked) == 2  # all processes ask the same questions
                for shard in shards:
                    shard.known.append([sum(pair) for pair in zip(*asked.values(), strict=True)])
        halves = [half + delta for half, (delta, _) in zip(halves, results, strict=True)]
        states = [state for _, state in results]
        values = [shard.asked for shard in shards]
    return torch.cat(halves, split), values


def _cuts(state, split):
    fields = {"exp_avg": split + 1, "exp_avg_sq": split}
    fields |= {"diag": split + 1} if state.diag.numel() else {}
    pieces = {name: getattr(state, name).chunk(2, dim) for name, dim in fields.items()}
    return [{name: piece[number] for name, piece in pieces.items()} for number in range(2)]


@pytest.mark.parametrize(
    ("shape", "split"), [((6, 4), 0), ((6, 6), 1), ((4, 2, 3, 3), 0), ((4, 4, 2, 3), 2), ((6,), 0)]
)
@pytest.mark.parametrize("role", ["hidden", "embedding"])
@pytest.mark.parametrize("kind", celo2.KINDS)
def test_shards_move_as_the_whole(kind, role, shape, split):
    rule, param, grads = make(kind).double(), torch.randn(shape).double(), torch.randn(2, *shape).double()
    expected, state = param, None
    for step, grad in enumerate(grads):
        delta, state = one_step(rule, grad, expected, state, role, step)
        expected = expected + delta
    found, asked = sharded_step(rule, grads, param, split, role)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    by_adamw = kind == "celo2" and (role == "embedding" or len(shape) < 2)
    assert asked == ([1, 1] if by_adamw else [3, 3] if len(shape) > 1 else [2, 2])


# --- configuration and weights


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"lr": -1.0}, "lr=-1.0"),
        ({"weight_decay": -0.1}, "weight_decay=-0.1"),
        ({"vector_mult": float("nan")}, "vector_mult=nan"),
        ({"orthogonalize": 1}, "orthogonalize=1"),
        ({"tanh": None}, "tanh=None"),
        ({"exp_mult": "0"}, "exp_mult='0'"),
        ({"layout": "numpy"}, "layout='numpy'"),
        ({"hidden_size": 0}, "hidden_size=0"),
    ],
)
def test_wrong_configurations_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        make("celo2", **config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"w0__5": None}, r"theta\['w0__5'\] has shape None, expected \(3, 8\)"),
        ({"w0__14": torch.zeros(1, 8)}, r"theta\['w0__14'\] has shape \(1, 8\), expected None"),
        ({"w2": torch.zeros(8, 2)}, r"theta\['w2'\] has shape \(8, 2\), expected \(8, 3\)"),
        ({"b0": None}, r"theta\['b0'\] has shape None, expected \(8,\)"),
        ({"b1": torch.full((8,), torch.nan)}, r"theta\['b1'\] is torch.float32 or holds NaN"),
        ({"b1": "b1"}, r"theta\['b1'\] is str, not an array"),
    ],
)
def test_wrong_or_partial_weights_are_refused_by_name(changes, message):
    theta = {name: value for name, value in {**THETA, **changes}.items() if value is not None}
    with pytest.raises(ValueError, match=message) as error:
        Celo2.from_jax(theta)
    assert "\n" not in str(error.value)


def test_another_kind_is_refused():
    with pytest.raises(ValueError, match=r"kind='celo' is not allowed: it must be one of \['celo2', 'celo2_base'\]"):
        Celo2.from_jax(THETA, kind="celo")


def test_it_starts_as_the_authors_do():
    """Truncated normal of standard deviation 1 / sqrt(fan-in) before truncation, with fan-in 30 for all of w0."""
    rule = make("celo2")
    assert rule.num_meta_params() == 347
    values = torch.cat([make("celo2").w0.detach().flatten() for _ in range(100)])
    assert float(values.abs().max()) <= 2 / 30**0.5
    assert float(values.std()) == pytest.approx(0.8796 / 30**0.5, rel=0.02)  # of a normal cut at two deviations
    assert not any(getattr(rule, f"b{layer}").any() for layer in range(3))


def test_a_population_step_is_traced_as_one_graph():
    """Meta-training compiles it; a graph break inside of vmap would silently leave it in eager mode."""
    rule = make("celo2")
    meta_params = {name: value.detach() for name, value in rule.meta_params().items()}

    def step(grad, state, param, count, role):
        return rule.update(meta_params, grad, state, param, StepContext(count, role=role))

    params = torch.randn(3, 5, 4)
    states = torch.func.vmap(rule.init_state)(params)
    for role in ("hidden", "embedding"):
        arguments = torch.ones_like(params), states, params, torch.tensor(2.0), role
        population = torch.func.vmap(step, in_dims=(0, 0, 0, None, None))
        traced = torch.compile(population, backend="eager", fullgraph=True)
        torch.testing.assert_close(traced(*arguments)[0], population(*arguments)[0])
