"""
The lab's rewards: the reward model beside one response a row, judges, rounds, credit of tokens.

    python -m pytest tests/test_reward.py

The models are random and tiny, tokens are bytes. Left out: credit's page, what rounds gain.
"""
import json
import math
import random

import numpy as np
import pytest
import torch

import train
from configurator import InputError
from conftest import randomise
from lab import credit, judge, rounds
from lab.plot import read_jsonl
from lab.reward import RewardModel, reward_loss
from model import GPT, GPTConfig, bias_of, pack
from prepare import Pairs, prepare
from tokenizer import get_tokenizer
from weights import load, load_checkpoint, save

SIZES = GPTConfig(block_size=64, vocab_size=257, n_layer=2, n_head=2, n_embd=32)
MINE = """
def early(prompt, responses): return [-len(r) / 2 for r in responses]
def few(prompt, responses): return [1.0]
def nan(prompt, responses): return [float('nan') for r in responses]
def broken(prompt, responses): raise KeyError('lost')
"""


@pytest.fixture(scope='module')
def files(tmp_path_factory):
    """A folder with pairs, whose chosen has more of 'a', and three models; 'brief' ends its
    responses early: its every token is 'a', 'b' or the end, with the same probability."""
    folder, rng = tmp_path_factory.mktemp('reward'), random.Random(0)
    for seed, name in enumerate(('base', 'other')):
        save(randomise(GPT(SIZES), std=0.1, seed=seed), folder / name)
    brief = GPT(SIZES)
    with torch.no_grad():
        brief.ln_f.weight.zero_()
        brief.ln_f.bias.fill_(1)
        brief.wte.weight.fill_(-1)
        brief.wte.weight[[*b'ab', 256]] = 0
    save(brief, folder / 'brief')
    with open(folder / 'pairs.jsonl', 'w') as f:
        for i in range(80):
            a, b = (''.join(rng.choices('abc', k=rng.randint(4, 9))) for _ in range(2))
            chosen, rejected = (a, b) if a.count('a') > b.count('a') else (b, a)
            pair = dict(prompt=f'{i}:', chosen=chosen + '.', rejected=rejected + '!')
            f.write(json.dumps(pair) + '\n')
    (folder / 'mine.py').write_text(MINE)
    (folder / 'reward.py').write_text(
        'from lab.reward import RewardModel as model_class, reward_loss as loss')
    return folder


@pytest.fixture
def config(files, tmp_path):
    """config([file], name=value, ...) -> the Config of train.py, or what `load` makes of them."""
    def config(*file, load=train.load_config, **changed):
        settings = dict(
            out_dir=tmp_path / 'run', init_from=files / 'base', dataset=files / 'pairs.jsonl',
            data_dir=tmp_path / 'data', tokenizer='byte', max_length=64, max_prompt_length=32,
            val_fraction=0.2, batch_size=16, learning_rate=3e-3, max_iters=6, device='cpu')
        options = [f'--{name}={value}' for name, value in (settings | changed).items()]
        return load([*map(str, file), *options])
    return config


# --------------------------------------------------------------------------------------------------
# The reward model and its loss


def test_loss_is_bradley_terrys_with_margins():
    numbers = torch.tensor([[1.5, -0.25], [0.5, 0.75], [0.9, 1.0], [0.0, 0.4]], dtype=float)
    chosen, rejected, p, margin = numbers
    losses, c, r = reward_loss(chosen, rejected, 0.1, 0.2, p, margin)
    for loss, z, q in zip(losses.tolist(), (1.0 - 0.1, -1.0 - 0.1 - 0.4), (0.9, 1.0)):
        q = 0.8 * q + 0.2 * (1 - q)
        plain = q * math.log1p(math.exp(-z)) + (1 - q) * math.log1p(math.exp(z))
        assert loss == pytest.approx(plain, rel=1e-12)
    assert torch.equal(c, chosen) and torch.equal(r, rejected)
    assert reward_loss(chosen, rejected)[0][0] == pytest.approx(math.log1p(math.exp(-1)))


@pytest.mark.parametrize('pad_to', [0, 80])
def test_rewards_and_gradients_equal_one_response_a_row(pad_to):
    model, rng = randomise(RewardModel(SIZES)), np.random.default_rng(0)
    pairs = [(rng.integers(257, size=n), [rng.integers(257, size=m) for m in lengths])
             for n, lengths in ((1, (1, 5, 2)), (9, (3, 1, 1)), (4, (8, 8, 2)))]
    batch = pack(pairs, pad_to)
    numbers = model.token_logps(batch)
    assert torch.count_nonzero(numbers) == 9               # one for each response
    rewards, plain = batch.sum_by_response(numbers), []
    for prompt, responses in pairs:
        for response in responses:
            row = torch.from_numpy(np.concatenate([prompt, response]))[None]
            index = torch.arange(row.size(1))
            hidden = model.hidden(row, index, bias_of(index <= index[:, None]))
            plain.append(hidden[0, -1] @ model.head.weight[0])
    plain = torch.stack(plain).view(3, 3)
    torch.testing.assert_close(rewards, plain, rtol=1e-4, atol=1e-5)
    weights = torch.randn(3, 3, generator=torch.Generator().manual_seed(0))
    parameters = [model.head.weight, model.wte.weight, model.blocks[0].qkv.weight]
    for ours, theirs in zip(*(torch.autograd.grad((weights * x).sum(), parameters)
                              for x in (rewards, plain))):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_a_config_file_trains_a_reward_model(config, files, tmp_path):
    metrics = train.train(config(files / 'reward.py', max_iters=25))
    assert read_jsonl(tmp_path / 'run' / 'log.jsonl')[1]['eval/loss'] == pytest.approx(math.log(2))
    assert metrics['eval/loss'] < 0.62 and metrics['eval/rewards/accuracies'] > 0.7


# --------------------------------------------------------------------------------------------------
# Judges, and what scores are used for


@pytest.mark.parametrize('loss', ['dpo', 'simpo', 'ipo', 'plackett_luce', 'reward'])
def test_a_runs_judge_gives_its_evaluations_rewards(config, files, tmp_path, loss):
    train.train(config(files / 'reward.py') if loss == 'reward' else config(loss=loss))
    lines, records = read_jsonl(tmp_path / 'run' / 'eval.jsonl'), read_jsonl(files / 'pairs.jsonl')
    pairs = [records[line['id']] for line in lines]
    prompts, texts = zip(*((r['prompt'], [r['chosen'], r['rejected']]) for r in pairs))
    run_judge = judge.load_judge(str(tmp_path / 'run'), 'cpu')
    scores = run_judge(prompts, texts)
    for found, line in zip(scores, lines, strict=True):
        assert found == pytest.approx([line['chosen_reward'], line['rejected_reward']], abs=2e-5)
    assert np.ptp(scores) > 1e-2
    assert np.isfinite(run_judge(['x:'], [[' good' * 20]])).all()    # a response that doesn't fit


def test_a_reference_that_has_changed_is_refused(config, tmp_path):
    save(randomise(GPT(SIZES)), tmp_path / 'moved')
    train.train(config(init_from=tmp_path / 'moved', max_iters=1))
    save(randomise(GPT(SIZES), seed=1), tmp_path / 'moved')
    with pytest.raises(InputError, match='moved'):
        judge.load_judge(str(tmp_path / 'run'), 'cpu')


@pytest.mark.parametrize('max_length, max_prompt_length', [(62, 60), (20, 9)])
def test_texts_are_encoded_as_prepare_encodes_them(config, write, max_length, max_prompt_length):
    turns = [dict(role=role, content=text) for role, text in (
        ('user', 'Hi'), ('assistant', 'Yes?'), ('user', 'Who?'), ('assistant', ' me'))]
    records = [dict(prompt='a question:', chosen=' yes', rejected=' no'),
               dict(chosen=turns, rejected=[*turns[:3], turns[3] | dict(content=' nobody at all')])]
    cfg = config(dataset=write('mixed.jsonl', records), max_length=max_length,
                 max_prompt_length=max_prompt_length)
    pairs, texts = Pairs(prepare(cfg)), judge.read_texts(enumerate(records))
    for i in range(2):
        prompt, responses = pairs[i]
        found = judge.encode(*texts[i], get_tokenizer('byte'), cfg)
        for (ids, tokens), response in zip(found, responses, strict=True):
            assert np.array_equal(ids, prompt) and np.array_equal(tokens, response)


def test_sampled_rankings_follow_plackett_luce():
    scores, rng, n = np.array([1.0, 0.0, -0.5]), np.random.default_rng(0), 20000
    drawn = [tuple(judge.rank([0, 1, 2], scores, rng, 'sample')[0]) for _ in range(n)]
    for order in ((0, 1, 2), (1, 0, 2), (2, 1, 0)):
        w = np.exp(scores[list(order)])
        p = w[0] / w.sum() * w[1] / w[1:].sum()
        assert abs(drawn.count(order) / n - p) < 4 * math.sqrt(p * (1 - p) / n)


def test_rejection_sampling_gives_the_tilted_distribution():
    """Six responses, equally likely under pi_ref: the first accepted is of pi_ref exp(r/beta)/Z."""
    scores, beta, rng = np.array([-1.0, 0.0, 0.5, 1.0, 1.5, 2.0]), 0.7, np.random.default_rng(0)
    optimum = np.exp(scores / beta) / np.exp(scores / beta).sum()
    drawn = [judge.reject(group, scores[group], rng, beta)
             for group in rng.integers(6, size=(20000, 40))]
    assert np.abs(np.bincount(drawn, minlength=6) / len(drawn) - optimum).max() < 0.015


@pytest.mark.parametrize('verb, options, expected', [
    ('score', [], [dict(prompt='p:', responses=[' aa', ' a'], scores=[-0.75, -0.5])]),
    ('label', [], [dict(prompt='p:', chosen=' aa', rejected=' a', p=pytest.approx(0.4378235))]),
    ('best', [], [dict(prompt='p:', chosen=' a'), dict(prompt='q:', chosen=' b')]),
    ('reject', ['--beta=0.01'], [dict(prompt='p:', chosen=' a'), dict(prompt='q:', chosen=' b')]),
    ('rank', [], [dict(prompt='p:', responses=[' a', ' aa', ' aaa'])]),
    ('rank', ['--labels=soft'],
     [dict(prompt='p:', chosen=' a', rejected=' aaa', p=pytest.approx(0.6224593))])])
def test_commands(files, write, tmp_path, verb, options, expected):
    """The mean of two judges, of which gold says 0. sigma(-0.25) = 0.4378, sigma(0.5) = 0.6225."""
    records = [dict(prompt='p:', chosen=' aa', rejected=' a')]
    if verb in ('best', 'reject', 'rank'):
        records = [dict(prompt=text[:2], response=text[2:], ended='cut' not in text) for text in (
            'p: aaa', 'q: b', 'p: a', 'p: cut', 'p: aa', 'q: ', 'q: b')]
    judge.main([verb, f'gold,{files / "mine.py"}:early', write('in.jsonl', records),
                f'--out={tmp_path / "out.jsonl"}', *options])
    assert read_jsonl(tmp_path / 'out.jsonl') == expected


@pytest.mark.parametrize('command, argv, word', [
    (judge, 'judge gold three.jsonl', 'usage'), (judge, 'score base three.jsonl', 'base'),
    (judge, 'label gold three.jsonl', '3 responses'), (judge, 'score mine.py:f x.csv', "'f'"),
    (judge, 'rank gold three.jsonl --labels=y', 'labels'), (rounds, '--labels=hard', 'labels'),
    (judge, 'score mine.py:few three.jsonl', 'few'), (rounds, '--completions=3', 'completions'),
    (judge, 'score mine.py:nan three.jsonl', 'nan'), (credit, 'base', 'prompt'),
    (judge, 'score mine.py:broken three.jsonl', 'lost')])
def test_what_cannot_be_done_is_named(files, monkeypatch, command, argv, word):
    monkeypatch.chdir(files)
    (files / 'three.jsonl').write_text('{"prompt": "p:", "responses": [" a", " b", " c"]}\n')
    with pytest.raises(InputError, match=word):
        command.main(argv.split())


# --------------------------------------------------------------------------------------------------
# Rounds, credit


@pytest.mark.parametrize('loss, completions, chat', [
    ('dpo', 2, False), ('plackett_luce', 3, False), ('simpo', 2, True), ('sft', 3, True)])
def test_rounds_sample_label_and_train(config, files, write, tmp_path, loss, completions, chat):
    prompts = [[dict(role='user', content=text)] if chat else text for text in ('Hi', 'Who?')]
    settings = dict(
        dataset=write('prompts.jsonl', [dict(prompt=p, chosen='x', rejected='y') for p in prompts]),
        load=rounds.load_config, init_from=files / 'brief', judge=f'{files / "mine.py"}:early',
        rounds=2, round_pairs=24, max_iters=2, loss=loss, completions=completions, labels='best')
    rounds.train_rounds(config(**settings))
    run = tmp_path / 'run'
    made = [read_jsonl(run / f'round-{k}.jsonl') for k in (1, 2)]
    assert len(made[0]) == len(made[1]) == 24
    for record in made[0] + made[1]:
        responses = record.get('responses') or [record['chosen'], record['rejected']]
        assert len(set(responses)) == completions and set(''.join(responses)) <= set('ab')
        assert sorted(responses, key=len) == responses         # as the judge says
        assert record['prompt'] in prompts
    first, second = (load_checkpoint(run / f'round-{k}' / 'ckpt.pt') for k in (1, 2))
    assert first['origin']['reference'] == second['origin']['reference']           # the reference stays,
    assert second['config']['init_from'] == str(run / 'round-1')       # and the policy goes on

    (run / 'round-2' / 'ckpt.pt').unlink()                     # as if interrupted in the second
    log = (run / 'round-1' / 'log.jsonl').read_text()
    rounds.train_rounds(config(**settings, resume=True))
    assert made == [read_jsonl(run / f'round-{k}.jsonl') for k in (1, 2)]
    assert (run / 'round-1' / 'log.jsonl').read_text() == log  # not trained again: speeds differ


def test_credit_of_each_token_is_that_of_two_plain_passes(files):
    policy, reference = (load(str(files / name)) for name in ('base', 'other'))
    prompt, response = list(b'one two'), [*b' three', 256]
    found = credit.token_credit(policy, reference, prompt, response, beta=0.3)
    logps = [m(torch.tensor([prompt + response]))[0].log_softmax(-1) for m in (policy, reference)]
    for t, (token, c) in enumerate(zip(response, found, strict=True)):
        difference = (logps[0] - logps[1])[len(prompt) + t - 1, token].item()
        assert c == pytest.approx(0.3 * difference, abs=1e-5)


@pytest.mark.parametrize('tokens, spans', [
    ([*'a\u20ac'.encode()], [('a', 1), ('\u20ac', 3)]),        # a character is a span,
    ([65, 195], [('A', 1), ('\ufffd', 1)]), ([195, 65], [('\ufffdA', 2)])])    # and no credit lost
def test_spans_are_characters(tokens, spans):
    assert credit.spans_of(tokens, [1.0] * len(tokens), get_tokenizer('byte')) == spans
