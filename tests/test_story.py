"""
From RLHF to DPO in lab/README.md; reward distillation, position weights, best of n, judges' labels.

    pytest tests/test_story.py

Left out: what the methods reach, which lab/LOG.md has.
"""
import itertools
import math
import os
import re

import numpy as np
import pytest
import torch

from conftest import randomise
from lab import films, frontier, labels, plot
from lab.credit import PositionWeightedGPT
from lab.reward import reward_distillation_loss
from model import GPT, GPTConfig, pack
from weights import save

with open(os.path.join(films.ROOT, 'lab', 'README.md'), encoding='utf-8') as f:
    README = f.read()
PRINTED = re.findall(r'```console\n\$ python -c "(.*)"\n(.*)\n```', README)
assert len(PRINTED) == README.count('python -c') == README.count('```console') == 8


@pytest.mark.parametrize('code, printed', PRINTED)
def test_the_page_prints_what_it_says(code, printed, capsys):
    exec(code, {})
    assert capsys.readouterr().out == printed + '\n'


def test_bradley_and_terrys_example():
    names = {}
    exec(re.search(r'```python\n(.*?)```', README, re.S)[1], names)
    strengths = (names['s'] - names['s'][0]).exp()
    assert strengths.tolist() == pytest.approx([1, 1 / 2, 5 / 3], abs=1e-4)
    assert (strengths[1] / (strengths[1] + strengths[2])).item() == pytest.approx(0.2308, abs=1e-4)


def test_reward_distillation_by_hand_and_its_minimum():
    """beta = 2, log-ratios 1 and -0.5, margin 2: (2 + 1 - 2)^2 = 1."""
    w, l = torch.tensor([-10.0], requires_grad=True), torch.tensor([-20.5], requires_grad=True)
    losses, chosen, rejected = reward_distillation_loss(w, l, -11, -20, torch.tensor([2.0]), 2.0)
    losses.backward()
    assert (losses.item(), chosen.item(), rejected.item()) == (1, 2, -1)
    assert (w.grad.item(), l.grad.item()) == (4, -4)             # 2 beta (h - margin)
    r, log_z = torch.tensor([1.5, -0.5]), 0.7                    # the optimum: log-ratio r - log Z
    at_optimum = reward_distillation_loss(*(r - log_z)[:, None], 0, 0, r[:1] - r[1:])[0]
    assert at_optimum.item() == pytest.approx(0, abs=1e-12)


def test_position_weights_start_anew_at_each_response():
    config = GPTConfig(block_size=32, vocab_size=20, n_layer=1, n_head=2, n_embd=16)
    plain, weighted = (randomise(kind(config)) for kind in (GPT, PositionWeightedGPT))
    batch = pack([([1, 2], [[3, 4, 5], [6]]), ([7], [[8, 9], [1, 1, 1, 1]])])
    weights = torch.tensor([0.98 ** t for t in (0, 1, 2, 0, 0, 1, 0, 1, 2, 3)])
    assert torch.allclose(weighted.token_logps(batch), weights * plain.token_logps(batch))


@pytest.mark.parametrize('n', [1, 2, 4])
def test_best_of_n_against_every_draw_of_n(n):
    """With ties: the first of the best. The twin sums over all 5^n draws."""
    rewards = np.array([[1.0, -1.0, 1.0, 0.0, 2.0], [0.5, 0.5, 0.5, 0.5, 0.0]])
    expected = np.zeros(2)
    for row in rewards:
        policy = np.zeros(len(row))
        for draw in itertools.product(range(5), repeat=n):
            policy[draw[np.argmax(row[list(draw)])]] += 5.0 ** -n
        expected += [(policy * row).sum(), (policy * np.log(policy * 5)).sum()]
    assert frontier.best_of_n(rewards, n) == pytest.approx(expected / 2)


def test_best_of_n_without_ties_has_the_known_kl():
    kl = frontier.best_of_n(np.arange(4000.0)[None] / 4000, 4)[1]
    assert kl == pytest.approx(math.log(4) - 3 / 4, abs=1e-3)


def test_scored_pairs_carry_the_judges_difference(write):
    good, bad = ' great plot.', ' dull plot.'
    path = write('pairs.jsonl', [dict(prompt='a:', chosen=good, rejected=bad),
                                 dict(prompt='a:', chosen=bad, rejected=good)])
    for number, expected in (('margin', [2, -2]), ('p', [0.8808, 0.1192])):
        lines = plot.read_jsonl(labels.scored(path, 'gold', number))
        assert [line[number] for line in lines] == pytest.approx(expected, abs=1e-4)


def test_accepted_responses_are_drawn_from_the_tilted_reference(write, monkeypatch):
    """Rewards 1 and -1, equally often: the optimum at beta = 1 has e^2 / (e^2 + 1)."""
    texts = [[*b' great plot.', 256], [*b' dull plot.', 256], [*b' no end']]
    rng = np.random.default_rng(0)
    monkeypatch.setattr(labels, 'load', lambda base: None)
    monkeypatch.setattr(films.World, 'sample', lambda self, model, prompts, seed: [
        texts[i] for i in rng.choice(3, len(prompts), p=[0.4, 0.4, 0.2])])
    path = write('pairs.jsonl', [dict(prompt=f'{i}:', chosen='a') for i in range(3000)])
    chosen = [line['chosen'] for line in plot.read_jsonl(labels.accepted(path, 'gold', 'base'))]
    assert len(chosen) == 3000 and ' no end' not in chosen
    assert chosen.count(' great plot.') / 3000 == pytest.approx(1 / (1 + math.exp(-2)), abs=0.03)


def test_every_method_runs_from_pairs_to_the_frontier(tmp_path, write, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    save(GPT(GPTConfig(block_size=128, vocab_size=257, n_layer=1, n_head=1, n_embd=16)), 'base')
    monkeypatch.setattr(labels, 'accepted', lambda path, judge, base: path)
    monkeypatch.setattr(films, 'base_model', lambda: 'base')
    pairs = write('pairs.jsonl', [
        dict(prompt=f'{i}:', chosen=' great plot.', rejected=' dull plot.') for i in range(30)])
    settings, rewards = frontier.DEMO | dict(init_from='base'), np.arange(128.0).reshape(2, 64)
    for loss, options in frontier.MORE + frontier.REWARDS[1:]:
        options = options | (dict(responses=8) if loss == 'ppo' else {})
        job = dict(loss=loss, options=options, seed=0, max_iters=1, samples=2, dataset=pairs)
        frontier.train_judge(job, settings, '.')                 # once
        line = frontier.run_job(job, settings, rewards, '.')
        assert math.isfinite(line['reward']) and math.isfinite(line['kl']), loss
    frontier.keep_optima(rewards, '.')
    frontier.keep_best_of_n(rewards, '.')
    best = plot.read_jsonl('best_of_n.jsonl')
    assert all(line['kl'] <= line['bound'] and line['share'] <= 1 for line in best)
