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
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

import train
from conftest import randomise
from model import (GPT, ChunkedLogps, GPTConfig, attend, attention, bias_of, block_mask, pack,
                   pieces_mask, plain_logps, rotary_angles, rotate, visible)

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
    rng = np.random.default_rng(seed)
    pairs = []
    for _ in range(n):
        P = rng.integers(1, block)
        lengths = rng.integers(1, block - P + 1, size=K)
        prompt, *responses = (rng.integers(VOCAB, size=m).tolist() for m in (P, *lengths))
        pairs.append((prompt, responses))
    return pairs


def slow_logps(model, pairs):
    """The plain twin of token_logps: each response alone in a row behind its prompt. (N,)"""
    parts = []
    for prompt, responses in pairs:
        for response in responses:
            tokens = torch.tensor([*prompt, *response])
            logps = model(tokens[None, :-1])[0].log_softmax(-1)                 # (t - 1, V)
            parts.append(logps.gather(1, tokens[1:, None])[len(prompt) - 1:, 0])
    return torch.cat(parts)


def close(a, b, tolerance):
    """Log-probs are differences of logits of size 1 and more: relative above 1, absolute below."""
    assert_close(a.double().cpu(), b.double().cpu(), rtol=tolerance, atol=tolerance)


def gradient(model):
    """All parameters' gradients end to end."""
    return torch.cat([p.grad.reshape(-1) for p in model.parameters()]).double().cpu()


# --------------------------------------------------------------------------------------------------
# The packed batch and its mask


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


def test_pack_takes_arrays_and_refuses_what_is_empty():
    lists = pack([([1, 2], [[3], [4, 5]])])
    arrays = pack([(np.array([1, 2], np.uint16), [np.array([3], np.uint16), np.array([4, 5])])])
    assert torch.equal(lists.tokens, arrays.tokens) and arrays.tokens.dtype == torch.int64
    for pair in (([], [[1], [2]]), ([1], [[], [2]]), ([1], [[2], []])):
        with pytest.raises(AssertionError, match='a token or more'):
            pack([([1], [[2], [3]]), pair])


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
@pytest.mark.parametrize('pad', [0, 7])
def test_visible_is_the_brute_force_mask(K, pad):
    pairs = random_pairs(4, K, seed=K)
    expected = brute_force_mask(pairs)
    T = len(expected)
    seen = dense_mask(pack(pairs, pad_to=T + pad))
    assert torch.equal(seen[:T, :T], expected)
    assert not seen[T:, :T].any() and not seen[:T, T:].any()    # padding neither sees nor is seen;
    assert torch.equal(seen[T:, T:], torch.eye(pad).bool())     # no row is empty: no nan


@pytest.mark.parametrize('piece', [1, 30, 256])
@pytest.mark.parametrize('pad_to', [0, 400])
def test_pieces_are_the_diagonal_blocks_of_the_mask(piece, pad_to):
    batch = pack(random_pairs(6, 2, seed=1), pad_to)
    dense, at = dense_mask(batch), 0
    rebuilt = torch.zeros_like(dense)
    for bias in pieces_mask(batch, piece):
        assert ((bias == 0) | (bias == -math.inf)).all()
        rebuilt[at:at + len(bias), at:at + len(bias)] = bias == 0
        at += len(bias)
    assert at == len(dense) and torch.equal(rebuilt, dense)


def test_blocks_of_flex_attention_contain_all_that_is_visible():
    for seed in range(8):
        batch = pack(random_pairs(12, 2, seed=seed), pad_to=(0, 600)[seed % 2])
        kept = block_mask(batch, size=16).to_dense()[0, 0].bool()               # (T/16, T/16)
        dense = torch.nn.functional.pad(dense_mask(batch), 2 * [0, -batch.tokens.numel() % 16])
        needed = dense.unflatten(0, (-1, 16)).unflatten(2, (-1, 16)).any(3).any(1)
        assert not (needed & ~kept).any()
        assert torch.equal(kept, kept.tril()) and kept.sum() < 0.5 * kept.numel()   # it does skip


# --------------------------------------------------------------------------------------------------
# Attention


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
def test_pieces_and_flex_attention_are_attend(G):
    """The forms of the mask for a CPU and for a GPU; the latter without compiling, forward only."""
    g = torch.Generator().manual_seed(0)
    for pad_to in (0, 256, 512):
        batch = pack(random_pairs(9, 2, seed=5), pad_to)
        T = batch.tokens.numel()
        q, k, v = (torch.randn(n, T, 8, generator=g) for n in (4, G, G))
        expected = attention(q, k, v, bias_of(dense_mask(batch)))
        assert_close(attention(q, k, v, pieces_mask(batch, piece=40)), expected)
        assert_close(attention(q, k, v, block_mask(batch)), expected)


def test_rotary_attention_depends_on_distance_alone():
    config = GPTConfig(**SIZES | MODELS['llama'])
    q, k = torch.randn(2, 1, 1, config.head_dim, generator=torch.Generator().manual_seed(0))

    def score(i, j):
        at = [rotary_angles(torch.tensor([position]), config) for position in (i, j)]
        return (rotate(q[None], *at[0]) * rotate(k[None], *at[1])).sum()
    assert_close(score(3, 1), score(13, 11))
    assert (score(3, 1) - score(3, 2)).abs() > 1e-3
    assert_close(score(5, 5), (q * k).sum())


def test_rotary_scaling_of_llama_3():
    """As in the release of Llama 3.1: a slow turn is slowed by the factor, a fast one is kept."""
    factor, low, high, context = scaling = 8.0, 1.0, 4.0, 8192
    config = GPTConfig(n_embd=128, n_head=1, rope_theta=500000.0, rope_scaling=scaling)
    expected = []
    for i in range(64):
        frequency = 500000.0 ** (-i / 64)
        wavelength = 2 * math.pi / frequency
        if wavelength > context / low:
            frequency /= factor
        elif wavelength >= context / high:
            smooth = (context / wavelength - low) / (high - low)
            frequency = (1 - smooth) * frequency / factor + smooth * frequency
        expected.append(frequency)
    cos, sin = rotary_angles(torch.tensor([1]), config)                         # (1, 1, 64)
    assert_close(torch.atan2(sin, cos)[0, 0], torch.tensor(expected), rtol=1e-4, atol=0)


# --------------------------------------------------------------------------------------------------
# token_logps against the plain twin


@st.composite
def pair_lists(draw):
    """Pairs of every shape: prompts and responses of one token, as long as fit, equal responses."""
    def length(longest):
        return draw(st.one_of(st.just(1), st.just(longest), st.integers(1, longest)))
    K, rng = draw(st.sampled_from([1, 2, 4])), np.random.default_rng(draw(st.integers(0, 2**32)))
    pairs = []
    for _ in range(draw(st.integers(1, 4))):
        P = length(BLOCK - 1)
        lengths = [length(BLOCK - P) for _ in range(K)]
        prompt, *responses = (rng.integers(VOCAB, size=n).tolist() for n in (P, *lengths))
        pairs.append((prompt, [responses[0]] * K if draw(st.booleans()) else responses))
    return pairs


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(pairs=pair_lists(), name=st.sampled_from(list(MODELS)), seed=st.integers(0, 3),
       piece=st.sampled_from([1, 20, 64, 10**6]), pad=st.sampled_from([0, 1, 50]))
def test_token_logps_equal_the_plain_twin(pairs, name, seed, piece, pad):
    """Log-probs, their sums and the gradient of all parameters, whatever the model, the shapes of
    the pairs, the pieces of the attention and the padding."""
    model = tiny(name, seed)
    twin = copy.deepcopy(model).double()
    batch = pack(pairs, pad_to=pack(pairs).tokens.numel() + pad)
    batch.mask = pieces_mask(batch, piece)
    logps, expected = model.token_logps(batch), slow_logps(twin, pairs)
    sums = batch.sum_by_response(logps)                                         # (B, K)
    assert logps.dtype == sums.dtype == torch.float32
    close(logps, expected, 1e-5)
    lengths = [len(r) for _, responses in pairs for r in responses]
    expected_sums = torch.stack([part.sum() for part in expected.split(lengths)]).view_as(sums)
    close(sums, expected_sums, 1e-5)

    weights = torch.rand(sums.shape, generator=torch.Generator().manual_seed(1))
    (weights * sums).sum().backward()
    (weights * expected_sums).sum().backward()
    a, b = gradient(model), gradient(twin)
    assert (a - b).norm() <= 1e-5 * b.norm()


def test_token_logps_of_a_float64_model():
    model, pairs = tiny().double(), random_pairs(3)
    logps = model.token_logps(pack(pairs))
    assert logps.dtype == torch.float64
    close(logps, slow_logps(model, pairs), 1e-12)


def run_and_check_bfloat16(model, pairs, device):
    """bfloat16 has 8 bits: an error of 1 in 256 for each number that a log-prob is made of, with
    signs that differ."""
    results = []
    for low in (False, True):
        model.zero_grad()
        with torch.autocast(device, dtype=torch.bfloat16, enabled=low):
            logps = model.token_logps(pack(pairs).to(device))
        assert logps.dtype == torch.float32
        logps.sum().backward()
        results.append((logps.detach(), gradient(model)))
    (exact, exact_gradient), (rounded, rounded_gradient) = results
    error = (rounded - exact).cpu()
    assert 0 < error.square().mean().sqrt() < 0.03 and error.mean().abs() < 0.01
    assert (rounded_gradient - exact_gradient).norm() < 0.05 * exact_gradient.norm()


@pytest.mark.filterwarnings('ignore:Mismatch dtype between input and weight')
@pytest.mark.parametrize('name', MODELS)
def test_bfloat16_on_the_cpu_is_close_to_float32(name):
    run_and_check_bfloat16(tiny(name, std=0.2), random_pairs(8, seed=6), 'cpu')


# --------------------------------------------------------------------------------------------------
# The head


def factors(N, V, d=16, dtype=torch.float32):
    """h (N, d), weight (V, d), targets (N,), the gradient from above (N,)"""
    g = torch.Generator().manual_seed(0)
    h, weight = torch.randn(N, d, generator=g), 0.5 * torch.randn(V, d, generator=g)
    return (h.to(dtype), weight.to(dtype), torch.randint(V, (N,), generator=g),
            torch.randn(N, generator=g))


@pytest.mark.parametrize('dtype, tolerance', [
    (torch.float32, 1e-5), (torch.float64, 1e-12), (torch.bfloat16, 0.02)])
def test_chunked_logps_are_plain_logps(dtype, tolerance):
    h, weight, targets, upstream = factors(37, 101, dtype=dtype)
    ours = [h.clone().requires_grad_(), weight.clone().requires_grad_()]
    plain = [h.double().requires_grad_(), weight.double().requires_grad_()]
    logps = ChunkedLogps.apply(*ours, targets, True)
    expected = (plain[0] @ plain[1].t()).log_softmax(1).gather(1, targets[:, None])[:, 0]
    assert logps.dtype == torch.promote_types(dtype, torch.float32)
    close(logps, expected, min(tolerance, 1e-5))           # factors in bf16, but sums in float32
    if dtype == torch.float32:
        close(logps, plain_logps(h, weight, targets), 1e-5)
    logps.backward(upstream.to(logps.dtype))
    expected.backward(upstream.double())
    for a, b in zip(ours, plain):
        assert a.grad.dtype == dtype
        assert (a.grad - b.grad).abs().max() <= tolerance * b.grad.abs().max()


@pytest.mark.parametrize('N', [3, 4])
def test_chunks_of_the_head(N):
    """A vocabulary so large that a chunk is two rows; the last chunk may be shorter."""
    h, weight, targets, upstream = factors(N, 2**22, d=2, dtype=torch.float64)
    leaves = [h.requires_grad_(), weight.requires_grad_()]
    plain = (h @ weight.t()).log_softmax(1).gather(1, targets[:, None])[:, 0]
    expected = torch.autograd.grad(plain, leaves, upstream.double())
    logps = ChunkedLogps.apply(*leaves, targets, True)
    close(logps, plain, 1e-12)
    for a, b in zip(torch.autograd.grad(logps, leaves, upstream.double()), expected):
        assert (a - b).norm() <= 1e-10 * b.norm()


@pytest.mark.parametrize('frozen', [0, 1])
def test_a_frozen_factor_gets_no_gradient(frozen):
    h, weight, targets, upstream = factors(5, 11)
    gradients = []
    for freeze in (False, True):
        leaves = [t.clone().requires_grad_() for t in (h, weight)]
        leaves[frozen].requires_grad_(not freeze)
        ChunkedLogps.apply(*leaves, targets, True).backward(upstream)
        gradients.append([leaf.grad for leaf in leaves])
    assert gradients[1][frozen] is None
    assert torch.equal(gradients[0][1 - frozen], gradients[1][1 - frozen])


def test_a_pass_without_gradients_keeps_nothing_for_them():
    """(N, V) numbers are saved for the backward pass only where there will be one."""
    model, batch, saved = tiny(), pack(random_pairs(3)), []
    full = (len(batch.targets), VOCAB)

    def pack_hook(t):
        saved.append(t.shape)
        return t
    with torch.autograd.graph.saved_tensors_hooks(pack_hook, lambda t: t):
        logps = model.token_logps(batch)
        assert full in saved
        saved.clear()
        with torch.no_grad():
            assert torch.equal(model.token_logps(batch), logps)
        assert not saved


@pytest.mark.parametrize('device', ['cpu', pytest.param('cuda', marks=needs_cuda)])
def test_logits_are_not_rounded_to_bfloat16(device):
    """Logits near -100, as GPT-2's are, rounded to bfloat16 would be wrong by up to a quarter."""
    h, weight, targets, _ = factors(64, 97, d=32)
    h = torch.cat([h, torch.full((64, 1), 10.0)], dim=1).bfloat16().to(device)
    weight = torch.cat([weight, torch.full((97, 1), -10.0)], dim=1).bfloat16().to(device)
    targets = targets.to(device)
    logits = h.double() @ weight.double().t()
    exact = logits.log_softmax(1).gather(1, targets[:, None])[:, 0]
    assert (plain_logps(h, weight, targets) - exact).abs().max() > 0.1          # it would matter
    with torch.autocast(device, dtype=torch.bfloat16):
        logps = ChunkedLogps.apply(h, weight.float(), targets, False)
    assert logps.dtype == torch.float32 and (logps - exact).abs().max() < 1e-3


# --------------------------------------------------------------------------------------------------
# The model


def test_config_fills_in_what_is_zero():
    c = GPTConfig(n_head=4, n_embd=32)
    assert (c.n_kv_head, c.head_dim, c.n_inner) == (4, 8, 128)
    c = GPTConfig(n_head=4, n_embd=32, n_kv_head=2, head_dim=16, n_inner=40)
    assert (c.n_kv_head, c.head_dim, c.n_inner) == (2, 16, 40)


@pytest.mark.parametrize('name', MODELS)
def test_parameters_and_their_initial_values(name):
    """GPT-2's: std 0.02, into the residual stream 0.02 / sqrt(2 n_layer); biases 0."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**SIZES | MODELS[name] | dict(n_embd=128, n_layer=8)))
    names = dict(model.named_parameters())
    assert ('lm_head.weight' in names) == (not model.config.tied)
    assert ('wpe.weight' in names) == (not model.config.rope_theta)
    biases = {n.split('.')[-2] for n in names if n.endswith('bias')} - {'ln_1', 'ln_2', 'ln_f'}
    expected = dict(all={'qkv', 'attn_out', 'up', 'down'}, qkv={'qkv'}, none=set())
    assert biases == expected[model.config.bias]
    for n, p in names.items():
        if p.dim() == 1:
            assert (p == (0.0 if n.endswith('bias') else 1.0)).all(), n
        else:
            std = 0.02 / (4 if n.endswith(('attn_out.weight', 'down.weight')) else 1)
            assert p.std().item() == pytest.approx(std, rel=0.1) and abs(p.mean()) < 0.1 * std, n


@pytest.mark.parametrize('name', MODELS)
def test_forward_is_causal(name):
    model, tokens = tiny(name), torch.randint(VOCAB, (2, BLOCK))
    changed = tokens.clone()
    changed[:, 10] = (changed[:, 10] + 1) % VOCAB
    with torch.no_grad():
        a, b = model(tokens), model(changed)
    assert a.shape == (2, BLOCK, VOCAB)
    assert torch.equal(a[:, :10], b[:, :10])
    assert ((a - b)[:, 10:].abs().amax(-1) > 1e-4).all()   # and every later token does see it


# --------------------------------------------------------------------------------------------------
# On a GPU


def cuda_model(name):
    """Heads of width 32: FlexAttention's kernels need 16 or more."""
    return tiny(name, std=0.1, block_size=128, n_embd=128, head_dim=32).cuda()


@needs_cuda
@pytest.mark.parametrize('name', ['gpt2', 'llama', 'qwen3'])
@pytest.mark.parametrize('low', [False, True], ids=['float32', 'bfloat16'])
def test_cuda_compiled_flex_attention_is_the_plain_path(name, low):
    """As train.py runs there: fixed shape, FlexAttention, torch.compile, bfloat16. The twin:
    float32, pieces, eager. Two batches of one shape: nothing of the first is left in the second."""
    model = cuda_model(name)
    twin = copy.deepcopy(model)
    train.compile_model(model, SimpleNamespace(compile=True, device='cuda'))
    for seed in (0, 1):
        pairs = random_pairs(10, 2, seed, block=128)
        batch = pack(pairs, pad_to=4096).to('cuda')
        batch.mask = block_mask(batch)
        results = []
        for m, b, dtype in ((twin, pack(pairs).to('cuda'), False), (model, batch, low)):
            m.zero_grad()
            with torch.autocast('cuda', dtype=torch.bfloat16, enabled=dtype):
                logps = m.token_logps(b)
            logps.sum().backward()
            results.append((logps.detach(), gradient(m)))
        (exact, exact_gradient), (fast, fast_gradient) = results
        assert (fast - exact).square().mean().sqrt() < (0.03 if low else 1e-4)
        off = (fast_gradient - exact_gradient).norm() / exact_gradient.norm()
        assert off < (0.05 if low else 1e-4)


@needs_cuda
@pytest.mark.parametrize('name', ['gpt2', 'llama3'])
def test_cuda_pieces(name):
    """float32 against the plain twin in float64 on the CPU; bfloat16 against float32."""
    model, pairs = cuda_model(name), random_pairs(10, 2, seed=2, block=128)
    twin = copy.deepcopy(model).cpu().double()
    with torch.no_grad():
        close(model.token_logps(pack(pairs).to('cuda')), slow_logps(twin, pairs), 1e-5)
    run_and_check_bfloat16(model, pairs, 'cuda')


@needs_cuda
def test_cuda_batch_is_the_same_there():
    host = pack(random_pairs(20, seed=7))
    there = host.to('cuda')
    assert there.mask is None and there.starts == host.starts
    for name in ('tokens', 'positions', 'pair', 'branch', 'scored', 'targets', 'owner', 'lengths'):
        assert getattr(there, name).is_cuda
        assert torch.equal(getattr(there, name).cpu(), getattr(host, name))
