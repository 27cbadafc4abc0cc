"""
Tests of model.py: the packed log-probs against a slow plain twin, loading and saving against transformers, generation
against a loop without a cache.

    python -m pytest tests/test_model.py

Every fast path is compared with the plainest code that says the same thing: one response to a row, whole logits,
float64. The models are tiny and their weights large and random (GPT-2's own initial weights attend almost evenly, which
would hide a wrong mask). Tests that need transformers are skipped where it is not installed, those that need a GPU
where there is none.
"""
import copy
import fnmatch
import json
import math
import os
import shutil
from dataclasses import asdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import train
from dpo import dpo_loss
from model import (GPT, SIZES, Batch, ChunkedLogps, GPTConfig, block_mask, draw, pack, pieces_mask, reduce_logits, their_name,
                   visible)
from prepare import InputError

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA GPU')


@pytest.fixture(autouse=True)
def whole_float32():
    """Some other test may have asked for faster products."""
    torch.set_float32_matmul_precision('highest')


BLOCK, VOCAB = 24, 53
TINY = dict(block_size=BLOCK, vocab_size=VOCAB, n_layer=2, n_head=3, n_embd=24, eos_token_id=VOCAB - 1)


def randomise(model, std=0.3, seed=0):
    """Random numbers in every parameter, biases and layer norms too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            norm = 'ln_' in name and name.endswith('weight')
            p.copy_((1.0 if norm else 0.0) + std * torch.randn(p.shape, generator=generator))
    return model.eval()


def tiny(seed=0, **changes):
    return randomise(GPT(GPTConfig(**{**TINY, **changes})), seed=seed)


def random_tokens(rng, *lengths, vocab=VOCAB):
    return [rng.integers(vocab, size=n).tolist() for n in lengths]


def some_pairs(n=5, K=2, seed=0, block=BLOCK):
    rng = np.random.default_rng(seed)
    pairs = []
    for _ in range(n):
        prompt = int(rng.integers(1, block))
        responses = rng.integers(1, block - prompt + 1, size=K)
        prompt, *responses = random_tokens(rng, prompt, *responses)
        pairs.append((prompt, responses))
    return pairs


def slow_logps(model, pairs):
    """The plain twin of token_logps: each response alone in a row behind its prompt. -> a (t,) tensor per response."""
    out = []
    for prompt, responses in pairs:
        for response in responses:
            tokens = torch.tensor([*prompt, *response], device=model.device)
            logps = model(tokens[None, :-1])[0].log_softmax(dim=-1)
            out.append(logps.gather(1, tokens[1:, None])[len(prompt) - 1:, 0])
    return out


def close(a, b, relative, scale=None):
    """|a - b| <= relative * scale; the scale is |b|, or 1 where that is smaller: log-probs are differences of logits."""
    a, b = torch.as_tensor(a).double().cpu(), torch.as_tensor(b).double().cpu()
    assert a.shape == b.shape
    limit = relative * (b.abs().clamp(min=1.0) if scale is None else scale)
    assert ((a - b).abs() <= limit).all(), f'off by {((a - b).abs() / limit).max().item():.2f} times the tolerance'


# ----------------------------------------------------------------------------------------------------------------
# The packed batch


def test_pack_of_the_drawing():
    """The drawing at the top of model.py, number by number, with a second pair behind it."""
    p, c, r = [10, 11, 12, 13], [20, 21, 22], [30, 31, 32, 33]
    batch = pack([(p, [c, r]), ([40], [[50], [60, 61]])])
    assert batch.tokens.tolist() == p + c + r + [40, 50, 60, 61]
    assert batch.positions.tolist() == [0, 1, 2, 3, 4, 5, 6, 4, 5, 6, 7] + [0, 1, 1, 2]
    assert batch.branch.tolist() == [0, 0, 0, 0, 1, 1, 1, 2, 2, 2, 2] + [0, 1, 2, 2]
    assert batch.pair.tolist() == [0] * 11 + [1] * 4
    # the prompt's last token (index 3; 11 in the second pair) predicts the first token of both responses
    assert batch.scored.tolist() == [3, 4, 5] + [3, 7, 8, 9] + [11] + [11, 13]
    assert batch.targets.tolist() == c + r + [50] + [60, 61]
    assert batch.owner.tolist() == [0] * 3 + [1] * 4 + [2] + [3] * 2
    assert batch.lengths.tolist() == [[3, 4], [1, 2]]
    assert batch.starts == [0, 11, 15]
    # 1+2+3, 4+5+6+7, 8, 9+10
    assert batch.sum_by_response(torch.arange(1.0, 11.0)).tolist() == [[6, 22], [8, 19]]


def test_pack_takes_arrays_and_refuses_what_is_empty():
    lists = pack([([1, 2], [[3], [4, 5]])])
    arrays = pack([(np.array([1, 2], np.uint16), [np.array([3], np.uint16), np.array([4, 5], np.uint32)])])
    assert torch.equal(lists.tokens, arrays.tokens) and arrays.tokens.dtype == torch.int64
    for pair in (([], [[1], [2]]), ([1], [[], [2]]), ([1], [[2], []])):
        with pytest.raises(ValueError):
            pack([([1], [[2], [3]]), pair])
    with pytest.raises(ValueError):
        pack([([1], [[2], [3]]), ([1], [[2]])])


def brute_force_mask(pairs):
    """Which token may see which, from what a mask is for: two tokens meet where some response, read behind its prompt,
    holds both, and the one that is seen is not the later."""
    total = sum(len(prompt) + sum(map(len, responses)) for prompt, responses in pairs)
    seen = np.zeros((total, total), dtype=bool)
    at = 0
    for prompt, responses in pairs:
        prompt_at = list(range(at, at + len(prompt)))
        at += len(prompt)
        for response in responses:
            sequence = prompt_at + list(range(at, at + len(response)))
            at += len(response)
            for i, query in enumerate(sequence):
                for key in sequence[:i + 1]:
                    seen[query, key] = True
    return torch.from_numpy(seen)


@pytest.mark.parametrize('K', [1, 2, 4])
@pytest.mark.parametrize('pad', [0, 7])
def test_visible_is_the_brute_force_mask(K, pad):
    pairs = some_pairs(4, K, seed=K)
    expected = brute_force_mask(pairs)
    T = len(expected)
    batch = pack(pairs, pad_to=T + pad)
    index = torch.arange(T + pad)
    seen = visible(batch.pair, batch.branch, index[:, None], index[None, :])
    assert torch.equal(seen[:T, :T], expected)
    assert not seen[T:, :T].any() and not seen[:T, T:].any()     # padding neither sees nor is seen ...
    assert seen.diagonal().all()                                 # ... and no row is empty: its softmax would be nan


@pytest.mark.parametrize('piece', [1, 30, 256])
def test_pieces_are_the_diagonal_blocks_of_the_mask(piece):
    pairs = some_pairs(6, 2, seed=1)
    batch = pack(pairs, pad_to=300)
    index = torch.arange(300)
    whole = visible(batch.pair, batch.branch, index[:, None], index[None, :])
    rebuilt = torch.zeros_like(whole)
    for start, stop, bias in pieces_mask(batch, piece):
        assert ((bias == 0) | (bias == -math.inf)).all()
        rebuilt[start:stop, start:stop] = bias == 0
    assert torch.equal(rebuilt, whole)


# ----------------------------------------------------------------------------------------------------------------
# token_logps against the plain twin


@st.composite
def pair_lists(draw_from):
    """Pairs of every shape: prompts and responses of one token, responses as long as fit, equal responses."""
    K = draw_from(st.sampled_from([1, 2, 4]))
    rng = np.random.default_rng(draw_from(st.integers(0, 2**32 - 1)))
    pairs = []
    for _ in range(draw_from(st.integers(1, 4))):
        P = draw_from(st.one_of(st.just(1), st.just(BLOCK - 1), st.integers(1, BLOCK - 1)))
        room = BLOCK - P
        lengths = [draw_from(st.one_of(st.just(1), st.just(room), st.integers(1, room))) for _ in range(K)]
        prompt, *responses = random_tokens(rng, P, *lengths)
        if draw_from(st.booleans()):
            responses = [responses[0]] * K
        pairs.append((prompt, responses))
    return pairs


def loss_of_sums(logps, reference):
    """A loss of (B, K) summed log-probs: DPO on the first and the last response; a likelihood where there is but one."""
    if logps.size(1) == 1:
        return -logps.sum()
    reference = reference.to(logps.dtype)
    return dpo_loss(logps[:, 0], logps[:, -1], reference[:, 0], reference[:, -1], beta=0.3)[0].sum()


def chunks_of(rows):
    """A stand-in for ChunkedLogps.chunks, which at these sizes would make one chunk of everything."""
    return staticmethod(lambda h, weight: [slice(i, i + rows) for i in range(0, h.size(0), rows)])


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(pairs=pair_lists(), piece=st.sampled_from([1, 20, 64, 10**6]), rows=st.sampled_from([1, 3, 16, 10**6]),
       pad=st.sampled_from([0, 1, 50]), zeros=st.sampled_from([0, 7]), seed=st.integers(0, 3))
def test_token_logps_equal_the_plain_twin(pairs, piece, rows, pad, zeros, seed):
    """Per-token log-probs, their sums, a loss, and the gradient of every parameter, to 1e-5, whatever the shapes of the
    pairs, the pieces of the attention, the chunks of the projection, the padding and, as on a GPU, the zeros beside W."""
    model = tiny(seed)
    twin = copy.deepcopy(model).double()
    B, K = len(pairs), len(pairs[0][1])

    batch = pack(pairs)
    batch = pack(pairs, pad_to=batch.tokens.numel() + pad)
    batch.mask = pieces_mask(batch, piece)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ChunkedLogps, 'chunks', chunks_of(rows))
        patch.setattr(ChunkedLogps, 'even', staticmethod(
            lambda weight, dtype: torch.nn.functional.pad(weight.to(dtype), (0, 0, 0, zeros))))
        logps = model.token_logps(batch)
        sums = batch.sum_by_response(logps)
        expected = slow_logps(twin, pairs)
        expected_sums = torch.stack([r.sum() for r in expected]).view(B, K)
        noise = torch.randn(B, K, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        reference = expected_sums.detach() + noise
        loss = loss_of_sums(sums, reference)
        loss.backward()

    assert logps.dtype == sums.dtype == torch.float32
    close(logps, torch.cat(expected), 1e-5)
    close(sums, expected_sums, 1e-5)
    assert batch.lengths.view(-1).tolist() == [len(r) for r in expected]
    assert batch.owner.tolist() == [i for i, r in enumerate(expected) for _ in r]

    # The gradient of the loss is a sum over the responses, each a number times the gradient of log pi(y|x). Two equal
    # responses cancel, and leave rounding: so the tolerance is relative to the sizes of the terms.
    leaf = expected_sums.detach().requires_grad_()
    expected_loss = loss_of_sums(leaf, reference)
    expected_loss.backward()
    close(loss.detach(), expected_loss.detach(), 1e-5)
    names, parameters = zip(*twin.named_parameters())
    gradients, sizes = [torch.zeros_like(p) for p in parameters], [0.0] * len(parameters)
    for weight, response in zip(leaf.grad.view(-1).tolist(), expected_sums.view(-1)):
        for i, g in enumerate(torch.autograd.grad(response, parameters, retain_graph=True)):
            gradients[i] += weight * g
            sizes[i] += abs(weight) * g.norm().item()
    for name, g, size in zip(names, gradients, sizes):
        error = (model.get_parameter(name).grad.double() - g).norm().item()
        assert error <= 1e-5 * size, f'gradient of {name}: off by {error:.2e} of {size:.2e}'


def test_token_logps_do_not_depend_on_order_or_neighbours():
    model, pairs = tiny(), some_pairs(7, 2, seed=3)
    order = np.random.default_rng(0).permutation(len(pairs))
    with torch.no_grad():
        def sums(some, **options):
            batch = pack(some, **options)
            return batch.sum_by_response(model.token_logps(batch))
        together = sums(pairs)
        close(sums([pairs[i] for i in order]), together[order], 1e-5)
        close(torch.cat([sums([pair]) for pair in pairs]), together, 1e-5)
        close(sums(pairs, pad_to=500), together, 1e-5)
        close(sums([(p, r[::-1]) for p, r in pairs]).flip(1), together, 1e-5)     # chosen and rejected are peers


def test_probabilities_of_all_responses_sum_to_one():
    """Three tokens are all the words there are; the probabilities of all 27 responses of three tokens make 1."""
    model = tiny(vocab_size=3, eos_token_id=2)
    responses = [[a, b, c] for a in range(3) for b in range(3) for c in range(3)]
    batch = pack([([0, 1, 2, 2], responses), ([1], responses)])
    total = batch.sum_by_response(model.token_logps(batch)).exp().sum(dim=1)
    close(total, [1.0, 1.0], 1e-5)


def test_prompt_tokens_have_no_log_prob():
    """One number per response token and none for a prompt's: the loss reaches the model's output only where the next
    token is a response's. Not inside the prompt, not at a response's end, not in the padding."""
    model, pairs = tiny(), some_pairs(5, 2, seed=4)
    batch = pack(pairs, pad_to=200)
    outputs = []
    model.ln_f.register_forward_hook(lambda module, inputs, out: (out.retain_grad(), outputs.append(out))[0])
    logps = model.token_logps(batch)
    assert len(logps) == sum(len(r) for _, responses in pairs for r in responses)
    assert batch.targets.tolist() == [t for _, responses in pairs for r in responses for t in r]
    logps.sum().backward()
    reached = outputs[0].grad.abs().sum(dim=1) > 0

    expected, at = torch.zeros(200, dtype=torch.bool), 0
    for prompt, responses in pairs:
        at += len(prompt)
        expected[at - 1] = True                              # the prompt's last token predicts
        for response in responses:
            expected[at:at + len(response) - 1] = True       # and so does every response token but the last
            at += len(response)
    assert torch.equal(reached, expected)


@pytest.mark.filterwarnings('ignore:flex_attention called without torch.compile')
def test_flex_attention_equals_the_pieces():
    """The form of the mask that compiled code on a GPU takes, here without compiling, forward only."""
    model, pairs = tiny(), some_pairs(9, 2, seed=5)
    with torch.no_grad():
        for pad_to in (0, 256, 512):
            batch = pack(pairs, pad_to=pad_to)
            pieces = model.token_logps(batch)
            batch.mask = block_mask(batch)
            close(model.token_logps(batch), pieces, 1e-5)


def test_the_blocks_that_flex_attention_keeps_hold_all_that_is_visible():
    for seed in range(8):
        batch = pack(some_pairs(12, 2, seed=seed), pad_to=(0, 600)[seed % 2])
        kept = block_mask(batch, size=16).to_dense()[0, 0].bool()                # (T/16, T/16)
        index = torch.arange(batch.tokens.numel())
        dense = visible(batch.pair, batch.branch, index[:, None], index[None])
        side = len(kept) * 16 - len(index)
        any_visible = torch.nn.functional.pad(dense, (0, side, 0, side)).view(len(kept), 16, len(kept), 16).any(3).any(1)
        assert not (any_visible & ~kept).any()
        assert kept.sum() < 0.5 * kept.numel()                                   # and it does pass over the rest


@pytest.mark.parametrize('rows', [1, 4, 100])
def test_chunked_logps_equal_log_softmax(rows, monkeypatch):
    g = torch.Generator().manual_seed(0)
    h, weight = torch.randn(37, 16, generator=g), torch.randn(101, 16, generator=g)
    targets, upstream = torch.randint(101, (37,), generator=g), torch.randn(37, generator=g)
    monkeypatch.setattr(ChunkedLogps, 'chunks', chunks_of(rows))
    leaves = [h.clone().requires_grad_(), weight.clone().requires_grad_()]
    out = ChunkedLogps.apply(*leaves, targets, True, reduce_logits)
    out.backward(upstream)
    plain = [h.double().requires_grad_(), weight.double().requires_grad_()]
    expected = (plain[0] @ plain[1].t()).log_softmax(dim=1).gather(1, targets[:, None])[:, 0]
    expected.backward(upstream.double())
    close(out.detach(), expected.detach(), 1e-5)
    for ours, theirs in zip(leaves, plain):
        close(ours.grad, theirs.grad, 1e-5, scale=theirs.grad.abs().max())


@pytest.mark.parametrize('frozen', [0, 1])
def test_chunked_logps_where_one_factor_is_frozen(frozen, monkeypatch):
    g = torch.Generator().manual_seed(0)
    factors = [torch.randn(5, 16, generator=g), torch.randn(11, 16, generator=g)]
    targets = torch.randint(11, (5,), generator=g)
    grads, calls, product = [], [], ChunkedLogps.product
    monkeypatch.setattr(ChunkedLogps, 'product', staticmethod(lambda a, b: (calls.append(b.shape), product(a, b))[1]))
    for freeze in (False, True):
        leaves = [f.clone().requires_grad_(not (freeze and i == frozen)) for i, f in enumerate(factors)]
        out = ChunkedLogps.apply(*leaves, targets, True, reduce_logits)
        calls.clear()
        out.sum().backward()
        assert len(calls) == (0 if freeze and frozen == 1 else 1)       # no gradient is made for nothing
        grads.append([leaf.grad for leaf in leaves])
    assert grads[1][frozen] is None and torch.equal(grads[0][1 - frozen], grads[1][1 - frozen])


@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16])
def test_gradients_of_chunked_logps_in_other_precisions(dtype):
    g = torch.Generator().manual_seed(0)
    factors = [torch.randn(9, 16, generator=g).to(dtype), 0.3 * torch.randn(31, 16, generator=g).to(dtype)]
    targets, upstream = torch.randint(31, (9,), generator=g), torch.randn(9, generator=g)
    leaves, plain = [f.clone().requires_grad_() for f in factors], [f.double().requires_grad_() for f in factors]
    out = ChunkedLogps.apply(*leaves, targets, True, reduce_logits)
    out.backward(upstream.to(out.dtype))
    expected = (plain[0] @ plain[1].t()).log_softmax(dim=1).gather(1, targets[:, None])[:, 0]
    expected.backward(upstream.double())
    close(out.detach(), expected.detach(), 1e-5)
    for ours, theirs in zip(leaves, plain):
        assert ours.grad.dtype == dtype
        close(ours.grad.double(), theirs.grad, 1e-12 if dtype == torch.float64 else 0.02, scale=theirs.grad.abs().max())


def test_a_pass_without_gradients_keeps_no_probabilities():
    """What is kept for the backward pass, (N, V), is for training alone: the same numbers without it."""
    model, batch, made = tiny(), pack(some_pairs(3, 2)), []
    class Made(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, op, kinds, args=(), kwargs=None):
            out = op(*args, **(kwargs or {}))
            if torch.is_tensor(out) and out.shape == (len(batch.targets), model.config.vocab_size):
                made.append(op)
            return out
    kept_as = []
    model.reduce_logits = lambda logits, targets, kept: (kept_as.append(kept), reduce_logits(logits, targets, kept))[1]
    with pytest.MonkeyPatch.context() as patch, Made():
        patch.setattr(ChunkedLogps, 'chunks', chunks_of(4))
        with_gradients = model.token_logps(batch)
        assert made and set(kept_as) == {torch.float32}
        made.clear(), kept_as.clear()
        with torch.no_grad():
            assert torch.equal(model.token_logps(batch), with_gradients)
        assert not made and set(kept_as) == {None}


def test_chunks_cover_every_row_once():
    for rows, vocab in ((1, 50257), (1000, 50257), (5, 256), (3, 2**30)):
        h, weight = torch.empty(rows, 1, device='meta'), torch.empty(vocab, 1, device='meta')
        chunks = ChunkedLogps.chunks(h, weight)
        assert [i for c in chunks for i in range(rows)[c]] == list(range(rows))
        assert max(c.stop - c.start for c in chunks) * vocab <= max(2**23, vocab)    # 32 MiB of float32 logits


def test_token_logps_of_a_float64_model():
    model, pairs = tiny().double(), some_pairs(3, 2)
    logps = model.token_logps(pack(pairs))
    assert logps.dtype == torch.float64
    close(logps.detach(), torch.cat(slow_logps(model, pairs)).detach(), 1e-12)


def test_bfloat16_on_the_cpu_is_close_to_float32():
    model, pairs = tiny(), some_pairs(8, 2, seed=6)
    results = []
    for low in (False, True):
        model.zero_grad()
        batch = pack(pairs)
        with torch.autocast('cpu', dtype=torch.bfloat16, enabled=low):
            logps = model.token_logps(batch)
        assert logps.dtype == torch.float32 and batch.sum_by_response(logps).dtype == torch.float32
        logps.sum().backward()
        results.append((logps.detach(), {name: p.grad for name, p in model.named_parameters()}))
    check_bfloat16(*results)


def check_bfloat16(exact, low):
    """bfloat16 keeps 8 bits: an error of 1 in 256 for each number that goes into a log-prob, with signs that differ."""
    error = low[0] - exact[0]
    assert error.square().mean().sqrt() < 0.03, error.square().mean().sqrt()
    assert abs(error.mean()) < 0.01, error.mean()
    for name, g in exact[1].items():
        relative = (low[1][name] - g).norm() / g.norm()
        assert relative < 0.05, f'gradient of {name}: {relative:.3f}'


@pytest.mark.parametrize('device', ['cpu', pytest.param('cuda', marks=needs_cuda)])
def test_logits_are_not_rounded_to_bfloat16(device):
    """Logits near -100, as GPT-2's are, rounded to bfloat16 would be off by up to a quarter."""
    g = torch.Generator().manual_seed(0)
    h = torch.cat([torch.randn(64, 32, generator=g), torch.full((64, 1), 10.0)], dim=1).bfloat16().to(device)
    weight = torch.cat([0.3 * torch.randn(97, 32, generator=g), torch.full((97, 1), -10.0)], dim=1).bfloat16().to(device)
    targets = torch.randint(97, (64,), generator=g).to(device)
    exact = (h.double() @ weight.double().t()).log_softmax(dim=1).gather(1, targets[:, None])[:, 0]
    with torch.autocast(device, dtype=torch.bfloat16):
        out = ChunkedLogps.apply(h, weight.float(), targets, False, reduce_logits)
    assert out.dtype == torch.float32
    assert (out - exact).abs().max() < 1e-3


# ----------------------------------------------------------------------------------------------------------------
# transformers' folders, checkpoints, the hub


def hf_model(seed=0, **changes):
    """A transformers GPT-2 of the tiny size, with random numbers in every parameter."""
    transformers = pytest.importorskip('transformers', reason='compares with transformers')
    sizes = {**TINY, **changes}
    config = transformers.GPT2Config(n_positions=sizes.pop('block_size'), bos_token_id=sizes['eos_token_id'], **sizes)
    return randomise(transformers.GPT2LMHeadModel(config), seed=seed)


def some_tokens(*shape, seed=0):
    return torch.randint(VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def same_logits(ours, theirs):
    tokens = some_tokens(3, BLOCK)
    with torch.no_grad():
        a, b = ours(tokens), theirs(tokens).logits
    assert a.dtype == b.dtype == torch.float32 and a.shape == b.shape == (3, BLOCK, VOCAB)
    assert b.std() > 0.5                                     # numbers worth comparing
    assert (a - b).abs().max() < 1e-4


def as_safetensors(theirs, folder):
    theirs.save_pretrained(folder)
    assert os.path.exists(folder / 'model.safetensors')


def as_shards(theirs, folder):
    theirs.save_pretrained(folder, max_shard_size='20KB')
    assert len(list(folder.glob('model-*.safetensors'))) > 2


def old_state(theirs, prefix):
    """A state_dict as older versions wrote it: with the causal mask of every layer, and maybe the bare transformer's
    names without the tied head."""
    state = dict(theirs.state_dict() if prefix else theirs.transformer.state_dict())
    for layer in range(theirs.config.n_layer):
        name = f'{"transformer." if prefix else ""}h.{layer}.attn.'
        state[name + 'bias'] = torch.ones(BLOCK, BLOCK).tril().view(1, 1, BLOCK, BLOCK)
        state[name + 'masked_bias'] = torch.tensor(-1e4)
    assert ('lm_head.weight' in state) == prefix
    return state


def as_bin(theirs, folder):
    theirs.config.save_pretrained(folder)
    torch.save(old_state(theirs, prefix=True), folder / 'pytorch_model.bin')


def as_bin_without_prefix(theirs, folder):
    theirs.config.save_pretrained(folder)
    torch.save(old_state(theirs, prefix=False), folder / 'pytorch_model.bin')


def as_bin_before_torch_1_6(theirs, folder):
    theirs.config.save_pretrained(folder)
    torch.save(old_state(theirs, prefix=False), folder / 'pytorch_model.bin', _use_new_zipfile_serialization=False)


def as_shards_of_bin(theirs, folder):
    theirs.config.save_pretrained(folder)
    names, state = [f'pytorch_model-0000{i}-of-00002.bin' for i in (1, 2)], old_state(theirs, prefix=True)
    weight_map = {key: names[i % 2] for i, key in enumerate(state)}
    for name in names:
        torch.save({key: t for key, t in state.items() if weight_map[key] == name}, folder / name)
    (folder / 'pytorch_model.bin.index.json').write_text(json.dumps(dict(metadata={}, weight_map=weight_map)))


@pytest.mark.parametrize('saved', [
    as_safetensors, as_shards, as_bin, as_bin_without_prefix, as_shards_of_bin,
    as_bin_before_torch_1_6])
def test_loads_what_transformers_saves(saved, tmp_path):
    theirs = hf_model()
    saved(theirs, tmp_path)
    ours = GPT.from_pretrained(str(tmp_path))
    assert ours.config == GPTConfig(**TINY)
    assert all(p.requires_grad and p.is_contiguous() for p in ours.parameters())
    same_logits(ours, theirs)


def test_loads_bfloat16_as_float32(tmp_path):
    theirs = hf_model().bfloat16()
    theirs.save_pretrained(tmp_path)
    same_logits(GPT.from_pretrained(str(tmp_path)), theirs.float())


@pytest.mark.parametrize('eos_token_id', [None, 50256])
def test_loads_a_model_without_an_end_of_text(eos_token_id, tmp_path):
    """transformers writes 50256 for every vocabulary, also for one of 53, where nobody said otherwise."""
    theirs = hf_model(eos_token_id=eos_token_id)
    theirs.save_pretrained(tmp_path)
    ours = GPT.from_pretrained(str(tmp_path))
    assert ours.config.eos_token_id == -1
    same_logits(ours, theirs)


def test_saves_a_model_without_an_end_of_text(tmp_path):
    tiny(eos_token_id=-1).save_pretrained(str(tmp_path))
    assert json.loads((tmp_path / 'config.json').read_text())['eos_token_id'] is None


@pytest.mark.parametrize('name', SIZES)
def test_published_sizes(name):
    """Every size's parameters have the names and shapes that transformers has (on no memory: the meta device)."""
    transformers = pytest.importorskip('transformers', reason='compares with transformers')
    with torch.device('meta'):
        ours = GPT(GPTConfig(**SIZES[name]))
        theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**SIZES[name]))
    shapes = {}
    for key, p in ours.named_parameters():
        their, transposed = their_name(key)
        shapes['transformer.' + their] = tuple(reversed(p.shape)) if transposed else tuple(p.shape)
    assert shapes == {key: tuple(p.shape) for key, p in theirs.named_parameters() if key != 'lm_head.weight'}
    assert ours.num_params() == theirs.num_parameters() == {
        'distilgpt2': 81_912_576, 'gpt2': 124_439_808, 'gpt2-medium': 354_823_168, 'gpt2-large': 774_030_080,
        'gpt2-xl': 1_557_611_200}[name]


def test_save_pretrained_loads_in_transformers_and_comes_back_bit_for_bit(tmp_path):
    ours = tiny()
    ours.save_pretrained(str(tmp_path))
    assert sorted(os.listdir(tmp_path)) == ['config.json', 'model.safetensors']
    again = GPT.from_pretrained(str(tmp_path))
    assert again.config == ours.config
    for (name, a), (name_again, b) in zip(ours.state_dict().items(), again.state_dict().items(), strict=True):
        assert name == name_again and torch.equal(a, b)

    transformers = pytest.importorskip('transformers', reason='compares with transformers')
    theirs, info = transformers.GPT2LMHeadModel.from_pretrained(str(tmp_path), output_loading_info=True)
    assert not any(info.values()), info                      # no key missing, none unexpected, none of another shape
    same_logits(ours, theirs.eval())
    assert theirs.config.eos_token_id == ours.config.eos_token_id
    theirs.save_pretrained(tmp_path / 'theirs')              # and through their hands, too
    for name, t in GPT.from_pretrained(str(tmp_path / 'theirs')).state_dict().items():
        assert torch.equal(t, ours.state_dict()[name])


def test_checkpoints(tmp_path):
    """A run's folder means its ckpt.pt; a file is taken as it is; what is loaded is a copy."""
    newest, best = tiny(seed=1), tiny(seed=2)
    for model, name in ((newest, 'ckpt.pt'), (best, 'best.pt')):
        torch.save(dict(model=model.state_dict(), model_config=asdict(model.config), config=dict(loss='dpo'), step=3),
                   tmp_path / name)
    for path, model in ((tmp_path, newest), (tmp_path / 'ckpt.pt', newest), (tmp_path / 'best.pt', best)):
        loaded = GPT.from_pretrained(str(path))
        assert loaded.config == model.config
        assert all(torch.equal(t, loaded.state_dict()[name]) for name, t in model.state_dict().items())
    with torch.no_grad():
        loaded.wte.weight.zero_()
    assert torch.equal(GPT.from_pretrained(str(tmp_path / 'best.pt')).wte.weight, best.wte.weight)


@pytest.mark.parametrize('name, repo, saved', [
    ('gpt2', 'openai-community/gpt2', as_safetensors), ('gpt2-xl', 'openai-community/gpt2-xl', as_safetensors),
    ('distilgpt2', 'distilbert/distilgpt2', as_safetensors), ('someone/their-model', 'someone/their-model', as_shards),
    ('someone/old-model', 'someone/old-model', as_bin)])
def test_hub_names(name, repo, saved, tmp_path, monkeypatch):
    """A name becomes a repository, and the files that are asked for are enough; nothing is downloaded twice over."""
    import huggingface_hub
    hub, cache, asked = tmp_path / 'hub', tmp_path / 'cache', []
    hub.mkdir(), cache.mkdir()
    theirs = hf_model()
    saved(theirs, hub)
    (hub / 'flax_model.msgpack').write_bytes(b'large, and of no use here')

    def snapshot_download(repo_id, allow_patterns):
        asked.append(repo_id)
        for file in os.listdir(hub):
            if any(fnmatch.fnmatch(file, pattern) for pattern in allow_patterns):
                shutil.copy(hub / file, cache)
        return str(cache)

    monkeypatch.setattr(huggingface_hub, 'snapshot_download', snapshot_download)
    monkeypatch.chdir(tmp_path)
    same_logits(GPT.from_pretrained(name), theirs)
    assert set(asked) == {repo}
    assert not (cache / 'flax_model.msgpack').exists()


def test_the_hub_does_not_answer(monkeypatch, tmp_path):
    import huggingface_hub

    def snapshot_download(*args, **kwargs):
        raise OSError('no network\nand a long story')
    monkeypatch.setattr(huggingface_hub, 'snapshot_download', snapshot_download)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match='no network') as e:
        GPT.from_pretrained('gpt2')
    assert '\n' not in str(e.value)


def spoil_config(**changes):
    def spoil(folder):
        config = json.loads((folder / 'config.json').read_text())
        (folder / 'config.json').write_text(json.dumps(config | changes))
    return spoil


def spoil_tensors(change):
    def spoil(folder):
        from safetensors.torch import load_file, save_file
        tensors = dict(load_file(folder / 'model.safetensors'))
        change(tensors)
        save_file(tensors, folder / 'model.safetensors')
    return spoil


def cut_short(folder):
    data = (folder / 'model.safetensors').read_bytes()
    (folder / 'model.safetensors').write_bytes(data[:len(data) // 2])


@pytest.mark.parametrize('spoil, message', [
    (spoil_config(model_type='llama'), 'model_type'),
    (spoil_config(activation_function='relu'), 'activation_function'),
    (spoil_config(scale_attn_by_inverse_layer_idx=True), 'scale_attn_by_inverse_layer_idx'),
    (spoil_config(tie_word_embeddings=False), 'tie_word_embeddings'),
    (spoil_config(n_inner=17), 'n_inner'),
    (spoil_config(n_layer=1), 'h.1.'),
    (spoil_config(vocab_size=VOCAB + 1), 'wte.weight'),
    (spoil_tensors(lambda t: t.pop('transformer.h.1.mlp.c_fc.bias')), 'h.1.mlp.c_fc.bias'),
    (spoil_tensors(lambda t: t.update({'score.weight': torch.zeros(2)})), 'score.weight'),
    (spoil_tensors(lambda t: t.update({'lm_head.weight': torch.zeros(VOCAB, 24)})), 'lm_head.weight'),
    (cut_short, 'model.safetensors'),
    (lambda folder: (folder / 'model.safetensors').unlink(), 'model.safetensors'),
    (lambda folder: (folder / 'config.json').unlink(), 'config.json'),
    (lambda folder: (folder / 'config.json').write_text('{'), 'config.json')])
def test_what_is_not_a_gpt2_is_refused_by_name(spoil, message, tmp_path):
    tiny().save_pretrained(str(tmp_path))
    spoil(tmp_path)
    with pytest.raises(InputError) as e:
        GPT.from_pretrained(str(tmp_path))
    assert message in str(e.value) and '\n' not in str(e.value)


# ----------------------------------------------------------------------------------------------------------------
# Generation


def plain_loop(model, prompts, max_new_tokens, temperature=0.0, top_k=0, top_p=1.0, seed=0):
    """The plain twin of generate: no cache, no batch, the whole text through the model for every token."""
    rng = torch.Generator().manual_seed(seed)
    uniform = torch.stack([torch.rand(len(prompts), generator=rng) for _ in range(max_new_tokens)]).to(model.device)
    responses = []
    for row, prompt in enumerate(prompts):
        response = []
        while len(response) < max_new_tokens and len(prompt) + len(response) < model.config.block_size:
            with torch.no_grad():
                logits = model(torch.tensor([[*prompt, *response]], device=model.device))[:, -1]
            token = draw(logits, temperature, top_k, top_p, uniform[len(response), row:row + 1])
            response.append(token.item())
            if response[-1] == model.config.eos_token_id:
                break
        responses.append(response)
    return responses


def some_prompts(n=7, longest=12, seed=0):
    rng = np.random.default_rng(seed)
    return random_tokens(rng, *rng.integers(1, longest + 1, size=n), vocab=VOCAB - 1)


@pytest.mark.parametrize('seed', range(4))
def test_greedy_is_the_plain_loop(seed):
    model, prompts = tiny(seed), some_prompts(seed=seed)
    expected = plain_loop(model, prompts, 12)
    assert model.generate(prompts, 12, temperature=0) == expected
    assert [model.generate([prompt], 12, temperature=0)[0] for prompt in prompts] == expected
    assert len(set(map(tuple, expected))) > 3                # texts that differ, or this would show little


@pytest.mark.parametrize('options', [dict(temperature=1.0), dict(temperature=0.6, top_k=9),
                                     dict(temperature=1.5, top_p=0.8), dict(temperature=1.0, top_k=20, top_p=0.9)])
def test_samples_are_the_plain_loop(options):
    """Rows end one by one and leave the batch; the uniform numbers of those that stay are the same."""
    model, prompts = tiny(eos_token_id=-1), some_prompts(16, longest=8)
    free = model.generate(prompts, 14, seed=5, **options)
    model.config.eos_token_id = np.bincount(sum(free, [])).argmax()              # the commonest token ends the text
    responses = model.generate(prompts, 14, seed=5, **options)
    assert responses == plain_loop(model, prompts, 14, seed=5, **options)
    assert len(set(map(len, responses))) > 3                 # they did leave one by one


def test_rows_do_not_touch_each_other():
    model, prompts = tiny(eos_token_id=7), some_prompts(8, longest=8)
    before = model.generate(prompts, 14, seed=1)
    others = some_prompts(8, longest=12, seed=9)
    after = model.generate(others[:3] + prompts[3:], 14, seed=1)
    assert before[3:] == after[3:] and before[:3] != after[:3]


def test_seeds():
    model, prompts = tiny(), some_prompts()
    state = torch.get_rng_state()
    first = model.generate(prompts, 10, seed=1)
    assert torch.equal(torch.get_rng_state(), state)         # a seed of its own, so training draws what it would have
    assert model.generate(prompts, 10, seed=1) == first
    assert model.generate(prompts, 10, seed=2) != first
    twice = model.generate([prompts[0]] * 2, 10, seed=1)
    assert twice[0] != twice[1]                              # one prompt asked twice gives two texts


def test_stops_at_the_end_of_text():
    model, prompts = tiny(), some_prompts(seed=2)
    free = model.generate(prompts, 12, temperature=0)
    model.config.eos_token_id = eos = free[0][3]
    stopped = model.generate(prompts, 12, temperature=0)
    for a, b in zip(free, stopped):
        assert b == (a[:a.index(eos) + 1] if eos in a else a)
    assert len(stopped[0]) <= 4


@pytest.mark.parametrize('temperature', [0, 1.0])
def test_stops_where_the_context_ends(temperature):
    """A prompt and its response fit the model, so that what was generated can be scored."""
    model = tiny(eos_token_id=0)
    with torch.no_grad():
        model.ln_f.bias -= 5 * model.wte.weight[0]           # the text does not end by itself
    prompts = [[1] * n for n in (1, 5, BLOCK - 1)]
    responses = model.generate(prompts, 100, temperature=temperature)
    assert [len(p) + len(r) for p, r in zip(prompts, responses)] == [BLOCK] * 3
    model.token_logps(pack([(p, [r]) for p, r in zip(prompts, responses)]))


def test_generated_text_has_the_log_probs_it_was_drawn_with():
    """Greedy tokens are the likeliest ones by token_logps too: the two paths through the model meet."""
    model, prompts = tiny(), some_prompts(longest=8)
    responses = model.generate(prompts, 8, temperature=0)
    batch = pack([(p, [r]) for p, r in zip(prompts, responses)])
    with torch.no_grad():
        logps = model.token_logps(batch)
        for token in range(VOCAB):
            other = copy.copy(batch)
            other.targets = torch.full_like(batch.targets, token)
            assert (model.token_logps(other) <= logps + 1e-5).all()


def test_bounds_of_generate():
    model = tiny()
    assert [len(r) for r in model.generate([[1], [2, 3]], 1)] == [1, 1]
    for prompts in ([], [[]], [[1], []], [[1] * BLOCK]):
        with pytest.raises(InputError):
            model.generate(prompts, 3)
    for bad in (dict(max_new_tokens=0), dict(max_new_tokens=3, temperature=-1.0)):
        with pytest.raises(InputError, match='is less than'):
            model.generate([[1]], **bad)


def test_logits_of_a_bf16_model_are_float32():
    """GPT-2's logits lie near -100, where bf16 has steps of a half: the likeliest of them would be a draw."""
    model = tiny()
    with torch.no_grad():
        model.ln_f.bias[0] = 100.0
        model.wte.weight[:, 0] = -1.0                        # every logit is 100 lower, and which is the highest stays
    model.bfloat16()
    prompts = some_prompts()
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr('model.draw', lambda logits, *options: (seen.append(logits), draw(logits, *options))[1])
        model.generate(prompts, 1, temperature=0)
    batch = pack([(p, [[0]]) for p in prompts])
    with torch.no_grad():
        x = model.packed_hidden(batch)[batch.scored]
    exact = x.double() @ model.wte.weight.double().t()
    assert seen[0].dtype == torch.float32 and exact.mean() < -50
    assert (seen[0] - exact).abs().max() < 1e-3 < 0.1 < (exact.bfloat16() - exact).abs().max()


def test_generating_leaves_the_precision_of_products_alone():
    before = torch.get_float32_matmul_precision()
    try:
        for precision in ('medium', 'highest'):
            torch.set_float32_matmul_precision(precision)
            tiny().generate(some_prompts(), 3)
            assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(before)


# draw: one token from (B, V) logits


def some_logits(B=1, V=10, seed=0):
    return 2 * torch.randn(B, V, generator=torch.Generator().manual_seed(seed))


def test_draw_of_one_likeliest_token_is_greedy():
    logits = some_logits(200, 50)
    uniform = torch.rand(200, generator=torch.Generator().manual_seed(1))
    greedy = logits.argmax(dim=1)
    for options in ((0, 0, 1.0), (0, 5, 0.5), (1.0, 1, 1.0), (2.0, 1, 1.0), (1.0, 0, 1e-6), (3.0, 0, 1e-6),
                    (1e-3, 0, 1.0)):                         # temperature, top_k, top_p
        assert torch.equal(draw(logits, *options, uniform), greedy), options


def kept(probs, top_k, top_p):
    """The plain meaning of top_k and top_p, token by token: the likeliest top_k, of these the fewest that together hold
    top_p of what they all hold."""
    order = sorted(range(len(probs)), key=lambda i: -probs[i])[:top_k or len(probs)]
    total, covered, tokens = sum(probs[i] for i in order), 0.0, []
    for i in order:
        if covered >= top_p * total:
            break
        tokens.append(i)
        covered += probs[i]
    return tokens


@pytest.mark.parametrize('temperature, top_k, top_p', [
    (1.0, 0, 1.0), (0.5, 0, 1.0), (2.0, 0, 1.0), (1.0, 4, 1.0), (1.0, 0, 0.7), (1.5, 6, 0.8), (1.0, 10, 1.0),
    (1.0, 99, 0.999)])
def test_draw_has_the_frequencies_of_the_softmax(temperature, top_k, top_p):
    logits = some_logits()
    probs = (logits[0].double() / temperature).softmax(dim=0)
    tokens = kept(probs.tolist(), top_k, top_p)
    expected = torch.zeros_like(probs)
    expected[tokens] = probs[tokens] / probs[tokens].sum()
    n = 100_000

    def counts(uniform):
        drawn = draw(logits.expand(n, -1), temperature, top_k, top_p, uniform)
        return torch.bincount(drawn, minlength=logits.size(1)).double()

    # uniform numbers laid out evenly, from 0 to just below 1: every token has its share of them to within one or two
    even = counts(torch.arange(n) / n)
    assert (even - n * expected).abs().max() <= 2
    # numbers at random: the chi-square statistic of 9 degrees of freedom is below 33.7 in 9,999 of 10,000 cases
    count = counts(torch.rand(n, generator=torch.Generator().manual_seed(0)))
    assert count[expected == 0].sum() == 0
    there = expected > 0
    assert ((count - n * expected)[there].square() / (n * expected)[there]).sum() < 33.7


def test_draw_never_leaves_its_set():
    """Also at the ends of the interval, with a vocabulary whose probabilities mostly round to nothing."""
    logits = 30 * torch.randn(300, 40, generator=torch.Generator().manual_seed(0))
    for u in (0.0, 1e-12, 0.5, 1 - 2**-24):
        uniform = torch.full((300,), u)
        for top_k, top_p in ((0, 1.0), (3, 1.0), (0, 0.9), (5, 0.5), (40, 0.99)):
            drawn = draw(logits, 1.0, top_k, top_p, uniform).tolist()
            for row, token in zip(logits.softmax(dim=1), drawn):
                assert row[token] > 0
                if top_k:
                    assert row[token] >= row.sort(descending=True).values[top_k - 1]
                if top_p < 1:
                    assert row[row > row[token]].sum() < top_p


# ----------------------------------------------------------------------------------------------------------------
# The same on a GPU


def cuda_model():
    """A model whose heads are large enough for FlexAttention's kernels (16 numbers or more)."""
    config = GPTConfig(block_size=128, vocab_size=211, n_layer=2, n_head=2, n_embd=64, eos_token_id=210)
    return randomise(GPT(config), std=0.15).cuda()


def logps_and_gradients(model, batch, low):
    model.zero_grad()
    with torch.autocast('cuda', dtype=torch.bfloat16, enabled=low):
        logps = model.token_logps(batch)
    assert logps.dtype == torch.float32
    logps.sum().backward()
    return logps.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


@needs_cuda
@pytest.mark.parametrize('low', [False, True], ids=['float32', 'bfloat16'])
def test_cuda_compiled_flex_attention_equals_the_pieces(low, monkeypatch):
    """As train.py runs on a GPU: fixed shape, FlexAttention, torch.compile, bfloat16. The twin: float32, pieces, eager.
    Two batches of one shape go through the compiled code, so that nothing of the first is left in the second."""
    model = cuda_model()
    twin = copy.deepcopy(model)
    train.compile_blocks(model, SimpleNamespace(compile=True, device='cuda'))
    monkeypatch.setattr(ChunkedLogps, 'chunks', chunks_of(100))       # several, and a shorter one at the end
    for seed in (0, 1):
        pairs = some_pairs(10, 2, seed=seed, block=128)
        exact = logps_and_gradients(twin, pack(pairs).to('cuda'), low=False)
        batch = pack(pairs, pad_to=4096).to('cuda')
        batch.mask = block_mask(batch)
        fast = logps_and_gradients(model, batch, low)
        with torch.no_grad(), torch.autocast('cuda', dtype=torch.bfloat16, enabled=low):
            close(model.token_logps(batch), fast[0], 2e-2 if low else 1e-4)
        if low:
            check_bfloat16(exact, fast)
        else:
            close(fast[0], exact[0], 1e-4)
            for name, g in exact[1].items():
                assert (fast[1][name] - g).norm() <= 1e-4 * g.norm(), name


@needs_cuda
def test_cuda_float32_equals_the_plain_twin():
    model, pairs = cuda_model(), some_pairs(10, 2, seed=2, block=128)
    with torch.no_grad():
        logps = model.token_logps(pack(pairs).to('cuda'))
        close(logps, torch.cat(slow_logps(copy.deepcopy(model).cpu().double(), pairs)), 1e-5)


@needs_cuda
def test_cuda_bfloat16_pieces_are_close_to_float32():
    model, pairs = cuda_model(), some_pairs(10, 2, seed=3, block=128)
    check_bfloat16(*(logps_and_gradients(model, pack(pairs).to('cuda'), low) for low in (False, True)))


@needs_cuda
def test_cuda_generation_is_the_plain_loop():
    model, prompts = cuda_model(), some_prompts(12)
    on_cpu = copy.deepcopy(model).cpu()
    greedy = model.generate(prompts, 20, temperature=0)
    assert greedy == plain_loop(model, prompts, 20) == on_cpu.generate(prompts, 20, temperature=0)
    options = dict(temperature=0.8, top_k=50, top_p=0.95, seed=3)
    sampled = model.generate(prompts, 20, **options)
    assert sampled == plain_loop(model, prompts, 20, **options) == on_cpu.generate(prompts, 20, **options)


@needs_cuda
def test_cuda_batch_arrives_whole():
    host = pack(some_pairs(20, 2, seed=7))
    there = host.to('cuda')
    assert isinstance(there, Batch) and there.mask is None and there.starts == host.starts
    for name in ('tokens', 'positions', 'pair', 'branch', 'scored', 'targets', 'owner', 'lengths'):
        assert getattr(there, name).is_cuda and torch.equal(getattr(there, name).cpu(), getattr(host, name))
