"""
The built-in world: a small language whose right answer is known.

    python train.py config/dpo_demo.py      # everything: the language, a base model, pairs, DPO, and this file's table

The language: one-line film reviews, drawn from a grammar. A prompt names who reviews what, and that decides how kind
the review tends to be. The gold reward of a review is plain to see: words of praise minus words of blame.

    ann on iron river (war): great plot, dull cast but lovely score.      reward 2 - 1 = 1

A byte-level GPT learns the language (SFT) and is the reference. Pairs are sampled from it, and labelled by the
Bradley-Terry model on the gold reward. As the reward is known, so is the optimum of DPO's objective,
pi*(y|x) = pi_ref(y|x) exp(r(x,y)/beta) / Z(x): samples of the reference, weighted by exp(r/beta), give the highest
expected reward that any policy can have at each KL from the reference, and a run is measured against that.
"""
import hashlib
import json
import math
import os
import re

import numpy as np
import torch

from model import GPT, pack
from prepare import END, get_tokenizer

PRAISE = ('great', 'superb', 'lovely', 'clever', 'moving', 'funny')
BLAME = ('dull', 'weak', 'clumsy', 'awful', 'flat', 'boring')
PLAIN = ('long', 'short', 'quiet', 'loud', 'odd', 'plain')
ASPECTS = ('plot', 'cast', 'score', 'ending', 'script', 'pace')
KINDNESS = {'ann': 0.9, 'bob': -0.9, 'cleo': 0.3, 'dan': -0.3, 'eve': 0.0, 'finn': 0.6, 'gus': -0.6, 'hal': 0.1}
GENRES = {'war': -0.3, 'drama': 0.2, 'comedy': 0.3, 'horror': -0.4, 'western': 0.0}
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
    """One to four clauses, each praise, blame or neither; 'but' where praise meets blame, 'and' before a last one."""
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
    """n pairs of reviews that the model wrote, labelled by Bradley-Terry: P(a beats b) = sigma(r(a) - r(b))."""
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


def pairs_file(cfg, pairs=6000, texts=20000):
    """The demo's data as a .jsonl file, made where it is not there yet: texts for SFT, else pairs from init_from."""
    if cfg.loss == 'sft':
        return write_once(os.path.join(cfg.data_dir, f'demo-texts-{texts}.jsonl'), lambda: draw_texts(texts))
    import train
    model = GPT.from_pretrained(cfg.init_from)
    path = os.path.join(cfg.data_dir, f'demo-pairs-{pairs}-{train.fingerprint(model)[:8]}.jsonl')
    if not os.path.exists(path):
        print(f'sampling {pairs:,} pairs of reviews from {cfg.init_from}, labelled by Bradley-Terry on the gold reward')
    return write_once(path, lambda: draw_pairs(model, pairs))


# ----------------------------------------------------------------------------------------------------------------
# The frontier: the best expected reward at each KL


def tilted(rewards, beta):
    """Samples of the reference, (prompts, samples) of their rewards, weighted by exp(r/beta) within each prompt.

    -> (expected reward of pi*, its KL from the reference in nats, effective sample size per prompt), means over the
    prompts. KL(pi*||pi_ref) = E*[r]/beta - log Z, with Z estimated by the mean of exp(r/beta).
    """
    logits = rewards / beta
    log_z = np.log(np.mean(np.exp(logits - logits.max(1, keepdims=True)), axis=1)) + logits.max(1)
    weights = np.exp(logits - log_z[:, None]) / rewards.shape[1]                # sum to one for each prompt
    reward = (weights * rewards).sum(1)
    return reward.mean(), (reward / beta - log_z).mean(), (1 / (weights**2).sum(1)).mean()


def frontier_at(rewards, kl):
    """The optimum whose KL is `kl`: (expected reward, beta, effective sample size), by bisection in log beta."""
    low, high = math.log(0.01), math.log(1000.0)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if tilted(rewards, math.exp(middle))[1] > kl else (low, middle)
    reward, _, size = tilted(rewards, math.exp(high))
    return reward, math.exp(high), size


def place(policy, reference, cfg, prompts=32, samples=128, reference_samples=256, seed=7):
    """Where a policy lies beside the frontier, on prompts of its own -> a dictionary of figures."""
    import train
    some = draw_prompts(prompts, seed)
    encode = get_tokenizer('byte').encode_ordinary

    def rewards_of(reviews):
        return np.array([gold_reward(text_of(t)[0]) for t in reviews]).reshape(prompts, -1)
    theirs = rewards_of(sample(reference, [p for p in some for _ in range(reference_samples)], seed))
    reviews = sample(policy, [p for p in some for _ in range(samples)], seed + 1)
    ours = rewards_of(reviews)
    pairs = [(encode(p), [t]) for p, t in zip([p for p in some for _ in range(samples)], reviews)]
    ratio = np.concatenate([(logps(policy, pairs[i:i + 256], cfg) - logps(reference, pairs[i:i + 256], cfg))
                            for i in range(0, len(pairs), 256)]).reshape(prompts, -1)     # log pi/pi_ref, y ~ pi
    kl = float(ratio.mean())
    best, beta, size = frontier_at(theirs, max(kl, 0.0))

    def error(x):    # of the mean over samples, the prompts being given
        return float(np.sqrt((x.var(1, ddof=1) / x.shape[1]).mean() / x.shape[0]))
    before, after = float(theirs.mean()), float(ours.mean())
    return dict(reward_before=before, reward_before_error=error(theirs), reward=after, reward_error=error(ours), kl=kl,
                kl_error=error(ratio), optimum=float(best), optimum_beta=beta, effective_samples=float(size),
                share=(after - before) / (best - before) if best > before else math.nan)


@torch.no_grad()
def logps(model, pairs, cfg):
    batch = pack(pairs).to(cfg.device)
    return batch.sum_by_response(model.token_logps(batch))[:, 0].double().cpu().numpy()


def report(policy, cfg):
    """Print where the policy lies, and reviews of both models to the same prompts from the same random numbers."""
    reference = GPT.from_pretrained(cfg.init_from).to(cfg.device)
    f = place(policy, reference, cfg)
    print(f"""
gold reward, mean      before {f['reward_before']:+.3f} +- {f['reward_before_error']:.3f}    after {f['reward']:+.3f} +- {f['reward_error']:.3f}
sampled KL(policy||reference), nats  {f['kl']:.3f} +- {f['kl_error']:.3f}
closed-form optimum at that KL       {f['optimum']:+.3f}    (pi_ref exp(r/{f['optimum_beta']:.2f})/Z; {f['effective_samples']:.0f} effective samples to a prompt)
share of the optimum's gain reached  {100 * f['share']:.1f}%
""")
    for prompt, ours, theirs in zip(draw_prompts(3, seed=11), *(sample(m, draw_prompts(3, seed=11), seed=3) for m in (policy, reference))):
        print(f'{prompt}\n    reference {gold_reward(text_of(theirs)[0]):+.0f} {text_of(theirs)[0]}\n'
              f'    policy    {gold_reward(text_of(ours)[0]):+.0f} {text_of(ours)[0]}')
