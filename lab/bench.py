"""
Speed and memory beside TRL, transformers and tiktoken, on whatever device there is.

    python -m lab.bench all                                  # every section; a table at the end
    python -m lab.bench step memory --dataset=pairs.jsonl    # two sections, your data
    python -m lab.bench step --model=llama --dtype=bfloat16  # the shape of SmolLM2-135M

    step      pairs/s of an optimiser step: DPO beside TRL's DPOTrainer, SimPO beside CPOTrainer
    memory    peak memory of the same steps
    growth    ours alone: pairs/s and peak memory as max_length and the pairs of a step grow
    prepare   tokens/s of prepare.py's path beside tiktoken's batch encoding of the same texts
    generate  tokens/s of sample.py's generate beside transformers': greedy, the same weights
    start     seconds from the command to the end of train.py's first step

Contestants live in processes of their own and take turns: one works while the other waits. A ratio
is the median over the rounds, with the least and the greatest. A round of `step` goes from token
ids to updated weights, and for DPO includes the forward pass of a live reference. TRL runs its own
training loop, at the fastest of the settings tried (each is printed). Both sides have the same
weights and token ids; their losses and gradient norms are compared. Utilisation counts the
arithmetic that is needed (prompt once, vocabulary at response positions, no padding) against the
fastest matrix product of the model's shapes, measured right after the rounds.

Needs Linux. Left out: evaluation, checkpoints, several GPUs, and the quality of what is learnt
(weights are random).
"""
import contextlib
import itertools
import json
import multiprocessing
import os
import queue
import random
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from importlib import metadata
from importlib.util import find_spec

import numpy as np
import torch
from torch.utils.benchmark import Timer

import train
from configurator import InputError, configure, first_line, run
from model import GPT, GPTConfig
from prepare import Pairs, prepare
from sample import generate
from tokenizer import get_tokenizer
from weights import load, save

MODELS = dict(
    gpt2=GPTConfig(), tiny=GPTConfig(n_layer=2, n_head=2, n_embd=64),
    llama=GPTConfig(block_size=8192, vocab_size=49152, n_layer=30, n_head=9, n_kv_head=3,
                    n_embd=576, n_inner=1536, norm='rms', gated=True, bias='none',
                    rope_theta=100000.0, model_type='llama'))
WORDS = 'the of and to in is it you that he was for on are with as his they be at one'.split()
CONTESTS, TABLE = {}, []        # what has been measured; rows of the last table


@dataclass
class Options(train.Config):    # the dataset, lengths, device, dtype, compile, ... are train.py's
    model: str = 'gpt2'         # gpt2 (124M), llama (135M) or tiny; random weights
    losses: str = 'dpo,simpo'
    orders: str = 'own,sorted'  # a fixed random order; steps of pairs of like length
    repeats: int = 3            # rounds that count
    warmup: int = 0             # rounds before them; 0: 1 on a CPU, 4 on a GPU
    prompts: int = 16           # generate
    new_tokens: int = 128       # generate
    peers: bool = True          # step and memory: beside TRL, where it is installed
    # of train.py, with defaults of their own
    dataset: str = ''           # empty: random words, as long as HH-harmless's texts
    tokenizer: str = 'gpt2'
    val_fraction: float = 0.0
    bad_records: str = 'skip'
    reference: str = 'live'
    batch_size: int = 0         # 0: 8 on a CPU, 64 on a GPU


def row(section, what, unit, numbers, ratios=(), note=''):
    """A line now, and again in the last table. `numbers`: ours and, if it takes part, the peer's;
    `ratios`: how many times better ours is, by round."""
    ratio = f'{np.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})' if ratios else ''
    numbers = [f'{x:,.0f}' if x >= 1000 else f'{x:.3g}' for x in numbers]
    TABLE.append([section, what, unit, *(numbers + [''])[:2], ratio, note])
    print('* ' + ', '.join(filter(None, TABLE[-1])))


def speed_row(section, what, unit, amount, rounds, note=''):
    """The speed over all rounds, lists of answers of one or two contestants: `amount` in each."""
    took = np.array([[answer['seconds'] for answer in answers] for answers in rounds])
    ratios = (took[1:] / took[0]).reshape(-1).tolist()
    row(section, what, f'{unit}/s', amount * took.shape[1] / took.sum(1), ratios, note)


# --------------------------------------------------------------------------------------------------
# The pairs, the arithmetic they need, the machine


def write_texts(path, n=10000):
    """n records of random words: lengths are log-normals fitted to prompt, chosen and rejected of
    HH-harmless's test split (2,312 pairs, GPT-2's tokens)."""
    rng = random.Random(4)
    with open(path, 'w') as f:
        for _ in range(n):
            sizes = [rng.lognormvariate(*fit) for fit in ((4.38, 1), (3.37, 0.87), (3.56, 0.93))]
            texts = [' ' + ' '.join(rng.choices(WORDS, k=1 + int(size))) for size in sizes]
            f.write(json.dumps(dict(zip(('prompt', 'chosen', 'rejected'), texts))) + '\n')
    return path


def get_pairs(cfg):
    """[(prompt, [chosen, rejected]), ...], lists of token ids, in a fixed random order."""
    pairs, end = Pairs(prepare(cfg)), MODELS[cfg.model].vocab_size - 1
    drawn = [pairs[i] for i in np.random.default_rng(2).permutation(pairs.train)]
    # TRL ends each response; to random weights, it matters little which ids the others are
    return [((prompt % end).tolist(), [(r[:-1] % end).tolist() + [end] for r in responses])
            for prompt, responses in drawn]


def draw_steps(pairs, batch_size, order, n):
    """The pairs of n steps: as they come, or of like length, at even distances in length."""
    starts = range(0, n * batch_size, batch_size)
    if order == 'sorted':
        pairs = sorted(pairs, key=lambda pair: len(pair[0]) + max(map(len, pair[1])))
        starts = [int((i + 0.5) / n * max(0, len(pairs) - batch_size)) for i in range(n)]
        random.Random(3).shuffle(starts)
    return [[pairs[i % len(pairs)] for i in range(start, start + batch_size)] for start in starts]


def needed(config, steps, loss):
    """Floating-point operations: a forward pass, a backward pass of two, for DPO the reference's."""
    c, width, total = config, config.n_head * config.head_dim, 0
    block = c.n_embd * (2 * width + 2 * c.n_kv_head * c.head_dim + (2 + c.gated) * c.n_inner)
    for prompt, (chosen, rejected) in itertools.chain(*steps):
        P, C, R = len(prompt), len(chosen), len(rejected)
        total += 2 * c.n_layer * block * (P + C + R) + 2 * c.vocab_size * c.n_embd * (C + R)
        total += 4 * c.n_layer * width * (P * P / 2 + C * (P + C / 2) + R * (P + R / 2))
    return (4 if loss == 'dpo' else 3) * total


def matmul_rate(cfg):
    """FLOP/s of the fastest of the model's own matrix products and a square one."""
    yield
    c, best = MODELS[cfg.model], 0.0
    tokens, square = (2048, 2048) if cfg.device == 'cpu' else (16384, 8192)
    for m, k, n in ((tokens, c.n_embd, c.n_inner), (tokens, c.n_inner, c.n_embd),
                    (tokens // 4, c.n_embd, c.vocab_size), (square, square, square)):
        a, b = (torch.randn(shape, device=cfg.device).to(getattr(torch, cfg.dtype))
                for shape in ((m, k), (k, n)))
        timer = Timer('torch.mm(a, b, out=out)', globals=dict(torch=torch, a=a, b=b, out=a @ b),
                      num_threads=torch.get_num_threads())
        best = max(best, 2 * m * k * n / min(timer.blocked_autorange(min_run_time=0.5).times))
    yield best


def clock(device):
    """The time when the device has done all that it was asked."""
    if device == 'cuda':
        torch.cuda.synchronize()
    return time.perf_counter()


def peak_memory(device):
    """The most GiB this process has had so far: tensors on a GPU, or resident memory."""
    if device == 'cuda':
        return torch.cuda.max_memory_allocated() / 2**30
    with open('/proc/self/status') as f:     # a child's ru_maxrss would start at its parent's
        return next(int(line.split()[1]) / 2**20 for line in f if line.startswith('VmHWM'))


def machine(device):
    """Hardware, versions and commit."""
    with open('/proc/cpuinfo') as f:
        cpu = f.read().partition('model name\t: ')[2].partition('\n')[0]
    name = torch.cuda.get_device_name() if device == 'cuda' else cpu
    versions = [f'{library} {metadata.version(library)}' for library in (
        'torch', 'transformers', 'trl', 'tiktoken') if find_spec(library)]
    git = subprocess.run('git describe --always --dirty'.split(), capture_output=True, text=True)
    return (f'{name}, {torch.get_num_threads()} threads; {", ".join(versions)}; '
            f'commit {git.stdout.strip()}')


# --------------------------------------------------------------------------------------------------
# Processes that take turns


def set_up(work, *args):
    """In the contestant's process. Its work is a generator: it yields when all is set up, and then
    once a turn."""
    global contestant
    for stream in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    contestant = work(*args)
    next(contestant)


def turn():
    return next(contestant)


def take_turns(n, *contestants):
    """n rounds of each (work, *args), in processes of their own -> for each the list of what it
    yields."""
    with contextlib.ExitStack() as stack:
        pools = []
        for contestant in contestants:
            pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context('spawn'))
            pools.append(stack.enter_context(pool))
            pool.submit(set_up, *contestant).result()
        rounds = [[pool.submit(turn).result() for pool in pools] for _ in range(n)]
    return [list(answers) for answers in zip(*rounds)]


def repeat(device, work):
    """A turn is one call of work()."""
    yield
    while True:
        begin, result = clock(device), work()
        yield dict(seconds=clock(device) - begin, result=result)


# --------------------------------------------------------------------------------------------------
# Rounds of a step: ours, TRL's


def ours(cfg, steps):
    """The steps of train.train(), by the same functions."""
    B, pairs = cfg.batch_size, list(itertools.chain(*steps))
    cfg.options = train.loss_options(cfg)
    train.setup_machine(cfg)
    model = load(cfg.init_from).to(cfg.device)
    reference, *_ = train.make_reference(model, pairs, np.arange(len(pairs)), cfg)
    optimizer = train.make_optimizer(model, cfg)

    def load_step(k):
        return list(train.batches(pairs, np.arange(len(pairs))[k * B:(k + 1) * B], 2, cfg))
    waiting = load_step(0)
    yield
    for k in range(len(steps)):
        begin, sums = clock(cfg.device), 0
        for rows, batch in waiting:
            with train.autocast(cfg):
                logps = batch.sum_by_response(model.token_logps(batch))             # (B, 2)
            reference_logps = batch.sum_by_response(reference(rows, batch)) if reference else None
            losses, *rewards = train.apply_loss(cfg, logps, reference_logps, batch.lengths,
                                                dict(p=torch.ones(len(rows)).to(cfg.device)))
            (losses.sum() / B).backward()
            sums = sums + train.metric_sums(losses, *rewards, logps)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip)
        waiting = load_step(k + 1)
        loss, norm = sums[0].item() / B, norm.item()
        assert np.isfinite([loss, norm]).all(), 'the step is not finite'
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        end = clock(cfg.device)
        yield dict(seconds=end - begin, loss=loss, norm=norm, peak=peak_memory(cfg.device))


def trl_trainer(cfg, steps, rows, attention, compiled):
    """DPOTrainer, or CPOTrainer with SimPO's loss. The words of its texts are our token ids."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from trl import DPOConfig, DPOTrainer
    from trl.experimental.cpo import CPOConfig, CPOTrainer
    cpu, dpo, config = cfg.device == 'cpu', cfg.loss == 'dpo', MODELS[cfg.model]
    objective = dict(beta=0.1) if dpo else dict(
        loss_type='simpo', beta=2.0, simpo_gamma=0.5, cpo_alpha=0.0)
    args = (DPOConfig if dpo else CPOConfig)(
        output_dir=cfg.data_dir, max_steps=len(steps), per_device_train_batch_size=rows,
        gradient_accumulation_steps=cfg.batch_size // rows, max_length=config.block_size,
        train_sampling_strategy='sequential', learning_rate=cfg.learning_rate, weight_decay=0.0,
        lr_scheduler_type='constant', optim='adamw_torch_fused', max_grad_norm=cfg.grad_clip,
        bf16=cfg.dtype == 'bfloat16', torch_compile=compiled, gradient_checkpointing=False,
        use_cpu=cpu, dataloader_num_workers=0 if cpu else 2, dataloader_pin_memory=not cpu,
        logging_steps=1, logging_nan_inf_filter=False, save_strategy='no', report_to='none',
        model_init_kwargs=dict(attn_implementation=attention, dtype='float32'), **objective)
    end, last = '<|endoftext|>', config.vocab_size - 1
    ids = {str(i): i for i in range(last)} | {end: last}
    words = Tokenizer(models.WordLevel(ids, unk_token=end))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token=end, pad_token=end)
    data = []
    for prompt, responses in itertools.chain(*steps):
        texts = [''.join(f' {i}' for i in part) for part in (prompt, *(r[:-1] for r in responses))]
        data.append(dict(prompt=texts[0], chosen=texts[1] + end, rejected=texts[2] + end))
    return (DPOTrainer if dpo else CPOTrainer)(
        model=cfg.init_from, args=args, train_dataset=Dataset.from_list(data),
        processing_class=tokenizer)


def trl(cfg, steps, *settings):
    """The trainer's own train(), in a thread that stands still between the turns."""
    train.setup_machine(cfg)                 # tuned as ours is
    from transformers import TrainerCallback
    answers, turns = queue.Queue(), queue.Queue()

    class Turns(TrainerCallback):
        def on_train_begin(self, *args, **kwargs):
            self.pause()

        def on_log(self, args, state, control, logs, **kwargs):
            took, peak = clock(cfg.device) - self.begin, peak_memory(cfg.device)
            self.pause(dict(seconds=took, loss=logs['loss'], norm=logs['grad_norm'], peak=peak))

        def pause(self, answer=None):
            answers.put(answer)
            turns.get()
            self.begin = clock(cfg.device)

    def run_trainer():
        try:
            trainer.train()
        except Exception as e:               # of any library
            answers.put(e)
    trainer = trl_trainer(cfg, steps, *settings)
    trainer.add_callback(Turns())
    threading.Thread(target=run_trainer, daemon=True).start()
    while True:
        answer = answers.get()
        if isinstance(answer, Exception):
            raise RuntimeError(first_line(answer))
        yield answer
        turns.put('go')


# --------------------------------------------------------------------------------------------------
# The sections


def search(cfg, steps):
    """TRL's settings that run here -> [(seconds, peak memory, words, settings), ...], fastest first.

    Pairs in a forward pass: fewer than a step's, with gradients accumulated, need less padding.
    Not tried: padding_free, which TRL 1.16 turns off itself; offloading and gradient checkpointing,
    which cost time."""
    B, cpu, tried = cfg.batch_size, cfg.device == 'cpu', []
    rows = sorted({n for n in (1 if cpu else B, B // 4, B) if n and B % n == 0})
    axes = rows, ['sdpa', 'eager'] if cpu else ['sdpa'], sorted({False, cfg.compile})
    for settings in itertools.product(*axes):
        words = f'TRL {settings[1]}, {settings[0]} a pass' + ', compile' * settings[2]
        try:
            last = take_turns(cfg.warmup + 1, (trl, cfg, steps, *settings))[0][-1]
        except RuntimeError as e:
            print(f'  {cfg.loss}, {words}: does not run here ({e})')
            continue
        tried.append((last['seconds'], last['peak'], words, settings))
        print(f'  {cfg.loss}, {words}: {B / last["seconds"]:.2f} pairs/s, {last["peak"]:.2f} GiB')
    return sorted(tried)


def contest(cfg, order, peers):
    """Steps of ours and, with `peers`, of TRL's at its fastest -> what it is, the rounds of each, a
    note, TRL's settings."""
    steps = draw_steps(get_pairs(cfg), cfg.batch_size, order, cfg.warmup + cfg.repeats)
    tried = search(cfg, steps) if peers and find_spec('trl') else []
    theirs = [(trl, cfg, steps, *settings) for *_, settings in tried[:1]]
    rounds = take_turns(len(steps), (ours, cfg, steps), *theirs)
    rate = take_turns(1, (matmul_rate, cfg))[0][0]
    what, note = f'{cfg.loss}, {order} order, {cfg.batch_size} pairs, {cfg.dtype}', ''
    if tried:
        what += f'; {tried[0][2]}'
        apart = max(max(abs(a['loss'] - b['loss']), abs(a['norm'] / b['norm'] - 1))
                    for a, b in zip(*rounds))
        differ = ': THEY DIFFER' if cfg.dtype == 'float32' and apart > 1e-3 else ''
        note = f'; losses and gradient norms within {apart:.0e}{differ}'
    rounds = [answers[cfg.warmup:] for answers in rounds]
    least = needed(MODELS[cfg.model], steps[cfg.warmup:], cfg.loss) / rate   # if products were all
    used = ' and '.join(f'{least / sum(a["seconds"] for a in answers):.0%}' for answers in rounds)
    return what, rounds, f'utilisation {used} of {rate / 1e9:,.0f} GFLOP/s{note}', tried


def contests(o):
    for key in itertools.product(o.losses.split(','), o.orders.split(',')):
        if key not in CONTESTS:
            CONTESTS[key] = contest(replace(o, loss=key[0]), key[1], o.peers)
        yield CONTESTS[key]


def step(o):
    for what, rounds, note, _ in contests(o):
        speed_row('step', what, 'pairs', o.batch_size, rounds, note)


def memory(o):
    for what, rounds, _, tried in contests(o):
        peaks = [answers[-1]['peak'] for answers in rounds]
        note = ', '.join(f'{peak:.2f} for {words}' for _, peak, words, _ in tried[1:])
        row('memory', what, 'GiB', peaks, [peak / peaks[0] for peak in peaks[1:]], note)


def growth(o):
    sizes = (8, 32) if o.device == 'cpu' else (8, 64, 256)
    for length, size in itertools.product((256, 512, 1024), sizes):
        cfg = replace(o, max_length=length, max_prompt_length=length // 2, batch_size=size)
        what, rounds, note, _ = contest(cfg, 'own', peers=False)
        note = f'{rounds[0][-1]["peak"]:.2f} GiB, {note}'
        speed_row('growth', f'max_length {length}, {what}', 'pairs', size, rounds, note)


def our_prepare(cfg):
    yield from repeat('cpu', lambda: prepare(replace(cfg, data_dir=tempfile.mkdtemp(dir=cfg.data_dir))))


def their_prepare(cfg):
    tokenizer, pairs = get_tokenizer(cfg.tokenizer), Pairs(prepare(cfg))
    parts = [part for i in pairs.train for part in (pairs[i][0], *(r[:-1] for r in pairs[i][1]))]
    texts = [tokenizer.decode(part.tolist()) for part in parts]
    encode = tokenizer.encoding.encode_ordinary_batch
    yield from repeat('cpu', lambda: len(encode(texts, num_threads=os.cpu_count())))


def preparation(o):
    uncut = replace(o, max_length=2**20, max_prompt_length=2**19)
    rounds = take_turns(1 + o.repeats, (our_prepare, uncut), (their_prepare, uncut))
    tokens = Pairs(rounds[0][0]['result']).meta['tokens']
    speed_row('prepare', f'{o.tokenizer}; tiktoken', 'tokens', tokens, [a[1:] for a in rounds])


def our_generate(cfg, prompts):
    model = load(cfg.init_from).to(cfg.device)
    repeat(cfg.device, lambda: generate(
        model, prompts, cfg.new_tokens, {-1}, temperature=0))                  # -1: nothing ends


def their_generate(cfg, prompts):
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained(cfg.init_from).to(cfg.device)
    longest = max(map(len, prompts))
    tokens, mask = (torch.tensor([[0] * (longest - len(row)) + row for row in rows]).to(cfg.device)
                    for rows in (prompts, [[1] * len(prompt) for prompt in prompts]))
    repeat(cfg.device, lambda: model.generate(
        tokens, attention_mask=mask, max_new_tokens=cfg.new_tokens, do_sample=False,
        pad_token_id=0)[:, longest:].tolist())


def generation(o):
    prompts, n = [prompt for prompt, _ in get_pairs(o)[:o.prompts]], o.warmup + o.repeats
    rounds = take_turns(n, (our_generate, o, prompts), (their_generate, o, prompts))
    same = sum(a == b for a, b in zip(*(answers[0]['result'] for answers in rounds)))
    what = f'{o.prompts} prompts, {o.new_tokens} new tokens, float32; transformers'
    speed_row('generate', what, 'tokens', o.prompts * o.new_tokens,
              [answers[o.warmup:] for answers in rounds], f'{same} responses are the same')


def start(o):
    """config/dpo_gpt2.py on these weights, twice: the second finds data and reference prepared."""
    command = [sys.executable, '-u', 'train.py', 'config/dpo_gpt2.py', '--max_iters=8',
               '--eval_pairs=1', '--overwrite', f'--out_dir={os.path.join(o.data_dir, "run")}']
    command += [f'--{name}={getattr(o, name)}' for name in (
        'init_from', 'dataset', 'tokenizer', 'data_dir', 'bad_records', 'batch_size', 'device',
        'dtype', 'compile', 'tokens_per_batch')]
    took, pipes = [], dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    for _ in range(2):
        begin = time.perf_counter()
        with subprocess.Popen(command, **pipes) as process:
            for line in process.stdout:
                if line.startswith('first step'):
                    break
            else:
                raise RuntimeError(f'train.py, before its first step: {line.strip()}')
            took.append(time.perf_counter() - begin)
            process.kill()
    note = f'data and reference prepared; {took[0]:.1f} before; without imports: {line.strip()}'
    row('start', f'{o.batch_size} pairs, {o.dtype}', 's', took[1:], note=note)


# --------------------------------------------------------------------------------------------------
# The command

SECTIONS = dict(step=step, memory=memory, growth=growth, prepare=preparation, generate=generation,
                start=start)


def read_options(argv):
    """[SECTION ...] [--name=value ...] -> (names of sections, Options). Raises InputError."""
    sections = [arg for arg in argv if not arg.startswith('-')]
    o = configure(Options, [arg for arg in argv if arg.startswith('-')])
    for name, values, choices in (
            ('section', sections, [*SECTIONS, 'all']), ('model', [o.model], list(MODELS)),
            ('losses', o.losses.split(','), ['dpo', 'simpo']),
            ('orders', o.orders.split(','), ['own', 'sorted'])):
        for value in values:
            if value not in choices:
                raise InputError(f'{name}: {value!r} is not one of {", ".join(choices)}')
    train.load_config([f'--device={o.device}', f'--dtype={o.dtype}'])
    train.setup_machine(o)
    cpu = o.device == 'cpu'
    o.batch_size, o.warmup = o.batch_size or (8 if cpu else 64), o.warmup or (1 if cpu else 4)
    return list(SECTIONS) if not sections or 'all' in sections else sections, o


def main(argv):
    sections, o = read_options(argv)
    sys.stdout.reconfigure(line_buffering=True)
    # for the contestants: who waits must not spin; nothing is asked of the hub
    os.environ |= dict(OMP_WAIT_POLICY='PASSIVE', HF_HUB_OFFLINE='1')
    head = f'{machine(o.device)}; {o.model}, max_length {o.max_length}'
    print(head)
    with tempfile.TemporaryDirectory() as o.data_dir:
        o.init_from = os.path.join(o.data_dir, 'weights')
        torch.manual_seed(0)
        save(GPT(MODELS[o.model]), o.init_from)
        o.dataset = o.dataset or write_texts(os.path.join(o.data_dir, 'words.jsonl'))
        for section in sections:
            try:
                SECTIONS[section](o)
            except (RuntimeError, InputError) as e:
                print(f'  {section}: does not run here ({e})')
    columns = ['section', 'what', 'unit', 'ours', 'theirs', 'times better (range)', 'note']
    print(f'\n{head}\n')
    for line in [columns, ['---'] * len(columns), *TABLE]:
        print('| ' + ' | '.join(line) + ' |')


if __name__ == '__main__':
    run(main, __doc__)
