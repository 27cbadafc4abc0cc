"""
The built-in world: a small language whose right answer is known. The demo's configs call it:

    init_from = films.base_model()     # trained first, as config/sft_demo.py says, if it is missing
    dataset = films.pairs(init_from)   # sampled from it and labelled, once
    at_end = films.report              # prints where the policy lies beside the optimum

The language: one-line film reviews from a grammar. A prompt names who reviews what, and that
decides how kind the review tends to be. The gold reward: words of praise minus words of blame.

    ann on iron river (war): great plot, dull cast but lovely score.      reward 2 - 1 = 1

A byte-level GPT learns the language (SFT) and is the reference. Pairs are its own samples, labelled
by the Bradley-Terry model on the gold reward. The reward is known, so lab/optimum.py knows the
optimum of DPO's objective, and how much of its gain a policy reaches.
"""
import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

import train
from configurator import InputError, atomic_write
from lab import optimum
from sample import encode_prompt, generate, text_and_end
from tokenizer import get_tokenizer
from weights import load

PRAISE = ('great', 'superb', 'lovely', 'clever', 'moving', 'funny')
BLAME = ('dull', 'weak', 'clumsy', 'awful', 'flat', 'boring')
PLAIN = ('long', 'short', 'quiet', 'loud', 'odd', 'plain')
ASPECTS = ('plot', 'cast', 'score', 'ending', 'script', 'pace')
KINDNESS = dict(ann=0.9, bob=-0.9, cleo=0.3, dan=-0.3, eve=0.0, finn=0.6, gus=-0.6, hal=0.1)
GENRES = dict(war=-0.3, drama=0.2, comedy=0.3, horror=-0.4, western=0.0)
FIRST = ('iron', 'silent', 'golden', 'last', 'broken', 'red', 'hidden', 'winter')
SECOND = ('river', 'garden', 'letter', 'city', 'summer', 'road', 'mirror', 'song')
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def gold_reward(review):
    """Words of praise minus words of blame: the reward r(x, y) of any text."""
    words = re.findall('[a-z]+', review)
    return float(sum(w in PRAISE for w in words) - sum(w in BLAME for w in words))


def draw_prompt(rng):
    """-> (prompt, how kind its reviews are, in log-odds of praise against blame)."""
    name, genre = rng.choice(list(KINDNESS)), rng.choice(list(GENRES))
    prompt = f'{name} on {rng.choice(FIRST)} {rng.choice(SECOND)} ({genre}):'
    return prompt, KINDNESS[name] + GENRES[genre]


def draw_review(rng, kindness):
    """One to four clauses of praise, blame or neither; 'but' joins opposites, 'and' the last."""
    weights = np.exp([kindness, -kindness, 0.0])
    tones = rng.choice(3, size=rng.integers(1, 5), p=weights / weights.sum())
    aspects = rng.permutation(ASPECTS)
    text = ''
    for i, tone in enumerate(tones):
        if i:
            opposite = {tone, tones[i - 1]} == {0, 1}
            text += ' but ' if opposite else ' and ' if i == len(tones) - 1 else ', '
        text += f'{rng.choice((PRAISE, BLAME, PLAIN)[tone])} {aspects[i]}'
    return ' ' + text + '.'


def draw_texts(n, seed=0):
    """The language itself, for SFT."""
    rng = np.random.default_rng(seed)
    for _ in range(n):
        prompt, kindness = draw_prompt(rng)
        yield dict(prompt=prompt, chosen=draw_review(rng, kindness))


def draw_prompts(n, seed):
    rng = np.random.default_rng(seed)
    return [draw_prompt(rng)[0] for _ in range(n)]


def gold_rewards(prompts, responses):
    return np.array([gold_reward(r) for r in responses])


# --------------------------------------------------------------------------------------------------
# A world: what an experiment needs to know of a language


@dataclass(frozen=True)
class World:
    tokenizer: str
    draw_prompts: Callable   # (n, seed) -> n texts
    reward: Callable         # (prompts, responses), as many texts of each -> their gold rewards
    max_new_tokens: int
    labels: str = 'sample'   # who wins: 'sample', by Bradley-Terry's chance; 'best', by reward

    def sample(self, model, prompts, seed, rows=1024):
        """One response, as token ids, to each prompt."""
        tokenizer, out = get_tokenizer(self.tokenizer), []
        for i in range(0, len(prompts), rows):
            ids = [encode_prompt(p, tokenizer) for p in prompts[i:i + rows]]
            out += generate(model, ids, self.max_new_tokens, tokenizer.ends, seed=seed + i)
        return out

    def text(self, tokens):
        """Token ids of a response -> (its text, whether it came to its end)."""
        return text_and_end(tokens, get_tokenizer(self.tokenizer))


FILMS = World('byte', draw_prompts, gold_rewards, 80)


def draw_pairs(model, n, seed=1, world=FILMS):
    """n pairs of the model's own responses, labelled by Bradley-Terry, P(a beats b) =
    sigma(r(a) - r(b)), or by the reward alone, as the world says."""
    rng, tokenizer, drawn = np.random.default_rng(seed), get_tokenizer(world.tokenizer), 0
    while n > 0:
        if drawn > 20 * n + 20000:
            raise InputError(f'too few of {drawn:,} pairs of responses end and differ: '
                             'the base model has not learnt enough')
        prompts = world.draw_prompts(min(n, 4096), seed=rng.integers(2**31))
        drawn += len(prompts)
        responses = world.sample(model, prompts * 2, seed=int(rng.integers(2**31)))
        texts, ended = zip(*map(world.text, responses))
        rewards = world.reward(prompts * 2, texts)
        for i, prompt in enumerate(prompts):
            j = i + len(prompts)
            usable = all(ended[k] and texts[k].strip() and responses[k][:-1]
                         == tokenizer.encode(texts[k]).tolist() for k in (i, j))
            if n == 0 or texts[i] == texts[j] or not usable:
                continue
            margin = rewards[i] - rewards[j]
            p = 1 / (1 + np.exp(-margin)) if world.labels == 'sample' else (np.sign(margin) + 1) / 2
            w, l = (i, j) if rng.random() < p else (j, i)
            yield dict(prompt=prompt, chosen=texts[w], rejected=texts[l])
            n -= 1


# --------------------------------------------------------------------------------------------------
# What the configs call


def write_once(path, records):
    """The records of records() in a .jsonl file, unless it is there -> the path."""
    if not os.path.exists(path):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with atomic_write(path) as f:
            f.writelines(json.dumps(r) + '\n' for r in records())
    return path


def texts(n=20000, data_dir='data'):
    """Reviews for SFT -> the path of a .jsonl file."""
    return write_once(os.path.join(data_dir, f'films-texts-{n}.jsonl'), lambda: draw_texts(n))


def base_model(config='config/sft_demo.py'):
    """The demo's reference -> its folder; trained first where it is not there, or not finished."""
    cfg = train.load_config([os.path.join(ROOT, config)])
    ckpt = os.path.join(cfg.out_dir, 'ckpt.pt')
    done = train.load_checkpoint(ckpt)['step'] if os.path.exists(ckpt) else 0
    if done < cfg.max_iters:
        train.say(f'{cfg.out_dir} is the base model: training it first, as {config} says')
        cfg.resume = done > 0
        train.train(cfg)
    return cfg.out_dir


def pairs(base, n=6000, seed=1, data_dir='data', world=FILMS, name='films'):
    """Pairs sampled from the model `base` and labelled -> the path of a .jsonl file."""
    model = load(base)
    best, weights = '-best' * (world.labels == 'best'), train.fingerprint_of(model)[:8]
    path = os.path.join(data_dir, f'{name}-pairs{best}-{n}-{seed}-{weights}.jsonl')
    if not os.path.exists(path):
        train.say(f'sampling {n:,} pairs of reviews from {base} and labelling them')
    return write_once(path, lambda: draw_pairs(model, n, seed, world))


def report(policy, cfg, world=FILMS, rewards=None):
    """Print where the policy lies beside the optimum, and both models' reviews of three films."""
    reference = load(cfg.reference_from or cfg.init_from).to(cfg.device)
    rewards = optimum.reference_rewards(reference, world) if rewards is None else rewards
    f = optimum.place(policy, reference, rewards, world)
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
    responses = [world.sample(m, prompts, 3) for m in (reference, policy)]
    for prompt, *both in zip(prompts, *responses):
        print(prompt)
        for name, tokens in zip(('reference', 'policy'), both):
            text, _ = world.text(tokens)
            print(f'    {name:10}{world.reward([prompt], [text])[0]:+.1f} {text}')
