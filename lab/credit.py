"""
Which tokens earn the implicit reward: each token's beta log pi/pi_ref, whose sum is the reward.

    python -m lab.credit out/dpo_demo --prompt="ann on iron river (war):"
    python -m lab.credit out/dpo_demo --prompt="..." --response=" great plot." --out=credit.html
    python -m lab.credit out/simpo_demo --prompt="..." --compare=out/sft_demo

The policy is a run. Its reference is the run's own unless --compare is given. beta is that of an
objective with a reference; for other objectives, log pi/pi_ref in nats. Green earns, red costs, on
the terminal and in an HTML page; where there is no terminal, numbers.
Credit can also be given in advance: `model_class = PositionWeightedGPT` in a config file.
Left out: credit under a reward model, which scores only a response's end.
"""
import html
import os
import sys
from dataclasses import dataclass

import torch

import train
from configurator import InputError, atomic_write, configure, run
from lab.judge import encode, load_reference, read_run
from model import GPT, pack
from sample import encode_prompt, generate
from tokenizer import get_tokenizer
from weights import load, tokenizer_of


@dataclass
class Options:
    prompt: str = ''
    response: str = ''           # empty: sampled from the policy
    compare: str = ''            # another reference
    template: str = ''           # 'chat': the prompt is a user turn; empty: as in the run's data
    max_new_tokens: int = 128
    temperature: float = 1.0     # 0: greedy
    seed: int = 1337
    out: str = 'credit.html'
    device: str = ''             # empty: cuda where there is one, else cpu


class PositionWeightedGPT(GPT):
    """Token t = 0, 1, ... of a response counts weight(t) times: a heuristic. A subclass in a config
    file may have another `weight`. It may depend on the position alone, so that policy and
    reference weigh a token alike. Not a policy's log-probs any more: sampling and KL need GPT's."""

    @staticmethod
    def weight(t):                       # (N,) positions -> (N,) weights
        return 0.98 ** t

    def token_logps(self, batch):
        lengths = batch.lengths.flatten()
        starts = lengths.cumsum(0) - lengths                                        # (B*K,)
        t = torch.arange(len(batch.targets), device=lengths.device) - starts[batch.owner]
        return super().token_logps(batch) * self.weight(t)


@torch.no_grad()
def token_credit(policy, reference, prompt, response, beta):
    """beta log pi/pi_ref of each token of a response: a list of floats."""
    batch = pack([(prompt, [response])]).to(policy.device)
    return (beta * (policy.token_logps(batch) - reference.token_logps(batch))).tolist()


def spans_of(tokens, credit, tokenizer):
    """-> [(text, credit), ...]: a span for a token, or for several that spell one character."""
    spans, length, total = [], 0, 0.0
    for i, c in enumerate(credit, 1):
        text, total = tokenizer.decode(tokens[:i]), total + c
        if text.endswith('\ufffd') and i < len(tokens):      # part of a character
            continue
        spans.append((text[length:], total))
        length, total = len(text), 0.0
    return spans


def colours(spans):
    """-> (r, g, b) of each span: white at 0, green or red at the largest credit of all."""
    most = max(abs(c) for _, c in spans) or 1.0
    for _, c in spans:
        full = (70, 190, 90) if c > 0 else (235, 80, 80)
        yield tuple(round(255 + abs(c) / most * (x - 255)) for x in full)


def terminal(spans):
    if not sys.stdout.isatty() and 'FORCE_COLOR' not in os.environ:
        return ' '.join(f'{text!r}{c:+.3f}' for text, c in spans)
    marked = ['\x1b[30;48;2;{};{};{}m{}'.format(*rgb, text)
              for (text, _), rgb in zip(spans, colours(spans))]
    return ''.join(marked) + '\x1b[0m'


def page(title, beta, prompt, spans):
    marked = ''.join(
        f'<span style="background:rgb{rgb}" title="{c:+.4f}">{html.escape(text)}</span>'
        for (text, c), rgb in zip(spans, colours(spans)))
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>credit</title>
<style>pre {{ font: 16px/1.6 serif; max-width: 50em; white-space: pre-wrap; color: #000 }}</style>
<h1>{html.escape(title)}</h1>
<p>Each token's share of the implicit reward, {beta:g} log &pi;/&pi;<sub>ref</sub>: green earns, red
costs; point at one to see its number.</p>
<pre>{html.escape(prompt)}{marked}</pre>
<p>implicit reward {sum(c for _, c in spans):+.3f}</p>
</html>
"""


def main(argv):
    if argv[0].startswith('-'):
        raise InputError('usage: python -m lab.credit RUN --prompt=... [--name=value ...]')
    o, name = configure(Options, argv[1:]), argv[0]
    if not o.prompt:
        raise InputError('prompt: is empty')
    cfg, checkpoint = read_run(name)
    device = o.device or ('cuda' if torch.cuda.is_available() else 'cpu')
    policy, tokenizer = load(name).to(device), get_tokenizer(tokenizer_of(name))
    reference = load(o.compare) if o.compare else load_reference(cfg, checkpoint)
    beta = cfg.options.get('beta', 1.0) if train.asks_for(cfg, 'reference') else 1.0
    prompt, cfg.template = o.prompt.replace('\\n', '\n'), o.template or cfg.template
    if o.response:
        ids, tokens = encode(prompt, [o.response], tokenizer, cfg)[0]
    else:
        ids = encode_prompt(prompt, tokenizer, cfg.template)
        tokens = generate(policy, [ids], o.max_new_tokens, tokenizer.ends, o.temperature,
                          seed=o.seed)[0]
    credit = token_credit(policy, reference.to(device), ids, tokens, beta)
    spans = spans_of([int(t) for t in tokens], credit, tokenizer)
    print(f'{prompt}    [implicit reward {sum(credit):+.3f}]')
    print(terminal(spans))
    title = f'{name} against {o.compare or cfg.reference_from or cfg.init_from}'
    with atomic_write(o.out) as f:
        f.write(page(title, beta, prompt, spans))
    print(f'-> {o.out}')


if __name__ == '__main__':
    run(main, __doc__)
