"""
A GPT from scratch: packed preference pairs in, one log-prob per response token out.

    batch = pack([(prompt, [chosen, rejected]), ...])      # lists of token ids
    logps = model.token_logps(batch)                       # (N,) float32, one per response token
    batch.sum_by_response(logps)                           # (B, 2): log pi(y|x)

One Block covers GPT-2, Llama, Mistral and Qwen: each difference is a field of GPTConfig. A pair's
prompt is stored once and shared by its responses, and there is no padding between pairs:

    tokens     p p p p | c c c | r r r r |  next pair ...
    position   0 1 2 3 | 4 5 6 | 4 5 6 7 |          rejected also continues from the prompt
    branch     0 0 0 0 | 1 1 1 | 2 2 2 2 |

Left out: dropout (DPO compares log-probs, and dropout makes them noisy), sharding over GPUs.
Loading and saving are in weights.py, sampling is in sample.py.

Shapes: T tokens, N response tokens, B pairs, K responses each, H heads of width D, G key-value
heads, d embedding, V vocabulary.
"""
import math
from dataclasses import dataclass, fields

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

# --------------------------------------------------------------------------------------------------
# The packed batch


def visible(pair, branch, q, k):
    """The attention mask: True where query q may attend to key k, index tensors that
    broadcast."""
    return (pair[q] == pair[k]) & (k <= q) & ((branch[k] == 0) | (branch[k] == branch[q]))


@dataclass
class Batch:
    tokens: torch.Tensor     # (T,) int64
    positions: torch.Tensor  # (T,) int64, place within prompt + response
    pair: torch.Tensor       # (T,) int64, which pair; padding (GPU only) is below 0
    branch: torch.Tensor     # (T,) int64, 0 for the prompt, k for the k-th response
    scored: torch.Tensor     # (N,) int64, index whose output predicts a response token: the token
                             #      before it; for a response's first, the prompt's last token
    targets: torch.Tensor    # (N,) int64, the response token predicted there
    owner: torch.Tensor      # (N,) int64, pair * K + branch - 1: whose response it is
    lengths: torch.Tensor    # (B, K) int64, tokens of each response
    starts: list             # index of each pair's first token, then T
    mask: object = None      # for `attention`; None: pieces_mask(batch)

    def to(self, device):
        """The same batch on `device`; to a GPU without waiting, from pinned memory."""
        def move(t):
            cuda = torch.device(device).type == 'cuda'
            return t.pin_memory().to(device, non_blocking=True) if cuda else t.to(device)
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        return Batch(**{k: move(t) if torch.is_tensor(t) else t for k, t in moved.items()})

    def sum_by_response(self, logps):
        """Per-token numbers (N,) -> their float32 sum over each response (B, K): log pi(y|x)."""
        sums = torch.zeros(self.lengths.numel(), dtype=logps.dtype, device=logps.device)
        return sums.index_add(0, self.owner, logps).view_as(self.lengths)


def pack(pairs, pad_to=0):
    """[(prompt, [response, ...]), ...], token ids -> Batch on the CPU.

    Every pair has the same number of responses; prompts and responses have a token or more.
    `pad_to` fills T up to a fixed number, so that compiled code sees few shapes.
    """
    B, K = len(pairs), len(pairs[0][1])
    lengths = np.array([[len(r) for r in responses] for _, responses in pairs])        # (B, K)
    prompts = np.array([len(prompt) for prompt, _ in pairs])                           # (B,)
    sizes = np.concatenate([prompts[:, None], lengths], axis=1).reshape(-1)      # (B * (1+K),)
    assert sizes.min() > 0, 'prompts and responses need a token or more'
    begin = np.cumsum(sizes) - sizes                            # where each segment begins
    T = int(sizes.sum())
    pad = max(0, pad_to - T)

    segments = [segment for prompt, responses in pairs for segment in (prompt, *responses)]
    tokens = np.concatenate([np.asarray(s, dtype=np.int64) for s in segments])
    index = np.arange(T)
    within = index - np.repeat(begin, sizes)                    # 0, 1, 2, ... in each segment
    branch = np.repeat(np.tile(np.arange(1 + K), B), sizes)
    pair = np.repeat(np.repeat(np.arange(B), 1 + K), sizes)
    response = branch > 0
    first_of_prompt = begin[::1 + K]
    last_of_prompt = (first_of_prompt + prompts - 1)[pair]
    before = np.where(within == 0, last_of_prompt, index - 1)   # where a token is predicted

    def padded(a, value=0):
        return torch.from_numpy(np.concatenate([a, np.zeros(pad, dtype=np.int64) + value]))
    return Batch(
        tokens=padded(tokens),
        positions=padded(np.where(response, prompts[pair] + within, within)),
        pair=padded(pair, -1 - np.arange(pad)),                 # padding sees itself alone
        branch=padded(branch),
        scored=torch.from_numpy(before[response]),
        targets=torch.from_numpy(tokens[response]),
        owner=torch.from_numpy((pair * K + branch - 1)[response]),
        lengths=torch.from_numpy(lengths.astype(np.int64)),
        starts=first_of_prompt.tolist() + [T])


# --------------------------------------------------------------------------------------------------
# Attention


def attend(q, k, v, bias):                   # (..., H, T, D), (..., G, S, D) twice, (..., T, S)
    """softmax(q k^T / sqrt(D) + bias) v; the bias is 0 where the key is visible, else -inf."""
    if k.size(-3) < q.size(-3):                                 # several query heads share a key
        k, v = (t.repeat_interleave(q.size(-3) // k.size(-3), dim=-3) for t in (k, v))
    scores = (q / math.sqrt(q.size(-1))) @ k.transpose(-2, -1)  # (..., H, T, S)
    scores += bias.to(q.dtype)
    return scores.softmax(-1) @ v                               # (..., H, T, D)


def attention(q, k, v, mask):                # as attend: -> (..., H, T, D)
    """`mask` is a bias for `attend`; or the pieces of a packed batch (CPU); or a BlockMask
    (GPU)."""
    if torch.is_tensor(mask):
        return attend(q, k, v, mask)
    if isinstance(mask, list):
        pieces = [t.split([len(bias) for bias in mask], dim=-2) for t in (q, k, v)]
        return torch.cat([attend(*piece) for piece in zip(*pieces, mask)], dim=-2)
    from torch.nn.attention.flex_attention import flex_attention    # slow to load, for GPUs only
    return flex_attention(q[None], k[None], v[None], block_mask=mask, enable_gqa=True)[0]


def bias_of(mask):
    """A boolean mask -> what `attend` adds to the scores."""
    return torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, -math.inf)


def pieces_mask(batch, piece=128):
    """`visible` as a block-diagonal mask: a list of (t, t) biases, each for whole pairs of about
    `piece` tokens together. Nothing is computed between pieces."""
    cuts, T = [0], batch.tokens.numel()
    starts = batch.starts + [T] * (batch.starts[-1] < T)        # padding is one more piece
    for start, stop in zip(starts, starts[1:]):
        if stop - cuts[-1] > piece and start > cuts[-1]:
            cuts.append(start)
    index = [torch.arange(a, b, device=batch.tokens.device) for a, b in zip(cuts, cuts[1:] + [T])]
    return [bias_of(visible(batch.pair, batch.branch, i[:, None], i[None, :])) for i in index]


def block_mask(batch):
    """`visible` as a BlockMask for FlexAttention, which skips blocks with nothing visible."""
    from torch.nn.attention.flex_attention import create_block_mask
    pair, branch, T = batch.pair, batch.branch, batch.tokens.numel()
    # compiled, it does not hold a T x T mask in memory
    return torch.compile(create_block_mask, dynamic=False)(
        lambda b, h, q, k: visible(pair, branch, q, k), None, None, T, T, device=pair.device.type)


# --------------------------------------------------------------------------------------------------
# The head: hidden states to log-probs


def plain_logps(h, weight, targets):         # (N, d), (V, d), (N,) -> (N,)
    """The definition, log softmax(h W^T)[target]: the slow twin of ChunkedLogps."""
    return (h @ weight.t()).float().log_softmax(-1).gather(1, targets[:, None])[:, 0]


class ChunkedLogps(torch.autograd.Function):
    """plain_logps, a chunk of rows at a time: all N rows of float32 logits never exist at once.

    The gradient of a row's log-prob by its logits is one-hot - softmax. The forward pass keeps
    softmax - one-hot, (N, V) in the precision of the products that use it (100 KB a token for
    GPT-2 in bf16): computing the logits a second time would cost a tenth of a step.
    """

    @staticmethod
    def product(a, b):
        """a b in float32 or better. Rounding GPT-2's logits (near -100) to bf16 is wrong by 0.25:
        a GPU sums bf16 products in float32; a CPU has no such product, and its factors stay
        float32."""
        if a.is_cuda and a.dtype == torch.bfloat16:
            return torch.mm(a, b, out_dtype=torch.float32)
        return torch.mm(a, b).to(torch.promote_types(a.dtype, torch.float32))

    @staticmethod
    def forward(ctx, h, weight, targets, needs_grad):  # (N, d), (V, d), (N,), bool -> (N,)
        device = h.device.type
        low = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else h.dtype
        dtype = low if h.is_cuda else torch.promote_types(low, torch.float32)
        ctx.dtypes = h.dtype, weight.dtype
        h, weight, N = h.to(dtype), weight.to(dtype), len(h)
        logps = h.new_empty(N, dtype=torch.promote_types(dtype, torch.float32))
        error = h.new_empty(N, len(weight), dtype=low) if needs_grad else None
        size = 2**27 if h.is_cuda else 2**23                    # logits: 512 MiB on a GPU, else 32
        rows = max(1, size // len(weight))
        with torch.autocast(device, enabled=False):
            for i in range(0, N, rows):
                chunk = slice(i, i + rows)
                logits = ChunkedLogps.product(h[chunk], weight.t())                    # (rows, V)
                total = logits.logsumexp(dim=1, keepdim=True)
                logps[chunk] = (logits.gather(1, targets[chunk, None]) - total)[:, 0]
                if needs_grad:
                    error[chunk] = logits.sub_(total).exp_()                           # softmax
                del logits                                      # before the next chunk's
        if needs_grad:                        # at the target p - 1 = expm1(log p), exact near p = 1
            error[torch.arange(N, device=h.device), targets] = torch.expm1(logps).to(low)
        ctx.save_for_backward(error, h, weight)
        return logps

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):                                    # (N,)
        error, h, weight = ctx.saved_tensors
        neg_grad, low = -grad[:, None], error.dtype
        grad_h = grad_weight = None
        with torch.autocast(h.device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                grad_h = (neg_grad * (error @ weight.to(low))).to(ctx.dtypes[0])       # (N, d)
            if ctx.needs_input_grad[1]:
                grad_weight = ChunkedLogps.product(error.t(), (neg_grad * h).to(low))  # (V, d)
                grad_weight = grad_weight.to(ctx.dtypes[1])
        return grad_h, grad_weight, None, None


# --------------------------------------------------------------------------------------------------
# The model


@dataclass
class GPTConfig:
    block_size: int = 1024      # longest sequence, in tokens
    vocab_size: int = 50257     # rows of the embedding; may exceed the tokenizer's vocabulary
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    # differences of newer models from GPT-2; 0 means the default in brackets
    n_kv_head: int = 0          # grouped-query attention [n_head]
    head_dim: int = 0           # [n_embd / n_head]
    n_inner: int = 0            # width of the MLP [4 n_embd]
    norm: str = 'layer'         # or 'rms'
    norm_eps: float = 1e-5
    gated: bool = False         # MLP: down(silu(gate x) * (up x)) in place of down(gelu(up x))
    bias: str = 'all'           # which linear maps have one: 'all', 'qkv' or 'none'
    qk_norm: bool = False       # RMS norm of each head's query and key
    rope_theta: float = 0.0     # rotary positions of that base [learned positions]
    rope_scaling: tuple = ()    # Llama 3's: (factor, low_freq_factor, high_freq_factor, context)
    tied: bool = True           # the embedding is also the vocabulary projection
    model_type: str = 'gpt2'    # transformers' name of the family; only weights.py looks at it

    def __post_init__(self):
        self.n_kv_head = self.n_kv_head or self.n_head
        self.head_dim = self.head_dim or self.n_embd // self.n_head
        self.n_inner = self.n_inner or 4 * self.n_embd
        assert self.norm in ('layer', 'rms'), f"norm is {self.norm!r}, not 'layer' or 'rms'"
        assert self.bias in ('all', 'qkv', 'none'), f"bias is {self.bias!r}, not all, qkv or none"
        assert self.n_head % self.n_kv_head == 0, 'n_kv_head does not divide n_head'
        assert self.head_dim % 2 == 0 or not self.rope_theta, 'rotary positions need an even width'


def make_norm(width, config):
    norm = nn.RMSNorm if config.norm == 'rms' else nn.LayerNorm
    return norm(width, eps=config.norm_eps)


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        c, d = config, config.n_embd
        self.heads = [c.n_head, c.n_kv_head, c.n_kv_head]       # of queries, keys, values
        self.ln_1 = make_norm(d, c)
        self.qkv = nn.Linear(d, sum(self.heads) * c.head_dim, bias=c.bias != 'none')
        self.q_norm = make_norm(c.head_dim, c) if c.qk_norm else None
        self.k_norm = make_norm(c.head_dim, c) if c.qk_norm else None
        self.attn_out = nn.Linear(c.n_head * c.head_dim, d, bias=c.bias == 'all')
        self.ln_2 = make_norm(d, c)
        self.gated = c.gated
        self.up = nn.Linear(d, (1 + c.gated) * c.n_inner, bias=c.bias == 'all')     # gate, then up
        self.down = nn.Linear(c.n_inner, d, bias=c.bias == 'all')

    def forward(self, x, mask, rotation=None, cache=None):      # (..., T, d) -> (..., T, d)
        heads = self.qkv(self.ln_1(x)).unflatten(-1, (sum(self.heads), -1))    # (..., T, H+2G, D)
        q, k, v = (t.transpose(-3, -2) for t in heads.split(self.heads, dim=-2))  # (..., H, T, D)
        if self.q_norm is not None:                             # in float32, under autocast, too
            q, k = self.q_norm(q.float()).to(q.dtype), self.k_norm(k.float()).to(k.dtype)
        if rotation is not None:
            q, k = rotate(q, *rotation), rotate(k, *rotation)
        if cache is not None:                                   # sampling: see sample.py
            k, v = cache.append(k, v)
        y = attention(q, k, v, mask).transpose(-3, -2).flatten(-2)                  # (..., T, H*D)
        x = x + self.attn_out(y)
        return x + self.down(self.activation(self.up(self.ln_2(x))))

    def activation(self, x):                 # (..., n_inner, or twice that) -> (..., n_inner)
        if self.gated:
            gate, up = x.chunk(2, dim=-1)
            return F.silu(gate) * up
        return F.gelu(x, approximate='tanh')


def rotary_angles(positions, config):        # (..., T) -> two of (..., 1, T, D/2)
    """cos and sin of position * frequency (Su et al. 2021, arXiv:2104.09864), the same for all
    heads.

    Llama 3's scaling divides frequencies by `factor` where a wavelength exceeds context / low,
    leaves them where it is below context / high, and interpolates in between.
    """
    D = config.head_dim
    exponent = torch.arange(0, D, 2, device=positions.device).float() / D
    frequency = 1.0 / config.rope_theta ** exponent             # (D/2,)
    if config.rope_scaling:
        factor, low, high, context = config.rope_scaling
        turns = context * frequency / (2 * math.pi)             # within the original context
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        frequency = keep * frequency + (1 - keep) * frequency / factor
    angles = positions[..., None, :, None].float() * frequency
    return angles.cos(), angles.sin()


def rotate(x, cos, sin):                     # (..., H, T, D) and (..., 1, T, D/2) twice
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        c = self.config = config
        self.wte = nn.Embedding(c.vocab_size, c.n_embd)
        self.wpe = None if c.rope_theta else nn.Embedding(c.block_size, c.n_embd)
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.n_layer))
        self.ln_f = make_norm(c.n_embd, c)
        self.lm_head = None if c.tied else nn.Linear(c.n_embd, c.vocab_size, bias=False)
        for name, p in self.named_parameters():                 # GPT-2's initialisation
            if p.dim() == 2:
                residual = name.endswith(('attn_out.weight', 'down.weight'))
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * c.n_layer) if residual else 0.02)
            elif name.endswith('bias'):
                nn.init.zeros_(p)

    @property
    def head_weight(self):                   # (V, d)
        return self.wte.weight if self.lm_head is None else self.lm_head.weight

    @property
    def device(self):
        return self.wte.weight.device

    def hidden(self, tokens, positions, mask, caches=None):     # (..., T) -> (..., T, d)
        """The output after the last norm. `caches`: one per block, where sampling keeps keys."""
        x = self.wte(tokens)
        x = x if self.wpe is None else x + self.wpe(positions)
        rotation = None if self.wpe is not None else rotary_angles(positions, self.config)
        for i, block in enumerate(self.blocks):
            x = block(x, mask, rotation, None if caches is None else caches[i])
        return self.ln_f(x)

    def forward(self, tokens):               # (B, T) -> (B, T, V)
        """Plain causal logits: the slow twin that the tests compare the packed path with."""
        positions = torch.arange(tokens.size(1), device=tokens.device)
        mask = bias_of(positions <= positions[:, None])
        return F.linear(self.hidden(tokens, positions, mask), self.head_weight)

    def packed_hidden(self, tokens, positions, mask):           # (T,) -> (T, d); may be compiled
        return self.hidden(tokens, positions, mask)

    def batch_hidden(self, batch):           # -> (T, d)
        mask = pieces_mask(batch) if batch.mask is None else batch.mask
        return self.packed_hidden(batch.tokens, batch.positions, mask)

    def token_logps(self, batch):
        """log pi(y_t | x, y_<t) of each response token of a packed batch: (N,) float32, in the
        order of `batch.targets`. Prompt tokens have none. `batch.sum_by_response` adds them
        up."""
        x = self.batch_hidden(batch)[batch.scored]                                     # (N, d)
        needs_grad = torch.is_grad_enabled()
        return ChunkedLogps.apply(x, self.head_weight, batch.targets, needs_grad)      # (N,)
