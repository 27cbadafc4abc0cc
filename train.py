"""
Train a GPT on preferences: python train.py CONFIG [--name=value ...]

    python train.py config/dpo_demo.py                                   # no download, minutes on a CPU
    python train.py config/dpo_gpt2.py --dataset=pairs.jsonl --beta=0.2  # your pairs
    python train.py config/dpo_gpt2.py --resume                          # go on where it stopped
    python train.py config/dpo_gpt2.py --eval_only                       # evaluate: eval.jsonl

Settings are the fields of Config and the options of the objective; a config file is plain Python.
Top to bottom: settings, the data of a step, the reference, evaluation, checkpoints, the loop.
Left out: sharding of a model over GPUs, LoRA, gradient checkpointing.
"""
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
from configurator import InputError, atomic_write, configure, first_line, run
from model import GPT, GPTConfig, block_mask, pack
from prepare import NUMBERS, Data, Pairs, get_tokenizer, prepare, source_text
from sample import generate, text_and_end
from weights import keep_tokenizer, load, load_checkpoint, tokenizer_of

# torchrun --nproc_per_node=N train.py ...: process RANK of WORLD takes every WORLD-th pair
RANK, WORLD = int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))


@dataclass
class Config(Data):
    out_dir: str = 'out/run'            # ckpt.pt, best.pt, log.jsonl, eval.jsonl
    init_from: str | dict = 'gpt2'      # the policy at the start: what weights.load takes, or fields
                                        # of GPTConfig for a random one
    reference_from: str = ''            # the reference; empty: the policy at the start
    model_class: type = GPT
    resume: bool = False                # go on from out_dir/ckpt.pt, exactly
    overwrite: bool = False             # start anew though out_dir holds a run
    eval_only: bool = False             # evaluate out_dir's run, or init_from where there is none
    # the objective: x stands for the function x_loss of dpo.py or simpo.py. Its options (beta, gamma,
    # label_smoothing, ...) are settings, too
    loss: str | Callable = 'dpo'
    reference: str = 'cached'           # log-probs computed once, kept in data_dir; 'live': every step
    # optimisation
    batch_size: int = 64                # pairs per step
    tokens_per_batch: int = 0           # per micro-batch: bounds the memory, changes nothing else;
                                        # 0: 16384 on cuda, 2048 on a CPU
    learning_rate: float = 1e-6
    schedule: str = 'cosine'            # after the warm-up: cosine or linear to min_lr, or constant
    warmup_iters: int = 0
    min_lr: float = 0.0
    max_iters: int = 0                  # steps; 0: as many as `epochs` takes
    epochs: float = 1.0
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    grad_clip: float = 1.0              # norm of the gradient; 0: not clipped
    seed: int = 1337
    # evaluation and logging
    eval_interval: int = 100            # steps between evaluations, each followed by a checkpoint
    eval_pairs: int = 0                 # validation pairs used; 0: all
    eval_samples: int = 0               # responses sampled at each evaluation, into samples.jsonl
    log_interval: int = 10
    at_end: Callable | None = None      # called with (model, cfg) when the run is done
    # the machine
    device: str = ''                    # cuda where there is one, else cpu
    dtype: str = ''                     # bfloat16 on cuda; float32 on a CPU and under eval_only
    compile: bool | None = None         # torch.compile; None: on cuda


# --------------------------------------------------------------------------------------------------
# Settings

# what the loop gives to an objective that names it; all else in its signature is an option
SUPPLIED = ('policy_logps', 'policy_chosen_logps', 'policy_rejected_logps',
            'reference_logps', 'reference_chosen_logps', 'reference_rejected_logps',
            'lengths', 'chosen_lengths', 'rejected_lengths', *NUMBERS)


def find_loss(loss):
    """A name or a function -> the function."""
    names = {name.removesuffix('_loss'): f for module in (dpo, simpo) for name, f in vars(module).items()
             if name.endswith('_loss')}
    if not callable(loss) and loss not in names:
        raise InputError(f'loss: {loss!r} is not one of {", ".join(names)}, nor a function')
    return loss if callable(loss) else names[loss]


def loss_options(cfg):
    """The objective's options with their defaults."""
    parameters = inspect.signature(find_loss(cfg.loss)).parameters
    return {name: p.default for name, p in parameters.items() if name not in SUPPLIED}


def asks_for(cfg, word):
    """Does the objective's signature name something with `word` in it?"""
    return any(word in name for name in inspect.signature(find_loss(cfg.loss)).parameters)


def load_config(argv):
    """[CONFIG] [--name=value ...] -> a Config that has been checked. Raises InputError."""
    cfg = configure(Config, argv, loss_options)
    at_least = {'batch_size eval_interval log_interval': 1, 'epochs max_iters warmup_iters learning_rate '
                'min_lr weight_decay grad_clip eval_pairs eval_samples tokens_per_batch seed': 0}
    for names, low in at_least.items():
        for name in names.split():
            if getattr(cfg, name) < low:
                raise InputError(f'{name}: {getattr(cfg, name)} is less than {low}')
    for name, choices in dict(schedule=('cosine', 'linear', 'constant'), reference=('cached', 'live'),
                              dtype=('', 'float32', 'bfloat16'), device=('', 'cpu', 'cuda')).items():
        if getattr(cfg, name) not in choices:
            raise InputError(f'{name}: {getattr(cfg, name)!r} is not one of {choices}')
    if cfg.options.get('beta', 1) <= 0:
        raise InputError(f'beta: {cfg.options["beta"]} is not above 0')
    try:                                 # the objective has range checks of its own
        one = torch.ones(1, 2)
        apply_loss(cfg, -one, -one if asks_for(cfg, 'reference') else None, one, {k: one[:, 0] for k in NUMBERS})
    except ValueError as e:
        raise InputError(str(e))
    return cfg


def setup_machine(cfg):
    """Fill in what depends on the machine: device, dtype, compile, tokens_per_batch."""
    if cfg.device == 'cuda' and not torch.cuda.is_available():
        raise InputError("device 'cuda' is not available here; use cpu")
    cfg.device = cfg.device or ('cuda' if torch.cuda.is_available() else 'cpu')
    cuda = cfg.device == 'cuda'
    cfg.dtype = cfg.dtype or ('bfloat16' if cuda and not cfg.eval_only else 'float32')
    cfg.compile = cuda if cfg.compile is None else cfg.compile
    cfg.tokens_per_batch = cfg.tokens_per_batch or (16384 if cuda else 2048)
    if WORLD > 1 and not dist.is_initialized():
        if cuda:
            torch.cuda.set_device(int(os.environ['LOCAL_RANK']))
        dist.init_process_group('nccl' if cuda else 'gloo')
    # bf16 runs: float32 products (the head's, on a CPU) may multiply in bf16 and sum in float32
    torch.set_float32_matmul_precision('medium' if cfg.dtype == 'bfloat16' else 'highest')
    torch._dynamo.config.recompile_limit = 32              # four sizes of batch, with gradients and without
    if not cuda and sys.platform == 'linux':               # glibc keeps freed memory: steps 15 to 20% faster
        for option in (-1, -3):                            # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
            ctypes.CDLL(None).mallopt(option, 2**30)
        # oneDNN caches a kernel per shape, a megabyte each, and every batch has new shapes
        os.environ.setdefault('ONEDNN_PRIMITIVE_CACHE_CAPACITY', '64')


def check_fit(cfg, model, tokenizer, pairs):
    """Raise InputError where model, data and settings do not fit together."""
    config, table = model.config, pairs.table
    if cfg.max_length > config.block_size:
        raise InputError(f'max_length: {cfg.max_length} exceeds the context of {cfg.init_from}, '
                         f'{config.block_size} tokens')
    if tokenizer.n_vocab > config.vocab_size:
        raise InputError(f'tokenizer: {tokenizer.name} has {tokenizer.n_vocab} tokens, and {cfg.init_from} '
                         f'knows {config.vocab_size}')
    longest = int((table['prompt'] + table['responses'].sum(1)).max())
    if longest > cfg.tokens_per_batch:
        raise InputError(f'tokens_per_batch: {cfg.tokens_per_batch} is less than the longest pair, {longest}')
    compares = asks_for(cfg, 'rejected') or asks_for(cfg, 'policy_logps')
    if compares and pairs.K != 2 and (pairs.K < 2 or asks_for(cfg, 'rejected')):
        raise InputError(f'dataset: {cfg.dataset} has {pairs.K} responses to a prompt, and the loss compares '
                         f'{"two or more" if pairs.K < 2 else "two"}')
    for name, default in NUMBERS.items():
        if compares and not asks_for(cfg, name) and (table[name] != np.float32(default)).any():
            raise InputError(f'dataset: {cfg.dataset} has {name} other than {default}, and the loss ignores it')
    if not len(pairs.val if cfg.eval_only else pairs.train):
        raise InputError(f'val_fraction: {cfg.val_fraction} leaves no pair to '
                         + ('evaluate' if cfg.eval_only else 'train on'))
    if cfg.batch_size < WORLD:
        raise InputError(f'batch_size: {cfg.batch_size} is less than the number of processes, {WORLD}')


# --------------------------------------------------------------------------------------------------
# The data of a step


def step_rows(step, rows, cfg):
    """The pairs of a step: a slice of the epochs' permutations, end to end. There is no state to resume."""
    at, n = np.arange(step * cfg.batch_size, (step + 1) * cfg.batch_size), len(rows)
    order = {e: np.random.default_rng([cfg.seed, int(e)]).permutation(n) for e in np.unique(at // n)}
    return rows[[order[i // n][i % n] for i in at]]


def micro_batches(sizes, limit):
    """Sizes in tokens -> lists of indices, each of at most `limit` tokens: first fit, longest first."""
    bins = []                                              # [tokens, indices]
    for i in np.argsort(-np.asarray(sizes), kind='stable').tolist():
        b = next((b for b in bins if b[0] + sizes[i] <= limit), None)
        if b is None:
            bins.append(b := [0, []])
        b[0] += sizes[i]
        b[1].append(i)
    return [indices for _, indices in bins]


def batches(pairs, rows, K, cfg):
    """Packed batches of the pairs at `rows`, with their first K responses: yields (rows, Batch)."""
    drawn = [(prompt, responses[:K]) for prompt, responses in (pairs[i] for i in rows)]
    sizes = [len(prompt) + sum(map(len, responses)) for prompt, responses in drawn]
    fixed = cfg.compile and cfg.device == 'cuda'
    for indices in micro_batches(sizes, cfg.tokens_per_batch):
        # compiled for a GPU, batches have one of four sizes, each compiled once
        quarter = -(-cfg.tokens_per_batch // 4)
        pad_to = -(-sum(sizes[i] for i in indices) // quarter) * quarter if fixed else 0
        batch = pack([drawn[i] for i in indices], pad_to).to(cfg.device)
        batch.mask = block_mask(batch) if fixed else None
        yield rows[indices], batch


def apply_loss(cfg, logps, reference_logps, lengths, numbers):
    """The objective on (B, K) log-probs, (B, K) of the reference or None, (B, K) lengths and (B,) numbers,
    each passed where its signature names it -> (losses, chosen_rewards, rejected_rewards), each (B,)."""
    supplied = dict(numbers, lengths=lengths, chosen_lengths=lengths[:, 0], rejected_lengths=lengths[:, -1])
    for model, x in (('policy', logps), ('reference', reference_logps)):
        if x is not None:
            supplied |= {f'{model}_logps': x, f'{model}_chosen_logps': x[:, 0], f'{model}_rejected_logps': x[:, -1]}
    loss = find_loss(cfg.loss)
    names = inspect.signature(loss).parameters
    return loss(**{k: v for k, v in supplied.items() if k in names}, **cfg.options)


def numbers_of(pairs, rows, device='cpu'):
    return {name: torch.from_numpy(pairs.table[name][rows]).to(device) for name in NUMBERS}


# --------------------------------------------------------------------------------------------------
# The reference: a function (rows, batch) -> log-probs of the batch's response tokens, (N,) float32


def autocast(cfg):
    return torch.autocast(cfg.device, dtype=torch.bfloat16, enabled=cfg.dtype == 'bfloat16')


def live_logps(model, cfg):
    """A model asked anew for every batch."""
    @torch.no_grad()
    def logps(rows, batch):
        with autocast(cfg):
            return model.token_logps(batch)
    return logps


def cached_logps(model, fingerprint, pairs, rows, cfg):
    """The model's log-probs of the pairs at `rows`, computed once and kept in a file of data_dir.

    The file's name is a hash of all that the numbers depend on: weights, tokens, precision and the
    source of the model. Tokens that are not computed yet are NaN, so an interruption loses little.
    """
    source = source_text(GPT) + source_text(cfg.model_class)
    made_of = [fingerprint, pairs.meta['hash'], cfg.dtype, cfg.device, cfg.compile, source]
    key = hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:12]
    path = os.path.join(cfg.data_dir, f'reference-{key}.f32')
    lengths = pairs.table['responses'].sum(1, dtype=np.int64)
    start = np.cumsum(lengths) - lengths                   # a pair's place in the file
    total = int(lengths.sum())
    if RANK == 0 and not (os.path.exists(path) and os.path.getsize(path) == 4 * total):
        with atomic_write(path, 'wb') as f:                # whole: a full disk at an mmap write is a SIGBUS
            for i in range(0, total, 2**20):
                f.write(np.full(min(2**20, total - i), np.nan, np.float32))
    if WORLD > 1:
        dist.barrier()
    table = np.memmap(path, np.float32, mode='r+')
    missing = np.array([i for i in rows if np.isnan(table[start[i] + lengths[i] - 1])], dtype=np.int64)
    if WORLD > 1:
        dist.barrier()                                     # all have looked before one writes
    logps = live_logps(model, cfg)
    mine = missing[RANK::WORLD]
    with tqdm(total=len(mine), desc='reference', unit=' pairs', disable=RANK > 0 or None, leave=False) as bar:
        for i in range(0, len(mine), 256):
            for some, batch in batches(pairs, mine[i:i + 256], pairs.K, cfg):
                values = logps(some, batch).cpu().numpy()  # (N,), pair after pair
                at = np.concatenate([np.arange(start[j], start[j] + lengths[j]) for j in some])
                table[at] = values
                bar.update(len(some))
            table.flush()
    if WORLD > 1:
        dist.barrier()

    def lookup(rows, batch):
        at = np.concatenate([np.arange(start[j], start[j] + lengths[j]) for j in rows])
        return torch.from_numpy(table[at]).to(batch.tokens.device, non_blocking=True)
    return lookup


# --------------------------------------------------------------------------------------------------
# Evaluation

METRICS = ('loss', 'rewards/chosen', 'rewards/rejected', 'rewards/margins', 'rewards/accuracies',
           'logps/chosen', 'logps/rejected')


def metric_sums(losses, chosen_rewards, rejected_rewards, logps):
    """Sums over the pairs of METRICS, (7,) float64; NaN where the objective has no rewards."""
    c, r = (torch.full_like(losses, math.nan),) * 2 if chosen_rewards is None else (chosen_rewards, rejected_rewards)
    accuracy = torch.where(c == r, 0.5, (c > r).float()) + 0 * c           # a tie counts one half
    rows = (losses, c, r, c - r, accuracy, logps[:, 0], logps[:, -1])
    return torch.stack([row.detach().double().sum() for row in rows])


def metric_means(sums, n, K):
    """Sums over n pairs -> {metric: mean}; without rejected responses (K = 1), without their metrics."""
    means = dict(zip(METRICS, (sums / n).tolist()))
    return {k: v for k, v in means.items() if v == v and (K > 1 or 'rejected' not in k)}


@torch.no_grad()
def evaluate(policy, reference, pairs, rows, cfg, path=None):
    """Metrics of the pairs at `rows`; `policy` and `reference` are functions (rows, batch) -> (N,).
    With a path, a line for each pair there, in the order of the source."""
    n, K = len(rows), pairs.K
    sums = torch.zeros(2, n, K, device=cfg.device)         # log-probs of policy and reference
    mine = np.arange(RANK, n, WORLD)
    place = {int(row): i for i, row in enumerate(rows)}
    with tqdm(total=len(mine), desc='evaluating', unit=' pairs', disable=RANK > 0 or None, leave=False) as bar:
        for i in range(0, len(mine), 256):
            for some, batch in batches(pairs, rows[mine[i:i + 256]], K, cfg):
                at = [place[int(row)] for row in some]
                sums[0, at] = batch.sum_by_response(policy(some, batch))
                if reference is not None:
                    sums[1, at] = batch.sum_by_response(reference(some, batch))
                bar.update(len(some))
    if WORLD > 1:
        dist.all_reduce(sums)
    logps, reference_logps = sums.cpu()
    lengths = torch.from_numpy(pairs.table['responses'][rows].astype(np.int64))
    losses, *rewards = apply_loss(cfg, logps, reference_logps if reference is not None else None, lengths,
                                  numbers_of(pairs, rows))
    ids = pairs.table['id'][rows].tolist()
    if not losses.isfinite().all():
        bad = [i for i, loss in zip(ids, losses) if not loss.isfinite()]
        raise InputError(f'evaluation: the loss of these pairs (numbers in the source) is not finite: {bad}')
    if path and RANK == 0:
        columns = dict(id=ids)
        for k, side in [(0, 'chosen'), (-1, 'rejected')][:K]:
            columns[f'{side}_logps'] = logps[:, k].tolist()
            columns[f'reference_{side}_logps'] = reference_logps[:, k].tolist() if reference is not None else None
            columns[f'{side}_length'] = lengths[:, k].tolist()
            columns[f'{side}_reward'] = rewards[k].tolist() if rewards[k] is not None else None
        columns = {k: [None] * n if v is None else v for k, v in columns.items()}
        with atomic_write(path) as f:
            f.writelines(json.dumps(dict(zip(columns, line))) + '\n' for line in zip(*columns.values()))
    return {'eval/' + k: v for k, v in metric_means(metric_sums(losses, *rewards, logps), n, K).items()}


@torch.no_grad()
def sample_validation(model, frozen, pairs, rows, tokenizer, cfg, path):
    """The policy's own responses to validation prompts, into a file -> their mean length; with the
    frozen reference at hand also KL(pi||pi_ref): the mean of log pi/pi_ref over them, in nats."""
    prompts = [pairs[i][0].tolist() for i in rows]
    responses = generate(model, prompts, cfg.max_length - max(map(len, prompts)), tokenizer.ends, seed=cfg.seed)
    metrics = {'eval/length': float(np.mean([len(r) for r in responses]))}
    if frozen is not None:
        batch = pack([(p, [r]) for p, r in zip(prompts, responses)]).to(cfg.device)
        ratios = batch.sum_by_response(model.token_logps(batch) - frozen.token_logps(batch))
        metrics['eval/kl'] = float(ratios.mean())
    if RANK == 0:
        with atomic_write(path) as f:
            for prompt, r in zip(prompts, responses):
                line = dict(prompt=tokenizer.decode(prompt), response=text_and_end(r, tokenizer)[0])
                f.write(json.dumps(line) + '\n')
    return metrics


# --------------------------------------------------------------------------------------------------
# Checkpoints


def fingerprint_of(model):
    """A hash of the weights."""
    h = hashlib.sha256()
    for name, t in model.state_dict().items():
        h.update(name.encode())
        h.update(t.detach().cpu().contiguous().view(torch.uint8).numpy())
    return h.hexdigest()


def plain_settings(cfg):
    """The settings as plain values: functions and classes by name."""
    named = {k: f'{v.__module__}.{v.__qualname__}' if callable(v) else v for k, v in asdict(cfg).items()}
    return named | cfg.options


def header(cfg, fingerprint, pairs):
    """The first line of log.jsonl: enough to repeat the run."""
    def git(*args):
        here = os.path.dirname(os.path.abspath(__file__))
        try:
            return subprocess.run(['git', '-C', here, *args], capture_output=True, text=True).stdout.strip()
        except OSError:                                    # git is not installed
            return ''
    commit = git('rev-parse', '--short', 'HEAD') + '+changes' * bool(git('status', '--porcelain', '-uno'))
    cpu = f'{platform.machine()} CPU, {torch.get_num_threads()} threads'
    return dict(config=plain_settings(cfg), commit=commit, weights=fingerprint, data=pairs.meta['hash'],
                hardware=torch.cuda.get_device_name() if cfg.device == 'cuda' else cpu, processes=WORLD,
                versions=dict(python=platform.python_version(), torch=torch.__version__, numpy=np.__version__))


def check_resume(checkpoint, path, cfg, pairs, reference_hash):
    """Raise InputError where the run of the checkpoint is another one."""
    if 'optimizer' not in checkpoint:
        raise InputError(f'{path}: weights only, so a run cannot go on from it')
    was = dict(loss=checkpoint['config']['loss'], dataset=checkpoint['data'], init_from=checkpoint['reference'])
    now = dict(loss=plain_settings(cfg)['loss'], dataset=pairs.meta['hash'], init_from=reference_hash)
    what = dict(loss='another loss', dataset='other data', init_from='another reference')
    for name in was:
        if was[name] != now[name]:
            raise InputError(f'{name}: {path} was trained with {what[name]}')
    if cfg.max_iters < checkpoint['step']:
        raise InputError(f'max_iters: {cfg.max_iters}, and {path} has done {checkpoint["step"]} steps')


# --------------------------------------------------------------------------------------------------
# The loop


def learning_rate(step, cfg):
    """Linear warm-up to cfg.learning_rate, then the schedule, down to min_lr at max_iters."""
    if step < cfg.warmup_iters:
        return cfg.learning_rate * (step + 1) / (cfg.warmup_iters + 1)
    done = (step - cfg.warmup_iters) / max(1, cfg.max_iters - cfg.warmup_iters)
    remaining = dict(cosine=0.5 * (1 + math.cos(math.pi * done)), linear=1 - done, constant=1.0)[cfg.schedule]
    return cfg.min_lr + remaining * (cfg.learning_rate - cfg.min_lr)


def say(text):
    if RANK == 0:
        tqdm.write(text)


def load_run(cfg):
    """The policy at its start, its tokenizer and the prepared pairs, checked against each other."""
    if isinstance(cfg.init_from, dict):
        cfg.tokenizer = cfg.tokenizer or 'gpt2'
        torch.manual_seed(cfg.seed)
        try:
            config = GPTConfig(**dict(vocab_size=get_tokenizer(cfg.tokenizer).n_vocab) | cfg.init_from)
        except TypeError as e:
            raise InputError(f'init_from: {first_line(e)}')
        model = cfg.model_class(config)
    else:
        cfg.tokenizer = cfg.tokenizer or tokenizer_of(cfg.init_from)
        model = load(cfg.init_from, cfg.model_class)
    tokenizer = get_tokenizer(cfg.tokenizer)
    if WORLD > 1 and RANK > 0:
        dist.barrier()                                     # the first process prepares, the others find it
    pairs = Pairs(prepare(cfg))
    if WORLD > 1 and RANK == 0:
        dist.barrier()
    check_fit(cfg, model, tokenizer, pairs)
    return model.to(cfg.device), tokenizer, pairs


def make_reference(model, pairs, rows, cfg):
    """The reference as a function (rows, batch) -> (N,), None where the objective asks for none; the
    frozen model, None where it need not stay; and a hash of its weights."""
    if not asks_for(cfg, 'reference'):
        compile_model(model, cfg)
        return None, None, ''
    frozen = load(cfg.reference_from, cfg.model_class).to(cfg.device) if cfg.reference_from else model
    fingerprint = fingerprint_of(frozen)
    if cfg.reference == 'live' and frozen is model:
        frozen = copy.deepcopy(model)                      # before compiling: a copy would run the original
    compile_model(model, cfg)
    if frozen is not model:
        compile_model(frozen.requires_grad_(False), cfg)
    if cfg.reference == 'live':
        return live_logps(frozen, cfg), frozen, fingerprint
    return cached_logps(frozen, fingerprint, pairs, rows, cfg), None, fingerprint


def compile_model(model, cfg):
    if cfg.compile:
        dynamic = False if cfg.device == 'cuda' else None  # on a GPU batches are padded to four sizes
        model.packed_hidden = torch.compile(model.packed_hidden, dynamic=dynamic)


def check_same(logps, reference_logps, cfg):
    """The policy still is the reference, so the two must agree: an edited model.py, a stale cache and a
    mask that differs all show here."""
    tolerance = dict(rtol=0.02, atol=0.5) if cfg.dtype == 'bfloat16' else dict(rtol=1e-3, atol=1e-3)
    if not torch.allclose(logps, reference_logps, **tolerance):
        apart = (logps - reference_logps).abs().max().item()
        raise InputError(f'before the first step the policy is the reference, but their log-probs differ by up '
                         f'to {apart:.3g} nats: only one of them is computed as the code says now')


def save_checkpoint(path, model, cfg, **state):
    with atomic_write(path, 'wb') as f:
        torch.save(dict(model=model.state_dict(), model_config=asdict(model.config),
                        config=plain_settings(cfg), **state), f)


def train(cfg):
    """Run the settings to the end -> the metrics of the last evaluation. Raises InputError."""
    started = time.perf_counter()
    setup_machine(cfg)
    ckpt, best_ckpt, log_path, eval_path, samples_path = (os.path.join(cfg.out_dir, name) for name in (
        'ckpt.pt', 'best.pt', 'log.jsonl', 'eval.jsonl', 'samples.jsonl'))
    if os.path.exists(ckpt) and not (cfg.resume or cfg.overwrite or cfg.eval_only):
        raise InputError(f'out_dir: {cfg.out_dir} holds a run; --resume goes on with it, --overwrite replaces it')
    if cfg.resume and not os.path.exists(ckpt):
        raise InputError(f'resume: there is no {ckpt}')
    resuming = cfg.resume or cfg.eval_only and os.path.exists(ckpt)

    model, tokenizer, pairs = load_run(cfg)
    cfg.max_iters = cfg.max_iters or math.ceil(cfg.epochs * len(pairs.train) / cfg.batch_size)
    val = pairs.val
    if 0 < cfg.eval_pairs < len(val):
        val = np.sort(np.random.default_rng(cfg.seed).permutation(val)[:cfg.eval_pairs])
    seen = [step_rows(s, pairs.train, cfg) for s in range(0 if cfg.eval_only else cfg.max_iters)]
    fingerprint = fingerprint_of(model)
    reference, frozen, reference_hash = make_reference(model, pairs, np.unique(np.concatenate([val, *seen])), cfg)
    K = pairs.K if asks_for(cfg, 'rejected') or asks_for(cfg, 'policy_logps') else 1
    starts_equal = reference is not None and not cfg.reference_from and not resuming
    optimizer = torch.optim.AdamW(
        [dict(params=[p for p in model.parameters() if p.dim() > 1], weight_decay=cfg.weight_decay),
         dict(params=[p for p in model.parameters() if p.dim() <= 1], weight_decay=0.0)],
        lr=cfg.learning_rate, betas=(cfg.beta1, cfg.beta2), fused=True)

    step, best, evaluated, first, metrics, log_bytes = 0, math.inf, -1, {}, {}, 0
    if resuming:
        checkpoint = load_checkpoint(ckpt)
        if not cfg.eval_only:
            check_resume(checkpoint, ckpt, cfg, pairs, reference_hash)
            optimizer.load_state_dict(checkpoint['optimizer'])
            step, best, evaluated, first, metrics, log_bytes = (checkpoint[name] for name in (
                'step', 'best', 'evaluated', 'first', 'metrics', 'log_bytes'))
        model.load_state_dict(checkpoint['model'])
        del checkpoint
    policy = live_logps(model, cfg)
    if cfg.eval_only:
        metrics = evaluate(policy, reference, pairs, val, cfg, eval_path)
        say(f'{ckpt if resuming else cfg.init_from} on {len(val)} validation pairs -> {eval_path}')
        say('\n'.join(f'{name:24}{value:>10.4f}' for name, value in metrics.items()))
        return metrics

    if RANK == 0:
        os.makedirs(cfg.out_dir, exist_ok=True)
        for path in (() if cfg.resume else filter(os.path.exists, (ckpt, best_ckpt, eval_path))):
            os.remove(path)                                # of the run that is overwritten
        log = open(log_path, 'r+b' if cfg.resume else 'wb', buffering=0)
        log.seek(log_bytes)
        log.truncate()                                     # lines after the checkpoint are written again

    def write_log(**line):
        if RANK == 0:
            log.write((json.dumps(line) + '\n').encode())

    if not cfg.resume:
        keep_tokenizer(cfg)
        write_log(**header(cfg, fingerprint, pairs))
    parameters = sum(p.numel() for p in model.parameters())
    say(f'{parameters:,} parameters; {len(pairs.train):,} pairs to train on, {len(val):,} to validate; '
        f'{cfg.max_iters} steps of {cfg.batch_size} pairs on {cfg.device} in {cfg.dtype}')
    say(', '.join([f'loss {plain_settings(cfg)["loss"]}', *(f'{k} {v}' for k, v in cfg.options.items())]))
    stop = []                                              # a signal arrived: finish the step first
    handlers = {s: signal.signal(s, lambda number, frame: stop.append(number))
                for s in (signal.SIGINT, signal.SIGTERM)}
    load_step = lambda step: list(batches(pairs, step_rows(step, pairs.train, cfg)[RANK::WORLD], K, cfg))
    waiting = load_step(step)
    since, pairs_since, tokens_since = time.perf_counter(), 0, 0
    bar = tqdm(total=cfg.max_iters, initial=step, unit=' steps', disable=RANK > 0 or None)
    while True:
        # evaluate and save
        if (step % cfg.eval_interval == 0 or step == cfg.max_iters) and step != evaluated:
            paused, evaluated, improved = time.perf_counter(), step, False
            if len(val):
                metrics = evaluate(policy, reference, pairs, val, cfg, eval_path if step == cfg.max_iters else None)
                if cfg.eval_samples:
                    metrics |= sample_validation(model, frozen, pairs, val[:cfg.eval_samples], tokenizer, cfg,
                                                 samples_path)
                write_log(step=step, **metrics)
                say(f'step {step}: ' + ', '.join(f'{k.removeprefix("eval/")} {v:.4f}' for k, v in metrics.items()))
                first = first or metrics
                improved, best = metrics['eval/loss'] < best, min(metrics['eval/loss'], best)
        halt = torch.tensor(len(stop), device=cfg.device)
        if WORLD > 1:
            dist.all_reduce(halt)                          # all processes stop at the same step
        if RANK == 0 and (evaluated == step or halt):
            os.fsync(log.fileno())
            if evaluated == step and improved:
                save_checkpoint(best_ckpt, model, cfg, step=step)
            save_checkpoint(ckpt, model, cfg, step=step, best=best, evaluated=evaluated, first=first,
                            metrics=metrics, log_bytes=log.tell(), optimizer=optimizer.state_dict(),
                            data=pairs.meta['hash'], reference=reference_hash)
        if evaluated == step:
            since += time.perf_counter() - paused          # rates leave evaluation out
        if step == cfg.max_iters or halt:
            break

        # forward and backward, a micro-batch at a time: the gradient of the mean over the step's pairs
        sums, losses_of = torch.zeros(len(METRICS), dtype=torch.float64, device=cfg.device), []
        for rows, batch in waiting:
            with autocast(cfg):
                logps = batch.sum_by_response(model.token_logps(batch))                         # (B, K)
            reference_logps = None
            if reference is not None:
                reference_logps = batch.sum_by_response(reference(rows, batch))                 # (B, K)
                if step == 0 and starts_equal and not losses_of:
                    check_same(logps, reference_logps, cfg)
            losses, *rewards = apply_loss(cfg, logps, reference_logps, batch.lengths,
                                          numbers_of(pairs, rows, cfg.device))                  # (B,) each
            (losses.sum() / cfg.batch_size).backward()
            sums += metric_sums(losses, *rewards, logps)
            losses_of.append((rows, losses.detach()))
            tokens_since += batch.starts[-1] * WORLD
        if WORLD > 1:
            for t in (sums, *(p.grad for p in model.parameters() if p.grad is not None)):
                dist.all_reduce(t)
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip or math.inf)
        waiting = load_step(step + 1)                      # packed on the CPU while a GPU works
        loss, grad_norm = sums[0].item() / cfg.batch_size, grad_norm.item()
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            bad = [rows[~losses.isfinite().cpu().numpy()] for rows, losses in losses_of]
            bad = np.concatenate(bad if any(map(len, bad)) else [rows for rows, _ in losses_of])
            raise InputError(f'step {step}: loss {loss}, gradient norm {grad_norm}; no update was applied; last good '
                             f'checkpoint: {ckpt}; pairs (numbers in the source): {pairs.table["id"][bad].tolist()}')

        # step and log
        lr = learning_rate(step, cfg)
        for group in optimizer.param_groups:
            group['lr'] = lr
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        pairs_since += cfg.batch_size
        bar.update()
        if step % cfg.log_interval == 0:
            seconds, line = time.perf_counter() - since, metric_means(sums, cfg.batch_size, K)
            write_log(step=step, **line, grad_norm=grad_norm, lr=lr, pairs_per_s=pairs_since / seconds,
                      tokens_per_s=tokens_since / seconds)
            bar.set_postfix(loss=f'{loss:.3f}')
            since, pairs_since, tokens_since = time.perf_counter(), 0, 0
        step += 1
        if step == 1:
            say(f'first step done {time.perf_counter() - started:.1f} s after the start')

    bar.close()
    for number, handler in handlers.items():
        signal.signal(number, handler)
    if halt:
        say(f'{cfg.out_dir}: stopped after {step} steps; --resume goes on from there')
        sys.exit(128 + (stop[0] if stop else signal.SIGTERM))
    say(f'-> {cfg.out_dir}')
    if first:
        say('\n'.join([f'{"":24}{"before":>10}{"after":>10}'] + [
            f'{name:24}{first[name]:>10.4f}{value:>10.4f}' for name, value in metrics.items()]))
    if cfg.at_end is not None and RANK == 0:
        cfg.at_end(model, cfg)
    return metrics


def main(argv):
    train(load_config(argv))


if __name__ == '__main__':
    run(main, __doc__)
