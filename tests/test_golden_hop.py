"""HopSupSup's Hopfield matrix and recovery (RAIVNLab/supsup): distances exactly, reals to 1e-5."""

import pytest
import torch
from golden import Golden, assert_near, cases

import subnet_kernels as sk
from subnet_pipelines import BENCHMARKS, METHODS
from subnet_pipelines.methods.hopsupsup import Descent, energy, fold, recover, signs, store, unfold
from subnet_pipelines.models import Gain, GainNet


@pytest.mark.parametrize("path", cases("supsup_hop_matrix_*"))
def test_matrix_and_energies(path):
    gold = Golden(path)
    assert torch.equal(signs(gold["scores"]), gold["patterns"])
    matrix = torch.zeros_like(gold["W"][0])
    for j, z in enumerate(gold["patterns"]):
        store(matrix, z)
        assert_near(matrix, gold["W"][j], what=f"matrix of {j + 1} patterns")
        assert torch.equal(matrix, matrix.T)
        assert torch.equal(unfold(fold(matrix), len(z)), matrix)
        states = [*gold["patterns"], *gold["probes"]]
        assert_near(torch.stack([energy(matrix, v) for v in states]), gold["energies"][j], what="energies")


@pytest.mark.parametrize("path", cases("supsup_hop_recovery_*"))
def test_recovery(path):
    gold = Golden(path)
    d = len(gold["score_init0"])
    net = GainNet([784, d, d], 10)
    with torch.no_grad():
        for layer, i in ((net.body[1], 0), (net.body[4], 1), (net.head, 2)):
            layer.weight.copy_(gold[f"weight{i}"]).requires_grad_(False)
    net = sk.convert(net, sk.SubnetConfig(select="threshold", filter=lambda _, m: isinstance(m, Gain)))
    net.to(gold["weight0"].device).eval()
    bank = sk.MaskBank(net)
    starts, matrices, own = {}, {}, {}
    for i, name in enumerate(bank.layer_names):
        patterns = signs(gold[f"task_scores{i}"])
        own[name], starts[name] = patterns[gold["task"]], patterns.mean(0)
        matrix = torch.zeros(d, d, device=patterns.device)
        for z in patterns:
            store(matrix, z)
        assert_near(matrix, gold[f"W{i}"], what="matrix")
        assert_near(starts[name], gold[f"score_init{i}"], what="start")
        matrices[name] = gold[f"W{i}"]

    seen = []
    look = lambda scores: seen.append({name: s.detach().clone() for name, s in scores.items()})  # noqa: E731
    descent = Descent(gold["gamma"], gold["lr"], gold["momentum"], gold["wd"])
    live = [layer.scores.clone() for layer in bank.layers()]
    found = recover(net, matrices, starts, list(gold["batches_x"]), descent, look)
    assert all(map(torch.equal, live, (layer.scores for layer in bank.layers())))
    for i, name in enumerate(bank.layer_names):
        assert_near(torch.stack([s[name] for s in seen[1:]]), gold[f"scores{i}"], what=f"scores of layer {i}")
        distances = [(signs(s[name]) != own[name]).sum() for s in seen[:-1]]
        assert torch.equal(torch.stack(distances), gold["distances"][i])

    bank.activate(None, bits={name: sk.threshold(s, 0.0) for name, s in found.items()})
    with torch.no_grad():
        logits = torch.stack([net(x) for x in gold["batches_x"]])
    assert_near(logits, gold["final_logits"], what="logits through the recovered mask")
    assert (logits.argmax(-1) == gold["batches_y"]).double().mean().item() == pytest.approx(gold["accuracy"], abs=1e-9)


@pytest.mark.parametrize("path", cases("supsup_init_BNNet_fan_in"))
def test_the_authors_network(path):
    gold = Golden(path)
    stream = BENCHMARKS["split-mnist-mini"]
    method = METHODS["hopsupsup"](METHODS["hopsupsup"].Config(), stream(stream.Config(tasks=5, labels="global"), 1), 1)
    linear = [m for m in method.model.modules() if isinstance(m, torch.nn.Linear)]
    assert [list(m.weight.shape) for m in linear] == [shape[:2] for shape in gold["shapes"].tolist()]
    for layer, constant, negative in zip(linear, gold["constant"].cpu(), gold["negative_fraction"].tolist()):
        sizes = layer.weight.abs().unique()
        assert len(sizes) == 1
        torch.testing.assert_close(sizes[0], constant, rtol=2 * torch.finfo(torch.float32).eps, atol=0)
        share = (layer.weight < 0).double().mean().item()
        assert share == pytest.approx(negative, abs=4 * (0.5 / layer.weight.numel()) ** 0.5)  # signs are drawn: four deviations
        assert not layer.weight.requires_grad
