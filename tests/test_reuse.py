"""How masks share weights: by hand, and against counts over bool masks."""

import numpy as np
import pytest
import torch
from device import generator

import subnet_kernels as sk
from subnet_pipelines.reuse import MOST, correlation, reuse, reuse_report


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


def test_of_a_bank(monkeypatch):
    model = sk.convert(torch.nn.Sequential(torch.nn.Linear(40, 30), torch.nn.Linear(30, 20)), sk.SubnetConfig(density=0.3))
    bank = sk.MaskBank(model)
    assert reuse_report(bank) is None
    for name in ("first", "second", "third"):
        bank.begin(scores="init")
        bank.commit(name)
    bank.commit("mix", alphas=torch.ones(3))  # is no mask
    found = reuse_report(bank)
    assert found["masks"] == ["first", "second", "third"]
    assert list(found["layers"]) == bank.layer_names
    size = sum(sk.count(bits).item() for bits in bank.bits("second").values())
    assert found["overlap"][1][1] == size
    assert found["overlap"][1][0] / size == pytest.approx(found["tasks"]["all"][1])
    assert found["correlation"][2][2] == 1
    monkeypatch.setattr("subnet_pipelines.reuse.MOST", 2)
    assert reuse_report(bank)["overlap"] is None
    assert MOST >= 100  # the longest stream of WSN's tables
