"""
Train a GPT on preferences: python train.py CONFIG [--name=value ...]

    python train.py config/dpo_demo.py                                   # no download, minutes on a CPU
    python train.py config/dpo_gpt2.py --dataset=pairs.jsonl --beta=0.2  # your pairs
    python train.py config/dpo_gpt2.py --resume=True                     # go on where it stopped
    python train.py config/dpo_gpt2.py --eval_only=True                  # the run's evaluation: eval.jsonl

A config file is plain Python, and is run; what it assigns, and every --name, must be a field of Config below.
Top to bottom: the config, the data of a step, scoring and the reference, evaluation, checkpoints, the loop.
Left out: sharding of a model over GPUs, LoRA and quantised weights, gradient checkpointing, dropout.
"""
import ast
import contextlib
import copy
import ctypes
import dataclasses
import difflib
import fcntl
import functools
import gc
import hashlib
import inspect
import json
import math
import os
import platform
import reprlib
import runpy
import signal
import subprocess
import sys
import time
import traceback
import types
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

import dpo
import reward
import simpo
from model import GPT, GPTConfig, block_mask, load_checkpoint, pack, send
from prepare import InputError, Pairs, first_line, get_tokenizer, prepare

LOSSES = {'sft': simpo.sft_loss, 'dpo': dpo.dpo_loss, 'robust_dpo': dpo.robust_dpo_loss, 'ipo': dpo.ipo_loss,
          'rdpo': dpo.rdpo_loss, 'kto': dpo.kto_loss, 'plackett_luce': dpo.plackett_luce_loss,
          'simpo': simpo.simpo_loss, 'cpo': simpo.cpo_loss, 'orpo': simpo.orpo_loss, 'slic': simpo.slic_loss,
          'rrhf': simpo.rrhf_loss, 'reward': reward.reward_loss}
OPTIONS = sorted({name for loss in LOSSES.values() for name, p in inspect.signature(loss).parameters.items()
                  if p.default is not inspect.Parameter.empty
                  and name not in ('p', 'margin')})                         # any objective's options


@dataclass
class Config:
    # where from and where to
    out_dir: str = 'out/run'            # checkpoints, log.jsonl, eval.jsonl
    init_from: str = 'gpt2'             # the policy at the start, and the reference: all that
                                        # GPT.from_pretrained takes, or 'scratch'
    init_config: str = ''               # the config file that makes init_from, run first where it is missing
    reference_from: str = ''            # the reference, where it is not the policy at the start
    n_layer: int = 12                   # these four for 'scratch' alone
    n_head: int = 12
    n_embd: int = 768
    block_size: int = 1024
    resume: bool = False                # go on from out_dir/ckpt.pt, exactly
    overwrite: bool = False             # start anew though out_dir holds a run
    eval_only: bool = False             # evaluate out_dir's run, or init_from where there is none
    # data: see prepare.py
    dataset: str = 'demo'               # demo, a file, a hub name, or a folder that prepare.py made
    split: str = ''                     # of a hub's data set; empty: train, or train_prefs
    tokenizer: str = 'gpt2'             # byte, or one of tiktoken's
    template: str = ''                  # 'chat' writes plain prompts out as \n\nHuman: ... \n\nAssistant:
    max_length: int = 512               # tokens of a prompt with one of its responses
    max_prompt_length: int = 256        # a longer prompt loses its start
    truncation: str = 'cut'             # a response that does not fit: 'cut' it, or 'drop' the pair
    val_fraction: float = 0.05          # of the prompts, chosen by their hash; 1.0: everything
    bad_records: str = 'error'          # or 'skip': leave them out, and count them
    label_from_scores: bool = False     # p = sigma(chosen_score - rejected_score)
    data_dir: str = 'data'
    # the objective; None leaves an option at the objective's own default (see dpo.py, simpo.py)
    loss: str = 'dpo'                   # sft; with reference: dpo, robust_dpo, ipo, rdpo, kto, plackett_luce;
                                        # without: simpo, cpo, orpo, slic, rrhf; a reward model: reward
    beta: float | None = None           # dpo: 0.1, the KL constraint's weight; simpo: 2.0, the reward's scale
    gamma: float | None = None          # simpo: 0.5, the target margin; reward: 0.0
    delta: float | None = None          # slic: 1.0, its margin
    alpha: float | None = None          # rdpo: 0.01, what a token costs
    label_smoothing: float | None = None  # the share of labels taken to be flipped
    length_average: bool | None = None  # ipo: divide log-ratios by the lengths, as TRL does, unlike the paper
    reference_point: float | None = None  # kto: 0.0, the reward that counts as neither gain nor loss
    sft_weight: float | None = None     # cpo, slic, rrhf: 1.0; simpo: 0.0; weight of chosen's likelihood
    reference: str | None = None        # 'cached': log-probs computed once, kept on disk; 'live': every step
    # optimisation
    batch_size: int = 64                # pairs per step
    tokens_per_batch: int = 0           # tokens per micro-batch: bounds the memory, leaves the result alone;
                                        # 0: 16384 on cuda, 2048 on a cpu
    learning_rate: float = 1e-6
    schedule: str = 'cosine'            # after the warm-up: cosine or linear to min_lr, or constant
    warmup_iters: int = 0
    min_lr: float = 0.0
    max_iters: int = 0                  # steps; 0: as many as `epochs` needs
    epochs: float = 1.0
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    grad_clip: float = 1.0              # norm of the gradient; 0: not clipped
    seed: int = 1337
    # evaluation and logging
    eval_interval: int = 100            # steps between evaluations, each followed by a checkpoint
    eval_pairs: int = 0                 # validation pairs used; 0: all
    log_interval: int = 10
    eval_samples: int = 0               # responses sampled at each evaluation, for the policy's KL and length
    # on-policy, see reward.py: rounds times, responses are sampled, labelled by the judge, and trained on
    rounds: int = 0                     # 0: train on `dataset`; else only its prompts are used
    judge: str = ''                     # gold; a run's folder; several with commas; file.py:function
    labels: str = 'best'                # who wins: 'best', by reward; 'sample', by chance; 'soft', with p
    completions: int = 2                # sampled for a prompt; more than two make rankings
    round_pairs: int = 1000             # prompts answered in a round
    # the machine
    device: str = 'auto'                # cuda where there is one, else cpu
    dtype: str = 'auto'                 # bfloat16 on cuda, float32 on a cpu and under eval_only
    compile: bool | None = None         # torch.compile; None: on cuda


# ------------------------------------------------------------------------------------------------------------
# The config


def parse_value(cfg, name, value, where):
    """`value` as the type of the field `name`; a string from the command line is read as a Python literal."""
    fields = {f.name: f for f in dataclasses.fields(cfg)}
    if name not in fields:
        near = ''.join(f'; {match!r} is' for match in difflib.get_close_matches(name, fields, n=1))
        raise InputError(f'{where}: {name!r} is not a name of the config{near}')
    annotation = fields[name].type
    kinds = annotation.__args__ if isinstance(annotation, types.UnionType) else (annotation,)
    if where == 'command line' and (str not in kinds or value == 'None' and type(None) in kinds):
        with contextlib.suppress(ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            value = ast.literal_eval(value)
    if type(value) is int and float in kinds:
        with contextlib.suppress(OverflowError):
            value = float(value)
    if type(value) not in kinds or (type(value) is float and not math.isfinite(value)):
        wanted = ' or '.join(k.__name__.replace('NoneType', 'None') for k in kinds)
        raise InputError(f'{where}: {name} = {reprlib.repr(value)} is not of type {wanted}')
    return value


def load_config(argv, cfg=None):
    """[CONFIG] [--name=value ...] -> Config, whose `given` names what was set. Raises InputError, one line.
    Another dataclass of options (sample.py has one) may come as `cfg`."""
    cfg = Config() if cfg is None else cfg
    cfg.given, from_file = set(), set()
    for i, arg in enumerate(argv):
        name, equals, value = arg.removeprefix('--').partition('=')
        if arg.startswith('--') and type(getattr(cfg, name, None)) is bool and not equals:
            equals, value = '=', 'True'                    # --resume is short for --resume=True
        if arg.startswith('--') and equals:
            setattr(cfg, name, parse_value(cfg, name, value, 'command line'))
            cfg.given.add(name)
            other = {'max_iters': 'epochs', 'epochs': 'max_iters'}.get(name)
            if other in from_file:                         # either says how long; the file's gives way
                setattr(cfg, other, getattr(Config, other))
                cfg.given.discard(other)
        elif i or arg.startswith('-'):
            raise InputError(f'command line: {arg!r} is not of the form --name=value')
        elif not os.path.isfile(arg):
            raise InputError(f'{arg}: no such config file')
        else:
            try:
                assigned = runpy.run_path(arg)
            except Exception as e:
                frames = traceback.extract_tb(e.__traceback__)
                lines = [0] + [frame.lineno for frame in frames if frame.filename == arg]
                line = e.lineno if isinstance(e, SyntaxError) else lines[-1]
                raise InputError(f'{arg} line {line}: {first_line(e)}')
            for name, value in assigned.items():
                if not name.startswith('_') and not inspect.ismodule(value) and not callable(value):
                    setattr(cfg, name, parse_value(cfg, name, value, arg))
                    from_file.add(name)
            cfg.given |= from_file
    if isinstance(cfg, Config):
        check_config(cfg)
    return cfg


def loss_parameters(loss):
    return inspect.signature(LOSSES[loss]).parameters


def check_config(cfg):
    """Raise InputError, naming the key, where a value is out of range or one that this objective ignores."""
    choices = dict(loss=LOSSES, schedule=('cosine', 'linear', 'constant'), truncation=('cut', 'drop'),
                   template=('', 'chat'), bad_records=('error', 'skip'), reference=('cached', 'live', None),
                   dtype=('auto', 'float32', 'bfloat16'), labels=('best', 'sample', 'soft'))
    for name, allowed in choices.items():
        if getattr(cfg, name) not in allowed:
            known = ', '.join(map(repr, filter(None, allowed)))
            raise InputError(f'{name}: {getattr(cfg, name)!r} is not one of {known}')
    limits = {'n_layer n_head n_embd block_size max_prompt_length': (1, math.inf),
              'batch_size eval_interval log_interval round_pairs': (1, math.inf),
              'completions': (2, math.inf),
              'learning_rate warmup_iters min_lr max_iters epochs weight_decay grad_clip': (0, math.inf),
              'eval_pairs eval_samples tokens_per_batch delta sft_weight rounds': (0, math.inf),
              'val_fraction': (0, 1),
              'label_smoothing': (0, 0.5), 'beta1 beta2': (0, 1 - 1e-9), 'seed': (0, 2**63 - 1),
              'beta': (1e-9, math.inf)}
    for names, (low, high) in limits.items():
        for name in names.split():
            value = getattr(cfg, name)
            if value is not None and not low <= value <= high:
                wrong = f'not between {low} and {high}' if high < math.inf else f'less than {low}'
                raise InputError(f'{name}: {value} is {wrong}')
    if cfg.init_from == 'scratch' and cfg.n_embd % cfg.n_head:
        raise InputError(f'n_head: {cfg.n_head} does not divide n_embd {cfg.n_embd}')
    if cfg.max_prompt_length >= cfg.max_length:
        raise InputError(f'max_prompt_length: {cfg.max_prompt_length} leaves no room for a response '
                         f'in max_length {cfg.max_length}')
    if {'max_iters', 'epochs'} <= cfg.given and cfg.max_iters:
        raise InputError('max_iters, epochs: give one of the two')
    if cfg.loss == 'robust_dpo' and cfg.label_smoothing == 0.5:
        raise InputError('label_smoothing: 0.5 says that labels are noise; robust_dpo divides by 1 - 2 * 0.5')
    if cfg.schedule == 'constant' and 'min_lr' in cfg.given:
        raise InputError("min_lr: ignored with schedule = 'constant'")
    ignored = set(OPTIONS) - set(loss_parameters(cfg.loss))
    ignored |= {'reference', 'reference_from'} if not needs_reference(cfg.loss) else set()
    ignored |= {'eval_samples'} if cfg.loss == 'reward' else set()
    ignored |= {'n_layer', 'n_head', 'n_embd', 'block_size'} if cfg.init_from != 'scratch' else set()
    for name in sorted(ignored & cfg.given):
        if getattr(cfg, name) is not None:
            by = 'init_from' if name in ('n_layer', 'n_head', 'n_embd', 'block_size') else 'loss'
            raise InputError(f'{name}: ignored with {by} = {getattr(cfg, by)!r}')
    if cfg.rounds:
        if not cfg.judge or cfg.loss in ('sft', 'reward'):
            raise InputError('rounds: need a judge, and an objective that compares responses')
        if cfg.completions > 2 and cfg.loss != 'plackett_luce' and cfg.labels != 'soft':
            raise InputError(f'completions: {cfg.completions} make rankings; {cfg.loss!r} compares two')
    for name in sorted({'judge', 'labels', 'completions', 'round_pairs'} & cfg.given):
        if not cfg.rounds:
            raise InputError(f'{name}: ignored with rounds = 0')


def config_of(path):
    """The Config of a checkpoint's run; what only another version of this program has is left out."""
    cfg, config = Config(), load_checkpoint(path)['config']
    for name in vars(cfg).keys() & config.keys():
        setattr(cfg, name, parse_value(cfg, name, config[name], path))
    return cfg


def needs_reference(loss):
    return any(name.startswith('reference') for name in loss_parameters(loss))


def objective(cfg, logps, lengths, reference_logps, p, margin=None):
    """The config's loss on summed log-probs (a reward model: scores) (B, K), lengths (B, K), the reference's
    log-probs (B, K) or None, p (B,), margin (B,). -> (losses, chosen_rewards, rejected_rewards), each (B,)

    It gets what its signature names: log-probs, lengths, and its options where the config sets them.
    """
    given = dict(policy_chosen_logps=logps[:, 0], policy_rejected_logps=logps[:, -1],
                 chosen_lengths=lengths[:, 0], rejected_lengths=lengths[:, -1], p=p, policy_logps=logps,
                 chosen_scores=logps[:, 0], rejected_scores=logps[:, -1], margin=margin)
    given |= {name: getattr(cfg, name) for name in OPTIONS}
    if reference_logps is not None:
        given |= dict(reference_logps=reference_logps, reference_chosen_logps=reference_logps[:, 0],
                      reference_rejected_logps=reference_logps[:, -1])
    names = loss_parameters(cfg.loss)
    return LOSSES[cfg.loss](**{k: v for k, v in given.items() if k in names and v is not None})


# ------------------------------------------------------------------------------------------------------------
# The data of a step


@functools.lru_cache(maxsize=2)
def permutation(n, seed, epoch):
    return np.random.default_rng([seed, epoch]).permutation(n)


def step_indices(step, n, batch_size, seed):
    """The pairs of a step: a slice of the epochs' permutations end to end, so there is no state to resume."""
    at = np.arange(step * batch_size, (step + 1) * batch_size)
    return np.array([permutation(n, seed, int(i) // n)[int(i) % n] for i in at])


def micro_batches(sizes, tokens_per_batch):
    """Sizes in tokens -> lists of positions, each within tokens_per_batch: first fit, longest first."""
    bins = []                                              # [tokens, positions]
    for i in np.argsort(-np.asarray(sizes), kind='stable').tolist():
        b = next((b for b in bins if b[0] + sizes[i] <= tokens_per_batch), None)
        if b is None:
            bins.append(b := [0, []])
        b[0] += sizes[i]
        b[1].append(i)
    return [b[1] for b in bins]


def padded(tokens, tokens_per_batch):
    """The size that a micro-batch is filled up to for compiled code: one of four, each compiled once."""
    return next(size for k in (1, 2, 3, 4) if (size := -(-tokens_per_batch * k // 4)) >= tokens)


def batches(pairs, indices, K, cfg):
    """The pairs at `indices`, with their first K responses, as packed batches on the device: yields
    (positions in `indices`, Batch). Where compiled for a GPU they are padded to one of four shapes."""
    drawn = [(prompt, responses[:K]) for prompt, responses in (pairs[i] for i in indices)]
    sizes = [len(prompt) + sum(map(len, responses)) for prompt, responses in drawn]
    fixed = cfg.compile and cfg.device == 'cuda'
    for members in micro_batches(sizes, cfg.tokens_per_batch):
        pad_to = padded(sum(sizes[i] for i in members), cfg.tokens_per_batch) if fixed else 0
        batch = pack([drawn[i] for i in members], pad_to).to(cfg.device)
        batch.mask = block_mask(batch) if fixed else None
        yield members, batch


# ------------------------------------------------------------------------------------------------------------
# Several processes: torchrun --nproc_per_node=N train.py ...  Each takes every N-th pair; sums are exchanged.

RANK, WORLD = int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))


def add_up(tensor):
    """The sum of a tensor over all processes, in place."""
    if WORLD > 1:
        with others():
            dist.all_reduce(tensor)
    return tensor


def wait():
    if WORLD > 1:
        with others():
            dist.barrier()


@contextlib.contextmanager
def others():
    """Where the other processes are needed: one that has ended ends this one too, with a line saying so."""
    try:
        yield
    except RuntimeError as e:
        raise InputError(f'process {RANK} of {WORLD}: another one has ended, or is out of reach '
                         f'({first_line(e)})')


def say(text):
    if RANK == 0:
        tqdm.write(text)


# ------------------------------------------------------------------------------------------------------------
# Scoring, and the reference


def precision(cfg):
    return torch.autocast(cfg.device, dtype=torch.bfloat16, enabled=cfg.dtype == 'bfloat16')


@torch.no_grad()
def score(model, pairs, indices, K, cfg, what='scoring'):
    """log pi(y|x) of the first K responses of the pairs at `indices`: (n, K) float32, on the host."""
    out = torch.zeros(len(indices), K, device=cfg.device)
    mine = np.arange(RANK, len(indices), WORLD)
    with tqdm(total=len(mine), desc=what, unit=' pairs', leave=False,
              disable=None if RANK == 0 else True) as bar:
        for start in range(0, len(mine), 256):             # so many at a time are sorted into full batches
            some = mine[start:start + 256]
            for members, batch in batches(pairs, indices[some], K, cfg):
                with precision(cfg):
                    out[some[members]] = model.score_responses(batch)
                bar.update(len(members))
    return add_up(out).cpu().numpy()


def fingerprint(model):
    """A hash of a model's weights."""
    h = hashlib.sha256()
    for name, t in model.state_dict().items():
        h.update(name.encode())
        h.update(t.cpu().contiguous().numpy())
    return h.hexdigest()


def cached_reference(model, weights, pairs, indices, cfg):
    """The reference's log-probs of the pairs at `indices`, computed where the cache lacks them: an (n, K)
    array, mapped from a file beside the data. Zero means not computed yet: a log-prob is below it. The key
    holds all that the numbers depend on, to the last bit; a sweep over beta or the rate pays once."""
    K, n, indices = pairs.meta['responses'], len(pairs), np.unique(indices)
    inputs = [weights, pairs.hash, cfg.dtype, cfg.device, cfg.compile, cfg.tokens_per_batch, WORLD]
    key = hashlib.sha256(json.dumps(inputs).encode() + indices.tobytes()).hexdigest()[:12]
    path = os.path.join(pairs.folder, f'{pairs.split}-reference-{key}.f32')
    try:
        with open(path, 'ab') as f:                        # zeros that are on the disk: to find it full at a
            while (more := n * K * 4 - f.tell()) > 0:      # mapped page, later, would end the process, mute
                f.write(bytes(min(more, 2**20)))
            f.truncate(n * K * 4)
        table = np.memmap(path, dtype='<f4', mode='r+', shape=(n, K))
    except OSError as e:
        raise InputError(f'{path}: cannot be written ({first_line(e)}); --reference=live needs no file')
    for start in range(0, len(indices), 4096):             # what an interruption can lose
        some = indices[start:start + 4096]
        whole_block = bool((np.isfinite(table[some]) & (table[some] < 0)).all())
        if add_up(torch.tensor(float(not whole_block), device=cfg.device)) > 0:    # as any process sees it
            logps = score(model, pairs, some, K, cfg, f'reference, {pairs.split}')
            if RANK == 0:
                table[some] = logps
                table.flush()
    wait()
    return table


# ------------------------------------------------------------------------------------------------------------
# Evaluation

STATS = ('loss', 'rewards/chosen', 'rewards/rejected', 'rewards/margins', 'rewards/accuracies',
         'logps/chosen', 'logps/rejected')


def statistics(losses, chosen_rewards, rejected_rewards, logps):
    """Sums over the pairs of what STATS names, (7,) float64; an objective without rewards leaves zeros."""
    zero = torch.zeros_like(losses)
    c, r = (zero, zero) if chosen_rewards is None else (chosen_rewards, rejected_rewards)
    accuracy = (c > r).float() + 0.5 * (c == r).float()    # a tie counts one half
    rows = (losses, c, r, c - r, accuracy, logps[:, 0], logps[:, -1])
    return torch.stack([row.detach().double().sum() for row in rows])


def named(stats, n, cfg, K, prefix=''):
    """Sums over n pairs -> {metric: mean}, without those that this objective or this data does not have."""
    means = dict(zip(STATS, (stats / n).tolist()))
    return {prefix + name: mean for name, mean in means.items()
            if not (cfg.loss == 'sft' and 'rewards' in name) and not (K == 1 and 'rejected' in name)
            and not (cfg.loss == 'reward' and 'logps' in name)}


def named_pairs(pairs, indices):
    return ('Their numbers in the source, from 0, as in eval.jsonl: '
            + ', '.join(map(str, pairs.table['id'][indices].tolist())))


def evaluate(model, reference, pairs, indices, cfg, path=None):
    """Metrics of the validation pairs at `indices`; with a path, also a line for each pair there."""
    K = pairs.meta['responses']
    logps, ref = torch.from_numpy(score(model, pairs, indices, K, cfg, 'evaluating')), None
    if reference is not None:                              # a live model, or the table of what it once said
        cached = isinstance(reference, np.ndarray)
        ref = reference[indices] if cached else score(reference, pairs, indices, K, cfg)
        ref = torch.from_numpy(np.array(ref))
    rows = pairs.table[indices]
    lengths, p = torch.from_numpy(rows['responses'].astype(np.int64)), torch.from_numpy(rows['p'].copy())
    losses, *rewards = objective(cfg, logps, lengths, ref, p, torch.from_numpy(rows['margin'].copy()))
    if not losses.isfinite().all():
        bad = indices[~losses.isfinite().numpy()]
        raise InputError(f'evaluation: the loss of {len(bad)} pairs is not finite; a checkpoint, if there is '
                         f'one, is from before. {named_pairs(pairs, bad)}')
    if path and RANK == 0:
        columns = dict(id=rows['id'])
        for k, side in ((0, 'chosen'), (-1, 'rejected'))[:min(K, 2)]:
            columns |= {f'{side}_logps': None if cfg.loss == 'reward' else logps[:, k],
                        f'reference_{side}_logps': None if ref is None else ref[:, k],
                        f'{side}_length': lengths[:, k], f'{side}_reward': rewards[k]}
        columns = {name: [None] * len(rows) if c is None else c.tolist() for name, c in columns.items()}
        with whole(path) as f:
            f.writelines(json.dumps(dict(zip(columns, row))) + '\n' for row in zip(*columns.values()))
    return named(statistics(losses, *rewards, logps), len(rows), cfg, K, 'eval/')


@torch.no_grad()
def on_policy(model, reference, pairs, indices, cfg, path):
    """What the policy itself says to the validation prompts at `indices`, a response to each, into a file; ->
    KL(pi||pi_ref), the mean of log pi/pi_ref over them, in nats a response, and their mean length in tokens.
    """
    prompts = [pairs[i][0].tolist() for i in indices]
    room = min(pairs.meta['settings']['max_length'], model.config.block_size) - max(map(len, prompts))
    responses = model.generate(prompts, room, seed=cfg.seed)
    drawn = [(prompt, [response]) for prompt, response in zip(prompts, responses)]
    logps, ref = (score(m, drawn, np.arange(len(drawn)), 1, cfg) for m in (model, reference))
    decode = get_tokenizer(cfg.tokenizer).decode
    if RANK == 0:
        with whole(path) as f:
            for i, prompt, response in zip(pairs.table['id'][indices].tolist(), prompts, responses):
                line = dict(id=i, prompt=decode(prompt), response=decode(response), tokens=len(response))
                f.write(json.dumps(line) + '\n')
    return {'eval/kl': float((logps - ref).mean()), 'eval/length': float(np.mean([*map(len, responses)]))}


def both_fall(first, now):
    """Have the chosen and the rejected responses both become less likely, by more than a nat each?"""
    sides = ('eval/logps/chosen', 'eval/logps/rejected')
    falls = [now[k] - first[k] for k in sides if k in now and k in first]
    return len(falls) == 2 and max(falls) < -1


def table(metrics, before):
    """Metrics as lines of text, beside what they were at the start."""
    return '\n'.join([f'{"":24}{"before":>10}{"after":>10}'] + [
        f'{name:24}{before.get(name, math.nan):>10.4f}{value:>10.4f}' for name, value in metrics.items()])


# ------------------------------------------------------------------------------------------------------------
# Checkpoints and the run's folder


@contextlib.contextmanager
def whole(path, mode='w'):
    """A file to write. Whatever happens on the way, `path` is a whole one: the old or the new."""
    try:
        with open(path + '.tmp', mode, encoding=None if 'b' in mode else 'utf-8') as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(path + '.tmp', path)
    except BaseException as e:
        with contextlib.suppress(OSError):
            os.remove(path + '.tmp')
        if not isinstance(e, (OSError, RuntimeError)):     # torch.save has both for a disk that is full,
            raise                                          # and the second tells less
        e = e.__context__ if isinstance(e.__context__, OSError) else e
        raise InputError(f'{path}: could not be written ({first_line(e)}); '
                         'the one before, if any, is as it was')


def lock(out_dir):
    """Hold out_dir until this process ends, however it ends. -> the open file, to be kept"""
    try:
        os.makedirs(out_dir, exist_ok=True)
        f = open(os.path.join(out_dir, 'lock'), 'ab+', buffering=0)
        fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        f.truncate(0)
        f.write(str(os.getpid()).encode())
        return f
    except BlockingIOError:
        f.seek(0)
        holder = f.read(20).decode(errors='replace').strip()
        raise InputError(f'out_dir: {out_dir} is in use by another run (process {holder})')
    except OSError as e:
        raise InputError(f'out_dir: {out_dir} cannot be written ({e.strerror})')


def header(cfg, weights, data):
    """The first line of log.jsonl: all that it takes to repeat the run, `weights` and `data` as hashes."""
    def git(*args):
        where = os.path.dirname(os.path.abspath(__file__))
        try:
            return subprocess.run(['git', '-C', where, *args], capture_output=True, text=True).stdout.strip()
        except OSError:                                    # a machine without git
            return ''
    commit = git('rev-parse', '--short', 'HEAD')
    commit += '+changes' if git('status', '--porcelain', '--untracked-files=no') else ''
    cpu = f'{platform.machine()} CPU, {torch.get_num_threads()} threads'
    return dict(config=dataclasses.asdict(cfg), commit=commit, weights=weights, data=data,
                hardware=torch.cuda.get_device_name() if cfg.device == 'cuda' else cpu, processes=WORLD,
                versions=dict(python=platform.python_version(), torch=torch.__version__,
                              numpy=np.__version__))


# ------------------------------------------------------------------------------------------------------------
# The loop


def learning_rate(step, cfg):
    """Linear warm-up to cfg.learning_rate, then the schedule, down to min_lr at max_iters."""
    if step < cfg.warmup_iters:
        return cfg.learning_rate * (step + 1) / (cfg.warmup_iters + 1)
    done = (step - cfg.warmup_iters) / max(1, cfg.max_iters - cfg.warmup_iters)
    left = {'cosine': 0.5 * (1 + math.cos(math.pi * done)), 'linear': 1 - done, 'constant': 1.0}[cfg.schedule]
    return cfg.min_lr + left * (cfg.learning_rate - cfg.min_lr)


def settle_machine(cfg):
    """Replace 'auto' by what this machine has, and keep its memory allocator from giving pages back."""
    if cfg.device == 'auto':
        cfg.device = 'cuda' if torch.cuda.is_available() else 'cpu'
    if cfg.device not in ('cuda', 'cpu') or (cfg.device == 'cuda' and not torch.cuda.is_available()):
        raise InputError(f'device: {cfg.device!r} is not to be had here; cpu is')
    if cfg.dtype == 'auto':
        cfg.dtype = 'bfloat16' if cfg.device == 'cuda' and not cfg.eval_only else 'float32'
    cfg.compile = cfg.device == 'cuda' if cfg.compile is None else cfg.compile
    cfg.tokens_per_batch = cfg.tokens_per_batch or (16384 if cfg.device == 'cuda' else 2048)
    if WORLD > 1 and not dist.is_initialized():
        if cfg.device == 'cuda':
            torch.cuda.set_device(int(os.environ['LOCAL_RANK']))
        dist.init_process_group('nccl' if cfg.device == 'cuda' else 'gloo')
    if cfg.device == 'cpu':
        with contextlib.suppress(OSError, AttributeError):    # glibc: keep freed memory, no new page faults
            for option in (-1, -3):                           # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
                ctypes.CDLL(None).mallopt(option, 2**30)
        # oneDNN keeps what it compiled for a thousand shapes, a megabyte each, and every step has new ones
        for name in ('LRU_CACHE_CAPACITY', 'ONEDNN_PRIMITIVE_CACHE_CAPACITY'):
            os.environ.setdefault(name, '64')


def settle_products(model):
    """Make float32 products on a CPU fast where that costs nothing. 'medium' lets oneDNN multiply: twice as
    fast for wide models on some CPUs, but it compiles a kernel for every new shape, which costs narrow ones
    half their speed; and on others it multiplies in bf16: look before using it."""
    if model.device.type == 'cpu':
        a, b = torch.randn(2, 256, 256, generator=torch.Generator().manual_seed(0))
        torch.set_float32_matmul_precision('medium' if model.config.n_embd >= 256 else 'highest')
        if (a @ b - (a.double() @ b.double())).abs().max() > 1e-4:
            torch.set_float32_matmul_precision('highest')


def load_policy(cfg):
    """The policy at the start, on cfg.device; made by init_config first where it is not there yet."""
    kind = reward.RewardModel if cfg.loss == 'reward' else GPT
    if cfg.init_from == 'scratch':
        tokenizer = get_tokenizer(cfg.tokenizer)
        torch.manual_seed(cfg.seed)
        return kind(GPTConfig(cfg.block_size, tokenizer.n_vocab, cfg.n_layer, cfg.n_head, cfg.n_embd,
                             tokenizer.eot_token)).to(cfg.device)
    if cfg.init_config:
        beside = os.path.join(os.path.dirname(os.path.abspath(__file__)), cfg.init_config)
        path = cfg.init_config if os.path.exists(cfg.init_config) else beside
        base = load_config([path, f'--data_dir={cfg.data_dir}', f'--device={cfg.device}'])
        path = os.path.join(base.out_dir, 'ckpt.pt')
        if base.out_dir == cfg.init_from:                  # not where another model was asked for
            there = load_checkpoint(path) if os.path.exists(path) else None
            if there is None or there.get('step', 0) < config_of(path).max_iters:
                base.resume = there is not None
                say(f'{cfg.init_from} is {"not whole" if there else "not there"} yet: training it, as '
                    f'{cfg.init_config} says')
                try:
                    train(base)
                except SystemExit:
                    say(f'that was {cfg.init_from}, not {cfg.out_dir} yet: the command as it was goes on')
                    raise
                say(f'{cfg.init_from} is there; now {cfg.out_dir}')
            elif base.max_iters and there.get('step') != base.max_iters:
                say(f'note: {cfg.init_from} was trained for {there["step"]} steps, and '
                    f'{cfg.init_config} says {base.max_iters}')
    return kind.from_pretrained(cfg.init_from).to(cfg.device)


def compile_blocks(model, cfg):
    """Compile all but the head's products, where cfg says so. On a GPU each size of `padded` is compiled by
    itself, with gradients and without; torch's limit of 8 would leave the rest as it was."""
    if cfg.compile:
        torch._dynamo.config.recompile_limit = 32
        model.hidden = torch.compile(model.hidden, dynamic=False if cfg.device == 'cuda' else None)
        model.reduce_logits = torch.compile(model.reduce_logits)


def load_reference(path, cfg):
    """The reference of the run whose checkpoint and Config these are, on cfg.device."""
    name = cfg.reference_from or cfg.init_from
    reference, was = GPT.from_pretrained(name).to(cfg.device), load_checkpoint(path).get('reference')
    if was and was != fingerprint(reference):
        raise InputError(f'{name}: not the reference that {path} was trained with; it has changed since')
    return reference


def check_model(cfg, model, max_length, tokenizer):
    """Raise InputError where the policy's context or vocabulary is not what the data needs."""
    context, vocab = model.config.block_size, model.config.vocab_size
    tokens = get_tokenizer(tokenizer).n_vocab
    if max_length > context:
        raise InputError(f'max_length: {max_length} exceeds the context of {cfg.init_from}, {context}')
    if not tokens <= vocab < tokens + 128:                 # may be padded to a round number
        raise InputError(f'tokenizer: {tokenizer!r} has {tokens} tokens, and {cfg.init_from} was made for '
                         f'{vocab}')


def check_fit(cfg, model, train_pairs, val_pairs):
    """Raise InputError where the config, the prepared data and the model do not go together."""
    meta = train_pairs.meta
    settings, K = meta['settings'], meta['responses']
    for name, value in settings.items():     # data given by the folder that it was prepared in has its own
        if (cfg.dataset != settings['dataset'] and name in cfg.given - {'dataset'}
                and getattr(cfg, name) != value):
            raise InputError(f'{name}: {getattr(cfg, name)!r}, but {cfg.dataset} was prepared with {value!r}')
    check_model(cfg, model, settings['max_length'], settings['tokenizer'])
    if cfg.loss != 'sft' and K != 2 and (K < 2 or cfg.loss != 'plackett_luce'):
        raise InputError(f'dataset: {cfg.dataset} has {K} responses to a prompt; '
                         f'loss = {cfg.loss!r} compares two')
    soft = any((pairs.table['p'] != 1).any() for pairs in (train_pairs, val_pairs))
    if soft and cfg.loss != 'sft' and 'p' not in loss_parameters(cfg.loss):
        raise InputError(f'dataset: {cfg.dataset} has labels p other than 1, '
                         f'and loss = {cfg.loss!r} ignores them')
    if cfg.loss != 'reward' and any((pairs.table['margin'] != 0).any() for pairs in (train_pairs, val_pairs)):
        raise InputError(f'dataset: {cfg.dataset} has margins, and loss = {cfg.loss!r} ignores them')
    if meta['longest_pair'] > cfg.tokens_per_batch:
        raise InputError(f'tokens_per_batch: {cfg.tokens_per_batch} is less than the longest pair, '
                         f'{meta["longest_pair"]} tokens')
    if cfg.batch_size < WORLD:
        raise InputError(f'batch_size: {cfg.batch_size} leaves some of the {WORLD} processes without a pair')
    if cfg.eval_only and not len(val_pairs):
        raise InputError(f'val_fraction: {cfg.val_fraction} leaves no pair to evaluate')
    if not cfg.eval_only and not len(train_pairs):
        raise InputError(f'val_fraction: {cfg.val_fraction} leaves no pair to train on')


def train(cfg):
    """Run the config from its first line to its last table. -> the metrics of the last evaluation"""
    started = time.perf_counter()
    settle_machine(cfg)
    ckpt, best_ckpt, log_path, eval_path, samples_path = (os.path.join(cfg.out_dir, name) for name in (
        'ckpt.pt', 'best.pt', 'log.jsonl', 'eval.jsonl', 'samples.jsonl'))
    if os.path.exists(ckpt) and not (cfg.resume or cfg.overwrite or cfg.eval_only):
        raise InputError(f'out_dir: {cfg.out_dir} holds a run; --resume=True goes on with it, '
                         '--overwrite=True starts anew')
    if cfg.resume and not os.path.exists(ckpt):
        raise InputError(f'resume: there is no {ckpt}')
    if cfg.eval_only:                                      # the run that is there, else init_from
        cfg.resume = os.path.exists(ckpt)

    # the policy and the pairs
    model = load_policy(cfg)
    settle_products(model)
    prepared = os.path.exists(os.path.join(cfg.dataset, 'meta.json'))
    if not prepared:
        check_model(cfg, model, cfg.max_length, cfg.tokenizer)
    if RANK > 0:
        wait()                                             # the first process prepares, the others find it
    folder = prepare(cfg)
    if RANK == 0:
        wait()
    train_pairs, val_pairs = Pairs(folder, 'train'), Pairs(folder, 'val')
    check_fit(cfg, model, train_pairs, val_pairs)
    model.config.eos_token_id = train_pairs.meta['eos']    # what responses end with from now on
    for name, value in train_pairs.meta['settings'].items():
        if name != 'dataset':                              # as prepared, where that was done before
            setattr(cfg, name, value)
    n, K = len(train_pairs), train_pairs.meta['responses']
    used = 1 if cfg.loss == 'sft' else K                   # the responses that training looks at
    cfg.max_iters = cfg.max_iters or math.ceil(cfg.epochs * n / cfg.batch_size)
    val = np.arange(len(val_pairs))
    if 0 < cfg.eval_pairs < len(val):
        val = np.sort(np.random.default_rng(cfg.seed).permutation(len(val))[:cfg.eval_pairs])
    held = lock(cfg.out_dir) if RANK == 0 else None
    if RANK == 0 and os.path.exists(ckpt) and not (cfg.resume or cfg.overwrite or cfg.eval_only):
        raise InputError(f'out_dir: {cfg.out_dir} holds a run, finished just now')
    first = model                                          # the reference: what the run starts from
    if cfg.reference_from:
        first = GPT.from_pretrained(cfg.reference_from).to(cfg.device).requires_grad_(False)
        check_model(dataclasses.replace(cfg, init_from=cfg.reference_from), first,
                    train_pairs.meta['settings']['max_length'], train_pairs.meta['settings']['tokenizer'])
    weights, data = fingerprint(model), dict(train=train_pairs.hash, val=val_pairs.hash)
    base = '' if not needs_reference(cfg.loss) else weights if first is model else fingerprint(first)

    # where the run stands
    state = dict(step=0, best=math.inf, evaluated=-1, log_bytes=0, first={}, metrics={}, warned=False)
    checkpoint = load_checkpoint(ckpt) if cfg.resume else None
    if cfg.resume:
        if not checkpoint.keys() >= {*state, 'optimizer', 'data', 'reference'} or any(
                type(checkpoint[name]) is not type(value)
                for name, value in dict(state, data=data, reference=base).items()) or not all(
                type(x) is float for name in ('first', 'metrics') for x in checkpoint[name].values()):
            raise InputError(f'{ckpt}: not a whole checkpoint, but weights alone')
        if checkpoint['model_config'] != dataclasses.asdict(model.config):
            raise InputError(f'{ckpt}: a model of another shape than {cfg.init_from}')
        if checkpoint['data'] != data and not cfg.eval_only:
            raise InputError(f'dataset: {folder} is not the data that {ckpt} was trained on')
        was = checkpoint['config'].get('loss')
        if was != cfg.loss and not cfg.eval_only:
            raise InputError(f'loss: {cfg.loss!r}, and {ckpt} was trained with {was!r}')
        if checkpoint['reference'] != base and was == cfg.loss:
            raise InputError(f'init_from: {cfg.reference_from or cfg.init_from} is not the reference that '
                             f'{ckpt} was trained with')
        if not cfg.eval_only and cfg.max_iters < checkpoint['step']:
            raise InputError(f'max_iters: {cfg.max_iters}, and {ckpt} has done {checkpoint["step"]} steps')
        if not cfg.eval_only and not os.path.exists(log_path):
            raise InputError(f'{log_path}: missing, and resume goes on with it')
        if not cfg.eval_only and os.path.getsize(log_path) < checkpoint['log_bytes']:
            raise InputError(f'{log_path}: shorter than when {ckpt} was written, and resume goes on with it')
        state, changed = {name: checkpoint[name] for name in state}, {}
        for name, was in checkpoint['config'].items():
            known = name in vars(cfg) and name not in ('resume', 'overwrite')
            if not cfg.eval_only and known and was != getattr(cfg, name):
                changed |= {name: getattr(cfg, name)} if name not in ('out_dir', 'data_dir') else {}
                say(f'resuming with {name} = {getattr(cfg, name)!r}, which was {was!r}')

    # the reference: frozen, and its log-probs known before the first step
    frozen = first                                         # a model apart, where it stays beside the policy
    if first is model and (cfg.reference == 'live' or cfg.eval_samples):
        frozen = copy.deepcopy(model).requires_grad_(False)
    reference = frozen if cfg.reference == 'live' else None
    compared = frozen if cfg.eval_samples else None        # what the policy's own samples are compared with
    compile_blocks(model, cfg)                             # not before: a copy would call the policy's code
    if frozen is not model:
        compile_blocks(frozen, cfg)
    reference_train = reference_val = reference
    if needs_reference(cfg.loss) and reference is None:
        if not cfg.eval_only:
            seen = np.arange(n) if cfg.max_iters * cfg.batch_size >= n else np.concatenate(
                [step_indices(s, n, cfg.batch_size, cfg.seed) for s in range(cfg.max_iters)])
            reference_train = cached_reference(frozen, base, train_pairs, seen, cfg)
        reference_val = cached_reference(frozen, base, val_pairs, val, cfg) if len(val) else None
    del first, frozen
    gc.collect()                                           # a compiled model refers to itself

    optimizer = torch.optim.AdamW(
        [dict(params=[p for p in model.parameters() if p.dim() > 1], weight_decay=cfg.weight_decay),
         dict(params=[p for p in model.parameters() if p.dim() == 1], weight_decay=0.0)],
        lr=cfg.learning_rate, betas=(cfg.beta1, cfg.beta2), fused=True)
    if cfg.resume:
        try:
            model.load_state_dict(checkpoint['model'])
            optimizer.load_state_dict(checkpoint['optimizer'])
        except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as e:
            raise InputError(f'{ckpt}: does not fit the model ({" ".join(str(e).split())[:200]})')
        del checkpoint

    if cfg.eval_only:
        metrics = evaluate(model, reference_val, val_pairs, val, cfg, eval_path)
        if cfg.eval_samples:
            metrics |= on_policy(model, compared, val_pairs, val[:cfg.eval_samples], cfg, samples_path)
        say(f'{ckpt if cfg.resume else cfg.init_from} on {len(val)} validation pairs -> {eval_path}')
        say('\n'.join(f'{name:24}{value:>10.4f}' for name, value in metrics.items()))
        return metrics

    if RANK == 0:
        if not cfg.resume and os.path.exists(ckpt):
            say(f'overwriting the run in {cfg.out_dir}')
        unwanted = [f'{path}.tmp' for path in (ckpt, best_ckpt, eval_path)]   # of a run that was killed
        unwanted += [] if cfg.resume else [ckpt, best_ckpt, eval_path]        # of a run that is overwritten
        try:
            for path in filter(os.path.exists, unwanted):
                os.remove(path)
            log = open(log_path, 'r+b' if cfg.resume else 'wb', buffering=0)
            log.seek(state['log_bytes'])
            log.truncate()                                 # lines after the checkpoint will be written again
        except OSError as e:
            raise InputError(f'out_dir: {cfg.out_dir} cannot be written ({first_line(e)})')

    def write_log(line):
        if RANK == 0:
            line = (json.dumps(line) + '\n').encode()
            try:
                while line:                                # a disk that fills up may take a part of it
                    line = line[log.write(line):]
            except OSError as e:
                raise InputError(f'{log_path}: could not be written ({first_line(e)}); --resume=True goes on '
                                 f'from the last checkpoint')

    def save_checkpoint(improved=False):
        for pairs in (train_pairs, val_pairs):
            pairs.check_unchanged()
        if not all(p.isfinite().all() for p in model.parameters()):
            raise InputError(f'step {state["step"]}: the weights are no longer finite; {ckpt} is from before')
        if RANK == 0:
            content = dict(model=model.state_dict(), model_config=dataclasses.asdict(model.config),
                           config=dataclasses.asdict(cfg))
            os.fsync(log.fileno())
            state['log_bytes'] = log.tell()
            if improved:                                   # first: killed in between, the step is done again
                with whole(best_ckpt, 'wb') as f:
                    torch.save(content | dict(step=state['step']), f)
            with whole(ckpt, 'wb') as f:
                torch.save(content | state | dict(optimizer=optimizer.state_dict(), data=data,
                                                  reference=base), f)

    def load_step(step):
        """The step's micro-batches, with reference log-probs and labels, on their way to the device."""
        ready = []
        if step < cfg.max_iters:
            mine = step_indices(step, n, cfg.batch_size, cfg.seed)[RANK::WORLD]
            for members, batch in batches(train_pairs, mine, used, cfg):
                some = mine[members]
                labels = [send(train_pairs.table[label][some], cfg.device) for label in ('p', 'margin')]
                cached = isinstance(reference_train, np.ndarray)
                ref = send(reference_train[some], cfg.device) if cached else None
                ready.append((some, batch, ref, labels))
        return ready

    stop = []                                              # a signal that came: the step is finished first

    def finish_step(number, frame):
        stop.append(number)
        signal.signal(number, handlers[number])            # a second one does not wait

    handlers = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)}
    for s in handlers:
        signal.signal(s, finish_step)
    if not cfg.resume:
        write_log(header(cfg, weights, data))
    elif changed:
        write_log(dict(resumed_at=state['step'], changed=changed))
    told = {name: p.default if getattr(cfg, name, None) is None else getattr(cfg, name)
            for name, p in loss_parameters(cfg.loss).items() if name in OPTIONS}
    say(', '.join([f'loss {cfg.loss}', *(f'{name} {value}' for name, value in told.items())]))
    if not len(val):
        say(f'note: no validation pairs (val_fraction {cfg.val_fraction}), so there is nothing to evaluate')
    if cfg.max_iters <= cfg.warmup_iters:
        say(f'note: all {cfg.max_iters} steps are warm-up (warmup_iters {cfg.warmup_iters}): the learning '
            f'rate does not come to {cfg.learning_rate:g}')
    say(f'{model.num_params():,} parameters; {n:,} pairs to train on, {len(val):,} to validate; '
        f'{cfg.max_iters} steps of {cfg.batch_size} pairs on {cfg.device} in {cfg.dtype}')
    bar = tqdm(total=cfg.max_iters, initial=state['step'], unit=' steps', disable=None if RANK == 0 else True)
    waiting, fresh = load_step(state['step']), True
    since, pairs_since, tokens_since = time.perf_counter(), 0, 0
    while True:
        step = state['step']

        # evaluate, and make safe what there is
        if (step % cfg.eval_interval == 0 or step == cfg.max_iters) and step != state['evaluated']:
            paused, loss = time.perf_counter(), math.inf
            if cfg.loss == 'reward':                       # mean zero over the data, in the end all of it
                some = np.arange(n if step == cfg.max_iters else min(n, 256))
                model.mean += float(score(model, train_pairs, some, K, cfg).mean())
            if len(val):
                metrics = evaluate(model, reference_val, val_pairs, val, cfg,
                                   eval_path if step == cfg.max_iters else None)
                if cfg.eval_samples:
                    some = val[:cfg.eval_samples]
                    metrics |= on_policy(model, compared, val_pairs, some, cfg, samples_path)
                write_log(dict(step=step) | metrics)
                shown = ', '.join(f'{k.removeprefix("eval/")} {v:.4f}' for k, v in metrics.items())
                say(f'step {step}: {shown}')
                state['first'], state['metrics'] = state['first'] or metrics, metrics
                loss = metrics['eval/loss']
                if both_fall(state['first'], metrics) and not state['warned']:
                    state['warned'] = True
                    fall = state['first']['eval/logps/chosen'] - metrics['eval/logps/chosen']
                    say(f'warning: the chosen responses have become less likely too, by {fall:.1f} nats: '
                        'what both lose goes to responses that are in no pair. A larger beta, a smaller '
                        'learning rate or fewer steps hold it back')
            improved, state['evaluated'] = loss < state['best'], step
            state['best'] = min(state['best'], loss)
            save_checkpoint(improved)
            since += time.perf_counter() - paused          # the rates leave evaluation out
        halt = len(stop) if WORLD == 1 else int(add_up(torch.tensor(len(stop), device=cfg.device)))
        if step == cfg.max_iters or halt:                  # all of them, or none
            break

        # forward and backward, a micro-batch at a time: the gradient of the mean over all the step's pairs
        stats, each = torch.zeros(len(STATS), dtype=torch.float64, device=cfg.device), []
        for some, batch, ref, labels in waiting:
            with precision(cfg):
                logps = model.score_responses(batch)                                # (pairs, used)
                if reference_train is reference and reference is not None:
                    with torch.no_grad():
                        ref = reference.score_responses(batch)
            losses, chosen_rewards, rejected_rewards = objective(cfg, logps, batch.lengths, ref, *labels)
            (losses.sum() / cfg.batch_size).backward()
            stats += statistics(losses, chosen_rewards, rejected_rewards, logps)
            each.append((some, losses.detach()))
            tokens_since += batch.starts[-1] * WORLD
        for p in model.parameters() if WORLD > 1 else ():
            add_up(p.grad) if p.grad is not None else None
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip or math.inf)
        waiting = load_step(step + 1)                      # packed on the host while the device works
        add_up(stats)

        # nothing that is not a number reaches the weights
        loss, grad_norm = stats[0].item() / cfg.batch_size, grad_norm.item()
        if not math.isfinite(loss) or not math.isfinite(grad_norm):
            culprits = np.concatenate([some[~losses.isfinite().cpu().numpy()] for some, losses in each])
            if not len(culprits):                          # the gradient alone: any of them
                culprits = np.concatenate([some for some, _ in each])
            raise InputError(f'step {step}: loss {loss}, gradient norm {grad_norm}; nothing was changed, and '
                             f'{ckpt} is from before. {named_pairs(train_pairs, culprits)}')
        lr = learning_rate(step, cfg)
        for group in optimizer.param_groups:
            group['lr'] = lr
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        state['step'] += 1
        pairs_since += cfg.batch_size
        bar.update()

        if fresh:
            now = time.perf_counter()
            say(f'first step after {now - started:.1f} s, {now - since:.1f} s of them the step itself'
                + ' and compiling' * bool(cfg.compile))
            fresh = False
        if step % cfg.log_interval == 0:
            seconds = time.perf_counter() - since
            line = named(stats, cfg.batch_size, cfg, used) | dict(grad_norm=grad_norm, lr=lr)
            write_log(dict(step=step) | line | dict(pairs_per_s=pairs_since / seconds,
                                                    tokens_per_s=tokens_since / seconds))
            bar.set_postfix({k.split('/')[-1]: f'{v:.3f}' for k, v in line.items()
                             if k == 'loss' or 'acc' in k})
            since, pairs_since, tokens_since = time.perf_counter(), 0, 0

    bar.close()
    if halt:
        save_checkpoint()
        say(f'{cfg.out_dir}: stopped after {state["step"]} steps; with --resume=True it goes on')
        raise SystemExit(128 + (stop[0] if stop else signal.SIGTERM))    # or another process got it
    for s, handler in handlers.items():
        signal.signal(s, handler)
    wait()
    if RANK == 0:
        log.close()
        held.close()
    say(f'-> {cfg.out_dir}')
    if state['first']:
        say(table(state['metrics'], state['first']))
    if cfg.dataset == 'demo' and cfg.loss not in ('sft', 'reward') and RANK == 0:
        import demo
        demo.report(model, cfg)
    return state['metrics']


def run(main, doc, argv):
    """A command's frame: help, one line for what the user can mend, and quiet when interrupted."""
    if not argv or {'-h', '--help'} & set(argv):
        raise SystemExit(print(doc.strip()))
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))    # what is half written goes
    try:
        main(argv)
    except BrokenPipeError:                                # what read our output has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    except (InputError, OSError) as e:
        sys.exit(f'error: {e}')
    except torch.OutOfMemoryError as e:
        sys.exit(f'error: out of memory ({first_line(e)}); a smaller --tokens_per_batch needs less')
    except KeyboardInterrupt:
        sys.exit(130)


def main(argv):
    cfg = load_config(argv)
    return reward.train_rounds(cfg) if cfg.rounds else train(cfg)


if __name__ == '__main__':
    import train as this    # by its name, as the others import it: one module, one Config
    run(this.main, __doc__, sys.argv[1:])
