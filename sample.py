"""
Sample from a model: completions, optionally next to another model's; or a chat.

    python sample.py out/dpo_demo --prompt="ann on iron river (war):"
    python sample.py out/dpo_demo --compare=out/sft_demo --prompts=val --n=2   # validation prompts
    python sample.py gpt2 --prompts=prompts.txt --temperature=0 --out=greedy.jsonl
    python sample.py out/dpo_smollm2 --chat                   # several turns, by the chat template

MODEL is anything weights.load takes. Two models draw with the same random numbers, so completions
differ only where the distributions do. A file of prompts has one a line (.txt), or records with a
"prompt", text or messages, in any format of prepare.py. --out writes a line of JSON per completion.
Left out: serving, beam search, streaming.
"""
import itertools
import json
import os
import sys
from dataclasses import dataclass

import torch

from configurator import InputError, atomic_write, check_least, configure, run
from model import bias_of, pack, pieces_mask
from prepare import Pairs, chat_of, parse, read_source, text_of
from tokenizer import get_tokenizer
from weights import find, load, load_checkpoint, tokenizer_of

# --------------------------------------------------------------------------------------------------
# Sampling


class Cache:
    """One block's keys and values of B sequences of up to `limit` tokens, (B, G, limit, D)."""

    def __init__(self, B, limit, config, like):
        shape = (B, config.n_kv_head, limit, config.head_dim)
        self.k, self.v = like.new_zeros(shape), like.new_zeros(shape)

    def place(self, rows, positions, keys=None):
        """Where the next tokens go, (n,) each. `keys`: how many keys to attend to; None: a packed
        prompt, which attends to itself."""
        self.rows, self.positions, self.keys = rows, positions, keys

    def append(self, k, v):  # a packed prompt (G, T, D), or a token for each of B rows (B, G, 1, D)
        packed = self.keys is None
        for cache, new in ((self.k, k), (self.v, v)):
            new = new.transpose(0, 1) if packed else new[:, :, 0]        # (n, G, D)
            cache[self.rows, :, self.positions] = new
        return (k, v) if packed else (self.k[:, :, :self.keys], self.v[:, :, :self.keys])


@torch.no_grad()
def generate(model, prompts, max_new_tokens, ends, temperature=1.0, top_k=0, top_p=1.0, seed=0):
    """Responses to `prompts`, lists of token ids of any lengths: a list of lists of new token ids.

    A response stops at a token of the set `ends` (kept), after max_new_tokens, or where the
    context is full. temperature 0 is greedy; top_k (0: off) and top_p (1: off) cut off the tail.
    Row i draws its t-th token with the i-th of the seed's t-th uniform numbers, whatever the
    other rows do: two models with one seed differ only where their distributions do.
    """
    context, device = model.config.block_size, model.device
    assert prompts and all(0 < len(p) < context for p in prompts), 'prompts must fit the context'
    B = len(prompts)
    limit = min(max(map(len, prompts)) + max_new_tokens, context)
    caches = [Cache(B, limit, model.config, model.wte.weight) for _ in model.blocks]
    rng, ends = torch.Generator().manual_seed(seed), torch.tensor(sorted(ends), device=device)

    # prompts are packed as for training; each one's response of one token is a placeholder, whose
    # slot in the cache the first new token overwrites
    batch = pack([(p, [[0]]) for p in prompts]).to(device)
    for cache in caches:
        cache.place(batch.pair, batch.positions)
    x = model.hidden(batch.tokens, batch.positions, pieces_mask(batch), caches)          # (T, d)
    x = x[batch.scored]                                                                  # (B, d)
    last = torch.tensor([len(p) - 1 for p in prompts], device=device)   # position of the last token
    rows = torch.arange(B, device=device)
    live = torch.ones(B, dtype=torch.bool, device=device)
    responses = [[] for _ in prompts]
    for step in range(max_new_tokens):
        logits = x.float() @ model.head_weight.float().t()                      # (B, V)
        tokens = draw(logits, temperature, top_k, top_p, torch.rand(B, generator=rng).to(device))
        for response, token, alive in zip(responses, tokens.tolist(), live.tolist()):
            if alive:
                response.append(token)
        last = last + live                              # finished rows stand still
        live = live & ~torch.isin(tokens, ends) & (last < context - 1)
        if not live.any() or step + 1 == max_new_tokens:
            break
        keys = int(last.max()) + 1
        for cache in caches:
            cache.place(rows, last, keys)
        mask = bias_of(torch.arange(keys, device=device) <= last[:, None])      # (B, keys)
        x = model.hidden(tokens[:, None], last[:, None], mask[:, None, None], caches)
        x = x[:, 0]                                                             # (B, d)
    return responses


def plain_generate(model, prompt, max_new_tokens, ends):
    """Greedy, one prompt, without a cache: the slow twin of `generate`."""
    tokens = list(prompt)
    while len(tokens) < min(len(prompt) + max_new_tokens, model.config.block_size):
        with torch.no_grad():
            tokens.append(int(model(torch.tensor([tokens], device=model.device))[0, -1].argmax()))
        if tokens[-1] in ends:
            break
    return tokens[len(prompt):]


def draw(logits, temperature, top_k, top_p, uniform):
    """(B, V) logits and (B,) numbers in [0, 1) -> (B,) tokens, by inverting the cumulative
    distribution."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    probs, order = (logits / temperature).softmax(dim=-1), None
    if top_k or top_p < 1:
        probs, order = probs.sort(dim=-1, descending=True)
        if top_k:
            probs[:, top_k:] = 0
        if top_p < 1:     # the fewest tokens that reach top_p
            before = probs.cumsum(dim=-1) - probs
            probs[before >= top_p * probs.sum(dim=-1, keepdim=True)] = 0
    cumulative = probs.double().cumsum(dim=-1)
    target = uniform.double()[:, None] * cumulative[:, -1:]
    at = torch.searchsorted(cumulative, target, right=True)
    at = at.clamp(max=probs.size(-1) - 1)
    return (at if order is None else order.gather(1, at))[:, 0]


# --------------------------------------------------------------------------------------------------
# The command


@dataclass
class Options:
    prompt: str = ''             # one prompt; \n stands for a line break
    prompts: str = ''            # a .txt file, a file of records with "prompt", or 'val'
    limit: int = 8               # of the prompts in a file or the validation set; 0: all
    chat: bool = False           # a conversation on the terminal
    compare: str = ''            # a second model
    n: int = 1                   # completions of a prompt
    max_new_tokens: int = 128
    temperature: float = 1.0     # 0: greedy
    top_k: int = 0               # 0: off
    top_p: float = 1.0           # 1: off
    seed: int = 1337
    tokenizer: str = ''          # empty: the model's own
    template: str = ''           # 'chat': a prompt is a user turn of the chat template
    batch_size: int = 32         # completions made together
    out: str = ''                # a .jsonl file
    device: str = ''             # empty: cuda if available, else cpu


def find_device(name=''):
    """'cpu' or 'cuda'; empty: cuda if available. Raises InputError if it is not."""
    cuda = torch.cuda.is_available()
    if name not in ('', 'cpu', 'cuda') or (name == 'cuda' and not cuda):
        raise InputError(f'device {name!r} is not available here; use cpu')
    return name or ('cuda' if cuda else 'cpu')


def encode_prompt(prompt, tokenizer, template=''):
    """Text or messages -> token ids, as prepare.py writes a prompt."""
    if template == 'chat' and isinstance(prompt, str):
        prompt = [dict(role='user', content=prompt)]
    if isinstance(prompt, list):
        return tokenizer.encode_turns(prompt).tolist()
    return [*tokenizer.begin, *tokenizer.encode(prompt).tolist()]


def read_prompts(o, name, tokenizer):
    """-> [(prompt, its token ids), ...], the prompt as it was given: text or messages."""
    if o.prompts == 'val':               # as they were prepared for the run
        path = find(name)
        prepared = None if os.path.isdir(path) else load_checkpoint(path).get('prepared')
        if not prepared:
            raise InputError(f"prompts: 'val' needs the folder of a run of train.py, not {name}")
        pairs = Pairs(prepared)
        ids = [pairs[i][0].tolist() for i in pairs.val[:o.limit or None]]
        return [(tokenizer.decode(x), x) for x in ids]
    source = read_source(o.prompts) if o.prompts else [
        ('prompt', dict(prompt=o.prompt.replace('\\n', '\n')))]
    prompts = []
    for where, raw in itertools.islice(source, o.limit or None):
        try:
            record = parse(raw)
            prompt = record.get('prompt') if isinstance(record, dict) else None
            prompt = (chat_of if isinstance(prompt, list) else text_of)(prompt, 'prompt')
            prompts.append((prompt, encode_prompt(prompt, tokenizer, o.template)))
        except (InputError, UnicodeEncodeError) as e:
            raise InputError(f'{where}: {e}')
    return prompts


def complete(model, prompts, o, tokenizer):
    """Token ids of prompts -> for each its o.n completions, lists of token ids."""
    completions, room = [[] for _ in prompts], model.config.block_size - 1
    for k in range(o.n):         # what a prompt gets does not depend on n
        for i in range(0, len(prompts), o.batch_size):
            inputs = [p[-room:] for p in prompts[i:i + o.batch_size]]
            seed = o.seed + k * 1_000_003 + i
            responses = generate(model, inputs, o.max_new_tokens, tokenizer.ends,
                                 o.temperature, o.top_k, o.top_p, seed)
            for j, response in enumerate(responses):
                completions[i + j].append(response)
    return completions


def text_and_end(tokens, tokenizer):
    """A response's ids -> (its text without the end token, whether it came to its end)"""
    ended = tokens[-1] in tokenizer.ends
    return tokenizer.decode(tokens[:-1] if ended else tokens), ended


def chat(model, o, tokenizer):
    print('your turn; an empty line ends')
    context = model.config.block_size
    turns, room = [], max(context // 2, context - o.max_new_tokens)
    while text := sys.stdin.readline().strip():
        turns.append(dict(role='user', content=text))
        ids = tokenizer.encode_turns(turns).tolist()[-room:]
        tokens = generate(model, [ids], o.max_new_tokens, tokenizer.ends,
                          o.temperature, o.top_k, o.top_p, o.seed + len(turns))[0]
        answer = text_and_end(tokens, tokenizer)[0].strip()
        turns.append(dict(role='assistant', content=answer))
        print(answer)


def main(argv):
    if argv[0].startswith('-'):
        raise InputError('usage: python sample.py MODEL [--name=value ...]')
    o = configure(Options, argv[1:])
    names = [argv[0], o.compare] if o.compare else [argv[0]]
    check_least(o, n=1, max_new_tokens=1, batch_size=1, top_k=0, limit=0)
    if o.temperature < 0 or not 0 < o.top_p <= 1:
        raise InputError('temperature is at least 0, and top_p above 0 and at most 1')
    if (o.prompt != '') + (o.prompts != '') + o.chat != 1:
        raise InputError('give one of --prompt, --prompts and --chat')
    tokenizer, *others = [get_tokenizer(o.tokenizer or tokenizer_of(name)) for name in names]
    if others and others[0].n_vocab != tokenizer.n_vocab:
        raise InputError(f'compare: {names[1]} has another tokenizer than {names[0]}')
    device = find_device(o.device)
    models = [load(name).to(device) for name in names]
    for name, model in zip(names, models):
        if tokenizer.n_vocab > model.config.vocab_size:
            raise InputError(f'tokenizer: {tokenizer.name} has {tokenizer.n_vocab} tokens, and '
                             f'{name} has {model.config.vocab_size}; --tokenizer names another')
    if o.chat:
        return chat(models[0], o, tokenizer)
    prompts = read_prompts(o, names[0], tokenizer)
    if not prompts:
        raise InputError(f'prompts: {o.prompts} is empty')
    answers = [complete(model, [ids for _, ids in prompts], o, tokenizer) for model in models]
    lines = []
    for (prompt, ids), *each in zip(prompts, *answers):
        print(f'\n{tokenizer.decode(ids)}')
        for name, completions in zip(names, each):
            for tokens in completions:
                response, ended = text_and_end(tokens, tokenizer)
                label = f'[{name}] ' if len(names) > 1 else ''
                print(f'  {label}{response.strip()}' + ('' if ended else ' ...'))
                lines.append(dict(model=name, prompt=prompt, response=response,
                                  tokens=len(tokens), ended=ended))
    if o.out:
        with atomic_write(o.out) as f:
            f.writelines(json.dumps(line) + '\n' for line in lines)
        print(f'\n-> {o.out}')


if __name__ == '__main__':
    run(main, __doc__)
