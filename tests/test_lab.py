"""
The lab's experiments: pairs, the optimum against exact sums, results, real reviews, pictures.

    pytest tests/test_lab.py

Left out: whole experiments, which tests/test_readme.py runs, and what they find (lab/LOG.md).
"""
import dataclasses
import math
import os
import re
import zlib

import numpy as np
import pytest
import torch

import dpo
import simpo
import train
from configurator import InputError
from lab import films, frontier, imdb, optimum, plot
from model import GPT, GPTConfig
from tokenizer import get_tokenizer
from weights import save

# --------------------------------------------------------------------------------------------------
# The language and its pairs


@pytest.mark.parametrize('review, reward', [
    (' great plot, dull cast but lovely score.', 1), (' greatest plot, flatter cast.', 0), ('', 0)])
def test_the_gold_reward_counts_words_not_parts_of_words(review, reward):
    assert films.gold_reward(review) == reward


@pytest.mark.parametrize('kindness', [1.0, -1.0])
def test_reviews_follow_the_grammar_and_the_reviewers_kindness(kindness):
    rng, tones = np.random.default_rng(0), films.PRAISE + films.BLAME + films.PLAIN
    clause = f'({"|".join(tones)}) ({"|".join(films.ASPECTS)})'
    reviews = [films.draw_review(rng, kindness) for _ in range(400)]
    assert all(re.fullmatch(rf' {clause}((,| and| but) {clause}){{0,3}}\.', r) for r in reviews)
    assert kindness * np.mean([films.gold_reward(review) for review in reviews]) > 0.8


@pytest.fixture
def sampled(monkeypatch):
    """sampled(f): f(i, n), token ids, is the i-th of n responses that any model gives."""
    def patch(f):
        monkeypatch.setattr(films.World, 'sample', lambda world, model, prompts, seed: [
            f(i, len(prompts)) for i in range(len(prompts))])
    return patch


@pytest.mark.parametrize('labels, rewards, share', [
    ('sample', (1, 0), 1 / (1 + math.exp(-1))), ('best', (1, 0), 1), ('best', (1, 1), 0.5)])
def test_labels_follow_bradley_terry_or_the_reward(sampled, labels, rewards, share):
    """P(a beats b) = sigma(r(a) - r(b)): with rewards 1 and 0, the better wins 73% of the time."""
    sampled(lambda i, n: [*(b' good' if i % 2 == (i < n // 2) else b' bad'), 256])
    world = dataclasses.replace(films.FILMS, labels=labels, reward=lambda prompts, texts: np.array(
        [rewards[text == ' bad'] for text in texts]))
    pairs = list(films.draw_pairs(None, 4000, world=world))
    assert all({pair['chosen'], pair['rejected']} == {' good', ' bad'} for pair in pairs)
    assert np.mean([pair['chosen'] == ' good' for pair in pairs]) == pytest.approx(share, abs=0.03)


@pytest.mark.parametrize('response', [[65] * 80, [*b' same.', 256], [256], [195, 256]])
def test_a_base_model_without_usable_pairs(sampled, response):
    """Responses that never end, are all the same, are blank, or are no text."""
    sampled(lambda i, n: response)
    with pytest.raises(InputError, match='the base model has not learnt enough'):
        list(films.draw_pairs(None, 3))


def test_pairs_are_drawn_once(sampled, tmp_path):
    save(GPT(GPTConfig(64, 257, 1, 1, 16)), str(tmp_path / 'base'))
    paths = []
    for seed, response in ((1, b'%d'), (1, b'other %d'), (2, b'%d')):
        sampled(lambda i, n: [*response % i, 256])
        paths.append(films.pairs(str(tmp_path / 'base'), 30, seed, str(tmp_path)))
    assert paths[0] == paths[1] != paths[2]
    texts = [pair['chosen'] for pair in plot.read_jsonl(paths[0])]
    assert len(texts) == 30 and all(text.isdigit() for text in texts)


def test_the_base_model_is_trained_once_and_resumed(write, tmp_path, monkeypatch):
    trained, out = [], str(tmp_path)
    monkeypatch.setattr(train, 'train', lambda cfg: trained.append(cfg.resume))
    config = write('sft.py', f'out_dir, loss, max_iters = {out!r}, "sft", 3')
    for step in (2, 3):                                    # where each call leaves the run
        assert films.base_model(config) == out
        torch.save(dict(model={}, model_config={}, config={}, step=step), f'{out}/ckpt.pt')
    assert films.base_model(config) == out and trained == [False, True]


# --------------------------------------------------------------------------------------------------
# The optimum

REWARDS, COUNTS = np.array([-1.0, 0.0, 2.0]), np.array([5, 4, 1])      # of three responses
REFERENCE, SAMPLES = COUNTS / COUNTS.sum(), np.repeat(REWARDS, COUNTS)[None]


def test_the_tilted_reference_is_the_exact_optimum():
    """Samples in exactly the proportions of a distribution: the estimate is then the sum itself."""
    best = REFERENCE * np.exp(REWARDS / 0.7)
    best /= best.sum()
    reward, kl, size = optimum.tilted(SAMPLES, beta=0.7)
    assert reward == pytest.approx((best * REWARDS).sum())
    assert kl == pytest.approx((best * np.log(best / REFERENCE)).sum())
    assert size == pytest.approx(1 / (best**2 / COUNTS).sum())
    assert optimum.frontier_at(SAMPLES, kl)[:2] == pytest.approx((reward, 0.7), rel=1e-4)


def test_no_policy_is_above_the_frontier():
    for policy in np.random.default_rng(0).dirichlet(np.ones(3), size=200):
        kl = (policy * np.log(policy / REFERENCE)).sum()
        assert (policy * REWARDS).sum() <= optimum.frontier_at(SAMPLES, kl)[0] + 1e-6
    assert all(map(math.isnan, optimum.frontier_at(SAMPLES, 2.4)))    # no KL is above log 10 = 2.3


def test_standard_error_by_hand():
    """The mean of two prompts' means, each the mean of three: sqrt((1/3 + 4/3) / 2^2)."""
    rewards = np.array([[1.0, 2.0, 3.0], [0.0, 2.0, 4.0]])
    assert optimum.standard_error(rewards) == pytest.approx(math.sqrt((1 + 4) / 3) / 2)


def test_place_is_exact_where_every_response_can_be_counted():
    """Responses of one token: reward, KL and the optimum are sums over 257 of them."""
    torch.manual_seed(0)
    policy, reference = (GPT(GPTConfig(64, 257, 1, 1, 16)) for _ in range(2))
    with torch.no_grad():
        for m in (policy, reference):
            m.wte.weight.mul_(20)

    def reward(prompts, responses):
        first = [ord(response[:1] or 'a') % 5 / 2 for response in responses]
        return first + (np.array(prompts) == 'c')
    world = films.World('byte', lambda n, seed: ['ab', 'c'][:n], reward, max_new_tokens=1)
    rewards = optimum.reference_rewards(reference, world, prompts=2, samples=4000)
    f = optimum.place(policy, reference, rewards, world, samples=4000)
    texts, exact = [world.text([t])[0] for t in range(257)], []
    for prompt in ('ab', 'c'):
        ids = torch.tensor([list(prompt.encode())])
        pi, ref = (m(ids)[0, -1].double().softmax(-1).detach().numpy() for m in (policy, reference))
        r = reward([prompt] * 257, texts)
        exact.append((pi @ r, pi @ np.log(pi / ref), ref @ r, r, ref))
    reward, kl, before = (np.mean([e[i] for e in exact]) for i in range(3))
    assert kl > 0.05 and abs(reward - before) > 0.02             # or the test would tell nothing
    for name, value in dict(reward=reward, kl=kl, before=before).items():
        assert abs(f[name] - value) < 4 * f[f'{name}_error'] < 0.2, name
    rewards_and_kls = []                                         # of the exact optimum at its beta
    for *_, r, ref in exact:
        best = ref * np.exp(r / f['optimum_beta']) / (ref @ np.exp(r / f['optimum_beta']))
        rewards_and_kls.append((best @ r, best @ np.log(best / ref)))
    best_reward, best_kl = np.mean(rewards_and_kls, axis=0)
    assert abs(f['optimum'] - best_reward) < 4 * f['optimum_error'] + 1e-3
    assert abs(f['kl'] - best_kl) < 4 * f['kl_error']
    share = (f['reward'] - f['before']) / (f['optimum'] - f['before'])
    assert f['share'] == pytest.approx(share) and 0 < f['share_error'] < 0.2


# --------------------------------------------------------------------------------------------------
# Experiments, real reviews, pictures


def test_the_runs_have_the_settings_of_the_demo(monkeypatch):
    monkeypatch.setattr(films, 'base_model', lambda: 'base')
    monkeypatch.setattr(films, 'pairs', lambda base: 'pairs.jsonl')
    demo = train.load_config([os.path.join(films.ROOT, 'config', 'dpo_demo.py')])
    run = frontier.config_of(frontier.DEMO | dict(loss='dpo', beta=1.0))
    differ = {name for name, value in vars(run).items() if value != vars(demo)[name]}
    assert differ <= {'out_dir', 'overwrite', 'init_from', 'dataset', 'at_end', 'eval_interval'}


def test_every_setting_of_the_frontier_is_one_of_its_loss():
    for loss, options in frontier.FRONTIER:
        frontier.config_of(frontier.DEMO | options | dict(loss=loss))    # refuses any other


def test_only_is_a_name_or_a_part_of_several():
    names = ['dpo beta=1', 'dpo beta=1 label_smoothing=0.1', 'rdpo beta=1 alpha=0.02', 'sft']
    assert frontier.select('dpo beta=1', names) == names[:1]
    assert frontier.select('dpo', names) == names[:3] and frontier.select('', names) == names


def test_finished_runs_are_not_repeated_and_those_of_other_settings_refused(tmp_path, write):
    jobs = [dict(name='dpo beta=1', seed=seed, pairs=20, reference='a') for seed in (0, 1)]
    write('results.jsonl', [jobs[0] | dict(reward=0.5)])
    assert frontier.unfinished(jobs, str(tmp_path)) == jobs[1:]
    for name, value in (('reference', 'b'), ('pairs', 30)):
        with pytest.raises(InputError, match=name):
            frontier.unfinished([jobs[0] | {name: value}], str(tmp_path))


def test_sft_loss_is_the_cores_with_the_rewards_of_dpo():
    logps = -3 * torch.rand(4, 5, dtype=torch.float64)
    losses, *rewards = frontier.sft_loss(*logps)
    assert torch.equal(losses, simpo.sft_loss(logps[0])[0])
    assert all(map(torch.equal, rewards, dpo.dpo_loss(*logps, beta=1.0)[1:]))


@pytest.mark.parametrize('command, argv, word', [
    (frontier, ['sft', '--seeds=3'], 'seeds'), (frontier, ['pairs', '--samples=1'], 'samples'),
    (frontier, ['all'], 'betas'), (imdb, ['none'], 'none'), (imdb, ['.'], 'train_'),
    (imdb, ['no_text'], 'train_pos.jsonl line 1'), (imdb, ['seven'], 'train_pos.jsonl line 1'),
    (plot, ['--frontier=.'], 'optimum.jsonl')])
def test_what_cannot_be_done_is_named(tmp_path, write, monkeypatch, command, argv, word):
    monkeypatch.chdir(tmp_path)
    for name, record in dict(no_text=dict(label='pos'), seven=dict(text='x', label='7')).items():
        os.mkdir(name)
        write(f'{name}/train_pos.jsonl', [record])
    with pytest.raises(InputError, match=word):
        command.main(argv)


def test_passages_are_complete_sentences_cut_after_a_few_tokens():
    never = 'Never seen. '
    passages = ['A fine film. Nobody moves!', (16 * never).strip(), (4 * never).strip()]
    assert imdb.passages(f'{passages[0]} {"x" * 300}. {20 * never}'.strip()) == passages
    cuts = list(imdb.cut_texts([*passages, 'Hm', ''] * 100, get_tokenizer('byte'), seed=1))
    assert {prompt + rest for prompt, rest in cuts} == set(passages) and len(cuts) == 300
    assert {len(prompt) for prompt, _ in cuts} == set(range(2, 9))


def test_reviews_of_a_folder(tmp_path, write):
    write('train_pos.jsonl', [dict(text='One.<br /><br />Two.\n', label='pos')])
    write('train_neg.jsonl.gz', [dict(text=' Three.', label=0)])
    assert [*zip(*imdb.read_imdb(str(tmp_path), 'train'))] == [('Three.', 0), ('One. Two.', 1)]


def test_classifier_learns_which_words_praise():
    rng, labels = np.random.default_rng(0), np.array([0, 1] * 200)
    texts = [' '.join(rng.choice(films.PRAISE if y else films.BLAME, 2)) + ' plot' for y in labels]
    superb, plain, awful = imdb.fit_classifier(texts, labels)(['superb', 'plot', 'awful'])
    assert superb > plain > awful
    words = ('great', 'film', '!', 'great great', 'great film', 'film !')
    numbers = sorted({zlib.crc32(w.encode()) % imdb.BUCKETS for w in words})
    assert imdb.features('Great, great film!') == numbers


@pytest.fixture
def axes(monkeypatch):
    """The panels that plot.main draws, by the name of the picture's file."""
    drawn = {}
    monkeypatch.setattr(
        plot, 'save', lambda fig, path: drawn.update({os.path.basename(path): fig.axes}))
    return drawn


def points(line):
    return line.get_xydata().tolist()


def test_curves_show_what_was_logged(tmp_path, write, axes):
    runs = [str(tmp_path / name) for name in 'ab']
    for run, first in zip(runs, ({'loss': 3.0, 'eval/loss': 4.0}, {'loss': 1.0, 'eval/kl': 0.5})):
        os.mkdir(run)
        write(f'{run}/log.jsonl', [dict(config={}), dict(step=0) | first, dict(step=5, loss=2.0)])
    plot.main([*runs, '--out=curves.png'])
    loss, kl = axes['curves.png']
    assert [*map(points, loss.lines)] == [[[0, 3], [5, 2]], [[0, 4]], [[0, 1], [5, 2]], []]
    assert [*map(points, kl.lines)] == [[], [], [], [[0, 0.5]]]
    assert [text.get_text() for text in loss.get_legend().texts] == runs


def test_pictures_of_results(tmp_path, write, axes):
    write('optimum.jsonl', [dict(beta=b, reward=1 / b, kl=1 / b, effective_samples=30 * b)
                            for b in (0.3, 0.7, 1.0, 2.0)])
    write('results.jsonl', [
        dict(name=f'dpo beta={b}', loss='dpo', options=dict(beta=b), kl=1 / b, reward=b, share=0.5,
             optimum=2.0, pairs=100 * b, reward_error=0.1, kl_error=0.2, share_error=0.05)
        for b in (0.5, 1.0)])
    plot.main([f'--{name}={tmp_path}' for name in ('frontier', 'betas', 'pairs')])
    (plane,), betas, (pairs,) = (axes[f'{name}.png'] for name in ('frontier', 'betas', 'pairs'))
    certain, uncertain = (line.get_xdata().tolist() for line in plane.lines[:2])
    assert certain == [1 / 0.7, 1, 0.5] and uncertain == [1 / 0.3, 1 / 0.7]      # they join
    assert [points(bars.lines[0]) for bars in plane.containers] == [[[2, 0.5]], [[1, 1]]]
    reward, kl, share = (points(ax.containers[0].lines[0]) for ax in betas)
    assert reward == [[0.5, 0.5], [1, 1]] and kl == [[0.5, 2], [1, 1]]
    _, _, (vertical,) = pairs.containers[0].lines
    assert np.allclose(vertical.get_segments()[0], [[50, 40], [50, 60]])         # two errors