"""Rows of a table side by side, times a matrix: what a layer of the sparse encoder computes.

PyTorch's own kernel starts a block of threads for every gathered row, of 32 bytes at worst. So on a GPU the gather is
compiled, which needs Triton and a C compiler there.

Shapes: R rows, K kernel positions, C channels.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

# Elements of the gathered rows that exist at a time: what a cache holds on a CPU, some hundred megabytes on a GPU, and
# in a graph, where every chunk would be a node of its own.
CHUNK = {"cpu": 2**20}
LARGE_CHUNK = 2**28
# Widths, kernels and dtypes for which one process may compile the gather.
MAX_GATHERS = 64


def gather_product(x: Tensor, rows: Tensor, matrix: Tensor) -> Tensor:
    """x (R, C), rows (R', K) with R meaning zeros, matrix (K * C, C') -> (R', C'), a chunk of rows at a time."""
    parts = [gathered @ matrix for gathered, _ in gathered_chunks(x, rows)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def gathered_chunks(x: Tensor, rows: Tensor) -> Iterator[tuple[Tensor, slice]]:
    """Chunks (n, K * C) of the rows of x that `rows` names, and which of `rows` they are."""
    padded = stored(F.pad(x, (0, 0, 0, 1)))
    is_in_graph = torch.compiler.is_compiling()
    gather = _compiled_gather if padded.is_cuda and not is_in_graph else _gather
    elements = LARGE_CHUNK if is_in_graph else CHUNK.get(padded.device.type, LARGE_CHUNK)
    size = max(1, elements // max(1, rows.shape[1] * padded.shape[1]))
    for start in range(0, max(1, rows.shape[0]), size):
        part = slice(start, start + size)
        yield gather(padded, rows[part]), part


def stored(x: Tensor) -> Tensor:
    """A contiguous x. In a compiled graph it is a buffer, where otherwise every gather from it would compute it anew.

    PyTorch's compiler puts a pointwise operation into the kernel that reads its result, here up to 27 times; it stores
    what as_strided reads.
    """
    return x.as_strided(x.size(), x.stride()) if torch.compiler.is_compiling() else x


def _gather(x: Tensor, rows: Tensor) -> Tensor:
    """Rows of x (R, C) at rows (n, K), side by side: (n, K * C)."""
    return x.index_select(0, rows.flatten()).view(rows.shape[0], rows.shape[1] * x.shape[1])


def _compiled_gather(x: Tensor, rows: Tensor) -> Tensor:
    for tensor in (x, rows):
        torch._dynamo.maybe_mark_dynamic(tensor, 0)
    with torch._dynamo.config.patch(recompile_limit=MAX_GATHERS):
        return _gather_kernel(x, rows)


# Fixed widths, any number of rows.
_gather_kernel = torch.compile(_gather, dynamic=False, fullgraph=True)
