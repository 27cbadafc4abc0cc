"""
Pictures of runs, from the files they wrote. Needs matplotlib.

    python plot.py out/dpo_demo out/simpo_demo    # curves of one or more runs -> curves.png
    python plot.py --out=assets/curves.png out/dpo_demo
    python plot.py --frontier=out/frontier        # what `python demo.py frontier` measured
"""
import json
import os
import sys

import numpy as np

from model import load_json
from prepare import InputError
from train import run

CURVES = ('loss', 'rewards/accuracies', 'rewards/margins', 'rewards/chosen', 'rewards/rejected',
          'logps/chosen', 'logps/rejected', 'kl', 'length', 'grad_norm')


def read_jsonl(path):
    try:
        with open(path, encoding='utf-8') as f:
            return [json.loads(line) for line in f]
    except OSError as e:
        raise InputError(f'{path}: cannot be read ({e.strerror})')
    except ValueError as e:
        raise InputError(f'{path}: not JSON lines ({e})')


def pyplot():
    try:
        import matplotlib
    except ModuleNotFoundError:
        raise InputError('matplotlib is not installed; requirements-dev.txt has it')
    matplotlib.use('Agg')    # to a file, also where there is no screen
    import matplotlib.pyplot
    return matplotlib.pyplot


def figure(columns, rows, width=3.4, height=2.6):
    return pyplot().subplots(rows, columns, figsize=(columns * width, rows * height), squeeze=False,
                             constrained_layout=True)


def curves(folders, path='curves.png'):
    """Training (thin) and validation (dots) of each run's log.jsonl, a panel a metric."""
    runs = {folder: read_jsonl(os.path.join(folder, 'log.jsonl'))[1:] for folder in folders}
    logged = {key.removeprefix('eval/') for lines in runs.values() for line in lines for key in line}
    shown = [c for c in CURVES if c in logged]
    if not shown:
        raise InputError(f'{", ".join(folders)}: nothing logged yet')
    fig, axes = figure(4, -(-len(shown) // 4))
    for ax in axes.flat[len(shown):]:
        ax.remove()
    for name, ax in zip(shown, axes.flat):
        for k, (folder, lines) in enumerate(runs.items()):
            for key, style in ((name, dict(lw=0.8)), ('eval/' + name, dict(marker='o', ms=3, lw=1.5))):
                points = [(line['step'], line[key]) for line in lines if key in line]
                if points:
                    ax.plot(*zip(*points), color=f'C{k}', label=folder if key == name else None, **style)
        ax.set(title=name, xlabel='step')
    axes.flat[0].legend(fontsize=7)
    fig.savefig(path, dpi=120)
    return path


def frontier(folder, path=None):
    """Runs of `demo.py frontier` on the plane of KL and gold reward, beside the highest reward there is."""
    path = path or os.path.join(folder, 'frontier.png')
    curve = load_json(os.path.join(folder, 'frontier.json'))
    lines = read_jsonl(os.path.join(folder, 'results.jsonl'))
    fig, ((ax,),) = figure(1, 1, 7.5, 5)
    for style, label, some in (
            ('k-', r'the optimum, $\pi_{ref}\,\exp(r/\beta)/Z$', lambda size: size >= 20),
            ('k:', 'the same, from fewer than 20 effective samples', lambda size: size < 25)):
        points = [(c['kl'], c['reward']) for c in curve if some(c['effective_samples'])]
        ax.plot(*zip(*points), style, lw=1.5, label=label) if points else None
    by = 'name' if len({line['name'] for line in lines}) <= 10 else 'loss'        # a mark each, or one a loss
    for k, label in enumerate(dict.fromkeys(line[by] for line in lines)):
        some = [line for line in lines if line[by] == label]
        kl, reward, kl_error, reward_error = (np.array([r[key] for r in some]) for key in (
            'kl', 'reward', 'kl_error', 'reward_error'))
        ax.errorbar(kl, reward, 2 * reward_error, 2 * kl_error, fmt='osD^v<>ph*XP'[k % 12], ms=5, lw=0.8,
                    label=label, alpha=0.85, color=f'C{k}' if k < 10 else '0.2')
    ax.set(xlabel=r'KL($\pi\,\|\,\pi_{ref}$) of whole responses, nats', ylabel='expected gold reward',
           xscale='log', xlim=(min(0.05, *(max(0.8 * r['kl'], 1e-3) for r in lines)),
                              1.3 * max(0.1, *(r['kl'] for r in lines))))
    ax.legend(fontsize=7, loc='upper left')
    ax.grid(alpha=0.25)
    fig.savefig(path, dpi=120)
    print(f'-> {path}')


def betas(folder, path=None):
    """Runs of `demo.py betas`: reward, KL and share of the optimum's gain against beta."""
    path = path or os.path.join(folder, 'betas.png')
    lines = [line for line in read_jsonl(os.path.join(folder, 'results.jsonl'))
             if line['loss'] == 'dpo' and not line['options'].get('label_smoothing')]
    fig, axes = figure(3, 1)
    for ax, key, label in zip(axes.flat, ('reward', 'kl', 'share'), (
            'expected gold reward', r'KL($\pi\,\|\,\pi_{ref}$), nats', "share of the optimum's gain")):
        x = [line['options']['beta'] for line in lines]
        ax.errorbar(x, [line[key] for line in lines], [2 * line[f'{key}_error'] for line in lines], fmt='o',
                    color='C3', ms=4, lw=0.8)
        if key == 'reward':
            ax.plot(x, [line['optimum'] for line in lines], 'k_', ms=9, label='the optimum at that KL')
            ax.legend(fontsize=7)
        ax.set(xscale='log', xlabel=r'$\beta$', title=label)
        ax.set_xticks(sorted(set(x)), [f'{beta:g}' for beta in sorted(set(x))])
        ax.minorticks_off()
        ax.grid(alpha=0.25)
    fig.savefig(path, dpi=120)
    print(f'-> {path}')


def pairs(folder, path=None):
    """Runs of `demo.py pairs`: the share of the optimum's gain against the number of pairs."""
    path = path or os.path.join(folder, 'pairs.png')
    lines = read_jsonl(os.path.join(folder, 'results.jsonl'))
    fig, ((ax,),) = figure(1, 1, 5, 3.4)
    ax.errorbar([r['pairs'] for r in lines], [100 * r['share'] for r in lines],
                [200 * r['share_error'] for r in lines], fmt='o', color='C3')
    ax.set(xscale='log', xlabel='pairs', ylabel="share of the optimum's gain\nat the policy's own KL, %",
           ylim=(None, 102))
    ax.axhline(100, color='k', lw=1)
    ax.grid(alpha=0.25)
    fig.savefig(path, dpi=120)
    print(f'-> {path}')


def main(argv):
    options = dict(arg.removeprefix('--').partition('=')[::2] for arg in argv if arg.startswith('--'))
    folders = [arg for arg in argv if not arg.startswith('--')]
    unknown = options.keys() - {'out', 'frontier', 'pairs'}
    if unknown or not (folders or options.keys() & {'frontier', 'pairs'}):
        raise InputError('usage: python plot.py [--out=FILE] RUN ... | --frontier=FOLDER | --pairs=FOLDER')
    if 'frontier' in options:
        frontier(options['frontier'], options.get('out'))
    if 'pairs' in options:
        pairs(options['pairs'], options.get('out'))
    if folders:
        print(f'-> {curves(folders, options.get("out", "curves.png"))}')


if __name__ == '__main__':
    run(main, __doc__, sys.argv[1:])
