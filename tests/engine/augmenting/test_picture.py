"""Which training images are shown."""

from __future__ import annotations

from launcher.engine.augmenting import picture
from launcher.engine.loading.balance import balanced_order
from launcher.engine.schedule import epoch_order
from launcher.recipe import load as recipes

LABELS = [0] * 30 + [1] * 2


class Images:
    samples = tuple((f"{index}.png", label) for index, label in enumerate(LABELS))

    def __len__(self):
        return len(LABELS)

    def key(self, index):
        return self.samples[index][0]


def recipe(balance):
    return recipes.from_dict({"data": {"name": "digits", "balance": balance}, "seed": 3})


def test_they_are_the_first_that_the_epoch_trains_on():
    even = balanced_order(3, 1, LABELS)[0].tolist()
    assert picture.first(Images(), recipe("sampler"), epoch=1, num=12) == even[:12]
    assert sum(LABELS[index] for index in even[:12]) > 2  # the rare class again and again
    order = epoch_order(3, 1, len(LABELS)).tolist()
    assert picture.first(Images(), recipe("none"), epoch=1, num=12) == order[:12]
    out = {f"{order[0]}.png", f"{order[3]}.png"}
    assert picture.first(Images(), recipe("none"), epoch=1, num=4, left_out=out) == [order[i] for i in (1, 2, 4, 5)]
