"""A sampler whose step is compiled: many samples come faster, after a minute or more.  Same numbers, up to rounding.

    model = CompiledColaDLM(ColaDLM.from_pretrained(folder))        # sample.py --compile

A compiled graph is for fixed shapes, so the cache is read in multiples of STATIC_LEN positions under a mask, and
batches shrink to powers of two only.
"""

import weakref

import torch

from cola import ColaDLM
from extras.kernels import allow_recompilation
from transformer import KVCache

STATIC_LEN = 256  # positions


class StaticKVCache(KVCache):
    """A cache that attention reads in multiples of STATIC_LEN positions, masked, so that most blocks look alike."""

    ragged = True

    def __init__(self, n_layer, batch_size, n_head, max_len, head_dim, device=None, dtype=None):
        max_len = -(-max_len // STATIC_LEN) * STATIC_LEN
        super().__init__(n_layer, batch_size, n_head, max_len, head_dim, device, dtype)
        self.memory = list(self.k), list(self.v)
        self.pin()

    def reach(self, end):
        return -(-end // STATIC_LEN) * STATIC_LEN

    def keep(self, rows):
        super().keep(rows)
        self.pin()

    def clear(self):
        """Forget everything, also rows that were dropped; returns itself."""
        self.k, self.v = map(list, self.memory)
        for tensor in self.k + self.v:
            tensor.zero_()  # a masked NaN would still be a NaN
        self.length = torch.zeros(len(self.k[0]), dtype=torch.long)
        self.pin()
        return self

    def pin(self):
        """Tell the compiler that the cache stays in its place, so that a CUDA graph may write to it."""
        for tensor in self.k + self.v:
            if tensor.is_cuda:  # elsewhere it would count as one of the weights
                torch._dynamo.mark_static_address(tensor)


class CompiledColaDLM(ColaDLM):
    """The same model, on the same weights, with a compiled step of the sampler.

    options: of torch.compile.  Without any: on CUDA one CUDA graph; on a CPU frozen weights, copies laid out as its
    products like them, so make another CompiledColaDLM when they have changed.  A new batch size or the next
    STATIC_LEN positions may compile again, once, which takes up to minutes."""

    def __init__(self, model, **options):
        super().__init__(model.vae, model.dit, model.tokenizer)
        self.train(model.training)
        torch._dynamo.reset()  # what was compiled before may hold other weights
        allow_recompilation()
        frozen = self.device.type == "cpu" and not options
        if frozen:  # with dynamic shapes oneDNN multiplies, in fp32 on an AMD CPU twice as fast as MKL
            options = dict(dynamic=True)
        elif self.device.type == "cuda" and not options:
            options = dict(mode="reduce-overhead")
        step = torch.compile(self.dit.forward, fullgraph=True, **dict(dynamic=False) | options)
        self.step = torch._inductor.config.patch(freezing=True)(step) if frozen else step
        self.spare = []  # caches of generations that are over: a CUDA graph is recorded for one place in memory

    def run_dit(self, *args):
        found = self.step(*args)  # a CUDA graph writes its next result to the same place
        return found.clone() if isinstance(found, torch.Tensor) else tuple(part.clone() for part in found)

    def prefill(self, *args, state=None, **options):
        new = super().prefill(*args, state=state, **options)
        if state is None:
            weakref.finalize(new, self.spare.append, new.dit_cache)
        return new

    def new_dit_cache(self, batch_size, max_len):
        c, weight = self.dit.config, self.dit.txt_in.proj.weight
        for i, cache in enumerate(self.spare):
            memory = cache.memory[0][0]  # (B, H, max_len, D)
            alike = memory.device == self.device and memory.dtype == weight.dtype and len(memory) == batch_size
            if alike and cache.max_len == cache.reach(max_len):
                return self.spare.pop(i).clear()
        self.spare.clear()
        return StaticKVCache(c.n_layer, batch_size, c.n_head, max_len, c.head_dim, self.device, weight.dtype)

    def kept_rows(self, going, n):
        """Batch sizes are powers of two, since each is compiled anew: some rows that are done stay."""
        size = 1 << (len(going) - 1).bit_length()
        going = going + [i for i in range(n) if i not in going][: size - len(going)]
        return super().kept_rows(going, n)
