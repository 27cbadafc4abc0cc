"""
sample.py: prompts from everywhere, two models side by side, what is written.

    pytest tests/test_sample.py
"""
import io
import json

import pytest
import torch

import sample
import train
from model import GPT, GPTConfig
from prepare import InputError


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
    found = lines(models / 'run' / 'samples.jsonl')
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


@pytest.mark.parametrize('args, message', [
    (['--tokenizer=gpt3'], "tokenizer: 'gpt3'"), (['--prompts=val'], 'prompts: val needs a run'),
    (['--prompts=missing.txt'], 'missing.txt cannot be read'), (['--tempreature=1'], "'temperature' is")])
def test_bad_options(models, args, message):
    with pytest.raises(InputError, match=message):
        sample.main([str(models / 'a'), *(args if 'tokenizer' in args[0] else ['--tokenizer=byte', *args])])
