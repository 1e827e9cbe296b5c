"""The surest answers of several classes an image, beside all of them looked at one by one, on any number of ranks."""

from __future__ import annotations

import pytest

from tests.engine.validating.test_multi_label import THRESHOLD, answers, counted_totals

NUM = 90


def expected(logits, targets, *, wrong):
    """Index, confidence, said and true of the surest 12, one image after the other."""
    rows = []
    for index, (probabilities, true) in enumerate(zip(logits.sigmoid().double(), targets.bool(), strict=True)):
        said = probabilities.float() >= THRESHOLD
        sure = [float(p if s else 1 - p) for p, s in zip(probabilities, said, strict=True)]
        missed = [s for s, a, b in zip(sure, said, true, strict=True) if a != b]
        if bool(missed) == wrong:
            rows.append((index, max(missed) if wrong else min(sure), said.tolist(), true.tolist()))
    return sorted(rows, key=lambda row: -row[1])[:12]


@pytest.mark.parametrize("sizes", [[NUM], [40, 0, 50]])
def test_the_surest_answers_of_all_ranks(in_ranks, sizes):
    logits, targets = answers(NUM)
    targets[:30] = (logits[:30].sigmoid() >= THRESHOLD).float()  # of 7 classes chance gets few all right

    def work(ranks):
        parts = (each.split(sizes)[ranks.rank] for each in (logits, targets))
        counted = counted_totals(*parts, 7).answers(None, NUM)
        several = counted.several
        begin = sum(sizes[: ranks.rank])
        found = several.surest.gather(list(range(begin, begin + sizes[ranks.rank])))
        return [rows.tolist() for rows in found], several.counts.tolist(), counted.calibration

    for found, counts, bins in in_ranks(len(sizes), work):
        for rows, wrong in zip(found, (True, False), strict=True):
            for (index, confidence, *has), (at, sure, said, true) in zip(
                rows, expected(logits, targets, wrong=wrong), strict=True
            ):
                assert (index, confidence) == (at, pytest.approx(sure, abs=1e-6))
                assert has == [*map(float, said), *map(float, true)]
        said = logits.sigmoid() >= THRESHOLD
        assert counts == [part.sum(0).tolist() for part in (said & targets.bool(), targets.bool(), said)]
        assert sum(images for images, _, _ in bins) == NUM * 7
        assert sum(hits for _, _, hits in bins) == int(targets.sum())
        assert sum(sure for _, sure, _ in bins) == pytest.approx(float(logits.sigmoid().sum()), rel=1e-5)
