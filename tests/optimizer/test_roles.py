"""Roles of tensors: told by modules, by names, by groups; decided once; kept in checkpoints."""

import warnings

import pytest
import torch
from torch import nn

import lightning_lopt as lopt
from lightning_lopt.optimizer import roles
from lightning_lopt.optimizer.groups import ROLES


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.attention = nn.MultiheadAttention(width, 2)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)


class LanguageModel(nn.Module):
    def __init__(self, tied):
        super().__init__()
        self.tokens = nn.Embedding(11, 8)
        self.positions = nn.Parameter(torch.zeros(5, 8))
        self.blocks = nn.ModuleList([Block(8)])
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 11, bias=False)
        if tied:
            self.head.weight = self.tokens.weight


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.zeros(4, 8, 16))
        self.router = nn.Linear(8, 4)
        self.score = nn.Linear(8, 2)


def conv_net():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.Conv2d(8, 8, 3, groups=8),
        nn.ConvTranspose2d(8, 4, 3),
        nn.Linear(4, 2),
    )


BY_MODULE = [
    (lambda: LanguageModel(tied=False), ["other", "embedding", "hidden", "hidden", "hidden", "hidden", "output"]),
    (lambda: LanguageModel(tied=True), ["other", "embedding", "hidden", "hidden", "hidden", "hidden"]),
    (conv_net, ["hidden", "other", "hidden", "output"]),
    (Experts, ["experts", "hidden", "output"]),
    (lambda: nn.LSTM(4, 6), ["hidden", "output"]),
    (lambda: nn.Linear(3, 1), ["output"]),
    (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)), ["hidden", "output"]),
    (lambda: nn.Sequential(nn.LazyLinear(4), nn.LazyLinear(2)), ["hidden", "other", "output", "other"]),
]


@pytest.mark.parametrize(("make", "expected"), BY_MODULE)
def test_modules_tell_roles(make, expected):
    model = make()
    assert list(roles.by_module(model, model.parameters()).values()) == expected


def test_the_last_layer_is_that_of_the_optimizer_not_of_the_model():
    model = nn.Sequential(nn.Linear(2, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    found = roles.by_module(model, [*model[0].parameters(), *model[1].parameters()])
    assert list(found.values()) == ["hidden", "output"]


NAMES = {
    "transformer.wte.weight": "embedding",
    "model.embed_tokens.weight": "embedding",
    "transformer.wpe.weight": "other",
    "vit.cls_token": "other",
    "encoder.pos_embed": "other",
    "blocks.0.attn.c_attn.weight": "hidden",
    "layers.3.mlp.experts.w1": "experts",
    "base.lora_A.default.weight": "hidden",
    "temperature": "other",
    "lm_head.weight": "output",
}


@pytest.mark.parametrize(("name", "role"), NAMES.items())
def test_names_tell_roles(name, role):
    tensor = torch.zeros((2, 3, 4) if role == "experts" else (3, 4))
    assert roles.by_name([(name, tensor), ("head.weight", torch.zeros(2, 2))])[tensor] == role


def test_names_of_a_plain_net_have_an_output_and_those_of_a_tied_one_have_none():
    plain = nn.Sequential(nn.Linear(2, 4), nn.Linear(4, 2))
    assert list(roles.by_name(plain.named_parameters()).values()) == ["hidden", "output"]
    tied = {"wte.weight": torch.zeros(9, 4), "mlp.weight": torch.zeros(4, 4)}
    assert list(roles.by_name(tied.items()).values()) == ["embedding", "hidden"]


def optimizer_of(params, **options):
    rule = lopt.rules.make("scheduled", orthogonal_start=1.0, orthogonal_end=1.0)
    return lopt.RuleOptimizer(params, rule, num_steps=10, **options)


def step(optimizer):
    generator = torch.Generator().manual_seed(0)
    for group in optimizer.param_groups:
        for param in group["params"]:
            param.grad = torch.randn(param.shape, generator=generator)
    optimizer.step()


def kept(optimizer):
    return [role for group in optimizer.param_groups for role in group[ROLES]]


def test_a_groups_role_comes_first_then_modules_then_names():
    model = nn.Sequential(nn.Linear(2, 4, bias=False), nn.Linear(4, 2, bias=False))
    groups = [{"params": [model[0].weight], "role": "other"}, {"params": [model[1].weight]}]
    optimizer = optimizer_of(groups)
    optimizer.set_roles(model)
    step(optimizer)
    assert kept(optimizer) == ["other", "output"]


@pytest.mark.parametrize("way", ["names", "module", "group"])
def test_each_way_of_telling_gives_the_same_steps(way):
    moved = []
    for told in (way, "module"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 5, bias=False), nn.Linear(5, 4, bias=False))
        params = {
            "names": model.named_parameters(),
            "module": model.parameters(),
            "group": [
                {"params": [model[0].weight], "role": "hidden"},
                {"params": [model[1].weight], "role": "output"},
            ],
        }[told]
        optimizer = optimizer_of(params)
        if told == "module":
            optimizer.set_roles(model)
        step(optimizer)
        moved.append([param.detach().clone() for param in model.parameters()])
    assert all(map(torch.equal, *moved))


def test_unknown_roles_are_warned_of_once_with_a_name():
    params = [nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(4))]
    optimizer = optimizer_of(params)
    with pytest.warns(
        UserWarning, match=r"roles of 1 matrices .* parameter 0 of group 0 \(shape \(3, 4\)\)'s.*set_roles"
    ):
        step(optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(optimizer)


def test_a_rule_without_use_for_roles_does_not_ask_for_them():
    optimizer = lopt.RuleOptimizer([nn.Parameter(torch.randn(3, 4))], lopt.rules.make("scheduled"))
    step(optimizer)
    assert kept(optimizer) == ["unknown"]


def test_an_unknown_role_of_a_group_is_refused():
    with pytest.raises(ValueError, match=r"role='middle' of a parameter group is not allowed: use one of \['hidden'"):
        optimizer_of([{"params": [nn.Parameter(torch.zeros(2, 2))], "role": "middle"}])


def test_a_role_is_decided_at_the_first_step_and_comes_back_with_a_checkpoint():
    model = nn.Sequential(nn.Linear(3, 5, bias=False), nn.Linear(5, 4, bias=False))
    optimizer = optimizer_of(model.named_parameters())
    step(optimizer)
    saved = optimizer.state_dict()
    optimizer.set_roles(nn.Sequential(model[0]))  # too late: the first layer would be the output
    step(optimizer)
    assert kept(optimizer) == ["hidden", "output"]
    other = optimizer_of(model.parameters())
    other.load_state_dict(saved)
    assert kept(other) == ["hidden", "output"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(other)


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_autocast_does_not_round_the_products(backend):
    """As in manual optimization, whose step is taken within the training step's autocast."""
    moved = []
    for on in (False, True):
        torch.manual_seed(0)
        param = nn.Parameter(torch.randn(20, 30))
        optimizer = optimizer_of([{"params": [param], "role": "hidden"}], backend=backend)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=on):
            step(optimizer)
        moved.append(param.detach())
    assert torch.equal(*moved)
