"""Inputs of every op that reach past one tile, one block and one wave of a GPU, beside the small ones of `test_dispatch.INPUTS`.

Sizes are odd, so that every kernel has a tail; ``cases()`` is all of both.
"""

import torch
from test_dispatch import INPUTS, bank, bits, ids, like, lr, mask, pooled, restoring

import subnet_kernels as sk
from subnet_kernels import reference

N = 100_003
SHAPE = (301, 333)


def layers():
    """Scores of layers of many sizes and dtypes, with ties and specials, and how many each keeps."""
    scores = [torch.randn(N), torch.randn(77), torch.randn(20_011).bfloat16(), torch.randn(0), torch.ones(5000)]
    scores[0][::1000] = float("nan")
    return scores, [30_000, 20, 6_000, 0, 1_500]


def refreshed():
    """Arguments of refresh_threshold_: scores, weights, and what is written, poisoned."""
    scores, _ = layers()
    packed = [torch.full((reference.nbytes(s.numel()),), 255, dtype=torch.uint8) for s in scores]
    w_eff = [torch.full((s.numel() if i != 1 else 0,), float("nan")) for i, s in enumerate(scores)]
    return scores, [torch.randn(s.shape) for s in scores], packed, w_eff


def product(rows, dtype):
    return torch.randn(rows, SHAPE[1]).to(dtype), torch.randn(SHAPE).to(dtype), bits(*SHAPE)


def learning(dtype, *state):
    """Parameters, gradients and so many lists of state, then steps and what is frozen."""
    params = [torch.randn(s).to(dtype) for s in ((N,), (77,), (30, 41))]
    return (
        params,
        *(like(params) for _ in range(1 + len(state))),
        [torch.tensor(2.0) for _ in params],
        [bits(N), None, bits(30, 41)],
    )


def adam(dtype):
    params, grads, means, squares, steps, frozen = learning(dtype, "means", "squares")
    return params, grads, means, squares, [], steps, frozen, lr(), None, None, 0.9, 0.999, 1e-8, 0.01, False, False, True


def rmsprop(dtype):
    params, grads, squares, steps, frozen = learning(dtype, "squares")
    return params, grads, squares, [], [], steps, frozen, lr(), None, None, 0.99, 1e-8, 0.0, 0.0, False, False


def sgd(dtype):
    params, grads, buffers, _, frozen = learning(dtype, "buffers")
    return params, grads, buffers, frozen, lr(), None, None, 0.9, 0.0, 0.01, True, False, False


def small_weight(form):
    weight = torch.randn(SHAPE)
    return sk.compress(weight, sk.select(weight, weight.numel() // 10), form)[:3]


FLOAT, HALF = torch.float32, torch.bfloat16
MEDIUM = {
    "pack": [lambda: (mask(N),), lambda: (mask(333, 301).t(),)],
    "unpack": [lambda: (bits(N), [N])],
    "count": [lambda: (bits(N),)],
    "stats": [lambda: (bits(N), bits(N))],
    "union_": [lambda: (bits(N), bits(N))],
    "overlap": [lambda: (bank(130, 20_011),)],
    "select": [lambda: layers(), lambda: (*layers(), "value", "all"), lambda: (*layers(), "magnitude", "first")],
    "refresh_": [
        lambda: (*refreshed()[:2], layers()[1], *refreshed()[2:], [torch.zeros(4, dtype=torch.float64) for _ in range(5)])
    ],
    "threshold": [lambda: (layers()[0], 0.25)],
    "refresh_threshold_": [lambda: (*refreshed()[:2], 0.25, False, *refreshed()[2:])],
    "apply": [lambda: (torch.randn(SHAPE), bits(*SHAPE)), lambda: (torch.randn(333, 301).bfloat16().t(), bits(*SHAPE))],
    "restore_": [lambda: restoring(SHAPE, (77,), (20_011,))],
    "straight_through": [
        lambda: (torch.randn(SHAPE), torch.randn(SHAPE), torch.randn(SHAPE), bits(*SHAPE), bits(*SHAPE)),
        lambda: (torch.randn(SHAPE).bfloat16(), torch.randn(SHAPE).bfloat16(), torch.randn(SHAPE), bits(*SHAPE), None, "value"),
    ],
    "masked_linear": [lambda: product(65, FLOAT), lambda: product(1, HALF), lambda: product(130, HALF), lambda: product(16, torch.float16)],
    "masked_linear_grad_input": [
        lambda: (torch.randn(65, 301), torch.randn(SHAPE), bits(*SHAPE)),
        lambda: (torch.randn(130, 301).bfloat16(), torch.randn(SHAPE).bfloat16(), bits(*SHAPE)),
    ],
    "masked_linear_grad_weight": [
        lambda: (torch.randn(65, 301), torch.randn(65, 333), torch.randn(SHAPE), torch.randn(SHAPE), bits(*SHAPE), bits(*SHAPE)),
        lambda: (torch.randn(130, 301).bfloat16(), torch.randn(130, 333).bfloat16(), None, None, bits(*SHAPE)),
    ],
    "superpose": [
        lambda: (torch.randn(SHAPE), bank(130, *SHAPE), torch.randn(130)),
        lambda: (torch.randn(SHAPE), bank(66, *SHAPE), torch.randn(3, 66)),
        lambda: (torch.randn(SHAPE), bank(66, *SHAPE), None),
    ],
    "superpose_counts": [lambda: (torch.randn(SHAPE), torch.randint(0, 9, SHAPE, dtype=torch.int32), 9)],
    "superpose_grad": [
        lambda: (torch.randn(SHAPE), torch.randn(SHAPE), bank(130, *SHAPE)),
        lambda: (torch.randn(3, *SHAPE), torch.randn(SHAPE), bank(66, *SHAPE)),
    ],
    "alpha_grad": [lambda: (torch.randn(17, 333), torch.randn(17, 301), torch.randn(SHAPE), bank(66, *SHAPE))],
    "mixed_linear": [
        lambda: (torch.randn(140, 333), torch.randn(SHAPE), bank(66, *SHAPE), ids(140, 66), torch.randn(301)),
        lambda: (torch.randn(140, 333).bfloat16(), torch.randn(SHAPE).bfloat16(), bank(2, *SHAPE), ids(140, 2)),
    ],
    "mixed_linear_grad_input": [lambda: (torch.randn(140, 301), torch.randn(SHAPE), bank(66, *SHAPE), ids(140, 66))],
    "mixed_linear_grad_weight": [lambda: (torch.randn(140, 301), torch.randn(140, 333), bank(66, *SHAPE), ids(140, 66))],
    "compressed_linear": [
        lambda: (torch.randn(9, 333), *small_weight("bitmap"), torch.randn(301)),
        lambda: (torch.randn(1, 333), *small_weight("index")),
    ],
    "max_pool_relu": [
        lambda: (torch.randn(5, 33, 31, 66), 2, True),
        lambda: (torch.randn(3, 64, 33, 31).bfloat16().permute(0, 2, 3, 1), 3, False),
    ],
    "max_pool_relu_grad": [lambda: pooled((5, 33, 31, 66), 2, True), lambda: pooled((3, 33, 31, 64), 3, False)],
    "decompress": [lambda: (*small_weight("bitmap"), 333), lambda: (*small_weight("index"), 333)],
    "update_sgd_": [lambda: sgd(FLOAT), lambda: sgd(HALF)],
    "update_rmsprop_": [lambda: rmsprop(FLOAT)],
    "update_adam_": [lambda: adam(FLOAT), lambda: adam(HALF)],
}  # fmt: skip


def cases() -> list[tuple[str, str, object]]:
    """(id, op, function that makes its arguments) for every input of every op."""
    every = [(name, makes + MEDIUM.get(name, [])) for name, makes in INPUTS.items()]
    return [(f"{name}-{i}", name, make) for name, makes in every for i, make in enumerate(makes)]
