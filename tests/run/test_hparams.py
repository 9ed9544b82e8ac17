"""The declaration of the settings and what follows from it: checks, differences, cache keys."""

import dataclasses

import pytest

from hparams import SETTINGS, STAGES, Hparams
from infra.errors import UsageError


def test_settings_are_checked_when_they_are_made_and_stay_as_they_are():
    hp = Hparams(n_patches=3, lr=1)
    assert (hp.n_patches, hp.lr, type(hp.lr), hp.bs) == (3, 1.0, float, 100)
    with pytest.raises(dataclasses.FrozenInstanceError):
        hp.n_patches = 4
    for wrong in (
        {"n_patches": 0},
        {"n_patches": 2.0},
        {"arch": "resnet50"},
        {"bags": 3, "n_patches": 4},
        {"labels": 3},
    ):
        with pytest.raises(UsageError, match=next(iter(wrong))):
            Hparams(**wrong)


def other(setting):
    """Return a value of the setting that is allowed and not the default."""
    if setting.choices:
        return next(choice for choice in setting.choices if choice != setting.default)
    if setting.type in (int, float):
        return setting.type(2 * (setting.default or setting.low + 5) or 1)
    return (not setting.default) if setting.type is bool else "other"


@pytest.mark.parametrize("stage", STAGES)
def test_a_key_holds_the_settings_that_a_result_depends_on(stage):
    """A key differs if a setting of this stage or an earlier one does, and for no other."""
    hp, stages = Hparams(), list(STAGES)
    for name, setting in SETTINGS.items():
        changed = dataclasses.replace(hp, **{name: other(setting)})
        assert changed.differences(hp) == {name: (other(setting), setting.default)}
        matters = stages.index(setting.stage) <= stages.index(stage)
        assert (changed.key(stage, "w") != hp.key(stage, "w")) == matters, name
    assert hp.key(stage, "w") != hp.key(stage, "v")
