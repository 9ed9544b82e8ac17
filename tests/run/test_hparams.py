"""The declaration of the settings and what follows from it: checks, differences, cache keys."""

import argparse
import dataclasses
import re

import pytest

from hparams import SETTINGS, STAGES, Hparams
from infra.errors import UsageError

# Whose values are not checked by their declaration, but where they are used.
FREE_TEXT = {"pretrained_proj", "weights", "data_dir", "device", "labels"}


def wrong_values(setting):
    """Return texts that a setting refuses; none for true-or-false settings and free text."""
    if setting.choices:
        return ["nonsense"]
    if setting.type not in (int, float):
        return []
    wrong = ["many", "nan", "inf", str(10**30), "1e999", str(setting.high + 1)]
    if setting.low >= 0:
        wrong.append("-1")
    if setting.above or setting.low == 1:
        wrong.append("0")
    if setting.type is int:
        wrong.append("1.5")
    if setting.name == "tcr_eps":
        wrong.append("1e-300")
    return wrong


def allowed_values(setting):
    """Return values at the bounds of a setting, or each of its choices."""
    if setting.type not in (int, float):
        return list(setting.choices)
    return [setting.high] if setting.above else [setting.low, setting.high]


def test_each_setting_refuses_wrong_values_and_names_what_is_allowed():
    for setting in SETTINGS.values():
        wrong = wrong_values(setting)
        assert wrong or setting.type is bool or setting.name in FREE_TEXT
        for text in wrong:
            expected = re.escape(f"must be {setting.allowed()}, not '{text}'")
            with pytest.raises(argparse.ArgumentTypeError, match=expected):
                setting.parse(text)
        for value in allowed_values(setting):
            assert setting.parse(str(value)) == value


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
        return setting.type(2 * (setting.default or max(0, setting.low) + 5) or 1)
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
