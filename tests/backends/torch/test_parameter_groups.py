"""Parameter groups of a compiled module: by role and by name, each parameter once."""

from __future__ import annotations

import pytest
import torch

from flowlang.diagnostics import FlowError
from tests.catalogue.nets import net

BODY = "h = relu(batch_norm[C](conv(x, 4, weight = weight_norm))); linear[C -> K = 3](mean[H, W](h))"


def test_weights_decay_and_vectors_do_not() -> None:
    module = net(BODY, C=2, H=4, W=4)
    groups = module.parameter_groups(weight_decay=0.1)
    found = {id(p): g["weight_decay"] for g in groups for p in g["params"]}
    assert len(found) == sum(len(g["params"]) for g in groups) == len(list(module.parameters()))
    for name, p in module.named_parameters():
        assert found[id(p)] == (0.1 if name.endswith("_weight") else 0.0), name
    torch.optim.SGD(groups, lr=0.1)


def test_rules_by_name_win_in_order() -> None:
    module = net(BODY, C=2, H=4, W=4)
    groups = module.parameter_groups(
        {"*": {"lr": 0.5}, "weight_norm.*": {"lr": 0.01, "weight_decay": 0.2}}, weight_decay=0.1
    )
    rates = {id(p): (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}
    named = dict(module.named_parameters())
    assert rates[id(named["weight_norm.g"])] == (0.01, 0.2)
    assert rates[id(named["linear_weight"])] == (0.5, 0.1)
    assert rates[id(named["linear_bias"])] == (0.5, 0.0)


def test_a_rule_for_nothing_is_told() -> None:
    with pytest.raises(FlowError, match="no parameter is named"):
        net(BODY, C=2, H=4, W=4).parameter_groups({"decoder.*": {"lr": 0.1}})
