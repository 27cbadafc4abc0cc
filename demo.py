"""
The built-in world: a small language whose right answer is known.

    python train.py config/dpo_demo.py   # the language, a base model, pairs, DPO, and this file's table
    python demo.py frontier              # every objective, several seeds, on the plane of reward and KL
    python demo.py pairs                 # how close DPO comes with 1,000 to 30,000 pairs

The language: one-line film reviews, drawn from a grammar. A prompt names who reviews what, and that decides
how kind the review tends to be. The gold reward of a review: words of praise minus words of blame.

    ann on iron river (war): great plot, dull cast but lovely score.      reward 2 - 1 = 1

A byte-level GPT learns the language (SFT) and is the reference. Pairs are sampled from it, and labelled by
the Bradley-Terry model on the gold reward. As the reward is known, so is the optimum of DPO's objective,
pi*(y|x) = pi_ref(y|x) exp(r(x,y)/beta) / Z(x): samples of the reference, weighted by exp(r/beta), give the
highest expected reward that any policy can have at each KL from the reference: the frontier.
"""
import contextlib
import dataclasses
import json
import math
import os
import re
import sys
import time

import numpy as np
import torch

import train
from model import GPT, pack
from prepare import InputError, get_tokenizer

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
        os.makedirs(os.path.dirname(path) or '.', exist_ok=True)
        with open(f'{path}.{os.getpid()}', 'w') as f:
            f.writelines(json.dumps(r) + '\n' for r in records())
        os.replace(f'{path}.{os.getpid()}', path)
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


def sample(model, prompts, seed, rows=1024):
    """One review, as token ids, to each prompt, from a byte-level model."""
    encode, out = get_tokenizer('byte').encode_ordinary, []
    for i in range(0, len(prompts), rows):
        out += model.generate([encode(p) for p in prompts[i:i + rows]], max_new_tokens=80, seed=seed + i)
    return out


def text_of(tokens):
    """Token ids of a review -> (its text, whether it came to its end)."""
    ended = tokens[-1] == get_tokenizer('byte').eot_token
    return get_tokenizer('byte').decode(tokens[:-1] if ended else tokens), ended


def draw_pairs(model, n, seed=1):
    """n pairs of the model's own reviews, labelled by Bradley-Terry: P(a beats b) = sigma(r(a) - r(b))."""
    rng = np.random.default_rng(seed)
    while n > 0:
        prompts = draw_prompts(min(n, 4096), seed=rng.integers(2**31))
        reviews = [text_of(t) for t in sample(model, prompts * 2, seed=int(rng.integers(2**31)))]
        for prompt, (a, a_ended), (b, b_ended) in zip(prompts, reviews, reviews[len(prompts):]):
            if a == b or not (a_ended and b_ended and a.strip() and b.strip()):
                continue    # no comparison, or a review without an end: drawn again
            if rng.random() >= 1 / (1 + math.exp(gold_reward(b) - gold_reward(a))):
                a, b = b, a
            yield dict(prompt=prompt, chosen=a, rejected=b)
            n -= 1


def pairs_file(cfg, pairs=6000, texts=20000, seed=1):
    """The demo's data as a .jsonl file, made where there is none: texts for SFT, else init_from's pairs."""
    if cfg.tokenizer != 'byte':
        raise InputError(f"tokenizer: {cfg.tokenizer!r}, and the demo's is 'byte'; see config/dpo_demo.py")
    if cfg.loss == 'sft':
        return write_once(os.path.join(cfg.data_dir, f'demo-texts-{texts}.jsonl'), lambda: draw_texts(texts))
    model = GPT.from_pretrained(cfg.init_from)
    path = os.path.join(cfg.data_dir, f'demo-pairs-{pairs}-{seed}-{train.fingerprint(model)[:8]}.jsonl')
    if not os.path.exists(path):
        print(f'sampling {pairs:,} pairs of reviews from {cfg.init_from}, labelled by Bradley-Terry')
    return write_once(path, lambda: draw_pairs(model, pairs, seed))


# ----------------------------------------------------------------------------------------------------------
# The frontier: the best expected reward at each KL


def tilted(rewards, beta):
    """Samples of the reference, (prompts, samples) of their rewards, weighted by exp(r/beta) for each prompt.

    -> (expected reward of pi*, its KL from the reference in nats, effective sample size per prompt), means
    over the prompts. KL(pi*||pi_ref) = E*[r]/beta - log Z, with Z estimated by the mean of exp(r/beta).
    """
    logits = rewards / beta
    top = logits.max(1, keepdims=True)
    log_z = np.log(np.exp(logits - top).mean(1)) + top[:, 0]
    weights = np.exp(logits - log_z[:, None]) / rewards.shape[1]                # sum to one for each prompt
    reward = (weights * rewards).sum(1)
    return reward.mean(), (reward / beta - log_z).mean(), (1 / (weights**2).sum(1)).mean()


def frontier_at(rewards, kl):
    """The optimum whose KL is `kl`: (expected reward, beta, effective sample size), by bisection."""
    low, high = math.log(0.01), math.log(1000.0)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if tilted(rewards, math.exp(middle))[1] > kl else (low, middle)
    reward, _, size = tilted(rewards, math.exp(high))
    return reward, math.exp(high), size


def rewards_of(reviews, prompts):
    return np.array([gold_reward(text_of(t)[0]) for t in reviews]).reshape(len(prompts), -1)


def reference_rewards(reference, prompts=32, samples=512, seed=7):
    """Gold rewards of the reference's own reviews: (prompts, samples)."""
    some = draw_prompts(prompts, seed)
    return rewards_of(sample(reference, [p for p in some for _ in range(samples)], seed), some)


def standard_error(x):
    """Of the mean of (prompts, samples), the prompts being given."""
    return float(np.sqrt((x.var(1, ddof=1) / x.shape[1]).mean() / x.shape[0]))


@torch.no_grad()
def place(policy, reference, rewards, device, samples=128, seed=7):
    """Where a policy lies beside the frontier of `rewards` (reference_rewards) -> a dictionary of figures.

    KL(pi||pi_ref), of whole reviews, is the mean of log pi/pi_ref over reviews that the policy wrote.
    """
    prompts = draw_prompts(len(rewards), seed)
    repeated = [p for p in prompts for _ in range(samples)]
    reviews = sample(policy, repeated, seed + 1)
    ours = rewards_of(reviews, prompts)
    encode, ratio = get_tokenizer('byte').encode_ordinary, []
    for i in range(0, len(reviews), 256):
        batch = pack([(encode(p), [t]) for p, t in zip(repeated[i:i + 256], reviews[i:i + 256])]).to(device)
        logps = [batch.sum_by_response(m.token_logps(batch)) for m in (policy, reference)]
        ratio.append((logps[0] - logps[1])[:, 0].double().cpu().numpy())
    ratio = np.concatenate(ratio).reshape(len(prompts), -1)
    before, after, kl = float(rewards.mean()), float(ours.mean()), float(ratio.mean())
    best, beta, size = frontier_at(rewards, max(kl, 0.0))
    return dict(before=before, before_error=standard_error(rewards), reward=after,
                reward_error=standard_error(ours), kl=kl, kl_error=standard_error(ratio), optimum=float(best),
                optimum_beta=beta, effective_samples=float(size),
                share=(after - before) / (best - before) if best > before else math.nan)


def report(policy, cfg):
    """Print where the policy lies, and both models' reviews of three films, from the same random numbers."""
    reference = GPT.from_pretrained(cfg.init_from).to(cfg.device)
    f = place(policy, reference, reference_rewards(reference), cfg.device)
    print(f"""
mean gold reward of the reference      {f['before']:+.3f} +- {f['before_error']:.3f}
                 of the policy         {f['reward']:+.3f} +- {f['reward_error']:.3f}
KL(policy||reference), sampled         {f['kl']:.3f} +- {f['kl_error']:.3f} nats
the optimum's reward at that KL        {f['optimum']:+.3f}   pi_ref exp(r/{f['optimum_beta']:.2f})/Z, \
{f['effective_samples']:.0f} effective samples a prompt
share of the optimum's gain reached    {100 * f['share']:.1f}%
""")
    prompts = draw_prompts(3, seed=11)
    reviews = [sample(m, prompts, seed=3) for m in (reference, policy)]
    for prompt, *both in zip(prompts, *reviews):
        print(prompt)
        for name, (text, _) in zip(('reference', 'policy'), map(text_of, both)):
            print(f'    {name:10}{gold_reward(text):+.0f} {text}')


# ----------------------------------------------------------------------------------------------------------
# Experiments: many short runs, each placed beside the frontier. A line a run goes to OUT/results.jsonl, so an
# experiment that was interrupted goes on where it stopped; plot.py draws it.

FRONTIER = [('dpo', dict(beta=beta)) for beta in (0.3, 0.5, 1.0, 2.0, 4.0)]
FRONTIER += [('simpo', dict(beta=beta, gamma=gamma)) for beta, gamma in ((2.0, 0.5), (2.0, 2.0), (5.0, 2.0))]
FRONTIER += [('sft', {}), ('robust_dpo', dict(beta=1.0, label_smoothing=0.1)), ('ipo', dict(beta=0.3)),
             ('rdpo', dict(beta=1.0, alpha=0.02)), ('kto', dict(beta=1.0)), ('plackett_luce', dict(beta=1.0)),
             ('cpo', dict(beta=0.3, sft_weight=0.1)), ('orpo', dict(beta=1.0)),
             ('slic', dict(delta=2.0, sft_weight=0.1)), ('rrhf', dict(sft_weight=0.1))]


def run(name, loss, options, out, base, rewards, pairs=6000, seed=0):
    """Train one policy and place it -> its line of results, read back where this run was done before."""
    path = os.path.join(out, 'results.jsonl')
    done = [json.loads(line) for line in open(path)] if os.path.exists(path) else []
    for line in done:
        if (line['name'], line['seed']) == (name, seed):
            return line
    started = time.perf_counter()
    cfg = dataclasses.replace(base, out_dir=os.path.join(out, 'run'), loss=loss, seed=seed,
                              **dict(beta=None) | options)
    cfg.given = {'loss', *options}
    train.check_config(cfg)
    cfg.dataset = pairs_file(dataclasses.replace(cfg, loss='dpo'), pairs, seed=seed + 1)
    with open(os.path.join(out, 'log.txt'), 'a') as log, contextlib.redirect_stdout(log):
        train.train(cfg)
    policy, reference = (GPT.from_pretrained(m).to(cfg.device) for m in (cfg.out_dir, cfg.init_from))
    line = dict(name=name, loss=loss, options=options, pairs=pairs, seed=seed,
                **place(policy, reference, rewards, cfg.device), seconds=time.perf_counter() - started)
    with open(path, 'a') as f:
        f.write(json.dumps(line) + '\n')
    print(f'{name:32} seed {seed}  reward {line["reward"]:+.3f} +- {line["reward_error"]:.3f}  '
          f'KL {line["kl"]:6.3f} +- {line["kl_error"]:.3f}  share {100 * line["share"]:5.1f}%  '
          f'{line["seconds"]:4.0f} s', flush=True)
    return line


def start(out):
    """-> (the config that all runs share, the reference's rewards); trains the base model if need be."""
    base = train.load_config(['config/dpo_demo.py', '--overwrite=True', '--eval_interval=1000000'])
    train.settle_machine(base)
    reference = train.load_policy(base)
    os.makedirs(out, exist_ok=True)
    rewards = reference_rewards(reference)
    curve = [dict(zip(('reward', 'kl', 'effective_samples'), map(float, tilted(rewards, beta))), beta=beta)
             for beta in np.geomspace(0.3, 30, 40)]
    with open(os.path.join(out, 'frontier.json'), 'w') as f:
        json.dump(curve, f)
    return base, rewards


def frontier(out='out/frontier', seeds=2):
    """Every objective on the plane of gold reward and KL, beside the frontier."""
    base, rewards = start(out)
    for seed in range(seeds):
        for loss, options in FRONTIER:
            name = ' '.join([loss, *(f'{k}={v:g}' for k, v in options.items())])
            run(name, loss, options, out, base, rewards, seed=seed)
    import plot
    plot.frontier(out)


def pairs(out='out/pairs', seeds=2, sizes=(1000, 3000, 10000, 30000)):
    """DPO at beta = 1 with more and more pairs: how much of the optimum's gain it reaches."""
    base, rewards = start(out)
    for seed in range(seeds):
        for size in sizes:
            run(f'{size} pairs', 'dpo', dict(beta=1.0), out, base, rewards, pairs=size, seed=seed)
    import plot
    plot.pairs(out)


if __name__ == '__main__':
    commands = dict(frontier=frontier, pairs=pairs)
    if len(sys.argv) != 2 or sys.argv[1] not in commands:
        sys.exit('usage: python demo.py ' + ' | '.join(commands))
    try:
        commands[sys.argv[1]]()
    except InputError as e:
        sys.exit(f'error: {e}')
