"""
Train a GPT on preferences: python train.py CONFIG [--name=value ...]

    python train.py config/dpo_demo.py                                   # no download, minutes on a CPU
    python train.py config/dpo_gpt2.py --dataset=pairs.jsonl --beta=0.2  # your pairs
    python train.py config/dpo_gpt2.py --resume=True                     # go on where it stopped
    python train.py config/dpo_gpt2.py --eval_only=True                  # init_from on the validation set: eval.jsonl

A config file is plain Python, and is run; what it assigns must be a field of Config below, and so must every --name.
From top to bottom: the config, the data of a step, scoring and the reference, evaluation, checkpoints, the loop.
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
import hashlib
import inspect
import json
import math
import os
import platform
import runpy
import signal
import subprocess
import sys
import time
import types
from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm

import dpo
import simpo
from model import GPT, GPTConfig, block_mask, load_checkpoint, pack
from prepare import InputError, Pairs, get_tokenizer, prepare

LOSSES = {'sft': simpo.sft_loss, 'dpo': dpo.dpo_loss, 'simpo': simpo.simpo_loss}


@dataclass
class Config:
    # where from and where to
    out_dir: str = 'out/run'            # checkpoints, log.jsonl, eval.jsonl
    init_from: str = 'gpt2'             # the policy at the start, and the reference: all that GPT.from_pretrained
                                        # takes, or 'scratch'
    init_config: str = ''               # the config file that makes init_from, run first where it is not there yet
    n_layer: int = 12                   # these four for 'scratch' alone
    n_head: int = 12
    n_embd: int = 768
    block_size: int = 1024
    resume: bool = False                # go on from out_dir/ckpt.pt, exactly
    overwrite: bool = False             # start anew though out_dir holds a run
    eval_only: bool = False             # evaluate init_from (with resume: ckpt.pt), write eval.jsonl, and stop
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
    loss: str = 'dpo'                   # sft, dpo, simpo
    beta: float | None = None           # dpo: 0.1, the KL constraint's weight; simpo: 2.0, the reward's scale
    gamma: float | None = None          # simpo: 0.5, the target margin
    label_smoothing: float | None = None  # 0.0; the share of labels taken to be flipped
    reference: str | None = None        # 'cached': its log-probs computed once and kept on disk; 'live': every step
    # optimisation
    batch_size: int = 64                # pairs per step
    tokens_per_batch: int = 16384       # tokens per micro-batch: bounds the memory, leaves the result alone
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
    # the machine
    device: str = 'auto'                # cuda where there is one, else cpu
    dtype: str = 'auto'                 # bfloat16 on cuda, float32 on a cpu and under eval_only
    compile: bool | None = None         # torch.compile; None: on cuda


# ----------------------------------------------------------------------------------------------------------------
# The config


def parse_value(cfg, name, value, where):
    """`value` as the type that the field `name` has; a string from the command line is read as a Python literal."""
    fields = {f.name: f for f in dataclasses.fields(cfg)}
    if name not in fields:
        near = difflib.get_close_matches(name, fields, n=1)
        raise InputError(f'{where}: {name!r} is not a name of the config' + (f'; {near[0]!r} is' if near else ''))
    annotation = fields[name].type
    kinds = annotation.__args__ if isinstance(annotation, types.UnionType) else (annotation,)
    if where == 'command line' and str not in kinds or (where == 'command line' and value == 'None' and type(None) in kinds):
        with contextlib.suppress(ValueError, SyntaxError):
            value = ast.literal_eval(value)
    if type(value) is int and float in kinds:
        value = float(value)
    if type(value) not in kinds or (type(value) is float and not math.isfinite(value)):
        wanted = ' or '.join(k.__name__.replace('NoneType', 'None') for k in kinds)
        raise InputError(f'{where}: {name} = {value!r} is not of type {wanted}')
    return value


def load_config(argv, cfg=None):
    """[CONFIG] [--name=value ...] -> Config, whose `given` names what was set. Raises InputError, one line. Another
    dataclass of options (sample.py has one) may come as `cfg`."""
    cfg = Config() if cfg is None else cfg
    cfg.given = set()
    for i, arg in enumerate(argv):
        name, equals, value = arg.removeprefix('--').partition('=')
        if arg.startswith('--') and equals:
            setattr(cfg, name, parse_value(cfg, name, value, 'command line'))
            cfg.given.add(name)
        elif i or arg.startswith('-'):
            raise InputError(f'command line: {arg!r} is not of the form --name=value')
        elif not os.path.isfile(arg):
            raise InputError(f'{arg}: no such config file')
        else:
            try:
                assigned = runpy.run_path(arg)
            except Exception as e:
                line = e.lineno if isinstance(e, SyntaxError) else e.__traceback__.tb_next and inspect.getinnerframes(e.__traceback__)[-1].lineno
                raise InputError(f'{arg} line {line}: {type(e).__name__}: {e}')
            for name, value in assigned.items():
                if not name.startswith('_') and not inspect.ismodule(value) and not callable(value):
                    setattr(cfg, name, parse_value(cfg, name, value, arg))
                    cfg.given.add(name)
    if isinstance(cfg, Config):
        check_config(cfg)
    return cfg


def loss_parameters(loss):
    return inspect.signature(LOSSES[loss]).parameters


def check_config(cfg):
    """Raise InputError, naming the key, where a value is out of range or is one that this objective ignores."""
    choices = dict(loss=LOSSES, schedule=('cosine', 'linear', 'constant'), truncation=('cut', 'drop'), template=('', 'chat'),
                   bad_records=('error', 'skip'), reference=('cached', 'live', None), dtype=('auto', 'float32', 'bfloat16'))
    for name, allowed in choices.items():
        if getattr(cfg, name) not in allowed:
            raise InputError(f'{name}: {getattr(cfg, name)!r} is not one of {", ".join(map(repr, filter(None, allowed)))}')
    for name in ('n_layer', 'n_head', 'n_embd', 'block_size', 'max_prompt_length', 'batch_size', 'tokens_per_batch',
                 'eval_interval', 'log_interval'):
        if getattr(cfg, name) < 1:
            raise InputError(f'{name}: {getattr(cfg, name)} is less than 1')
    for name in ('learning_rate', 'warmup_iters', 'min_lr', 'max_iters', 'epochs', 'weight_decay', 'grad_clip', 'eval_pairs',
                 'beta', 'gamma', 'label_smoothing', 'val_fraction', 'seed'):
        if (getattr(cfg, name) or 0) < 0:
            raise InputError(f'{name}: {getattr(cfg, name)} is less than 0')
    for name, limit in dict(val_fraction=1.0, label_smoothing=0.5, beta1=1.0, beta2=1.0).items():
        if not 0 <= (getattr(cfg, name) or 0) <= limit:
            raise InputError(f'{name}: {getattr(cfg, name)} is not between 0 and {limit}')
    if cfg.max_prompt_length >= cfg.max_length:
        raise InputError(f'max_prompt_length: {cfg.max_prompt_length} leaves no room for a response in max_length {cfg.max_length}')
    if {'max_iters', 'epochs'} <= cfg.given and cfg.max_iters:
        raise InputError('max_iters, epochs: give one of the two')
    ignored = {name for name in ('beta', 'gamma', 'label_smoothing') if name not in loss_parameters(cfg.loss)}
    ignored |= {'reference'} if not needs_reference(cfg.loss) else set()
    ignored |= {'n_layer', 'n_head', 'n_embd', 'block_size'} if cfg.init_from != 'scratch' else set()
    for name in sorted(ignored & cfg.given):
        if getattr(cfg, name) is not None:
            raise InputError(f'{name}: ignored with ' + (f'loss = {cfg.loss!r}' if name in (
                'beta', 'gamma', 'label_smoothing', 'reference') else f"init_from = {cfg.init_from!r} ('scratch' uses it)"))


def needs_reference(loss):
    return any(name.startswith('reference') for name in loss_parameters(loss))


def objective(cfg, logps, lengths, reference_logps, p):
    """The config's loss on summed log-probs (B, K), lengths (B, K), the reference's (B, K) or None, and p (B,).

    The objective gets what its signature names: log-probs, lengths, and its options where the config sets them.
    """
    given = dict(policy_chosen_logps=logps[:, 0], policy_rejected_logps=logps[:, -1],
                 chosen_lengths=lengths[:, 0], rejected_lengths=lengths[:, -1], p=p,
                 beta=cfg.beta, gamma=cfg.gamma, label_smoothing=cfg.label_smoothing)
    if reference_logps is not None:
        given |= dict(reference_chosen_logps=reference_logps[:, 0], reference_rejected_logps=reference_logps[:, -1])
    names = loss_parameters(cfg.loss)
    return LOSSES[cfg.loss](**{k: v for k, v in given.items() if k in names and v is not None})


# ----------------------------------------------------------------------------------------------------------------
# The data of a step


@functools.lru_cache(maxsize=2)
def permutation(n, seed, epoch):
    return np.random.default_rng([seed, epoch]).permutation(n)


def step_indices(step, n, batch_size, seed):
    """The pairs of a step: a slice of the epochs' permutations laid end to end, so it needs no state to resume."""
    at = np.arange(step * batch_size, (step + 1) * batch_size)
    return np.array([permutation(n, seed, int(i) // n)[int(i) % n] for i in at])


def micro_batches(sizes, tokens_per_batch):
    """Sizes of pairs in tokens -> lists of positions, each list within tokens_per_batch: first fit, longest first."""
    bins = []
    for i in np.argsort(-np.asarray(sizes), kind='stable'):
        for b in bins:
            if b[0] + sizes[i] <= tokens_per_batch:
                b[0] += sizes[i]
                b[1].append(int(i))
                break
        else:
            bins.append([sizes[i], [int(i)]])
    return [b[1] for b in bins]


def batches(pairs, indices, K, cfg):
    """The pairs at `indices`, with their first K responses, as packed batches on the device: (positions in `indices`,
    Batch), ... On a GPU with compile they are padded to one shape."""
    drawn = [pairs[i] for i in indices]
    drawn = [(prompt, responses[:K]) for prompt, responses in drawn]
    sizes = [len(prompt) + sum(map(len, responses)) for prompt, responses in drawn]
    for members in micro_batches(sizes, cfg.tokens_per_batch):
        fixed = cfg.compile and cfg.device == 'cuda'
        batch = pack([drawn[i] for i in members], pad_to=cfg.tokens_per_batch if fixed else 0).to(cfg.device)
        if fixed:
            batch.mask = block_mask(batch)
        yield members, batch


# ----------------------------------------------------------------------------------------------------------------
# Scoring, and the reference


def precision(cfg):
    return torch.autocast(cfg.device, dtype=torch.bfloat16, enabled=cfg.dtype == 'bfloat16')


@torch.no_grad()
def score(model, pairs, indices, K, cfg, what='scoring'):
    """log pi(y|x) of the first K responses of the pairs at `indices`: (n, K) float32 on the host."""
    out = np.zeros((len(indices), K), dtype=np.float32)
    with tqdm(total=len(indices), desc=what, unit=' pairs', disable=None, leave=False) as bar:
        for start in range(0, len(indices), 256):    # so many at a time are sorted into full batches
            some = indices[start:start + 256]
            for members, batch in batches(pairs, some, K, cfg):
                with precision(cfg):
                    logps = batch.sum_by_response(model.token_logps(batch))
                out[start + np.array(members)] = logps.cpu().numpy()
                bar.update(len(members))
    return out


def fingerprint(model):
    """A hash of a model's weights."""
    h = hashlib.sha256()
    for name, t in model.state_dict().items():
        h.update(name.encode() + t.cpu().contiguous().numpy().tobytes())
    return h.hexdigest()


def cached_reference(model, pairs, indices, cfg):
    """The reference's log-probs of the pairs at `indices`, computed where the cache lacks them: an (n, K) array mapped
    from a file beside the data. A zero there means not computed yet (log-probs are below it). The key holds all that
    the numbers depend on, so a sweep over beta or the learning rate pays once."""
    K, n = pairs.meta['responses'], len(pairs)
    key = hashlib.sha256(f'{fingerprint(model)} {pairs.hash} {cfg.dtype} {cfg.device}'.encode()).hexdigest()[:12]
    path = os.path.join(pairs.folder, f'{pairs.split}-reference-{key}.f32')
    with open(path, 'ab') as f:
        f.truncate(n * K * 4)
    table = np.memmap(path, dtype='<f4', mode='r+', shape=(n, K))
    missing = np.unique(indices)
    missing = missing[(table[missing] == 0).any(axis=1)]
    for start in range(0, len(missing), 4096):       # what an interruption can lose
        some = missing[start:start + 4096]
        table[some] = score(model, pairs, some, K, cfg, f'reference, {pairs.split}')
        table.flush()
    return table


# ----------------------------------------------------------------------------------------------------------------
# Evaluation


STATS = ('loss', 'rewards/chosen', 'rewards/rejected', 'rewards/margins', 'rewards/accuracies', 'logps/chosen', 'logps/rejected')


def statistics(losses, chosen_rewards, rejected_rewards, logps):
    """Sums over the pairs of what STATS names, as one tensor; an objective without rewards leaves zeros."""
    zero = torch.zeros_like(losses)
    c, r = (zero, zero) if chosen_rewards is None else (chosen_rewards, rejected_rewards)
    accuracy = (c > r).float() + 0.5 * (c == r).float()      # a tie counts one half
    rows = (losses.detach(), c, r, c - r, accuracy, logps[:, 0].detach(), logps[:, -1].detach())
    return torch.stack([row.double().sum() for row in rows])


def named(stats, n, cfg, K, prefix=''):
    """The sums over n pairs -> {metric: mean}, without what this objective or this data does not have."""
    names = [s for s in STATS if not s.startswith('rewards') or cfg.loss != 'sft']
    names = [s for s in names if s != 'logps/rejected' or K > 1]
    return {prefix + s: v / n for s, v in zip(STATS, stats.tolist()) if s in names}


def evaluate(model, reference, pairs, indices, cfg, path=None):
    """Metrics of the validation pairs at `indices`; with a path, a line for each pair is written there."""
    K, n = pairs.meta['responses'], len(indices)
    logps = torch.from_numpy(score(model, pairs, indices, K, cfg, 'evaluating'))
    ref = None
    if reference is not None:
        ref = torch.tensor(score(reference, pairs, indices, K, cfg, 'reference') if isinstance(reference, GPT) else reference[indices])
    rows = pairs.table[indices]
    lengths, p = torch.tensor(rows['responses'].astype(np.int64)), torch.tensor(rows['p'])
    result = objective(cfg, logps, lengths, ref, p)
    metrics = named(statistics(*result, logps), n, cfg, K, 'eval/')
    if path:
        nothing = [None] * n
        columns = dict(
            id=rows['id'].tolist(), chosen_logps=logps[:, 0].tolist(), rejected_logps=logps[:, -1].tolist() if K > 1 else nothing,
            reference_chosen_logps=nothing if ref is None else ref[:, 0].tolist(),
            reference_rejected_logps=nothing if ref is None else ref[:, -1].tolist(),
            chosen_length=lengths[:, 0].tolist(), rejected_length=lengths[:, -1].tolist() if K > 1 else nothing,
            chosen_reward=nothing if result[1] is None else result[1].tolist(),
            rejected_reward=nothing if result[2] is None else result[2].tolist())
        with open(path + '.tmp', 'w') as f:
            f.writelines(json.dumps(dict(zip(columns, row))) + '\n' for row in zip(*columns.values()))
        os.replace(path + '.tmp', path)
    return metrics


# ----------------------------------------------------------------------------------------------------------------
# Checkpoints and the run's folder


def save(path, state):
    """Write a checkpoint so that, whatever happens on the way, `path` is a whole one: the old or the new."""
    try:
        with open(path + '.tmp', 'wb') as f:
            torch.save(state, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(path + '.tmp', path)
    except (OSError, RuntimeError) as e:
        with contextlib.suppress(OSError):
            os.remove(path + '.tmp')
        raise InputError(f'{path}: could not be written ({str(e).splitlines()[0][:120]}); the one before is as it was')


def lock(out_dir):
    """Hold out_dir until this process ends, however it ends. -> the open file."""
    try:
        os.makedirs(out_dir, exist_ok=True)
        f = open(os.path.join(out_dir, 'lock'), 'a+')
    except OSError as e:
        raise InputError(f'out_dir: {out_dir} cannot be written ({e.strerror})')
    try:
        fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        f.seek(0)
        raise InputError(f'out_dir: {out_dir} is in use by another run (process {f.read().strip() or "unknown"})')
    f.truncate(0)
    f.write(str(os.getpid()))
    f.flush()
    return f


def header(cfg, train_pairs, val_pairs):
    """The first line of log.jsonl: all that it takes to repeat the run."""
    def git(*args):
        result = subprocess.run(['git', '-C', os.path.dirname(os.path.abspath(__file__)), *args], capture_output=True, text=True)
        return result.stdout.strip() if result.returncode == 0 else ''
    commit = git('rev-parse', '--short', 'HEAD') + ('+changes' if git('status', '--porcelain', '--untracked-files=no') else '')
    name = torch.cuda.get_device_name() if cfg.device == 'cuda' else f'{platform.machine()} CPU, {torch.get_num_threads()} threads'
    return dict(config=dataclasses.asdict(cfg), commit=commit, hardware=name, data=dict(train=train_pairs.hash, val=val_pairs.hash),
                versions=dict(python=platform.python_version(), torch=torch.__version__, numpy=np.__version__))


# ----------------------------------------------------------------------------------------------------------------
# The loop


def learning_rate(step, cfg):
    """Linear warm-up to cfg.learning_rate, then the schedule, down to min_lr at max_iters."""
    if step < cfg.warmup_iters:
        return cfg.learning_rate * (step + 1) / (cfg.warmup_iters + 1)
    done = (step - cfg.warmup_iters) / max(1, cfg.max_iters - cfg.warmup_iters)
    left = {'cosine': 0.5 * (1 + math.cos(math.pi * done)), 'linear': 1 - done, 'constant': 1.0}[cfg.schedule]
    return cfg.min_lr + left * (cfg.learning_rate - cfg.min_lr)


def settle_machine(cfg):
    """Replace 'auto' by what this machine has, and make its float32 matrix products fast where that costs nothing."""
    if cfg.device == 'auto':
        cfg.device = 'cuda' if torch.cuda.is_available() else 'cpu'
    if cfg.device not in ('cuda', 'cpu') or (cfg.device == 'cuda' and not torch.cuda.is_available()):
        raise InputError(f'device: {cfg.device!r} is not to be had here; there is cpu' + ', cuda' * torch.cuda.is_available())
    if cfg.dtype == 'auto':
        cfg.dtype = 'bfloat16' if cfg.device == 'cuda' and not cfg.eval_only else 'float32'
    if cfg.compile is None:
        cfg.compile = cfg.device == 'cuda'
    if cfg.device == 'cpu':
        with contextlib.suppress(OSError, AttributeError):    # glibc: keep freed memory rather than fault it in anew
            for option in (-1, -3):                           # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
                ctypes.CDLL(None).mallopt(option, 2**30)
        # 'medium' lets oneDNN multiply: twice as fast on some CPUs, but bf16 on others, so look before trusting it
        a, b = torch.randn(2, 256, 256, generator=torch.Generator().manual_seed(0))
        torch.set_float32_matmul_precision('medium')
        if (a @ b - (a.double() @ b.double())).abs().max() > 1e-4:
            torch.set_float32_matmul_precision('highest')


def load_policy(cfg):
    """The policy at the start -> GPT on cfg.device; made by init_config first where it is not there yet."""
    if cfg.init_from == 'scratch':
        tokenizer = get_tokenizer(cfg.tokenizer)
        torch.manual_seed(cfg.seed)
        return GPT(GPTConfig(cfg.block_size, tokenizer.n_vocab, cfg.n_layer, cfg.n_head, cfg.n_embd, tokenizer.eot_token)).to(cfg.device)
    if cfg.init_config and not os.path.exists(os.path.join(cfg.init_from, 'ckpt.pt')):
        print(f'{cfg.init_from} is not there yet: training it first, python train.py {cfg.init_config}')
        train(load_config([cfg.init_config, f'--out_dir={cfg.init_from}', f'--data_dir={cfg.data_dir}', f'--device={cfg.device}']))
        print(f'{cfg.init_from} is there; going on with {cfg.out_dir}')
    return GPT.from_pretrained(cfg.init_from).to(cfg.device)


def check_fit(cfg, model, meta):
    """Raise InputError where the config, the prepared data and the model do not go together."""
    for name, value in meta['settings'].items():     # data prepared before, given by its folder, has settings of its own
        if cfg.dataset != meta['settings']['dataset'] and name in cfg.given - {'dataset'} and getattr(cfg, name) != value:
            raise InputError(f'{name}: {getattr(cfg, name)!r}, but {cfg.dataset} was prepared with {value!r}')
    tokenizer, context, vocab = meta['settings']['tokenizer'], model.config.block_size, model.config.vocab_size
    if meta['settings']['max_length'] > context:
        raise InputError(f'max_length: {meta["settings"]["max_length"]} exceeds the context of {cfg.init_from}, {context} tokens')
    if not meta['n_vocab'] <= vocab < meta['n_vocab'] + 128:     # a vocabulary may be padded to a round number
        raise InputError(f'tokenizer: {tokenizer!r} has {meta["n_vocab"]} tokens, and {cfg.init_from} was made for {vocab}')
    K, used = meta['responses'], 1 if cfg.loss == 'sft' else 2
    if K < used:
        raise InputError(f'dataset: {cfg.dataset} has one response to a prompt, and loss = {cfg.loss!r} compares two')
    if meta['longest_pair'] > cfg.tokens_per_batch:
        raise InputError(f'tokens_per_batch: {cfg.tokens_per_batch} is less than the longest pair, {meta["longest_pair"]} tokens')


def train(cfg):
    """Run the config from its first line to its last table. -> the last evaluation's metrics."""
    started = time.perf_counter()
    settle_machine(cfg)
    out = functools.partial(os.path.join, cfg.out_dir)
    if os.path.exists(out('ckpt.pt')) and not (cfg.resume or cfg.overwrite or cfg.eval_only):
        raise InputError(f'out_dir: {cfg.out_dir} holds a run; --resume=True goes on with it, --overwrite=True starts anew')
    if cfg.resume and not os.path.exists(out('ckpt.pt')):
        raise InputError(f'resume: there is no {out("ckpt.pt")}')

    # the policy, the pairs
    model = load_policy(cfg)
    folder = prepare(cfg)
    train_pairs, val_pairs = Pairs(folder, 'train'), Pairs(folder, 'val')
    check_fit(cfg, model, train_pairs.meta)
    K = train_pairs.meta['responses']
    used = 1 if cfg.loss == 'sft' else K                   # responses that training looks at
    n = len(train_pairs)
    if n == 0 and not cfg.eval_only:
        raise InputError(f'val_fraction: {cfg.val_fraction} leaves no pair to train on')
    val = np.arange(len(val_pairs))
    if cfg.eval_pairs and cfg.eval_pairs < len(val):
        val = np.sort(np.random.default_rng(cfg.seed).permutation(len(val))[:cfg.eval_pairs])
    if cfg.eval_only and not len(val):
        raise InputError(f'val_fraction: {cfg.val_fraction} leaves no pair to evaluate')
    if not cfg.max_iters:
        cfg.max_iters = math.ceil(cfg.epochs * n / cfg.batch_size)
    held = lock(cfg.out_dir)

    # the reference: frozen, and its log-probs known before the first step
    reference_train = reference_val = None
    if needs_reference(cfg.loss):
        reference = model if cfg.reference != 'live' else copy.deepcopy(model)
        reference.requires_grad_(False)
        if cfg.reference == 'live':
            reference_train = reference_val = reference
        else:
            seen = np.arange(n) if cfg.max_iters * cfg.batch_size >= n else np.concatenate(
                [step_indices(s, n, cfg.batch_size, cfg.seed) for s in range(cfg.max_iters)])
            if not cfg.eval_only:
                reference_train = cached_reference(model, train_pairs, seen, cfg)
            if len(val):
                reference_val = cached_reference(model, val_pairs, val, cfg)
        model.requires_grad_(True)

    # where the run stands
    step, best, evaluated, log_bytes, first, warned = 0, math.inf, -1, 0, None, False
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW([dict(params=decayed, weight_decay=cfg.weight_decay), dict(params=others, weight_decay=0.0)],
                                  lr=cfg.learning_rate, betas=(cfg.beta1, cfg.beta2), fused=True)
    if cfg.resume:
        checkpoint = load_checkpoint(out('ckpt.pt'))
        if checkpoint['data'] != train_pairs.hash and not cfg.eval_only:
            raise InputError(f'dataset: {folder} is not the data that {out("ckpt.pt")} was trained on')
        model.load_state_dict(checkpoint['model'])
        optimizer.load_state_dict(checkpoint['optimizer'])
        step, best, evaluated, log_bytes, first, warned = (
            checkpoint[k] for k in ('step', 'best', 'evaluated', 'log_bytes', 'first', 'warned'))
        del checkpoint
    if cfg.compile:
        model.hidden = torch.compile(model.hidden, dynamic=cfg.device == 'cpu')

    if cfg.eval_only:
        metrics = evaluate(model, reference_val, val_pairs, val, cfg, out('eval.jsonl'))
        print(f'{len(val)} validation pairs -> {out("eval.jsonl")}')
        print(table(metrics))
        return metrics

    log = open(out('log.jsonl'), 'r+' if cfg.resume else 'w')
    log.seek(log_bytes)
    log.truncate()                                         # lines written after the checkpoint will be written again

    def write_log(line):
        log.write(json.dumps(line) + '\n')
        log.flush()

    def save_checkpoint():
        config = dataclasses.asdict(cfg)
        weights = dict(model={k: v.detach() for k, v in model.state_dict().items()}, config=config, step=step,
                       model_config=dataclasses.asdict(model.config))
        save(out('ckpt.pt'), weights | dict(optimizer=optimizer.state_dict(), best=best, evaluated=evaluated,
                                            log_bytes=log.tell(), first=first, warned=warned, data=train_pairs.hash))
        return weights

    def load_step(step):
        """The step's micro-batches, each with its reference log-probs and labels, on their way to the device."""
        if step >= cfg.max_iters:
            return []
        indices, ready = step_indices(step, n, cfg.batch_size, cfg.seed), []
        for members, batch in batches(train_pairs, indices, used, cfg):
            some = indices[members]
            p = torch.tensor(train_pairs.table['p'][some]).to(cfg.device)
            ref = reference_train[some] if isinstance(reference_train, np.ndarray) else None
            ready.append((batch, None if ref is None else torch.tensor(ref).to(cfg.device), p))
        return ready

    stop = []                                              # a signal that arrived: the step is finished first
    handlers = {s: signal.signal(s, lambda number, frame: stop.append(number)) for s in (signal.SIGTERM, signal.SIGINT)}
    if not cfg.resume:
        write_log(header(cfg, train_pairs, val_pairs))
    print(f'{model.num_params():,} parameters, {n:,} pairs to train on, {len(val):,} to validate; {cfg.max_iters} steps of '
          f'{cfg.batch_size} pairs on {cfg.device} in {cfg.dtype}')
    bar = tqdm(total=cfg.max_iters, initial=step, unit=' steps', disable=None)
    waiting = load_step(step)
    since, pairs_since, tokens_since = time.perf_counter(), 0, 0
    metrics = {}
    while True:

        # evaluate, and make what there is safe
        if (step % cfg.eval_interval == 0 or step == cfg.max_iters) and step != evaluated:
            paused = time.perf_counter()
            if len(val):
                metrics = evaluate(model, reference_val, val_pairs, val, cfg, out('eval.jsonl') if step == cfg.max_iters else None)
                write_log(dict(step=step) | metrics)
                tqdm.write(f'step {step}: ' + ', '.join(f'{k} {v:.4f}' for k, v in metrics.items()))
                first = first or metrics
                if both_fall(first, metrics) and not warned:
                    warned = True
                    fall = first['eval/logps/chosen'] - metrics['eval/logps/chosen']
                    tqdm.write(f'warning: the chosen responses have become less likely too, by {fall:.1f} nats: what both '
                               'lose goes to responses that are in no pair. A larger beta, a smaller learning rate or '
                               'fewer steps hold it back')
            evaluated, improved = step, metrics.get('eval/loss', math.inf) < best
            best = min(best, metrics.get('eval/loss', math.inf))
            weights = save_checkpoint()
            if improved:
                save(out('best.pt'), weights)
            since += time.perf_counter() - paused          # rates leave evaluation out
        if step == cfg.max_iters or stop:
            break

        # forward and backward, a micro-batch at a time; the gradient is of the mean over all the step's pairs
        lr = learning_rate(step, cfg)
        stats = torch.zeros(len(STATS), dtype=torch.float64, device=cfg.device)
        for batch, ref, p in waiting:
            with precision(cfg):
                logps = batch.sum_by_response(model.token_logps(batch))             # (pairs, used)
                if isinstance(reference_train, GPT):
                    with torch.no_grad():
                        ref = batch.sum_by_response(reference_train.token_logps(batch))
            losses, chosen_rewards, rejected_rewards = objective(cfg, logps, batch.lengths, ref, p)
            (losses.sum() / cfg.batch_size).backward()
            stats += statistics(losses, chosen_rewards, rejected_rewards, logps)
            tokens_since += batch.starts[-1]
        limit = cfg.grad_clip or math.inf
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), limit)
        waiting = load_step(step + 1)                      # the host packs the next step while the device works

        # nothing that is not a number reaches the weights
        if not math.isfinite(grad_norm.item()) or not math.isfinite(stats[0].item()):
            if step != evaluated:
                save_checkpoint()
            ids = train_pairs.table['id'][step_indices(step, n, cfg.batch_size, cfg.seed)].tolist()
            raise InputError(f'step {step}: loss {stats[0].item() / cfg.batch_size}, gradient norm {grad_norm.item()}; the weights are as '
                             f'they were, in {out("ckpt.pt")}. The pairs of this step, by their record in the source: {ids}')
        for group in optimizer.param_groups:
            group['lr'] = lr
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        pairs_since += cfg.batch_size

        if step % cfg.log_interval == 0:
            now = time.perf_counter()
            line = dict(step=step) | named(stats, cfg.batch_size, cfg, used) | dict(
                grad_norm=grad_norm.item(), lr=lr, pairs_per_s=pairs_since / (now - since), tokens_per_s=tokens_since / (now - since))
            write_log(line)
            bar.set_postfix({k.split('/')[-1]: f'{v:.3f}' for k, v in line.items() if k in ('loss', 'rewards/margins', 'rewards/accuracies')})
            if step == 0:
                tqdm.write(f'first step after {now - started:.1f} s, of which {now - since:.1f} s the step itself'
                           + (', compiling included' if cfg.compile else ''))
            since, pairs_since, tokens_since = now, 0, 0
        step += 1
        bar.update()
    bar.close()
    for s, handler in handlers.items():
        signal.signal(s, handler)
    if stop:
        save_checkpoint()
        print(f'stopped at step {step}; to go on: python train.py ... --resume=True')
        raise SystemExit(128 + stop[0])
    log.close()
    held.close()
    if first:
        print(table(metrics, first))
    if cfg.dataset == 'demo' and cfg.loss != 'sft':
        import demo
        demo.report(model, cfg)
    return metrics


def both_fall(first, now):
    """Have the chosen responses become less likely together with the rejected ones, by more than a nat each?"""
    falls = [now[k] - first[k] for k in ('eval/logps/chosen', 'eval/logps/rejected') if k in now and k in first]
    return len(falls) == 2 and max(falls) < -1


def table(metrics, before=None):
    """Metrics as lines of text, with what they were at the start beside them."""
    lines = [f'{"":24}{"before":>10}{"after":>10}'] if before else []
    for name, value in metrics.items():
        lines.append(f'{name:24}' + (f'{before[name]:>10.4f}' if before else '') + f'{value:>10.4f}')
    return '\n'.join(lines)


if __name__ == '__main__':
    try:
        train(load_config(sys.argv[1:]))
    except InputError as e:
        sys.exit(f'error: {e}')
