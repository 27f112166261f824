"""What only compiled code and GPUs need: FlexAttention, and blocks that are compiled one by one."""

import functools

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import create_block_mask, create_mask, flex_attention


@functools.lru_cache(maxsize=16)
def flex_mask(sees, block, noisy, device):
    """The mask of a sequence with itself for FlexAttention, which skips what nobody sees.  Made once per shape.

    sees: the rule, `transformer.sees`; block, noisy: of every position, tuples."""
    n, block, noisy = len(block), torch.tensor(block, device=device), torch.tensor(noisy, device=device)

    def visible(b, h, q, k):
        return sees(block[q], block[k], noisy[q], noisy[k])

    return create_block_mask(visible, None, None, n, n, device)


def fast_flex_attention(q, k, v, mask):
    """FlexAttention is a fast kernel only if compiled; in a compiled block it is anyway.  On a GPU it refuses heads of
    fewer than 16 channels, which have a dense mask instead."""
    if q.shape[-1] < 16:
        dense = create_mask(mask.mask_mod, None, None, *mask.seq_lengths, q.device)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=dense)
    flex = compiled_flex_attention() if q.is_cuda and not torch.compiler.is_compiling() else flex_attention
    return flex(q, k, v, block_mask=mask)


@functools.cache
def compiled_flex_attention():
    allow_recompilation()
    return torch.compile(flex_attention, dynamic=False)


def compile_blocks(model, **options):
    """Compile all blocks of a model in place, with options of torch.compile.  Like blocks share one graph."""
    allow_recompilation()
    for block in model.blocks:
        block.compile(dynamic=False, **options)


def allow_recompilation():
    """More shapes than PyTorch would compile for: of several lengths, batch sizes and precisions."""
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 4096
