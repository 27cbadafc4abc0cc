"""
Long and large: memory that does not grow with the pairs or the steps, and files that are closed again.

    pytest tests/test_large.py
    NANOPREF_LONG=1 pytest -s tests/test_large.py     # a million pairs, 20,000 steps; prints what it measures
"""
import contextlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

import prepare
import train
from forks import ROOT, Forks, until
from model import GPT, GPTConfig

LONG = bool(os.environ.get('NANOPREF_LONG'))
PROC = pytest.mark.skipif(not os.path.exists('/proc/self/status'), reason='memory is read from /proc')
OPTIONS = dict(init_from='base', data_dir='data', tokenizer='byte', max_length=96, max_prompt_length=48,
               val_fraction=0.02, batch_size=8, tokens_per_batch=1024, learning_rate=1e-4, log_interval=1,
               eval_pairs=16, device='cpu')


def options(**changed):
    return [f'--{name}={value}' for name, value in (OPTIONS | changed).items()]


@pytest.fixture(scope='module')
def place(tmp_path_factory):
    folder, before = tmp_path_factory.mktemp('large'), os.getcwd()
    torch.manual_seed(0)
    GPT(GPTConfig(96, 257, 1, 1, 8, eos_token_id=256)).save_pretrained(folder / 'base')
    precision = torch.get_float32_matmul_precision()
    os.chdir(folder)
    yield folder
    os.chdir(before)
    torch.set_float32_matmul_precision(precision)


def write_pairs(path, n):
    """n pairs, one in a hundred of them a duplicate of another."""
    rng = random.Random(0)
    words = [''.join(rng.choices('abcdefghij', k=rng.randint(2, 9))) for _ in range(500)]
    with open(path, 'w') as f:
        for i in range(n):
            a, b, c = rng.choices(words, k=3)
            number = i - 1 if i % 100 == 99 else i
            prompt, rest = f'{number} of {a}', f'"chosen": " {b} {c}", "rejected": " {c}"'
            if number == i:
                line = f'{{"prompt": "{prompt}", {rest}}}\n'
            f.write(line)
    return path


def peak(work):
    """The most bytes that Python and NumPy held at once during work(), beyond what they held before."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_the_peak_of_preparing_and_of_a_start_does_not_grow_with_the_pairs(place, monkeypatch):
    """Four times the pairs. (A start draws an epoch's order: 8 bytes a pair.)"""
    monkeypatch.setattr(os, 'sched_getaffinity', lambda pid: {0}, raising=False)     # all in this process
    monkeypatch.setattr(prepare, 'CHUNK', 2**12)
    preparing, starting = {}, {}
    for n in (1000, 4000, 16000):      # the first takes what is taken once
        write_pairs(f'{n}.jsonl', n)
        cfg = train.load_config(options(dataset=f'{n}.jsonl', out_dir=f'run{n}', max_iters=1))
        preparing[n] = peak(lambda: prepare.prepare(cfg))
        train.permutation.cache_clear()
        starting[n] = peak(lambda: train.train(cfg))
    more = 16000 - 4000
    assert preparing[16000] - preparing[4000] < 4 * more, preparing        # less than 4 bytes a pair
    assert starting[16000] - starting[4000] < 40 * more, starting


def test_the_report_is_what_all_the_lengths_at_once_would_give(place, capsys, monkeypatch):
    """Percentiles from counts, duplicates from a file that is sorted, the longest pair as it goes by."""
    monkeypatch.setattr(prepare, 'CHUNK', 2**12)
    path = Path(write_pairs('report.jsonl', 3001))
    longest = '{"prompt": "the longest of all", "chosen": "%s", "rejected": "B"}\n' % ('A' * 60)
    path.write_text(longest + path.read_text())
    cfg = options(dataset=path, max_length=96, max_prompt_length=17)
    folder = prepare.prepare(train.load_config(cfg))
    printed = capsys.readouterr().out
    pairs = [prepare.Pairs(folder, split) for split in ('train', 'val')]
    lengths = np.concatenate([np.column_stack([p.table['prompt'], p.table['responses']]) for p in pairs])
    for name, column in (('prompt', 0), ('chosen', 1), ('rejected', 2)):
        row = np.percentile(lengths[:, column], (0, 50, 90, 99, 100), method='inverted_cdf')
        assert f'{name:>9}  ' + ''.join(f'{n:>7}' for n in row) in printed
    assert pairs[0].meta['longest_pair'] == lengths.sum(1).max()
    texts = path.read_text().splitlines()
    assert pairs[0].meta['duplicates'] == len(texts) - len(set(texts)) == 30
    assert sorted(os.listdir(folder)) == ['meta.json', 'train.bin', 'train.idx', 'val.bin', 'val.idx']


def test_percentiles_from_counts():
    rng = np.random.default_rng(0)
    for n in range(1, 120):
        values = rng.integers(1, 300, size=n)
        meta = dict(counts=dict(read=n), pairs=dict(train=n, val=0), tokens={}, duplicates=0, responses=1)
        row = np.percentile(values, (0, 50, 90, 99, 100), method='inverted_cdf')
        printed = prepare.report(meta, [Counter(values.tolist())] * 3).splitlines()[-2:]
        assert [line.split()[1:] for line in printed] == [list(map(str, row))] * 2, n


def status(pid):
    """{'VmHWM': bytes, 'RssAnon': ...} of a process, and its open files but one that it writes."""
    with open(f'/proc/{pid}/status') as f:
        found = {line.split(':')[0]: int(line.split()[1]) * 1024 for line in f if line.endswith(' kB\n')}
    names = []
    for number in os.listdir(f'/proc/{pid}/fd'):
        with contextlib.suppress(OSError):                     # closed since
            names.append(os.readlink(f'/proc/{pid}/fd/{number}'))
    return found | dict(files=[name for name in names if not name.endswith('.tmp')])


def steps_done(log):
    with open(log, 'rb') as f:
        f.seek(max(0, os.path.getsize(log) - 4096))
        last = [line for line in f.read().split(b'\n')[:-1] if line.startswith(b'{"step": ')]
    return int(last[-1].split(b'"step": ')[1].split(b',')[0]) if last else -1


@PROC
def test_memory_and_open_files_do_not_grow_with_the_steps(place):
    early, late = (1000, 20_000) if LONG else (100, 300)
    write_pairs('steps.jsonl', 400)
    with Forks() as forks:
        args = options(dataset='steps.jsonl', out_dir='steps', max_iters=late + 1,
                       eval_interval=300 if LONG else 70)
        child = forks.start(place, 'train.py', *args)
        log, found = place / 'steps' / 'log.jsonl', {}
        for step in (early, late):
            there = until(lambda: log.exists() and steps_done(log) >= step or time.sleep(0.005), 900)
            assert there, child.said()
            found[step] = status(child.pid)
        assert child.wait() == 0
    for step, figures in found.items():
        sizes = [f'{name} {figures[name] / 2**20:.1f} MiB' for name in ('VmRSS', 'RssAnon', 'VmHWM')]
        print(f'\nstep {step:,}', *sizes, f'{len(figures["files"])} open files', sep=', ')
    assert sorted(found[late]['files']) == sorted(found[early]['files'])
    assert found[late]['VmRSS'] - found[early]['VmRSS'] < 8 * 2**20, found


def watched(*argv, until_there_is=''):
    """Run a command, to its end or until that file has a line -> (seconds, its output, the most memory that
    it and, together, its children had at a time)."""
    began, most = time.monotonic(), dict(VmHWM=0, RssAnon=0, workers_RssAnon=0)
    process = subprocess.Popen([sys.executable, *map(str, argv)], text=True, stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, env=dict(os.environ, OMP_WAIT_POLICY='PASSIVE'))

    def watch():
        told = not until_there_is
        while process.poll() is None:
            try:
                own = status(process.pid)
                children = Path(f'/proc/{process.pid}/task/{process.pid}/children').read_text().split()
                own['workers_RssAnon'] = sum(status(child)['RssAnon'] for child in children)
            except (OSError, KeyError):
                own = {}
            for name in most:
                most[name] = max(most[name], own.get(name, 0))
            if not told and os.path.exists(until_there_is) and os.path.getsize(until_there_is):
                told = process.send_signal(signal.SIGTERM) or True
            time.sleep(0.02)
    watcher = threading.Thread(target=watch)
    watcher.start()
    said = process.communicate()[0]
    watcher.join()
    assert process.returncode == (143 if until_there_is else 0), said
    return time.monotonic() - began, said, most


@PROC
@pytest.mark.skipif(not LONG, reason='a million pairs take minutes: NANOPREF_LONG=1')
def test_a_million_pairs(place):
    found = {}
    for n in (100_000, 1_000_000):
        write_pairs(f'{n}.jsonl', n)
        common = options(dataset=f'{n}.jsonl')
        for what, (script, *args) in {
                'prepare': ['prepare.py', f'{n}.jsonl', *common],
                'start': ['train.py', *common, '--max_iters=20', f'--out_dir=start{n}'],
                'start and reference': ['train.py', *common, f'--out_dir=epoch{n}']}.items():
            until_there_is = f'epoch{n}/log.jsonl' if 'reference' in what else ''
            seconds, said, most = watched(os.path.join(ROOT, script), *args, until_there_is=until_there_is)
            found[what, n] = most
            first = [line for line in said.splitlines() if line.startswith('first step')]
            print(f'\n{n:,} pairs, {what}: {seconds:.1f} s', *first,
                  *(f'{name} {size / 2**20:.1f} MiB' for name, size in most.items()), sep=', ')
    for what, bytes_a_pair in {'prepare': 4, 'start': 40, 'start and reference': 80}.items():
        few, many = found[what, 100_000], found[what, 1_000_000]
        assert many['RssAnon'] - few['RssAnon'] < bytes_a_pair * 900_000 + 8 * 2**20, (what, few, many)
