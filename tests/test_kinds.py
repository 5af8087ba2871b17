"""Masked layers of the kinds that PyTorch's own products serve: transposed convolutions and embeddings, in every use of a layer."""

import copy

import pytest
import torch
from device import generator
from torch import nn

import subnet_kernels as sk
from subnet_kernels import reference

LAYERS = {
    "transposed 1d": (lambda: nn.ConvTranspose1d(4, 6, 3, stride=2, output_padding=1), (4, 5)),
    "transposed 2d": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, groups=2, bias=False), (4, 5, 4)),
    "transposed 2d, dilated": (lambda: nn.ConvTranspose2d(4, 6, 3, dilation=2), (4, 5, 4)),
    "transposed 3d": (lambda: nn.ConvTranspose3d(2, 3, 2), (2, 3, 4, 3)),
    "embedding": (lambda: nn.Embedding(20, 6), None),
    "embedding, padded": (lambda: nn.Embedding(20, 6, padding_idx=3, scale_grad_by_freq=True), None),
}


def inputs(shape, seed, rows=6):
    chance = generator(seed)
    return torch.randint(20, (rows, 7), generator=chance) if shape is None else torch.randn(rows, *shape, generator=chance)


class Naive(nn.Module):
    """The dense layer with a weight that autograd makes of weight and scores at every forward."""

    def __init__(self, layer, dense):
        super().__init__()
        self.dense, self.k = dense, layer.k
        self.own = {key: nn.Parameter(getattr(layer, key).detach().clone()) for key in ("weight", "scores")}

    def forward(self, x):
        weight, scores = self.own.values()
        mask = reference.unpack(reference.select([scores], [self.k], "magnitude", "last")[0], scores.shape)
        effective = weight * (mask.to(weight.dtype) + (scores.abs() - scores.abs().detach()))
        return torch.func.functional_call(self.dense, {"weight": effective}, (x,))


@pytest.mark.parametrize("name", LAYERS)
def test_trains_as_the_twin(name):
    make, shape = LAYERS[name]
    dense = make()
    layer = sk.convert(copy.deepcopy(dense), sk.SubnetConfig(density=0.3, train_weights=True))
    assert isinstance(layer, type(dense))
    twin = Naive(layer, dense)
    sides = [(layer, [layer.weight, layer.scores]), (twin, list(twin.own.values()))]
    optimizers = [torch.optim.Adam(parameters, 1e-2) for _, parameters in sides]
    for step in range(3):
        for (model, parameters), optimizer in zip(sides, optimizers):
            optimizer.zero_grad()
            model(inputs(shape, step)).square().mean().backward()
            assert all(p.grad.any() for p in parameters)
            optimizer.step()
        assert torch.equal(layer.weight, twin.own["weight"])
        assert torch.equal(layer.scores, twin.own["scores"])
    assert torch.equal(layer.w_eff, reference.apply(layer.weight.detach(), layer.bits))


@pytest.mark.parametrize("name", LAYERS)
def test_every_way_to_run(name):
    """Active, mixed rows, superposed, exported, stateless, copied and unconverted agree with the dense layer of that weight."""
    make, shape = LAYERS[name]
    model = sk.convert(nn.Sequential(make()), sk.SubnetConfig(density=0.3)).eval()
    bank, x, dense = sk.MaskBank(model), inputs(shape, 1), make()

    def expected(weight):
        state = {key: value for key, value in sk.dense_state_dict(model).items()}
        return torch.func.functional_call(
            dense, {"weight": weight, **({"bias": state["0.bias"]} if "0.bias" in state else {})}, (x,)
        )

    weight, masks = model[0].weight.detach(), torch.rand(3, *model[0].weight.shape) < 0.5
    for t, mask in enumerate(masks):
        bank.commit(str(t), bits={"0": reference.pack(mask)})
    alone = [expected(weight.where(mask, 0)) for mask in masks]
    for t, y in enumerate(alone):
        bank.activate(str(t))
        assert torch.equal(model(x), y)
        assert torch.equal(bank.export(str(t))(x), y)
    bank.activate(None)
    ids = torch.tensor([2, 0, 1, 1, 0, 2])
    with bank.rows(ids):
        torch.testing.assert_close(model(x), torch.stack([alone[t][i] for i, t in enumerate(ids)]))
    alphas = bank.superpose(torch.tensor([0.5, 0.2, 0.3]))
    mixed = expected(weight * (masks * alphas.view(-1, *[1] * weight.dim())).sum(0))
    torch.testing.assert_close(model(x), mixed)
    with pytest.raises(ValueError, match=r"row_alpha_grad: layer '0' must be linear or an ungrouped Conv2d, got Subnet"):
        bank.row_alpha_grad(x, lambda y: y.flatten(1).sum(1))
    bank.activate(None)
    y = model(x).detach()
    parameters = {key: value.detach() for key, value in model.named_parameters()}
    assert torch.equal(torch.func.functional_call(model, parameters, (x,)), y)
    assert torch.equal(copy.deepcopy(model)(x), y)
    assert torch.equal(sk.unconvert(model)(x), expected(weight))


def test_one_row_that_all_share():
    """Positions come to their embedding as one row, however many rows the batch has."""

    class Positions(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.places, self.out = nn.Embedding(9, 4), nn.Embedding(5, 4), nn.Linear(4, 3)

        def forward(self, x):
            return self.out(self.words(x) + self.places(torch.arange(x.shape[1])[None]))

    model = sk.convert(Positions(), sk.SubnetConfig(density=0.5)).eval()
    bank, x, ids = sk.MaskBank(model), torch.randint(9, (4, 5)), [1, 0, 2, 1]
    for t in range(3):
        bank.commit(
            str(t),
            bits={key: reference.pack(torch.rand(m.weight.shape) < 0.5) for key, m in zip(bank.layer_names, bank.layers())},
        )
    with bank.rows(torch.tensor(ids)):
        y = model(x)
        one = model(x[:1])  # one input as all of them
    for row, t in enumerate(ids):
        with bank.as_task(str(t)):
            torch.testing.assert_close(y[row], model(x[row : row + 1])[0])
            torch.testing.assert_close(one[row], model(x[:1])[0])
    with bank.rows(torch.tensor(ids)), pytest.raises(ValueError, match=r"rows: layer 'words': its input must have 4 rows first"):
        model(x[:3])


def test_the_size_that_a_transposed_convolution_is_asked_for():
    dense = nn.ConvTranspose2d(3, 4, 3, stride=2)
    layer = sk.convert(copy.deepcopy(dense), sk.SubnetConfig(density=0.5))
    x = torch.randn(2, 3, 4, 4)
    with torch.no_grad():
        dense.weight.copy_(layer.w_eff)
    y = layer(x, output_size=[10, 10])
    assert y.shape == (2, 4, 10, 10)
    assert torch.equal(y, dense(x, output_size=[10, 10]))
    bank = sk.MaskBank(layer)
    bank.commit("a")
    bank.commit("b")
    with bank.rows(["a", "b"]):
        torch.testing.assert_close(layer(x, output_size=[10, 10]), y)


def test_by_their_own_constructors():
    assert sk.SubnetConvTranspose1d(3, 4, 3, rule=sk.Rule(0.5))(torch.ones(1, 3, 5)).shape == (1, 4, 7)
    assert sk.SubnetConvTranspose2d(3, 4, 3)(torch.ones(1, 3, 5, 5)).shape == (1, 4, 7, 7)
    assert sk.SubnetConvTranspose3d(3, 4, 2)(torch.ones(1, 3, 3, 3, 3)).shape == (1, 4, 4, 4, 4)
    assert int(reference.count(sk.SubnetEmbedding(8, 4, rule=sk.Rule(0.25)).bits)) == 8
    with pytest.raises(ValueError, match=r"SubnetEmbedding: max_norm must be None"):
        sk.SubnetEmbedding(8, 4, max_norm=2.0)
    with pytest.raises(ValueError, match=r"SubnetEmbedding: sparse must be False"):
        sk.SubnetEmbedding(8, 4, sparse=True)
