"""Signed masks: entries 1, -1 and 0. Two packed planes with one coefficient, through layers, bank, superposition and files."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from device import DEVICE, generator
from torch import nn

import subnet_kernels as sk
from subnet_kernels import optim
from subnet_kernels.convert import SubnetConfig
from subnet_kernels.live import Rule

DENSITY = 0.3


def net(dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(2, 5, 3, padding=1, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(5 * 16, 7), nn.Tanh())
    model.append(nn.Linear(7, 3, bias=False))
    return sk.convert(model.to(dtype), SubnetConfig(select="signed", density=DENSITY, weight_init="signed_constant"))


def mask_of(scores, k):
    """sign(S) on the top-k of |S|, in plain PyTorch."""
    order = scores.detach().abs().flatten().sort(stable=True).indices
    mask = torch.zeros(scores.numel(), dtype=scores.dtype, device=scores.device)
    mask[order[len(order) - k :]] = scores.detach().flatten()[order[len(order) - k :]].sign()
    return mask.view(scores.shape)


def layers_of(model):
    return [m for m in model if hasattr(m, "scores")]


def images(rows=6, dtype=torch.float32):
    return torch.randn(rows, 2, 4, 4, generator=generator(5), dtype=dtype)


def by_hand(model, masks, x):
    """The network of plain products with weights W * mask."""
    weights = iter([layer.weight.detach() * mask for layer, mask in zip(layers_of(model), masks)])
    x = F.conv2d(x, next(weights), padding=1).relu().flatten(1)
    return F.linear(F.linear(x, next(weights), model[3].bias).tanh(), next(weights))


def learnt(tasks=3, dtype=torch.float32, model=None):
    """A bank of tasks with scores, and biases, of their own; and their masks."""
    model = model or net(dtype)
    bank, masks, biases = sk.MaskBank(model), [], []
    for t in range(tasks):
        bank.begin(scores="init")
        with torch.no_grad():
            model[3].bias.copy_(torch.randn(7, generator=generator(t), dtype=dtype))
        bank.commit(f"task {t}")
        masks.append([mask_of(layer.scores, layer.k) for layer in layers_of(model)])
        biases.append(model[3].bias.detach().clone())
    return model, bank, masks, biases


def planes_of(mask):
    return torch.stack([sk.pack(mask > 0), sk.pack(mask < 0)])


# ---- layers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_live_weight(dtype):
    for layer in layers_of(net(dtype)):
        mask = mask_of(layer.scores, layer.k)
        assert torch.equal(layer.w_eff, layer.weight * mask)
        assert torch.equal(sk.unpack(layer.bits, mask.shape), mask != 0)
        assert (mask != 0).sum() == layer.k == sk.k_sort(mask.numel(), DENSITY)
        assert {*mask.unique().tolist()} == {-1.0, 0.0, 1.0}


def test_gradients_go_straight_through_to_the_signed_score():
    """d loss / d S = G * W for every entry: the mask is the score's own sign, so that no sign comes in from the rule."""
    model = net(torch.float64)
    x = images(dtype=torch.float64)
    masks = [mask_of(layer.scores, layer.k).requires_grad_() for layer in layers_of(model)]
    expected = torch.autograd.grad(by_hand(model, masks, x).square().sum(), masks)
    model(x).square().sum().backward()
    for layer, grad in zip(layers_of(model), expected):
        torch.testing.assert_close(layer.scores.grad, grad)
        assert layer.weight.grad is None
    stateless = torch.func.grad(
        lambda scores: torch.func.functional_call(model, scores, (x,)).square().sum(),
    )({f"{name}.scores": m.scores.detach().clone() for name, m in model.named_children() if hasattr(m, "scores")})
    for grad, other in zip(expected, stateless.values()):
        torch.testing.assert_close(grad, other)


@pytest.mark.parametrize(
    ("make", "fused"),
    [(optim.Adam, False), (optim.Adam, True), (optim.SGD, False), (optim.SGD, True), (torch.optim.RMSprop, False)],
)
def test_steps_refresh_the_mask(make, fused):
    """Against the same steps on plain tensors, and with the same bits whether or not the step makes the gradient."""
    model, plain = net(), net()
    x, y = images(), torch.tensor([0, 1, 2, 0, 1, 2])
    opt = make([m.scores for m in layers_of(model)], lr=0.05, **({"fuse_ste": True} if fused else {}))
    scores = [m.scores.detach().clone().requires_grad_() for m in layers_of(plain)]
    other = getattr(torch.optim, make.__name__)(scores, lr=0.05)
    for _ in range(4):
        opt.zero_grad()
        F.cross_entropy(model(x), y).backward()
        opt.step()
        masks = [mask_of(s, m.k).requires_grad_() for s, m in zip(scores, layers_of(plain))]
        for s, grad in zip(scores, torch.autograd.grad(F.cross_entropy(by_hand(plain, masks, x), y), masks)):
            s.grad = grad
        other.step()
    for layer, s in zip(layers_of(model), scores):
        torch.testing.assert_close(layer.scores, s, rtol=1e-4, atol=1e-5)
        assert torch.equal(layer.w_eff, layer.weight * mask_of(layer.scores, layer.k))
        assert not torch.equal(layer.scores, next(m.scores for m in layers_of(net()) if m.scores.shape == s.shape))


def test_scores_written_by_hand_are_noticed():
    model = net()
    with torch.no_grad():
        model[5].scores.neg_()
    x = images()
    torch.testing.assert_close(model(x), by_hand(model, [mask_of(m.scores, m.k) for m in layers_of(model)], x))
    again = net(seed=1)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(x), model(x))
    assert torch.equal(copy.deepcopy(model)(x), model(x))


def test_a_score_of_zero_has_no_sign():
    """sign(0) = 0: it closes its weight even among the top-k, and what is closed does not get out, NaN neither."""
    model = net()
    layer = model[5]
    with torch.no_grad():
        layer.scores.zero_()
        layer.scores[0, 0] = -1.0
        layer.weight[1:] = torch.nan
    y = model(images())
    assert y.isfinite().all()
    expected = torch.zeros_like(layer.weight)
    expected[0, 0] = -layer.weight[0, 0]
    assert torch.equal(layer.w_eff, expected)
    bank = sk.MaskBank(model)
    assert [int(sk.count(plane)) for plane in bank.live_bits()["5"]] == [0, 1]
    bank.commit("a")
    bank.activate("a")
    assert torch.equal(layer.effective_weight(), expected)
    assert torch.equal(model(images()), y)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: SubnetConfig(select="signed", train_weights=True), "train_weights must be False where select is 'signed'"),
        (lambda: Rule(select="signed", by="value"), "by must be 'magnitude' where select is 'signed', got 'value'"),
    ],
)
def test_bad_settings(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_all_layers_are_signed_or_none():
    model = nn.Sequential(sk.SubnetLinear(4, 4, rule=Rule()), sk.SubnetLinear(4, 4, rule=Rule(select="signed")))
    with pytest.raises(ValueError, match="either all layers' masks must be signed or none, got both"):
        sk.MaskBank(model)


def test_says_so():
    assert "density=0.3, signed" in repr(net())


# ---- bank -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tasks", [3, 35])  # 35 tasks are 70 planes, which end in a second block
def test_a_bank_keeps_two_planes(tasks):
    model, bank, masks, biases = learnt(tasks)
    x = images()
    for t in (0, 1, 31, 32, tasks - 1):
        if t >= tasks:
            continue
        for name, mask in zip(bank.layer_names, masks[t]):
            assert torch.equal(bank.bits(f"task {t}")[name], planes_of(mask))
            assert torch.equal(bank.opened(f"task {t}")[name], sk.pack(mask != 0))
        bank.activate(f"task {t}")
        with torch.no_grad():
            model[3].bias.copy_(biases[t])
        for layer, mask in zip(layers_of(model), masks[t]):
            assert torch.equal(layer.effective_weight(), layer.weight * mask)
        y = model(x)
        torch.testing.assert_close(bank.export(f"task {t}")(x), y)
        torch.testing.assert_close(bank.view(f"task {t}")(x), y)
    bank.activate(None)
    union = [sum(m.abs() for m in of_layer) > 0 for of_layer in zip(*masks)]
    assert all(torch.equal(sk.unpack(bank.owned()[name], u.shape), u) for name, u in zip(bank.layer_names, union))


def test_capacity_counts_two_bits_a_weight():
    _, bank, masks, _ = learnt(3)
    found, unsigned = bank.capacity(), sum(layer.bits.numel() for layer in bank.layers())
    assert found["mask_bytes"] == 2 * 3 * unsigned
    total = sum(layer.weight.numel() for layer in bank.layers())
    assert found["bits_per_weight"] == pytest.approx(2 * 8 * unsigned / total)
    assert found["seed_only_cap"] == pytest.approx(100 * 6 * unsigned / (4 * total))
    for name, of_layer in zip(bank.layer_names, zip(*masks)):
        rows = torch.stack([m.flatten() != 0 for m in of_layer]).double()
        assert torch.equal(bank.overlap()[name], (rows @ rows.t()).long())


@pytest.mark.parametrize("tasks", [3, 35])
@pytest.mark.parametrize(("by_layer", "equal"), [(False, False), (True, False), (False, True)])
def test_superposition_has_one_coefficient_a_mask(tasks, by_layer, equal):
    model, bank, masks, biases = learnt(tasks, torch.float64)
    x = images(dtype=torch.float64)
    shape = (3, tasks) if by_layer else (tasks,)
    alphas = torch.full(shape, 1 / tasks, dtype=torch.float64) if equal else torch.randn(shape, dtype=torch.float64)
    alphas.requires_grad_()
    given = bank.superpose(None if equal else alphas)
    y = model(x)
    (grad,) = torch.autograd.grad(y.square().sum(), given)
    rows = alphas.expand(3, -1) if alphas.dim() == 1 else alphas
    mixed = [sum(a * m for a, m in zip(row, of_layer)) for row, of_layer in zip(rows, zip(*masks))]
    with torch.no_grad():
        model[3].bias.copy_(biases[-1])
    expected = by_hand(model, mixed, x)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(grad, torch.autograd.grad(expected.square().sum(), alphas)[0])
    if equal:
        some = ["task 2", "task 0"]
        part = bank.superpose(None, over=some)
        mean = [(of_layer[2] + of_layer[0]) / 2 for of_layer in zip(*masks)]
        torch.testing.assert_close(model(x), by_hand(model, mean, x))
        assert part.shape == (2,)


def test_each_rows_gradient():
    model, bank, _, _ = learnt(5, torch.float64)
    x, objective = images(dtype=torch.float64), lambda y: y.logsumexp(1)
    rows = bank.row_alpha_grad(x, objective, head="task 0")
    for b in range(len(x)):
        alphas = bank.superpose(torch.full((5,), 0.2, dtype=torch.float64, requires_grad=True), head="task 0")
        (expected,) = torch.autograd.grad(objective(model(x[b : b + 1])).sum(), alphas)
        torch.testing.assert_close(rows[b], expected)


def test_rows_of_several_tasks():
    model, bank, _, _ = learnt(3)
    x = images()
    ids = torch.tensor([2, 0, 1, 1, 2, 0])
    with bank.rows(ids):
        y = model(x)
    for b, t in enumerate(ids.tolist()):
        bank.activate(f"task {t}")
        torch.testing.assert_close(y[b], model(x[b : b + 1])[0])


def test_combinations_given_masks_and_removal():
    model, bank, masks, _ = learnt(3)
    alphas = torch.tensor([0.5, -1.0, 2.0])
    bank.commit("mix", alphas=alphas)
    bank.activate("mix")
    for layer, of_layer in zip(layers_of(model), zip(*masks)):
        torch.testing.assert_close(layer.effective_weight(), layer.weight * sum(a * m for a, m in zip(alphas, of_layer)))
    bank.remove("mix")
    given = {name: planes_of(-mask) for name, mask in zip(bank.layer_names, masks[0])}
    bank.commit("turned", bits=given)
    bank.activate("turned")
    assert all(torch.equal(m.effective_weight(), -m.weight * mask) for m, mask in zip(layers_of(model), masks[0]))
    bank.activate(None, bits=bank.bits("task 1"))
    assert all(torch.equal(m.effective_weight(), m.weight * mask) for m, mask in zip(layers_of(model), masks[1]))
    bank.remove("task 0")
    assert bank.masks == ["task 1", "task 2", "turned"]
    assert all(torch.equal(bank.bits("turned")[name], given[name]) for name in given)
    both = {name: torch.stack([bits[0], bits[0]]) for name, bits in given.items()}
    with pytest.raises(ValueError, match="a signed mask must open a weight with one sign, that of layer '0' has both"):
        bank.commit("wrong", bits=both)
    with pytest.raises(ValueError, match=r"bits of layer '0' must be uint8 of \(2, 64\) on"):
        bank.commit("wrong", bits={name: bits[0] for name, bits in given.items()})


def test_through_files(tmp_path):
    model, bank, _, _ = learnt(3)
    bank.save(tmp_path)
    bank.begin(scores="init")
    bank.commit("task 3")
    bank.save(tmp_path)
    again = sk.MaskBank.load(tmp_path, net())
    assert again.masks == [f"task {t}" for t in range(4)]
    for name in again.masks:
        assert all(torch.equal(a, b) for a, b in zip(again.bits(name).values(), bank.bits(name).values()))
    bank.activate("task 1")
    again.activate("task 1")
    assert torch.equal(model(images()), again.model(images()))
    assert all(torch.equal(again.owned()[name], bits) for name, bits in bank.owned().items())
    again.verify()
    plain = sk.convert(net_without_masks(), SubnetConfig(density=DENSITY, weight_init="signed_constant"))
    without = sk.MaskBank.load(tmp_path, plain)  # entries are read when they are asked for
    with pytest.raises(ValueError, match="must hold 64 bytes of bits for layer '0'"):
        without.bits("task 0")


def net_without_masks():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 5, 3, padding=1, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(5 * 16, 7), nn.Tanh())
    return model.append(nn.Linear(7, 3, bias=False))


def test_a_file_with_both_signs_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    _, bank, _, _ = learnt(1)
    bank.save(tmp_path)
    (path,) = tmp_path.glob("*.safetensors")
    tensors = load_file(path)
    tensors["bits/3"][1] |= tensors["bits/3"][0]
    save_file(tensors, path)
    again = sk.MaskBank.load(tmp_path, net())
    with pytest.raises(ValueError, match="must open a weight with one sign, its mask of layer '3' has both"):
        again.bits("task 0")


def test_a_model_can_be_kept_whole():
    model = net()
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False)(images()), model(images()))


@pytest.mark.skipif(DEVICE != "cpu", reason="compiled on the CPU alone")
def test_compiled():
    model = net()
    x = images()
    expected = model(x)
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), expected)
