"""MetaTrainer in a Trainer: meta-gradients, logs, validation, export, and errors."""

import math
from itertools import pairwise

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback, EarlyStopping, LearningRateMonitor, ModelCheckpoint
from lightning_cases import KNOWN_WARNINGS, csv_logger, metrics
from meta_cases import Descent, Parabola, fit, losses_by_hand, meta, meta_params, star, validate
from optimizer_cases import assert_equal
from torch.utils._pytree import tree_leaves

import lightning_lopt as lopt
from lightning_lopt import MetaTrainer
from lightning_lopt.meta.estimators import PES, ESSingle, FullES, FullUnroll, OneStep, TruncatedBackprop
from lightning_lopt.meta.schedules import Horizon

pytestmark = KNOWN_WARNINGS


class Plain(MetaTrainer):
    """A MetaTrainer with plain SGD as meta-optimizer."""

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1.0)


class Record(Callback):
    """Records the estimates, and the parameters before and after each optimizer step."""

    def __init__(self):
        self.estimates, self.grads, self.weights, self.turns = [], [], [], []

    def on_fit_start(self, trainer, pl_module):
        average, estimate = pl_module._average, pl_module._estimate

        def recorded(grads):
            self.estimates.append(average(grads))
            return self.estimates[-1]

        def counted(index, number):
            self.turns.append(index)
            return estimate(index, number)

        pl_module._average, pl_module._estimate = recorded, counted
        self.weights.append(meta_params(pl_module.rule))

    def on_after_backward(self, trainer, pl_module):
        learned = pl_module.rule.named_parameters()
        self.grads.append({name: p.grad.clone() for name, p in learned if p.requires_grad})

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.weights.append(meta_params(pl_module.rule))


def assert_steps(record, expected):
    """Compare the change of the parameters at each batch with `expected`."""
    for (before, after), steps in zip(pairwise(record.weights), expected, strict=True):
        for name, step in steps.items():
            torch.testing.assert_close(after[name], before[name] - step, rtol=1e-12, atol=1e-12)


# --- The meta-gradient ---

ESTIMATORS = [
    PES(num_pairs=8, truncation=5, horizon=Horizon(10, 20)),
    ESSingle(num_pairs=8, truncation=5, horizon=Horizon(10, 20)),
    FullES(num_pairs=8, horizon=10),
    FullUnroll(num_runs=4, horizon=10),
    TruncatedBackprop(num_runs=4, truncation=5, horizon=Horizon(10, 20)),
    OneStep(num_runs=8, horizon=Horizon(10)),
]


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=lambda e: type(e).__name__)
def test_the_meta_loss_falls(tmp_path, estimator):
    module = meta(Descent(log_lr=-4.0), estimator=estimator, steps_per_epoch=10, lr=0.1)
    fit(tmp_path, module, max_epochs=5, logger=csv_logger(tmp_path))
    rows = [row["meta_loss"] for row in metrics(tmp_path) if "meta_loss" in row]
    assert rows[-1] < rows[0] - 0.01
    assert losses_by_hand(meta_params(module.rule), 10)[-1] < 0.5 * losses_by_hand(meta_params(Descent(-4.0)), 10)[-1]


def test_the_gradient_that_lightning_sees_is_the_mean_estimate(tmp_path):
    record = Record()
    fit(tmp_path, meta(), record)
    assert len(record.grads) == len(record.estimates) == 8
    for grads, estimate in zip(record.grads, record.estimates, strict=True):
        assert grads == estimate
        assert any(grad != 0 for grad in grads.values())


def test_clipping(tmp_path):
    record = Record()
    fit(tmp_path, meta(Descent(), kind=Plain), record, gradient_clip_val=1e-3)
    norms = [torch.stack(list(estimate.values())).norm() for estimate in record.estimates]
    scale = [min(1.0, 1e-3 / (norm.item() + 1e-6)) for norm in norms]
    assert min(scale) < 1
    assert_steps(record, [{k: s * g for k, g in e.items()} for s, e in zip(scale, record.estimates, strict=True)])


def test_accumulation(tmp_path):
    record = Record()
    fresh = FullES(num_pairs=4, horizon=3)  # its estimates follow from the generator alone
    fit(tmp_path, meta(Descent(), kind=Plain, estimator=fresh), record, accumulate_grad_batches=2)
    first, second = record.estimates[::2], record.estimates[1::2]
    steps = []
    for a, b in zip(first, second, strict=True):
        assert a != b  # another estimate, though the optimizer has made no step
        steps += [{k: torch.zeros_like(g) for k, g in a.items()}, {k: (a[k] + b[k]) / 2 for k in a}]
    assert_steps(record, steps)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_inner_runs_are_in_single_precision_at_least(tmp_path, precision):
    module = meta(star(), tasks=["digits-logreg"])
    fit(tmp_path, module, precision=precision, max_epochs=1)
    floats = {leaf.dtype for leaf in tree_leaves(module._states) if leaf.is_floating_point()}
    assert floats <= {torch.float32, torch.float64}
    assert torch.get_default_dtype() == torch.float32


def test_tasks_take_turns(tmp_path):
    record = Record()
    fit(tmp_path, meta(tasks=[Parabola(name=name) for name in "abc"], tasks_per_step=2, steps_per_epoch=3), record)
    assert record.turns == [0, 1, 2, 0, 1, 2] * 2
    record = Record()
    fit(tmp_path, meta(tasks=[Parabola(name=name) for name in "abc"], steps_per_epoch=2), record)
    assert record.turns == [0, 1, 2] * 4


def test_tasks_can_be_made_to_count_alike():
    grads = [{"a": torch.tensor(3.0), "b": torch.tensor(4.0)}, {"a": torch.tensor(-600.0), "b": torch.tensor(0.0)}]
    for normalize, expected in ((False, {"a": -298.5, "b": 2.0}), (True, {"a": -0.2, "b": 0.4})):
        assert meta(normalize=normalize)._average(grads) == pytest.approx(expected)


# --- What learns, and how fast ---


def test_what_does_not_learn_is_left_alone(tmp_path):
    module = meta(star(), tasks=["quadratic"], trainable=["w2", "*_decays"])
    before = meta_params(module.rule)
    fit(tmp_path, module, Record())
    after = meta_params(module.rule)
    assert {name for name in after if not torch.equal(before[name], after[name])} == {
        "w2",
        "momentum_decays",
        "rms_decays",
        "adafactor_decays",
    }
    (particles,) = module._states
    assert set(particles.perturbation) == {"w2", "momentum_decays", "rms_decays", "adafactor_decays"}


def test_zeroed_meta_parameters_start_at_zero():
    rule = star()
    module = meta(rule, zero=["w2", "b*"])
    assert module.rule is rule
    assert {name for name, p in rule.named_parameters() if not p.any()} == {
        "w2",
        "b0",
        "b1",
        "b2",
        "momentum_decays",
        "rms_decays",
        "adafactor_decays",
    }


def test_learning_rates(tmp_path):
    rates = LearningRateMonitor(logging_interval="step")
    module = meta(star(), tasks=["quadratic"], lr=0.1, lr_factors={"w2": 2.0, "w*": 0.5, "*_decays": 0.1})
    runner = fit(tmp_path, module, rates, logger=csv_logger(tmp_path))
    groups = runner.optimizers[0].param_groups
    sizes = {round(group["initial_lr"], 9): sum(p.numel() for p in group["params"]) for group in groups}
    assert sizes == {0.05: 39 * 4 + 16, 0.1: 4 + 4 + 4, 0.2: 16, 0.01: 7}
    logged = [row["lr-AdamW/pg2"] for row in metrics(tmp_path) if "lr-AdamW/pg2" in row]
    assert logged == pytest.approx([0.1 * 0.5 * (1 + math.cos(math.pi * step / 8)) for step in range(8)])


def test_constant_learning_rate(tmp_path):
    runner = fit(tmp_path, meta(schedule="constant", lr=0.1, weight_decay=0.3), max_epochs=-1, max_steps=3)
    assert [group["lr"] for group in runner.optimizers[0].param_groups] == [0.1]
    assert [group["weight_decay"] for group in runner.optimizers[0].param_groups] == [0.3]
    assert runner.lr_scheduler_configs == []


def test_a_cosine_needs_an_end(tmp_path):
    with pytest.raises(MisconfigurationException, match="'cosine' needs a run of known length: give the Trainer max_s"):
        fit(tmp_path, meta(), max_epochs=-1)


# --- Logs ---


def test_what_is_logged(tmp_path):
    tasks = [Parabola(name="a"), Parabola(name="b", start=2.0)]
    module = meta(tasks=tasks, validation_tasks=[Parabola(name="c"), "rosenbrock"])
    fit(tmp_path, module, logger=csv_logger(tmp_path), max_epochs=3)
    rows = metrics(tmp_path)
    train, val = ([row for row in rows if key in row] for key in ("meta_loss", "val/meta_loss"))
    assert len(train) == len(val) == 3
    common = {"epoch", "step"}
    assert set(train[0]) - common == {
        *("meta_loss", "meta_loss/a", "meta_loss/b", "meta_loss_best", "meta_grad_norm", "nonfinite_tasks"),
    }
    assert set(val[0]) - common == {"val/meta_loss", "val/best", "val/final/c", "val/final/rosenbrock"}
    for row in train:
        assert row["meta_loss"] == pytest.approx((row["meta_loss/a"] + row["meta_loss/b"]) / 2)
        assert row["meta_grad_norm"] > 0
        assert row["nonfinite_tasks"] == 0
    for rows, name, best in ((train, "meta_loss", "meta_loss_best"), (val, "val/meta_loss", "val/best")):
        lowest = [min(row[name] for row in rows[: i + 1]) for i in range(3)]
        assert [row[best] for row in rows] == pytest.approx(lowest)


def test_divergence_is_counted_and_does_not_end_the_run(tmp_path):
    tasks = [Parabola(name="good", dtype=torch.float32), Parabola(name="bad", dtype=torch.float32, start=1e38)]
    module = meta(Descent(log_lr=5.0, dtype=torch.float32), tasks=tasks, objective="raw")
    runner = fit(tmp_path, module)
    assert runner.callback_metrics["nonfinite_tasks"] >= 1
    assert runner.callback_metrics["meta_loss/bad"].isnan()  # no finite one to average
    assert all(p.isfinite().all() for p in module.rule.parameters())


def test_module_in_the_state_dict_is_the_rule_alone(tmp_path):
    module = meta(validation_tasks=[Parabola()])
    fit(tmp_path, module)
    assert set(module.state_dict()) == {"rule.log_lr", "rule.momentum"}


# --- Meta-validation ---


def test_validation_is_the_same_each_time_and_touches_no_training(tmp_path):
    noisy = Parabola(noise=0.5, random_start=True)
    options = {"validation_tasks": [noisy], "validation_horizon": 12, "validation_seeds": 3}
    scores = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        scores.append(fit(tmp_path, meta(seed=seed, lr=0.0, **options)).callback_metrics)
    assert scores[0]["val/meta_loss"] == scores[1]["val/meta_loss"]
    assert scores[0]["val/final/parabola"] == scores[1]["val/final/parabola"]
    assert scores[0]["meta_loss"] != scores[1]["meta_loss"]
    with_validation, without = meta(**options), meta()
    fit(tmp_path, with_validation)
    fit(tmp_path, without)
    assert_equal(with_validation.rule.parameters(), without.rule.parameters())


def test_validation_is_of_the_whole_horizon(tmp_path):
    module = meta(validation_tasks=[Parabola()], validation_horizon=20, validation_seeds=2)
    expected = losses_by_hand(meta_params(module.rule), 19)
    found = validate(tmp_path, module)
    assert found["val/final/parabola"].item() == pytest.approx(expected[-2:].mean().item(), rel=1e-6)
    log = (expected / expected[0] + 1e-2).log().mean().item()
    assert found["val/meta_loss"].item() == pytest.approx(log, rel=1e-6)


def test_frozen_meta_parameters_are_validated_too(tmp_path):
    scores = [
        validate(tmp_path, meta(validation_tasks=[Parabola()], trainable=trainable))["val/meta_loss"]
        for trainable in (["*"], ["momentum"])
    ]
    assert scores[0] == scores[1]


def test_checkpoints_and_stopping_by_the_validation_loss(tmp_path):
    module = meta(star(), tasks=["quadratic"], validation_tasks=["rosenbrock"], export=str(tmp_path / "rule"))
    best = ModelCheckpoint(tmp_path, monitor="val/meta_loss", filename="best")
    stop = EarlyStopping(monitor="val/meta_loss", patience=1, min_delta=100.0)
    runner = fit(tmp_path, module, best, stop, enable_checkpointing=True, max_epochs=9)
    assert runner.current_epoch == 2
    weights = torch.load(tmp_path / "best.ckpt", weights_only=True)["state_dict"]
    exported = lopt.load_rule(tmp_path / "rule" / "best").state_dict()
    assert_equal(exported.values(), [weights[f"rule.{name}"] for name in exported])
    assert_equal(lopt.load_rule(tmp_path / "rule").parameters(), module.rule.parameters())


# --- Export ---


def test_export(tmp_path):
    module = meta(star(), tasks=["quadratic", ("digits-mlp", {"hidden": [8]})], export=str(tmp_path / "rule"), seed=7)
    runner = fit(tmp_path, module, max_epochs=1)
    loaded = lopt.load_rule(tmp_path / "rule")
    assert loaded.config == module.rule.config
    assert_equal(loaded.parameters(), module.rule.parameters())
    card = (tmp_path / "rule" / "README.md").read_text()
    for fact in ("quadratic, digits-mlp", "PES(num_pairs=4", "'objective': 'log'", "| seed | 7 |", "| steps | 4 "):
        assert fact in card
    assert not (tmp_path / "rule" / "best").exists()
    runner.save_checkpoint(tmp_path / "saved.ckpt")
    before = meta_params(module.rule)
    torch.nn.init.ones_(module.rule.w2)
    module.save(tmp_path / "earlier", checkpoint=tmp_path / "saved.ckpt", card="# mine\n")
    assert_equal(lopt.load_rule(tmp_path / "earlier").parameters(), before.values())
    assert (tmp_path / "earlier" / "README.md").read_text().endswith("# mine\n")
    assert (module.rule.w2 == 1).all()


def test_an_exported_rule_is_meta_trained_on(tmp_path):
    meta(star()).save(tmp_path)
    module = meta(str(tmp_path), tasks=["quadratic"])
    assert_equal(module.rule.parameters(), star().parameters())
    fit(tmp_path, module, max_epochs=1)


# --- Arguments ---


def test_a_rule_from_its_kind_follows_from_the_seed():
    torch.manual_seed(0)
    first, again, other = (meta({"kind": "star", "step_mult": 1e-4}, seed=seed).rule for seed in (3, 3, 4))
    assert torch.equal(torch.rand(1), torch.rand(1, generator=torch.Generator().manual_seed(0)))
    assert first.config.step_mult == 1e-4
    assert_equal(first.parameters(), again.parameters())
    assert not torch.equal(first.w0, other.w0)


def test_tasks_with_the_same_name_are_told_apart():
    module = meta(tasks=["quadratic", ("quadratic", {"dim": 3}), Parabola(), ("digits-mlp", {"hidden": [4, 4]})])
    assert module.labels == ["quadratic", "quadratic-2", "parabola", "digits-mlp"]
    assert module.tasks[1].dim == 3
    assert module.tasks[3].num_params == 65 * 4 + 20 + 50


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"trainable": ["nothing"]}, r"trainable: 'nothing' matches no meta-parameter. The rule has \['log_lr', 'mom"),
        ({"trainable": []}, "trainable=.* leaves nothing to learn"),
        ({"zero": ["w9"]}, "zero: 'w9' matches no meta-parameter"),
        ({"lr_factors": {"w9": 1.0}}, "lr_factors: 'w9' matches no meta-parameter"),
        ({"schedule": "step"}, r"schedule='step' is not allowed: it must be one of \['cosine', 'constant'\]"),
        ({"objective": "mean"}, "objective='mean' is not allowed"),
        ({"tasks": []}, "tasks=.* is not allowed: pass at least one"),
        ({"tasks": ["no-such"]}, "Unknown task 'no-such'"),
        ({"tasks": [("quadratic", {"size": 1})]}, "Unknown option 'size' of task 'quadratic'"),
        ({"tasks_per_step": 2}, r"tasks_per_step=2 is not allowed: it must be an integer in \[1, 1\]"),
        ({"steps_per_epoch": 0}, "steps_per_epoch=0 is not allowed"),
        ({"validation_horizon": 1.5}, "validation_horizon=1.5 is not allowed"),
        ({"lr": -1.0}, r"lr=-1.0 is not allowed: it must be a number in \[0.0, inf\]"),
        ({"estimator": PES}, "estimator=.* is not allowed: pass one of meta.estimators, such as PES()"),
        ({"rule": {"step_mult": 1.0}}, "rule=.* is not allowed: pass a rule, .* or a mapping with a 'kind'"),
        ({"rule": {"kind": "nope"}}, "Unknown kind 'nope'"),
        ({"rule": "nope"}, "Unknown rule 'nope'"),
    ],
    ids=str,
)
def test_arguments_that_are_not_allowed(options, message):
    with pytest.raises(ValueError, match=message):
        meta(**options)
