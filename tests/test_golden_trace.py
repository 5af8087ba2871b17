"""WSN's training, replayed step by step (ihaeyong/WSN, main_wsn_pmnist.py): two tasks with freezing between them.

Masks, their counts and the consolidated masks are compared exactly, parameters, gradients and losses to 1e-5, at every recorded
step. The program's habits, all of them visible in the traces: a step runs with the mask of the scores before it; validation and the
stored mask use the mask of the last training step (`stored_mask: last_step`), while weights and scores are restored from the epoch
of least validation loss; each task has a fresh optimizer and a head of its own, which is not masked.
"""

import pytest
import torch
import torch.nn.functional as F
from golden import Golden, assert_near, cases

import subnet_kernels as sk
import subnet_kernels.optim
from subnet_kernels.ops.apply import straight_through
from subnet_kernels.ops.update import update_adam_, update_sgd_

LAYERS = ("fc1", "fc2")
RECORDED = (1, 2, 5, 20)


def forward(x, effective, head):
    for w in effective:
        x = F.linear(x, w).relu()
    return F.linear(x, head)


class Ops:
    """WSN's training written out on the ops: selection, straight-through gradients, and a step that knows what is frozen."""

    def __init__(self, gold, kind):
        self.gold, self.kind = gold, kind
        self.weights = {layer: gold[f"task0_step0_{layer}"].clone() for layer in LAYERS}
        self.scores = {layer: gold[f"task0_step0_{layer}_scores"].clone() for layer in LAYERS}
        self.k = [sk.k_kth(w.numel(), gold["c"]) for w in self.weights.values()]
        self.owned = [torch.zeros_like(sk.pack(w > 0)) for w in self.weights.values()]

    def begin(self, task):
        self.head = self.gold[f"task{task}_step0_head"].clone()
        self.moments = None
        self.frozen = [owned.clone() for owned in self.owned] if task else [None, None]

    def parameters(self):
        return {
            **{layer: self.weights[layer] for layer in LAYERS},
            **{f"{layer}_scores": self.scores[layer] for layer in LAYERS},
            "head": self.head,
        }

    def load(self, state):
        for name, value in self.parameters().items():
            value.copy_(state[name])

    def select(self):
        return sk.select([self.scores[layer] for layer in LAYERS], self.k, ties="all")

    def step(self, x, y):
        """One step; the gradients that reached the optimizer."""
        self.bits = self.select()
        effective = [sk.apply(self.weights[layer], bits).requires_grad_() for layer, bits in zip(LAYERS, self.bits)]
        head = self.head.clone().requires_grad_()
        loss = F.cross_entropy(forward(x, effective, head), y)
        *grads, head_grad = torch.autograd.grad(loss, [*effective, head])
        handed = {"head": head_grad}
        for layer, g, bits, frozen in zip(LAYERS, grads, self.bits, self.frozen):
            handed[layer], handed[f"{layer}_scores"] = straight_through(g, self.weights[layer], self.scores[layer], bits, frozen)
        self.update(handed)
        return handed

    def update(self, grads):
        parameters = self.parameters()
        names = list(parameters)
        params, grads = [parameters[n] for n in names], [grads[n] for n in names]
        frozen = [dict(zip(LAYERS, self.frozen)).get(n) for n in names]
        lr = torch.tensor(self.gold["lr"])
        if self.kind == "sgd":
            update_sgd_(params, grads, [], frozen, lr, None, None, 0.0, 0.0, 0.0, False, False, False)
            return
        if self.moments is None:
            zeros = lambda: [torch.zeros_like(p) for p in params]  # noqa: E731
            self.moments = zeros(), zeros(), [torch.tensor(0.0) for _ in params]
        means, squares, steps = self.moments
        update_adam_(
            params, grads, means, squares, [], steps, frozen, lr, None, None, 0.9, 0.999, 1e-8, 0.0, False, False, False
        )  # fmt: skip

    def loss(self, x, y):
        """With the masks of the last step."""
        effective = [sk.apply(self.weights[layer], bits) for layer, bits in zip(LAYERS, self.bits)]
        return F.cross_entropy(forward(x, effective, self.head), y)

    def masks(self):
        return dict(zip(LAYERS, self.bits))

    def commit(self, task):
        """Store the masks of the last step; what is owned by any task so far."""
        for owned, bits in zip(self.owned, self.bits):
            sk.union_(owned, bits)
        return dict(zip(LAYERS, self.owned))


class OpsAndTorch(Ops):
    """The same with an optimizer of PyTorch, after whose step frozen weights are put back."""

    def begin(self, task):
        super().begin(task)
        make = torch.optim.SGD if self.kind == "sgd" else torch.optim.Adam
        self.leaves = {name: torch.nn.Parameter(value) for name, value in self.parameters().items()}  # share their memory
        self.optimizer = make(self.leaves.values(), lr=self.gold["lr"])
        self.values = None
        if task:
            self.values = [self.weights[n][sk.unpack(b, self.weights[n].shape)] for n, b in zip(LAYERS, self.frozen)]

    def update(self, grads):
        for name, leaf in self.leaves.items():
            leaf.grad = grads[name].clone()
        self.optimizer.step()
        if self.values is not None:
            sk.restore_([self.weights[n] for n in LAYERS], self.frozen, self.values)


class Net(torch.nn.Module):
    def __init__(self, shapes):
        super().__init__()
        for name, (outputs, inputs) in shapes.items():
            setattr(self, name, torch.nn.Linear(inputs, outputs, bias=False))

    def forward(self, x):
        return self.head(self.fc2(self.fc1(x).relu()).relu())


class Layers:
    """As a user writes it: a converted network, a bank, an ordinary optimizer. Only `stored_mask: last_step` takes a line of its own."""

    optimizers = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}

    def __init__(self, gold, kind):
        self.gold, self.kind = gold, kind
        net = Net({name: gold[f"task0_step0_{name}"].shape for name in (*LAYERS, "head")})
        config = sk.SubnetConfig(density=gold["c"], k_rule="kth", ties="all", train_weights=True, per_task=["head"])
        self.net = sk.convert(net, config)
        self.bank = sk.MaskBank(self.net)
        self.load({name: gold[f"task0_step0_{name}"] for name in self.parameters()})
        self.logits = []

    def begin(self, task):
        if task:
            self.bank.begin(scores="keep")
        with torch.no_grad():
            self.net.head.weight.copy_(self.gold[f"task{task}_step0_head"])
        self.optimizer = self.optimizers[self.kind](self.net.parameters(), lr=self.gold["lr"])

    def parameters(self):
        return {name.removesuffix(".weight").replace(".", "_"): p for name, p in self.net.named_parameters()}

    @torch.no_grad()
    def load(self, state):
        for name, value in self.parameters().items():
            value.copy_(state[name])

    def step(self, x, y):
        self.bits = self.bank.live_bits()
        self.optimizer.zero_grad()
        F.cross_entropy(self.net(x), y).backward()
        handed = {name: p.grad.clone() for name, p in self.parameters().items()}
        self.optimizer.step()
        return handed

    @torch.no_grad()
    def loss(self, x, y):
        self.bank.activate(None, bits=self.bits)
        loss = F.cross_entropy(self.net(x), y)
        self.bank.activate(None)
        return loss

    def masks(self):
        return self.bits

    def commit(self, task):
        self.bank.commit(f"task{task}", bits=self.bits)
        for layer, bits in self.bank.bits(f"task{task}").items():
            assert torch.equal(bits, self.bits[layer])
        self.bank.verify()
        assert self.bank.capacity()["used_fraction"] == self.gold["used_fraction"][task]
        self.remember(task)
        return self.bank.owned()

    @torch.no_grad()
    def remember(self, task):
        """Every task so far gives the logits that it gave at its commit, to the bit, on the images it was validated with."""
        now = []
        for t in range(task + 1):
            self.bank.activate(f"task{t}")
            now.append(self.net(self.gold[f"task{t}_valid_x"]))
        self.bank.activate(None)
        assert all(torch.equal(a, b) for a, b in zip(self.logits, now))
        self.logits = now


class LayersAndOurOptimizer(Layers):
    """The same with an optimizer of `subnet_kernels.optim`."""

    optimizers = {"sgd": subnet_kernels.optim.SGD, "adam": subnet_kernels.optim.Adam}


def replay(gold, trainer):
    used = []
    for task in (0, 1):
        get = lambda name, task=task: gold[f"task{task}_{name}"]  # noqa: E731
        trainer.begin(task)
        for name, value in trainer.parameters().items():
            assert_near(value, get(f"step0_{name}"), what=f"task {task}, step 0, {name}")
        start = {name: value.detach().clone() for name, value in trainer.parameters().items()}
        batches, x, y = get("batches"), get("x"), get("y")
        per_epoch = len(batches) // len(get("valid_loss"))
        best, valid = None, []
        for j, batch in enumerate(batches, 1):
            batch = batch[batch >= 0]
            grads = trainer.step(x[batch], y[batch])
            bits = trainer.masks()
            assert [sk.count(bits[layer]).item() for layer in LAYERS] == get("mask_ones")[j - 1].tolist(), (
                f"task {task}, step {j}"
            )
            if j in RECORDED:
                for layer in LAYERS:
                    mask = gold.mask(f"task{task}_step{j}_mask_{layer}")
                    assert torch.equal(sk.unpack(bits[layer], mask.shape), mask), f"task {task}, step {j}, {layer}"
                for name, value in trainer.parameters().items():
                    assert_near(value, get(f"step{j}_{name}"), what=f"task {task}, step {j}, {name}")
            if j == 1:
                for name, grad in grads.items():
                    assert_near(grad, get(f"step1_grad_{name}"), what=f"task {task}, gradient of {name}")
            if j % per_epoch == 0:
                epoch = j // per_epoch - 1
                assert_near(trainer.loss(x, y), get("train_loss")[epoch].float(), what="train loss")
                valid.append(trainer.loss(get("valid_x"), get("valid_y")).item())
                assert_near(valid[-1], get("valid_loss")[epoch].float(), what="validation loss")
                if valid[-1] == min(valid):
                    best = {name: value.detach().clone() for name, value in trainer.parameters().items()}
        assert valid.index(min(valid)) == get("best_epoch")
        stored = {layer: bits.clone() for layer, bits in trainer.masks().items()}
        trainer.load(best)
        for name, value in trainer.parameters().items():
            assert_near(value, get(f"end_{name}"), what=f"task {task}, restored {name}")
        owned = trainer.commit(task)
        for layer in LAYERS:
            mask = gold.mask(f"task{task}_stored_mask_{layer}")
            assert torch.equal(sk.unpack(stored[layer], mask.shape), mask)
            assert torch.equal(sk.unpack(owned[layer], mask.shape), gold.mask(f"task{task}_consolidated_{layer}"))
            if task:  # nothing that task 0 owns has moved, to the bit
                frozen = gold.mask(f"task0_consolidated_{layer}")
                assert torch.equal(trainer.parameters()[layer][frozen], start[layer][frozen])
        used.append(sum(sk.count(owned[layer]).item() for layer in LAYERS) / sum(start[layer].numel() for layer in LAYERS))
    assert used == gold["used_fraction"].tolist()


@pytest.mark.parametrize("trainer", [Ops, OpsAndTorch, Layers, LayersAndOurOptimizer])
@pytest.mark.parametrize("path", cases("wsn_trace_*"))
def test_replay(path, trainer):
    gold = Golden(path)
    replay(gold, trainer(gold, "adam" if "adam" in path.stem else "sgd"))
