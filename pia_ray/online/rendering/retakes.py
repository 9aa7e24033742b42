"""`RequestTakes`: the takes of one request in a renderer, which to make next, and the best of those that were made."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Final

from pia_ray.animation import Animation
from pia_ray.errors import Busy, Cancelled, RowError, Timeout
from pia_ray.online.rendering.renderer import RenderRequest, StepDone
from pia_ray.online.rendering.timing import Deadline
from pia_ray.takes import Take, best_take, next_take, not_accepted, plain_takes, take_seed

_LAST_SHARE: Final = 0.95
"""Share of a request's time within which retakes have to end, so that the best take is encoded in the rest."""


class RequestTakes:
    """The takes of a request. They share its deadline; where its time is over, the best take until then counts."""

    def __init__(self, request: RenderRequest, deadline: Deadline) -> None:
        self._request = request
        self._policy = request.policy
        self._all = deadline
        self._first_step_s: float | None = None
        self._longest_s = 0.0
        self._tried: list[Take] = []
        self._best: Animation | None = None
        self._is_over = False

    @property
    def is_complete(self) -> bool:
        """Whether no further take is made."""
        if self._best is None or not self._policy.bounds:
            return self._best is not None
        best = best_take(self._tried, self._policy)
        wanted = next_take(
            self._tried,
            self._policy,
            published=None if best is None else best.number,
            made={take.number for take in self._tried},
        )
        return wanted is None or self._is_over or not self._fits

    def begin(self) -> tuple[RenderRequest, Deadline]:
        """The request of the next take, and its deadline."""
        self._first_step_s = None
        if self._best is None:
            return self._request, self._all
        seed = take_seed(self._first_seed, len(self._tried))
        request = replace(self._request, params=self._request.params.model_copy(update={"seed": seed}))
        return request, self._all.share(_LAST_SHARE)

    def counted(self, step: StepDone) -> StepDone:
        """The step of the present take among those of all takes that may be made."""
        if self._first_step_s is None:
            self._first_step_s = self._all.elapsed_s
        if not self._policy.bounds:
            return step
        done, total = len(self._tried) * step.total + step.done, (1 + self._policy.retakes) * step.total
        return replace(step, done=done, total=total)

    def add(self, animation: Animation) -> None:
        """Takes the animation of the present take."""
        if self._first_step_s is not None:  # without the time in the queue
            self._longest_s = max(self._longest_s, self._all.elapsed_s - self._first_step_s)
        if not self._policy.bounds:
            self._best = animation
            return
        seed = animation.params.seed or 0
        take = Take(len(self._tried), seed, animation.judge().as_dict(), gpu_s=animation.gpu_s)
        self._tried.append(take)
        if best_take(self._tried, self._policy) is take:
            self._best = animation

    def add_failure(self, error: RowError) -> None:
        """Takes the failure of the present take.

        Raises:
            RowError: the failure is that of the request: no take was made before, or its engine ends.
        """
        if self._best is None or isinstance(error, Busy | Cancelled):
            raise error
        seed = take_seed(self._first_seed, len(self._tried))
        self._tried.append(Take(len(self._tried), seed, error=error.code))
        self._is_over = isinstance(error, Timeout)

    def best(self) -> tuple[Animation, dict[str, Any]]:
        """The animation of the best take, and its numbers and takes as fields of its `FinishedVideo`.

        The fields are empty where the request has no bounds.

        Raises:
            NotAccepted: it misses a bound, and `unaccepted` is fail.
        """
        assert self._best is not None, "the first take has a video"
        take = best_take(self._tried, self._policy)
        if take is None:
            return self._best, {}
        accepted = self._policy.accepts(take.scores)
        if not accepted and self._policy.unaccepted == "fail":
            raise not_accepted(self._tried, self._policy)
        facts = {"accepted": accepted, "take": take.number, "takes": tuple(plain_takes(self._tried))}
        return self._best, {**take.scores, **facts}

    @property
    def _first_seed(self) -> int:
        return self._tried[0].seed

    @property
    def _fits(self) -> bool:
        """Whether there is time for a take as long as the longest one."""
        left_s = self._all.share(_LAST_SHARE).left_s
        return left_s is None or left_s > self._longest_s
