"""
What DPO replaces: PPO against a judge's scores, on this project's own GPT.

    python -m lab.ppo config/ppo_demo.py                          # the gold reward of lab/films.py
    python -m lab.ppo config/ppo_demo.py --judge=out/reward_demo  # any judge of lab/judge.py
    python -m lab.ppo config/ppo_demo.py --resume                 # continue where it stopped

A rollout: sample responses, score them, take log-probs, values and advantages; then a few epochs
of clipped steps on it, and a line in log.jsonl. What train.Config calls a step is a rollout here.

A response earns the judge's score minus beta log pi/pi_ref(y|x), token by token, so the best that
a policy can do is pi_ref exp(r/beta)/Z exactly: what DPO aims at, too. The KL stands in the reward
and not in the loss: there its gradient takes the earlier tokens as given, that they lead to costly
ones goes unseen, and the optimum is another. A response that has no end, or is blank, earns
`unfinished_reward` in place of a score.

Left out: another reference than the policy at the start, a value model of its own, value clipping
(a habit of implementations, not of the paper), several processes, micro-batches, torch.compile.
"""
import json
import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn as nn
from torch.nn.utils.rnn import pad_sequence, unpad_sequence
from tqdm import tqdm

import train
from configurator import InputError, run
from lab import films
from lab.judge import load_judge
from model import ChunkedLogps, pack
from sample import encode_prompt, generate, text_and_end
from tokenizer import get_tokenizer
from weights import load


@dataclass
class PPOConfig(train.Config):
    judge: str = 'gold'                 # see lab/judge.py
    watch: str = ''                     # a second judge, which is logged and teaches nothing
    draw_prompts: Callable = films.draw_prompts    # (n, seed) -> n texts
    max_new_tokens: int = 80
    unfinished_reward: float = -1.0     # choose it below most scores of the judge
    responses: int = 512                # of a rollout, each to a prompt of its own
    beta: float = 1.0                   # weight of the KL from the reference
    lam: float = 1.0                    # lambda of GAE
    clip: float = 0.2
    value_coef: float = 0.1             # c_1 and c_2 of equation 9
    entropy_coef: float = 0.0
    target_kl: float = 0.01             # a step further from pi_old, in nats a token, ends the
    epochs: int = 2                     # epochs; 0: off
    max_iters: int = 40
    loss: str = 'sft'                   # no choice: PPO's own is below


def load_config(argv):
    cfg = train.load_config(argv, PPOConfig)
    unused = ('loss dataset split convert reference reference_from model_class eval_only '
              'eval_samples log_interval tokens_per_batch max_length max_prompt_length '
              'val_fraction bad_records show compile')
    for name in unused.split():
        if getattr(cfg, name) != getattr(PPOConfig, name):
            raise InputError(f'{name}: PPO does not use it')
    if min(cfg.responses, cfg.max_new_tokens, cfg.epochs, cfg.max_iters) < 1:
        raise InputError('responses, max_new_tokens, epochs and max_iters: 1 or more')
    if train.WORLD > 1 or isinstance(cfg.init_from, dict):
        raise InputError('lab.ppo: for one process, and from a trained model')
    return cfg


def token_rewards(scores, old_logps, reference_logps, lengths, beta):
    """(B,) scores, (N,) log-probs of B responses end to end, `lengths` (B,) -> (N,): r_t = -beta
    log pi_old/pi_ref(y_t), and at a response's last token the score, too."""
    return (-beta * (old_logps - reference_logps)).index_add(0, lengths.cumsum(0) - 1, scores)


def gae(rewards, values, lengths, gamma, lam):
    """Generalised advantage estimation (Schulman et al. 2016, arXiv:1506.02438, equation 16), (N,)
    twice -> (N,): A_t = sum_l (gamma lambda)^l delta_{t+l} with delta_t = r_t + gamma V_{t+1} -
    V_t. After a response's last token V is 0."""
    r, v = (pad_sequence(x.split(lengths.tolist())) for x in (rewards, values))    # (T, B)
    delta = r + gamma * torch.cat([v[1:], 0 * v[:1]]) - v   # 0 in the padding, which comes last
    advantages, later = torch.empty_like(delta), 0.0
    for t in reversed(range(len(delta))):
        advantages[t] = later = delta[t] + gamma * lam * later
    return torch.cat(unpad_sequence(advantages, lengths))


def whiten(x):                           # to mean 0 and deviation 1
    return (x - x.mean()) / (x.std() + 1e-8)


def clipped_loss(logps, old_logps, advantages, clip):
    """-L^CLIP (Schulman et al. 2017, arXiv:1707.06347, equation 7), the mean over (N,) tokens:
    -min(r_t A_t, clip(r_t, 1 - eps, 1 + eps) A_t) with r_t = pi/pi_old(y_t)."""
    ratio = (logps - old_logps).exp()
    return -torch.min(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages).mean()


def value_loss(values, returns):         # L^VF of equation 9: the mean of (V_t - V_t^targ)^2
    return (values - returns).square().mean()


def entropy(logits):
    """S of equation 9: (N, V) -> the mean entropy of the N distributions, in nats."""
    return torch.distributions.Categorical(logits=logits.float()).entropy().mean()


def approximate_kl(logps, old_logps):
    """KL(pi_old||pi) a token from samples of pi_old: the mean of r - 1 - log r >= 0, whose
    expectation is that of -log r (Schulman 2020, joschu.net/blog/kl-approx.html)."""
    log_ratio = logps - old_logps
    return (log_ratio.expm1() - log_ratio).mean()


def explained_variance(values, returns):           # 1 for perfect values, 0 for any constant
    return 1 - (returns - values).var() / returns.var()


class PolicyAndValue(nn.Module):
    """A GPT, and V = 20 w h from the output h that predicts a token. Values learn from h and do
    not change it: where they did, the policy reached 88% of the optimum's gain, without 96%."""

    def __init__(self, policy):
        super().__init__()
        self.policy, self.value = policy, nn.Linear(policy.config.n_embd, 1, bias=False)
        nn.init.zeros_(self.value.weight)

    def forward(self, batch):            # -> (N,) token_logps, (N,) values, (N, d) the outputs h
        gpt = self.policy
        h = gpt.batch_hidden(batch)[batch.scored]
        logps = ChunkedLogps.apply(h, gpt.head_weight, batch.targets, torch.is_grad_enabled())
        return logps, 20 * self.value(h.detach())[:, 0].float(), h    # a weight moves by lr a step


def score(judge, prompts, responses, tokenizer, cfg):
    """Texts of prompts, token ids of a response to each -> (B,) float32: what they earn."""
    texts = [text_and_end(response, tokenizer) for response in responses]
    finished = [i for i, (text, ended) in enumerate(texts) if ended and text.strip()]
    scores = np.full(len(texts), cfg.unfinished_reward, dtype=np.float32)
    if finished:
        found = judge([prompts[i] for i in finished], [[texts[i][0]] for i in finished])
        scores[finished] = np.concatenate(found)
    return torch.from_numpy(scores)


@torch.no_grad()
def roll_out(model, reference, judges, tokenizer, step, cfg):
    """-> (minibatches, metrics). A minibatch is (Batch, old log-probs, advantages, returns), packed
    once for all epochs, so that pi and pi_old are computed alike, to the last bit."""
    seed = int(np.random.default_rng([cfg.seed, step]).integers(2**31))
    prompts, B = cfg.draw_prompts(cfg.responses, seed), cfg.responses
    ids = [encode_prompt(prompt, tokenizer, cfg.template) for prompt in prompts]
    responses = generate(model.policy, ids, cfg.max_new_tokens, tokenizer.ends, seed=seed)
    earned = {name: score(judge, prompts, responses, tokenizer, cfg).to(cfg.device)
              for name, judge in judges.items()}
    pairs, n = [(prompt, [response]) for prompt, response in zip(ids, responses)], cfg.batch_size
    batches = [pack(pairs[i:i + n]).to(cfg.device) for i in range(0, B, n)]
    with train.autocast(cfg):
        passes = [(*model(batch)[:2], reference.token_logps(batch)) for batch in batches]
    logps, values, reference_logps = map(torch.cat, zip(*passes))                      # (N,)
    lengths = torch.cat([batch.lengths[:, 0] for batch in batches])                    # (B,)
    rewards = token_rewards(earned['reward'], logps, reference_logps, lengths, cfg.beta)
    advantages = gae(rewards, values, lengths, 1.0, cfg.lam)     # gamma 1: no other optimum
    returns, sizes = advantages + values, [len(batch.targets) for batch in batches]
    columns = [x.split(sizes) for x in (logps, whiten(advantages), returns)]
    metrics = {name: scores.mean().item() for name, scores in earned.items()} | dict(
        kl=(logps - reference_logps).sum().item() / B, entropy=-logps.mean().item(),   # of samples
        length=len(logps) / B, unfinished=sum(r[-1] not in tokenizer.ends for r in responses) / B,
        explained_variance=explained_variance(values, returns).item())
    return list(zip(batches, *columns)), metrics


def learn(model, optimizer, minibatches, step, cfg):
    """cfg.epochs over the minibatches, or until pi is too far from pi_old -> means of metrics."""
    sums, rng = [], np.random.default_rng([cfg.seed, step])
    for i in np.concatenate([rng.permutation(len(minibatches)) for _ in range(cfg.epochs)]):
        batch, old_logps, advantages, returns = minibatches[i]
        with train.autocast(cfg):
            logps, values, h = model(batch)
        drift = approximate_kl(logps, old_logps)
        if drift > cfg.target_kl > 0:
            break
        of_policy = clipped_loss(logps, old_logps, advantages, cfg.clip)
        of_values = value_loss(values, returns)
        loss = of_policy + cfg.value_coef * of_values      # equation 9, with its sign turned
        if cfg.entropy_coef:
            loss -= cfg.entropy_coef * entropy(h @ model.policy.head_weight.t())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip or math.inf)
        if not norm.isfinite():
            raise InputError(f'rollout {step}: gradient norm {norm}; ckpt.pt is from before')
        optimizer.step()
        clipped = ((logps - old_logps).expm1().abs() > cfg.clip).float().mean()
        sums.append(torch.stack([of_policy, of_values, drift, clipped, norm]).detach())
    names = 'policy_loss value_loss approx_kl clip_fraction grad_norm'.split()
    return dict(zip(names, torch.stack(sums).mean(0).tolist()), steps=len(sums))


def train_ppo(cfg):
    """Run the settings to the end. Raises InputError."""
    train.setup_machine(cfg)
    ckpt = os.path.join(cfg.out_dir, 'ckpt.pt')
    train.check_out_dir(cfg, ckpt)
    train.name_tokenizer(cfg)
    tokenizer = get_tokenizer(cfg.tokenizer)
    reference = load(cfg.init_from).to(cfg.device).requires_grad_(False)
    start, model = train.fingerprint_of(reference), PolicyAndValue(load(cfg.init_from))
    names = {'reward': cfg.judge, f'reward/{cfg.watch}': cfg.watch}
    judges = {name: load_judge(judge, cfg.device) for name, judge in names.items() if judge}
    optimizer, step, log_bytes = train.make_optimizer(model.to(cfg.device), cfg), 0, 0
    if cfg.resume:
        checkpoint = train.restore(model.policy, ckpt)
        if 'value' not in checkpoint or checkpoint['origin']['reference'] != start:
            raise InputError(f'{ckpt}: not a run of PPO from {cfg.init_from}')
        for name in ('judge', 'beta', 'lam', 'clip', 'epochs', 'responses', 'batch_size', 'seed'):
            if checkpoint['config'][name] != getattr(cfg, name):
                raise InputError(f'{name}: {ckpt} was trained with {checkpoint["config"][name]}')
        model.value.load_state_dict(checkpoint['value'])
        optimizer.load_state_dict(checkpoint['optimizer'])
        step, log_bytes = checkpoint['step'], checkpoint['log_bytes']
    log = train.open_log(cfg, log_bytes)
    if not cfg.resume:
        log.write(json.dumps(train.header(cfg, start)).encode() + b'\n')
    with train.catch_signals() as stop, tqdm(
            total=cfg.max_iters, initial=step, unit=' rollouts', disable=None) as bar:
        while step < cfg.max_iters and not stop:
            started, lr = time.perf_counter(), train.learning_rate(step, cfg)
            for group in optimizer.param_groups:
                group['lr'] = lr
            minibatches, metrics = roll_out(model, reference, judges, tokenizer, step, cfg)
            metrics |= learn(model, optimizer, minibatches, step, cfg)
            line = dict(step=step) | metrics | dict(lr=lr, seconds=time.perf_counter() - started)
            log.write(json.dumps(line).encode() + b'\n')
            bar.update()
            bar.set_postfix(reward=f'{metrics["reward"]:.3f}', kl=f'{metrics["kl"]:.3f}')
            step += 1
            if stop or step % cfg.eval_interval == 0 or step == cfg.max_iters:
                os.fsync(log.fileno())
                train.save_checkpoint(ckpt, model.policy, cfg, step=step, log_bytes=log.tell(),
                                      origin=dict(reference=start), value=model.value.state_dict(),
                                      optimizer=optimizer.state_dict())
    if step < cfg.max_iters:
        train.say(f'{cfg.out_dir}: stopped after {step} rollouts; --resume continues from there')
        sys.exit(128 + stop[0])
    if cfg.at_end is not None:
        cfg.at_end(model.policy, cfg)


def main(argv):
    train_ppo(load_config(argv))


if __name__ == '__main__':
    run(main, __doc__)
