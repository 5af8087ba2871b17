"""The rule by which a stream without task ids gets its masks, replayed on the authors' decisions (RAIVNLab/supsup, trainers/nns.py)."""

import pytest
from golden import Golden, cases

from subnet_pipelines.inference import whose_batch


@pytest.mark.parametrize("path", cases("supsup_nns_rule_*"))
def test_decisions(path):
    gold = Golden(path)
    for i in range(len(gold["n"])):
        n, before = gold["n"][i].item(), gold["task_total_before"][i].item()
        assert n == max(before, 5)
        found = whose_batch(gold["grads"][i, :n], before)
        assert found.new == bool(gold["new_task"][i]), i
        assert found.mask == gold["chosen"][i], i
        assert found.confidence == pytest.approx(gold["max_prob"][i].item(), rel=1e-6)
        assert before + found.new == gold["task_total_after"][i]
