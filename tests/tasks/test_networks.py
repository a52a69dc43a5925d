"""The networks against torch's own modules with the same weights, their gradients, and their initial values."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_lopt.tasks import layers
from lightning_lopt.tasks.layers import Network, init_params
from lightning_lopt.tasks.networks import MLP, ConvNet, PooledConvNet, ResNet
from lightning_lopt.tasks.sequences import LSTMLanguageModel, TransformerLanguageModel, VisionTransformer

MODULES = {
    "relu": nn.ReLU(),
    "tanh": nn.Tanh(),
    "sigmoid": nn.Sigmoid(),
    "gelu": nn.GELU(approximate="tanh"),
    "leaky_relu": nn.LeakyReLU(),
    "elu": nn.ELU(),
    "silu": nn.SiLU(),
}


def draw(network: Network, seed: int = 0) -> dict[str, Tensor]:
    """Random parameters, including the scales and offsets of norms."""
    generator = torch.Generator().manual_seed(seed)
    params = init_params(network.specs(), generator, None)
    return {name: param + 0.1 * torch.randn(param.shape, generator=generator) for name, param in params.items()}


def count(network: Network) -> int:
    return sum(math.prod(spec.shape) for spec in network.specs().values())


def filled(module: nn.Module, params: dict[str, Tensor], name: str) -> nn.Module:
    """Load the parameters with a prefix into the module, and set it to training mode."""
    module.load_state_dict({k: params[f"{name}.{k}"] for k, _ in module.named_parameters()}, strict=False)
    return module.train()


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("norm", ["none", "layer", "batch"])
@pytest.mark.parametrize("activation", MODULES)
def test_mlp(activation, norm):
    network = MLP(inputs=12, hidden=(7, 5), outputs=3, activation=activation, norm=norm)
    params, x = draw(network), torch.randn(6, 3, 2, 2)
    modules: list[nn.Module] = [nn.Flatten()]
    for i, (fan_in, fan_out) in enumerate(((12, 7), (7, 5))):
        modules.append(filled(nn.Linear(fan_in, fan_out), params, f"layers.{i}"))
        if norm != "none":
            kind = {"layer": nn.LayerNorm, "batch": nn.BatchNorm1d}[norm]
            modules.append(filled(kind(fan_out), params, f"norms.{i}"))
        modules.append(MODULES[activation])
    modules.append(filled(nn.Linear(5, 3), params, "layers.2"))
    close(network.apply(params, x), nn.Sequential(*modules)(x))


def test_dropout_masks_stand_before_the_activation():
    network = MLP(inputs=4, hidden=(6,), outputs=2, activation="sigmoid", dropout=0.5)
    params, x = draw(network), torch.randn(3, 4)
    assert network.mask_shapes(3) == ((3, 6),)
    masks = (torch.tensor([0.0, 2.0]).repeat(3, 3),)
    hidden = torch.sigmoid(masks[0] * F.linear(x, params["layers.0.weight"], params["layers.0.bias"]))
    close(network.apply(params, x, masks), F.linear(hidden, params["layers.1.weight"], params["layers.1.bias"]))
    assert torch.equal(network.apply(params, x, (torch.ones(3, 6),)), network.apply(params, x))


@pytest.mark.parametrize("size", [8, 7])
@pytest.mark.parametrize("pool", ["avg", "max", "flatten"])
@pytest.mark.parametrize("norm", ["none", "layer", "batch"])
def test_conv_net(norm, pool, size):
    network = ConvNet(in_shape=(3, size, size), channels=(4, 6), strides=(2, 1), outputs=5, norm=norm, pool=pool)
    params, x = draw(network), torch.randn(6, 3, size, size)
    h = x
    for i, (fan_in, fan_out, stride) in enumerate(((3, 4, 2), (4, 6, 1))):
        # "Same" for a 3x3 kernel: stride 2 on an even size pads after the end only.
        pad = nn.ZeroPad2d((0, 1, 0, 1) if stride == 2 and h.shape[-1] % 2 == 0 else 1)
        h = F.relu(filled(nn.Conv2d(fan_in, fan_out, 3, stride), params, f"convs.{i}")(pad(h)))
        if norm == "batch":
            h = filled(nn.BatchNorm2d(fan_out), params, f"norms.{i}")(h)
        elif norm == "layer":  # over the channels of each position
            h = filled(nn.LayerNorm(fan_out), params, f"norms.{i}")(h.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    h = {"avg": h.mean((2, 3)), "max": h.amax((2, 3)), "flatten": h.flatten(1)}[pool]
    close(network.apply(params, x), filled(nn.Linear(h.shape[1], 5), params, "head")(h))


def test_conv_net_without_padding():
    network = ConvNet(in_shape=(1, 9, 7), channels=(2, 3), strides=(1, 2), padding="valid", pool="flatten")
    params, x = draw(network), torch.randn(4, 1, 9, 7)
    first = F.relu(filled(nn.Conv2d(1, 2, 3), params, "convs.0")(x))
    h = F.relu(filled(nn.Conv2d(2, 3, 3, 2), params, "convs.1")(first)).flatten(1)
    close(network.apply(params, x), filled(nn.Linear(h.shape[1], 10), params, "head")(h))


@pytest.mark.parametrize("bottleneck", [False, True])
@pytest.mark.parametrize("max_pool", [False, True])
def test_res_net(bottleneck, max_pool):
    network = ResNet(
        in_shape=(3, 8, 8), channels=(8, 16), blocks=(1, 2), bottleneck=bottleneck, stem_channels=4, max_pool=max_pool
    )
    params, x = draw(network), torch.randn(5, 3, 8, 8)

    def conv(name: str, h: Tensor, stride: int = 1) -> Tensor:
        weight = params[f"{name}.weight"]
        if weight.shape[-1] == 1:
            return F.conv2d(h, weight, None, stride)
        pads = (0, 1, 0, 1) if stride == 2 and h.shape[-1] % 2 == 0 else (1, 1, 1, 1)
        return F.conv2d(F.pad(h, pads), weight, None, stride)

    def norm_relu(name: str, h: Tensor) -> Tensor:
        return F.relu(F.batch_norm(h, None, None, params[f"{name}.weight"], params[f"{name}.bias"], training=True))

    h = conv("stem", x)
    if max_pool:
        h = F.max_pool2d(F.pad(h, (0, 1, 0, 1), value=-math.inf), 3, 2)
    strides = {True: (1, 2, 1), False: (2, 1)}[bottleneck]
    for name, stride, projects in (("groups.0.0", 1, True), ("groups.1.0", 2, True), ("groups.1.1", 1, False)):
        shortcut = h
        for i, conv_stride in enumerate(strides):
            h = norm_relu(f"{name}.norms.{i}", h)
            if i == 0 and projects:
                shortcut = conv(f"{name}.projection", h, stride)
            h = conv(f"{name}.convs.{i}", h, conv_stride if stride == 2 else 1)
        h = h + shortcut
    expected = filled(nn.Linear(16, 10), params, "head")(norm_relu("norm", h).mean((2, 3)))
    close(network.apply(params, x), expected)


def test_lstm_language_model():
    network = LSTMLanguageModel(vocab=11, embed=5, hidden=6)
    params, x = draw(network), torch.randint(11, (3, 7))
    lstm = nn.LSTM(5, 6, batch_first=True)
    forget = torch.zeros(24)
    forget[6:12] = 1.0
    with torch.no_grad():
        lstm.weight_ih_l0.copy_(params["cell.weight"][:, :5])
        lstm.weight_hh_l0.copy_(params["cell.weight"][:, 5:])
        lstm.bias_ih_l0.copy_(params["cell.bias"])
        lstm.bias_hh_l0.copy_(forget)
    state = tuple(params[name].expand(1, 3, 6).contiguous() for name in ("initial_h", "initial_c"))
    hidden, _ = lstm(F.embedding(x, params["embedding.weight"]), state)
    close(network.apply(params, x), filled(nn.Linear(6, 11), params, "head")(hidden))


def test_lstm_language_models_have_the_references_parameter_counts():
    """Published parameter counts of two RNNLM tasks of the reference, for vocabularies of bytes and of 32k tokens."""
    assert count(LSTMLanguageModel(vocab=259, embed=64, hidden=128)) == 149_059
    assert count(LSTMLanguageModel(vocab=32_100, embed=128, hidden=256)) == 12_753_252


def encoder_layer(params: dict[str, Tensor], name: str, width: int, heads: int) -> nn.TransformerEncoderLayer:
    """torch's pre-norm block with the weights of one of our blocks."""
    layer = nn.TransformerEncoderLayer(
        width, heads, 4 * width, 0.0, nn.GELU(approximate="tanh"), batch_first=True, norm_first=True
    )
    state = {}
    for kind in ("weight", "bias"):
        ours = {part: params[f"{name}.{part}.{kind}"] for part in ("query", "key", "value", "out", "up", "down")}
        state[f"self_attn.in_proj_{kind}"] = torch.cat([ours["query"], ours["key"], ours["value"]])
        state[f"self_attn.out_proj.{kind}"] = ours["out"]
        state[f"linear1.{kind}"], state[f"linear2.{kind}"] = ours["up"], ours["down"]
        state[f"norm1.{kind}"], state[f"norm2.{kind}"] = (params[f"{name}.norm{i}.{kind}"] for i in (1, 2))
    layer.load_state_dict(state)
    return layer


def test_transformer_language_model():
    network = TransformerLanguageModel(vocab=11, context=9, width=8, depth=2, heads=2)
    params, x = draw(network), torch.randint(11, (3, 7))
    h = F.embedding(x, params["embedding.weight"]) + params["positions"][:7]
    causal = nn.Transformer.generate_square_subsequent_mask(7)
    for i in range(2):
        h = encoder_layer(params, f"blocks.{i}", 8, 2)(h, src_mask=causal)
    h = filled(nn.LayerNorm(8), params, "norm")(h)
    close(network.apply(params, x), filled(nn.Linear(8, 11), params, "head")(h))


def test_transformer_does_not_see_the_future():
    network = TransformerLanguageModel(vocab=11, context=9, width=8, depth=2, heads=2, positions=False, head_size=3)
    params, x = draw(network), torch.randint(11, (3, 7))
    changed = x.clone()
    changed[:, 4:] = (changed[:, 4:] + 1) % 11
    close(network.apply(params, x)[:, :4], network.apply(params, changed)[:, :4])


def test_attention_with_heads_of_a_size_of_their_own():
    network = TransformerLanguageModel(vocab=11, context=7, width=8, depth=1, heads=3, head_size=5, positions=False)
    params, x = draw(network), torch.randn(2, 7, 8)
    query, key, value = (
        F.linear(x, params[f"blocks.0.{part}.weight"], params[f"blocks.0.{part}.bias"]).view(2, 7, 3, 5).transpose(1, 2)
        for part in ("query", "key", "value")
    )
    attended = F.scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2).reshape(2, 7, 15)
    expected = F.linear(attended, params["blocks.0.out.weight"], params["blocks.0.out.bias"])
    close(network.blocks._attention(params, "blocks.0", x), expected)


def test_transformer_dropout_masks():
    network = TransformerLanguageModel(vocab=5, context=4, width=4, depth=2, heads=2, dropout=0.1)
    params, x = draw(network), torch.randint(5, (2, 4))
    assert network.mask_shapes(2) == 4 * ((2, 4, 4),)
    masks = tuple(torch.ones(shape) for shape in network.mask_shapes(2))
    assert torch.equal(network.apply(params, x, masks), network.apply(params, x))
    # Everything that the blocks add is dropped, which leaves the embedding.
    dropped = network.apply(params, x, tuple(torch.zeros_like(mask) for mask in masks))
    h = F.embedding(x, params["embedding.weight"]) + params["positions"]
    h = filled(nn.LayerNorm(4), params, "norm")(h)
    close(dropped, filled(nn.Linear(4, 5), params, "head")(h))


def test_vision_transformer():
    network = VisionTransformer(in_shape=(3, 8, 12), patch=4, width=8, depth=2, heads=2)
    params, x = draw(network), torch.randn(5, 3, 8, 12)
    patches = nn.Conv2d(3, 8, 4, 4)
    with torch.no_grad():
        patches.weight.copy_(params["patch.weight"].view(8, 3, 4, 4))
        patches.bias.copy_(params["patch.bias"])
    h = torch.cat([params["token"].expand(5, 1, 8), patches(x).flatten(2).transpose(1, 2)], 1) + params["positions"]
    for i in range(2):
        h = encoder_layer(params, f"blocks.{i}", 8, 2)(h)
    h = filled(nn.LayerNorm(8), params, "norm")(h)[:, 0]
    close(network.apply(params, x), filled(nn.Linear(8, 10), params, "head")(h))


IMAGES, TOKENS = torch.rand(3, 2, 6, 6, dtype=torch.float64), torch.randint(5, (3, 4))
SMALL = {
    "mlp": (MLP(inputs=72, hidden=(3, 2), outputs=3, activation="tanh", norm="layer"), IMAGES),
    "batch norm": (MLP(inputs=72, hidden=(3, 2), outputs=3, activation="tanh", norm="batch"), IMAGES),
    "conv": (ConvNet(in_shape=(2, 6, 6), channels=(2, 2), strides=(2, 1), activation="elu", norm="batch"), IMAGES),
    "resnet": (ResNet(in_shape=(2, 6, 6), channels=(4, 4), blocks=(1, 1), stem_channels=2), IMAGES),
    "vit": (VisionTransformer(in_shape=(2, 6, 6), patch=3, width=4, depth=1, heads=2), IMAGES),
    "lstm": (LSTMLanguageModel(vocab=5, embed=3, hidden=3), TOKENS),
    "transformer": (TransformerLanguageModel(vocab=5, context=4, width=4, depth=1, heads=2), TOKENS),
}


@pytest.mark.parametrize("kind", SMALL)
def test_first_and_second_derivatives_are_those_of_finite_differences(kind):
    network, x = SMALL[kind]
    params = {name: param.double().requires_grad_() for name, param in draw(network).items()}

    def loss(*values: Tensor) -> Tensor:
        return network.apply(dict(zip(params, values, strict=True)), x).logsumexp(-1).sum()

    assert torch.autograd.gradcheck(loss, tuple(params.values()), fast_mode=True)
    assert torch.autograd.gradgradcheck(loss, tuple(params.values()), fast_mode=True)


@pytest.mark.parametrize("kind", SMALL)
@pytest.mark.parametrize("scheme", layers.SCHEMES)
def test_initial_values(kind, scheme):
    network, _ = SMALL[kind]
    generator = torch.Generator().manual_seed(0)
    params = init_params(network.specs(), generator, 4000, scheme, std=0.3)
    for name, spec in network.specs().items():
        param, bound = params[name], 1 / math.sqrt(spec.fan_in)
        assert param.shape == (4000, *spec.shape)
        if spec.kind in ("ones", "zeros"):
            assert (param == float(spec.kind == "ones")).all()
            continue
        if scheme == "haiku":
            spread = 0.0 if spec.kind == "bias" else 0.8796 * spec.gain * (1.0 if spec.kind == "embedding" else bound)
        elif scheme == "torch":
            spread = 1.0 if spec.kind == "embedding" else bound / math.sqrt(3)
        else:
            spread = 0.3
        assert float(param.mean()) == pytest.approx(0, abs=0.03)
        assert float(param.std()) == pytest.approx(spread, rel=0.05, abs=1e-12)


def test_the_torch_scheme_is_that_of_torchs_modules():
    torch.manual_seed(0)
    linear, conv = nn.Linear(5, 400), nn.Conv2d(3, 400, 3)
    network = ConvNet(in_shape=(3, 4, 4), channels=(400,), strides=(1,))
    params = init_params(network.specs(), torch.Generator().manual_seed(0), None, "torch")
    params |= init_params(layers.linear_specs("l", 5, 400), torch.Generator().manual_seed(0), None, "torch")
    pairs = {"convs.0.weight": conv.weight, "convs.0.bias": conv.bias, "l.weight": linear.weight, "l.bias": linear.bias}
    for name, theirs in pairs.items():
        assert float(params[name].abs().max()) == pytest.approx(float(theirs.detach().abs().max()), rel=0.02)
        assert float(params[name].std()) == pytest.approx(float(theirs.detach().std()), rel=0.1)


@pytest.mark.parametrize("local_norm", [False, True])
@pytest.mark.parametrize("pool_size", [2, 3])
def test_pooled_conv_net(local_norm, pool_size):
    """Against torch's modules. For even sides, "same" padding of windows of 3 at stride 2 is one pixel at the end."""
    network = PooledConvNet(
        in_shape=(3, 8, 12), channels=(10, 12), hidden=(7, 5), outputs=4, pool_size=pool_size, local_norm=local_norm
    )
    params, x = draw(network), torch.randn(6, 3, 8, 12)
    pad = nn.ZeroPad2d((0, pool_size - 2, 0, pool_size - 2))  # after relu nothing is below 0
    y = x
    for i, (inputs, outputs) in enumerate(((3, 10), (10, 12))):
        y = filled(nn.Conv2d(inputs, outputs, 5, padding=2), params, f"convs.{i}")(y).relu()
        y = F.local_response_norm(y, 9, alpha=1e-3, beta=0.75, k=1.0) if local_norm else y
        y = F.max_pool2d(pad(y), pool_size, 2)
    y = y.flatten(1)
    assert y.shape == (6, 12 * 2 * 3)
    for i, (inputs, outputs) in enumerate(((72, 7), (7, 5))):
        y = filled(nn.Linear(inputs, outputs), params, f"layers.{i}")(y).relu()
    close(network.apply(params, x), filled(nn.Linear(5, 4), params, "layers.2")(y))


def test_the_thesis_networks_have_its_sizes():
    """ConvMnist large and small, ConvCifar 0 (1,068,298 parameters in the thesis) and 1."""
    shapes = {
        "large": PooledConvNet(in_shape=(1, 28, 28)).specs()["layers.0.weight"].shape,
        "small": PooledConvNet(in_shape=(1, 28, 28), channels=(16, 32), hidden=(512,)).specs()["layers.0.weight"].shape,
    }
    assert shapes == {"large": (1024, 3136), "small": (512, 1568)}
    cifar = PooledConvNet(in_shape=(3, 24, 24), channels=(64, 64), hidden=(384, 192), pool_size=3, local_norm=True)
    assert count(cifar) == 1_068_298
