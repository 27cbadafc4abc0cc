"""
Pairs with a judge's scores in place of labels, and samples that it accepts. A config file calls it:

    dataset = labels.scored(films.pairs(init_from), 'gold', 'p')        # soft labels, for DPO
    dataset = labels.scored(films.pairs(init_from), 'out/reward_demo', 'margin')
    dataset = labels.accepted(films.pairs(init_from), 'gold', init_from)     # for SFT

`margin` is for lab.reward.reward_distillation_loss. Left out: a cache. Each call scores anew.
"""
import json
import os
import re

import numpy as np

from configurator import atomic_write
from lab import films
from lab.judge import load_judge, reject
from lab.plot import read_jsonl
from weights import load


def write(path, judge, what, records):
    """Records into pairs-what-judge.jsonl, beside pairs.jsonl -> its path."""
    out = f'{os.path.splitext(path)[0]}-{what}-{re.sub(r"[^A-Za-z0-9]+", "-", judge)}.jsonl'
    with atomic_write(out) as f:
        f.writelines(json.dumps(record) + '\n' for record in records)
    return out


def scored(path, judge, number):
    """The pairs of a file with a judge's opinion: 'p' = sigma(r_w - r_l) or 'margin' = r_w - r_l,
    below 0.5 or 0 where the judge prefers rejected -> the path of the new file."""
    pairs = read_jsonl(path)
    responses = [[pair['chosen'], pair['rejected']] for pair in pairs]
    scores = load_judge(judge)([pair['prompt'] for pair in pairs], responses)
    margins = np.array([w - l for w, l in scores])
    values = 1 / (1 + np.exp(-margins)) if number == 'p' else margins
    return write(path, judge, number, (
        pair | {number: value} for pair, value in zip(pairs, values.tolist())))


def accepted(path, judge, base, n=8, seed=1, world=films.FILMS):
    """For each pair's prompt the first of n responses of the model `base` that rejection sampling
    at beta = 1 accepts (lab.judge.reject): samples of pi_ref exp(r)/Z, tilted too little where n
    is small -> the path of the new file."""
    prompts, rng = [pair['prompt'] for pair in read_jsonl(path)], np.random.default_rng(seed)
    tokens = world.sample(load(base), [p for p in prompts for _ in range(n)], seed)
    texts = [text if ended and text.strip() else '' for text, ended in map(world.text, tokens)]
    groups = [[t for t in texts[i:i + n] if t] for i in range(0, len(texts), n)]
    prompts, groups = zip(*((p, group) for p, group in zip(prompts, groups) if group))
    scores = load_judge(judge)(prompts, groups)
    return write(path, judge, f'accepted-of-{n}', (
        dict(prompt=p, chosen=reject(group, each, rng))
        for p, group, each in zip(prompts, groups, scores)))
