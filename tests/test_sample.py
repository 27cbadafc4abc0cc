"""
sample.py: generation beside loops without a cache, frequencies of draw, and the command.

    python -m pytest tests/test_sample.py

The models are random and tiny, tokens are bytes. Left out: real models, GPUs.
"""
import glob
import io
import json

import numpy as np
import pytest
import torch

import prepare
import sample
import train
from configurator import InputError
from conftest import randomise
from model import GPT, GPTConfig, pack, pieces_mask
from sample import draw, generate, plain_generate
from test_model import BLOCK, MODELS, tiny
from tokenizer import ASSISTANT, get_tokenizer, plain_chat
from weights import load, save

END = 52


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


@pytest.mark.parametrize('kind', MODELS)
def test_greedy_is_the_plain_loop(kind):
    """Up to an end, or to where the context is full."""
    model, prompts = tiny(kind), ragged(9, longest=BLOCK - 1)
    expected = [plain_generate(model, prompt, 99, {END}) for prompt in prompts]
    assert generate(model, prompts, 99, {END}, temperature=0) == expected
    assert [generate(model, [p], 99, {END}, temperature=0)[0] for p in prompts] == expected
    full = [len(p) + len(r) == BLOCK for p, r in zip(prompts, expected)]
    assert len(set(map(tuple, expected))) > 3 and any(full)     # or it would show little


@pytest.mark.parametrize('kind', MODELS)
@pytest.mark.parametrize('options', [
    dict(temperature=1.0), dict(temperature=0.6, top_k=9), dict(temperature=1.5, top_p=0.8),
    dict(temperature=1.0, top_k=20, top_p=0.9)])
def test_samples_are_the_plain_loop(kind, options):
    """Rows end one by one and leave the batch; the others keep their random numbers."""
    model, prompts = tiny(kind), ragged(16, longest=8)
    free = generate(model, prompts, 14, set(), seed=5, **options)
    ends = set(np.bincount(sum(free, [])).argsort()[-2:].tolist())       # the two commonest tokens
    responses = generate(model, prompts, 14, ends, seed=5, **options)
    assert responses == plain_samples(model, prompts, 14, ends, seed=5, **options)
    assert len(set(map(len, responses))) > 3               # they did leave one by one
    assert {r[-1] for r in responses} >= ends              # by either end


def test_common_random_numbers():
    """A row's numbers depend on the seed and its place alone: not on other rows, nor on training's
    random numbers, which stay as they were."""
    model, prompts, others = tiny(), ragged(8, longest=8), ragged(8, longest=12, seed=9)
    state = torch.get_rng_state()
    first = generate(model, prompts, 14, {7}, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    after = generate(model, others[:3] + prompts[3:], 14, {7}, seed=1)
    assert first[3:] == after[3:] and first[:3] != after[:3]
    assert generate(model, prompts, 14, {7}, seed=2) != first
    twice = generate(model, [prompts[0]] * 2, 14, {7}, seed=1)
    assert twice[0] != twice[1]


def test_logits_of_a_bf16_model_are_float32():
    """GPT-2's logits lie near -100, where bf16 has steps of a half: many tokens would be equal."""
    model, prompts = tiny(), ragged(20)
    with torch.no_grad():                                  # every logit is 100 lower
        model.ln_f.bias[0] = 100.0
        model.wte.weight[:, 0] = -1.0
        model.bfloat16()
        batch = pack([(p, [[0]]) for p in prompts])
        x = model.hidden(batch.tokens, batch.positions, pieces_mask(batch))[batch.scored]
        exact = x.double() @ model.wte.weight.double().t()                                 # (B, V)
    first = [r[0] for r in generate(model, prompts, 1, {END}, temperature=0)]
    assert first == exact.argmax(1).tolist() != exact.bfloat16().argmax(1).tolist()


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
    (1.0, 0, 1.0), (0.5, 0, 1.0), (2.0, 1, 1.0), (1.0, 4, 1.0), (1.0, 0, 0.7), (1.0, 0, 1e-6),
    (1.5, 6, 0.8), (1.0, 99, 0.999)])
def test_draw_has_the_frequencies_of_the_softmax(temperature, top_k, top_p):
    logits, n = 2 * torch.randn(1, 10, generator=torch.Generator().manual_seed(0)), 100_000
    probs = (logits[0].double() / temperature).softmax(0)
    tokens = nucleus(probs.tolist(), top_k, top_p)
    expected = torch.zeros_like(probs)
    expected[tokens] = probs[tokens] / probs[tokens].sum()
    # numbers laid out evenly from 0 to 1: every token has its share of them to within two
    drawn = draw(logits.expand(n, -1), temperature, top_k, top_p, torch.arange(n) / n)
    assert (torch.bincount(drawn, minlength=10) - n * expected).abs().max() <= 2


def test_draw_never_leaves_its_set():
    """At the ends of the interval, too, and where most probabilities round to nothing."""
    logits = 30 * torch.randn(300, 40, generator=torch.Generator().manual_seed(0))
    for u in (0.0, 1e-12, 0.5, 1 - 2**-24):
        for top_k, top_p in ((0, 1.0), (3, 1.0), (0, 0.9), (5, 0.5), (40, 0.99)):
            drawn = draw(logits, 1.0, top_k, top_p, torch.full((300,), u))
            for row, token in zip(logits.softmax(1), drawn):
                likelier = row[row > row[token]]
                assert row[token] > 0 and len(likelier) < (top_k or 40)
                assert top_p == 1 or likelier.sum() < top_p


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


def test_two_models_side_by_side_draw_with_the_same_numbers(command, capsys):
    options = '--prompt=Hello\\nyou', '--max_new_tokens=6', '--n=2'
    one, same, both = (command('a', *compare, *options)
                       for compare in ([], ['--compare=a'], ['--compare=b']))
    assert same == one * 2 and both[:2] == one             # only the distributions matter
    assert [line['model'] for line in both] == ['a', 'a', 'b', 'b']
    assert one[0]['response'] != one[1]['response'] != both[3]['response']
    printed = capsys.readouterr().out
    assert all(text in printed for text in ('\nHello\nyou\n', '[a] ', '[b] '))
    tokens = generate(load('a'), [list(b'Hello\nyou')], 6, {256}, seed=1337)[0]
    text = get_tokenizer('byte').decode(tokens).removesuffix('<|endoftext|>')
    assert one[0] == dict(model='a', prompt='Hello\nyou', response=text, tokens=len(tokens),
                          ended=256 in tokens)
    assert command('a', *options[:2], '--n=3')[:2] == one  # nor how many are asked for


def test_prompts_of_files(command, tmp_path):
    (tmp_path / 'p.txt').write_text('one\n\n two \n' + 'long ' * 50 + '\n')
    (tmp_path / 'p.jsonl').write_text('{"prompt": "one"}\n{"prompt": " two "}\n')

    def answers(file, *options):
        return command('a', f'--prompts={tmp_path}/{file}', '--max_new_tokens=2', '--temperature=0',
                       *options)
    lines = answers('p.txt')
    assert [line['prompt'] for line in lines] == ['one', ' two ', 'long ' * 50]
    assert answers('p.jsonl') == lines[:2] == answers('p.txt', '--limit=2')
    assert answers('p.txt', '--batch_size=1') == lines
    assert answers('p.jsonl', '--template=chat')[0]['prompt'] == 'one'


def test_validation_prompts_of_a_run(command):
    pairs = prepare.Pairs(*glob.glob('data/lines-*'))
    prompts = [bytes(pairs[i][0].tolist()).decode() for i in pairs.val]
    for limit in (0, 2):
        lines = command('run', '--prompts=val', f'--limit={limit}', '--max_new_tokens=3',
                        tokenizer='')
        assert [line['prompt'] for line in lines] == prompts[:limit or None]
    assert len(prompts) > 3 and all(prompt.startswith('question') for prompt in prompts)


@pytest.fixture
def seen(models, monkeypatch):
    """What the command gives to generate, one by one: (prompt, response), token ids."""
    monkeypatch.chdir(models)
    pairs = []

    def keep(model, prompts, *options):
        responses = generate(model, prompts, *options)
        pairs.extend(zip(prompts, responses))
        return responses
    monkeypatch.setattr(sample, 'generate', keep)
    return pairs


@pytest.mark.parametrize('end', ['\n', ''], ids=['empty line', 'no line'])
def test_a_chat_remembers_its_turns_and_ends_with_the_input(end, seen, monkeypatch, capsys):
    byte = get_tokenizer('byte')
    monkeypatch.setattr('sys.stdin', io.StringIO('Hi\n you \n' + end))
    sample.main(['a', '--tokenizer=byte', '--device=cpu', '--chat', '--max_new_tokens=3'])
    answer = byte.decode([t for t in seen[0][1] if t != byte.eot]).strip()
    turns = [dict(role='user', content='Hi'), dict(role='assistant', content=answer),
             dict(role='user', content='you')]
    assert [byte.decode(prompt) for prompt, _ in seen] == [
        plain_chat(turns[:1]) + ASSISTANT, plain_chat(turns) + ASSISTANT]
    assert answer in capsys.readouterr().out


def test_a_prompt_is_read_whole_where_the_answer_may_fill_the_context(seen):
    sample.main(['a', '--prompt=hello there', '--tokenizer=byte', '--device=cpu',
                 '--max_new_tokens=1000', '--temperature=0'])
    assert [prompt for prompt, _ in seen] == [list(b'hello there')]


@pytest.mark.parametrize('options, says', [
    (['--prompt=x', '--tokenizer=gpt3'], 'gpt3'), (['--prompt=x', '--tmperature=1'], 'temperature'),
    (['--prompt=x', '--temperature=-1'], 'temperature'), (['--prompt=x', '--top_p=0.0'], 'top_p'),
    (['--prompt=x', '--device=gpu'], 'gpu'), (['--prompt=x', '--compare=none'], 'none'),
    ([], '--prompts'), (['--prompt=x', '--chat'], '--chat'), (['--prompts=val'], 'val'),
    (['--prompts=none.jsonl'], 'none.jsonl'), (['--prompts=bad.txt'], 'bad.txt'),
    (['--prompts=empty.jsonl'], 'prompts'), (['--prompts=list.jsonl'], 'list.jsonl line 2'),
    (['--prompt=x', '--out=none/a'], 'none/a')])
def test_bad_options_are_one_line_and_write_nothing(options, says, models, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    files = {'out.jsonl': b'before', 'bad.txt': b'\xff' * 9, 'empty.jsonl': b'',
             'list.jsonl': b'{"prompt": "a"}\n["a"]'}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises((InputError, OSError)) as caught:   # the errors that the command prints
        sample.main([str(models / 'a'), '--tokenizer=byte', '--out=out.jsonl', '--device=cpu',
                     '--max_new_tokens=2', *options])
    message = str(caught.value)
    assert says in message and '\n' not in message and len(message) < 500
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == files
