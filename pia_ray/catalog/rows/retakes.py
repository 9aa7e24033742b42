"""`RowTakes`, the takes of one row in a worker: which to make next, what is published, and the result at the end."""

from __future__ import annotations

from dataclasses import replace

from pia_ray.catalog.policies import policy_of
from pia_ray.catalog.rows.failures import without_video
from pia_ray.catalog.steps import Fetched
from pia_ray.config.catalog import CatalogConfig
from pia_ray.result_row import FAILED, ResultRow
from pia_ray.takes import (
    Take,
    best_take,
    is_good,
    merged,
    next_take,
    not_accepted,
    take_of,
    take_seed,
    takes_from_json,
    takes_of,
    takes_to_json,
    with_verdict,
)
from pia_ray.types import ManifestRow


class RowTakes:
    """The takes of a row. `published` is the result of the video that is there already.

    A take that is better than those before it is published at once, so that a crash costs the take at work only. With
    `unaccepted: fail` only an accepted one is.

    Raises:
        BadParameter: a cell of the row's policy has no valid value.
    """

    def __init__(
        self, row: ManifestRow, config: CatalogConfig, *, run_id: str, model: str, published: ResultRow | None
    ) -> None:
        self.row = row
        self._policy = policy_of(config, style=row.params.style, accept=row.accept, retakes=row.retakes)
        self._run_id = run_id
        self._model = model
        self.fetched: Fetched | None = None
        """The row's picture, once a take has needed it."""
        self._published = published
        self._made: set[int] = set()
        self._tried = merged(takes_from_json(row.takes), () if published is None else takes_of(published))

    @property
    def result(self) -> ResultRow | None:
        """The row's result; None while another take is to be made."""
        if self._next is not None:
            return None
        return self.shown or self._not_accepted()

    @property
    def shown(self) -> ResultRow | None:
        """The result of the video that is there now, with what is known of all takes."""
        published = self._published
        if published is None or not (self._policy.bounds or published.takes or self.row.takes):
            return published
        shown = with_verdict(published, self._tried, self._policy, number=published.take or 0)
        return replace(shown, review_note=self.row.review_note)

    @property
    def is_first(self) -> bool:
        """Whether no take has been tried before."""
        return not self._tried

    @property
    def next_row(self) -> ManifestRow:
        """The row with the seed of the take to make now."""
        assert self.row.params.seed is not None
        seed = take_seed(self.row.params.seed, self._next or 0)
        return replace(self.row, params=self.row.params.model_copy(update={"seed": seed}))

    def judged(self, result: ResultRow) -> ResultRow:
        """The result of the take that is made now, with the columns of takes; as it is without bounds."""
        if not self._policy.bounds and not self._tried:
            return result
        number = self._next or 0
        judged = with_verdict(result, merged(self._tried, [take_of(result, number)]), self._policy, number=number)
        return replace(judged, review_note=self.row.review_note)

    def publishes(self, result: ResultRow) -> bool:
        """Whether the take that is made now is the best, so that its video is written."""
        number = self._next or 0
        takes = merged(self._tried, [take_of(result, number)])
        take = next(take for take in takes if take.number == number)
        if not is_good(take, self._policy) and self._policy.unaccepted == "fail":
            return False
        return self._published is None or best_take(takes, self._policy) is take

    def add(self, result: ResultRow) -> None:
        """Takes the result of the take that was made: published, not good enough for that, or failed."""
        number = self._next or 0
        assert self.row.params.seed is not None
        self._made.add(number)
        if result.status == FAILED:
            seed = take_seed(self.row.params.seed, number)
            take = Take(number, seed, run_id=self._run_id, error=result.error_code)
            self._tried = merged(self._tried, [take])
            return
        self._tried = merged(self._tried, takes_of(result))
        if result.publish_s is not None:  # else its video was not written
            self._published = result

    @property
    def _next(self) -> int | None:
        published = None if self._published is None else self._published.take or 0
        return next_take(self._tried, self._policy, published=published, made=self._made)

    def _not_accepted(self) -> ResultRow:
        error = not_accepted(self._tried, self._policy)
        failed = without_video(self.row, error, model=self._model, run_id=self._run_id, attempts=1)
        return replace(failed, accepted=False, takes=takes_to_json(self._tried))
