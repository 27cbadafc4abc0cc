"""
Tests of model.py: the packed log-probs against slow plain twins.

    python -m pytest tests/test_model.py

Every fast path is compared with the plainest code that says the same: one response to a row, dense
masks made by loops, all logits at once, float64. Models are tiny, their weights large and random.
Left out: models of transformers, which are in test_weights.py. needs_cuda tests want a GPU.
"""
import copy
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.testing import assert_close

import train
from conftest import randomise
from model import (GPT, ChunkedLogps, GPTConfig, attend, attention, bias_of, block_mask, pack,
                   pieces_mask, plain_logps, visible)

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA GPU')

VOCAB, BLOCK = 53, 24
SIZES = dict(block_size=BLOCK, vocab_size=VOCAB, n_layer=2, n_head=4, n_embd=32)
ROTARY = dict(norm='rms', norm_eps=1e-6, gated=True, bias='none', rope_theta=100.0)
MODELS = {   # every field of GPTConfig differs from its default in one of these
    'gpt2': dict(),
    'llama': dict(ROTARY, n_kv_head=1, n_inner=40, tied=False),
    'llama3': dict(ROTARY, n_kv_head=2, rope_scaling=(8.0, 1.0, 4.0, 32)),
    'qwen2': dict(ROTARY, bias='qkv', n_kv_head=2, tied=False),
    'qwen3': dict(ROTARY, head_dim=16, n_kv_head=2, qk_norm=True),
}


def tiny(name='gpt2', seed=0, std=0.3, **changes):
    return randomise(GPT(GPTConfig(**SIZES | MODELS[name] | changes)), std, seed)


def random_pairs(n=5, K=2, seed=0, block=BLOCK):
    """Prompts and responses of one token, as many as fit, or some number between."""
    rng, pairs = np.random.default_rng(seed), []
    for _ in range(n):
        P = rng.choice([1, block - 1, rng.integers(1, block)])
        lengths = [rng.choice([1, block - P, rng.integers(1, block - P + 1)]) for _ in range(K)]
        prompt, *responses = (rng.integers(VOCAB, size=m).tolist() for m in (P, *lengths))
        pairs.append((prompt, responses))
    return pairs


def slow_logps(model, pairs):
    """The plain twin of token_logps: each response alone in a row behind its prompt. (N,)"""
    parts = []
    for prompt, response in [(prompt, r) for prompt, responses in pairs for r in responses]:
        tokens = torch.tensor([*prompt, *response])
        logps = model(tokens[None, :-1])[0].log_softmax(-1)                     # (t - 1, V)
        parts.append(logps.gather(1, tokens[1:, None])[len(prompt) - 1:, 0])
    return torch.cat(parts)


def close(a, b, tolerance):
    """Log-probs are differences of logits of size 1 and more: relative above 1, absolute below."""
    assert_close(a.double().cpu(), b.double().cpu(), rtol=tolerance, atol=tolerance)


def gradient(model):
    """All parameters' gradients end to end."""
    return torch.cat([p.grad.reshape(-1) for p in model.parameters()]).double().cpu()


# --------------------------------------------------------------------------------------------------
# The packed batch, its mask, and attention


def test_pack_of_the_drawing():
    """The drawing at the top of model.py, number by number, with a second pair behind it."""
    p, c, r = [10, 11, 12, 13], [20, 21, 22], [30, 31, 32, 33]
    batch = pack([(p, [c, r]), ([40], [[50], [60, 61]])])
    assert batch.tokens.tolist() == p + c + r + [40, 50, 60, 61]
    assert batch.positions.tolist() == [0, 1, 2, 3, 4, 5, 6, 4, 5, 6, 7] + [0, 1, 1, 2]
    assert batch.branch.tolist() == [0, 0, 0, 0, 1, 1, 1, 2, 2, 2, 2] + [0, 1, 2, 2]
    assert batch.pair.tolist() == [0] * 11 + [1] * 4
    # a prompt's last token (at 3, and at 11) predicts the first token of both responses
    assert batch.scored.tolist() == [3, 4, 5] + [3, 7, 8, 9] + [11] + [11, 13]
    assert batch.targets.tolist() == c + r + [50] + [60, 61]
    assert batch.owner.tolist() == [0] * 3 + [1] * 4 + [2] + [3] * 2
    assert batch.lengths.tolist() == [[3, 4], [1, 2]] and batch.starts == [0, 11, 15]
    # 1+2+3, 4+5+6+7, 8, 9+10
    assert batch.sum_by_response(torch.arange(1.0, 11.0)).tolist() == [[6, 22], [8, 19]]


def brute_force_mask(pairs):
    """Two tokens meet where a response, read behind its prompt, has both; the key is not later."""
    total = sum(len(prompt) + sum(map(len, responses)) for prompt, responses in pairs)
    seen, at = torch.zeros(total, total, dtype=torch.bool), 0
    for prompt, responses in pairs:
        prompt_at = list(range(at, at + len(prompt)))
        at += len(prompt)
        for response in responses:
            sequence = prompt_at + list(range(at, at + len(response)))
            at += len(response)
            for i, query in enumerate(sequence):
                seen[query, sequence[:i + 1]] = True
    return seen


def dense_mask(batch):
    index = torch.arange(batch.tokens.numel())
    return visible(batch.pair, batch.branch, index[:, None], index[None, :])    # (T, T)


@pytest.mark.parametrize('K', [1, 2, 4])
def test_visible_is_the_brute_force_mask(K):
    pairs = random_pairs(4, K, seed=K)
    expected = brute_force_mask(pairs)
    T = len(expected)
    seen = dense_mask(pack(pairs, pad_to=T + 7))
    assert torch.equal(seen[:T, :T], expected)
    assert not seen[T:, :T].any() and not seen[:T, T:].any()    # padding neither sees nor is seen;
    assert torch.equal(seen[T:, T:], torch.eye(7).bool())       # no row is empty: no nan


@pytest.mark.parametrize('G', [1, 2, 4])
def test_attend_is_the_definition(G):
    """Query by query and head by head; heads h with the same h * G // 4 share keys and values."""
    batch = pack(random_pairs(2, 2))
    T, seen = batch.tokens.numel(), dense_mask(batch)
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(n, T, 8, generator=g, dtype=torch.float64) for n in (4, G, G))
    out = attend(q, k, v, bias_of(seen))
    for h in range(4):
        for t in range(T):
            keys, values = k[h * G // 4][seen[t]], v[h * G // 4][seen[t]]       # (s, D)
            weights = (keys @ q[h, t] / math.sqrt(8)).exp()
            assert_close(out[h, t], (weights / weights.sum()) @ values)


@pytest.mark.filterwarnings('ignore:flex_attention called without torch.compile')
@pytest.mark.parametrize('G', [1, 4])
def test_pieces_and_flex_attention_are_attend(G, monkeypatch):
    """The forms of the mask for a CPU and for a GPU; the latter without compiling, forward only."""
    monkeypatch.setattr(torch, 'compile', lambda function, **given: function)
    g, batch = torch.Generator().manual_seed(0), pack(random_pairs(9, 2, seed=5), pad_to=512)
    q, k, v = (torch.randn(n, 512, 8, generator=g) for n in (4, G, G))
    expected = attention(q, k, v, bias_of(dense_mask(batch)))
    assert_close(attention(q, k, v, pieces_mask(batch, piece=40)), expected)
    assert_close(attention(q, k, v, block_mask(batch)), expected)


# --------------------------------------------------------------------------------------------------
# The head


@pytest.mark.parametrize('N, V, dtype, tolerance', [
    (37, 101, torch.float32, 1e-5), (37, 101, torch.float64, 1e-12),
    (37, 101, torch.bfloat16, 0.02),
    (3, 2**22, torch.float64, 1e-10)])       # a chunk of such a vocabulary is two rows
def test_chunked_logps_are_plain_logps(N, V, dtype, tolerance):
    g = torch.Generator().manual_seed(0)
    ours = [torch.randn(n, 4, generator=g).to(dtype).requires_grad_() for n in (N, V)]  # h, weight
    targets, upstream = torch.randint(V, (N,), generator=g), torch.randn(N, generator=g)
    plain = [t.detach().double().requires_grad_() for t in ours]
    logps = ChunkedLogps.apply(*ours, targets, True)
    expected = (plain[0] @ plain[1].t()).log_softmax(1).gather(1, targets[:, None])[:, 0]
    assert logps.dtype == torch.promote_types(dtype, torch.float32)
    close(logps, expected, min(tolerance, 1e-5))           # factors in bf16, but sums in float32
    if dtype == torch.float32:
        close(plain_logps(*ours, targets), expected, 1e-5)
    logps.backward(upstream.to(logps.dtype))
    expected.backward(upstream.double())
    for a, b in zip(ours, plain):
        assert a.grad.dtype == dtype
        assert (a.grad - b.grad).abs().max() <= tolerance * b.grad.abs().max()


@pytest.mark.parametrize('device', ['cpu', pytest.param('cuda', marks=needs_cuda)])
def test_logits_are_not_rounded_to_bfloat16(device):
    """Logits near -100, as GPT-2's are, rounded to bfloat16 would be wrong by up to a quarter."""
    g = torch.Generator().manual_seed(0)
    h, weight = (torch.randn(n, 33, generator=g).bfloat16().to(device) for n in (64, 97))
    h[:, 0], weight[:, 0] = 10.0, -10.0
    targets = torch.randint(97, (64,), generator=g).to(device)
    logits = h.double() @ weight.double().t()
    exact = logits.log_softmax(1).gather(1, targets[:, None])[:, 0]
    assert (plain_logps(h, weight, targets) - exact).abs().max() > 0.1          # it would matter
    with torch.autocast(device, dtype=torch.bfloat16):
        logps = ChunkedLogps.apply(h, weight.float(), targets, False)
    assert logps.dtype == torch.float32 and (logps - exact).abs().max() < 1e-3


# --------------------------------------------------------------------------------------------------
# The model


@pytest.mark.parametrize('seed', range(10))
@pytest.mark.parametrize('name', MODELS)
def test_packed_equals_one_at_a_time(name, seed):
    """Log-probs, their sums and the gradient of all parameters, whatever the model, the shapes of
    the pairs, the pieces of the attention and the padding."""
    n, K, pad, piece = 1 + seed % 4, (1, 2, 4)[seed % 3], (0, 1, 50)[seed % 3], 5 * 3 ** (seed % 5)
    model, pairs = tiny(name, seed), random_pairs(n, K, seed)
    twin = copy.deepcopy(model).double()
    batch = pack(pairs, pad_to=pack(pairs).tokens.numel() + pad)
    batch.mask = pieces_mask(batch, piece)
    logps, expected = model.token_logps(batch), slow_logps(twin, pairs)
    close(logps, expected, 1e-5)
    sums = batch.sum_by_response(logps)                                         # (B, K)
    assert sums.dtype == torch.float32
    lengths = [len(r) for _, responses in pairs for r in responses]
    expected_sums = torch.stack([part.sum() for part in expected.split(lengths)]).view_as(sums)
    close(sums, expected_sums, 1e-5)
    weights = torch.rand(sums.shape, generator=torch.Generator().manual_seed(1))
    (weights * sums).sum().backward()
    (weights * expected_sums).sum().backward()
    a, b = gradient(model), gradient(twin)
    assert (a - b).norm() <= 1e-5 * b.norm()


def run(model, batch, low=False):
    """Log-probs and the gradient of their sum; in bfloat16 where `low`."""
    model.zero_grad()
    with torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=low):
        logps = model.token_logps(batch)
    assert logps.dtype == torch.float32
    logps.sum().backward()
    return logps.detach(), gradient(model)


@pytest.mark.filterwarnings('ignore:Mismatch dtype between input and weight')
@pytest.mark.parametrize('name', MODELS)
def test_bfloat16_is_close_to_float32(name):
    """8 bits: an error of 1 in 256 in each number that a log-prob is made of, of either sign."""
    model, batch = tiny(name, std=0.2), pack(random_pairs(8, seed=6))
    exact, exact_gradient = run(model, batch)
    rounded, rounded_gradient = run(model, batch, low=True)
    error = rounded - exact
    assert 0 < error.square().mean().sqrt() < 0.03 and error.mean().abs() < 0.01
    assert (rounded_gradient - exact_gradient).norm() < 0.05 * exact_gradient.norm()


@pytest.mark.parametrize('name', MODELS)
def test_initial_weights_are_gpt2s(name):
    """std 0.02, into the residual stream 0.02 / sqrt(2 n_layer); gains 1, biases 0."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**SIZES | MODELS[name] | dict(n_embd=128, n_layer=8)))
    for n, p in model.named_parameters():
        if p.dim() == 1:
            assert (p == (0.0 if n.endswith('bias') else 1.0)).all(), n
        else:
            std = 0.02 / (4 if n.endswith(('attn_out.weight', 'down.weight')) else 1)
            assert p.std().item() == pytest.approx(std, rel=0.1) and abs(p.mean()) < 0.1 * std, n


@needs_cuda
@pytest.mark.parametrize('name', ['gpt2', 'llama3', 'qwen3'])
@pytest.mark.parametrize('low', [False, True], ids=['float32', 'bfloat16'])
def test_on_a_gpu_compiled_flex_attention_is_the_plain_path(name, low):
    """As train.py runs there: fixed shape, FlexAttention, torch.compile, bfloat16. The twins:
    float32, pieces, eager; and one at a time in float64 on the CPU. Two batches of one shape:
    nothing of the first is left in the second. FlexAttention's kernels need heads of 16 or more."""
    model = tiny(name, std=0.1, block_size=128, n_embd=128, head_dim=32)
    plain, twin = copy.deepcopy(model).double(), copy.deepcopy(model).cuda()
    train.compile_model(model.cuda(), SimpleNamespace(compile=True, device='cuda'))
    for seed in (0, 1):
        pairs = random_pairs(10, 2, seed, block=128)
        batch = pack(pairs, pad_to=4096).to('cuda')
        batch.mask = block_mask(batch)
        exact, exact_gradient = run(twin, pack(pairs).to('cuda'))
        close(exact, slow_logps(plain, pairs), 1e-5)
        fast, fast_gradient = run(model, batch, low)
        assert (fast - exact).square().mean().sqrt() < (0.03 if low else 1e-4)
        off = (fast_gradient - exact_gradient).norm() / exact_gradient.norm()
        assert off < (0.05 if low else 1e-4)
