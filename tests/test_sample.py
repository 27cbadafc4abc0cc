"""
sample.py: prompts from everywhere, two models side by side, what is written.

    pytest tests/test_sample.py
"""
import io
import json
import re

import pytest
import torch

import sample
import train
from model import GPT, GPTConfig
from prepare import InputError, get_tokenizer


@pytest.fixture(scope='module')
def models(tmp_path_factory):
    """Two tiny byte-level models, and a run of one of them."""
    folder = tmp_path_factory.mktemp('models')
    for seed, name in enumerate('ab'):
        torch.manual_seed(seed)
        GPT(GPTConfig(64, 257, 1, 1, 16, 256)).save_pretrained(folder / name)
    with open(folder / 'pairs.jsonl', 'w') as f:
        for i in range(30):
            f.write(json.dumps(dict(prompt=f'question {i}', chosen=' yes', rejected=' no')) + '\n')
    train.train(train.load_config([f'--{k}={v}' for k, v in dict(
        out_dir=folder / 'run', init_from=folder / 'a', dataset=folder / 'pairs.jsonl', data_dir=folder / 'data',
        tokenizer='byte', max_length=32, max_prompt_length=16, val_fraction=0.3, batch_size=4, max_iters=1).items()]))
    return folder


def lines(path):
    return [json.loads(line) for line in open(path, encoding='utf-8')]


def test_two_models_side_by_side_on_the_same_seeds(models, tmp_path, capsys):
    out = tmp_path / 'out.jsonl'
    args = ['--tokenizer=byte', '--prompt=Hello', '--max_new_tokens=6', '--n=2', f'--out={out}']
    sample.main([str(models / 'a'), f'--compare={models / "a"}', *args])
    mine, theirs = lines(out)[:2], lines(out)[2:]
    assert [m['response'] for m in mine] == [t['response'] for t in theirs]      # the same model: the same text
    assert mine[0]['response'] != mine[1]['response'] and set(mine[0]) == {
        'model', 'prompt', 'response', 'tokens', 'ended', 'seed'}
    sample.main([str(models / 'a'), f'--compare={models / "b"}', *args])
    assert lines(out)[0]['response'] == mine[0]['response'] != lines(out)[2]['response']
    assert f'[{models / "b"}]' in capsys.readouterr().out


def test_a_runs_validation_prompts_and_its_own_file(models):
    sample.main([str(models / 'run'), '--prompts=val', '--limit=3', '--max_new_tokens=3'])
    found = lines(models / 'run' / 'completions.jsonl')
    assert len(found) == 3 and all(line['prompt'].startswith('question') for line in found)


def test_prompts_from_files_and_from_the_keyboard(models, tmp_path, monkeypatch, capsys):
    (tmp_path / 'p.txt').write_text('one\ntwo\n')
    (tmp_path / 'p.jsonl').write_text('{"prompt": "three"}\n')
    base = [str(models / 'a'), '--tokenizer=byte', '--max_new_tokens=2', '--temperature=0']
    sample.main([*base, f'--prompts={tmp_path / "p.txt"}'])
    sample.main([*base, f'--prompts={tmp_path / "p.jsonl"}', '--template=chat'])
    monkeypatch.setattr('sys.stdin', io.StringIO('four\n\nfive\n'))
    sample.main(base)
    out = capsys.readouterr().out
    assert all(word in out for word in ('one', 'two', 'Human: three\n\nAssistant:', 'four')) and 'five' not in out


def test_nothing_asked_leaves_what_was_written(models, tmp_path, monkeypatch):
    (tmp_path / 'out.jsonl').write_text('before')
    monkeypatch.setattr('sys.stdin', io.StringIO(''))
    sample.main([str(models / 'a'), '--tokenizer=byte', f'--out={tmp_path / "out.jsonl"}'])
    assert (tmp_path / 'out.jsonl').read_text() == 'before'
    monkeypatch.setattr('sys.stdin', io.StringIO('a\nb\n'))
    sample.main([str(models / 'a'), '--tokenizer=byte', '--max_new_tokens=2', f'--out={tmp_path / "out.jsonl"}'])
    assert [line['prompt'] for line in lines(tmp_path / 'out.jsonl')] == ['a', 'b']


@pytest.mark.parametrize('args, message', [
    (['--tokenizer=gpt3'], "tokenizer: 'gpt3'"), (['--prompts=val'], 'prompts: val needs a run'),
    (['--prompts=missing.txt'], 'missing.txt cannot be read'), (['--prompt='], 'prompt: is empty'),
    (['--tempreature=1'], "'temperature' is")])
def test_bad_options(models, args, message):
    with pytest.raises(InputError, match=message):
        sample.main([str(models / 'a'), *(args if 'tokenizer' in args[0] else ['--tokenizer=byte', *args])])


@pytest.mark.parametrize('content, message', [
    (b'{"prompt": 5}', "line 1: 'prompt' is of type int"), (b'["a"]', "line 1: no 'prompt'"),
    (b'{"prompt": "a"}\n{"prompt": "a\\ud800"}', "line 2.*lone surrogate|'prompt' holds a lone surrogate"),
    (b'{"prompt": ""}', "line 1: 'prompt' is empty or blank"), (b'{"prompt": "a"', 'line 1: not valid JSON'),
    (b'{"prompt": "\xff"}', 'line 1: not valid UTF-8')])
def test_bad_prompts_leave_what_was_written(models, tmp_path, content, message):
    (tmp_path / 'p.jsonl').write_bytes(content)
    (tmp_path / 'out.jsonl').write_text('before')
    with pytest.raises(InputError, match=message) as caught:
        sample.main([str(models / 'a'), '--tokenizer=byte', f'--prompts={tmp_path}/p.jsonl',
                     f'--out={tmp_path}/out.jsonl'])
    assert len(str(caught.value).splitlines()) == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ['out.jsonl', 'p.jsonl']
    assert (tmp_path / 'out.jsonl').read_text() == 'before'
    (tmp_path / 'none.jsonl').write_bytes(b'')
    with pytest.raises(InputError, match='prompts: there are none in .*none.jsonl'):
        sample.main([str(models / 'a'), '--tokenizer=byte', f'--prompts={tmp_path}/none.jsonl'])
    (tmp_path / 'p.txt').write_bytes(b'\xff' * 9999)
    with pytest.raises(InputError, match='p.txt cannot be read .UnicodeDecodeError') as caught:
        sample.main([str(models / 'a'), '--tokenizer=byte', f'--prompts={tmp_path}/p.txt'])
    assert len(str(caught.value)) < 500


# ------------------------------------------------------------------------------------------------------------
# Credit and scores


def test_credit_of_each_token_is_that_of_two_plain_passes(models):
    a, b = (GPT.from_pretrained(str(models / name)) for name in 'ab')
    prompt, response = list(b'one two'), list(b' three') + [256]
    found = sample.token_credit(a, b, prompt, response, beta=0.3)
    row = torch.tensor([prompt + response])
    for t, credit in enumerate(found):
        logps = [m(row)[0, len(prompt) + t - 1].log_softmax(-1)[response[t]].item() for m in (a, b)]
        assert credit == pytest.approx(0.3 * (logps[0] - logps[1]), abs=1e-5)
    assert len(found) == len(response)


@pytest.mark.parametrize('text', ['plain', 'caf\u00e9 \u20ac5 \U0001f600!'])
def test_credit_is_shown_by_whole_characters(text):
    tokens = get_tokenizer('byte').encode_ordinary(text)
    spans = sample.whole_characters(tokens, [1.0] * len(tokens), get_tokenizer('byte'))
    assert [c for c, _ in spans] == list(text)
    assert [n for _, n in spans] == [len(c.encode()) for c in text]


def test_bytes_that_are_no_character_lose_no_credit():
    spans = sample.whole_characters([255, 254, 65], [1.0, 2.0, 4.0], get_tokenizer('byte'))
    assert sum(c for _, c in spans) == 7.0 and ''.join(text for text, _ in spans).endswith('A')


def test_credit_on_the_terminal_and_as_a_page(models, tmp_path, capsys, monkeypatch):
    page, asked = tmp_path / 'credit.html', [f'--compare={models / "b"}', '--tokenizer=byte', '--prompt=<x>', '--credit']
    sample.main([str(models / 'a'), *asked, '--response= a<b', f'--out={page}'])
    text, said = page.read_text(), capsys.readouterr().out
    assert '<b>&lt;x&gt;</b>' in text and text.count('<span ') == 5 and '>&lt;</span>' in text     # 4 bytes, the end
    assert 'http' not in text and '<script' not in text and '<link' not in text
    total = float(said.split('implicit reward ')[1].split(']')[0])
    numbers = [float(n) for n in re.findall(r"'([+-]\d+\.\d+)", said)]
    assert sum(numbers) == pytest.approx(total, abs=5e-3) and '\x1b[' not in said
    a, b = (GPT.from_pretrained(str(models / name)) for name in 'ab')
    assert total == pytest.approx(sum(sample.token_credit(a, b, list(b'<x>'), [*b' a<b', 256], 1.0)), abs=1e-3)
    assert abs(total) > 0.01
    monkeypatch.setenv('FORCE_COLOR', '1')
    sample.main([str(models / 'a'), *asked, '--response= a<b', f'--out={page}'])
    assert capsys.readouterr().out.count('\x1b[30;48;2;') == 5


def test_a_run_knows_its_reference_and_beta(models, capsys):
    """A run of one step at a learning rate of 1e-6 hardly moved: a credit of nearly nothing, but of something."""
    sample.main([str(models / 'run'), '--credit', '--prompts=val', '--limit=2', '--max_new_tokens=4'])
    said = capsys.readouterr().out
    rewards = [float(part.split(']')[0]) for part in said.split('implicit reward ')[1:]]
    assert len(rewards) == 2 and max(map(abs, rewards)) < 1e-2
    assert (models / 'run' / 'credit.html').exists()


def test_scores_of_a_file(models, capsys):
    sample.main([str(models / 'run'), f'--score={models / "pairs.jsonl"}'])
    found = lines(models / 'run' / 'scores.jsonl')
    assert len(found) == 30 and all(len(line['rewards']) == 2 for line in found)
    assert '30 pairs' in capsys.readouterr().out


@pytest.mark.parametrize('args, message', [
    (['--credit', '--prompt=x'], 'credit: needs a reference'), (['--credit', '--response='], 'response: is empty'),
    (['--response=x', '--prompt=x'], 'response: ignored'),
    (['--score=x.jsonl', '--n=2'], 'n: ignored with score'), (['--score=x.jsonl'], 'is no run of train.py')])
def test_bad_credit_and_score(models, args, message):
    with pytest.raises(InputError, match=message):
        sample.main([str(models / 'a'), *args])


def test_credit_needs_a_prompt(models):
    with pytest.raises(InputError, match='credit: needs a prompt'):
        sample.main([str(models / 'run'), '--credit'])
