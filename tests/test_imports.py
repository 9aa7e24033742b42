"""Imports of large packages."""

from __future__ import annotations

import gc
import subprocess
import sys

import pytest

from pia_ray.imports import begin_import, collector_paused


def test_the_collector_is_paused_in_the_block_and_goes_on_after_it() -> None:
    with collector_paused():
        assert not gc.isenabled()
        with collector_paused():
            pass
        assert not gc.isenabled()
    assert gc.isenabled()


def test_a_collector_that_was_off_stays_off() -> None:
    gc.disable()
    try:
        with collector_paused():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


def run(program: str) -> None:
    """Runs the program in a process whose garbage nobody else has frozen."""
    begin = "import gc\nfrom pia_ray.imports import collector_paused, own_process\n"
    subprocess.run([sys.executable, "-c", begin + program], check=True)


@pytest.mark.skipif(sys.version_info[:2] == (3, 12), reason="Python 3.12 begins with frozen objects, which stay so")
def test_objects_of_an_import_are_old_ones_after_it_that_are_freed_with_what_holds_them() -> None:
    run("""
with collector_paused():
    import wave
    kept = [["an object of an import"]]
    kept.append(kept)
assert any(each is kept for each in gc.get_objects(generation=2))
assert gc.get_freeze_count() == 0
del kept
assert gc.collect() > 0
""")


def test_objects_of_an_import_are_left_out_of_collections_for_good_in_a_process_of_our_own() -> None:
    run("""
own_process()
with collector_paused():
    import wave
    kept = [["an object of an import"]]
assert gc.isenabled() and gc.get_freeze_count() > 0
assert not any(each is kept for each in gc.get_objects())
""")


def test_what_a_program_has_frozen_itself_stays_frozen() -> None:
    run("""
gc.freeze()
num_frozen = gc.get_freeze_count()
with collector_paused():
    import wave
assert gc.get_freeze_count() >= num_frozen > 1000
""")


def test_a_block_without_an_import_leaves_garbage_to_the_next_collection() -> None:
    run("""
own_process()
num_frozen = gc.get_freeze_count()
with collector_paused():
    garbage = [["no object of an import"]]
    garbage.append(garbage)
assert any(each is garbage for each in gc.get_objects(generation=0))
assert gc.get_freeze_count() == num_frozen
""")


def test_a_module_is_imported_on_a_thread_and_one_that_fails_leaves_its_error_to_the_caller() -> None:
    begin_import("wave").join()
    assert "wave" in sys.modules
    begin_import("pia_ray.no_such_module").join()
