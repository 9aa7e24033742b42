"""The row ledger of an output: RESULTS_SCHEMA, parts, what is pending, `results.parquet`, lease, attempts, upkeep.

Its modules are `layout` (URIs), `results` (rows and the table that people read), `parts` (files of rows), `index` (the
row that wins), `runs`, `attempts`, `lease`, `busy_share`, `live` (the run at work), `planning`, `retaking`,
`take_counts`, `review_counts`, `ledger`, `found_rows`, `results_writer`, `videos` and `upkeep` (summary, verify,
rebuild).
"""

from pia_ray.ledger.attempts import (
    AttemptRecord,
    AttemptState,
    begin_attempt,
    begin_first_attempt,
    count_attempts,
    earlier_attempts,
    remove_attempts,
    remove_attempts_of_run,
    set_attempt_state,
)
from pia_ray.ledger.busy_share import BusyShare
from pia_ray.ledger.found_rows import keys_of, rows_of
from pia_ray.ledger.layout import (
    items_uri,
    path_in_output,
    poster_uri,
    results_uri,
    slug,
    summary_uri,
    thumbnail_uris,
    video_uri,
)
from pia_ray.ledger.lease import Lease
from pia_ray.ledger.ledger import Ledger
from pia_ray.ledger.live import (
    LiveRun,
    RowInFlight,
    Stage,
    WorkerState,
    live_run,
    remove_worker,
    remove_workers_of_run,
    write_worker,
)
from pia_ray.ledger.planning import ROW_COLUMNS, Planned
from pia_ray.ledger.results import (
    RESULTS_SCHEMA,
    from_record,
    from_table,
    open_results,
    provenance,
    read_results,
    row_from_provenance,
    tells_row,
    to_table,
)
from pia_ray.ledger.retaking import Retaking, StoredTakes
from pia_ray.ledger.review_counts import ReviewCounts
from pia_ray.ledger.runs import (
    COLUMN_PREFIX,
    RunRecord,
    item_files,
    latest_run,
    new_run,
    read_item_file,
    read_items,
)
from pia_ray.ledger.take_counts import TakeCounts, count_takes
from pia_ray.ledger.upkeep import LedgerSummary, Rebuilt, Verified, rebuild, summary, verify

__all__ = [
    "COLUMN_PREFIX",
    "RESULTS_SCHEMA",
    "ROW_COLUMNS",
    "AttemptRecord",
    "AttemptState",
    "BusyShare",
    "Lease",
    "Ledger",
    "LedgerSummary",
    "LiveRun",
    "Planned",
    "Rebuilt",
    "Retaking",
    "ReviewCounts",
    "RowInFlight",
    "RunRecord",
    "Stage",
    "StoredTakes",
    "TakeCounts",
    "Verified",
    "WorkerState",
    "begin_attempt",
    "begin_first_attempt",
    "count_attempts",
    "count_takes",
    "earlier_attempts",
    "from_record",
    "from_table",
    "item_files",
    "items_uri",
    "keys_of",
    "latest_run",
    "live_run",
    "new_run",
    "open_results",
    "path_in_output",
    "poster_uri",
    "provenance",
    "read_item_file",
    "read_items",
    "read_results",
    "rebuild",
    "remove_attempts",
    "remove_attempts_of_run",
    "remove_worker",
    "remove_workers_of_run",
    "results_uri",
    "row_from_provenance",
    "rows_of",
    "set_attempt_state",
    "slug",
    "summary",
    "summary_uri",
    "tells_row",
    "thumbnail_uris",
    "to_table",
    "verify",
    "video_uri",
    "write_worker",
]
