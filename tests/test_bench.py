"""bench.py at its smallest: a tiny model, no peers, and no time asserted."""
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import bench
from dpo import dpo_loss
from model import GPT, GPTConfig

HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
TINY = ['--model=tiny', '--peers=False', '--batch_size=2', '--repeats=1', '--max_length=32', '--losses=dpo']


def run(*argv):
    return subprocess.run([sys.executable, 'bench.py', *argv], cwd=HERE, capture_output=True, text=True)


def test_one_section_from_the_command_line():
    done = run('step', 'memory', '--orders=own', *TINY)
    assert done.returncode == 0, done.stderr
    table = [line for line in done.stdout.splitlines() if line.startswith('| ')]
    assert [line.split(' | ')[0] for line in table] == ['| section', '| ---', '| step', '| memory']
    assert 'utilisation' in table[2] and 'GiB' in table[3]
    assert os.path.abspath(HERE) not in done.stdout


@pytest.mark.parametrize('argument, word', [
    ('stpe', "'stpe'"), ('--repeats=x', 'repeats'), ('--modle=tiny', 'modle')])
def test_a_wrong_argument_is_named(argument, word):
    with pytest.raises(bench.prepare.InputError, match=word):
        bench.main([argument])


def test_needed_arithmetic_is_what_was_worked_out_by_hand():
    gpt2 = dict(n_layer=12, n_embd=768, vocab_size=50257)
    pair = ([0] * 112, [[0] * 40, [0] * 49])      # HH-harmless's means: 125 GFLOP, 165 with the reference
    assert bench.needed(gpt2, [[pair]], 'simpo') == pytest.approx(125e9, rel=0.01)
    assert bench.needed(gpt2, [[pair], [pair]], 'dpo') == pytest.approx(2 * 165e9, rel=0.02)


def test_a_round_is_the_step_it_says(tmp_path):
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=1, n_head=2, n_embd=16))
    model.save_pretrained(tmp_path)
    o = SimpleNamespace(pairs='', folder=str(tmp_path))
    batches = bench.draw_batches(bench.get_pairs(o, 24, n=12), 3, 'sorted', 2)
    job = SimpleNamespace(loss='dpo', device='cpu', dtype='float32', compile=False, weights=str(tmp_path),
                          tokens_per_batch=60, batches=batches)
    rounds = bench.our_rounds(job)
    assert next(rounds) is None
    first, second = rounds
    given = torch.from_numpy(bench.given_reference(batches[0]))
    logps = torch.from_numpy(first['logps'])
    expected = dpo_loss(logps[:, 0], logps[:, 1], given[:, 0], given[:, 1])[0].mean()
    assert first['loss'] == pytest.approx(expected.item(), abs=1e-6) and abs(first['loss'] - np.log(2)) > 1e-4
    prompt, (chosen, _) = batches[0][0]
    with torch.no_grad():
        rows = model(torch.tensor([prompt + chosen])).log_softmax(-1)[0, len(prompt) - 1:-1]
    total = rows.gather(1, torch.tensor(chosen)[:, None]).sum().item()
    assert logps[0, 0].item() == pytest.approx(total, rel=1e-5)
    assert second['step'] > 0 and second['peak'] > 0


def test_batches_by_length_hold_pairs_of_like_length():
    o = SimpleNamespace(pairs='', folder='')
    pairs = bench.get_pairs(o, 256, n=400)
    longest = {order: [[len(p) + max(map(len, r)) for p, r in batch] for batch in
                       bench.draw_batches(pairs, 8, order, 5)] for order in ('sorted', 'own')}
    spread = {order: np.mean([max(row) - min(row) for row in rows]) for order, rows in longest.items()}
    assert spread['sorted'] < 0.2 * spread['own']
    assert all(len(p) <= 128 and len(p) + max(map(len, r)) <= 256 for p, r in pairs)
