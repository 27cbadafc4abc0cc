"""lab/bench.py at its smallest: a tiny model, no peers, and no time asserted."""
import copy
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

import model
from configurator import InputError
from dpo import dpo_loss
from lab import bench
from simpo import simpo_loss
from weights import load, save

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
TINY = ['--model=tiny', '--peers=False', '--tokenizer=byte', '--batch_size=2', '--repeats=1',
        '--max_length=48', '--max_prompt_length=24', '--losses=dpo', '--orders=own', '--device=cpu']


def test_one_contest_from_the_command_line():
    done = subprocess.run([sys.executable, '-m', 'lab.bench', 'step', 'memory', *TINY], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    table = [line for line in done.stdout.splitlines() if line.startswith('| ')]
    assert [line.split(' | ')[0] for line in table] == ['| section', '| ---', '| step', '| memory']
    assert 'utilisation' in table[2] and 'GiB' in table[3]


@pytest.mark.parametrize('argument, word', [
    ('stpe', "'stpe'"), ('--repeats=x', 'repeats'), ('--modle=tiny', "'model'"),
    ('--losses=dop', "'dop'"), ('--dtype=half', 'dtype')])
def test_a_wrong_argument_is_named(argument, word):
    with pytest.raises(InputError, match=word):
        bench.main([argument])


def test_needed_arithmetic_is_what_was_worked_out_by_hand():
    pair = ([0] * 112, [[0] * 40, [0] * 49])      # means of HH-harmless: 125 GFLOPs, with 165 for DPO
    gpt2 = bench.MODELS['gpt2']
    assert bench.needed(gpt2, [[pair]], 'simpo') == pytest.approx(125e9, rel=0.01)
    assert bench.needed(gpt2, [[pair], [pair]], 'dpo') == pytest.approx(2 * 165e9, rel=0.02)
    # one layer, 2 heads of width 4 on 1 of keys: q 8x8, k and v 8x4 each, out 8x8; gate, up, down 8x16
    llama = model.GPTConfig(n_layer=1, n_head=2, n_kv_head=1, n_embd=8, n_inner=16, gated=True, vocab_size=10)
    linear = 2 * (64 + 2 * 32 + 64 + 3 * 128) * 4          # 2 prompt tokens and 2 responses of 1
    head, attention = 2 * 10 * 8 * 2, 2 * 2 * 8 * (2 + 2.5 + 2.5)      # keys that are seen: t^2/2
    assert bench.needed(llama, [[([0, 0], [[0], [0]])]], 'simpo') == 3 * (linear + head + attention)


def plain_steps(policy, steps, loss):
    """The slow twin of bench.ours: every response with its prompt, one at a time -> [(loss, norm), ...]"""
    frozen = copy.deepcopy(policy)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3, weight_decay=0.0)

    def logps(gpt, pairs):                   # -> (2, B)
        return torch.stack([torch.stack([
            gpt(torch.tensor([p + rs[k]])).log_softmax(-1)[0, len(p) - 1:-1].gather(
                1, torch.tensor(rs[k])[:, None]).sum() for p, rs in pairs]) for k in (0, 1)])
    for pairs in steps:
        given = logps(frozen, pairs).detach() if loss == 'dpo' else torch.tensor(
            [[float(len(rs[k])) for _, rs in pairs] for k in (0, 1)])
        losses = (dpo_loss if loss == 'dpo' else simpo_loss)(*logps(policy, pairs), *given)[0]
        losses.mean().backward()
        norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        yield losses.mean().item(), norm.item()


@pytest.mark.parametrize('loss', ['dpo', 'simpo'])
def test_rounds_of_ours_are_the_steps_they_say(loss, tmp_path):
    torch.manual_seed(0)
    save(model.GPT(model.GPTConfig(n_layer=1, n_head=2, n_embd=16, vocab_size=257)), str(tmp_path / 'w'))
    cfg = bench.Options(
        loss=loss, dataset=bench.write_texts(str(tmp_path / 'words.jsonl'), 40), tokenizer='byte',
        data_dir=str(tmp_path), init_from=str(tmp_path / 'w'), device='cpu', batch_size=3,
        model='tiny', max_length=24, max_prompt_length=12, tokens_per_batch=60, learning_rate=1e-3)
    steps, answers = bench.draw_steps(bench.get_pairs(cfg), 3, 'own', 3), []
    steps = [[([t % 257 for t in p], [[t % 257 for t in r] for r in rs]) for p, rs in s] for s in steps]
    bench.ours(answers.append, cfg, steps)
    assert answers.pop(0) is None and len(answers) == 3
    for answer, (value, norm) in zip(answers, plain_steps(load(cfg.init_from), steps, loss)):
        assert answer['loss'] == pytest.approx(value, rel=1e-4)
        assert answer['norm'] == pytest.approx(norm, rel=1e-3)
        assert answer['seconds'] > 0 and answer['peak'] > 0
    assert abs(answers[2]['loss'] - answers[0]['loss']) > 1e-4         # the policy has moved


def test_steps_by_length_have_pairs_of_like_length():
    rng = np.random.default_rng(0)
    pairs = [([0] * n, [[0] * m, [0]]) for n, m in rng.integers(1, 100, (400, 2)).tolist()]
    spread = {order: np.mean([np.ptp([len(p) + len(r[0]) for p, r in step]) for step in
                              bench.draw_steps(pairs, 8, order, 5)]) for order in ('sorted', 'own')}
    assert spread['sorted'] < 0.2 * spread['own']
