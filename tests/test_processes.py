"""
torchrun with several processes trains the same run as one process.

    python -m pytest tests/test_processes.py

Left out: several machines, GPUs.
"""
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import train
import weights
from forks import ROOT, until
from model import GPT, GPTConfig
from weights import load_checkpoint

WORDS = 'the a red dog sees one old cat'.split()
SETTINGS = dict(init_from='base', dataset='pairs.jsonl', data_dir='data', tokenizer='byte',
                max_length=64, max_prompt_length=16, val_fraction=0.2, batch_size=7, eval_samples=3,
                max_iters=5, eval_interval=2, log_interval=1, learning_rate=1e-3, device='cpu',
                schedule='constant')


@pytest.fixture(scope='module')
def place(tmp_path_factory):
    """A folder with a tiny model and pairs, as the working directory."""
    folder, rng = tmp_path_factory.mktemp('processes'), random.Random(0)
    before = os.getcwd(), torch.get_float32_matmul_precision()
    os.chdir(folder)
    torch.manual_seed(0)
    weights.save(GPT(GPTConfig(64, 257, 2, 2, 32)), 'base')
    with open('pairs.jsonl', 'w') as f:
        for i in range(60):
            chosen, rejected = (' '.join(rng.choices(WORDS, k=rng.randint(1, 6))) for _ in range(2))
            f.write(json.dumps(dict(prompt=f'{i}:', chosen=chosen, rejected=rejected)) + '\n')
    yield folder
    os.chdir(before[0])
    torch.set_float32_matmul_precision(before[1])


def options(**changed):
    return [f'--{name}={value}' for name, value in (SETTINGS | changed).items()]


def start(processes, **changed):
    """train.py under torchrun; what all processes print goes into one pipe."""
    launcher = [sys.executable, '-m', 'torch.distributed.run', '--standalone',
                f'--nproc_per_node={processes}']
    env = dict(os.environ, OMP_WAIT_POLICY='PASSIVE', OMP_NUM_THREADS='1')
    return subprocess.Popen([*launcher, os.path.join(ROOT, 'train.py'), *options(**changed)],
                            env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def read_lines(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def read_log(folder):
    return [{name: value for name, value in line.items() if not name.endswith('_per_s')}
            for line in read_lines(f'{folder}/log.jsonl')[1:]]


@pytest.mark.parametrize('processes, reference', [(2, 'cached'), (3, 'live')])
def test_several_processes_equal_one(place, processes, reference):
    """Weights, log and evaluation, except for rounding. They prepare data and reference anew."""
    train.train(train.load_config(options(out_dir=f'one_{reference}', reference=reference)))
    process = start(processes, out_dir=reference, data_dir=f'data_{reference}', reference=reference)
    printed = process.communicate(timeout=120)[0]
    assert process.returncode == 0, printed[-2000:]
    assert printed.count('parameters;') == 1               # one of them prints
    ours, theirs = (load_checkpoint(f'{run}/ckpt.pt') for run in (reference, f'one_{reference}'))
    for name, t in theirs['model'].items():
        assert (ours['model'][name] - t).abs().mean() < 1e-6, name
    assert ours['step'] == 5 and ours['best'] == pytest.approx(theirs['best'], abs=1e-6)
    for read in (read_log, lambda run: read_lines(f'{run}/eval.jsonl')):
        for line, expected in zip(read(reference), read(f'one_{reference}'), strict=True):
            assert line == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert read_lines(f'{reference}/samples.jsonl') == read_lines(f'one_{reference}/samples.jsonl')
    assert read_lines(f'{reference}/log.jsonl')[0]['processes'] == processes


def test_a_signal_to_one_process_stops_them_all(place):
    """They finish the same step, one of them saves, and a single process can go on."""
    process = start(2, out_dir='stopped', max_iters=10000, eval_interval=10000)
    children = Path(f'/proc/{process.pid}/task/{process.pid}/children')
    log = Path('stopped/log.jsonl')
    if not children.exists():
        process.kill()
        pytest.skip('the processes are found through /proc')
    assert until(lambda: process.poll() is not None
                 or log.exists() and log.read_bytes().count(b'\n') > 4, 120)
    os.kill(int(children.read_text().split()[-1]), signal.SIGTERM)
    printed = process.communicate(timeout=120)[0]
    done = load_checkpoint('stopped/ckpt.pt')['step']
    assert f'stopped: stopped after {done} steps; --resume continues from there' in printed
    train.train(train.load_config(options(out_dir='stopped', resume=True, max_iters=done + 2)))
    steps = [line['step'] for line in read_log('stopped') if 'loss' in line]
    assert steps == list(range(done + 2))
