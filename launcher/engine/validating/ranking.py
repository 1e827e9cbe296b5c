"""What a model's probabilities say, beyond its answers: AUROC, average precision and calibration, exact over ranks.

AUROC and average precision are those of each class against all others, and the mean over the classes that have both
kinds of images. Up to EXACT_SCORES probabilities (images x classes, over all ranks) they are exact. Beyond, every
probability is counted in one of BINS bins, and memory no more depends on the images. All that is added up over ranks
are whole numbers, so any number of ranks comes to the same.

torchmetrics has all of it, and tests compare; but to import it takes longer than a short training's validation, and it
goes through the classes one by one.
"""

from __future__ import annotations

import math

import torch

from launcher.engine.distributed import gather_rows, sum_over_ranks

EXACT_SCORES = 1 << 20
"""4 MB of float32: 10,000 images of 100 classes."""
BINS = 512
"""Of log-odds, since most probabilities are close to 0 where there are many classes."""
LARGEST_LOG_ODDS = 16.5
"""float32 has nothing between the sigmoid of it and 1."""
CALIBRATION_BINS = 15
"""As most who measure ECE take (Guo et al. 2017, arXiv 1706.04599)."""
CURVE_POINTS = 33
"""Recalls, from 0 to 1, at which a curve of precision is kept."""
UNIT = 1 << 32
"""Confidences are added up as multiples of one over this, so that their order does not matter."""


class Ranking:
    """Of one rank's share of the validation set; all ranks' together on :meth:`compute`.

    Args:
        num_classes: outputs of the model.
        device: where probabilities will be.
    """

    def __init__(self, num_classes: int, device: torch.device) -> None:
        self._num_classes = num_classes
        self._device = device
        self._kept: list[tuple[torch.Tensor, torch.Tensor]] = []
        """Probabilities, N x C, and the true classes, N, or which are true, N x C."""
        self._num_kept = self._num_seen = 0
        self.curves: torch.Tensor | None = None
        """Of each class the precision at CURVE_POINTS recalls; known after :meth:`compute`."""
        self.roc: torch.Tensor | None = None
        """Likewise the recall at as many false positive rates."""
        self._binned: torch.Tensor | None = None
        """Of each class and bin, how many images are not of the class, and how many are: C x BINS x 2."""

    def add(self, probabilities: torch.Tensor, targets: torch.Tensor) -> None:
        """Count float32 N x C, and the true classes (int64 N) or which are true (N x C, 0 or 1)."""
        self._kept.append((probabilities, targets))
        self._num_kept += probabilities.numel()
        self._num_seen += len(targets)
        if self._num_kept > EXACT_SCORES:
            self._put_into_bins()

    def compute(self) -> tuple[str, torch.Tensor, torch.Tensor]:
        """Over all ranks; every rank must call it.

        Returns:
            ``exact`` or ``N bins``; AUROC and average precision of each class, NaN where there is none.
        """
        seen = int(sum_over_ranks(torch.tensor(self._num_seen, device=self._device)))
        if seen * self._num_classes <= EXACT_SCORES:
            return "exact", *self._areas(*self._at_each_score())
        self._put_into_bins()
        assert self._binned is not None  # noqa: S101
        counts = sum_over_ranks(self._binned).cpu().flip(1).cumsum(1)
        return f"{BINS} bins", *self._areas(counts[:, :, 1].T, counts[:, :, 0].T)

    def kept(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """This rank's probabilities and which classes are true (bool), N x C each; None: they are in bins.

        To be asked after :meth:`compute`, by which all ranks know.
        """
        if self._binned is not None:
            return None
        none = torch.empty(0, self._num_classes, device=self._device)
        probabilities = torch.cat([none, *(each for each, _ in self._kept)])
        return probabilities, torch.cat([none.bool(), *(self._as_sets(each) for _, each in self._kept)])

    def _areas(self, right: torch.Tensor, wrong: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.curves, self.roc = _curves(right, wrong), _roc(right, wrong)
        return areas(right, wrong)

    def _at_each_score(self) -> tuple[torch.Tensor, torch.Tensor]:
        """From the likeliest image of each class on, how many are of it, and how many are not: int64 N x C each."""
        kept = self.kept()
        assert kept  # noqa: S101  there are few enough
        probabilities, targets = gather_rows(kept[0]).cpu(), gather_rows(kept[1].to(torch.uint8)).cpu()
        ordered, order = probabilities.sort(dim=0, descending=True)
        of_class = targets.gather(0, order).long()
        ends = torch.ones_like(ordered, dtype=torch.bool)
        ends[:-1] = ordered[1:] != ordered[:-1]  # images with the same probability come all at once
        right, wrong = ((part.cumsum(0) * ends).cummax(0).values for part in (of_class, 1 - of_class))
        return right, wrong

    def _put_into_bins(self) -> None:
        """Count what is kept, and keep it no longer."""
        if self._binned is None:
            self._binned = torch.zeros(self._num_classes, BINS, 2, dtype=torch.int64, device=self._device)
        bounds = torch.linspace(-LARGEST_LOG_ODDS, LARGEST_LOG_ODDS, BINS - 1, device=self._device).sigmoid()
        rows = torch.arange(self._num_classes, device=self._device) * BINS
        for probabilities, targets in self._kept:
            places = torch.bucketize(probabilities, bounds, right=True) + rows
            places = (2 * places + self._as_sets(targets)).flatten()
            self._binned.view(-1).index_add_(0, places, torch.ones_like(places))
        self._kept, self._num_kept = [], 0

    def _as_sets(self, targets: torch.Tensor) -> torch.Tensor:
        """Which classes are true, bool N x C."""
        if targets.dim() > 1:
            return targets.bool()
        return targets[:, None] == torch.arange(self._num_classes, device=targets.device)


def areas(right: torch.Tensor, wrong: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """AUROC and average precision of each class, float64 C; NaN where there are no images of it, or no others.

    Args:
        right: images of the class that reach each threshold, from the highest to one that all reach; int64 K x C.
        wrong: the same of images that are not of the class.
    """
    right, wrong = right.double(), wrong.double()
    before, wrong_before = (torch.cat([torch.zeros_like(each[:1]), each[:-1]]) for each in (right, wrong))
    positive, negative = right[-1], wrong[-1]
    auroc = ((wrong - wrong_before) * (right + before)).sum(dim=0) / (2 * positive * negative)
    precision = ((right - before) * right / (right + wrong).clamp(min=1)).sum(dim=0) / positive
    return auroc, precision


def _curves(right: torch.Tensor, wrong: torch.Tensor) -> torch.Tensor:
    """Of each class the highest precision that has at least each of CURVE_POINTS recalls; NaN without images of it.

    Args:
        right: as :func:`areas` takes it.
        wrong: the same.
    """
    right, wrong = right.double().T.contiguous(), wrong.double().T
    precision = right / (right + wrong).clamp(min=1)
    highest = precision.flip(1).cummax(dim=1).values.flip(1)
    recalls = torch.linspace(0, 1, CURVE_POINTS, dtype=torch.float64)
    wanted = (recalls * right[:, -1:] - 1e-9).contiguous()  # in images, less what rounding adds
    places = torch.searchsorted(right, wanted).clamp(max=right.shape[1] - 1)
    return torch.where(right[:, -1:] > 0, highest.gather(1, places), torch.nan)


def _roc(right: torch.Tensor, wrong: torch.Tensor) -> torch.Tensor:
    """Of each class the recall at no more than each of CURVE_POINTS false positive rates; NaN of one kind of images.

    Args:
        right: as :func:`areas` takes it.
        wrong: the same.
    """
    right, wrong = right.double().T, wrong.double().T.contiguous()
    rates = torch.linspace(0, 1, CURVE_POINTS, dtype=torch.float64)
    allowed = (rates * wrong[:, -1:] + 1e-9).contiguous()  # in images, and what rounding takes
    places = torch.searchsorted(wrong, allowed, right=True) - 1
    recall = torch.where(places < 0, 0.0, right.gather(1, places.clamp(min=0))) / right[:, -1:]
    return torch.where((right[:, -1:] > 0) & (wrong[:, -1:] > 0), recall, torch.nan)


class Calibration:
    """The expected calibration error: by how much confidence and being right differ, in the mean over images.

    Args:
        device: where confidences will be.
    """

    def __init__(self, device: torch.device) -> None:
        self._sums = torch.zeros(CALIBRATION_BINS, 3, dtype=torch.int64, device=device)
        """Of each bin images, confidences in units, and hits."""

    def add(self, confidences: torch.Tensor, hits: torch.Tensor) -> None:
        """Count probabilities of answers, and which of these are right."""
        places = calibration_bin(confidences)
        units = (confidences.double().nan_to_num() * UNIT).round().long()
        self._sums.index_add_(0, places, torch.stack([torch.ones_like(units), units, hits.long()], dim=1))

    def bins(self) -> list[list[int]]:
        """Of each bin over all ranks: images, their confidences in units, hits. Every rank must call it."""
        found: list[list[int]] = sum_over_ranks(self._sums.clone()).tolist()
        return found

    def compute(self) -> float:
        """Over all ranks; every rank must call it. NaN of no images."""
        return error_of(self.bins())


def calibration_bin(confidences: torch.Tensor) -> torch.Tensor:
    """Which of CALIBRATION_BINS bins each confidence is in, from 0."""
    bounds = torch.linspace(0, 1, CALIBRATION_BINS + 1, device=confidences.device)[1:-1]
    return torch.bucketize(confidences, bounds, right=True)


def in_images(bins: list[list[int]]) -> list[list[float]]:
    """:meth:`Calibration.bins` as people read them: images, the sum of their confidences, hits."""
    return [[images, units / UNIT, hits] for images, units, hits in bins]


def error_of(bins: list[list[int]]) -> float:
    """What :meth:`Calibration.bins` come to; NaN of no images."""
    num = sum(images for images, _, _ in bins)
    return sum(abs(units - hits * UNIT) for _, units, hits in bins) / UNIT / num if num else math.nan


def mean_of(values: torch.Tensor) -> float:
    """Over the classes that have a value; NaN where none has."""
    known = values[values.isfinite()]
    return float(known.mean()) if len(known) else math.nan
