"""The papers' networks: their weight counts, what they compute, and that they convert and learn."""

import pytest
import torch
import torch.nn.functional as F
from golden import Golden, assert_near, cases, tolerance
from torch import nn

import subnet_kernels as sk
from subnet_pipelines import Refusal
from subnet_pipelines.models import MODELS, use_batch_statistics, use_running_statistics

# name -> input, weights of what WSN masks (without the head), width that the head reads
NETWORKS = {
    "mlp": ((784,), 88_400, 100),
    "lenet-300-100": ((784,), 265_200, 100),
    "fc-300-300": ((784,), 325_200, 300),
    "fc-1024": ((784,), 784 * 1024 + 1024**2, 1024),
    "alexnet": ((3, 32, 32), 6_499_328, 2048),
    "lenet": ((3, 32, 32), 2_986_500, 500),
    "lenet-large": ((1, 32, 32), 24_436_400, 1500),
    "tinynet": ((3, 64, 64), 2_743_520, 640),
    "resnet-18": ((3, 32, 32), 1_090_140, 640),
    "gem-resnet-18": ((3, 32, 32), 1_090_140, 160),
    "resnet-50": ((3, 224, 224), 23_454_912, 2048),
}


def test_every_network_is_here():
    assert MODELS.keys() == NETWORKS.keys()


@pytest.mark.parametrize("name", NETWORKS)
def test_counts_and_shapes(name):
    shape, weights, features = NETWORKS[name]
    net = MODELS[name](7, *shape)
    assert sum(p.numel() for p in net.body.parameters()) == weights
    assert {key for key, _ in net.named_parameters() if not key.endswith("weight")} == set()  # no bias, no affine norm
    assert net.head.weight.shape == (7, features)
    assert net.features(torch.randn(3, *shape)).shape == (3, features)
    assert net(torch.randn(3, *shape)).shape == (3, 7)
    assert MODELS[name]()(torch.randn(2, *shape)).shape[0] == 2  # the papers' inputs are the default


def test_supsup_counts_the_heads():
    assert sum(p.numel() for p in MODELS["gem-resnet-18"]().parameters()) == 1_090_940
    assert sum(p.numel() for p in MODELS["resnet-50"]().parameters()) == 23_475_392
    assert sum(m.num_features for m in MODELS["resnet-50"]().modules() if isinstance(m, nn.BatchNorm2d)) == 26_560


def test_widths():
    assert [p.shape[0] for p in MODELS["lenet-300-100"](7, width=0.5).parameters()] == [150, 50, 7]
    assert [p.shape[0] for p in MODELS["fc-1024"](7, width=2).parameters()] == [2048, 2048, 7]
    narrow = [m for m in MODELS["gem-resnet-18"](7, width=0.29).modules() if isinstance(m, nn.Conv2d)]
    assert (narrow[0].out_channels, narrow[-1].out_channels) == (5, 40)  # 20 x .29 = 5.8
    wide = MODELS["resnet-50"](7, width=2)
    assert sum(p.numel() for p in wide.body.parameters()) == 66_766_016  # of wide ResNet-50-2
    for name in ("lenet-300-100", "fc-1024", "gem-resnet-18", "resnet-50"):
        with pytest.raises(Refusal, match=f"width must leave every layer of model {name} a unit, got 0.0001"):
            MODELS[name](width=1e-4)


def test_other_channels():
    for name, channels in (("alexnet", 1), ("resnet-18", 1), ("lenet", 1), ("lenet-large", 3), ("tinynet", 1)):
        shape = (channels, *NETWORKS[name][0][1:])
        assert MODELS[name](4, *shape)(torch.randn(2, *shape)).shape == (2, 4)


@pytest.mark.parametrize("shape", [(784,), (3, 48, 48), (1, 28, 28)])
@pytest.mark.parametrize("name", [name for name, (shape, *_) in NETWORKS.items() if len(shape) == 3])
def test_other_images_are_refused(name, shape):
    got, side = " x ".join(map(str, shape)), NETWORKS[name][0][1]
    with pytest.raises(Refusal, match=f"model {name} reads images of channels x {side} x {side}, got inputs of {got}"):
        MODELS[name](10, *shape)


def test_alexnet_as_described():
    kinds = [type(m) for m in MODELS["alexnet"]().body]
    conv = [nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.Dropout, nn.MaxPool2d]
    linear = [nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Dropout]
    assert kinds == conv * 3 + [nn.Flatten] + linear * 2
    net = MODELS["alexnet"]()
    assert [m.p for m in net.modules() if isinstance(m, nn.Dropout)] == [0.2, 0.2, 0.5, 0.5, 0.5]
    convs = [m for m in net.body if isinstance(m, nn.Conv2d)]
    assert [(m.out_channels, *m.kernel_size) for m in convs] == [(64, 4, 4), (128, 3, 3), (256, 2, 2)]
    assert [m.out_features for m in net.body if isinstance(m, nn.Linear)] == [2048, 2048]


@pytest.mark.parametrize("name", ["lenet", "lenet-large"])
def test_lenets_as_described(name):
    net = MODELS[name]()
    conv, linear = [nn.Conv2d, nn.ReLU, nn.MaxPool2d], [nn.Linear, nn.ReLU]
    assert [type(m) for m in net.body] == conv * 2 + [nn.Flatten] + linear * 2
    convs, pools = ([m for m in net.body if isinstance(m, kind)] for kind in (nn.Conv2d, nn.MaxPool2d))
    assert all((m.kernel_size, m.padding) == ((5, 5), (2, 2)) for m in convs)
    assert all((m.kernel_size, m.stride, m.padding) == (3, 2, 1) for m in pools)
    widths = [m.out_channels for m in convs] + [m.out_features for m in net.body if isinstance(m, nn.Linear)]
    assert widths == {"lenet": [20, 50, 800, 500], "lenet-large": [64, 128, 2500, 1500]}[name]


def test_tinynet_as_described():
    net = MODELS["tinynet"]()
    assert [type(m) for m in net.body] == [nn.Conv2d, nn.ReLU] * 4 + [nn.Flatten] + [nn.Linear, nn.ReLU] * 2
    convs = [m for m in net.body if isinstance(m, nn.Conv2d)]
    assert [(m.out_channels, m.kernel_size, m.stride, m.padding) for m in convs] == [(160, (3, 3), (2, 2), (1, 1))] * 4
    assert [(m.in_features, m.out_features) for m in net.body if isinstance(m, nn.Linear)] == [(2560, 640), (640, 640)]


def test_one_row_has_no_statistics():
    net, row = MODELS["alexnet"](4), torch.randn(1, 3, 32, 32)
    for mode in (True, False):
        with pytest.raises(Refusal, match="alexnet norms by the statistics of the batch"):
            net.train(mode)(row)
    assert use_running_statistics(net)(row).shape == (1, 4)  # in eval mode
    with pytest.raises(Refusal, match="one row has none"):
        net.train()(row)


@pytest.mark.parametrize("name", ["alexnet", "resnet-18"])
def test_running_statistics_are_what_a_norm_made_with_them_keeps(name):
    net = use_running_statistics(MODELS[name](4))
    norm = next(m for m in net.modules() if isinstance(m, nn.BatchNorm2d))
    other, inputs = nn.BatchNorm2d(norm.num_features, affine=False), []
    norm.register_forward_pre_hook(lambda _, args: inputs.append(args[0].detach()))
    for _ in range(2):
        net(torch.randn(3, 3, 32, 32))
        other(inputs[-1])
    assert norm.state_dict().keys() == other.state_dict().keys()
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in norm.state_dict().items())
    x = torch.randn(4, 3, 32, 32)
    net.eval()
    with torch.no_grad():
        torch.testing.assert_close(net(x)[:2], net(x[:2]))  # a row's logits do not depend on the batch
    assert use_running_statistics(net) is net
    assert norm.num_batches_tracked == 2  # what is there already stays


@pytest.mark.parametrize("name", ["alexnet", "resnet-18", "gem-resnet-18"])
def test_norm_by_the_batch_in_eval_mode_too(name):
    net = MODELS[name](10).eval()
    if name == "gem-resnet-18":  # which is made to norm by running statistics
        assert list(net.buffers())
        assert use_batch_statistics(net) is net
    x = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        assert not torch.equal(net(x)[:2], net(x[:2]))
    assert not list(net.buffers())


@pytest.mark.parametrize("path", cases("supsup_bn_gemresnet18"))
def test_resnet_18_computes_what_the_authors_compute(path):
    """Their network of a quarter of the width: two tasks, each three batches in train mode and then one in eval mode."""
    gold, near = Golden(path), tolerance(path)
    net = MODELS["gem-resnet-18"](5, width=0.25)
    bank = sk.MaskBank(sk.convert(net, sk.SubnetConfig()))
    norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    assert (len(bank.layers()), len(norms)) == (len(gold["conv_names"]), len(gold["bn_names"]))
    with torch.no_grad():
        for layer, name in zip(bank.layers(), gold["conv_names"]):
            layer.weight.copy_(gold[f"weight:{name}"].view_as(layer.weight))
        for task in (0, 1):
            masks = [gold.mask(f"mask{task}:{name}") for name in gold["conv_names"]]
            bits = {name: sk.pack(mask) for name, mask in zip(bank.layer_names, masks)}
            bank.begin()
            bank.activate(None, bits=bits)
            net.train()
            for x, y in zip(gold["x"].roll(-task, 0), gold[f"train_y{task}"]):
                assert_near(net(x), y, near, f"task {task}, train")
            for norm, name in zip(norms, gold["bn_names"]):
                assert_near(norm.running_mean, gold[f"mean{task}:{name}"], near, f"task {task}, mean of {name}")
                assert_near(norm.running_var, gold[f"var{task}:{name}"], near, f"task {task}, variance of {name}")
            bank.commit(str(task), bits=bits)
            bank.activate(str(task))
            net.eval()
            assert_near(net(gold["x"][0]), gold[f"eval_y{task}"], near, f"task {task}, eval")
        bank.activate("0")
        assert_near(net(gold["x"][0]), gold["eval_y0_again"], near, "task 0 after task 1")


@pytest.mark.parametrize("name", NETWORKS)
def test_converts_and_learns(name):
    shape, weights, _ = NETWORKS[name]
    config = sk.SubnetConfig(density=0.1, k_rule="kth", train_weights=True, per_task=["head"])
    net = sk.convert(MODELS[name](5, *shape), config)
    bank = sk.MaskBank(net)
    assert sum(layer.weight.numel() for layer in bank.layers()) == weights
    x, y = torch.randn(4, *shape), torch.tensor([0, 1, 2, 3])
    for task in ("a", "b"):
        bank.begin(scores="init")
        before = [layer.weight.detach().clone() for layer in bank.layers()]
        opt = sk.optim.Adam(net.parameters(), 1e-3, fuse_ste=True)
        F.cross_entropy(net(x), y).backward()
        opt.step()
        for layer, old in zip(bank.layers(), before):
            assert torch.equal(layer.bits, sk.select(layer.scores, layer.k))
            assert not torch.equal(layer.weight, old)
            if layer.frozen is not None:
                frozen = sk.unpack(layer.frozen, old.shape)
                assert torch.equal(layer.weight[frozen], old[frozen])
        bank.commit(task)
    bank.verify()
