"""How masks share weights: by hand, and against counts over bool masks."""

import numpy as np
import pytest
import torch
from device import generator

import subnet_kernels as sk
from subnet_pipelines.reuse import MOST, correlation, expected_overlap, pairs, reuse, reuse_report

SIZES = {"a": 10, "b": 4}


def by_hand():
    """Four masks over ten and over four weights: tasks 0 and 1 share, task 2 is new but for one weight of both, task 3 repeats task 0."""
    a = ["1111000000", "0111100000", "0100001111", "1111000000"]
    b = ["1100", "1100", "0011", "0000"]
    masks = [{"a": _mask(x), "b": _mask(y)} for x, y in zip(a, b)]
    return [{name: sk.pack(mask) for name, mask in row.items()} for row in masks]


def _mask(text):
    return torch.tensor([c == "1" for c in text])


def test_by_hand():
    found = reuse(by_hand())
    assert found["layers"]["a"] == {"all": [0, 0.75, 0.2, 0.25], "some": [0, 0, 0, 0.75], "none": [1, 0.25, 0.8, 0]}
    assert found["layers"]["b"] == {"all": [0, 1, 0, None], "some": [0, 0, 0, None], "none": [1, 0, 1, None]}
    assert found["tasks"]["all"] == [0, 5 / 6, 1 / 7, 1 / 4]
    assert found["tasks"]["none"] == [1, 1 / 6, 6 / 7, 0]


@pytest.mark.parametrize("tasks", [1, 2, 9])
def test_against_bool_masks(tasks):
    masks = {n: torch.rand(tasks, n, generator=generator(n)) < 0.4 for n in (1000, 513)}
    rows = [{str(n): sk.pack(m[t]) for n, m in masks.items()} for t in range(tasks)]
    found = reuse(iter(rows))
    for t in range(tasks):
        now, by_all, by_any = 0, 0, 0
        for m in masks.values():
            earlier = m[:t]
            now += m[t].sum().item()
            by_any += (m[t] & earlier.any(0)).sum().item()
            by_all += (m[t] & earlier.all(0)).sum().item() if t else 0
        shares = [found["tasks"][name][t] for name in ("all", "some", "none")]
        assert shares == [by_all / now, (by_any - by_all) / now, (now - by_any) / now]
        assert sum(shares) == pytest.approx(1)


def test_correlation_is_numpys():
    masks = torch.rand(5, 700, generator=generator(0)) < torch.tensor([0.1, 0.3, 0.5, 0.5, 0.9])[:, None]
    masks[3] = masks[2]
    overlap = sk.overlap(sk.pack_bank(masks))
    np.testing.assert_allclose(correlation(overlap, 700), np.corrcoef(masks.cpu().numpy()), atol=1e-6)
    masks[0], masks[1] = False, True
    found = correlation(sk.overlap(sk.pack_bank(masks)), 700)
    assert found[0] == found[1] == [None] * 5
    assert found[2][3] == 1
    assert found[2][0] is None


def test_expected_overlap_by_hand():
    rows = by_hand()
    layers = {
        name: sk.overlap(sk.pack_bank(torch.stack([sk.unpack(row[name], [n]) for row in rows]))) for name, n in SIZES.items()
    }
    assert expected_overlap(layers["a"], 10).tolist() == [
        [1.6, 1.6, 2, 1.6],
        [1.6, 1.6, 2, 1.6],
        [2, 2, 2.5, 2],
        [1.6, 1.6, 2, 1.6],
    ]
    assert expected_overlap(layers["b"], 4).tolist() == [[1, 1, 1, 0]] * 3 + [[0] * 4]
    found = pairs(layers, SIZES)  # pairs 01 02 03 12 13 23 have 3 1 4 1 3 1 of ten and 2 0 0 0 0 0 of four in common
    assert found["layers"]["a"] == {"measured": pytest.approx(100 * 13 / 60), "expected": pytest.approx(100 * 10.8 / 60)}
    assert found["layers"]["b"] == {"measured": pytest.approx(100 * 2 / 24), "expected": pytest.approx(100 * 3 / 24)}
    assert found["all"] == {"measured": pytest.approx(100 * 15 / 84), "expected": pytest.approx(100 * 13.8 / 84)}


def test_random_masks_overlap_as_expected():
    """Densities of their own in every layer and mask: independent masks have what is expected, layer by layer and over all; equal ones have
    more, and complements nothing."""
    sizes, densities = {"a": 40_000, "b": 10_007}, {"a": torch.linspace(0.05, 0.3, 12), "b": torch.linspace(0.9, 0.1, 12)}
    masks = {name: torch.rand(12, n, generator=generator(n)) < densities[name][:, None] for name, n in sizes.items()}
    layers = {name: sk.overlap(sk.pack_bank(rows)) for name, rows in masks.items()}
    found = pairs(layers, sizes)
    for shares in (*found["layers"].values(), found["all"]):
        assert shares["measured"] == pytest.approx(shares["expected"], rel=0.02)
    rows = masks["a"].double()
    expected = expected_overlap(layers["a"], sizes["a"])
    torch.testing.assert_close(expected, rows.sum(1)[:, None] * rows.sum(1) / sizes["a"])
    off = ~torch.eye(12, dtype=torch.bool, device=expected.device)
    deviation = (expected * (1 - rows.mean(1)[:, None]) * (1 - rows.mean(1))).sqrt()  # of a hypergeometric count
    assert ((layers["a"] - expected)[off].abs() < 5 * deviation[off]).all()
    same, other = masks["a"][3:4], ~masks["a"][3:4]
    density = same.double().mean().item()
    for mask, share in ((same, density), (other, 0.0)):
        (found,) = pairs({"a": sk.overlap(sk.pack_bank(torch.cat([same, mask])))}, {"a": 40_000})["layers"].values()
        assert found["measured"] == pytest.approx(100 * share)
        assert found["expected"] == pytest.approx(100 * density * mask.double().mean().item())


def test_of_a_bank(monkeypatch):
    model = sk.convert(torch.nn.Sequential(torch.nn.Linear(40, 30), torch.nn.Linear(30, 20)), sk.SubnetConfig(density=0.3))
    bank = sk.MaskBank(model)
    sizes = {"0": 1200, "1": 600}
    assert reuse_report(bank, sizes) is None
    for name in ("first", "second", "third"):
        bank.begin(scores="init")
        bank.commit(name)
    bank.commit("mix", alphas=torch.ones(3))  # is no mask
    found = reuse_report(bank, sizes)
    assert found["masks"] == ["first", "second", "third"]
    assert list(found["layers"]) == bank.layer_names
    size = sum(sk.count(bits).item() for bits in bank.bits("second").values())
    assert found["overlap"][1][1] == size
    assert found["overlap"][1][0] / size == pytest.approx(found["tasks"]["all"][1])
    assert found["correlation"][2][2] == 1
    each = {name: sk.count(bits).item() for name, bits in bank.bits("second").items()}  # of the third as well
    assert found["expected"][1][2] == round(each["0"] ** 2 / 1200 + each["1"] ** 2 / 600, 1)
    both = [found["overlap"][i][j] for i, j in ((0, 1), (0, 2), (1, 2))]
    assert found["pairs"]["all"]["measured"] == pytest.approx(100 * sum(both) / 3 / 1800)
    assert list(found["pairs"]["layers"]) == bank.layer_names
    monkeypatch.setattr("subnet_pipelines.reuse.MOST", 2)
    assert {reuse_report(bank, sizes)[name] for name in ("overlap", "expected", "correlation", "pairs")} == {None}
    bank.remove("mix")
    bank.remove("third")
    bank.remove("second")
    assert reuse_report(bank, sizes)["overlap"] == [[size]]
    assert reuse_report(bank, sizes)["pairs"] is None  # one mask
    assert MOST >= 100  # the longest stream of WSN's tables
