"""The phases of a training: what the recipe's keys say, and what is wrong with them."""

from __future__ import annotations

import pytest

from launcher.errors import RecipeError
from launcher.recipe import load as recipes
from launcher.recipe import notes, phases

HEAD_FIRST = """\
data: {{path: {images}}}
optim: {{lr: 0.1, warmup_epochs: 1}}
train:
  phases:
    - {{epochs: 2, freeze: [backbone], optim: {{lr: 0.01}}}}
    - {{epochs: 3, optim: {{schedule: constant, groups: {{head: 0.2}}, warmup_epochs: 0}}}}
"""


@pytest.fixture
def load(recipe_file, images):
    """The recipe of a text in which ``{images}`` stands for a folder, with overrides."""

    def read(text, *overrides):
        return recipes.load(str(recipe_file(text.format(images=images))), overrides)[0]

    return read


@pytest.fixture
def problems(load):
    """Key to message of all that is wrong with a recipe."""

    def find(text, *overrides):
        with pytest.raises(RecipeError) as caught:
            load(text, *overrides)
        return {problem.key: (problem.where, problem.message) for problem in caught.value.problems}

    return find


def test_each_phase_has_its_own_layers_settings_and_course(load):
    recipe = load(HEAD_FIRST)
    assert recipe.train.epochs == 5  # what the phases take together
    one, two = phases.phases(recipe)
    assert (one.start, one.course, one.freeze, one.optim.lr, one.optim.warmup_epochs) == (
        0,
        (0, 2),
        ("backbone",),
        0.01,
        1,
    )
    assert (two.start, two.course, two.freeze, two.optim.lr, two.optim.warmup_epochs) == (2, (2, 3), (), 0.1, 0)
    assert (one.optim.schedule, two.optim.schedule) == ("cosine", "constant")
    assert (one.optim.groups, two.optim.groups) == ({}, {"head": 0.2})
    assert [phases.phase_at(recipe, epoch).start for epoch in (0, 1, 2, 4, 5)] == [0, 0, 2, 2, 2]


def test_the_last_phase_may_have_the_rest(load):
    text = HEAD_FIRST.replace("{{epochs: 3, optim", "{{optim")
    assert phases.phases(load(text))[1].course == (2, 18)
    assert phases.phases(load(text, "train.epochs=7"))[1].course == (2, 5)


def test_freeze_and_unfreeze_are_short_for_phases_with_one_course(load):
    text = "data: {{path: {images}}}\nmodel: {{freeze: [backbone], unfreeze: {{3: layer4, 1: [fc]}}}}\n"
    found = phases.phases(load(text, "train.epochs=9"))
    assert [(one.start, one.freeze, one.learn, one.course) for one in found] == [
        (0, ("backbone",), (), (0, 9)),
        (1, ("backbone",), ("fc",), (0, 9)),
        (3, ("backbone",), ("fc", "layer4"), (0, 9)),
    ]
    assert [one.start for one in phases.phases(load(text, "train.epochs=2"))] == [0, 1]


def test_any_of_them_can_be_tried_for_an_epoch_and_what_never_comes_is_told(load):
    recipe = load(HEAD_FIRST, "train.epochs=1")
    assert [(one.start, one.course) for one in phases.phases(recipe)] == [(0, (0, 1))]
    assert list(notes.find_notes(recipe)) == [
        ("train.phases.0", "1 of its 2 epochs come: train.epochs is 1"),
        ("train.phases.1", "it never begins: train.epochs is 1"),
    ]
    later = load(HEAD_FIRST, "train.epochs=2", "optim.step_epochs=1", "train.phases.1.optim.schedule=step")
    assert [key for key, _ in notes.find_notes(later)] == ["train.phases.1"]  # which would read optim.step_epochs


def test_all_of_a_schedule_may_be_a_phases_own_and_what_it_does_not_come_to_is_told(load):
    own = "schedule: step, step_epochs: [1, 9], step_factor: 0.5, decay_norms: false, warmup_epochs: 4"
    text = HEAD_FIRST.replace("{{lr: 0.01}}", f"{{{{{own}}}}}")
    first, second = phases.phases(load(text, "optim.cycles=5", "train.phases.1.optim.schedule=cosine_restarts"))
    assert (first.optim.step_epochs, first.optim.step_factor, first.optim.decay_norms) == ([1, 9], 0.5, False)
    assert (second.optim.decay_norms, second.optim.cycles) == (True, 5)
    assert list(notes.find_notes(load(text, "train.phases.1.optim.power=3"))) == [
        (
            "train.phases.0.optim.warmup_epochs",
            "4 epochs are more than the 2 of train.phases.0: the rates end at 50% of theirs",
        ),
        ("train.phases.1.optim.power", "no effect with schedule=constant; it is read by polynomial"),
        ("train.phases.0.optim.step_epochs", "its drop at 9 never comes in train.phases.0, which has 2 epochs"),
    ]


def test_what_several_phases_have_of_optim_is_told_in_one_line(load):
    given = ("optim.warmup_epochs=20", "optim.schedule=step", "optim.step_epochs=[2, 19]")
    text = HEAD_FIRST.replace("optim: {{schedule: constant, groups: {{head: 0.2}}, warmup_epochs: 0}}", "freeze: []")
    assert list(notes.find_notes(load(text, *given))) == [
        (
            "optim.warmup_epochs",
            (
                "20 epochs are more than the 2 of train.phases.0 and the 3 of train.phases.1: "
                "the rates end at 10% and 15% of theirs"
            ),
        ),
        (
            "optim.step_epochs",
            (
                "its drops at 2 and 19 never come in train.phases.0, which has 2 epochs; "
                "its drop at 19 never comes in train.phases.1, which has 3 epochs"
            ),
        ),
    ]


def test_more_epochs_than_the_phases_have_is_a_mistake(problems):
    where, message = problems(HEAD_FIRST, "train.epochs=40")["train.epochs"]
    assert where == "command line (train.epochs=40)"
    assert message.startswith("found 40, but the phases are 5 epochs long; make the last one longer")


def test_two_ways_to_say_what_learns_and_a_phase_without_an_end(problems):
    text = HEAD_FIRST.replace("epochs: 2, ", "") + "model: {{freeze: [conv1], unfreeze: {{1: conv1}}}}\n"
    found = problems(text)
    assert found.keys() == {"model.freeze", "model.unfreeze", "train.phases.0.epochs"}
    assert "train.phases says what learns when" in found["model.freeze"][1]
    assert found["train.phases.0.epochs"][0].endswith("recipe.yaml:5")


@pytest.mark.parametrize(
    ("change", "key", "words"),
    [
        (("{{lr: 0.01}}", "{{lrr: 0.01}}"), "train.phases.0.optim.lrr", "unknown key; did you mean 'lr'?"),
        (("{{lr: 0.01}}", "{{name: sgd}}"), "train.phases.0.optim.name", "unknown key;"),
        (("epochs: 2", "epochs: 0"), "train.phases.0.epochs", "found 0; valid: a whole number >= 1, or null"),
        (("freeze: [backbone]", "freez: [backbone]"), "train.phases.0.freez", "did you mean 'freeze'?"),
        (
            ("    - {{epochs: 3", "    - all\n    - {{epochs: 3"),
            "train.phases.1",
            "valid: a mapping with the keys epochs",
        ),
    ],
)
def test_a_mistake_within_a_phase_is_told_by_its_key_and_line(change, key, words, problems):
    where, message = problems(HEAD_FIRST.replace(*change))[key]
    assert words in message
    assert where.endswith(("recipe.yaml:5", "recipe.yaml:6"))


def test_they_can_be_given_on_the_command_line(load):
    recipe = load("data: {{path: {images}}}\n", "train.phases=[{epochs: 1, freeze: [backbone]}, {epochs: 2}]")
    assert [one.course for one in phases.phases(recipe)] == [(0, 1), (1, 2)]
