"""
reward.py: the reward model against a plain twin, judges, what is done with rewards, and training on-policy.

    pytest tests/test_reward.py
"""
import json
import math
import random
import shutil

import numpy as np
import pytest
import torch

import reward
import train
from model import GPT, GPTConfig, load_checkpoint, pack
from prepare import InputError, Pairs, prepare
from reward import RewardModel, accept, load_judge, ranked, reward_loss

WORDS = 'good fine nice bad poor grim tree road'.split()


def kindness(text):
    return float(sum(text.count(w) for w in WORDS[:3]) - sum(text.count(w) for w in WORDS[3:6]))


@pytest.fixture(scope='module')
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp('reward')
    torch.manual_seed(0)
    GPT(GPTConfig(64, 257, 2, 2, 32, 256)).save_pretrained(folder / 'base')
    rng = random.Random(0)
    with open(folder / 'pairs.jsonl', 'w') as f:
        for i in range(80):
            a, b = (' ' + ' '.join(rng.choices(WORDS, k=rng.randint(2, 4))) for _ in 'ab')
            a, b = (a, b) if kindness(a) >= kindness(b) else (b, a)
            f.write(json.dumps(dict(prompt=f'{i}:', chosen=a + '.', rejected=b + '!')) + '\n')
    return folder


@pytest.fixture
def config(base, tmp_path):
    def config(**overrides):
        settings = dict(out_dir=tmp_path / 'run', init_from=base / 'base', dataset=base / 'pairs.jsonl',
                        tokenizer='byte', max_length=64, max_prompt_length=32, val_fraction=0.2,
                        data_dir=base / 'data', batch_size=16, learning_rate=3e-3, max_iters=6, eval_interval=3,
                        log_interval=1, device='cpu')
        return train.load_config([f'--{k}={v}' for k, v in (settings | overrides).items() if v is not None])
    return config


# ------------------------------------------------------------------------------------------------------------
# The loss and the model


def test_loss_is_bradley_terry_by_hand():
    chosen, rejected = torch.tensor([1.5, -0.25], dtype=float), torch.tensor([0.5, 0.75], dtype=float)
    p, margin = torch.tensor([0.9, 1.0], dtype=float), torch.tensor([0.0, 0.4], dtype=float)
    losses, c, r = reward_loss(chosen, rejected, gamma=0.1, p=p, margin=margin)
    z = [1.0 - 0.1, -1.0 - 0.1 - 0.4]
    for got, x, q in zip(losses.tolist(), z, p.tolist()):
        assert got == pytest.approx(q * math.log1p(math.exp(-x)) + (1 - q) * math.log1p(math.exp(x)), rel=1e-12)
    assert torch.equal(c, chosen) and torch.equal(r, rejected)
    assert reward_loss(chosen, rejected)[0][0] == pytest.approx(math.log1p(math.exp(-1)))


def test_scores_equal_one_response_a_row():
    torch.manual_seed(0)
    model = RewardModel(GPTConfig(64, 300, 2, 2, 32, 256)).double()
    torch.nn.init.normal_(model.head.weight)
    model.mean += 0.25
    rng = np.random.default_rng(0)
    pairs = [(rng.integers(0, 300, n), [rng.integers(0, 300, m) for m in sizes])
             for n, sizes in ((1, (1, 5, 2)), (9, (3, 1, 1)), (4, (8, 8, 2)))]
    scores = model.score_responses(pack(pairs))
    for i, (prompt, responses) in enumerate(pairs):
        for k, response in enumerate(responses):
            row = torch.from_numpy(np.concatenate([prompt, response]))[None]
            hidden = model.hidden(row, torch.arange(row.size(1)), None)
            plain = hidden[0, -1] @ model.head.weight[0] - 0.25
            assert scores[i, k].item() == pytest.approx(plain.item(), rel=1e-5, abs=1e-6)


def test_reward_model_learns_and_is_centred(config, tmp_path):
    cfg = config(loss='reward', max_iters=25, eval_interval=25)
    metrics = train.train(cfg)
    log = [json.loads(line) for line in open(tmp_path / 'run' / 'log.jsonl')]
    assert log[1]['eval/loss'] == pytest.approx(math.log(2))     # a head of zeros
    assert metrics['eval/loss'] < 0.62 and metrics['eval/rewards/accuracies'] > 0.7
    assert not any('logps' in key for line in log[1:] for key in line)
    lines = [json.loads(line) for line in open(tmp_path / 'run' / 'eval.jsonl')]
    assert lines[0]['chosen_logps'] is None and isinstance(lines[0]['chosen_reward'], float)
    model = RewardModel.from_pretrained(str(tmp_path / 'run'))
    pairs = Pairs(prepare(cfg), 'train')
    assert abs(train.score(model, pairs, np.arange(len(pairs)), 2, cfg).mean()) < 1e-4
    with pytest.raises(InputError, match='tensor head.weight is not one of GPT-2'):
        GPT.from_pretrained(str(tmp_path / 'run'))


def test_reward_model_resumes_where_it_was(config, tmp_path):
    """The rewards' mean, which an evaluation changes, with it: bit for bit."""
    settings = dict(loss='reward', schedule='constant', eval_interval=3)
    train.train(config(**settings, max_iters=6, out_dir=tmp_path / 'whole'))
    train.train(config(**settings, max_iters=3))
    half = load_checkpoint(str(tmp_path / 'run' / 'ckpt.pt'))
    train.train(config(**settings, max_iters=6, resume=True))
    whole, run = (load_checkpoint(str(tmp_path / name / 'ckpt.pt')) for name in ('whole', 'run'))
    assert (half['step'], run['step']) == (3, 6) and half['model']['mean'] != run['model']['mean'] != 0
    assert all(torch.equal(t, run['model'][name]) for name, t in whole['model'].items())


def test_margins_reach_the_loss_and_no_other_objective(config, write):
    path = write('margins.jsonl', [dict(prompt=f'{i}:', chosen=' a', rejected=' b', margin=2.0) for i in range(8)])
    cfg = config(dataset=path, loss='reward', val_fraction=1.0, eval_only=True, max_iters=None)
    assert train.train(cfg)['eval/loss'] == pytest.approx(math.log1p(math.exp(2.0)))
    with pytest.raises(InputError, match='has margins, and loss = .dpo. ignores them'):
        train.train(config(dataset=path))
    bad = write('bad.jsonl', [dict(prompt='x', chosen=' a', rejected=' b', margin='much')])
    with pytest.raises(InputError, match="bad.jsonl line 1: 'margin' is 'much', not a finite number"):
        prepare(config(dataset=bad))


# ------------------------------------------------------------------------------------------------------------
# Judges


def test_implicit_reward_is_that_of_the_evaluation(config, base, tmp_path):
    for loss in ('dpo', 'simpo', 'ipo'):
        cfg = config(loss=loss, out_dir=tmp_path / loss, dtype='float32')
        train.train(cfg)
        lines = [json.loads(line) for line in open(tmp_path / loss / 'eval.jsonl')]
        records = [json.loads(line) for line in open(base / 'pairs.jsonl')]
        some = [records[line['id']] for line in lines]
        rewards = load_judge(str(tmp_path / loss), 'cpu')(
            [r['prompt'] for r in some], [[r['chosen'], r['rejected']] for r in some])
        for got, line in zip(rewards, lines):
            assert got == pytest.approx([line['chosen_reward'], line['rejected_reward']], abs=2e-5)


def test_several_judges_are_averaged(config, base, tmp_path, write):
    path = write('mine.py', b'def length(prompt, responses):\n    return [len(r) for r in responses]\n')
    judge = load_judge(f'gold,{path}:length')
    rewards = judge(['x:'], [[' great plot.', ' dull cast, weak score.', ' x']])
    assert rewards[0].tolist() == [(1 + 12) / 2, (-2 + 23) / 2, (0 + 2) / 2]


@pytest.mark.parametrize('text, message', [
    ('def f(p, r): return [1.0]', 'must give a finite number for each of 2 responses'),
    ('def f(p, r): return [1.0, float("nan")]', 'must give a finite number for each of 2 responses'),
    ('def f(p, r): return ["a", "b"]', 'ValueError'),
    ('def f(p, r): raise KeyError("lost")', "KeyError: 'lost'"),
    ('def g(p, r): return r', "has no function 'f'"),
    ('import nothing_of_that_name', 'ModuleNotFoundError')])
def test_a_judge_of_the_users_own_is_held_to_its_word(write, text, message):
    path = write('mine.py', text.encode())
    with pytest.raises(InputError, match='judge: ') as e:
        load_judge(f'{path}:f')(['x'], [['a', 'b']])
    assert message in str(e.value) and '\n' not in str(e.value)


def test_judges_that_there_are_not(base, tmp_path):
    for name, message in (('mine.py:f', 'no such file'), (str(base / 'base'), 'is no run of train.py'),
                          (str(tmp_path / 'nothing'), 'no such file or folder')):
        with pytest.raises(InputError, match=message):
            load_judge(name)


# ------------------------------------------------------------------------------------------------------------
# Labels, best of n, rejection sampling


def test_sampled_ranking_is_plackett_luce():
    rewards, rng, n = np.array([1.0, 0.0, -0.5]), np.random.default_rng(0), 20000
    drawn = [tuple(ranked(rewards, 'sample', rng)[0]) for _ in range(n)]
    weights = np.exp(rewards)
    for order in {(0, 1, 2), (1, 0, 2), (2, 1, 0)}:
        w = weights[list(order)]
        p = w[0] / w.sum() * w[1] / w[1:].sum()
        assert abs(drawn.count(order) / n - p) < 4 * math.sqrt(p * (1 - p) / n)


def test_labels_by_reward():
    order, p = ranked(np.array([0.5, 2.0, -1.0]), 'best', np.random.default_rng(0))
    assert order.tolist() == [1, 0, 2] and p == 1.0
    order, p = ranked(np.array([0.5, 2.0, -1.0]), 'soft', np.random.default_rng(0))
    assert order.tolist() == [1, 2] and p == pytest.approx(1 / (1 + math.exp(-3.0)))


def test_rejection_sampling_gives_the_tilted_distribution():
    """Six responses, equally likely under pi_ref: what is kept is pi_ref exp(r/beta) / Z."""
    values, beta, rng = np.array([-1.0, 0.0, 0.5, 1.0, 1.5, 2.0]), 0.7, np.random.default_rng(0)
    drawn = rng.integers(6, size=60000)
    kept = drawn[accept(values[drawn], beta, rng)]
    wanted = np.exp(values / beta) / np.exp(values / beta).sum()
    assert np.abs(np.bincount(kept, minlength=6) / len(kept) - wanted).max() < 0.01


def test_the_first_that_is_accepted_of_many_is_a_sample_of_the_tilted_distribution():
    values, beta, rng = np.array([-1.0, 0.0, 0.5, 1.0, 1.5, 2.0]), 0.7, np.random.default_rng(1)
    groups = rng.integers(6, size=(20000, 40))
    first = [some[accept(values[some], beta, rng).argmax()] for some in groups]
    wanted = np.exp(values / beta) / np.exp(values / beta).sum()
    assert np.abs(np.bincount(first, minlength=6) / len(first) - wanted).max() < 0.015


def test_completions_that_were_cut_off_are_no_answers(write, tmp_path, capsys):
    judge = write('mine.py', b'def longer(prompt, responses):\n    return [len(r) for r in responses]\n') + ':longer'
    samples = write('cut.jsonl', [dict(model='m', prompt='p:', response=r, ended=ended) for r, ended in (
        (' a', True), (' aaaaaa', False), (' ', True), (' aa', True))])
    reward.main(['best', judge, samples, f'--out={tmp_path / "best.jsonl"}'])
    assert json.loads((tmp_path / 'best.jsonl').read_text()) == dict(prompt='p:', chosen=' aa')
    assert '2 completions without an end, or empty, left out' in capsys.readouterr().out
    two = write('two_models.jsonl', [dict(model=m, prompt='p:', response=' a', ended=True) for m in 'ab'])
    with pytest.raises(InputError, match='completions of more than one model'):
        reward.main(['best', judge, two])


def test_a_reference_that_has_changed_is_not_taken_for_the_one_of_before(config, base, tmp_path):
    shutil.copytree(base / 'base', tmp_path / 'moved')
    train.train(config(init_from=tmp_path / 'moved'))
    load_judge(str(tmp_path / 'run'), 'cpu')
    model = GPT.from_pretrained(str(tmp_path / 'moved'))
    with torch.no_grad():
        model.ln_f.bias.add_(0.1)
    model.save_pretrained(tmp_path / 'moved')
    with pytest.raises(InputError, match='moved: not the reference that .*ckpt.pt was trained with'):
        load_judge(str(tmp_path / 'run'), 'cpu')


def test_commands_write_what_prepare_reads(config, base, write, tmp_path, monkeypatch, capsys):
    judge = write('mine.py', b'def shorter(prompt, responses):\n    return [-len(r) / 2 for r in responses]\n') + ':shorter'
    pairs, samples = write('two.jsonl', [dict(prompt='p:', chosen=' aa', rejected=' a')]), write(
        'many.jsonl', [dict(prompt=p, response=r) for p, r in (('p:', ' aaa'), ('q:', ' b'), ('p:', ' a'), ('p:', ' aa'),
                                                               ('q:', ' b'))])

    def ask(*argv):
        out = str(tmp_path / 'out.jsonl')
        reward.main([*argv, f'--out={out}'])
        return [json.loads(line) for line in open(out)]
    assert ask('score', judge, pairs)[0]['rewards'] == [-1.5, -1.0]
    assert '0.0 +- 0.0% of 1 pairs' in capsys.readouterr().out
    assert ask('label', judge, pairs)[0]['p'] == pytest.approx(1 / (1 + math.exp(0.5)))
    assert ask('best', judge, samples) == [dict(prompt='p:', chosen=' a'), dict(prompt='q:', chosen=' b')]
    assert ask('rank', judge, samples) == [dict(prompt='p:', responses=[' a', ' aa', ' aaa'])]
    kept = ask('reject', judge, samples, '--beta=0.01')
    assert kept == [dict(prompt='p:', chosen=' a'), dict(prompt='q:', chosen=' b')]
    soft = ask('rank', judge, samples, '--labels=soft')[0]
    assert (soft['chosen'], soft['rejected']) == (' a', ' aaa') and soft['p'] == pytest.approx(1 / (1 + math.exp(-1)))
    read = Pairs(prepare(config(dataset=str(tmp_path / 'out.jsonl'), val_fraction=0.0)), 'train')
    assert read.table['p'][0] == pytest.approx(soft['p'])
    for argv, message in ((('score', judge), 'usage'), (('judge', judge, pairs), 'usage'),
                          (('score', judge, pairs, '--beta=2.0'), 'beta: ignored by score'),
                          (('reject', judge, samples, '--beta=0.0'), 'beta: 0.0 is not above 0'),
                          (('rank', judge, samples, '--labels=x'), "labels: 'x' is not one of"),
                          (('label', judge, samples), 'label needs pairs'),
                          (('score', judge, 'none.jsonl'), 'none.jsonl: no such file')):
        with pytest.raises(InputError, match=message):
            reward.main(list(argv))


# ------------------------------------------------------------------------------------------------------------
# On-policy


@pytest.fixture
def quick_judge(write):
    return write('mine.py', b'def early(prompt, responses):\n    return [-float(len(r)) for r in responses]\n') + ':early'


@pytest.fixture
def talkative(base):
    """A model that ends what it says soon: an untrained one ends one response in a hundred."""
    folder = base / 'talkative'
    if not folder.exists():
        torch.manual_seed(1)
        model = GPT(GPTConfig(64, 257, 1, 2, 32, 256))
        with torch.no_grad():
            model.ln_f.bias += 4 * model.wte.weight[256] / model.wte.weight[256].norm()
            model.wte.weight[256] *= 4
        model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize('loss, completions, shape', [('dpo', 2, 'chosen'), ('plackett_luce', 3, 'responses')])
def test_rounds_sample_label_and_train(config, quick_judge, talkative, tmp_path, loss, completions, shape):
    cfg = config(init_from=talkative, rounds=2, judge=quick_judge, round_pairs=24, completions=completions, loss=loss,
                 max_iters=2)
    reward.train_rounds(cfg)
    files = sorted(p.name for p in (tmp_path / 'run').glob('round-*.jsonl'))
    assert [name[:8] for name in files] == ['round-1-', 'round-2-']
    for name in files:
        records = [json.loads(line) for line in open(tmp_path / 'run' / name)]
        assert len(records) == 24 and all(shape in r for r in records)
        for r in records:
            responses = r.get('responses') or [r['chosen'], r['rejected']]
            assert len(responses) == completions and sorted(responses, key=len) == responses
    first = load_checkpoint(str(tmp_path / 'run' / 'round-1' / 'ckpt.pt'))
    second = load_checkpoint(str(tmp_path / 'run' / 'round-2' / 'ckpt.pt'))
    assert first['reference'] == second['reference']                  # the reference stays
    assert second['config']['init_from'].endswith('round-1')          # the policy goes on
    again = config(init_from=talkative, rounds=2, judge=quick_judge, round_pairs=24, completions=completions, loss=loss,
                   max_iters=2, resume=True)
    reward.train_rounds(again)                                        # whole: nothing to do
    assert sorted(p.name for p in (tmp_path / 'run').glob('round-*.jsonl')) == files
    for k, before in ((1, first), (2, second)):
        after = load_checkpoint(str(tmp_path / 'run' / f'round-{k}' / 'ckpt.pt'))['model']
        assert all(torch.equal(t, after[name]) for name, t in before['model'].items())


@pytest.mark.parametrize('options, message', [
    (dict(rounds=2), 'rounds: need a judge'), (dict(judge='gold'), 'judge: ignored with rounds = 0'),
    (dict(rounds=1, judge='gold', loss='sft'), 'rounds: need a judge, and an objective'),
    (dict(rounds=1, judge='gold', completions=3), 'completions: 3 make rankings'),
    (dict(rounds=1, judge='gold', completions=1), 'completions: 1 is less than 2'),
    (dict(rounds=1, judge='gold', labels='hard'), "labels: 'hard' is not one of")])
def test_settings_of_rounds_that_cannot_be(config, options, message):
    with pytest.raises(InputError, match=message):
        config(**options)


def test_a_policy_that_never_ends_is_said(config, base, quick_judge):
    with pytest.raises(InputError, match='distinct responses'):
        reward.train_rounds(config(init_from=base / 'base', rounds=1, judge=quick_judge, round_pairs=100,
                                   max_length=34, max_prompt_length=33))


def test_another_reference_than_the_start(config, base, talkative, tmp_path):
    """The first step's loss is not log 2, and cached and live reference agree."""
    found = []
    for reference in ('cached', 'live'):
        cfg = config(init_from=talkative, reference_from=base / 'base', reference=reference, max_iters=2,
                     out_dir=tmp_path / reference)
        train.train(cfg)
        found.append([json.loads(line) for line in open(tmp_path / reference / 'eval.jsonl')])
        first = [json.loads(line) for line in open(tmp_path / reference / 'log.jsonl')][1]
        assert abs(first['eval/loss'] - math.log(2)) > 1e-3
    for a, b in zip(*found):
        assert a == pytest.approx(b, abs=1e-4)
    with pytest.raises(InputError, match="reference_from: ignored with loss = 'simpo'"):
        config(loss='simpo', reference_from=base / 'base')


def test_samples_at_evaluation_give_kl_and_length(config, talkative, tmp_path):
    train.train(config(init_from=talkative, eval_samples=8, max_iters=3, learning_rate=1e-2))
    lines = [json.loads(line) for line in open(tmp_path / 'run' / 'log.jsonl')]
    lines = [line for line in lines if 'eval/kl' in line]
    assert [line['step'] for line in lines] == [0, 3]
    assert lines[0]['eval/kl'] == pytest.approx(0, abs=1e-4) and lines[1]['eval/kl'] > 1e-3
    samples = [json.loads(line) for line in open(tmp_path / 'run' / 'samples.jsonl')]
    assert len(samples) == 8 and lines[1]['eval/length'] == np.mean([s['tokens'] for s in samples])
    with pytest.raises(InputError, match="eval_samples: ignored with loss = 'reward'"):
        config(loss='reward', eval_samples=4)
