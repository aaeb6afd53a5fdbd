"""Several items at once on the CPU: copies of a model that share its weights, one a core, each at one thread.

Products as small as these gain less from a second thread than from being left alone. And since none of them is shared
between threads, what comes out depends on no number of cores.
"""

import copy
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue

import torch
from tqdm.auto import tqdm


def replica(model):
    """The model again, with modules, hooks and configuration of its own and the same weights."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})


def each(model, function: Callable, items: Sequence, **bar) -> list:
    """`[function(model, item) for item in items]`, on the CPU as many at once as torch has threads; `bar` is tqdm's."""
    n = 1 if model.device.type != "cpu" else min(torch.get_num_threads(), len(items))
    if n <= 1:
        return [function(model, item) for item in tqdm(items, mininterval=2, **bar)]
    idle, threads = SimpleQueue(), torch.get_num_threads()
    for one in (model, *(replica(model) for _ in range(n - 1))):
        idle.put(one)

    def run(item):
        torch.set_num_threads(1)  # of this thread
        own = idle.get()
        try:
            return function(own, item)
        finally:
            idle.put(own)

    try:
        with ThreadPoolExecutor(n) as pool:
            return list(tqdm(pool.map(run, items), total=len(items), mininterval=2, **bar))
    finally:
        torch.set_num_threads(threads)
