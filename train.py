"""
Train a GPT on preferences: python train.py CONFIG [--name=value ...]

    python train.py config/dpo_demo.py                                   # no download, no GPU
    python train.py config/dpo_gpt2.py --dataset=pairs.jsonl --beta=0.2  # your pairs
    python train.py config/dpo_gpt2.py --resume                          # continue where it stopped
    python train.py config/dpo_gpt2.py --eval_only                       # evaluate: eval.jsonl

Settings are the fields of Config and the options of the objective; a config file is plain Python.
Top to bottom: settings, the data of a step, the reference, evaluation, checkpoints, the loop.
Left out: sharding of a model over GPUs, LoRA, gradient checkpointing.
"""
import contextlib
import copy
import ctypes
import hashlib
import inspect
import json
import math
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

import dpo
import simpo
from configurator import InputError, atomic_write, check_choice, check_least, configure, run
from model import GPT, block_mask, pack
from prepare import NUMBERS, Data, Pairs, prepare, show, source_texts
from sample import find_device, generate
from tokenizer import TOKENIZER_FILES, get_tokenizer
from weights import copy_tokenizer, load, load_checkpoint, make_config, tokenizer_of

# torchrun --nproc_per_node=N train.py ...: process RANK of WORLD takes every WORLD-th pair
RANK, WORLD = int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))


@dataclass
class Config(Data):
    out_dir: str = 'out/run'            # ckpt.pt, best.pt, log.jsonl, eval.jsonl
    init_from: str | dict = 'gpt2'      # the policy at the start: what weights.load takes, or
                                        # fields of GPTConfig for a random one
    reference_from: str = ''            # the reference; empty: the policy at the start
    model_class: type = GPT
    resume: bool = False                # continue from out_dir/ckpt.pt, exactly
    overwrite: bool = False             # replace the run in out_dir
    eval_only: bool = False             # evaluate out_dir's run, or init_from if there is none
    # name x: the function x_loss of dpo.py or simpo.py. Its options (beta, gamma, label_smoothing,
    # ...) are settings, too
    loss: str | Callable = 'dpo'
    reference: str = 'cached'           # its log-probs are computed once; 'live': at every step
    # optimisation
    batch_size: int = 64                # pairs per step
    tokens_per_batch: int = 0           # per micro-batch: bounds the memory, changes nothing else;
                                        # 0: 16384 on cuda, 2048 on a CPU
    learning_rate: float = 1e-6
    schedule: str = 'cosine'            # after the warm-up: cosine or linear to 0, or constant
    warmup_iters: int = 0
    max_iters: int = 0                  # steps; 0: as many as `epochs` takes
    epochs: float = 1.0
    grad_clip: float = 1.0              # norm of the gradient; 0: not clipped
    seed: int = 1337
    # evaluation and logging
    eval_interval: int = 100            # steps between evaluations, each followed by a checkpoint
    eval_samples: int = 0               # responses sampled at an evaluation, into samples.jsonl
    log_interval: int = 10
    at_end: Callable | None = None      # called with (model, cfg) when the run is done
    # the machine
    device: str = ''                    # cuda if available, else cpu
    dtype: str = ''                     # bfloat16 on cuda; float32 on a CPU and under eval_only
    compile: bool | None = None         # torch.compile; None: only on cuda


# --------------------------------------------------------------------------------------------------
# Settings

# What the loop passes to an objective that names it. Its other parameters are its options.
SUPPLIED = ('policy_logps', 'policy_chosen_logps', 'policy_rejected_logps',
            'reference_logps', 'reference_chosen_logps', 'reference_rejected_logps',
            'lengths', 'chosen_lengths', 'rejected_lengths', *NUMBERS)


def find_loss(loss):
    """A name or a function -> the function."""
    names = {name.removesuffix('_loss'): f for module in (dpo, simpo)
             for name, f in vars(module).items() if name.endswith('_loss')}
    if not callable(loss) and loss not in names:
        raise InputError(f'loss: {loss!r} is not one of {", ".join(names)}, nor a function')
    return loss if callable(loss) else names[loss]


def signature_of(cfg):
    return inspect.signature(find_loss(cfg.loss)).parameters


def loss_options(cfg):
    """The objective's options with their defaults."""
    options, empty = {}, inspect.Parameter.empty
    for name, default in ((name, p.default) for name, p in signature_of(cfg).items()):
        is_number = name in NUMBERS and default not in (None, empty)
        if is_number or name in Config.__dataclass_fields__:
            raise InputError(f'loss: its option {name!r} needs another name: this one is taken')
        if name not in SUPPLIED:
            options[name] = default
            if default is empty:
                raise InputError(f'loss: its parameter {name!r} is not supplied and has no default')
    return options


def asks_for(cfg, word):
    """Does the objective take an argument of SUPPLIED with this word in its name?"""
    return any(word in name for name in signature_of(cfg) if name in SUPPLIED)


def compares(cfg):
    """Does the objective use more than the chosen response?"""
    return asks_for(cfg, 'rejected') or 'policy_logps' in signature_of(cfg)


def load_config(argv, cls=Config):
    """[CONFIG] [--name=value ...] -> a Config whose values are in range. Raises InputError."""
    cfg = configure(cls, argv, loss_options)
    check_least(cfg, batch_size=1, eval_interval=1, log_interval=1, epochs=0, max_iters=0,
                warmup_iters=0, learning_rate=0, grad_clip=0, eval_samples=0, tokens_per_batch=0,
                seed=0)
    check_choice(cfg, schedule=('cosine', 'linear', 'constant'), reference=('cached', 'live'),
                 dtype=('', 'float32', 'bfloat16'))
    if cfg.options.get('beta', 1) <= 0:
        raise InputError(f'beta: {cfg.options["beta"]} is not above 0')
    if (cfg.reference_from or cfg.reference == 'live') and not asks_for(cfg, 'reference'):
        raise InputError(f'reference: loss = {cfg.loss!r} has none')
    ones = torch.ones(1, 2)
    try:                                 # an objective may check its options itself
        apply_loss(cfg, -ones, -ones, ones, {name: ones[0, :1] for name in NUMBERS})
    except (TypeError, ValueError) as e:
        raise InputError(f'loss: {e}')
    return cfg


def plain_settings(cfg):
    """All settings as plain values: functions and classes by name."""
    plain = {name: f'{value.__module__}.{value.__qualname__}' if callable(value) else value
             for name, value in asdict(cfg).items()}
    return plain | cfg.options


def setup_machine(cfg):
    """Fill in what depends on the machine: device, dtype, compile, tokens_per_batch."""
    cfg.device = find_device(cfg.device)
    cuda = cfg.device == 'cuda'
    cfg.dtype = cfg.dtype or ('bfloat16' if cuda and not cfg.eval_only else 'float32')
    cfg.compile = cuda if cfg.compile is None else cfg.compile
    cfg.tokens_per_batch = cfg.tokens_per_batch or (16384 if cuda else 2048)
    if WORLD > 1 and not dist.is_initialized():
        if cuda:
            torch.cuda.set_device(int(os.environ['LOCAL_RANK']))
        dist.init_process_group('nccl' if cuda else 'gloo')
    # under bf16, float32 products (the head's, on a CPU) may multiply in bf16 and sum in float32
    torch.set_float32_matmul_precision('medium' if cfg.dtype == 'bfloat16' else 'highest')
    if not cuda and sys.platform == 'linux':
        for option in (-1, -3):          # glibc keeps freed memory: steps 15 to 20% faster
            ctypes.CDLL(None).mallopt(option, 2**30)       # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
        # oneDNN caches a kernel per shape, a megabyte each, and every batch has new shapes
        os.environ.setdefault('ONEDNN_PRIMITIVE_CACHE_CAPACITY', '64')


def check_fit(cfg, model, tokenizer, pairs):
    """Raise InputError where model, data and settings do not fit together."""
    context, vocab, table = model.config.block_size, model.config.vocab_size, pairs.table
    if cfg.max_length > context:
        raise InputError(f'max_length: {cfg.max_length} exceeds the context of {cfg.init_from}, '
                         f'{context} tokens')
    if tokenizer.n_vocab > vocab:
        raise InputError(f'tokenizer: {tokenizer.name} has {tokenizer.n_vocab} tokens, and '
                         f'{cfg.init_from} has {vocab}')
    longest = int((table['prompt'] + table['responses'].sum(1)).max())
    if longest > cfg.tokens_per_batch:
        raise InputError(f'tokens_per_batch: {cfg.tokens_per_batch} is less than the longest pair, '
                         f'{longest} tokens')
    if compares(cfg) and (pairs.K < 2 or pairs.K > 2 and asks_for(cfg, 'rejected')):
        raise InputError(f'dataset: {cfg.dataset} has {pairs.K} response(s) to a prompt; the loss '
                         'compares two')
    for name, default in NUMBERS.items():
        ignored = compares(cfg) and name not in signature_of(cfg)
        if ignored and (table[name] != np.float32(default)).any():
            raise InputError(f'dataset: {cfg.dataset} has {name} other than {default}; the loss '
                             'ignores it')
    if not len(pairs.val if cfg.eval_only else pairs.train):
        raise InputError(f'val_fraction: {cfg.val_fraction} leaves no pair to '
                         + ('evaluate' if cfg.eval_only else 'train on'))
    if cfg.batch_size < WORLD:
        raise InputError(f'batch_size: {cfg.batch_size} is less than the {WORLD} processes')


def say(text):
    if RANK == 0:
        tqdm.write(text)


def barrier():
    if WORLD > 1:
        dist.barrier()


def all_reduce(*tensors):
    """Sum each over all processes, in place."""
    if WORLD > 1:
        for t in tensors:
            dist.all_reduce(t)


def name_tokenizer(cfg):
    """Fill in cfg.tokenizer: the model's own; gpt2 for a random model."""
    if not cfg.tokenizer:
        cfg.tokenizer = 'gpt2' if isinstance(cfg.init_from, dict) else tokenizer_of(cfg.init_from)


def load_run(cfg):
    """The policy at its start, its tokenizer and the prepared pairs, checked against each
    other."""
    name_tokenizer(cfg)
    if isinstance(cfg.init_from, dict):
        torch.manual_seed(cfg.seed)
        vocab = dict(vocab_size=get_tokenizer(cfg.tokenizer).n_vocab)
        model = cfg.model_class(make_config(vocab | cfg.init_from, 'init_from'))
    else:
        model = load(cfg.init_from, cfg.model_class)
    if RANK > 0:
        barrier()                                          # the first process prepares
    pairs, tokenizer = Pairs(prepare(cfg)), get_tokenizer(cfg.tokenizer)
    if RANK == 0:
        barrier()
    check_fit(cfg, model, tokenizer, pairs)
    cfg.max_iters = cfg.max_iters or math.ceil(cfg.epochs * len(pairs.train) / cfg.batch_size)
    size = sum(p.numel() for p in model.parameters())
    say(f'{size:,} parameters; {len(pairs.train):,} pairs to train on, {len(pairs.val):,} to '
        f'validate; {cfg.max_iters} steps of {cfg.batch_size} pairs on '
        f'{cfg.device} in {cfg.dtype}; loss {plain_settings(cfg)["loss"]} {cfg.options or ""}')
    return model.to(cfg.device), tokenizer, pairs


# --------------------------------------------------------------------------------------------------
# The data of a step


def training_order(rows, cfg):
    """The pairs of all steps, end to end. Each epoch is a permutation of `rows` that depends on
    the seed and the epoch's number alone, so there is no state to resume."""
    n = cfg.max_iters * cfg.batch_size
    epochs = range(-(-n // len(rows)))
    order = [np.random.default_rng([cfg.seed, e]).permutation(rows) for e in epochs]
    return np.concatenate([rows[:0], *order])[:n]


def micro_batches(sizes, limit):
    """Sizes in tokens -> lists of indices within `limit` tokens: first fit, longest first."""
    members, totals = [], []
    for i in np.argsort(-np.asarray(sizes), kind='stable').tolist():
        b = next((b for b, total in enumerate(totals) if total + sizes[i] <= limit), len(totals))
        if b == len(totals):
            members.append([])
            totals.append(0)
        members[b].append(i)
        totals[b] += sizes[i]
    return members


def batches(pairs, rows, K, cfg):
    """The pairs at `rows` with their first K responses, packed: yields (rows, Batch)."""
    drawn = [(prompt, responses[:K]) for prompt, responses in (pairs[i] for i in rows)]
    sizes = [len(prompt) + sum(map(len, responses)) for prompt, responses in drawn]
    static = cfg.compile and cfg.device == 'cuda'          # one of four sizes, each compiled once
    quarter = -(-cfg.tokens_per_batch // 4)
    for indices in micro_batches(sizes, cfg.tokens_per_batch):
        pad_to = -(-sum(sizes[i] for i in indices) // quarter) * quarter if static else 0
        batch = pack([drawn[i] for i in indices], pad_to).to(cfg.device)
        batch.mask = block_mask(batch) if static else None
        yield rows[indices], batch


def numbers_of(pairs, rows, device='cpu'):
    return {name: torch.from_numpy(pairs.table[name][rows]).to(device) for name in NUMBERS}


def apply_loss(cfg, logps, reference_logps, lengths, numbers):
    """Call the objective with those of these that its signature names: (B, K) log-probs of the
    policy, of the reference (or None), (B, K) lengths, (B,) numbers. -> (losses, chosen_rewards,
    rejected_rewards), (B,) each
    """
    supplied = dict(numbers)
    for name, x in (('policy_{}logps', logps), ('reference_{}logps', reference_logps),
                    ('{}lengths', lengths)):
        if x is not None:
            supplied |= {name.format(''): x, name.format('chosen_'): x[:, 0],
                         name.format('rejected_'): x[:, -1]}
    arguments = {name: x for name, x in supplied.items() if name in signature_of(cfg)}
    return find_loss(cfg.loss)(**arguments, **cfg.options)


# --------------------------------------------------------------------------------------------------
# The reference: a function (rows, batch) -> log-probs of the batch's response tokens, (N,) float32


def autocast(cfg):
    return torch.autocast(cfg.device, dtype=torch.bfloat16, enabled=cfg.dtype == 'bfloat16')


def no_grad_logps(model, cfg):
    """-> f(rows, batch), which runs the model on the batch without gradients."""
    @torch.no_grad()
    def logps(rows, batch):
        with autocast(cfg):
            return model.token_logps(batch)
    return logps


def cached_logps(model, fingerprint, pairs, rows, cfg):
    """-> f(rows, batch), which looks log-probs up in a file of data_dir, computed here once.

    The file's name is a hash of all that the numbers depend on: weights, tokens, precision and the
    source of the model. What is not computed yet is NaN, so an interruption loses little.
    """
    made_of = [fingerprint, pairs.meta['hash'], cfg.dtype, cfg.device, cfg.compile,
               source_texts(cfg.model_class)]
    key = hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:12]
    path = os.path.join(cfg.data_dir, f'reference-{key}.f32')
    each = pairs.table['responses'].astype(np.int64)       # (pairs, K)
    lengths = each.sum(1)
    start = np.cumsum(lengths) - lengths                   # where a pair's tokens are in the file

    def places(rows, K):
        return np.concatenate([np.arange(start[i], start[i] + each[i, :K].sum()) for i in rows])

    if RANK == 0 and not os.path.exists(path):
        with atomic_write(path, 'wb') as f:    # preallocate: no SIGBUS at an mmap write later
            f.write(np.full(lengths.sum(), np.nan, np.float32))
    barrier()
    table = np.memmap(path, np.float32, mode='r+')
    missing = rows[np.isnan(table[start[rows] + lengths[rows] - 1])]    # by a pair's last token
    barrier()                                              # all have looked before one writes
    mine, logps = missing[RANK::WORLD], no_grad_logps(model, cfg)
    with progress('reference', len(mine)) as bar:
        for i in range(0, len(mine), 256):                 # enough pairs to fill batches well
            for members, batch in batches(pairs, mine[i:i + 256], pairs.K, cfg):
                table[places(members, pairs.K)] = logps(members, batch).cpu().numpy()
                bar.update(len(members))
            table.flush()
    barrier()

    def lookup(rows, batch):
        return torch.from_numpy(table[places(rows, batch.lengths.size(1))]).to(cfg.device)
    return lookup


def make_reference(model, pairs, rows, cfg):
    """Compile the policy and make its reference -> (f(rows, batch), a hash of its weights); without
    a reference (None, '')."""
    frozen, fingerprint = model, ''
    if asks_for(cfg, 'reference'):
        if cfg.reference_from:
            frozen = load(cfg.reference_from, cfg.model_class).to(cfg.device)
        elif cfg.reference == 'live':
            frozen = copy.deepcopy(model)    # first: a compiled model's copy runs its code
        fingerprint = fingerprint_of(frozen)
    compile_model(model, cfg)
    if not fingerprint:
        return None, ''
    if frozen is not model:
        compile_model(frozen.requires_grad_(False), cfg)
    if cfg.reference == 'live':
        return no_grad_logps(frozen, cfg), fingerprint
    return cached_logps(frozen, fingerprint, pairs, rows, cfg), fingerprint


def compile_model(model, cfg):
    if cfg.compile:
        torch._dynamo.config.recompile_limit = 32          # four sizes, with gradients and without
        dynamic = False if cfg.device == 'cuda' else None
        model.packed_hidden = torch.compile(model.packed_hidden, dynamic=dynamic)


def check_same(logps, reference_logps, cfg):
    """At step 0 policy and reference must agree. Catches an edit that only one of them went
    through."""
    bf16 = cfg.dtype == 'bfloat16'
    if not torch.allclose(logps, reference_logps, rtol=0.02 if bf16 else 1e-3,
                          atol=0.5 if bf16 else 1e-3):
        apart = (logps - reference_logps).abs().max().item()
        raise InputError(f'policy and reference are the same model, but their log-probs differ by '
                         f'{apart:.3g} nats: they are computed by different code')


# --------------------------------------------------------------------------------------------------
# Evaluation


def metrics_of(losses, chosen_rewards, rejected_rewards, logps):
    """{metric: (B,) values}; NaN where the objective has no rewards."""
    c, r = chosen_rewards, rejected_rewards
    if c is None:
        c = r = torch.full_like(losses, math.nan)
    return {'loss': losses, 'rewards/chosen': c, 'rewards/rejected': r, 'rewards/margins': c - r,
            'rewards/accuracies': torch.where(c.isnan(), c, (c > r) + 0.5 * (c == r)),    # tie: 1/2
            'logps/chosen': logps[:, 0], 'logps/rejected': logps[:, -1]}


METRICS = tuple(metrics_of(*torch.zeros(3, 1), torch.zeros(1, 2)))


def metric_sums(*args):
    """The values of metrics_of summed over the pairs, in the order of METRICS, float64."""
    return torch.stack([x.detach().double().sum() for x in metrics_of(*args).values()])


def metric_means(sums, n, K):
    """Sums over n pairs -> {metric: mean}; of those that this objective and K responses have."""
    means = dict(zip(METRICS, (sums / n).tolist()))
    return {name: mean for name, mean in means.items()
            if not math.isnan(mean) and (K > 1 or 'rejected' not in name)}


def progress(what, total):
    return tqdm(desc=what, total=total, unit=' pairs', disable=RANK > 0 or None, leave=False)


@torch.no_grad()
def evaluate(policy, reference, pairs, rows, cfg, path=None):
    """Metrics of the pairs at `rows`, sorted; `policy` and `reference` are functions (rows,
    batch) -> (N,). With a path, also a line for each pair in that file."""
    n, K, mine = len(rows), pairs.K, rows[RANK::WORLD]
    sums = torch.zeros(2, n, K, device=cfg.device)         # log-probs of policy and reference
    with progress('evaluating', len(mine)) as bar:
        for i in range(0, len(mine), 256):
            for members, batch in batches(pairs, mine[i:i + 256], K, cfg):
                at = np.searchsorted(rows, members)
                sums[0, at] = batch.sum_by_response(policy(members, batch))
                if reference is not None:
                    sums[1, at] = batch.sum_by_response(reference(members, batch))
                bar.update(len(members))
    all_reduce(sums)
    logps, reference_logps = sums.cpu()
    lengths = torch.from_numpy(pairs.table['responses'][rows].astype(np.int64))
    losses, *rewards = apply_loss(cfg, logps, reference_logps, lengths, numbers_of(pairs, rows))
    ids = pairs.table['id'][rows]
    if not losses.isfinite().all():
        bad = ids[~losses.isfinite().numpy()].tolist()
        raise InputError(f'evaluation: the loss of these pairs (numbers in the source) is not '
                         f'finite: {bad}')
    if path and RANK == 0:
        columns, absent = dict(id=ids.tolist()), [None] * n
        for k, side in [(0, 'chosen'), (-1, 'rejected')][:K]:
            columns |= {
                f'{side}_logps': logps[:, k].tolist(), f'{side}_length': lengths[:, k].tolist(),
                f'reference_{side}_logps': reference_logps[:, k].tolist() if reference else absent,
                f'{side}_reward': absent if rewards[k] is None else rewards[k].tolist()}
        with atomic_write(path) as f:
            f.writelines(json.dumps(dict(zip(columns, x))) + '\n' for x in zip(*columns.values()))
    means = metric_means(metric_sums(losses, *rewards, logps), n, K)
    return {f'eval/{name}': mean for name, mean in means.items()}


def sample_validation(model, policy, reference, pairs, tokenizer, cfg):
    """Responses to cfg.eval_samples validation prompts, into samples.jsonl -> their mean length;
    with a live reference also KL(pi||pi_ref), the mean of log pi/pi_ref over them, in nats."""
    prompts = [pairs[i][0].tolist() for i in pairs.val[:cfg.eval_samples]]
    room = cfg.max_length - max(map(len, prompts))
    responses = generate(model, prompts, room, tokenizer.ends, seed=cfg.seed)
    with atomic_write(os.path.join(cfg.out_dir, 'samples.jsonl')) as f:
        for p, r in zip(prompts, responses):
            texts = dict(prompt=tokenizer.decode(p), response=tokenizer.decode(r))
            f.write(json.dumps(texts) + '\n')
    metrics = {'eval/length': float(np.mean([len(r) for r in responses]))}
    if reference is not None and cfg.reference == 'live':
        batch = pack([(p, [r]) for p, r in zip(prompts, responses)]).to(cfg.device)
        log_ratios = batch.sum_by_response(policy(None, batch) - reference(None, batch))
        metrics['eval/kl'] = float(log_ratios.mean())
    return metrics


# --------------------------------------------------------------------------------------------------
# The run's folder


def fingerprint_of(model):
    """A hash of the weights."""
    h = hashlib.sha256()
    for name, t in model.state_dict().items():
        h.update(name.encode())
        h.update(t.detach().cpu().flatten().view(torch.uint8).numpy())
    return h.hexdigest()


def header(cfg, fingerprint, data=''):
    """The first line of log.jsonl: enough to repeat the run."""
    git, commit = 'git describe --always --exclude=* --dirty=+changes'.split(), ''
    with contextlib.suppress(OSError):                     # git is not installed
        here = os.path.dirname(os.path.abspath(__file__))
        commit = subprocess.run(git, cwd=here, capture_output=True, text=True).stdout.strip()
    hardware = f'{platform.machine()} CPU, {torch.get_num_threads()} threads'
    if cfg.device == 'cuda':
        hardware = torch.cuda.get_device_name()
    versions = dict(python=platform.python_version(), torch=torch.__version__, numpy=np.__version__)
    return dict(config=plain_settings(cfg), commit=commit, weights=fingerprint,
                data=data, hardware=hardware, processes=WORLD, versions=versions)


def save_checkpoint(path, model, cfg, **state):
    with atomic_write(path, 'wb') as f:
        torch.save(dict(model=model.state_dict(), model_config=asdict(model.config),
                        config=plain_settings(cfg), **state), f)


def check_out_dir(cfg, ckpt):
    if os.path.exists(ckpt) and not (cfg.resume or cfg.overwrite or cfg.eval_only):
        raise InputError(f'out_dir: {cfg.out_dir} holds a run; --resume continues it, --overwrite '
                         'replaces it')
    if cfg.resume and not os.path.exists(ckpt):
        raise InputError(f'resume: there is no {ckpt}')


def restore(model, path):
    """Load the weights of a checkpoint -> the checkpoint. Raises InputError for another shape."""
    checkpoint = load_checkpoint(path)
    if checkpoint['model_config'] != asdict(model.config):
        raise InputError(f'{path}: a model of another shape than init_from')
    model.load_state_dict(checkpoint['model'])
    return checkpoint


def check_resume(checkpoint, path, cfg, state):
    """Raise InputError where the checkpoint is of another run than cfg's."""
    if 'optimizer' not in checkpoint:
        raise InputError(f'{path}: weights only; a run cannot resume from it')
    for name, now in state['origin'].items():
        if checkpoint['origin'].get(name) != now:
            raise InputError(f'{path} was trained with another {name}')
    if cfg.max_iters < checkpoint['step']:
        raise InputError(f'max_iters: {cfg.max_iters}; {path} has done {checkpoint["step"]} steps')


def open_log(cfg, log_bytes):
    """Open log.jsonl, cut to its length at the checkpoint: a resumed run logs later steps again."""
    if RANK > 0:
        return open(os.devnull, 'wb')
    os.makedirs(cfg.out_dir, exist_ok=True)
    files = ('ckpt.pt', 'best.pt', 'log.jsonl', 'eval.jsonl', 'samples.jsonl', *TOKENIZER_FILES)
    for name in os.listdir(cfg.out_dir):                   # of the run that is overwritten;
        if name.endswith('.tmp') or (name in files and not cfg.resume):    # .tmp: killed in a save
            os.remove(os.path.join(cfg.out_dir, name))
    log = open(os.path.join(cfg.out_dir, 'log.jsonl'), 'ab', buffering=0)
    log.truncate(log_bytes)
    log.seek(log_bytes)                  # where tell() counts from until the first line
    return log


# --------------------------------------------------------------------------------------------------
# The loop


def learning_rate(step, cfg):
    """Linear warm-up to cfg.learning_rate, then the schedule, down to 0 at max_iters."""
    if step < cfg.warmup_iters:
        return cfg.learning_rate * (step + 1) / (cfg.warmup_iters + 1)
    done = (step - cfg.warmup_iters) / max(1, cfg.max_iters - cfg.warmup_iters)
    cosine = 0.5 * (1 + math.cos(math.pi * done))
    return cfg.learning_rate * dict(cosine=cosine, linear=1 - done, constant=1.0)[cfg.schedule]


def make_optimizer(model, cfg):
    """AdamW. Its averages forget fast, as runs are short; no weight decay: the KL regularises."""
    return torch.optim.AdamW(model.parameters(), lr=cfg.learning_rate, betas=(0.9, 0.99),
                             weight_decay=0.0, fused=True)


@contextlib.contextmanager
def catch_signals():
    """Collect SIGINT and SIGTERM in a list, for a loop that ends its step, saves and leaves."""
    stop, handlers = [], {}
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            handlers[number] = signal.signal(number, lambda number, frame: stop.append(number))
        yield stop
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def check_finite(step, loss, grad_norm, losses_of, pairs):
    """Raise InputError, before an update, where a number is not one; name the pairs."""
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        bad = [rows[~losses.isfinite().cpu().numpy()] for rows, losses in losses_of]
        bad = np.concatenate(bad if any(map(len, bad)) else [rows for rows, _ in losses_of])
        raise InputError(f'step {step}: loss {loss}, gradient norm {grad_norm}; no update was '
                         'applied, ckpt.pt is from before; pairs (numbers in the source): '
                         f'{pairs.table["id"][bad].tolist()}')


def evaluate_only(cfg, model, policy, reference, reference_hash, pairs, ckpt):
    """Evaluate out_dir's run, or init_from if there is none -> metrics, and eval.jsonl."""
    name = f'no run in {cfg.out_dir}, so {cfg.init_from}'
    if os.path.exists(ckpt):
        origin, name = restore(model, ckpt)['origin'], ckpt
        if reference_hash and origin['reference'] not in ('', reference_hash):
            raise InputError(f'{ckpt} was trained with another reference: see init_from')
    path = os.path.join(cfg.out_dir, 'eval.jsonl')
    os.makedirs(cfg.out_dir, exist_ok=True)
    metrics = evaluate(policy, reference, pairs, pairs.val, cfg, path)
    say(f'{name} on {len(pairs.val)} validation pairs -> {path}')
    say('\n'.join(f'{name:24}{value:>10.4f}' for name, value in metrics.items()))
    return metrics


def train(cfg):
    """Run the settings to the end -> the metrics of the last evaluation. Raises InputError."""
    started = time.perf_counter()
    setup_machine(cfg)
    ckpt, best, eval_file = (os.path.join(cfg.out_dir, name)
                             for name in ('ckpt.pt', 'best.pt', 'eval.jsonl'))
    check_out_dir(cfg, ckpt)
    model, tokenizer, pairs = load_run(cfg)
    order = training_order(pairs.train, cfg) if not cfg.eval_only else pairs.val
    fingerprint = fingerprint_of(model)
    reference, reference_hash = make_reference(model, pairs, np.union1d(pairs.val, order), cfg)
    policy = no_grad_logps(model, cfg)
    if cfg.eval_only:
        return evaluate_only(cfg, model, policy, reference, reference_hash, pairs, ckpt)

    optimizer = make_optimizer(model, cfg)
    state = dict(step=0, best=math.inf, evaluated=-1, first={}, metrics={}, log_bytes=0,
                 prepared=pairs.folder, origin=dict(
                     loss=plain_settings(cfg)['loss'], **cfg.options, dataset=pairs.meta['hash'],
                     seed=cfg.seed, batch_size=cfg.batch_size, reference=reference_hash))
    if cfg.resume:
        checkpoint = restore(model, ckpt)
        check_resume(checkpoint, ckpt, cfg, state)
        optimizer.load_state_dict(checkpoint['optimizer'])
        state = {name: checkpoint[name] for name in state}
        del checkpoint
    log = open_log(cfg, state['log_bytes'])

    def write_log(**line):
        log.write((json.dumps(line) + '\n').encode())

    if not cfg.resume and RANK == 0:
        copy_tokenizer(cfg.tokenizer, cfg.out_dir)
        write_log(**header(cfg, fingerprint, pairs.meta['hash']))
    K = pairs.K if compares(cfg) else 1

    def load_step(step):
        rows = order[step * cfg.batch_size:(step + 1) * cfg.batch_size]
        return list(batches(pairs, rows[RANK::WORLD], K, cfg))

    waiting = load_step(state['step'])
    since, pairs_since, tokens_since = time.perf_counter(), 0, 0
    bar = tqdm(total=cfg.max_iters, initial=state['step'], unit=' steps', disable=RANK > 0 or None)
    with catch_signals() as stop, bar:                     # finish the step, save, leave
        while True:
            step, paused = state['step'], time.perf_counter()
            lr = learning_rate(step, cfg)

            # evaluate and save
            halt = torch.tensor(len(stop), device=cfg.device)
            all_reduce(halt)                               # all processes stop at the same step
            done, halt = step == cfg.max_iters, bool(halt)
            due = done or step % cfg.eval_interval == 0
            if due and len(pairs.val) and step != state['evaluated']:
                path = eval_file if done else None
                metrics = evaluate(policy, reference, pairs, pairs.val, cfg, path)
                if cfg.eval_samples:
                    metrics |= sample_validation(
                        model, policy, reference, pairs, tokenizer, cfg)
                write_log(step=step, **metrics)
                say(f'step {step}: ' + ', '.join(
                    f'{name.removeprefix("eval/")} {value:.4f}' for name, value in metrics.items()))
                state |= dict(metrics=metrics, first=state['first'] or metrics, evaluated=step)
                if metrics['eval/loss'] < state['best']:
                    state['best'] = metrics['eval/loss']
                    if RANK == 0:
                        save_checkpoint(best, model, cfg, **state)
            if (due or halt) and RANK == 0:
                os.fsync(log.fileno())
                state['log_bytes'] = log.tell()
                save_checkpoint(ckpt, model, cfg, **state, optimizer=optimizer.state_dict())
            if done or halt:
                break
            since += time.perf_counter() - paused          # rates leave evaluation out

            # forward and backward, a micro-batch at a time: the gradient of the mean over the pairs
            sums, losses_of = torch.zeros(len(METRICS), dtype=torch.float64, device=cfg.device), []
            for rows, batch in waiting:
                with autocast(cfg):
                    logps = batch.sum_by_response(model.token_logps(batch))             # (B, K)
                reference_logps = None
                if reference is not None:
                    reference_logps = batch.sum_by_response(reference(rows, batch))     # (B, K)
                    if step == 0 and not losses_of and not cfg.reference_from:
                        check_same(logps, reference_logps, cfg)
                losses, *rewards = apply_loss(cfg, logps, reference_logps, batch.lengths,
                                              numbers_of(pairs, rows, cfg.device))      # (B,) each
                (losses.sum() / cfg.batch_size).backward()
                sums += metric_sums(losses, *rewards, logps)
                losses_of.append((rows, losses.detach()))
                tokens_since += batch.starts[-1] * WORLD
            all_reduce(sums, *(p.grad for p in model.parameters() if p.grad is not None))
            limit = cfg.grad_clip or math.inf
            grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), limit)
            waiting = load_step(step + 1)                  # packed on the CPU while a GPU works
            loss, grad_norm = sums[0].item() / cfg.batch_size, grad_norm.item()
            check_finite(step, loss, grad_norm, losses_of, pairs)

            # step and log
            for group in optimizer.param_groups:
                group['lr'] = lr
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            state['step'] += 1
            pairs_since += cfg.batch_size
            bar.update()
            if step == 0:
                say(f'first step after {time.perf_counter() - started:.1f} s')
            if step % cfg.log_interval == 0:
                seconds = time.perf_counter() - since
                write_log(step=step, **metric_means(sums, cfg.batch_size, K),
                          grad_norm=grad_norm, lr=lr, pairs_per_s=pairs_since / seconds,
                          tokens_per_s=tokens_since / seconds)
                bar.set_postfix(loss=f'{loss:.3f}')
                since, pairs_since, tokens_since = time.perf_counter(), 0, 0

    if not done:
        say(f'{cfg.out_dir}: stopped after {step} steps; --resume continues from there')
        sys.exit(128 + (stop[0] if stop else signal.SIGTERM))    # another process's, where not ours
    say(f'-> {cfg.out_dir}')
    for name, value in state['metrics'].items():
        say(f'{name:24}{state["first"].get(name, math.nan):>10.4f} -> {value:.4f}')
    if cfg.at_end is not None and RANK == 0:
        cfg.at_end(model, cfg)
    return state['metrics']


def main(argv):
    cfg = load_config(argv)
    if cfg.show:
        name_tokenizer(cfg)
        show(cfg)
    else:
        train(cfg)


if __name__ == '__main__':
    run(main, __doc__)
