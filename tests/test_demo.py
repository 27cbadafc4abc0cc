"""
demo.py: the language, the gold reward, the labels, and the frontier against what can be worked out exactly.

    pytest tests/test_demo.py
"""
import math

import numpy as np
import pytest
import torch

import demo
from model import GPT, GPTConfig


def test_the_gold_reward_counts_whole_words():
    assert demo.gold_reward(' great plot, dull cast but lovely score.') == 1
    assert demo.gold_reward(' greatest plot, flatter cast.') == 0
    assert demo.gold_reward('') == 0


def test_reviews_follow_the_grammar():
    rng = np.random.default_rng(0)
    tones = {word: tone for tone, words in enumerate((demo.PRAISE, demo.BLAME, demo.PLAIN)) for word in words}
    lengths = set()
    for _ in range(300):
        prompt, kindness = demo.draw_prompt(rng)
        review = demo.draw_review(rng, kindness)
        words = review.strip(' .').replace(',', '').split()
        joined = [w for w in words if w not in ('and', 'but')]
        lengths.add(len(joined) // 2)
        assert all(w in tones for w in joined[::2]) and len(set(joined[1::2])) == len(joined) // 2
        assert prompt.endswith('):') and review.startswith(' ') and review.endswith('.')
    assert lengths == {1, 2, 3, 4}


def test_kind_reviewers_are_kinder():
    rng = np.random.default_rng(0)
    kind, harsh = (np.mean([demo.gold_reward(demo.draw_review(rng, k)) for _ in range(400)]) for k in (1.0, -1.0))
    assert kind > 0.8 and harsh < -0.8


def test_the_tilted_reference_is_the_exact_optimum():
    """Samples in exactly the proportions of a known distribution: the estimate is then the sum itself."""
    rewards, counts, beta = np.array([-1.0, 0.0, 2.0]), np.array([5, 4, 1]), 0.7
    ref = counts / counts.sum()
    best = ref * np.exp(rewards / beta)
    best /= best.sum()
    reward, kl, size = demo.tilted(np.repeat(rewards, counts)[None], beta)
    assert reward == pytest.approx((best * rewards).sum())
    assert kl == pytest.approx((best * np.log(best / ref)).sum())
    assert 1 < size < 10
    assert demo.frontier_at(np.repeat(rewards, counts)[None], kl)[:2] == pytest.approx((reward, beta), rel=1e-4)


def test_no_policy_is_above_the_frontier():
    rng = np.random.default_rng(0)
    rewards = np.repeat(np.array([-1.0, 0.0, 2.0]), [5, 4, 1])[None]
    ref = np.array([0.5, 0.4, 0.1])
    for _ in range(200):
        policy = rng.dirichlet(np.ones(3))
        kl = (policy * np.log(policy / ref)).sum()
        assert (policy * [-1.0, 0.0, 2.0]).sum() <= demo.frontier_at(rewards, kl)[0] + 1e-6


@pytest.fixture(scope='module')
def model():
    """Knows nothing, and ends a review after a few bytes."""
    torch.manual_seed(0)
    return GPT(GPTConfig(block_size=128, vocab_size=257, n_layer=1, n_head=1, n_embd=16, eos_token_id=256))


def test_the_reference_lies_at_the_beginning_of_the_frontier(model):
    rewards = demo.reference_rewards(model, prompts=3, samples=6)
    f = demo.place(model, model, rewards, 'cpu', samples=5)
    assert rewards.shape == (3, 6) and f['kl'] == pytest.approx(0, abs=1e-6) and f['kl_error'] < 1e-6


def test_pairs_are_labelled_by_bradley_terry(monkeypatch):
    """P(a beats b) = sigma(r(a) - r(b)): with rewards 1 and 0, praise wins 73% of the time."""
    encode = demo.get_tokenizer('byte').encode_ordinary
    monkeypatch.setattr(demo, 'sample', lambda model, prompts, seed: [
        [*encode(' great plot.' if i % 2 else ' long plot.'), 256] if i < len(prompts) // 2 else
        [*encode(' long plot.' if i % 2 else ' great plot.'), 256] for i in range(len(prompts))])
    pairs = list(demo.draw_pairs(None, 4000))
    assert len(pairs) == 4000
    wins = np.mean([pair['chosen'] == ' great plot.' for pair in pairs])
    assert wins == pytest.approx(1 / (1 + math.exp(-1)), abs=0.03)
