"""Every operation in plain PyTorch: the specification.

A kernel is an optimisation of the function of the same name here, and is tested against it: bits exactly, floats to the
error that PyTorch itself makes in that dtype. Nothing here is clever, and nothing is imported but torch.

Shape letters: B batch rows, O outputs, I inputs, N weights of a layer, K stored tasks.

Packed bits. A mask over N weights is a uint8 tensor of ``nbytes(N)`` bytes: bit ``i % 8`` of byte ``i // 8`` is weight i in
logical (row-major) order, padded with zeros to a multiple of 512 weights. A *bank* of K masks is a list of blocks, each
``(ceil(N / 512), k, 64)`` uint8 with k <= 64 tasks: tile, task, 64 bytes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

TILE = 512  # weights that the padding of packed bits is a multiple of, and that a bank stores side by side
BLOCK = 64  # tasks in a full block of a bank


def nbytes(n: int) -> int:
    """Bytes of the packed mask of n weights: ceil(n / 512) * 64."""
    return (n + TILE - 1) // TILE * (TILE // 8)


# ---------------------------------------------------------------------------------------------------------------- bits


def pack(mask: Tensor) -> Tensor:
    """Mask to bits.

    mask: bool, any shape, N elements, any strides -> uint8 (nbytes(N),), the layout of
    ``numpy.packbits(mask, bitorder="little")`` padded with zeros.
    """
    flat = mask.reshape(-1).to(torch.uint8)
    padded = flat.new_zeros(nbytes(flat.numel()) * 8)
    padded[: flat.numel()] = flat
    shifts = torch.arange(8, dtype=torch.uint8, device=mask.device)
    return (padded.view(-1, 8) << shifts).sum(1, dtype=torch.uint8)


def unpack(bits: Tensor, shape: Sequence[int]) -> Tensor:
    """Bits to mask.

    bits: uint8 (nbytes(N),) -> bool of the given shape with N elements, contiguous.
    """
    n = 1
    for size in shape:
        n *= size
    shifts = torch.arange(8, dtype=torch.uint8, device=bits.device)
    return ((bits[:, None] >> shifts) & 1).reshape(-1)[:n].reshape(tuple(shape)).to(torch.bool)


def _ones(data: Tensor) -> Tensor:
    """Bits set in each byte of data: int64 of the same shape."""
    x = data.to(torch.int64)
    x = x - ((x >> 1) & 0x55)
    x = (x & 0x33) + ((x >> 2) & 0x33)
    return (x + (x >> 4)) & 0x0F


def count(bits: Tensor) -> Tensor:
    """Number of open weights: uint8 bits of any shape -> int64 (), on the device of the bits, without a host sync."""
    return _ones(bits).sum()


def union_(owned: Tensor, bits: Tensor) -> None:
    """owned |= bits, in place; both uint8 (nbytes(N),). WSN's consolidated mask M <- M or m (Kang et al. 2022, Alg. 1)."""
    owned.bitwise_or_(bits)


def stats(bits: Tensor, owned: Tensor) -> Tensor:
    """Capacity figures of a mask against the owned weights.

    bits, owned: uint8 (nbytes(N),) -> int64 (3,): open weights, those new (open and not owned), those shared (open and owned).
    """
    return torch.stack([count(bits), count(bits & ~owned), count(bits & owned)])


def overlap(bank: Sequence[Tensor]) -> Tensor:
    """Open weights that tasks j and k have in common.

    bank: blocks (ceil(N/512), k, 64) uint8, K tasks in all -> int64 (K, K), symmetric, the counts of single masks on the diagonal.
    """
    rows = torch.cat([block.transpose(0, 1).reshape(block.shape[1], -1) for block in bank])
    return torch.stack([_ones(rows & row).sum(1) for row in rows]) if len(rows) else rows.new_zeros((0, 0), dtype=torch.int64)


# ----------------------------------------------------------------------------------------------------------- selection


def _key(scores: Tensor, by: str) -> Tensor:
    """What selection sorts: every NaN the same one and no -0.0, for torch.sort on a GPU goes by their bits."""
    key = scores.abs() if by == "magnitude" else scores
    return torch.where(key.isnan(), torch.full((), float("nan"), dtype=key.dtype, device=key.device), key + 0.0)


def select(scores: Sequence[Tensor], k: Sequence[int], by: str = "magnitude", ties: str = "last") -> list[Tensor]:
    """The exact top-k of every score tensor as bits: the supermask of edge-popup (Ramanujan et al. 2020) and WSN.

    scores: list of float tensors, any shapes and strides; k: one int each, 0 <= k <= N -> list of uint8 (nbytes(N),).

    The key is \\|score\\| (``by="magnitude"``) or the score (``"value"``). NaN counts as largest and all NaN as equal, -0.0 equals
    +0.0: the order of ``torch.sort``. Among equal keys at the cut, ``ties="last"`` keeps higher logical indices (the last k of a
    stable ascending sort), ``"first"`` lower ones, and ``"all"`` keeps every one of them, possibly more than k (WSN's rule).
    """
    return [_select(s.detach(), int(n), by, ties) for s, n in zip(scores, k)]


def _select(scores: Tensor, k: int, by: str, ties: str) -> Tensor:
    key = _key(scores, by).reshape(-1)
    mask = torch.zeros(key.numel(), dtype=torch.bool, device=key.device)
    if k > 0:
        if ties == "first":
            mask.index_fill_(0, key.sort(descending=True, stable=True).indices[:k], True)
        else:
            order = key.sort(stable=True)
            if ties == "last":
                mask.index_fill_(0, order.indices[key.numel() - k :], True)
            else:
                least = order.values[key.numel() - k]
                mask = (key >= least) | key.isnan()
    return pack(mask)


def refresh_(
    scores: Sequence[Tensor],
    weights: Sequence[Tensor],
    k: Sequence[int],
    bits: Sequence[Tensor],
    w_eff: Sequence[Tensor],
    hints: Sequence[Tensor],
    by: str = "magnitude",
    ties: str = "last",
) -> None:
    """Selection of many layers in one call, written in place.

    ``bits[i] <- select(scores[i], k[i])``, and ``w_eff[i] <- apply(weights[i], bits[i])`` where w_eff[i] is not empty.

    scores, weights: float, equal shapes in pairs; bits: uint8 (nbytes(N),); w_eff: contiguous, weight's shape and dtype, or
    0 elements; hints: float64 (4,) each, where a kernel may keep what it learnt of the threshold for its next call: the key of the
    k-th largest score (an integer that orders as the scores do, and a fraction for its place among equal ones where the kernel
    knows it), the half-width in keys of the window about it that the next call looks in first (0: none yet), how many scores the
    last window held, and how many windows have missed so far. Hints change speed, never results, whatever they hold; the reference
    leaves them alone.
    """
    for w, b, e, new in zip(weights, bits, w_eff, select(scores, k, by, ties)):
        b.copy_(new)
        if e.numel():
            e.copy_(apply(w.detach(), b))


def threshold(scores: Sequence[Tensor], value: float, inclusive: bool = True) -> list[Tensor]:
    """Score >= value (or > value) as bits: SupSup's mask on MNIST (0, inclusive), HopSupSup's, and Piggyback's (5e-3, exclusive).

    scores: list of float tensors, any shapes and strides -> list of uint8 (nbytes(N),). The comparison is PyTorch's in the
    scores' dtype: NaN compares false, -0.0 equals +0.0, and value is rounded to that dtype first.
    """
    cuts = [torch.full((), value, dtype=torch.float64, device=s.device).to(s.dtype) for s in scores]
    return [pack(s.detach() >= v if inclusive else s.detach() > v) for s, v in zip(scores, cuts)]


def refresh_threshold_(
    scores: Sequence[Tensor],
    weights: Sequence[Tensor],
    value: float,
    inclusive: bool,
    bits: Sequence[Tensor],
    w_eff: Sequence[Tensor],
) -> None:
    """`threshold` of many layers in one call, written in place as `refresh_` does."""
    for w, b, e, new in zip(weights, bits, w_eff, threshold(scores, value, inclusive)):
        b.copy_(new)
        if e.numel():
            e.copy_(apply(w.detach(), b))


# ------------------------------------------------------------------------------------------------------------ weights


def apply(weight: Tensor, bits: Tensor) -> Tensor:
    """W where open, +0.0 elsewhere. It selects and never multiplies: NaN or inf behind a closed bit does not get out.

    weight: any dtype and strides, N elements; bits: uint8 (nbytes(N),) -> weight's shape and dtype, contiguous.
    """
    return torch.where(unpack(bits, weight.shape), weight, torch.zeros((), dtype=weight.dtype, device=weight.device)).contiguous()


def restore_(weights: Sequence[Tensor], bits: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Put kept values back under their bits, in place: after any optimizer step frozen weights are bit-identical.

    weights: any strides; bits: uint8 (nbytes(N),); values: (count(bits),), weight's dtype, in logical order.
    """
    for w, b, v in zip(weights, bits, values):
        w.detach().masked_scatter_(unpack(b, w.shape), v)


def straight_through(
    grad: Tensor,
    weight: Tensor,
    scores: Tensor,
    bits: Tensor,
    frozen: Tensor | None,
    by: str = "magnitude",
    need_weight: bool = True,
    need_scores: bool = True,
) -> tuple[Tensor, Tensor]:
    """Gradients of weight and scores from G, the gradient at the effective weight (edge-popup's straight-through estimator).

    dW = G where open and not frozen, else +0.0; dS = G * W, times sign(score) for magnitude keys (0 where the score is 0), for
    closed weights too.

    grad, weight, scores: float, one shape; bits, frozen: uint8 (nbytes(N),), frozen may be None -> dW in weight's dtype and dS in
    scores' dtype, contiguous. What is not needed comes back with 0 elements.
    """
    d_weight = grad.new_empty(0, dtype=weight.dtype)
    d_scores = grad.new_empty(0, dtype=scores.dtype)
    if need_weight:
        d_weight = apply(grad.to(weight.dtype), bits if frozen is None else bits & ~frozen)
    if need_scores:
        d_scores = grad * weight
        if by == "magnitude":
            d_scores = d_scores * scores.sign()
        d_scores = d_scores.to(scores.dtype).contiguous()
    return d_weight, d_scores


# ------------------------------------------------------------------------------------------------------ masked products


def masked_linear(x: Tensor, weight: Tensor, bits: Tensor | None, bias: Tensor | None = None) -> Tensor:
    """y = x (W where open)^T + bias.

    x: (..., I); weight: (O, I); bits: uint8 (nbytes(O*I),), or None where weight is the effective one; bias: (O,) or None -> (..., O).
    """
    return F.linear(x, weight if bits is None else apply(weight, bits), bias)


def masked_linear_grad_input(grad_y: Tensor, weight: Tensor, bits: Tensor | None) -> Tensor:
    """dx = G_y (W where open) of `masked_linear`.

    grad_y: (..., O); weight: (O, I); bits: uint8 (nbytes(O*I),) or None -> (..., I).
    """
    return grad_y @ (weight if bits is None else apply(weight, bits))


def masked_linear_grad_weight(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor | None = None,
    scores: Tensor | None = None,
    bits: Tensor | None = None,
    frozen: Tensor | None = None,
    by: str = "magnitude",
    need_weight: bool = True,
) -> tuple[Tensor, Tensor]:
    """G = G_y^T x of `masked_linear`, and what follows from it by `straight_through`.

    dW = G, where open and not frozen if bits are given; dS of `scores`, which need weight and bits.

    grad_y: (..., O); x: (..., I); weight, scores: (O, I) or None; bits, frozen: uint8 (nbytes(O*I),) or None -> dW and dS, (O, I) each;
    what is not asked for comes back with 0 elements.
    """
    total = grad_y.reshape(-1, grad_y.shape[-1]).t() @ x.reshape(-1, x.shape[-1])
    if bits is None:
        return total if need_weight else total.new_empty(0), total.new_empty(0)
    own = total if weight is None else weight
    return straight_through(total, own, own if scores is None else scores, bits, frozen, by, need_weight, scores is not None)


def masked_conv(
    x: Tensor,
    weight: Tensor,
    bits: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """Convolution in 1, 2 or 3 dimensions with the open weights.

    x: (B, C, *size); weight: (O, C // groups, *kernel); bits: uint8 (nbytes(N),); bias: (O,) or None; stride, padding,
    dilation: one int a dimension -> (B, O, *out).
    """
    conv = (F.conv1d, F.conv2d, F.conv3d)[weight.dim() - 3]
    return conv(x, apply(weight, bits), bias, tuple(stride), tuple(padding), tuple(dilation), groups)


# ------------------------------------------------------------------------------------------------------- superposition


def pack_bank(masks: Tensor) -> list[Tensor]:
    """K masks to a bank.

    masks: bool (K, *shape) -> blocks (ceil(N/512), k, 64) uint8, k = 64 but for the last.
    """
    rows = torch.stack([pack(mask) for mask in masks]) if len(masks) else masks.new_zeros((0, 0), dtype=torch.uint8)
    return [chunk.view(chunk.shape[0], -1, TILE // 8).transpose(0, 1).contiguous() for chunk in rows.split(BLOCK) if len(chunk)]


def unpack_bank(bank: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
    """A bank to its masks: blocks of `pack_bank` -> bool (K, *shape)."""
    masks = [unpack(block[:, j].reshape(-1), shape) for block in bank for j in range(block.shape[1])]
    device = bank[0].device if len(bank) else None
    return torch.stack(masks) if masks else torch.zeros((0, *shape), dtype=torch.bool, device=device)


def superpose(weight: Tensor, bank: Sequence[Tensor], alphas: Tensor | None) -> Tensor:
    """W * sum_k alpha_k M_k: SupSup's superposition (Wortsman et al. 2020, eq. 2) and ImpressLearn's combination of masks.

    weight: (*shape) float; bank: blocks of K masks; alphas: (K,) float, (R, K) for R superpositions at once, or None for 1/K each
    -> (*shape), or (R, *shape); weight's dtype, contiguous. A weight that no mask opens gives +0.0 whatever it holds.
    """
    masks = unpack_bank(bank, weight.shape)
    if alphas is None:
        return superpose_counts(weight, masks.sum(0, dtype=torch.int32), len(masks))
    return _where_open(masks.any(0), weight * torch.tensordot(alphas.to(weight.dtype), masks.to(weight.dtype), 1))


def superpose_counts(weight: Tensor, counts: Tensor, tasks: int) -> Tensor:
    """`superpose` of K masks by 1/K each, from the number of masks that open each weight: no mask is read.

    weight: (*shape) float; counts: (*shape) int32; tasks: K -> (*shape), weight's dtype, contiguous.
    """
    wide = torch.promote_types(weight.dtype, torch.float32)
    of = torch.full(
        (), tasks, dtype=wide, device=weight.device
    )  # a tensor: a number would be inverted on a GPU, for one rounding more
    return _where_open(counts > 0, weight * (counts.to(weight.dtype).to(wide) / of).to(weight.dtype))


def _where_open(opened: Tensor, product: Tensor) -> Tensor:
    return torch.where(opened, product, torch.zeros((), dtype=product.dtype, device=product.device)).contiguous()


def superpose_grad(grad: Tensor, weight: Tensor, bank: Sequence[Tensor]) -> Tensor:
    """Gradient of `superpose` to its alphas: d alpha_k = <G * W, M_k>.

    grad: (*shape) float, or (R, *shape); weight: (*shape) float; bank: blocks of K masks -> (K,), or (R, K); weight's dtype, summed
    in float64.
    """
    if grad.dim() == weight.dim() + 1:
        rows = [superpose_grad(g, weight, bank) for g in grad]
        return torch.stack(rows) if rows else weight.new_zeros((0, sum(block.shape[1] for block in bank)))
    product = (grad * weight).double()
    zero = torch.zeros((), dtype=torch.float64, device=weight.device)
    sums = [torch.where(mask, product, zero).sum() for mask in unpack_bank(bank, weight.shape)]
    return torch.stack(sums).to(weight.dtype) if sums else weight.new_zeros(0)


def alpha_grad(x: Tensor, grad_y: Tensor, weight: Tensor, bank: Sequence[Tensor]) -> Tensor:
    """Gradient to the alphas for every row by itself: d alpha[b, k] = sum_oi grad_y[b, o] (W * M_k)[o, i] x[b, i].

    x: (B, I); grad_y: (B, O); weight: (O, I); bank: blocks of K masks -> (B, K). SupSup's one-shot inference, each row for itself.
    """
    columns = [(grad_y @ apply(weight, block[:, j].reshape(-1)) * x).sum(1) for block in bank for j in range(block.shape[1])]
    return torch.stack(columns, 1) if columns else x.new_zeros((x.shape[0], 0))


# ------------------------------------------------------------------------------------------------------------ mixed tasks


def bank_bits(bank: Sequence[Tensor], task: int) -> Tensor:
    """The packed bits of one task of a bank: uint8 (nbytes(N),)."""
    for block in bank:
        if task < block.shape[1]:
            return block[:, task].reshape(-1)
        task -= block.shape[1]
    raise IndexError(f"the bank has no task {task} after its last")


def _rows_of_tasks(bank: Sequence[Tensor], task_ids: Tensor) -> list[tuple[Tensor, Tensor]]:
    """(rows, bits) of every task that a batch has."""
    return [((task_ids == task).nonzero()[:, 0], bank_bits(bank, task)) for task in task_ids.unique().tolist()]


def mixed_linear(x: Tensor, weight: Tensor, bank: Sequence[Tensor], task_ids: Tensor, bias: Tensor | None = None) -> Tensor:
    """Every row through its own task's mask: y[b] = (W where M_t(b) is open) x[b] + bias, t = task_ids.

    x: (B, I); weight: (O, I); bank: blocks of K masks; task_ids: int64 (B,), each in 0..K-1; bias: (O,) or None -> (B, O).
    """
    y = x.new_empty((x.shape[0], weight.shape[0]))
    for rows, bits in _rows_of_tasks(bank, task_ids):
        y[rows] = F.linear(x[rows], apply(weight, bits), bias)
    return y


def mixed_linear_grad_input(grad: Tensor, weight: Tensor, bank: Sequence[Tensor], task_ids: Tensor) -> Tensor:
    """Gradient of `mixed_linear` to x: dx[b] = g[b] (W where M_t(b) is open).

    grad: (B, O); weight: (O, I) -> (B, I).
    """
    out = grad.new_empty((grad.shape[0], weight.shape[1]))
    for rows, bits in _rows_of_tasks(bank, task_ids):
        out[rows] = grad[rows] @ apply(weight, bits)
    return out


def mixed_linear_grad_weight(grad: Tensor, x: Tensor, bank: Sequence[Tensor], task_ids: Tensor) -> Tensor:
    """Gradient of `mixed_linear` to the weight: dW[o, i] = sum of g[b, o] x[b, i] over the rows b whose mask opens it.

    grad: (B, O); x: (B, I) -> (O, I), +0.0 where no mask in the batch is open.
    """
    out = grad.new_zeros((grad.shape[1], x.shape[1]))
    for rows, bits in _rows_of_tasks(bank, task_ids):
        out += apply(grad[rows].t() @ x[rows], bits)
    return out


# ---------------------------------------------------------------------------------------------------------- compressed


def decompress(values: Tensor, positions: Tensor, offsets: Tensor, inputs: int) -> Tensor:
    """A compressed weight to its dense form, +0.0 where it is closed.

    values: (count,), the open weights in logical order; offsets: int64 (O + 1,), those of row o are offsets[o] to offsets[o + 1];
    positions: a bitmap, uint8 (O, ceil(I / 64) * 8), or columns, uint16 or int32 (count,); inputs: I -> (O, I).
    """
    outputs = offsets.numel() - 1
    if positions.dtype == torch.uint8:
        mask = torch.cat([unpack(row, (1, inputs)) for row in positions]) if outputs else positions.new_zeros((0, inputs)).bool()
        return values.new_zeros((outputs, inputs)).masked_scatter(mask, values)
    rows = torch.arange(outputs, device=values.device).repeat_interleave(offsets.diff())
    dense = values.new_zeros((outputs, inputs))
    dense[rows, positions.long()] = values
    return dense


def compressed_linear(x: Tensor, values: Tensor, positions: Tensor, offsets: Tensor, bias: Tensor | None = None) -> Tensor:
    """y = x (W where open)^T + bias, from the open weights alone: an x that only closed weights meet takes no part, whatever it is.

    x: (..., I); values, positions, offsets: as `decompress`; bias: (O,) or None -> (..., O).
    """
    inputs = x.shape[-1]
    open_columns = decompress(torch.ones_like(values), positions, offsets, inputs) != 0
    weight = decompress(values, positions, offsets, inputs)
    columns = [row @ x[..., mask].unsqueeze(-1) for row, mask in ((w[m], m) for w, m in zip(weight, open_columns))]
    y = torch.cat(columns, -1) if columns else x.new_empty((*x.shape[:-1], 0))
    return y if bias is None else y + bias


# --------------------------------------------------------------------------------------------------------------- pooling


def max_pool_relu(x: Tensor, window: int, split: bool) -> tuple[Tensor, Tensor]:
    """ReLU of the maxima of windows that lie side by side, and where in its window each maximum was.

    x: (N, H, W, C) floating -> (N, ceil(H / window), ceil(W / window), C) of its dtype, and uint8 of that shape: the place in the
    window, row by row, of equals the first; 255 where ReLU lets nothing through. split, with C even: the second half of the
    channels follows as rows of its own, (2 N, ..., C / 2).
    """
    y, at = F.max_pool2d(x.permute(0, 3, 1, 2), window, ceil_mode=True, return_indices=True)
    places = at // x.shape[2] % window * window + at % x.shape[2] % window
    places = places.masked_fill(y <= 0, 255).to(torch.uint8)
    y, places = (t.permute(0, 2, 3, 1) for t in (y.relu(), places))
    if split:
        y, places = (torch.cat(t.chunk(2, 3)) for t in (y, places))
    return y.contiguous(), places.contiguous()


def max_pool_relu_grad(grad: Tensor, places: Tensor, window: int, split: bool, height: int, width: int) -> Tensor:
    """The gradient of max_pool_relu in its input (N, height, width, C): each of grad at its place, zero elsewhere."""
    if split:
        grad, places = (torch.cat(t.chunk(2), 3) for t in (grad, places))
    n, rows, columns, channels = grad.shape
    here = places[..., None] == torch.arange(window**2, device=places.device)
    spread = torch.where(here, grad[..., None], 0).unflatten(4, (window, window))  # n, row, column, channel, and in the window
    return spread.permute(0, 1, 4, 2, 5, 3).reshape(n, rows * window, columns * window, channels)[:, :height, :width].contiguous()


# ------------------------------------------------------------------------------------------------------------ optimizer


def _live(param: Tensor, frozen: Tensor | None) -> Tensor | None:
    return None if frozen is None else ~unpack(frozen, param.shape)


def _write(target: Tensor, value: Tensor, live: Tensor | None) -> None:
    target.copy_(value if live is None else torch.where(live, value, target))


def _normal(average: Tensor) -> Tensor:
    """What a step reads of a running average: 0 where it is below the smallest normal number.

    The average of a weight whose gradient stays 0 ends there, rounding keeps it from 0, and processors multiply such numbers a
    hundred times as slowly. Nothing else of ``torch.optim`` is changed by it.
    """
    return average.masked_fill(average.abs() < torch.finfo(torch.promote_types(average.dtype, torch.float32)).tiny, 0.0)


def _incoming(grad: Tensor, param: Tensor, grad_scale: Tensor | None, maximize: bool) -> Tensor:
    grad = grad.to(param.dtype)
    if grad_scale is not None:
        grad = grad / grad_scale.to(param.dtype)
    return -grad if maximize else grad


def _overflowed(found_inf: Tensor | None) -> bool:
    return found_inf is not None and bool(found_inf.item() != 0)


def paired_gradients(
    params: Sequence[Tensor], grads: Sequence[Tensor], pairs: Sequence[int], beside: Sequence[Tensor] | None
) -> list[Tensor]:
    """Each parameter's own gradient where a weight and its scores come with one, G, that of the effective weight.

    pairs: three numbers each: the index of the scores in params, that of the weight, or -1 where it does not learn, and 1 where the
    scores are compared by magnitude; beside: for each pair the weight's live bits, or the weight that does not learn.
    """
    grads = list(grads)
    for k, other in enumerate(beside or ()):
        scores, weight, magnitude = pairs[3 * k : 3 * k + 3]
        learns = weight >= 0
        rule = other.new_empty(0, dtype=torch.uint8), None, "magnitude" if magnitude else "value"
        if learns:
            rule = other, *rule[1:]
        of = straight_through(grads[scores], params[weight] if learns else other, params[scores], *rule, need_weight=learns)
        grads[scores] = of[1]
        if learns:
            grads[weight] = of[0]
    return grads


@torch.no_grad()
def update_sgd_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    frozen: Sequence[Tensor | None],
    lr: Tensor,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    maximize: bool,
    first_step: bool,
    pairs: Sequence[int] = (),
    beside: Sequence[Tensor] | None = None,
) -> None:
    """One step of ``torch.optim.SGD`` that leaves frozen weights and their momentum bit-identical.

    params, grads: float, equal shapes in pairs; momentum_buffers: like params, or an empty list without momentum; frozen: bits or
    None each; lr, grad_scale, found_inf: 0-dim; first_step: the buffer becomes the gradient itself. With found_inf != 0 nothing
    changes. Only what is neither frozen nor skipped is written. pairs, beside: as `paired_gradients`.
    """
    if _overflowed(found_inf):
        return
    grads = paired_gradients(params, grads, pairs, beside)
    for i, (p, g) in enumerate(zip(params, grads)):
        live = _live(p, frozen[i])
        g = _incoming(g, p, grad_scale, maximize)
        if weight_decay != 0:
            g = g + weight_decay * p
        if momentum != 0:
            buffer = momentum_buffers[i]
            _write(buffer, g if first_step else momentum * _normal(buffer) + (1 - dampening) * g, live)
            g = g + momentum * buffer if nesterov else buffer
        _write(p, p - lr.to(p.dtype) * g, live)


@torch.no_grad()
def update_rmsprop_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    square_avgs: Sequence[Tensor],
    grad_avgs: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    steps: Sequence[Tensor],
    frozen: Sequence[Tensor | None],
    lr: Tensor,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    alpha: float,
    eps: float,
    weight_decay: float,
    momentum: float,
    centered: bool,
    maximize: bool,
    pairs: Sequence[int] = (),
    beside: Sequence[Tensor] | None = None,
) -> None:
    """One step of ``torch.optim.RMSprop`` that leaves frozen weights and their state bit-identical.

    square_avgs: like params; grad_avgs only if centered and momentum_buffers only with momentum, else empty lists; steps: 0-dim
    float32 each, counted up here. The rest as `update_sgd_`.
    """
    if _overflowed(found_inf):
        return
    grads = paired_gradients(params, grads, pairs, beside)
    for i, (p, g) in enumerate(zip(params, grads)):
        steps[i].add_(1)
        live = _live(p, frozen[i])
        g = _incoming(g, p, grad_scale, maximize)
        if weight_decay != 0:
            g = g + weight_decay * p
        square = square_avgs[i]
        _write(square, alpha * _normal(square) + (1 - alpha) * (g * g), live)
        variance = square
        if centered:
            mean = grad_avgs[i]
            _write(mean, _normal(mean).lerp(g, 1 - alpha), live)
            variance = square - mean * mean
        change = g / (variance.sqrt() + eps)
        if momentum > 0:
            buffer = momentum_buffers[i]
            _write(buffer, momentum * _normal(buffer) + change, live)
            change = buffer
        _write(p, p - lr.to(p.dtype) * change, live)


@torch.no_grad()
def update_adam_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    frozen: Sequence[Tensor | None],
    lr: Tensor,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    amsgrad: bool,
    maximize: bool,
    decoupled: bool,
    pairs: Sequence[int] = (),
    beside: Sequence[Tensor] | None = None,
) -> None:
    """One step of ``torch.optim.Adam`` (``AdamW`` where decoupled) that leaves frozen weights and their state bit-identical.

    exp_avgs, exp_avg_sqs: like params; max_exp_avg_sqs only with amsgrad, else an empty list; steps: 0-dim float32 each, counted
    up here; bias corrections are computed in float64, and the second one multiplies rate and eps instead of dividing the root, which is
    the same number for one rounding less. The rest as `update_sgd_`. Kingma & Ba 2015; Loshchilov & Hutter 2019.
    """
    if _overflowed(found_inf):
        return
    grads = paired_gradients(params, grads, pairs, beside)
    rate = lr.double()
    for i, (p, g) in enumerate(zip(params, grads)):
        steps[i].add_(1)
        step = steps[i].double()
        live = _live(p, frozen[i])
        g = _incoming(g, p, grad_scale, maximize)
        base = p
        if weight_decay != 0:
            if decoupled:
                base = p * (1 - rate * weight_decay).to(p.dtype)
            else:
                g = g + weight_decay * p
        mean, square = exp_avgs[i], exp_avg_sqs[i]
        _write(mean, _normal(mean).lerp(g, 1 - beta1), live)
        _write(square, beta2 * _normal(square) + (1 - beta2) * (g * g), live)
        variance = square
        if amsgrad:
            _write(max_exp_avg_sqs[i], torch.maximum(max_exp_avg_sqs[i], square), live)
            variance = max_exp_avg_sqs[i]
        correction1, correction2 = 1 - beta1**step, 1 - beta2**step
        root, wide = correction2.sqrt(), torch.promote_types(p.dtype, torch.float32)  # half precision cannot hold eps
        denominator = variance.to(wide).sqrt() + (eps * root).to(wide)
        _write(p, base - (rate * root / correction1).to(wide) * mean / denominator, live)
