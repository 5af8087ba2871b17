"""Components of a basis of masks, and coefficients over them."""

import pytest
import torch
from test_impresslearn import impresslearn

from subnet_pipelines import RunConfig, run
from subnet_pipelines.methods.components import nearest, nonnegative, principal


def masks(count=12, weights=400, density=0.3):
    return (torch.rand(count, weights, generator=torch.Generator().manual_seed(3)) < density).double()


def test_principal_components_are_those_of_the_singular_values():
    m = masks()
    found = principal(m.long() @ m.long().T, 5) @ m
    _, _, directions = torch.linalg.svd(m, full_matrices=False)
    size = m.square().sum(1).mean().sqrt()  # of a mask, in the root mean square
    torch.testing.assert_close(found.norm(dim=1), size.expand(5))
    torch.testing.assert_close((found @ directions[:5].T).abs(), torch.eye(5, dtype=torch.float64) * size, atol=1e-6, rtol=0)


def test_nonnegative_components_of_three_groups_are_the_groups():
    """Twelve masks that are three disjoint ones, each four times: convex NMF has one of the three in each component."""
    m = torch.zeros(12, 300, dtype=torch.float64)
    for k in range(12):
        m[k, 100 * (k % 3) : 100 * (k % 3) + 60] = 1
    shares = nonnegative(m.long() @ m.long().T, 3, torch.Generator().manual_seed(1))
    assert (shares >= 0).all()
    torch.testing.assert_close(shares.sum(1), torch.ones(3, dtype=torch.float64))
    group = shares.view(3, 4, 3).sum(1)  # of a component in each of the three
    torch.testing.assert_close(
        group.sort(1).values, torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64).expand(3, 3), atol=1e-3, rtol=0
    )
    assert sorted(group.argmax(1).tolist()) == [0, 1, 2]


def test_nonnegative_components_fit_no_worse_than_masks_drawn_from_the_basis():
    m, count = masks(), 4
    gram = m.long() @ m.long().T

    def left(components):  # of the masks, outside the span of the components
        basis = torch.linalg.qr(components.T).Q
        return (m - m @ basis @ basis.T).square().sum()

    ours = left(nonnegative(gram, count, torch.Generator().manual_seed(2)) @ m)
    drawn = [left(m[torch.randperm(12, generator=torch.Generator().manual_seed(s))[:count]]) for s in range(20)]
    assert left(principal(gram, count) @ m) <= ours <= min(drawn)


def test_nearest_is_the_projection():
    m = masks()
    shares, wanted = principal(m.long() @ m.long().T, 4), torch.full((12,), 1 / 12, dtype=torch.float64)
    found = nearest(m.long() @ m.long().T, shares, wanted)
    left = m.T @ wanted - (shares @ m).T @ found
    torch.testing.assert_close((shares @ m) @ left, torch.zeros(4, dtype=torch.float64), atol=1e-9, rtol=0)


@pytest.mark.parametrize("kind", ["principal", "nonnegative"])
def test_learns_new_tasks_by_components(kind, tmp_path):
    """Of two masks that contradict each other and one of noise: as many components as masks say as much as they do, and coefficients that
    are kept lie in the span of the components."""
    method, benchmark = impresslearn(components=kind, component_count=3, basis_random=1, epochs=60)
    result = run(method, benchmark, RunConfig(), tmp_path)
    assert min(result.final) >= 90
    assert result.method_report["learnt_per_task"] == result.method_report["alphas_per_task"] == 9

    method, benchmark = impresslearn(components=kind, component_count=2, basis_random=1)
    result = run(method, benchmark, RunConfig(), tmp_path / "two")
    assert result.method_report["learnt_per_task"] == 6
    kept = method.bank["task 2"].alphas
    assert kept.shape == (3, 3)
    method.make_alphas(method.basis)
    method.make_components()
    found = torch.linalg.lstsq(method.shares.mT, kept[:, :, None]).solution
    torch.testing.assert_close(method.shares.mT @ found, kept[:, :, None], atol=1e-5, rtol=0)
