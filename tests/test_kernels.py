"""Kernels made ready ahead: the imports are done, no name of theirs is left, and none outlives the run."""

import pytest
from jupyter_core.utils import run_sync

from lib import kernels
from lib.stages import STAGES


def ask(kernel, expression: str) -> str:
    """What the kernel prints for an expression."""
    client = kernel.client()  # one that asks the process, not the heartbeat, whether a kernel at its imports is alive
    client.start_channels()
    run_sync(client.wait_for_ready)(timeout=300)
    reply = run_sync(client.execute_interactive)("", user_expressions={"answer": expression}, timeout=60)
    client.stop_channels()
    return reply["content"]["user_expressions"]["answer"]["data"]["text/plain"]


def test_a_prepared_kernel_knows_the_modules_and_not_the_names():
    with kernels.Kernels() as ready:
        ready.prepare("07_specificity")
        kernel = ready.take("07_specificity")
        try:
            assert ask(kernel, "'lib.stats.specificity' in __import__('sys').modules") == "True"
            assert ask(kernel, "[name for name in ('specificity', 'Study', 'probe_figures') if name in globals()]") == "[]"
            assert ask(kernel, "__import__('os').environ['OMP_NUM_THREADS']") == "'1'"
        finally:
            run_sync(kernel.shutdown_kernel)(now=True)


def test_kernels_nobody_took_end_with_the_run():
    with pytest.raises(KeyboardInterrupt), kernels.Kernels() as ready:
        ready.prepare("02_filter")
        [kernel] = ready._ready.values()
        assert run_sync(kernel.is_alive)()
        raise KeyboardInterrupt
    assert not run_sync(kernel.is_alive)()


def test_the_imports_are_those_of_the_notebook():
    for stage in STAGES:
        lines = kernels.imports_of(stage).splitlines()
        assert "from lib.store import Study" in lines or stage == "10_report"
        assert all(line.split()[0] in ("import", "from") for line in lines)
