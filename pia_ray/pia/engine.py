"""The stepper: packs the UNet evaluations of many rows into forwards; rows join and leave at any step.

Single-threaded and without a queue; `animator.Animator` puts it on a thread. Rows present together may differ in
everything, since only what one forward must share (latent shape, frames, prompt length) decides what is packed.
"""

from __future__ import annotations

import logging
import time
import traceback
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from pia_ray.animation import Animation
from pia_ray.config.knobs import AnimationParams
from pia_ray.config.workers import DEFAULT_BATCH_SIZE
from pia_ray.errors import DeviceLost, NonFiniteFrames, OutOfMemory, RowError, UnexpectedError
from pia_ray.pia.components import Components
from pia_ray.pia.decoding.output import Making, begin, finished
from pia_ray.pia.denoising.row_program import row_program
from pia_ray.pia.device.batch_tuner import START, ForwardTuner
from pia_ray.pia.device.errors import device_is_lost, is_out_of_memory
from pia_ray.pia.device.memory import evaluations_that_fit
from pia_ray.pia.device.nan_check import FiniteCheck
from pia_ray.pia.device.placement import forward_sizes, most_evaluations
from pia_ray.pia.device.timing import Lead, Stopwatch, mark_of
from pia_ray.pia.evaluation import Branch, Evaluation, Program
from pia_ray.pia.model_cache import Model
from pia_ray.pia.unet.forward import Piece
from pia_ray.pia.unet.rewrites import most_positions
from pia_ray.types import AnimationRequest

log = logging.getLogger(__name__)

Sharing = tuple[object, ...]
"""What must be equal for rows to share a forward."""


@dataclass(eq=False)
class Row:
    """One request's place in the engine."""

    request: AnimationRequest
    """Its params are resolved and its image has the size to make."""
    model: Model
    program: Program
    evaluation: Evaluation
    """What the program waits for."""
    joined_at: float
    times: list[tuple[Stopwatch, float]] = field(default_factory=list)
    """What the device did for it, each with the row's share."""
    latents: torch.Tensor | None = None
    """Set when the program has returned."""
    making: Making | None = None
    """What the device has been told to make of the latents."""
    error: RowError | None = field(default=None)
    checks: deque[tuple[FiniteCheck, slice, int]] = field(default_factory=deque)
    """Of its latest predictions: the check, where in it they are, and the steps that were done before."""

    @property
    def sharing(self) -> Sharing:
        """The one place that says which rows may share a forward: same model, same state of its UNet, same shapes."""
        return (id(self.model), self.request.params.free_u, *self.evaluation.shape)

    def find_non_finite(self) -> None:
        """Fails the row if one of its predictions is known to be NaN or infinite by now."""
        if self.error is not None:
            return
        while self.checks and self.checks[0][0].known:
            check, part, steps_done = self.checks.popleft()
            if check.fails(part):
                at = f"at step {steps_done + 1} of {self.evaluation.num_steps}"
                self.error = NonFiniteFrames(_NOT_FINITE.format(row=self.request.id or "this row", at=at))
                self.checks.clear()


class Engine:
    """Rows in flight. Not thread-safe but for `finish`: one thread joins, advances and leaves.

    `components` are those of rows that join without a model. `batch_size` bounds the rows of a forward; with `tunes`
    that is the most, and what pays is found by timing.
    """

    def __init__(self, components: Components | None = None, *, batch_size: int, tunes: bool = False) -> None:
        self._model = None if components is None else Model(components)
        self._batch_size = batch_size
        self._tunes = tunes
        self._tuners: dict[tuple[object, ...], ForwardTuner] = {}
        """Evaluations per forward by model version and shape."""
        self._measured: set[tuple[object, ...]] = set()
        """Those for which memory has been asked since models last came or went."""
        self._lead = Lead()
        self.rows: list[Row] = []

    def join(self, request: AnimationRequest, model: Model | None = None) -> Row:
        """Takes a row in; it takes part from the next step on. `model` animates it, else the engine's own.

        Raises:
            RowError: the request cannot be run by this model; other rows are not touched.
        """
        joined_at = time.perf_counter()
        model = self._given(model)
        watch = Stopwatch(model.components.device)
        try:
            model = model.with_loras(request.params)
            program = row_program(request, model.components, model.conditions)
            evaluation = next(program)
        except RowError:
            raise
        except Exception as error:
            raise self._row_error(error, request) from error
        row = Row(request, model, program, evaluation, joined_at=joined_at)
        row.times.append((watch.stop(), 1.0))
        self.rows.append(row)
        return row

    def encode_prompt(self, prompt: str, model: Model | None = None, *, clip_skip: int | None) -> np.ndarray[Any, Any]:
        """The embedding of a text, float32 [L, C], by `model` or else the engine's own, under its own LoRAs.

        Raises:
            RowError: clip_skip leaves no layer of this text encoder, or the encoder failed.
        """
        try:
            conditions = self._given(model).with_loras(AnimationParams(prompt="-")).conditions
            embedding = conditions.prompt(prompt, clip_skip=clip_skip)
            return np.ascontiguousarray(embedding.float().cpu().numpy())
        except RowError:
            raise
        except Exception as error:
            if device_is_lost(error):
                raise DeviceLost(f"the GPU failed and needs a new process: {error}") from error
            raise UnexpectedError(f"{type(error).__name__}: {error}") from error

    @property
    def room(self) -> int:
        """Rows to have in flight, so that forwards of the size that is being tried, or has been found, are full."""
        if not self._tunes:
            return self._batch_size
        largest = max((tuner.limit for tuner in self._tuners.values()), default=0)
        return max(DEFAULT_BATCH_SIZE, min(self._batch_size, largest // 2))

    def measure_memory(self) -> None:
        """Asks anew how much memory holds, for models have come or gone."""
        self._measured.clear()

    def leave(self, row: Row) -> None:
        """Lets a row go before its end; the others do not notice."""
        if row in self.rows:
            self.rows.remove(row)
        row.program.close()

    def step(self) -> list[tuple[Row, Animation | RowError]]:
        """As `advance`; waits for what the ended rows made, and returns it with them.

        Raises:
            DeviceLost: the GPU is beyond repair for this process.
        """
        return [(row, self.finish(row)) for row in self.advance()]

    def advance(self) -> list[Row]:
        """Moves every row by one evaluation; returns those that ended, for `finish`.

        The frames of those that did not fail are begun. A GPU is told, not waited for, but for a step long before.

        Raises:
            DeviceLost: the GPU is beyond repair for this process.
        """
        groups: dict[Sharing, list[Row]] = {}
        for row in self.rows:
            groups.setdefault(row.sharing, []).append(row)
        for rows in groups.values():
            self._advance(rows)
        for row in self.rows:
            if row.error is None:
                row.find_non_finite()
        ended = [row for row in self.rows if row.latents is not None or row.error is not None]
        for row in ended:
            self.rows.remove(row)
            if row.error is None:
                self._begin_output(row)
        for device in {row.model.components.device for row in (*self.rows, *ended)}:
            if (mark := mark_of(device)) is not None:
                self._lead.step(mark)
        return ended

    def finish(self, row: Row) -> Animation | RowError:
        """What became of a row that ended. Waits for the device; for any thread, beside what the engine's own does.

        Raises:
            DeviceLost: the GPU is beyond repair for this process.
        """
        if row.error is not None or row.making is None:
            assert row.error is not None
            return row.error
        try:
            watch = Stopwatch(_HOST)
            pixels, motion, output = finished(row.making)
            device_s = sum(share * stopwatch.seconds for stopwatch, share in row.times)
        except RowError as error:
            row.find_non_finite()  # by now the device has answered
            return row.error or error
        except Exception as error:  # noqa: BLE001 - the row boundary
            return self._row_error(error, row.request)
        if row.model.components.device.type != "cuda":  # what this took on a GPU is next to nothing
            device_s += watch.stop().seconds
        return Animation(
            frames=pixels,
            params=row.request.params,
            model=row.model.components.version,
            id=row.request.id,
            gpu_s=device_s,
            animate_s=time.perf_counter() - row.joined_at,
            motion=motion,
            output=output,
        )

    def _advance(self, rows: list[Row]) -> None:
        watch = Stopwatch(rows[0].model.components.device)
        pieces = [(row, branch) for row in rows for branch in row.evaluation.branches]
        try:
            predictions = self._predict(pieces)
        except MemoryError:
            for row in rows:
                row.error = OutOfMemory(_TOO_LARGE.format(**_size(row.request)))
            return
        except Exception as error:
            if device_is_lost(error):
                raise DeviceLost(f"the GPU failed and needs a new process: {error}") from error
            if len(rows) == 1:
                rows[0].error = self._row_error(error, rows[0].request)
                return
            log.warning("a forward of %d rows failed (%s): running each alone", len(rows), error)
            for row in rows:
                self._advance([row])
            return
        watch.stop()
        check = FiniteCheck(predictions)
        start = 0
        for row in rows:
            num = len(row.evaluation.branches)
            row.times.append((watch, num / len(pieces)))
            row.checks.append((check, slice(start, start + num), row.evaluation.step))
            self._feed(row, predictions[start : start + num])
            start += num

    def _feed(self, row: Row, predictions: torch.Tensor) -> None:
        try:
            with torch.inference_mode():
                row.evaluation = row.program.send(predictions)
        except StopIteration as end:
            row.latents = end.value
        except RowError as error:
            row.error = error
        except Exception as error:  # noqa: BLE001 - the row boundary
            row.error = self._row_error(error, row.request)

    @torch.inference_mode()
    def _predict(self, pieces: Sequence[tuple[Row, Branch]]) -> torch.Tensor:
        """Predictions [N, 4, T, h, w], float32, of N evaluations that share a forward.

        Out of memory halves and remembers.
        """
        first = pieces[0][0]
        device, tuner = first.model.components.device, self._tuner_for(first)
        while True:
            try:
                predictions, start = [], 0
                for size in forward_sizes(len(pieces), tuner.limit, device=device):
                    predictions.append(self._forward(pieces[start : start + size], tuner))
                    start += size
                return torch.cat(predictions)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                if tuner.limit == 1 or len(pieces) == 1:
                    raise MemoryError(str(error)) from error
            tuner.shrink(min(tuner.limit, len(pieces)) // 2)
            log.warning(
                "out of memory: from now on at most %d evaluations of %d x %d x %d a forward",
                tuner.limit,
                *first.evaluation.shape[:3],
            )
            if device.type == "cuda":
                torch.cuda.empty_cache()

    def _forward(self, pieces: Sequence[tuple[Row, Branch]], tuner: ForwardTuner) -> torch.Tensor:
        """One forward; timed, which on a GPU means waited for, only while its size is still being looked for."""
        model, device = pieces[0][0].model, pieces[0][0].model.components.device
        asked = [Piece(row.evaluation, branch, row.request.params.free_u) for row, branch in pieces]
        if tuner.settled or len(pieces) != tuner.limit:
            return model.forward.predict(asked)
        wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
        wait()
        started = time.perf_counter()
        predictions = model.forward.predict(asked)
        wait()
        tuner.record(len(pieces), time.perf_counter() - started)
        if tuner.settled:
            log.info("forwards of %s: %d evaluations each", tuple(predictions.shape[2:]), tuner.limit)
        return predictions

    def _tuner_for(self, row: Row) -> ForwardTuner:
        # By version: an id may be that of a model that was dropped.
        components = row.model.components
        sized = (components.version, *row.evaluation.shape)
        if (known := self._tuners.get(sized)) is not None and sized in self._measured:
            return known
        num_frames, height, width = row.evaluation.shape[:3]
        device = components.device
        bound = most_positions(components.unet, device)
        most = most_evaluations(self._batch_size, num_frames, height, width, device=device, most_positions=bound)
        # A CPU's best size is known: see speed.CPU_FORWARD_PIXELS.
        start = START if self._tunes and device.type == "cuda" else most
        tuner = self._tuners.setdefault(sized, ForwardTuner(most=most, start=start))
        tuner.room = evaluations_that_fit(components, num_frames=num_frames, height=height, width=width)
        self._measured.add(sized)
        return tuner

    def _begin_output(self, row: Row) -> None:
        assert row.latents is not None
        watch = Stopwatch(row.model.components.device)
        try:
            row.making = begin(row.model.components, row.latents, row.request)
        except RowError as error:
            row.error = error
        except Exception as error:  # noqa: BLE001 - the row boundary
            row.error = self._row_error(error, row.request)
        row.times.append((watch.stop(), 1.0))

    def _given(self, model: Model | None) -> Model:
        if (model := model or self._model) is None:
            raise TypeError("an engine without a model of its own must be given one")
        return model

    def _row_error(self, error: Exception, request: AnimationRequest) -> RowError:
        if is_out_of_memory(error):
            return OutOfMemory(_TOO_LARGE.format(**_size(request)))
        if device_is_lost(error):
            raise DeviceLost(f"the GPU failed and needs a new process: {error}") from error
        text = "".join(traceback.format_exception(error)).strip()
        return UnexpectedError(f"{type(error).__name__}: {error}\n{text}")


_HOST = torch.device("cpu")
_NOT_FINITE = "the model produced NaN or infinite values for {row} {at}: try another seed, or dtype float32 or bfloat16"
_TOO_LARGE = (
    "{width} x {height} px x {num_frames} frames does not fit in memory even alone: "
    "choose a smaller size, fewer frames, or a larger device"
)


def _size(request: AnimationRequest) -> dict[str, object]:
    params = request.params
    return {"width": params.width, "height": params.height, "num_frames": params.num_frames}
