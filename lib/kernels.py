"""Kernels for the stages, the next one's made ready while a stage runs.

Half of a short stage is the start of its kernel and the imports of its notebook, on one core. Both are done while the
stage before it is still at work. The imports run in a namespace that is thrown away: a notebook that forgets one fails.
"""

import ast
import os

from jupyter_client.manager import AsyncKernelManager
from jupyter_core.utils import run_sync

from lib.params import ROOT
from lib.sources import NOTEBOOKS
from lib.stages import STAGES
from lib.store import REUSE

ENVIRONMENT = {"PYDEVD_DISABLE_FILE_VALIDATION": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_DISABLE_PROGRESS_BARS": "1", REUSE: "1"}


def environment(stage: str) -> dict[str, str]:
    """The environment of a stage's kernel."""
    # Threads that wait for one another by spinning cost far more than they bring where anything else runs. With small
    # matrices one thread does; a model's go to sleep soon (beside a busy process a forward took 8 times as long, now 3).
    few = {"GOMP_SPINCOUNT": "20000"} if STAGES[stage].model else dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    return {**os.environ, **ENVIRONMENT, **few}


def imports_of(stage: str) -> str:
    """The import statements at the top level of a stage's notebook."""
    tree = ast.parse((NOTEBOOKS / f"{stage}.py").read_text(encoding="utf-8"))
    return "\n".join(ast.unparse(node) for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom))


class Kernels:
    """Gives each stage a kernel of its own; `prepare` starts one ahead. All are shut down on leaving."""

    def __enter__(self) -> "Kernels":
        self._ready: dict[str, AsyncKernelManager] = {}
        return self

    def __exit__(self, *_) -> None:
        for kernel in self._ready.values():
            run_sync(kernel.shutdown_kernel)(now=True)

    def prepare(self, stage: str) -> None:
        """Start the stage's kernel where there is none yet; returns at once."""
        if stage not in self._ready:
            kernel = AsyncKernelManager(kernel_name="python3")
            first = f"--IPKernelApp.exec_lines=exec({imports_of(stage)!r}, {{}})"
            run_sync(kernel.start_kernel)(extra_arguments=["--log-level=ERROR", first], cwd=str(ROOT), env=environment(stage))
            self._ready[stage] = kernel

    def take(self, stage: str) -> AsyncKernelManager:
        """The stage's kernel, from now on the caller's to shut down."""
        self.prepare(stage)
        return self._ready.pop(stage)
