"""
Several processes train as one: the same losses and weights, to rounding.

    pytest tests/test_processes.py
"""
import json
import os
import random
import subprocess
import sys

import pytest
import torch

from model import GPT, GPTConfig
from weights import load_checkpoint, save

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    """-> a function of the number of processes: the run's folder, trained when first asked for."""
    folder = tmp_path_factory.mktemp('processes')
    torch.manual_seed(0)
    save(GPT(GPTConfig(64, 257, 1, 2, 32)), folder / 'base')
    rng = random.Random(0)
    with open(folder / 'pairs.jsonl', 'w') as f:
        for i in range(50):
            chosen, rejected = (' '.join(rng.choices('one two three four'.split(),
                                                     k=rng.randint(1, 6))) for _ in 'ab')
            pair = dict(prompt=f'{i}:', chosen=' ' + chosen, rejected=' not ' + rejected)
            f.write(json.dumps(pair) + '\n')

    def run(processes):
        out = folder / f'run{processes}'
        args = [f'--{k}={v}' for k, v in dict(
            init_from=folder / 'base', dataset=folder / 'pairs.jsonl', data_dir=folder / 'data',
            out_dir=out, tokenizer='byte', max_length=64, max_prompt_length=16, val_fraction=0.2,
            batch_size=7, max_iters=5, eval_interval=5, log_interval=1, learning_rate=1e-3,
            device='cpu').items()]
        launcher = [] if processes == 1 else ['-m', 'torch.distributed.run', '--standalone',
                                              f'--nproc_per_node={processes}']
        env = dict(os.environ, OMP_WAIT_POLICY='PASSIVE', OMP_NUM_THREADS='1')
        done = subprocess.run([sys.executable, *launcher, 'train.py', *args], cwd=ROOT, text=True,
                              capture_output=True, env=env)
        assert done.returncode == 0, done.stderr[-2000:]
        return out, done.stdout
    return run


def test_two_and_three_processes_equal_one(runs):
    (whole, said) = runs(1)
    one = load_checkpoint(str(whole / 'ckpt.pt'))['model']
    log = [json.loads(line) for line in open(whole / 'log.jsonl')]
    for processes in (2, 3):
        out, more = runs(processes)
        assert more.count('parameters;') == said.count('parameters;') == 1       # only one process speaks
        for name, t in load_checkpoint(str(out / 'ckpt.pt'))['model'].items():
            assert (t - one[name]).abs().mean() < 1e-6, (processes, name)
        lines = [json.loads(line) for line in open(out / 'log.jsonl')]
        assert len(lines) == len(log) and lines[0]['processes'] == processes
        for a, b in zip(log[1:], lines[1:]):
            assert all(b[k] == pytest.approx(a[k], rel=1e-4, abs=1e-5)
                       for k in a if not k.endswith('_per_s'))
        theirs, ours = ([json.loads(line) for line in open(folder / 'eval.jsonl')]
                        for folder in (out, whole))
        assert [line['id'] for line in theirs] == [line['id'] for line in ours]
