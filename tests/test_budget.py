"""A hospital's own flags: what they may be, and what they say of whom it takes part with."""

from federation.config import Recipe
from federation.console import Parser, PublicError
from federation.privacy.budget import Budget, add_budget_flags, check_budget

import pytest


def budget(*argv: str) -> Budget | None:
    parser = Parser("")
    add_budget_flags(parser)
    return Budget.from_args(parser.parse_args(list(argv)))


def test_without_flags_there_is_no_private_training():
    assert budget() is None


def test_epsilon_alone_is_enough_and_each_flag_counts():
    assert budget("--dp-epsilon", "3") == Budget(3, delta=1e-5, clip=1.0, ledger=None, seed=None)
    all_flags = [
        "--dp-epsilon",
        "8",
        "--dp-epsilon-per-run",
        "2",
        "--dp-delta",
        "1e-6",
        "--dp-clip",
        "0.5",
        "--ledger",
        "a.json",
        "--dp-seed",
        "0",
    ]
    assert budget(*all_flags) == Budget(8, 2, 1e-6, 0.5, "a.json", 0)


@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf", "-inf"])
@pytest.mark.parametrize("flag", ["--dp-epsilon", "--dp-epsilon-per-run", "--dp-clip"])
def test_epsilon_and_clip_are_above_0_and_finite(flag, value):
    others = [] if flag == "--dp-epsilon" else ["--dp-epsilon", "3"]
    with pytest.raises(ValueError, match=rf"^{flag} must be above 0 and finite, got {value}$"):
        budget(*others, f"{flag}={value}")


@pytest.mark.parametrize("value", ["0", "1", "-0.1", "2", "nan", "inf", "1e-15"])
def test_delta_is_between_0_and_1(value):
    with pytest.raises(ValueError, match=rf"^--dp-delta must be from 1e-12 to 1, below 1 in .*; got {value}$"):
        budget("--dp-epsilon", "3", f"--dp-delta={value}")


def test_a_seed_is_not_negative_and_a_ledger_has_a_name():
    with pytest.raises(ValueError, match=r"^--dp-seed must be at least 0, got -1$"):
        budget("--dp-epsilon", "3", "--dp-seed=-1")
    with pytest.raises(ValueError, match=r"^--ledger needs the name of a file, got an empty one$"):
        budget("--dp-epsilon", "3", "--ledger", "")


@pytest.mark.parametrize(
    "flag",
    ["--dp-epsilon-per-run=1", "--dp-delta=1e-6", "--dp-clip=1", "--dp-seed=0", "--ledger=a.json", "--dp-delta=0"],
)
def test_other_flags_need_an_epsilon(flag):
    with pytest.raises(ValueError, match=rf"^{flag.partition('=')[0]} needs --dp-epsilon, which turns private .* on$"):
        budget(flag)


@pytest.mark.parametrize("flag", ["--dp-epsilon=three", "--dp-seed=1.5", "--dp-clip="])
def test_what_is_no_number_is_wrong_use(flag, capsys):
    with pytest.raises(SystemExit, match="2"):
        budget(flag)
    assert flag.partition("=")[0] in capsys.readouterr().err


def test_a_client_with_a_budget_trains_privately_only_and_one_without_never():
    check_budget(Budget(3), Recipe(private_training=True))
    check_budget(None, Recipe())
    with pytest.raises(PublicError, match=r"private training only .* --private-training$"):
        check_budget(Budget(3), Recipe())
    with pytest.raises(PublicError, match=r"trains privately; start the client with --dp-epsilon"):
        check_budget(None, Recipe(private_training=True))
