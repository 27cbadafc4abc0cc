"""
demo.py: the language, the gold reward, the labels, and the frontier against what can be worked out exactly.

    pytest tests/test_demo.py
"""
import dataclasses
import functools
import json
import math
import sys
import zlib

import numpy as np
import pytest
import torch

import demo
import plot
from model import GPT, GPTConfig
from prepare import InputError


def test_the_gold_reward_counts_whole_words():
    assert demo.gold_reward(' great plot, dull cast but lovely score.') == 1
    assert demo.gold_reward(' greatest plot, flatter cast.') == 0
    assert demo.gold_reward('') == 0


def test_reviews_follow_the_grammar():
    rng = np.random.default_rng(0)
    tones = {word: tone for tone, words in enumerate((demo.PRAISE, demo.BLAME, demo.PLAIN)) for word in words}
    lengths = set()
    for _ in range(300):
        prompt, kindness = demo.draw_prompt(rng)
        review = demo.draw_review(rng, kindness)
        words = review.strip(' .').replace(',', '').split()
        joined = [w for w in words if w not in ('and', 'but')]
        lengths.add(len(joined) // 2)
        assert all(w in tones for w in joined[::2]) and len(set(joined[1::2])) == len(joined) // 2
        assert prompt.endswith('):') and review.startswith(' ') and review.endswith('.')
    assert lengths == {1, 2, 3, 4}


def test_kind_reviewers_are_kinder():
    rng = np.random.default_rng(0)
    kind, harsh = (np.mean([demo.gold_reward(demo.draw_review(rng, k)) for _ in range(400)]) for k in (1.0, -1.0))
    assert kind > 0.8 and harsh < -0.8


def test_the_tilted_reference_is_the_exact_optimum():
    """Samples in exactly the proportions of a known distribution: the estimate is then the sum itself."""
    rewards, counts, beta = np.array([-1.0, 0.0, 2.0]), np.array([5, 4, 1]), 0.7
    ref = counts / counts.sum()
    best = ref * np.exp(rewards / beta)
    best /= best.sum()
    reward, kl, size = demo.tilted(np.repeat(rewards, counts)[None], beta)
    assert reward == pytest.approx((best * rewards).sum())
    assert kl == pytest.approx((best * np.log(best / ref)).sum())
    assert 1 < size < 10
    assert demo.frontier_at(np.repeat(rewards, counts)[None], kl)[:2] == pytest.approx((reward, beta), rel=1e-4)


def test_no_policy_is_above_the_frontier():
    rng = np.random.default_rng(0)
    rewards = np.repeat(np.array([-1.0, 0.0, 2.0]), [5, 4, 1])[None]
    ref = np.array([0.5, 0.4, 0.1])
    for _ in range(200):
        policy = rng.dirichlet(np.ones(3))
        kl = (policy * np.log(policy / ref)).sum()
        assert (policy * [-1.0, 0.0, 2.0]).sum() <= demo.frontier_at(rewards, kl)[0] + 1e-6


@pytest.fixture(scope='module')
def model():
    """Knows nothing, and ends a review after a few bytes."""
    torch.manual_seed(0)
    return GPT(GPTConfig(block_size=128, vocab_size=257, n_layer=1, n_head=1, n_embd=16, eos_token_id=256))


def test_the_reference_lies_at_the_beginning_of_the_frontier(model):
    rewards = demo.reference_rewards(model, prompts=3, samples=6)
    f = demo.place(model, model, rewards, 'cpu', samples=5)
    assert rewards.shape == (3, 6) and f['kl'] == pytest.approx(0, abs=1e-6) and f['kl_error'] < 1e-6


def test_place_is_exact_where_every_response_can_be_counted():
    """Responses of one token: reward, KL and the optimum are sums over 257 of them."""
    torch.manual_seed(0)
    policy, reference = (GPT(GPTConfig(64, 257, 1, 1, 16, eos_token_id=256)) for _ in range(2))
    with torch.no_grad():
        for m in (policy, reference):
            m.wte.weight.mul_(20)
    world = demo.World('byte', lambda n, seed: ['ab', 'c'][:n], lambda prompts, responses: np.array(
        [ord((r or 'a')[0]) % 5 / 2 + (p == 'c') for p, r in zip(prompts, responses)]), 1)
    rewards = demo.reference_rewards(reference, prompts=2, samples=4000, world=world)
    f = demo.place(policy, reference, rewards, 'cpu', samples=4000, world=world)
    exact = []
    for prompt in ('ab', 'c'):
        pi, ref = (m(torch.tensor([list(prompt.encode())]))[0, -1].double().softmax(-1).detach().numpy()
                   for m in (policy, reference))
        texts = [demo.text_of([t], world)[0] for t in range(257)]
        r = world.reward([prompt] * 257, texts)
        exact.append((pi @ r, pi @ np.log(pi / ref), ref @ r, r, ref))
    reward, kl, before = (np.mean([e[i] for e in exact]) for i in range(3))
    assert kl > 0.05 and abs(reward - before) > 0.02                     # or the test would tell nothing
    for name, value in dict(reward=reward, kl=kl, before=before).items():
        assert abs(f[name] - value) < 4 * f[f'{name}_error'] < 0.2, name
    low, high = 1e-2, 1e3                                                # the optimum of that KL, by its sums
    for _ in range(60):
        beta = math.sqrt(low * high)
        best = [ref * np.exp(r / beta) / (ref @ np.exp(r / beta)) for *_, r, ref in exact]
        far = np.mean([b @ np.log(b / e[4]) for b, e in zip(best, exact)]) > f['kl']
        low, high = (beta, high) if far else (low, beta)
    optimum = np.mean([b @ e[3] for b, e in zip(best, exact)])
    assert abs(f['optimum'] - optimum) < 4 * f['optimum_error'] + 1e-3
    assert f['share'] == pytest.approx((f['reward'] - f['before']) / (f['optimum'] - f['before']))
    assert 0 < f['share_error'] < 0.2


def test_standard_error_by_hand():
    """Of the mean of two prompts' means, each the mean of three: sqrt((1/3 + 4/3) / 2^2)."""
    assert demo.standard_error(np.array([[1.0, 2.0, 3.0], [0.0, 2.0, 4.0]])) == pytest.approx(math.sqrt((1 + 4) / 3) / 2)


def test_no_frontier_beyond_what_samples_can_tell():
    rewards = np.random.default_rng(0).normal(size=(3, 16))
    assert all(map(math.isnan, demo.frontier_at(rewards, 3.0))) and demo.frontier_at(rewards, 1.0)[0] > rewards.mean()


def test_results_of_other_settings_are_not_taken_for_these(tmp_path):
    jobs = [dict(name='dpo beta=1', seed=0, pairs=20), dict(name='dpo beta=1', seed=1, pairs=20)]
    assert demo.left_to_do(jobs, str(tmp_path), reference='a') == jobs
    (tmp_path / 'results.jsonl').write_text(json.dumps(jobs[0] | dict(reference='a', reward=0.5)) + '\n')
    assert demo.left_to_do(jobs, str(tmp_path), reference='a') == jobs[1:]
    with pytest.raises(InputError, match="'dpo beta=1' has reference = 'a' there, and 'b' here; --out="):
        demo.left_to_do(jobs, str(tmp_path), reference='b')
    with pytest.raises(InputError, match='has pairs = 20 there, and 30 here'):
        demo.left_to_do([jobs[0] | dict(pairs=30)], str(tmp_path), reference='a')


def test_only_is_a_name_or_a_part_of_some():
    names = ['dpo beta=1', 'dpo beta=1 label_smoothing=0.1', 'rdpo beta=1 alpha=0.02', 'sft']
    assert demo.chosen('dpo beta=1', names) == names[:1] and demo.chosen('dpo', names) == names[:3]
    assert demo.chosen('', names) == names
    with pytest.raises(InputError, match="only: 'x' is in none of dpo"):
        demo.chosen('x', names)


@pytest.mark.parametrize('argv, message', [(['sft', '--seeds=3'], 'seeds: ignored by sft'),
                                           (['frontier', '--base=gpt2'], 'base: ignored by frontier'),
                                           (['imdb', 'x', '--seeds=2'], 'seeds: ignored by imdb')])
def test_options_that_an_experiment_ignores(argv, message):
    with pytest.raises(InputError, match=message):
        demo.main(argv)


def test_a_base_model_that_never_comes_to_an_end(monkeypatch):
    monkeypatch.setattr(demo, 'sample', lambda model, prompts, seed, world: [[65 + i % 9] * 80 for i in range(len(prompts))])
    with pytest.raises(InputError, match='too few come to an end and differ: the base model has not learnt enough'):
        list(demo.draw_pairs(None, 3))


def test_pairs_are_labelled_by_bradley_terry(monkeypatch):
    """P(a beats b) = sigma(r(a) - r(b)): with rewards 1 and 0, praise wins 73% of the time."""
    encode = demo.get_tokenizer('byte').encode_ordinary
    monkeypatch.setattr(demo, 'sample', lambda model, prompts, seed, world: [
        [*encode(' great plot.' if i % 2 else ' long plot.'), 256] if i < len(prompts) // 2 else
        [*encode(' long plot.' if i % 2 else ' great plot.'), 256] for i in range(len(prompts))])
    pairs = list(demo.draw_pairs(None, 4000))
    assert len(pairs) == 4000
    wins = np.mean([pair['chosen'] == ' great plot.' for pair in pairs])
    assert wins == pytest.approx(1 / (1 + math.exp(-1)), abs=0.03)
    certain = list(demo.draw_pairs(None, 400, world=dataclasses.replace(demo.FILMS, labels='best')))
    assert {pair['chosen'] for pair in certain} == {' great plot.'}
    indifferent = dataclasses.replace(demo.FILMS, labels='best', reward=lambda prompts, responses: np.ones(len(responses)))
    wins = np.mean([pair['chosen'] == ' great plot.' for pair in demo.draw_pairs(None, 4000, world=indifferent)])
    assert wins == pytest.approx(0.5, abs=0.03)


# ------------------------------------------------------------------------------------------------------------
# Real reviews


def test_passages_are_whole_sentences_cut_after_a_few_tokens():
    tokenizer = demo.get_tokenizer('byte')
    text = 'A fine film. Nobody moves! ' + 'x' * 300 + '. ' + ' '.join(['Never seen.'] * 20)
    first, *more = demo.passages(text)
    assert first == 'A fine film. Nobody moves!' and {s for p in more for s in p.split('. ')} == {'Never seen', 'Never seen.'}
    assert sum(p.count('seen') for p in more) == 20 and max(map(len, more)) <= 200 and len(more) == 2
    (prompt, rest), = demo.cut_texts([first, 'Hm', ''], tokenizer, seed=0)
    assert prompt + rest == first and 2 <= len(prompt.encode()) <= 8
    assert {len(p) for p, _ in demo.cut_texts([text] * 200, tokenizer, seed=1)} == set(range(2, 9))


def test_classifier_learns_which_words_praise():
    rng = np.random.default_rng(0)
    kinds = np.array([0, 1] * 200)
    texts = [' '.join(rng.choice(demo.PRAISE if kind else demo.BLAME, 2)) + ' plot' for kind in kinds]
    log_odds = demo.fit_classifier(texts, kinds)
    assert ((log_odds(texts) > 0) == kinds).mean() > 0.99
    assert log_odds(['superb', 'awful', 'plot'])[[0, 2]].min() > log_odds(['awful'])[0]
    words = ('great', 'film', '!', 'great great', 'great film', 'film !')
    assert demo.features('Great, great film!') == sorted({zlib.crc32(w.encode()) % 2**18 for w in words})


def test_imdb_from_reviews_to_a_picture(tmp_path, capsys, gpt2, monkeypatch):
    """The whole experiment on a few made-up reviews: nothing is learnt, everything runs, results and picture stay."""
    (tmp_path / 'imdb').mkdir()
    rng = np.random.default_rng(0)
    for kind in ('train_pos', 'train_neg', 'test_pos', 'test_neg', 'train_unsup'):
        words = demo.PRAISE if 'pos' in kind else demo.BLAME
        with open(tmp_path / 'imdb' / f'{kind}.jsonl', 'w') as f:
            for _ in range(30):
                text = ' '.join(f'The {a} was {w}.<br /><br />' for a, w in zip(rng.permutation(demo.ASPECTS), rng.choice(words, 4)))
                f.write(json.dumps(dict(label=kind.split('_')[1], text=text)) + '\n')
    monkeypatch.setattr(demo, 'sample', lambda model, prompts, seed, world, real=demo.sample: [
        [*t[:10], 4096] for t in real(model, prompts, seed, world)])
    monkeypatch.setattr(demo, 'reference_rewards', functools.partial(demo.reference_rewards, prompts=2, samples=4))
    demo.main(['imdb', str(tmp_path / 'imdb'), f'--out={tmp_path / "out"}', '--pairs=40', '--max_iters=1', '--samples=2',
               '--only=dpo beta=1'])
    said = capsys.readouterr().out
    assert 'gold reward: the log-odds of a classifier, right for 100.0% of 60 reviews' in said
    lines = plot.read_jsonl(str(tmp_path / 'out' / 'results.jsonl'))
    assert [line['name'] for line in lines] == ['dpo beta=1'] and np.isfinite(lines[0]['reward'])
    assert (tmp_path / 'out' / 'frontier.png').exists()
    with pytest.raises(InputError, match='no train_'):
        demo.main(['imdb', str(tmp_path)])
    with pytest.raises(InputError, match='missing: neither a folder of reviews nor owner/name of the hub'):
        demo.main(['imdb', 'missing'])


def test_without_matplotlib_experiments_say_so_before_they_run(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'matplotlib', None)
    with pytest.raises(InputError, match='matplotlib is not installed'):
        demo.main(['frontier', f'--out={tmp_path / "out"}'])
    assert not (tmp_path / 'out').exists()


def test_a_picture_of_a_folder_without_results(tmp_path):
    with pytest.raises(InputError, match='frontier.json: no such file'):
        plot.main([f'--frontier={tmp_path}'])
