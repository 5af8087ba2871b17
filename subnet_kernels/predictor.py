"""Serving: many threads ask, each for whatever task; what waits runs as one batch whose rows are of different tasks.

There is no thread of its own. Whoever waits for an answer while nobody runs a batch runs the next one, his own request in it, and wakes
the others. Everything that runs is a copy of the bank's model that is never shown, so the bank may go on learning.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from subnet_kernels.bank import MaskBank
from subnet_kernels.heads import fixed_copy, like
from subnet_kernels.layers import SubnetLinear
from subnet_kernels.rows import differing_biases, join
from subnet_kernels.views import TaskView


class Answer(NamedTuple):
    """Logits (B, C) of a request's rows, C the widest of its own tasks, with -inf behind a narrower one; and the task of each row."""

    logits: Tensor
    tasks: list[str]


class Request:
    """Some rows that wait for their answer."""

    def __init__(self, predictor: Predictor, x: Tensor, tasks: list[str | None]):
        self.x, self.tasks, self.rows = x, tasks, x.shape[0]
        self._predictor = predictor
        self._answer: Answer | None = None
        self._error: Exception | None = None
        self._done = self._waits = False
        self._wake = threading.Lock()
        self._wake.acquire()

    def result(self) -> Answer:
        """The answer, for which this thread may have to run the batch. Raises what the model raised on these rows."""
        self._predictor._run_until(self)
        if self._error is not None:
            raise self._error
        return self._answer


def entropy(logits: Tensor) -> Tensor:
    """Of the softmax of each row, in nats: (B, C) -> (B,)."""
    return -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1)


class Predictor:
    """A bank's tasks, as they are now, for many threads at once.

    bank: whose entries are served; its model is copied, later commits are not seen. view_bytes: of materialised weights that are kept, the
    least used go first; most_rows: of a batch; patience: seconds that a batch waits at most for as many requests as the last one had, so
    that threads that ask again and again meet; objective: logits (B, C) -> (B,), small where a row is sure, by which a row's own task is
    inferred (default the entropy).

    Rows of masks over linear layers run together, each through its own mask (`mixed_linear`); per_task modules a row at a time. What
    depends on its task in another way (convolutions, norms with statistics, combinations, signed masks) runs a task at a time, on
    materialised weights. In the former, where every product is a masked layer's or a head's, in float32 on the CPU, an answer has the
    very bits that it has alone and that `bank.activate` gives, whatever it shares a batch with; else it agrees with them up to the
    rounding of PyTorch's products, which add in another order for another number of rows.
    """

    def __init__(
        self,
        bank: MaskBank,
        *,
        view_bytes: int = 1 << 28,
        most_rows: int = 256,
        patience: float = 2e-4,
        objective: Callable[[Tensor], Tensor] | None = None,
    ):
        if not len(bank):
            raise ValueError("Predictor: the bank must have a task to serve, it has none")
        self._bank = bank.copy()
        self._bank.model.eval().requires_grad_(False)
        self._objective, self._most_rows, self._patience = objective or entropy, most_rows, patience
        self._views, self._view_bytes, self._held_bytes = OrderedDict(), view_bytes, 0
        self._queue: deque[Request] = deque()
        self._lock = threading.Lock()  # around the queue and who runs; what runs has no lock, as only one thread runs
        self._busy, self._last = False, 1
        masks = self._bank.masks
        self._first = (
            masks[0] if masks else None
        )  # whose state is in the model: rows run together if theirs differs in biases alone
        self._together: dict[str, Mapping[str, Tensor] | None] = {}
        linear = all(isinstance(layer, SubnetLinear) for layer in self._bank.layers())
        self._mixes = linear and bool(masks) and self._bank._planes == 1
        if self._mixes:
            self._bank.activate(self._first)
            self._heads = {key: _HeadOfEachRow(self._bank, key) for key in self._bank._per_task}
            for layer in self._bank.layers():
                layer._active = None

    def __call__(self, x: Tensor, task: str | Sequence[str | None] | None = None) -> Answer:
        """Logits of rows x (B, ...), all of one task, or each of its own; None where the task is to be inferred. As `submit`."""
        return self.submit(x, task).result()

    def submit(self, x: Tensor, task: str | Sequence[str | None] | None = None) -> Request:
        """As calling, but the answer is asked for later, by its `result`: many requests of one thread then share a batch. Until then
        what x holds must stay as it is.

        Raises KeyError for an unknown task, ValueError on another bad argument.
        """
        if not isinstance(x, Tensor) or x.dim() < 1 or not x.shape[0]:
            got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"Predictor: x must be rows (B, ...) with B >= 1, got {got}")
        tasks = [task] * x.shape[0] if task is None or isinstance(task, str) else list(task)
        if len(tasks) != x.shape[0]:
            raise ValueError(f"Predictor: there must be a task, or None, for each of {x.shape[0]} rows, got {len(tasks)}")
        for name in tasks:
            if name is not None:
                self._bank[name]
        request = Request(self, x, tasks)
        with self._lock:
            self._queue.append(request)
        return request

    # ------------------------------------------------------------------------------------------------------------ queue

    def _run_until(self, request: Request) -> None:
        """Wait until a request is answered, running batches while nobody else does."""
        while True:
            with self._lock:
                if request._done:
                    return
                leads = not self._busy
                self._busy, request._waits = True, not leads
            if not leads:
                self._sleep(request)
                continue
            batch: list[Request] = []
            try:
                self._gather()
                batch = self._take()
                self._answer(batch)
            finally:
                self._hand_over(batch)

    def _sleep(self, request: Request) -> None:
        """Until somebody wakes the thread of a request. If it is interrupted while it is the one who shall go on, another one does."""
        try:
            request._wake.acquire()
        except BaseException:
            with self._lock:
                woken, request._waits = not request._waits, False
                if woken and not self._busy:
                    self._wake_one()
            raise

    def _wake_one(self) -> None:
        """Of those who wait for their answer."""
        for request in self._queue:
            if request._waits:
                request._waits = False
                request._wake.release()
                return

    def _gather(self) -> None:
        """Let the threads that were answered last ask again."""
        until = time.monotonic() + self._patience
        while len(self._queue) < self._last and time.monotonic() < until:
            time.sleep(0)  # gives the interpreter to them

    def _take(self) -> list[Request]:
        """The next requests that can run together: rows of one shape and dtype, in the order in which they came."""
        with self._lock:
            first, rows, batch, others = self._queue[0].x, 0, [], deque()
            while self._queue:
                request = self._queue.popleft()
                alike = request.x.shape[1:] == first.shape[1:] and request.x.dtype == first.dtype
                if alike and (not batch or rows + request.rows <= self._most_rows):
                    batch.append(request)
                    rows += request.rows
                else:
                    others.append(request)
            self._queue, self._last = others, len(batch)
        return batch

    def _hand_over(self, batch: Sequence[Request]) -> None:
        """Wake those who have their answer, and one of those who wait for theirs, who runs the next batch."""
        with self._lock:
            self._busy = False
            for request in reversed(batch):
                request._done = request._answer is not None or request._error is not None
                if not request._done:  # this thread was interrupted: another one will answer
                    self._queue.appendleft(request)
                elif request._waits:
                    request._waits = False
                    request._wake.release()
            self._wake_one()

    # ---------------------------------------------------------------------------------------------------------- running

    @torch.no_grad()
    def _answer(self, batch: Sequence[Request]) -> None:
        """Answer some requests that can run together."""
        try:
            device = self._bank.layers()[0].weight.device
            x = torch.cat([request.x for request in batch]).to(device)
            tasks = [task for request in batch for task in request.tasks]
            unknown = [i for i, task in enumerate(tasks) if task is None]
            if unknown:
                for i, name in zip(unknown, self._infer(x[unknown])):
                    tasks[i] = name
            y, widths = self._logits(x, tasks)
            start = 0
            for request, part in zip(batch, torch.split_with_sizes_copy(y, [request.rows for request in batch])):
                end = start + request.rows
                if widths is not None and (widest := max(widths[start:end])) < part.shape[-1]:
                    part = part[..., :widest]
                request._answer = Answer(part, tasks[start:end])
                start = end
        except Exception as error:  # of the caller's rows: each caller is told
            for request in batch:
                request._error = error

    def _infer(self, x: Tensor) -> list[str]:
        """The task of each row: the mask of which more would make it surest (SupSup's one-shot rule)."""
        grads = self._bank.row_alpha_grad(x, self._objective)
        return [self._bank.masks[k] for k in grads.argmin(1).tolist()]

    def _logits(self, x: Tensor, tasks: Sequence[str]) -> tuple[Tensor, list[int] | None]:
        """(B, C) of all rows, and how many of them are each row's own: the rest is -inf; None where all are."""
        alone: dict[str, list[int]] = {}
        for i, name in enumerate(tasks):
            if self._biases(name) is None:
                alone.setdefault(name, []).append(i)
        if not alone:
            return self._mixed(x, tasks)
        widths = [0] * len(tasks)
        parts = []
        if together := [i for i, name in enumerate(tasks) if name not in alone]:
            y, own = self._mixed(x[together], [tasks[i] for i in together])
            parts.append((torch.tensor(together, device=y.device), y))
            for i, width in zip(together, own or [y.shape[-1]] * len(together)):
                widths[i] = width
        for name, rows in alone.items():
            y = self._view(name)(x[rows])
            parts.append((torch.tensor(rows, device=y.device), y))
            for i in rows:
                widths[i] = y.shape[-1]
        return join(parts, len(tasks)), widths

    def _biases(self, name: str) -> Mapping[str, Tensor] | None:
        """Of a task whose rows run with those of others: its biases of masked layers where they are not the first one's; else None."""
        if name not in self._together:
            entries = [self._bank[self._first], self._bank[name]] if self._mixes else []
            biases = differing_biases(entries, self._bank._layers) if entries else None
            self._together[name] = biases and {layer: rows[1] for layer, rows in biases.items()}
        return self._together[name]

    def _mixed(self, x: Tensor, tasks: Sequence[str]) -> tuple[Tensor, list[int] | None]:
        """Of rows that run together, as `_logits`."""
        ids = torch.tensor([self._bank[name].index for name in tasks], device=x.device)
        model, layers = self._bank.model, self._bank._layers
        differ = {layer for name in tasks for layer in self._biases(name)}
        before = {key: model.get_submodule(key) for key in self._heads}
        try:
            for key, layer in layers.items():
                biases = None
                if key in differ:
                    biases = torch.stack([self._biases(name).get(key, layer.bias) for name in tasks])
                vars(layer)["_rows"] = (self._bank._masks.blocks[key], ids, biases)  # setting it as an attribute takes longer
            for key, heads in self._heads.items():
                heads.tasks = tasks
                model.set_submodule(key, heads)
            y = model(x)
        finally:
            for layer in layers.values():
                vars(layer)["_rows"] = None
            for key, module in before.items():
                model.set_submodule(key, module)
        for heads in self._heads.values():
            if heads.widths and y.dim() > 1 and y.shape[-1] == max(heads.widths):  # the last layer: it is as wide as the widest
                return y, heads.widths
        return y, None

    def _view(self, name: str) -> TaskView:
        """A task's materialised weights, kept while there is room for them."""
        if name in self._views:
            self._views.move_to_end(name)
            return self._views[name][0]
        view = self._bank.view(name)
        size = sum(tensor.nbytes for tensor in view.state_dict().values())
        self._views[name] = (view, size)
        self._held_bytes += size
        while self._held_bytes > self._view_bytes and self._views:
            self._held_bytes -= self._views.popitem(last=False)[1][1]
        return view


class _HeadOfEachRow(nn.Module):
    """A ``per_task`` module of a batch whose rows are of different tasks, a row at a time, so that a row does not depend on others."""

    def __init__(self, bank: MaskBank, key: str):
        super().__init__()
        self._bank, self._key = bank, key
        self._own: dict[str, nn.Module] = {}
        self.tasks: Sequence[str] = ()  # of the rows
        self.widths: list[int] = []  # of their outputs

    def forward(self, x: Tensor) -> Tensor:
        rows = [self.of(name)(x[i : i + 1]) for i, name in enumerate(self.tasks)]
        self.widths = [y.shape[-1] for y in rows]
        return _stack([y[0] for y in rows])

    def of(self, name: str) -> nn.Module:
        """A task's own."""
        if name not in self._own:
            module = fixed_copy(self._bank[name].modules[self._key])
            self._own[name] = module.to(like(self._bank.layers()[0])).eval()
        return self._own[name]


def _stack(rows: Sequence[Tensor]) -> Tensor:
    """Rows (C,) as (B, C), narrower ones ending in -inf."""
    if len({row.shape for row in rows}) == 1:
        return torch.stack(list(rows))
    return join([(torch.tensor([i], device=row.device), row[None]) for i, row in enumerate(rows)], len(rows))
