"""
Experiments in the built-in world (lab/films.py): many short runs, each placed beside the optimum.

    python -m lab.frontier frontier     # every objective, on the plane of gold reward and KL
    python -m lab.frontier frontier --only="dpo beta=1" --seeds=1        # one point of it
    python -m lab.frontier betas        # DPO from a weak to a strong KL constraint
    python -m lab.frontier pairs        # how much of the optimum's gain 1,000 to 30,000 pairs reach
    python -m lab.frontier rewards      # labels beside a judge's scores: hard, soft, differences
    python -m lab.frontier sft          # DPO beside SFT on the chosen responses, step by step

Each run is a line of results.jsonl in the experiment's folder. A run that has its line there is not
repeated, so an interrupted experiment continues. lab/plot.py draws the pictures.
Left out: a search of learning rates, several GPUs.
"""
import contextlib
import functools
import json
import math
import multiprocessing
import os
import signal
import time
from dataclasses import dataclass

import numpy as np
import torch

import train
from configurator import InputError, check_least, configure, run
from lab import films, labels, optimum, plot, ppo
from lab.credit import PositionWeightedGPT
from lab.reward import RewardModel, reward_distillation_loss, reward_loss
from prepare import prepare
from weights import load

# config/dpo_demo.py without its objective
DEMO = dict(tokenizer='byte', max_length=112, max_prompt_length=48, val_fraction=0.05,
            batch_size=32, learning_rate=1e-4, warmup_iters=10, compile=False)

# (loss, settings that differ from DEMO's)
BETAS = [('dpo', dict(beta=beta)) for beta in (0.3, 0.5, 1.0, 2.0, 4.0)]
SIMPO = [('simpo', dict(beta=beta, gamma=gamma, learning_rate=rate)) for beta, gamma, rate in (
    (2.0, 0.5, 1e-5), (2.0, 1.5, 1e-5), (5.0, 0.5, 1e-5), (10.0, 0.5, 1e-5), (2.0, 0.5, 3e-5),
    (2.0, 0.5, 1e-4))]
FRONTIER = [
    *BETAS, *SIMPO,
    ('sft', dict()),
    ('robust_dpo', dict(beta=1.0, label_smoothing=0.1)),
    ('ipo', dict(beta=0.3)),
    ('rdpo', dict(beta=1.0, alpha=0.02)),
    ('kto', dict(beta=1.0)),
    ('dpo', dict(beta=1.0, label_smoothing=0.1)),
    ('orpo', dict(beta=1.0, learning_rate=1e-5)),
    ('cpo', dict(beta=0.3, sft_weight=0.1, learning_rate=1e-5)),
    ('slic', dict(delta=2.0, sft_weight=0.1, learning_rate=1e-5)),
    ('rrhf', dict(sft_weight=0.1, learning_rate=1e-5))]
# more than an objective on labelled pairs: what is made of the pairs first (lab/labels.py), the
# objective, and what replaces settings
METHODS = dict(
    rejection_sampling=('accepted', 'sft', {}),
    position_weights=('', 'dpo', dict(model_class=PositionWeightedGPT)),
    soft_labels=('p', 'dpo', {}),
    reward_distillation=('margin', 'dpo', dict(loss=reward_distillation_loss)))
JUDGE_STEPS = 360    # two epochs of 6,000 pairs, also where they are fewer
MORE = [('rejection_sampling', dict(judge='gold')), ('position_weights', dict(beta=1.0)),
        ('ppo', dict(beta=1.0, judge='gold')), ('ppo', dict(beta=1.0, judge='model'))]
REWARDS = [('dpo', dict(beta=1.0)), *(
    (method, dict(beta=1.0, judge=judge)) for judge in ('gold', 'model')
    for method in ('soft_labels', 'reward_distillation'))]


@dataclass
class Common:
    out: str = ''        # the experiment's folder; empty: out/ and its name
    pairs: int = 0       # per run; 0: the experiment's own number
    max_iters: int = 0   # steps of a run; 0: one epoch


@dataclass
class Options(Common):
    only: str = ''       # a setting's name, such as "dpo beta=1", or a part of several names
    seeds: int = 2       # runs of each setting
    samples: int = 128   # responses of a policy to each of 32 prompts


# --------------------------------------------------------------------------------------------------
# Jobs: what is to be run


def title(loss, options):
    values = (f'{name.replace("learning_rate", "rate")}={x if isinstance(x, str) else f"{x:g}"}'
              for name, x in options.items())
    return ' '.join([loss, *values])


def select(only, names):
    """--only: the setting of that very name, else all whose name contains it."""
    found = [name for name in names if name == only] or [name for name in names if only in name]
    if not found:
        raise InputError(f'only: {only!r} is in none of {", ".join(names)}')
    return found


def make_jobs(settings, seeds, o, reference):
    """[(name, loss, options, number of pairs), ...] -> a job per seed and selected setting."""
    names = select(o.only, [name for name, *_ in settings])
    same = dict(max_iters=o.max_iters, samples=o.samples, reference=train.fingerprint_of(reference))
    return [dict(name=name, loss=loss, options=options, pairs=n, seed=seed, **same)
            for seed in range(seeds) for name, loss, options, n in settings if name in names]


def unfinished(jobs, out):
    """The jobs without a line in results.jsonl. Raises InputError where a job's line is from other
    settings or from another base model."""
    path = os.path.join(out, 'results.jsonl')
    lines = plot.read_jsonl(path) if os.path.exists(path) else []
    results = {(line['name'], line['seed']): line for line in lines}
    for job in jobs:
        line = results.get((job['name'], job['seed']), job)
        for key, value in job.items():
            if line.get(key) != value:
                raise InputError(f'{path}: {job["name"]!r} has {key} = {line.get(key)!r} there, '
                                 f'and {value!r} here; --out=... names another folder')
    return [job for job in jobs if (job['name'], job['seed']) not in results]


# --------------------------------------------------------------------------------------------------
# Runs


def config_of(settings):
    """Settings by name -> train.Config, checked as those of the command line are."""
    return train.load_config([f'--{name}={value}' for name, value in settings.items()])


def run_folder(out):
    """Where this process trains its policies, each in the place of the one before."""
    return os.path.join(out, f'run-{os.getpid()}')


def train_logged(work, cfg, out):
    """work(cfg); what it prints goes to this process's log."""
    with open(os.path.join(out, f'log-{os.getpid()}.txt'), 'a') as log, \
            contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        work(cfg)


def judge_folder(dataset, out):
    """Where the reward model of these pairs is."""
    return os.path.join(out, 'judge-' + os.path.splitext(os.path.basename(dataset))[0])


def train_judge(job, settings, out):
    """A reward model of the job's pairs, as config/reward_demo.py has it, unless it is there."""
    own = dict(dataset=job['dataset'], out_dir=judge_folder(job['dataset'], out), seed=job['seed'],
               learning_rate=3e-4, max_iters=job['max_iters'] or JUDGE_STEPS, eval_interval=10**9)
    cfg = config_of(settings | own | dict(overwrite=True))
    cfg.model_class, cfg.loss, cfg.options = RewardModel, reward_loss, {}
    if not os.path.exists(os.path.join(cfg.out_dir, 'eval.jsonl')):      # written at the end
        train_logged(train.train, cfg, out)


def run_job(job, settings, rewards, out, world=films.FILMS):
    """Train one policy and place it beside the optimum -> its line of results."""
    started, folder, options = time.perf_counter(), run_folder(out), dict(job['options'])
    own = {name: job[name] for name in ('seed', 'max_iters', 'dataset')}
    data, own['loss'], replaced = METHODS.get(job['loss'], ('', job['loss'], {}))
    judge = options.pop('judge', '')
    judge = judge_folder(job['dataset'], out) if judge == 'model' else judge
    if data == 'accepted':
        own['dataset'] = labels.accepted(job['dataset'], judge, settings['init_from'])
    elif data:
        own['dataset'] = labels.scored(job['dataset'], judge, data)
    if job['loss'] == 'ppo':
        cfg = ppo_config(options | dict(judge=judge, seed=job['seed'], out_dir=folder), job)
        train_logged(ppo.train_ppo, cfg, out)
    else:
        fixed = dict(out_dir=folder, overwrite=True, eval_interval=10**9)    # two evaluations
        cfg = config_of(settings | options | own | fixed)
        for name, value in replaced.items():
            setattr(cfg, name, value)
        cfg.options = {name: cfg.options[name] for name in train.loss_options(cfg)}
        train_logged(train.train, cfg, out)
    policy, reference = (load(name).to(cfg.device) for name in (folder, cfg.init_from))
    figures = optimum.place(policy, reference, rewards, world, job['samples'])
    return job | figures | dict(seconds=time.perf_counter() - started)


def ppo_config(options, job):
    """config/ppo_demo.py with these options."""
    options |= dict(max_iters=job['max_iters']) if job['max_iters'] else {}
    cfg = ppo.load_config([os.path.join(films.ROOT, 'config', 'ppo_demo.py'),
                           *(f'--{name}={value}' for name, value in options.items())])
    cfg.at_end = None
    return cfg


def keep_result(line, out):
    with open(os.path.join(out, 'results.jsonl'), 'a') as f:
        f.write(json.dumps(line) + '\n')
    print('{name:32} seed {seed}  reward {reward:+.3f} +- {reward_error:.3f}  '
          'KL {kl:6.3f} +- {kl_error:.3f}  share {share:6.1%} +- {share_error:.1%}  '
          '{seconds:4.0f} s'.format(**line), flush=True)


def keep_optima(rewards, out):
    """The curve of the optima, for lab/plot.py."""
    with open(os.path.join(out, 'optimum.jsonl'), 'w') as f:
        for beta in np.geomspace(0.3, 30, 40):
            reward, kl, size = map(float, optimum.tilted(rewards, beta))
            line = dict(beta=beta, reward=reward, kl=kl, effective_samples=size)
            f.write(json.dumps(line) + '\n')


def best_of_n(rewards, n):
    """The best of n samples of the reference, from (prompts, samples) of their rewards -> (its
    expected reward, its KL from the reference), means over the prompts.

    pi_n/pi_ref = (F^n - G^n) / (F - G), F the share of samples at or below y's reward, G below it:
    exact for the distribution of these samples, as ties are alike to it. Without ties the KL is
    the bound, log n - (n-1)/n, else below it (Beirami et al. 2024, arXiv:2401.01879).
    """
    ranks = [[np.searchsorted(np.sort(row), row, side) for row in rewards]
             for side in ('left', 'right')]
    below, up_to = np.array(ranks) / rewards.shape[1]                           # G and F
    ratio = (up_to**n - below**n) / (up_to - below)
    return (ratio * rewards).mean(), (ratio * np.log(np.maximum(ratio, 1e-300))).mean()


def keep_best_of_n(rewards, out):
    """The best of 2 to 64 samples, for lab/plot.py: no training, one line each."""
    rng, names = np.random.default_rng(0), ('reward', 'kl', 'share')
    at = [rng.integers(rewards.shape[1], size=rewards.shape) for _ in range(25)]     # a bootstrap
    with open(os.path.join(out, 'best_of_n.jsonl'), 'w') as f:
        for n in (2, 4, 8, 16, 32, 64):
            rows = []
            for drawn in [rewards, *(np.take_along_axis(rewards, i, 1) for i in at)]:
                point = best_of_n(drawn, n)
                rows.append((*point, optimum.share_of(drawn, *point)[0]))
            line = dict(zip(names, map(float, rows[0]))) | {
                f'{name}_error': float(e) for name, e in zip(names, np.std(rows[1:], 0, ddof=1))}
            f.write(json.dumps(line | dict(n=n, bound=math.log(n) - (n - 1) / n)) + '\n')


def start_worker():
    torch.set_num_threads(1)             # these models are too small for two
    signal.signal(signal.SIGINT, signal.SIG_IGN)    # Ctrl-C reaches all; the parent ends them


def experiment(name, settings, o):
    """Run [(name, loss, options, number of pairs), ...] with seeds 0 to o.seeds - 1, in as many
    processes as there are cores -> the folder of the results. Each seed has pairs of its own."""
    out, base = o.out or os.path.join('out', name), films.base_model()
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    reference = load(base).to(device)
    jobs = unfinished(make_jobs(settings, o.seeds, o, reference), out)
    if not jobs:
        return out
    os.makedirs(out, exist_ok=True)
    rewards = optimum.reference_rewards(reference, films.FILMS)
    keep_optima(rewards, out)
    keep_best_of_n(rewards, out)
    workers = 1 if device == 'cuda' else min(len(jobs), os.cpu_count())
    with multiprocessing.get_context('spawn').Pool(workers, start_worker) as pool:
        data = sorted({(job['pairs'], job['seed']) for job in jobs})
        paths = pool.starmap(films.pairs, [(base, n, seed + 1) for n, seed in data], chunksize=1)
        for job in jobs:
            job['dataset'] = paths[data.index((job['pairs'], job['seed']))]
        settings = DEMO | dict(init_from=base)
        for path in paths:               # here: a worker cannot start prepare's workers
            prepare(config_of(settings | dict(dataset=path)))
        judges = {job['dataset']: job for job in jobs if job['options'].get('judge') == 'model'}
        pool.starmap(train_judge, [(job, settings, out) for job in judges.values()], chunksize=1)
        run_one = functools.partial(run_job, settings=settings, rewards=rewards, out=out)
        for line in pool.imap_unordered(run_one, jobs):
            keep_result(line, out)
        pool.close()
        pool.join()
    return out


# --------------------------------------------------------------------------------------------------
# The experiments


def frontier(o):
    """Every objective on the plane of gold reward and KL."""
    out = experiment('frontier', [(title(*s), *s, o.pairs or 6000) for s in FRONTIER + MORE], o)
    plot.frontier(out, os.path.join(out, 'frontier.png'))


def betas(o):
    """DPO's reward, KL and share of the optimum's gain against beta: points of `frontier`."""
    out = experiment('frontier', [(title(*s), *s, o.pairs or 6000) for s in BETAS], o)
    plot.betas(out, os.path.join(out, 'betas.png'))


def pairs(o):
    """DPO at beta = 1 with more and more pairs: how much of the optimum's gain it reaches."""
    n = o.pairs or 30000
    sizes = [n // 30, n // 10, n // 3, n]
    out = experiment('pairs', [(f'{size} pairs', 'dpo', dict(beta=1.0), size) for size in sizes], o)
    plot.pairs(out, os.path.join(out, 'pairs.png'))


def rewards(o):
    """Hard labels, soft labels and differences of rewards, of the gold reward or of a reward model
    trained on the hard labels."""
    n = o.pairs or 6000
    experiment('rewards', [(f'{title(*s)}, {size} pairs', *s, size)
                           for size in (n // 6, n) for s in REWARDS], o)


def sft_loss(policy_chosen_logps, policy_rejected_logps,
             reference_chosen_logps, reference_rejected_logps):
    """SFT on chosen, with the implicit rewards of DPO at beta = 1 for the log."""
    chosen_rewards = policy_chosen_logps - reference_chosen_logps
    rejected_rewards = policy_rejected_logps - reference_rejected_logps
    return -policy_chosen_logps, chosen_rewards.detach(), rejected_rewards.detach()


def sft(o):
    """DPO and SFT on the same pairs, step by step: chosen, rejected, KL and length."""
    out, base = o.out or 'out/sft', films.base_model()
    folders = [os.path.join(out, name) for name in ('dpo', 'sft')]
    settings = DEMO | dict(
        loss='dpo', beta=1.0, init_from=base, dataset=films.pairs(base, o.pairs or 6000),
        overwrite=True, reference='live', eval_interval=20, eval_samples=64, max_iters=o.max_iters)
    for folder in folders:
        cfg = config_of(settings | dict(out_dir=folder))
        if folder == folders[1]:
            cfg.loss, cfg.options = sft_loss, {}
        cfg.at_end = films.report
        train.train(cfg)
    plot.curves(folders, os.path.join(out, 'curves.png'))


def read_options(cls, argv):
    o = configure(cls, argv)
    least = dict(seeds=1, pairs=0, max_iters=0, samples=2)
    check_least(o, **{name: low for name, low in least.items() if hasattr(o, name)})
    plot.pyplot()                        # an error now rather than after the last run
    return o


def main(argv):
    experiments = dict(frontier=frontier, betas=betas, pairs=pairs, rewards=rewards, sft=sft)
    if argv[0] not in experiments:
        names = '|'.join(experiments)
        raise InputError(f'usage: python -m lab.frontier {names} [--name=value ...]')
    experiments[argv[0]](read_options(Common if argv[0] == 'sft' else Options, argv[1:]))


if __name__ == '__main__':
    run(main, __doc__)
