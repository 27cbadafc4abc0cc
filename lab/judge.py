"""
Score responses, and use the scores: labels, best of n, rejection sampling, rankings.

    python -m lab.judge score out/reward_demo pairs.jsonl      # scores; the accuracy on pairs
    python -m lab.judge label out/rm1,out/rm2 pairs.jsonl      # p = sigma(r_1 - r_2), for DPO
    python -m lab.judge best out/reward_demo samples.jsonl     # best of n, for SFT
    python -m lab.judge reject out/reward_demo samples.jsonl --beta=0.5     # samples of the optimum
    python -m lab.judge rank out/reward_demo samples.jsonl --labels=sample  # pairs or rankings

A judge is one of these, or several with commas between them, whose scores are averaged:

    gold                 the gold reward of lab/films.py
    out/reward_demo      a reward model's run
    out/dpo_demo         any other run: its objective's implicit reward; DPO's is beta log pi/pi_ref
    mine.py:kindness     your function: kindness(prompt, [response, ...]) -> a number for each

The file is anything that prepare.py reads, or completions as `sample.py --n=16 --out=samples.jsonl`
writes them. best, reject and rank take all responses to one prompt together, whichever model wrote
them. The difference of two scores is the log-odds that the first response is better.
Left out: completions of prompts that a chat template wrote (their text no longer is a chat).
"""
import json
import os
import pkgutil
from dataclasses import dataclass, fields

import numpy as np
import torch

import train
from configurator import InputError, atomic_write, configure, first_line, run, run_config
from lab import films
from prepare import NUMBERS, parse, read_record, read_source, tokenize
from tokenizer import get_tokenizer
from weights import find, load, load_checkpoint, tokenizer_of

VERBS = ('score', 'label', 'best', 'reject', 'rank')
LABELS = ('best', 'sample', 'soft')      # see `rank`


@dataclass
class Options:
    out: str = ''              # empty: the file's name with the verb, in the current folder
    beta: float = 1.0          # of reject
    labels: str = 'best'       # of rank: best, sample or soft
    seed: int = 1337
    device: str = ''           # empty: cuda where there is one, else cpu


# --------------------------------------------------------------------------------------------------
# Judges: functions (n prompts, n lists of responses) -> n arrays of scores


def read_run(name):
    """-> (the run's Config, its checkpoint). Raises InputError where `name` is no run."""
    path = find(name)
    if os.path.isdir(path):
        raise InputError(f'{name}: not a run of train.py, which knows its objective and reference')
    checkpoint = load_checkpoint(path)
    if 'value' in checkpoint:
        raise InputError(f'{name}: a run of lab.ppo, whose objective is no function of pairs')
    settings = dict(checkpoint['config'])
    cfg = train.Config(**{field.name: settings.pop(field.name) for field in fields(train.Config)})
    cfg.options = settings
    try:                                 # saved by their names
        cfg.model_class = pkgutil.resolve_name(cfg.model_class)
        cfg.loss = pkgutil.resolve_name(cfg.loss) if '.' in cfg.loss else cfg.loss
    except (ImportError, AttributeError, ValueError) as e:
        raise InputError(f'{path}: its loss or model_class is not there ({first_line(e)})')
    return cfg, checkpoint


def load_reference(cfg, checkpoint):
    """The reference of a run, provided that its weights are still the same."""
    name = cfg.reference_from or cfg.init_from
    if isinstance(name, dict):
        raise InputError(f'{cfg.out_dir}: the run began with a random model, which is not saved')
    reference = load(name, cfg.model_class)
    if checkpoint.get('origin', {}).get('reference', '') not in ('', train.fingerprint_of(reference)):
        raise InputError(f'{name}: not the reference that {cfg.out_dir} was trained with')
    return reference


def load_judge(names, device=''):
    """The judge of that name, see the top of this file. Raises InputError where there is none."""
    judges = [load_one(name, device) for name in names.split(',')]
    return lambda prompts, responses: [
        np.mean(each, axis=0) for each in zip(*(one(prompts, responses) for one in judges))]


def load_one(name, device):
    path, colon, function = name.rpartition('.py:')
    if name != 'gold' and not colon:
        return run_judge(name, device)
    functions = run_config(path + '.py') if colon else dict(gold=films.gold_rewards)
    if function not in functions:
        raise InputError(f'judge: {path}.py has no function {function!r}')

    def score(prompt, texts):
        try:
            scores = np.asarray(functions[function](prompt, list(texts)), dtype=np.float64)
            assert scores.shape == (len(texts),) and np.isfinite(scores).all(), (
                'not a finite number for each response')
        except Exception as e:           # the user's code
            raise InputError(f'judge: {name}: {first_line(e)}')
        return scores
    return lambda prompts, responses: [score(*each) for each in zip(prompts, responses)]


def run_judge(name, device):
    """A run of train.py: the rewards that its objective reports. For a reward model's run they are
    the model's; for others the implicit rewards, such as beta log pi/pi_ref."""
    cfg, checkpoint = read_run(name)
    cfg.device, cfg.dtype, cfg.compile, cfg.tokens_per_batch = device, 'float32', False, 0
    train.setup_machine(cfg)
    tokenizer = get_tokenizer(tokenizer_of(name))
    models = [load(name, cfg.model_class).to(cfg.device)]
    if train.asks_for(cfg, 'reference'):
        models.append(load_reference(cfg, checkpoint).to(cfg.device))

    @torch.no_grad()
    def judge(prompts, responses):
        pairs = [(ids, [tokens]) for prompt, texts in zip(prompts, responses)
                 for ids, tokens in encode(prompt, texts, tokenizer, cfg)]
        sums = torch.zeros(len(models), len(pairs), 1)       # log pi(y|x) or r(x, y), log pi_ref
        for rows in np.array_split(np.arange(len(pairs)), -(-len(pairs) // 256)):
            for at, batch in train.batches(pairs, rows, 1, cfg):
                for k, model in enumerate(models):
                    sums[k, at] = batch.sum_by_response(model.token_logps(batch)).cpu()
        lengths = torch.tensor([[len(tokens)] for _, (tokens,) in pairs])
        numbers = {number: torch.full((len(pairs),), x) for number, x in NUMBERS.items()}
        rewards = train.apply_loss(cfg, sums[0], sums[-1], lengths, numbers)[1]
        if rewards is None:
            raise InputError(f'judge: {name} was trained with a loss that has no rewards')
        ends = np.cumsum([len(texts) for texts in responses])
        return np.split(rewards.double().numpy(), ends[:-1])
    return judge


def encode(prompt, responses, tokenizer, cfg):
    """Text or messages, texts -> [(prompt ids, response ids), ...], as prepare.py makes them."""
    prompt, responses, *_ = read_record(dict(prompt=prompt, responses=responses), cfg.template)
    found = [tokenize(prompt, [response], tokenizer, cfg) for response in responses]
    if found[0][0] is None:
        raise InputError(f'judge: a prompt is {found[0][2][0]}')
    return [(ids, tokens[0]) for ids, tokens, _ in found]


# --------------------------------------------------------------------------------------------------
# The command: what to do with the scores of the responses to a prompt


def reject(responses, scores, rng, beta=1.0):
    """Rejection sampling (Liu et al. 2023, arXiv:2309.06657): samples of pi_ref, accepted with
    probability exp((r - max r)/beta), are samples of pi_ref exp(r/beta)/Z. max r is the largest of
    these n, so few tilt too little. The first is taken: of all, easy prompts would have more."""
    accepted = rng.random(len(scores)) < np.exp((scores - scores.max()) / beta)
    return responses[accepted.argmax()]


def rank(responses, scores, rng, labels='best'):
    """-> (all responses, best first; p), or None where all are the same. labels 'best': by score.
    'sample': drawn from the Plackett-Luce model of the scores, which sorting by score plus Gumbel
    noise does. 'soft': the best and the worst, with Bradley-Terry's probability as p."""
    if all(response == responses[0] for response in responses):
        return None
    noise = rng.gumbel(size=len(scores)) if labels == 'sample' else 0.0
    ranked = [responses[i] for i in np.argsort(-(scores + noise), kind='stable')]
    if labels == 'soft':
        margin = torch.tensor(scores.max() - scores.min())
        return [ranked[0], ranked[-1]], margin.sigmoid().item()
    return ranked, 1.0


def as_record(prompt, responses, p=1.0):
    """A record of a shape that prepare.py knows."""
    pair = dict(zip(('chosen', 'rejected'), responses))
    texts = pair if len(responses) <= 2 else dict(responses=responses)
    return dict(prompt=prompt, **texts, **(dict(p=p) if p != 1 else {}))


def read_texts(stream, grouped=False):
    """Records or completions -> [(prompt, responses), ...]; `grouped`: one entry for each prompt.
    A prompt is text or messages. Completions that did not come to their end are left out."""
    entries, unfinished = {}, 0
    for where, raw in stream:
        try:
            record = parse(raw)
            if isinstance(record, dict) and 'response' in record:
                if record.get('ended') is False or not str(record['response']).strip():
                    unfinished += 1
                    continue
                record = dict(prompt=record.get('prompt'), responses=[record['response']])
            prompt, responses, *_ = read_record(record)
        except InputError as e:
            raise InputError(f'{where}: {e}')
        # a chat's response is a list of messages, mostly of one
        texts = [r if isinstance(r, str) or len(r) > 1 else r[0]['content'] for r in responses]
        key = json.dumps(prompt) if grouped else len(entries)
        entries.setdefault(key, (prompt, []))[1].extend(texts)
    if unfinished:
        print(f'{unfinished:,} completions without an end, or blank, left out')
    if not entries:
        raise InputError('there is no record to judge')
    return list(entries.values())


def summary(scores):
    """Mean and deviation; for records of several responses, how often the first beats the last."""
    every, margins = np.concatenate(scores), np.array([s[0] - s[-1] for s in scores if len(s) > 1])
    text = f'{len(every):,} responses, scores {every.mean():+.4f} +- {every.std():.4f} (deviation)'
    if len(margins):
        right = ((margins > 0) + 0.5 * (margins == 0)).mean()
        error = np.sqrt(right * (1 - right) / len(margins))
        text += f'; chosen above rejected in {right:.1%} +- {error:.1%} of {len(margins):,} pairs'
    return text


def main(argv):
    if len(argv) < 3 or argv[0] not in VERBS:
        raise InputError(f'usage: python -m lab.judge {"|".join(VERBS)} JUDGE FILE')
    (verb, names, path), o = argv[:3], configure(Options, argv[3:])
    if o.beta <= 0 or o.labels not in LABELS:
        raise InputError(f'beta is to be above 0, and labels one of {", ".join(LABELS)}')
    judge, rng = load_judge(names, o.device), np.random.default_rng(o.seed)
    entries = read_texts(read_source(path), grouped=verb not in ('score', 'label'))
    scores, records = judge(*zip(*entries)), []
    for (prompt, responses), each in zip(entries, scores):
        if verb == 'score':
            records.append(dict(prompt=prompt, responses=responses, scores=each.tolist()))
        elif verb == 'label' and len(responses) != 2:
            raise InputError(f'label: a prompt with {len(responses)} responses, not 2')
        elif verb == 'label':
            p = torch.tensor(each[0] - each[1]).sigmoid().item()
            records.append(as_record(prompt, responses, p))
        elif verb == 'best':
            records.append(as_record(prompt, [responses[each.argmax()]]))
        elif verb == 'reject':
            records.append(as_record(prompt, [reject(responses, each, rng, o.beta)]))
        elif found := rank(responses, each, rng, o.labels):
            records.append(as_record(prompt, *found))
    out = o.out or f'{os.path.basename(path).split(".")[0]}-{verb}.jsonl'
    with atomic_write(out) as f:
        f.writelines(json.dumps(record) + '\n' for record in records)
    if verb in ('score', 'label'):
        print(summary(scores))
    print(f'{len(records):,} records of {len(entries):,} -> {out}')


if __name__ == '__main__':
    run(main, __doc__)
