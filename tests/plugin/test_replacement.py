"""Which optimizers LearnedOptimizer replaces, and what it says where a replacement is not what the user means."""

import gc
import weakref

import lightning as L
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning_cases import KNOWN_WARNINGS, ManualModule, Module, adamw, data, fit, learned, trainer, weights
from optimizer_cases import assert_equal, star
from torch import nn
from torch.optim import lr_scheduler as schedulers

import lightning_lopt as lopt
from lightning_lopt import RuleOptimizer
from lightning_lopt.plugin.strategies import LearnedSingleDevice

pytestmark = KNOWN_WARNINGS


@pytest.fixture
def said(monkeypatch):
    lines = []
    monkeypatch.setattr("lightning_lopt.plugin.callback.rank_zero_info", lines.append)
    return lines


# --- only and skip ---


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"only": [0]}, ["RuleOptimizer", "SGD"]),
        ({"only": [torch.optim.SGD]}, ["AdamW", "RuleOptimizer"]),
        ({"only": (torch.optim.AdamW, 1)}, ["RuleOptimizer", "RuleOptimizer"]),
        ({"skip": [1]}, ["RuleOptimizer", "SGD"]),
        ({"skip": [torch.optim.AdamW]}, ["AdamW", "RuleOptimizer"]),
        ({"only": [0, 1], "skip": [torch.optim.SGD]}, ["RuleOptimizer", "SGD"]),
    ],
    ids=str,
)
def test_only_and_skip_choose_among_several_optimizers(tmp_path, said, options, expected):
    runner = fit(tmp_path, learned(**options), module=ManualModule())
    assert [type(o).__name__ for o in runner.optimizers] == expected
    assert runner.lr_scheduler_configs[0].scheduler.optimizer is runner.optimizers[0]
    assert [bool(o.state) or type(o) is torch.optim.SGD for o in runner.optimizers] == [True, True]
    left = [name for name in expected if name != "RuleOptimizer"]
    assert [f"{name} is left alone" in said[0] for name in left] == [True] * len(left)
    losses = runner.lightning_module.losses
    assert sum(losses[16:]) < sum(losses[:16])


@pytest.mark.parametrize(
    ("options", "named"),
    [({"only": [2]}, "only=2"), ({"skip": [torch.optim.Adam]}, "skip=Adam"), ({"only": [-1]}, "only=-1")],
)
def test_a_choice_that_matches_nothing_is_an_error(tmp_path, options, named):
    message = (
        rf"{named} matches none of the optimizers .*\(0: AdamW, 1: SGD\). Name one of their positions, or its exact"
    )
    with pytest.raises(MisconfigurationException, match=message) as caught:
        fit(tmp_path, learned(**options), module=ManualModule())
    assert "\n" not in str(caught.value)


def test_the_strategy_chooses_likewise(tmp_path):
    runner = fit(
        tmp_path, L.Callback(), module=ManualModule(), strategy=LearnedSingleDevice(skip=[1]), accelerator="auto"
    )
    assert [type(o).__name__ for o in runner.optimizers] == ["RuleOptimizer", "SGD"]


def test_nothing_left_to_replace_is_pointed_out_and_is_plain_training(tmp_path):
    with pytest.warns(UserWarning, match=r"replaces no optimizer: all of them are left alone \(AdamW\)"):
        ours = fit(tmp_path, learned(skip=[0]))
    assert_equal(weights(ours), weights(fit(tmp_path, L.Callback())))


class Recommender(ManualModule):
    def __init__(self):
        super().__init__(lambda module: [adamw(module.net), torch.optim.SparseAdam(module.table.parameters(), 1e-2)])
        self.table = nn.Embedding(10, 4, sparse=True)

    def training_step(self, batch, batch_idx):
        rows = self.table(torch.arange(len(batch[0])))
        loss = self.loss([batch[0] + rows, batch[1]])
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()
            optimizer.zero_grad()


def test_sparse_adam_trains_the_sparse_table_beside_the_rule(tmp_path):
    runner = fit(tmp_path, module=Recommender())
    assert [type(o).__name__ for o in runner.optimizers] == ["RuleOptimizer", "SparseAdam"]
    assert not torch.equal(runner.lightning_module.table.weight, Recommender().table.weight)


# --- Optimizers that are the method ---


class Wrapper(torch.optim.Optimizer):
    """Holds another optimizer, and does not call Optimizer.__init__ (as Opacus' DPOptimizer and Lookahead)."""

    def __init__(self, inner):
        self.inner = inner

    @property
    def param_groups(self):
        return self.inner.param_groups

    @property
    def state(self):
        return self.inner.state

    @property
    def defaults(self):
        return self.inner.defaults

    def step(self, closure=None):
        return self.inner.step(closure)


class Based(torch.optim.Optimizer):
    """Holds another optimizer over its own groups, as SAM does."""

    def __init__(self, params, **options):
        super().__init__(params, options)
        self.base = torch.optim.Adam(self.param_groups, **options)

    def step(self, closure=None):
        return self.base.step(closure)


def named(name, base):
    return type(name, (base,), {})


REFUSED = {
    "Lookahead": (
        lambda m: Wrapper(adamw(m)),
        r"Wrapper: it wraps another optimizer \(inner: AdamW\), and what it adds",
    ),
    "SAM by another name": (lambda m: Based(m.parameters(), lr=1e-2), r"Based: it wraps another .*\(base: Adam\)"),
    "differential privacy": (
        lambda m: named("DistributedDPOptimizer", named("DPOptimizer", Wrapper))(adamw(m)),
        r"DistributedDPOptimizer: it clips per-sample gradients .* without it training is not private",
    ),
    "sampling": (
        lambda m: named("SGLD", torch.optim.SGD)(m.parameters(), lr=1e-2),
        "SGLD: its noise makes the posterior samples",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_an_optimizer_that_is_the_method_is_refused_with_the_reason(tmp_path, name):
    configure, message = REFUSED[name]
    runner = trainer(tmp_path, learned())
    with pytest.raises(MisconfigurationException, match=rf"does not replace {message}.*skip=\[0\]") as caught:
        runner.fit(Module(configure), data())
    assert "\n" not in str(caught.value)
    assert "setup_optimizers" not in vars(runner.strategy)


@pytest.mark.parametrize("name", ["SAM by another name", "sampling"])
def test_a_refused_optimizer_can_be_left_alone(tmp_path, name):
    configure, _ = REFUSED[name]
    with pytest.warns(UserWarning, match="replaces no optimizer"):
        left = fit(tmp_path, learned(skip=[0]), module=Module(configure))
    assert_equal(weights(left), weights(fit(tmp_path, L.Callback(), module=Module(configure))))


class ScheduleFree(torch.optim.SGD):
    def train_mode(self):
        pass


def test_an_optimizer_that_does_not_come_with_torch_is_replaced_with_a_warning(tmp_path, said):
    message = r"replaces .*\.ScheduleFree, which does not come with torch.*Its methods train_mode are gone.*skip=\[0\]"
    with pytest.warns(UserWarning, match=message):
        runner = fit(tmp_path, module=Module(lambda m: ScheduleFree(m.parameters(), lr=1e-2)))
    assert [type(o) for o in runner.optimizers] == [RuleOptimizer]
    assert "in place of ScheduleFree" in said[0]


def test_the_first_line_names_all_that_was_replaced(tmp_path, said):
    fit(tmp_path, module=ManualModule())
    assert "trains 49 parameters in place of AdamW and SGD," in said[0]


def test_a_small_part_of_the_parameters_is_pointed_out(tmp_path):
    """As where Pyro's own optimizers train the rest."""
    module = Module(lambda m: torch.optim.Adam([m.dummy], lr=1e-2))
    module.dummy = nn.Parameter(torch.ones(1))
    module.loss = lambda batch: module.dummy.square().sum()
    with pytest.warns(UserWarning, match=r"hold 1 of 50 trainable parameters. LearnedOptimizer trains no others"):
        fit(tmp_path, module=module)


def test_frozen_parameters_do_not_count_as_trained_by_something_else(tmp_path):
    module = Module(lambda m: torch.optim.AdamW([m.net[2].bias], lr=1e-2))
    module.net[0].requires_grad_(False)
    module.net[2].weight.requires_grad_(False)
    fit(tmp_path, module=module)  # warnings are errors


def test_lazy_parameters(tmp_path, said):
    class Lazy(Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.LazyLinear(8), nn.Tanh(), nn.Linear(8, 1))

    runner = fit(tmp_path, module=Lazy())
    assert {s["step"].item() for s in runner.optimizers[0].state.values()} == {16}
    assert "trains 9 parameters and 2 lazy tensors in place of AdamW, " in said[0]
    losses = runner.lightning_module.losses
    assert sum(losses[8:]) < sum(losses[:8])


# --- Schedulers that hold schedulers ---


class Gradual(schedulers.LRScheduler):
    """Warms up, and hands over to a scheduler that it holds (pytorch-gradual-warmup-lr)."""

    def __init__(self, optimizer, after):
        self.after_scheduler = after
        super().__init__(optimizer)

    def get_lr(self):
        return [base * min(self.last_epoch / 4, 1) for base in self.base_lrs]

    def step(self, epoch=None):
        if self.last_epoch >= 4:
            self.after_scheduler.step()
        else:
            super().step()


class Plain:
    """Not one of torch's schedulers, as timm's; what it holds lies in lists and dicts too."""

    def __init__(self, optimizer):
        self.optimizer = optimizer
        self.parts = {"halves": [schedulers.ExponentialLR(optimizer, 0.5)], "optimizers": (optimizer,)}

    def step(self, *args, **kwargs):
        (part,) = self.parts["halves"]
        part.step()

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


NESTED = {
    "after_scheduler": lambda o: Gradual(o, schedulers.ExponentialLR(o, 0.5)),
    "two deep": lambda o: Gradual(o, Gradual(o, schedulers.ExponentialLR(o, 0.5))),
    "lists and dicts": Plain,
}


@pytest.mark.parametrize("make", NESTED.values(), ids=NESTED)
def test_schedulers_inside_schedulers_drive_the_new_optimizer(tmp_path, make):
    def configure(module):
        optimizer = adamw(module)
        return [optimizer], [{"scheduler": make(optimizer), "interval": "step"}]

    class Steps(Module):
        def __init__(self):
            super().__init__(configure)

        def lr_scheduler_step(self, scheduler, metric):
            scheduler.step()

    ours, plain = (fit(tmp_path, callback, module=Steps()) for callback in (learned(), L.Callback()))
    assert ours.lightning_module.lrs == plain.lightning_module.lrs
    assert ours.lightning_module.lrs[-1] < [1e-2 / 100]
    scheduler = ours.lr_scheduler_configs[0].scheduler
    if isinstance(scheduler, Plain):
        assert scheduler.parts["optimizers"] == (ours.optimizers[0],)


# --- Modules that keep the optimizer that they made ---


class Keeps(Module):
    """Steps its own optimizer by hand."""

    def __init__(self, make=adamw, steps=True):
        super().__init__()
        self.automatic_optimization = not steps
        self.make = make

    def configure_optimizers(self):
        self.own = self.make(self)
        return self.own

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        if self.automatic_optimization:
            self.own.param_groups[0]["lr"] = 1e-6
            return loss
        self.own.zero_grad()
        self.manual_backward(loss)
        self.own.step()
        return None


ADVICE = r"A module that keeps its optimizer \(as self.opt\) must use self.optimizers\(\) instead"


@pytest.mark.filterwarnings("ignore:.*lr_scheduler.step.*")
@pytest.mark.parametrize(
    ("make", "fault"),
    [
        (adamw, "The module stepped its own AdamW"),
        (lambda m: torch.optim.SGD(m.parameters(), lr=1e-2), r"took no step in the first epoch .* optimizer 0 \(SGD\)"),
    ],
    ids=["AdamW", "SGD, which has no state"],
)
def test_a_module_that_steps_its_own_optimizer_is_told_once(tmp_path, make, fault):
    with pytest.warns(UserWarning, match=f"{fault}.*{ADVICE}") as caught:
        fit(tmp_path, module=Keeps(make))
    assert len([w for w in caught if "self.optimizers()" in str(w.message)]) == 1


def test_a_learning_rate_set_on_the_old_optimizer_is_pointed_out(tmp_path):
    with pytest.warns(UserWarning, match=f"The module set the lr of its own AdamW, .* no effect. {ADVICE}"):
        fit(tmp_path, learned(lr="scale"), module=Keeps(steps=False))


def test_the_old_optimizer_is_released_after_the_first_epoch(tmp_path):
    class Looks(L.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            gc.collect()
            self.alive = made[0]() is not None

    def configure(module):
        optimizer = adamw(module)
        made.append(weakref.ref(optimizer))
        return optimizer

    made = []
    looks = Looks()
    fit(tmp_path, learned(), looks, module=Module(configure))
    assert not looks.alive


def test_an_optimizer_that_comes_with_state_is_not_taken_for_one_that_stepped(tmp_path):
    def used(module):
        optimizer = adamw(module)
        module.loss(next(iter(data()))).backward()
        optimizer.step()
        optimizer.zero_grad()
        return optimizer

    fit(tmp_path, module=Module(used))  # warnings are errors


# --- Learning rate and weight decay ---


def climbing(optimizer):  # chemprop's: from a tenth of the peak
    return schedulers.LambdaLR(optimizer, lambda step: 1 + 9 * min(step / 8, 1))


def scheduled(make, lr=1e-2):
    def configure(module):
        optimizer = adamw(module, lr=lr)
        return [optimizer], [{"scheduler": make(optimizer), "interval": "step"}]

    return configure


def test_a_schedule_that_climbs_above_its_reference_is_pointed_out_once(tmp_path):
    with pytest.warns(
        UserWarning, match=r"multiplies the update by 2.12: the lr is above.*pass the peak as ref"
    ) as seen:
        fit(tmp_path, learned(lr="scale"), module=Module(scheduled(climbing)))
    assert len([w for w in seen if "above its reference" in str(w.message)]) == 1


def test_reference_lr_is_where_the_update_has_its_full_size(tmp_path):
    peak = fit(tmp_path, learned(lr="scale", reference_lr=0.1), module=Module(scheduled(climbing)))
    (group,) = peak.optimizers[0].param_groups
    assert group["lopt_base_lr"] == 0.1
    constant = fit(tmp_path, learned(lr="scale", reference_lr=0.04), module=Module(adamw))
    tenth = fit(tmp_path, learned(lr="scale", reference_lr=0.4), module=Module(lambda m: adamw(m, lr=0.1)))
    assert_equal(weights(constant), weights(tenth))


def test_a_schedule_that_never_comes_near_its_reference_is_pointed_out(tmp_path):
    def noam(optimizer):
        return schedulers.LambdaLR(optimizer, lambda step: 0.004 * min(step + 1, 4) / 4)

    with pytest.warns(UserWarning, match=r"by at most 0.004 in the first epoch: the lr never came near its reference"):
        fit(tmp_path, learned(lr="scale"), module=Module(scheduled(noam, lr=1.0)))


def test_a_resumed_schedule_near_its_end_is_not_taken_for_one_off_its_reference(tmp_path):
    module = lambda: Module(scheduled(lambda optimizer: schedulers.ExponentialLR(optimizer, 0.5)))  # noqa: E731
    fit(tmp_path, learned(lr="scale"), module=module(), max_epochs=1).save_checkpoint(tmp_path / "saved.ckpt")
    fit(tmp_path, learned(lr="scale"), module=module(), ckpt_path=tmp_path / "saved.ckpt")  # warnings are errors


def test_the_lr_of_the_modules_own_rule_optimizer_is_its_own_affair(tmp_path):
    fit(tmp_path, learned(lr="scale"), module=Module(lambda m: RuleOptimizer(m.parameters(), star(), lr=2.0)))


def two_groups(lr, make=None):
    def configure(module):
        groups = [{"params": module.net[0].parameters(), "lr": lr}, {"params": module.net[2].parameters()}]
        optimizer = torch.optim.AdamW(groups, lr=1e-2, weight_decay=0.5)
        return optimizer if make is None else ([optimizer], [make(optimizer)])

    return configure


def test_a_group_with_lr_0_is_pointed_out_where_lr_is_ignored(tmp_path):
    with pytest.warns(
        UserWarning, match=r"group 0 has lr=0.*trains it like the others.*requires_grad_\(False\)"
    ) as seen:
        fit(tmp_path, module=Module(two_groups(0.0)))
    assert len([w for w in seen if "has lr=0" in str(w.message)]) == 1


@pytest.mark.filterwarnings("ignore:LearnedOptimizer replaces .*Relative, which does not come with torch")
def test_an_lr_that_the_optimizer_works_out_itself(tmp_path):
    class Relative(torch.optim.Optimizer):  # as transformers' Adafactor
        def __init__(self, params):
            super().__init__(params, {"lr": None})

    runner = fit(tmp_path, module=Module(lambda m: Relative(m.parameters())))  # warnings are errors
    assert runner.optimizers[0].param_groups[0]["lr"] is None


def test_a_group_with_lr_0_is_held_where_lr_scales(tmp_path):
    runner = fit(tmp_path, learned(lr="scale", weight_decay="decoupled"), module=Module(two_groups(0.0)))
    assert_equal(weights(runner)[:2], [p.detach() for p in Module().net[0].parameters()])


def test_a_warm_up_from_0_and_frozen_parameters_are_not_taken_for_held_groups(tmp_path):
    warm_up = lambda optimizer: schedulers.LambdaLR(optimizer, lambda epoch: float(epoch))  # noqa: E731
    fit(tmp_path, module=Module(two_groups(1e-3, warm_up)))  # warnings are errors
    module = Module(two_groups(0.0))
    module.net[0].requires_grad_(False)
    fit(tmp_path, module=module)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({}, "The module's own lr is logged, not used; its weight decay (0.5) is not used."),
        ({"lr": "scale"}, "The module's own lr multiplies its update; its weight decay (0.5) is not used."),
        (
            {"weight_decay": "decoupled"},
            "The module's own lr is logged, not used; its weight decay (0.5) acts as in AdamW.",
        ),
    ],
    ids=str,
)
def test_the_first_line_says_what_of_lr_and_weight_decay_acts(tmp_path, said, options, sentence):
    fit(tmp_path, learned(**options), module=Module(two_groups(1e-3)))
    assert said[0].endswith(sentence)


def test_without_weight_decay_the_first_line_says_nothing_of_it(tmp_path, said):
    fit(tmp_path, module=Module(lambda m: adamw(m, weight_decay=0.0)))
    assert said[0].endswith("The module's own lr is logged, not used.")


# --- Evaluation of a checkpoint ---


class Evaluated(Module):
    def evaluation_step(self, batch, batch_idx):
        self.log("loss", self.loss(batch))

    test_step = validation_step = evaluation_step


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")
@pytest.mark.parametrize("evaluate", ["test", "validate"])
@pytest.mark.parametrize("rule", [lopt.rules.make("hyperparam"), star(seed=5)], ids=["another kind", "other weights"])
def test_evaluating_a_checkpoint_needs_no_rule_and_changes_none(tmp_path, evaluate, rule):
    saved = fit(tmp_path, module=Evaluated(), max_epochs=1)
    saved.save_checkpoint(tmp_path / "saved.ckpt")
    callback = lopt.LearnedOptimizer(rule)
    module = Evaluated()
    before = {name: tensor.clone() for name, tensor in callback.rule.state_dict().items()}
    getattr(trainer(tmp_path, callback), evaluate)(module, data(), ckpt_path=tmp_path / "saved.ckpt", verbose=False)
    assert_equal([p.detach() for p in module.parameters()], weights(saved))
    assert_equal(callback.rule.state_dict().values(), before.values())


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")
def test_a_fit_after_an_evaluation_restores_the_rule_again(tmp_path):
    whole = fit(tmp_path, module=Evaluated())
    fit(tmp_path, module=Evaluated(), max_epochs=1).save_checkpoint(tmp_path / "saved.ckpt")
    runner = trainer(tmp_path, lopt.LearnedOptimizer(star(seed=5)))
    runner.test(Evaluated(), data(), ckpt_path=tmp_path / "saved.ckpt", verbose=False)
    with pytest.warns(UserWarning, match="weights of the rule differ"):
        runner.fit(Evaluated(), data(), ckpt_path=tmp_path / "saved.ckpt")
    assert_equal(weights(runner), weights(whole))
