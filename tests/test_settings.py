"""Settings check themselves, whoever makes them; runs and servers of earlier versions are read as they were meant."""

import dataclasses
import json

from federation.aggregation.strategy import STRATEGIES, CheckedStrategy
from federation.config import Recipe
from federation.server.settings import ServerSettings

import numpy as np
import pytest
from helpers.updates import update

# What the project's own task makes of a recipe: its networks with their defaults.
MODELS = {"cnn": {"batch_size": 64, "learning_rate": 0.15}, "lenet": {"batch_size": 32, "learning_rate": 0.02}}
# As commit eaf4b7f, the last before the settings became one dataclass field each, sent and stored them.
OLD_RECIPE = (
    '{"model": "cnn", "rounds": 3, "local_epochs": 1, "batch_size": 64, "learning_rate": 0.15, '
    '"partitioner": "iid", "alpha": 0.5, "seed": 0, "compress": "none"}'
)
OLD_SETTINGS = {"clients": 3, "min_clients": 2, "fraction_fit": 1.0, "strategy": "fedavg", "max_update_norm": None}
OLD_SETTINGS |= {"target_accuracy": None, "join_timeout": 3600.0, "rejoin_wait": 30.0, "round_timeout": 600.0}
OLD_SETTINGS |= {"mode": "sync", "buffer_size": 2, "server_learning_rate": 1.0, "max_staleness": 10, "patience": 0.25}


def refusal(kind: type, **values: object) -> str:
    with pytest.raises(ValueError, match=r".") as caught:
        kind(**values)
    return str(caught.value)


WRONG_TYPES = {
    "rounds": ("3", "--rounds must be a whole number, got '3'"),
    "local_epochs": (2.0, "--local-epochs must be a whole number, got 2.0"),
    "batch_size": (True, "--batch-size must be a whole number, got True"),
    "learning_rate": ("fast", "--learning-rate must be a number, got 'fast'"),
    "alpha": (False, "--alpha must be a number, got False"),
    "seed": (None, "--seed must be a whole number, got None"),
    "model": (7, "--model must be a word, got 7"),
    "compress": (["fp16"], "--compress must be a word, got ['fp16']"),
}


@pytest.mark.parametrize("name", WRONG_TYPES)
def test_a_setting_of_another_type_is_refused_at_once(name):
    value, words = WRONG_TYPES[name]
    assert refusal(Recipe, **{name: value}) == words


def test_a_setting_of_another_range_is_refused_at_once_by_both_kinds():
    partitioners = "iid, dirichlet, shards, quantity-skew, local"
    assert refusal(Recipe, partitioner="x") == f"--partitioner must be one of {partitioners}, got 'x'"
    assert refusal(Recipe, rounds=0) == "--rounds must be at least 1, got 0"
    assert refusal(Recipe, alpha=float("nan")) == "--alpha must be above 0, got nan"
    assert refusal(ServerSettings, clients=0) == "--clients must be at least 1, got 0"
    assert refusal(ServerSettings, fraction_fit="all") == "--fraction-fit must be a number, got 'all'"
    assert refusal(ServerSettings, min_clients=4) == "--min-clients must be between 1 and --clients (3), got 4"


def test_a_whole_number_does_for_a_number_however_large():
    assert repr(Recipe(alpha=1).alpha) == "1.0"
    with pytest.raises(ValueError, match=r"^--alpha must be above 0, got inf$"):
        Recipe.from_json('{"alpha": 1' + 400 * "0" + "}")


def test_what_is_left_out_follows_from_the_rest():
    assert [ServerSettings(clients=n).min_clients for n in (1, 2, 9)] == [1, 2, 2]
    assert [ServerSettings(clients=n, mode="async").buffer_size for n in (1, 3, 4)] == [1, 2, 3]
    assert ServerSettings(strategy="fedadam").server_learning_rate == 0.01
    assert ServerSettings(strategy="fedavgm").server_learning_rate == 1
    sync = ServerSettings()
    assert {sync.buffer_size, sync.max_staleness, sync.patience, sync.server_learning_rate} == {None}


OPEN = (None, None, None, None)


def of_task(recipe: Recipe) -> tuple:
    return recipe.model, recipe.batch_size, recipe.learning_rate, recipe.own


def test_what_is_the_tasks_stays_open_until_the_task_completes_it():
    assert of_task(Recipe()) == OPEN
    assert of_task(Recipe().complete(MODELS)) == ("cnn", 64, 0.15, {})
    assert of_task(Recipe(model="lenet").complete(MODELS)) == ("lenet", 32, 0.02, {})
    assert of_task(Recipe(batch_size=8).complete(MODELS)) == ("cnn", 8, 0.15, {})
    assert of_task(Recipe().complete({"network": {}})) == ("network", 32, 0.05, {})
    assert Recipe().complete(MODELS).complete(MODELS) == Recipe().complete(MODELS)


def test_a_network_that_the_task_does_not_have_is_refused_with_those_that_it_has():
    with pytest.raises(ValueError, match=r"^--model must be one of the task's \(cnn, lenet\), got 'vgg'$"):
        Recipe(model="vgg").complete(MODELS)


OWN = {"mlp": {"batch_size": 16, "hidden": 16, "dropout": 0.5, "residual": True, "norm": "batch"}}


@pytest.mark.parametrize(
    ("given", "name", "value"),
    [
        ("hidden=32", "hidden", 32),
        ("dropout=0", "dropout", 0.0),
        ("dropout=1e-3", "dropout", 0.001),
        ("residual=false", "residual", False),
        ("residual=1", "residual", True),
        ("norm=layer", "norm", "layer"),
    ],
)
def test_a_setting_of_the_tasks_own_gets_the_kind_of_its_default(given, name, value):
    own = Recipe(own=[given]).complete(OWN).own
    assert own == {"hidden": 16, "dropout": 0.5, "residual": True, "norm": "batch", name: value}
    assert type(own[name]) is type(value)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("hidden=wide", "--set hidden must be a whole number, got 'wide'"),
        ("hidden=1.5", "--set hidden must be a whole number, got '1.5'"),
        ("dropout=nan", "--set dropout must be a number, got 'nan'"),
        ("residual=maybe", "--set residual must be true or false, got 'maybe'"),
        ("width=3", "--set width: the task has no such setting for mlp; it has dropout, hidden, norm, residual"),
    ],
)
def test_a_setting_of_the_tasks_own_that_it_can_not_take_is_refused_with_the_reason(given, words):
    with pytest.raises(ValueError, match=r".") as caught:
        Recipe(own=[given]).complete(OWN)
    assert str(caught.value) == words


@pytest.mark.parametrize("given", [["hidden"], ["=3"], ["a b=3"], "hidden", [3], 7, {"hidden": [1]}, {"x": None}])
def test_what_is_no_setting_of_a_tasks_own_is_refused_at_once(given):
    assert refusal(Recipe, own=given).startswith("--set ")


def test_settings_of_the_tasks_own_travel_and_come_back():
    made = Recipe(own={"hidden": 32, "residual": False})
    assert json.loads(made.to_json())["own"] == {"hidden": 32, "residual": False}
    assert Recipe.from_json(made.to_json()) == made
    assert Recipe.from_run_config({"set": "hidden=32 residual=false"}) == Recipe(own="hidden=32 residual=false")


OF_OTHERS = {
    "buffer_size": (2, {}, "--mode async"),
    "max_staleness": (3, {}, "--mode async"),
    "patience": (0.5, {"strategy": "krum"}, "--mode async"),
    "server_momentum": (0.5, {"strategy": "fedadam"}, "--strategy fedavgm"),
    "malicious_clients": (1, {"strategy": "fedmedian"}, "--strategy krum"),
    "trimmed_fraction": (0.1, {"mode": "async"}, "--strategy fedtrimmedavg"),
    "server_learning_rate": (1.0, {}, "--mode async or --strategy fedavgm or --strategy fedadam"),
}


@pytest.mark.parametrize("name", OF_OTHERS)
def test_a_setting_of_another_mode_or_strategy_is_refused(name):
    value, others, owner = OF_OTHERS[name]
    flag = "--" + name.replace("_", "-")
    assert refusal(ServerSettings, **{name: value}, **others) == f"{flag} is for {owner}; give both or none"


def test_the_asynchronous_mode_has_its_own_aggregation():
    for values, flag in (({"strategy": "krum"}, "--strategy krum"), ({"fraction_fit": 0.5}, "--fraction-fit")):
        assert refusal(ServerSettings, mode="async", **values).endswith(f"leave out {flag}")


def test_seed_partition_and_round_each_give_another_randomness():
    seeds = [Recipe(seed=s).round_seed(p, r) for s in range(3) for p in range(4) for r in range(5)]
    assert len(set(seeds)) == len(seeds)
    assert Recipe(rounds=9, alpha=2.0).round_seed(1, 2) == Recipe().round_seed(1, 2)


PRIVATE = {"net": {"batch_size": 8, "private": {"batch_size": 64, "local_epochs": 5}}, "other": {"private": {}}}


@pytest.mark.parametrize(
    ("recipe", "batch_and_epochs"),
    [
        (Recipe(), (8, 1)),
        (Recipe(private_training=True), (64, 5)),
        (Recipe(private_training=True, local_epochs=2), (64, 2)),
        (Recipe(private_training=True, model="other"), (32, 1)),
    ],
)
def test_a_network_may_have_its_own_local_epochs_for_private_training(recipe, batch_and_epochs):
    made = recipe.complete(PRIVATE)
    assert (made.batch_size, made.local_epochs) == batch_and_epochs
    assert made.own == {}


def test_local_epochs_are_told_where_the_task_may_choose_them():
    assert "local_epochs" not in Recipe().complete(PRIVATE).of_task()
    told = Recipe(private_training=True).complete(PRIVATE).of_task()
    assert told == {"model": "net", "batch_size": 64, "learning_rate": 0.05, "own": {}, "local_epochs": 5}
    assert "local_epochs" not in json.loads(Recipe(private_training=True).to_json()), "left open, it is the task's"


# Earlier versions


def test_the_recipe_of_a_run_without_new_settings_travels_as_it_always_did():
    """A client of an earlier version knows what the task has made of it; what is left open, it has by itself."""
    assert dataclasses.replace(Recipe().complete(MODELS), own=None).to_json() == OLD_RECIPE
    assert Recipe().complete(MODELS).to_json() == OLD_RECIPE, "there are no settings of the task's own"
    assert Recipe.from_json(OLD_RECIPE).complete(MODELS) == Recipe().complete(MODELS)
    open_ones = ("model", "batch_size", "learning_rate")
    left_open = {name: value for name, value in json.loads(OLD_RECIPE).items() if name not in open_ones}
    assert json.loads(Recipe().to_json()) == left_open


@pytest.mark.parametrize(("old", "new"), [("whole", "local"), ("sizes", "quantity-skew")])
def test_partitioners_are_accepted_by_their_former_names_and_travel_by_them(old, new):
    assert Recipe(partitioner=old).partitioner == new
    assert Recipe.from_stored({"partitioner": old}).partitioner == new
    assert json.loads(Recipe(partitioner=new).to_json())["partitioner"] == old
    assert Recipe.from_json(Recipe(partitioner=new).to_json()) == Recipe(partitioner=new)


def test_a_new_setting_travels_only_where_it_is_on():
    sent = Recipe(proximal_mu=0.1).complete(MODELS).to_json()
    assert json.loads(sent) == {**json.loads(OLD_RECIPE), "proximal_mu": 0.1}
    assert Recipe.from_json(sent).proximal_mu == 0.1


def test_a_recipe_of_a_later_version_is_refused_in_words():
    for text in ('{"privacy": 1}', "[]", "3"):
        with pytest.raises(ValueError, match=r"^the server's recipe is of another version: "):
            Recipe.from_json(text)


def test_a_stored_synchronous_run_is_read_without_what_did_not_apply_to_it():
    config = {**json.loads(OLD_RECIPE), **OLD_SETTINGS, "classes": ["a", "b"], "statistics": [1]}
    assert ServerSettings.from_stored(config) == ServerSettings()
    assert Recipe.from_stored(config).complete(MODELS) == Recipe().complete(MODELS)
    other = {**config, "partitioner": "sizes", "model": "lenet", "batch_size": 8, "learning_rate": 0.5, "seed": 9}
    made = Recipe("lenet", batch_size=8, learning_rate=0.5, partitioner="quantity-skew", seed=9)
    assert Recipe.from_stored(other) == made


def test_the_target_of_a_stored_run_is_read_by_its_former_name():
    assert ServerSettings.from_stored({**OLD_SETTINGS, "target_accuracy": 0.75}) == ServerSettings(target=0.75)


def test_a_stored_asynchronous_run_is_read_with_all_its_settings():
    config = {**OLD_SETTINGS, "mode": "async", "buffer_size": 3, "server_learning_rate": 0.5, "patience": 0.0}
    made = ServerSettings(mode="async", buffer_size=3, server_learning_rate=0.5, patience=0.0)
    assert ServerSettings.from_stored(config) == made


def test_a_stored_run_of_fedadam_or_fedavgm_goes_on_with_the_steps_that_it_took():
    """Its server_learning_rate of 1 was FedBuff's, and not used."""
    stored = {name: ServerSettings.from_stored({**OLD_SETTINGS, "strategy": name}) for name in ("fedadam", "fedavgm")}
    assert stored["fedadam"].server_learning_rate == 0.01
    assert (stored["fedavgm"].server_learning_rate, stored["fedavgm"].server_momentum) == (1, 0.5)
    steps = []
    for settings in (stored["fedadam"], ServerSettings(strategy="fedadam", server_learning_rate=0.01)):
        start = [np.zeros(1, np.float32)]
        rule = CheckedStrategy(STRATEGIES["fedadam"], settings, start, [])
        steps.append(rule.aggregate(start, [update([np.ones(1, np.float32)])])[0].tobytes())
    assert steps[0] == steps[1]


@pytest.mark.parametrize(
    "settings",
    [
        ServerSettings(strategy="fedadam", server_learning_rate=0.5),
        ServerSettings(strategy="fedavgm", server_learning_rate=0.5, server_momentum=0.9),
        ServerSettings(strategy="krum", clients=9, malicious_clients=3),
        ServerSettings(strategy="fedtrimmedavg", trimmed_fraction=0.1),
        ServerSettings(mode="async", patience=1.0, max_staleness=0),
    ],
    ids=lambda settings: f"{settings.mode} {settings.strategy}",
)
def test_what_is_stored_today_comes_back(settings):
    assert ServerSettings.from_stored(json.loads(json.dumps(dataclasses.asdict(settings)))) == settings


def test_the_run_config_of_flowers_engines_leaves_what_is_empty_at_its_default():
    recipe = Recipe.from_run_config({"batch-size": "", "rounds": 5, "learning-rate": 1, "dataset": "synthetic"})
    assert recipe.complete(MODELS) == Recipe(rounds=5, learning_rate=1.0).complete(MODELS)
    assert of_task(recipe) == (None, None, 1.0, {})
