"""The stepper: it packs the UNet evaluations of many rows into forwards. Rows join and leave at any step.

It has one thread and no queue; `animator.Animator` runs it. Rows may differ in everything: only the attributes that one
forward must share (latent shape, frames, prompt length) decide which evaluations are packed together.
"""

from __future__ import annotations

import logging
import math
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
from pia_ray.errors import DeviceLost, NonFiniteFrames, OutOfMemory, RowError, UnexpectedError
from pia_ray.pia.components import Components
from pia_ray.pia.decoding.output import PendingOutput, begin_output, finish_output
from pia_ray.pia.denoising.row_program import row_program
from pia_ray.pia.device.batch_tuner import ForwardTuner
from pia_ray.pia.device.errors import device_is_lost, is_out_of_memory
from pia_ray.pia.device.nan_check import FiniteCheck
from pia_ray.pia.device.precision import products_of
from pia_ray.pia.device.timing import RunAheadLimit, Stopwatch, record_event
from pia_ray.pia.evaluation import Evaluation, Program
from pia_ray.pia.forward_sizes import ForwardSizes
from pia_ray.pia.model_cache import Model
from pia_ray.pia.transfers import to_device
from pia_ray.pia.unet.forward import BatchEntry
from pia_ray.pia.unet.packing import packed
from pia_ray.types import PreparedRequest

log = logging.getLogger(__name__)

ForwardKey = tuple[object, ...]
"""The attributes that rows of one forward share."""


@dataclass(eq=False)
class Row:
    """One request while the engine denoises it."""

    request: PreparedRequest
    model: Model
    program: Program
    evaluation: Evaluation
    """The evaluation that the program waits for."""
    joined_at: float
    times: list[tuple[Stopwatch, float]] = field(default_factory=list)
    """Timings of the device's work for it, each with the row's share."""
    latents: torch.Tensor | None = None
    """Set when the program has returned."""
    pending: PendingOutput | None = None
    """The output that the device makes of the latents."""
    error: RowError | None = field(default=None)
    checks: deque[tuple[FiniteCheck, slice, int]] = field(default_factory=deque)
    """For its latest predictions: the check, their slice in it, and the steps that were done before."""

    @property
    def forward_key(self) -> ForwardKey:
        """The key of rows that may share a forward: the same UNet in the same state, the same shapes."""
        return (id(self.model.forward), self.request.params.free_u, *self.evaluation.shape)

    def find_non_finite(self) -> None:
        """Fails the row if one of its predictions is known to be NaN or infinite."""
        if self.error is not None:
            return
        while self.checks and self.checks[0][0].known:
            check, part, steps_done = self.checks.popleft()
            if check.fails(part):
                at = f"at step {steps_done + 1} of {self.evaluation.num_steps}"
                self.error = NonFiniteFrames(_NOT_FINITE.format(row=self.request.id or "this row", at=at))
                self.checks.clear()


class Engine:
    """Rows in flight. Only `finish` is thread-safe: one thread calls `join`, `advance` and `leave`.

    `components` are those of rows that join without a model. `batch_size` bounds the rows of a forward; with `tunes`
    the number that pays is found by timing, up to that bound.
    """

    def __init__(self, components: Components | None = None, *, batch_size: int, tunes: bool = False) -> None:
        self._model = None if components is None else Model(components)
        self._sizes = ForwardSizes(batch_size=batch_size, tunes=tunes)
        self._run_ahead = RunAheadLimit()
        self.rows: list[Row] = []
        self.expected_rows: int | None = None
        """Rows that end here in all, as far as its owner knows; None: without end. Compilation has to pay in them."""
        self._num_ended = 0

    def join(self, request: PreparedRequest, model: Model | None = None) -> Row:
        """The new row, which runs from the next step on. `model` animates it, else the engine's own.

        Raises:
            RowError: this model cannot run the request; other rows are not affected.
        """
        joined_at = time.perf_counter()
        model = self._model_or_own(model)
        watch = Stopwatch(model.components.device)
        try:
            held = model.components.variants.num_bytes
            model = model.with_loras(request.params)
            if model.components.variants.num_bytes != held:
                self.measure_memory()
            with products_of(model.components):
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

    def encode_prompt(self, params: AnimationParams, model: Model | None = None) -> np.ndarray[Any, Any]:
        """The embedding of the params' prompt, float32 [L, C], by `model`, else the engine's own.

        Raises:
            RowError: the model has no such LoRA, clip_skip leaves no layer of its text encoder, or the encoder failed.
        """
        try:
            conditions = self._model_or_own(model).with_loras(params).conditions
            with products_of(conditions.components):
                embedding = conditions.prompt(params.prompt, clip_skip=params.clip_skip, syntax=params.prompt_syntax)
            return np.ascontiguousarray(embedding.float().cpu().numpy())
        except RowError:
            raise
        except Exception as error:
            if device_is_lost(error):
                raise DeviceLost(f"the GPU failed and needs a new process: {error}") from error
            raise UnexpectedError(f"{type(error).__name__}: {error}") from error

    @property
    def room(self) -> int:
        """As `ForwardSizes.room`."""
        return self._sizes.room

    def measure_memory(self) -> None:
        """As `ForwardSizes.measure_memory`."""
        self._sizes.measure_memory()

    def forget_ended(self) -> None:
        """Counts the rows that end anew; called after a warm-up."""
        self._num_ended = 0

    def tuner_of(self, model: Model, shape: tuple[int, ...]) -> ForwardTuner:
        """The size of a model's forwards of evaluations of that shape (T, h, w, L)."""
        return self._sizes.of(model.components, shape)

    def leave(self, row: Row) -> None:
        """Removes a row before its end; other rows are not affected."""
        if row in self.rows:
            self.rows.remove(row)
        row.program.close()

    def step(self) -> list[tuple[Row, Animation | RowError]]:
        """Advances all rows, and waits for those that ended: each with its animation or error.

        Raises:
            DeviceLost: the GPU is beyond repair for this process.
        """
        return [(row, self.finish(row)) for row in self.advance()]

    def advance(self) -> list[Row]:
        """Advances every row by one evaluation; returns the rows that ended, for `finish`.

        The frames of those that did not fail are queued on the device. The call waits for no work of a GPU but that of
        `MOST_AHEAD` steps before.

        Raises:
            DeviceLost: the GPU is beyond repair for this process.
        """
        groups: dict[ForwardKey, list[Row]] = {}
        for row in self.rows:
            groups.setdefault(row.forward_key, []).append(row)
        for rows in groups.values():
            self._advance(rows)
        for row in self.rows:
            if row.error is None:
                row.find_non_finite()
        ended = [row for row in self.rows if row.latents is not None or row.error is not None]
        self._num_ended += len(ended)
        for row in ended:
            self.rows.remove(row)
            if row.error is None:
                self._begin_output(row)
        for device in {row.model.components.device for row in (*self.rows, *ended)}:
            if (event := record_event(device)) is not None:
                self._run_ahead.step(event)
        return ended

    def finish(self, row: Row) -> Animation | RowError:
        """The animation or the error of a row that ended. Waits for the device; any thread may call it at any time.

        Raises:
            DeviceLost: the GPU is beyond repair for this process.
        """
        if row.error is not None or row.pending is None:
            assert row.error is not None
            return row.error
        try:
            watch = Stopwatch(_HOST)
            made = finish_output(row.pending)
            device_s = sum(share * stopwatch.seconds for stopwatch, share in row.times)
        except RowError as error:
            row.find_non_finite()  # the device has finished its checks now
            return row.error or error
        except Exception as error:  # noqa: BLE001 - the row boundary
            return self._row_error(error, row.request)
        if row.model.components.device.type != "cuda":  # on a GPU the time is negligible
            device_s += watch.stop().seconds
        return Animation(
            frames=made.frames,
            params=row.request.params,
            model=row.model.components.version,
            id=row.request.id,
            gpu_s=device_s,
            animate_s=time.perf_counter() - row.joined_at,
            motion=made.motion,
            output=made.output,
            image=row.request.image,
            upscale=None if (upscaler := row.model.components.upscaler) is None else upscaler.enlarge,
            subject_similarity=None if made.similarities is None else made.similarities.subject,
            prompt_similarity=None if made.similarities is None else made.similarities.prompt,
            nsfw=made.nsfw,
        )

    def _advance(self, rows: list[Row]) -> None:
        watch = Stopwatch(rows[0].model.components.device)
        entries = [
            BatchEntry(row.evaluation, branch, row.request.params.free_u)
            for row in rows
            for branch in row.evaluation.branches
        ]
        try:
            with products_of(rows[0].model.components):
                predictions = self._predict(entries, rows[0])
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
            row.times.append((watch, num / len(entries)))
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
    def _predict(self, entries: Sequence[BatchEntry], first: Row) -> torch.Tensor:
        """Predictions [N, 4, T, h, w], float32, of N evaluations that may share a forward, of `first` and other rows.

        When memory runs out, the size of forwards is halved, for this call and for a while.
        """
        device, tuner = first.model.components.device, self.tuner_of(first.model, first.evaluation.shape)
        few_kinds = first.model.forward.packs_for(first.request.params.free_u)
        tuner.reconsider()
        while True:
            try:
                forwards = packed(entries, tuner.limit, device=device, few_kinds=few_kinds)
                predictions = [
                    self._forward([entries[index] for index in forward], first.model, tuner) for forward in forwards
                ]
                return _in_order(predictions, forwards)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                if tuner.limit == 1 or len(entries) == 1:
                    raise MemoryError(str(error)) from error
            pause_s = tuner.shrink(min(tuner.limit, len(entries)) // 2)
            log.warning(
                "out of memory: at most %d evaluations of %d x %d x %d a forward for %d minutes",
                tuner.limit,
                *first.evaluation.shape[:3],
                round(pause_s / 60),
            )
            if device.type == "cuda":
                torch.cuda.empty_cache()

    def _forward(self, entries: Sequence[BatchEntry], model: Model, tuner: ForwardTuner) -> torch.Tensor:
        """Predictions of one forward. Only while sizes are compared is it timed, and so waited for on a GPU."""
        if tuner.settled or len(entries) != tuner.limit:
            return model.forward.predict(entries, ahead=self._ahead)
        wait = torch.cuda.synchronize if model.components.device.type == "cuda" else lambda: None
        wait()
        started = time.perf_counter()
        predictions = model.forward.predict(entries, ahead=0)  # this size may not stay
        wait()
        tuner.record(len(entries), time.perf_counter() - started)
        if tuner.settled:
            log.info("forwards of %s: %d evaluations each", tuple(predictions.shape[2:]), tuner.limit)
        return predictions

    @property
    def _ahead(self) -> float:
        """Rows to come for each one that was denoised here until now."""
        if self.expected_rows is None:
            return math.inf
        done = self._num_ended + sum(row.evaluation.step / row.evaluation.num_steps for row in self.rows)
        return max(0.0, self.expected_rows - done) / done if done else 0.0

    def _begin_output(self, row: Row) -> None:
        assert row.latents is not None
        watch = Stopwatch(row.model.components.device)
        try:
            with products_of(row.model.components):
                row.pending = begin_output(row.model.components, row.latents, row.request)
        except RowError as error:
            row.error = error
        except Exception as error:  # noqa: BLE001 - the row boundary
            row.error = self._row_error(error, row.request)
        row.times.append((watch.stop(), 1.0))

    def _model_or_own(self, model: Model | None) -> Model:
        if (model := model or self._model) is None:
            raise TypeError("this engine has no model of its own: pass one")
        return model

    def _row_error(self, error: Exception, request: PreparedRequest) -> RowError:
        if is_out_of_memory(error):
            return OutOfMemory(_TOO_LARGE.format(**_size(request)))
        if device_is_lost(error):
            raise DeviceLost(f"the GPU failed and needs a new process: {error}") from error
        text = "".join(traceback.format_exception(error)).strip()
        return UnexpectedError(f"{type(error).__name__}: {error}\n{text}")


def _in_order(predictions: Sequence[torch.Tensor], forwards: Sequence[Sequence[int]]) -> torch.Tensor:
    """The predictions of all forwards in the order of their entries."""
    found = [index for forward in forwards for index in forward]
    together = torch.cat(list(predictions)) if len(predictions) > 1 else predictions[0]
    if found == sorted(found):
        return together
    back = torch.tensor(sorted(range(len(found)), key=found.__getitem__))
    return together[to_device(back, together.device)]


_HOST = torch.device("cpu")
_NOT_FINITE = "the model produced NaN or infinite values for {row} {at}: try another seed, or dtype float32 or bfloat16"
_TOO_LARGE = (
    "{width} x {height} px x {num_frames} frames does not fit in memory even alone: "
    "choose a smaller size, fewer frames, or a larger device"
)


def _size(request: PreparedRequest) -> dict[str, object]:
    params = request.params
    return {"width": params.width, "height": params.height, "num_frames": params.num_frames}
