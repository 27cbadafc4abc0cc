"""
On-policy rounds: sample from the policy, let a judge label, train on that; and again.

    python -m lab.rounds config/rounds_demo.py
    python -m lab.rounds config/rounds_demo.py --judge=out/reward_demo   # any judge of lab/judge.py
    python -m lab.rounds config/rounds_demo.py --resume                  # continue where it stopped
    python -m lab.rounds config/dpo_gpt2.py --judge=mine.py:kindness --dataset=pairs.jsonl

As many pairs in one, two and three rounds:

    for k in 1 2 3; do
        python -m lab.rounds config/rounds_demo.py --rounds=$k --round_pairs=$((6000 / k)) \\
            --out_dir=out/rounds_$k
    done

A config has the settings of RoundsConfig beside train.py's; of its dataset only the prompts matter.
The reference stays the base model. So with labels 'sample' or 'soft' the optimum stays
pi_ref exp(r/beta)/Z in all rounds; with 'best' only beta limits how far the policy moves. Under
loss = 'sft' and labels = 'best', rounds train on the best of n.
Round k is the run out_dir/round-k, trained on out_dir/round-k.jsonl.
Left out: several processes, completions of several policies in one pair, PPO.
"""
import glob
import json
import os
from dataclasses import dataclass, fields

import numpy as np

import sample
import train
from configurator import InputError, atomic_write, check_least, run
from lab.judge import LABELS, as_record, encode, load_judge, rank, read_texts
from prepare import records_of
from tokenizer import get_tokenizer
from weights import load


@dataclass
class RoundsConfig(train.Config):
    rounds: int = 3
    judge: str = 'gold'        # see lab/judge.py
    labels: str = 'sample'     # best, sample or soft: see `rank` in lab/judge.py
    completions: int = 2       # responses to a prompt
    round_pairs: int = 2000    # prompts of a round, each with its completions


def load_config(argv):
    cfg = train.load_config(argv, RoundsConfig)
    check_least(cfg, rounds=1, completions=2, round_pairs=1)
    if cfg.labels not in LABELS:
        raise InputError(f'labels: {cfg.labels!r} is not one of {", ".join(LABELS)}')
    if cfg.completions > 2 and cfg.labels != 'soft' and train.asks_for(cfg, 'rejected'):
        raise InputError(f'completions: {cfg.completions} make rankings, and loss = {cfg.loss!r} '
                         "compares two responses; labels = 'soft' takes the best and the worst")
    if train.WORLD > 1:
        raise InputError('rounds: for one process only')
    return cfg


def draw_round(policy, entries, judge, cfg, seed):
    """cfg.round_pairs records: responses of the policy, ranked by the judge, to prompts drawn from
    the data set's entries. What is unfinished, blank or twice the same is drawn again."""
    tokenizer, rng, records = get_tokenizer(cfg.tokenizer), np.random.default_rng(seed), []
    o = sample.Options(n=cfg.completions, batch_size=128)
    for _ in range(20):
        o.seed = int(rng.integers(2**31))
        drawn = rng.integers(len(entries), size=cfg.round_pairs - len(records))
        drawn = [entries[i] for i in drawn]
        ids = [encode(prompt, responses[:1], tokenizer, cfg)[0][0].tolist()
               for prompt, responses in drawn]
        o.max_new_tokens = cfg.max_length - max(map(len, ids))
        prompts, texts = [], []
        for (prompt, _), responses in zip(drawn, sample.complete(policy, ids, o, tokenizer)):
            pairs = [sample.text_and_end(tokens, tokenizer) for tokens in responses]
            distinct = list(dict.fromkeys(text for text, ended in pairs if ended and text.strip()))
            if len(distinct) == cfg.completions:
                prompts.append(prompt)
                texts.append(distinct)
        for prompt, each, scores in zip(prompts, texts, judge(prompts, texts)):
            records.append(as_record(prompt, *rank(each, scores, rng, cfg.labels)))
        if len(records) == cfg.round_pairs:
            return records
    raise InputError(f'round_pairs: only {len(records)} of {cfg.round_pairs} prompts got '
                     f'{cfg.completions} distinct responses that end within max_length')


def train_rounds(cfg):
    """Sample, label and train cfg.rounds times -> the metrics of the last round."""
    ready = [path for pattern in ('round-*.jsonl', 'round-*/ckpt.pt')
             for path in glob.glob(os.path.join(glob.escape(cfg.out_dir), pattern))]
    if ready and not (cfg.resume or cfg.overwrite):
        raise InputError(f'out_dir: {cfg.out_dir} holds rounds; --resume continues them, '
                         '--overwrite replaces them')
    for path in ready if not cfg.resume else []:
        os.remove(path)
    os.makedirs(cfg.out_dir, exist_ok=True)
    train.setup_machine(cfg)
    train.name_tokenizer(cfg)
    judge = load_judge(cfg.judge, cfg.device)
    entries = read_texts((where, raw) for _, where, raw in records_of(cfg))
    settings = {field.name: getattr(cfg, field.name) for field in fields(train.Config)}
    base, newest = cfg.reference_from or cfg.init_from, cfg.init_from
    for k in range(1, cfg.rounds + 1):
        folder, seed = os.path.join(cfg.out_dir, f'round-{k}'), cfg.seed + k
        path = folder + '.jsonl'
        if not os.path.exists(path):
            train.say(f'round {k} of {cfg.rounds}: {cfg.completions} responses of {newest} to '
                      f'{cfg.round_pairs:,} prompts, labelled by {cfg.judge}')
            records = draw_round(load(newest).to(cfg.device), entries, judge, cfg, seed)
            with atomic_write(path) as f:
                f.writelines(json.dumps(record) + '\n' for record in records)
        # where the policy is the reference, reference_from stays empty: it is not loaded twice
        other = train.asks_for(cfg, 'reference') and base != newest
        config = train.Config(**settings | dict(
            dataset=path, split='', convert=None, out_dir=folder, init_from=newest, seed=seed,
            reference_from=base if other else '', overwrite=True, at_end=None,
            resume=os.path.exists(os.path.join(folder, 'ckpt.pt'))))
        config.options = cfg.options
        metrics, newest = train.train(config), folder
    if cfg.at_end is not None:
        cfg.at_end(load(newest).to(cfg.device), cfg)
    return metrics


def main(argv):
    train_rounds(load_config(argv))


if __name__ == '__main__':
    run(main, __doc__)
