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
ids to updated weights, for DPO with the forward pass of a live reference. TRL runs its own training
loop, at the fastest of the settings tried (each is printed), with the same weights and token ids;
losses and gradient norms are compared. Utilisation counts the arithmetic that is needed (prompt
once, vocabulary at response positions, no padding) against the fastest matrix product of the
model's shapes, measured right after the rounds.

Needs Linux. Left out: evaluation, checkpoints, several GPUs, what is learnt (weights are random).
"""
import itertools
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from importlib import metadata

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
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
CONTESTS = {}                   # what has been measured
TABLE = [['section', 'what', 'unit', 'ours', 'theirs', 'times better (range)', 'note'], 7 * ['---']]


@dataclass
class Options(train.Config):    # the dataset, lengths, device, dtype, compile, ... are train.py's
    model: str = 'gpt2'         # gpt2 (124M), llama (135M) or tiny; random weights
    losses: str = 'dpo,simpo'
    orders: str = 'own,sorted'  # a fixed random order; steps of pairs of like length
    repeats: int = 3            # rounds that count
    warmup: int = 0             # rounds before them; 0: 1 on a CPU, 4 on a GPU
    prompts: int = 16           # generate
    new_tokens: int = 128       # generate
    peers: bool = True          # step and memory: beside TRL
    dataset: str = ''           # empty: random words, as long as HH-harmless's texts
    tokenizer: str = 'gpt2'     # start, with llama: byte, which has fewer tokens
    val_fraction: float = 0.0
    bad_records: str = 'skip'
    reference: str = 'live'
    batch_size: int = 0         # 0: 8 on a CPU, 64 on a GPU


def row(section, what, unit, numbers, ratios=(), note=''):
    """A line now, and again in the last table: `numbers` are ours, and a peer's if there is one."""
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
    """n records of random words. Lengths are log-normals fitted to HH-harmless's test split (2,312
    prompts, chosen and rejected responses, in tokens of GPT-2)."""
    rng = np.random.default_rng(0)
    sizes = 1 + rng.lognormal((4.38, 3.37, 3.56), (1.00, 0.87, 0.93), (n, 3)).astype(int)
    with open(path, 'w') as f:
        for texts in [[' ' + ' '.join(rng.choice(WORDS, k)) for k in row] for row in sizes]:
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
    starts = np.arange(n) * batch_size
    if order == 'sorted':
        pairs = sorted(pairs, key=lambda pair: len(pair[0]) + max(map(len, pair[1])))
        starts = (np.arange(n) + 0.5) / n * max(0, len(pairs) - batch_size)
        starts = np.random.default_rng(3).permutation(starts.astype(int))
    return [[pairs[(start + i) % len(pairs)] for i in range(batch_size)] for start in starts]


def needed(config, steps, loss):
    """FLOPs: a forward pass, a backward pass of two; for DPO the reference's."""
    c, width, total = config, config.n_head * config.head_dim, 0
    block = c.n_embd * (2 * width + 2 * c.n_kv_head * c.head_dim + (2 + c.gated) * c.n_inner)
    for prompt, (chosen, rejected) in itertools.chain(*steps):
        P, C, R = len(prompt), len(chosen), len(rejected)
        total += 2 * c.n_layer * block * (P + C + R) + 2 * c.vocab_size * c.n_embd * (C + R)
        total += 4 * c.n_layer * width * (P * P / 2 + C * (P + C / 2) + R * (P + R / 2))
    return (4 if loss == 'dpo' else 3) * total


def matmul_rate(pause, cfg):
    """FLOP/s of the fastest of the model's own matrix products and a square one."""
    pause()
    c, best = MODELS[cfg.model], 0.0
    tokens, square = (2048, 2048) if cfg.device == 'cpu' else (16384, 8192)
    for m, k, n in ((tokens, c.n_embd, c.n_inner), (tokens, c.n_inner, c.n_embd),
                    (tokens // 4, c.n_embd, c.vocab_size), (square, square, square)):
        a, b = (torch.randn(shape, device=cfg.device).to(getattr(torch, cfg.dtype))
                for shape in ((m, k), (k, n)))
        timer = Timer('torch.mm(a, b, out=out)', globals=dict(torch=torch, a=a, b=b, out=a @ b),
                      num_threads=torch.get_num_threads())
        best = max(best, 2 * m * k * n / min(timer.blocked_autorange(min_run_time=0.5).times))
    pause(best)


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
    versions = sorted(f'{d.name} {d.version}' for d in metadata.distributions()
                      if d.name in ('torch', 'transformers', 'trl', 'tiktoken'))
    git = subprocess.run('git describe --always --dirty'.split(), capture_output=True, text=True)
    return ', '.join([name, f'{torch.get_num_threads()} threads', *versions, git.stdout.strip()])


# --------------------------------------------------------------------------------------------------
# Processes that take turns; their work of step, memory and growth


def child(conn, work, *args):
    """Run work(pause, *args), where pause(answer) ends a turn and waits for the next."""
    for stream in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)

    def pause(answer=None):
        conn.send(answer)
        conn.recv()
    try:
        conn.recv()
        work(pause, *args)
    except Exception as e:                   # of any library; or EOFError: there is no further turn
        conn.send(RuntimeError(first_line(e)))


def take_turns(n, *contestants):
    """A turn to set up, then n rounds of each (work, *args) in its own process -> answers."""
    context, running = multiprocessing.get_context('spawn'), []

    def turn(conn):
        try:
            conn.send('go')
            answer = conn.recv()
        except (EOFError, OSError):
            raise RuntimeError('the process died; out of memory?')
        if isinstance(answer, Exception):
            raise answer
        return answer
    try:
        for contestant in contestants:
            here, there = context.Pipe()
            running.append(here)
            context.Process(target=child, args=(there, *contestant)).start()
            there.close()
            turn(here)
        rounds = [[turn(conn) for conn in running] for _ in range(n)]
    finally:
        for conn in running:
            conn.close()
        for process in multiprocessing.active_children():
            process.join()
    return [list(answers) for answers in zip(*rounds)]


def repeat(pause, device, work):
    """A turn is one call of work()."""
    pause()
    while True:
        begin, result = clock(device), work()
        pause(dict(seconds=clock(device) - begin, result=result))


def ours(pause, cfg, steps):
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
    pause()
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
        pause(dict(seconds=end - begin, loss=loss, norm=norm, peak=peak_memory(cfg.device)))


def trl(pause, cfg, steps, rows, attention, compiled):
    """The train() of DPOTrainer, or of CPOTrainer with SimPO's loss; it pauses after each step. The
    words of its texts are our token ids."""
    train.setup_machine(cfg)                 # tuned as ours is
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, TrainerCallback
    from trl import DPOConfig, DPOTrainer
    from trl.experimental.cpo import CPOConfig, CPOTrainer
    end, last = '<|endoftext|>', MODELS[cfg.model].vocab_size - 1
    ids = {str(i): i for i in range(last)} | {end: last}
    words = Tokenizer(models.WordLevel(ids, unk_token=end))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token=end, pad_token=end)
    data = []
    for prompt, responses in itertools.chain(*steps):
        texts = [''.join(f' {i}' for i in part) for part in (prompt, *(r[:-1] for r in responses))]
        data.append(dict(prompt=texts[0], chosen=texts[1] + end, rejected=texts[2] + end))

    class Turns(TrainerCallback):
        def on_train_begin(self, *args, **kwargs):
            pause()
            self.begin = clock(cfg.device)

        def on_log(self, args, state, control, logs, **kwargs):
            took, peak = clock(cfg.device) - self.begin, peak_memory(cfg.device)
            pause(dict(seconds=took, loss=logs['loss'], norm=logs['grad_norm'], peak=peak))
            self.begin = clock(cfg.device)
    trainer, config, objective = DPOTrainer, DPOConfig, dict(beta=0.1)
    if cfg.loss == 'simpo':
        trainer, config = CPOTrainer, CPOConfig
        objective = dict(loss_type='simpo', beta=2.0, simpo_gamma=0.5, cpo_alpha=0.0)
    cpu = cfg.device == 'cpu'
    args = config(
        output_dir=cfg.data_dir, max_steps=len(steps), per_device_train_batch_size=rows,
        gradient_accumulation_steps=cfg.batch_size // rows, train_sampling_strategy='sequential',
        max_length=MODELS[cfg.model].block_size, learning_rate=cfg.learning_rate, weight_decay=0.0,
        lr_scheduler_type='constant', optim='adamw_torch_fused', max_grad_norm=cfg.grad_clip,
        bf16=cfg.dtype == 'bfloat16', torch_compile=compiled, gradient_checkpointing=False,
        use_cpu=cpu, dataloader_num_workers=0 if cpu else 2, logging_steps=1,
        logging_nan_inf_filter=False, save_strategy='no', report_to='none',
        model_init_kwargs=dict(attn_implementation=attention, dtype='float32'), **objective)
    trainer(model=cfg.init_from, args=args, train_dataset=Dataset.from_list(data),
            processing_class=tokenizer, callbacks=[Turns()]).train()


# --------------------------------------------------------------------------------------------------
# The sections and the command


def search(cfg, steps):
    """TRL's settings that run here, fastest first: [(seconds, GiB, words, settings), ...]. Fewer
    pairs in a forward pass, with gradients accumulated, need less padding. Not tried: what costs
    time (gradient checkpointing, offloading), and padding_free, which TRL 1.16 turns off itself."""
    B, cpu, tried = cfg.batch_size, cfg.device == 'cpu', []
    rows = sorted({n for n in (1 if cpu else B, B // 4, B) if n and B % n == 0})
    axes = rows, ['sdpa', 'eager'] if cpu else ['sdpa'], sorted({False, cfg.compile})
    for settings in itertools.product(*axes):
        words = f'TRL {settings[1]}, {settings[0]} a pass' + ', compile' * settings[2]
        try:
            last = take_turns(cfg.warmup + 1, (trl, cfg, steps, *settings))[0][-1]
            tried.append((last['seconds'], last['peak'], words, settings))
            words += f': {B / last["seconds"]:.2f} pairs/s, {last["peak"]:.2f} GiB'
        except RuntimeError as e:
            words += f': does not run here ({e})'
        print(f'  {cfg.loss}, {words}')
    return sorted(tried)


def contest(cfg, order, peers):
    """Steps of ours and, with `peers`, of TRL's at its fastest -> (words, rounds of each, note)."""
    steps = draw_steps(get_pairs(cfg), cfg.batch_size, order, cfg.warmup + cfg.repeats)
    tried = search(cfg, steps) if peers else []
    theirs = [(trl, cfg, steps, *settings) for *_, settings in tried[:1]]
    rounds = take_turns(len(steps), (ours, cfg, steps), *theirs)
    rate = take_turns(1, (matmul_rate, cfg))[0][0]
    what, note = f'{cfg.loss}, {order} order, {cfg.batch_size} pairs, {cfg.dtype}', ''
    what += ', compile' * cfg.compile
    if tried:
        what += f'; {tried[0][2]}'
        apart = max(abs(a[x] / b[x] - 1) for a, b in zip(*rounds) for x in ('loss', 'norm'))
        differ = ': THEY DIFFER' if cfg.dtype == 'float32' and not apart <= 1e-3 else ''
        note = f'; losses and gradient norms within {apart:.0e}{differ}'
    rounds = [answers[cfg.warmup:] for answers in rounds]
    least = needed(MODELS[cfg.model], steps[cfg.warmup:], cfg.loss) / rate   # if products were all
    used = ' and '.join(f'{least / sum(a["seconds"] for a in answers):.0%}' for answers in rounds)
    return what, rounds, f'utilisation {used} of {rate / 1e9:,.0f} GFLOP/s{note}'


def contests(o):
    for key in itertools.product(o.losses.split(','), o.orders.split(',')):
        if key not in CONTESTS:
            CONTESTS[key] = contest(replace(o, loss=key[0]), key[1], o.peers)
        yield CONTESTS[key]


def step(o):
    for what, rounds, note in contests(o):
        speed_row('step', what, 'pairs', o.batch_size, rounds, note)


def memory(o):
    for what, rounds, _ in contests(o):
        peaks = [answers[-1]['peak'] for answers in rounds]
        row('memory', what, 'GiB', peaks, [peak / peaks[0] for peak in peaks[1:]])


def growth(o):
    sizes = (8, 32) if o.device == 'cpu' else (8, 64, 256)
    for length, size in itertools.product((256, 512, 1024), sizes):
        cfg = replace(o, max_length=length, max_prompt_length=length // 2, batch_size=size)
        what, rounds, note = contest(cfg, 'own', peers=False)
        speed_row('growth', f'max_length {length}, {what}', 'pairs', size, rounds,
                  f'{rounds[0][-1]["peak"]:.2f} GiB, {note}')


def our_prepare(pause, cfg):
    repeat(pause, 'cpu', lambda: prepare(replace(cfg, data_dir=tempfile.mkdtemp(dir=cfg.data_dir))))


def their_prepare(pause, cfg):
    tokenizer, pairs = get_tokenizer(cfg.tokenizer), Pairs(prepare(cfg))
    texts = [tokenizer.decode(part.tolist()) for i in pairs.train
             for part in (pairs[i][0], *(r[:-1] for r in pairs[i][1]))]
    encode = tokenizer.encoding.encode_ordinary_batch
    repeat(pause, 'cpu', lambda: len(encode(texts, num_threads=os.cpu_count())))


def preparation(o):
    uncut = replace(o, max_length=2**20, max_prompt_length=2**19)
    rounds = take_turns(1 + o.repeats, (our_prepare, uncut), (their_prepare, uncut))
    tokens = Pairs(rounds[0][0]['result']).meta['tokens']
    speed_row('prepare', f'{o.tokenizer}; tiktoken', 'tokens', tokens, [a[1:] for a in rounds])


def our_generate(pause, cfg, prompts):
    model = load(cfg.init_from).to(cfg.device)
    repeat(pause, cfg.device, lambda: generate(
        model, prompts, cfg.new_tokens, ends={-1}, temperature=0))             # -1: nothing ends


def their_generate(pause, cfg, prompts):
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained(cfg.init_from).to(cfg.device)
    tokens, mask = (pad_sequence(list(map(torch.tensor, rows)), True, 0, 'left').to(cfg.device)
                    for rows in (prompts, [[1] * len(prompt) for prompt in prompts]))
    repeat(pause, cfg.device, lambda: model.generate(
        tokens, attention_mask=mask, max_new_tokens=cfg.new_tokens, do_sample=False,
        pad_token_id=0)[:, tokens.size(1):].tolist())


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
    names = 'init_from dataset tokenizer data_dir bad_records batch_size device dtype compile'
    command += [f'--{name}={getattr(o, name)}' for name in names.split()]
    took = []
    for _ in range(2):
        begin = time.perf_counter()
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            line = next((line for line in process.stdout if line.startswith('first step')), '')
            took.append(time.perf_counter() - begin)
            process.kill()
        if not line:
            raise RuntimeError('train.py has not come to its first step')
    note = f'data and reference prepared; {took[0]:.1f} before; without imports: {line.strip()}'
    row('start', f'{o.batch_size} pairs, {o.dtype}', 's', took[1:], note=note)


SECTIONS = dict(step=step, memory=memory, growth=growth, prepare=preparation, generate=generation,
                start=start)


def main(argv):
    sections = [arg for arg in argv if not arg.startswith('-')]
    o = configure(Options, [arg for arg in argv if arg.startswith('-')])
    for names, choices in ((sections, [*SECTIONS, 'all']), ([o.model], list(MODELS)),
                           (o.losses.split(','), ['dpo', 'simpo']),
                           (o.orders.split(','), ['own', 'sorted'])):
        if unknown := set(names) - set(choices):
            raise InputError(f'{unknown.pop()!r} is not one of {", ".join(choices)}')
    train.load_config([f'--device={o.device}', f'--dtype={o.dtype}'])    # raises InputError
    train.setup_machine(o)
    o.batch_size = o.batch_size or (8 if o.device == 'cpu' else 64)
    o.warmup = o.warmup or (1 if o.device == 'cpu' else 4)
    sys.stdout.reconfigure(line_buffering=True)
    os.environ |= dict(OMP_WAIT_POLICY='PASSIVE', HF_HUB_OFFLINE='1')    # who waits must not spin
    print(head := f'{machine(o.device)}; {o.model}, max_length {o.max_length}')
    with tempfile.TemporaryDirectory() as o.data_dir:
        o.init_from = os.path.join(o.data_dir, 'weights')
        torch.manual_seed(0)
        save(GPT(MODELS[o.model]), o.init_from)
        o.dataset = o.dataset or write_texts(os.path.join(o.data_dir, 'words.jsonl'))
        for section in SECTIONS if 'all' in sections or not sections else sections:
            try:
                SECTIONS[section](o)
            except (RuntimeError, InputError) as e:
                print(f'  {section}: does not run here ({e})')
    print(f'\n{head}\n')
    print('\n'.join('| ' + ' | '.join(line) + ' |' for line in TABLE))


if __name__ == '__main__':
    run(main, __doc__)
