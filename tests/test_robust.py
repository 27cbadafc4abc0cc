"""
Nothing lost, nothing silent: runs killed, interrupted or out of disk, and input that is damaged at random.

    pytest tests/test_robust.py
    NANOPREF_LONG=1 pytest tests/test_robust.py     # 100 kills instead of 20, and many more random inputs

Commands run in forks of one process (forks.py). What is wrong rather than damaged is in test_bad_input.py.
"""
import ast
import contextlib
import dataclasses
import glob
import gzip
import io
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings as hypothesis_settings, strategies as st

import prepare
import train
from forks import ROOT, Forks, until
from model import GPT, GPTConfig, load_checkpoint
from prepare import InputError, Pairs

LONG = bool(os.environ.get('NANOPREF_LONG'))
WORDS = 'the a red dog sees one old cat under blue tree and runs home'.split()


def write_pairs(path, n, seed=0, words=5):
    rng = random.Random(seed)

    def text(low, high):
        return ' '.join(rng.choice(WORDS) for _ in range(rng.randint(low, high)))
    with open(path, 'w') as f:
        for i in range(n):
            f.write(json.dumps(dict(prompt=f'{i} {text(1, 3)}', chosen=' ' + text(1, words - 1),
                                    rejected=' ' + text(1, words))) + '\n')


@pytest.fixture(scope='module')
def place(tmp_path_factory):
    """A folder with a tiny model and pairs, where the tests of this file are at home."""
    folder = tmp_path_factory.mktemp('robust')
    torch.manual_seed(0)
    GPT(GPTConfig(64, 257, 1, 2, 16, eos_token_id=256)).save_pretrained(folder / 'base')
    write_pairs(folder / 'pairs.jsonl', 60)
    write_pairs(folder / 'many.jsonl', 1500, words=4)
    precision = torch.get_float32_matmul_precision()
    with contextlib.chdir(folder):
        yield folder
    torch.set_float32_matmul_precision(precision)


@pytest.fixture(scope='module')
def forks():
    with Forks() as forks:
        yield forks


SETTINGS = dict(init_from='base', dataset='pairs.jsonl', data_dir='data', tokenizer='byte', max_length=64,
                max_prompt_length=32, val_fraction=0.2, batch_size=8, tokens_per_batch=512,
                learning_rate=1e-3, schedule='constant', max_iters=12, eval_interval=4, log_interval=1,
                device='cpu')


def options(**changed):
    return [f'--{name}={value}' for name, value in (SETTINGS | changed).items()]


def config(**changed):
    """The same settings for a run in this process."""
    return train.load_config(options(**changed))


def lines(path):
    """log.jsonl or eval.jsonl, whole lines all, without what a clock decides."""
    content = Path(path).read_bytes()
    assert content.endswith(b'\n')
    found = [json.loads(line) for line in content.splitlines() if b'resumed_at' not in line]
    return [{k: v for k, v in line.items() if not k.endswith('_per_s')} for line in found]


def steps(log):
    """A log's lines by step and kind, (3, True) the evaluation before step 3; none may be there twice."""
    kinds = [(line['step'], 'eval/loss' in line) for line in log[1:]]
    assert len(set(kinds)) == len(kinds), kinds
    return kinds


def same(a, b):
    """Are two parts of a checkpoint equal, bit for bit?"""
    if torch.is_tensor(a):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def assert_same_run(one, other, evaluated=True):
    """Everything that two runs leave behind, but for their names and the clock's figures."""
    names = ['ckpt.pt', 'lock', 'log.jsonl'] + ['best.pt', 'eval.jsonl'] * evaluated
    assert sorted(os.listdir(one)) == sorted(os.listdir(other)) == sorted(names)
    for name in ('ckpt.pt', 'best.pt')[:1 + evaluated]:
        a, b = (load_checkpoint(str(folder / name)) for folder in (one, other))
        for checkpoint in (a, b):
            for key in ('config', 'log_bytes'):     # out_dir and resume; the clock's figures differ in length
                checkpoint.pop(key, None)
        assert same(a, b), name
    ours, theirs = lines(one / 'log.jsonl'), lines(other / 'log.jsonl')
    assert ours[1:] == theirs[1:] and steps(ours) == steps(theirs)
    assert ours[0]['data'] == theirs[0]['data']
    assert not evaluated or (one / 'eval.jsonl').read_bytes() == (other / 'eval.jsonl').read_bytes()


def snapshot(folder):
    return {str(path): path.read_bytes() for path in Path(folder).rglob('*') if path.is_file()}


def error_of(result, code=1):
    """A command's (exit code, output) -> its error: the last line, and no traceback."""
    assert result[0] == code and 'Traceback' not in result[1], result
    return result[1].splitlines()[-1]


# ------------------------------------------------------------------------------------------------------------
# kill -9


def test_killed_at_random_instants_and_resumed(place, forks):
    kills, rng = 100 if LONG else 20, random.Random(0)
    changed = dict(max_iters=60, eval_interval=3)
    began = time.monotonic()
    assert forks.run(place, 'train.py', *options(out_dir='whole', **changed))[0] == 0
    takes, done, mid_write, finished = time.monotonic() - began, 0, 0, 0
    while done < kills or not finished:
        run = place / f'killed{finished}'
        made = run / 'ckpt.pt'
        how = '--resume=True' if made.exists() else '--overwrite=True'
        child = forks.start(place, 'train.py', *options(out_dir=run.name, **changed), how)
        if done < kills:
            moment = time.monotonic() + rng.uniform(0, 0.25) * takes
            writing = [str(run / 'best.pt.tmp'), str(run / 'ckpt.pt.tmp')][done % 8 == 3]
            if done % 4 != 3 or not until(lambda: os.path.exists(writing), 0.2 * takes):   # amid a checkpoint
                time.sleep(max(0, moment - time.monotonic()))
            child.signal(signal.SIGKILL)
        if child.wait() == 0:
            assert_same_run(place / 'whole', run)
            finished += 1
            continue
        done += 1
        assert done <= kills, child.said()
        mid_write += bool(glob.glob(str(run / '*.tmp')))
        for path in run.glob('*.pt'):           # whatever is there is whole
            load_checkpoint(str(path))
        if made.exists():                       # and what it says of the log is there, to the end of a line
            whole_lines = (run / 'log.jsonl').read_bytes()[:load_checkpoint(str(made))['log_bytes']]
            assert whole_lines.endswith(b'\n')
            steps([json.loads(line) for line in whole_lines.splitlines()])
    print(f'{kills} kills, {mid_write} of them amid a checkpoint, in {finished} runs that were finished')
    assert done == kills and mid_write >= kills // 20


def test_killed_between_the_two_checkpoints(place, monkeypatch):
    """best.pt comes first: were it to come last, a kill in between would leave an older one for good."""
    train.train(config(out_dir='both', loss='sft'))
    assert load_checkpoint(str(place / 'both' / 'best.pt'))['step'] == 12      # each is the best yet
    replace = os.replace

    def kill(source, path):
        if path.endswith('ckpt.pt') and os.path.exists(path):
            raise KeyboardInterrupt
        replace(source, path)
    monkeypatch.setattr(os, 'replace', kill)
    with pytest.raises(KeyboardInterrupt):
        train.train(config(out_dir='between', loss='sft'))
    monkeypatch.undo()
    assert load_checkpoint(str(place / 'between' / 'best.pt'))['step'] == 4
    assert load_checkpoint(str(place / 'between' / 'ckpt.pt'))['step'] == 0
    train.train(config(out_dir='between', loss='sft', resume=True))
    assert_same_run(place / 'both', place / 'between')


@pytest.mark.parametrize('changed', [
    dict(loss='simpo'), dict(loss='sft'), dict(loss='reward'), dict(loss='orpo', val_fraction=0.0),
    dict(dtype='bfloat16', tokens_per_batch=128), dict(reference='live', eval_samples=4, max_length=56)],
    ids=lambda changed: ' '.join(map(str, changed.values())))
def test_every_kind_of_run_goes_on_bit_for_bit(place, changed):
    """Interrupted between two evaluations, as by a signal, and resumed."""
    name = '-'.join(map(str, changed.values()))
    train.train(config(out_dir=f'{name}-whole', **changed))
    handlers = [(s, signal.getsignal(s)) for s in (signal.SIGINT, signal.SIGTERM)]
    plain = train.learning_rate

    def learning_rate(step, cfg):
        if step == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(step, cfg)
    try:
        with pytest.MonkeyPatch.context() as patched, pytest.raises(SystemExit) as stopped:
            patched.setattr(train, 'learning_rate', learning_rate)
            train.train(config(out_dir=f'{name}-half', **changed))
        assert stopped.value.code == 143
        del stopped                                      # its traceback holds the run's lock
    finally:
        for s, handler in handlers:
            signal.signal(s, handler)
    assert load_checkpoint(f'{name}-half/ckpt.pt')['step'] == 7
    train.train(config(out_dir=f'{name}-half', resume=True, **changed))
    for folder in (place / f'{name}-whole', place / f'{name}-half'):
        samples = folder / 'samples.jsonl'
        assert samples.exists() == ('eval_samples' in changed)
        samples.unlink(missing_ok=True)
    assert_same_run(place / f'{name}-whole', place / f'{name}-half', evaluated='val_fraction' not in changed)


def test_a_log_that_lost_its_end_is_not_filled_up(place):
    """A machine that loses power can lose what was not forced to the disk."""
    train.train(config(out_dir='power', max_iters=4))
    log = place / 'power' / 'log.jsonl'
    whole = log.read_bytes()
    log.write_bytes(whole[:-10])
    before = snapshot(place / 'power')
    with pytest.raises(InputError, match='log.jsonl: shorter than when .*ckpt.pt was written'):
        train.train(config(out_dir='power', max_iters=12, resume=True))
    assert snapshot(place / 'power') == before
    log.write_bytes(whole + b'{"step": 4, "lo')        # half a line, as a kill leaves it
    train.train(config(out_dir='power', max_iters=12, resume=True))
    steps(lines(log))


# ------------------------------------------------------------------------------------------------------------
# Ctrl-C and SIGTERM, in every stage of a run

CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -9}
BOTH = pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM], ids=['SIGINT', 'SIGTERM'])


def interrupt(child, number, when):
    """Send the signal once when() holds -> what it said; that it ended as it should has been seen to."""
    assert until(when), child.said()
    child.signal(number)
    code, said = child.wait(), child.said()
    assert code == CODES[number] and 'Traceback' not in said, (code, said)
    return said


@BOTH
def test_interrupted_while_preparing(place, forks, number):
    """The workers, which Ctrl-C reaches too, end without a word, and nothing half-written is left."""
    source = place / 'long.jsonl'
    if not source.exists():
        line = json.dumps(dict(prompt='Q' * 300, chosen='a ' * 200, rejected='b ' * 200))
        source.write_text(''.join(line.replace('"Q', f'"{i}Q') + '\n' for i in range(30000)))    # 33 MB
    data = place / f'data{number}'
    args = ['prepare.py', source, '--tokenizer=byte', f'--data_dir={data}']
    for later in (0, 0.01, 0.02, 0.03, 0.05, 0.2):                  # workers start soon after the first chunk
        child = forks.start(place, *args)
        assert until(lambda: any(os.path.getsize(f) for f in glob.glob(f'{data}/*.part-*/train.bin')))
        interrupt(child, number, lambda end=time.monotonic() + later: time.monotonic() >= end)
        assert os.listdir(data) == []
        with contextlib.suppress(ProcessLookupError):               # no worker has outlived it for long
            end = time.monotonic() + 10
            while time.monotonic() < end:
                os.killpg(child.pid, 0)
            pytest.fail('a worker is left')
    child = forks.start(place, *args)
    assert until(lambda: any(os.path.getsize(f) for f in glob.glob(f'{data}/*.part-*/train.bin')))
    child.signal(signal.SIGKILL)
    assert child.wait() == -9 and len(glob.glob(f'{data}/*.part-*')) == 1       # what it had no time to remove
    assert until(lambda: prepare_is_free(data))                     # its workers have ended as well
    assert forks.run(place, *args)[0] == 0
    folder, = data.iterdir()                                        # the next one has
    assert len(Pairs(str(folder), 'train')) > 25000


def prepare_is_free(data):
    held = [prepare.hold(folder) for folder in glob.glob(f'{data}/*.part-*')]
    for descriptor in held:
        os.close(descriptor) if descriptor else None
    return all(held)


def test_a_machine_without_git(place, monkeypatch):
    monkeypatch.setenv('PATH', '/nowhere')
    train.train(config(out_dir='no_git', max_iters=1))
    assert lines('no_git/log.jsonl')[0]['commit'] == ''


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda s: s.name)
def test_interrupted_in_the_reference_pass(place, forks, number):
    changed = dict(dataset='many.jsonl', batch_size=600, max_iters=2, eval_interval=2)     # all are seen
    if not (place / 'reference').exists():
        assert forks.run(place, 'train.py', *options(out_dir='reference', **changed))[0] == 0
        shutil.move('data', 'reference_data')
    folder, run = prepare.prepare(config(out_dir='', **changed)), place / f'reference{number}'
    pattern = f'{folder}/*-reference-*.f32'
    for path in glob.glob(pattern):
        os.remove(path)
    child = forks.start(place, 'train.py', *options(out_dir=run.name, **changed))
    interrupt(child, number, lambda: glob.glob(pattern))
    assert os.listdir(run) == ['lock']
    for path in glob.glob(pattern):
        assert os.path.getsize(path) % 8 == 0
    code, said = forks.run(place, 'train.py', *options(out_dir=run.name, **changed))
    assert code == 0, said
    assert_same_run(run, place / 'reference')
    found = {os.path.basename(path): Path(path).read_bytes() for path in glob.glob(pattern)}
    whole = Path('reference_data', os.path.basename(folder))
    assert len(found) == 2 and found == {name: (whole / name).read_bytes() for name in found}


@BOTH
def test_interrupted_in_an_evaluation(place, forks, number):
    """It is finished first, the checkpoint is written, and the run goes on from there."""
    changed = dict(dataset='many.jsonl', val_fraction=0.9, max_iters=4, eval_interval=2)
    if not (place / 'evaluated').exists():
        assert forks.run(place, 'train.py', *options(out_dir='evaluated', **changed))[0] == 0
    run = place / f'evaluated{number}'
    log = run / 'log.jsonl'
    child = forks.start(place, 'train.py', *options(out_dir=run.name, **changed))
    said = interrupt(child, number, lambda: log.exists() and log.stat().st_size)
    assert 'stopped after 0 steps; with --resume=True it goes on' in said
    assert load_checkpoint(str(run / 'ckpt.pt'))['evaluated'] == 0
    assert [line.get('step') for line in lines(log)] == [None, 0]
    assert forks.run(place, 'train.py', *options(out_dir=run.name, **changed), '--resume=True')[0] == 0
    assert_same_run(place / 'evaluated', run)


@BOTH
def test_interrupted_in_an_evaluation_alone(place, forks, number):
    changed = dict(dataset='many.jsonl', val_fraction=0.9, eval_only=True)
    run = place / f'eval_only{number}'
    child = forks.start(place, 'train.py', *options(out_dir=run.name, **changed))
    interrupt(child, number, lambda: (run / 'lock').exists())
    assert set(os.listdir(run)) <= {'lock', 'eval.jsonl'}
    if (run / 'eval.jsonl').exists():
        lines(run / 'eval.jsonl')
    assert forks.run(place, 'train.py', *options(out_dir=run.name, **changed))[0] == 0
    assert len(lines(run / 'eval.jsonl')) > 1200


@BOTH
def test_interrupted_in_a_step(place, forks, number):
    run = place / f'step{number}'
    changed = dict(max_iters=3000, eval_interval=3000, schedule='linear')
    child = forks.start(place, 'train.py', *options(out_dir=run.name, **changed))
    log = run / 'log.jsonl'
    said = interrupt(child, number, lambda: log.exists() and log.read_bytes().count(b'\n') > 10)
    done = load_checkpoint(str(run / 'ckpt.pt'))['step']
    assert f'stopped after {done} steps; with --resume=True it goes on' in said
    assert steps(lines(log))[-1] == (done - 1, False)


def test_a_worker_that_is_killed_is_an_error_of_one_line(place, monkeypatch, tmp_path):
    class Pool:
        """One whose workers the system ends, as it does for want of memory."""
        def __init__(self, *args, initializer):
            assert initializer is prepare.leave_signals

        def submit(self, *args):
            raise BrokenProcessPool('A process in the process pool was terminated abruptly')

        def shutdown(self, **options):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *exc):
            pass
    monkeypatch.setattr(prepare, 'ProcessPoolExecutor', Pool)
    monkeypatch.setattr(prepare, 'CHUNK', 100)
    monkeypatch.setattr(os, 'sched_getaffinity', lambda pid: {0, 1}, raising=False)
    with pytest.raises(InputError, match='a process that encodes records was killed'):
        prepare.prepare(config(out_dir='', data_dir=tmp_path / 'data'))
    assert os.listdir(tmp_path / 'data') == []


def test_workers_leave_ctrl_c_to_the_first_process():
    handlers = [(s, signal.getsignal(s)) for s in (signal.SIGINT, signal.SIGTERM)]
    try:
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(143))    # which a worker inherits
        prepare.leave_signals()
        assert [signal.getsignal(s) for s, _ in handlers] == [signal.SIG_IGN, signal.SIG_DFL]
    finally:
        for s, handler in handlers:
            signal.signal(s, handler)


# ------------------------------------------------------------------------------------------------------------
# A disk that is full: here, files that cannot grow beyond a size


@pytest.fixture(scope='module')
def half(place, forks):
    """A run that is done, and the same one as it stood after 4 of its 12 steps -> a function to copy it."""
    assert forks.run(place, 'train.py', *options(out_dir='full'))[0] == 0
    assert forks.run(place, 'train.py', *options(out_dir='half', max_iters=4))[0] == 0

    def half(name):
        shutil.copytree(place / 'half', place / name)
        return place / name
    return half


def goes_on(place, forks, run):
    """With room again, the run ends as one that never was without."""
    code, said = forks.run(place, 'train.py', *options(out_dir=run.name), '--resume=True')
    assert code == 0, said
    assert_same_run(place / 'full', run)


@pytest.mark.parametrize('name', ['best', 'ckpt'])
def test_disk_full_at_a_checkpoint(place, forks, half, name):
    run = half(f'full_{name}')
    before = {path: content for path, content in snapshot(run).items() if path.endswith('.pt')}
    limit = {os.path.basename(path): len(content) for path, content in before.items()}[f'{name}.pt'] - 1000
    result = forks.run(place, 'train.py', *options(out_dir=run.name), '--resume=True', file_limit=limit)
    assert re.match(rf'error: full_{name}/{name}.pt: could not be written \(OSError: .*File too large\); '
                    'the one before, if any, is as it was$', error_of(result))
    after = snapshot(run)
    assert all(after[path] == before[path] for path in before if name == 'best' or path.endswith('ckpt.pt'))
    assert load_checkpoint(str(run / 'best.pt')) and not glob.glob(f'{run}/*.tmp')
    assert load_checkpoint(str(run / 'ckpt.pt'))['step'] == 4
    goes_on(place, forks, run)


def test_disk_full_at_the_log(place, forks, half):
    run = half('full_log')
    limit = (run / 'log.jsonl').stat().st_size + 400
    before = (run / 'ckpt.pt').read_bytes()
    result = forks.run(place, 'train.py', *options(out_dir=run.name), '--resume=True', file_limit=limit)
    assert error_of(result).startswith('error: full_log/log.jsonl: could not be written (OSError')
    assert 'goes on from the last checkpoint' in result[1] and (run / 'ckpt.pt').read_bytes() == before
    assert (run / 'log.jsonl').stat().st_size == limit                      # half a line, until it goes on
    goes_on(place, forks, run)


def test_disk_full_at_the_metrics(place, forks, half):
    run = half('full_metrics')
    forks.run(place, 'train.py', *options(out_dir=run.name, eval_only=True, val_fraction=1.0))
    before = snapshot(run)
    result = forks.run(place, 'train.py', *options(out_dir=run.name, eval_only=True, val_fraction=1.0),
                       file_limit=5000)
    assert error_of(result).startswith('error: full_metrics/eval.jsonl: could not be written')
    assert snapshot(run).keys() == before.keys() and all(
        snapshot(run)[path] == before[path] for path in before if not path.endswith('lock'))


def test_disk_full_while_preparing(place, forks):
    data = place / 'full_data'
    result = forks.run(place, 'train.py', *options(out_dir='nowhere', data_dir=data), file_limit=2000)
    assert re.match(r'error: .*full_data/pairs-\w+: cannot be written \(OSError', error_of(result))
    assert os.listdir(data) == [] and not (place / 'nowhere').exists()


def test_disk_full_in_the_reference_pass(place, forks, monkeypatch):
    """A file that is mapped must be on the disk before: a page that finds it full later ends the process."""
    cfg = config(out_dir='', data_dir='full_reference')
    folder = prepare.prepare(cfg)
    args = options(out_dir='nowhere', data_dir='full_reference')
    result = forks.run(place, 'train.py', *args, file_limit=200)
    assert re.search(r'-reference-\w+.f32: cannot be written \(OSError.*; --reference=live needs no file',
                     error_of(result))
    def stop(*args):
        raise KeyboardInterrupt
    monkeypatch.setattr(train, 'score', stop)
    with pytest.raises(KeyboardInterrupt):
        train.train(config(out_dir='somewhere', data_dir='full_reference'))
    path, = glob.glob(f'{folder}/*-reference-*')
    assert os.path.getsize(path) == 320 and os.stat(path).st_blocks         # 40 pairs, and no hole


def test_disk_full_at_an_export(place, forks):
    result = forks.run(place, 'model.py', 'base', 'full_export', file_limit=2000)
    assert error_of(result).startswith('error: full_export: cannot be written (')
    assert os.listdir(place / 'full_export') == []


# ------------------------------------------------------------------------------------------------------------
# Folders and files that may not be written


@pytest.fixture
def read_only():
    """read_only(path, ...): takes away the right to write, until the test is over."""
    changed = []

    def read_only(*paths):
        for path in paths:
            changed.append((path, path.stat().st_mode))
            path.chmod(0o555 if path.is_dir() else 0o444)
    yield read_only
    for path, mode in changed:
        path.chmod(mode)


def forbidden(forks, folder, *argv):
    """The error of a command for which permissions hold; it leaves everything as it was."""
    if os.geteuid() == 0 and sys.platform != 'linux':
        pytest.skip('permissions do not hold for root, who can give up that power on Linux alone')
    before = snapshot(folder)
    error = error_of(forks.run(folder, *argv, powerless=True))
    assert snapshot(folder) == before
    return error


def test_a_read_only_run_folder(place, forks, half, read_only):
    run = half('closed')
    read_only(run)
    resume = ['train.py', *options(out_dir='closed'), '--resume=True']
    (run / 'lock').chmod(0o444)
    assert forbidden(forks, place, *resume) == 'error: out_dir: closed cannot be written (Permission denied)'
    (run / 'lock').chmod(0o644)
    code, said = forks.run(place, *resume, powerless=True)
    assert code == 1 and re.search(r'error: closed/\w+.pt: could not be written \(PermissionError', said)
    run.chmod(0o755)
    goes_on(place, forks, run)


def test_a_read_only_log(place, forks, half, read_only):
    run = half('closed_log')
    (run / 'lock').unlink()
    read_only(run / 'log.jsonl')
    result = forks.run(place, 'train.py', *options(out_dir=run.name), '--resume=True', powerless=True)
    assert error_of(result).startswith('error: out_dir: closed_log cannot be written (PermissionError')
    (run / 'log.jsonl').chmod(0o644)
    goes_on(place, forks, run)


def test_a_read_only_data_folder(place, forks, read_only):
    data = place / 'closed_data'
    data.mkdir()
    read_only(data)
    args = ['train.py', *options(out_dir='nowhere', data_dir='closed_data')]
    error = forbidden(forks, place, *args)
    assert re.match(r'error: closed_data/pairs-\w+: cannot be written \(PermissionError', error)
    data.chmod(0o755)
    folder = Path(prepare.prepare(config(out_dir='', data_dir='closed_data')))
    read_only(folder)
    error = error_of(forks.run(place, *args, powerless=True))
    assert re.search(r'-reference-\w+.f32: cannot be written \(PermissionError.*--reference=live', error)


# ------------------------------------------------------------------------------------------------------------
# Several processes


def torchrun(place, args):
    """train.py in two processes, under way."""
    launcher = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2']
    return subprocess.Popen(
        [*launcher, os.path.join(ROOT, 'train.py'), *args],
        cwd=place, env=dict(os.environ, OMP_NUM_THREADS='1', OMP_WAIT_POLICY='PASSIVE'), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def ranks_of(process):
    children = Path(f'/proc/{process.pid}/task/{process.pid}/children')
    if not children.exists():
        pytest.skip('the ranks are found through /proc')
    return set(map(int, children.read_text().split()))


def test_a_rank_that_dies_takes_the_others_down(place):
    """Its own name is in torchrun's report; the one that was left says why it ends."""
    process = torchrun(place, options(out_dir='ranks', max_iters=100_000, eval_interval=100_000))
    try:
        log = place / 'ranks' / 'log.jsonl'
        assert until(lambda: process.poll() is not None
                     or log.exists() and log.read_bytes().count(b'\n') > 3, 120)
        first = int((place / 'ranks' / 'lock').read_text())
        second, = ranks_of(process) - {first}
        os.kill(second, signal.SIGKILL)
        began = time.monotonic()
        said = process.communicate(timeout=90)[0]
    finally:
        process.kill()
    assert process.returncode != 0 and time.monotonic() - began < 60
    assert 'error: process 0 of 2: another one has ended, or is out of reach (RuntimeError' in said
    assert re.search(rf'Signal 9 \(SIGKILL\) received by PID {second}', said)
    assert load_checkpoint(str(place / 'ranks' / 'ckpt.pt'))['step'] == 0          # whole, from before
    assert not until(lambda: os.path.exists(f'/proc/{first}'), 0)


@BOTH
def test_one_rank_interrupted_stops_them_all(place, forks, number):
    """Whichever process the signal comes to: all finish the same step, and the run goes on with any number."""
    args = options(out_dir=f'ranks{number}', max_iters=100_000, eval_interval=100_000)
    process = torchrun(place, args)
    run = place / f'ranks{number}'
    try:
        assert until(lambda: process.poll() is not None
                     or (run / 'log.jsonl').exists() and (run / 'log.jsonl').read_bytes().count(b'\n') > 3, 120)
        first = int((run / 'lock').read_text())
        others = ranks_of(process) - {first}
        os.kill(others.pop() if number == signal.SIGTERM else first, number)
        said = process.communicate(timeout=90)[0]
    finally:
        process.kill()
    done = load_checkpoint(str(run / 'ckpt.pt'))['step']
    assert f'ranks{number}: stopped after {done} steps; with --resume=True it goes on' in said
    assert 'another one has ended' not in said and steps(lines(run / 'log.jsonl'))[-1] == (done - 1, False)
    code, said = forks.run(place, 'train.py', *args, '--resume=True', f'--max_iters={done + 2}')
    assert code == 0, said


# ------------------------------------------------------------------------------------------------------------
# What must change nothing


@pytest.fixture(scope='module')
def even(place):
    """Pairs of one size, 8 of which fill a step: 8 x 48 tokens."""
    rng = random.Random(1)
    with open(place / 'even.jsonl', 'w') as f:
        for _ in range(64):
            prompt, chosen, rejected = (''.join(rng.choices('abcdefg ', k=n - 1)) + '.' for n in (20, 11, 15))
            f.write(json.dumps(dict(prompt=prompt, chosen=chosen, rejected=rejected)) + '\n')


@pytest.mark.parametrize('loss', ['dpo', 'simpo', 'sft'])
def test_accumulation_over_1_2_4_and_8_micro_batches(place, even, monkeypatch, loss):
    cut, counts, runs = train.micro_batches, [], []
    monkeypatch.setattr(train, 'micro_batches', lambda *args: (counts.append(len(cut(*args))), cut(*args))[1])
    for parts in (1, 2, 4, 8):
        counts.clear()
        room = max(48, (32 if loss == 'sft' else 48) * 8 // parts)         # sft does not look at rejected
        train.train(config(loss=loss, dataset='even.jsonl', tokens_per_batch=room, max_iters=6,
                           eval_interval=100, val_fraction=0.0, out_dir=f'{loss}{parts}'))
        assert counts[-6:] == [parts] * 6
        run = place / f'{loss}{parts}'
        runs.append((lines(run / 'log.jsonl'), load_checkpoint(str(run / 'ckpt.pt'))['model']))
    (log, weights), *others = runs
    assert len(log) == 7
    for their_log, their_weights in others:
        for ours, theirs in zip(log[1:], their_log[1:], strict=True):
            assert theirs == pytest.approx(ours, rel=1e-4, abs=1e-6)
        for name, w in weights.items():
            # Adam divides by the gradient's size: where that is next to nothing, rounding shows
            assert (w - their_weights[name]).abs().mean() < 1e-6, name


def test_evaluation_in_the_middle_changes_nothing(place):
    found = {}
    for interval in (1, 3, 7, 1000):
        run = place / f'interval{interval}'
        train.train(config(out_dir=run.name, eval_interval=interval))
        log = lines(run / 'log.jsonl')
        trained = [line for line in log[1:] if 'eval/loss' not in line]
        evaluated = [line['step'] for line in log[1:] if 'eval/loss' in line]
        assert evaluated == sorted({*range(0, 12, interval), 12}) and len(trained) == 12
        found[interval] = (load_checkpoint(str(run / 'ckpt.pt')), trained, log[-1],
                           (run / 'eval.jsonl').read_bytes())
    (whole, steps, last, metrics), *others = found.values()
    for checkpoint, their_steps, their_last, their_metrics in others:
        assert all(same(checkpoint[key], whole[key]) for key in ('model', 'optimizer', 'step'))
        assert their_steps == steps and their_last == last and their_metrics == metrics


def test_the_header_is_enough_to_repeat_a_run(place):
    """Its config, given back, makes the same run; its hashes say whether the data is the same."""
    train.train(config(out_dir='header', max_iters=5, loss='simpo', gamma=0.7, seed=3, grad_clip=0.1))
    header = lines(place / 'header' / 'log.jsonl')[0]
    folder = prepare.prepare(config(out_dir=''))
    assert header['data'] == {split: Pairs(folder, split).hash for split in ('train', 'val')}
    cfg = train.Config(**header['config'] | dict(out_dir=str(place / 'repeated')))
    cfg.given = set()
    train.train(cfg)
    assert_same_run(place / 'header', place / 'repeated')
    assert header['versions']['torch'] == torch.__version__ and header['processes'] == 1 and header['commit']


# ------------------------------------------------------------------------------------------------------------
# Numbers


@pytest.mark.skipif(not LONG, reason='a reference pass of two parts takes half a minute: NANOPREF_LONG=1')
def test_interrupted_between_two_parts_of_the_reference_pass(place, monkeypatch):
    write_pairs('parts.jsonl', 5500, words=3)
    cfg, score, calls = config(dataset='parts.jsonl', out_dir='', max_iters=1), train.score, []
    train.settle_machine(cfg)
    model, pairs = GPT.from_pretrained('base'), Pairs(prepare.prepare(cfg), 'train')
    train.settle_products(model)

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return score(*args)
    whole = np.array(train.cached_reference(model, 'whole', pairs, np.arange(len(pairs)), cfg))
    monkeypatch.setattr(train, 'score', interrupted)
    with pytest.raises(KeyboardInterrupt):
        train.cached_reference(model, 'parts', pairs, np.arange(len(pairs)), cfg)
    again = train.cached_reference(model, 'parts', pairs, np.arange(len(pairs)), cfg)
    assert [len(args[2]) for args in calls] == [4096, len(pairs) - 4096, len(pairs) - 4096]
    assert np.array_equal(whole, again)


@pytest.mark.parametrize('what, says', [
    ('gradient', r'loss 0\.\d+, gradient norm (nan|inf)'), ('loss', 'loss nan, gradient norm'),
    ('infinity', 'loss inf, gradient norm')])
def test_what_is_no_number_never_reaches_the_weights(place, monkeypatch, what, says):
    """In the loss, or in its gradient alone: the checkpoint is from before, and the line says whose it is."""
    run, plain, calls = place / f'bad_{what}', train.objective, []

    def objective(cfg, logps, *args):
        losses, *rewards = plain(cfg, logps, *args)
        calls.append(torch.is_grad_enabled() and logps.requires_grad)
        if sum(calls) == 6 and calls[-1]:                        # the sixth step's only micro-batch
            zero = (logps.sum(1) - logps.sum(1).detach()).abs()
            bad = dict(gradient=zero.sqrt(), loss=zero / zero, infinity=1 / zero)[what]    # sqrt'(0) = inf
            losses = torch.cat([losses[:2], (losses + bad)[2:3], losses[3:]])
        return losses, *rewards
    monkeypatch.setattr(train, 'objective', objective)
    cfg = config(out_dir=run.name, eval_interval=3, tokens_per_batch=2048)
    with pytest.raises(InputError) as caught:
        train.train(cfg)
    monkeypatch.undo()
    message, = str(caught.value).splitlines()
    del caught                                                   # its frames hold the run's lock
    pairs = Pairs(prepare.prepare(cfg), 'train')
    step = [int(pairs.table['id'][i]) for i in train.step_indices(5, len(pairs), 8, cfg.seed)]
    assert re.match(f'step 5: {says}', message) and 'ckpt.pt is from before' in message
    named = list(map(int, message.split('eval.jsonl: ')[1].split(', ')))
    assert sorted(named) == sorted(step) if what == 'gradient' else len(named) == 1 and named[0] in step
    assert load_checkpoint(str(run / 'ckpt.pt'))['step'] == 3
    assert steps(lines(run / 'log.jsonl'))[-1] == (4, False)
    train.train(config(out_dir=run.name, eval_interval=3, tokens_per_batch=2048, resume=True))    # mended
    train.train(config(out_dir=f'{run.name}_plain', eval_interval=3, tokens_per_batch=2048))
    assert_same_run(run, place / f'{run.name}_plain')


def test_a_rate_that_was_too_high_is_mended_by_a_lower_one(place):
    """The weights break in a step whose own loss was fine: they are not written over the good ones."""
    changed = dict(out_dir='high', eval_interval=4, schedule='constant')
    train.train(config(**changed, max_iters=4))
    before = load_checkpoint('high/ckpt.pt')
    with pytest.raises(InputError, match='is from before|is not finite'):
        train.train(config(**changed, max_iters=12, learning_rate=1e38, resume=True))
    assert same(load_checkpoint('high/ckpt.pt'), before) and before['step'] == 4
    train.train(config(**changed, max_iters=12, resume=True))
    assert load_checkpoint('high/ckpt.pt')['step'] == 12
    resumed = [json.loads(line) for line in open('high/log.jsonl') if 'resumed_at' in line]
    assert resumed == [dict(resumed_at=4, changed=dict(max_iters=12))]    # the other was after the checkpoint


@pytest.mark.parametrize('val_fraction', [0.2, 0.0])
def test_the_last_steps_weights_are_looked_at(place, val_fraction):
    """No step comes after the last one to find them broken."""
    run = place / f'last{val_fraction}'
    with pytest.raises(InputError, match='is not finite|no longer finite'):
        train.train(config(out_dir=run.name, max_iters=1, learning_rate=1e39, val_fraction=val_fraction))
    assert load_checkpoint(str(run / 'ckpt.pt'))['step'] == 0 and not (run / 'eval.jsonl').exists()


def test_data_that_change_under_a_run(place, tmp_path):
    """Seen at the next checkpoint, which is not written."""
    cfg = config(out_dir='changing', data_dir=tmp_path, max_iters=8)
    folder, plain = prepare.prepare(cfg), train.learning_rate

    def learning_rate(step, cfg):
        if step == 5:
            with open(os.path.join(folder, 'val.bin'), 'r+b') as f:
                f.write(b'x')
        return plain(step, cfg)
    with pytest.MonkeyPatch.context() as patched, pytest.raises(InputError, match='val.bin: changed while'):
        patched.setattr(train, 'learning_rate', learning_rate)
        train.train(cfg)
    assert load_checkpoint('changing/ckpt.pt')['step'] == 4


# ------------------------------------------------------------------------------------------------------------
# The frame of a command


@pytest.mark.parametrize('raised, code, says', [
    (OSError(28, 'No space left on device', 'a.bin'), 'error: [Errno 28] No space left on device', None),
    (torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB.\nAnd more'),
     'error: out of memory (OutOfMemoryError: CUDA out of memory.', 'a smaller --tokens_per_batch'),
    (InputError('beta: 0'), 'error: beta: 0', None), (KeyboardInterrupt(), 130, None)])
def test_what_a_command_ends_with(raised, code, says):
    def main(argv):
        raise raised
    handler = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as caught:
            train.run(main, 'help', ['x'])
    finally:
        signal.signal(signal.SIGTERM, handler)
    said = caught.value.code
    assert said == code if isinstance(code, int) else said.startswith(code) and (says or '') in said
    assert '\n' not in str(said)


def test_a_reader_that_goes_away_ends_a_command_quietly(place):
    """python prepare.py FILE --show=1000 | head -1"""
    command = ['prepare.py', 'many.jsonl', '--show=1500', '--tokenizer=byte']
    command = [sys.executable, os.path.join(ROOT, command[0]), *command[1:]]
    process = subprocess.Popen(command, cwd=place, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline().startswith('---')
    process.stdout.close()
    assert process.stderr.read() == '' and process.wait() == 128 + signal.SIGPIPE


def test_show_leaves_out_what_preparing_would(place, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    good = json.dumps(dict(prompt='Q', chosen='A', rejected='B'))
    Path('a.jsonl').write_text(f'{good}\nnot JSON\n{good}\n')
    prepare.main(['a.jsonl', '--show=3', '--tokenizer=byte', '--bad_records=skip'])
    shown = [line for line in capsys.readouterr().out.splitlines() if line.startswith('---')]
    assert shown == ['--- a.jsonl line 1', '--- a.jsonl line 2; left out: not valid JSON (Expecting value at '
                     'character 1)', '--- a.jsonl line 3']
    with pytest.raises(InputError, match='a.jsonl line 2: not valid JSON .*--bad_records=skip'):
        prepare.main(['a.jsonl', '--show=3', '--tokenizer=byte'])
    assert os.listdir('.') == ['a.jsonl']


def test_a_record_of_another_kind_chunks_later_is_named_or_left_out(tmp_path, monkeypatch, capsys):
    """The first pair decides how many responses all have, also for workers that never saw it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(prepare, 'CHUNK', 200)
    monkeypatch.setattr(os, 'sched_getaffinity', lambda pid: {0, 1}, raising=False)
    records = [dict(prompt=f'Q{i}', chosen='A', rejected='B') for i in range(40)]
    records[20:20] = [dict(prompt='R', responses=['a', 'b', 'c']), dict(prompt='S', chosen='d')]
    Path('a.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in records))
    options = ['a.jsonl', '--tokenizer=byte', '--val_fraction=0.0']
    with pytest.raises(InputError, match='a.jsonl line 21: 3 responses, where the records before have 2'):
        prepare.main(options)
    prepare.main([*options, '--bad_records=skip'])
    printed = capsys.readouterr().out
    assert '40 kept' in printed
    assert '2 dropped: bad records, the first of them a.jsonl line 21: 3 responses, where' in printed


def test_a_source_that_changes_while_it_is_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_pairs('a.jsonl', 50)
    encode_chunk = prepare.encode_chunk

    def append(*args):
        with open('a.jsonl', 'a') as f:
            f.write('\n')
        return encode_chunk(*args)
    monkeypatch.setattr(prepare, 'encode_chunk', append)
    with pytest.raises(InputError, match='a.jsonl: changed while it was read'):
        prepare.main(['a.jsonl', '--tokenizer=byte'])
    assert os.listdir('data') == []


# ------------------------------------------------------------------------------------------------------------
# Damage at random: the outcome is success or one line, and nothing is changed or half-written

def fuzz(n, long):
    """How many examples: few enough for every run of the tests, the same each time; more on request."""
    return hypothesis_settings(max_examples=long if LONG else n, deadline=None, derandomize=not LONG,
                               database=None, report_multiple_bugs=False,
                               suppress_health_check=list(HealthCheck))


@contextlib.contextmanager
def orderly(folder):
    """The block may raise InputError: a line, and every file is as it was; or nothing, and no part is left.
    Yields a list, which then holds the message, if there is one."""
    before, said = snapshot(folder), []
    terminal = io.TextIOWrapper(io.BytesIO(), 'utf-8')              # as strict as a real one
    try:
        with contextlib.redirect_stdout(terminal), contextlib.redirect_stderr(io.StringIO()):
            yield said
    except InputError as e:
        said.append(str(e))
        assert len(said[0].splitlines()) == 1 and len(said[0]) < 800, said
        assert snapshot(folder) == before, said
    left = [path for path in Path(folder).rglob('*') if '.part-' in path.name or path.suffix == '.tmp']
    assert not left, left


texts = st.one_of(st.text(max_size=12), st.sampled_from(
    ['', ' ', 'Q', ' A', '\ud800', 'x\0y', '<|endoftext|>', '\n\nHuman: a\n\nAssistant: b',
     '\n\nHuman: a\n\nAssistant:', '\u00e9' * 40, 'word ' * 30]))
scalars = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), texts, st.just(10**400))
anything = st.recursive(scalars, lambda inner: st.one_of(
    st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=5), inner, max_size=4)), max_leaves=8)
messages = st.fixed_dictionaries(dict(
    role=st.sampled_from(['user', 'assistant', 'system', 'human', 'gpt', 'tool', 3]),
    content=st.one_of(texts, scalars)))
chats = st.lists(st.one_of(messages, messages, messages, anything), max_size=4)
numbers = st.one_of(st.floats(), st.integers(), st.floats(0, 1), scalars)
either = st.one_of(texts, chats)
values = dict(prompt=either, chosen=either, rejected=either, responses=st.lists(texts, max_size=4),
              instruction=texts, input=texts, p=numbers, margin=numbers, chosen_score=numbers,
              rejected_score=numbers, score_chosen=numbers, score_rejected=numbers)
records = st.one_of(
    st.builds(lambda keys, record: {k: v for k, v in record.items() if k in keys},
              st.sets(st.sampled_from(sorted(values))), st.fixed_dictionaries(values)),
    st.fixed_dictionaries(dict(prompt=texts, chosen=texts, rejected=texts)),
    st.fixed_dictionaries(dict(chosen=chats, rejected=chats)),
    st.dictionaries(st.one_of(st.sampled_from(sorted(values)), st.text(max_size=5)), anything), anything)


def preparing(dataset, folder, **changed):
    return SimpleNamespace(**dict(
        dataset=str(dataset), split='', tokenizer='byte', template='', max_length=40, max_prompt_length=12,
        truncation='cut', val_fraction=0.3, bad_records='error', label_from_scores=False,
        data_dir=str(folder / 'data')) | changed)


def prepared_or_refused(name, content, **changed):
    """Prepare a file of these bytes, and read back what came -> the error message, if there was one."""
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        (folder / name).write_bytes(content)
        with orderly(folder) as said:
            made = prepare.prepare(preparing(folder / name, folder, **changed))
            for split in ('train', 'val'):
                pairs = Pairs(made, split)
                for prompt, responses in map(pairs.__getitem__, range(len(pairs))):
                    assert len(prompt) and min(map(len, responses)) and max(map(max, responses)) <= 256
    return said


outcomes = dict(template=st.sampled_from(['', 'chat']), truncation=st.sampled_from(['cut', 'drop']),
                bad_records=st.sampled_from(['error', 'skip', 'skip']), label_from_scores=st.booleans())


@fuzz(250, 20_000)
@given(found=st.lists(records, min_size=1, max_size=4), changed=st.fixed_dictionaries(outcomes),
       as_list=st.booleans())
def test_any_records(found, changed, as_list):
    text = json.dumps(found) if as_list else ''.join(json.dumps(record) + '\n' for record in found)
    prepared_or_refused('a.json' if as_list else 'a.jsonl', text.encode(), **changed)


GOOD = [dict(prompt=f'Q{i}', chosen=f' yes {i}', rejected=[' no', ' \u00e9\u4e2d'][i % 2], p=0.5)
        for i in range(30)]


def good_file(name):
    if name.endswith('.parquet'):
        import pyarrow
        import pyarrow.parquet
        sink = io.BytesIO()
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(GOOD), sink)
        return sink.getvalue()
    text = ''.join(json.dumps(record, ensure_ascii=False) + '\n' for record in GOOD)
    text = json.dumps(GOOD) if name.endswith('.json') else text
    return gzip.compress(text.encode(), mtime=0) if name.endswith('.gz') else text.encode()


@st.composite
def damaged(draw, content):
    """Bytes with some of them changed, cut off, lost, doubled, or put in from elsewhere."""
    content = bytearray(content)
    for _ in range(draw(st.integers(1, 3))):
        at, kind = draw(st.integers(0, max(0, len(content) - 1))), draw(st.integers(0, 5))
        size = draw(st.integers(1, 40))
        if kind == 0 and content:
            content[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == 1:
            del content[at:]
        elif kind == 2:
            del content[at:at + size]
        elif kind == 3:
            content[at:at] = content[at:at + size]
        elif kind == 4:
            content[at:at + size] = draw(st.binary(min_size=1, max_size=20))
        elif content:
            content[at] = draw(st.sampled_from([0, 10, 13, 34, 92, 123, 125, 255]))
    return bytes(content)


KINDS = ['a.jsonl', 'a.jsonl.gz', 'a.json', 'a.parquet']


@pytest.mark.parametrize('name', KINDS)
def test_any_file(name):
    whole = good_file(name)
    assert not prepared_or_refused(name, whole)
    refused = []

    @fuzz(70, 5_000)
    @given(content=st.one_of(damaged(whole), damaged(whole), damaged(whole), st.binary(max_size=100)),
           skip=st.booleans())
    def check(content, skip):
        refused.extend(prepared_or_refused(name, content, bad_records='skip' if skip else 'error'))
    check()
    assert refused


def test_parquet_with_text_that_is_none(tmp_path):
    """What Arrow lets through and Python cannot decode."""
    content = good_file('a.parquet').replace(b' no', b' n\xff')
    assert 'a.parquet: cannot be read beyond record' in prepared_or_refused('a.parquet', content)[0]


literals = st.one_of(st.integers(), st.floats(), st.booleans(), st.none(), texts, st.just(2**70),
                     st.lists(st.integers(), max_size=2)).map(repr)
names = st.one_of(st.sampled_from([f.name for f in dataclasses.fields(train.Config)]), st.text(max_size=8))
words = st.one_of(st.builds('--{}={}'.format, names, st.one_of(literals, texts)),
                  texts.filter(lambda text: '/' not in text))


@fuzz(400, 50_000)
@given(argv=st.lists(words, max_size=4))
def test_any_command_line(argv):
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder), orderly(folder):
        cfg = train.load_config(argv)
        train.check_config(cfg)
        for field in dataclasses.fields(cfg):
            json.dumps(getattr(cfg, field.name))


assignments = st.builds('{} = {}'.format, names, literals)
symbols = st.text('ab1 =()[]{}:,.\'"#\n\t\\+-*@\0\x0c\u00e9', max_size=30)     # could do no harm if it runs


@fuzz(200, 20_000)
@given(found=st.lists(st.one_of(assignments, assignments, assignments, symbols), max_size=4),
       junk=st.binary(max_size=9))
def test_any_config_file(found, junk):
    text = '\n'.join(found).encode(errors='surrogatepass')
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        Path('c.py').write_bytes(text if len(junk) < 7 else text + b'\n#' + junk)
        with orderly(folder):
            train.load_config(['c.py'])


@pytest.fixture(scope='module')
def victim(place):
    """A run, its data and the model that it started from: what is damaged below, each file in a copy."""
    folder = place / 'victim'
    folder.mkdir()
    shutil.copytree(place / 'base', folder / 'base')
    write_pairs(folder / 'pairs.jsonl', 20)
    with contextlib.chdir(folder):
        train.train(config(out_dir='out', max_iters=4, batch_size=4))      # with the reference of all pairs
    return folder


def broken(victim, path, content, use):
    """Use a copy of the victim in which one file has these bytes -> (what came of it, the messages)."""
    with tempfile.TemporaryDirectory() as folder:
        copy, result = Path(folder) / 'copy', None
        shutil.copytree(victim, copy)
        (copy / path).write_bytes(content)
        with contextlib.chdir(copy), orderly(copy) as said:
            result = use()
    return result, said


def resume():
    train.train(config(out_dir='out', max_iters=5, batch_size=4, resume=True))


def test_any_checkpoint(victim):
    """Bits that change in a checkpoint are found, by its checksums, or were of no meaning."""
    path = victim / 'out' / 'ckpt.pt'
    content, whole, refused = path.read_bytes(), load_checkpoint(str(path)), []
    assert not broken(victim, 'out/ckpt.pt', content, resume)[1]

    @fuzz(120, 5_000)
    @given(content=damaged(content))
    def check(content):
        found, said = broken(victim, 'out/ckpt.pt', content, lambda: load_checkpoint('out/ckpt.pt'))
        assert said or same(found, whole)
        refused.extend(said)
    check()
    assert all('out/ckpt.pt: not a whole model file' in line for line in refused) and len(refused) > 50


@fuzz(40, 3_000)
@given(data=st.data())
def test_any_content_of_a_checkpoint(victim, data):
    """A whole file, in which something is not what train.py wrote."""
    whole = torch.load(victim / 'out' / 'ckpt.pt', weights_only=True)
    name = data.draw(st.sampled_from(['', '', 'model', 'model_config', 'optimizer', 'config']))
    part = whole[name] if name else whole
    key = data.draw(st.one_of(st.sampled_from(sorted(part)), st.text(max_size=3)))
    if key in part and data.draw(st.booleans()):
        del part[key]
    else:
        tensors = st.sampled_from([torch.zeros(3), torch.zeros(3).to_sparse(), torch.zeros(3, device='meta')])
        part[key] = data.draw(st.one_of(anything, tensors))
    sink = io.BytesIO()
    try:
        torch.save(whole, sink)
    except UnicodeEncodeError:                     # a lone surrogate cannot be pickled
        return
    for use in (resume, lambda: GPT.from_pretrained('out')):
        broken(victim, 'out/ckpt.pt', sink.getvalue(), use)


def test_any_model_file(victim):
    path, refused = 'base/model.safetensors', []
    content = (victim / path).read_bytes()
    assert not broken(victim, path, content, lambda: GPT.from_pretrained('base'))[1]

    @fuzz(100, 5_000)
    @given(content=damaged(content))
    def check(content):
        refused.extend(broken(victim, path, content, lambda: GPT.from_pretrained('base'))[1])
    check()
    assert refused


@fuzz(80, 5_000)
@given(data=st.data())
def test_any_model_config(victim, data):
    settings = json.loads((victim / 'base' / 'config.json').read_text())
    for _ in range(data.draw(st.integers(1, 2))):
        key = data.draw(st.sampled_from([*settings, 'n_inner', 'scale_attn_weights']))
        huge = st.sampled_from([2**31, 2**62, 10**30])
        settings[key] = data.draw(st.one_of(anything, st.integers(1, 70), huge))
    broken(victim, 'base/config.json', json.dumps(settings).encode(), lambda: GPT.from_pretrained('base'))


@pytest.mark.parametrize('name', ['meta.json', 'train.bin', 'train.idx', 'val.bin', 'val.idx'])
def test_any_prepared_data(victim, name):
    folder = next((victim / 'data').iterdir()).relative_to(victim)
    content, refused = (victim / folder / name).read_bytes(), []

    def read():
        return [Pairs(str(folder), split).meta for split in ('train', 'val')]
    whole, _ = broken(victim, folder / name, content, read)

    @fuzz(50, 3_000)
    @given(other=damaged(content))
    def check(other):
        found, said = broken(victim, folder / name, other, read)
        assert said or other == content or name == 'meta.json' and found == whole
        refused.extend(said)
    check()
    assert refused


@fuzz(30, 1_000)
@given(data=st.data())
def test_any_settings_of_a_run(victim, data):
    """Values that the config lets through end in a run, or in a line."""
    cases = dict(
        loss=st.sampled_from(sorted(train.LOSSES)),
        learning_rate=st.sampled_from([0.0, 1e-3, 1.0, 1e30, 1e308]),
        max_iters=st.integers(1, 2), batch_size=st.sampled_from([1, 3, 50]), schedule=st.sampled_from(
            ['cosine', 'linear', 'constant']), tokens_per_batch=st.sampled_from([1, 60, 200, 10**30]),
        grad_clip=st.sampled_from([0.0, 1e-30, 1e308]), weight_decay=st.sampled_from([0.0, 1e30]),
        beta1=st.sampled_from([0.0, 0.9]), eval_interval=st.sampled_from([1, 10**30]),
        log_interval=st.sampled_from([1, 10**30]), eval_pairs=st.sampled_from([0, 1, 10**30]),
        val_fraction=st.sampled_from([0.0, 0.3, 1.0]), max_length=st.sampled_from([2, 20, 64, 10**30]),
        max_prompt_length=st.sampled_from([1, 8, 10**30]), truncation=st.sampled_from(['cut', 'drop']),
        dtype=st.sampled_from(['float32', 'bfloat16']), seed=st.sampled_from([0, 2**63 - 1]),
        warmup_iters=st.sampled_from([0, 10**30]), eval_only=st.booleans(), label_from_scores=st.booleans())
    changed = {name: data.draw(values) for name, values in cases.items() if data.draw(st.integers(0, 3)) == 0}
    handlers = [(s, signal.getsignal(s)) for s in (signal.SIGINT, signal.SIGTERM)]

    def use():
        with contextlib.suppress(InputError):          # prepared first: a run that stops then changes nothing
            prepare.prepare(config(**dict(out_dir='new') | changed))
        try:
            cfg = config(**dict(out_dir='new', batch_size=4, max_iters=2) | changed)
            metrics = train.train(cfg)
        except InputError as e:
            assert len(str(e).splitlines()) == 1, e
        else:
            there = {} if cfg.eval_only else load_checkpoint('new/ckpt.pt')
            assert cfg.eval_only or there['step'] == cfg.max_iters
            assert all(t.isfinite().all() for t in there.get('model', {}).values())
            assert all(map(math.isfinite, metrics.values()))
    try:
        broken(victim, 'pairs.jsonl', (victim / 'pairs.jsonl').read_bytes(), use)
    finally:
        for s, handler in handlers:
            signal.signal(s, handler)


# ------------------------------------------------------------------------------------------------------------
# The README's troubleshooting section


def test_the_messages_that_the_readme_explains_are_in_the_code():
    with open(os.path.join(ROOT, 'README.md'), encoding='utf-8') as f:
        section = f.read().split('## Troubleshooting\n')[1].split('\n## ')[0]
    rows = re.findall(r'^\| `(.+?)` \|', section, re.M)
    code = ''
    for path in glob.glob(os.path.join(ROOT, '*.py')):
        with open(path, encoding='utf-8') as f:
            for node in ast.walk(ast.parse(f.read())):       # strings side by side are one; {...} is '...'
                if isinstance(node, ast.JoinedStr):
                    parts = [v.value if isinstance(v, ast.Constant) else '...' for v in node.values]
                    code += ''.join(parts) + '\n'
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    code += node.value + '\n'
    assert 10 <= len(rows) <= 16
    for row in rows:
        assert row in code, row
