"""
train.py: settings, the data of a step, objectives, the reference, the loop, evaluation, resuming.

    python -m pytest tests/test_train.py

A GPT of two layers with random weights and 60 made-up pairs stand in for the real thing; tokens are
bytes. Left out: interruptions and damage (test_robust.py), several processes (test_processes.py).
"""
import glob
import json
import math
import os
import random
import shutil
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import train
import weights
from configurator import InputError
from dpo import bernoulli_nll
from forks import ROOT, Forks
from model import GPT, GPTConfig
from prepare import Pairs, prepare
from sample import generate
from weights import load_checkpoint

WORDS = 'the a red dog sees one old cat under blue tree and runs home'.split()
LN2 = pytest.approx(math.log(2), abs=1e-6)
SETTINGS = dict(out_dir='run', init_from='base', dataset='pairs.jsonl', data_dir='data',
                tokenizer='byte', max_length=64, max_prompt_length=32, val_fraction=0.2,
                batch_size=8, tokens_per_batch=512, learning_rate=1e-3, max_iters=6,
                eval_interval=3, log_interval=1, device='cpu')


def make_model(name, seed=0, **changed):
    torch.manual_seed(seed)
    sizes = dict(block_size=64, vocab_size=257, n_layer=2, n_head=2, n_embd=32)
    weights.save(GPT(GPTConfig(**sizes | changed)), name)


def write_records(path, n, responses=2, **more):
    """Records with made-up words; a keyword gives each its value, a function of its number."""
    rng = random.Random(0)

    def text(low, high):
        return ' ' + ' '.join(rng.choice(WORDS) for _ in range(rng.randint(low, high)))
    with open(path, 'w') as f:
        for i in range(n):
            record = dict(prompt=f'{i}{text(1, 3)}', chosen=text(1, 4), rejected=text(1, 5))
            if responses != 2:
                record = dict(prompt=f'{i}{text(1, 3)}',
                              responses=[text(1, 4) for _ in range(responses)])
            record |= {name: value(i) for name, value in more.items()}
            f.write(json.dumps(record) + '\n')


@pytest.fixture
def config(tmp_path, monkeypatch):
    """In a folder with a model and pairs: config('c.py', beta=0.5, ...) -> a Config. None: the
    file's value, or the default."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    make_model('base')
    write_records('pairs.jsonl', 60)
    before = torch.get_float32_matmul_precision(), torch.get_num_threads()
    torch.set_num_threads(1)                               # as fast where a model is tiny
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}

    def config(*files, **changed):
        settings = (SETTINGS | changed).items()
        return train.load_config([*files, *(f'--{k}={v}' for k, v in settings if v is not None)])
    yield config
    torch.set_float32_matmul_precision(before[0])
    torch.set_num_threads(before[1])
    for number, handler in handlers.items():               # a run that fails leaves its own
        signal.signal(number, handler)


@pytest.fixture(scope='module')
def forks():
    with Forks() as forks:
        yield forks


def read_lines(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def read_log(folder='run'):
    """log.jsonl without its header and without what depends on the clock."""
    return [{name: value for name, value in line.items() if not name.endswith('_per_s')}
            for line in read_lines(f'{folder}/log.jsonl')[1:]]


def training_lines(folder='run'):
    return [line for line in read_log(folder) if 'loss' in line]


def weights_of(folder='run'):
    return load_checkpoint(f'{folder}/ckpt.pt')['model']


def plain_logp(model, prompt, response):
    """log pi(response | prompt) of one response alone, from full logits."""
    ids = torch.tensor([*map(int, prompt), *map(int, response)])[None]
    logits = model(ids[:, :-1])[0, len(prompt) - 1:]
    return logits.log_softmax(-1).gather(1, ids[0, len(prompt):, None]).sum()


# --------------------------------------------------------------------------------------------------
# The data of a step


def test_epochs_are_permutations_and_steps_need_no_state():
    rows = np.arange(100, 110)
    for size in (4, 25):
        cfg = SimpleNamespace(batch_size=size, seed=3)
        steps = [train.step_rows(step, rows, cfg) for step in range(10)]
        drawn = np.concatenate(steps)
        for epoch in range(4):
            assert sorted(drawn[epoch * 10:(epoch + 1) * 10]) == rows.tolist()
        assert not np.array_equal(drawn[:10], drawn[10:20])
        assert np.array_equal(train.step_rows(7, rows, cfg), steps[7])
        assert np.array_equal(train.step_rows(0, rows, cfg, steps=10), drawn)
        other = train.step_rows(0, rows, SimpleNamespace(batch_size=size, seed=4))
        assert not np.array_equal(other, steps[0])


def test_micro_batches_fit_and_cover():
    rng = np.random.default_rng(0)
    for _ in range(50):
        sizes = rng.integers(1, 100, size=rng.integers(1, 60))
        parts = train.micro_batches(sizes, 100)
        assert sorted(i for part in parts for i in part) == list(range(len(sizes)))
        assert all(sizes[part].sum() <= 100 for part in parts)


@pytest.mark.parametrize('K', [1, 2])
def test_batches_say_which_pairs_they_have(config, K):
    cfg = config(tokens_per_batch=200)
    train.setup_machine(cfg)
    pairs = Pairs(prepare(cfg))
    wanted = np.array([7, 3, 50, 11, 0, 22, 31, 8])
    seen = []
    for rows, batch in train.batches(pairs, wanted, K, cfg):
        for row, start, stop in zip(rows, batch.starts, batch.starts[1:]):
            prompt, responses = pairs[row]
            expected = np.concatenate([prompt, *responses[:K]])
            assert batch.tokens[start:stop].tolist() == expected.tolist()
        seen += rows.tolist()
    assert sorted(seen) == sorted(wanted)


def test_learning_rate_warms_up_and_follows_the_schedule():
    cfg = SimpleNamespace(learning_rate=1.0, min_lr=0.1, warmup_iters=3, max_iters=13)
    rates = {}
    for cfg.schedule in ('cosine', 'linear', 'constant'):
        rates[cfg.schedule] = [train.learning_rate(step, cfg) for step in range(14)]
        assert rates[cfg.schedule][:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates['constant'][4:] == [1.0] * 10
    assert rates['linear'][8] == pytest.approx(0.55) and rates['linear'][13] == pytest.approx(0.1)
    for step in range(3, 14):
        expected = 0.1 + 0.9 * (1 + math.cos(math.pi * (step - 3) / 10)) / 2
        assert rates['cosine'][step] == pytest.approx(expected)


# --------------------------------------------------------------------------------------------------
# The loop


@pytest.mark.parametrize('reference', ['cached', 'live'])
def test_dpo_starts_at_ln_2_and_learns(config, reference):
    metrics = train.train(config(max_iters=40, eval_interval=20, learning_rate=5e-3,
                                 schedule='constant', reference=reference))
    evaluated, first = read_log()[:2]
    assert evaluated['eval/loss'] == LN2 and evaluated['eval/rewards/accuracies'] == 0.5
    assert first['loss'] == LN2 and first['rewards/accuracies'] == 0.5
    assert first.keys() == {*train.METRICS, 'step', 'grad_norm', 'lr'}
    last = training_lines()[-5:]                           # few enough pairs to learn by heart
    assert np.mean([line['loss'] for line in last]) < 0.4
    assert np.mean([line['rewards/accuracies'] for line in last]) > 0.8
    assert {'step': 40} | metrics == read_log()[-1]
    best = min(line['eval/loss'] for line in read_log() if 'eval/loss' in line)
    at_best = next(line['step'] for line in read_log() if line.get('eval/loss') == best)
    assert load_checkpoint('run/best.pt')['step'] == at_best


@pytest.mark.parametrize('loss', ['dpo', 'simpo', 'sft'])
def test_micro_batches_change_nothing(config, loss, monkeypatch):
    split, counts, logs, models = train.micro_batches, [], [], []
    monkeypatch.setattr(train, 'micro_batches',
                        lambda *args: counts.append(len(split(*args))) or split(*args))
    for limit in (2000, 200, 70):
        counts.clear()
        train.train(config(loss=loss, tokens_per_batch=limit, val_fraction=0.0,
                           out_dir=f'run{limit}'))
        assert limit < 2000 and max(counts) > 1 or set(counts[-7:]) == {1}
        logs.append(read_log(f'run{limit}'))
        models.append(weights_of(f'run{limit}'))
    for log, model in zip(logs[1:], models[1:]):
        for line, expected in zip(log, logs[0], strict=True):
            assert line == pytest.approx(expected, rel=1e-4, abs=1e-5)
        for name, expected in models[0].items():
            # Adam divides by the gradient's size: where that is next to nothing, rounding shows
            assert (model[name] - expected).abs().mean() < 1e-6, name


def test_one_step_is_plain_adamw_on_the_mean_dpo_loss(config):
    """The same step, written plainly: a response at a time, full logits, torch's own optimiser."""
    cfg = config(max_iters=1, schedule='constant', grad_clip=0.5, weight_decay=0.1, beta=0.3)
    train.train(cfg)
    model, pairs, losses = weights.load('base'), Pairs(prepare(cfg)), []
    for row in train.step_rows(0, pairs.train, cfg):
        prompt, (chosen, rejected) = pairs[row]
        ratio = plain_logp(model, prompt, chosen) - plain_logp(model, prompt, rejected)
        losses.append(-F.logsigmoid(0.3 * (ratio - ratio.detach())))       # pi_ref is pi
    torch.stack(losses).mean().backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    assert training_lines()[0]['grad_norm'] == pytest.approx(norm.item(), rel=1e-4)
    groups = [dict(params=[p for p in model.parameters() if p.dim() > 1], weight_decay=0.1),
              dict(params=[p for p in model.parameters() if p.dim() == 1], weight_decay=0.0)]
    torch.optim.AdamW(groups, lr=1e-3).step()
    for name, t in weights_of().items():
        assert (t - model.state_dict()[name]).abs().mean() < 1e-6, name


def test_epochs_give_the_number_of_steps(config):
    cfg = config(max_iters=0, epochs=1.5, eval_interval=100)
    train.train(cfg)
    n = len(Pairs(prepare(cfg)).train)
    assert [line['step'] for line in training_lines()] == list(range(math.ceil(1.5 * n / 8)))


def test_evaluation_changes_nothing_but_the_log(config):
    runs = {}
    for interval in (1, 4, 100):
        train.train(config(eval_interval=interval, out_dir=f'run{interval}'))
        evaluated = [line['step'] for line in read_log(f'run{interval}') if 'eval/loss' in line]
        assert evaluated == sorted({*range(0, 6, interval), 6})
        runs[interval] = training_lines(f'run{interval}'), weights_of(f'run{interval}')
    for log, model in runs.values():
        assert log == runs[1][0]
        assert all(torch.equal(t, runs[1][1][name]) for name, t in model.items())


def test_the_header_is_enough_to_repeat_the_run(config):
    cfg = config(loss='simpo', gamma=0.7, seed=3, grad_clip=0.1, learning_rate=2e-3)
    train.train(cfg)
    header = read_lines('run/log.jsonl')[0]
    again = {name: value for name, value in header['config'].items() if name != 'model_class'}
    options = [f'--{name}={value}' for name, value in (again | dict(out_dir='again')).items()]
    train.train(train.load_config(options))
    assert read_log('again') == read_log()
    assert all(torch.equal(t, weights_of()[name]) for name, t in weights_of('again').items())
    assert header['config']['gamma'] == 0.7 and header['config']['model_class'] == 'model.GPT'
    assert header['data'] == Pairs(prepare(cfg)).meta['hash'] and header['processes'] == 1
    assert header['versions']['torch'] == torch.__version__
    assert header['commit'] and header['weights']


def test_a_random_model_is_the_same_one_again(config):
    Path('scratch.py').write_text('init_from = dict(n_layer=1, n_head=2, n_embd=16, block_size=64)')
    for run in ('one', 'two'):
        train.train(config('scratch.py', out_dir=run, init_from=None))
    assert read_log('one') == read_log('two') and training_lines('one')[0]['loss'] == LN2
    assert load_checkpoint('one/ckpt.pt')['model_config']['vocab_size'] == 257


def test_at_end_is_called_with_the_finished_run(config):
    Path('end.py').write_text('def at_end(model, cfg):\n'
                              '    with open(cfg.out_dir + "/end.txt", "a") as f:\n'
                              '        print(model.wte.weight[0, 0].item(), file=f)\n')
    train.train(config('end.py'))
    called_with = [float(line) for line in Path('run/end.txt').read_text().split()]
    assert called_with == [weights_of()['wte.weight'][0, 0].item()]


@pytest.mark.parametrize('changed', [
    dict(), dict(reference='live', eval_samples=6), dict(loss='simpo'),
    dict(reference_from='other')], ids=lambda changed: ' '.join(map(str, changed)) or 'cached')
def test_a_compiled_run_equals_a_plain_one(config, changed, monkeypatch):
    """By dynamo alone, without the compiler behind it: a second in place of half a minute. What is
    compiled belongs to its model: the policy, the reference, what samples are compared with."""
    make_model('other', seed=1)
    compiled, ran = torch.compile, []

    def light(function, **options):
        traced = compiled(function, backend='eager', **options)
        return lambda *args: ran.append(function) or traced(*args)
    monkeypatch.setattr(torch, 'compile', light)
    plain, traced = (train.train(config(out_dir=f'run{compile}', compile=compile, **changed))
                     for compile in (False, True))
    assert len(set(ran)) == (1 if changed in (dict(), dict(loss='simpo')) else 2)
    for name, value in plain.items():
        assert traced[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name


@pytest.mark.skipif(not os.environ.get('NANOPREF_LONG'), reason='half a minute: NANOPREF_LONG=1')
def test_a_run_of_the_real_compiler_equals_a_plain_one(config):
    plain, compiled = (train.train(config(out_dir=f'run{compile}', compile=compile))
                       for compile in (False, True))
    assert compiled == pytest.approx(plain, rel=1e-4, abs=1e-5)


# --------------------------------------------------------------------------------------------------
# The reference


def test_cached_and_live_references_agree(config):
    for reference in ('cached', 'live'):
        train.train(config(reference=reference, out_dir=reference))
    for cached, live in zip(read_log('cached'), read_log('live'), strict=True):
        assert cached == pytest.approx(live, rel=1e-4, abs=1e-5)


def test_the_reference_may_be_another_model(config):
    make_model('other', seed=1)
    cfg = config(reference_from='other', eval_only=True)
    train.train(cfg)
    pairs, policy, reference = Pairs(prepare(cfg)), weights.load('base'), weights.load('other')
    for row, line in zip(pairs.val, read_lines('run/eval.jsonl'), strict=True):
        prompt, (chosen, rejected) = pairs[row]
        for side, response in (('chosen', chosen), ('rejected', rejected)):
            own = plain_logp(policy, prompt, response).item()
            other = plain_logp(reference, prompt, response).item()
            assert line[f'{side}_logps'] == pytest.approx(own, abs=1e-3)
            assert line[f'reference_{side}_logps'] == pytest.approx(other, abs=1e-3)
            assert line[f'{side}_reward'] == pytest.approx(0.1 * (own - other), abs=1e-3)
    train.train(config(reference_from='other', overwrite=True))
    assert training_lines()[0]['loss'] != LN2


def test_the_reference_is_computed_once_for_many_runs(config, monkeypatch):
    """Batches that went through a model: of SimPO's runs, none are the reference's."""
    token_logps, calls = GPT.token_logps, []
    monkeypatch.setattr(GPT, 'token_logps', lambda *args: calls.append(1) or token_logps(*args))

    def calls_of(**changed):
        calls.clear()
        train.train(config(overwrite=True, **changed))
        return len(calls)
    without = calls_of(loss='simpo')
    assert calls_of() > without
    assert calls_of(beta=0.5, learning_rate=1e-4) == without
    assert len(glob.glob('data/reference-*')) == 1
    make_model('base', seed=1)                             # other weights: another reference
    assert calls_of() > without and training_lines()[0]['loss'] == LN2
    assert calls_of(dtype='bfloat16') > without            # as another precision


def test_the_reference_is_computed_for_the_pairs_of_the_run_alone(config):
    cfg = config(max_iters=2)
    train.train(cfg)
    pairs, (path,) = Pairs(prepare(cfg)), glob.glob('data/reference-*')
    tokens = pairs.table['responses'].sum(1)
    there = np.isfinite(np.fromfile(path, np.float32))
    expected = {*pairs.val, *train.step_rows(0, pairs.train, cfg, steps=2)}
    assert 0 < len(expected) < len(tokens)
    ends = np.cumsum(tokens)
    for row, (start, stop) in enumerate(zip(ends - tokens, ends)):
        assert there[start:stop].tolist() == [row in expected] * (stop - start)


# A discount of the log-prob of each response token, by its place in the response
DISCOUNT = (' * 0.9 ** (torch.arange(len(batch.owner))'
            ' - torch.searchsorted(batch.owner, batch.owner))')
EDITS = {   # file, and the text of it that is discounted
    'token_logps': ('model.py', 'ChunkedLogps.apply(x, self.head_weight, batch.targets, learns)'),
    'the policy alone': ('train.py', 'logps = batch.sum_by_response(model.token_logps(batch)'),
}


def edit(root, name):
    """Discount what EDITS says in a copy of the repository."""
    file, text = EDITS[name]
    source = (root / file).read_text()
    assert source.count(text) == 1
    (root / file).write_text(source.replace(text, text + DISCOUNT))


@pytest.fixture
def copy(tmp_path):
    """A copy of the repository, to edit; its runs are in the folder of `config`."""
    root = tmp_path / 'copy'
    root.mkdir()
    for path in Path(ROOT).glob('*.py'):
        shutil.copy(path, root)
    return root


def run_copy(forks, copy, out_dir):
    options = [f'--{name}={value}' for name, value in (SETTINGS | dict(out_dir=out_dir)).items()]
    return forks.run('.', 'train.py', *options, root=copy)


def test_an_edited_model_never_meets_the_old_reference(config, forks, copy):
    """The cache's key must have the source of the model in it."""
    assert run_copy(forks, copy, 'before')[0] == 0
    edit(copy, 'token_logps')
    code, printed = run_copy(forks, copy, 'after')
    assert code == 0, printed
    before, after = training_lines('before')[0], training_lines('after')[0]
    assert abs(after['logps/chosen']) < 0.9 * abs(before['logps/chosen'])  # the edit has an effect
    assert before['loss'] == LN2 and after['loss'] == LN2 and after['rewards/accuracies'] == 0.5
    assert read_log('after')[0]['eval/loss'] == LN2
    assert len(glob.glob('data/reference-*')) == 2


def test_a_policy_that_is_computed_otherwise_than_the_reference_stops(config, forks, copy):
    edit(copy, 'the policy alone')
    code, printed = run_copy(forks, copy, 'run')
    assert code == 1 and 'Traceback' not in printed
    error = printed.splitlines()[-1]
    assert error.startswith('error: policy and reference are the same model, but')
    assert training_lines() == []                          # before the first update
    assert all(torch.equal(t, weights_of()[name])
               for name, t in weights.load('base').state_dict().items())


# --------------------------------------------------------------------------------------------------
# Objectives


def test_sft_learns_from_chosen_alone(config):
    first = train.train(config(loss='sft', eval_only=True))
    model = weights.load('base')
    pairs = Pairs(prepare(config()))
    expected = [plain_logp(model, prompt, responses[0]).item() for prompt, responses in map(
        pairs.__getitem__, pairs.val)]
    assert first['eval/loss'] == pytest.approx(-np.mean(expected), abs=1e-3)
    last = train.train(config(loss='sft', max_iters=20, learning_rate=1e-2))
    assert last['eval/loss'] < first['eval/loss'] - 5
    assert training_lines()[0].keys() == {'step', 'loss', 'logps/chosen', 'grad_norm', 'lr'}
    assert not glob.glob('data/reference-*')


def test_sft_on_single_responses(config):
    write_records('single.jsonl', 30, responses=1)
    train.train(config(loss='sft', dataset='single.jsonl'))
    assert read_lines('run/eval.jsonl')[0].keys() == {
        'id', 'chosen_logps', 'chosen_length', 'reference_chosen_logps', 'chosen_reward'}


def test_simpo_needs_no_reference(config):
    metrics = train.train(config(loss='simpo', gamma=0.3, beta=2.5, learning_rate=1e-2,
                                 max_iters=20))
    lines = read_lines('run/eval.jsonl')
    z = [2.5 * (line['chosen_logps'] / line['chosen_length']
                - line['rejected_logps'] / line['rejected_length']) for line in lines]
    assert metrics['eval/loss'] == pytest.approx(np.mean([np.log1p(np.exp(0.3 - x)) for x in z]))
    assert metrics['eval/rewards/accuracies'] == np.mean([x > 0 for x in z])
    assert all(line['reference_chosen_logps'] is None for line in lines)
    assert training_lines()[-1]['loss'] < training_lines()[0]['loss'] - 0.1
    assert not glob.glob('data/reference-*')


@pytest.mark.parametrize('reference', ['cached', 'live'])
def test_plackett_luce_learns_from_rankings(config, reference):
    write_records('ranks.jsonl', 40, responses=3)
    cfg = config(loss='plackett_luce', dataset='ranks.jsonl', reference=reference, max_iters=40,
                 learning_rate=5e-3, schedule='constant')
    train.train(cfg)
    assert training_lines()[0]['loss'] == pytest.approx(math.log(6), abs=1e-5)    # of 3! orders
    assert training_lines()[-1]['loss'] < 1.2
    model, pairs = weights.load('run'), Pairs(prepare(cfg))
    for row, line in zip(pairs.val, read_lines('run/eval.jsonl'), strict=True):
        prompt, (best, _, worst) = pairs[row]
        for side, response in (('chosen', best), ('rejected', worst)):
            expected = plain_logp(model, prompt, response).item()
            assert line[f'{side}_logps'] == pytest.approx(expected, abs=1e-3)
            assert line[f'{side}_length'] == len(response)


def test_soft_labels_reach_the_loss(config):
    write_records('soft.jsonl', 60, p=lambda i: i % 5 / 4)
    metrics = train.train(config(dataset='soft.jsonl', max_iters=20, learning_rate=5e-3))
    lines = read_lines('run/eval.jsonl')
    z = torch.tensor([line['chosen_reward'] - line['rejected_reward'] for line in lines])
    p = torch.tensor([line['id'] % 5 / 4 for line in lines])
    assert metrics['eval/loss'] == pytest.approx(bernoulli_nll(z, p=p).mean().item(), abs=1e-5)
    assert abs(metrics['eval/loss'] - bernoulli_nll(z).mean().item()) > 0.01


OWN = """
from torch.nn.functional import relu

def hinge_loss(policy_chosen_logps, policy_rejected_logps, reference_chosen_logps,
               reference_rejected_logps, margin, beta=0.1, slope=1.0):
    c = beta * (policy_chosen_logps - reference_chosen_logps)
    r = beta * (policy_rejected_logps - reference_rejected_logps)
    return slope * relu(margin - (c - r)), c.detach(), r.detach()
"""


@pytest.mark.parametrize('text, name', [
    ('from own_losses import hinge_loss as loss\nslope = 2', 'own_losses.hinge_loss'),
    (OWN + '\nloss = hinge_loss\nslope = 2', '<run_path>.hinge_loss')],
    ids=['imported', 'in the config file'])
def test_an_objective_of_ones_own(config, text, name):
    Path('own_losses.py').write_text(OWN)
    Path('own.py').write_text(text)
    write_records('margins.jsonl', 60, margin=lambda i: i % 3 / 2)
    cfg = config('own.py', dataset='margins.jsonl', beta=0.3)
    assert cfg.options == dict(beta=0.3, slope=2.0)
    last, first = train.train(cfg), read_log()[0]
    ids = [line['id'] for line in read_lines('run/eval.jsonl')]
    assert first['eval/loss'] == pytest.approx(np.mean([2 * (i % 3 / 2) for i in ids]), abs=1e-5)
    z = [line['chosen_reward'] - line['rejected_reward'] for line in read_lines('run/eval.jsonl')]
    expected = np.mean([2 * max(0, i % 3 / 2 - x) for i, x in zip(ids, z)])
    assert last['eval/loss'] == pytest.approx(expected, abs=1e-5)
    assert read_lines('run/log.jsonl')[0]['config']['loss'] == name
    sys.modules.pop('own_losses', None)


def test_an_option_that_the_objective_lacks_is_refused(config):
    Path('own.py').write_text(OWN + '\nloss = hinge_loss\n')
    with pytest.raises(InputError, match="command line: 'slop' is not .*'slope'"):
        config('own.py', slop=2)
    with pytest.raises(InputError, match="'gamma' is not a setting"):
        config('own.py', gamma=2)


@pytest.mark.parametrize('reference', ['cached', 'live'])
def test_an_objective_of_chosen_and_its_reference_alone(config, reference):
    """It sees one response of each pair, though the data has two."""
    Path('own.py').write_text(
        'def loss(policy_chosen_logps, reference_chosen_logps, beta=0.1):\n'
        '    ratio = policy_chosen_logps - reference_chosen_logps\n'
        '    return ratio.square() - beta * policy_chosen_logps, None, None\n')
    metrics = train.train(config('own.py', reference=reference))
    lines = read_lines('run/eval.jsonl')
    chosen, reference = (np.array([line[f'{name}chosen_logps'] for line in lines])
                         for name in ('', 'reference_'))
    expected = ((chosen - reference) ** 2 - 0.1 * chosen).mean()
    assert metrics['eval/loss'] == pytest.approx(expected, rel=1e-4)


OWN_MODEL = """
import torch
from model import GPT

class Warm(GPT):
    def __init__(self, config):
        super().__init__(config)
        self.scale = torch.nn.Parameter(torch.ones(()))

    def token_logps(self, batch):
        return self.scale * super().token_logps(batch)
"""


@pytest.mark.parametrize('text', ['from own_model import Warm as model_class',
                                  OWN_MODEL + '\nmodel_class = Warm'],
                         ids=['imported', 'in the config file'])
def test_a_model_of_ones_own(config, text):
    Path('own_model.py').write_text(OWN_MODEL)
    Path('own.py').write_text(text)
    train.train(config('own.py', max_iters=4, schedule='constant'))
    assert weights_of()['scale'] != 1 and training_lines()[0]['loss'] == LN2
    train.train(config('own.py', resume=True, schedule='constant'))
    train.train(config('own.py', out_dir='one', schedule='constant'))
    assert training_lines() == training_lines('one')
    sys.modules.pop('own_model', None)


# --------------------------------------------------------------------------------------------------
# Evaluation


def test_eval_jsonl_is_what_transformers_gives_for_each_response_alone(config):
    transformers = pytest.importorskip('transformers')
    torch.manual_seed(2)
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=257, n_positions=64, n_embd=32, n_layer=2, n_head=2)).eval()
    theirs.save_pretrained('theirs')
    metrics = train.train(config(init_from='theirs', eval_only=True, val_fraction=1.0))
    lines, records = read_lines('run/eval.jsonl'), read_lines('pairs.jsonl')
    assert [line['id'] for line in lines] == list(range(60))
    for line, record in zip(lines, records):
        prompt = list(record['prompt'].encode())
        for side in ('chosen', 'rejected'):
            response = [*record[side].encode(), 256]       # the end of text counts
            with torch.no_grad():
                logps = theirs(torch.tensor([prompt + response])).logits[0].log_softmax(-1)
            rows = range(len(prompt) - 1, len(prompt) - 1 + len(response))
            expected = logps[rows, response].sum().item()
            assert line[f'{side}_logps'] == pytest.approx(expected, abs=1e-3)
            assert line[f'reference_{side}_logps'] == pytest.approx(expected, abs=1e-3)
            assert line[f'{side}_length'] == len(response) and line[f'{side}_reward'] == 0
    chosen = [line['chosen_logps'] for line in lines]
    assert metrics['eval/logps/chosen'] == pytest.approx(np.mean(chosen))
    assert os.listdir('run') == ['eval.jsonl']


def test_a_tie_counts_one_half():
    chosen, rejected = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([0.0, 2.0, 5.0, 4.0])
    sums = train.metric_sums(torch.zeros(4), chosen, rejected, torch.zeros(4, 2))
    assert train.metric_means(sums, 4, 2)['rewards/accuracies'] == (1 + 0.5 + 0 + 0.5) / 4


def test_eval_only_evaluates_the_run_that_is_there(config):
    last = train.train(config(max_iters=4, learning_rate=1e-2))
    before = Path('run/ckpt.pt').read_bytes()
    lines = read_lines('run/eval.jsonl')
    again = train.train(config(eval_only=True, max_iters=4))
    assert again == pytest.approx(last, rel=1e-5) and again['eval/loss'] != LN2
    assert read_lines('run/eval.jsonl') == [pytest.approx(line, rel=1e-5) for line in lines]
    assert Path('run/ckpt.pt').read_bytes() == before
    other = train.train(config(eval_only=True, val_fraction=1.0, beta=0.7))
    assert len(read_lines('run/eval.jsonl')) == 60 and other['eval/loss'] != again['eval/loss']


def test_eval_pairs_are_the_same_part_every_time(config):
    metrics = train.train(config(eval_only=True, eval_pairs=3, loss='simpo'))
    ids = [line['id'] for line in read_lines('run/eval.jsonl')]
    assert len(ids) == 3 and ids == sorted(ids)
    assert train.train(config(eval_only=True, eval_pairs=3, loss='simpo')) == metrics
    assert [line['id'] for line in read_lines('run/eval.jsonl')] == ids


@pytest.mark.parametrize('reference', ['cached', 'live'])
def test_eval_samples_give_a_length_and_with_a_live_reference_a_kl(config, reference):
    cfg = config(reference=reference, eval_samples=5, learning_rate=1e-2)
    metrics = train.train(cfg)
    policy, base, pairs = weights.load('run'), weights.load('base'), Pairs(prepare(cfg))
    prompts = [pairs[row][0].tolist() for row in pairs.val[:5]]
    room = 64 - max(map(len, prompts))
    responses = generate(policy, prompts, room, {256}, seed=cfg.seed)
    assert metrics['eval/length'] == np.mean([len(response) for response in responses])
    if reference == 'live':
        ratios = [(plain_logp(policy, *each) - plain_logp(base, *each)).item()
                  for each in zip(prompts, responses)]
        assert metrics['eval/kl'] == pytest.approx(np.mean(ratios), abs=1e-3)
        assert abs(np.mean(ratios)) > 0.01
    else:
        assert 'eval/kl' not in metrics
    lines = read_lines('run/samples.jsonl')
    assert [line['prompt'].encode() for line in lines] == [bytes(prompt) for prompt in prompts]


# --------------------------------------------------------------------------------------------------
# What is refused, a line each


@pytest.mark.parametrize('changed, says', [
    (dict(batch_size=0), 'batch_size: 0 is less than 1'),
    (dict(eval_interval=0), 'eval_interval: 0 is less than 1'),
    (dict(log_interval=-1), 'log_interval: -1 is less than 1'),
    (dict(learning_rate=-1e-6), 'learning_rate: -1e-06 is less than 0'),
    (dict(epochs=-1.0), 'epochs: -1.0 is less than 0'),
    (dict(seed=-1), 'seed: -1 is less than 0'),
    (dict(tokens_per_batch=-1), 'tokens_per_batch: -1 is less than 0'),
    (dict(schedule='step'), "schedule: 'step' is not one of"),
    (dict(reference='none'), "reference: 'none' is not one of"),
    (dict(dtype='float16'), "dtype: 'float16' is not one of"),
    (dict(device='tpu'), "device: 'tpu' is not one of"),
    (dict(loss='ppo'), "loss: 'ppo' is not one of dpo, "),
    (dict(beta=0), 'beta: 0.0 is not above 0'),
    (dict(beta='high'), "beta = 'high' is not of type float"),
    (dict(label_smoothing=0.6), 'label_smoothing 0.6 is not between 0 and 0.5'),
    (dict(loss='simpo', reference='live'), "reference: loss = 'simpo' has none"),
    (dict(loss='sft', reference_from='base'), "reference: loss = 'sft' has none"),
    (dict(gamma=0.5), "'gamma' is not a setting here"),
    (dict(loss='sft', beta=0.5), "'beta' is not a setting here"),
    (dict(lerning_rate=1), "'lerning_rate' is not a setting here; did you mean 'learning_rate'?"),
    (dict(bata=1), "'bata' is not a setting here; did you mean 'beta'?"),
], ids=lambda value: ' '.join(map(str, value)) if isinstance(value, dict) else '')
def test_settings_that_are_refused(config, changed, says):
    with pytest.raises(InputError) as caught:
        config(**changed)
    assert says in str(caught.value) and '\n' not in str(caught.value)


@pytest.mark.parametrize('changed, says', [
    (dict(max_length=65), 'max_length: 65 exceeds the context of base, 64 tokens'),
    (dict(init_from='small'), 'tokenizer: byte has 257 tokens, and small has 256'),
    (dict(tokens_per_batch=16), 'tokens_per_batch: 16 is less than the longest pair'),
    (dict(dataset='single.jsonl'), 'single.jsonl has 1 responses to a prompt; the loss compares'),
    (dict(dataset='ranks.jsonl'), 'ranks.jsonl has 3 responses to a prompt; the loss compares two'),
    (dict(dataset='soft.jsonl', loss='ipo'), 'soft.jsonl has p other than 1.0; the loss ignores'),
    (dict(dataset='soft.jsonl', loss='cpo'), 'soft.jsonl has p other than 1.0; the loss ignores'),
    (dict(dataset='margins.jsonl'), 'margins.jsonl has margin other than 0.0; the loss ignores it'),
    (dict(val_fraction=1.0), 'val_fraction: 1.0 leaves no pair to train on'),
    (dict(val_fraction=0.0, eval_only=True), 'val_fraction: 0.0 leaves no pair to evaluate'),
    (dict(init_from='./none'), './none: no model there'),
    (dict(reference_from='./none'), './none: no model there'),
    (dict(dataset='none.jsonl'), 'none.jsonl: no such file'),
    (dict(resume=True), 'resume: there is no run/ckpt.pt'),
], ids=lambda value: ' '.join(map(str, value.values())) if isinstance(value, dict) else '')
def test_what_does_not_fit_is_refused(config, changed, says):
    make_model('small', vocab_size=256)
    write_records('single.jsonl', 20, responses=1)
    write_records('ranks.jsonl', 20, responses=3)
    write_records('soft.jsonl', 20, p=lambda i: 0.7)
    write_records('margins.jsonl', 20, margin=lambda i: 0.7)
    with pytest.raises(InputError) as caught:
        train.train(config(**changed))
    assert says in str(caught.value) and '\n' not in str(caught.value)
    assert not os.path.exists('run')


def test_a_random_model_with_a_misspelt_size_is_refused(config):
    Path('scratch.py').write_text('init_from = dict(layers=1)')
    with pytest.raises(InputError, match="init_from: .*'layers'"):
        train.train(config('scratch.py', init_from=None))


def snapshot(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def test_a_run_is_not_overwritten_by_accident(config):
    train.train(config(max_iters=2, eval_samples=2))
    before = snapshot('run')
    with pytest.raises(InputError, match='out_dir: run holds a run; --resume .*, --overwrite'):
        train.train(config())
    with pytest.raises(InputError, match='tokens_per_batch'):
        train.train(config(overwrite=True, tokens_per_batch=16))
    assert snapshot('run') == before
    train.train(config(overwrite=True, max_iters=1, val_fraction=0.0))
    assert sorted(os.listdir('run')) == ['ckpt.pt', 'log.jsonl']    # nothing of the old run is left
    assert [line['step'] for line in read_log()] == [0]


@pytest.mark.parametrize('changed, says', [
    (dict(dataset='other.jsonl'), 'dataset: run/ckpt.pt was trained with another dataset'),
    (dict(loss='ipo'), 'loss: run/ckpt.pt was trained with another loss'),
    (dict(init_from='other'), 'init_from: run/ckpt.pt was trained with another init_from'),
    (dict(reference_from='other'), 'init_from: run/ckpt.pt was trained with another init_from'),
    (dict(max_iters=3), 'run/ckpt.pt has done 4 steps'),
], ids=lambda value: ' '.join(map(str, value)) if isinstance(value, dict) else '')
def test_a_run_is_resumed_as_what_it_was(config, changed, says):
    make_model('other', seed=1)
    write_records('other.jsonl', 50)
    train.train(config(max_iters=4))
    before = snapshot('run')
    with pytest.raises(InputError) as caught:
        train.train(config(resume=True, **changed))
    assert says in str(caught.value) and '\n' not in str(caught.value)
    assert snapshot('run') == before


@pytest.mark.parametrize('how', [dict(resume=True), dict(eval_only=True)], ids=str)
def test_a_run_of_a_model_of_another_shape_is_refused(config, how):
    make_model('wide', n_embd=48)
    train.train(config(loss='simpo', max_iters=4))
    with pytest.raises(InputError, match='run/ckpt.pt'):
        train.train(config(loss='simpo', init_from='wide', **how))


def test_weights_alone_cannot_be_resumed(config):
    train.train(config(max_iters=4))
    shutil.copy('run/best.pt', 'run/ckpt.pt')
    with pytest.raises(InputError, match='run/ckpt.pt: weights only'):
        train.train(config(resume=True))


def test_a_resumed_run_may_have_other_settings_and_more_steps(config):
    """Interruptions are in test_robust.py: here, a run that was finished goes on."""
    train.train(config(max_iters=3, schedule='constant'))
    train.train(config(max_iters=6, schedule='constant', resume=True))
    train.train(config(max_iters=6, schedule='constant', out_dir='one'))
    assert read_log() == read_log('one')
    assert all(torch.equal(t, weights_of('one')[name]) for name, t in weights_of().items())
    train.train(config(max_iters=8, schedule='constant', resume=True, learning_rate=5e-4))
    assert [line['lr'] for line in training_lines()] == [1e-3] * 6 + [5e-4] * 2
