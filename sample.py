"""
Completions from a policy, alone or beside another model; its implicit reward, of files and token by token.

    python sample.py out/dpo_demo --prompt="ann on iron river (war):"
    python sample.py out/dpo_demo --compare=out/sft_demo --prompts=val --n=2     # a run's validation prompts
    python sample.py gpt2 --prompts=prompts.txt --temperature=0 --out=greedy.jsonl
    python sample.py out/dpo_gpt2 --template=chat                               # no prompts: asks for them
    python sample.py out/dpo_demo --score=pairs.jsonl                           # implicit rewards; accuracy
    python sample.py out/dpo_demo --credit --prompt="ann on iron river (war):"  # which tokens earn it

MODEL is any of from_pretrained's names. --compare puts two models side by side: both draw with the same
random numbers, so they differ only where their distributions do. What is printed also goes to a .jsonl file
(--out or in a run's folder), a line a completion: {"model", "prompt", "response", "tokens", "ended", "seed"}.
--credit colours each token of a response by its share of the implicit reward, beta log pi/pi_ref of that
token (green: likelier than under the reference), on the terminal and in an HTML file.
Left out: serving, beam search, streaming.
"""
import contextlib
import html
import itertools
import json
import os
import sys
from dataclasses import dataclass

import torch

from model import GPT, find_pretrained, pack
from prepare import InputError, Pairs, encode, first_line, get_tokenizer, parse, prepare, read_source, text_of
from reward import load_judge, score_file
from train import (Config, check_model, config_of, load_config, load_reference, loss_parameters,
                   needs_reference, run, settle_machine, settle_products, whole)


@dataclass
class Options:
    prompt: str = ''             # one prompt, as it is; \n stands for a line break
    prompts: str = ''            # a .txt file (a prompt a line), a .jsonl file with "prompt" keys, or 'val'
    limit: int = 8               # of the prompts in a file or the validation set; 0: all
    score: str = ''              # a file of pairs, rankings or completions: their implicit rewards, to --out
    credit: bool = False         # colour tokens by their share of the reward; --compare: another reference
    response: str = ''           # with credit: of this text instead of a completion
    compare: str = ''            # a second model
    n: int = 1                   # completions to a prompt
    max_new_tokens: int = 128
    temperature: float = 1.0     # 0: the likeliest token
    top_k: int = 0               # 0: off
    top_p: float = 1.0           # 1: off
    seed: int = 1337
    tokenizer: str = ''          # empty: the run's, or gpt2 for a model that is no run
    template: str = ''           # 'chat': prompts are written out as \n\nHuman: ... \n\nAssistant:
    batch_size: int = 32         # completions made together
    out: str = ''                # .jsonl (credit: .html); empty: in a run's folder, else none
    device: str = 'auto'
    dtype: str = 'auto'


def run_config(name):
    """The Config that a run or checkpoint was trained with; None for a model that is no run."""
    path = find_pretrained(name)
    return None if os.path.isdir(path) else config_of(path)


def read_prompts(options, run, tokenizer):
    """-> [(text, token ids), ...] from --prompt, --prompts, or the run's validation set."""
    if options.prompts == 'val':
        if run is None:
            raise InputError('prompts: val needs a run\'s folder, which knows its data')
        pairs = Pairs(prepare(run), 'val')
        ids = [pairs[i][0].tolist() for i in range(len(pairs))][:options.limit or None]
        if not ids:
            raise InputError('prompts: the run has no validation pairs')
        return [(tokenizer.decode(p), p) for p in ids]
    texts = [options.prompt.replace('\\n', '\n')] if options.prompt else []
    if options.prompts.endswith('.txt'):
        try:
            with open(options.prompts, encoding='utf-8') as f:
                texts = [line.rstrip('\n') for line in f if line.strip()][:options.limit or None]
        except (OSError, UnicodeDecodeError) as e:
            raise InputError(f'prompts: {options.prompts} cannot be read ({first_line(e)})')
    elif options.prompts:
        for where, raw in itertools.islice(read_source(options.prompts), options.limit or None):
            try:
                record = parse(raw)
                texts.append(text_of(record if isinstance(record, dict) else {}, 'prompt'))
            except InputError as e:
                raise InputError(f'prompts: {where}: {e}')
    if options.prompts and not texts:
        raise InputError(f'prompts: there are none in {options.prompts}')
    return [as_prompt(text, options, tokenizer) for text in texts]


def as_prompt(text, options, tokenizer):
    if options.template == 'chat':
        text = f'\n\nHuman: {text}\n\nAssistant:'
    return text, encode(tokenizer, text, 'prompt').tolist()


def complete(model, prompts, options, tokenizer):
    """[(text, ids), ...] -> for each, `n` completions (text, number of tokens, whether it ended, seed)."""
    room = model.config.block_size - 1
    found = []
    for k in range(options.n):    # a seed's completions together: what a prompt gets does not depend on `n`
        for i in range(0, len(prompts), options.batch_size):
            ids = [p[-room:] for _, p in prompts[i:i + options.batch_size]]
            seed = options.seed + k * 1_000_003 + i
            for tokens in model.generate(ids, options.max_new_tokens, options.temperature, options.top_k,
                                         options.top_p, seed):
                ended = tokens[-1] == model.config.eos_token_id
                found.append((tokenizer.decode(tokens[:-1] if ended else tokens), len(tokens), ended, seed))
    return [found[i::len(prompts)] for i in range(len(prompts))]


# ------------------------------------------------------------------------------------------------------------
# Credit: which tokens earn the implicit reward


@torch.no_grad()
def token_credit(policy, reference, prompt, response, beta):
    """beta log pi/pi_ref of each token of a response; their sum is the response's implicit reward."""
    batch = pack([(prompt, [response])]).to(policy.device)
    return (beta * (policy.token_logps(batch) - reference.token_logps(batch))).tolist()


def whole_characters(tokens, credit, tokenizer):
    """-> [(text, credit), ...]: a token each, or several together where a character is spread over them."""
    spans, held, sum_ = [], b'', 0.0
    for i, (token, c) in enumerate(zip(tokens, credit)):
        held, sum_ = held + tokenizer.decode_single_token_bytes(token), sum_ + c
        last = i == len(tokens) - 1 or len(held) > 8         # no character is so long: these bytes are none
        try:
            text = held.decode('utf-8', 'replace' if last else 'strict')
        except UnicodeDecodeError:
            continue
        spans.append((text, sum_))
        held, sum_ = b'', 0.0
    return spans


def colour(c, most):
    """-> (r, g, b): white at 0, green up to `most`, red down to -most."""
    fade = 1 - min(1.0, abs(c) / most) if most else 1.0
    full = (70, 190, 90) if c > 0 else (235, 80, 80)
    return tuple(round(255 * fade + x * (1 - fade)) for x in full)


def show_credit(prompt, spans, total):
    """The response on the terminal: coloured, or where that is none, with a number after every token."""
    print(f'\n{prompt}    [implicit reward {total:+.3f}]')
    most = max(abs(c) for _, c in spans)
    if sys.stdout.isatty() or os.environ.get('FORCE_COLOR'):
        marks = ['\x1b[30;48;2;{};{};{}m'.format(*colour(c, most)) + text for text, c in spans]
        print(''.join(marks) + '\x1b[0m')
    else:
        print(' '.join(f'{text!r}{c:+.3f}' for text, c in spans))


def credit_page(shown, names, beta):
    """The same as one HTML page, with nothing to load: [(prompt, spans, total), ...] -> text."""
    body = []
    for prompt, spans, total in shown:
        most = max(abs(c) for _, c in spans)
        marked = ''.join('<span style="background:rgb({},{},{})" title="{:+.4f}">{}</span>'.format(
            *colour(c, most), c, html.escape(text)) for text, c in spans)
        body.append(f'<p><b>{html.escape(prompt)}</b> <small>implicit reward {total:+.3f}</small></p>'
                    f'<p>{marked}</p>')
    said = ' against '.join(map(html.escape, names))
    return ('<!doctype html><html lang="en"><meta charset="utf-8"><title>credit</title>'
            '<style>body{font:16px/1.6 serif;max-width:50em;margin:2em auto;color:#000;background:#fff}'
            'p{white-space:pre-wrap}</style>'
            f'<h1>{said}</h1><p>Each token by its share of the implicit reward, {beta:g} log &pi;/&pi;'
            '<sub>ref</sub>: green earns, red costs; point at one for its number.</p>'
            f'{"".join(body)}</html>\n')


def credit(models, names, prompts, options, trained, tokenizer, path):
    """Responses to the prompts by the first model (or --response), marked by credit against the second."""
    beta, shown = 1.0, []                                    # without an objective's beta: in nats
    if trained and needs_reference(trained.loss):
        beta = loss_parameters(trained.loss)['beta'].default if trained.beta is None else trained.beta
    for text, ids in prompts:
        if options.response:
            tokens = tokenizer.encode_ordinary(options.response) + [tokenizer.eot_token]
        else:
            tokens = models[0].generate([ids], options.max_new_tokens, options.temperature, options.top_k,
                                        options.top_p, options.seed)[0]
        each = token_credit(*models, ids, tokens, beta)
        shown.append((text, whole_characters(tokens, each, tokenizer), sum(each)))
        show_credit(*shown[-1])
    with whole(path) as f:
        f.write(credit_page(shown, names, beta))
    print(f'\n-> {path}')


def main(argv):
    if not argv or argv[0].startswith('-'):
        raise InputError('usage: python sample.py MODEL [--name=value ...]')
    options = load_config(argv[1:], Options())
    limits = dict(n=(1, 1e9), max_new_tokens=(1, 1e9), batch_size=(1, 1e9), limit=(0, 1e9), top_k=(0, 1e9),
                  top_p=(1e-9, 1), temperature=(0, 1e9), seed=(0, 2**62))
    for name, (low, high) in limits.items():
        if not low <= getattr(options, name) <= high:
            raise InputError(f'{name}: {getattr(options, name)} is not between {low:g} and {high:g}')
    if options.template not in ('', 'chat') or options.dtype not in ('auto', 'float32', 'bfloat16'):
        raise InputError(f'template, dtype: {options.template!r} or {options.dtype!r} is not known')
    if options.prompt and options.prompts:
        raise InputError('prompt, prompts: give one of the two')
    for name in ('prompt', 'response'):
        if name in options.given and not getattr(options, name):
            raise InputError(f'{name}: is empty')
    if options.response and not options.credit:
        raise InputError('response: ignored without credit')
    if options.credit and options.n > 1:
        raise InputError('n: ignored with credit')
    if options.score:
        asked = {'score', 'out', 'template', 'device'}
        if options.given - asked:
            raise InputError(f'{min(options.given - asked)}: ignored with score')
        out = options.out or os.path.join(argv[0] if os.path.isdir(argv[0]) else '.', 'scores.jsonl')
        return print(score_file(load_judge(argv[0], options.device), options.score, out, options.template))
    names = [argv[0]] + [options.compare] * bool(options.compare)
    trained = run_config(names[0])
    if options.credit and len(names) == 1:
        if trained is None or trained.init_from == 'scratch':
            raise InputError('credit: needs a reference; --compare names one')
        names.append(trained.reference_from or trained.init_from)
    tokenizer = get_tokenizer(options.tokenizer or (trained.tokenizer if trained else 'gpt2'))
    machine = Config(device=options.device, dtype=options.dtype)
    settle_machine(machine)
    models = [GPT.from_pretrained(name).to(machine.device) for name in names]
    if options.credit and not options.compare:
        trained.device = machine.device
        models[1] = load_reference(find_pretrained(names[0]), trained)     # or what has changed since
    settle_products(models[0])
    for name, model in zip(names, models):
        check_model(Config(init_from=name), model, 0, tokenizer.name)
        model.config.eos_token_id = tokenizer.eot_token
    if machine.dtype == 'bfloat16':
        models = [model.bfloat16() for model in models]
    prompts = read_prompts(options, trained, tokenizer)
    path = options.out
    if options.credit:
        if not prompts:
            raise InputError('credit: needs a prompt, or prompts')
        path = path or os.path.join(names[0] if os.path.isdir(names[0]) else '.', 'credit.html')
        return credit(models, names, prompts, options, trained, tokenizer, path)
    if trained and os.path.isdir(names[0]):
        path = path or os.path.join(names[0], 'completions.jsonl')
    def answer(prompts, out):
        """Complete the prompts with every model; print, and write, what came."""
        answers = [complete(model, prompts, options, tokenizer) for model in models]
        for (text, _), *each in zip(prompts, *answers):
            print(f'\n{text}')
            for name, completions in zip(names, each):
                for response, tokens, ended, seed in completions:
                    label = f'[{name}] ' if len(names) > 1 else ''
                    print(f'  {label}{response.strip()}' + ('' if ended else ' ...'))
                    if out:
                        out.write(json.dumps(dict(model=name, prompt=text, response=response, tokens=tokens,
                                                  ended=ended, seed=seed)) + '\n')
    if prompts:
        with whole(path) if path else contextlib.nullcontext() as out:
            answer(prompts, out)
    else:
        print('a prompt a line; an empty line ends')
        texts = iter(lambda: sys.stdin.readline().rstrip('\n'), '')
        first = next(texts, None)
        if first is None:                                  # nothing asked: an older file stays
            return
        with open(path, 'w', encoding='utf-8') if path else contextlib.nullcontext() as out:
            for text in itertools.chain([first], texts):
                answer([as_prompt(text.replace('\\n', '\n'), options, tokenizer)], out)
    if path:
        print(f'\n-> {path}')


if __name__ == '__main__':
    run(main, __doc__, sys.argv[1:])
