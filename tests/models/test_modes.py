from __future__ import annotations

import pytest
from torch import nn

from transferkit.models.modes import evaluating, modes_kept


def test_every_module_returns_to_its_own_mode() -> None:
    model = nn.Sequential(nn.Dropout(), nn.Sequential(nn.Dropout().eval(), nn.Dropout()))
    before = [module.training for module in model.modules()]
    with evaluating(model):
        assert not any(module.training for module in model.modules())
    assert [module.training for module in model.modules()] == before


def test_modes_return_after_an_error_too() -> None:
    model = nn.Dropout()
    with pytest.raises(RuntimeError), evaluating(model):
        raise RuntimeError
    assert model.training


def test_modes_that_a_block_changes_return() -> None:
    model = nn.Sequential(nn.Dropout().eval(), nn.Sequential(nn.Dropout()))
    before = [module.training for module in model.modules()]
    with modes_kept(model):
        assert [module.training for module in model.modules()] == before
        model.eval()
        model[0].train()
    assert [module.training for module in model.modules()] == before
