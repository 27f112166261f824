"""How the same numbers come faster or with less memory: the fastest attention for a mask, blocks that are compiled,
activations that are computed twice."""

import functools

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, create_mask, flex_attention
from torch.utils.checkpoint import checkpoint

MAX_LOGITS = 1 << 26  # 256 MB in fp32; those of a long batch over 100,278 tokens would take gigabytes


def attention(q, k, v, mask=None):
    """softmax(q k^T / sqrt(D)) v, all (B, H, L, D).  mask: of `flex_mask`, or bool, True where a key is seen."""
    if isinstance(mask, BlockMask):
        return fast_flex_attention(q, k, v, mask)
    if not q.requires_grad or q.device.type != "cpu":
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    scores = q @ k.mT * q.shape[-1] ** -0.5  # training: in bf16 2 to 3 times as fast as the fused kernel
    if mask is not None:
        scores = scores + torch.zeros(mask.shape, dtype=q.dtype).masked_fill(~mask, float("-inf"))
    return scores.softmax(-1) @ v


@functools.lru_cache(maxsize=16)
def flex_mask(block_mask, block, noisy, device):
    """The mask of a sequence with itself for FlexAttention, which skips what nobody sees.  Made once per shape.

    block_mask: the rule, that of transformer.py; block, noisy: of every position, tuples."""
    n, block, noisy = len(block), torch.tensor(block, device=device), torch.tensor(noisy, device=device)

    def visible(b, h, q, k):
        return block_mask(block[q], block[k], noisy[q], noisy[k])

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


def run_layer(block, checkpointing, *args):
    """block(*args).  With checkpointing its activations are computed again for the gradient, not kept: less memory."""
    if checkpointing and torch.is_grad_enabled():
        return checkpoint(block, *args, use_reentrant=False, preserve_rng_state=False)  # nothing is drawn
    return block(*args)


def in_chunks(function, width, *tensors):
    """function(*tensors), which makes `width` logits of each row, for few rows at a time: at most MAX_LOGITS exist.  In
    training, those of a chunk are computed again for its gradient."""
    size = max(MAX_LOGITS // width, 1)
    if len(tensors[0]) <= size:
        return function(*tensors)
    chunks = zip(*(x.split(size) for x in tensors), strict=True)
    return torch.cat([checkpoint(function, *xs, use_reentrant=False, preserve_rng_state=False) for xs in chunks])


def allow_recompilation():
    """More shapes than PyTorch would compile for: of several lengths, batch sizes and precisions."""
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 4096
