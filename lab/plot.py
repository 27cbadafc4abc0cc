"""
Pictures of runs, from the files they write. Needs matplotlib.

    python -m lab.plot out/dpo_demo out/simpo_demo       # training curves -> curves.png
    python -m lab.plot out/dpo_demo --out=dpo.png
    python -m lab.plot --frontier=out/frontier           # results of lab/frontier.py or lab/imdb.py
    python -m lab.plot --pairs=out/pairs
    python -m lab.plot --rewards=out/ppo_reward_demo     # a run of lab.ppo: judge's and gold reward

Left out: smoothing, live updates.
"""
import json
import os
from dataclasses import dataclass

import numpy as np

from configurator import InputError, configure, first_line, run

CURVES = ('loss', 'rewards/accuracies', 'rewards/margins', 'rewards/chosen', 'rewards/rejected',
          'logps/chosen', 'logps/rejected', 'kl', 'length', 'grad_norm')
KL = r'KL($\pi\,\|\,\pi_{ref}$), nats'


@dataclass
class Options:
    out: str = ''         # the picture; empty: curves.png, or a file in the experiment's folder
    frontier: str = ''    # folders of experiments
    betas: str = ''
    pairs: str = ''
    rewards: str = ''     # the folder of a run of lab.ppo


def read_jsonl(path):
    try:
        with open(path, encoding='utf-8') as f:
            return [json.loads(line) for line in f]
    except (OSError, ValueError) as e:
        raise InputError(f'{path}: not JSON lines ({first_line(e)})')


def column(lines, key):
    return np.array([line[key] for line in lines])


def pyplot():
    try:
        import matplotlib
    except ModuleNotFoundError:
        raise InputError('matplotlib is not installed; requirements-dev.txt has it')
    matplotlib.use('Agg')    # to a file, also where there is no screen
    import matplotlib.pyplot
    return matplotlib.pyplot


def panels(n, columns=1, width=3.4, height=2.6):
    """-> (figure, n axes)"""
    rows = -(-n // columns)
    fig, axes = pyplot().subplots(rows, columns, figsize=(columns * width, rows * height),
                                  squeeze=False, constrained_layout=True)
    for ax in axes.flat[n:]:
        ax.remove()
    return fig, axes.flat[:n]


def error_bars(ax, x, lines, key, scale=1, **style):
    """Points with bars of two standard errors."""
    bars = 2 * scale * column(lines, f'{key}_error')
    ax.errorbar(x, scale * column(lines, key), bars, ms=5, lw=0.8, **style)
    ax.grid(alpha=0.25)


def save(fig, path):
    fig.savefig(path, dpi=120)
    print(f'-> {path}')


def curves(folders, path):
    """Training (thin) and validation (dots) of each run's log.jsonl, a panel a metric."""
    runs = {folder: read_jsonl(os.path.join(folder, 'log.jsonl'))[1:] for folder in folders}
    logged = {key.removeprefix('eval/')
              for lines in runs.values() for line in lines for key in line}
    metrics = [name for name in CURVES if name in logged]
    if not metrics:
        raise InputError(f'{", ".join(folders)}: nothing logged yet')
    fig, axes = panels(len(metrics), columns=4)
    for name, ax in zip(metrics, axes):
        for k, lines in enumerate(runs.values()):
            for key, style in ((name, dict(lw=0.8)), (f'eval/{name}', dict(marker='o', ms=3))):
                points = [line for line in lines if key in line]
                ax.plot(column(points, 'step'), column(points, key), color=f'C{k}', **style)
        ax.set(title=name, xlabel='step')
    axes[0].legend(axes[0].lines[::2], runs, fontsize=7)
    save(fig, path)


def frontier(folder, path):
    """Runs on the plane of KL and gold reward, beside the optimum. A mark stands for a setting, or
    for a loss where there are more than ten settings."""
    optima = read_jsonl(os.path.join(folder, 'optimum.jsonl'))
    lines = read_jsonl(os.path.join(folder, 'results.jsonl'))
    fig, (ax,) = panels(1, width=7.5, height=5)
    size = column(optima, 'effective_samples')
    for style, label, rows in (('k-', r'the optimum, $\pi_{ref}\,\exp(r/\beta)/Z$', size >= 20),
                               ('k:', 'the same, from fewer than 20 effective samples', size < 25)):
        ax.plot(column(optima, 'kl')[rows], column(optima, 'reward')[rows], style, label=label)
    by = 'name' if len({line['name'] for line in lines}) <= 10 else 'loss'
    for k, label in enumerate(dict.fromkeys(line[by] for line in lines)):
        group = [line for line in lines if line[by] == label]
        error_bars(ax, column(group, 'kl'), group, 'reward', xerr=2 * column(group, 'kl_error'),
                   fmt='osD^v<>ph*XP'[k % 12], label=label, color=f'C{k}' if k < 10 else '0.2')
    kl = column(lines, 'kl')
    if os.path.exists(path_of_best := os.path.join(folder, 'best_of_n.jsonl')):
        best = read_jsonl(path_of_best)
        for key, mark, label in (('kl', 'k1', 'best of n = 2 to 64'),
                                 ('bound', 'k|', r'the same at its bound, $\log n - (n-1)/n$')):
            ax.plot(column(best, key), column(best, 'reward'), mark, ms=9, label=label)
        kl = np.append(kl, column(best, 'bound'))
    ax.set(xlabel=KL, ylabel='expected gold reward', xscale='log',
           xlim=(min(0.05, max(0.8 * kl.min(), 1e-3)), 1.3 * max(0.1, kl.max())))
    ax.legend(fontsize=7, loc='upper left')
    save(fig, path)


def betas(folder, path):
    """DPO's reward, KL and share of the optimum's gain against beta."""
    lines = [line for line in read_jsonl(os.path.join(folder, 'results.jsonl'))
             if line['loss'] == 'dpo' and list(line['options']) == ['beta']]
    beta = [line['options']['beta'] for line in lines]
    titles = dict(reward='expected gold reward', kl=KL, share="share of the optimum's gain")
    fig, axes = panels(3, columns=3)
    for ax, key in zip(axes, titles):
        error_bars(ax, beta, lines, key, fmt='o', color='C3')
        ax.set(xscale='log', xlabel=r'$\beta$', title=titles[key])
        ax.set_xticks(sorted(set(beta)), [f'{b:g}' for b in sorted(set(beta))])
        ax.minorticks_off()
    axes[0].plot(beta, column(lines, 'optimum'), 'k_', ms=9, label='the optimum at that KL')
    axes[0].legend(fontsize=7)
    save(fig, path)


def pairs(folder, path):
    """The share of the optimum's gain against the number of pairs."""
    lines = read_jsonl(os.path.join(folder, 'results.jsonl'))
    fig, (ax,) = panels(1, width=5, height=3.4)
    error_bars(ax, column(lines, 'pairs'), lines, 'share', scale=100, fmt='o', color='C3')
    ax.set(xscale='log', xlabel='pairs', ylabel="share of the optimum's gain, %", ylim=(None, 102))
    ax.axhline(100, color='k', lw=1)
    save(fig, path)


def rewards(folder, path):
    """The judge's reward and the gold one of each rollout of a run of lab.ppo, against KL."""
    lines = [line for line in read_jsonl(os.path.join(folder, 'log.jsonl')) if 'kl' in line]
    fig, (ax,) = panels(1, width=5, height=3.6)
    for key, mark, label in (('reward', 'o', "the judge's"), ('reward/gold', '^', 'gold')):
        ax.plot(column(lines, 'kl'), column(lines, key), mark, ms=4, label=label)
    ax.set(xlabel=KL, ylabel='mean reward of a rollout')
    ax.grid(alpha=0.25)
    ax.legend()
    save(fig, path)


def main(argv):
    folders = [arg for arg in argv if not arg.startswith('--')]
    o = configure(Options, [arg for arg in argv if arg.startswith('--')])
    for draw in (frontier, betas, pairs, rewards):
        if folder := getattr(o, draw.__name__):
            draw(folder, o.out or os.path.join(folder, f'{draw.__name__}.png'))
    if folders:
        curves(folders, o.out or 'curves.png')


if __name__ == '__main__':
    run(main, __doc__)
