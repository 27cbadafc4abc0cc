"""
The built-in world: a small language whose right answer is known.

    python train.py config/dpo_demo.py   # the language, a base model, pairs, DPO, and this file's table
    python demo.py frontier              # every objective, several seeds, on the plane of reward and KL
    python demo.py frontier --only="dpo beta=1" --seeds=1      # one point of it
    python demo.py pairs                 # how close DPO comes with 1,000 to 30,000 pairs
    python demo.py betas                 # DPO from a weak to a strong KL constraint
    python demo.py sft                   # DPO against SFT on the chosen responses, step by step
    python demo.py rounds                # as many pairs in one, two and three on-policy rounds
    python demo.py imdb FOLDER           # the same with real film reviews (or the hub: stanfordnlp/imdb)

The language: one-line film reviews, drawn from a grammar. A prompt names who reviews what, and that decides
how kind the review tends to be. The gold reward of a review: words of praise minus words of blame.

    ann on iron river (war): great plot, dull cast but lovely score.      reward 2 - 1 = 1

A byte-level GPT learns the language (SFT) and is the reference. Pairs are sampled from it, and labelled by
the Bradley-Terry model on the gold reward. As the reward is known, so is the optimum of DPO's objective,
pi*(y|x) = pi_ref(y|x) exp(r(x,y)/beta) / Z(x): samples of the reference, weighted by exp(r/beta), give the
highest expected reward that any policy can have at each KL from the reference: the frontier.

The real reviews' gold reward is a classifier's log-odds that a text is positive, fitted on the labelled ones,
and the better of two always wins, as in the paper. From such certain labels DPO does not learn exp(r/beta)
but, given the pairs, something infinitely far away; the frontier still bounds the reward at each KL.

An experiment keeps a line per run in its folder's results.jsonl, and goes on after it.
"""
import contextlib
import dataclasses
import glob
import json
import math
import multiprocessing
import os
import re
import sys
import time
import zlib
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Callable

import numpy as np
import torch

import plot
import reward
import train
from model import GPT, pack
from prepare import InputError, first_line, get_tokenizer, parse, read_source

PRAISE = ('great', 'superb', 'lovely', 'clever', 'moving', 'funny')
BLAME = ('dull', 'weak', 'clumsy', 'awful', 'flat', 'boring')
PLAIN = ('long', 'short', 'quiet', 'loud', 'odd', 'plain')
ASPECTS = ('plot', 'cast', 'score', 'ending', 'script', 'pace')
KINDNESS = dict(ann=0.9, bob=-0.9, cleo=0.3, dan=-0.3, eve=0.0, finn=0.6, gus=-0.6, hal=0.1)
GENRES = dict(war=-0.3, drama=0.2, comedy=0.3, horror=-0.4, western=0.0)
FIRST = ('iron', 'silent', 'golden', 'last', 'broken', 'red', 'hidden', 'winter')
SECOND = ('river', 'garden', 'letter', 'city', 'summer', 'road', 'mirror', 'song')


def gold_reward(review):
    """Words of praise minus words of blame: the reward r(x, y) of any text."""
    words = re.findall('[a-z]+', review)
    return float(sum(w in PRAISE for w in words) - sum(w in BLAME for w in words))


def draw_prompt(rng):
    """-> (prompt, how kind its reviews are, in log-odds of praise against blame)."""
    name, genre = rng.choice(list(KINDNESS)), rng.choice(list(GENRES))
    return f'{name} on {rng.choice(FIRST)} {rng.choice(SECOND)} ({genre}):', KINDNESS[name] + GENRES[genre]


def draw_review(rng, kindness):
    """One to four clauses of praise, blame or neither: 'but' where the two meet, 'and' before a last one."""
    weights = np.exp([kindness, -kindness, 0.0])
    tones = rng.choice(3, size=rng.integers(1, 5), p=weights / weights.sum())
    aspects = rng.permutation(ASPECTS)
    text = ''
    for i, tone in enumerate(tones):
        if i:
            text += ' but ' if {tone, tones[i - 1]} == {0, 1} else ' and ' if i == len(tones) - 1 else ', '
        text += f'{rng.choice((PRAISE, BLAME, PLAIN)[tone])} {aspects[i]}'
    return ' ' + text + '.'


def write_once(path, records):
    """Records to a .jsonl file, whole or not at all, unless it is there. -> the path"""
    if not os.path.exists(path):
        part = f'{path}.{os.getpid()}'
        try:
            os.makedirs(os.path.dirname(path) or '.', exist_ok=True)
            with open(part, 'w') as f:
                f.writelines(json.dumps(r) + '\n' for r in records())
            os.replace(part, path)
        except OSError as e:
            raise InputError(f'{path}: cannot be written ({first_line(e)})')
        finally:
            with contextlib.suppress(OSError):
                os.remove(part)
    return path


def draw_texts(n, seed=0):
    """The language itself, for SFT."""
    rng = np.random.default_rng(seed)
    for _ in range(n):
        prompt, kindness = draw_prompt(rng)
        yield dict(prompt=prompt, chosen=draw_review(rng, kindness))


def draw_prompts(n, seed):
    rng = np.random.default_rng(seed)
    return [draw_prompt(rng)[0] for _ in range(n)]


# ----------------------------------------------------------------------------------------------------------
# A world: what an experiment needs to know of a language


@dataclass(frozen=True)
class World:
    tokenizer: str
    draw_prompts: Callable   # (n, seed) -> n texts
    reward: Callable         # (prompts, responses), as many texts of each -> their gold rewards, an array
    max_new_tokens: int
    labels: str = 'sample'   # who wins: 'sample', by chance, as Bradley-Terry says; 'best', by reward


def gold_rewards(prompts, responses):
    return np.array([gold_reward(r) for r in responses])


FILMS = World('byte', draw_prompts, gold_rewards, 80)


def sample(model, prompts, seed, world=FILMS, rows=1024):
    """One response, as token ids, to each prompt."""
    encode, out = get_tokenizer(world.tokenizer).encode_ordinary, []
    for i in range(0, len(prompts), rows):
        out += model.generate([encode(p) for p in prompts[i:i + rows]], world.max_new_tokens, seed=seed + i)
    return out


def text_of(tokens, world=FILMS):
    """Token ids of a response -> (its text, whether it came to its end)."""
    tokenizer = get_tokenizer(world.tokenizer)
    ended = tokens[-1] == tokenizer.eot_token
    return tokenizer.decode(tokens[:-1] if ended else tokens), ended


def draw_pairs(model, n, seed=1, world=FILMS):
    """n pairs of the model's own responses, labelled by Bradley-Terry, P(a beats b) = sigma(r(a) - r(b)), or
    by the reward alone, as the world says."""
    rng, encode = np.random.default_rng(seed), get_tokenizer(world.tokenizer).encode_ordinary
    tried, most = 0, 20 * n + 20000
    while n > 0:
        if tried > most:
            raise InputError(f'of {tried:,} pairs of responses too few come to an end and differ: '
                             'the base model has not learnt enough')
        prompts = world.draw_prompts(min(n, 4096), seed=rng.integers(2**31))
        tried += len(prompts)
        drawn = sample(model, prompts * 2, seed=int(rng.integers(2**31)), world=world)
        texts, ended = zip(*[text_of(t, world) for t in drawn])
        rewards = world.reward(prompts * 2, texts)
        for i, prompt in enumerate(prompts):
            j = i + len(prompts)
            if texts[i] == texts[j] or not all(ended[k] and texts[k].strip() and encode(texts[k]) ==
                                               drawn[k][:-1] for k in (i, j)):
                continue    # no comparison, no end, or tokens that no text has: drawn again
            margin = rewards[i] - rewards[j]
            p = 1 / (1 + math.exp(-margin)) if world.labels == 'sample' else (np.sign(margin) + 1) / 2
            w, l = (i, j) if rng.random() < p else (j, i)
            yield dict(prompt=prompt, chosen=texts[w], rejected=texts[l])
            n -= 1
            if n == 0:
                return


def pairs_file(cfg, pairs=6000, texts=20000, seed=1):
    """The demo's data as a .jsonl file, made where there is none: texts for SFT, else init_from's pairs."""
    if cfg.tokenizer != 'byte':
        raise InputError(f"tokenizer: {cfg.tokenizer!r}, and the demo's is 'byte'; see config/dpo_demo.py")
    if cfg.loss == 'sft':
        return write_once(os.path.join(cfg.data_dir, f'demo-texts-{texts}.jsonl'), lambda: draw_texts(texts))
    return sampled_pairs(GPT.from_pretrained(cfg.init_from), cfg, pairs, seed, FILMS, 'demo')


def sampled_pairs(model, cfg, pairs, seed, world, name):
    """A .jsonl file of the model's own pairs, made where there is none."""
    name = '-'.join([name, 'pairs', *['best'] * (world.labels == 'best'), str(pairs), str(seed)])
    path = os.path.join(cfg.data_dir, f'{name}-{train.fingerprint(model)[:8]}.jsonl')
    if not os.path.exists(path):
        how = 'Bradley-Terry' if world.labels == 'sample' else 'their rewards'
        print(f'sampling {pairs:,} pairs of reviews from {cfg.init_from}, labelled by {how}')
    return write_once(path, lambda: draw_pairs(model, pairs, seed, world))


# ----------------------------------------------------------------------------------------------------------
# The frontier: the best expected reward at each KL


def tilted(rewards, beta):
    """Samples of the reference, (prompts, samples) of their rewards, weighted by exp(r/beta) for each prompt.

    -> (expected reward of pi*, its KL from the reference in nats, effective sample size per prompt), means
    over the prompts, the last a harmonic one, as errors go by 1/size. KL(pi*||pi_ref) = E*[r]/beta - log Z,
    with Z estimated by the mean of exp(r/beta); log of a mean of n is too low by about 1/(2 size), and so
    is the frontier by beta times that.
    """
    logits = rewards / beta
    top = logits.max(1, keepdims=True)
    log_z = np.log(np.exp(logits - top).mean(1)) + top[:, 0]
    weights = np.exp(logits - log_z[:, None]) / rewards.shape[1]                # sum to one for each prompt
    reward = (weights * rewards).sum(1)
    return reward.mean(), (reward / beta - log_z).mean(), 1 / (weights**2).sum(1).mean()


def frontier_at(rewards, kl):
    """The optimum whose KL is `kl`: (expected reward, beta, effective sample size), by bisection. Not a
    number where it is beyond what these samples can tell: none of n has a KL above log n."""
    low, high = math.log(0.01), math.log(1000.0)
    if tilted(rewards, math.exp(low))[1] < kl:
        return math.nan, math.nan, math.nan
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if tilted(rewards, math.exp(middle))[1] > kl else (low, middle)
    reward, _, size = tilted(rewards, math.exp(high))
    return reward, math.exp(high), size


def rewards_of(responses, prompts, world):
    """Gold rewards of as many responses to each prompt: (prompts, samples)."""
    repeated = [p for p in prompts for _ in range(len(responses) // len(prompts))]
    return world.reward(repeated, [text_of(t, world)[0] for t in responses]).reshape(len(prompts), -1)


def reference_rewards(reference, prompts=32, samples=512, seed=7, world=FILMS):
    """Gold rewards of the reference's own responses: (prompts, samples)."""
    some = world.draw_prompts(prompts, seed)
    return rewards_of(sample(reference, [p for p in some for _ in range(samples)], seed, world), some, world)


def standard_error(x):
    """Of the mean of (prompts, samples), the prompts being given."""
    return float(np.sqrt((x.var(1, ddof=1) / x.shape[1]).mean() / x.shape[0]))


def share_of(rewards, ours, kl):
    """The share of the optimum's gain over the reference, at the policy's own KL: (share, optimum)."""
    best = frontier_at(rewards, max(kl, 0.0))[0]
    return (ours - rewards.mean()) / (best - rewards.mean()) if best > rewards.mean() else math.nan, best


@torch.no_grad()
def place(policy, reference, rewards, device, samples=128, seed=7, world=FILMS):
    """Where a policy lies beside the frontier of `rewards` (reference_rewards) -> a dictionary of figures.

    KL(pi||pi_ref), of whole responses, is the mean of log pi/pi_ref over responses that the policy wrote.
    Errors are standard errors over samples, the prompts being given; those of the optimum and of the share
    by drawing the samples of both models anew (bootstrap).
    """
    prompts = world.draw_prompts(len(rewards), seed)
    repeated = [p for p in prompts for _ in range(samples)]
    responses = sample(policy, repeated, seed + 1, world)
    ours = rewards_of(responses, prompts, world)
    encode, ratio = get_tokenizer(world.tokenizer).encode_ordinary, []
    for i in range(0, len(responses), 256):
        batch = pack([(encode(p), [t]) for p, t in zip(repeated[i:i + 256], responses[i:i + 256])]).to(device)
        logps = [m.score_responses(batch) for m in (policy, reference)]
        ratio.append((logps[0] - logps[1])[:, 0].double().cpu().numpy())
    ratio = np.concatenate(ratio).reshape(len(prompts), -1)
    kl, rng, again = float(ratio.mean()), np.random.default_rng(seed), []
    for _ in range(25):
        i, j = (rng.integers(x.shape[1], size=x.shape) for x in (rewards, ours))
        theirs, mine, of_mine = (np.take_along_axis(*x, 1) for x in ((rewards, i), (ours, j), (ratio, j)))
        again.append(share_of(theirs, mine.mean(), of_mine.mean()))
    share, best = share_of(rewards, ours.mean(), kl)
    share_error, optimum_error = np.std(again, axis=0, ddof=1)
    _, beta, size = frontier_at(rewards, max(kl, 0.0))
    return {name: float(x) for name, x in dict(
        before=rewards.mean(), before_error=standard_error(rewards), reward=ours.mean(),
        reward_error=standard_error(ours), kl=kl, kl_error=standard_error(ratio), optimum=best,
        optimum_error=optimum_error, optimum_beta=beta, effective_samples=size, share=share,
        share_error=share_error).items()}


def report(policy, cfg, world=FILMS, rewards=None):
    """Print where the policy lies, and both models' reviews of three films, from the same random numbers."""
    reference = GPT.from_pretrained(cfg.reference_from or cfg.init_from).to(cfg.device)
    rewards = reference_rewards(reference) if rewards is None else rewards
    f = place(policy, reference, rewards, cfg.device, world=world)
    print(f"""
mean gold reward of the reference      {f['before']:+.3f} +- {f['before_error']:.3f}
                 of the policy         {f['reward']:+.3f} +- {f['reward_error']:.3f}
KL(policy||reference), sampled         {f['kl']:.3f} +- {f['kl_error']:.3f} nats
the optimum's reward at that KL        {f['optimum']:+.3f} +- {f['optimum_error']:.3f}   \
pi_ref exp(r/{f['optimum_beta']:.2f})/Z, {f['effective_samples']:.0f} effective samples a prompt
share of the optimum's gain reached    {100 * f['share']:.1f} +- {100 * f['share_error']:.1f}%
""")
    show_samples(policy, reference, world)


def show_samples(policy, reference, world):
    prompts = world.draw_prompts(3, seed=11)
    responses = [sample(m, prompts, 3, world) for m in (reference, policy)]
    for prompt, *both in zip(prompts, *responses):
        print(prompt)
        for name, tokens in zip(('reference', 'policy'), both):
            text, _ = text_of(tokens, world)
            print(f'    {name:10}{world.reward([prompt], [text])[0]:+.1f} {text}')


# ----------------------------------------------------------------------------------------------------------
# Experiments: many short runs, each placed beside the frontier, as many at a time as there are cores

FRONTIER = [('dpo', dict(beta=beta)) for beta in (0.3, 0.5, 1.0, 2.0, 4.0)]
FRONTIER += [('simpo', dict(beta=beta, gamma=gamma, learning_rate=rate)) for beta, gamma, rate in (
    (2.0, 0.5, 1e-5), (2.0, 1.5, 1e-5), (5.0, 0.5, 1e-5), (10.0, 0.5, 1e-5), (2.0, 0.5, 3e-5),
    (2.0, 0.5, 1e-4))]
FRONTIER += [('sft', {}), ('robust_dpo', dict(beta=1.0, label_smoothing=0.1)), ('ipo', dict(beta=0.3)),
             ('rdpo', dict(beta=1.0, alpha=0.02)), ('kto', dict(beta=1.0)),
             ('dpo', dict(beta=1.0, label_smoothing=0.1)), ('orpo', dict(beta=1.0, learning_rate=1e-5)),
             ('cpo', dict(beta=0.3, sft_weight=0.1, learning_rate=1e-5)),
             ('slic', dict(delta=2.0, sft_weight=0.1, learning_rate=1e-5)),
             ('rrhf', dict(sft_weight=0.1, learning_rate=1e-5))]


def title(loss, options):
    return ' '.join([loss, *(f'{k.replace("learning_rate", "rate")}={v:g}' for k, v in options.items())])


def left_to_do(jobs, out, **shared):
    """The jobs, with what they share, that have no line in the experiment's results. Raises InputError where
    there is a line of that name, but from other settings, or of another base model."""
    path, left = os.path.join(out, 'results.jsonl'), []
    lines = plot.read_jsonl(path) if os.path.exists(path) else []
    for job in jobs:
        there = [line for line in lines if (line['name'], line['seed']) == (job['name'], job['seed'])]
        for name, value in (job | shared).items():
            for line in there:
                if line.get(name) != value:
                    raise InputError(f'{path}: {job["name"]!r} has {name} = {line.get(name)!r} there, and '
                                     f'{value!r} here; --out=... keeps the two apart')
        left += [] if there else [job]
    return left


def chosen(only, names):
    """--only: the setting of that very name, else all whose name has it in it."""
    found = [name for name in names if name == only] or [name for name in names if only in name]
    if not found:
        raise InputError(f'only: {only!r} is in none of {", ".join(names)}')
    return found


def point(job, out, base, rewards, samples, world=FILMS):
    """Train one policy, as the job says, and place it -> its line of results, which is also kept in `out`."""
    started, folder = time.perf_counter(), os.path.join(out, f'run-{os.getpid()}')
    cfg = dataclasses.replace(base, out_dir=folder, **{k: job[k] for k in ('loss', 'seed', 'dataset')},
                              **dict(beta=None) | job['options'])
    cfg.given = {'loss', *job['options']} - {'max_iters'}
    train.check_config(cfg)
    with open(os.path.join(out, f'log-{os.getpid()}.txt'), 'a') as log, contextlib.redirect_stdout(log):
        (reward.train_rounds if cfg.rounds else train.train)(cfg)
    policy = os.path.join(folder, f'round-{cfg.rounds}') if cfg.rounds else folder
    policy, reference = (GPT.from_pretrained(m).to(cfg.device) for m in (policy, cfg.init_from))
    line = dict(job, samples=samples, reference=train.fingerprint(reference), labels=world.labels,
                **place(policy, reference, rewards, cfg.device, samples=samples, world=world),
                seconds=time.perf_counter() - started)
    with open(os.path.join(out, 'results.jsonl'), 'a') as f:
        f.write(json.dumps(line) + '\n')
    print('{name:32} seed {seed}  reward {reward:+.3f} +- {reward_error:.3f}  KL {kl:6.3f} +- {kl_error:.3f}'
          '  share {share:6.1%} +- {share_error:.1%}  {seconds:4.0f} s'.format(**line), flush=True)
    return line


@dataclass
class Options:
    out: str = ''        # the experiment's folder; empty: out/ and its name
    seeds: int = 2       # runs of each setting
    pairs: int = 0       # per run; 0: the experiment's own number
    only: str = ''       # a setting's name, like "dpo beta=1", or what several names have in them, like dpo
    max_iters: int = 0   # steps of a run; 0: one epoch
    samples: int = 128   # responses of a policy to each of 32 prompts
    base: str = ''       # imdb: a model to start from, like gpt2; empty: a small one from scratch


def make_pairs(cfg, n, seed):
    """The file of n pairs of a seed, for DPO, made where there is none (in a process of the pool, often)."""
    return pairs_file(cfg, n, seed=seed + 1)


def experiment(name, settings, o):
    """Run `settings`, [(name, loss, options, pairs), ...], each with o.seeds seeds, and keep a line of
    results of each in the experiment's folder -> the folder. What has its line there is not run again.

    As many processes as there are cores, of one thread each: these models are too small for two.
    """
    out = o.out or os.path.join('out', name)
    base = train.load_config(['config/dpo_demo.py', '--overwrite=True', '--eval_interval=1000000'])
    train.settle_machine(base)
    reference = train.load_policy(base)             # trained first, where it is not there
    os.makedirs(out, exist_ok=True)
    rewards = reference_rewards(reference)
    some = chosen(o.only, [name for name, *_ in settings])
    jobs = left_to_do([
        dict(name=name, loss=loss, options=dict(options, max_iters=o.max_iters), pairs=n, seed=seed)
        for seed in range(o.seeds) for name, loss, options, n in settings if name in some],
        out, samples=o.samples, reference=train.fingerprint(reference))
    keep_frontier(out, rewards)
    if not jobs:
        return out
    if len(jobs) == 1:
        job = jobs[0]
        job['dataset'] = 'demo' if 'rounds' in job['options'] else make_pairs(base, job['pairs'], job['seed'])
        point(job, out, base, rewards, o.samples)
        return out
    workers = 1 if base.device == 'cuda' else min(len(jobs), os.cpu_count())
    spawn = multiprocessing.get_context('spawn')
    with ProcessPoolExecutor(workers, spawn, torch.set_num_threads, (1,)) as pool:
        try:
            needed = sorted({(job['pairs'], job['seed']) for job in jobs if 'rounds' not in job['options']})
            made = [pool.submit(make_pairs, base, *one) for one in needed]
            files = {one: path.result() for one, path in zip(needed, made)}
            for job in jobs:
                job['dataset'] = files.get((job['pairs'], job['seed']), 'demo')
            for found in [pool.submit(point, job, out, base, rewards, o.samples) for job in jobs]:
                found.result()
        except BaseException:                       # or those that wait would all be run before this one ends
            pool.shutdown(wait=False, cancel_futures=True)
            for child in multiprocessing.active_children():
                child.terminate()
            raise
    return out


def keep_frontier(out, rewards):
    """The curve of the optima, for plot.py."""
    curve = [dict(zip(('reward', 'kl', 'effective_samples'), map(float, tilted(rewards, beta))), beta=beta)
             for beta in np.geomspace(0.3, 30, 40)]
    with open(os.path.join(out, 'frontier.json'), 'w') as f:
        json.dump(curve, f)


def frontier(o):
    """Every objective on the plane of gold reward and KL, beside the frontier."""
    n = o.pairs or 6000
    plot.frontier(experiment('frontier', [(title(*s), *s, n) for s in FRONTIER], o))


def betas(o):
    """DPO's sweep over beta: the reward, the KL and the share of the optimum's gain that each comes to."""
    n = o.pairs or 6000
    settings = [(loss, options) for loss, options in FRONTIER if loss == 'dpo' and set(options) == {'beta'}]
    plot.betas(experiment('frontier', [(title(*s), *s, n) for s in settings], o))    # points of that picture


def pairs(o):
    """DPO at beta = 1 with more and more pairs: how much of the optimum's gain it reaches."""
    n = o.pairs or 30000
    sizes = [n // 30, n // 10, n // 3, n]
    plot.pairs(experiment('pairs', [(f'{size} pairs', 'dpo', dict(beta=1.0), size) for size in sizes], o))


def rounds(o):
    """As many pairs in one on-policy round or more. The labels are drawn, as everywhere here, by chance."""
    n, options = o.pairs or 6000, dict(beta=1.0, judge='gold', labels='sample')
    plot.frontier(experiment('rounds', [
        (f'{k} rounds of {n // k} pairs', 'dpo', options | dict(rounds=k, round_pairs=n // k), n)
        for k in (1, 2, 3)], o))


def sft(o):
    """DPO and SFT on the same pairs, step by step: what each does to chosen, rejected, KL and length."""
    out = o.out or 'out/sft'
    base = train.load_config(['config/dpo_demo.py', '--overwrite=True', '--eval_interval=20',
                              '--eval_samples=64', f'--max_iters={o.max_iters}'])
    train.settle_machine(base)
    rewards = reference_rewards(train.load_policy(base))
    base.dataset = make_pairs(base, o.pairs or 6000, 0)
    folders = [os.path.join(out, loss) for loss in ('dpo', 'sft')]
    for folder, loss, beta in zip(folders, ('dpo', 'sft'), (1.0, None)):
        cfg = dataclasses.replace(base, out_dir=folder, loss=loss, beta=beta)
        cfg.given = {'loss'}
        train.train(cfg)
        report(GPT.from_pretrained(folder).to(cfg.device), cfg, rewards=rewards)
    print(f'-> {plot.curves(folders, os.path.join(out, "curves.png"))}')


# ----------------------------------------------------------------------------------------------------------
# Real film reviews: IMDb (Maas et al. 2011), as in the DPO paper's controlled sentiment experiment


def read_imdb(source, kind):
    """The reviews of kind 'train', 'test' or 'unsup' -> (texts, labels: 1 positive, 0 negative, -1 unknown).
    `source` is a folder of files like train_pos.jsonl.gz, or a data set of the hub."""
    pattern = 'train_unsup.jsonl*' if kind == 'unsup' else f'{kind}_[np]*.jsonl*'
    files = sorted(glob.glob(os.path.join(glob.escape(source), pattern)))
    if not files and os.path.isdir(source):
        raise InputError(f'{source}: no {pattern} in it')
    if not files and source.count('/') != 1:
        raise InputError(f'{source}: neither a folder of reviews nor owner/name of the hub')
    names = {'pos': 1, 'neg': 0, 1: 1, 0: 0}
    split = '' if files else kind.replace('unsup', 'unsupervised')
    texts, labels = [], []
    for file in files or [source]:
        for where, raw in read_source(file, split):
            record = parse(raw)
            if not isinstance(record, dict) or not isinstance(record.get('text'), str):
                raise InputError(f"{where}: no 'text'")
            texts.append(re.sub(r'(<br\s*/?>|\s)+', ' ', record['text']).strip())
            labels.append(names.get(record.get('label'), -1))
            if labels[-1] < 0 and kind != 'unsup':
                raise InputError(f"{where}: 'label' is {record.get('label')!r}, not pos, neg, 1 or 0")
    return texts, np.array(labels)


def passages(text, longest=200):
    """A review's sentences, as many together as fit into `longest` characters; none that do not fit."""
    found = ['']
    for sentence in re.split(r'(?<=[.!?])\s+', text):
        if len(found[-1]) + len(sentence) >= longest:
            found.append('')
        if len(sentence) < longest:
            found[-1] += ' ' * bool(found[-1]) + sentence
    return found


def cut_texts(texts, tokenizer, seed):
    """-> (prompt, rest) of each text, cut after 2 to 8 tokens as in the paper"""
    rng = np.random.default_rng(seed)
    for text in texts:
        ids, cut = tokenizer.encode_ordinary(text), int(rng.integers(2, 9))
        prompt, rest = tokenizer.decode(ids[:cut]), tokenizer.decode(ids[cut:])
        if len(ids) > cut + 2 and prompt + rest == text and rest.strip():       # not within a character
            yield prompt, rest


def features(text, buckets=2**18):
    """Which words and pairs of neighbours a text has, as numbers below `buckets`."""
    words = re.findall(r"[a-z']+|[!?]", text.lower())
    words += [' '.join(two) for two in zip(words, words[1:])]
    return sorted({zlib.crc32(w.encode()) % buckets for w in words})


def bags(texts):
    found = [features(t) for t in texts]
    starts = np.cumsum([0] + list(map(len, found)))[:-1]
    return torch.tensor([f for some in found for f in some]), torch.from_numpy(starts)


def fit_classifier(texts, labels, epochs=4, buckets=2**18):
    """Logistic regression on `features` -> a function from texts to log-odds that they are positive."""
    torch.manual_seed(0)
    weights, bias = torch.nn.EmbeddingBag(buckets, 1, mode='sum'), torch.nn.Parameter(torch.zeros(1))
    torch.nn.init.zeros_(weights.weight)
    optimizer = torch.optim.AdamW([*weights.parameters(), bias], lr=3e-3, weight_decay=1e-2)
    order = np.array_split(np.random.default_rng(0).permutation(len(texts)), max(1, len(texts) // 128))
    batches = [(*bags([texts[i] for i in some]), torch.from_numpy(labels[some]).float()) for some in order]
    for _ in range(epochs):
        for indices, starts, y in batches:
            logits = weights(indices, starts)[:, 0] + bias
            torch.nn.functional.binary_cross_entropy_with_logits(logits, y).backward()
            optimizer.step()
            optimizer.zero_grad()

    @torch.no_grad()
    def log_odds(texts):
        return (weights(*bags(texts))[:, 0] + bias).double().numpy()
    return log_odds


def imdb(source, o):
    """The DPO paper's controlled sentiment experiment: real prompts, a base model that has learnt reviews, a
    classifier for gold reward; DPO at several beta, and SFT on the chosen, by reward and KL, with samples."""
    out, n_pairs = o.out or 'out/imdb', o.pairs or 20000
    tokenizer = 'gpt2' if o.base else 'gpt2:4096'
    texts, labels = read_imdb(source, 'train')
    os.makedirs(out, exist_ok=True)
    log_odds = fit_classifier(texts, labels)
    test_texts, test_labels = read_imdb(source, 'test')
    right = np.mean((log_odds(test_texts) > 0) == test_labels)
    print(f'gold reward: the log-odds of a classifier, right for {right:.1%} of {len(test_texts):,} reviews')
    seen = texts + read_imdb(source, 'unsup')[0]

    def draw_from(texts, seed):
        openings = [passages(text)[0] for text in texts]
        some = [prompt for prompt, _ in cut_texts(openings, get_tokenizer(tokenizer), seed)]
        return lambda n, seed: [some[i] for i in np.random.default_rng(seed).integers(len(some), size=n)]

    def gold(prompts, responses):
        return log_odds([p + r for p, r in zip(prompts, responses)])
    world = World(tokenizer, draw_from(test_texts, 2), gold, 80, labels='best')     # as in the paper

    # the base model learns all passages; pairs are sampled from it, for prompts that are not the tests'
    folder = os.path.join(out, 'base')
    shared = [f'--tokenizer={tokenizer}', '--max_length=96', '--max_prompt_length=32', '--beta2=0.99',
              '--eval_interval=1000', '--eval_pairs=500', f'--data_dir={os.path.join(out, "data")}',
              f'--max_iters={o.max_iters}']
    size = [f'--init_from={o.base}', '--learning_rate=5e-5'] if o.base else [
        '--init_from=scratch', '--n_layer=4', '--n_head=4', '--n_embd=128', '--block_size=96',
        '--learning_rate=4e-3', '--grad_clip=0.0', *['--epochs=0.5'] * (not o.max_iters)]
    base = train.load_config([*shared, *size, '--loss=sft', '--batch_size=64', '--warmup_iters=100',
                              '--val_fraction=0.01', f'--out_dir={folder}'])
    base.dataset = write_once(os.path.join(out, f'passages-{tokenizer}.jsonl'), lambda: (
        dict(prompt=p, chosen=r) for p, r in cut_texts(
            (passage for text in seen for passage in passages(text)), get_tokenizer(tokenizer), seed=1)))
    base.resume = os.path.exists(os.path.join(folder, 'ckpt.pt'))
    train.train(base)
    cfg = train.load_config([*shared, f'--init_from={folder}', '--learning_rate=2e-4', '--batch_size=32',
                             '--warmup_iters=10', '--val_fraction=0.05', '--overwrite=True'])
    train.settle_machine(cfg)
    reference = GPT.from_pretrained(folder).to(cfg.device)
    others = dataclasses.replace(world, draw_prompts=draw_from(texts, 1))
    dataset = sampled_pairs(reference, cfg, n_pairs, 1, others, 'imdb')
    rewards = reference_rewards(reference, world=world)
    settings = {title(*s): s for s in [('dpo', dict(beta=b)) for b in (0.5, 1.0, 2.0)] + [('sft', {})]}
    jobs = [(name, *settings[name]) for name in chosen(o.only, settings)]
    jobs = left_to_do(
        [dict(name=name, loss=loss, options=dict(options, max_iters=o.max_iters), seed=0, pairs=n_pairs)
         for name, loss, options in jobs],
        out, samples=o.samples, reference=train.fingerprint(reference), labels=world.labels)
    keep_frontier(out, rewards)
    for job in jobs:
        point(job | dict(dataset=dataset), out, cfg, rewards, o.samples, world)
        policy = GPT.from_pretrained(os.path.join(out, f'run-{os.getpid()}')).to(cfg.device)
        show_samples(policy, reference, world)
    plot.frontier(out)


def main(argv):
    commands = dict(frontier=frontier, pairs=pairs, betas=betas, sft=sft, rounds=rounds, imdb=imdb)
    sources, argv = [a for a in argv[1:] if a[:2] != '--'], argv[:1] + [a for a in argv[1:] if a[:2] == '--']
    if argv[0] not in commands or len(sources) != (argv[0] == 'imdb'):
        raise InputError(f'usage: python demo.py {"|".join(commands)} [--name=value ...]; imdb takes a '
                         'folder, or stanfordnlp/imdb')
    o = train.load_config(argv[1:], Options())
    takes = dict(sft={'out', 'pairs', 'max_iters'}, imdb={f.name for f in dataclasses.fields(o)} - {'seeds'})
    all_but_imdb = {'out', 'seeds', 'pairs', 'only', 'max_iters', 'samples'}
    for name in sorted(o.given - takes.get(argv[0], all_but_imdb)):
        raise InputError(f'{name}: ignored by {argv[0]}')
    for name, least in dict(seeds=1, pairs=0, max_iters=0, samples=2).items():
        if getattr(o, name) < least:
            raise InputError(f'{name}: {getattr(o, name)} is less than {least}')
    plot.pyplot()                                # better missed now than after the last run
    commands[argv[0]](*sources, o)


if __name__ == '__main__':
    import demo    # by its name, as the others import it
    train.run(demo.main, __doc__, sys.argv[1:])
