"""Import VeLO: its authors' `params` and `theta.state`, with their config.gin, and PyLO's pair of files."""

import importlib.util
import json
import resource
import warnings
from pathlib import Path

import goldens
import huggingface_hub
import numpy as np
import pytest
import safetensors.torch
import torch
from hub_server import serve
from velo_goldens import GOLDENS, replay

import lightning_lopt as lopt
from lightning_lopt.hub import read_theta
from lightning_lopt.hub.importers import MAX_TREE_BYTES
from lightning_lopt.rules import velo_theta

PARAMS = (goldens.FIXTURES / "velo_params").read_bytes()  # as flax wrote it: {params: tree, gen_id, step}
THETA = PARAMS[8 : PARAMS.index(b"\xa6gen_id")]  # the tree alone, as flax writes theta.state
SCRIPT = Path(__file__).parents[2] / "examples" / "soak" / "fuzz_files.py"
CONFIG_GIN = """
import somewhere.else
run_train.lopt = @HyperV2()
opt_from_checkpoint__6cf1d6ba_d295/HyperV2.lstm_hidden_size = 16
HyperV2.param_inits = 6  # networks
HyperV2.use_bugged_loss_features = False
"""


def directory(folder, **files):
    folder.mkdir(exist_ok=True)
    for name, data in files.items():
        (folder / name.replace("_dot_", ".")).write_bytes(data if isinstance(data, bytes) else data.encode())
    return folder


@pytest.fixture(scope="module")
def formats():
    """The fuzzing script, which has a writer for the authors' format."""
    spec = importlib.util.spec_from_file_location("fuzz_files", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def load(folder, match):
    with pytest.warns(UserWarning, match=match) as caught:
        rule = lopt.load_rule(folder)
    assert len(caught) == 1
    return rule


def same(rule, other):
    return all(torch.equal(a, b) for a, b in zip(rule.parameters(), other.parameters(), strict=True))


def test_the_authors_params_with_their_configuration_take_the_authors_steps(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rule = lopt.load_rule(directory(tmp_path, params=PARAMS, config_dot_gin=CONFIG_GIN))
    assert (rule.kind, rule.source.name) == ("velo", str(tmp_path))
    assert (rule.config.lstm_hidden_size, rule.config.param_inits) == (16, 6)
    assert rule.config == type(rule.config)(lstm_hidden_size=16, param_inits=6)
    golden = GOLDENS["velo_f64"]
    config = {**rule.config.to_dict(), "layout": "jax"}
    authors = lopt.rules.make("velo", **config).double()
    authors.load_state_dict(rule.double().state_dict())
    for step in replay(authors, golden, "mixed", 11):
        last = step
    for leaf, param in last.params.items():
        torch.testing.assert_close(param, golden.recorded(f"mixed/params/{leaf}")[1], rtol=0, atol=1e-12)


def test_theta_state_alone_leaves_the_constructor_open(tmp_path):
    rule = load(directory(tmp_path / "theta", theta_dot_state=THETA), "leaves out the constructor's arguments")
    assert same(rule, load(directory(tmp_path / "params", params=PARAMS), "leaves out the constructor's arguments"))
    assert (rule.config.bugged_loss_features, rule.config.bugged_lstm_state) == (False, False)
    theta = read_theta(tmp_path / "theta" / "theta.state")
    assert theta.keys() == {*velo_theta.NAMES.values(), *velo_theta.BLOCKS, *velo_theta.UNUSED}
    old = lopt.rules.VeLO.from_jax(theta, use_bugged_loss_features=True, use_bugged_next_lstm_state=True, ff_mult=1.0)
    assert old.config.bugged_lstm_state
    assert same(rule, old)
    assert old.config.ff_mult == 1.0


def test_saved_as_our_own_it_is_the_same_rule(tmp_path):
    rule = load(directory(tmp_path / "theta", theta_dot_state=THETA), "leaves out")
    again = lopt.load_rule(lopt.save_rule(rule, tmp_path / "ours"))
    assert again.config == rule.config
    assert same(again, rule)


def test_the_published_size_fits_into_the_limits(formats, tmp_path):
    """512 units and 256 networks; other trees of that size are refused."""
    rule = lopt.rules.make("velo")
    assert rule.num_meta_params() + 31 * 512 == 2_320_385  # with the layer that nobody uses
    assert lopt.load_rule(lopt.save_rule(rule, tmp_path / "ours")).config == rule.config
    tree = formats.packed(formats.velo_tree(rule))
    assert len(tree) > 2 * MAX_TREE_BYTES
    assert same(load(directory(tmp_path / "theta", theta_dot_state=tree), "leaves out"), rule)
    other = tree.replace(b"\xacff_mod_stack", b"\xacff_mod_stick")
    with pytest.raises(ValueError, match=f"has {len(tree)} bytes; at most {MAX_TREE_BYTES} are allowed"):
        lopt.load_rule(directory(tmp_path / "other", theta_dot_state=other))
    longer = tree + bytes(4 << 20)
    with pytest.raises(ValueError, match=r"bytes; at most 12582912 are allowed"):
        lopt.load_rule(directory(tmp_path / "longer", theta_dot_state=longer))


def theta_with(change):
    def make(formats):
        rule = lopt.rules.make("velo", lstm_hidden_size=4, param_inits=2)
        change(rule)
        return formats.packed(formats.velo_tree(rule))

    return make


def set_to(name, value):
    return lambda rule: setattr(rule, name, torch.nn.Parameter(value))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda formats: THETA[:-1], "not a tree of arrays in msgpack .it ends too early"),
        (lambda formats: THETA + b"\x00", "followed by more data"),
        (lambda formats: THETA.replace(b"\xa5w0__7", b"\xa5w0__x"), r"w0__7'\] has shape None, expected \(6, 3, 4\)"),
        (
            lambda formats: THETA.replace(b"\xa9step_size", b"\xa9step_sise"),
            r"step_sise/b'\] has shape \(1,\), expected None",
        ),
        (
            lambda formats: THETA.replace(b"\xafrnn_to_controls", b"\xafrnn_to_somebody"),
            "rnn_to_controls/w'. is missing",
        ),
        (theta_with(set_to("controls_w", torch.zeros(4096, 0))), r"cell'\] has shape \(1, 4\), expected \(1, 4096\)"),
        (theta_with(set_to("mix_w", torch.zeros(31, 4))), r"linear_1/w'\] has shape \(31, 4\), expected \(30, 4\)"),
        (theta_with(set_to("gates_w", torch.zeros(8, 12))), r"rnn/linear/w'\] has shape \(8, 12\), expected \(8, 16\)"),
        (theta_with(set_to("b1", torch.full((2, 4), torch.nan))), "'ff_mod_stack/~/b1' contains NaN"),
        (theta_with(set_to("b1", torch.zeros(2, 5))), r"~/b1'\] has shape \(2, 5\), expected \(2, 4\)"),
    ],
)
def test_a_wrong_or_partial_tree_is_refused_by_name(formats, tmp_path, make, message):
    with pytest.raises(ValueError, match=f"theta.state: .*{message}") as error:
        lopt.load_rule(directory(tmp_path, theta_dot_state=make(formats)))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", {"bugged_loss_features": True}),  # the authors' own default
        ("HyperV2.exp_mult = 0.02", {"bugged_loss_features": True, "exp_mult": 0.02}),
        ("a/b.HyperV2.step_mult = 1e-3\nHyperV2.mix_layers = True", {"step_mult": 1e-3}),
        ("hyper_v2.HyperV2.use_bugged_next_lstm_state = True", {"bugged_lstm_state": True}),
        ("HyperV2.clip_param_scale_amount = None", {"clip_param_scale_amount": None}),
    ],
)
def test_arguments_in_config_gin(tmp_path, text, expected):
    config = lopt.load_rule(directory(tmp_path, params=PARAMS, config_dot_gin=text)).config
    assert {name: getattr(config, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("HyperV2.param_inits = 7", r"params: theta\[.*\] has shape"),
        (
            "HyperV2.param_inits = __import__('os').system('touch hacked')",
            "config.gin: sets HyperV2.param_inits to .*not",
        ),
        ("HyperV2.step_mult = @open('x')", "config.gin: sets HyperV2.step_mult"),
        ("HyperV2.step_mult = e", "config.gin: sets HyperV2.step_mult"),
        ("HyperV2.ff_hidden_size = 8", "config.gin: sets HyperV2.ff_hidden_size to '8'. Read are"),
        ("HyperV2.with_validation_feature_dim = True", "config.gin: sets HyperV2.with_validation_feature_dim"),
        (b"\xff\xfe", "config.gin: is not text"),
        ("#" * (65 << 10), "config.gin: has 66560 bytes; at most 65536 are allowed"),
    ],
)
def test_arguments_that_cannot_be_had_are_refused_by_name(tmp_path, text, message):
    with pytest.raises(ValueError, match=message) as error:
        lopt.load_rule(directory(tmp_path, params=PARAMS, config_dot_gin=text))
    assert "\n" not in str(error.value)


# --- PyLO


def pylo_pair(seed=0, units=16, inits=6):
    """Both files as PyLO saves them, with the layers that are not used."""
    generator = torch.Generator().manual_seed(seed)
    layers = {"mix_layer1": (units, 30), "mix_layer2": (units, 30), "final_mix_layer": (units, 30)}
    layers |= {"lstm.linear": (4 * units, 2 * units), "rnn_to_controls": (inits, units), "step_size": (1, units)}
    rnn = {f"{name}.weight": torch.randn(shape, generator=generator) / 4 for name, shape in layers.items()}
    rnn |= {f"{name}.bias": torch.randn(shape[0], generator=generator) / 4 for name, shape in layers.items()}
    rnn |= {f"lstm_init_state.{place}": torch.randn(1, units, generator=generator) / 4 for place in (0, 1)}
    mlp = {}
    for name, shape in {"input": (4, 30), "hidden": (4, 4), "output": (3, 4)}.items():
        last = ".0" if name == "hidden" else ""
        mlp[f"{name}_weights_{last}"] = torch.randn(inits, *shape, generator=generator)
        mlp[f"{name}_bias_{last}"] = torch.randn(inits, shape[0], generator=generator)
        mlp[f"{name}_weights{last}"] = torch.full(shape, torch.nan)  # scratch
        mlp[f"{name}_bias{last}"] = torch.zeros(shape[0])
    of_rnn = {"input_size": 30, "lstm_hidden_size": units, "param_inits": inits, "mix_layers": True}
    of_mlp = {"hidden_layers": 1, "hidden_size": 4, "input_size": 30, "output_size": 3, "param_inits": inits}
    return {"VeLO_RNN": [of_rnn, rnn], "VeLO_MLP": [of_mlp, mlp]}


def write(folder, pair):
    for name, (spec, tensors) in pair.items():
        weights = safetensors.torch.save(tensors)
        directory(folder / name, config_dot_json=json.dumps(spec), model_dot_safetensors=weights)
    return folder


def test_pylos_pair_by_either_name(tmp_path):
    pair = pylo_pair()
    write(tmp_path, pair)
    rule = load(tmp_path / "VeLO_RNN", "leaves out which of VeLO's checkpoints")
    assert same(rule, load(f"{tmp_path}/VeLO_MLP/", "leaves out"))
    assert (rule.config.lstm_hidden_size, rule.config.param_inits, rule.config.layout) == (16, 6, "torch")
    rnn, mlp = pair["VeLO_RNN"][1], pair["VeLO_MLP"][1]
    # Their forward pass in torch's own layers, on random inputs of two tensors.
    inputs, hidden, cell = torch.randn(2, 30), torch.randn(2, 16), torch.randn(2, 16)
    linear = {name: torch.nn.functional.linear(inputs, rnn[f"{name}.weight"], rnn[f"{name}.bias"]) for name in LAYERS}
    units = linear["final_mix_layer"] + linear["mix_layer2"].relu().amax(0)
    cells = torch.nn.LSTMCell(16, 16)
    i, g, f, o = rnn["lstm.linear.weight"].chunk(4)
    bias_i, bias_g, bias_f, bias_o = rnn["lstm.linear.bias"].chunk(4)
    weight = torch.cat([i, f, g, o])  # torch's order of the gates
    bias = torch.cat([bias_i, bias_f + 1, bias_g, bias_o])
    cells.load_state_dict(
        {"weight_ih": weight[:, :16], "weight_hh": weight[:, 16:], "bias_ih": bias, "bias_hh": torch.zeros(64)}
    )
    expected = cells(units, (hidden, cell))
    found = lopt.rules.velo.parts.lstm(rule.meta_params(), inputs, hidden, cell, inputs[:0])
    torch.testing.assert_close(tuple(found), expected)
    controls, factor = rule.heads(rule.meta_params(), expected[0][0] - rule.initial_hidden)
    torch.testing.assert_close(controls, rnn["rnn_to_controls.weight"] @ expected[0][0] + rnn["rnn_to_controls.bias"])
    torch.testing.assert_close(factor, (rnn["step_size.weight"] @ expected[0][0] + rnn["step_size.bias"])[0])
    network = lopt.rules.velo.mlp.mixed_network(rule.meta_params(), controls, 100.0)
    mixed = (controls[:, None, None] * mlp["input_weights_"]).mean(0) * 100
    torch.testing.assert_close(network["w0"].mT, mixed)
    torch.testing.assert_close(network["b2"], (controls[:, None] * mlp["output_bias_"]).mean(0) * 100)


LAYERS = ("mix_layer2", "final_mix_layer")


def changed(part, *, spec=None, drop=None, add=None, shape=None):
    pair = pylo_pair()
    pair[part][0].update(spec or {})
    if drop:
        del pair[part][1][drop]
    if add:
        pair[part][1][add] = torch.zeros(3)
    if shape:
        pair[part][1][shape] = torch.zeros(2, 2)
    return pair


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        (
            lambda: changed("VeLO_RNN", drop="step_size.bias"),
            "VeLO_RNN/model.safetensors: tensor 'step_size.bias' is mis",
        ),
        (
            lambda: changed("VeLO_MLP", drop="hidden_bias_.0"),
            "VeLO_MLP/model.safetensors: tensor 'hidden_bias_.0' is mi",
        ),
        (lambda: changed("VeLO_MLP", add="extra"), "tensor 'extra' is unexpected"),
        (lambda: changed("VeLO_RNN", shape="mix_layer2.weight"), r"'mix_layer2.weight' has shape \[2, 2\]"),
        (lambda: changed("VeLO_MLP", spec={"hidden_size": 8}), "VeLO_MLP/config.json: hidden_size=8 does not belong"),
        (lambda: changed("VeLO_MLP", spec={"hidden_layers": True}), "hidden_layers=True does not belong"),
        (lambda: changed("VeLO_RNN", spec={"input_size": 31}), "VeLO_RNN/config.json: input_size=31 does not belong"),
        (lambda: changed("VeLO_RNN", spec={"mix_layers": False}), "mix_layers=False does not belong"),
        (lambda: changed("VeLO_RNN", spec={"lstm_hidden_size": 0}), "lstm_hidden_size=0 does not belong"),
        (lambda: changed("VeLO_RNN", spec={"eval": 1}), "eval=1 does not belong"),
        (
            lambda: {**pylo_pair(), "VeLO_MLP": pylo_pair(inits=5)["VeLO_MLP"]},
            "VeLO_RNN has param_inits=6, and VeLO_MLP",
        ),
        (lambda: {**pylo_pair(), "VeLO_MLP": pylo_pair()["VeLO_RNN"]}, "holds VeLO_RNN again"),
        (lambda: {"VeLO_RNN": pylo_pair()["VeLO_RNN"]}, "VeLO_MLP/config.json: is missing"),
        (
            lambda: {**pylo_pair(), "VeLO_MLP": [{"hidden_layers": 1, "hidden_size": 4, "input_size": 39}, {}]},
            "is not PyLO's",
        ),
    ],
)
def test_a_wrong_or_partial_pair_is_refused_by_name(tmp_path, pair, message):
    write(tmp_path, pair())
    with pytest.raises(ValueError, match=message) as error:
        lopt.load_rule(tmp_path / "VeLO_RNN")
    assert "\n" not in str(error.value)


def test_a_part_under_another_name_is_refused(tmp_path):
    write(tmp_path, {"half": pylo_pair()["VeLO_RNN"]})
    with pytest.raises(ValueError, match="describes PyLO's VeLO_RNN, which is half of a rule. Put its VeLO_MLP beside"):
        lopt.load_rule(tmp_path / "half")


# --- from the Hub


@pytest.fixture
def hub(tmp_path):
    with serve() as (hub, _):
        yield hub
    huggingface_hub.close_session()


def put(hub, repo_id, files):
    return hub.create(repo_id).commit("main", files)


def load_from(hub, repo_id, tmp_path, **arguments):
    return lopt.load_rule(repo_id, endpoint=hub.url, cache_dir=tmp_path / "cache", **arguments)


def test_pylos_pair_from_the_hub(hub, tmp_path):
    shas = {}
    for name, (spec, tensors) in pylo_pair().items():
        files = {"config.json": json.dumps(spec).encode(), "model.safetensors": safetensors.torch.save(tensors)}
        shas[name] = put(hub, f"someone/{name}", files)
    with pytest.warns(UserWarning, match="leaves out which of VeLO's checkpoints"):
        rule = load_from(hub, "someone/VeLO_MLP", tmp_path, revision=shas["VeLO_MLP"])
    assert rule.source == ("someone/VeLO_MLP", shas["VeLO_MLP"])
    write(tmp_path, pylo_pair())
    assert same(rule, load(tmp_path / "VeLO_RNN", "leaves out"))
    del hub.repos["someone/VeLO_RNN"]
    with pytest.raises(FileNotFoundError, match="someone/VeLO_RNN"):
        lopt.load_rule("someone/VeLO_MLP", endpoint=hub.url, cache_dir=tmp_path / "other")


def test_a_theta_state_from_the_hub(hub, tmp_path):
    sha = put(hub, "someone/velo-4000", {"theta.state": THETA})
    with pytest.warns(UserWarning, match="leaves out the constructor's arguments"):
        rule = load_from(hub, "someone/velo-4000", tmp_path)
    assert rule.source == ("someone/velo-4000", sha)
    assert same(rule, load(directory(tmp_path / "theta", theta_dot_state=THETA), "leaves out"))
    put(hub, "someone/nothing", {"model.pt": b""})
    with pytest.raises(FileNotFoundError, match="config.json"):
        load_from(hub, "someone/nothing", tmp_path)


def test_numpy_arrays_and_their_dtype():
    theta = {name: value.double().numpy() for name, value in read_theta(goldens.FIXTURES / "velo_params").items()}
    rule = lopt.rules.VeLO.from_jax(theta)
    assert {param.dtype for param in rule.parameters()} == {torch.float64}
    assert np.array_equal(rule.mix_w.detach().numpy(), theta["rnn_params/linear_1/w"])
    with pytest.raises(ValueError, match="is dict, not an array"):
        lopt.rules.VeLO.from_jax({"rnn_params": {}})


def test_sizes_that_are_only_claimed_take_no_memory_and_no_random_numbers(tmp_path):
    """An array without data can claim any number of units, whose square would fill the memory."""
    theta = {"rnn_params/rnn_to_controls/w": torch.zeros(4096, 0), "ff_mod_stack/~/b0": torch.zeros(4096, 0)}
    state, before = torch.get_rng_state(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match="has shape .*, expected"):
        lopt.rules.VeLO.from_jax(theta)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # KiB
    lopt.rules.VeLO.from_jax(read_theta(goldens.FIXTURES / "velo_params"))
    assert torch.equal(torch.get_rng_state(), state)
