"""
Completions from a policy, alone or beside another model.

    python sample.py out/dpo_demo --prompt="ann on iron river (war):"
    python sample.py out/dpo_demo --compare=out/sft_demo --prompts=val --n=2     # a run's validation prompts
    python sample.py gpt2 --prompts=prompts.txt --temperature=0 --out=greedy.jsonl
    python sample.py out/dpo_gpt2 --template=chat                               # no prompts: asks for them

MODEL is any of from_pretrained's names. --compare puts two models side by side: both draw with the same
random numbers, so they differ only where their distributions do. What is printed also goes to a .jsonl file
(--out or in a run's folder), a line a completion: {"model", "prompt", "response", "tokens", "ended", "seed"}.
Left out: serving, beam search, streaming.
"""
import json
import os
import sys
from dataclasses import dataclass

from model import GPT, find_pretrained, load_checkpoint
from prepare import InputError, Pairs, get_tokenizer, prepare
from train import Config, check_model, load_config, run, settle_machine


@dataclass
class Options:
    prompt: str = ''             # one prompt, as it is; \n stands for a line break
    prompts: str = ''            # a .txt file (a prompt a line), a .jsonl file with "prompt" keys, or 'val'
    limit: int = 8               # of the prompts in a file or the validation set; 0: all
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
    out: str = ''                # .jsonl; empty: samples.jsonl in a run's folder, else none
    device: str = 'auto'
    dtype: str = 'auto'


def run_config(name):
    """The Config that a run or checkpoint was trained with; None for a model that is no run."""
    path = find_pretrained(name)
    return None if os.path.isdir(path) else Config(**load_checkpoint(path)['config'])


def read_prompts(options, run, tokenizer):
    """-> [(text, token ids), ...] from --prompt, --prompts, or the run's validation set."""
    if options.prompts == 'val':
        if run is None:
            raise InputError('prompts: val needs a run\'s folder, which knows its data')
        pairs = Pairs(prepare(run), 'val')
        ids = [pairs[i][0].tolist() for i in range(len(pairs))][:options.limit or None]
        return [(tokenizer.decode(p), p) for p in ids]
    texts = [options.prompt.replace('\\n', '\n')] if options.prompt else []
    if options.prompts:
        try:
            with open(options.prompts, encoding='utf-8') as f:
                lines = [line.rstrip('\n') for line in f if line.strip()]
            jsonl = options.prompts.endswith('.jsonl')
            texts += [json.loads(line)['prompt'] if jsonl else line for line in lines]
        except OSError as e:
            raise InputError(f'prompts: {options.prompts} cannot be read ({e.strerror})')
        except (ValueError, KeyError, TypeError) as e:
            raise InputError(f'prompts: {options.prompts} is not UTF-8 with a "prompt" in every line ({e!r})')
        texts = texts[:options.limit or None]
    return [encode(text, options, tokenizer) for text in texts]


def encode(text, options, tokenizer):
    if options.template == 'chat':
        text = f'\n\nHuman: {text}\n\nAssistant:'
    return text, tokenizer.encode_ordinary(text)


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
    names = [argv[0]] + [options.compare] * bool(options.compare)
    trained = run_config(names[0])
    tokenizer = get_tokenizer(options.tokenizer or (trained.tokenizer if trained else 'gpt2'))
    machine = Config(device=options.device, dtype=options.dtype)
    settle_machine(machine)
    models = [GPT.from_pretrained(name).to(machine.device) for name in names]
    for name, model in zip(names, models):
        check_model(Config(init_from=name), model, 0, tokenizer.name)
        model.config.eos_token_id = tokenizer.eot_token
    if machine.dtype == 'bfloat16':
        models = [model.bfloat16() for model in models]
    prompts = read_prompts(options, trained, tokenizer)
    path = options.out
    if trained and os.path.isdir(names[0]):
        path = path or os.path.join(names[0], 'samples.jsonl')
    try:
        out = open(path, 'w', encoding='utf-8') if path else None
    except OSError as e:
        raise InputError(f'out: {path} cannot be written ({e.strerror})')

    def answer(prompts):
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
        answer(prompts)
    else:
        print('a prompt a line; an empty line ends')
        while text := sys.stdin.readline().rstrip('\n'):
            answer([encode(text.replace('\\n', '\n'), options, tokenizer)])
    if out:
        out.close()
        print(f'\n-> {path}')


if __name__ == '__main__':
    run(main, __doc__, sys.argv[1:])
