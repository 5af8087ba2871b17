"""SupSup's own layers, counts and networks (RAIVNLab/supsup): masks and counts exactly, reals to 1e-5.

Not read here: `supsup_infer_*` is in test_golden_inference.py, `supsup_bn_*` in test_models.py, `supsup_batche_*` and `supsup_psp_*` in
test_supsup_baselines.py, `supsup_nns_*` in test_golden_nns.py, `supsup_hop_*` in test_golden_hop.py.
"""

import pytest
import torch
import torch.nn.functional as F
from golden import Golden, assert_near, cases

import subnet_kernels as sk
from subnet_kernels.convert import ErdosRenyi, SubnetConfig, signed_constant_
from subnet_kernels.ops.apply import straight_through
from subnet_kernels.ops.masked import subnet_weight
from subnet_pipelines.capacity import csc_bytes
from subnet_pipelines.models import MODELS

NOTHING = torch.zeros(())
SPLIT_IMAGENET = {4: 40.9, 8: 80.6, 16: 159.1}  # s -> megabytes of 100 masks' indices
NETWORKS = {"GEMResNet18": "gem-resnet-18", "ResNet50": "resnet-50", "LeNet": "lenet-300-100", "FC1024": "fc-1024"}


def our_layers(path, gold, **config):
    """The layers of our network of the file's name, converted; None where the name is none of ours. Checks that they are the file's."""
    name = path.stem.split("_")[2]
    if name not in NETWORKS:
        return None
    outputs = gold["shapes"][-1, 0].item()
    layers = sk.MaskBank(sk.convert(MODELS[NETWORKS[name]](outputs), SubnetConfig(**config))).layers()
    shapes = [[*layer.weight.shape, 1, 1][:4] for layer in layers]  # a linear layer is the 1x1 convolution of the authors' nets
    assert shapes == gold["shapes"].tolist()
    return layers


def convolve(gold, x, weight):
    return F.conv2d(x, weight, stride=gold["stride"], padding=gold["padding"])


def check_products(gold, by):
    """Output and gradients through the saved mask, by the ops and by the straight-through rule."""
    bits = sk.pack(gold.mask("mask"))
    x, weight = gold.leaf("x"), gold.leaf("weight")
    y = sk.masked_conv(x, weight, bits, stride=gold["stride"], padding=gold["padding"])
    y.backward(gold["g"])
    for name, value in (("y", y), ("grad_x", x.grad), ("grad_weight", weight.grad)):
        assert_near(value, gold[name], what=name)
    assert weight.grad[~gold.mask("mask")].count_nonzero() == 0

    effective = sk.apply(gold["weight"], bits).requires_grad_()
    convolve(gold, gold["x"], effective).backward(gold["g"])
    d_weight, d_scores = straight_through(effective.grad, gold["weight"], gold["scores"], bits, None, by)
    assert_near(d_weight, gold["grad_weight"], what="grad_weight, straight through")
    assert_near(d_scores, gold["grad_scores"], what="grad_scores")

    if gold["x"].shape[2:] == (1, 1) and gold["weight"].shape[2:] == (1, 1):  # the fully connected nets are 1x1 convolutions
        y = sk.masked_linear(gold["x"].flatten(1), gold["weight"].flatten(1), bits)
        assert_near(y, gold["y"].flatten(1), what="y as a linear layer")


@pytest.mark.parametrize("path", [*cases("supsup_layer_*_MultitaskMaskConv_*"), *cases("supsup_layer_*_MaskConv_*")])
class TestSortRule:
    @staticmethod
    def rule(gold):
        """k, whether ties leave open which entries are kept, and the key at the cut."""
        key, mask = gold["scores"].abs(), gold.mask("mask")
        k = sk.k_sort(key.numel(), gold["k"])
        assert k == key.numel() - gold["zeros"] == mask.sum().item()
        least, most = key[mask].min(), key[~mask].max()
        assert least >= most  # of the saved mask: the rule as the README states it
        return k, bool(least == most), least

    def test_mask(self, path):
        gold = Golden(path)
        k, arbitrary, cut = self.rule(gold)
        mask = sk.unpack(sk.select(gold["scores"], k, ties="last"), gold["scores"].shape)
        assert mask.sum() == k
        if not arbitrary:
            assert torch.equal(mask, gold.mask("mask"))
            return
        key = gold["scores"].abs()
        assert key[mask].min() >= key[~mask].max()
        assert torch.equal(mask[key != cut], gold.mask("mask")[key != cut])  # off the tie nothing is arbitrary
        tied = mask[key == cut]
        assert tied[len(tied) - int(tied.sum()) :].all()  # on it, ours are the last in logical order

    def test_products(self, path):
        check_products(Golden(path), "magnitude")

    def test_scores(self, path):
        """The stateless layer, where the mask is not arbitrary."""
        gold = Golden(path)
        k, arbitrary, _ = self.rule(gold)
        x, weight, scores = gold.leaf("x"), gold.leaf("weight"), gold.leaf("scores")
        y = convolve(gold, x, subnet_weight("conv", weight, scores, k, None, "magnitude", "last"))
        y.backward(gold["g"])
        # y is linear in the effective weight and its cotangent is given, so G, and with it this gradient, is the same whichever tied
        # entries are kept.
        assert_near(scores.grad, gold["grad_scores"], what="grad_scores")
        if not arbitrary:
            for name, value in (("y", y), ("grad_x", x.grad), ("grad_weight", weight.grad)):
                assert_near(value, gold[name], what=name)


@pytest.mark.parametrize("path", cases("supsup_layer_*_FastMultitaskMaskConv_*"))
class TestThresholdRule:
    def test_mask(self, path):
        gold = Golden(path)
        bits = sk.threshold(gold["scores"], 0.0)
        assert torch.equal(sk.unpack(bits, gold["scores"].shape), gold.mask("mask"))

    def test_products(self, path):
        check_products(Golden(path), "value")


@pytest.mark.parametrize("path", cases("supsup_counts"))
def test_counts(path):
    gold = Golden(path)
    counts = [[sk.k_sort(n, k) for k in gold["k"].tolist()] for n in gold["n"].tolist()]
    assert counts == gold["ones"].tolist()
    for i, n in enumerate(gold["n"].tolist()):
        if n <= 100_000:
            scores = torch.randperm(n).float() + 1  # distinct, as in the authors' program
            for j, k in enumerate(gold["k"].tolist()):
                assert sk.count(sk.select(scores, sk.k_sort(n, k))) == gold["ones"][i, j]


@pytest.mark.parametrize("path", cases("supsup_er_*"))
def test_erdos_renyi(path):
    """Densities of whole networks by the Erdos-Renyi rule, equal in double precision, and the counts that follow from them."""
    gold = Golden(path)
    for s in gold["s"].tolist():
        rule = SubnetConfig(density=ErdosRenyi(s))
        for i, (name, shape) in enumerate(zip(gold["layer_names"], gold["shapes"].tolist())):
            density = rule.layer_density(name, shape)
            assert density == gold[f"density_s{s:g}"][i].item()
            assert torch.Size(shape).numel() == gold["params"][i]
            assert rule.rule(density).k(torch.Size(shape).numel()) == gold[f"ones_s{s:g}"][i]
        layers = our_layers(path, gold, density=ErdosRenyi(s))
        opened = [int(sk.count(layer.bits)) for layer in layers]
        assert opened == gold[f"ones_s{s:g}"].tolist()
        if "ResNet50" in path.name and s in SPLIT_IMAGENET:
            assert csc_bytes(100 * sum(opened), 0) / 1e6 == pytest.approx(SPLIT_IMAGENET[s], abs=0.05)


@pytest.mark.parametrize("path", cases("supsup_init_*"))
def test_signed_constant(path):
    """One magnitude a layer, the float32 one of the authors to its last two bits; signs as drawn, and an exact 0 stays 0."""
    gold = Golden(path)
    constants = dict(zip(map(tuple, gold["shapes"].tolist()), gold["constant"]))  # layers of one shape have one constant
    for shape, constant in constants.items():
        assert all(c == constant for s, c in zip(gold["shapes"].tolist(), gold["constant"]) if tuple(s) == shape)
        weight = torch.randn(shape)
        weight.view(-1)[0] = 0
        drawn = weight.clone()
        assert signed_constant_(weight, "fan_in") is weight
        magnitude = weight.abs().max()
        torch.testing.assert_close(magnitude, constant, rtol=2 * torch.finfo(torch.float32).eps, atol=0)
        assert torch.equal(weight, drawn.sign() * magnitude)
        if all(size == 1 for size in shape[2:]):  # a linear layer is the 1x1 convolution of the authors' nets
            flat = signed_constant_(drawn.flatten(1), "fan_in")
            assert torch.equal(flat, weight.flatten(1))
    for layer, constant in zip(our_layers(path, gold, weight_init="signed_constant") or [], gold["constant"]):
        magnitude = layer.weight.detach().abs()
        torch.testing.assert_close(magnitude.max(), constant, rtol=2 * torch.finfo(torch.float32).eps, atol=0)
        assert torch.equal(magnitude[magnitude > 0].unique(), magnitude.max()[None])
