"""
Nothing lost, nothing silent: runs that are killed, interrupted, out of disk or not finite.

    python -m pytest tests/test_robust.py
    NANOPREF_LONG=1 python -m pytest tests/test_robust.py    # 100 kills instead of 12

Commands run in forks of one process (forks.py). Left out: records that are wrong (test_prepare.py),
settings that are (test_train.py), damaged checkpoints (test_weights.py).
"""
import contextlib
import json
import os
import random
import re
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import prepare
import test_train
import train
from configurator import InputError
from forks import Forks, until
from test_train import make_model, read_lines, write_records
from weights import load, load_checkpoint, save

KINDS = [dict(loss='dpo'), dict(loss='simpo'), dict(loss='sft'), dict(reference='live')]
OTHERS = [dict(dtype='bfloat16', tokens_per_batch=128),
          dict(loss='orpo', beta=0.2, warmup_iters=5)]
CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}
SIGNALS = pytest.mark.parametrize('number', CODES, ids=lambda s: s.name)


def name_of(changed):
    return '_'.join(map(str, changed.values()))


@pytest.fixture(scope='module')
def place(tmp_path_factory):
    """A folder with a tiny model and pairs: the working directory of this file's tests."""
    folder, threads = tmp_path_factory.mktemp('robust'), torch.get_num_threads()
    torch.set_num_threads(1)                               # as in forks: bits depend on it
    with contextlib.chdir(folder):
        make_model('base', n_layer=1, n_embd=16)
        write_records('pairs.jsonl', 60)
        yield folder
    torch.set_num_threads(threads)


@pytest.fixture(scope='module')
def forks():
    with Forks() as forks:
        yield forks


def options(**changed):
    longer = dict(schedule='constant', max_iters=12, eval_interval=4)
    return test_train.options(**longer | changed)


def config(**changed):
    return train.load_config(options(**changed))


def contents(path):
    """A checkpoint as text, to the bit, without its folder and what depends on the clock."""
    checkpoint = load_checkpoint(str(path))
    kept = {name: x for name, x in checkpoint.items() if name not in ('config', 'log_bytes')}
    return json.dumps(kept, default=lambda t: [str(t.dtype), t.tolist()])


def assert_same_run(one, other):
    """Everything that two runs leave behind, except their names and what depends on the clock."""
    assert sorted(os.listdir(one)) == sorted(os.listdir(other))
    for name in ('ckpt.pt', 'best.pt'):
        same = contents(f'{one}/{name}') == contents(f'{other}/{name}')
        assert same, name
    assert read_lines(f'{one}/log.jsonl')[1:] == read_lines(f'{other}/log.jsonl')[1:]
    assert read_lines(f'{one}/eval.jsonl') == read_lines(f'{other}/eval.jsonl')


def stopped(**changed):
    """A run in this process that gets a signal in its seventh step."""
    plain = train.learning_rate

    def interrupted(step, cfg):
        if step == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(step, cfg)
    with pytest.MonkeyPatch.context() as patched, pytest.raises(SystemExit) as end:
        patched.setattr(train, 'learning_rate', interrupted)
        train.train(config(**changed))
    assert end.value.code == CODES[signal.SIGTERM]


def error_of(result):
    """A command's (exit code, output) -> its error: the last line, and no traceback."""
    assert result[0] == 1 and 'Traceback' not in result[1], result
    return result[1].splitlines()[-1]


# --------------------------------------------------------------------------------------------------
# Killed, or interrupted, and resumed


@pytest.mark.parametrize('changed', KINDS, ids=name_of)
def test_killed_at_random_instants_and_resumed(place, forks, changed):
    kind, kills = name_of(changed), 25 if os.environ.get('NANOPREF_LONG') else 3
    rng, finished, done = random.Random(kind), 0, 0
    changed = changed | dict(eval_interval=3, max_iters=30)
    assert forks.run(place, 'train.py', *options(out_dir=f'one_{kind}', **changed))[0] == 0
    while done < kills or not finished:
        run = place / f'killed_{kind}{finished}'
        how = '--resume' if (run / 'ckpt.pt').exists() else '--overwrite'
        child = forks.start(place, 'train.py', *options(out_dir=run.name, **changed), how)
        if done < kills:
            lines, log = rng.randrange(42), run / 'log.jsonl'
            saving = run / f'{rng.choice(["best", "ckpt"])}.pt.{child.pid}.tmp'
            until(lambda: child.ended() or log.exists() and log.read_bytes().count(b'\n') > lines)
            if rng.random() < 0.5:                         # amid a checkpoint
                until(lambda: child.ended() or saving.exists())
            else:
                time.sleep(rng.uniform(0, 0.05))
            child.signal(signal.SIGKILL)
        if (code := child.wait()) == 0:
            assert_same_run(f'one_{kind}', run)
            finished += 1
            continue
        assert code == -signal.SIGKILL, child.printed()
        done += 1
        for path in run.glob('*.pt'):                      # whatever is there is whole,
            log_bytes = load_checkpoint(str(path)).get('log_bytes', 0)
            logged = (run / 'log.jsonl').read_bytes()[:log_bytes]    # and the log up to there
            assert len(logged) == log_bytes and logged[-1:] in (b'\n', b'')


@pytest.mark.parametrize('changed', KINDS + OTHERS, ids=name_of)
def test_stopped_between_evaluations_and_resumed(place, changed):
    one, other = f'straight_{name_of(changed)}', f'stopped_{name_of(changed)}'
    train.train(config(out_dir=one, **changed))
    stopped(out_dir=other, **changed)
    train.train(config(out_dir=other, resume=True, **changed))
    assert_same_run(one, other)


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


def test_a_reference_pass_that_was_interrupted_goes_on_where_it_was(place, monkeypatch):
    plain, calls, seen = train.no_grad_logps, [], []

    def no_grad_logps(*args):
        def logps(rows, batch):
            calls.append(batch)
            if len(calls) == 4:
                raise KeyboardInterrupt
            seen.extend(rows)
            return plain(*args)(rows, batch)
        return logps
    monkeypatch.setattr(train, 'no_grad_logps', no_grad_logps)
    cfg = config(data_dir='passes', tokens_per_batch=128)
    with pytest.raises(KeyboardInterrupt):
        train.train(cfg)
    model, _, pairs = train.load_run(cfg)
    train.make_reference(model, pairs, np.arange(len(pairs.table)), cfg)
    assert sorted(seen) == list(range(len(pairs.table)))    # each once


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
    assert read_lines(log)[-1]['step'] == done - 1


@SIGNALS
def test_interrupted_while_preparing(place, forks, number):
    """Nothing half-written is left, nor a worker; Ctrl-C reaches them, too."""
    line = json.dumps(dict(prompt='Q' * 300, chosen='a ' * 200, rejected='b ' * 200)) + '\n'
    Path('long.jsonl').write_text(''.join(line.replace('"Q', f'"{i}Q') for i in range(10000)))
    data = place / f'data{number}'
    child = forks.start(place, 'prepare.py', 'long.jsonl', '--tokenizer=byte', f'--data_dir={data}')
    # the first process alone encodes 1.3 MB before it starts workers
    interrupt(child, number, lambda: any(path.stat().st_size > 2e6
                                         for path in data.glob('*.part-*/tokens.bin')))
    assert os.listdir(data) == []
    with pytest.raises(ProcessLookupError):
        until(lambda: os.killpg(child.pid, 0), 10)


# --------------------------------------------------------------------------------------------------
# A disk that is full: here, files that cannot grow beyond a size


@pytest.mark.parametrize('file, more, says', [
    ('ckpt.pt', -1000, 'ckpt.pt: could not be written'), ('log.jsonl', 400, 'File too large')])
def test_disk_full_in_a_run(place, forks, file, more, says):
    """The checkpoint stays, and with room again the run ends as one that never was without."""
    train.train(config(out_dir=f'room_{file}'))
    stopped(out_dir=f'full_{file}')
    run = place / f'full_{file}'
    before, limit = (run / 'ckpt.pt').read_bytes(), (run / file).stat().st_size + more
    command = 'train.py', *options(out_dir=run.name, resume=True)
    assert says in error_of(forks.run(place, *command, file_limit=limit))
    assert (run / 'ckpt.pt').read_bytes() == before and not list(run.glob('*.tmp'))
    assert forks.run(place, *command)[0] == 0
    assert_same_run(f'room_{file}', run)


@pytest.mark.parametrize('file, limit, says', [
    ('pairs', 2000, r'pairs-\w+: cannot be written'),
    ('reference', 1000, r'reference-\w+.f32: could not be written')])
def test_disk_full_before_a_run(place, forks, file, limit, says):
    data = place / f'full_{file}'
    given = options(out_dir='nowhere', data_dir=data.name)
    if file == 'reference':
        prepare.prepare(train.load_config(given))
    before = sorted(data.rglob('*'))
    error = error_of(forks.run(place, 'train.py', *given, file_limit=limit))
    assert re.match(f'error: full_{file}/{says}', error)
    assert sorted(data.rglob('*')) == before and not os.path.exists('nowhere')


# --------------------------------------------------------------------------------------------------
# Numbers that are not finite; no git


@pytest.mark.parametrize('what, says', [
    ('gradient', r'loss 0\.\d+, gradient norm (nan|inf)'), ('loss', 'loss nan, gradient norm')])
def test_what_is_not_finite_never_reaches_the_weights(place, monkeypatch, what, says):
    """In a pair's loss, or in its gradient alone: no update, and the line names the pairs."""
    plain, calls, cfg = train.apply_loss, [], config(out_dir=f'bad_{what}', tokens_per_batch=2048)
    monkeypatch.setattr(train, 'catch_signals', lambda: contextlib.nullcontext([]))    # Ctrl-C stops pytest

    def apply_loss(cfg, logps, *rest):
        losses, *rewards = plain(cfg, logps, *rest)
        calls.append(logps.requires_grad)
        if sum(calls) == 6 and calls[-1]:                  # the sixth step's only micro-batch
            zero = (logps.sum(1) - logps.sum(1).detach()).abs()
            bad = dict(gradient=zero.sqrt(), loss=zero / zero)[what]    # sqrt'(0) is infinite
            losses = torch.cat([losses[:2], (losses + bad)[2:3], losses[3:]])
        return losses, *rewards
    with monkeypatch.context() as patched, pytest.raises(InputError) as caught:
        patched.setattr(train, 'apply_loss', apply_loss)
        train.train(cfg)
    message = str(caught.value)
    assert re.match(f'step 5: {says}', message) and 'no update was applied' in message
    pairs = prepare.Pairs(prepare.prepare(cfg))
    step = pairs.table['id'][train.training_order(pairs.train, cfg)[40:48]]
    named = json.loads(re.search(r'\[.*\]', message)[0])
    assert set(named) <= set(step) and len(named) == (8 if what == 'gradient' else 1)
    assert load_checkpoint(f'bad_{what}/ckpt.pt')['step'] == 4
    assert read_lines(f'bad_{what}/log.jsonl')[-1]['step'] == 4


def test_a_model_that_is_not_finite_stops_at_the_first_evaluation(place, monkeypatch):
    monkeypatch.setattr(train, 'catch_signals', lambda: contextlib.nullcontext([]))    # Ctrl-C stops pytest
    model = load('base')
    with torch.no_grad():
        model.wte.weight[ord('~')] = float('nan')          # in no pair, but in every softmax
    save(model, 'nan')
    with pytest.raises(InputError, match='evaluation: .* not finite'):
        train.train(config(init_from='nan', out_dir='of_nan'))
    assert os.listdir('of_nan') == ['log.jsonl']


def test_a_machine_without_git(place, monkeypatch):
    monkeypatch.setenv('PATH', '/nowhere')
    train.train(config(out_dir='no_git', max_iters=1))
    assert read_lines('no_git/log.jsonl')[0]['commit'] == ''
