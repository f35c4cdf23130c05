"""The same GPT in PyTorch at its best, to be raced by benchmarks.gpu.

torch.compile, flash attention, fused AdamW, float32 masters and bfloat16 products.

Its shape is lib.config's with the parts off that only nanochat has: pre-norm blocks, rotary
embeddings, normed queries and keys, squared ReLU, an untied head.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel


def norm(x):
    return F.rms_norm(x, (x.size(-1),))


def rotate(x, cos, sin):
    """Rotary embedding over split halves of the last axis."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos + second * sin, second * cos - first * sin], dim=-1)


class Linear(nn.Linear):
    """Float32 weights, cast where they are used; faster than autocast, which widens the norms."""

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype))


class Block(nn.Module):
    """Attention and an mlp, each behind a norm and added to the stream."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = Linear(width, 3 * width, bias=False)
        self.out = Linear(width, width, bias=False)
        self.up = Linear(width, 4 * width, bias=False)
        self.down = Linear(4 * width, width, bias=False)

    def forward(self, x, cos, sin):
        batch, length, width = x.shape
        shape = batch, length, 3, self.heads, width // self.heads
        q, k, v = self.qkv(norm(x)).view(shape).permute(2, 0, 3, 1, 4)
        q, k = norm(rotate(q, cos, sin)), norm(rotate(k, cos, sin))
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(o.transpose(1, 2).reshape(batch, length, width))
        return x + self.down(F.relu(self.up(norm(x))).square())


class GPT(nn.Module):
    """Token ids and targets (B, T) to their mean cross-entropy."""

    def __init__(self, config):
        super().__init__()
        width, half = config.n_embd, config.head_dim // 2
        self.embed = nn.Embedding(config.vocab_size, width)
        self.blocks = nn.ModuleList(Block(width, config.n_head) for _ in range(config.n_layer))
        self.head = Linear(width, config.vocab_size, bias=False)
        frequency = config.rope_base ** (-torch.arange(half) / half)
        angle = torch.arange(config.sequence_len)[:, None] * frequency
        self.register_buffer("cos", angle.cos().bfloat16())
        self.register_buffer("sin", angle.sin().bfloat16())

    def forward(self, ids, targets):
        x = norm(self.embed(ids).bfloat16())
        for block in self.blocks:
            x = block(x, self.cos, self.sin)
        logits = self.head(norm(x)).float()
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def make_step(config):
    """(step() -> loss tensor, number of parameters) for a batch of random tokens on the GPU."""
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(0)
    with torch.device("cuda"):
        gpt = GPT(config)
        shape = config.accumulate, config.microbatch, config.sequence_len
        ids = torch.randint(0, config.vocab_size, shape)
    optimizer = torch.optim.AdamW(gpt.parameters(), lr=1e-3, betas=(0.9, 0.95), fused=True)
    compiled = torch.compile(gpt)

    def step():
        for batch in ids:
            with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION]):
                loss = compiled(batch, batch.roll(-1, 1)) / len(ids)
            loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    return step, sum(p.numel() for p in gpt.parameters())
