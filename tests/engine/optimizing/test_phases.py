"""Phases in real trainings: what learns in each, at which rates, and to the same bits after any stop."""

from __future__ import annotations

import itertools

import pytest
import torch

from launcher.engine import optim, recipe_checks
from launcher.engine.model import FineTunedModel, build_model
from launcher.engine.optimizing import groups
from launcher.errors import RecipeError
from launcher.recipe import load as recipes
from launcher.recipe.schema import ModelConfig, OptimConfig
from launcher.system.files import read_jsonl
from tests.nets import NET

HEAD, BODY = "classifier.1.weight", "features.0.0.weight"
THREE = {
    "model": NET,
    "batch": {"size": 19},  # two steps an epoch
    "optim": {"name": "sgd", "lr": 0.1, "schedule": "cosine"},
    "train": {
        "epochs": 4,
        "ema": 0.9,
        "batchnorm_recompute": 0,
        "checkpoint": {"every_steps": 1},
        "phases": [
            {"epochs": 1, "freeze": ["backbone"], "optim": {"lr": 0.02, "schedule": "one_cycle"}},
            {"epochs": 2, "optim": {"momentum": 0.0, "groups": {"head": 0.3, "*": 0.05}, "warmup_epochs": 1}},
            {"freeze": ["features.0"], "optim": {"layer_decay": 0.5}},
        ],
    },
}


def events(run, kind):
    return [event for event in read_jsonl(run.events) if event["kind"] == kind]


def test_each_phase_trains_its_layers_at_its_rates_and_begins_a_course(make_run, engine, one_rank):
    found = engine.train(make_run(**THREE))
    rates = [{k: v for k, v in line.items() if k.startswith("lr")} for line in found.lines if line["split"] == "train"]
    assert [rate["lr"] for rate in rates[:2]] == [
        pytest.approx(0.02 * optim.lr_factor(at, OptimConfig(schedule="one_cycle"), epochs=1), rel=1e-2)
        for at in (0.257, 0.757)
    ]
    assert [rate["lr/head"] for rate in rates[2:4]] == [pytest.approx(0.3 * at, rel=3e-2) for at in (0.257, 0.757)]
    assert rates[2]["lr/*"] == pytest.approx(rates[2]["lr/head"] / 6)
    assert set(rates[6]) == {"lr", *(f"lr/rest-{height}" for height in range(5))}
    assert rates[6]["lr/rest-0"] == pytest.approx(0.1 * optim.lr_factor(0.257, OptimConfig(), epochs=1), rel=1e-2)


def test_what_a_phase_freezes_stays_and_the_average_still_comes_to_it(make_run, engine, one_rank):
    phase = {"train": THREE["train"] | {"epochs": 6, "early_stopping": {"patience": None}}}
    run, seen = make_run(**THREE | phase), {}

    def prepare(parts):
        step = parts.optimizer.step

        def watch(*arguments, **options):
            found = step(*arguments, **options)
            seen[len(seen)] = {n: p.detach().clone() for n, p in parts.model.module.named_parameters()}
            return found

        parts.optimizer.step = watch

    engine.train(run, prepare=prepare)
    assert torch.equal(seen[0][BODY], seen[1][BODY])
    assert not torch.equal(seen[0][HEAD], seen[1][HEAD])
    assert not torch.equal(seen[1][BODY], seen[2][BODY])
    assert torch.equal(seen[5][BODY], seen[11][BODY])  # the third phase
    assert not torch.equal(seen[5][HEAD], seen[11][HEAD])


@pytest.mark.slow
def test_a_run_that_is_stopped_anywhere_comes_to_the_same_bits(make_run, engine, one_rank):
    expected = engine.train(make_run("undisturbed", **THREE))
    run = make_run(**THREE)
    for poll in itertools.chain([2], itertools.count(8)):
        found = engine.train(run, stop=engine.at_poll(poll))
        if found.outcome == "completed":
            break
    assert poll > 9
    assert not events(run, "groups_changed")  # at the end of an epoch they are still those of its phase
    assert engine.identical(
        [found.state, found.optimizer, found.best], [expected.state, expected.optimizer, expected.best]
    )


def test_a_change_of_settings_keeps_what_the_optimizer_knows_where_it_still_holds():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    model = FineTunedModel(net, ModelConfig(), head=("1",))
    optimizer = optim.build_optimizer(model, OptimConfig())
    net(torch.ones(1, 2)).sum().backward()
    optim.prepare_momentum(optimizer)
    optimizer.step()
    momentum = optimizer.state[net[0].weight]["momentum_buffer"].clone()
    optim.regroup(optimizer, model, OptimConfig(groups={"head": 0.5}, weight_decay=0.1))
    assert [group["name"] for group in optimizer.param_groups] == ["head", "rest"]
    assert torch.equal(optimizer.state[net[0].weight]["momentum_buffer"], momentum)
    net[0].requires_grad_(False)
    optim.forget_frozen(optimizer)
    assert net[0].weight not in optimizer.state
    assert net[1].weight in optimizer.state
    optim.regroup(optimizer, model, OptimConfig(momentum=0.0))
    assert not optimizer.state[net[1].weight].get("momentum_buffer")


def test_batches_are_measured_in_the_phase_that_takes_the_most_memory():
    def hungriest(*freezes):
        recipe = recipes.from_dict(
            {
                "model": {"arch": "resnet18", "weights": None},
                "train": {
                    "epochs": 9,
                    "phases": [{"epochs": 1, "freeze": freeze} for freeze in freezes[:-1]] + [{"freeze": freezes[-1]}],
                },
            }
        )
        return build_model(recipe, num_classes=3, image_size=32, with_weights=False).hungriest_epoch()

    assert hungriest(["backbone"], []) == 1
    assert hungriest([], ["backbone"]) == 0
    assert hungriest(["backbone"], ["layer4", "fc"], ["conv1", "bn1", "layer1"]) == 1  # from the stem on: most to keep
    assert hungriest(["conv1"], ["conv1", "layer4"], ["backbone"]) == 0


def test_patterns_in_phases_are_checked_and_so_is_whether_anything_learns(images):
    named = [{"epochs": 1, "freeze": ["layr1"], "optim": {"groups": {"hed": 0.1}}}, {"freeze": ["*"]}]
    values = {"model": {"arch": "resnet18", "weights": None}, "data": {"path": str(images), "image_size": 32}}

    def keys(phase):
        with pytest.raises(RecipeError) as caught:
            recipe_checks.check(recipes.from_dict({**values, "train": {"phases": phase}}), str)
        return {problem.key for problem in caught.value.problems}

    assert keys(named) == {"train.phases.0.freeze", "train.phases.0.optim.groups.hed"}
    assert keys([{"epochs": 1}, {"freeze": ["*"]}]) == {"train.phases.1.freeze"}
    beyond = {"*": 0.1, "head": 0.2}  # of the head nothing is left
    assert keys([{"epochs": 1}, {"optim": {"groups": beyond}}]) == {"train.phases.1.optim.groups.head"}


def test_features_are_kept_in_the_first_phase_and_given_up_after_it(make_run, engine, one_rank):
    train = {"epochs": 4, "phases": [{"epochs": 3, "freeze": ["backbone"]}, {}], "batchnorm_recompute": 0}
    kept = engine.train(make_run(model=NET, batch={"size": 37}, train=train))
    plain = engine.train(make_run("plain", model=NET, batch={"size": 37}, train=train | {"feature_views": 0}))
    assert engine.largest_difference(kept.state, plain.state) < 1e-5


@pytest.mark.parametrize("is_same", [True, False])
def test_groups_that_another_version_made_are_told_at_a_resume(make_run, engine, one_rank, monkeypatch, is_same):
    optim_section = {"name": "sgd", "lr": 0.1, "schedule": "constant", "layer_decay": 0.5, "decay_norms": False}
    changes = {"model": NET, "batch": {"size": 19}, "optim": optim_section, "train": THREE["train"] | {"phases": []}}
    run, said = make_run(**changes), []
    monkeypatch.setattr(engine.records, "say", lambda _, line: said.append(line))
    with monkeypatch.context() as earlier:
        found_now = groups.heights
        earlier.setattr(groups, "heights", lambda model: {name: 2 * at for name, at in found_now(model).items()})
        earlier.setattr(groups, "is_norm_or_bias", lambda name, _: name.endswith("bias"))
        assert engine.train(run, stop=engine.at_poll(4)).outcome == "preempted"
    if not is_same:
        run.recipe.write_text(run.recipe.read_text().replace("layer_decay: 0.5", "layer_decay: 0.25"))
    assert engine.train(run, stop=engine.at_poll(4)).outcome == "preempted"
    engine.train(run)  # by then the checkpoint has the groups of now
    told = events(run, "groups_changed")
    assert [(event["rate"], event["weight_decay"]) for event in told] == ([(10, 4)] if is_same else [])
    lines = [line for line in said if "groups" in line]
    assert lines == [
        f"from step {event['step']} on: another learning rate for 10 tensors, another weight decay for 4 tensors of "
        "the model (this version of launch groups them otherwise than the one before, the recipe is the same)"
        for event in told
    ]
