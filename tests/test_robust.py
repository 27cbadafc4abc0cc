"""
Nothing lost, nothing silent: runs that are killed, interrupted or out of disk; damaged files.

    python -m pytest tests/test_robust.py
    NANOPREF_LONG=1 python -m pytest tests/test_robust.py    # 100 kills instead of 12

Commands run in forks of one process (forks.py). Left out: records that are wrong (test_prepare.py),
settings that are (test_train.py).
"""
import contextlib
import glob
import json
import os
import random
import re
import shutil
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import prepare
import train
import weights
from configurator import InputError
from forks import Forks, until
from model import GPT, GPTConfig
from weights import load_checkpoint

LONG = bool(os.environ.get('NANOPREF_LONG'))
WORDS = 'the a red dog sees one old cat under blue tree and runs home'.split()
SETTINGS = dict(init_from='base', dataset='pairs.jsonl', data_dir='data', tokenizer='byte',
                max_length=64, max_prompt_length=32, val_fraction=0.2, batch_size=8,
                tokens_per_batch=512, learning_rate=1e-3, schedule='constant', max_iters=12,
                eval_interval=4, log_interval=1, device='cpu')
KINDS = dict(dpo={}, simpo=dict(loss='simpo'), sft=dict(loss='sft'), live=dict(reference='live'))
CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -9}
SIGNALS = pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM], ids=lambda s: s.name)


def write_pairs(path, n, longest=5):
    rng = random.Random(0)

    def text(low, high):
        return ' ' + ' '.join(rng.choice(WORDS) for _ in range(rng.randint(low, high)))
    with open(path, 'w') as f:
        for i in range(n):
            record = dict(prompt=f'{i}{text(1, 3)}', chosen=text(1, longest - 1),
                          rejected=text(1, longest))
            f.write(json.dumps(record) + '\n')


@pytest.fixture(scope='module')
def place(tmp_path_factory):
    """A folder with a tiny model and pairs: the working directory of this file's tests."""
    folder = tmp_path_factory.mktemp('robust')
    torch.manual_seed(0)
    before = torch.get_float32_matmul_precision(), torch.get_num_threads()
    torch.set_num_threads(1)                               # as in forks: bits depend on it
    with contextlib.chdir(folder):
        weights.save(GPT(GPTConfig(64, 257, 1, 2, 16)), 'base')
        write_pairs('pairs.jsonl', 60)
        write_pairs('many.jsonl', 1500, longest=4)
        yield folder
    torch.set_float32_matmul_precision(before[0])
    torch.set_num_threads(before[1])


@pytest.fixture(scope='module')
def forks():
    with Forks() as forks:
        yield forks


@pytest.fixture(autouse=True)
def own_handlers():
    """A run that fails in this process leaves its handlers of signals."""
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def options(**changed):
    return [f'--{name}={value}' for name, value in (SETTINGS | changed).items()]


def config(**changed):
    """The same settings for a run in this process."""
    return train.load_config(options(**changed))


def read_lines(path):
    """log.jsonl or eval.jsonl, every line of it whole, without what depends on the clock."""
    content = Path(path).read_bytes()
    assert content.endswith(b'\n')
    return [{name: value for name, value in json.loads(line).items() if not name.endswith('_per_s')}
            for line in content.splitlines()]


def steps_of(log):
    """A log's lines by step and kind, (3, True) the evaluation before step 3; none is doubled."""
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


def assert_same_run(one, other):
    """Everything that two runs leave behind, except their names and what depends on the clock."""
    assert sorted(os.listdir(one)) == sorted(os.listdir(other))
    for name in ('ckpt.pt', 'best.pt'):
        a, b = (load_checkpoint(f'{folder}/{name}') for folder in (one, other))
        for key in ('config', 'log_bytes'):                # out_dir, resume; rates differ in length
            a.pop(key, None), b.pop(key, None)
        assert same(a, b), name
    ours, theirs = (read_lines(f'{folder}/log.jsonl') for folder in (one, other))
    assert ours[1:] == theirs[1:] and ours[0]['data'] == theirs[0]['data']
    steps_of(ours)
    assert Path(one, 'eval.jsonl').read_bytes() == Path(other, 'eval.jsonl').read_bytes()


def snapshot(folder):
    return {str(path): path.read_bytes() for path in Path(folder).rglob('*') if path.is_file()}


def error_of(result, code=1):
    """A command's (exit code, output) -> its error: the last line, and no traceback."""
    assert result[0] == code and 'Traceback' not in result[1], result
    assert result[1].count('error: ') == 1, result
    return result[1].splitlines()[-1]


# --------------------------------------------------------------------------------------------------
# kill -9


@pytest.mark.parametrize('kind', KINDS)
def test_killed_at_random_instants_and_resumed(place, forks, kind):
    kills, rng = 25 if LONG else 3, random.Random(kind)
    changed, begin = KINDS[kind] | dict(eval_interval=3, max_iters=30), time.monotonic()
    assert forks.run(place, 'train.py', *options(out_dir=f'one_{kind}', **changed))[0] == 0
    takes, finished, done = time.monotonic() - begin, 0, 0
    while done < kills or not finished:
        run = place / f'killed_{kind}{finished}'
        there = (run / 'ckpt.pt').exists()
        child = forks.start(place, 'train.py', *options(out_dir=run.name, **changed),
                            '--resume' if there else '--overwrite')
        if done < kills:
            lines, log = rng.randrange(42), run / 'log.jsonl'
            until(lambda: log.exists() and log.read_bytes().count(b'\n') > lines, takes)
            if rng.random() < 0.5:                         # amid a checkpoint
                until((run / f'{rng.choice(["best", "ckpt"])}.pt.{child.pid}.tmp').exists, takes)
            else:
                time.sleep(rng.uniform(0, 0.1) * takes)
            child.signal(signal.SIGKILL)
        if (code := child.wait()) == 0:
            assert_same_run(f'one_{kind}', run)
            finished += 1
            continue
        assert code == -signal.SIGKILL, child.printed()
        done += 1
        for path in run.glob('*.tmp'):                     # as a user would
            path.unlink()
        for path in run.glob('*.pt'):                      # whatever is there is whole,
            log_bytes = load_checkpoint(str(path)).get('log_bytes', 0)
            lines = (run / 'log.jsonl').read_bytes()[:log_bytes]    # and so is the log up to there
            assert len(lines) == log_bytes and lines[-1:] in (b'\n', b'')
            steps_of([json.loads(line) for line in lines.splitlines()])


def test_killed_between_the_two_checkpoints(place, monkeypatch):
    """best.pt comes first: were it to come last, a kill in between would leave an older one."""
    train.train(config(out_dir='both', loss='sft'))
    assert load_checkpoint('both/best.pt')['step'] == 12   # each evaluation was the best so far
    replace = os.replace

    def kill(source, path):
        if path.endswith('ckpt.pt') and os.path.exists(path):
            raise KeyboardInterrupt
        replace(source, path)
    monkeypatch.setattr(os, 'replace', kill)
    with pytest.raises(KeyboardInterrupt):
        train.train(config(out_dir='between', loss='sft'))
    monkeypatch.undo()
    assert load_checkpoint('between/best.pt')['step'] == 4
    assert load_checkpoint('between/ckpt.pt')['step'] == 0
    train.train(config(out_dir='between', loss='sft', resume=True))
    assert_same_run('both', 'between')


def stopped(function, call, number=signal.SIGTERM, **changed):
    """A run in this process that gets a signal in a call, from 0, of a function of train.py."""
    plain, calls = getattr(train, function), []

    def interrupted(*args):
        if len(calls) == call:
            os.kill(os.getpid(), number)
        calls.append(args)
        return plain(*args)
    with pytest.MonkeyPatch.context() as patched, pytest.raises(SystemExit) as end:
        patched.setattr(train, function, interrupted)
        train.train(config(**changed))
    assert end.value.code == CODES[number]


@pytest.mark.parametrize('changed', [*KINDS.values(), dict(dtype='bfloat16', tokens_per_batch=128),
                                     dict(loss='orpo', weight_decay=0.1, warmup_iters=5)],
                         ids=lambda changed: ' '.join(map(str, changed.values())) or 'dpo')
def test_stopped_between_evaluations_and_resumed(place, changed):
    name = '_'.join(map(str, changed.values()))
    train.train(config(out_dir=f'straight_{name}', **changed))
    stopped('learning_rate', 6, out_dir=f'stopped_{name}', **changed)
    assert 6 <= load_checkpoint(f'stopped_{name}/ckpt.pt')['step'] <= 7
    train.train(config(out_dir=f'stopped_{name}', resume=True, **changed))
    assert_same_run(f'straight_{name}', f'stopped_{name}')


def test_a_log_that_ran_ahead_is_cut(place):
    """By a run that was killed amid a line after its checkpoint; and the next checkpoint, written
    before anything is logged, says where the log ends now."""
    train.train(config(out_dir='not_ahead'))
    train.train(config(out_dir='ahead', max_iters=4))
    with open('ahead/log.jsonl', 'ab') as f:
        f.write(b'{"step": 4, "loss": 0.7}\n{"step": 5, "lo')
    train.train(config(out_dir='ahead', max_iters=4, resume=True))
    assert load_checkpoint('ahead/ckpt.pt')['log_bytes'] == os.path.getsize('ahead/log.jsonl')
    train.train(config(out_dir='ahead', resume=True))
    assert_same_run('not_ahead', 'ahead')


# --------------------------------------------------------------------------------------------------
# Ctrl-C and SIGTERM, in every stage of a run


def interrupt(child, number, when):
    """Send the signal as soon as when() is true -> what the command printed."""
    assert until(when), child.printed()
    child.signal(number)
    code, printed = child.wait(), child.printed()
    assert code == CODES[number] and 'Traceback' not in printed, (code, printed)
    return printed


@SIGNALS
def test_interrupted_in_a_step(place, forks, number):
    """The step is finished and saved, and the command says how to go on."""
    changed = dict(out_dir=f'step{number}', max_iters=3000, eval_interval=3000)
    log = place / f'step{number}' / 'log.jsonl'
    child = forks.start(place, 'train.py', *options(**changed))
    printed = interrupt(child, number, lambda: log.exists() and log.read_bytes().count(b'\n') > 9)
    done = load_checkpoint(f'step{number}/ckpt.pt')['step']
    assert f'step{number}: stopped after {done} steps; --resume continues from there' in printed
    assert steps_of(read_lines(log))[-1] == (done - 1, False)
    changed |= dict(max_iters=done + 2)
    code, printed = forks.run(place, 'train.py', *options(**changed), '--resume')
    assert code == 0 and steps_of(read_lines(log))[-1] == (done + 2, True)


@SIGNALS
@pytest.mark.parametrize('call', [0, 1])
def test_interrupted_in_an_evaluation(place, number, call):
    """It is finished first, the checkpoint is written, and the run goes on from there."""
    if not os.path.exists('evaluated'):
        train.train(config(out_dir='evaluated'))
    run = f'evaluated{number}{call}'
    stopped('evaluate', call, number, out_dir=run)
    assert load_checkpoint(f'{run}/ckpt.pt')['evaluated'] == 4 * call
    train.train(config(out_dir=run, resume=True))
    assert_same_run('evaluated', run)


@pytest.mark.parametrize('number', CODES, ids=lambda s: s.name)
def test_interrupted_in_the_reference_pass(place, forks, number):
    """What was computed stays, and what the second run adds is the same as in one go."""
    changed = dict(dataset='many.jsonl', batch_size=600, max_iters=2, eval_interval=2)
    if not os.path.exists('reference'):
        assert forks.run(place, 'train.py', *options(
            out_dir='reference', **changed | dict(data_dir='reference_data')))[0] == 0
    changed |= dict(data_dir=f'reference_data{number}')
    prepare.prepare(config(**changed))
    run, found = place / f'reference{number}', f'reference_data{number}/reference-*.f32'
    child = forks.start(place, 'train.py', *options(out_dir=run.name, **changed))
    interrupt(child, number, lambda: any(
        np.isfinite(np.fromfile(path, np.float32)).any() for path in glob.glob(found)))
    assert not run.exists()
    half = np.fromfile(glob.glob(found)[0], np.float32)
    assert forks.run(place, 'train.py', *options(out_dir=run.name, **changed))[0] == 0
    full, expected = (np.fromfile(glob.glob(pattern)[0], np.float32)
                      for pattern in (found, 'reference_data/reference-*.f32'))
    there = np.isfinite(half)
    assert 0 < there.sum() and np.array_equal(half[there], full[there])
    np.testing.assert_allclose(full, expected, rtol=1e-5, atol=1e-5)
    logs = (read_lines(f'{folder}/log.jsonl')[1:] for folder in (run, 'reference'))
    for line, other in zip(*logs, strict=True):
        assert line == pytest.approx(other, rel=1e-4, abs=1e-4)


@pytest.fixture(scope='module')
def long(place):
    """Records for several workers: 12 MB of them."""
    line = json.dumps(dict(prompt='Q' * 300, chosen='a ' * 200, rejected='b ' * 200))
    with open('long.jsonl', 'w') as f:
        f.writelines(line.replace('"Q', f'"{i}Q') + '\n' for i in range(10000))
    return str(place / 'long.jsonl')


def workers_deliver(data):
    """More is written than the first process alone encodes before it starts workers, 1.3 MB."""
    return any(os.path.getsize(path) > 2e6 for path in glob.glob(f'{data}/*.part-*/tokens.bin'))


def group_is_alive(pid):
    try:
        os.killpg(pid, 0)
    except ProcessLookupError:
        return False
    return True


@SIGNALS
def test_interrupted_while_preparing(place, forks, long, number):
    """Nothing half-written is left, nor a worker; Ctrl-C reaches them, too."""
    data = f'data{number}'
    command = ['prepare.py', long, '--tokenizer=byte', f'--data_dir={data}']
    child = forks.start(place, *command)
    interrupt(child, number, lambda: workers_deliver(data))
    assert os.listdir(data) == []
    assert until(lambda: not group_is_alive(child.pid), 10)
    assert forks.run(place, *command)[0] == 0
    folder, = os.listdir(data)
    assert len(prepare.Pairs(f'{data}/{folder}').table) == 10000


# --------------------------------------------------------------------------------------------------
# A disk that is full: here, files that cannot grow beyond a size. Folders that may not be written


@pytest.fixture(scope='module')
def half(place):
    """A run that is done, and one that was stopped half-way -> a function to copy the latter."""
    train.train(config(out_dir='full'))
    stopped('learning_rate', 6, out_dir='half')

    def half(name):
        shutil.copytree('half', name)
        return place / name
    return half


def resumes(place, forks, run):
    """With room again, the run ends as one that never was without."""
    code, printed = forks.run(place, 'train.py', *options(out_dir=run.name), '--resume')
    assert code == 0, printed
    assert_same_run('full', run)


def test_disk_full_at_a_checkpoint(place, forks, half):
    run = half('full_ckpt')
    before = (run / 'ckpt.pt').read_bytes()
    result = forks.run(place, 'train.py', *options(out_dir=run.name), '--resume',
                       file_limit=len(before) - 1000)
    assert error_of(result).startswith('error: full_ckpt/ckpt.pt: could not be written (')
    assert (run / 'ckpt.pt').read_bytes() == before and not list(run.glob('*.tmp'))
    resumes(place, forks, run)


def test_disk_full_at_the_best_checkpoint(place, forks):
    result = forks.run(place, 'train.py', *options(out_dir='full_best'), file_limit=10000)
    assert error_of(result).startswith('error: full_best/best.pt: could not be written (')
    assert os.listdir('full_best') == ['log.jsonl']


def test_disk_full_at_the_log(place, forks, half):
    run = half('full_log')
    limit, before = (run / 'log.jsonl').stat().st_size + 400, (run / 'ckpt.pt').read_bytes()
    result = forks.run(place, 'train.py', *options(out_dir=run.name), '--resume', file_limit=limit)
    assert 'File too large' in error_of(result)
    assert (run / 'ckpt.pt').read_bytes() == before
    resumes(place, forks, run)


def test_disk_full_at_eval_jsonl(place, forks, half):
    run = half('full_eval')
    command = ['train.py', *options(out_dir=run.name, val_fraction=1.0), '--eval_only']
    assert forks.run(place, *command)[0] == 0
    before = snapshot(run)
    assert error_of(forks.run(place, *command, file_limit=5000)).startswith(
        'error: full_eval/eval.jsonl: could not be written (')
    assert snapshot(run) == before


def test_disk_full_while_preparing(place, forks):
    result = forks.run(place, 'train.py', *options(out_dir='nowhere', data_dir='full_data'),
                       file_limit=2000)
    assert re.match(r'error: full_data/pairs-\w+: cannot be written \(OSError', error_of(result))
    assert os.listdir('full_data') == [] and not os.path.exists('nowhere')


def test_disk_full_in_the_reference_pass(place, forks):
    """A file that is mapped must be on the disk before: a full disk at a page of it is a SIGBUS."""
    changed = options(out_dir='nowhere', data_dir='full_reference')
    folder = prepare.prepare(train.load_config(changed))
    result = forks.run(place, 'train.py', *changed, file_limit=1000)
    assert re.match(r'error: full_reference/reference-\w+.f32: could not be', error_of(result))
    assert os.listdir('full_reference') == [os.path.basename(folder)]
    assert forks.run(place, 'train.py', *changed)[0] == 0
    path, = glob.glob('full_reference/reference-*')
    assert os.stat(path).st_blocks * 512 >= os.path.getsize(path) > 1000    # no hole in it


PLACES = 'out_dir', 'its parent', 'data_dir'


@pytest.mark.parametrize('what', PLACES)
def test_a_read_only_folder(place, forks, half, what):
    if os.geteuid() == 0 and sys.platform != 'linux':
        pytest.skip('permissions do not apply to root, who can give up that right on Linux only')
    run = half(f'closed {what}')
    folder = place / dict(zip(PLACES, (run.name, 'closed_parent', 'closed')))[what]
    folder.mkdir(exist_ok=True)
    folder.chmod(0o555)
    changed = {'out_dir': dict(out_dir=run.name, resume=True),
               'its parent': dict(out_dir='closed_parent/x'),
               'data_dir': dict(out_dir='never', data_dir='closed')}[what]
    try:
        before = snapshot(folder)
        error = error_of(forks.run(place, 'train.py', *options(**changed), unprivileged=True))
        assert 'ermission' in error and folder.name in error, error
        assert {name: snapshot(folder)[name] for name in before if name.endswith('.pt')} == {
            name: content for name, content in before.items() if name.endswith('.pt')}
    finally:
        folder.chmod(0o755)
    if what == 'out_dir':
        resumes(place, forks, run)


# --------------------------------------------------------------------------------------------------
# Numbers that are not finite


@pytest.mark.parametrize('what, says', [
    ('gradient', r'loss 0\.\d+, gradient norm (nan|inf)'), ('loss', 'loss nan, gradient norm'),
    ('infinity', 'loss inf, gradient norm')])
def test_what_is_not_finite_never_reaches_the_weights(place, monkeypatch, what, says):
    """In a pair's loss, or in its gradient alone: no update, and the line names the pairs."""
    run, plain, calls = f'bad_{what}', train.apply_loss, []
    cfg = config(out_dir=run, eval_interval=3, tokens_per_batch=2048)

    def apply_loss(cfg, logps, *rest):
        losses, *rewards = plain(cfg, logps, *rest)
        calls.append(logps.requires_grad)
        if sum(calls) == 6 and calls[-1]:                  # the sixth step's only micro-batch
            zero = (logps.sum(1) - logps.sum(1).detach()).abs()
            bad = dict(gradient=zero.sqrt(), loss=zero / zero, infinity=1 / zero)[what]  # sqrt'(0)
            losses = torch.cat([losses[:2], (losses + bad)[2:3], losses[3:]])
        return losses, *rewards
    monkeypatch.setattr(train, 'apply_loss', apply_loss)
    with pytest.raises(InputError) as caught:
        train.train(cfg)
    monkeypatch.undo()
    message, = str(caught.value).splitlines()
    pairs = prepare.Pairs(prepare.prepare(cfg))
    step = pairs.table['id'][train.step_rows(5, pairs.train, cfg)].tolist()
    assert re.match(f'step 5: {says}', message) and 'no update was applied' in message
    named = json.loads(re.search(r'\[.*\]', message)[0])
    assert set(named) <= set(step) and len(named) == (8 if what == 'gradient' else 1)
    assert load_checkpoint(f'{run}/ckpt.pt')['step'] == 3
    assert steps_of(read_lines(f'{run}/log.jsonl'))[-1] == (4, False)
    train.train(config(out_dir=run, eval_interval=3, tokens_per_batch=2048, resume=True))
    train.train(config(out_dir=f'{run}_plain', eval_interval=3, tokens_per_batch=2048))
    assert_same_run(run, f'{run}_plain')


@pytest.mark.parametrize('val_fraction, says', [(0.2, 'evaluation: .* not finite'), (0.0, 'nan')])
@pytest.mark.parametrize('loss', ['dpo', 'simpo'])
def test_a_model_that_is_not_finite_stops_at_once(place, tmp_path, loss, val_fraction, says):
    model = weights.load('base')
    with torch.no_grad():
        model.wte.weight[ord('~')] = float('nan')          # in no pair, but in every softmax
    weights.save(model, tmp_path / 'base')
    run = tmp_path / 'run'
    with pytest.raises(InputError, match=says):
        train.train(config(init_from=tmp_path / 'base', out_dir=run, loss=loss,
                           val_fraction=val_fraction, data_dir=tmp_path / 'data'))
    assert not (run / 'best.pt').exists() and len((run / 'log.jsonl').read_text().splitlines()) == 1


def test_a_machine_without_git(place, monkeypatch):
    monkeypatch.setenv('PATH', '/nowhere')
    train.train(config(out_dir='no_git', max_iters=1))
    assert read_lines('no_git/log.jsonl')[0]['commit'] == ''


# --------------------------------------------------------------------------------------------------
# Damaged files: an error of one line, and nothing is changed


def refused(action, *says):
    """The action must raise InputError with one line that has all of `says` -> the line."""
    with pytest.raises(InputError) as caught:
        action()
    message, = str(caught.value).splitlines()
    assert all(part in message for part in says) and len(message) < 600, message
    return message


@pytest.mark.parametrize('spoil', [
    lambda path: path.write_bytes(path.read_bytes()[:5000]), lambda path: path.write_bytes(b''),
    lambda path: path.write_text('{}'), lambda path: torch.save([1], path)],
    ids=['cut short', 'empty', 'text', 'a list'])
def test_no_run_goes_on_from_a_damaged_checkpoint(half, spoil, tmp_path):
    run = tmp_path / 'run'
    shutil.copytree('half', run)
    spoil(run / 'ckpt.pt')
    before = snapshot(run)
    refused(lambda: train.train(config(out_dir=run, resume=True)), str(run / 'ckpt.pt'))
    refused(lambda: train.train(config(out_dir=run, eval_only=True)), str(run / 'ckpt.pt'))
    refused(lambda: train.train(config(out_dir=tmp_path / 'new', init_from=run)),
            str(run / 'ckpt.pt'))
    assert snapshot(run) == before and not (tmp_path / 'new').exists()


def test_a_checkpoint_runs_no_code(tmp_path):
    class Planted:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / 'was_run'),)
    path = str(tmp_path / 'ckpt.pt')
    torch.save(dict(model=Planted(), model_config={}, config={}), path)
    refused(lambda: load_checkpoint(path), path)
    assert not (tmp_path / 'was_run').exists()
