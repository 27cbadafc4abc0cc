"""
Every command in the README runs: shortened by extra options, on small stand-ins for what must be downloaded.

    pytest tests/test_readme.py

The commands run in one process, in the README's order, in a folder of their own, as later ones need what earlier
ones made. Not run here: `pip install` and `pytest`, which .ci/run calls on a clean checkout, and `torchrun`, which
tests/test_processes.py runs.
"""
import functools
import json
import os
import random
import re
import runpy
import shlex
import sys

import pytest
import torch

import demo
import reward
import train
from model import GPT, GPTConfig

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
README = open(os.path.join(ROOT, 'README.md'), encoding='utf-8').read()
LINES = [line.split('  #')[0].strip() for block in re.findall(r'```sh\n(.*?)```', README, re.S)
         for line in block.splitlines() if line.strip()]
COMMANDS = [line for line in LINES if line.startswith('python ')]

# what shortens a command, by what it begins with: the first that fits
SHORT = {
    'python train.py config/dpo_demo.py': '--max_iters=2 --eval_interval=2',
    'python train.py config/simpo_demo.py': '--max_iters=2 --eval_interval=2',
    'python train.py config/sft_gpt2.py': '--init_from=tiny --dataset=pairs.jsonl --max_iters=2 --batch_size=4',
    'python train.py config/dpo_gpt2.py --dataset=pairs.jsonl --init_from=gpt2': '--init_from=tiny --max_iters=2 '
                                                                              '--batch_size=4',
    'python train.py config/dpo_gpt2.py': '--dataset=pairs.jsonl --max_iters=2 --batch_size=4',
    'python train.py config/simpo_gpt2.py': '--init_from=tiny --dataset=pairs.jsonl --max_iters=2 --batch_size=4 '
                                            '--max_length=512 --max_prompt_length=256',
    'python train.py config/reward_demo.py': '--max_iters=2 --eval_interval=2',
    'python train.py config/rounds_demo.py': '--max_iters=1 --eval_interval=2',
    'python sample.py out/dpo_demo --score': '',
    'python sample.py out/dpo_demo --credit': '',
    'python sample.py out/dpo_demo': '--max_new_tokens=4',
    'python sample.py out/sft_demo': '--max_new_tokens=90',      # some come to an end
    'python demo.py frontier --only': '--pairs=20 --max_iters=1 --samples=2',
    'python demo.py frontier': '--pairs=20 --max_iters=1 --samples=2 --seeds=1 --only=orpo',
    'python demo.py pairs': '--pairs=30 --max_iters=1 --samples=2 --seeds=1 --only=30',
    'python demo.py betas': '--pairs=20 --max_iters=1 --samples=2 --seeds=1 --only=4',
    'python demo.py rounds': '--pairs=20 --max_iters=1 --samples=2 --seeds=1 --only=20',
    'python demo.py sft': '--pairs=20 --max_iters=1',
    'python demo.py imdb': '--pairs=20 --max_iters=1 --samples=2 --only=sft',
    'python sample.py out/dpo_gpt2': '--max_new_tokens=4',
    'python bench.py': '--model=tiny --batch_size=2 --repeats=1 --peers=False --records=50 --prompts=2 --new_tokens=4'
                       ' --lengths=64 --steps=2 --losses=dpo --orders=own --max_length=64',
}


def test_the_other_commands_are_those_that_ci_runs():
    others = {line for line in LINES if not line.startswith(('python ', 'torchrun '))}
    assert others == {'pip install -r requirements.txt', 'pip install -r requirements-dev.txt', 'pytest'}
    with open(os.path.join(ROOT, '.ci', 'run')) as f:
        script = f.read()
    assert 'requirements-dev.txt' in script and '\npytest' in script


@pytest.fixture(scope='module')
def place(tmp_path_factory):
    """A folder with the configs, a tiny GPT-2, a few pairs, and a demo whose base model has hardly been trained."""
    folder = tmp_path_factory.mktemp('readme')
    os.symlink(os.path.join(ROOT, 'config'), folder / 'config')
    patch = pytest.MonkeyPatch()
    patch.chdir(folder)
    torch.manual_seed(0)
    GPT(GPTConfig(block_size=1024, n_layer=1, n_head=1, n_embd=8)).save_pretrained('tiny')
    rng = random.Random(0)
    with open('pairs.jsonl', 'w') as f:
        for i in range(200):
            words = [rng.choice('good bad fine poor film plot'.split()) for _ in range(6)]
            f.write(json.dumps(dict(prompt=f'{i} ' + ' '.join(words[:3]), chosen=' ' + words[3],
                                    rejected=' ' + ' '.join(words[4:]) + '!')) + '\n')
    with open('prompts.txt', 'w') as f:
        f.write('ann on iron river (war):\nbob on last song (drama):\n')
    os.mkdir('imdb')
    for kind in ('train_pos', 'train_neg', 'train_unsup', 'test_pos', 'test_neg'):
        with open(f'imdb/{kind}.jsonl', 'w') as f:
            for _ in range(20):
                text = ' '.join(f'The film was {rng.choice("good fine long red slow".split())}.' for _ in range(4))
                f.write(json.dumps(dict(text=text, label=kind.split('_')[1])) + '\n')
    train.train(train.load_config(['config/sft_demo.py', '--max_iters=40', '--eval_interval=40']))
    patch.setattr(demo, 'draw_pairs', lambda model, n, seed, world: list(small_pairs()))
    patch.setattr(reward, 'draw_round', lambda *args: list(small_pairs()))
    patch.setattr(demo, 'sample', functools.partial(few_tokens, demo.sample))
    patch.setattr(demo, 'reference_rewards', functools.partial(demo.reference_rewards, prompts=2, samples=4))
    patch.setattr(demo, 'place', functools.partial(demo.place, samples=4))
    yield folder
    patch.undo()


def small_pairs():
    for a, b in zip(demo.draw_texts(60, seed=1), demo.draw_texts(60, seed=2)):
        if a['chosen'] != b['chosen']:
            yield dict(prompt=a['prompt'], chosen=a['chosen'], rejected=b['chosen'])


def few_tokens(sample, model, prompts, seed, world=demo.FILMS):
    return [tokens[:12] for tokens in sample(model, prompts, seed, world)]


@pytest.mark.parametrize('command', COMMANDS)
def test_command(command, place, monkeypatch, capsys, request):
    if 'gpt2' in command or 'pairs.jsonl' in command or 'imdb' in command:
        request.getfixturevalue('gpt2')    # skips where GPT-2's tables are not at hand
    extra = next((more for begin, more in SHORT.items() if command.startswith(begin)), '')
    script, *args = shlex.split(command)[1:]
    monkeypatch.setattr(sys, 'argv', [script, *args, *extra.split()])
    runpy.run_path(os.path.join(ROOT, script), run_name='__main__')
    out = capsys.readouterr().out
    assert out.strip()
    if script == 'train.py' and 'config/dpo_demo.py' in command:
        assert 'share of the optimum' in out


def test_the_files_that_the_readme_counts_have_that_many_lines():
    counted = re.findall(r'^\| `(\w+\.py)` \|.*\| (\d+) \|$', README, re.M)
    assert {'prepare.py', 'model.py', 'dpo.py', 'simpo.py', 'train.py', 'sample.py'} <= {name for name, _ in counted}
    for name, lines in counted:
        with open(os.path.join(ROOT, name)) as f:
            assert abs(sum(1 for _ in f) - int(lines)) <= 10, name
