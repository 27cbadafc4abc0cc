"""lab/bench.py: steps and arithmetic. tests/test_readme.py runs the command; no time asserted."""
import copy

import numpy as np
import pytest
import torch

from configurator import InputError
from dpo import dpo_loss
from lab import bench
from model import GPT, GPTConfig
from simpo import simpo_loss
from weights import load, save


def draw_pairs(n, longest):
    rng = np.random.default_rng(0)
    texts = [rng.integers(60, size=size).tolist() for size in rng.integers(1, longest, 3 * n)]
    return [(prompt, responses) for prompt, *responses in zip(texts[::3], texts[1::3], texts[2::3])]


@pytest.mark.parametrize('argument, word', [
    ('stpe', "'stpe'"), ('--modle=tiny', "'model'"), ('--losses=dop', "'dop'")])
def test_a_wrong_argument_is_named(argument, word):
    with pytest.raises(InputError, match=word):
        bench.main([argument])


def test_needed_arithmetic_is_what_was_worked_out_by_hand():
    pair = ([0] * 112, [[0] * 40, [0] * 49])               # HH-harmless's means: 125 and 165 GFLOPs
    assert bench.needed(GPTConfig(), [[pair]], 'simpo') == pytest.approx(125e9, rel=0.01)
    assert bench.needed(GPTConfig(), [[pair], [pair]], 'dpo') == pytest.approx(2 * 165e9, rel=0.02)
    # 2 heads of width 4 share a key: q and output 8 x 8, k and v 8 x 4; gate, up, down 8 x 16
    sizes = dict(n_layer=1, n_head=2, n_kv_head=1, n_embd=8, n_inner=16, vocab_size=10)
    linear = 2 * (2 * 64 + 2 * 32 + 3 * 128) * 4           # 4 tokens: a prompt of 2, responses of 1
    head, attention = 2 * 10 * 8 * 2, 4 * 8 * (2 + 2.5 + 2.5)          # (t^2)/2 keys of t queries
    found = bench.needed(GPTConfig(**sizes, gated=True), [[([0, 0], [[0], [0]])]], 'simpo')
    assert found == 3 * (linear + head + attention)


def plain_steps(policy, steps, loss):
    """The slow twin of bench.ours, a response at a time, behind its prompt: yields (loss, norm)."""
    frozen, losses_of = copy.deepcopy(policy), dict(dpo=dpo_loss, simpo=simpo_loss)[loss]
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3, weight_decay=0,
                                  betas=(0.9, 0.99))

    def logp(gpt, prompt, response):
        rows = gpt(torch.tensor([prompt + response]))[0, len(prompt) - 1:-1].log_softmax(-1)
        return rows.gather(1, torch.tensor(response)[:, None]).sum()
    for pairs in steps:
        logps, given = ([torch.stack([logp(gpt, p, r[k]) for p, r in pairs]) for k in (0, 1)]
                        for gpt in (policy, frozen))
        if loss == 'simpo':
            given = [torch.tensor([len(r[k]) for _, r in pairs]) for k in (0, 1)]
        optimizer.zero_grad()
        mean = losses_of(*logps, *(t.detach() for t in given))[0].mean()
        mean.backward()
        yield mean.item(), torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0).item()
        optimizer.step()


@pytest.mark.parametrize('loss', ['dpo', 'simpo'])
def test_rounds_of_ours_are_the_steps_they_say(loss, tmp_path):
    torch.manual_seed(0)
    save(GPT(GPTConfig(n_layer=1, n_head=2, n_embd=16, vocab_size=60)), str(tmp_path))
    cfg = bench.Options(loss=loss, init_from=str(tmp_path), device='cpu', batch_size=3,
                        tokens_per_batch=60, learning_rate=1e-3)
    steps, answers = bench.draw_steps(draw_pairs(9, 20), 3, 'own', 3), []
    bench.ours(lambda answer=None: answers.append(answer), cfg, steps)     # the first: it is set up
    plain = plain_steps(load(str(tmp_path)), steps, loss)
    for answer, (mean, norm) in zip(answers[1:], plain, strict=True):
        assert answer['loss'] == pytest.approx(mean, rel=1e-5)
        assert answer['norm'] == pytest.approx(norm, rel=1e-4)


def test_steps_by_length_have_pairs_of_like_length():
    pairs, spread = draw_pairs(400, 100), {}
    for order in ('sorted', 'own'):
        spread[order] = np.mean([np.ptp([len(p) + max(map(len, r)) for p, r in step])
                                 for step in bench.draw_steps(pairs, 8, order, 5)])
    assert spread['sorted'] < 0.2 * spread['own']
