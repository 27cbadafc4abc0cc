"""
train.py: the loop, the reference, objectives, evaluation, what is refused.

    python -m pytest tests/test_train.py
    NANOPREF_LONG=1 python -m pytest tests/test_train.py   # with the real compiler: minutes more

A GPT of two layers with random weights and 60 made-up pairs stand in for the real thing; tokens are
bytes. Left out: interruptions and damage (test_robust.py), several processes (test_processes.py).
"""
import contextlib
import json
import os
import random
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import train
import weights
from configurator import InputError
from forks import ROOT, Forks
from model import GPT, GPTConfig
from prepare import Pairs, prepare
from sample import generate

WORDS = 'the a red dog sees one old cat under blue tree and runs home'.split()
SETTINGS = dict(out_dir='run', init_from='base', dataset='pairs.jsonl', data_dir='data',
                tokenizer='byte', max_length=64, max_prompt_length=32, val_fraction=0.2,
                batch_size=8, tokens_per_batch=512, learning_rate=1e-3, max_iters=6,
                eval_interval=3, log_interval=1, device='cpu')


def make_model(name, seed=0, **changed):
    torch.manual_seed(seed)
    sizes = dict(block_size=64, vocab_size=257, n_layer=2, n_head=2, n_embd=32)
    weights.save(GPT(GPTConfig(**sizes | changed)), name)


def write_records(path, n, responses=2, **numbers):
    """Records of made-up words; a keyword gives each a number, a function of its place."""
    rng = random.Random(0)
    with open(path, 'w') as f:
        for i in range(n):
            prompt, *texts = (' ' + ' '.join(rng.choices(WORDS, k=rng.randint(1, 5)))
                              for _ in range(1 + responses))
            own = {name: value(i) for name, value in numbers.items()}
            f.write(json.dumps(dict(prompt=f'{i}{prompt}', responses=texts) | own) + '\n')


def options(**changed):
    settings = (SETTINGS | changed).items()
    return [f'--{name}={value}' for name, value in settings if value is not None]


@pytest.fixture
def config(tmp_path, monkeypatch):
    """In a folder with a model and pairs: config('own.py', beta=0.5, ...) -> a Config."""
    monkeypatch.chdir(tmp_path)
    make_model('base')
    write_records('pairs.jsonl', 60)
    monkeypatch.setattr(train, 'catch_signals', lambda: contextlib.nullcontext([]))    # Ctrl-C stops pytest
    threads = torch.get_num_threads()
    torch.set_num_threads(1)                               # faster where a model is tiny
    yield lambda *files, **changed: train.load_config([*files, *options(**changed)])
    torch.set_num_threads(threads)


def read_lines(path):
    """log.jsonl or eval.jsonl without what depends on the clock."""
    lines = map(json.loads, Path(path).read_text().splitlines())
    return [{k: v for k, v in line.items() if not k.endswith('_per_s')} for line in lines]


def read_log(folder='run', of='loss'):
    """The lines of the steps; of='eval/loss': of the evaluations."""
    return [line for line in read_lines(f'{folder}/log.jsonl') if of in line]


def weights_of(folder='run'):
    return weights.load_checkpoint(f'{folder}/ckpt.pt')['model']


def plain_logps(model, pairs, rows):
    """(rows, K) log pi(y|x), of each response alone, from full logits."""
    def logp(prompt, response):
        ids = torch.tensor([*map(int, prompt), *map(int, response)])
        logits = model(ids[None, :-1])[0, len(prompt) - 1:]
        return logits.log_softmax(-1).gather(1, ids[len(prompt):, None]).sum()
    return torch.stack([torch.stack([logp(prompt, y) for y in responses])
                        for prompt, responses in (pairs[row] for row in rows)])


# --------------------------------------------------------------------------------------------------
# The loop


def test_an_epoch_is_a_permutation_and_more_steps_change_none_before():
    rows, cfg = np.arange(100, 110), train.Config(batch_size=4, max_iters=10, seed=3)
    order = train.training_order(rows, cfg)
    for epoch in range(4):
        assert sorted(order[epoch * 10:(epoch + 1) * 10]) == rows.tolist()
    assert len(order) == 40 and not np.array_equal(order[:10], order[10:20])
    cfg.max_iters = 7
    assert np.array_equal(train.training_order(rows, cfg), order[:28])
    cfg.seed = 4
    assert not np.array_equal(train.training_order(rows, cfg), order[:28])


@pytest.mark.parametrize('schedule, then', [
    ('cosine', [2.0, 1 + 0.5**0.5, 1.0, 1 - 0.5**0.5, 0.0]), ('constant', [2.0] * 5),
    ('linear', [2.0, 1.5, 1.0, 0.5, 0.0])])
def test_the_learning_rate_warms_up_and_follows_the_schedule(schedule, then):
    cfg = train.Config(learning_rate=2.0, warmup_iters=3, max_iters=7, schedule=schedule)
    rates = [train.learning_rate(step, cfg) for step in range(8)]
    assert rates == pytest.approx([0.5, 1.0, 1.5, *then])


def test_one_step_is_plain_adamw_on_the_mean_dpo_loss(config):
    """The same step, written plainly: full logits, torch's own optimiser."""
    make_model('other', seed=1)
    cfg = config(max_iters=1, warmup_iters=1, grad_clip=0.5, beta=0.3, reference_from='other')
    train.train(cfg)
    pairs, policy, reference = Pairs(prepare(cfg)), weights.load('base'), weights.load('other')
    rows = train.training_order(pairs.train, cfg)
    logps = plain_logps(policy, pairs, rows)
    rewards = 0.3 * (logps - plain_logps(reference, pairs, rows))
    margins = rewards[:, 0] - rewards[:, 1]
    loss = -margins.sigmoid().log().mean()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), 0.5)
    torch.optim.Adam(policy.parameters(), lr=5e-4, betas=(0.9, 0.99)).step()
    for name, t in weights_of().items():
        # Adam divides by the gradient's size: where that is next to nothing, rounding shows
        assert (t - policy.state_dict()[name]).abs().mean() < 1e-6, name
    means = [loss, *rewards.mean(0), margins.mean(), (margins > 0).float().mean(), *logps.mean(0)]
    expected = dict(zip(train.METRICS, torch.stack(means).tolist()), grad_norm=norm.item(),
                    lr=5e-4, step=0)
    assert read_log() == [pytest.approx(expected, rel=1e-4, abs=1e-4)]


@pytest.mark.parametrize('loss', ['dpo', 'simpo', 'sft'])
def test_micro_batches_and_their_size_change_nothing(config, loss, monkeypatch):
    """All of a step at once, some pairs, about one: a pair has up to 80 tokens."""
    token_logps, sizes = GPT.token_logps, []
    monkeypatch.setattr(GPT, 'token_logps', lambda model, batch: sizes.append(len(batch.tokens))
                        or token_logps(model, batch))
    for limit in (2000, 200, 80):
        run = f'run{limit}'
        train.train(config(loss=loss, tokens_per_batch=limit, out_dir=run))
        for line, expected in zip(read_log(run), read_log('run2000'), strict=True):
            assert line == pytest.approx(expected, rel=1e-4, abs=1e-5)
        for name, t in weights_of(run).items():
            assert (t - weights_of('run2000')[name]).abs().mean() < 1e-6, name
        assert max(sizes) <= limit
        sizes.clear()


@pytest.mark.parametrize('loss, responses, orders', [('dpo', 2, 2), ('plackett_luce', 3, 6)])
def test_a_run_starts_with_all_orders_equally_likely_and_learns(config, loss, responses, orders):
    write_records('records.jsonl', 60, responses)
    train.train(config(loss=loss, dataset='records.jsonl', max_iters=40, eval_interval=20,
                       batch_size=25, learning_rate=5e-3))
    steps, evaluations = read_log(), read_log(of='eval/loss')
    assert steps[0]['loss'] == pytest.approx(np.log(orders), abs=1e-5)
    assert steps[0]['rewards/accuracies'] == evaluations[0]['eval/rewards/accuracies'] == 0.5
    last = steps[-5:]                                      # few enough pairs to learn by heart
    assert np.mean([line['loss'] for line in last]) < 0.6 * np.log(orders)
    assert np.mean([line['rewards/accuracies'] for line in last]) > 0.9
    best = min(evaluations, key=lambda line: line['eval/loss'])
    assert weights.load_checkpoint('run/best.pt')['step'] == best['step']


def test_the_header_is_enough_to_repeat_the_run(config):
    train.train(config(loss='simpo', gamma=0.7, seed=3, grad_clip=0.1, max_iters=0, epochs=1.5))
    header = read_lines('run/log.jsonl')[0]
    assert len(read_log()) == 10                           # 1.5 times 50 pairs, 8 a step
    assert header['config'].pop('model_class') == 'model.GPT' and header['config']['gamma'] == 0.7
    train.train(config(**header['config'] | dict(out_dir='again')))
    assert read_lines('again/log.jsonl')[1:] == read_lines('run/log.jsonl')[1:]
    assert all(header[name] for name in 'commit weights data hardware processes versions'.split())


def test_a_random_model_is_the_same_one_again(config):
    Path('c.py').write_text('init_from = dict(n_layer=1, n_head=2, n_embd=16, block_size=64)')
    for run in ('one', 'two'):
        train.train(config('c.py', init_from=None, out_dir=run))
    assert read_log('one') == read_log('two')


@pytest.mark.parametrize('reference, models', [('cached', 1), ('live', 2)])
def test_a_compiled_run_equals_a_plain_one(config, reference, models, monkeypatch):
    """What is compiled belongs to its model: the policy, the reference."""
    backend = 'inductor' if os.environ.get('NANOPREF_LONG') else 'eager'    # dynamo alone: seconds
    plain, ran = torch.compile, []

    def traced(function, **given):
        compiled = plain(function, backend=backend, **given)
        return lambda *args: ran.append(function) or compiled(*args)
    monkeypatch.setattr(torch, 'compile', traced)
    runs = [train.train(config(out_dir=f'run{compile}', compile=compile, reference=reference))
            for compile in (False, True)]
    assert runs[1] == pytest.approx(runs[0], rel=1e-4, abs=1e-5) and len(set(ran)) == models


# --------------------------------------------------------------------------------------------------
# The reference


@pytest.mark.parametrize('dtype, tolerance', [('float32', 1e-4), ('bfloat16', 0.01)])
def test_cached_and_live_references_agree(config, dtype, tolerance):
    for reference in ('cached', 'live'):
        train.train(config(reference=reference, dtype=dtype, out_dir=reference))
    for cached, live in zip(read_log('cached'), read_log('live'), strict=True):
        assert cached == pytest.approx(live, rel=tolerance, abs=tolerance)


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
    assert calls_of(dtype='bfloat16') > without            # another precision,
    make_model('base', seed=1)                             # other weights: another reference
    assert calls_of() > without


def test_the_reference_is_computed_for_the_pairs_of_the_run_alone(config):
    cfg = config(max_iters=2)
    train.train(cfg)
    pairs, (path,) = Pairs(prepare(cfg)), Path('data').glob('reference-*')
    rows = np.union1d(pairs.val, train.training_order(pairs.train, cfg))
    expected = np.isin(np.arange(len(pairs.table)), rows)
    there = np.isfinite(np.fromfile(path, np.float32))
    assert np.array_equal(there, np.repeat(expected, pairs.table['responses'].sum(1)))


# An objective with an option, which asks for all that there is; a model
OWN = """
import torch
from model import GPT

def hinge_loss(policy_logps, reference_logps, lengths, margin, p, beta=0.1, slope=1.0):
    c, r = (beta * (policy_logps - reference_logps) / lengths).T
    return slope * p * torch.relu(margin - (c - r)), c.detach(), r.detach()

class Warm(GPT):
    def token_logps(self, batch):
        return 1.1 * super().token_logps(batch)
"""


def test_an_edited_model_never_meets_the_old_reference(config, tmp_path):
    """The cache's key has the source of model.py in it, and that of a model of one's own."""
    copy, own, logps = tmp_path / 'copy', Path('own.py'), []
    copy.mkdir()
    for path in Path(ROOT).glob('*.py'):
        shutil.copy(path, copy)
    own.write_text(OWN + 'model_class = Warm')
    with Forks() as forks:
        for path, text in ((own, '# no edit'), (own, 'super().token_logps(batch)'),
                           (copy / 'model.py', 'ChunkedLogps.apply(x,')):
            path.write_text(path.read_text().replace(text, f'0.9 * {text}'))
            assert forks.run('.', 'train.py', 'own.py', *options(overwrite=True), root=copy)[0] == 0
            assert read_log()[0]['loss'] == pytest.approx(np.log(2), abs=1e-6)
            logps.append(read_log()[0]['logps/chosen'])
    assert logps == pytest.approx([logps[0], 0.9 * logps[0], 0.81 * logps[0]])    # both show


def test_a_policy_that_is_computed_otherwise_than_the_reference_stops(config, monkeypatch):
    plain = train.no_grad_logps                               # the reference's way, and evaluation's
    monkeypatch.setattr(train, 'no_grad_logps',
                        lambda *args: lambda *batch: 0.9 * plain(*args)(*batch))
    with pytest.raises(InputError, match='policy and reference are the same model, but'):
        train.train(config())
    assert read_log() == []                                # before the first update


# --------------------------------------------------------------------------------------------------
# Objectives and evaluation


@pytest.mark.parametrize('responses', [1, 2])
def test_sft_learns_from_chosen_alone(config, responses):
    write_records('records.jsonl', 60, responses)
    cfg = config(loss='sft', dataset='records.jsonl', max_iters=20, learning_rate=1e-2)
    last, pairs = train.train(cfg), Pairs(prepare(cfg))
    first = read_log(of='eval/loss')[0]['eval/loss']
    chosen = plain_logps(weights.load('base'), pairs, pairs.val)[:, 0]
    assert first == pytest.approx(-chosen.mean().item(), abs=1e-3)
    assert last['eval/loss'] < first - 5
    assert read_log()[0].keys() == {'step', 'loss', 'logps/chosen', 'grad_norm', 'lr'}


@pytest.mark.parametrize('source', ['from own import Warm, hinge_loss', OWN],
                         ids=['imported', 'in the config file'])
def test_an_objective_and_a_model_of_ones_own(config, monkeypatch, source):
    monkeypatch.syspath_prepend('.')
    Path('own.py').write_text(OWN)
    Path('c.py').write_text(f'{source}\nloss, model_class, slope = hinge_loss, Warm, 2')
    write_records('numbers.jsonl', 60, margin=lambda i: i % 3 / 2, p=lambda i: i % 5 / 4)
    metrics, losses = train.train(config('c.py', dataset='numbers.jsonl', beta=0.3)), []
    for line in read_lines('run/eval.jsonl'):
        i, c, r = line['id'], line['chosen_reward'], line['rejected_reward']
        ratio = line['chosen_logps'] - line['reference_chosen_logps']
        assert c == pytest.approx(0.3 * ratio / line['chosen_length'], abs=1e-6)
        losses.append(2 * (i % 5 / 4) * max(0, i % 3 / 2 - (c - r)))
    assert metrics['eval/loss'] == pytest.approx(np.mean(losses), abs=1e-6)
    settings = read_lines('run/log.jsonl')[0]['config']
    assert settings['loss'].endswith('.hinge_loss') and settings['model_class'].endswith('.Warm')


def test_eval_jsonl_is_a_plain_computation_of_each_response_alone(config):
    make_model('other', seed=1)
    cfg = config(reference_from='other', eval_only=True, val_fraction=1.0)
    metrics, pairs, lines = train.train(cfg), Pairs(prepare(cfg)), read_lines('run/eval.jsonl')
    rows = np.searchsorted(pairs.table['id'], [line['id'] for line in lines])
    assert len(set(rows)) == len(pairs.table) and os.listdir('run') == ['eval.jsonl']
    policy, other = (plain_logps(weights.load(name), pairs, rows) for name in ('base', 'other'))
    for k, side in enumerate(('chosen', 'rejected')):
        expected = {f'{side}_logps': policy, f'reference_{side}_logps': other,
                    f'{side}_reward': 0.1 * (policy - other),
                    f'{side}_length': pairs.table['responses'][rows]}
        for name, values in expected.items():
            ours = [line[name] for line in lines]
            assert ours == pytest.approx(values[:, k].tolist(), abs=1e-3), name
    margins = 0.1 * (policy - other) @ torch.tensor([1.0, -1.0])
    assert metrics['eval/loss'] == pytest.approx(-margins.sigmoid().log().mean().item(), abs=1e-4)


def test_a_tie_counts_one_half():
    chosen, rejected = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([0.0, 2.0, 5.0, 4.0])
    sums = train.metric_sums(torch.zeros(4), chosen, rejected, torch.zeros(4, 2))
    assert train.metric_means(sums, 4, 2)['rewards/accuracies'] == (1 + 0.5 + 0 + 0.5) / 4


def test_eval_only_evaluates_the_run_that_is_there(config):
    last, lines = train.train(config(learning_rate=1e-2)), read_lines('run/eval.jsonl')
    assert train.train(config(eval_only=True)) == pytest.approx(last, rel=1e-5)
    assert read_lines('run/eval.jsonl') == [pytest.approx(line, rel=1e-5) for line in lines]


def test_eval_samples_give_a_length_and_with_a_live_reference_a_kl(config):
    cfg = config(reference='live', eval_samples=5, learning_rate=1e-2)
    metrics, pairs, policy = train.train(cfg), Pairs(prepare(cfg)), weights.load('run')
    prompts = [pairs[row][0].tolist() for row in pairs.val[:5]]
    responses = generate(policy, prompts, 64 - max(map(len, prompts)), {256}, seed=cfg.seed)
    sampled = [(prompt, [response]) for prompt, response in zip(prompts, responses)]
    ratios = [plain_logps(model, sampled, range(5)) for model in (policy, weights.load('base'))]
    assert metrics['eval/kl'] == pytest.approx((ratios[0] - ratios[1]).mean().item(), abs=1e-3)
    assert metrics['eval/length'] == np.mean([len(response) for response in responses])
    assert len(read_lines('run/samples.jsonl')) == 5


# --------------------------------------------------------------------------------------------------
# What is refused, a line each


def snapshot(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


@pytest.mark.parametrize('says, changed', {
    'batch_size: 0 is less than 1': dict(batch_size=0),
    "schedule: 'step' is not one of": dict(schedule='step'),
    "device 'tpu' is not available": dict(device='tpu'),
    "loss: 'ppo' is not one of dpo, ": dict(loss='ppo'),
    'beta: 0.0 is not above 0': dict(beta=0),
    "beta = 'high' is not of type float": dict(beta='high'),
    "'gamma' is not a setting here": dict(gamma=0.5),
    'label_smoothing 0.6 is not between': dict(label_smoothing=0.6),
    "reference: loss = 'simpo' has none": dict(loss='simpo', reference='live'),
    'max_length: 65 exceeds the context of base, 64': dict(max_length=65),
    'byte has 257 tokens, and small has 256': dict(init_from='small'),
    'single.jsonl has 1 response(s) to a prompt': dict(dataset='single.jsonl'),
    'ranks.jsonl has 3 response(s) to a prompt': dict(dataset='ranks.jsonl'),
    'soft.jsonl has p other than 1.0; the loss ignores it': dict(dataset='soft.jsonl', loss='ipo'),
    'val_fraction: 1.0 leaves no pair to train on': dict(val_fraction=1.0),
    'resume: there is no new/ckpt.pt': dict(resume=True),
    'run holds a run; --resume continues it, --overwrite replaces it': dict(out_dir='run'),
    '20 is less than the longest pair': dict(out_dir='run', overwrite=True, tokens_per_batch=20),
    'was trained with another dataset': dict(out_dir='run', resume=True, val_fraction=0.3),
    'was trained with another batch_size': dict(out_dir='run', resume=True, batch_size=4),
    'was trained with another loss': dict(out_dir='run', resume=True, loss='ipo'),
    'was trained with another reference': dict(out_dir='run', resume=True, reference_from='other'),
    'was trained with another reference: see': dict(out_dir='run', eval_only=True,
                                                    init_from='other'),
    'a model of another shape than init_from': dict(out_dir='run', resume=True, init_from='wide'),
    'has done 6 steps': dict(out_dir='run', resume=True, max_iters=3),
    'weights only; a run cannot resume from it': dict(out_dir='best', resume=True),
}.items())
def test_what_is_refused_changes_nothing(config, says, changed):
    for name, sizes in dict(small=dict(vocab_size=256), other={}, wide=dict(n_embd=48)).items():
        make_model(name, seed=1, **sizes)
    write_records('single.jsonl', 20, responses=1)
    write_records('ranks.jsonl', 20, responses=3)
    write_records('soft.jsonl', 20, p=lambda i: 0.7)
    train.train(config())
    shutil.copytree('run', 'best')
    shutil.copy('run/best.pt', 'best/ckpt.pt')
    before = snapshot('run')
    with pytest.raises(InputError, match=re.escape(says)):
        train.train(config(**dict(out_dir='new') | changed))
    assert snapshot('run') == before and not os.path.exists('new')


def test_overwrite_leaves_nothing_of_the_old_run(config):
    train.train(config(eval_samples=2))
    Path('run/tokenizer.json').write_text("the old run's")
    train.train(config(overwrite=True, max_iters=1, val_fraction=0.0))
    assert sorted(os.listdir('run')) == ['ckpt.pt', 'log.jsonl'] and len(read_log()) == 1
