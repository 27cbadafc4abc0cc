"""
The optimum of DPO's objective where the reward is known, and where a policy lies beside it.

pi*(y|x) = pi_ref(y|x) exp(r(x,y)/beta) / Z(x) has the highest expected reward that any policy can
have at its KL from the reference: over all beta, it is the frontier. Samples of the reference,
weighted by exp(r/beta), measure it. lab/films.py reports a run beside it; lab/frontier.py draws it.
"""
import math

import numpy as np
import torch

from model import pack
from sample import encode_prompt
from tokenizer import get_tokenizer


def tilted(rewards, beta):
    """The optimum pi_ref exp(r/beta)/Z from samples of the reference: (prompts, samples) of their
    rewards, weighted by exp(r/beta) within each prompt.

    -> (expected reward, KL from the reference in nats, effective samples per prompt). The first two
    are means over the prompts, the last is a harmonic mean, as errors go by 1/size. KL = E*[r]/beta
    - log Z, with Z estimated by the mean of exp(r/beta), whose log is too low by 1/(2 size).
    """
    logits = rewards / beta
    top = logits.max(1, keepdims=True)
    log_z = np.log(np.exp(logits - top).mean(1)) + top[:, 0]
    weights = np.exp(logits - log_z[:, None]) / rewards.shape[1]           # sum to 1 per prompt
    reward = (weights * rewards).sum(1)
    return reward.mean(), (reward / beta - log_z).mean(), 1 / (weights**2).sum(1).mean()


def frontier_at(rewards, kl):
    """The optimum whose KL is `kl`, by bisection: (expected reward, beta, effective samples). NaN
    where it is beyond these samples: no weighting of n samples has a KL above log n."""
    low, high = math.log(0.01), math.log(1000.0)
    if tilted(rewards, math.exp(low))[1] < kl:
        return math.nan, math.nan, math.nan
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if tilted(rewards, math.exp(middle))[1] > kl else (low, middle)
    reward, _, size = tilted(rewards, math.exp(high))
    return reward, math.exp(high), size


def rewards_of(responses, prompts, world):
    """Gold rewards of the same number of responses to each prompt: (prompts, samples)."""
    repeated = [p for p in prompts for _ in range(len(responses) // len(prompts))]
    texts = [world.text(t)[0] for t in responses]
    return world.reward(repeated, texts).reshape(len(prompts), -1)


def reference_rewards(reference, world, prompts=32, samples=512, seed=7):
    """Gold rewards of the reference's own responses: (prompts, samples)."""
    drawn = world.draw_prompts(prompts, seed)
    responses = world.sample(reference, [p for p in drawn for _ in range(samples)], seed)
    return rewards_of(responses, drawn, world)


def standard_error(x):
    """Of the mean of (prompts, samples), for these prompts."""
    return float(np.sqrt((x.var(1, ddof=1) / x.shape[1]).mean() / x.shape[0]))


def share_of(rewards, reward, kl):
    """The share of the optimum's gain over the reference at the policy's KL, and the optimum."""
    best = frontier_at(rewards, max(kl, 0.0))[0]
    gain = best - rewards.mean()
    return (reward - rewards.mean()) / gain if gain > 0 else math.nan, best


@torch.no_grad()
def place(policy, reference, rewards, world, samples=128, seed=7):
    """Where a policy lies beside the frontier of `rewards`, of reference_rewards -> figures.

    KL(pi||pi_ref), of whole responses, is the mean of log pi/pi_ref over the policy's own. Errors
    are standard errors over samples, for these prompts; those of the optimum and the share are from
    a bootstrap over the samples of both models.
    """
    prompts = world.draw_prompts(len(rewards), seed)
    repeated = [p for p in prompts for _ in range(samples)]
    responses = world.sample(policy, repeated, seed + 1)
    ours = rewards_of(responses, prompts, world)
    tokenizer, ratio = get_tokenizer(world.tokenizer), []
    for i in range(0, len(responses), 256):
        some = zip(repeated[i:i + 256], responses[i:i + 256])
        batch = pack([(encode_prompt(p, tokenizer), [t]) for p, t in some]).to(policy.device)
        logps = [batch.sum_by_response(m.token_logps(batch)) for m in (policy, reference)]
        ratio.append((logps[0] - logps[1])[:, 0].double().cpu().numpy())
    ratio = np.concatenate(ratio).reshape(len(prompts), -1)                     # (prompts, samples)
    kl, rng, again = float(ratio.mean()), np.random.default_rng(seed), []
    for _ in range(25):
        i, j = (rng.integers(x.shape[1], size=x.shape) for x in (rewards, ours))
        theirs, mine, of_mine = (np.take_along_axis(x, at, axis=1)
                                 for x, at in ((rewards, i), (ours, j), (ratio, j)))
        again.append(share_of(theirs, mine.mean(), of_mine.mean()))
    share, best = share_of(rewards, ours.mean(), kl)
    share_error, optimum_error = np.std(again, axis=0, ddof=1)
    _, beta, size = frontier_at(rewards, max(kl, 0.0))
    figures = dict(
        before=rewards.mean(), before_error=standard_error(rewards), reward=ours.mean(),
        reward_error=standard_error(ours), kl=kl, kl_error=standard_error(ratio), optimum=best,
        optimum_error=optimum_error, optimum_beta=beta, effective_samples=size, share=share,
        share_error=share_error)
    return {name: float(x) for name, x in figures.items()}
