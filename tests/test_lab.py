"""
The lab's experiments: the language and its pairs, the optimum against exact sums, runs and their
results, real reviews, pictures.

    pytest tests/test_lab.py

Left out: what the experiments find, which lab/LOG.md has.
"""
import dataclasses
import json
import math
import os
import sys
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import dpo
import simpo
import train
from configurator import InputError
from lab import films, frontier, imdb, optimum, plot
from model import GPT, GPTConfig
from tokenizer import END, get_tokenizer
from weights import load, load_checkpoint, save


def with_bytes(text):
    """A text that came to its end, as a model writes it."""
    return [*text.encode(), 256]


@pytest.fixture
def base(tmp_path, monkeypatch):
    """The folder of a base model whose every token is 'a', 'b' or the end, equally likely."""
    model = GPT(GPTConfig(block_size=128, vocab_size=257, n_layer=1, n_head=1, n_embd=16))
    with torch.no_grad():
        model.ln_f.weight.zero_()
        model.ln_f.bias.copy_(torch.eye(16)[0])
        model.wte.weight[:, 0] = -30
        model.wte.weight[[*b'ab', 256], 0] = 0
    save(model, str(tmp_path / 'base'))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(films, 'base_model', lambda: str(tmp_path / 'base'))
    return str(tmp_path / 'base')


# --------------------------------------------------------------------------------------------------
# The language and its pairs


def test_the_gold_reward_counts_words_not_parts_of_words():
    assert films.gold_reward(' great plot, dull cast but lovely score.') == 1
    assert films.gold_reward(' greatest plot, flatter cast.') == 0
    assert films.gold_reward('') == 0


def test_reviews_follow_the_grammar():
    rng, lengths = np.random.default_rng(0), set()
    kinds = (films.PRAISE, films.BLAME, films.PLAIN)
    tones = {word: tone for tone, words in enumerate(kinds) for word in words}
    for _ in range(300):
        prompt, kindness = films.draw_prompt(rng)
        review = films.draw_review(rng, kindness)
        words = [w for w in review.strip(' .').replace(',', '').split() if w not in ('and', 'but')]
        lengths.add(len(words) // 2)
        assert all(w in tones for w in words[::2]) and len(set(words[1::2])) == len(words) // 2
        assert prompt.endswith('):') and review.startswith(' ') and review.endswith('.')
    assert lengths == {1, 2, 3, 4}


def test_kind_reviewers_are_kinder():
    rng = np.random.default_rng(0)

    def mean_reward(kindness):
        return np.mean([films.gold_reward(films.draw_review(rng, kindness)) for _ in range(400)])
    assert mean_reward(1.0) > 0.8 and mean_reward(-1.0) < -0.8


def test_labels_follow_bradley_terry(monkeypatch):
    """P(a beats b) = sigma(r(a) - r(b)): with rewards 1 and 0, praise wins 73% of the time."""
    monkeypatch.setattr(films.World, 'sample', lambda self, model, prompts, seed: [
        with_bytes(' great plot.' if (i % 2) == (i < len(prompts) // 2) else ' long plot.')
        for i in range(len(prompts))])

    def praise_wins(n, **changed):
        world = dataclasses.replace(films.FILMS, **changed)
        pairs = list(films.draw_pairs(None, n, world=world))
        assert len(pairs) == n and all(pair['chosen'] != pair['rejected'] for pair in pairs)
        return np.mean([pair['chosen'] == ' great plot.' for pair in pairs])
    assert praise_wins(4000) == pytest.approx(1 / (1 + math.exp(-1)), abs=0.03)
    assert praise_wins(400, labels='best') == 1
    same = dict(labels='best', reward=lambda prompts, responses: np.ones(len(responses)))
    assert praise_wins(4000, **same) == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize('response', [[65] * 80, with_bytes(' same.'), [256], [195, 256]])
def test_a_base_model_without_usable_pairs(monkeypatch, response):
    """Responses that never end, are all the same, are blank, or are no text."""
    monkeypatch.setattr(films.World, 'sample', lambda self, model, prompts, seed: [
        response[:] for _ in prompts])
    with pytest.raises(InputError, match='the base model has not learnt enough'):
        list(films.draw_pairs(None, 3))


def test_pairs_are_drawn_once(base):
    path = films.pairs(base, n=30)
    lines = plot.read_jsonl(path)
    assert len(lines) == 30 and all(set(r['chosen'] + r['rejected']) <= set('ab') for r in lines)
    assert films.pairs(base, n=30) == path and plot.read_jsonl(path) == lines
    assert films.pairs(base, n=30, seed=2) != path


def test_the_base_model_is_trained_once_and_resumed(tmp_path, monkeypatch):
    def config(max_iters):
        (tmp_path / 'sft.py').write_text(f"""
from lab import films
out_dir, data_dir = {str(tmp_path / 'out')!r}, {str(tmp_path)!r}
dataset = films.texts(60, data_dir)
init_from = dict(n_layer=1, n_head=1, n_embd=16, block_size=128)
tokenizer, loss, batch_size, log_interval, max_iters = 'byte', 'sft', 4, 1, {max_iters}
max_length, max_prompt_length = 112, 48
""")
        return str(tmp_path / 'sft.py')
    folder = films.base_model(config(2))
    assert folder == str(tmp_path / 'out') and load_checkpoint(f'{folder}/ckpt.pt')['step'] == 2
    films.base_model(config(3))
    steps = [line['step'] for line in plot.read_jsonl(f'{folder}/log.jsonl')[1:] if 'lr' in line]
    assert load_checkpoint(f'{folder}/ckpt.pt')['step'] == 3 and steps == [0, 1, 2]
    monkeypatch.setattr(train, 'train', None)
    assert films.base_model(config(3)) == folder


def test_the_report_of_the_reference_itself(base, capsys):
    cfg = SimpleNamespace(reference_from='', init_from=base, device='cpu')
    rewards = np.random.default_rng(0).normal(size=(2, 16))
    films.report(load(base), cfg, rewards=rewards)
    said = capsys.readouterr().out
    assert f'of the reference      {rewards.mean():+.3f}' in said and ' 0.000 +- 0.000 nats' in said
    assert said.count('    reference ') == said.count('    policy    ') == 3


# --------------------------------------------------------------------------------------------------
# The optimum

REWARDS, COUNTS = np.array([-1.0, 0.0, 2.0]), np.array([5, 4, 1])
REFERENCE, SAMPLES = COUNTS / COUNTS.sum(), np.repeat(REWARDS, COUNTS)[None]


def test_the_tilted_reference_is_the_exact_optimum():
    """Samples in exactly the proportions of a distribution: the estimate is then the sum itself."""
    best = REFERENCE * np.exp(REWARDS / 0.7)
    best /= best.sum()
    reward, kl, size = optimum.tilted(SAMPLES, beta=0.7)
    assert reward == pytest.approx((best * REWARDS).sum())
    assert kl == pytest.approx((best * np.log(best / REFERENCE)).sum())
    assert 1 < size < 10
    assert optimum.frontier_at(SAMPLES, kl)[:2] == pytest.approx((reward, 0.7), rel=1e-4)


def test_no_policy_is_above_the_frontier():
    rng = np.random.default_rng(0)
    for policy in rng.dirichlet(np.ones(3), size=200):
        kl = (policy * np.log(policy / REFERENCE)).sum()
        assert (policy * REWARDS).sum() <= optimum.frontier_at(SAMPLES, kl)[0] + 1e-6


def test_no_frontier_beyond_what_samples_can_tell():
    rewards = np.random.default_rng(0).normal(size=(3, 16))      # no KL above log 16 = 2.8
    assert all(map(math.isnan, optimum.frontier_at(rewards, 3.0)))
    assert optimum.frontier_at(rewards, 1.0)[0] > rewards.mean()


def test_standard_error_by_hand():
    """Of the mean of two prompts' means, each the mean of three: sqrt((1/3 + 4/3) / 2^2)."""
    error = optimum.standard_error(np.array([[1.0, 2.0, 3.0], [0.0, 2.0, 4.0]]))
    assert error == pytest.approx(math.sqrt((1 + 4) / 3) / 2)


def test_place_is_exact_where_every_response_can_be_counted():
    """Responses of one token: reward, KL and the optimum are sums over 257 of them."""
    torch.manual_seed(0)
    policy, reference = (GPT(GPTConfig(64, 257, 1, 1, 16)) for _ in range(2))
    with torch.no_grad():
        for m in (policy, reference):
            m.wte.weight.mul_(20)

    def reward(prompts, responses):
        return np.array([ord(r[:1] or 'a') % 5 / 2 + (prompt == 'c')
                         for prompt, r in zip(prompts, responses)])
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
    low, high = 1e-2, 1e3                                        # the optimum at that KL, exact
    for _ in range(60):
        beta = math.sqrt(low * high)
        best = [ref * np.exp(r / beta) / (ref @ np.exp(r / beta)) for *_, r, ref in exact]
        far = np.mean([b @ np.log(b / e[4]) for b, e in zip(best, exact)]) > f['kl']
        low, high = (beta, high) if far else (low, beta)
    best_reward = np.mean([b @ e[3] for b, e in zip(best, exact)])
    assert abs(f['optimum'] - best_reward) < 4 * f['optimum_error'] + 1e-3
    assert f['share'] == pytest.approx((f['reward'] - f['before']) / (f['optimum'] - f['before']))
    assert 0 < f['share_error'] < 0.2


# --------------------------------------------------------------------------------------------------
# Experiments


def test_the_runs_have_the_settings_of_the_demo(monkeypatch):
    monkeypatch.setattr(films, 'base_model', lambda: 'base')
    monkeypatch.setattr(films, 'pairs', lambda base: 'pairs.jsonl')
    demo = train.load_config([os.path.join(films.ROOT, 'config', 'dpo_demo.py')])
    run = frontier.config_of(frontier.DEMO | dict(loss='dpo', beta=1.0))
    assert run.options == demo.options
    own = ('out_dir', 'overwrite', 'init_from', 'dataset', 'at_end', 'eval_interval')
    assert {k: v for k, v in vars(run).items() if k not in own} == {
        k: v for k, v in vars(demo).items() if k not in own}


def test_every_setting_of_the_frontier_is_one_of_its_loss():
    names = [frontier.title(*s) for s in frontier.FRONTIER]
    assert len(set(names)) == len(names) == 21 and 'simpo beta=2 gamma=0.5 rate=1e-05' in names
    for loss, options in frontier.FRONTIER:
        cfg = frontier.config_of(frontier.DEMO | options | dict(loss=loss))
        assert {**vars(cfg), **cfg.options}.items() >= options.items()


def test_only_is_a_name_or_a_part_of_several():
    names = ['dpo beta=1', 'dpo beta=1 label_smoothing=0.1', 'rdpo beta=1 alpha=0.02', 'sft']
    assert frontier.select('dpo beta=1', names) == names[:1]
    assert frontier.select('dpo', names) == names[:3] and frontier.select('', names) == names
    with pytest.raises(InputError, match="only: 'x' is in none of dpo"):
        frontier.select('x', names)


def test_results_of_other_settings_are_refused(tmp_path):
    jobs = [dict(name='dpo beta=1', seed=seed, pairs=20, reference='a') for seed in (0, 1)]
    assert frontier.unfinished(jobs, str(tmp_path)) == jobs
    (tmp_path / 'results.jsonl').write_text(json.dumps(jobs[0] | dict(reward=0.5)) + '\n')
    assert frontier.unfinished(jobs, str(tmp_path)) == jobs[1:]
    for name, was, value in (('reference', 'a', 'b'), ('pairs', 20, 30)):
        with pytest.raises(InputError, match=f'{name} = {was!r} there, and {value!r} here; --out='):
            frontier.unfinished([jobs[0] | {name: value}], str(tmp_path))


@pytest.mark.parametrize('argv, message', [
    (['sft', '--seeds=3'], "'seeds' is not a setting here"),
    (['frontier', '--base=gpt2'], "'base' is not a setting here"),
    (['pairs', '--samples=1'], 'samples: 1 is less than 2'),
    (['all'], 'usage: python -m lab.frontier frontier')])
def test_bad_options_of_experiments(argv, message):
    with pytest.raises(InputError, match=message):
        frontier.main(argv)


def test_without_matplotlib_experiments_say_so_before_they_run(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'matplotlib', None)
    with pytest.raises(InputError, match='matplotlib is not installed'):
        frontier.main(['frontier', f'--out={tmp_path / "out"}'])
    assert not (tmp_path / 'out').exists()


def test_an_experiment_in_two_processes_and_again(base, monkeypatch, capsys):
    rewards = np.random.default_rng(0).normal(size=(2, 16))
    monkeypatch.setattr(optimum, 'reference_rewards', lambda reference, world: rewards)
    argv = ['--only=dpo beta=0', '--seeds=1', '--pairs=40', '--max_iters=1', '--samples=2']
    frontier.main(['frontier', *argv])
    lines = plot.read_jsonl('out/frontier/results.jsonl')
    assert {line['name'] for line in lines} == {'dpo beta=0.3', 'dpo beta=0.5'}
    assert all(line['before'] == pytest.approx(rewards.mean()) for line in lines)
    assert all(np.isfinite([line['reward'], line['kl']]).all() for line in lines)
    assert os.path.exists('out/frontier/frontier.png')
    assert 'dpo beta=0.5                     seed 0  reward' in capsys.readouterr().out
    monkeypatch.setattr(optimum, 'reference_rewards', None)
    frontier.main(['betas', *argv])                              # the same runs: nothing is left
    assert plot.read_jsonl('out/frontier/results.jsonl') == lines
    assert os.path.exists('out/frontier/betas.png')


def test_sft_beside_dpo_step_by_step(base, monkeypatch):
    reported = []
    monkeypatch.setattr(films, 'report', lambda model, cfg: reported.append(cfg.out_dir))
    frontier.main(['sft', '--pairs=100', '--max_iters=2'])
    assert reported == ['out/sft/dpo', 'out/sft/sft'] and os.path.exists('out/sft/curves.png')
    (dpo_run, dpo_first, *_), (sft_run, sft_first, *_) = (
        plot.read_jsonl(f'{folder}/log.jsonl') for folder in reported)
    assert dpo_run['data'] == sft_run['data']
    assert dpo_first['eval/loss'] == pytest.approx(math.log(2))
    assert sft_first['eval/loss'] == pytest.approx(-sft_first['eval/logps/chosen'])
    assert dpo_first['eval/kl'] == sft_first['eval/kl'] == pytest.approx(0, abs=1e-6)


def test_sft_loss_is_the_cores_with_the_rewards_of_dpo():
    logps = -3 * torch.rand(4, 5, dtype=torch.float64)
    losses, *rewards = frontier.sft_loss(*logps)
    assert torch.equal(losses, simpo.sft_loss(logps[0])[0])
    for ours, theirs in zip(rewards, dpo.dpo_loss(*logps, beta=1.0)[1:]):
        assert torch.equal(ours, theirs)


# --------------------------------------------------------------------------------------------------
# Real reviews


def test_passages_are_complete_sentences_cut_after_a_few_tokens():
    tokenizer = get_tokenizer('byte')
    text = 'A fine film. Nobody moves! ' + 'x' * 300 + '. ' + ' '.join(['Never seen.'] * 20)
    first, *rest = imdb.passages(text)
    assert first == 'A fine film. Nobody moves!'
    assert {s.strip('.') for p in rest for s in p.split('. ')} == {'Never seen'}
    assert sum(p.count('seen') for p in rest) == 20
    assert max(map(len, rest)) <= 200 and len(rest) == 2
    (prompt, end), = imdb.cut_texts([first, 'Hm', ''], tokenizer, seed=0)
    assert prompt + end == first and 2 <= len(prompt.encode()) <= 8
    lengths = {len(p) for p, _ in imdb.cut_texts([text] * 200, tokenizer, seed=1)}
    assert lengths == set(range(2, 9))


def test_a_tokenizer_of_the_reviews(tmp_path):
    texts = ['The plot was great.', 'The cast was awful, naïve.'] * 5
    tokenizer = get_tokenizer(imdb.train_tokenizer(texts, str(tmp_path / 'bpe'), size=300))
    assert 257 < tokenizer.n_vocab <= 300 and tokenizer.decode([tokenizer.eot]) == END
    for text in (texts[1], ' 東京 <br>', f'not {END} the end'):
        ids = tokenizer.encode(text).tolist()
        assert tokenizer.decode(ids) == text and tokenizer.eot not in ids
    assert len(tokenizer.encode('The plot was')) < 6
    assert imdb.train_tokenizer(None, str(tmp_path / 'bpe')) == tokenizer.name    # learnt once


def test_classifier_learns_which_words_praise():
    rng, labels = np.random.default_rng(0), np.array([0, 1] * 200)
    texts = [' '.join(rng.choice(films.PRAISE if y else films.BLAME, 2)) + ' plot' for y in labels]
    log_odds = imdb.fit_classifier(texts, labels)
    assert ((log_odds(texts) > 0) == labels).mean() > 0.99
    superb, plot_, awful, nothing = log_odds(['superb', 'plot', 'awful', ''])
    assert superb > plot_ > awful and superb > nothing > awful
    words = ('great', 'film', '!', 'great great', 'great film', 'film !')
    numbers = sorted({zlib.crc32(w.encode()) % imdb.BUCKETS for w in words})
    assert imdb.features('Great, great film!') == numbers


def test_reviews_that_cannot_be_read(tmp_path, write):
    for content, message in (([dict(label='pos')], "no 'text'"),
                             ([dict(text='x', label='7')], "'label' is not pos, neg, 1 or 0")):
        write('train_pos.jsonl', content)
        with pytest.raises(InputError, match=f'train_pos.jsonl line 1: {message}'):
            imdb.read_imdb(str(tmp_path), 'train')
    with pytest.raises(InputError, match='no test_'):
        imdb.read_imdb(str(tmp_path), 'test')
    with pytest.raises(InputError, match='missing: neither'):
        imdb.main(['missing'])
    write('train_pos.jsonl', [dict(text='One.<br /><br />Two.\n', label='pos')])
    write('train_neg.jsonl.gz', [dict(text=' Three.', label=0)])
    texts, labels = imdb.read_imdb(str(tmp_path), 'train')
    assert texts == ['Three.', 'One. Two.'] and labels.tolist() == [0, 1]


def test_imdb_from_reviews_to_a_picture(tmp_path, capsys, monkeypatch, write):
    """The experiment on made-up reviews. One step teaches nothing, so sentences of ours stand for
    the models' samples."""
    rng, measure = np.random.default_rng(0), optimum.reference_rewards

    def sentence(words):
        return f'The {rng.choice(films.ASPECTS)} was {rng.choice(words)}.'

    def sample(world, model, prompts, seed):
        tokenizer, words = get_tokenizer(world.tokenizer), films.PRAISE + films.BLAME
        return [[*tokenizer.encode(' ' + sentence(words)).tolist(), tokenizer.eot] for _ in prompts]
    for kind in ('train_pos', 'train_neg', 'test_pos', 'test_neg', 'train_unsup'):
        words = films.PRAISE if 'pos' in kind else films.BLAME
        texts = ['<br />'.join(sentence(words) for _ in range(4)) for _ in range(200)]
        write(f'{kind}.jsonl', [dict(label=kind.split('_')[1], text=text) for text in texts])
    monkeypatch.setattr(films.World, 'sample', sample)
    monkeypatch.setattr(optimum, 'reference_rewards', lambda reference, world: measure(
        reference, world, prompts=2, samples=4))
    out = tmp_path / 'out'
    argv = [str(tmp_path), f'--out={out}', '--pairs=40', '--max_iters=1', '--samples=2']
    imdb.main([*argv, '--only=dpo beta=1'])
    said = capsys.readouterr().out
    assert 'the log-odds of a classifier, right for 100.0% of 400 reviews' in said
    line, = plot.read_jsonl(out / 'results.jsonl')
    assert line['name'] == 'dpo beta=1' and np.isfinite([line['reward'], line['kl']]).all()
    assert (out / 'frontier.png').exists()
    pairs = [[films.gold_reward(r[key]) for key in ('chosen', 'rejected')]
             for r in plot.read_jsonl(line['dataset'])]
    assert len(pairs) == 40 and all(c >= r for c, r in pairs)    # the better one always wins
    imdb.main([*argv, '--only=sft'])                             # base model and pairs are there
    said = capsys.readouterr().out
    assert 'sampling' not in said and 'preparing' not in said
    names = [line['name'] for line in plot.read_jsonl(out / 'results.jsonl')]
    assert names == ['dpo beta=1', 'sft']


# --------------------------------------------------------------------------------------------------
# Pictures


@pytest.fixture
def figures(monkeypatch):
    """The pictures that are drawn, by the name of their file."""
    drawn = {}
    monkeypatch.setattr(plot, 'save', lambda fig, path: drawn.update({os.path.basename(path): fig}))
    return drawn


def points(line):
    return line.get_xydata().tolist()


def test_curves_show_what_was_logged(tmp_path, write, figures):
    runs = [str(tmp_path / name) for name in 'ab']
    for run in runs:
        os.mkdir(run)
    write('a/log.jsonl', [dict(config={}), {'step': 0, 'loss': 3.0, 'eval/loss': 4.0},
                          dict(step=5, loss=2.0)])
    write('b/log.jsonl', [dict(config={}), {'step': 0, 'loss': 1.0, 'eval/kl': 0.5}])
    plot.main([*runs, '--out=x.png'])
    loss, kl = figures['x.png'].axes
    assert (loss.get_title(), kl.get_title()) == ('loss', 'kl')
    assert [*map(points, loss.lines)] == [[[0, 3], [5, 2]], [[0, 4]], [[0, 1]], []]
    assert [*map(points, kl.lines)] == [[], [], [], [[0, 0.5]]]
    legend = loss.get_legend()
    assert [text.get_text() for text in legend.texts] == runs
    assert [line.get_color() for line in legend.get_lines()] == ['C0', 'C1']


def test_pictures_of_results(tmp_path, write, figures):
    write('optimum.jsonl', [dict(beta=b, reward=1 / b, kl=1 / b, effective_samples=30 * b)
                            for b in (0.3, 0.7, 1.0, 2.0)])
    errors = dict(reward_error=0.1, kl_error=0.2, share_error=0.05)
    write('results.jsonl', [
        dict(name=f'dpo beta={b}', loss='dpo', options=dict(beta=b), kl=1 / b, reward=b, share=0.5,
             optimum=2.0, pairs=100 * b, **errors) for b in (0.5, 1.0)])
    plot.main([f'--{name}={tmp_path}' for name in ('frontier', 'betas', 'pairs')])
    ax, = figures['frontier.png'].axes
    certain, uncertain = (line.get_xdata().tolist() for line in ax.lines[:2])
    assert certain == [1 / 0.7, 1, 0.5] and uncertain == [1 / 0.3, 1 / 0.7]      # they join
    assert [points(bars.lines[0]) for bars in ax.containers] == [[[2, 0.5]], [[1, 1]]]
    reward, kl, share = (ax.containers[0].lines[0] for ax in figures['betas.png'].axes)
    assert points(reward) == [[0.5, 0.5], [1, 1]] and points(kl) == [[0.5, 2], [1, 1]]
    marks, _, (vertical,) = figures['pairs.png'].axes[0].containers[0].lines
    assert points(marks) == [[50, 50], [100, 50]]
    assert np.allclose(vertical.get_segments()[0][:, 1], [40, 60])               # two errors


def test_pictures_that_cannot_be_drawn(tmp_path, write):
    write('log.jsonl', [dict(config={})])
    for argument, message in ((f'--frontier={tmp_path}', 'optimum.jsonl: not JSON lines'),
                              (str(tmp_path), 'nothing logged yet'),
                              ('--frontir=x', "'frontir' is not a setting here; did you mean 'fr")):
        with pytest.raises(InputError, match=message):
            plot.main([argument])
