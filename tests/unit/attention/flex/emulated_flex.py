"""FlexAttention's contract on the CPU: what the kernel computes from a block mask, written out densely.

On the CPU FlexAttention has no backward pass and ignores lists of blocks; these functions honour the lists, so that
schedules can be tested without a GPU.
"""

import math
from types import SimpleNamespace

import torch

from cmt_aqr.attention.dense import softmax_with_lse


def listed(num, indices, num_row_blocks, block_q, block_k, num_tokens):
    """Which (row, token) pairs lie in listed blocks: (B, S, G R, K) bool."""
    num, indices = num[..., :num_row_blocks], indices[..., :num_row_blocks, :]
    num_blocks = indices.shape[-1]
    flags = torch.zeros(*indices.shape[:-1], num_blocks + 1, dtype=torch.bool)
    place = torch.arange(num_blocks)
    flags.scatter_(-1, torch.where(place < num[..., None], indices.long(), num_blocks), True)
    flags = flags[..., :num_blocks].repeat_interleave(block_q, -2).repeat_interleave(block_k, -1)
    return flags[..., :num_tokens]


def membership(block_mask, num_passes):
    """Which tokens every row of every pass attends to: (B, S, G R, K) bool."""
    num_rows, num_tokens = block_mask.seq_lengths
    block_q, block_k = block_mask.BLOCK_SIZE
    size = (num_rows // block_q, block_q, block_k, num_tokens)
    b, s, row, token = torch.meshgrid(
        torch.arange(len(block_mask.kv_num_blocks)),
        torch.arange(num_passes),
        torch.arange(num_rows),
        torch.arange(num_tokens),
        indexing="ij",
    )
    allowed = block_mask.mask_mod(b, s, row, token)
    partial = listed(block_mask.kv_num_blocks, block_mask.kv_indices, *size)
    full = listed(block_mask.full_kv_num_blocks, block_mask.full_kv_indices, *size)
    assert not (full & partial).any(), "a block is listed twice"
    return full | (partial & allowed)


def emulated_flex(q, k, v, *, block_mask, enable_gqa, return_aux, kernel_options):
    """Stands in for ``flex_attention``."""
    assert enable_gqa and return_aux.lse and kernel_options["fwd_BLOCKS_ARE_CONTIGUOUS"]
    num_passes = q.shape[1] // k.shape[1]
    mask = membership(block_mask, num_passes).repeat(1, k.shape[1], 1, 1)
    k, v = (x.repeat_interleave(num_passes, dim=1) for x in (k, v))
    scores = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).masked_fill(~mask, -math.inf)
    out, lse = softmax_with_lse(scores, v)
    return out, SimpleNamespace(lse=lse)
