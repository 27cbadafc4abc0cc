"""
The reward that DPO does without, and what rewards are good for: labels, best of n, on-policy rounds.

    python train.py config/reward_demo.py                  # a Bradley-Terry reward model: loss = 'reward'
    python reward.py score out/reward_demo pairs.jsonl     # the reward of every response; accuracy on pairs
    python reward.py label out/rm1,out/rm2 pairs.jsonl     # p = sigma(r_1 - r_2), for distilled DPO
    python reward.py best out/reward_demo samples.jsonl    # best of n, for SFT
    python reward.py reject out/reward_demo samples.jsonl --beta=0.5      # rejection sampling, for SFT
    python reward.py rank out/reward_demo samples.jsonl --labels=sample   # completions -> pairs or rankings
    python train.py config/rounds_demo.py                  # sample, label, train; and again: on-policy

Every command is VERB JUDGE FILE. A judge is

    gold                  the demo's own reward
    out/reward_demo       a reward model's run
    out/dpo_demo          any other run: its objective's implicit reward, beta log pi/pi_ref for DPO
    judge.py:kindness     your function: kindness(prompt, [response, ...]) -> [reward, ...]; the file is run
    a,b,c                 several: the mean of their rewards

FILE is anything that prepare.py reads, or what `sample.py --n=16 --out=samples.jsonl` wrote. best, reject and
rank take the responses to one prompt together. What comes out, --out=..., is what prepare.py takes. label,
reject, and rank with soft or sampled labels read a difference of rewards as Bradley-Terry's log-odds.
Left out: reward models of other architectures than the policy's, and PPO.
"""
import dataclasses
import hashlib
import json
import math
import os
import runpy
import sys
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn as nn

from dpo import preference_loss
from model import GPT, find_pretrained, load_checkpoint
from prepare import (InputError, Pairs, encode, file_hash, first_line, get_tokenizer, parse, prepare,
                     read_record, read_source, text_of)

# ------------------------------------------------------------------------------------------------------------
# The reward model


class RewardModel(GPT):
    """The GPT with one linear map on top: r(x, y) is read where y ends, when all of it has been seen."""

    def __init__(self, config):
        super().__init__(config)
        self.head = nn.Linear(config.n_embd, 1, bias=False)
        nn.init.zeros_(self.head.weight)                           # all rewards 0, the first loss log 2
        self.mean = nn.Parameter(torch.zeros(()), requires_grad=False)    # of the rewards over the data

    def score_responses(self, batch):
        """The reward of every response of a packed batch: (B, K) float32, of mean zero over the data."""
        x = self.packed_hidden(batch)                                               # (T, d)
        w = self.head.weight[0]                                                     # (d,)
        return (x[batch.ends].to(w.dtype) * w).sum(-1) - self.mean                  # (B, K), not in bf16

    @classmethod
    def from_pretrained(cls, name):
        """A reward model's run; or any model of GPT.from_pretrained's, under a head of zeros."""
        path = find_pretrained(name)
        if os.path.isfile(path) and 'head.weight' in load_checkpoint(path)['model']:
            return super().from_pretrained(path)
        policy = GPT.from_pretrained(name)
        model = cls(policy.config)
        model.load_state_dict(policy.state_dict(), strict=False)
        return model


def reward_loss(chosen_scores, rejected_scores, gamma=0.0, label_smoothing=0.0, p=None, margin=None):
    """The Bradley-Terry reward model (Rafailov et al. 2023, equation 2): (B,) rewards of the two responses,

        loss = -log sigma(r(x, y_w) - r(x, y_l) - m),    m = gamma + the pair's own margin

    `p` and `label_smoothing` are as in dpo_loss. A pair's `margin`, (B,), says by how much chosen is better
    (Touvron et al. 2023, arXiv:2307.09288, equation 2); gamma is one for all pairs.
    """
    z = chosen_scores - rejected_scores - gamma - (0.0 if margin is None else margin)
    return preference_loss(z, label_smoothing, p), chosen_scores.detach(), rejected_scores.detach()


# ------------------------------------------------------------------------------------------------------------
# Judges: functions (prompts, responses) -> rewards; texts, a list of responses to each; a list of arrays


def load_judge(names, device='auto'):
    """The judge of that name, see the top of this file. Raises InputError where there is none."""
    judges = [load_one(name, device) for name in names.split(',')]

    def judge(prompts, responses):
        found = [one(prompts, responses) for one in judges]
        return [np.mean(rewards, axis=0) for rewards in zip(*found)]
    return judge


def load_one(name, device):
    if name == 'gold':
        import demo    # imported here: it imports train, which imports this file; so below
        return lambda prompts, responses: [np.array(list(map(demo.gold_reward, some))) for some in responses]
    path, colon, function = name.rpartition('.py:')
    return user_judge(path + '.py', function) if colon else model_judge(name, device)


def judge_hashes(names):
    """What a judge's labels depend on: its names, and what is in their files."""
    files = [name.rpartition(':')[0] if '.py:' in name else find_pretrained(name)
             for name in names.split(',') if name != 'gold']
    return [names, *(file_hash(path) for path in files)]


def user_judge(path, name):
    """A function of the user's own, held to what it promises: a finite number for each response."""
    try:
        function = runpy.run_path(path)[name]
    except FileNotFoundError:
        raise InputError(f'judge: {path}: no such file')
    except KeyError:
        raise InputError(f'judge: {path} has no function {name!r}')
    except Exception as e:
        raise InputError(f'judge: {path}: {first_line(e)}')

    def judge(prompts, responses):
        found = []
        for prompt, some in zip(prompts, responses):
            try:
                rewards = np.asarray(function(prompt, list(some)), dtype=np.float64)
            except Exception as e:
                raise InputError(f'judge: {path}: {name}: {first_line(e)}')
            if rewards.shape != (len(some),) or not np.isfinite(rewards).all():
                raise InputError(f'judge: {path}: {name} must give a finite number for each of {len(some)} '
                                 f'responses, and gave {str(rewards)[:100]!r}')
            found.append(rewards)
        return found
    return judge


def model_judge(name, device):
    """A run of train.py's: a reward model's rewards, or the implicit reward of the run's objective."""
    import train
    path = find_pretrained(name)
    if os.path.isdir(path):
        raise InputError(f'judge: {name} is no run of train.py, which knows its objective and reference')
    cfg = train.config_of(path)
    if cfg.loss == 'sft':
        raise InputError(f"judge: {name} was trained with loss = 'sft', which has no reward")
    cfg.device, cfg.dtype, cfg.compile, cfg.tokens_per_batch, cfg.eval_only = device, 'auto', False, 0, True
    train.settle_machine(cfg)
    tokenizer = get_tokenizer(cfg.tokenizer)
    model = (RewardModel if cfg.loss == 'reward' else GPT).from_pretrained(path).to(cfg.device)
    train.settle_products(model)
    reference = None
    if train.needs_reference(cfg.loss):
        reference = train.load_reference(path, cfg)

    def tokens_of(prompt, responses):
        prompt = encode(tokenizer, prompt, 'prompt')[-cfg.max_prompt_length:]
        return prompt, [np.append(encode(tokenizer, r, 'response'), tokenizer.eot_token)
                        [:cfg.max_length - len(prompt)] for r in responses]

    def judge(prompts, responses):
        pairs = [tokens_of(prompt, some) for prompt, some in zip(prompts, responses)]
        found = [None] * len(pairs)
        for K in {len(some) for _, some in pairs}:       # packed together: as many responses to each prompt
            members = [i for i, (_, some) in enumerate(pairs) if len(some) == K]
            some, index = [pairs[i] for i in members], np.arange(len(members))
            scores = torch.from_numpy(train.score(model, some, index, K, cfg, 'judging'))          # (n, K)
            if cfg.loss != 'reward':
                lengths = torch.tensor([[len(r) for r in each] for _, each in some])
                ref = None
                if reference is not None:
                    ref = torch.from_numpy(train.score(reference, some, index, K, cfg, 'reference'))
                scores = implicit_rewards(cfg, scores, lengths, ref)
            for i, rewards in zip(members, scores.double().numpy()):
                found[i] = rewards
        return found
    return judge


def implicit_rewards(cfg, logps, lengths, reference_logps):
    """What a run's objective takes for the rewards of responses, (n, K) of each: asked of the objective, for
    pairs of a response and itself."""
    import train
    columns = []
    for k in range(logps.size(1)):
        twice = [None if t is None else t[:, [k, k]] for t in (logps, lengths, reference_logps)]
        columns.append(train.objective(cfg, *twice, torch.ones(len(logps)))[1])
    return torch.stack(columns, dim=1)


# ------------------------------------------------------------------------------------------------------------
# What one does with rewards

def sigmoid(x):
    return 1 / (1 + np.exp(-np.clip(x, -700, 700)))


def ranked(rewards, labels, rng):
    """Rewards (K,) -> (the order of the responses, best first; p, the probability that the first is better).

    labels 'best': by reward. 'sample': drawn from the Plackett-Luce model on the rewards, for two responses
    Bradley-Terry's (to add Gumbel noise and sort is to draw from it). 'soft': the best and the worst, with
    their Bradley-Terry probability as p.
    """
    noise = rng.gumbel(size=len(rewards)) if labels == 'sample' else 0.0
    order = np.argsort(-(rewards + noise), kind='stable')
    if labels == 'soft':
        return order[[0, -1]], float(sigmoid(rewards[order[0]] - rewards[order[-1]]))
    return order, 1.0


def as_record(prompt, responses, p=1.0):
    record = dict(prompt=prompt, responses=responses)
    if len(responses) <= 2:
        record = dict(prompt=prompt) | dict(zip(('chosen', 'rejected'), responses))
    return record | (dict(p=p) if p != 1 else {})


def accept(rewards, beta, rng):
    """Rejection sampling (Liu et al. 2023, arXiv:2309.06657): which of n samples of pi_ref to keep, each with
    probability exp((r - max r) / beta), to have samples of pi_ref exp(r/beta) / Z. Exactly so where max r
    is the largest reward that there is; here it is the largest of the n, so few samples tilt too little."""
    return rng.random(len(rewards)) < np.exp((rewards - rewards.max()) / beta)


@dataclass
class Options:
    out: str = ''              # .jsonl; empty: the file's name with the verb in it
    beta: float = 1.0          # reject: of pi_ref exp(r/beta)
    labels: str = 'best'       # rank: best, sample or soft (see `ranked`)
    template: str = ''         # as in prepare.py, for records that are no chats
    seed: int = 1337
    device: str = 'auto'


def read_texts(path, template, grouped):
    """-> [(prompt, responses), ...] of records or completions in a file; `grouped`: one entry to a prompt."""
    found, groups, models, unfinished = [], {}, set(), 0
    for where, raw in read_source(path):
        try:
            record = parse(raw)
            if isinstance(record, dict) and 'response' in record:
                models.add(record.get('model'))
                if grouped and len(models) > 1:
                    raise InputError('a file with completions of more than one model')
                if grouped and (record.get('ended') is False or not str(record['response']).strip()):
                    unfinished += 1         # prepare.py would end them where they were cut off
                    continue
                prompt, responses = text_of(record, 'prompt'), [str(record['response'])]
            else:
                prompt, responses, *_ = read_record(record, template)
        except InputError as e:
            raise InputError(f'{where}: {e}')
        if grouped and prompt in groups:
            groups[prompt].extend(responses)
        else:
            groups[prompt] = responses
            found.append((prompt, responses))
    if unfinished:
        print(f'{path}: {unfinished:,} completions without an end, or empty, left out')
    if not found:
        raise InputError(f'{path}: no record in it')
    return found


def score_file(judge, path, out, template=''):
    """Each record's rewards, to `out`; -> a line about them, with the accuracy where there are pairs."""
    texts = read_texts(path, template, grouped=False)
    rewards = judge(*zip(*texts))
    import train
    with train.whole(out) as f:
        for (prompt, responses), r in zip(texts, rewards):
            f.write(json.dumps(dict(prompt=prompt, responses=responses, rewards=r.tolist())) + '\n')
    every = np.concatenate(rewards)
    said = f'{len(every):,} responses, rewards {every.mean():+.4f} +- {every.std():.4f} (mean, deviation)'
    pairs = np.array([r for r in rewards if len(r) == 2])
    if len(pairs):
        right = ((pairs[:, 0] > pairs[:, 1]) + 0.5 * (pairs[:, 0] == pairs[:, 1])).mean()
        error = math.sqrt(right * (1 - right) / len(pairs))
        said += f'; chosen over rejected in {100 * right:.1f} +- {100 * error:.1f}% of {len(pairs):,} pairs'
    return f'{said}\n-> {out}'


def main(argv):
    import train
    verbs = ('score', 'label', 'best', 'reject', 'rank')
    if len(argv) < 3 or argv[0] not in verbs or any(a.startswith('-') for a in argv[1:3]):
        raise InputError(f'usage: python reward.py {"|".join(verbs)} JUDGE FILE [--name=value ...]')
    verb, name, path = argv[:3]
    o = train.load_config(argv[3:], Options())
    ignored = {'beta'} if verb != 'reject' else set()
    ignored |= {'labels'} if verb != 'rank' else set()
    ignored |= {'seed'} if verb not in ('reject', 'rank') else set()
    for option in sorted(ignored & o.given):
        raise InputError(f'{option}: ignored by {verb}')
    if o.beta <= 0:
        raise InputError(f'beta: {o.beta} is not above 0')
    if o.labels not in ('best', 'sample', 'soft'):
        raise InputError(f"labels: {o.labels!r} is not one of 'best', 'sample', 'soft'")
    folder, name_of_file = os.path.split(path)
    out = o.out or os.path.join(folder, f'{name_of_file.split(".")[0]}-{verb}.jsonl')
    judge, rng = load_judge(name, o.device), np.random.default_rng(o.seed)
    if verb == 'score':
        return print(score_file(judge, path, out, o.template))
    texts = read_texts(path, o.template, grouped=verb != 'label')
    records = []
    for (prompt, responses), rewards in zip(texts, judge(*zip(*texts))):
        if verb == 'label':
            if len(responses) != 2:
                raise InputError(f'{path}: {len(responses)} responses to {prompt[:50]!r}; label needs pairs')
            records.append(as_record(prompt, responses, float(sigmoid(rewards[0] - rewards[1]))))
        elif verb == 'best':
            records.append(as_record(prompt, [responses[int(rewards.argmax())]]))
        elif verb == 'reject':
            first = int(accept(rewards, o.beta, rng).argmax())     # one to a prompt, or easy ones count more
            records.append(as_record(prompt, [responses[first]]))
        elif len(set(responses)) > 1:
            order, p = ranked(rewards, o.labels, rng)
            records.append(as_record(prompt, [responses[i] for i in order], p))
    with train.whole(out) as f:
        f.writelines(json.dumps(record) + '\n' for record in records)
    print(f'{len(records):,} records from {len(texts):,} prompts -> {out}')


# ------------------------------------------------------------------------------------------------------------
# On-policy: sample, label, train; and again


def draw_round(policy, prompts, judge, cfg, seed):
    """cfg.round_pairs records: `completions` responses of `policy` to a prompt, put in order by the judge."""
    import sample
    tokenizer, rng = get_tokenizer(cfg.tokenizer), np.random.default_rng(seed)
    options = sample.Options(n=cfg.completions, batch_size=512, max_new_tokens=cfg.max_length, seed=seed)
    left, records = cfg.round_pairs, []
    for _ in range(20):                                 # what is unfinished or twice the same is drawn again
        if not left:
            return records
        options.seed = int(rng.integers(2**31))
        some = [prompts[i] for i in rng.integers(len(prompts), size=left)]
        found = []
        for (prompt, _), each in zip(some, sample.complete(policy, some, options, tokenizer)):
            texts = [text for text, _, ended, _ in each if ended and text.strip()]
            if len(set(texts)) == cfg.completions:
                found.append((prompt, texts))
        for (prompt, texts), rewards in zip(found, judge(*zip(*found)) if found else ()):
            order, p = ranked(rewards, cfg.labels, rng)
            records.append(as_record(prompt, [texts[i] for i in order], p))
        left = cfg.round_pairs - len(records)
    raise InputError(f'rounds: {len(records)} of {cfg.round_pairs} prompts got {cfg.completions} finished, '
                     'distinct responses; a larger max_length may help, or a policy that comes to an end')


def train_rounds(cfg):
    """cfg.rounds times: sample from the newest policy, let the judge label, train on that. -> last metrics

    The reference stays what the first round began with, so with labels 'sample' or 'soft' the optimum stays
    pi_ref exp(r/beta) / Z ('best' has no doubt in it, so that beta alone holds the policy back). A round
    has a folder in out_dir, beside the file of its pairs; --resume=True goes on in the one that was cut off.
    """
    import train
    from demo import write_once
    if train.WORLD > 1:
        raise InputError('rounds: for one process only')
    if cfg.eval_only:
        raise InputError('eval_only: ignored with rounds; evaluate a round by its folder')
    train.settle_machine(cfg)
    train.load_policy(cfg)                              # so that init_config's model is there
    pairs, tokenizer = Pairs(prepare(cfg), 'train'), get_tokenizer(cfg.tokenizer)
    prompts = [pairs[i][0].tolist() for i in range(len(pairs))]
    prompts = [(tokenizer.decode(ids), ids) for ids in prompts]
    judge, newest, metrics = load_judge(cfg.judge, cfg.device), cfg.init_from, {}
    for k in range(cfg.rounds):
        out = os.path.join(cfg.out_dir, f'round-{k + 1}')
        ckpt = os.path.join(out, 'ckpt.pt')
        policy = GPT.from_pretrained(newest).to(cfg.device)
        made_of = [train.fingerprint(policy), pairs.hash, judge_hashes(cfg.judge), cfg.completions,
                   cfg.round_pairs, cfg.max_length, cfg.labels, cfg.seed + k]
        key = hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:8]
        train.say(f'round {k + 1} of {cfg.rounds}: {cfg.round_pairs:,} times {cfg.completions} responses of '
                  f'{newest}, labelled by {cfg.judge}')
        path = write_once(f'{out}-{key}.jsonl', lambda: draw_round(policy, prompts, judge, cfg, cfg.seed + k))
        del policy
        run = dataclasses.replace(
            cfg, rounds=0, judge='', dataset=path, split='', template='', init_from=newest, init_config='',
            reference_from=cfg.reference_from or cfg.init_from, out_dir=out, seed=cfg.seed + k,
            resume=cfg.resume and os.path.exists(ckpt))
        run.given = cfg.given
        metrics, newest = train.train(run), out
    if cfg.dataset == 'demo':
        import demo
        demo.report(GPT.from_pretrained(newest).to(cfg.device), cfg)
    return metrics


if __name__ == '__main__':
    import reward   # by its name, as train.py imports it: one module, one RewardModel
    import train
    train.run(reward.main, __doc__, sys.argv[1:])
