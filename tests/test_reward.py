"""
The lab's reward half: the reward model beside one response a row, judges, what scores are used for,
on-policy rounds, credit of tokens.

    python -m pytest tests/test_reward.py

The models are random and tiny, tokens are bytes. Left out: what rounds gain, which lab/LOG.md has.
"""
import json
import math
import random
import re

import numpy as np
import pytest
import torch

import sample
import train
from configurator import InputError
from conftest import randomise
from lab import credit, judge, rounds
from lab.judge import load_judge, rank
from lab.reward import RewardModel, reward_loss
from model import GPT, GPTConfig, bias_of, pack
from prepare import Pairs, prepare
from tokenizer import ASSISTANT, get_tokenizer, plain_chat
from weights import load, load_checkpoint, save

WORDS = 'good fine nice bad poor grim tree road'.split()
EARLY = 'def early(prompt, responses):\n    return [-len(r) / 2 for r in responses]\n'


def kindness(text):
    return sum(text.count(w) for w in WORDS[:3]) - sum(text.count(w) for w in WORDS[3:6])


def read(path):
    with open(path, encoding='utf-8') as f:
        return [json.loads(line) for line in f]


def random_model(seed):
    sizes = dict(block_size=64, vocab_size=257, n_layer=2, n_head=2, n_embd=32)
    return randomise(GPT(GPTConfig(**sizes)), std=0.1, seed=seed)


@pytest.fixture(scope='module')
def files(tmp_path_factory):
    """A folder with pairs, labelled by `kindness`, and three models; 'brief' ends its responses
    early: its every token is 'a', 'b' or the end, with the same probability."""
    folder, rng = tmp_path_factory.mktemp('reward'), random.Random(0)
    for seed, name in enumerate(('base', 'other')):
        save(random_model(seed), folder / name)
    brief = GPT(GPTConfig(block_size=64, vocab_size=257, n_layer=1, n_head=1, n_embd=16))
    with torch.no_grad():
        brief.ln_f.weight.zero_()
        brief.ln_f.bias.copy_(torch.eye(16)[0])
        brief.wte.weight[:, 0] = -30
        brief.wte.weight[[*b'ab', 256], 0] = 0
    save(brief, folder / 'brief')
    with open(folder / 'pairs.jsonl', 'w') as f:
        for i in range(80):
            texts = [' ' + ' '.join(rng.choices(WORDS, k=rng.randint(2, 4))) for _ in 'ab']
            chosen, rejected = sorted(texts, key=kindness, reverse=True)
            record = dict(prompt=f'{i}:', chosen=chosen + '.', rejected=rejected + '!')
            f.write(json.dumps(record) + '\n')
    return folder


@pytest.fixture
def config(files, tmp_path):
    """config(load, name=value, ...) -> the Config that `load` makes of a config file."""
    def config(load_config=train.load_config, imports='', **changed):
        settings = dict(
            out_dir=tmp_path / 'run', init_from=files / 'base', dataset=files / 'pairs.jsonl',
            data_dir=tmp_path / 'data', tokenizer='byte', max_length=64, max_prompt_length=32,
            val_fraction=0.2, batch_size=16, learning_rate=3e-3, max_iters=6, eval_interval=3,
            log_interval=1, device='cpu') | changed
        lines = [f'{name} = {value if isinstance(value, (int, float)) else str(value)!r}\n'
                 for name, value in settings.items()]
        (tmp_path / 'config.py').write_text(imports + ''.join(lines))
        return load_config([str(tmp_path / 'config.py')])
    return config


@pytest.fixture
def reward_config(config):
    imports = 'from lab.reward import RewardModel as model_class, reward_loss as loss\n'
    return lambda **changed: config(imports=imports, **changed)


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
    sizes = dict(block_size=64, vocab_size=300, n_layer=2, n_head=2, n_embd=32)
    model, rng = randomise(RewardModel(GPTConfig(**sizes))), np.random.default_rng(0)
    pairs = [(rng.integers(300, size=n), [rng.integers(300, size=m) for m in lengths])
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


def test_a_config_file_trains_a_reward_model(reward_config, files, tmp_path):
    metrics = train.train(reward_config(max_iters=25, eval_interval=25))
    assert read(tmp_path / 'run' / 'log.jsonl')[1]['eval/loss'] == pytest.approx(math.log(2))
    assert metrics['eval/loss'] < 0.62 and metrics['eval/rewards/accuracies'] > 0.7
    checkpoint = load_checkpoint(tmp_path / 'run' / 'ckpt.pt')
    assert checkpoint['config']['loss'] == 'lab.reward.reward_loss'
    assert load(str(tmp_path / 'run'), RewardModel).head.weight.abs().sum() > 0
    assert load(str(files / 'base'), RewardModel).head.weight.abs().sum() == 0
    with pytest.raises(InputError, match='unexpected tensor head.weight'):
        load(str(tmp_path / 'run'))


def test_a_reward_model_resumes_exactly(reward_config, tmp_path):
    runs = []
    for folder, steps, resume in (('through', 6, False), ('cut', 3, False), ('cut', 6, True)):
        train.train(reward_config(out_dir=tmp_path / folder, max_iters=steps, resume=resume,
                                  schedule='constant'))
        runs.append(load_checkpoint(tmp_path / folder / 'ckpt.pt')['model'])
    assert not torch.equal(runs[0]['head.weight'], runs[1]['head.weight'])
    assert all(torch.equal(t, runs[2][name]) for name, t in runs[0].items())


def test_margins_reach_the_reward_loss_and_no_other(reward_config, config, write):
    records = [dict(prompt=f'{i}:', chosen=' a', rejected=' b', margin=2.0) for i in range(8)]
    path = write('margins.jsonl', records)
    cfg = reward_config(dataset=path, val_fraction=1.0, eval_only=True)
    assert train.train(cfg)['eval/loss'] == pytest.approx(math.log1p(math.exp(2.0)))
    with pytest.raises(InputError, match='margin other than 0'):
        train.train(config(dataset=path))


# --------------------------------------------------------------------------------------------------
# Judges


@pytest.mark.parametrize('loss', ['dpo', 'simpo', 'ipo', 'plackett_luce', 'reward'])
def test_a_runs_judge_gives_its_evaluations_rewards(config, reward_config, files, tmp_path, loss):
    train.train(reward_config() if loss == 'reward' else config(loss=loss, truncation='drop'))
    lines, records = read(tmp_path / 'run' / 'eval.jsonl'), read(files / 'pairs.jsonl')
    prompts = [records[line['id']]['prompt'] for line in lines]
    texts = [[records[line['id']][key] for key in ('chosen', 'rejected')] for line in lines]
    scores = load_judge(str(tmp_path / 'run'), 'cpu')(prompts, texts)
    for found, line in zip(scores, lines, strict=True):
        assert found == pytest.approx([line['chosen_reward'], line['rejected_reward']], abs=2e-5)
    assert np.ptp(scores) > 1e-2
    cut, = load_judge(str(tmp_path / 'run'), 'cpu')(['x:'], [[' good' * 20]])
    assert np.isfinite(cut).all()                          # a response that does not fit


def test_several_judges_are_averaged(write):
    path, texts = write('mine.py', EARLY), [[' great plot.', ' dull cast.'], [' x']]
    scores = load_judge(f'gold,{path}:early')(['x:', 'y:'], texts)
    assert [each.tolist() for each in scores] == [[(1 - 6) / 2, (-1 - 5.5) / 2], [(0 - 1) / 2]]


@pytest.mark.parametrize('text, message', [
    ('def f(p, r): return [1.0]', 'must return a finite number for each of 2 responses'),
    ('def f(p, r): return [1.0, float("nan")]', 'must return a finite number'),
    ('def f(p, r): return ["a", "b"]', 'ValueError'),
    ('def f(p, r): raise KeyError("lost")', "KeyError: 'lost'"),
    ('def g(p, r): return r', "has no function 'f'"),
    ('import nothing_of_that_name', 'ModuleNotFoundError')])
def test_mistakes_in_a_judge_of_ones_own_are_one_line(write, text, message):
    path = write('mine.py', text)
    with pytest.raises(InputError) as e:
        load_judge(f'{path}:f')(['x'], [['a', 'b']])
    assert message in str(e.value) and 'mine.py' in str(e.value) and '\n' not in str(e.value)


def test_what_is_no_judge(config, files, tmp_path):
    train.train(config(loss='sft', out_dir=tmp_path / 'sft', max_iters=1))
    for name, message in (
            (files / 'mine.py:f', 'no such'), (files / 'base', 'not a run of train.py'),
            (tmp_path / 'nothing', 'no model there'), (tmp_path / 'sft', 'has no rewards')):
        with pytest.raises(InputError, match=message):
            load_judge(str(name), 'cpu')(['x'], [['a', 'b']])


def test_a_reference_that_has_changed_is_refused(config, tmp_path):
    save(random_model(0), tmp_path / 'moved')
    train.train(config(init_from=tmp_path / 'moved', max_iters=1))
    load_judge(str(tmp_path / 'run'), 'cpu')
    save(random_model(1), tmp_path / 'moved')
    with pytest.raises(InputError, match='moved: not the reference that .*run was trained with'):
        load_judge(str(tmp_path / 'run'), 'cpu')


def test_texts_are_encoded_as_prepare_encodes_them(config, write):
    """Strings and chats, with room for all and with too little; and the same text twice."""
    turns = [dict(role=role, content=text) for role, text in (
        ('user', 'Hi'), ('assistant', 'Yes?'), ('user', 'Who?'), ('assistant', ' me'))]
    other = dict(role='assistant', content=' you, and nobody else at all')
    records = [dict(prompt='a question:', chosen=' yes', rejected=' no'),
               dict(chosen=turns, rejected=[*turns[:3], other])]
    path, tokenizer = write('mixed.jsonl', records), get_tokenizer('byte')
    for longest, longest_prompt in ((62, 60), (20, 9)):
        cfg = config(dataset=path, max_length=longest, max_prompt_length=longest_prompt)
        pairs = Pairs(prepare(cfg))
        entries = judge.read_texts((path, record) for record in records)
        assert entries[1] == (turns[:3], [' me', other['content']])
        for i, (prompt, texts) in enumerate(entries):
            expected, (chosen, rejected) = pairs[i]
            found = judge.encode(prompt, [*texts, texts[1]], tokenizer, cfg)
            assert all(ids.tolist() == expected.tolist() for ids, _ in found)
            assert [tokens.tolist() for _, tokens in found] == [
                x.tolist() for x in (chosen, rejected, rejected)]


# --------------------------------------------------------------------------------------------------
# What scores are used for


def test_sampled_rankings_follow_plackett_luce():
    scores, rng, n = np.array([1.0, 0.0, -0.5]), np.random.default_rng(0), 20000
    drawn = [tuple(rank([0, 1, 2], scores, rng, 'sample')[0]) for _ in range(n)]
    for order in ((0, 1, 2), (1, 0, 2), (2, 1, 0)):
        w = np.exp(scores[list(order)])
        p = w[0] / w.sum() * w[1] / w[1:].sum()
        assert abs(drawn.count(order) / n - p) < 4 * math.sqrt(p * (1 - p) / n)


def test_rejection_sampling_gives_the_tilted_distribution():
    """Six responses, equally likely under pi_ref: the first accepted of many is a sample of
    pi_ref exp(r/beta)/Z."""
    scores, beta, rng = np.array([-1.0, 0.0, 0.5, 1.0, 1.5, 2.0]), 0.7, np.random.default_rng(0)
    optimum = np.exp(scores / beta) / np.exp(scores / beta).sum()
    groups = rng.integers(6, size=(20000, 40))
    drawn = [judge.reject(group, scores[group], rng, beta)[0][0] for group in groups]
    assert np.abs(np.bincount(drawn, minlength=6) / len(drawn) - optimum).max() < 0.015


def test_commands_write_what_prepare_reads(config, write, tmp_path, capsys):
    mine, out = write('mine.py', EARLY) + ':early', str(tmp_path / 'out.jsonl')
    pairs = write('two.jsonl', [dict(prompt='p:', chosen=' aa', rejected=' a')])
    samples = write('many.jsonl', [
        dict(model='m', prompt=p, response=r, ended=r != ' cut')
        for p, r in (('p:', ' aaa'), ('q:', ' b'), ('p:', ' a'), ('p:', ' cut'), ('p:', ' aa'),
                     ('q:', ' '), ('q:', ' b'))])

    def ask(verb, file, *options):
        judge.main([verb, mine, file, f'--out={out}', *options])
        return read(out)
    assert ask('score', pairs)[0]['scores'] == [-1.5, -1.0]
    assert '0.0% +- 0.0% of 1 pairs' in capsys.readouterr().out
    assert len(ask('score', samples)) == 5                 # one by one
    capsys.readouterr()
    assert ask('label', pairs)[0] == dict(
        prompt='p:', chosen=' aa', rejected=' a', p=pytest.approx(1 / (1 + math.exp(0.5))))
    shortest = [dict(prompt='p:', chosen=' a'), dict(prompt='q:', chosen=' b')]
    assert ask('best', samples) == shortest
    assert '2 completions without an end, or blank, left out' in capsys.readouterr().out
    assert ask('reject', samples, '--beta=0.01') == shortest
    assert ask('rank', samples) == [dict(prompt='p:', responses=[' a', ' aa', ' aaa'])]
    soft, = ask('rank', samples, '--labels=soft')
    p = 1 / (1 + math.exp(-1))
    assert soft == dict(prompt='p:', chosen=' a', rejected=' aaa', p=pytest.approx(p))
    assert Pairs(prepare(config(dataset=out))).table['p'][0] == pytest.approx(p)


@pytest.mark.parametrize('argv, message', [
    ('score gold', 'usage'), ('judge gold three.jsonl', 'usage'), ('best gold --out=x', 'usage'),
    ('score gold none.jsonl', 'none.jsonl: no such file'),
    ('label gold three.jsonl', '3 responses, not 2'),
    ('best gold three.jsonl --beta=1', "'beta' is not a setting"),
    ('rank gold three.jsonl --labels=y', "labels: 'y' is not one of"),
    ('reject gold three.jsonl --beta=0', 'beta: 0.0 is not above 0'),
    ('best gold models.jsonl', 'models.jsonl line 2: completions of a second model')])
def test_commands_that_cannot_be_done(write, tmp_path, monkeypatch, argv, message):
    monkeypatch.chdir(tmp_path)
    write('three.jsonl', [dict(prompt='p:', responses=[' a', ' b', ' c'])])
    write('models.jsonl', [dict(model=m, prompt='p:', response=' a', ended=True) for m in 'ab'])
    with pytest.raises(InputError, match=message):
        judge.main(argv.split())


# --------------------------------------------------------------------------------------------------
# Rounds


@pytest.fixture
def round_config(config, files, write):
    def round_config(**changed):
        mine = write('mine.py', EARLY) + ':early'
        settings = dict(init_from=files / 'brief', judge=mine, rounds=2, round_pairs=24)
        return config(rounds.load_config, **settings | dict(max_iters=2) | changed)
    return round_config


@pytest.mark.parametrize('loss, completions, chat', [
    ('dpo', 2, False), ('plackett_luce', 3, False), ('simpo', 2, True), ('sft', 3, True)])
def test_rounds_sample_label_and_train(
        round_config, write, tmp_path, monkeypatch, loss, completions, chat):
    changed, messages = dict(loss=loss, completions=completions, labels='best'), []
    generate, answered = sample.generate, []

    def noted(model, prompts, *more):
        answered.extend(bytes(ids).decode() for ids in prompts)
        return generate(model, prompts, *more)
    monkeypatch.setattr(sample, 'generate', noted)
    if loss == 'dpo':                                          # responses of 1 to 5 tokens
        changed |= dict(max_length=9, max_prompt_length=3)
    if chat:
        messages = [[dict(role='user', content=text)] for text in ('Hi', 'Who?', 'Why')]
        changed['dataset'] = write('chats.jsonl', [dict(prompt=m, chosen='x') for m in messages])
    rounds.train_rounds(round_config(**changed))
    run = tmp_path / 'run'
    for k in (1, 2):
        records = read(run / f'round-{k}.jsonl')
        assert len(records) == 24 and all(not chat or r['prompt'] in messages for r in records)
        for r in records:
            responses = r.get('responses') or [r['chosen'], r['rejected']]
            assert len(set(responses)) == completions and set(''.join(responses)) <= set('ab')
            assert sorted(responses, key=len) == responses     # as the judge says
            assert loss != 'dpo' or len(r['prompt']) + max(map(len, responses)) + 1 <= 9
        texts = [plain_chat(r['prompt']) + ASSISTANT if chat else r['prompt'] for r in records]
        assert set(texts) <= set(answered)                     # prompts with nothing cut off
    first, second = (load_checkpoint(run / f'round-{k}' / 'ckpt.pt') for k in (1, 2))
    assert first['reference'] == second['reference']           # the reference stays,
    assert second['config']['init_from'] == str(run / 'round-1')       # and the policy goes on
    assert (second['config']['reference_from'] == '') == (loss in ('simpo', 'sft'))

    with pytest.raises(InputError, match='holds rounds'):
        rounds.train_rounds(round_config(**changed))
    times = [path.stat().st_mtime_ns for path in sorted(run.glob('round-*.jsonl'))]
    (run / 'round-2' / 'ckpt.pt').unlink()                     # as if interrupted in the second
    log = (run / 'round-1' / 'log.jsonl').read_text()
    rounds.train_rounds(round_config(**changed, resume=True))
    assert [path.stat().st_mtime_ns for path in sorted(run.glob('round-*.jsonl'))] == times
    for k, before in ((1, first), (2, second)):
        after = load_checkpoint(run / f'round-{k}' / 'ckpt.pt')['model']
        assert all(torch.equal(t, after[name]) for name, t in before['model'].items())
    assert (run / 'round-1' / 'log.jsonl').read_text() == log  # not trained again: speeds differ
    rounds.train_rounds(round_config(**changed, overwrite=True, rounds=1))    # draws anew
    assert (run / 'round-1.jsonl').stat().st_mtime_ns != times[0]
    assert not (run / 'round-2.jsonl').exists()


@pytest.mark.parametrize('changed, message', [
    (dict(rounds=0), 'rounds: 0 is less than 1'), (dict(completions=1), 'completions: 1 is less'),
    (dict(completions=3), 'completions: 3 make rankings'), (dict(labels='hard'), "labels: 'hard'"),
    (dict(judje='gold'), "did you mean 'judge'")])
def test_settings_of_rounds_that_cannot_be(round_config, changed, message):
    with pytest.raises(InputError, match=message):
        round_config(**changed)


def test_a_policy_that_never_ends_is_one_line(round_config, files):
    cfg = round_config(init_from=files / 'base', round_pairs=100)
    with pytest.raises(InputError, match='of 100 prompts got 2 distinct responses'):
        rounds.train_rounds(cfg)


# --------------------------------------------------------------------------------------------------
# Credit


def test_credit_of_each_token_is_that_of_two_plain_passes(files):
    policy, reference = (load(str(files / name)) for name in ('base', 'other'))
    prompt, response = list(b'one two'), [*b' three', 256]
    found = credit.token_credit(policy, reference, prompt, response, beta=0.3)
    logps = [m(torch.tensor([prompt + response]))[0].log_softmax(-1) for m in (policy, reference)]
    for t, (token, c) in enumerate(zip(response, found, strict=True)):
        difference = (logps[0] - logps[1])[len(prompt) + t - 1, token].item()
        assert c == pytest.approx(0.3 * difference, abs=1e-5)


@pytest.mark.parametrize('text', ['plain', 'caf\u00e9 \u20ac5 \U0001f600!'])
def test_spans_are_characters(text):
    tokens = get_tokenizer('byte').encode(text).tolist()
    spans = credit.spans_of(tokens, [1.0] * len(tokens), get_tokenizer('byte'))
    assert spans == [(character, len(character.encode())) for character in text]


@pytest.mark.parametrize('tokens', [[255, 254, 65], [65, 195], [195, 65, 66]])
def test_bytes_that_are_no_character_lose_no_credit(tokens):
    numbers = [1.0, 2.0, 4.0][:len(tokens)]
    spans = credit.spans_of(tokens, numbers, get_tokenizer('byte'))
    assert sum(c for _, c in spans) == sum(numbers)
    assert ''.join(text for text, _ in spans) == get_tokenizer('byte').decode(tokens)


def test_credit_on_the_terminal_and_as_a_page(config, files, tmp_path, capsys, monkeypatch):
    train.train(config(beta=0.5))
    run, page = str(tmp_path / 'run'), tmp_path / 'credit.html'
    argv = [run, '--prompt=<x>', '--response= a<b', f'--out={page}', '--device=cpu']
    credit.main(argv)
    shown, text = capsys.readouterr().out, page.read_text()
    score, = load_judge(run, 'cpu')(['<x>'], [[' a<b']])      # the reward is the sum of the credit
    assert abs(score[0]) > 0.01
    total = float(re.search(r'implicit reward (\S+)\]', shown)[1])
    numbers = [float(number) for number in re.findall(r"'([+-]\d+\.\d+)", shown)]
    assert total == pytest.approx(score[0], abs=1e-3)
    assert sum(numbers) == pytest.approx(score[0], abs=5e-3)
    assert len(numbers) == text.count('<span ') == 5           # 4 bytes and the end of text
    assert '<pre>&lt;x&gt;<span' in text and '>&lt;</span>' in text and '0.5 log' in text
    assert not re.search('http|<script|<link', text)
    monkeypatch.setenv('FORCE_COLOR', '1')
    credit.main(argv)
    assert capsys.readouterr().out.count('\x1b[30;48;2;') == 5
    credit.main([run, '--prompt=x', f'--compare={run}', f'--out={page}', '--max_new_tokens=4'])
    assert 'implicit reward +0.000' in capsys.readouterr().out     # the policy beside itself
    with pytest.raises(InputError, match='prompt: is empty'):
        credit.main([run])
    with pytest.raises(InputError, match='base: not a run of train.py'):
        credit.main([str(files / 'base'), '--prompt=x'])
