"""ImpressLearn's layers (DSGA1006-Capstone-Team/supsup): basis masks and their combination, forward and gradients."""

import pytest
import torch
import torch.nn.functional as F
from golden import Golden, assert_near, cases

import subnet_kernels as sk


@pytest.fixture(params=cases("impress_*"))
def gold(request):
    return Golden(request.param)


def bank_of(gold):
    scores = list(gold["basis_scores"])
    bits = sk.select(scores, sk.k_sort(scores[0].numel(), gold["k"]))
    masks = torch.stack([sk.unpack(b, s.shape) for b, s in zip(bits, scores)])
    return masks, sk.pack_bank(masks)


def test_basis_masks(gold):
    assert torch.equal(bank_of(gold)[0], gold.mask("basis_masks"))


def test_combination(gold):
    _, bank = bank_of(gold)
    x, weight, alphas = gold.leaf("x"), gold.leaf("weight"), gold.leaf("alphas")
    y = F.conv2d(x, sk.superpose(weight, bank, alphas), stride=gold["stride"], padding=gold["padding"])
    y.backward(gold["g"])
    for name, value in (("y", y), ("grad_x", x.grad), ("grad_alphas", alphas.grad), ("grad_weight", weight.grad)):
        assert_near(value, gold[name], what=name)


def test_initial_alphas(gold):
    """The authors start at 1/B, what `alphas=None` means."""
    _, bank = bank_of(gold)
    assert torch.equal(gold["initial_alphas"], torch.full_like(gold["initial_alphas"], 1 / len(gold["initial_alphas"])))
    equal = sk.superpose(gold["weight"], bank)
    assert_near(equal, sk.superpose(gold["weight"], bank, gold["initial_alphas"]), 1e-6)


def test_basis_task(gold):
    """A basis task runs through its own mask alone: as bits, and as one-hot coefficients."""
    masks, bank = bank_of(gold)
    layout = {"stride": gold["stride"], "padding": gold["padding"]}
    assert_near(sk.masked_conv(gold["x"], gold["weight"], sk.pack(masks[1]), **layout), gold["y_basis1"], what="y_basis1")
    one_hot = torch.nn.functional.one_hot(torch.tensor(1), len(masks)).float()
    assert_near(F.conv2d(gold["x"], sk.superpose(gold["weight"], bank, one_hot), **layout), gold["y_basis1"], what="y_basis1")


def test_alpha_grad(gold):
    """Summed over the batch, the gradient of every row by itself is the layer's, where the layer is a linear one."""
    if gold["x"].shape[2:] != (1, 1) or gold["weight"].shape[2:] != (1, 1):
        pytest.skip("alpha_grad is for linear layers, and this is a convolution")
    _, bank = bank_of(gold)
    rows = sk.alpha_grad(gold["x"].flatten(1), gold["g"].flatten(1), gold["weight"].flatten(1), bank)
    assert rows.shape == (len(gold["x"]), len(gold["alphas"]))
    assert_near(rows.sum(0), gold["grad_alphas"], what="grad_alphas")
