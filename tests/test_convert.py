"""Conversion of a model: which layers, how dense, from what weights; and that everything else stays as it was."""

import copy
import math
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import subnet_kernels as sk
from subnet_kernels import reference
from subnet_kernels.layers import SubnetLayer


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.norm = nn.BatchNorm2d(8)
        self.body = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 12, bias=False))
        self.heads = nn.ModuleList([nn.Linear(12, 4), nn.Sequential(nn.Linear(12, 6), nn.Linear(6, 5))])

    def forward(self, x, head=0):
        x = self.norm(self.conv(x)).relu().mean((2, 3))
        return self.heads[head](self.body(x))


def densities(model):
    return {name: m.density for name, m in model.named_modules() if isinstance(m, SubnetLayer)}


def opened(layer):
    return reference.unpack(layer.bits, layer.weight.shape)


# ------------------------------------------------------------------------------------------------------- which and how dense


def test_all_layers_by_default():
    model = sk.convert(Net(), sk.SubnetConfig(density=0.25))
    assert densities(model) == dict.fromkeys(["conv", "body.0", "body.2", "heads.0", "heads.1.0", "heads.1.1"], 0.25)
    for layer in (model.conv, model.body[0]):
        assert int(opened(layer).sum()) == sk.k_sort(layer.weight.numel(), 0.25) == layer.k


def test_patterns_first_that_fits():
    model = sk.convert(Net(), sk.SubnetConfig(density={"conv": 0.5, "body.*": 0.25, "*": 1.0}))
    assert densities(model) == {
        "conv": 0.5,
        "body.0": 0.25,
        "body.2": 0.25,
        "heads.0": 1.0,
        "heads.1.0": 1.0,
        "heads.1.1": 1.0,
    }
    assert opened(model.heads[0]).all()


def test_callable_of_the_shape():
    model = sk.convert(Net(), sk.SubnetConfig(density=lambda shape: 0.5 if len(shape) == 4 else 0.1))
    assert densities(model)["conv"] == 0.5
    assert densities(model)["body.0"] == 0.1


def test_erdos_renyi_by_hand():
    model = sk.convert(Net(), sk.SubnetConfig(density=sk.ErdosRenyi(2.0)))
    assert densities(model)["conv"] == 2.0 * (8 + 3) / (8 * 3 * 9)
    assert densities(model)["body.2"] == 2.0 * (12 + 12) / (12 * 12)
    assert densities(model)["heads.0"] == 0.5  # 2 (4 + 12) / 48 = .67 is capped


def test_kth_rule():
    model = sk.convert(Net(), sk.SubnetConfig(density=0.3, k_rule="kth", ties="all"))
    assert model.body[0].k == sk.k_kth(96, 0.3) == 96 - round(0.01 * (0.7 * 100) * 95)


def test_filter():
    model = sk.convert(Net(), sk.SubnetConfig(filter=lambda name, m: isinstance(m, nn.Conv2d) or name == "body.2"))
    assert list(densities(model)) == ["conv", "body.2"]
    assert type(model.body[0]) is nn.Linear


@pytest.mark.parametrize(
    ("given", "masked"),
    [
        (nn.Conv2d, ["conv"]),
        ("body", ["body.0", "body.2"]),
        ("body.0", ["body.0"]),
        ("*.0", ["body.0", "heads.0", "heads.1.0"]),
        ([nn.Conv2d, "heads.1"], ["conv", "heads.1.0", "heads.1.1"]),
        ((nn.BatchNorm2d, "body.2"), ["body.2"]),
    ],
)
def test_filter_by_class_and_name(given, masked):
    assert list(densities(sk.convert(Net(), sk.SubnetConfig(filter=given)))) == masked


@pytest.mark.parametrize(
    ("patterns", "modules", "masked_heads"),
    [
        (["heads"], ["heads"], []),
        (["heads.*"], ["heads.0", "heads.1"], []),
        (["heads.1"], ["heads.1"], ["heads.0"]),
        (["*ads.0"], ["heads.0"], ["heads.1.0", "heads.1.1"]),
        (["heads.1.0"], ["heads.1.0"], ["heads.0", "heads.1.1"]),
    ],
)
def test_per_task_modules_stay_dense(patterns, modules, masked_heads):
    """What convert leaves dense is what the bank stores for every task: one reading of the globs."""
    model = sk.convert(Net(), sk.SubnetConfig(per_task=patterns))
    assert [name for name in densities(model) if name.startswith("heads")] == masked_heads
    bank = sk.MaskBank(model)
    bank.commit("a")
    assert list(bank["a"].modules) == modules


def test_a_bare_layer_as_the_model():
    layer = nn.Linear(8, 4)
    weight = layer.weight
    model = sk.convert(layer, sk.SubnetConfig(density={"": 0.25}, train_weights=True))
    assert model is layer
    assert model.weight is weight
    assert list(model.state_dict()) == ["weight", "bias", "scores"]
    assert list(sk.dense_state_dict(model)) == ["weight", "bias"]
    model(torch.ones(2, 8)).sum().backward()
    assert model.scores.grad is not None


# ------------------------------------------------------------------------------------------------------------ weight inits


def test_weights_are_kept_by_default():
    model = Net()
    before = copy.deepcopy(model.state_dict())
    sk.convert(model, sk.SubnetConfig())
    assert all(torch.equal(v, before[k]) for k, v in sk.dense_state_dict(model).items())


@pytest.mark.parametrize("fan", ["fan_in", "fan_out"])
@pytest.mark.parametrize("scale_fan", [False, True])
def test_signed_constant(fan, scale_fan):
    model = Net()
    with torch.no_grad():
        model.conv.weight[0, 0, 0, 0] = 0
        model.body[0].weight[1, 1] = 0
    signs = {"conv": model.conv.weight.sign(), "body.0": model.body[0].weight.sign()}
    config = sk.SubnetConfig(density=0.25, weight_init="signed_constant", fan=fan, scale_fan=scale_fan)
    sk.convert(model, config)
    fans = {"conv": 3 * 9 if fan == "fan_in" else 8 * 9, "body.0": 8 if fan == "fan_in" else 12}
    for name, count in fans.items():
        weight = model.get_submodule(name).weight
        assert weight.unique().numel() == 3
        expected = signs[name] * math.sqrt(2 / (count * (0.25 if scale_fan else 1)))
        torch.testing.assert_close(weight.detach(), expected, rtol=1e-7, atol=0)
    assert model.conv.weight[0, 0, 0, 0] == 0
    assert model.body[0].weight[1, 1] == 0


def test_grouped_convolution_counts_its_own_fan():
    conv = sk.convert(nn.Conv2d(8, 16, 3, groups=4), sk.SubnetConfig(weight_init="signed_constant"))
    torch.testing.assert_close(conv.weight.abs().max().item(), math.sqrt(2 / (2 * 9)), rtol=1e-6, atol=0)


def test_kaiming_normal():
    model = sk.convert(nn.Linear(400, 300), sk.SubnetConfig(density=0.5, weight_init="kaiming_normal", fan="fan_out"))
    assert abs(model.weight.std().item() / math.sqrt(2 / 300) - 1) < 0.02


@pytest.mark.parametrize("init", ["signed_constant", "kaiming_normal"])
def test_what_is_not_masked_keeps_its_values(init):
    model = Net()
    head, norm, bias = model.heads[0].weight.clone(), model.norm.weight.clone(), model.conv.bias.clone()
    sk.convert(model, sk.SubnetConfig(weight_init=init, per_task=["heads"]))
    assert torch.equal(model.heads[0].weight, head)
    assert torch.equal(model.norm.weight, norm)
    assert torch.equal(model.conv.bias, bias)


def test_scores_are_drawn_within_the_bound_and_reproducibly():
    torch.manual_seed(1)
    a = sk.convert(Net(), sk.SubnetConfig())
    torch.manual_seed(1)
    b = sk.convert(Net(), sk.SubnetConfig())
    for layer, other, fan in ((a.conv, b.conv, 27), (a.body[0], b.body[0], 8)):
        assert torch.equal(layer.scores, other.scores)
        assert layer.scores.abs().max() <= fan**-0.5
        assert layer.scores.abs().max() > 0.8 * fan**-0.5


# ---------------------------------------------------------------------------------------------- identity and checkpoints


@pytest.mark.parametrize("train_weights", [True, False])
def test_identity_is_kept(train_weights):
    model = Net()
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    buffers, keys = dict(model.named_buffers()), list(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    assert sk.convert(model, sk.SubnetConfig(train_weights=train_weights, per_task=["heads"])) is model
    assert all(module is modules[name] for name, module in model.named_modules())
    now = dict(model.named_parameters())
    assert all(now[name] is p for name, p in parameters.items())
    assert all(b is buffers[name] for name, b in model.named_buffers())
    assert isinstance(model.conv, nn.Conv2d)
    assert [key for key in model.state_dict() if not key.endswith(".scores")] == keys
    assert set(model.state_dict()) - set(keys) == {f"{name}.scores" for name in densities(model)}
    assert model.conv.weight.requires_grad is train_weights
    assert model.conv.bias.requires_grad
    assert {id(p) for p in optimizer.param_groups[0]["params"]} <= {id(p) for p in now.values()}


def test_dense_checkpoint_loads_after_conversion_and_back():
    dense, model = Net().eval(), sk.convert(Net(), sk.SubnetConfig(density=0.4)).eval()
    scores = model.conv.scores.detach().clone()
    checkpoint = dense.state_dict()
    keys = list(checkpoint)
    assert model.load_state_dict(checkpoint) == ([], [])
    assert list(checkpoint) == keys  # the caller's dict is his own
    assert torch.equal(model.conv.scores, scores)
    assert torch.equal(model.conv.w_eff, reference.apply(dense.conv.weight.detach(), model.conv.bits))
    other = Net()
    assert other.load_state_dict(sk.dense_state_dict(model)) == ([], [])
    x = torch.randn(2, 3, 6, 6)
    assert torch.equal(other.eval()(x), dense(x))
    converted = sk.convert(Net(), sk.SubnetConfig(density=0.4)).eval()
    converted.load_state_dict(model.state_dict())
    assert torch.equal(converted(x), model(x))
    assert not torch.equal(converted(x), dense(x))


def test_strict_loading_still_complains_of_the_rest():
    model = sk.convert(Net(), sk.SubnetConfig())
    checkpoint = Net().state_dict()
    del checkpoint["conv.bias"]
    with pytest.raises(RuntimeError, match=r"Missing key.*conv\.bias"):
        model.load_state_dict(checkpoint)


def test_a_converted_model_pickles_whatever_its_config():
    config = sk.SubnetConfig(density=lambda shape: 0.3, filter=lambda name, m: name != "conv", per_task=["heads.*"])
    model = sk.convert(Net(), config).eval()
    other = pickle.loads(pickle.dumps(model))
    x = torch.randn(2, 3, 6, 6)
    assert torch.equal(model(x), other(x))
    assert sk.MaskBank(other).layer_names == ["body.0", "body.2"]


@pytest.mark.parametrize("wrap", [lambda layer: layer, lambda layer: nn.TransformerEncoder(layer, 2)])
def test_fused_transformer_inference_does_not_read_past_the_masks(wrap):
    """nn.TransformerEncoderLayer has a fused path, taken without gradients, that reads linear1.weight itself."""
    torch.manual_seed(0)
    model = sk.convert(wrap(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)), sk.SubnetConfig(density=0.3)).eval()
    x = torch.randn(2, 5, 8)
    expected = model(x).detach()
    with torch.no_grad():
        y = model(x)
    torch.testing.assert_close(y, expected)
    with torch.no_grad():
        for layer in (m for m in model.modules() if isinstance(m, SubnetLayer)):
            layer.weight[~opened(layer)] = 100.0
        torch.testing.assert_close(model(x), expected)


# ---------------------------------------------------------------------------------------------------------- and back


@pytest.mark.parametrize("train_weights", [True, False])
def test_unconverted_is_the_model_that_it_was(train_weights):
    model = Net().eval()
    model.body[2].weight.requires_grad_(False)
    x = torch.randn(2, 3, 6, 6)
    kinds, modules = [type(m) for m in model.modules()], list(model.modules())
    y, state = model(x), copy.deepcopy(model.state_dict())
    attributes = [set(m.__dict__) for m in model.modules()]
    learns, parameters = [p.requires_grad for p in model.parameters()], list(model.parameters())
    sk.convert(model, sk.SubnetConfig(train_weights=train_weights))
    assert not torch.equal(model(x), y)
    assert sk.unconvert(model) is model
    assert [type(m) for m in model.modules()] == kinds
    assert list(model.modules()) == modules
    assert all(a is b for a, b in zip(model.parameters(), parameters))
    assert [p.requires_grad for p in model.parameters()] == learns
    assert [set(m.__dict__) for m in model.modules()] == attributes
    assert list(model.state_dict()) == list(state)
    assert torch.equal(model(x), y)
    sk.convert(model, sk.SubnetConfig())  # and once more


def test_merged_has_the_effective_weights():
    model = sk.convert(Net(), sk.SubnetConfig(density=0.3)).eval()
    model.double()  # whose products are PyTorch's own on both sides
    bank, x = sk.MaskBank(model), torch.randn(2, 3, 6, 6, dtype=torch.float64)
    live = model(x).detach()
    bank.commit(
        "a", bits={name: reference.pack(torch.rand(m.weight.shape) < 0.5) for name, m in zip(bank.layer_names, bank.layers())}
    )
    other = sk.unconvert(copy.deepcopy(model), merge=True)
    assert torch.equal(other(x), live)
    assert other.conv.weight.ne(0).float().mean() < 0.4
    bank.activate("a")
    task = model(x)
    assert torch.equal(sk.unconvert(model, merge=True)(x), task)


def test_merged_in_float32_up_to_rounding():
    model = sk.convert(Net(), sk.SubnetConfig(density=0.3)).eval()
    x = torch.randn(2, 3, 6, 6)
    y = model(x)
    torch.testing.assert_close(sk.unconvert(model, merge=True)(x), y, rtol=1e-5, atol=1e-6)


def test_unconvert_gives_fused_inference_back():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, activation="gelu").eval()
    x = torch.randn(2, 5, 8)
    with torch.no_grad():
        y = layer(x)
    sk.unconvert(sk.convert(layer, sk.SubnetConfig()))
    assert layer.activation_relu_or_gelu == 2
    with torch.no_grad():
        assert torch.equal(layer(x), y)


def test_unconvert_refuses_in_a_sentence():
    with pytest.raises(ValueError, match=r"expected a converted model, got Net without a masked layer"):
        sk.unconvert(Net())
    model = sk.convert(nn.Sequential(nn.Linear(4, 3)), sk.SubnetConfig(density=0.5))
    bank = sk.MaskBank(model)
    bank.commit("a")
    bank.commit("b", bits={"0": reference.pack(torch.ones(3, 4, dtype=torch.bool))})
    with bank.rows(["a", "b"]), pytest.raises(ValueError, match=r"must run one task to be merged"):
        sk.unconvert(model, merge=True)


# ------------------------------------------------------------------------------------------------------------- no values


@pytest.mark.parametrize("assign", [False, True])
def test_a_model_without_values_converts_and_takes_a_dense_checkpoint(assign):
    checkpoint, x = Net().eval().state_dict(), torch.randn(2, 3, 6, 6)
    with torch.device("meta"):
        model = Net().eval()
    sk.convert(model, sk.SubnetConfig(density=0.3, train_weights=True, per_task=["heads"]))
    assert model.conv.scores.is_meta
    with pytest.raises(ValueError, match=r"MaskBank: layer 'conv' must have values, it is on the meta device"):
        sk.MaskBank(model)
    if not assign:
        model.to_empty(device=x.device)
    model.load_state_dict(checkpoint, assign=assign)
    for layer, fan in ((model.conv, 27), (model.body[0], 8), (model.body[2], 12)):
        assert 0.8 * fan**-0.5 < layer.scores.abs().max() <= fan**-0.5  # drawn, though no checkpoint has them
        assert torch.equal(layer.bits, reference.select([layer.scores], [layer.k], "magnitude", "last")[0])
    bank = sk.MaskBank(model)
    assert model(x).isfinite().all()
    bank.commit("a")


# ------------------------------------------------------------------------------------------------------------- refusals


def test_a_layer_names_its_path():
    model = sk.convert(Net(), sk.SubnetConfig())
    with pytest.raises(ValueError, match=r"^body\.0: density must be in \(0, 1\], got 1\.7"):
        model.body[0].density = 1.7
    with pytest.raises(ValueError, match=r"^body\.0: density must be in"):
        copy.deepcopy(model).body[0].density = 1.7
    assert model.body[0].density == 0.5


def tied():
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))
    model[2].weight = model[0].weight
    return model


def tied_to_an_embedding():
    model = nn.Sequential(nn.Embedding(5, 6), nn.Linear(6, 5))
    model[1].weight = model[0].weight
    return model


def weight_normed():
    return nn.Sequential(parametrizations.weight_norm(nn.Linear(6, 6)), nn.Linear(6, 3))


REFUSED = {
    "parametrised": (weight_normed, {}, r"convert: module '0' must have a plain weight, its weight is parametrised"),
    "tied": (tied, {}, r"convert: weights must not be tied, '2\.weight' is '0\.weight'"),
    "tied to an embedding": (tied_to_an_embedding, {}, r"must not be tied, '1\.weight' is '0\.weight'"),
    "tied to what is not masked": (tied_to_an_embedding, {"filter": nn.Linear}, r"must not be tied, '0\.weight' is '1\.weight'"),
    "an embedding that writes": (
        lambda: nn.Sequential(nn.Embedding(5, 6, max_norm=1.0)),
        {},
        r"module '0': max_norm must be None",
    ),
    "a sparse embedding": (lambda: nn.Sequential(nn.Embedding(5, 6, sparse=True)), {}, r"module '0': sparse must be False"),
    "filter of nothing": (Net, {"filter": ["body", "tail"]}, r"filter 'tail' must name a module of the model, which has conv"),
    "tied to a head": (tied, {"per_task": ["2"]}, r"must not be tied, '2\.weight' is '0\.weight'"),
    "masked already": (lambda: sk.convert(Net(), sk.SubnetConfig()), {}, r"module 'conv' must be dense, it is masked already"),
    "nothing to mask": (lambda: nn.Sequential(nn.ReLU()), {}, r"expected a model with Linear, Conv or Embedding.*got none"),
    "all filtered": (Net, {"filter": lambda *_: False}, r"expected a model with Linear, Conv or Embedding"),
    "per_task of nothing": (Net, {"per_task": ["head"]}, r"per_task 'head' must name a module of the model, which has conv"),
    "no pattern": (Net, {"density": {"conv": 0.5}}, r"must have a pattern for layer 'body\.0', got 'conv'"),
    "share out of range": (Net, {"density": {"conv": 0.5, "*": 1.5}}, r"^body\.0: density must be in \(0, 1\], got 1\.5"),
    "callable out of range": (Net, {"density": lambda _: 0}, r"^conv: density must be in \(0, 1\], got 0"),
    "not a density": (Net, {"density": "half"}, r"density must be in \(0, 1\], got 'half'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_a_sentence_and_left_as_it_was(case):
    make, options, message = REFUSED[case]
    model = make()
    kinds, state = [type(m) for m in model.modules()], copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message) as raised:
        sk.convert(model, sk.SubnetConfig(weight_init="signed_constant", **options))
    assert "\n" not in str(raised.value)
    assert [type(m) for m in model.modules()] == kinds
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("density", 0.0),
        ("density", -0.1),
        ("density", 1.01),
        ("density", float("nan")),
        ("k_rule", "half"),
        ("by", "size"),
        ("ties", "none"),
        ("select", "best"),
        ("weight_init", "zeros"),
        ("fan", "fan"),
        ("filter", [3]),
    ],
)
def test_bad_fields_are_refused_at_once(field, value):
    with pytest.raises(ValueError, match=rf"{field} must be .*got"):
        sk.SubnetConfig(**{field: value})


def test_a_shared_module_is_one_layer():
    layer = nn.Linear(6, 6)
    model = sk.convert(nn.Sequential(layer, nn.ReLU(), layer), sk.SubnetConfig(density=0.5))
    assert list(densities(model)) == ["0"]
    model(torch.ones(2, 6)).sum().backward()
    assert model[0].scores.grad is not None
