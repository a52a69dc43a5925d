"""Import weights in the formats of PyLO, of learned_optimization (theta.state) and of Celo2's authors."""

import hashlib
import importlib.util
import json
import shutil
from pathlib import Path

import field_goldens as field
import goldens
import numpy as np
import pytest
import safetensors.torch
import torch
from reference_star import ReferenceSTAR
from torch import nn

import lightning_lopt as lopt
from lightning_lopt.hub import read_theta
from lightning_lopt.rules import STAR, Celo2, StepContext

SCRIPT = Path(__file__).parents[2] / "examples" / "soak" / "fuzz_files.py"
DECAYS = {  # what PyLO's AdafacLO runs with, to five digits
    "momentum": (0.54203, 0.95844, 0.99802),
    "rms": (0.998886,),
    "adafactor": (0.35622, 0.99663, 0.99946),
}


@pytest.fixture(scope="module")
def formats():
    """The fuzzing script, which has writers for these formats."""
    spec = importlib.util.spec_from_file_location("fuzz_files", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write(folder, contents):
    for name, data in contents.items():
        (folder / name).write_bytes(data)
    return folder


def load(folder):
    with pytest.warns(UserWarning, match="leaves? out") as caught:
        rule = lopt.load_rule(folder)
    assert len(caught) == 1
    return rule


# --- PyLO ---


def test_our_files_of_their_format_are_theirs(formats):
    """Size and hash equal those published for btherien/mulo."""
    mulo = formats.pylo_files()
    digest = hashlib.sha256(mulo["config.json"]).hexdigest()
    assert digest.startswith("03ce572d")
    assert digest.endswith("3b94")
    assert len(mulo["model.safetensors"]) == 10096


@pytest.mark.parametrize(("hidden_size", "hidden_layers"), [(32, 1), (4, 0), (6, 3)])
def test_a_network_of_pylos_moves_parameters_as_their_optimizer(formats, tmp_path, hidden_size, hidden_layers):
    torch.manual_seed(0)
    rule = load(write(tmp_path, formats.pylo_files(hidden_size, hidden_layers)))
    assert (rule.kind, rule.source.name, rule.config.layout) == ("blackbox", str(tmp_path), "torch")
    for name, decays in DECAYS.items():
        assert getattr(rule.decays(rule.meta_params()), name).tolist() == pytest.approx(decays, abs=6e-6)
    # PyLO's network in torch, on features that an independent reference computes.
    tensors = safetensors.torch.load_file(tmp_path / "model.safetensors")
    places = ["input", *(f"linear_{n}" for n in range(hidden_layers)), "output"]
    layers = []
    for place in places:
        weight, bias = (tensors[f"network.{place}.{part}"].double() for part in ("weight", "bias"))
        layers.append(nn.Linear(*weight.shape[::-1], dtype=torch.float64))
        layers[-1].load_state_dict({"weight": weight, "bias": bias})
        layers.append(nn.ReLU())
    network = nn.Sequential(*layers[:-1])
    offsets = {f"{name}_decays": getattr(rule, f"{name}_decays").detach().numpy() for name in DECAYS}
    reference = ReferenceSTAR(offsets, (5, 3), step_mult=0.01)
    reference.network = lambda features: network(torch.tensor(features)).detach().numpy()
    theirs, ours = np.full((5, 3), 0.5), torch.full((5, 3), 0.5)
    state = rule.init_state(ours)
    for step in range(4):
        grad = torch.randn(5, 3, generator=torch.Generator().manual_seed(step))
        theirs = reference.step(theirs, grad.double().numpy())
        delta, state = rule.update(rule.meta_params(), grad, state, ours, StepContext(torch.tensor(float(step))))
        ours = ours + delta
        np.testing.assert_allclose(ours.detach().numpy(), theirs, rtol=1e-4, atol=1e-6)
    assert np.abs(theirs - 0.5).max() > 1e-3


def test_saved_as_our_own_the_decays_are_in_the_file(formats, tmp_path):
    rule = load(write(tmp_path, formats.pylo_files()))
    again = lopt.load_rule(lopt.save_rule(rule, tmp_path / "ours"))
    assert again.config == rule.config
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, rule.state_dict()[name])


def changed(formats, *, config=None, drop=None, add=None, transpose=None):
    files = formats.pylo_files()
    tensors = safetensors.torch.load(files["model.safetensors"])
    if drop:
        del tensors[drop]
    if add:
        tensors[add] = torch.zeros(3)
    if transpose:
        tensors[transpose] = tensors[transpose].mT.contiguous()
    spec = {**json.loads(files["config.json"]), **(config or {})}
    spec = {name: value for name, value in spec.items() if value is not None}
    return {"config.json": json.dumps(spec).encode(), "model.safetensors": safetensors.torch.save(tensors)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"drop": "network.output.bias"}, "safetensors: tensor 'network.output.bias' is missing"),
        ({"add": "network.extra"}, "safetensors: tensor 'network.extra' is unexpected"),
        ({"transpose": "network.input.weight"}, r"'network.input.weight' has shape \[39, 32\], .* requires \[32, 39\]"),
        ({"config": {"hidden_layers": 2}}, "safetensors: tensor 'network.linear_1.(bias|weight)' is missing"),
        ({"config": {"hidden_size": 16}}, r"has shape \[32, 39\], but config.json requires \[16, 39\]"),
        ({"config": {"hidden_size": 0}}, r"config.json: config of kind 'blackbox': hidden_size=0"),
        ({"config": {"hidden_size": True}}, "config.json: .* is not a configuration of PyLO's MetaMLP"),
        ({"config": {"hidden_size": None}}, "config.json: .* is not a configuration of PyLO's MetaMLP"),
        ({"config": {"input_size": 38}}, "with input_size 39"),
        ({"config": {"lstm_hidden_size": 512}}, "config.json: input_size=39 does not belong to the VeLORNN"),
        ({"config": {"param_inits": 256}}, "config.json: input_size=39 does not belong to the VeLOMLP"),
        ({"config": {"feature_dims": [1]}}, "activation=None is not that of PyLO's CELO2MLP"),
        ({"config": {"format_version": 1}}, "kind=None is unknown"),
    ],
    ids=str,
)
def test_a_wrong_or_partial_file_of_pylos_is_refused_by_name(formats, tmp_path, change, message):
    write(tmp_path, changed(formats, **change))
    with pytest.raises(ValueError, match=message) as error:
        lopt.load_rule(tmp_path)
    assert "\n" not in str(error.value)


def test_pylos_other_file_is_a_pickle_and_stays_unread(tmp_path):
    torch.save({"state_dict": {}, "decays": {}}, tmp_path / "model.pt")
    with pytest.raises(ValueError, match=r"config.json: is missing"):
        lopt.load_rule(tmp_path)


# --- learned_optimization ---


@pytest.mark.parametrize("kind", ["star", "blackbox"])
def test_a_theta_state_that_flax_wrote(formats, tmp_path, kind):
    """The fixture was written by flax 0.12.8 from theta.npz, including the haiku modules."""
    path = goldens.FIXTURES / f"{kind}_theta.state"
    golden = goldens.load("star_paper" if kind == "star" else "blackbox_default", "f32")
    theta = read_theta(path)
    assert theta.keys() == golden.theta.keys()
    assert all(np.array_equal(theta[name].numpy(), value) for name, value in golden.theta.items())
    shutil.copy(path, tmp_path / "theta.state")
    rule = load(tmp_path)
    assert rule.kind == kind
    config = {**golden.rule().config.to_dict(), "layout": "torch"}
    assert rule.config.to_dict() == config  # the paper's for STAR, the constructor's own for small_fc_lopt
    assert formats.packed(formats.theta_of(STAR.from_jax(golden.theta))) == path.read_bytes()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_sizes_and_dtypes_follow_from_the_arrays(formats, tmp_path, dtype):
    rule = lopt.rules.make("blackbox", hidden_size=7, hidden_layers=3).to(dtype)
    write(tmp_path, {"theta.state": formats.packed(formats.theta_of(rule))})
    loaded = load(tmp_path)
    assert (loaded.config.hidden_size, loaded.config.hidden_layers) == (7, 3)
    for found, expected in zip(loaded.parameters(), rule.parameters(), strict=True):
        assert found.dtype == dtype
        assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_a_network_of_pylos_keeps_its_dtype(formats, tmp_path, dtype):
    files = formats.pylo_files()
    tensors = safetensors.torch.load(files["model.safetensors"])
    files["model.safetensors"] = safetensors.torch.save({name: value.to(dtype) for name, value in tensors.items()})
    rule = load(write(tmp_path, files))
    assert {param.dtype for param in rule.parameters()} == {dtype}
    again = lopt.load_rule(lopt.save_rule(rule, tmp_path / "ours"))
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), rule.parameters(), strict=True))


def test_a_checkpoint_of_meta_training_holds_the_theta_under_params(formats, tmp_path):
    rule = lopt.rules.make("star")
    tree = {"params": formats.theta_of(rule), "gen_id": "abc", "step": 7}
    write(tmp_path, {"theta.state": formats.packed(tree)})
    assert torch.equal(load(tmp_path).w0, rule.w0)


def tree_with(change):
    def make(formats):
        tree = formats.theta_of(lopt.rules.make("star"))
        change(tree)
        return formats.packed(tree)

    return make


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (tree_with(lambda tree: tree.pop("rms_decays")), r"'rms_decays' has shape None, expected \(1,\)"),
        (tree_with(lambda tree: tree["nn"]["~"].pop("b2")), r"'b2' has shape None, expected \(4,\)"),
        (tree_with(lambda tree: tree["nn"]["~"].pop("w2")), r"'b2' has shape \(4,\), expected None"),
        (tree_with(lambda tree: tree.update(nn={})), "has no layers w0, w1, ... with 2 or 4 outputs"),
        (tree_with(lambda tree: tree.update(w0=torch.zeros(3))), "contains 'w0' twice"),
        (tree_with(lambda tree: tree.update(rms_decays=torch.tensor([torch.nan]))), "'rms_decays' contains NaN"),
        (tree_with(lambda tree: tree.update(rms_decays=torch.tensor([1]))), "'rms_decays' contains NaN, infinity or"),
        (lambda formats: formats.THETAS[0][:-1], "not a tree of arrays in msgpack .it ends too early"),
        (lambda formats: formats.THETAS[0] + b"\x00", "followed by more data"),
        (lambda formats: b"", "ends too early"),
        (lambda formats: b"\x80", "has no layers"),
        (lambda formats: b"\x81\xa1a" * 50 + b"\x80", "more than 500 entries or 6 levels"),
        (lambda formats: b"\xdf\xff\xff\xff\xff", "more than 500 entries"),
        (lambda formats: b"\x81\xa1a\xdd\xff\xff\xff\xff", "does not begin a value of a tree of arrays"),
        (lambda formats: b"\x81\xa1a\xc9\xff\xff\xff\xff\x01", "ends too early"),
        (lambda formats: b"\x82\xa1a\x00\xa1a\x00", "a key occurs twice"),
        (lambda formats: b"\x81\x00\x00", "a key is not a string"),
        (lambda formats: b"\x80" * (5 << 20), "has 5242880 bytes; at most 4194304 are allowed"),
        (lambda formats: b"cposix\nsystem\n(S'touch hacked'\ntR.", "not a tree of arrays in msgpack"),
    ],
)
def test_a_wrong_or_partial_theta_is_refused_by_name(formats, tmp_path, make, message):
    write(tmp_path, {"theta.state": make(formats)})
    with pytest.raises(ValueError, match=f"theta.state: .*{message}") as error:
        lopt.load_rule(tmp_path)
    assert "\n" not in str(error.value)


# --- Celo2 ---


def celo2_rule(**config):
    theta = {name: value.float() for name, value in field.theta("celo2").items()}
    return Celo2.from_jax(theta, adam_bias_correction=True, **config)


def assert_same(found, expected):
    assert (found.kind, found.config) == (expected.kind, expected.config)
    for name, value in expected.state_dict().items():
        assert torch.equal(found.state_dict()[name], value), name


def test_the_theta_of_celo2_that_flax_wrote(formats, tmp_path):
    """The fixture was written by flax 0.12.8, including the haiku module."""
    path = goldens.FIXTURES / "celo2_theta.state"
    shutil.copy(path, tmp_path / "theta.state")
    assert_same(load(tmp_path), celo2_rule())
    assert formats.packed(formats.theta_of(celo2_rule())) == path.read_bytes()


@pytest.mark.parametrize(("optimizer", "kind"), [("celo2", "celo2"), ("celo2base", "celo2_base")])
def test_the_authors_two_files_say_which_variant_it_is(formats, tmp_path, optimizer, kind):
    files = formats.celo2_repo(celo2_rule(), optimizer)
    shutil.copy(goldens.FIXTURES / "celo2_theta.state", tmp_path / "theta.state")
    (tmp_path / "config.json").write_bytes(files["config.json"])
    rule = lopt.load_rule(tmp_path)  # nothing is left out, so there is no warning
    assert_same(rule, celo2_rule(kind=kind))
    assert rule.source.name == str(tmp_path)
    assert_same(lopt.load_rule(lopt.save_rule(rule, tmp_path / "ours")), rule)


def test_pylos_celo2(formats, tmp_path):
    assert_same(load(write(tmp_path, formats.pylo_celo2_files(celo2_rule()))), celo2_rule())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda files, spec, tensors: tensors.pop("w0.13"), "safetensors: tensor 'w0.13' is missing"),
        (lambda files, spec, tensors: tensors.update(w3=torch.zeros(1)), "safetensors: tensor 'w3' is unexpected"),
        (
            lambda files, spec, tensors: tensors.update({"w0.3": torch.zeros(8, 3)}),
            r"'w0.3' has shape \[8, 3\], but config.json requires \[3, 8\]",
        ),
        (lambda files, spec, tensors: spec.update(activation="tanh"), "config.json: activation='tanh' is not that of"),
        (lambda files, spec, tensors: spec.update(hidden_layers=3), "config.json: hidden_layers=3 is not that of"),
        (lambda files, spec, tensors: spec.update(more=1), "config.json: more=1 is not that of PyLO's CELO2MLP"),
        (lambda files, spec, tensors: spec.pop("hidden_size"), "config.json: hidden_size=None is not that of"),
        (lambda files, spec, tensors: spec.update(hidden_size=9), r"has shape .*, but config.json requires \[.*9"),
        (lambda files, spec, tensors: spec.update(hidden_size=0), "config.json: config of kind 'celo2': hidden_size=0"),
    ],
)
def test_a_wrong_or_partial_celo2_of_pylos_is_refused_by_name(formats, tmp_path, change, message):
    files = formats.pylo_celo2_files(celo2_rule())
    spec, tensors = json.loads(files["config.json"]), safetensors.torch.load(files["model.safetensors"])
    change(files, spec, tensors)
    contents = {"config.json": json.dumps(spec).encode(), "model.safetensors": safetensors.torch.save(tensors)}
    with pytest.raises(ValueError, match=message) as error:
        lopt.load_rule(write(tmp_path, contents))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("beside", [True, False], ids=["with its config.json", "alone"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda arrays: arrays.pop("w0__4"), r"theta.state: array 'w0__4' has shape None, expected \(1, 8\)"),
        (lambda arrays: arrays.pop("b0"), r"theta.state: array 'b0' has shape None, expected \(8,\)"),
        (lambda arrays: arrays.update(w0__14=torch.zeros(3, 8)), r"'w0__14' has shape \(3, 8\), expected None"),
        (lambda arrays: arrays.update(w2=torch.zeros(8, 2)), r"'w2' has shape \(8, 2\), expected \(8, 3\)"),
        (lambda arrays: arrays.update(b2=torch.full((3,), torch.inf)), "array 'b2' contains NaN, infinity"),
    ],
)
def test_a_wrong_or_partial_theta_of_celo2_is_refused_by_name(formats, tmp_path, change, message, beside):
    tree = formats.theta_of(celo2_rule())
    change(tree["ff_mod_stack"]["~"])
    files = {**formats.celo2_repo(celo2_rule()), "theta.state": formats.packed(tree)}
    if not beside:
        del files["config.json"]
    with pytest.raises(ValueError, match=message) as error:
        lopt.load_rule(write(tmp_path, files))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("optimizer", ["adam", None, 3, ["celo2"]])
def test_the_meta_training_of_another_optimizer_is_refused_by_its_name(formats, tmp_path, optimizer):
    with pytest.raises(ValueError, match=r"config.json: describes the meta-training of optimizer .* can be read"):
        lopt.load_rule(write(tmp_path, formats.celo2_repo(celo2_rule(), optimizer)))


def test_the_authors_config_without_its_theta_is_refused(formats, tmp_path):
    files = formats.celo2_repo(celo2_rule())
    del files["theta.state"]
    with pytest.raises(ValueError, match=r"theta.state: is missing or is not a regular file. Check the directory"):
        lopt.load_rule(write(tmp_path, files))
