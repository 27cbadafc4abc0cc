"""
GPT-2 from scratch: packed preference pairs in, one log-probability per response token out.

    batch = pack([(prompt, [chosen, rejected]), ...])        # lists of token ids
    logps = GPT.from_pretrained('gpt2').token_logps(batch)   # (N,) float32, one per response token
    batch.sum_by_response(logps)                             # (B, 2): log pi(y|x)

A pair's prompt stands once, and its responses follow it, with no padding anywhere:

    tokens     p p p p | c c c | r r r r |  next pair ...
    position   0 1 2 3 | 4 5 6 | 4 5 6 7 |          rejected takes up where the prompt ended
    branch     0 0 0 0 | 1 1 1 | 2 2 2 2 |

From the command line, any model that `from_pretrained` knows becomes a folder for transformers:

    python model.py out/dpo_gpt2 my-model

Left out: dropout (it makes a policy's log-probs noisy, and DPO compares log-probs), biases one could turn
off, sharding over GPUs, and every architecture but GPT-2's.

Shapes: T tokens, N response tokens, B pairs, K responses each, H heads, D = d/H, d embedding, V vocabulary.
"""
import contextlib
import json
import math
import os
import sys
import warnings
import zipfile
from dataclasses import asdict, dataclass

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from prepare import InputError, first_line, short

# ------------------------------------------------------------------------------------------------------------
# The packed batch


def visible(pair, branch, q, k):
    """The attention mask: may the query at q see the key at k? (Indices of any shapes that broadcast.)"""
    return (pair[q] == pair[k]) & (k <= q) & ((branch[k] == 0) | (branch[k] == branch[q]))


@dataclass
class Batch:
    tokens: torch.Tensor     # (T,) int64
    positions: torch.Tensor  # (T,) int64, where in its own sequence a token stands
    pair: torch.Tensor       # (T,) int64, which pair a token is of; padding (GPU only): below 0
    branch: torch.Tensor     # (T,) int64, 0 for the prompt, k for the k-th response
    scored: torch.Tensor     # (N,) int64, index whose output predicts a response token: the one before it, or
                             #             the prompt's last for the first token of every response
    targets: torch.Tensor    # (N,) int64, the response token predicted there
    owner: torch.Tensor      # (N,) int64, pair * K + branch - 1: which response a response token belongs to
    lengths: torch.Tensor    # (B, K) int64, tokens of each response
    ends: torch.Tensor       # (B, K) int64, where each response's last token is
    starts: list             # first token of each pair, then T: how a CPU cuts the attention into pieces
    mask: object = None      # what `attention` takes; `pieces_mask(batch)` where nothing else was put here

    def to(self, device):
        """The same batch on `device`."""
        names = ('tokens', 'positions', 'pair', 'branch', 'scored', 'targets', 'owner', 'lengths', 'ends')
        return Batch(**{name: send(getattr(self, name), device) for name in names}, starts=self.starts)

    def sum_by_response(self, logps):
        """Per-token numbers (N,) -> their sum over each response (B, K), in float32: log pi(y|x)."""
        total = torch.zeros(self.lengths.numel(), dtype=logps.dtype, device=logps.device)
        return total.index_add(0, self.owner, logps).view_as(self.lengths)


def send(t, device):
    """A tensor or an array of the host's to `device`; from pinned memory the copy runs beside its work."""
    t = torch.as_tensor(t)
    cuda = torch.device(device).type == 'cuda'
    return t.pin_memory().to(device, non_blocking=True) if cuda else t.to(device)


def pack(pairs, pad_to=0):
    """[(prompt, [response, ...]), ...], sequences of token ids -> Batch on the CPU.

    Every prompt needs a token or more, and every pair the same number of responses, each of a token or more.
    `pad_to` fills T up to a fixed number, so that compiled code sees one shape.
    """
    K = len(pairs[0][1])
    lengths = np.array([[len(r) for r in responses] for _, responses in pairs], dtype=np.int64)   # (B, K)
    prompts = np.array([len(prompt) for prompt, _ in pairs], dtype=np.int64)                      # (B,)
    if lengths.shape != (len(pairs), K) or lengths.min() < 1 or prompts.min() < 1:
        raise ValueError('a pair needs a prompt and responses of one token or more')
    sizes = np.concatenate([prompts[:, None], lengths], axis=1)         # (B, 1+K): prompt, responses
    size = sizes.reshape(-1)
    begin = np.concatenate([[0], np.cumsum(size)])[:-1]                 # where each segment begins
    T = int(size.sum())
    pad = max(0, pad_to - T)

    segments = [segment for prompt, responses in pairs for segment in (prompt, *responses)]
    tokens = np.concatenate([np.asarray(s, dtype=np.int64) for s in segments])
    within = np.arange(T) - np.repeat(begin, size)                      # 0, 1, 2, ... inside each segment
    branch = np.repeat(np.tile(np.arange(1 + K), len(pairs)), size)
    prompt_length = np.repeat(np.repeat(prompts, 1 + K), size)
    response = branch > 0
    first = response & (within == 0)
    prompt_end = np.repeat(np.repeat(begin[::1 + K] + prompts - 1, 1 + K), size)
    index = np.arange(T)
    pair = np.repeat(np.repeat(np.arange(len(pairs)), 1 + K), size)

    def filled(a, value=0):
        return torch.from_numpy(np.concatenate([a, np.zeros(pad, dtype=np.int64) + value]))
    return Batch(
        tokens=filled(tokens),
        positions=filled(np.where(response, prompt_length + within, within)),
        pair=filled(pair, -1 - np.arange(pad)),
        branch=filled(branch),
        scored=torch.from_numpy(np.where(first, prompt_end, index - 1)[response]),
        targets=torch.from_numpy(tokens[response]),
        owner=torch.from_numpy((pair * K + branch - 1)[response]),
        lengths=torch.from_numpy(lengths),
        ends=torch.from_numpy((begin + size - 1).reshape(-1, 1 + K)[:, 1:].copy()),
        starts=begin[::1 + K].tolist() + [T],
    )


# ------------------------------------------------------------------------------------------------------------
# Attention: one function; what a query sees comes in one of four forms


def pieces_mask(batch, piece=128):
    """A packed batch's mask as [(start, stop, (t, t): 0 where visible, else -inf), ...], pair by pair, short
    ones together up to `piece` tokens: nothing is computed between pieces. For a CPU, and the plain way."""
    cuts, T = [0], batch.tokens.numel()
    starts = batch.starts + [T] * (batch.starts[-1] < T)        # padding, if there is any, is one more
    for start, stop in zip(starts, starts[1:]):
        if stop - cuts[-1] > piece and start > cuts[-1]:
            cuts.append(start)
    cuts.append(T)
    index = torch.arange(cuts[-1], device=batch.tokens.device)
    bias = []
    for start, stop in zip(cuts, cuts[1:]):
        seen = visible(batch.pair, batch.branch, index[start:stop, None], index[None, start:stop])
        bias.append((start, stop, torch.zeros(seen.shape, device=seen.device).masked_fill(~seen, -math.inf)))
    return bias


def block_mask(batch, size=128):
    """The same mask for FlexAttention, which passes over blocks with nothing visible: compiled code on a GPU.

    Pairs lie in order, so a block of queries can see a block of keys only where their ranges of pairs meet
    and the keys' is not the later: (T/128)^2 entries, where asking `visible` for each two tokens takes T^2.
    """
    from torch.nn.attention.flex_attention import BlockMask
    pair, branch, T = batch.pair, batch.branch, batch.tokens.numel()
    order = torch.where(pair < 0, T - pair, pair)                        # padding, at the end, counts on
    order = F.pad(order, (0, -T % size), value=3 * T).view(-1, size)
    first, last = order[:, 0], order[:, -1]
    index = torch.arange(len(order), device=pair.device)
    meet = (first[:, None] <= last) & (first <= last[:, None]) & (index <= index[:, None])  # (queries, keys)
    number, which = meet.sum(1, dtype=torch.int32), meet.int().argsort(dim=1, descending=True, stable=True)
    return BlockMask.from_kv_blocks(
        number[None, None], which[None, None].int(), BLOCK_SIZE=size, seq_lengths=(T, T),
        mask_mod=lambda b, h, q, k: visible(pair, branch, q, k))


def attention(q, k, v, mask):                # each (..., H, T, D) -> (..., H, T, D)
    if mask is None:                                                             # plain causal
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    if torch.is_tensor(mask) and q.size(-2) == 1 and q.device.type == 'cpu' and q.dtype == torch.float32:
        # generation on a CPU: two plain products are 4 times faster than the fused kernel, but not through
        # oneDNN, which compiles one for each number of keys
        bias = torch.zeros(mask.shape).masked_fill(~mask, -math.inf).expand(-1, q.size(1), -1, -1)
        bias, qs, ks, vs = (t.flatten(0, 1) for t in (bias, q, k.transpose(-2, -1), v))    # each (B*H, ...)
        was = torch.get_float32_matmul_precision()
        try:
            torch.set_float32_matmul_precision('highest')
            scores = torch.baddbmm(bias, qs, ks, alpha=1 / math.sqrt(q.size(-1)))          # (B*H, 1, keys)
            return torch.bmm(scores.softmax(-1), vs).view(q.shape)
        finally:
            torch.set_float32_matmul_precision(was)
    if torch.is_tensor(mask):                                                    # a boolean mask: generation
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    if isinstance(mask, list):                                                   # pieces of a packed batch
        out, sizes = [], [stop - start for start, stop, _ in mask]
        for qi, ki, vi, (_, _, bias) in zip(*(t.split(sizes, dim=1) for t in (q, k, v)), mask):
            bias = bias.to(q.dtype)
            if q.device.type == 'cpu' and (len(bias) <= 256 or q.dtype == torch.bfloat16):
                # a CPU's fused attention has a backward 2 to 3 times slower than these two lines; but they
                # keep a (H, t, t) for it, and in float32 and for long pieces are no faster
                scores = torch.baddbmm(bias.expand(len(qi), -1, -1), qi, ki.transpose(-2, -1),
                                       alpha=1 / math.sqrt(q.size(-1)))                     # (H, t, t)
                out.append(scores.softmax(-1) @ vi)      # in bf16, too, exponentials and sums are float32
            else:
                out.append(F.scaled_dot_product_attention(qi[None], ki[None], vi[None], attn_mask=bias)[0])
        return torch.cat(out, dim=1)
    from torch.nn.attention.flex_attention import flex_attention                 # a BlockMask
    return flex_attention(q[None], k[None], v[None], block_mask=mask)[0]


# ------------------------------------------------------------------------------------------------------------
# The vocabulary projection


def reduce_logits(logits, targets, kept):    # (rows, V), (rows,), dtype or None
    """A chunk's log-probs (rows,), and its softmax (rows, V) of the dtype `kept`, or None."""
    total = logits.logsumexp(dim=1, keepdim=True)
    logps = (logits.gather(1, targets[:, None]) - total)[:, 0]
    return logps, None if kept is None else (logits - total).exp_().to(kept)


class ChunkedLogps(torch.autograd.Function):
    """log softmax(h W^T)[target] at N positions, a chunk of rows at a time.

    The float32 logits of all rows never exist at once: each chunk's are reduced to one number per row. Where
    `learns`, what the gradient needs of them is kept, softmax - one-hot (N, V), in the precision of the
    products that take it: for GPT-2 100 KB a response token in bf16, twice that in float32, and no more of
    them than tokens_per_batch. Made anew for the backward pass it would cost a tenth of a step instead.
    """

    @staticmethod
    def chunks(h, weight):
        rows = max(1, (2**27 if h.is_cuda else 2**23) // weight.size(0))  # logits: 512 MiB on a GPU, else 32
        return [slice(i, i + rows) for i in range(0, h.size(0), rows)]

    @staticmethod
    def product(a, b):
        """a b in float32 or more. bf16 factors with float32 sums: on a GPU; a CPU rounds the sums to bf16."""
        if a.is_cuda and a.dtype == torch.bfloat16:
            return torch.mm(a, b, out_dtype=torch.float32)
        return torch.mm(a, b).to(torch.promote_types(a.dtype, torch.float32))

    @staticmethod
    def even(weight, dtype):                 # (V, d) -> (V or more, d)
        """W as `dtype`; for a GPU, whose fast products want even shapes, with zeros to a multiple of 64."""
        weight = weight.to(dtype)
        return F.pad(weight, (0, 0, 0, -len(weight) % 64)) if weight.is_cuda else weight

    @staticmethod
    def forward(ctx, h, weight, targets, learns, reduce):    # (N, d), (V, d), (N,), bool, function -> (N,)
        # rounding GPT-2's logits (near -100) to bf16 would be wrong by 0.25: where bf16 factors cannot be
        # summed into float32 logits, the factors are float32 too
        device, V = h.device.type, weight.size(0)
        low = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else h.dtype
        dtype = low if h.is_cuda else torch.promote_types(low, torch.float32)
        ctx.V, ctx.dtypes = V, (h.dtype, weight.dtype)
        h, w = h.to(dtype), ChunkedLogps.even(weight, dtype)
        out = h.new_empty(h.size(0), dtype=torch.promote_types(dtype, torch.float32))
        error = h.new_empty(h.size(0), w.size(0), dtype=low) if learns else None
        with torch.autocast(device, enabled=False):
            for c in ChunkedLogps.chunks(h, w):
                logits = ChunkedLogps.product(h[c], w.t())[:, :V]                           # (rows, V)
                out[c], probs = reduce(logits, targets[c], low if learns else None)
                if learns:
                    error[c, :V] = probs
                del logits, probs                              # before the next chunk's
        if learns:                                         # at each target p - 1, exact where p is nearly 1
            error[torch.arange(len(targets), device=h.device), targets] = torch.expm1(out).to(low)
            error[:, V:] = 0
        ctx.save_for_backward(error, h, w)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):                             # (N,)
        # d log p / d logits = one-hot - softmax, times the row's upstream gradient
        error, h, w = ctx.saved_tensors
        h_dtype, w_dtype = ctx.dtypes
        minus, low, grad_h, grad_w = -grad[:, None], error.dtype, None, None
        with torch.autocast(h.device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                grad_h = (minus * (error @ w.to(low))).to(h_dtype)                  # (N, d)
            if ctx.needs_input_grad[1]:
                grad_w = ChunkedLogps.product(error.t(), (minus * h).to(low))       # (V or more, d)
                grad_w = grad_w[:ctx.V].to(w_dtype)                                 # (V, d)
        return grad_h, grad_w, None, None, None


# ------------------------------------------------------------------------------------------------------------
# The model


@dataclass
class GPTConfig:
    block_size: int = 1024   # longest sequence, in tokens
    vocab_size: int = 50257  # rows of the embedding; may be padded beyond the tokenizer's
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    eos_token_id: int = 50256  # ends every response; -1: none does

    def __post_init__(self):
        for name, value in asdict(self).items():
            if type(value) is not int or (value < 1 and name != 'eos_token_id'):
                raise InputError(f'{name} is {value!r}, not a number of 1 or more')
        if self.n_embd % self.n_head:
            raise InputError(f'n_head: {self.n_head} does not divide n_embd {self.n_embd}')
        if self.eos_token_id >= self.vocab_size:
            raise InputError(f'eos_token_id: {self.eos_token_id} is not in a vocabulary of {self.vocab_size}')


SIZES = {  # the hub's names for the published models
    'distilgpt2': dict(n_layer=6, n_head=12, n_embd=768),
    'gpt2': dict(n_layer=12, n_head=12, n_embd=768),
    'gpt2-medium': dict(n_layer=24, n_head=16, n_embd=1024),
    'gpt2-large': dict(n_layer=36, n_head=20, n_embd=1280),
    'gpt2-xl': dict(n_layer=48, n_head=25, n_embd=1600),
}


def linear(layer, x):                        # (..., T, in) -> (..., T, out)
    if x.size(-2) == 1 and len(x) <= 64 and x.device.type == 'cpu':
        # generation, one token of each of a few sequences: this way round a CPU reads the weights faster
        return (layer.weight @ x.squeeze(-2).t()).t().unsqueeze(-2) + layer.bias
    return layer(x)


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        d = config.n_embd
        self.n_head = config.n_head
        self.ln_1 = nn.LayerNorm(d)
        self.c_attn = nn.Linear(d, 3 * d)    # queries, keys and values of all heads at once
        self.attn_proj = nn.Linear(d, d)
        self.ln_2 = nn.LayerNorm(d)
        self.c_fc = nn.Linear(d, 4 * d)
        self.mlp_proj = nn.Linear(4 * d, d)

    def forward(self, x, mask, cache=None):  # (..., T, d) -> (..., T, d)
        heads = linear(self.c_attn, self.ln_1(x)).unflatten(-1, (3, self.n_head, -1))  # (..., T, 3, H, D)
        q, k, v = (t.transpose(-3, -2) for t in heads.unbind(-3))                   # each (..., H, T, D)
        if cache is not None:
            k, v = cache.append(k, v)
        y = attention(q, k, v, mask).transpose(-3, -2).flatten(-2)                           # (..., T, d)
        x = x + linear(self.attn_proj, y)
        return x + linear(self.mlp_proj, F.gelu(linear(self.c_fc, self.ln_2(x)), approximate='tanh'))


class GPT(nn.Module):
    reduce_logits = staticmethod(reduce_logits)    # compiled with the rest, where anything is

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)   # also the vocabulary projection
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)
        for name, p in self.named_parameters():                     # GPT-2's initialisation
            if p.dim() == 2:
                residual = name.endswith('proj.weight')
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_layer) if residual else 0.02)
            elif name.endswith('bias'):
                nn.init.zeros_(p)

    @property
    def device(self):
        return self.wte.weight.device

    def num_params(self):
        return sum(p.numel() for p in self.parameters())

    def hidden(self, tokens, positions, mask, caches=None):
        """The transformer's output after the last layer norm: (..., T) -> (..., T, d)."""
        x = self.wte(tokens) + self.wpe(positions)
        for i, block in enumerate(self.blocks):
            x = block(x, mask, None if caches is None else caches[i])
        return self.ln_f(x)

    def forward(self, tokens):
        """Plain causal logits: (B, T) -> (B, T, V). Not fast: the tests compare the fast paths with it."""
        x = self.hidden(tokens, torch.arange(tokens.size(1), device=tokens.device), None)
        return F.linear(x, self.wte.weight)

    def token_logps(self, batch):
        """log pi(y_t | x, y_<t) of each response token of a packed batch on the model's device: (N,) float32,
        in the order of `batch.targets`; `batch.owner` says whose each is. Prompt tokens have none."""
        x = self.packed_hidden(batch)[batch.scored]                                            # (N, d)
        learns = torch.is_grad_enabled()
        return ChunkedLogps.apply(x, self.wte.weight, batch.targets, learns, self.reduce_logits)  # (N,)

    def packed_hidden(self, batch):
        """The transformer's output for a packed batch: (T, d)."""
        mask = pieces_mask(batch) if batch.mask is None else batch.mask     # made anew, not kept: it is large
        return self.hidden(batch.tokens, batch.positions, mask)

    def score_responses(self, batch):
        """log pi(y|x) of every response of a packed batch: (B, K) float32. (RewardModel's: its reward.)"""
        return batch.sum_by_response(self.token_logps(batch))

    @classmethod
    def from_pretrained(cls, name):
        """A GPT from a hub name (gpt2, gpt2-medium, -large, -xl, distilgpt2, or owner/model of a GPT-2), a
        folder of transformers', a run's `out_dir` (its ckpt.pt), or a checkpoint file like out/run/best.pt.
        float32, on the CPU. Raises InputError, one line, where it is none of these or does not fit GPT-2."""
        path, names = find_pretrained(name), their_name
        if os.path.isdir(path):
            settings, tensors = load_folder(path)
        else:
            checkpoint, names = load_checkpoint(path), lambda name: (name, False)
            settings, tensors = checkpoint['model_config'], checkpoint['model']
        try:
            config = GPTConfig(**settings)
            if config.n_layer > len(tensors):        # a billion of them would take as long to make as to miss
                raise InputError(f'n_layer is {config.n_layer}, and there are {len(tensors)} tensors')
            with torch.device('meta'):               # no memory or time for weights about to be replaced
                model = cls(config)
        except (InputError, TypeError, RuntimeError, OverflowError) as e:    # settings that GPTConfig does
            raise InputError(f'{path}: {" ".join(str(e).split())[:200]}')    # not have; sizes beyond 64 bits
        state = {}
        for ours, p in model.named_parameters():
            theirs, transposed = names(ours)
            t, shape = tensors.pop(theirs, None), tuple(p.shape[::-1] if transposed else p.shape)
            if not torch.is_tensor(t) or not t.is_floating_point() or t.layout != torch.strided or t.is_meta:
                raise InputError(f'{path}: no tensor {theirs}')
            if tuple(t.shape) != shape:
                raise InputError(f'{path}: tensor {theirs} has shape {tuple(t.shape)}, expected {shape}')
            state[ours] = (t.t() if transposed else t).to(torch.float32, copy=True).contiguous()
        if tensors:
            surplus = ' '.join(min(map(str, tensors)).split())[:200]
            raise InputError(f'{path}: tensor {surplus} is not one of GPT-2\'s')
        model.load_state_dict(state, assign=True)
        return model

    def save_pretrained(self, folder):
        """Write config.json and model.safetensors into `folder`: what transformers.GPT2LMHeadModel loads."""
        from safetensors import SafetensorError
        from safetensors.torch import save_file
        c, end = self.config, self.config.eos_token_id if self.config.eos_token_id >= 0 else None
        tensors = {}
        for name, p in self.state_dict().items():
            their, transposed = their_name(name)
            p = (p.t() if transposed else p).detach()
            tensors['transformer.' + their] = p.to('cpu', torch.float32).contiguous()
        settings = dict(architectures=['GPT2LMHeadModel'], resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
                        model_type='gpt2', activation_function='gelu_new', n_positions=c.block_size,
                        n_ctx=c.block_size, vocab_size=c.vocab_size, n_embd=c.n_embd,
                        n_layer=c.n_layer, n_head=c.n_head, layer_norm_epsilon=1e-5,
                        initializer_range=0.02, bos_token_id=end, eos_token_id=end,
                        tie_word_embeddings=True, torch_dtype='float32')
        paths = [os.path.join(folder, name) for name in ('model.safetensors', 'config.json')]
        try:
            os.makedirs(folder, exist_ok=True)
            save_file(tensors, paths[0] + '.tmp', metadata={'format': 'pt'})
            with open(paths[1] + '.tmp', 'w', encoding='utf-8') as f:
                json.dump(settings, f, indent=2)
            for path in paths:                               # whole files only, even where this is cut short
                os.replace(path + '.tmp', path)
        except (OSError, SafetensorError) as e:
            raise InputError(f'{folder}: cannot be written ({first_line(e)})')
        finally:
            for path in paths:
                with contextlib.suppress(OSError):
                    os.remove(path + '.tmp')

    @torch.no_grad()
    def generate(self, prompts, max_new_tokens, temperature=1.0, top_k=0, top_p=1.0, seed=0):
        """Responses to `prompts`, lists of token ids of any lengths: a list of lists of new token ids.

        A response ends with the end-of-text token, or without one where `max_new_tokens` or the context ran
        out. temperature 0 takes the likeliest token; top_k (0: off) and top_p (1: off) cut the distribution's
        tail. Token t of row i is drawn with the seed's t-th row of uniform numbers, whatever other rows do,
        so two models asked with one seed differ only where their distributions do.
        """
        block_size, device = self.config.block_size, self.device
        if temperature < 0:
            raise InputError(f'temperature: {temperature} is less than 0')
        if max_new_tokens < 1:
            raise InputError(f'max_new_tokens: {max_new_tokens} is less than 1')
        if not prompts or min(map(len, prompts)) < 1 or max(map(len, prompts)) >= block_size:
            raise InputError(f'a prompt to generate from needs 1 to {block_size - 1} tokens')
        B, longest = len(prompts), max(map(len, prompts))
        limit = min(longest + max_new_tokens, block_size)
        rng = torch.Generator().manual_seed(seed)
        caches = [Cache(B, limit, self.config, self.wte.weight) for _ in self.blocks]

        # the prompts, packed like a training batch, each with a response of one token that is not there yet:
        # its slot in the cache is written over by the token drawn
        batch = pack([(p, [[0]]) for p in prompts]).to(device)
        Cache.place(caches, batch.pair, batch.positions)
        x = GPT.hidden(self, batch.tokens, batch.positions, pieces_mask(batch), caches)             # (T, d)
        x = x[batch.scored]                                                 # (B, d), each prompt's last token
        ends = torch.tensor([len(p) - 1 for p in prompts], device=device)   # where each row's newest token is
        rows = torch.arange(B, device=device)                               # which prompt a row answers
        going = torch.ones(B, dtype=torch.bool, device=device)
        responses = [[] for _ in prompts]
        for _ in range(max_new_tokens):
            if x.is_cuda:                                                                       # (B, V)
                logits = ChunkedLogps.product(x, self.wte.weight.t())
            else:
                logits = (self.wte.weight.float() @ x.float().t()).t()    # this way round a CPU is faster
            uniform = torch.rand(B, generator=rng).to(device)[rows]
            next_token = draw(logits, temperature, top_k, top_p, uniform)           # (B,)
            for row, token, live in zip(rows.tolist(), next_token.tolist(), going.tolist()):
                if live:
                    responses[row].append(token)
            ends = ends + going                                             # rows that ended stand still
            going = going & (next_token != self.config.eos_token_id) & (ends < block_size - 1)
            if not going.any():
                break
            if going.sum() <= 0.75 * len(rows):                             # ... and at times leave the batch
                rows, next_token, ends = rows[going], next_token[going], ends[going]
                for cache in caches:
                    cache.k, cache.v = cache.k[going], cache.v[going]
                going = going[going]
            keys = int(ends.max()) + 1
            Cache.place(caches, torch.arange(len(rows), device=device), ends, keys)
            seen = torch.arange(keys, device=device) <= ends[:, None]               # (B, keys)
            x = GPT.hidden(self, next_token[:, None], ends[:, None], seen[:, None, None], caches)[:, 0]
        return responses


class Cache:
    """One layer's keys and values of B sequences: what generation has seen so far."""

    def __init__(self, B, limit, config, like):
        shape = (B, config.n_head, limit, config.n_embd // config.n_head)
        self.k, self.v = like.new_zeros(shape), like.new_zeros(shape)   # (B, H, limit, D)

    @staticmethod
    def place(caches, rows, positions, keys=None):
        """Say where the next tokens go, (n,) each, and how many slots are in use by then."""
        for cache in caches:
            cache.rows, cache.positions, cache.keys = rows, positions, keys

    def append(self, k, v):
        """Keep the new keys and values -> those to attend to. Packed prompts, (H, T, D), see only themselves;
        a token to each row, (B, H, 1, D), sees its row: (B, H, keys, D)."""
        packed = k.dim() == 3
        for kept, new in ((self.k, k), (self.v, v)):
            kept[self.rows, :, self.positions] = new.transpose(0, 1) if packed else new[:, :, 0]
        return (k, v) if packed else (self.k[:, :, :self.keys], self.v[:, :, :self.keys])


def draw(logits, temperature, top_k, top_p, uniform):
    """(B, V) logits and (B,) numbers in [0, 1) -> (B,) tokens, by inverting the cumulative distribution."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    probs = (logits / temperature).softmax(dim=-1)
    if top_k == 0 and top_p == 1.0:
        order = None
    else:
        probs, order = probs.sort(dim=-1, descending=True)
        if top_k:
            probs[:, top_k:] = 0
        if top_p < 1.0:   # the fewest tokens that together reach top_p: those before which it is not reached
            rest = probs.cumsum(dim=-1) - probs >= top_p * probs.sum(dim=-1, keepdim=True)
            rest[:, 0] = False
            probs[rest] = 0
    cumulative = probs.double().cumsum(dim=-1)
    at = torch.searchsorted(cumulative, (uniform.double() * cumulative[:, -1])[:, None], right=True)
    at = at.clamp(max=probs.size(-1) - 1)
    return (at if order is None else order.gather(1, at))[:, 0]


# ------------------------------------------------------------------------------------------------------------
# Load and save


# What transformers calls our tensors. Its Conv1D keeps a matrix as (in, out), nn.Linear as (out, in).
THEIRS = {'ln_1': 'ln_1', 'c_attn': 'attn.c_attn', 'attn_proj': 'attn.c_proj',
          'ln_2': 'ln_2', 'c_fc': 'mlp.c_fc', 'mlp_proj': 'mlp.c_proj'}


def their_name(name):
    """Our parameter's name -> (theirs, without its 'transformer.'; whether the matrix lies transposed)."""
    if not name.startswith('blocks.'):
        return name, False
    _, layer, part, kind = name.split('.')
    return f'h.{layer}.{THEIRS[part]}.{kind}', kind == 'weight' and not part.startswith('ln')


def load_file(path):
    """What a .safetensors, .bin or .pt file holds, by name, mapped rather than read; no code in it is run."""
    try:
        if path.endswith('.safetensors'):
            from safetensors.torch import load_file as load_safetensors
            return load_safetensors(path)
        mapped = zipfile.is_zipfile(path)    # what torch before 1.6 wrote cannot be mapped
        with warnings.catch_warnings(action='ignore'):    # torch's, on pickles of another kind: refused below
            found = torch.load(path, map_location='cpu', weights_only=True, mmap=mapped)
    except FileNotFoundError:
        raise InputError(f'{path}: no such file')
    except Exception as e:    # each format has errors of its own for a file cut short, or of another kind
        raise InputError(f'{path}: not a whole model file ({first_line(e)})')
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found):
        raise InputError(f'{path}: not a model file but a {type(found).__name__}')
    return found


def load_json(path):
    try:
        with open(path, encoding='utf-8') as f:
            return json.load(f)
    except FileNotFoundError:
        raise InputError(f'{path}: no such file')
    except OSError as e:
        raise InputError(f'{path}: cannot be read ({e.strerror})')
    except (ValueError, RecursionError) as e:
        raise InputError(f'{path}: not valid JSON ({e})')


def load_folder(folder):
    """A GPT-2 folder of transformers -> (settings for GPTConfig, {their name: tensor})."""
    path = os.path.join(folder, 'config.json')
    theirs = load_json(path)
    needed = ('n_embd', 'n_layer', 'n_head', 'vocab_size', 'n_positions')
    if not isinstance(theirs, dict) or not theirs.keys() >= set(needed):
        missing = [key for key in needed if not isinstance(theirs, dict) or key not in theirs]
        raise InputError(f'{path}: no {missing[0]!r}; not the configuration of a GPT-2')
    for key, ours in dict(model_type='gpt2', activation_function='gelu_new', layer_norm_epsilon=1e-5,
                          scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False,
                          add_cross_attention=False, tie_word_embeddings=True, n_inner=None).items():
        width = theirs['n_embd'] if isinstance(theirs['n_embd'], int) else 0
        if theirs.get(key, ours) != ours and (key, theirs[key]) != ('n_inner', 4 * width):
            raise InputError(f'{path}: {key} is {short(theirs[key])}, and GPT-2 here has {ours!r}')
    settings = {key: theirs[key] for key in needed if key != 'n_positions'}
    eos, vocab = theirs.get('eos_token_id', 50256), settings['vocab_size']
    known = isinstance(eos, int) and isinstance(vocab, int) and eos < vocab
    settings |= dict(block_size=theirs['n_positions'], eos_token_id=eos if known else -1)
    tensors = {}
    for name in ('model.safetensors', 'pytorch_model.bin'):
        whole, index = os.path.join(folder, name), os.path.join(folder, name + '.index.json')
        if os.path.exists(whole):
            tensors = load_file(whole)
            break
        if os.path.exists(index):
            shards = load_json(index)
            if not isinstance(shards, dict) or not isinstance(shards.get('weight_map'), dict):
                raise InputError(f'{index}: no weight_map, which says where the tensors are')
            for shard in sorted(set(map(str, shards['weight_map'].values()))):
                tensors |= load_file(os.path.join(folder, shard))
            break
    else:
        raise InputError(f'{folder}: no model.safetensors or pytorch_model.bin (whole or sharded)')
    tensors = {name.removeprefix('transformer.'): t for name, t in tensors.items()
               if not name.endswith(('.attn.bias', '.attn.masked_bias'))}      # the causal mask, in old files
    head, wte = tensors.pop('lm_head.weight', None), tensors.get('wte.weight')
    if torch.is_tensor(head) and torch.is_tensor(wte) and not torch.equal(head.to(wte), wte):
        raise InputError(f'{folder}: lm_head.weight differs from wte.weight, and GPT-2 ties them')
    return settings, tensors


def load_checkpoint(path):
    """A checkpoint of train.py -> its dictionary: model, model_config, config, step and more."""
    try:
        with zipfile.ZipFile(path) as f:                  # torch.load itself does not look at the checksums
            damaged = f.testzip()
    except Exception as e:                                # of the many ways in which bytes are no archive
        damaged = os.path.isfile(path) and first_line(e)
    if damaged:
        raise InputError(f'{path}: not a whole model file (damaged: {damaged})')
    checkpoint = load_file(path)
    configs = [checkpoint.get(key) for key in ('model_config', 'config')]
    if not isinstance(checkpoint.get('model'), dict) or not all(isinstance(c, dict) for c in configs) or any(
            isinstance(value, torch.Tensor) for c in configs for value in c.values()):
        raise InputError(f'{path}: not a checkpoint of train.py')
    return checkpoint


def find_pretrained(name):
    """What `from_pretrained` takes -> a path: a checkpoint file or a folder of transformers' (downloaded)."""
    if os.path.isfile(name):
        return name
    if os.path.isdir(name):
        if os.path.exists(os.path.join(name, 'config.json')):
            return name
        if os.path.exists(os.path.join(name, 'ckpt.pt')):
            return os.path.join(name, 'ckpt.pt')
        raise InputError(f'{name}: neither a model folder (config.json) nor a run\'s folder (ckpt.pt)')
    repo = f'openai-community/{name}' if name in SIZES else name
    repo = 'distilbert/distilgpt2' if name == 'distilgpt2' else repo
    if repo.count('/') != 1 or name.startswith(('.', '/')) or name.split('/')[0] in ('out', 'data'):
        raise InputError(f'{name}: no such file or folder, and not one of {", ".join(SIZES)}')
    from huggingface_hub import snapshot_download
    try:
        patterns = ['config.json', 'model*.safetensors', '*.safetensors.index.json']
        folder = snapshot_download(repo, allow_patterns=patterns)
        if not any(f.endswith('.safetensors') for f in os.listdir(folder)):
            folder = snapshot_download(repo, allow_patterns=['config.json', 'pytorch_model*'])
        return folder
    except Exception as e:    # no network, no such repository, no permission: the hub's errors share no class
        raise InputError(f'{name}: no such folder, and the hub did not give it ({first_line(e)})')


if __name__ == '__main__':
    if len(sys.argv) != 3:
        sys.exit('usage: python model.py MODEL FOLDER   '
                 '(any model from_pretrained knows -> a folder for transformers)')
    try:
        GPT.from_pretrained(sys.argv[1]).save_pretrained(sys.argv[2])
    except InputError as e:
        sys.exit(f'error: {e}')
    print(f'{sys.argv[2]}: loads with transformers.GPT2LMHeadModel.from_pretrained. No tokenizer is written: '
          "GPT-2's is GPT2Tokenizer.from_pretrained('gpt2')")
