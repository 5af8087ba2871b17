"""WSN's own layers, counts, capacities and Huffman codes (ihaeyong/WSN): masks, counts and bits exactly, reals to 1e-5."""

import pytest
import torch
import torch.nn.functional as F
from golden import Golden, assert_near, cases

import subnet_kernels as sk
from subnet_kernels.ops.apply import straight_through
from subnet_kernels.ops.masked import subnet_weight
from subnet_pipelines.capacity import code_lengths, joint_counts, joint_huffman


def select(scores, c):
    return sk.select(scores, sk.k_kth(scores.numel(), c), ties="all")


def check_masks(gold):
    """The rule k_kth + ties="all" makes the saved masks, of the weight and of the bias."""
    for name in ("", "bias_"):
        if f"{name}scores" in gold:
            scores = gold[f"{name}scores"]
            assert sk.k_kth(scores.numel(), gold["c"]) == scores.numel() - gold[f"{name}rank"] + 1
            assert torch.equal(sk.unpack(select(scores, gold["c"]), scores.shape), gold.mask(f"{name}mask"))


def effective_bias(gold, leaves):
    """WSN masks biases as it masks weights; we mask weights only, yet the ops serve tensors of any shape."""
    if "bias" not in gold:
        return None
    leaves["bias"], leaves["bias_scores"] = gold.leaf("bias"), gold.leaf("bias_scores")
    return subnet_weight(
        "bias", leaves["bias"], leaves["bias_scores"], sk.k_kth(gold["bias"].numel(), gold["c"]), None, "magnitude", "all"
    )


def check_gradients(gold, y, leaves):
    assert_near(y, gold["y"], what="y")
    y.backward(gold["g"])
    for name, leaf in leaves.items():
        assert_near(leaf.grad, gold[f"grad_{name}"], what=f"grad_{name}")
    for name in {"weight", "bias"} & leaves.keys():
        closed = ~gold.mask("mask" if name == "weight" else "bias_mask")
        assert leaves[name].grad[closed].count_nonzero() == 0


@pytest.mark.parametrize("path", cases("wsn_linear_*"))
class TestLinear:
    def test_masks(self, path):
        check_masks(Golden(path))

    def test_subnet_linear(self, path):
        gold = Golden(path)
        leaves = {name: gold.leaf(name) for name in ("x", "weight", "scores")}
        k = sk.k_kth(gold["weight"].numel(), gold["c"])
        y = sk.subnet_linear(leaves["x"], leaves["weight"], leaves["scores"], k, bias=effective_bias(gold, leaves), ties="all")
        check_gradients(gold, y, leaves)

    def test_masked_linear(self, path):
        gold = Golden(path)
        leaves = {name: gold.leaf(name) for name in ("x", "weight")}
        y = sk.masked_linear(leaves["x"], leaves["weight"], select(gold["scores"], gold["c"]), effective_bias(gold, leaves))
        check_gradients(gold, y, leaves)

    def test_frozen(self, path):
        """Frozen weights get a gradient of exactly +0.0, and their scores learn as before."""
        gold = Golden(path)
        weight, scores = gold.leaf("weight"), gold.leaf("scores")
        frozen = gold.mask("given_mask")
        k = sk.k_kth(weight.numel(), gold["c"])
        sk.subnet_linear(gold["x"], weight, scores, k, frozen=sk.pack(frozen), ties="all").backward(gold["g"])
        assert torch.equal(weight.grad[frozen], torch.zeros_like(weight.grad[frozen]))
        assert not weight.grad[frozen].signbit().any()
        assert_near(weight.grad, gold["grad_weight"].where(~frozen, torch.zeros(())), what="grad_weight where not frozen")
        assert_near(scores.grad, gold["grad_scores"], what="grad_scores")

    def test_given_mask(self, path):
        gold = Golden(path)
        bias = sk.apply(gold["bias"], sk.pack(gold.mask("given_bias_mask"))) if "bias" in gold else None
        y = sk.masked_linear(gold["x"], gold["weight"], sk.pack(gold.mask("given_mask")), bias)
        assert_near(y, gold["y_test"], what="y_test")


@pytest.mark.parametrize("path", cases("wsn_conv_*"))
class TestConv:
    def test_masks(self, path):
        check_masks(Golden(path))

    def test_masked_conv(self, path):
        gold = Golden(path)
        leaves = {name: gold.leaf(name) for name in ("x", "weight")}
        bits, bias = select(gold["scores"], gold["c"]), effective_bias(gold, leaves)
        y = sk.masked_conv(leaves["x"], leaves["weight"], bits, bias, stride=gold["stride"], padding=gold["padding"])
        check_gradients(gold, y, leaves)

    def test_without_autograd(self, path):
        """Without gradients `masked_conv` takes the fused op."""
        gold = Golden(path)
        bias = effective_bias(gold, {})
        bits = select(gold["scores"], gold["c"])
        y = sk.masked_conv(
            gold["x"],
            gold["weight"],
            bits,
            None if bias is None else bias.detach(),
            stride=gold["stride"],
            padding=gold["padding"],
        )
        assert_near(y, gold["y"], what="y")

    def test_scores(self, path):
        gold = Golden(path)
        leaves = {name: gold.leaf(name) for name in ("x", "weight", "scores")}
        k = sk.k_kth(gold["weight"].numel(), gold["c"])
        effective = subnet_weight("conv", leaves["weight"], leaves["scores"], k, None, "magnitude", "all")
        y = F.conv2d(leaves["x"], effective, effective_bias(gold, leaves), stride=gold["stride"], padding=gold["padding"])
        check_gradients(gold, y, leaves)

    def test_straight_through(self, path):
        """The op by itself, on G computed by PyTorch."""
        gold = Golden(path)
        bits = select(gold["scores"], gold["c"])
        grad = torch.nn.grad.conv2d_weight(
            gold["x"], gold["weight"].shape, gold["g"], stride=gold["stride"], padding=gold["padding"]
        )
        d_weight, d_scores = straight_through(grad, gold["weight"], gold["scores"], bits, None)
        assert_near(d_weight, gold["grad_weight"], what="grad_weight")
        assert_near(d_scores, gold["grad_scores"], what="grad_scores")


@pytest.mark.parametrize("path", cases("wsn_counts"))
def test_counts(path):
    gold = Golden(path)
    counts = [[sk.k_kth(n, c) for c in gold["c"].tolist()] for n in gold["n"].tolist()]
    assert counts == gold["ones"].tolist()
    for i, n in enumerate(gold["n"].tolist()):
        scores = torch.randperm(n).float() + 1  # distinct, as in the authors' program
        if n <= 100_000:
            for j, c in enumerate(gold["c"].tolist()):
                assert sk.count(select(scores, c)) == gold["ones"][i, j]
        elif n == 2359296:  # the layer of a ResNet-18 whose count at c = .3 depends on the order of the arithmetic
            assert sk.count(select(scores, 0.3)) == 707789


@pytest.mark.parametrize("path", cases("wsn_capacity_*"))
def test_capacity(path):
    """Consolidated masks and used fractions, in all and by layer, from unions of packed bits."""
    gold = Golden(path)
    layers = ("fc1", "fc2")
    owned = {layer: torch.zeros_like(sk.pack(gold.mask(f"mask_task0_{layer}"))) for layer in layers}
    total = sum(gold[f"mask_task0_{layer}"].numel() for layer in layers)
    for task in range(len(gold["global_sparsity"])):
        used = []
        for j, layer in enumerate(layers):
            mask = gold.mask(f"mask_task{task}_{layer}")
            bits = sk.pack(mask)
            before = sk.count(owned[layer]).item()
            opened, new, shared = sk.stats(bits, owned[layer]).tolist()
            sk.union_(owned[layer], bits)
            used.append(sk.count(owned[layer]).item())
            assert torch.equal(sk.unpack(owned[layer], mask.shape), gold.mask(f"consolidated_after{task}_{layer}"))
            assert torch.tensor(used[-1] / mask.numel()) == gold["layer_sparsity"][task, j].float()  # a float32 mean
            assert (opened, new, shared) == (mask.sum().item(), used[-1] - before, opened - new)
        assert sum(used) / total == gold["global_sparsity"][task].item()


@pytest.mark.parametrize("path", cases("wsn_capacity_*"))
def test_huffman(path):
    """The authors' coder over each group of seven tasks, in true bits: patterns, code lengths and ratios."""
    gold = Golden(path)
    tasks, layers = len(gold["global_sparsity"]), ("fc1", "fc2")
    packed = [{layer: sk.pack(gold.mask(f"mask_task{t}_{layer}")) for layer in layers} for t in range(tasks)]
    sizes = {layer: gold.mask(f"mask_task0_{layer}").numel() for layer in layers}
    words = table = 0
    for g, start in enumerate(range(0, tasks, 7)):
        rows = packed[start : start + 7]
        for layer in layers:
            name = f"group{g}_{layer}"
            counts = joint_counts([row[layer] for row in rows], sizes[layer])
            assert counts.tolist() == torch.bincount(gold[f"{name}_symbols"].view(-1), minlength=1 << len(rows)).tolist()
            lengths = code_lengths(counts)
            bits = sum(int(count) * length for count, length in zip(counts, lengths))
            words, table = words + bits, table + 8 * len(counts)
            assert bits == gold[f"{name}_encoded_bits"]
            assert bits / sizes[layer] == gold[f"{name}_mean_code_length"]
            assert bits / (2 * sizes[layer]) == gold[f"{name}_gain"]
            symbols, their = gold[f"{name}_table_symbol"].tolist(), gold[f"{name}_table_code_length"].tolist()
            assert sorted(i for i, count in enumerate(counts) if count) == sorted(symbols)
            assert sum(int(counts[i]) * length for i, length in zip(symbols, their)) == bits
            assert sum(2.0**-length for length in lengths if length) == 1
    found = joint_huffman(packed, sizes)
    assert (found["code_bits"], found["table_bits"]) == (words, table)
    assert found["rate"] == 1 - words / (sum(sizes.values()) * tasks)
