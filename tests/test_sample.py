"""
sample.py: generation beside loops without a cache, frequencies of draw, and the command.

    python -m pytest tests/test_sample.py

The models are random and tiny, tokens are bytes. Left out: real models, GPUs.
"""
import glob
import io
import json
import os

import numpy as np
import pytest
import torch

import prepare
import sample
import train
from configurator import InputError
from conftest import randomise
from model import GPT, GPTConfig, pack
from sample import draw, generate, plain_generate
from tokenizer import ASSISTANT, get_tokenizer, plain_chat
from weights import load, save

BLOCK, VOCAB, END = 24, 53, 52
ROTARY = dict(norm='rms', norm_eps=1e-6, gated=True, rope_theta=1000.0)
KINDS = {
    'gpt2': dict(),
    'grouped queries': dict(n_head=4, n_kv_head=2),
    'llama': ROTARY | dict(n_head=4, n_kv_head=1, bias='none', tied=False),
    'qwen3': ROTARY | dict(n_head=4, n_kv_head=2, head_dim=10, bias='none', qk_norm=True),
}


def build(kind='gpt2', seed=0):
    sizes = dict(block_size=BLOCK, vocab_size=VOCAB, n_layer=2, n_head=3, n_embd=24)
    return randomise(GPT(GPTConfig(**sizes | KINDS[kind])), std=0.3, seed=seed)


def ragged(n=7, longest=12, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(END, size=size).tolist() for size in rng.integers(1, longest + 1, size=n)]


def plain_samples(model, prompts, max_new_tokens, ends, temperature, top_k=0, top_p=1.0, seed=0):
    """The slow twin of sampling: no cache, no batch, the text anew for every token; and the same
    random numbers, the t-th row of which is for everyone's t-th token."""
    rng, responses = torch.Generator().manual_seed(seed), []
    uniform = torch.stack([torch.rand(len(prompts), generator=rng) for _ in range(max_new_tokens)])
    for row, prompt in enumerate(prompts):
        response = []
        while len(response) < max_new_tokens and len(prompt) + len(response) < BLOCK:
            with torch.no_grad():
                logits = model(torch.tensor([[*prompt, *response]]))[:, -1]
            number = uniform[len(response), row:row + 1]
            response.append(int(draw(logits, temperature, top_k, top_p, number)))
            if response[-1] in ends:
                break
        responses.append(response)
    return responses


# --------------------------------------------------------------------------------------------------
# generate


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('seed', [0, 1])
def test_greedy_is_the_plain_loop(kind, seed):
    model, prompts = build(kind, seed), ragged(seed=seed)
    expected = [plain_generate(model, prompt, 12, {END}) for prompt in prompts]
    assert generate(model, prompts, 12, {END}, temperature=0) == expected
    assert [generate(model, [p], 12, {END}, temperature=0)[0] for p in prompts] == expected
    assert len(set(map(tuple, expected))) > 3              # or it would show little


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('options', [
    dict(temperature=1.0), dict(temperature=0.6, top_k=9), dict(temperature=1.5, top_p=0.8),
    dict(temperature=1.0, top_k=20, top_p=0.9)])
def test_samples_are_the_plain_loop(kind, options):
    """Rows end one by one and leave the batch; the others keep their random numbers."""
    model, prompts = build(kind), ragged(16, longest=8)
    free = generate(model, prompts, 14, set(), seed=5, **options)
    ends = set(np.bincount(sum(free, [])).argsort()[-2:].tolist())       # the two commonest tokens
    responses = generate(model, prompts, 14, ends, seed=5, **options)
    assert responses == plain_samples(model, prompts, 14, ends, seed=5, **options)
    assert len(set(map(len, responses))) > 3               # they did leave one by one
    assert {r[-1] for r in responses} >= ends              # by either end


def test_rows_do_not_touch_each_other():
    model, prompts, others = build(), ragged(8, longest=8), ragged(8, longest=12, seed=9)
    before = generate(model, prompts, 14, {7}, seed=1)
    after = generate(model, others[:3] + prompts[3:], 14, {7}, seed=1)
    assert before[3:] == after[3:] and before[:3] != after[:3]


def test_seeds():
    model, prompts, state = build(), ragged(), torch.get_rng_state()
    first = generate(model, prompts, 10, {END}, seed=1)
    assert torch.equal(torch.get_rng_state(), state)       # training's random numbers are its own
    assert generate(model, prompts, 10, {END}, seed=1) == first
    assert generate(model, prompts, 10, {END}, seed=2) != first
    twice = generate(model, [prompts[0]] * 2, 10, {END}, seed=1)
    assert twice[0] != twice[1]


def test_stops_at_any_of_the_ends_and_keeps_it():
    model, prompts = build(), ragged(seed=2)
    free = generate(model, prompts, 12, set(), temperature=0)
    assert {len(r) for r in free} == {12}
    ends = {free[0][3], free[1][5]}
    for response, full in zip(generate(model, prompts, 12, ends, temperature=0), free):
        at = next((i + 1 for i, token in enumerate(full) if token in ends), 12)
        assert response == full[:at]
    assert generate(model, prompts, 1, {END}, temperature=0) == [r[:1] for r in free]


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('temperature', [0, 1.0])
def test_stops_where_the_context_ends(kind, temperature):
    """A prompt and its response fit the model, so that what was sampled can be scored."""
    model, prompts = build(kind), [[1] * n for n in (1, 5, BLOCK - 1)]
    responses = generate(model, prompts, 100, set(), temperature)
    assert [len(p) + len(r) for p, r in zip(prompts, responses)] == [BLOCK] * 3
    model.token_logps(pack([(p, [r]) for p, r in zip(prompts, responses)]))


def test_logits_of_a_bf16_model_are_float32(monkeypatch):
    """GPT-2's logits lie near -100, where bf16 has steps of a half: many tokens would be equal."""
    model, prompts, logits = build(), ragged(), []
    with torch.no_grad():                                  # every logit is 100 lower
        model.ln_f.bias[0] = 100.0
        model.wte.weight[:, 0] = -1.0
    model.bfloat16()

    def draw_and_keep(x, *options):
        logits.append(x)
        return draw(x, *options)
    monkeypatch.setattr(sample, 'draw', draw_and_keep)
    responses = generate(model, prompts, 6, {END}, temperature=0)
    batch = pack([(p, [[0]]) for p in prompts])
    with torch.no_grad():
        x = model.hidden(batch.tokens, batch.positions, sample.pieces_mask(batch))[batch.scored]
        exact = x.double() @ model.wte.weight.double().t()                                 # (B, V)
    assert logits[0].dtype == torch.float32 and exact.mean() < -50
    assert (logits[0] - exact).abs().max() < 1e-3 < 0.1 < (exact.bfloat16() - exact).abs().max()
    assert [r[0] for r in responses] == exact.argmax(1).tolist()
    assert {len(r) for r in responses} <= set(range(1, 7))


# --------------------------------------------------------------------------------------------------
# draw: one token from each row of (B, V) logits


def noise(B=1, V=10, std=2.0):
    return std * torch.randn(B, V, generator=torch.Generator().manual_seed(0))


def test_draw_of_one_likeliest_token_is_greedy():
    logits, uniform = noise(200, 50), torch.rand(200, generator=torch.Generator().manual_seed(1))
    for temperature, top_k, top_p in ((0, 0, 1.0), (0, 5, 0.5), (2.0, 1, 1.0), (3.0, 0, 1e-6),
                                      (1e-3, 0, 1.0)):
        tokens = draw(logits, temperature, top_k, top_p, uniform)
        assert torch.equal(tokens, logits.argmax(1)), (temperature, top_k, top_p)


def nucleus(probs, top_k, top_p):
    """The plain meaning of top_k and top_p, token by token: the likeliest top_k, and of these the
    fewest that together have top_p of what they all have."""
    order = sorted(range(len(probs)), key=lambda i: -probs[i])[:top_k or len(probs)]
    total, covered, tokens = sum(probs[i] for i in order), 0.0, []
    for i in order:
        if covered < top_p * total:
            tokens.append(i)
            covered += probs[i]
    return tokens


@pytest.mark.parametrize('temperature, top_k, top_p', [
    (1.0, 0, 1.0), (0.5, 0, 1.0), (2.0, 0, 1.0), (1.0, 4, 1.0), (1.0, 0, 0.7), (1.5, 6, 0.8),
    (1.0, 10, 1.0), (1.0, 99, 0.999)])
def test_draw_has_the_frequencies_of_the_softmax(temperature, top_k, top_p):
    logits, n = noise(), 100_000
    probs = (logits[0].double() / temperature).softmax(0)
    tokens = nucleus(probs.tolist(), top_k, top_p)
    expected = torch.zeros_like(probs)
    expected[tokens] = probs[tokens] / probs[tokens].sum()

    def counts(uniform):
        drawn = draw(logits.expand(n, -1), temperature, top_k, top_p, uniform)
        return torch.bincount(drawn, minlength=10).double()

    # numbers laid out evenly from 0 to 1: every token has its share of them to within two
    assert (counts(torch.arange(n) / n) - n * expected).abs().max() <= 2
    # numbers at random: chi-square of 9 degrees of freedom is below 33.7 in 9,999 of 10,000 cases
    count, there = counts(torch.rand(n, generator=torch.Generator().manual_seed(0))), expected > 0
    assert count[~there].sum() == 0
    assert ((count - n * expected)[there].square() / (n * expected)[there]).sum() < 33.7


def test_draw_never_leaves_its_set():
    """At the ends of the interval, too, and where most probabilities round to nothing."""
    logits = noise(300, 40, std=30.0)
    for u in (0.0, 1e-12, 0.5, 1 - 2**-24):
        for top_k, top_p in ((0, 1.0), (3, 1.0), (0, 0.9), (5, 0.5), (40, 0.99)):
            drawn = draw(logits, 1.0, top_k, top_p, torch.full((300,), u))
            for row, token in zip(logits.softmax(1), drawn):
                likelier = row[row > row[token]]
                assert row[token] > 0 and len(likelier) < (top_k or 40)
                assert top_p == 1 or likelier.sum() < top_p


# --------------------------------------------------------------------------------------------------
# The command


CONFIG = """
dataset, data_dir, out_dir, init_from = 'lines.jsonl', 'data', 'run', 'a'
tokenizer, max_length, max_prompt_length, val_fraction = 'byte', 32, 16, 0.3
batch_size, max_iters, device = 4, 1, 'cpu'

def convert(record):
    return dict(prompt=record['text'], chosen=' yes', rejected=' no')
"""


@pytest.fixture(scope='module')
def models(tmp_path_factory):
    """Models a and b, and a run: one step from a, on records that its config file converts."""
    folder = tmp_path_factory.mktemp('models')
    for seed, name in enumerate('ab'):
        config = GPTConfig(block_size=64, vocab_size=257, n_layer=1, n_head=2, n_embd=16)
        save(randomise(GPT(config), seed=seed), str(folder / name))
    (folder / 'config.py').write_text(CONFIG)
    (folder / 'lines.jsonl').write_text(
        ''.join(json.dumps(dict(text=f'question {i}')) + '\n' for i in range(30)))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        train.main(['config.py'])
    return folder


@pytest.fixture
def command(models, tmp_path, monkeypatch):
    """command('a', '--name=value', ...) -> the lines of --out."""
    monkeypatch.chdir(models)

    def command(name, *options, tokenizer='byte'):
        out = f'--out={tmp_path}/out.jsonl'
        sample.main([name, f'--tokenizer={tokenizer}', '--device=cpu', out, *options])
        return [json.loads(line) for line in open(tmp_path / 'out.jsonl', encoding='utf-8')]
    return command


def test_two_models_side_by_side_with_the_same_random_numbers(command, capsys):
    options = '--prompt=Hello\\nyou', '--max_new_tokens=6', '--n=2'
    one = command('a', *options)
    assert capsys.readouterr().out.startswith('\nHello\nyou\n  ')
    same, both = command('a', '--compare=a', *options), command('a', '--compare=b', *options)
    assert same == one * 2 and both[:2] == one             # only the distributions matter
    assert [line['model'] for line in both] == ['a', 'a', 'b', 'b']
    assert one[0]['response'] != one[1]['response'] != both[3]['response']
    assert '[a] ' in (printed := capsys.readouterr().out) and '[b] ' in printed
    tokens = generate(load('a'), [list(b'Hello\nyou')], 6, {256}, seed=1337)[0]
    text = get_tokenizer('byte').decode(tokens).removesuffix('<|endoftext|>')
    assert one[0] == dict(model='a', prompt='Hello\nyou', response=text, tokens=len(tokens),
                          ended=256 in tokens)
    assert command('a', *options[:2], '--n=3')[:2] == one  # nor how many are asked for


def test_prompts_of_files(command, tmp_path):
    (tmp_path / 'p.txt').write_text('one\n\n two \n' + 'long ' * 50 + '\n')
    (tmp_path / 'p.jsonl').write_text('{"prompt": "one"}\n{"prompt": " two "}\n')
    short = '--max_new_tokens=2', '--temperature=0'
    lines = command('a', f'--prompts={tmp_path}/p.txt', *short)
    assert [line['prompt'] for line in lines] == ['one', ' two ', 'long ' * 50]
    assert command('a', f'--prompts={tmp_path}/p.jsonl', *short) == lines[:2]
    assert command('a', f'--prompts={tmp_path}/p.txt', *short, '--batch_size=1') == lines
    assert command('a', f'--prompts={tmp_path}/p.txt', *short, '--limit=1') == lines[:1]
    chats = command('a', f'--prompts={tmp_path}/p.jsonl', *short, '--template=chat')
    assert chats[0]['prompt'] == '\n\nHuman: one\n\nAssistant:'


def test_validation_prompts_of_a_run(command):
    pairs = prepare.Pairs(*glob.glob('data/lines-*'))
    prompts = [bytes(pairs[i][0].tolist()).decode() for i in pairs.val]
    lines = command('run', '--prompts=val', '--limit=0', '--max_new_tokens=3', tokenizer='')
    assert [line['prompt'] for line in lines] == prompts and len(prompts) > 3
    assert all(line['prompt'].startswith('question') for line in lines)
    assert len(command('run', '--prompts=val', '--limit=2', '--max_new_tokens=1')) == 2


def test_a_chat_remembers_its_turns_and_ends_with_the_input(models, monkeypatch, capsys):
    monkeypatch.chdir(models)
    prompts, answers = [], []

    def keep(model, ids, *options):
        prompts.append(get_tokenizer('byte').decode(ids[0]))
        answers.append(generate(model, ids, *options)[0])
        return answers[-1:]
    monkeypatch.setattr(sample, 'generate', keep)
    for end in ('\n', ''):                                 # an empty line, or no line at all
        prompts.clear()
        monkeypatch.setattr('sys.stdin', io.StringIO('Hi\n you \n' + end))
        sample.main(['a', '--tokenizer=byte', '--device=cpu', '--chat', '--max_new_tokens=3'])
        first, _ = sample.text_and_end(answers[-2], get_tokenizer('byte'))
        turns = [dict(role='user', content='Hi'), dict(role='assistant', content=first.strip()),
                 dict(role='user', content='you')]
        assert prompts == [plain_chat(turns[:1]) + ASSISTANT, plain_chat(turns) + ASSISTANT]
        assert first.strip() in capsys.readouterr().out


@pytest.mark.parametrize('options, says', [
    (['--prompt=x', '--tokenizer=gpt3'], "tokenizer: 'gpt3'"),
    (['--prompt=x', '--tempreature=1'], "did you mean 'temperature'?"),
    (['--prompt=x', '--temperature=-1'], 'temperature: -1.0'),
    (['--prompt=x', '--top_p=0.0'], 'top_p: 0.0'), (['--prompt=x', '--top_k=-1'], 'top_k: -1'),
    (['--prompt=x', '--n=0'], 'n: 0'), (['--prompt=x', '--device=gpu'], 'gpu'),
    (['--prompt=x', '--compare=none'], 'none: no such'), (['--prompt=x', '--compare=.'], '.: no m'),
    ([], 'give one of --prompt, --prompts and --chat'), (['--prompt=x', '--chat'], 'give one of'),
    (['--prompts=val'], "prompts: 'val' needs a run"), (['--prompts=none.jsonl'], 'none.jsonl: no'),
    (['--prompts=none.txt'], 'none.txt'), (['--prompts=bad.txt'], 'bad.txt'),
    (['--prompts=empty.jsonl'], 'prompts: there are none'),
    (['--prompts=list.jsonl'], "list.jsonl line 2: no 'prompt'"),
    (['--prompts=number.jsonl'], "number.jsonl line 1: 'prompt' is of type int"),
    (['--prompts=cut.jsonl'], 'cut.jsonl line 1: not valid JSON'),
    (['--prompts=half.jsonl'], 'half.jsonl line 1: '),
    (['--prompt=x', '--out=none/out'], 'none/out')])
def test_bad_options_are_one_line_and_write_nothing(options, says, models, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for name, content in {
            'out.jsonl': b'before', 'bad.txt': b'\xff' * 9, 'empty.jsonl': b'',
            'list.jsonl': b'{"prompt": "a"}\n["a"]', 'number.jsonl': b'{"prompt": 5}',
            'cut.jsonl': b'{"prompt": "a"', 'half.jsonl': b'{"prompt": "a\\ud800"}'}.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises((InputError, OSError)) as caught:   # the errors that the command prints
        sample.main([str(models / 'a'), '--tokenizer=byte', '--out=out.jsonl', '--device=cpu',
                     '--max_new_tokens=2', *options])
    message = str(caught.value)
    assert says in message and '\n' not in message and len(message) < 500
    assert (tmp_path / 'out.jsonl').read_text() == 'before' and len(os.listdir(tmp_path)) == 7


def test_a_prompt_is_read_whole_where_the_answer_may_fill_the_context(models, monkeypatch, capsys):
    """max_new_tokens as large as the context takes nothing from the prompt."""
    monkeypatch.chdir(models)
    prompts = []

    def keep(model, ids, *options):
        prompts.extend(ids)
        return generate(model, ids, *options)
    monkeypatch.setattr(sample, 'generate', keep)
    sample.main(['a', '--prompt=hello there', '--tokenizer=byte', '--device=cpu',
                 '--max_new_tokens=1000', '--temperature=0'])
    assert prompts == [list(b'hello there')]
