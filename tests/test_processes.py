"""torchrun with several processes trains the same run as one. Left out: several machines, GPUs."""
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import train
import weights
from forks import ROOT, until
from lab.plot import read_jsonl
from model import GPT, GPTConfig


def options(**changed):
    return [f'--{name}={value}' for name, value in (dict(
        init_from='base', dataset='pairs.jsonl', data_dir='data', tokenizer='byte', max_length=64,
        max_prompt_length=16, val_fraction=0.2, batch_size=7, eval_samples=3, max_iters=5,
        eval_interval=2, log_interval=1, learning_rate=1e-3, device='cpu', schedule='constant')
        | changed).items()]


@pytest.fixture
def torchrun(tmp_path, monkeypatch):
    """torchrun(n, name=value, ...): train.py in n processes, in a folder with a model and pairs."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    weights.save(GPT(GPTConfig(64, 257, 2, 2, 32)), 'base')
    Path('pairs.jsonl').write_text(''.join(json.dumps(dict(
        prompt=f'{i}:', chosen='a red dog'[:i % 9 + 1], rejected='one old cat'[:i * 7 % 11 + 1]))
        + '\n' for i in range(60)))
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone']
    return lambda processes, **changed: subprocess.Popen(
        [*command, f'--nproc_per_node={processes}', f'{ROOT}/train.py', *options(**changed)],
        env=dict(os.environ, OMP_WAIT_POLICY='PASSIVE', OMP_NUM_THREADS='1'), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def read_log(folder):
    return [{name: value for name, value in line.items() if not name.endswith('_per_s')}
            for line in read_jsonl(f'{folder}/log.jsonl')[1:]]


@pytest.mark.parametrize('processes, reference', [(2, 'cached'), (3, 'live')])
def test_several_processes_equal_one(torchrun, processes, reference):
    """Weights, log and evaluation, except for rounding; they prepare data and reference anew."""
    train.train(train.load_config(options(out_dir='one', reference=reference)))
    process = torchrun(processes, out_dir='many', data_dir='data_many', reference=reference)
    printed = process.communicate(timeout=120)[0]
    assert process.returncode == 0, printed[-2000:]
    assert printed.count('parameters;') == 1               # one of them prints
    ours, theirs = (weights.load_checkpoint(f'{run}/ckpt.pt') for run in ('many', 'one'))
    for name, t in theirs['model'].items():
        assert (ours['model'][name] - t).abs().mean() < 1e-6, name
    for read in (read_log, lambda run: read_jsonl(f'{run}/eval.jsonl')):
        for line, expected in zip(read('many'), read('one'), strict=True):
            assert line == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert read_jsonl('many/samples.jsonl') == read_jsonl('one/samples.jsonl')
    assert read_jsonl('many/log.jsonl')[0]['processes'] == processes


@pytest.mark.skipif(not os.path.exists('/proc'), reason='the processes are found through /proc')
def test_a_signal_to_one_process_stops_them_all(torchrun):
    """They finish the same step, one of them saves, and a single process can go on."""
    process, log = torchrun(2, out_dir='stopped', max_iters=10000), Path('stopped/log.jsonl')
    assert until(lambda: process.poll() is not None
                 or log.exists() and log.read_bytes().count(b'\n') > 4, 120)
    children = Path(f'/proc/{process.pid}/task/{process.pid}/children').read_text()
    os.kill(int(children.split()[-1]), signal.SIGTERM)
    process.communicate(timeout=120)
    done = weights.load_checkpoint('stopped/ckpt.pt')['step']
    train.train(train.load_config(options(out_dir='stopped', resume=True, max_iters=done + 2)))
    steps = [line['step'] for line in read_log('stopped') if 'loss' in line]
    assert steps == list(range(done + 2))
