"""WSN on two tasks that contradict each other: learnt, not forgotten by a bit, resumed to the same bits."""

import pytest
import torch
from streams import Contrary, assert_same_run, broken_run

import subnet_kernels as sk
from subnet_pipelines import METHODS, Refusal, RunConfig, run
from subnet_pipelines.benchmarks.base import BenchmarkConfig
from subnet_pipelines.capacity import joint_huffman
from subnet_pipelines.reuse import reuse


def wsn(tasks=2, seed=1, val_fraction=0.25, **fields):
    cls = METHODS["wsn"]
    benchmark = Contrary(BenchmarkConfig(tasks=tasks, val_fraction=val_fraction), seed)
    return cls(cls.Config(**{"epochs": 6, "lr": 0.01, "density": 0.3, **fields}), benchmark, seed), benchmark


@pytest.mark.parametrize(
    "fields", [{}, {"stored_mask": "last_step", "ties": "all"}, {"scores": "init", "optimizer": "sgd", "lr": 0.3}]
)
def test_learns_and_forgets_nothing(fields, tmp_path):
    method, benchmark = wsn(tasks=3, **fields)
    result = run(method, benchmark, RunConfig(), tmp_path)
    assert min(result.diagonal) >= 95
    assert result.bwt == 0.0
    assert result.accuracy_matrix[2][0] == result.accuracy_matrix[0][0]
    method.bank.verify()


def test_earlier_logits_keep_their_bits(tmp_path):
    logits = {}
    method, benchmark = wsn(tasks=3)
    commit = method.commit

    def commit_and_look(of):
        commit(of)
        task = of.index
        x, _ = benchmark.test(task).tensors()
        logits[task] = method.predict(x, task).logits.detach().clone()
        method.bank.activate(None)

    method.commit = commit_and_look
    run(method, benchmark, RunConfig(), tmp_path)
    for task, before in logits.items():
        x, _ = benchmark.test(task).tensors()
        assert torch.equal(method.predict(x, task).logits, before), task


def test_masks_have_the_rules_count():
    method, _ = wsn()
    for layer in method.bank.layers():
        assert int(sk.count(layer.bits)) == sk.k_kth(layer.weight.numel(), 0.3)


def test_capacity(tmp_path):
    method, benchmark = wsn()
    result = run(method, benchmark, RunConfig(), tmp_path)
    report = result.capacity
    owned = sum(int(sk.count(bits)) for bits in method.bank.owned().values())
    total = 16 * 100 + 100 * 100
    assert report["used_fraction"] == owned / total
    assert report["paper_cap"] == pytest.approx(100 * (owned / total + 0.22 * 2 / 32))
    masks = [method.bank.bits(name) for name in method.bank.masks]
    sizes = {name: layer.weight.numel() for name, layer in zip(method.bank.layer_names, method.bank.layers())}
    assert report["huffman"] == joint_huffman(masks, sizes)
    coded = report["huffman"]["code_bits"] + report["huffman"]["table_bits"]
    assert report["huffman_cap"] == pytest.approx(100 * (owned / total + coded / (32 * total)))
    assert result.method_report["reuse"]["tasks"] == reuse(masks)["tasks"]


@pytest.mark.parametrize("fields", [{}, {"stored_mask": "last_step"}])
def test_resumes_to_the_same_bits(fields, tmp_path):
    method, benchmark = wsn(**fields)
    whole = method, run(method, benchmark, RunConfig(), tmp_path / "whole")
    for stops in ([1], [8, 8], [29, 30, 7]):
        assert_same_run(whole, broken_run(lambda: wsn(**fields), tmp_path / "-".join(map(str, stops)), stops))


def test_no_validation_rows(tmp_path):
    method, benchmark = wsn(val_fraction=0.0)
    assert min(run(method, benchmark, RunConfig(), tmp_path).diagonal) >= 95


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("density", 0.0, "density must be in"),
        ("density", 1.5, "density must be in"),
        ("lr", 0.0, "lr must be positive"),
        ("patience", 0, "patience"),
    ],
)
def test_bad_settings(field, value, words):
    with pytest.raises(Refusal, match=words):
        wsn(**{field: value})
